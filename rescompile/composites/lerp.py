"""Linear interpolation, as exporters guard it against rounding.

    y = where(|w| < ½, a + w·(b − a), b − (b − a)·(1 − w))

Both sides are a + w·(b − a).
"""

from __future__ import annotations

from rescompile.composites.region import Recogniser, close
from rescompile.graph import Op, Value
from rescompile.kinds import OpKind


def lerp(recogniser: Recogniser, where: Op) -> Op | None:
    """The first side in the place of the selection; None when the sides are not that interpolation of two values."""
    _, first, second = where.operands if len(where.operands) == 3 else (None, None, None)
    if first is None or second is None:
        return None
    near, far = _sum(first, (1.0, 1.0)), _sum(second, (1.0, -1.0))
    if near is None or far is None:
        return None
    (a, step), (b, back) = near.operands, far.operands
    forward, backward = _product(step), _product(back)
    if forward is None or backward is None:
        return None
    for w, difference in (forward.operands, forward.operands[::-1]):
        for rest, same in (backward.operands, backward.operands[::-1]):
            made = _sum(difference, (1.0, -1.0))
            if same is difference and made is not None and made.operands == [b, a] and _is_rest(recogniser, rest, w):
                region = [where, far, backward]
                return recogniser.cover(region, OpKind.IDENTITY, [first], where.output)
    return None


def _is_rest(recogniser: Recogniser, rest: Value, w: Value) -> bool:
    """Whether `rest` is 1 − w."""
    number = recogniser.scalar(w)
    if number is not None:
        return close(recogniser.scalar(rest), 1.0 - number)
    op = _sum(rest, (1.0, -1.0))
    return op is not None and op.operands[1] is w and close(recogniser.scalar(op.operands[0]), 1.0)


def _sum(value: Value, scales: tuple[float, ...]) -> Op | None:
    op = value.producer
    return op if op is not None and op.kind is OpKind.ADD and op.scales == scales else None


def _product(value: Value) -> Op | None:
    op = value.producer
    return op if op is not None and op.kind is OpKind.MUL else None
