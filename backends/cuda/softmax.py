"""CUDA kernels of softmax over rows, for classifiers and inside attention.

y = exp(x − max(x)) / sum of exp(x − max(x))          or its logarithm, x − max(x) − log(sum of exp(x − max(x)))
"""

from __future__ import annotations

from dataclasses import dataclass

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
from rescompile.backends.kernels import Argument


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


def takes(spec: RowSoftmax) -> bool:
    """Whether there is a kernel for the spec."""
    return spec.dtype in DTYPES and spec.out_dtype in DTYPES and spec.width <= WIDEST


def arguments(spec: RowSoftmax) -> list[Argument]:
    """x, y."""
    matrix = (spec.rows, spec.width)
    return [Argument("x", matrix, spec.dtype), Argument("y", matrix, spec.out_dtype, output=True)]


def prim_func(spec: RowSoftmax, name: str) -> tvm.tirx.PrimFunc:
    """The kernel, its threads bound."""
    wider = "float32" if "float32" in (spec.dtype, spec.out_dtype) else spec.dtype
    return row_function(name, arguments(spec), spec.rows, row_tile(spec.width, wider), lambda row: _emit(spec, row))


def _emit(spec: RowSoftmax, row: Row) -> None:
    vector = row.tile.vector
    given = local(row.elements, spec.dtype)
    row.each(lambda chunk: row.read("x", given, chunk, chunk))
    top = row.reduce(lambda i: wide(given[i]), largest=True)
    powers = local(row.elements)
    unrolled(row.elements, lambda i: store(powers, T.exp(wide(given[i]) - top[0]), i))
    total = row.reduce(lambda i: powers[i])
    if spec.log:
        shift = named(top[0] + T.log(total[0]))
    else:
        scale: Expr = const(1.0) / total[0]
        if spec.floor is not None:
            scale = T.Select(top[0] > const(spec.floor), scale, const(0.0))
        shift = named(scale)
    staged = local(vector, spec.out_dtype)

    def write(chunk: int) -> None:
        def result(i: Expr) -> None:
            at = chunk * vector + i
            value = wide(given[at]) - shift[0] if spec.log else powers[at] * shift[0]
            store(staged, value.astype(spec.out_dtype), i)

        unrolled(vector, result)
        row.write("y", staged, 0, chunk)

    row.each(write)
