"""LayerNorm and RMSNorm over rows, with the residual add before them and the sum as a second output."""

from __future__ import annotations

import tvm

from rescompile.backends.kernels.emit import Expr, Flat, const, each, let, prim_func, sqrt
from rescompile.backends.kernels.machine import Machine
from rescompile.backends.kernels.rows import each_row, reduce_row, row_tile
from rescompile.backends.kernels.specs import Argument, NormSpec, compute_dtype
from rescompile.backends.kernels.tiles import Tile


def arguments(spec: NormSpec, tile: Tile | None = None) -> list[Argument]:
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


def candidates(spec: NormSpec, machine: Machine) -> list[Tile]:
    """One."""
    return [row_tile(spec.rows, spec.width, machine, spec.dtype)]


def build(spec: NormSpec, tile: Tile, name: str) -> tvm.tirx.PrimFunc:
    """The kernel."""
    compute = compute_dtype(spec.dtype)
    names = [argument.name for argument in arguments(spec)]

    def body(*given: Expr) -> None:
        buffers: dict[str, Flat] = dict(zip(names, given, strict=False))
        rows = given[len(names)] if spec.rows is None else spec.rows
        with each_row(rows, tile) as row:
            _emit_row(spec, tile, buffers, let(row * spec.width), compute)

    return prim_func(name, arguments(spec), body)


def _emit_row(spec: NormSpec, tile: Tile, buffers: dict[str, Flat], start: Expr, compute: str) -> None:
    x, y = buffers["x"], buffers["y"]
    residual, total = buffers.get("residual"), buffers.get("sum")
    weight, bias = buffers.get("weight"), buffers.get("bias")
    count, lanes = spec.width, tile.lanes
    inverse = const(1.0 / count, compute)

    def added(i: Expr) -> Expr:
        return x[start + i] if residual is None else x[start + i] + residual[start + i]

    def value(i: Expr) -> Expr:
        return added(i) if total is None else total[start + i]

    if total is not None:
        each(count, lambda i: total.store(start + i, added(i)), lanes)
    if spec.kind == "layer":
        mean = let(reduce_row(count, lanes, compute, value) * inverse)
        square = reduce_row(count, lanes, compute, lambda i: (value(i) - mean) * (value(i) - mean))
    else:
        mean = None
        square = reduce_row(count, lanes, compute, lambda i: value(i) * value(i))
    scale = let(const(1.0, compute) / sqrt(square * inverse + const(spec.eps, compute)))

    def normed(i: Expr) -> None:
        result = (value(i) if mean is None else value(i) - mean) * scale
        if weight is not None:
            result = result * weight[i]
        if bias is not None:
            result = result + bias[i]
        y.store(start + i, result)

    each(count, normed, lanes)
