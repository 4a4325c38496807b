"""What makes of a plain sum or concatenation a long, recurrent or stochastic one: one row for each kind."""

from __future__ import annotations

from collections.abc import Callable

from rescompile.detection.judgement import Draft, Judgement
from rescompile.graph import Op, Shape, Value
from rescompile.kinds import OpKind, Trait

_PARTS = (OpKind.SLICE, OpKind.SPLIT)
_MAY_ENLARGE = frozenset((OpKind.INTERPOLATE, OpKind.CONV_TRANSPOSE, OpKind.RESHAPE, OpKind.OPAQUE))
_FACTORS = frozenset((OpKind.MUL, OpKind.DIV, OpKind.WHERE))
_LOOKED_AT = 12  # operations that a factor is made of


def is_recurrent(judgement: Judgement, draft: Draft) -> bool:
    """The branch holds an RNN, an LSTM or a GRU, or the steps of one."""
    steps = judgement.recurrences
    return OpKind.RECURRENT in draft.kinds or (bool(steps) and not steps.isdisjoint(draft.branch_ops))


def is_stochastic(judgement: Judgement, draft: Draft) -> bool:
    """The branch is multiplied by a random number, or computed by a coin: stochastic depth (Huang et al. 2016)."""
    if judgement.dropped and not judgement.dropped.isdisjoint(draft.branch_ops):
        return True
    if draft.kinds.isdisjoint(_FACTORS):
        return False
    return any(_random_factor(op) for op in draft.branch_ops if op.kind in _FACTORS)


def is_long(judgement: Judgement, draft: Draft) -> bool:
    """The branch goes to another resolution and comes back: a way to the join leads through an enlarging operation.

    A map that is made at a lower resolution and only weighs what stayed at the fork's is no such way back; and where
    the shortcut changes the resolution as well, the branch does not come back.
    """
    if draft.kinds.isdisjoint(_MAY_ENLARGE) and not (draft.kind == "dense" and judgement.long):
        return False
    if not any(comes_back(judgement, draft)):
        return False
    if draft.join_value.shape is None:
        text = "whether the branch comes back from another resolution: the shape of '{}' is not known"
        draft.undecided.append(text.format(draft.join_value.name))
    return True


def comes_back(judgement: Judgement, draft: Draft) -> list[bool]:
    """For each end of a branch, whether every way to it from the fork leads through an enlarging operation.

    Where no shapes are known, what can only be there to enlarge counts as enlarging.
    """
    extents, before = _extents(draft.join_value.shape), _extents(draft.fork.shape)
    if extents is None and draft.join_value.shape is not None:
        return []
    moved = extents is None or (before is not None and len(before) == len(extents) and before != extents)
    if moved and _resizes(draft):
        return []
    back = {op for op in draft.branch_ops if _enlarges(op) or _is_beside(judgement, draft, op)}
    if not back:
        return []
    stayed = {draft.fork}
    for op in draft.branch_ops:
        if op not in back and not stayed.isdisjoint(judgement.reach.sources(op.outputs[0])):
            stayed.update(op.outputs)
    return [end not in stayed for end in draft.branches]


def _is_beside(judgement: Judgement, draft: Draft, op: Op) -> bool:
    """Whether an operation joins a long skip of the same level: two features kept before one descent (U-Net++).

    Where only a part of the fork goes past the branch (ShuffleNet), what lies in the branch is its own affair.
    """
    return draft.kind == "dense" and draft.shortcut != "view" and op in judgement.long


def _resizes(draft: Draft) -> bool:
    return any(_enlarges(op) for op in draft.shortcut_ops)


# kind → what a block of one of the given kinds must fulfil to be of it; the first that holds
FLAVOURS: tuple[tuple[str, tuple[str, ...], Callable[[Judgement, Draft], bool]], ...] = (
    ("long", ("add", "dense"), is_long),
    ("recurrent", ("add",), is_recurrent),
    ("stochastic", ("add", "parallel"), is_stochastic),
)


def flavour(judgement: Judgement, draft: Draft) -> str:
    """The kind of a block, all things considered."""
    for kind, among, holds in FLAVOURS:
        if draft.kind in among and holds(judgement, draft):
            if kind == "long":
                judgement.long.add(draft.join_op)
            return kind
    return draft.kind


def shortcut_kind(judgement: Judgement, draft: Draft) -> str:
    """The shortcut's kind, all things considered: one that reaches a part of the branch's channels only is a view.

    y = [F(x)[:c] + x, F(x)[c:]] is F(x) plus x in the first channels (ReXNet).
    """
    if draft.shortcut != "identity" or len(draft.branches) != 1:
        return draft.shortcut
    part = draft.branches[0].producer
    if part is None or part.kind not in _PARTS:
        return draft.shortcut
    whole = judgement.only_user(draft.join_value)
    if whole is None or whole.kind is not OpKind.CONCAT:
        return draft.shortcut
    others = (value.producer for value in whole.operands if value is not draft.join_value)
    rest = any(op is part or (op is not None and op.kind in _PARTS and op.inputs[0] is part.inputs[0]) for op in others)
    return "view" if rest else draft.shortcut


def _enlarges(op: Op) -> bool:
    if op.kind not in _MAY_ENLARGE or not op.operands:
        return False
    before, after = _extents(op.operands[0].shape), _extents(op.outputs[0].shape)
    if op.kind in (OpKind.INTERPOLATE, OpKind.CONV_TRANSPOSE):
        return before is None or after is None or before != after
    if op.kind is OpKind.RESHAPE:
        before = _extents(_shuffled(op))
    if before is None or after is None or len(before) != len(after):
        return False
    return all(isinstance(a, int) and isinstance(b, int) and a > b > 1 for a, b in zip(after, before, strict=True))


def _shuffled(op: Op) -> Shape | None:
    """What a pixel shuffle (reshape, permute to [N, C, H, r, W, r], reshape) starts from, None where `op` ends none."""
    permute = op.operands[0].producer
    if permute is None or permute.kind is not OpKind.PERMUTE or tuple(permute.attr("perm")) != (0, 1, 4, 2, 5, 3):
        return None
    first = permute.operands[0].producer
    return None if first is None or first.kind is not OpKind.RESHAPE else first.operands[0].shape


def _extents(shape: Shape | None) -> Shape | None:
    """Height, width, ... of [N, C, H, W]; None for anything that is no image."""
    return shape[2:] if shape is not None and len(shape) >= 3 else None


def _random_factor(op: Op) -> bool:
    """Whether a factor is random and the same for all elements of a sample."""
    return any(is_random_factor(value) for value in op.operands)


def is_random_factor(value: Value) -> bool:
    """Whether a value is made of random numbers and constants only, the same for all elements of a sample."""
    if value.shape is not None and not all(extent == 1 for extent in value.shape[1:]):
        return False
    pending, found = [value], False
    for _ in range(_LOOKED_AT):
        if not pending:
            return found
        op = pending.pop().producer
        if op is None:
            return False
        if op.has(Trait.RANDOM) and op.kind is not OpKind.DROPOUT:
            found = True
            continue
        if not op.has(Trait.SOURCE) and not op.has(Trait.ELEMENTWISE) and not op.has(Trait.FREE):
            return False
        pending.extend(operand for operand in op.operands if operand.producer is not None or not operand.constant)
    return False
