"""Norms, as exporters and authors decompose them.

    LayerNorm:     y = (x − mean(x)) / √(mean((x − mean(x))²) + eps) · weight + bias
    RMSNorm:       y = x / √(mean(x²) + eps) · weight
    InstanceNorm:  LayerNorm over all positions of a channel
    any other:     `normalise`: other axes, eps outside the root, unbiased variance, x / max(‖x‖, eps) with a gain

The anchor is the mean, or the sum, of the squares. Casts to a wider dtype inside, and back, belong to the norm. Casts
to a narrower one do too, but what they round cannot be had by another order of operations: an RMS norm in the one order
that every IR can write keeps the type as its `stash_type`, any other norm is a `normalise`. A
weight is taken only when it is a constant of exactly the normalised shape: a rotary table is no norm's weight. A
length without a gain (cosine similarity, global response normalisation's statistic) is no norm.
"""

from __future__ import annotations

from rescompile.composites.group_norm import group_norm
from rescompile.composites.region import Recogniser, close
from rescompile.composites.statistics import Root, count, kept, root_of
from rescompile.graph import Attrs, Op, Shape, Value
from rescompile.kinds import OpKind
from rescompile.values import numpy_dtype


def norm(recogniser: Recogniser, reduction: Op) -> Op | None:
    """A norm in the place of the region around a mean or sum of squares; None when there is none."""
    squared = _square(recogniser, reduction.inputs[0])
    if squared is None or reduction.operands[0].constant:
        return None
    base, square = squared
    shape = base.shape
    axes = _axes(reduction, shape)
    root = root_of(recogniser, reduction)
    if not axes or root is None or root.numerator is None or root.output is None:
        return None
    ops = [square, reduction, *root.ops]
    x = _normalised(recogniser, root, base, axes, ops)
    if x is None:
        return None
    value, centred = x
    producer = value.producer
    if producer is not None and producer.kind is OpKind.CAST and recogniser.enclosed(producer, ops):
        ops.append(producer)
        value = producer.operands[0]
    kind = _kind(root, value.shape, axes, centred)
    if kind is None:
        if not centred and not _is_mean(root) and not _gained(recogniser, root):
            return None
        return _other_norm(recogniser, ops, value, root.output, axes, centred, root.eps)
    inner = base.dtype if _narrower(base.dtype, value.dtype) else None
    found = _affine(recogniser, kind, ops, value, root, axes, inner)
    return (group_norm(recogniser, found) or found) if found is not None else None


def _square(recogniser: Recogniser, value: Value | None) -> tuple[Value, Op] | None:
    """`d` and the operation, where the value is d²."""
    op = None if value is None else value.producer
    if op is None or not op.inputs or op.inputs[0] is None:
        return None
    if op.kind is OpKind.POW and recogniser.scalar(op.inputs[1]) == 2.0:
        return op.inputs[0], op
    if op.kind is OpKind.MUL and op.inputs[0] is op.inputs[1]:
        return op.inputs[0], op
    return None


def _axes(reduction: Op, shape: Shape | None) -> tuple[int, ...]:
    """The axes that are reduced, counted from the front where the rank is known."""
    axes = tuple(sorted(reduction.attr("axes")))
    return axes if shape is None else tuple(sorted(axis % len(shape) for axis in axes))


def _normalised(
    recogniser: Recogniser, root: Root, base: Value, axes: tuple[int, ...], ops: list[Op]
) -> tuple[Value, bool] | None:
    """`x`, and whether its mean is taken off, where the quotient's numerator fits what was squared; extends `ops`."""
    numerator = _without_weight(root, ops)
    inner = _centred(recogniser, base, axes)
    outer = _centred(recogniser, numerator, axes)
    if root.centred is not None:
        mean = _square(recogniser, root.centred.inputs[1])
        if inner is not None or outer is None or mean is None:
            return None
        same = _mean_of(recogniser, mean[0], axes)
        if same is None or same[0] is not outer[0] or outer[0] is not base:
            return None
        ops += [mean[1], *same[1], *outer[1]]
        return base, True
    if inner is not None:
        if outer is None or outer[0] is not inner[0]:
            return None
        ops += [*inner[1], *outer[1]]
        return inner[0], True
    if base is numerator:
        return base, False
    x, casts = recogniser.through(base, OpKind.CAST)
    same_x, more = recogniser.through(numerator, OpKind.CAST)
    if same_x is not x:
        return None
    ops += [cast for cast in (*casts, *more) if recogniser.enclosed(cast, [*ops, *casts, *more])]
    return x, False


def _without_weight(root: Root, ops: list[Op]) -> Value:
    """The numerator before the constants that it was multiplied by."""
    assert root.numerator is not None
    value = root.numerator
    while (op := value.producer) is not None and op.kind is OpKind.MUL and len(value.uses) == 1:
        first, second = op.operands
        if not (first.constant or second.constant):
            break
        root.weights.append(first if first.constant else second)
        ops.append(op)
        value = second if first.constant else first
    return value


def _centred(recogniser: Recogniser, value: Value, axes: tuple[int, ...]) -> tuple[Value, list[Op]] | None:
    """`x` and the operations, where the value is x − mean(x) over the axes."""
    op = value.producer
    if op is None or op.kind is not OpKind.ADD or len(op.inputs) != 2 or op.scales != (1.0, -1.0):
        return None
    x, mean = op.operands
    found = _mean_of(recogniser, mean, axes)
    return (x, [op, *found[1]]) if found is not None and found[0] is x else None


def _mean_of(recogniser: Recogniser, value: Value, axes: tuple[int, ...]) -> tuple[Value, list[Op]] | None:
    """`x` and the operations, where the value is the mean of x over the axes, kept as extents of 1."""
    factor, ops, shape = 1.0, list[Op](), value.shape
    while (op := value.producer) is not None and len(ops) < 4:
        ops.append(op)
        if op.kind in (OpKind.MEAN, OpKind.SUM):
            x = op.operands[0]
            size = 1 if op.kind is OpKind.MEAN else count(x.shape, axes)
            same = _axes(op, x.shape) == axes and (bool(op.attr("keepdims")) or shape == kept(x.shape, axes))
            return (x, ops) if same and size is not None and close(factor * size, 1.0) else None
        number = recogniser.scalar(op.inputs[1]) if op.kind in (OpKind.MUL, OpKind.DIV) else None
        if number:
            factor *= number if op.kind is OpKind.MUL else 1.0 / number
        elif op.kind is not OpKind.RESHAPE:
            return None
        value = op.operands[0]
    return None


def _kind(root: Root, shape: Shape | None, axes: tuple[int, ...], centred: bool) -> OpKind | None:
    """The kind that the equation is exactly; None when it is a norm of its own."""
    if not root.exact:
        return None
    last = -1 if axes[0] < 0 or shape is None else len(shape) - 1
    if axes == tuple(range(axes[0], last + 1)) and (axes[0] != 0 or shape is None):
        if centred and shape is not None and len(shape) > 3 and axes == tuple(range(2, len(shape))):
            return OpKind.INSTANCE_NORM
        return OpKind.LAYER_NORM if centred else OpKind.RMS_NORM
    return None


def _is_mean(root: Root) -> bool:
    return root.factor is not None and close(root.factor, 1.0)


def _gained(recogniser: Recogniser, root: Root) -> bool:
    """Whether a length that was divided by is made up for by a constant factor, trained or not."""
    if root.weights:
        return True
    user = None if root.output is None else recogniser.only_user(root.output)
    return user is not None and user.kind is OpKind.MUL and any(value.constant for value in user.operands)


def _other_norm(
    recogniser: Recogniser, ops: list[Op], x: Value, output: Value, axes: tuple[int, ...], centred: bool, eps: float
) -> Op | None:
    """A `normalise` over the region; the constants that it reads are operands."""
    region = _until_dtype(recogniser, ops, output, x.dtype)
    inside = {value for op in region for value in op.outputs}
    read = dict.fromkeys(
        value
        for op in sorted(region, key=lambda op: op.order)
        for value in op.operands
        if value not in inside and value is not x and recogniser.scalar(value) is None
    )
    last = region[-1].output if region[-1] not in ops else output
    attrs = {"axes": axes, "centred": centred, "eps": eps}
    return recogniser.cover(region, OpKind.NORMALISE, [x, *read], last, attrs)


def _until_dtype(recogniser: Recogniser, ops: list[Op], output: Value, dtype: str | None) -> list[Op]:
    """The region with the cast back to the operand's dtype, when one follows."""
    user = recogniser.only_user(output)
    if output.dtype == dtype or user is None or user.kind is not OpKind.CAST or user.output.dtype != dtype:
        return ops
    return [*ops, user]


def _narrower(one: str | None, other: str | None) -> bool:
    return None not in (one, other) and numpy_dtype(one or "").itemsize < numpy_dtype(other or "").itemsize


def _stash(
    recogniser: Recogniser, root: Root, region: list[Op], x: Value, inner: str, weight: Value | None
) -> Attrs | None:
    """What says that `inner` is the type of r = 1 / √(mean(x²) + eps); None where y = x·r·weight is in another order.

    `region` begins with the square and its mean. All up to r is in the type `inner`; x·r is where `rounded`; the
    weight multiplies in the wider of the types.
    """
    *inverse, quotient = (op for op in root.ops if op.kind not in (OpKind.CAST, OpKind.IDENTITY))
    steps = [op.kind for op in inverse if op.kind is not OpKind.ADD]
    plain = steps in ([OpKind.RSQRT], [OpKind.SQRT, OpKind.RECIPROCAL]) or (
        steps == [OpKind.SQRT, OpKind.DIV] and close(recogniser.scalar(inverse[-1].inputs[0]), 1.0)
    )
    if not plain or region[1].kind is not OpKind.MEAN or quotient.kind is not OpKind.MUL or root.numerator is None:
        return None
    if any(op.output.dtype != inner for op in (*region[:2], *inverse)):
        return None
    rounded = root.numerator.dtype == inner
    wide = inner if rounded else x.dtype
    if quotient.output.dtype != wide:
        return None
    if weight is not None:
        product = next(op for op in region if weight in op.inputs)
        if product.output.dtype != (weight.dtype if _narrower(wide, weight.dtype) else wide):
            return None
    return {"stash_type": inner, "rounded": rounded}


def _affine(
    recogniser: Recogniser,
    kind: OpKind,
    ops: list[Op],
    x: Value,
    root: Root,
    axes: tuple[int, ...],
    inner: str | None,
) -> Op | None:
    """Extend the region by cast, weight, cast, bias, cast, as far as they are there, and cover it.

    `inner`: the type in which the norm computes, where that is narrower than its operand's.
    """
    assert root.output is not None
    weight: Value | None = None
    bias: Value | None = None
    if root.weights:
        if kind is OpKind.INSTANCE_NORM or len(root.weights) > 1 or not _fits(root.weights[0], x.shape, axes[0]):
            return _other_norm(recogniser, ops, x, root.output, axes, kind is not OpKind.RMS_NORM, root.eps)
        weight = root.weights[0]
    region, value = list(ops), root.output
    best = (list(ops), root.output, weight, bias) if root.output.dtype == x.dtype else None
    while kind is not OpKind.INSTANCE_NORM and (user := recogniser.only_user(value)) is not None and user.group is None:
        if user.kind in (OpKind.CAST, OpKind.IDENTITY):
            pass
        elif user.kind is OpKind.MUL and weight is None and bias is None:
            weight = _parameter(user, value, x.shape, axes[0])
            if weight is None:
                break
        elif user.kind is OpKind.ADD and kind is OpKind.LAYER_NORM and bias is None and user.scales == (1.0, 1.0):
            bias = _parameter(user, value, x.shape, axes[0])
            if bias is None:
                break
        else:
            break
        region.append(user)
        value = user.output
        if value.dtype == x.dtype:
            best = (list(region), value, weight, bias)
    if best is None:
        return None
    region, value, weight, bias = best
    extra: Attrs = {}
    if inner is not None:
        stash = None if kind is not OpKind.RMS_NORM else _stash(recogniser, root, region, x, inner, weight)
        if root.weights or stash is None:
            return _other_norm(recogniser, region, x, value, axes, kind is not OpKind.RMS_NORM, root.eps)
        extra = stash
    if kind is OpKind.INSTANCE_NORM:
        return recogniser.cover(region, kind, [x, None, None], value, {"eps": root.eps})
    inputs = [x, weight, bias] if kind is OpKind.LAYER_NORM else [x, weight]
    return recogniser.cover(region, kind, inputs, value, {"axis": axes[0], "eps": root.eps, **extra})


def _parameter(op: Op, value: Value, shape: Shape | None, axis: int) -> Value | None:
    """The other operand, when it is a constant of exactly the normalised shape."""
    first, second = op.inputs
    other = second if first is value else first
    return other if other is not None and _fits(other, shape, axis) else None


def _fits(other: Value, shape: Shape | None, axis: int) -> bool:
    if not other.constant or other.shape is None:
        return False
    if shape is None:  # a trace without shapes: as many extents as are normalised, none of which is broadcast
        return axis == -len(other.shape) and 1 not in other.shape
    return other.shape == shape[axis:]
