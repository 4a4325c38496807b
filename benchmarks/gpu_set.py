"""Reads a compiled set (see gpu_pack) on a machine that has torch and TVM's runtime, not TVM."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rescompile.backends import tvm_runtime
from rescompile.backends.cuda.libraries import LibraryCall
from rescompile.errors import RescompileError

SCHEMA = 1
INDEX = "set.json"
SITE = "site"


@dataclass(frozen=True)
class Buffer:
    """One buffer of a region."""

    name: str
    shape: tuple[int | None, ...]
    dtype: str
    output: bool


@dataclass(frozen=True)
class Region:
    """One region with everything that computes it."""

    folder: Path
    data: dict[str, Any]

    @property
    def name(self) -> str:
        """group/shape/dtype"""
        return str(self.data["name"])

    @property
    def buffers(self) -> list[Buffer]:
        """Inputs, then outputs."""
        return [Buffer(**{**part, "shape": tuple(part["shape"])}) for part in self.data["arguments"]]

    def kernels(self) -> list[tuple[str, Callable[..., object] | None]]:
        """Our own candidates, loaded; None for one that cannot be."""
        found: list[tuple[str, Callable[..., object] | None]] = []
        for candidate in self.data["candidates"]:
            found.append((candidate["label"], Loaded.of(self.folder / candidate["library"], candidate["function"])))
        return found

    def libraries(self, as_torch: Callable[[Any], Any] | None = None) -> list[tuple[str, Callable[..., object]]]:
        """The libraries' candidates."""
        return [(call["label"], LibraryCall.parse(call["text"]).function(as_torch)) for call in self.data["libraries"]]

    def alone(self) -> LibraryCall | None:
        """The library's plain contraction of the same shape: what ours is to come close to, epilogue included."""
        text = self.data["alone"]
        return None if text is None else LibraryCall.parse(text)


@dataclass(frozen=True)
class Set:
    """A folder with compiled regions and models."""

    folder: Path
    arch: str
    kernels: str
    versions: dict[str, str]
    regions: list[Region]
    models: list[dict[str, Any]]

    @staticmethod
    def open(folder: Path) -> Set:
        """RescompileError where there is none, or one of another form."""
        try:
            data = json.loads((folder / INDEX).read_text(encoding="utf-8"))
            if data["schema"] != SCHEMA:
                raise ValueError(f"schema {data['schema']}")
            regions = [Region(folder, region) for region in data["regions"]]
            return Set(folder, data["arch"], data["kernels"], data["versions"], regions, data["models"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise RescompileError(
                f"'{folder}' holds no compiled set ({error}): make one with python -m benchmarks.gpu_pack."
            ) from error


def load_runtime(folder: Path) -> None:
    """TVM's runtime: the installed one, or the one in the set. RescompileError where neither can be loaded."""
    site = folder / SITE
    if site.is_dir() and str(site) not in sys.path:
        sys.path.append(str(site))
    why = tvm_runtime.load_cuda()
    if why:
        raise RescompileError(f"TVM's runtime for NVIDIA GPUs cannot be loaded: {why}.")


class Loaded:
    """A kernel with the library that it would die with."""

    _libraries: dict[Path, Any] = {}

    def __init__(self, library: Any, function: Any) -> None:
        self.library, self.function = library, function

    @classmethod
    def of(cls, path: Path, name: str) -> Loaded | None:
        """A function of a library; None where it cannot be loaded."""
        import tvm_ffi

        try:
            if path not in cls._libraries:
                cls._libraries[path] = tvm_ffi.load_module(str(path))
            library = cls._libraries[path]
            return cls(library, library.get_function(name))
        except (RuntimeError, OSError, AttributeError, ValueError):
            return None

    def __call__(self, *buffers: Any) -> object:
        return self.function(*buffers)
