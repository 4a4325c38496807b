"""Streams of several resolutions that are added up: y = Σ Mᵢ(sᵢ), M₁ the identity or a map to another size (HRNet).

1. Every operand comes by one way from a stream: from the join of a block at its resolution, or from another such sum.
2. The streams differ, and started from one value, the fork.
3. What is on a way maps, resizes, normalises or activates; on one of them the size changes.

Each stream has worked on its own since the fork, so the sum carries none of them on: it is told as `branches`, and a
search for the origin of what follows goes through all of them.
"""

from __future__ import annotations

from collections.abc import Sequence

from rescompile.detection.flavours import comes_back
from rescompile.detection.judgement import Draft, Judgement
from rescompile.detection.paths import RESIZING, step_back
from rescompile.graph import Op, Value
from rescompile.kinds import OpKind, Trait

_STEPS = 24  # operations on the way from a stream to the sum, at most
_STREAMS = ("add", "parallel", "gated", "stochastic")
_MAPS = (OpKind.CONV, OpKind.CONV_TRANSPOSE, OpKind.LINEAR)


def fused_streams(judgement: Judgement, op: Op, fork: Value, operands: Sequence[tuple[int, Value]]) -> Draft | None:
    """The sum as `branches` of the fork, sums of the same streams that it completes included; None where it is none."""
    streams: list[Value] = []
    region: set[Op] = set()
    branches: list[Value] = []
    joins: list[Op] = []
    for _, value in operands:
        before = _fusion(judgement, value)
        if before is not None and judgement.only_user(value) is op:
            streams += before.streams
            region.update(before.branch_ops)
            branches += before.branches
            joins += before.join_ops
            fork = judgement.reach.meet(fork, (before.fork,)) or fork
            continue
        ops: list[Op] = []
        end = _stream(judgement, value, ops)
        if end is None:
            return None
        streams.append(end)
        region.update(ops)
        branches.append(value)
    if len(set(streams)) < len(streams) or not any(map(_resizes, region)):
        return None
    if any(_comes_from_elsewhere(judgement, end) for end in streams):
        return None
    return Draft(
        kind="branches",
        shortcut="projection",
        fork=fork,
        join_op=op,
        join_value=op.outputs[0],
        skip_index=operands[0][0],
        branches=branches,
        branch_ops=sorted(region, key=lambda member: member.order),
        shortcut_ops=[],
        outside=[],
        join_ops=joins,
        streams=streams,
    )


def _comes_from_elsewhere(judgement: Judgement, end: Value) -> bool:
    """Whether a join is a long one, as those of a pyramid: what is behind it is no stream of one resolution."""
    draft = None if end.producer is None else judgement.drafts.get(end.producer)
    return draft is not None and not draft.streams and any(comes_back(judgement, draft))


def _fusion(judgement: Judgement, value: Value) -> Draft | None:
    draft = None if value.producer is None else judgement.drafts.get(value.producer)
    return draft if draft is not None and draft.streams else None


def _stream(judgement: Judgement, value: Value, ops: list[Op]) -> Value | None:
    """Where the way back from `value` comes to a stream; its operations go to `ops`. None where it comes to none."""
    for _ in range(_STEPS):
        op = value.producer
        draft = None if op is None else judgement.drafts.get(op)
        if draft is not None:
            return value if draft.kind in _STREAMS or draft.streams else None
        before = step_back(judgement.reach, value)
        if op is None or before is None or not (_maps(op) or _resizes(op)):
            return None
        ops.append(op)
        value = before
    return None


def _maps(op: Op) -> bool:
    return op.kind in _MAPS or op.has(Trait.NORM) or op.has(Trait.ACTIVATION) or op.has(Trait.FREE)


def _resizes(op: Op) -> bool:
    if op.kind in (OpKind.INTERPOLATE, OpKind.CONV_TRANSPOSE) or op.has(Trait.POOL) or op.kind in RESIZING:
        return True
    return op.kind is OpKind.CONV and any(step != 1 for step in op.attr("stride"))
