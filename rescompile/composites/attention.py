"""Softmax attention, as exporters decompose it.

    y = softmax(scale·q·kᵀ + mask)·v        q: [..., S, D], k: [..., T, D], v: [..., T, E], mask: [..., S, T]

The anchor is the softmax. The scale may be a factor on the product, on q, on k, or (torch's ONNX export) the root of it
on both; the mask an addition, several, or a `where` that puts −∞ where it is false; a guard may turn rows of NaN into
zeros. Where an exporter has merged the transposition of k with the splitting of heads, the splitting is presented as an
operation of its own before the attention. Repeated heads (grouped queries) stay outside: k and v are read as they come.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from rescompile.composites.region import Recogniser
from rescompile.graph import Attrs, Op, Shape, Value
from rescompile.kinds import OpKind

_Step = tuple[OpKind, Sequence[Value | None], Value, Attrs]


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
    masks: list[Value] = []
    while (masked := _mask(recogniser, scores)) is not None:
        if masks and masks[0].dtype == "bool":  # what a `where` selects from is no sum with it
            break
        scores, added, op = masked
        masks.append(added)
        ops.append(op)
    scale, scores, passed = _scaled(recogniser, scores, ops)
    ops += passed
    matmul = scores.producer
    if matmul is None or matmul.kind is not OpKind.MATMUL:
        return None
    ops.append(matmul)
    factor_q, q, passed = _scaled(recogniser, matmul.operands[0], ops)
    ops += passed
    factor_k, transposed, passed = _scaled(recogniser, matmul.operands[1], ops)
    ops += passed
    keys = _untransposed(recogniser, transposed, ops)
    if keys is None:
        return None
    k, before, passed = keys
    ops += passed
    if not before:
        factor, k, passed = _scaled(recogniser, k, ops)
        factor_k *= factor
        ops += passed
    mask, sums = _total(recogniser, masks)
    if mask is None and masks:
        return None
    attrs = {"scale": scale * factor_q * factor_k}
    return recogniser.cover(ops, OpKind.ATTENTION, [q, k, v, mask], output, attrs, before=[*before, *sums])


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
    """Whether the value is a matmul, behind at most a few factors and masks."""
    for _ in range(4):
        op = value.producer
        if op is None:
            return False
        if op.kind is OpKind.MATMUL:
            return True
        if op.kind not in (OpKind.MUL, OpKind.DIV, OpKind.CAST, OpKind.ADD) or op.inputs[0] is None:
            return False
        value = op.inputs[0]
    return False


def _total(recogniser: Recogniser, masks: Sequence[Value]) -> tuple[Value | None, list[_Step]]:
    """One mask for several that were added in turn, and the sum that makes it; None when their shapes are unknown."""
    if len(masks) < 2:
        return (masks[0] if masks else None), []
    shape = _broadcast([mask.shape for mask in masks])
    if shape is None or len({mask.dtype for mask in masks}) != 1:
        return None, []
    total = recogniser.new_value(f"{masks[0].name}_total", shape, masks[0].dtype)
    return total, [(OpKind.ADD, list(reversed(masks)), total, {})]


def _broadcast(shapes: Sequence[Shape | None]) -> Shape | None:
    known = [shape for shape in shapes if shape is not None]
    if len(known) != len(shapes):
        return None
    rank = max(map(len, known))
    padded = [(1,) * (rank - len(shape)) + shape for shape in known]
    extents = []
    for column in zip(*padded, strict=True):
        wide = {extent for extent in column if extent != 1}
        if len(wide) > 1:
            return None
        extents.append(wide.pop() if wide else 1)
    return tuple(extents)


def _scaled(recogniser: Recogniser, value: Value, inside: list[Op]) -> tuple[float, Value, list[Op]]:
    """The constant factors on a value, the value without them, and the operations that multiplied them in.

    A factor that others read too stays where it is: only operations that nothing but `inside` reads are taken.
    """
    factor, ops = 1.0, list[Op]()
    while (op := value.producer) is not None and op.kind in (OpKind.MUL, OpKind.DIV):
        first, second = op.inputs
        if not recogniser.enclosed(op, [*inside, *ops]):
            break
        number = recogniser.scalar(second)
        if number is None and op.kind is OpKind.MUL:
            first, number = second, recogniser.scalar(first)
        if number is None or first is None or number == 0.0 or first.shape != value.shape:
            break
        factor *= number if op.kind is OpKind.MUL else 1.0 / number
        ops.append(op)
        value = first
    return factor, value, ops


def _untransposed(
    recogniser: Recogniser, transposed: Value, inside: list[Op]
) -> tuple[Value, list[_Step], list[Op]] | None:
    """k, for kᵀ; what prepares k where the transposition was merged with another one; and what the region takes.

    Either kᵀ = permute(s), and k is s with the same permutation but for the last two axes, or kᵀ = reshape(permute(s))
    where the permutation swaps the last two axes and the reshape regroups only those before them.
    """
    op = transposed.producer
    if op is None or not recogniser.enclosed(op, inside):
        return None
    if op.kind is OpKind.PERMUTE:
        source, perm = op.operands[0], list(op.attr("perm"))
        perm[-2:] = reversed(perm[-2:])
        if perm == list(range(len(perm))):
            return source, [], [op]
        k = recogniser.new_value(f"{transposed.name}_keys", _swapped(transposed.shape), transposed.dtype)
        return k, [(OpKind.PERMUTE, [source], k, {"perm": tuple(perm)})], [op]
    permute = op.operands[0].producer if op.kind is OpKind.RESHAPE else None
    if permute is None or permute.kind is not OpKind.PERMUTE or not _swaps_last_two(permute):
        return None
    before, after = permute.output.shape, transposed.shape
    if before is None or after is None or before[-2:] != after[-2:] or not recogniser.enclosed(permute, [op]):
        return None
    k = recogniser.new_value(f"{transposed.name}_keys", _swapped(after), transposed.dtype)
    return k, [(OpKind.RESHAPE, [permute.operands[0]], k, {})], [op, permute]


def _swapped(shape: Shape | None) -> Shape | None:
    return None if shape is None else (*shape[:-2], shape[-1], shape[-2])


def _swaps_last_two(permute: Op) -> bool:
    perm = list(permute.attr("perm"))
    rank = len(perm)
    return rank >= 2 and perm == [*range(rank - 2), rank - 1, rank - 2]
