"""Sums of a stack: stack([a, b]).sum(0) = a + b, and its mean, whichever way the stack is made."""

from __future__ import annotations

from rescompile.composites.region import Recogniser
from rescompile.graph import Op, Shape, Value
from rescompile.kinds import OpKind


def stacked_sum(recogniser: Recogniser, reduction: Op) -> Op | None:
    """An ADD in the place of a sum or mean over an axis on which each value has one place; None when it is none.

    1. The sum is over the axis of a concatenation that nothing else reads.
    2. Each value was given that axis, as an extent of 1, by a reshape.
    """
    stack = reduction.operands[0].producer
    if stack is None or stack.kind is not OpKind.CONCAT or len(stack.inputs) < 2:
        return None
    axis, rank = stack.attr("axis"), reduction.operands[0].rank
    axes = tuple(reduction.attr("axes"))
    if rank is None or len(axes) != 1 or axes[0] % rank != axis % rank:
        return None
    region, parts = [reduction, stack], list[Value]()
    for value in stack.operands:
        maker = value.producer
        if maker is None or maker.kind is not OpKind.RESHAPE or not _unsqueezes(maker, axis % rank):
            return None
        if all(user is stack for user, _ in value.uses):
            region.append(maker)
        parts.append(maker.operands[0])
    if reduction.attr("keepdims") and axis % rank != 0:
        return None
    mean = reduction.kind is OpKind.MEAN
    attrs = {"scales": (1.0 / len(parts),) * len(parts)} if mean else {}
    return recogniser.cover(region, OpKind.ADD, parts, reduction.output, attrs)


def _unsqueezes(op: Op, axis: int) -> bool:
    before: Shape | None = op.operands[0].shape
    after = op.output.shape
    return before is not None and after is not None and after == (*before[:axis], 1, *before[axis:])
