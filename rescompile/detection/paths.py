"""What one way from fork to join does: nothing, a projection, or work."""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

from rescompile.detection.chains import order
from rescompile.detection.reach import Reach
from rescompile.graph import Op, Value
from rescompile.kinds import OpKind, Trait

# The kinds of shortcut, from free to dear.
_RANK = {"identity": 0, "view": 1, "pad": 2, "pool": 3, "projection": 4}

# Steps that leave a way free of work and of moved elements. An ADD with one way back adds constants only.
_NOTHING = (
    OpKind.IDENTITY,
    OpKind.CAST,
    OpKind.QUANTIZE,
    OpKind.DEQUANTIZE,
    OpKind.NEG,
    OpKind.DROPOUT,
    OpKind.ADD,
)


# Free operations that move nothing where they leave the shape as it is.
_KEEPING = (OpKind.RESHAPE, OpKind.EXPAND, OpKind.SLICE, OpKind.SPLIT)

# Besides pools: over an axis that a reshape made of the elements of a window, a mean or a maximum is one.
RESIZING = (OpKind.INTERPOLATE, OpKind.MEAN, OpKind.AMAX)


class Chain(msgspec.Struct, frozen=True):
    """The operations from a fork to one operand of a join, one after the other, each reading only the one before."""

    ops: tuple[Op, ...]
    shortcut: str | None  # the kind of shortcut that the chain could be; None when it does more than one may
    affine: bool  # linear in the fork but for constants
    working: bool  # holds an operation that works
    sums: tuple[Op, ...] = ()  # joins of other blocks with the same fork that the chain runs through

    @property
    def rank(self) -> int:
        """How dear the shortcut is."""
        return len(_RANK) if self.shortcut is None else _RANK[self.shortcut]


# Statistics alone (a mean, a sum, the k largest) do not work: global response normalisation is no residual block.
_STATISTICS = (OpKind.SOFTMAX, OpKind.CUMSUM, OpKind.TOPK)
_WORKING = frozenset(
    kind for kind in OpKind if kind.has(Trait.WORK) and not kind.has(Trait.REDUCTION) and kind not in _STATISTICS
)


def works(op: Op) -> bool:
    """Whether the operation makes a branch a working one: it mixes or transforms with weights or across positions."""
    return op.kind in _WORKING and (op.kind is not OpKind.OPAQUE or bool(op.attr("works")))


def branch_works(reach: Reach, region: Iterable[Op]) -> bool:
    """Whether a region holds an operation that works; a block nested in it does."""
    forks = reach.forks
    return any(works(op) or op.outputs[0] in forks for op in region)


def is_pointwise(op: Op) -> bool:
    """Whether a contraction is a linear, or a convolution with a kernel of one element."""
    if op.kind is OpKind.LINEAR:
        return True
    weight = op.inputs[1] if op.kind is OpKind.CONV else None
    return weight is not None and weight.shape is not None and all(extent == 1 for extent in weight.shape[2:])


def _is_depthwise(op: Op) -> bool:
    """Whether a convolution maps each channel to one of its own."""
    weight = op.inputs[1] if op.kind is OpKind.CONV else None
    return weight is not None and weight.shape is not None and weight.shape[:2] == (op.attr("groups"), 1)


def _is_strided(op: Op) -> bool:
    return op.kind is OpKind.CONV and any(step != 1 for step in op.attr("stride"))


def keeps_all(op: Op) -> bool:
    """Whether a free operation leaves every element where it is: an identity, a cast, x[:n] of n elements."""
    if op.kind in (OpKind.IDENTITY, OpKind.CAST):
        return True
    shape = op.outputs[0].shape
    if op.kind not in _KEEPING or shape is None or op.operands[0].shape != shape:
        return False
    return op.kind is not OpKind.SLICE or all(step == 1 for step in op.attr("steps"))


def is_scale(op: Op) -> bool:
    """Whether the operation multiplies or divides by a constant."""
    return op.kind in (OpKind.MUL, OpKind.DIV) and any(value.constant for value in op.operands)


def step_back(reach: Reach, value: Value) -> Value | None:
    """The one value that leads to `value`, not counting constants."""
    sources = reach.sources(value)
    if len(sources) > 1:
        sources = tuple(source for source in sources if not source.constant)
    return sources[0] if len(sources) == 1 else None


def _padded(reach: Reach, value: Value) -> Value | None:
    """`x`, where the value is [x, 0·x] or [x, 0]: He's option A."""
    op = value.producer
    if op is None or op.kind is not OpKind.CONCAT:
        return None
    moving = [source for source in reach.sources(value) if not source.constant and not _is_zero(reach, source)]
    return moving[0] if len(moving) == 1 else None


def _is_zero(reach: Reach, value: Value) -> bool:
    op = value.producer
    if op is None or op.kind is not OpKind.MUL:
        return False
    return any(operand.constant and reach.graph.scalar(operand) == 0.0 for operand in op.operands)


def _pads_channels(op: Op) -> bool:
    """Whether the padding is along the channels of [N, C, ...], not along the extents of an image."""
    if op.kind is OpKind.CONCAT:
        return bool(op.attr("axis") == 1)
    pads = tuple(op.attr("pads"))
    half = len(pads) // 2
    return half > 2 and bool(pads[1] or pads[half + 1])


def _parts(reach: Reach, joined: Value) -> tuple[Value | None, tuple[Chain, ...]]:
    """Where the two parts of a concatenation come from, and how, if it puts together again what slices took apart.

    [x[:1], pool(x[1:])] pools the tokens behind a class token; [max(x), mean(x)] pools in two ways.
    """
    sources = [source for source in reach.sources(joined) if not source.constant]
    if joined in reach.forks or len(sources) != 2:
        return None, ()
    origin = reach.meet(sources[0], sources[1:])
    if origin is None:
        return None, ()
    ways = [chain(reach, origin, source) for source in sources]
    if not all(way is not None and way.shortcut is not None and not way.sums and _is_part(way) for way in ways):
        return None, ()
    return origin, tuple(way for way in ways if way is not None)


def _is_part(way: Chain) -> bool:
    return way.shortcut == "pool" or (bool(way.ops) and way.ops[0].kind in (OpKind.SLICE, OpKind.SPLIT))


def chain(reach: Reach, fork: Value, top: Value) -> Chain | None:
    """The chain from `fork` to `top`; None when the way is none, because operations on it read other streams too."""
    bound = order(fork)
    ops: list[Op] = []
    sums: list[Op] = []
    contractions = depthwise = spatial = strided = norms = activations = views = pads = 0
    channels = pools = bends = others = 0
    value = top
    while value is not fork:
        op = value.producer
        below = step_back(reach, value) or _padded(reach, value)
        parts: tuple[Chain, ...] = ()
        if op is not None and op.order > bound and below is None and op.kind is OpKind.CONCAT:
            below, parts = _parts(reach, value)
        if op is None or below is None or op.order <= bound:
            return None
        ops.append(op)
        if parts:
            ops.extend(sorted({member for way in parts for member in way.ops}, key=lambda op: -op.order))
            contractions += any(member.kind in (OpKind.CONV, OpKind.LINEAR) for way in parts for member in way.ops)
            norms += any(way.shortcut == "projection" for way in parts)
            pools += any(way.shortcut == "pool" for way in parts)
            pads += any(way.shortcut == "pad" for way in parts)
            views += 1
            bends += not all(way.affine for way in parts)
        elif value in reach.forks:
            if reach.forks[value] is not fork or len(op.outputs[0].uses) != 1:
                return None
            sums.append(op)
        elif op.kind in (OpKind.CONV, OpKind.LINEAR):
            contractions += 1
            strided += _is_strided(op)
            if not is_pointwise(op):
                spatial += 1
                depthwise += _is_depthwise(op)
        elif op.has(Trait.NORM):
            norms += 1
            bends += op.kind is not OpKind.BATCH_NORM
        elif op.has(Trait.POOL) or op.kind in RESIZING:
            pools += 1
            bends += op.kind in (OpKind.MAX_POOL, OpKind.AMAX)
        elif op.kind is OpKind.PAD or op.kind is OpKind.CONCAT:
            pads += 1
            channels += _pads_channels(op)
        elif op.kind is OpKind.SCATTER and op.inputs[0] is not None and op.inputs[0].constant:
            pads += 1
        elif op.kind is OpKind.GATHER and op.inputs[1] is not None and op.inputs[1].constant:
            views += 1
        elif op.kind in _NOTHING or is_scale(op):
            pass
        elif op.has(Trait.FREE):
            views += not keeps_all(op)
        elif op.has(Trait.ACTIVATION):
            activations += 1
            bends += 1
        else:
            others += 1
            bends += 1
        if contractions > 1 and bends:  # neither a shortcut nor affine, however it goes on
            break
        value = below
    ops.reverse()
    shortcut: str | None
    # Of convolutions with a larger kernel those are projections that change the extent, or are half of a separable
    # one: a depthwise one alone, at one resolution, is a position encoding. None has an activation.
    separable = spatial == depthwise == 1 and contractions == 2
    bent = activations and not (contractions or norms or sums)  # relu(x) is another value than x, and no projection
    spread = spatial and (activations or not (strided or separable))
    if others or bent or spread or (contractions > 1 and not separable):
        shortcut = None
    elif contractions or norms or activations:
        shortcut = "projection"
    else:
        shortcut = "pad" if channels else "pool" if pools else "pad" if pads else "view" if views else "identity"
    working = any(works(op) for op in ops) or bool(sums)
    return Chain(tuple(ops), shortcut, not bends and contractions <= 1 and not sums, working, tuple(sums))
