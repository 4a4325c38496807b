"""Softmax and log-softmax over rows."""

from __future__ import annotations

import tvm

from rescompile.backends.kernels.activations import exp
from rescompile.backends.kernels.emit import Expr, Flat, const, each, let, log, prim_func, scratch
from rescompile.backends.kernels.machine import Machine
from rescompile.backends.kernels.rows import each_row, reduce_row, row_maximum, row_tile
from rescompile.backends.kernels.specs import Argument, SoftmaxSpec, compute_dtype
from rescompile.backends.kernels.tiles import Tile


def arguments(spec: SoftmaxSpec, tile: Tile | None = None) -> list[Argument]:
    """x, y (rows, width)."""
    matrix = (spec.rows, spec.width)
    return [Argument("x", matrix, spec.dtype), Argument("y", matrix, spec.dtype, output=True)]


def candidates(spec: SoftmaxSpec, machine: Machine) -> list[Tile]:
    """One."""
    return [row_tile(spec.rows, spec.width, machine, spec.dtype)]


def build(spec: SoftmaxSpec, tile: Tile, name: str) -> tvm.tirx.PrimFunc:
    """The kernel."""
    compute, count, lanes = compute_dtype(spec.dtype), spec.width, tile.lanes

    def body(x: Flat, y: Flat, *dynamic: Expr) -> None:
        with each_row(dynamic[0] if dynamic else spec.rows, tile) as row:
            start = let(row * count)
            # A 16-bit output is too coarse to hold the exponentials that are summed.
            powers, base = (y, start) if spec.dtype == compute else (scratch(count, compute), 0)
            top = reduce_row(count, lanes, compute, lambda i: x[start + i], row_maximum)
            each(count, lambda i: powers.store(base + i, exp(x[start + i] - top, compute)), lanes)
            total = reduce_row(count, lanes, compute, lambda i: powers[base + i])
            if spec.log:
                shift = let(top + log(total))
                each(count, lambda i: y.store(start + i, x[start + i] - shift), lanes)
            else:
                scale = let(const(1.0, compute) / total)
                each(count, lambda i: y.store(start + i, powers[base + i] * scale), lanes)

    return prim_func(name, arguments(spec), body)
