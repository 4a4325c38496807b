"""What torch.onnx.export makes anew on each call and is the same each time: its tables, kept for the process.

On each call it reads the sources of 500 functions and asks for every registered operator, which takes three times as
long as exporting a model of a test does.
"""

from __future__ import annotations

import functools
from typing import Any


def keep_export_tables() -> None:
    """Let exports share their tables; without effect where this version of torch has none of that name."""
    try:
        import torch
        from torch._export import utils
        from torch.onnx._internal.exporter import _registration

        registry: Any = _registration.ONNXRegistry
        build, default = registry.from_torchlib.__func__, _registration._constants.TORCHLIB_OPSET
        materialise = utils._materialize_cpp_cia_ops
        registered = torch._C._dispatch_get_registrations_for_dispatch_key
    except (ImportError, AttributeError):
        return
    made = functools.cache(build)
    known: set[int] = set()

    def from_torchlib(cls: Any, opset_version: int = default) -> Any:
        table, copy = made(cls, opset_version), cls()
        copy._opset_version = table._opset_version
        copy.functions = {target: list(found) for target, found in table.functions.items()}
        return copy

    def materialise_once() -> None:
        count = len(registered("CompositeImplicitAutograd"))
        if count not in known:
            materialise()
            known.add(count)

    registry.from_torchlib = classmethod(from_torchlib)
    utils._materialize_cpp_cia_ops = materialise_once
