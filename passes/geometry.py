"""How the value at a join lies to the value at its fork: which axis holds channels, and what became of the others.

Every convolution and pool turns an extent S into ⌊(S − o − 1)/s⌋ + 1 with its own stride s and loss o (what border and
kernel take away), and so does a series of them: (s₁, o₁) then (s₂, o₂) is (s₁·s₂, o₁ + s₁·o₂). The strided slice
[a : S − b : s] with a + b = o has that very extent, so a skip can follow a branch through odd sizes and symbolic ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rescompile.graph import Dim, Op, Shape, Value
from rescompile.kinds import OpKind, Trait
from rescompile.passes.layers import Place
from rescompile.plans import Refusal

_SAME = (OpKind.IDENTITY, OpKind.CAST, OpKind.DROPOUT, OpKind.SOFTMAX, OpKind.RECURRENT)


@dataclass(frozen=True, slots=True)
class Extent:
    """S → ⌊(S − lost − 1)/stride⌋ + 1, or S → S·factor."""

    stride: int = 1
    lost: int = 0
    factor: int = 1

    @property
    def same(self) -> bool:
        """Whether the extent stays."""
        return self == Extent()

    def then(self, later: Extent) -> Extent | None:
        """This change and a later one; None where no strided slice or repetition does both."""
        if later.factor == 1 and self.factor == 1:
            return Extent(self.stride * later.stride, self.lost + self.stride * later.lost)
        if self.stride == 1 and self.lost == 0:
            if later.factor > 1:
                return Extent(factor=self.factor * later.factor)
            if later.lost == 0 and self.factor % later.stride == 0:
                return Extent(factor=self.factor // later.stride)
        if self.lost in (0, self.stride - 1) and self.stride == later.factor:
            return Extent()
        return None

    def of(self, extent: int) -> int:
        """What becomes of an extent."""
        return extent * self.factor if self.factor > 1 else (extent - self.lost - 1) // self.stride + 1


@dataclass(frozen=True, slots=True)
class Geometry:
    """`channel`: the axis of fork and join that holds channels; `extents`: what becomes of every other axis."""

    channel: int
    extents: tuple[Extent, ...]

    @property
    def same_positions(self) -> bool:
        """Whether fork and join differ in channels at most."""
        return all(extent.same for extent in self.extents)


def geometry(place: Place) -> Geometry | Refusal:
    """How fork and join lie to each other; a refusal with both shapes where no shortcut can match them."""
    fork, join = place.fork, place.join
    if fork.shape is None or join.shape is None:
        return Refusal(place.name, "the shape of the fork or the join is unknown: capture with example inputs")
    if len(fork.shape) != len(join.shape) or len(fork.shape) < 2:
        return _unmatched(place, "have different numbers of dimensions")
    tracked = _track(place)
    found = tracked or _by_shape(place)
    if found is None:
        return _unmatched(place, "do not correspond axis by axis")
    for axis, extent in enumerate(found.extents):
        if axis == found.channel:
            continue
        before, after = fork.shape[axis], join.shape[axis]
        if extent.lost < 0:
            return _unmatched(place, f"differ along axis {axis}, which the branch lengthens by {-extent.lost}")
        if isinstance(before, int) and isinstance(after, int):
            if extent.of(before) != after:
                return _unmatched(place, f"differ along axis {axis}")
        elif extent.same and before != after:
            return _unmatched(place, f"differ along axis {axis}")
    for shape in (fork.shape, join.shape):
        if not isinstance(shape[found.channel], int):
            return _unmatched(place, f"have a symbolic number of channels, along axis {found.channel}")
    return found


def show(shape: Shape | None) -> str:
    """A shape in a sentence."""
    return "?" if shape is None else "[" + ", ".join(str(extent) for extent in shape) + "]"


def _unmatched(place: Place, how: str) -> Refusal:
    shapes = f"{show(place.fork.shape)} at the fork and {show(place.join.shape)} at the join"
    return Refusal(place.name, f"the shapes {shapes} {how}: no shortcut matches them")


def _by_shape(place: Place) -> Geometry | None:
    """From shapes alone: equal but for the last axis, where no operation tells more (a recurrent layer of ONNX)."""
    fork, join = place.fork.shape or (), place.join.shape or ()
    return Geometry(len(fork) - 1, (Extent(),) * len(fork)) if fork[:-1] == join[:-1] else None


def _track(place: Place) -> Geometry | None:
    """Follow every axis of the fork through the branch; None where an operation mixes them."""
    inside = set(place.ops)
    way: list[tuple[Op, Value]] = []
    value = place.join
    while value is not place.fork:
        op = value.producer
        if op is None or op not in inside:
            return None
        below = _main_operand(op, inside, place.fork)
        if below is None:
            return None
        way.append((op, below))
        value = below
    rank = len(place.fork.shape or ())
    axes: list[int] = list(range(rank))  # the fork's axis that each axis of the value is
    extents: list[Extent | None] = [Extent()] * rank  # None where shortened and lengthened: the shapes tell
    channel: int | None = None
    for op, below in reversed(way):
        if op.kind is OpKind.PERMUTE:
            axes = [axes[axis] for axis in op.attr("perm")]
            continue
        change = _change(op, below)
        if change is None or len(change[1]) != len(axes):
            return None
        mixed, changes = change
        if mixed is not None:
            if channel is not None and channel != axes[mixed]:
                return None
            channel = axes[mixed]
        for axis, step in enumerate(changes):
            if axis == mixed:
                continue
            before = extents[axes[axis]]
            extents[axes[axis]] = None if before is None else before.then(step)
    if axes != list(range(rank)):
        return None
    if channel is None:
        channel = rank - 1 if rank < 3 else 1
    ends = zip(place.fork.shape or (), place.join.shape or (), strict=True)
    known = [extent or _resize(*end) for extent, end in zip(extents, ends, strict=True)]
    return None if None in known else Geometry(channel, tuple(extent for extent in known if extent is not None))


def _main_operand(op: Op, inside: set[Op], fork: Value) -> Value | None:
    """The operand that carries the stream: of several, the one whose shape the output has."""
    found = [value for value in op.operands if value is fork or (value.producer in inside)]
    same = [value for value in found if value.shape == op.output.shape]
    return same[0] if same and len(found) > 1 else found[0] if found else None


def _change(op: Op, below: Value) -> tuple[int | None, Sequence[Extent]] | None:
    """Which axis an operation mixes, and what it does to each; None where that cannot be said."""
    shape, after = below.shape, op.output.shape
    if shape is None or after is None:
        return None
    same = (Extent(),) * len(shape)
    if op.kind in (OpKind.CONV, OpKind.FUSED_CONV):
        return 1, _windows(op, _kernel(op))
    if op.kind in (OpKind.LINEAR, OpKind.FUSED_LINEAR, OpKind.RECURRENT):
        return (len(shape) - 1, same) if len(shape) == len(after) else None
    if op.kind is OpKind.MATMUL:
        right = op.inputs[1]
        return (len(shape) - 1, same) if op.inputs[0] is below and right is not None and right.constant else None
    if op.has(Trait.POOL) and "kernel" in op.kind.spec.attrs:
        return None, _windows(op, tuple(op.attr("kernel")))
    if op.kind is OpKind.PAD:
        pads, rank = op.attr("pads"), len(shape)
        return None, [Extent(lost=-(pads[axis] + pads[axis + rank])) for axis in range(rank)]
    if op.kind in (OpKind.INTERPOLATE, OpKind.CONV_TRANSPOSE, OpKind.ADAPTIVE_AVG_POOL):
        resized = _resized(shape, after)
        return None if resized is None else (1 if op.kind is OpKind.CONV_TRANSPOSE else None, resized)
    if op.kind is OpKind.CONCAT:
        return op.attr("axis"), same
    if op.has(Trait.SHAPE_PRESERVING) or op.has(Trait.ELEMENTWISE) or op.kind in _SAME or op.kind is OpKind.ATTENTION:
        return (None, same) if len(shape) == len(after) else None
    return None


def _kernel(op: Op) -> tuple[int, ...]:
    weight = op.operand("weight")
    shape = () if weight is None or weight.shape is None else weight.shape[2:]
    return tuple(extent for extent in shape if isinstance(extent, int))


def _windows(op: Op, kernel: tuple[int, ...]) -> list[Extent]:
    """Batch and channels as they are, then one change for each spatial dimension."""
    rank = len(kernel)
    stride = tuple(op.attr("stride")) or kernel
    pads = tuple(op.attr("pads")) or (0,) * (2 * rank)
    dilation = tuple(op.attr("dilation")) if "dilation" in op.kind.spec.attrs and op.attr("dilation") else (1,) * rank
    ceil = bool(op.kind.spec.attrs.get("ceil_mode") is not None and op.attr("ceil_mode"))
    found = [Extent(), Extent()]
    for axis in range(rank):
        lost = dilation[axis] * (kernel[axis] - 1) - pads[axis] - pads[axis + rank]
        found.append(Extent(stride[axis], lost - (stride[axis] - 1 if ceil else 0)))
    return found


def _resized(before: Shape, after: Shape) -> list[Extent] | None:
    """Enlarged by a whole factor, or cut down to a divisor, along each spatial axis."""
    found = [_resize(old, new) for old, new in zip(before[2:], after[2:], strict=True)]
    return None if None in found else [Extent(), Extent(), *(extent for extent in found if extent is not None)]


def _resize(old: Dim, new: Dim) -> Extent | None:
    """From one extent to another that is as large, a multiple or a divisor; None for any other."""
    if old == new:
        return Extent()
    if not isinstance(old, int) or not isinstance(new, int) or not old or not new:
        return None
    if new % old == 0:
        return Extent(factor=new // old)
    return Extent(old // new, old // new - 1) if old % new == 0 else None
