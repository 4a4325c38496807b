"""A region as a graph of what one thread computes for one element, each view resolved into where operands are read.

`Trace` walks from the outputs to the operands. A place is a list of index terms, one for each dimension. A value that
depends on a norm is known only where its row is held: at the place that belongs to the thread's own element.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from rescompile.backends.cuda import scalars
from rescompile.backends.cuda.index import (
    ONE,
    ZERO,
    Extent,
    Mirrored,
    Sum,
    Term,
    address,
    coordinate,
    extent,
    product,
    regroup,
    shifted,
    turned,
)
from rescompile.backends.cuda.region_spec import NORMS, VIEWS, RegionSpec
from rescompile.errors import GraphError
from rescompile.fused_region import Step
from rescompile.kinds import OpKind
from rescompile.values import Dim

K = OpKind
Place: TypeAlias = tuple[Term, ...]


@dataclass(frozen=True)
class Guard:
    """low ≤ term < high"""

    term: Term
    low: int
    high: int | None


Guards: TypeAlias = tuple[Guard, ...]


@dataclass(frozen=True)
class Load:
    """An element of an operand, read only where the guards hold."""

    operand: int
    at: Sum
    guards: Guards


@dataclass(frozen=True)
class Number:
    """A literal of that type."""

    value: float
    dtype: str


@dataclass(frozen=True, eq=False)
class Made:
    """The element that a step computes of others."""

    value: int
    operands: tuple[Node | None, ...]


@dataclass(frozen=True, eq=False)
class Chosen:
    """`inside` where the guards hold, else `outside`."""

    guards: Guards
    inside: Node
    outside: Node


@dataclass(frozen=True, eq=False)
class Normed:
    """An element of a norm's result: `source` is the element of its operand, `weight` and `bias` those beside it."""

    value: int
    source: Node
    weight: Node | None
    bias: Node | None


Node: TypeAlias = Load | Number | Made | Chosen | Normed


@dataclass
class Space:
    """Coordinates: `rows` rows of `width` elements; where a value's element is that belongs to a thread's."""

    rows: Extent
    width: Extent
    here: dict[int, Place] = field(default_factory=dict)

    @property
    def row(self) -> Term:
        return coordinate("row", self.rows)

    @property
    def col(self) -> Term:
        return coordinate("col", self.width)


class Trace:
    """Nodes of a region's values. GraphError says why a value cannot be computed by one kernel."""

    def __init__(self, spec: RegionSpec) -> None:
        self.spec = spec
        self.region = spec.region
        self.norms = [value for value in range(len(spec.values)) if self._kind(value) in NORMS]
        self._behind: set[int] = set()  # values that depend on a norm
        for value in range(self.region.operands, len(spec.values)):
            step = spec.step(value)
            if step is not None and (value in self.norms or any(read in self._behind for read in step.inputs)):
                self._behind.add(value)
        self._nodes: dict[tuple[int, Place, Guards], Node] = {}
        self.space = self._space()

    def root(self, value: int) -> Node:
        """The node of a value at the thread's own element."""
        if value not in self.space.here:
            raise GraphError("an output has other elements than the rest")
        return self.node(value, self.space.here[value], ())

    def written(self, value: int) -> Sum:
        """Where an output's element goes that is the thread's own."""
        tensor = self.spec.outputs[self.region.outputs.index(value)]
        place = self.space.here[value]
        order = tensor.order or tuple(range(len(place)))
        return address([place[axis] for axis in order], [extent(dim) for dim in tensor.lying])

    # ---- the space ---------------------------------------------------------------------------------------------------

    def _space(self) -> Space:
        spec = self.spec
        if self.norms:
            value = self.norms[0]
            source = self.source(value)
            rows, width, place = self._norm_space(value, spec.shape(source))
            space = Space(rows, width)
            self._spread(space, source, place)
            for other in self.norms[1:]:
                if other not in space.here or self._norm_space(other, spec.shape(self.source(other)))[:2] != (
                    rows,
                    width,
                ):
                    raise GraphError("its norms are over different rows")
        else:
            root = max(self.region.outputs, key=lambda value: (spec.size(value).number, -value))
            tensor = spec.outputs[self.region.outputs.index(root)]
            lying = tensor.lying
            cut = max((axis + 1 for axis, dim in enumerate(lying) if isinstance(dim, str)), default=0)
            space = Space(product(lying[:cut]), product(lying[cut:]))
            parts = [(space.row, space.rows), (space.col, space.width)]
            places = regroup(parts, [extent(dim) for dim in lying])
            order = tensor.order or tuple(range(len(lying)))
            native = [places[order.index(axis)] for axis in range(len(lying))]
            self._spread(space, root, tuple(native))
        return space

    def _norm_space(self, value: int, shape: Sequence[Dim]) -> tuple[Extent, Extent, Place]:
        """Rows, width, and the place of the element (row, col) of a norm."""
        step = self.spec.step(value)
        assert step is not None
        attrs = {**step.kind.spec.attrs, **step.attrs}
        sizes = [extent(dim) for dim in shape]
        if step.kind in (K.LAYER_NORM, K.RMS_NORM):
            axis = attrs["axis"] % len(shape)
            rows, width = product(shape[:axis]), product(shape[axis:])
            return rows, width, tuple(regroup(_parts(rows, width), sizes))
        groups = int(attrs["groups"]) if step.kind is K.GROUP_NORM else shape[1]
        if not isinstance(groups, int) or not isinstance(shape[1], int) or shape[1] % groups:
            raise GraphError("its channels are no multiple of the groups")
        within, spatial = shape[1] // groups, product(shape[2:])
        rows, width = extent(shape[0]) * Extent(groups), Extent(within) * spatial
        if self._channels_last():
            # A row's elements in the order in which they lie: positions, and within each the channels of the group.
            col = regroup(_parts(rows, width)[1:], [spatial, Extent(within)])
            row = regroup(_parts(rows, width)[:1], [extent(shape[0]), Extent(groups)])
            channel = regroup([(row[1], Extent(groups)), (col[1], Extent(within))], [Extent(shape[1])])
            return rows, width, (row[0], channel[0], *regroup([(col[0], spatial)], sizes[2:]))
        return rows, width, tuple(regroup(_parts(rows, width), sizes))

    def _channels_last(self) -> bool:
        return any(len(tensor.order) > 2 and tensor.order[-1] == 1 for tensor in self.spec.operands)

    def _spread(self, space: Space, value: int, place: Place) -> None:
        """Say where each value's element lies that belongs to the thread's: down to the operands, then up."""
        self._down(space, value, place)
        for made in range(self.region.operands, len(self.spec.values)):
            step = self.spec.step(made)
            if step is None or made in space.here:
                continue
            for read in step.inputs:
                if read in space.here and (up := self._up(made, step, read, space.here[read])) is not None:
                    # What is beside the stream that is known goes down from here.
                    self._down(space, made, up)
                    break

    def _down(self, space: Space, value: int, place: Place) -> None:
        if value in space.here:
            return
        space.here[value] = place
        step = self.spec.step(value)
        if step is None:
            return
        if step.kind in VIEWS:
            source = self.source(value)
            below, guards, _ = self._through(value, step, place)
            if not guards:
                self._down(space, source, below)
        elif step.kind in NORMS:
            self._down(space, self.source(value), place)
        elif step.kind is not K.CONCAT:
            for read in step.inputs:
                if read is not None and self.spec.shape(read) == self.spec.shape(value):
                    self._down(space, read, place)

    def _up(self, made: int, step: Step, read: int, place: Place) -> Place | None:
        """Where the element of a step's result is that is made of the one at `place`; None where there is none."""
        shape, result = self.spec.shape(read), self.spec.shape(made)
        attrs = {**step.kind.spec.attrs, **step.attrs}
        if step.kind is K.PERMUTE:
            return tuple(place[axis] for axis in attrs["perm"])
        if step.kind is K.RESHAPE:
            return tuple(regroup(_sized(place, shape), [extent(dim) for dim in result]))
        if step.kind is K.ROLL:
            return self._roll(place, shape, attrs, 1)
        if step.kind is K.FLIP:
            return self._flip(place, shape, attrs)
        if step.kind in (K.SLICE, K.PAD, K.CONCAT):
            return None
        return place if shape == result else None

    # ---- nodes -------------------------------------------------------------------------------------------------------

    def node(self, value: int, place: Place, guards: Guards) -> Node:
        """The node of a value's element at a place."""
        key = (value, place, guards)
        if key not in self._nodes:
            self._nodes[key] = self._node(value, place, guards)
        return self._nodes[key]

    def _node(self, value: int, place: Place, guards: Guards) -> Node:
        step = self.spec.step(value)
        if step is None:
            tensor = self.spec.operands[value]
            order = tensor.order or tuple(range(len(place)))
            at = address([place[axis] for axis in order], [extent(dim) for dim in tensor.lying])
            return Load(value, at, guards)
        if step.kind is K.FULL:
            return Number(step.attrs["value"], self.spec.dtype(value))
        if step.kind in NORMS:
            if place != self.space.here.get(value):
                raise GraphError("a norm's result is moved before it is used up")
            source = self.node(self.source(value), place, guards)
            beside = [None if read is None else self._affine(value, read, place) for read in step.inputs[1:3]]
            return Normed(value, source, *[*beside, None, None][:2])
        if step.kind in VIEWS:
            return self._view(value, step, place, guards)
        if step.kind is K.CONCAT:
            return self._concat(value, step, place, guards)
        refused = scalars.refusal(step.kind)
        if refused:
            raise GraphError(refused)
        if step.kind is K.BATCH_NORM:
            rest = [None if read is None else self.node(read, (place[1],), guards) for read in step.inputs[1:]]
            return Made(value, (self.node(self.source(value), place, guards), *rest))
        operands = [
            None if read is None else self.node(read, self._broadcast(value, step, read, place), guards)
            for read in step.inputs
        ]
        return Made(value, tuple(operands))

    def _affine(self, value: int, read: int, place: Place) -> Node:
        step, shape = self.spec.step(value), self.spec.shape(read)
        assert step is not None
        if step.kind in (K.LAYER_NORM, K.RMS_NORM):
            axis = step.attrs.get("axis", -1) % len(place)
            inner = place[axis:]
            if product(shape) == ONE:
                return self.node(read, (ZERO,) * len(shape), ())
            have = self.spec.shape(self.source(value))[axis:]
            return self.node(read, tuple(regroup(_sized(inner, have), [extent(dim) for dim in shape])), ())
        return self.node(read, (place[1],) if len(shape) == 1 else self._broadcast(value, step, read, place), ())

    def _broadcast(self, value: int, step: Step, read: int, place: Place) -> Place:
        shape = self.spec.shape(read)
        if step.kind is K.PRELU and len(shape) == 1 and len(place) > 1 and not self.spec.slopes_last:
            return (place[1] if shape[0] != 1 else ZERO,)
        beside = place[len(place) - len(shape) :] if shape else ()
        return tuple(ZERO if dim == 1 else term for dim, term in zip(shape, beside, strict=True))

    def _view(self, value: int, step: Step, place: Place, guards: Guards) -> Node:
        below, more, outside = self._through(value, step, place)
        inside = self.node(self.source(value), below, guards + more)
        return Chosen(more, inside, Number(outside, self.spec.dtype(value))) if more else inside

    def _through(self, value: int, step: Step, place: Place) -> tuple[Place, Guards, float]:
        """Where a view reads: the place, what has to hold for it, and the number that stands where it does not."""
        shape, attrs = self.spec.shape(self.source(value)), {**step.kind.spec.attrs, **step.attrs}
        if step.kind is K.PERMUTE:
            perm = tuple(attrs["perm"])
            return tuple(place[perm.index(axis)] for axis in range(len(perm))), (), 0.0
        if step.kind is K.RESHAPE:
            return tuple(regroup(_sized(place, self.spec.shape(value)), [extent(dim) for dim in shape])), (), 0.0
        if step.kind is K.ROLL:
            return self._roll(place, shape, attrs, -1), (), 0.0
        if step.kind is K.FLIP:
            return self._flip(place, shape, attrs), (), 0.0
        if step.kind is K.SLICE:
            return self._slice(place, shape, attrs), (), 0.0
        return self._pad(place, shape, attrs)

    @staticmethod
    def _roll(place: Place, shape: Sequence[Dim], attrs: dict[str, object], sign: int) -> Place:
        result = list(place)
        for axis, shift in zip(attrs["axes"], attrs["shifts"], strict=True):  # type: ignore[call-overload]
            result[axis] = turned(result[axis], sign * shift, _static(shape[axis]))
        return tuple(result)

    @staticmethod
    def _flip(place: Place, shape: Sequence[Dim], attrs: dict[str, object]) -> Place:
        result = list(place)
        for axis in attrs["axes"]:  # type: ignore[attr-defined]
            result[axis] = shifted(result[axis], -1, _static(shape[axis]) - 1)
        return tuple(result)

    @staticmethod
    def _slice(place: Place, shape: Sequence[Dim], attrs: dict[str, object]) -> Place:
        result = list(place)
        axes, starts, stops = attrs["axes"], attrs["starts"], attrs["stops"]
        if len(result) != len(shape):
            raise GraphError("a slice drops a dimension")
        steps = attrs["steps"] or (1,) * len(axes)  # type: ignore[arg-type]
        for axis, start, stop, stride in zip(axes, starts, stops, steps, strict=True):  # type: ignore[call-overload]
            count = shape[axis]
            if isinstance(count, str):
                if start != 0 or stride != 1:
                    raise GraphError("a slice of an extent that is not known before it runs")
                continue
            picked = range(count)[slice(start, stop if stop is None or stop >= -count else None, stride)]
            if len(picked):
                result[axis] = shifted(result[axis], picked.step, picked.start)
        return tuple(result)

    @staticmethod
    def _pad(place: Place, shape: Sequence[Dim], attrs: dict[str, object]) -> tuple[Place, Guards, float]:
        pads, mode = attrs["pads"], attrs["mode"]
        rank = len(shape)
        result, guards = list(place), []
        for axis, count in enumerate(shape):
            before, after = pads[axis], pads[axis + rank]  # type: ignore[index]
            if before == after == 0:
                continue
            size = _static(count)
            moved = shifted(place[axis], 1, -before)
            if before <= 0 and after <= 0:
                result[axis] = moved
            elif mode == "constant":
                result[axis] = moved
                guards.append(Guard(moved, 0, size))
            elif mode in ("reflect", "replicate"):
                result[axis] = Mirrored(moved, size, edge=mode == "replicate")
            else:
                raise GraphError(f"a border that is {mode}")
        return tuple(result), tuple(guards), float(attrs["value"] or 0.0)  # type: ignore[arg-type]

    def _concat(self, value: int, step: Step, place: Place, guards: Guards) -> Node:
        axis = step.attrs.get("axis", 0) % len(place)
        start, parts = 0, []
        for read in step.inputs:
            assert read is not None
            size = _static(self.spec.shape(read)[axis])
            if size:
                parts.append((read, start, size))
            start += size
        chosen: Node | None = None
        for read, begin, size in reversed(parts):
            last, first = chosen is None, begin == 0
            low, high = (-1 << 30 if first else begin), (None if last else begin + size)
            guard = () if first and last else (Guard(place[axis], low, high),)
            inner = (*place[:axis], shifted(place[axis], 1, -begin), *place[axis + 1 :])
            node = self.node(read, inner, guards + guard)
            chosen = node if chosen is None else Chosen((Guard(place[axis], -1 << 30, begin + size),), node, chosen)
        if chosen is None:
            raise GraphError("it joins nothing")
        return chosen

    def source(self, value: int) -> int:
        """What a step reads first. GraphError where it reads nothing."""
        step = self.spec.step(value)
        source = None if step is None or not step.inputs else step.inputs[0]
        if source is None:
            raise GraphError("a step reads nothing")
        return source

    def _kind(self, value: int) -> OpKind | None:
        step = self.spec.step(value)
        return None if step is None else step.kind


def _parts(rows: Extent, width: Extent) -> list[tuple[Term, Extent]]:
    return [(coordinate("row", rows), rows), (coordinate("col", width), width)]


def _sized(place: Place, shape: Sequence[Dim]) -> list[tuple[Term, Extent]]:
    return [(term, extent(dim)) for term, dim in zip(place, shape, strict=True)]


def _static(dim: Dim) -> int:
    if isinstance(dim, str):
        raise GraphError("a view along an extent that is not known before it runs")
    return dim
