"""Load TVM's tensor-core intrinsics in seconds.

They are parsed from Python source at import, and the parser walks the call stack with `inspect.stack`, which looks
through all loaded modules for each frame: minutes in a process that has loaded a library of thousands of modules.
"""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, ModuleType
from typing import Any

_MODULE = "tvm.s_tir.tensor_intrin.cuda"


def load() -> None:
    """Register the intrinsics, once in a process."""
    if _MODULE not in sys.modules:
        with _frames_name_their_modules():
            importlib.import_module(_MODULE)


@contextmanager
def _frames_name_their_modules() -> Iterator[None]:
    """Let `inspect` find a frame's module by the name in its globals instead of by a search."""
    search = inspect.getmodule

    def by_name(object: Any, filename: str | None = None) -> ModuleType | None:
        if isinstance(object, FrameType):
            return sys.modules.get(object.f_globals.get("__name__", ""))
        return search(object, filename)

    inspect.getmodule = by_name  # type: ignore[assignment]
    try:
        yield
    finally:
        inspect.getmodule = search
