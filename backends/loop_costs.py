"""What a generated loop nest moves and computes: bytes from its buffers and iteration domains, operations from its blocks."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from math import prod
from typing import Any

import tvm
import tvm_ffi
from tvm import s_tir
from tvm.s_tir.analysis import estimate_tir_flops

from rescompile.backends.kernels.emit import TVM_ERRORS


@dataclass(frozen=True)
class LoopCost:
    """Bytes of the parameters that one call touches, its floating point operations, the type of its first parameter.

    None where an extent is known at run time only.
    """

    bytes: int | None
    flops: int | None
    dtype: str


def cost_of(function: tvm.tirx.PrimFunc) -> LoopCost:
    """The cost of one call. Of a buffer that it looks up in, no more elements count than the lookup has results."""
    buffers = [function.buffer_map[parameter] for parameter in function.params if parameter in function.buffer_map]
    dtype = str(buffers[0].dtype) if buffers else ""
    sizes = [_product(buffer.shape) for buffer in buffers]
    if any(size is None for size in sizes):
        return LoopCost(None, None, dtype)
    touched = _touched(function)
    moved = 0
    for buffer, size in zip(buffers, sizes, strict=True):
        elements = min(int(size or 0), touched.get(buffer.data, int(size or 0)))
        moved += elements * tvm.DataType(str(buffer.dtype)).itemsize
    flops = None
    with contextlib.suppress(*TVM_ERRORS):
        flops = int(estimate_tir_flops(tvm.IRModule({"main": function})))
    return LoopCost(moved, flops, dtype)


def _touched(function: tvm.tirx.PrimFunc) -> dict[Any, int]:
    """By a buffer's pointer, elements that blocks read or write of it, at most one in each of their iterations."""
    found: dict[Any, int] = {}

    def visit(block: Any) -> None:
        domain = _product([variable.dom.extent for variable in block.iter_vars])
        if not block.iter_vars or domain is None:
            return
        for region in [*block.reads, *block.writes]:
            within = _product([part.extent for part in region.region])
            data = region.buffer.data
            if within is None:
                within = 1
            found[data] = found.get(data, 0) + domain * within

    tvm_ffi.structural_walk(function.body, [(s_tir.SBlock, visit)], order="post")
    return found


def _product(extents: Any) -> int | None:
    numbers = [getattr(extent, "value", extent) for extent in extents]
    return prod(numbers) if all(isinstance(number, int) for number in numbers) else None
