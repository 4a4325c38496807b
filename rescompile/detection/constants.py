"""What is no stream: biases, tables, numbers; and what is added everywhere."""

from __future__ import annotations

from collections.abc import Sequence

from rescompile.detection.judgement import Judgement, Refusal
from rescompile.detection.paths import is_scale, works
from rescompile.graph import Role, Value
from rescompile.kinds import OpKind, Trait


def may_be_stream(judgement: Judgement, value: Value) -> bool:
    """Whether an operand could carry a stream: computed from inputs, or a constant that is read elsewhere too."""
    if not value.constant:
        return True
    if value.role is not Role.RESULT:
        return value in judgement.reach.streams
    for _ in range(8):
        if len(value.uses) > 1:
            return True
        op = value.producer
        if op is None or not (op.has(Trait.FREE) or is_scale(op) or op.kind is OpKind.ADD):
            return op is not None and works(op)
        value = op.operands[0]
    return False


def constant_operand(operands: Sequence[tuple[int, Value]]) -> Refusal:
    """The reason for a sum of which at most one operand is a stream."""
    constants = [value for _, value in operands if value.constant]
    if len(constants) == len(operands):
        return Refusal("constants: the sum does not depend on the model's inputs")
    value = constants[0]
    size = None if value.shape is None else [extent for extent in value.shape if extent != 1]
    if size is not None and not size:
        return Refusal(f"constant: '{value.name}' is one number")
    if size is not None and len(size) == 1:
        return Refusal(f"bias: '{value.name}' is a constant")
    return Refusal(f"constant table: '{value.name}' does not depend on the inputs (a position embedding, a mask)")


def is_broadcast(skip: Value, total: Value) -> bool:
    """Whether the sum is larger than the skip, other than by the batch of a stream that starts as a constant."""
    if skip.shape is None or total.shape is None or skip.shape == total.shape:
        return False
    padded = (1,) * (len(total.shape) - len(skip.shape)) + skip.shape
    differing = [axis for axis, (own, whole) in enumerate(zip(padded, total.shape, strict=True)) if own != whole]
    if skip.constant and differing == [0]:
        return False
    return any(padded[axis] == 1 for axis in differing)
