"""Index arithmetic of the kinds that move elements: where one comes from, and where it goes."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

from rescompile.backends.kernels.emit import Expr, div, maximum, minimum, mod
from rescompile.kinds import OpKind
from rescompile.values import Attrs

K = OpKind
Extents = tuple[int, ...]
Index = tuple[Expr, ...]

BIJECTIONS = frozenset((K.RESHAPE, K.PERMUTE, K.ROLL, K.FLIP, K.IDENTITY, K.CAST))


def moves_all(kind: OpKind, attrs: Attrs, before: Sequence[object]) -> bool:
    """Whether every element of the operand has one place in the result, and no other element has one."""
    if kind is K.PAD:
        return not any(attrs.get("pads", ()))
    if kind is K.SLICE:
        return all(
            start == 0 and step == 1 and isinstance(extent := before[axis], int) and stop >= extent
            for axis, start, stop, step in _slices(attrs)
        )
    return kind in BIJECTIONS


def target(kind: OpKind, attrs: Attrs, before: Extents, after: Extents, index: Index) -> Index:
    """Where the element at `index` goes, of a move for which `moves_all`."""
    if kind is K.RESHAPE:
        return regrouped(before, after, index)
    if kind is K.PERMUTE:
        return tuple(index[axis] for axis in attrs["perm"])
    if kind is K.ROLL:
        moved = list(index)
        for axis, shift in zip(attrs["axes"], attrs["shifts"], strict=True):
            moved[axis] = _rolled(moved[axis], shift % before[axis], before[axis])
        return tuple(moved)
    if kind is K.FLIP:
        return _flipped(attrs, before, index)
    return index


def source(
    kind: OpKind, attrs: Attrs, before: Extents, after: Extents, index: Index
) -> tuple[Index, list[tuple[Expr, int]]]:
    """Where the element at `index` of the result comes from; of a pad also (coordinate, extent) that must be inside.

    A coordinate outside is moved to the edge, where a load is legal.
    """
    if kind is K.RESHAPE:
        return regrouped(after, before, index), []
    if kind is K.PERMUTE:
        found: list[Expr] = [0] * len(index)
        for axis, coordinate in zip(attrs["perm"], index, strict=True):
            found[axis] = coordinate
        return tuple(found), []
    moved = list(index)
    tests: list[tuple[Expr, int]] = []
    if kind is K.ROLL:
        for axis, shift in zip(attrs["axes"], attrs["shifts"], strict=True):
            moved[axis] = _rolled(moved[axis], -shift % before[axis], before[axis])
    elif kind is K.FLIP:
        return _flipped(attrs, before, index), []
    elif kind is K.SLICE:
        for axis, start, _, step in _slices(attrs):
            moved[axis] = moved[axis] * step + start
    elif kind is K.PAD:
        for axis, first in enumerate(attrs["pads"][: len(index)]):
            last = attrs["pads"][len(index) + axis]
            if not first and not last:
                continue
            at = plain(moved[axis]) - first
            tests.append((at, before[axis]))
            moved[axis] = maximum(minimum(at, before[axis] - 1), 0)
    return tuple(moved), tests


class Lanes:
    """A coordinate base + lane of a vector of `count` lanes that begins at a multiple of `count`.

    Dividing an axis by a multiple of `count` leaves all lanes on one side, which index arithmetic alone cannot know.
    """

    def __init__(self, base: Expr, lane: Expr, count: int) -> None:
        self.base, self.lane, self.count = base, lane, count

    @property
    def expr(self) -> Expr:
        """The coordinate."""
        return self.base + self.lane

    def __add__(self, other: Expr) -> Expr:
        return self.expr + plain(other)

    __radd__ = __add__

    def __sub__(self, other: Expr) -> Expr:
        return self.expr - plain(other)

    def __rsub__(self, other: Expr) -> Expr:
        return plain(other) - self.expr

    def __mul__(self, other: Expr) -> Expr:
        return self.expr * other

    __rmul__ = __mul__


def plain(coordinate: Expr) -> Expr:
    """A coordinate as an expression."""
    return coordinate.expr if isinstance(coordinate, Lanes) else coordinate


def regrouped(before: Extents, after: Extents, index: Index) -> Index:
    """The index in the extents `after` of the element at `index` in `before`: only axes that change are divided."""
    result: list[Expr] = []
    for old, new in groups_of(before, after):
        inside = _flat(tuple(before[axis] for axis in old), tuple(index[axis] for axis in old))
        result += _spread(inside, tuple(after[axis] for axis in new))
    return tuple(result)


def groups_of(before: Extents, after: Extents) -> list[tuple[list[int], list[int]]]:
    """Axes of a reshape that hold the same elements: those before, and those after."""
    groups: list[tuple[list[int], list[int]]] = []
    left = right = 0
    while left < len(before) or right < len(after):
        first, second = left, right
        a = b = 1
        while left < len(before) or right < len(after):
            if a == b and left > first and right > second:
                break
            if (a <= b and left < len(before)) or right == len(after):
                a *= before[left]
                left += 1
            else:
                b *= after[right]
                right += 1
        groups.append((list(range(first, left)), list(range(second, right))))
    return groups


def _flat(extents: Extents, index: Index) -> Expr:
    total: Expr = 0
    for extent, coordinate in zip(extents, index, strict=True):
        total = coordinate if extent == prod(extents) else total * extent + coordinate
        if extent == prod(extents):
            return total
    return total


def _spread(position: Expr, extents: Extents) -> list[Expr]:
    result: list[Expr] = []
    inner = prod(extents)
    for number, extent in enumerate(extents):
        outer, inner = inner, inner // extent
        # The outermost axis of a group cannot overflow, and an axis of one element is always at its first.
        whole = all(before == 1 for before in extents[:number]) and outer == extent * inner
        if extent == 1:
            result.append(0)
        elif whole and inner == 1:
            result.append(position)
        elif isinstance(position, Lanes) and inner % position.count == 0:
            part = div(position.base, inner)
            result.append(part if whole else mod(part, extent))
        elif isinstance(position, Lanes) and inner == 1 and extent % position.count == 0:
            result.append(Lanes(mod(position.base, extent), position.lane, position.count))
        else:
            part = plain(position) if inner == 1 else div(plain(position), inner)
            result.append(part if whole else mod(part, extent))
    return result


def _rolled(coordinate: Expr, shift: int, extent: int) -> Expr:
    return coordinate if shift == 0 else mod(plain(coordinate) + shift, extent)


def _flipped(attrs: Attrs, extents: Extents, index: Index) -> Index:
    return tuple(
        extents[axis] - 1 - coordinate if axis in attrs["axes"] else coordinate for axis, coordinate in enumerate(index)
    )


def _slices(attrs: Attrs) -> list[tuple[int, int, int, int]]:
    axes = attrs["axes"]
    steps = attrs.get("steps") or (1,) * len(axes)
    return list(zip(axes, attrs["starts"], attrs["stops"], steps, strict=True))
