"""The end of a contraction, for any main loop: operands read, steps computed, results cast and written, in vectors.

    with contraction_function(spec, name) as call:         # buffers by name, flat; the row count as an expression
        ...launch threads, sum into float32 registers...
        epilogue = Epilogue(spec, call)
        held = epilogue.read(batch, row, column)           # loads only: they can be in flight before the sums are there
        epilogue.write(sums, first, held, batch, row, column)

One call handles `spec.result_vector` neighbouring columns of one row, which are all inside or all outside the result.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from math import prod
from typing import Any

import tvm
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script.builder import ir as T

from rescompile.backends.cuda import scalars
from rescompile.backends.cuda.contraction import (
    ACCESS,
    BYTES,
    ContractionSpec,
    EpilogueOperand,
    arguments,
)
from rescompile.backends.cuda.rows import local, store, unrolled, vector
from rescompile.kinds import OpKind

Expr = Any  # tvm.tirx expressions, buffers and Python integers alike

_OPAQUE = 8  # Relax's op pattern "opaque": never fused into, never fused away


@dataclass
class Call:
    """The kernel under construction: flat views of its buffers by name, and the extents that may be dynamic."""

    buffers: dict[str, Expr]
    rows: Expr
    batch: Expr
    function: tvm.tirx.PrimFunc | None = None


@contextmanager
def contraction_function(spec: ContractionSpec, name: str) -> Iterator[Call]:
    """A kernel's frame; its body is what is built inside. `function` of the yielded call is there afterwards."""
    with IRBuilder() as builder:
        with T.prim_func(s_tir=True):
            T.func_name(name)
            T.func_attr({"global_symbol": name, "tirx.noalias": True, "op_pattern": _OPAQUE, "tirx.is_scheduled": True})
            shapes = {argument.name: argument.shape for argument in arguments(spec)}
            dynamic = any(extent is None for shape in shapes.values() for extent in shape)
            count: Expr = tvm.tirx.Var("rows", "int64") if dynamic else None
            given = {}
            for argument in arguments(spec):
                shape = [count if extent is None else extent for extent in argument.shape]
                given[argument.name] = T.arg(argument.name, T.buffer(shape, argument.dtype))
            call = Call({}, spec.rows, spec.batch)
            if spec.conv is not None and spec.rows is None:
                call.rows = count * spec.conv.pixels
            elif spec.rows is None:
                call.rows = count
            elif spec.batch is None:
                call.batch = count
            for argument in arguments(spec):
                size: Expr = prod(extent for extent in argument.shape if extent is not None)
                size = size if None not in argument.shape else count * size
                flat = T.decl_buffer((size,), argument.dtype, data=given[argument.name].data)
                IRBuilder.name(argument.name, flat)
                call.buffers[argument.name] = flat
            yield call
        call.function = builder.get()


class Epilogue:
    """What one thread does to neighbouring columns of one row."""

    def __init__(self, spec: ContractionSpec, call: Call) -> None:
        self.spec, self.call, self.width = spec, call, spec.result_vector

    def read(self, batch: Expr, row: Expr, column: Expr, inside: Expr = None, above: Sequence[Expr] = ()) -> list[Expr]:
        """The operands' elements, in registers; not read where `inside` says that they are outside the result.

        above: what was read for the same columns of a row further up, of which this one takes what has no rows.
        """
        operands = self.spec.epilogue.operands
        widths = [self.width if operand.column else 1 for operand in operands]
        held = [
            above[index] if above and not operand.row else local(width, operand.dtype)
            for index, (operand, width) in enumerate(zip(operands, widths, strict=True))
        ]
        fresh = any(operand.row for operand in operands) or (operands and not above)
        with guarded(inside if fresh else None):
            for operand, width, into in zip(operands, widths, held, strict=True):
                if above and not operand.row:
                    continue
                source, at = self.call.buffers[operand.name], self._offset(operand, batch, row, column)
                for first, count in _parts(width, operand.dtype):
                    vector(count, _copied(into, first, source, at + first))
        return held

    def write(
        self,
        sums: Expr,
        first: Expr,
        held: Sequence[Expr],
        batch: Expr,
        row: Expr,
        column: Expr,
        inside: Expr = None,
    ) -> None:
        """The steps on sums[first], ..., and their results, written; nothing where `inside` is false."""
        program = self.spec.epilogue
        results = [(output, local(self.width, output.dtype)) for output in program.outputs]
        places: list[Expr] = [local(self.width, "float32") for _ in range(1 + len(program.operands))]

        def compute(i: Expr) -> None:
            store(places[0], sums[first + i], i)
            for operand, given, place in zip(program.operands, held, places[1:], strict=False):
                store(place, given[i if operand.column else 0].astype("float32"), i)
            values: list[Expr] = [place[i] for place in places]
            for step in program.steps:
                made = self._step(step.kind, step.settings, [values[place] for place in step.inputs])
                if step.kind is not OpKind.FULL:
                    kept = local(1, scalars.dtype_of(made))
                    store(kept, made, 0)
                    made = kept[0]
                values.append(made)
            for output, result in results:
                store(result, scalars.convert(values[output.value], output.dtype), i)

        unrolled(self.width, compute)
        at = self.result_offset(batch, row, column)
        with guarded(inside):
            for output, result in results:
                for start, count in _parts(self.width, output.dtype):
                    vector(count, _copied(self.call.buffers[output.name], at + start, result, start))

    def result_offset(self, batch: Expr, row: Expr, column: Expr) -> Expr:
        """Where an element of the result lies in its flat buffer."""
        spec = self.spec
        if spec.conv is not None:
            return row * spec.channels + batch * spec.columns + column
        return (batch * self.call.rows + row) * spec.columns + column

    def _offset(self, operand: EpilogueOperand, batch: Expr, row: Expr, column: Expr) -> Expr:
        spec = self.spec
        if operand.batch and operand.row and operand.column and operand.row_step == 1 and not operand.row_cycle:
            return self.result_offset(batch, row, column)
        rows, at = self.call.rows, tvm.tirx.const(0, "int32")
        if operand.row:
            at = row if operand.row_step == 1 else row // operand.row_step
            if operand.row_cycle:
                at, rows = at % operand.row_cycle, operand.row_cycle
            elif operand.row_step != 1:
                rows = (rows + operand.row_step - 1) // operand.row_step
        else:
            rows = 1
        if operand.batch and spec.conv is None and spec.batch != 1:
            at = batch * rows + at
        if not operand.column:
            return at
        return at * spec.channels + (batch * spec.columns if spec.conv is not None else 0) + column

    @staticmethod
    def _step(kind: OpKind, attrs: dict[str, Any], operands: list[Expr]) -> Expr:
        if kind is OpKind.FULL:
            return scalars.literal(attrs["value"], "float32")
        if kind is OpKind.CAST and str(attrs["dtype"]) in BYTES and attrs["dtype"] != "bool":
            return scalars.convert(scalars.convert(operands[0], str(attrs["dtype"])), "float32")
        return scalars.scalar(kind, attrs, operands)


@contextmanager
def guarded(condition: Expr) -> Iterator[None]:
    """A branch that is taken where the condition holds; none where there is no condition."""
    with ExitStack() as frames:
        if condition is not None:
            frames.enter_context(T.If(condition))
            frames.enter_context(T.Then())
        yield


def _parts(width: int, dtype: str) -> list[tuple[int, int]]:
    """A vector as accesses of at most 16 bytes: first element and count of each."""
    most = min(width, ACCESS // BYTES[dtype])
    return [(first, most) for first in range(0, width, most)]


def _copied(into: Expr, to: Expr, source: Expr, at: Expr) -> Any:
    return lambda i: store(into, source[at + i], to + i)
