"""Regions inside kernels: where values lie, and their programs evaluated element by element.

A kernel walks over the elements of one value of the region, its *anchor* (what a contraction makes, a norm reads, a
concatenation joins, or a result). What the anchor depends on is evaluated at the index that leads there; what depends
on the anchor follows it to the place that index arithmetic tells, and is stored there: moves cost no pass over memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from typing import Any

import tvm

from rescompile.backends.kernels.emit import Expr, Flat, const, let, rounded, select, sqrt
from rescompile.backends.kernels.moves import Index, moves_all, plain, source, target
from rescompile.backends.kernels.scalars import has_rule, scalar, uses_library
from rescompile.backends.kernels.specs import Argument, Pair, compute_dtype
from rescompile.fused_region import Region, Step, parse
from rescompile.kinds import OpKind

K = OpKind
_COMPARISONS = frozenset((K.EQUAL, K.NOT_EQUAL, K.LESS, K.LESS_EQUAL, K.GREATER, K.GREATER_EQUAL))
_LOGICAL = frozenset((K.LOGICAL_AND, K.LOGICAL_OR, K.LOGICAL_NOT))
MOVES = frozenset((K.RESHAPE, K.PERMUTE, K.SLICE, K.ROLL, K.FLIP, K.PAD))
Extents = tuple[int | None, ...]


@dataclass(frozen=True)
class Place:
    """Element (i, j, ...) of a value of `shape` lies at offset + i·strides[0] + j·strides[1] + ... of a buffer.

    extents: of the buffer, whose first may be None, the dynamic row count. border: zeros (vertical, horizontal) that a
    kernel that writes the value writes around it, channels last; the offset counts them. shared: the buffer holds more
    than the value, and a kernel leaves that alone.
    """

    shape: Extents
    dtype: str
    strides: tuple[int, ...]
    extents: Extents
    offset: int = 0
    border: Pair = (0, 0)
    shared: bool = False

    @staticmethod
    def plain(shape: Sequence[int | None], dtype: str) -> Place:
        """As the graph says, without gaps."""
        strides = [prod(extent or 1 for extent in shape[axis + 1 :]) for axis in range(len(shape))]
        return Place(tuple(shape), dtype, tuple(strides), tuple(shape))

    @staticmethod
    def channels_last(
        shape: Sequence[int], dtype: str, border: Pair = (0, 0), pitch: int | None = None, first: int = 0
    ) -> Place:
        """[N, C, *spatial] as [N, *spatial, pitch], from channel `first` on, inside its border."""
        batch, channels, *spatial = shape
        frame = [0] * (len(spatial) - 2) + list(border)
        stored = [extent + 2 * side for extent, side in zip(spatial, frame[-len(spatial) :], strict=True)]
        lie = [prod(stored[axis + 1 :]) * (pitch or channels) for axis in range(len(stored))]
        start = sum(side * step for side, step in zip(frame[-len(spatial) :], lie, strict=True))
        strides = (prod(stored) * (pitch or channels), 1, *lie)
        extents = (batch, *stored, pitch or channels)
        return Place(tuple(shape), dtype, strides, extents, start + first, border, shared=pitch is not None)

    def at(self, index: Index) -> Expr:
        """The element's position in the buffer seen flat."""
        total: Expr = self.offset
        for coordinate, stride, extent in zip(index, self.strides, self.shape, strict=True):
            if extent != 1:
                total = total + plain(coordinate) * stride
        return total

    def argument(self, name: str, output: bool = False) -> Argument:
        """The buffer, as a kernel's argument."""
        return Argument(name, self.extents or (1,), self.dtype, output, output and self.shared)


@dataclass(frozen=True)
class Program:
    """A region as kernels evaluate it.

    Attributes:
        steps: the region's text.
        operands: where each operand lies; None for one that only the kernel's own step (a contraction) reads.
        results: where each result goes.
        types: shape and dtype of what each step makes.
    """

    steps: str
    operands: tuple[Place | None, ...]
    results: tuple[Place, ...]
    types: tuple[tuple[Extents, str], ...]

    @property
    def region(self) -> Region:
        """The steps, read."""
        return parse(self.steps)

    def step(self, number: int) -> Step | None:
        """The step that makes a value; None for an operand."""
        region = self.region
        return region.steps[number - region.operands] if number >= region.operands else None

    def shape(self, number: int) -> Extents:
        """Extents of a value."""
        return self._type(number)[0]

    def dtype(self, number: int) -> str:
        """Element type of a value."""
        return self._type(number)[1]

    def _type(self, number: int) -> tuple[Extents, str]:
        if number >= len(self.operands):
            return self.types[number - len(self.operands)]
        place = self.operands[number]
        return ((), "") if place is None else (place.shape, place.dtype)

    def following(self, anchor: int) -> list[int]:
        """Steps that depend on the anchor, in order."""
        return list(_following(self.region, anchor))

    def library(self) -> bool:
        """Whether a step calls the C library."""
        return any(
            uses_library(step.kind, self.settings(step), compute_dtype(dtype))
            for step, (_, dtype) in zip(self.region.steps, self.types, strict=True)
        )

    def settings(self, step: Step) -> dict[str, Any]:
        """A step's attributes, with the exponent of a power that is a number."""
        if step.kind is K.POW and step.inputs[1] is not None:
            exponent = self.step(step.inputs[1])
            if exponent is not None and exponent.kind is K.FULL:
                return {**step.attrs, "exponent": float(exponent.attrs["value"])}
        return step.attrs

    def arguments(self, first: str = "t") -> tuple[list[Argument], list[Argument]]:
        """Buffers of the operands, then those of the results."""
        operands = [place.argument(f"{first}{i}") for i, place in enumerate(self.operands) if place is not None]
        return operands, [place.argument(f"y{i}", output=True) for i, place in enumerate(self.results)]


@lru_cache(maxsize=4096)
def _following_text(steps: str, anchor: int) -> tuple[int, ...]:
    region = parse(steps)
    found = {anchor}
    for position, step in enumerate(region.steps, region.operands):
        if any(value in found for value in step.inputs):
            found.add(position)
    return tuple(sorted(found - {anchor}))


def _following(region: Region, anchor: int) -> tuple[int, ...]:
    return _following_text(region.text(), anchor)


def unfollowed(program: Program, anchor: int, norms: Sequence[int] = ()) -> str:
    """Why elements cannot be followed from the anchor to the results; empty when they can.

    norms: those whose statistics the kernel takes.
    """
    dependent = {anchor, *program.following(anchor)}
    for number in program.following(anchor):
        step = program.step(number)
        if step is None:
            continue
        read = [value for value in step.inputs if value in dependent]
        shape = program.shape(number)
        if step.kind is K.CONCAT:
            if len(read) > 1:
                return "several parts of a concatenation depend on one contraction or norm"
        elif step.kind in MOVES:
            if not moves_all(step.kind, step.attrs, program.shape(read[0] or 0)):
                return f"a {step.kind.value} behind the contraction or norm drops or adds elements"
        elif has_rule(step.kind) or step.kind is K.BATCH_NORM or number in norms:
            if any(program.shape(value) != shape for value in read if value is not None):
                return f"a {step.kind.value} broadcasts what the contraction or norm makes"
        else:
            return f"a {step.kind.value} behind the contraction or norm"
    ways: dict[int, tuple[int, ...]] = {anchor: ()}
    for number in program.following(anchor):
        step = program.step(number)
        read = [value for value in (step.inputs if step else ()) if value in dependent]
        found = {ways[value] for value in read if value is not None}
        if len(found) != 1:
            return "two ways from the contraction or norm to one sum differ in what element goes where"
        way = found.pop()
        ways[number] = (*way, number) if step is not None and step.kind in (*MOVES, K.CONCAT) else way
    return ""


def unpulled(program: Program, numbers: Iterable[int]) -> str:
    """Why the given steps cannot be evaluated element by element; empty when they can."""
    for number in numbers:
        step = program.step(number)
        if step is None or step.kind in (K.FULL, K.CONCAT, K.BATCH_NORM) or has_rule(step.kind):
            continue
        if step.kind is K.PAD and step.attrs.get("mode", "constant") != "constant":
            return "a pad that is not of one number"
        if step.kind not in MOVES:
            return f"a {step.kind.value}, which no loop over elements computes"
    return ""


class Values:
    """Elements of a program's values while a kernel is emitted."""

    def __init__(self, program: Program, operands: Sequence[Flat | None], results: Sequence[Flat]) -> None:
        self.program = program
        self.operands = operands
        self.results = results
        self.bind = not program.library()
        self.kept: dict[int, Callable[[Index], Expr]] = {}  # values whose elements are known already
        self.skip: frozenset[int] = frozenset()  # results that are written already
        # Where the graph makes these in 16 bits, they are rounded: they are written, or a norm reads them.
        self.narrow: set[int] = set(program.region.outputs)
        self._known: dict[tuple[Any, ...], tuple[Index, Expr]] = {}

    def forget(self) -> None:
        """Leave the scope of the loops in which elements were named."""
        self._known.clear()

    def at(self, number: int, index: Index) -> Expr:
        """An element of a value, in the type that it is computed in."""
        if number in self.kept:
            return self.kept[number](index)
        key = (number, *(i if isinstance(i, int) else id(i) for i in index))
        if key not in self._known:
            value = self._rounded(number, self._made(number, index))
            self._known[key] = index, self._named(value)
        return self._known[key][1]

    def follow(self, anchor: int, index: Index, value: Expr) -> None:
        """Store the results that depend on the anchor's element."""
        program = self.program
        reached: dict[int, tuple[Index, Expr]] = {anchor: (index, self._stored(anchor, index, value))}
        for number in program.following(anchor):
            step = program.step(number)
            if step is None:
                continue
            inside = [v for v in step.inputs if v is not None and v in reached]
            where, came = reached[inside[0]]
            before, after = program.shape(inside[0]), program.shape(number)
            if step.kind is K.CONCAT:
                where = self._beside(step, inside[0], where)
            elif step.kind in MOVES:
                where = target(step.kind, step.attrs, _static(before), _static(after), where)
            elif number in self.kept:
                came = self._named(self.kept[number](where))
            else:
                came = self._computed(step, number, where, {v: reached[v][1] for v in inside})
                came = self._named(came)
            reached[number] = where, self._stored(number, where, came)

    def store(self, number: int, index: Index) -> None:
        """Store an element of a result."""
        self._stored(number, index, self.at(number, index))

    # ---- inside ------------------------------------------------------------------------------------------------

    def _named(self, value: Expr) -> Expr:
        """Computed once; vectors of integers and truth values stay nameless, since TVM 0.27 cannot analyse them."""
        literal = isinstance(value, tvm.tirx.IntImm | tvm.tirx.FloatImm)
        return let(value) if self.bind and not literal and "float" in str(value.ty.dtype) else value

    def _stored(self, number: int, index: Index, value: Expr) -> Expr:
        for place, made, flat in zip(self.program.results, self.program.region.outputs, self.results, strict=True):
            if made == number and number not in self.skip:
                flat.store(place.at(index), value)
        return self._rounded(number, value)

    def _rounded(self, number: int, value: Expr) -> Expr:
        dtype = self.program.dtype(number)
        if number < len(self.program.operands) or number not in self.narrow or dtype not in ("float16", "bfloat16"):
            return value
        return self._named(rounded(value, dtype))

    def _made(self, number: int, index: Index) -> Expr:
        program = self.program
        step = program.step(number)
        if step is None:
            place, flat = program.operands[number], self.operands[number]
            if place is None or flat is None:
                raise ValueError(f"operand {number} of {program.steps} lies nowhere")
            return flat[place.at(index)]
        if step.kind is K.FULL:
            return const(step.attrs["value"], compute_dtype(program.dtype(number)))
        if step.kind is K.CONCAT:
            return self._joined(step, index)
        if step.kind in MOVES:
            read = step.inputs[0] or 0
            before, after = _static(program.shape(read)), _static(program.shape(number))
            where, tests = source(step.kind, step.attrs, before, after, index)
            value = self.at(read, where)
            if not tests:
                return value
            inside = [test for at, extent in tests for test in (at >= 0, at < extent)]
            empty = const(step.attrs.get("value", 0.0) or 0.0, compute_dtype(program.dtype(number)))
            return select(tvm.tirx.all(*inside), value, empty)
        return self._computed(step, number, index, {})

    def _computed(self, step: Step, number: int, index: Index, given: dict[int, Expr]) -> Expr:
        program = self.program

        def read(value: int | None) -> Expr:
            if value is None:
                return None
            return given[value] if value in given else self.at(value, broadcast(index, program.shape(value)))

        xs = [read(value) for value in step.inputs]
        dtype = program.dtype(number)
        compute = compute_dtype(dtype)
        if step.kind is K.CAST:
            return _cast(xs[0], compute_dtype(program.dtype(step.inputs[0] or 0)), dtype)
        if step.kind is K.BATCH_NORM:
            return self._normalised(step, xs, index, compute)
        types = [compute_dtype(program.dtype(value or 0)) for value in step.inputs]
        if step.kind in _COMPARISONS:
            wide = max(types, key=("bool", "int32", "int64", "float32", "float64").index)
            xs = [_cast(x, have, wide) for x, have in zip(xs, types, strict=True)]
        elif step.kind in _LOGICAL:
            xs = [_cast(x, have, "bool") for x, have in zip(xs, types, strict=True)]
        elif step.kind is K.WHERE:
            xs = [
                _cast(xs[0], types[0], "bool"),
                *(_cast(x, t, compute) for x, t in zip(xs[1:], types[1:], strict=True)),
            ]
        else:
            xs = [_cast(x, have, compute) for x, have in zip(xs, types, strict=True)]
        return scalar(step.kind, program.settings(step), xs, compute)

    def _normalised(self, step: Step, xs: list[Expr], index: Index, dtype: str) -> Expr:
        """w·(x − m) / √(v + ε) + b, each of the channel"""

        def channel(place: int) -> Expr | None:
            value = step.inputs[place] if place < len(step.inputs) else None
            return None if value is None else self.at(value, (index[1],))

        weight, bias, mean, var = (channel(place) for place in (1, 2, 3, 4))
        x = xs[0] if mean is None else xs[0] - mean
        if var is not None:
            x = x / sqrt(var + const(step.attrs.get("eps", 1e-5), dtype))
        x = x if weight is None else x * weight
        return x if bias is None else x + bias

    def _beside(self, step: Step, part: int, index: Index) -> Index:
        axis = step.attrs.get("axis", 0)
        start = sum(int(self.program.shape(value or 0)[axis] or 0) for value in step.inputs[: step.inputs.index(part)])
        moved = list(index)
        moved[axis] = moved[axis] + start
        return tuple(moved)

    def _joined(self, step: Step, index: Index) -> Expr:
        """An element of a concatenation, wherever it is."""
        axis = step.attrs.get("axis", 0)
        result: Expr = None
        start = 0
        for value in step.inputs:
            extent = int(self.program.shape(value or 0)[axis] or 0)
            where = list(index)
            where[axis] = plain(where[axis])
            shifted = where[axis] - start
            if isinstance(shifted, int):
                if 0 <= shifted < extent:
                    where[axis] = shifted
                    return self.at(value or 0, tuple(where))
                start += extent
                continue
            where[axis] = tvm.tirx.max(tvm.tirx.min(shifted, extent - 1), 0)
            element = self.at(value or 0, tuple(where))
            result = element if result is None else select(plain(index[axis]) >= start, element, result)
            start += extent
        return result


def broadcast(index: Index, shape: Extents) -> Index:
    """The index of the element that is read at `index` of an operation's result."""
    kept = index[len(index) - len(shape) :] if shape else ()
    return tuple(0 if extent == 1 else at for extent, at in zip(shape, kept, strict=True))


def _cast(value: Expr, have: str, want: str) -> Expr:
    compute = compute_dtype(want)
    if have == want or (have == compute and want == compute):
        return value
    if want == "bool":
        return value if have == "bool" else tvm.tirx.NE(value, const(0, have))
    if have == "bool":
        return select(value, const(1, compute), const(0, compute))
    wide = value if have == compute else value.astype(compute)
    return rounded(wide, want) if want in ("float16", "bfloat16") else wide


def _static(shape: Extents) -> tuple[int, ...]:
    return tuple(int(extent or 0) for extent in shape)
