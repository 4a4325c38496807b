"""Where an element lies after a chain of views, as arithmetic on the thread's coordinates.

A term is a number that a thread computes out of its coordinates: "row", which its lanes share, and "col", at which lane
i of a vector adds i. Terms are compared by what they are made of, so that a view and its inverse cancel, and a tensor
that is read as it lies is read at the coordinate itself, without a division. Extents are products of numbers and names.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import gcd
from typing import Any, TypeAlias

from tvm import tirx

from rescompile.errors import GraphError
from rescompile.values import Dim

Expr: TypeAlias = Any


@dataclass(frozen=True)
class Extent:
    """number · name · name · ..."""

    number: int = 1
    names: tuple[str, ...] = ()

    def __mul__(self, other: Extent) -> Extent:
        return Extent(self.number * other.number, tuple(sorted(self.names + other.names)))

    def over(self, other: Extent) -> Extent | None:
        """The quotient, None where `other` does not divide it."""
        names = list(self.names)
        for name in other.names:
            if name not in names:
                return None
            names.remove(name)
        if other.number == 0 or self.number % other.number:
            return None
        return Extent(self.number // other.number, tuple(names))


ONE = Extent()


def extent(dim: Dim) -> Extent:
    """A dimension as an extent."""
    return Extent(dim) if isinstance(dim, int) else Extent(1, (dim,))


def product(dims: Sequence[Dim]) -> Extent:
    """The number of elements."""
    total = ONE
    for dim in dims:
        total = total * extent(dim)
    return total


@dataclass(frozen=True)
class Digit:
    """source // div % mod, the source being a coordinate or a term that counts up to `total`."""

    source: str | Term
    total: Extent
    div: Extent
    mod: Extent


@dataclass(frozen=True)
class Sum:
    """Σ term · stride + offset"""

    parts: tuple[tuple[Term, Extent], ...]
    offset: int = 0


@dataclass(frozen=True)
class Turned:
    """(term + amount) mod count: rolled."""

    term: Term
    amount: int
    count: int


@dataclass(frozen=True)
class Mirrored:
    """|term| and then from the end again where it is past it: reflected at both ends. `edge`: held at the ends."""

    term: Term
    count: int
    edge: bool


Term: TypeAlias = Digit | Sum | Turned | Mirrored
ZERO = Sum(())


def coordinate(name: str, total: Extent) -> Term:
    """The coordinate of a thread that counts up to `total`."""
    return Digit(name, total, ONE, total) if total != ONE else ZERO


def shifted(term: Term, factor: int, offset: int) -> Term:
    """factor · term + offset"""
    if isinstance(term, Sum):
        parts = tuple((part, stride * Extent(factor)) for part, stride in term.parts)
        inner = Sum(parts, term.offset * factor + offset)
        return inner.parts[0][0] if len(parts) == 1 and parts[0][1] == ONE and inner.offset == 0 else inner
    return term if factor == 1 and offset == 0 else Sum(((term, Extent(factor)),), offset)


def turned(term: Term, amount: int, count: int) -> Term:
    """(term + amount) mod count"""
    if isinstance(term, Turned) and term.count == count:
        amount += term.amount
        term = term.term
    amount %= count
    return Turned(term, amount, count) if amount else term


def regroup(dims: Sequence[tuple[Term, Extent]], shape: Sequence[Extent]) -> list[Term]:
    """The same place in a tensor of the same elements in another shape. GraphError where extents cannot be told apart.

    Digits are split and joined, from the last dimension on.
    """
    have = [(term, size) for term, size in dims if size != ONE]
    result: list[Term] = []
    wanted = [size for size in shape if size != ONE]
    for position in range(len(wanted) - 1, -1, -1):
        size = wanted[position]
        taken: list[tuple[Term, Extent]] = []  # the lowest first
        if position == 0:
            taken, have = have[::-1], []
        else:
            left = size
            while left != ONE:
                if not have:
                    raise GraphError("a reshape's extents do not follow from each other")
                term, here = have.pop()
                if (rest := left.over(here)) is not None:
                    taken.append((term, here))
                    left = rest
                elif (more := here.over(left)) is not None:
                    taken.append((_part(term, here, ONE, left), left))
                    have.append((_part(term, here, left, more), more))
                    left = ONE
                elif have:
                    above, size_above = have.pop()
                    have.append((joined([(term, here), (above, size_above)]), here * size_above))
                else:
                    raise GraphError("a reshape's extents do not follow from each other")
        result.append(joined(taken))
    result.reverse()
    found = iter(result)
    return [ZERO if size == ONE else next(found) for size in shape]


def joined(low_first: Sequence[tuple[Term, Extent]]) -> Term:
    """low + low extent · (next + next extent · ...), digits of one source as one digit."""
    merged: list[tuple[Term, Extent]] = []
    for term, size in low_first:
        if merged:
            last, below = merged[-1]
            if (
                isinstance(term, Digit)
                and isinstance(last, Digit)
                and term.source == last.source
                and term.div == last.div * last.mod
            ):
                merged[-1] = (_digit(term.source, term.total, last.div, last.mod * term.mod), below * size)
                continue
        merged.append((term, size))
    if len(merged) == 1:
        return merged[0][0]
    parts, stride = [], ONE
    for term, size in merged:
        parts.append((term, stride))
        stride = stride * size
    return Sum(tuple(parts))


def _digit(source: str | Term, total: Extent, div: Extent, mod: Extent) -> Term:
    return source if not isinstance(source, str) and div == ONE and mod == total else Digit(source, total, div, mod)


def _part(term: Term, size: Extent, div: Extent, mod: Extent) -> Term:
    """Digits of a term that counts up to `size`."""
    if isinstance(term, Digit):
        return Digit(term.source, term.total, term.div * div, mod)
    parts = _radix(term, size)
    above = size.over(div * mod)
    if parts is not None and above is not None:
        return regroup(parts, [above, mod, div])[1]
    return Digit(term, size, div, mod)


def _radix(term: Term, size: Extent) -> list[tuple[Term, Extent]] | None:
    """The digits that `joined` made a sum of, the highest first; None for any other term."""
    if not isinstance(term, Sum) or term.offset or len(term.parts) < 2 or term.parts[0][1] != ONE:
        return None
    strides = [stride for _, stride in term.parts] + [size]
    extents = [above.over(here) for here, above in pairwise(strides)]
    if any(found is None for found in extents):
        return None
    return [(part, found or ONE) for (part, _), found in zip(term.parts, extents, strict=True)][::-1]


def address(dims: Sequence[Term], shape: Sequence[Extent]) -> Sum:
    """The place of an element in memory: Σ dim · stride, digits of one source joined where they lie so."""
    low_first = [(term, size) for term, size in zip(dims, shape, strict=True) if size != ONE][::-1]
    parts: list[tuple[Term, Extent]] = []
    offset, stride = 0, ONE
    for term, size in low_first:
        inner = term.parts if isinstance(term, Sum) else ((term, ONE),)
        if isinstance(term, Sum) and term.offset:
            if stride.names:
                raise GraphError("a view begins at a distance that is not known before it runs")
            offset += term.offset * stride.number
        for piece, factor in inner:
            there = stride * factor
            if parts and isinstance(piece, Digit):
                last, below = parts[-1]
                if (
                    isinstance(last, Digit)
                    and last.source == piece.source
                    and piece.div == last.div * last.mod
                    and there == below * last.mod
                ):
                    parts[-1] = (_digit(piece.source, piece.total, last.div, last.mod * piece.mod), below)
                    continue
            parts.append((piece, there))
        stride = stride * size
    return Sum(tuple(parts), offset)


# ---- lanes -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Lanes:
    """How a number changes over the lanes of a vector: in groups of `group` lanes it stays, or goes up by one.

    `align`: the power of two that divides it at the first lane of each group.
    """

    group: int
    steps: bool
    align: int


def lanes(term: Term, vector: int) -> Lanes:
    """What the lanes of an access of `vector` elements, which begins at a multiple of `vector`, see of a term."""
    if isinstance(term, Digit):
        if term.source == "row":
            return Lanes(vector, False, 1)
        own = isinstance(term.source, str)
        inner = Lanes(vector, True, vector) if own else lanes(term.source, vector)  # type: ignore[arg-type]
        if not inner.steps:
            return Lanes(inner.group, False, 1)
        if term.div == ONE:
            group = gcd(inner.group, gcd(_power(term.mod.number, vector), inner.align))
            return Lanes(group, True, group)
        return Lanes(gcd(gcd(inner.group, inner.align), _power(term.div.number, vector)), False, 1)
    if isinstance(term, Turned):
        inner = lanes(term.term, vector)
        if not inner.steps:
            return Lanes(inner.group, False, 1)
        group = gcd(gcd(inner.group, inner.align), gcd(_power(term.amount, vector), _power(term.count, vector)))
        return Lanes(group, True, group)
    if isinstance(term, Mirrored):
        inner = lanes(term.term, vector)
        return Lanes(1 if inner.steps else inner.group, False, 1)
    group, steps, align = vector, False, _power(term.offset, vector)
    for part, stride in term.parts:
        inner = lanes(part, vector)
        if inner.steps and stride != ONE:
            return Lanes(1, False, 1)
        if inner.steps and steps:
            return Lanes(1, False, 1)
        group, steps = gcd(group, inner.group), steps or inner.steps
        align = gcd(align, inner.align * _power(stride.number, vector))
    return Lanes(group, steps, min(align, vector))


def _power(number: int, most: int) -> int:
    """The largest power of two up to `most` that divides the number; `most` for zero."""
    return gcd(number, most)


# ---- expressions -----------------------------------------------------------------------------------------------------

Coordinate: TypeAlias = Callable[[str], Expr]


def expression(term: Term, coordinate: Coordinate, names: Mapping[str, Expr]) -> Expr:
    """The term as an expression of a thread; `names` are the extents that are not known before it runs."""
    if isinstance(term, Digit):
        value = coordinate(term.source) if isinstance(term.source, str) else expression(term.source, coordinate, names)
        if term.div != ONE:
            value = tirx.floordiv(value, size_of(term.div, names))
        return value if term.div * term.mod == term.total else tirx.floormod(value, size_of(term.mod, names))
    if isinstance(term, Turned):
        value = expression(term.term, coordinate, names) + term.amount
        return tirx.Select(value >= term.count, value - term.count, value)
    if isinstance(term, Mirrored):
        value = expression(term.term, coordinate, names)
        last = term.count - 1
        if term.edge:
            return tirx.max(tirx.min(value, last), 0)
        return last - tirx.abs(last - tirx.abs(value))
    total: Expr = None
    for part, stride in term.parts:
        value = expression(part, coordinate, names)
        value = value if stride == ONE else value * size_of(stride, names)
        total = value if total is None else total + value
    if total is None:
        return tirx.const(term.offset, "int32")
    return total + term.offset if term.offset else total


def size_of(size: Extent, names: Mapping[str, Expr]) -> Expr:
    """An extent as an expression."""
    value: Expr = size.number
    for name in size.names:
        value = names[name] if isinstance(value, int) and value == 1 else names[name] * value
    return value
