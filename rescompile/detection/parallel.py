"""Parallel branches: y = x + A(n(x)) + F(n(x)), as x + (A + F) or as (x + A) + F; the experts of a mixture are one."""

from __future__ import annotations

from collections.abc import Sequence

from rescompile.detection.chains import order
from rescompile.detection.judgement import Draft, Judgement, Refusal
from rescompile.detection.paths import RESIZING, Chain, branch_works, chain, is_scale, works
from rescompile.graph import Op, Value
from rescompile.kinds import OpKind, Trait

_ROUTES = (OpKind.TOPK, OpKind.ARGMAX)
_PASSED = (OpKind.IDENTITY, OpKind.CAST, OpKind.DROPOUT, OpKind.QUANTIZE, OpKind.DEQUANTIZE)


def absorb(judgement: Judgement, draft: Draft, way: Chain, affine: bool) -> Draft | Refusal:
    """(x + A(x)) + F(x): the sum completes the one before."""
    inner = judgement.drafts.get(way.sums[0])
    plain = all(op in way.sums or op.kind in _PASSED for op in way.ops)
    refusal = Refusal(f"two working branches: both sides of the sum work on '{draft.fork.name}'", draft.fork, True)
    if inner is None or len(way.sums) > 1:
        return refusal
    if not plain:
        return _beside(judgement, draft, inner, way) or refusal
    if inner.kind == "branches" and affine:
        draft.kind = "branches"
    elif inner.kind in ("add", "parallel"):
        draft.kind = "parallel"
    else:
        return refusal
    draft.shortcut = inner.shortcut
    draft.shortcut_ops = inner.shortcut_ops
    draft.branch_ops = sorted({*inner.branch_ops, *draft.branch_ops}, key=lambda op: op.order)
    draft.branches = [*inner.branches, *draft.branches]
    draft.outside = list(dict.fromkeys([*inner.outside, *draft.outside]))
    draft.join_ops = list(inner.join_ops)
    return draft


def _beside(judgement: Judgement, draft: Draft, inner: Draft, way: Chain) -> Draft | None:
    """p₁ = S(x₀) + P₁(x₁) with x₁ = F(x₀), then p₂ = R(p₁) + P₂(G(x₁)): a sum that runs beside a stream (StyleGAN2).

    What is moved or resized, R(P₁(x₁)), is the shortcut around G.
    """
    if len(inner.branches) != 1 or len(draft.branches) != 1 or way.sums[0] is not inner.join_op:
        return None
    reach, (end,), (top,) = judgement.reach, inner.branches, draft.branches
    fork = reach.meet(end, (top,))
    first = None if fork is None else chain(reach, fork, end)
    rest = way.ops[way.ops.index(inner.join_op) + 1 :]
    resized = any(op.has(Trait.POOL) or op.kind in RESIZING for op in rest)
    known = all(op.has(Trait.FREE) or op.has(Trait.POOL) or op.kind in RESIZING for op in rest)
    if fork is None or first is None or first.shortcut is None or first.sums or not known or fork is inner.fork:
        return None
    region, outside = reach.between(fork, [top])
    if not branch_works(reach, region):
        return None
    draft.fork, draft.branch_ops, draft.outside = fork, region, outside
    moved = "pool" if resized else "view"
    draft.shortcut = moved if first.shortcut in ("identity", "view") else first.shortcut
    draft.shortcut_ops = [*first.ops, inner.join_op, *rest]
    return draft


def parallel_tail(judgement: Judgement, draft: Draft) -> None:
    """x + (A(n(x)) + F(n(x))): the branch ends in a sum of two that start where the block does."""
    if len(draft.branches) == 1 and _tail(draft.branches[0]) is None:
        return
    ends: list[Value] = []
    sums: list[Op] = []
    pending = list(draft.branches)
    while pending:
        value = pending.pop(0)
        op = _tail(value)
        refusal = None if op is None else judgement.refusals.get(op)
        if op is None or refusal is None or not refusal.working or not _starts_at(judgement, draft.fork, refusal.meet):
            ends.append(value)
            continue
        parts = judgement.reach.operands(op)
        if _is_mixture(judgement, draft.fork, parts):
            ends.append(value)
            continue
        sums.append(op)
        pending.extend(parts)
    if len(ends) == 1:
        return
    working = [end for end in ends if branch_works(judgement.reach, judgement.reach.between(draft.fork, [end])[0])]
    if len(working) > 1:
        draft.kind = "parallel"
        draft.branches = ends
        draft.join_ops = sorted(sums, key=lambda op: op.order)


def _is_mixture(judgement: Judgement, fork: Value, parts: Sequence[Value]) -> bool:
    """Whether a sum is the one of a mixture of experts: some parts are routed, the others work on each position alone.

    An expert that all positions share is a part of the mixture, not a branch beside it; an attention is one.
    """
    regions = [judgement.reach.between(fork, [part])[0] for part in parts]
    routed = [any(op.kind in _ROUTES for op in region) for region in regions]
    if not any(routed):
        return False
    plain = (region for region, is_routed in zip(regions, routed, strict=True) if not is_routed)
    return all(op.kind is OpKind.LINEAR or op.has(Trait.NORM) or not works(op) for region in plain for op in region)


def _tail(value: Value) -> Op | None:
    """The sum that a branch ends in, when only the join reads it."""
    while (op := value.producer) is not None and len(value.uses) == 1:
        if op.kind is OpKind.ADD:
            return op
        if op.kind not in _PASSED and not is_scale(op):
            return None
        value = op.operands[0]
    return None


def _starts_at(judgement: Judgement, fork: Value, meet: Value | None) -> bool:
    """Whether a branch's parts meet at the fork, at what norms and activations make of it, or at one linear."""
    if meet is None or order(meet) < order(fork):
        return False
    if meet is fork:
        return True
    way = chain(judgement.reach, fork, meet)
    if way is None:
        return False
    rest = [op for op in way.ops if not (op.has(Trait.NORM) or op.has(Trait.FREE) or is_scale(op))]
    return all(op.has(Trait.ACTIVATION) for op in rest) or (len(rest) == 1 and rest[0].kind is OpKind.LINEAR)
