"""CUDA kernels of residual add + LayerNorm or RMSNorm, with both outputs, and of the norms alone.

    s = x + residual;  y = (s − mean(s)) / sqrt(var(s) + eps) · weight + bias      (layer)
    s = x + residual;  y = s / sqrt(mean(s²) + eps) · weight                       (rms)

The sum is rounded to the buffers' type, as the graph's own add rounds it, and that is what is normalised. Statistics
are in float32 and take two passes over registers (the variance is of the centred values), which cost no traffic.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import tvm
from tvm.tirx.script.builder import ir as T

from rescompile.backends.cuda.rows import (
    DTYPES,
    WIDEST,
    Expr,
    Row,
    const,
    local,
    named,
    row_function,
    row_tile,
    store,
    unrolled,
    wide,
)
from rescompile.backends.kernels import Argument, NormSpec


def takes(spec: NormSpec) -> bool:
    """Whether there is a kernel for the spec."""
    return spec.dtype in DTYPES and spec.width <= WIDEST


def arguments(spec: NormSpec) -> list[Argument]:
    """x (rows, width), [residual (rows, width)], [weight (width)], [bias (width)], y, [sum]."""
    matrix = (spec.rows, spec.width)
    return [
        Argument("x", matrix, spec.dtype),
        *([Argument("residual", matrix, spec.dtype)] if spec.residual else []),
        *([Argument("weight", (spec.width,), spec.dtype)] if spec.weight else []),
        *([Argument("bias", (spec.width,), spec.dtype)] if spec.bias else []),
        Argument("y", matrix, spec.dtype, output=True),
        *([Argument("sum", matrix, spec.dtype, output=True)] if spec.sum_output else []),
    ]


def prim_func(spec: NormSpec, name: str) -> tvm.tirx.PrimFunc:
    """The kernel, its threads bound; a row count of None is read from the buffers' shape at run time."""
    tile = row_tile(spec.width, spec.dtype)
    return row_function(name, arguments(spec), spec.rows, tile, lambda row: _emit(spec, row))


def _emit(spec: NormSpec, row: Row) -> None:
    vector = row.tile.vector
    held = local(row.elements, spec.dtype)
    staged = local(row.elements if spec.residual else vector, spec.dtype)
    row.each(lambda chunk: row.read("x", held, chunk, chunk))
    if spec.residual:
        # All loads first: they are in flight together.
        row.each(lambda chunk: row.read("residual", staged, chunk, chunk))

        def add(i: Expr) -> None:
            store(held, (wide(held[i]) + wide(staged[i])).astype(spec.dtype), i)

        unrolled(row.elements, add)
        if spec.sum_output:
            row.each(lambda chunk: row.write("sum", held, chunk, chunk))
    inverse = const(1.0 / spec.width)
    mean = named(row.reduce(lambda i: wide(held[i]))[0] * inverse) if spec.kind == "layer" else None

    def centred(i: Expr) -> Expr:
        return wide(held[i]) if mean is None else wide(held[i]) - mean[0]

    power = row.reduce(lambda i: centred(i) * centred(i))
    scale = named(T.rsqrt(power[0] * inverse + const(spec.eps)))
    names = [name for name in ("weight", "bias") if name in row.buffers]
    affine: dict[str, Any] = {name: local(vector, spec.dtype) for name in names}
    row.each(lambda chunk: _norm(spec, row, centred, scale, staged, affine, chunk))


def _norm(
    spec: NormSpec,
    row: Row,
    centred: Callable[[Expr], Expr],
    scale: Expr,
    staged: Expr,
    affine: dict[str, Expr],
    chunk: int,
) -> None:
    """y of one chunk."""
    for name, part in affine.items():
        row.read(name, part, 0, chunk)

    def norm(i: Expr) -> None:
        value = centred(chunk * row.tile.vector + i) * scale[0]
        if "weight" in affine:
            value = value * wide(affine["weight"][i])
        if "bias" in affine:
            value = value + wide(affine["bias"][i])
        store(staged, value.astype(spec.dtype), i)

    unrolled(row.tile.vector, norm)
    row.write("y", staged, 0, chunk)
