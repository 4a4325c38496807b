"""Concatenations: y = [x, F(x)], where x is the fork or a part of it and F works (DenseNet, ShuffleNet v2, U-Net)."""

from __future__ import annotations

from itertools import islice

from rescompile.detection.chains import age, order
from rescompile.detection.flavours import comes_back
from rescompile.detection.gates import is_gate, reached_by_gates_only
from rescompile.detection.judgement import Draft, Judgement, Refusal
from rescompile.detection.paths import Chain, branch_works, chain, works
from rescompile.detection.recurrences import shares_weights, takes_part
from rescompile.detection.streams import crossing
from rescompile.graph import Op, Value
from rescompile.kinds import OpKind, Trait

_FREE = ("identity", "view")
_TRIED = 3  # operands that are tried as the new features, newest first
_LAST = (OpKind.LINEAR, OpKind.LAYER_NORM, OpKind.RMS_NORM)  # of tokens [N, T, C]: features are the last axis
_FIRST = (OpKind.CONV, OpKind.CONV_TRANSPOSE, OpKind.BATCH_NORM, OpKind.GROUP_NORM, OpKind.INSTANCE_NORM)
_RESIZES = (OpKind.AVG_POOL, OpKind.INTERPOLATE)
_SAME_AXES = (OpKind.SLICE, OpKind.SPLIT, OpKind.CONCAT)
_GATE = "a gate: '{}' only weighs what it is concatenated with"
_LOOKED_AT = 12  # operations behind a concatenation, until one tells which axis holds features


def residual_concat(judgement: Judgement, op: Op) -> Draft | Refusal:
    """A block that ends in the concatenation `op`, or why it is none.

    1. One operand, the new features, comes from another one, the old ones, by a way that works.
    2. The old ones are the fork, or come from it by a free way; or, of two parts, by an average pool or a resampling.
    3. What reads the concatenation reads its axis as features: a class token in front of others is none.
    """
    output = op.outputs[0]
    if output.dtype is not None and output.dtype.startswith(("int", "uint", "bool")):
        return Refusal("integer arithmetic: the concatenation holds positions or sizes, not features")
    axis = op.attr("axis")
    parts = [(index, value) for index, value in enumerate(op.inputs) if value is not None]
    moving = [part for part in parts if not part[1].constant]
    if len(parts) < 2:
        judgement.concats[tuple(value for _, value in parts)] = output
        return Refusal("a concatenation of one value")
    if all(_extent(value, axis) == 1 for _, value in parts):
        return Refusal("a stack: each value has a place of its own on the axis, nothing reads them as features")
    if len(moving) < 2:
        return Refusal("constant: all operands but one are constants")
    judgement.concats[tuple([value for _, value in parts])] = output
    features = _feature_axis(output)
    if features is not None and features != axis:
        return Refusal(f"positions: the parts lie beside each other on axis {axis}, features on {features}")
    gated = _gated_skip(judgement, op, moving)
    if gated is not None:
        return gated
    newest = sorted(moving, key=age, reverse=True)
    meet: Value | None = None
    working = False
    weighing: Refusal | None = None
    for index, new in newest[:_TRIED]:
        before = judgement.concats.get(tuple([value for other, value in parts if other != index]))
        if before is not None and order(before) < order(new) and judgement.reach.comes_from(before, new):
            return _appended(judgement, op, before, (index, new))
        old = [part for part in moving if part[0] != index and part[1] is not new]
        fork = judgement.reach.meet(new, [value for _, value in old])
        if fork is None:
            continue
        meet = meet or fork
        found = _grown(judgement, op, fork, (index, new), old)
        if isinstance(found, Draft):
            return found
        working = working or found.working
        weighing = found if found.reason == _GATE.format(fork.name) else weighing
    names = ", ".join(f"'{value.name}'" for _, value in moving[:4])
    if meet is None:
        return Refusal(f"no common origin: {names} come from streams of their own")
    if working:
        across = _across(judgement, op, newest) or _resized(judgement, op, newest)
        if across is not None:
            return across
        return Refusal(f"two working branches: {names} all work on what they come from, '{meet.name}'", meet)
    if weighing is not None:
        return weighing
    return Refusal(f"no working branch: nothing works between '{meet.name}' and the concatenation", meet)


def _extent(value: Value, axis: int) -> int | str | None:
    """Extent along an axis; None when unknown, and for the empty vector that torch lets pass as any empty tensor."""
    return value.shape[axis] if value.shape is not None and axis < len(value.shape) else None


def _feature_axis(value: Value) -> int | None:
    """The axis that the nearest norm, linear or convolution behind `value` mixes or scales; None when none is near."""
    rank = value.rank
    if rank is None:
        return None
    # And where each axis comes from, None for one that a reshape added.
    pending: list[tuple[Value, tuple[int | None, ...]]] = [(value, tuple(range(rank)))]
    for _ in range(_LOOKED_AT):
        if not pending:
            return None
        value, axes = pending.pop(0)
        for user, index in islice(value.uses, _LOOKED_AT):
            last = len(axes) - 1
            reads_last = user.kind in _LAST and (user.kind is OpKind.LINEAR or user.attr("axis") in (-1, last))
            if index == 0 and (reads_last or user.kind in _FIRST) and last > 0:
                return axes[last if reads_last else 1]
            if user.kind is OpKind.PERMUTE:
                pending.append((user.outputs[0], tuple(axes[axis] for axis in user.attr("perm"))))
            elif user.kind is OpKind.RESHAPE and (moved := _through_ones(value, user.outputs[0])) is not None:
                pending.append((user.outputs[0], tuple(None if axis is None else axes[axis] for axis in moved)))
            elif user.has(Trait.ELEMENTWISE) or user.kind in _SAME_AXES:
                pending.extend((output, axes) for output in user.outputs if output.rank == len(axes))
    return None


def _through_ones(before: Value, after: Value) -> list[int | None] | None:
    """Where the axes of a value come from that a reshape only gave, or took, axes of extent 1; None for any other."""
    if before.shape is None or after.shape is None:
        return None
    kept = [axis for axis, extent in enumerate(before.shape) if extent != 1]
    if [before.shape[axis] for axis in kept] != [extent for extent in after.shape if extent != 1]:
        return None
    rest = iter(kept)
    return [None if extent == 1 else next(rest) for extent in after.shape]


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
    if tops and all(reached_by_gates_only(reach, fork, region, top) for top in tops):
        return Refusal(_GATE.format(fork.name), fork)
    skip = max(free, key=lambda index: -1 if ways[index] is None else order(dict((new, *old))[index]))
    way = ways[skip]
    shortcut = "identity" if way is None or way.shortcut is None else way.shortcut
    if way is not None and takes_part(way.ops) and shares_weights(region):
        judgement.recurrences.add(op)
        return Refusal("unrolled recurrence", fork)
    tops = [top for top in tops if order(top) > order(fork)]
    free_way = Chain(() if way is None else way.ops, shortcut, affine=True, working=False)
    return _draft(op, fork, (skip, free_way), tops, region, outside)


def _across(judgement: Judgement, op: Op, newest: list[tuple[int, Value]]) -> Draft | None:
    """An earlier value beside others that were made of it over another stream, or at another resolution.

    The latter may pass through a projection of its own (DeepLab v3+): then all others come from that resolution.
    """
    for index, new in newest[:_TRIED]:
        for skip, old in newest[-_TRIED:]:
            crossed = crossing(judgement, old, new) if skip != index and order(old) < order(new) else None
            if crossed is None or reached_by_gates_only(
                judgement.reach, crossed.fork, crossed.region, new, through=True
            ):
                continue
            moved = Chain(tuple(crossed.shortcut_ops), crossed.shortcut, affine=True, working=False)
            return _draft(op, crossed.fork, (skip, moved), [new], crossed.region, crossed.outside)
    for skip, old in newest[-_TRIED:]:
        others = [value for other, value in newest if other != skip]
        fork = judgement.reach.meet(old, others)
        way = None if fork is None else chain(judgement.reach, fork, old)
        if fork is None or way is None or way.shortcut != "projection" or way.sums:
            continue
        region, outside = judgement.reach.between(fork, others)
        draft = _draft(op, fork, (skip, way), others, region, outside)
        back = comes_back(judgement, draft)
        if back and all(back):
            return draft
    return None


def _resized(judgement: Judgement, op: Op, parts: list[tuple[int, Value]]) -> Draft | None:
    """[pool(x), F(x)]: the fork, averaged or enlarged to the resolution that its branch goes to (ShuffleNet v1).

    What works last in the branch has weights: of [up(x), up(F(x))] or two kinds of pool neither is the other's skip.
    """
    if len(parts) != 2:
        return None
    for (skip, old), (_, new) in (parts, parts[::-1]):
        fork = judgement.reach.meet(new, [old])
        way = None if fork is None else chain(judgement.reach, fork, old)
        if fork is None or way is None or way.shortcut != "pool" or way.sums:
            continue
        if not all(step.kind in _RESIZES or step.has(Trait.FREE) for step in way.ops):
            continue
        region, outside = judgement.reach.between(fork, [new])
        working = [member for member in region if works(member) and not member.has(Trait.NORM)]
        if working and working[-1].has(Trait.PARAMETRIC):
            return _draft(op, fork, (skip, way), [new], region, outside)
    return None


def _gated_skip(judgement: Judgement, op: Op, moving: list[tuple[int, Value]]) -> Draft | None:
    """[x·σ(…), F(x)] with F by another resolution and back: an earlier stage's value, weighed (Oktay et al. 2018)."""
    for skip, value in moving:
        product = value.producer
        if product is None or product.kind is not OpKind.MUL or len(value.uses) != 1:
            continue
        for x, gate in (product.inputs, product.inputs[::-1]):
            others = [part for other, part in moving if other != skip]
            if x is None or gate is None or not is_gate(gate):
                continue
            fork = judgement.reach.meet(x, others)
            way = None if fork is None else chain(judgement.reach, fork, x)
            if fork is None or way is None or way.shortcut not in _FREE or way.sums:
                continue
            region, outside = judgement.reach.between(fork, [*others, gate])
            weighed = Chain((*way.ops, product), way.shortcut, affine=False, working=False)
            draft = _draft(op, fork, (skip, weighed), others, region, outside)
            back = comes_back(judgement, draft)
            if back and all(back):
                return draft
    return None


def _draft(
    op: Op, fork: Value, skip: tuple[int, Chain], branches: list[Value], region: list[Op], outside: list[Value]
) -> Draft:
    return Draft(
        kind="dense",
        shortcut=skip[1].shortcut or "identity",
        fork=fork,
        join_op=op,
        join_value=op.outputs[0],
        skip_index=skip[0],
        branches=branches,
        branch_ops=region,
        shortcut_ops=list(skip[1].ops),
        outside=outside,
    )


def _appended(judgement: Judgement, op: Op, fork: Value, new: tuple[int, Value]) -> Draft | Refusal:
    """The features of an earlier concatenation, once more, and what was made of all of them."""
    region, outside = judgement.reach.between(fork, [new[1]])
    if not branch_works(judgement.reach, region):
        return Refusal(f"no working branch: nothing works between '{fork.name}' and the concatenation", fork)
    skip = next(index for index, value in enumerate(op.inputs) if value is not None and index != new[0])
    return _draft(op, fork, (skip, Chain((), "identity", affine=True, working=False)), [new[1]], region, outside)
