"""CUDA kernels of softmax over rows, for classifiers and inside attention.

y = exp(x − max(x)) / sum of exp(x − max(x))          or its logarithm, x − max(x) − log(sum of exp(x − max(x)))
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np
import tvm
from tvm import tirx
from tvm.tirx.script.builder import ir as T

from rescompile.backends.cuda.rows import (
    DTYPES,
    WIDEST,
    Expr,
    Row,
    RowTile,
    across_threads,
    const,
    local,
    named,
    row_function,
    row_tiles,
    store,
    unrolled,
    wide,
)
from rescompile.backends.cuda.scalars import call
from rescompile.backends.cuda.targets import Architecture
from rescompile.backends.kernels import Argument

_MOST = 1 << 17  # elements of the widest row


@dataclass(frozen=True)
class RowSoftmax:
    """y (rows, width) in `out_dtype` out of x (rows, width) in `dtype`; `rows` None leaves their count to run time.

    A row whose largest element is not above `floor` (one in which attention masks everything) gives zeros.
    """

    rows: int | None
    width: int
    dtype: str = "float32"
    out_dtype: str = "float32"
    log: bool = False
    floor: float | None = None


def refusal(spec: RowSoftmax, limits: Architecture) -> str:
    """Why there is no kernel, one clause; empty when there is one."""
    if spec.dtype not in DTYPES or spec.out_dtype not in DTYPES:
        return f"there is no softmax from {spec.dtype} to {spec.out_dtype}"
    return "" if 0 < spec.width <= _MOST else f"its rows have more than {_MOST} elements"


def candidates(spec: RowSoftmax, limits: Architecture) -> list[RowTile]:
    """Tiles, the first being the one to take where nothing can be timed."""
    wider = "float32" if "float32" in (spec.dtype, spec.out_dtype) else spec.dtype
    return row_tiles(spec.width, wider)


def arguments(spec: RowSoftmax) -> list[Argument]:
    """x, y."""
    matrix = (spec.rows, spec.width)
    return [Argument("x", matrix, spec.dtype), Argument("y", matrix, spec.out_dtype, output=True)]


def prim_func(spec: RowSoftmax, tile: RowTile, name: str) -> tvm.tirx.PrimFunc:
    """The kernel, its threads bound. A row that no block holds is read twice."""
    emit = _emit if spec.width <= WIDEST else _emit_streaming
    return row_function(name, arguments(spec), spec.rows, tile, lambda row: emit(spec, row))


def _emit(spec: RowSoftmax, row: Row) -> None:
    vector = row.tile.vector
    given = local(row.elements, spec.dtype)
    row.each(lambda chunk: row.read("x", given, chunk, chunk))
    top = row.reduce(lambda i: wide(given[i]), largest=True)
    powers = local(row.elements)
    unrolled(row.elements, lambda i: store(powers, call("exp", wide(given[i]) - top[0]), i))
    total = row.reduce(lambda i: powers[i])
    shift = _shift(spec, top, total)
    staged = local(vector, spec.out_dtype)

    def write(chunk: int) -> None:
        def result(i: Expr) -> None:
            at = chunk * vector + i
            value = wide(given[at]) - shift[0] if spec.log else powers[at] * shift[0]
            store(staged, value.astype(spec.out_dtype), i)

        unrolled(vector, result)
        row.write("y", staged, 0, chunk)

    row.each(write)


def _shift(spec: RowSoftmax, top: Expr, total: Expr) -> Expr:
    """What is taken off each element, or what its power is multiplied by."""
    if spec.log:
        return named(top[0] + call("log", total[0]))
    scale: Expr = const(1.0) / total[0]
    if spec.floor is not None:
        scale = T.Select(top[0] > const(spec.floor), scale, const(0.0))
    return named(scale)


def _emit_streaming(spec: RowSoftmax, row: Row) -> None:
    """The largest and the sum in one pass: a thread's sum is scaled down whenever it meets a larger element."""
    tile = row.tile
    given, staged = local(tile.vector, spec.dtype), local(tile.vector, spec.out_dtype)
    lowest = const(float(np.finfo(np.float32).min))
    top, total, found = local(1), local(1), local(1)
    store(top, lowest, 0)
    store(total, const(0.0), 0)
    with T.serial(0, tile.chunks) as chunk:
        row.read("x", given, 0, chunk)
        with ExitStack() as guards:
            if row.ragged(chunk):
                guards.enter_context(T.If(row.column(chunk) < row.width))
                guards.enter_context(T.Then())
            store(found, top[0], 0)
            unrolled(tile.vector, lambda i: store(found, tirx.max(found[0], wide(given[i])), 0))
            store(total, total[0] * call("exp", top[0] - found[0]), 0)
            unrolled(tile.vector, lambda i: store(total, total[0] + call("exp", wide(given[i]) - found[0]), 0))
            store(top, found[0], 0)
    store(found, top[0], 0)
    across_threads(top, tile.threads, row.lane, lowest, largest=True)
    store(total, total[0] * call("exp", found[0] - top[0]), 0)
    across_threads(total, tile.threads, row.lane, const(0.0))
    shift = _shift(spec, top, total)
    with T.serial(0, tile.chunks) as chunk:
        row.read("x", given, 0, chunk)

        def result(i: Expr) -> None:
            value = wide(given[i])
            value = value - shift[0] if spec.log else call("exp", value - top[0]) * shift[0]
            store(staged, value.astype(spec.out_dtype), i)

        unrolled(tile.vector, result)
        row.write("y", staged, 0, chunk)
