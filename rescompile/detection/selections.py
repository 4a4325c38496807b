"""Joins that are never residual, and why: y = max(x, F(x)), y = where(c, x, F(x)), and what is not known at all.

A selection passes one operand at each position: the other one contributes nothing there, no gradient runs through it,
and the stream is not carried on (maxout, Goodfellow et al. 2013). So it is told, with where the paths meet, and is no
block.
"""

from __future__ import annotations

from rescompile.detection.judgement import Judgement, Refusal
from rescompile.detection.sums import INTEGERS
from rescompile.graph import Op, Value
from rescompile.kinds import OpKind

_CONDITIONS = {OpKind.WHERE: 1}  # operands before the ones that are selected


def selection(judgement: Judgement, op: Op) -> Refusal | None:
    """Why a maximum, minimum or where of two streams ends no block; None when it has only one."""
    meet = _meet(judgement, op, op.inputs[_CONDITIONS.get(op.kind, 0) :])
    if meet is None:
        return None
    text = f"{op.kind.value}: selects one operand at each position, the gradient passes through that one only"
    return Refusal(text, meet)


def unknown(judgement: Judgement, op: Op) -> Refusal | None:
    """Why an opaque operation on two values of its own result's shape ends no block; None for any other.

    Where nobody knows the result's shape, it may be that of the first value read.
    """
    shape = op.outputs[0].shape
    if shape is None:
        shape = next((value.shape for value in op.operands if value.rank and not value.constant), None)
    meet = _meet(judgement, op, [value for value in op.inputs if value is not None and value.shape == shape])
    if meet is None:
        return None
    return Refusal(f"opaque: what '{op.attr('target')}' does with its operands is not known", meet)


def _meet(judgement: Judgement, op: Op, values: list[Value | None]) -> Value | None:
    moving = list(dict.fromkeys(value for value in values if value is not None and not value.constant))
    dtype = op.outputs[0].dtype
    if len(moving) < 2 or (dtype is not None and dtype.startswith(INTEGERS)):
        return None
    return judgement.reach.meet(moving[0], moving[1:])
