"""Sums: y = s + F(x), where s is x or comes from it by a free way or a projection, and F works.

1. The operands come from one value, the fork.
2. The way from the fork to one operand, the shortcut, is free of work or is a projection, and of two projections the
   one without an activation.
3. The way to another operand, the branch, works.
4. The shortcut is not broadcast: a bias or a table that is added everywhere is no stream.
5. It is no step of an unrolled recurrence.

Where several operands work on the same fork beside the shortcut, the block is `parallel` (see there). Where every
operand is affine in the fork and works, it is a sum of re-parameterisable `branches`:
y = B₀(x) + B₁(conv₃(x)) + B₂(conv₁(x)).
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

from rescompile.detection.chains import age
from rescompile.detection.constants import constant_operand, is_broadcast, may_be_stream
from rescompile.detection.flavours import comes_back
from rescompile.detection.fusions import fused_streams
from rescompile.detection.gates import only_measured, only_weighs, reached_by_gates_only
from rescompile.detection.judgement import Draft, Judgement, Refusal
from rescompile.detection.parallel import absorb, parallel_tail
from rescompile.detection.paths import Chain, branch_works, chain, step_back
from rescompile.detection.reach import Reach
from rescompile.detection.recurrences import shares_weights, takes_part
from rescompile.detection.streams import crossing
from rescompile.graph import Op, Value
from rescompile.kinds import OpKind, Trait

INTEGERS = ("int", "uint", "bool")
_TRIED = 16  # operands of a sum of many that are tried as the shortcut, oldest first: a skip is older than its branches
_PUT_TOGETHER = 8  # parts of a concatenation that are looked for in a branch, at most
_MOVES = 8  # free operations behind that concatenation, at most
_IDENTITY = Chain((), "identity", affine=True, working=False)
_PARTS = (OpKind.SLICE, OpKind.SPLIT, OpKind.GATHER)


def residual_sum(judgement: Judgement, op: Op) -> Draft | Refusal:
    """A block that ends in the sum `op`, or why it is none."""
    output = op.outputs[0]
    if output.dtype is not None and output.dtype.startswith(INTEGERS):
        return Refusal("integer arithmetic: the sum computes positions or sizes, not features")
    operands = [(index, value) for index, value in enumerate(op.inputs) if value is not None]
    if all(value is operands[0][1] for _, value in operands):
        return Refusal(f"x + x: every operand is '{operands[0][1].name}'", operands[0][1])
    if only_measured(judgement, op):
        return Refusal("a distance: the difference is only squared and summed up, as in a loss")
    if judgement.is_gone(op):
        text = "cancels: '{}' and '{}' are one stream at two places, so the difference is what was added in between"
        return Refusal(text.format(*(value.name for _, value in operands)), operands[0][1])
    streams = [item for item in operands if not item[1].constant or may_be_stream(judgement, item[1])]
    if len(streams) < 2:
        return constant_operand(operands)
    refusal: Refusal | None = None
    # The shortcut is the older operand where it is the fork itself; so the search mostly ends with the first.
    tried = sorted(streams, key=age)
    for index, skip in tried[:_TRIED] if len(streams) > 2 else tried[:1]:
        others = [item for item in streams if item[0] != index]
        found = _two(judgement, op, (index, skip), others)
        if isinstance(found, Draft):
            return found
        refusal = found if refusal is None or not refusal.working else refusal
    if refusal is None or any(value.constant for _, value in streams):
        return constant_operand(operands)
    return refusal


def sum_of_two(judgement: Judgement, op: Op, x: tuple[int, Value], y: tuple[int, Value]) -> Draft | Refusal:
    """A block that ends in an operation which adds two of its operands, each with its index, or why it is none."""
    if x[1] is y[1]:
        return Refusal(f"x + x: every operand is '{x[1].name}'", x[1])
    return _two(judgement, op, x, [y])


def _two(judgement: Judgement, op: Op, left: tuple[int, Value], rest: Sequence[tuple[int, Value]]) -> Draft | Refusal:
    """Judge one operand against the others; of two, either may be the shortcut."""
    found = _contracted(judgement, op, left, rest)
    dear = found.shortcut == "projection" if isinstance(found, Draft) else found.working
    if len(rest) == 1 and dear:
        for skip, other in ((left, rest[0]), (rest[0], left)):
            crossed = crossing(judgement, skip[1], other[1], through=True)
            if crossed is None or is_broadcast(skip[1], op.outputs[0]):
                continue
            draft = Draft(
                kind="add",
                shortcut=crossed.shortcut,
                fork=crossed.fork,
                join_op=op,
                join_value=op.outputs[0],
                skip_index=skip[0],
                branches=[other[1]],
                branch_ops=crossed.region,
                shortcut_ops=crossed.shortcut_ops,
                outside=crossed.outside,
            )
            if not only_weighs(judgement, draft):  # a bias that all layers add to their attention scores
                return draft
    if isinstance(found, Draft) and found.shortcut == "projection" and only_weighs(judgement, found):
        text = "a gate: two maps of '{}' are added to make factors or attention weights, not features"
        return Refusal(text.format(found.fork.name), found.fork)
    return found


def _contracted(
    judgement: Judgement, op: Op, left: tuple[int, Value], rest: Sequence[tuple[int, Value]]
) -> Draft | Refusal:
    """Judge one operand against the others, every block before being an identity."""
    reach = judgement.reach
    fork = reach.meet(left[1], [value for _, value in rest])
    if fork is None:
        names = _names(left, *rest)
        return Refusal(f"no common origin: none of {names} comes from another's stream, nor all from one value")
    sides = [(left, rest)] if len(rest) > 1 else [(left, rest), (rest[0], [left])]
    for skip, others in sides:
        if skip[1] is fork:  # no shortcut ranks before the fork itself, so the other way need not be followed
            found = _block(judgement, op, fork, _IDENTITY, skip, others)
            if isinstance(found, Draft):
                return found
    ranked: list[tuple[Chain, tuple[int, Value], Sequence[tuple[int, Value]]]] = []
    for skip, others in sides:
        way = chain(reach, fork, skip[1])
        if way is not None and way.shortcut is not None:
            ranked.append((way, skip, others))
    if not ranked:
        whole = _put_together(judgement, op, sides)
        if whole is not None:
            return whole
        branches = _branches(judgement, op, fork, (left, *rest)) or fused_streams(judgement, op, fork, (left, *rest))
        if branches is not None:
            return branches
        text = (
            f"two working branches: {_names(left, *rest)} both work on what they come from, '{fork.name}', so neither "
            "is a shortcut" + _undecided(reach, fork, (left, *rest))
        )
        return Refusal(text, fork, working=True)
    ranked.sort(key=lambda item: (item[0].rank, len(item[0].ops)))
    refusal: Refusal | None = None
    for way, skip, others in ranked:
        found = _block(judgement, op, fork, way, skip, others)
        if isinstance(found, Draft):
            return found
        if refusal is None:
            refusal = found
    return refusal if refusal is not None else Refusal("no shortcut", fork)


def _put_together(
    judgement: Judgement, op: Op, sides: Sequence[tuple[tuple[int, Value], Sequence[tuple[int, Value]]]]
) -> Draft | None:
    """y = [a, b] + F(a, b): the branch took the parts one by one, which are put together for the sum (TimeSformer).

    The fork is the part that is a stream, or the largest; what the branch makes of the others enters it from outside.
    """
    reach = judgement.reach
    for skip, others in sides:
        way: list[Op] = []
        value = skip[1]
        while (maker := value.producer) is not None and value not in reach.forks and len(way) < _MOVES:
            way.append(maker)
            if maker.kind is OpKind.CONCAT or not maker.has(Trait.FREE):
                break
            value = maker.operands[0]
        parts = reach.sources(value)
        if not way or way[-1].kind is not OpKind.CONCAT or not 2 <= len(parts) <= _PUT_TOGETHER:
            continue
        tops = [top for _, top in others]
        if all(reach.meet(part, tops) is part for part in parts):
            ways = Chain(tuple(way[::-1]), "view", affine=True, working=False)
            fork = max(parts, key=lambda part: (part in reach.forks, _size(part)))
            found = _block(judgement, op, fork, ways, skip, others)
            if isinstance(found, Draft):
                return found
    return None


def _size(value: Value) -> int:
    """Number of elements, as far as it is known."""
    return prod(extent for extent in value.shape or () if isinstance(extent, int))


def _branches(judgement: Judgement, op: Op, fork: Value, operands: Sequence[tuple[int, Value]]) -> Draft | None:
    """The sum as re-parameterisable branches, none of which could be a shortcut: y = conv₃(x) + conv₅(x)."""
    ways = [chain(judgement.reach, fork, value) for _, value in operands]
    if any(way is None or not (way.affine and way.working) or takes_part(way.ops) for way in ways):
        return None
    tops = [value for _, value in operands]
    region, outside = judgement.reach.between(fork, tops)
    return Draft(
        kind="branches",
        shortcut="projection",
        fork=fork,
        join_op=op,
        join_value=op.outputs[0],
        skip_index=operands[0][0],
        branches=tops,
        branch_ops=region,
        shortcut_ops=[],
        outside=outside,
    )


def _undecided(reach: Reach, fork: Value, operands: Sequence[tuple[int, Value]]) -> str:
    """What to add where one side could be a projection, if the shape of a kernel were known."""
    for _, value in operands[:_TRIED]:
        at: Value | None = value
        while at is not None and at is not fork and (op := at.producer) is not None:
            if op.kind is OpKind.CONV and op.inputs[1] is not None and op.inputs[1].shape is None:
                return f"; undecided: whether the kernel of '{op.name}' has one element, for its shape is not known"
            if op.kind is OpKind.OPAQUE:
                return f"; undecided: whether '{op.name}', which is opaque, is a projection"
            at = step_back(reach, at)
    return ""


def _names(*operands: tuple[int, Value]) -> str:
    more = f" and {len(operands) - 8} more" if len(operands) > 8 else ""
    return " and ".join(f"'{value.name}'" for _, value in operands[:8]) + more


def _block(
    judgement: Judgement, op: Op, fork: Value, way: Chain, skip: tuple[int, Value], others: Sequence[tuple[int, Value]]
) -> Draft | Refusal:
    reach = judgement.reach
    tops = [value for _, value in others]
    region, outside = reach.between(fork, tops)
    if not branch_works(reach, region):
        if way.sums:
            return Refusal(f"no working branch: nothing works between '{fork.name}' and the sum", fork)
        path = ", ".join(member.name for member in region[:4]) or "nothing"
        return Refusal(f"no working branch: {path} between '{fork.name}' and the sum transforms nothing", fork)
    if fork.constant and _only_added(judgement, fork, region):
        return constant_operand([skip, *others])
    in_part = bool(way.ops) and takes_part(way.ops)
    if in_part and shares_weights(region):
        judgement.recurrences.add(op)
        return Refusal(f"unrolled recurrence: the steps on '{fork.name}' share their weights", fork)
    if in_part and way.working and _works_on_parts(judgement, fork, region):
        text = f"two working branches: '{skip[1].name}' and the others work on parts of '{fork.name}' that differ"
        return Refusal(text, fork, working=True)
    if way.shortcut == "view" and all(reached_by_gates_only(reach, fork, region, top) for top in tops):
        return Refusal(f"a gate: the rest of '{fork.name}' only weighs what '{skip[1].name}' is added to", fork)
    if is_broadcast(skip[1], op.outputs[0]):
        return Refusal(f"broadcast: '{skip[1].name}' is smaller than the sum, so it is no stream", fork)
    draft = Draft(
        kind="add",
        shortcut=way.shortcut or "identity",
        fork=fork,
        join_op=op,
        join_value=op.outputs[0],
        skip_index=skip[0],
        branches=tops,
        branch_ops=region,
        shortcut_ops=list(way.ops),
        outside=outside,
    )
    if skip[1].shape is None or op.outputs[0].shape is None:
        draft.undecided.append(f"whether '{skip[1].name}' is broadcast: its shape, or the sum's, is not known")
    if way.working:
        if len(tops) == 1 and _is_other_projection(way, chain(reach, fork, tops[0])):
            text = f"two working branches: '{skip[1].name}' and '{tops[0].name}' are projections of '{fork.name}' alike"
            return Refusal(text, fork, working=True)
        ways = [chain(reach, fork, value) for value in tops]
        affine = all(other is not None and other.affine and other.working for other in ways)
        parted = [other for other in (way, *ways) if other is not None and takes_part(other.ops)]
        if affine and way.affine and parted:
            text = f"two working branches: each of them maps a part of '{fork.name}'"
            return Refusal(text, fork, working=True)
    if way.sums and any(comes_back(judgement, draft)):
        return draft  # the stream that runs through another block is what is joined
    if way.sums:
        return absorb(judgement, draft, way, affine)
    if way.working and way.affine and affine:
        draft.kind = "branches"
        draft.branch_ops = sorted({*region, *way.ops}, key=lambda member: member.order)
        draft.branches = [skip[1], *tops]
        draft.shortcut_ops = []
        return draft
    parallel_tail(judgement, draft)
    return draft


def _only_added(judgement: Judgement, table: Value, region: Sequence[Op]) -> bool:
    """Whether a constant came into the region as a table that was added to a stream: it starts none of its own."""
    readers = [op for op in region if table in judgement.reach.sources(op.outputs[0])]
    return bool(readers) and all(
        op.kind is OpKind.ADD and op in judgement.refusals and not op.outputs[0].constant for op in readers
    )


def _works_on_parts(judgement: Judgement, fork: Value, region: Sequence[Op]) -> bool:
    """Whether what works in the region reads parts of the fork only."""
    whole = {fork}
    for op in region:
        if op.kind in _PARTS or whole.isdisjoint(judgement.reach.sources(op.outputs[0])):
            continue
        if not op.has(Trait.FREE):
            return False
        whole.update(op.outputs)
    return True


def _is_other_projection(way: Chain, other: Chain | None) -> bool:
    """Whether both ways are a linear or a 1×1 convolution with a norm or an activation: neither is a shortcut.

    Of N(W·x) and relu(V·x) the one without an activation is.
    """
    if other is None or other.shortcut != "projection" or way.affine:
        return False
    if _activates(other) and not _activates(way):
        return False
    return all(any(op.kind in (OpKind.CONV, OpKind.LINEAR) for op in each.ops) for each in (way, other))


def _activates(way: Chain) -> bool:
    return any(op.has(Trait.ACTIVATION) for op in way.ops)
