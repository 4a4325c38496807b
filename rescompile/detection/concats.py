"""Concatenations: y = [x, F(x)], where x is the fork or a part of it and F works (DenseNet, ShuffleNet v2, U-Net)."""

from __future__ import annotations

from rescompile.detection.chains import order
from rescompile.detection.judgement import Draft, Judgement, Refusal
from rescompile.detection.paths import branch_works, chain
from rescompile.graph import Op, Value

_FREE = ("identity", "view")
_TRIED = 3  # operands that are tried as the new features, newest first


def residual_concat(judgement: Judgement, op: Op) -> Draft | Refusal:
    """A block that ends in the concatenation `op`, or why it is none.

    1. One operand, the new features, comes from another one, the old ones, by a way that works.
    2. The old ones are the fork, or come from it by a free way.
    """
    output = op.outputs[0]
    if output.dtype is not None and output.dtype.startswith(("int", "uint", "bool")):
        return Refusal("integer arithmetic: the concatenation holds positions or sizes, not features")
    parts = [(index, value) for index, value in enumerate(op.inputs) if value is not None]
    moving = [(index, value) for index, value in parts if not value.constant]
    if len(parts) < 2:
        judgement.concats[tuple(value for _, value in parts)] = output
        return Refusal("a concatenation of one value")
    if all(_extent(value, op.attr("axis")) == 1 for _, value in parts):
        return Refusal("a stack: each value has a place of its own on the axis, nothing reads them as features")
    if len(moving) < 2:
        return Refusal("constant: all operands but one are constants")
    judgement.concats[tuple(value for _, value in parts)] = output
    newest = sorted(moving, key=lambda item: order(item[1]), reverse=True)
    meet: Value | None = None
    working = False
    for index, new in newest[:_TRIED]:
        before = judgement.concats.get(tuple(value for other, value in parts if other != index))
        if before is not None and order(before) < order(new) and judgement.reach.comes_from(before, new):
            return _appended(judgement, op, before, (index, new))
        old = [(other, value) for other, value in moving if other != index and value is not new]
        fork = judgement.reach.meet(new, [value for _, value in old])
        if fork is None:
            continue
        meet = meet or fork
        found = _grown(judgement, op, fork, (index, new), old)
        if isinstance(found, Draft):
            return found
        working = working or found.working
    names = ", ".join(f"'{value.name}'" for _, value in moving[:4])
    if meet is None:
        return Refusal(f"no common origin: {names} come from streams of their own")
    if working:
        return Refusal(f"two working branches: {names} all work on what they come from, '{meet.name}'", meet)
    return Refusal(f"no working branch: nothing works between '{meet.name}' and the concatenation", meet)


def _extent(value: Value, axis: int) -> int | str | None:
    """Extent along an axis; None when unknown, and for the empty vector that torch lets pass as any empty tensor."""
    return value.shape[axis] if value.shape is not None and axis < len(value.shape) else None


def _grown(
    judgement: Judgement, op: Op, fork: Value, new: tuple[int, Value], old: list[tuple[int, Value]]
) -> Draft | Refusal:
    reach = judgement.reach
    ways = {index: chain(reach, fork, value) for index, value in (new, *old)}
    free = [index for index, way in ways.items() if way is not None and way.shortcut in _FREE and not way.sums]
    if not free:
        return Refusal("two working branches", fork, working=True)
    tops = [value for index, value in (new, *old) if index not in free]
    # Of old features that are no part of the fork, those count that come from it; a search tells the newest only.
    region, outside = reach.between(fork, [top for top in tops if order(top) > order(fork)])
    if not branch_works(reach, region):
        return Refusal("no working branch", fork)
    skip = max(free, key=lambda index: -1 if ways[index] is None else order(dict((new, *old))[index]))
    way = ways[skip]
    shortcut = "identity" if way is None or way.shortcut is None else way.shortcut
    return Draft(
        kind="dense",
        shortcut=shortcut,
        fork=fork,
        join_op=op,
        join_value=op.outputs[0],
        skip_index=skip,
        branches=[top for top in tops if order(top) > order(fork)],
        branch_ops=region,
        shortcut_ops=[] if way is None else list(way.ops),
        outside=outside,
    )


def _appended(judgement: Judgement, op: Op, fork: Value, new: tuple[int, Value]) -> Draft | Refusal:
    """The features of an earlier concatenation, once more, and what was made of all of them."""
    region, outside = judgement.reach.between(fork, [new[1]])
    if not branch_works(judgement.reach, region):
        return Refusal(f"no working branch: nothing works between '{fork.name}' and the concatenation", fork)
    skip = next(index for index, value in enumerate(op.inputs) if value is not None and index != new[0])
    return Draft(
        kind="dense",
        shortcut="identity",
        fork=fork,
        join_op=op,
        join_value=op.outputs[0],
        skip_index=skip,
        branches=[new[1]],
        branch_ops=region,
        shortcut_ops=[],
        outside=outside,
    )
