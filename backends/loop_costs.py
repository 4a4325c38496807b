"""What a generated loop nest moves and computes: bytes from its buffers and domains, operations from its blocks."""

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
    buffers = [parameter for parameter in function.params if hasattr(parameter, "shape")]
    dtype = str(buffers[0].dtype) if buffers else ""
    sizes = [_product(buffer.shape) for buffer in buffers]
    if any(size is None for size in sizes):
        return LoopCost(None, None, dtype)
    moved = 0
    touched = _touched(function)
    for buffer, size in zip(buffers, sizes, strict=True):
        # A block is one element of what it writes: it reads of each buffer no more than it has iterations.
        reach = sum(domain for source, domain in touched if source.same_as(buffer))
        moved += min(int(size or 0), reach or int(size or 0)) * tvm.DataType(str(buffer.dtype)).itemsize
    flops = None
    with contextlib.suppress(*TVM_ERRORS):
        flops = int(estimate_tir_flops(tvm.IRModule({"main": function})))
    return LoopCost(moved, flops, dtype)


def _touched(function: tvm.tirx.PrimFunc) -> list[tuple[Any, int]]:
    """Buffers that blocks read or write, with the block's iterations; nothing of a block that has none."""
    found: list[tuple[Any, int]] = []

    def visit(block: Any) -> None:
        domain = _product([variable.dom.extent for variable in block.iter_vars])
        if block.iter_vars and domain is not None:
            found.extend((region.source, domain) for region in [*block.reads, *block.writes])

    tvm_ffi.structural_walk(function.body, [(s_tir.SBlock, visit)], order="post")
    return found


def _product(extents: Any) -> int | None:
    numbers = [getattr(extent, "value", extent) for extent in extents]
    return prod(numbers) if all(isinstance(number, int) for number in numbers) else None
