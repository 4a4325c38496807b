"""What a compiled program is made of: one entry for each kernel and each generated function."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

import tvm
from tvm import relax

from rescompile.backends.dense_buffers import Shared
from rescompile.backends.kernels import Argument, Choice, Spec, Tile
from rescompile.backends.loop_costs import cost_of

_BYTES = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2, "int64": 8, "int32": 4, "bool": 1}


@dataclass
class Region:
    """What one function of a program computes, and how that was decided.

    Attributes:
        kernel: conv, linear, attention, norm, softmax, pool, globalmean, layout; region and rows of fused regions;
            "generated" for loop nests of TVM's; "in place" for a concatenation written part by part, "written
            out" for a fused region without a kernel of its own, "copied" for a concatenation: no functions, but a why.
        ops: operations of the graph that call it.
        tried: tile and microseconds of each candidate that was timed; none where the choice was remembered.
        microseconds: of one call of the chosen tile on cold weights; None where nothing was timed.
        chosen: how a GPU's candidate was chosen: timed, remembered, recorded elsewhere, or first in order.
        flops: floating point operations of one call; None where the row count is dynamic.
        bytes: of all buffers of one call; of a concatenation in place those that are not moved.
        dtype: of what it reads.
        why: what there is to say of it.
    """

    name: str
    kernel: str
    ops: list[str] = field(default_factory=list)
    calls: int = 0
    spec: str = ""
    tile: str = ""
    tried: list[dict[str, Any]] = field(default_factory=list)
    microseconds: float | None = None
    flops: int | None = None
    bytes: int | None = None
    chosen: str = ""
    dtype: str = ""
    why: str = ""

    @staticmethod
    def of_kernel(
        name: str, family: str, spec: Spec, tile: Tile, choice: Choice | None, buffers: Sequence[Argument]
    ) -> Region:
        """The entry of a kernel, not called yet."""
        dynamic = getattr(spec, "rows", 1) is None
        return Region(
            name,
            family,
            spec=str(spec),
            tile=str(tile),
            tried=[
                {"tile": str(other), "microseconds": round(seconds * 1e6, 1)}
                for other, seconds in (choice.tried if choice is not None else ())
            ],
            microseconds=round(choice.seconds * 1e6, 1) if choice is not None and choice.seconds else None,
            flops=None if dynamic else getattr(spec, "flops", None),
            bytes=None if dynamic else bytes_of(buffers),
            dtype=spec.dtype,
        )


def bytes_of(buffers: Sequence[Argument]) -> int:
    """Bytes of all buffers of a kernel."""
    return sum(prod(extent or 1 for extent in buffer.shape) * _BYTES.get(buffer.dtype, 4) for buffer in buffers)


def generated(module: tvm.IRModule, known: dict[str, Region]) -> list[Region]:
    """Entries for the functions of a finished module that are no kernels, in the order in which they are called."""
    found: dict[str, Region] = {}

    def visit(expr: Any) -> None:
        if isinstance(expr, relax.Call) and isinstance(expr.op, tvm.ir.Op) and expr.op.name == "relax.call_tir":
            name = str(expr.args[0].name_hint)
            if name not in known:
                if name not in found:
                    cost = cost_of(module[expr.args[0]])
                    found[name] = Region(name, "generated", bytes=cost.bytes, flops=cost.flops, dtype=cost.dtype)
                found[name].calls += 1

    relax.analysis.post_order_visit(module["main"], visit)
    return list(found.values())


def written_out(reasons: Mapping[str, str]) -> list[Region]:
    """Entries for the fused regions that have no kernel of their own, by name."""
    return [Region(name, "written out", [name], why=why) for name, why in reasons.items()]


def concatenations(shared: Shared) -> list[Region]:
    """Entries for the concatenations that are written in place, and for those that are not."""
    found = []
    for name, join in shared.joins.items():
        copied = "".join(f"; copied: {why}" for why in join.copied.values())
        why = f"written in place, {join.saved:,} bytes are not moved{copied}"
        found.append(Region(name, "in place", [name], bytes=join.saved, why=why))
    return found + [Region(name, "copied", [name], why=why) for name, why in shared.refused.items()]
