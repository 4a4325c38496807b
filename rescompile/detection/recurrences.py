"""Steps of an unrolled recurrence: hₜ = f(hₜ₋₁, x[t]) with the same weights in every step (RNN, LSTM, GRU, MGU).

What a step adds, mixes or concatenates carries a state over time, not a stream over layers, so it ends no block.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rescompile.detection.judgement import Judgement
from rescompile.detection.paths import works
from rescompile.graph import Op, Value
from rescompile.kinds import OpKind, Trait

_PARTS = (OpKind.SLICE, OpKind.SPLIT, OpKind.GATHER)
_STEPS = 16  # operations between parts of the sequence and the step, at most


def takes_part(ops: Iterable[Op]) -> bool:
    """Whether a way leads through a part of a value: a step's share of the sequence."""
    return any(op.kind in _PARTS for op in ops)


def shares_weights(region: Sequence[Op]) -> bool:
    """Whether everything that works in a region does so with weights that others use too."""
    working = [op for op in region if works(op)]
    return bool(working) and all(_weight_is_shared(op) for op in working)


def is_step(judgement: Judgement, fork: Value, region: Sequence[Op], outside: Sequence[Value]) -> bool:
    """Whether a region is one step: it shares its weights and reads its share of a sequence, or another step."""
    if not shares_weights(region):
        return False
    if any(op in judgement.recurrences for op in region):
        return True
    return any(_is_share(judgement, value) for value in (fork, *outside))


def _is_share(judgement: Judgement, value: Value) -> bool:
    """Whether a value was made of nothing but one entry of a sequence, or of what a step made."""
    pending, seen = [value], {value}
    for _ in range(_STEPS):
        if not pending:
            return True
        value = pending.pop()
        op = value.producer
        if op is None:
            return False
        if op in judgement.recurrences or (op.kind in _PARTS and _is_single(value, op)):
            continue
        moving = [operand for operand in judgement.reach.operands(op) if not operand.constant]
        if not moving:
            return False
        pending += [operand for operand in moving if operand not in seen]
        seen.update(moving)
    return not pending


def _is_single(value: Value, op: Op) -> bool:
    """Whether a part is one entry along the axis that it is taken from."""
    before = op.operands[0].shape
    if op.kind is OpKind.GATHER or value.shape is None or before is None or len(before) != len(value.shape):
        return op.kind is OpKind.GATHER
    return any(own == 1 != whole for own, whole in zip(value.shape, before, strict=True))


def _weight_is_shared(op: Op) -> bool:
    value = op.inputs[1] if op.kind in (OpKind.LINEAR, OpKind.CONV) else None
    while value is not None and value.constant:
        if len(value.uses) > 1:
            return True
        producer = value.producer
        value = producer.inputs[0] if producer is not None and producer.has(Trait.FREE) else None
    return False
