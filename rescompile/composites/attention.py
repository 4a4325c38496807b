"""Softmax attention, as exporters decompose it.

    y = softmax(scale·q·kᵀ + mask)·v        q: [..., S, D], k: [..., T, D], v: [..., T, E], mask: [..., S, T]

The anchor is the softmax. The scale may be a factor on the product, on q, on k, or (torch's ONNX export) the root of it
on both; the mask an addition or a `where` that puts −∞ where it is false; a guard may turn rows of NaN into zeros.
Repeated heads (grouped queries) stay outside: k and v are read as they come.
"""

from __future__ import annotations

import math

from rescompile.composites.region import Recogniser
from rescompile.graph import Op, Value
from rescompile.kinds import OpKind


def attention(recogniser: Recogniser, softmax: Op) -> Op | None:
    """An ATTENTION in the place of the region around `softmax`; None when the region is not one."""
    x = softmax.operands[0]
    if softmax.attr("log") or x.rank is None or softmax.attr("axis") not in (-1, x.rank - 1):
        return None
    below = _weighted(recogniser, softmax)
    if below is None:
        return None
    v, output, ops = below
    ops = [softmax, *ops]
    scores, passed = recogniser.through(x, OpKind.CAST)
    ops += passed
    mask = None
    masked = _mask(recogniser, scores)
    if masked is not None:
        scores, mask, op = masked
        ops.append(op)
    scale, scores, passed = _scaled(recogniser, scores)
    ops += passed
    matmul = scores.producer
    if matmul is None or matmul.kind is not OpKind.MATMUL:
        return None
    ops.append(matmul)
    factor_q, q, passed = _scaled(recogniser, matmul.operands[0], inside=ops)
    ops += passed
    factor_k, transposed, passed = _scaled(recogniser, matmul.operands[1], inside=ops)
    ops += passed
    permute = transposed.producer
    if permute is None or permute.kind is not OpKind.PERMUTE or not _swaps_last_two(permute):
        return None
    if not recogniser.enclosed(permute, ops):
        return None
    ops.append(permute)
    factor, k, passed = _scaled(recogniser, permute.operands[0], inside=ops)
    ops += passed
    inputs = [q, k, v] if mask is None else [q, k, v, mask]
    total = scale * factor_q * factor_k * factor
    return recogniser.cover(ops, OpKind.ATTENTION, [*inputs, *[None] * (4 - len(inputs))], output, {"scale": total})


def _weighted(recogniser: Recogniser, softmax: Op) -> tuple[Value, Value, list[Op]] | None:
    """`v`, the product and the operations between softmax and product."""
    value, ops = softmax.output, list[Op]()
    guarded = _nan_guard(recogniser, value)
    if guarded is not None:
        value, passed = guarded
        ops += passed
    while (user := recogniser.only_user(value)) is not None:
        ops.append(user)
        if user.kind is OpKind.MATMUL:
            v = user.inputs[1]
            if user.inputs[0] is not value or v is None or v is value:
                return None
            return v, user.output, ops
        if user.kind not in (OpKind.CAST, OpKind.IDENTITY):
            return None
        value = user.output
    return None


def _nan_guard(recogniser: Recogniser, weights: Value) -> tuple[Value, list[Op]] | None:
    """where(is_nan(w), 0, w): the rows that the mask empties."""
    users = weights.users
    test = next((op for op in users if op.kind is OpKind.IS_NAN), None)
    where = next((op for op in users if op.kind is OpKind.WHERE), None)
    if len(users) != 2 or test is None or where is None:
        return None
    condition, a, b = where.inputs
    if condition is test.output and b is weights and recogniser.scalar(a) == 0.0:
        return where.output, [test, where]
    return None


def _mask(recogniser: Recogniser, scores: Value) -> tuple[Value, Value, Op] | None:
    """The scores before a mask, the mask, and the operation that applied it."""
    op = scores.producer
    if op is None or recogniser.only_user(scores) is None:
        return None
    if op.kind is OpKind.ADD and len(op.inputs) == 2 and op.scales == (1.0, 1.0):
        first, second = op.operands
        if _is_product(first) or not _is_product(second):
            return first, second, op
        return second, first, op
    if op.kind is OpKind.WHERE:
        condition, kept, fill = op.inputs
        number = recogniser.scalar(fill)
        if kept is not None and condition is not None and number is not None and math.isinf(number) and number < 0:
            return kept, condition, op
    return None


def _is_product(value: Value) -> bool:
    """Whether the value is a matmul, behind at most a few factors."""
    for _ in range(3):
        op = value.producer
        if op is None:
            return False
        if op.kind is OpKind.MATMUL:
            return True
        if op.kind not in (OpKind.MUL, OpKind.DIV, OpKind.CAST) or op.inputs[0] is None:
            return False
        value = op.inputs[0]
    return False


def _scaled(recogniser: Recogniser, value: Value, inside: list[Op] | None = None) -> tuple[float, Value, list[Op]]:
    """The constant factors on a value, the value without them, and the operations that multiplied them in.

    A factor that others read too stays where it is: only operations that nothing but `inside` reads are taken.
    """
    factor, ops = 1.0, list[Op]()
    while (op := value.producer) is not None and op.kind in (OpKind.MUL, OpKind.DIV):
        first, second = op.inputs
        if inside is not None and not recogniser.enclosed(op, [*inside, *ops]):
            break
        number = recogniser.scalar(second)
        if number is None and op.kind is OpKind.MUL:
            first, number = second, recogniser.scalar(first)
        if number is None or first is None or number == 0.0:
            break
        factor *= number if op.kind is OpKind.MUL else 1.0 / number
        ops.append(op)
        value = first
    return factor, value, ops


def _swaps_last_two(permute: Op) -> bool:
    perm = list(permute.attr("perm"))
    rank = len(perm)
    return rank >= 2 and perm == [*range(rank - 2), rank - 1, rank - 2]
