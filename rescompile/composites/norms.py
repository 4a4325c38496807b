"""Layer norm and RMS norm, as exporters decompose them.

    LayerNorm:  y = (x − mean(x)) / sqrt(mean((x − mean(x))²) + eps) · weight + bias
    RMSNorm:    y = x / sqrt(mean(x²) + eps) · weight

The anchor is the mean of the squares. Casts to a wider dtype inside, and back, belong to the norm. A weight is taken
only when it is a constant of exactly the normalised shape: a rotary table is no norm's weight.
"""

from __future__ import annotations

from rescompile.composites.region import Recogniser, close
from rescompile.graph import Op, Shape, Value
from rescompile.kinds import OpKind


def norm(recogniser: Recogniser, mean: Op) -> Op | None:
    """A LAYER_NORM or RMS_NORM in the place of the region around a mean of squares; None when there is none."""
    squared = _square(recogniser, mean.inputs[0])
    axis = _trailing_axis(mean)
    if squared is None or axis is None:
        return None
    base, square = squared
    scaled = _divided_by_root(recogniser, mean)
    if scaled is None:
        return None
    numerator, eps, root_ops, output = scaled
    ops = [square, mean, *root_ops]

    centred = _centred(base, mean)
    if centred is not None:
        x, centre_ops = centred
        other = _centred(numerator, mean)
        if other is None or other[0] is not x:
            return None
        ops += [*centre_ops, *other[1]]
        kind = OpKind.LAYER_NORM
    else:
        if base is numerator:
            x = base
        else:
            x, casts = recogniser.through(base, OpKind.CAST)
            same, more = recogniser.through(numerator, OpKind.CAST)
            if same is not x:
                return None
            ops += [cast for cast in (*casts, *more) if recogniser.enclosed(cast, [*ops, *casts, *more])]
        kind = OpKind.RMS_NORM
    producer = x.producer
    if producer is not None and producer.kind is OpKind.CAST and recogniser.enclosed(producer, ops):
        ops.append(producer)
        x = producer.operands[0]
    return _affine(recogniser, kind, ops, x, output, axis, eps)


def _square(recogniser: Recogniser, value: Value | None) -> tuple[Value, Op] | None:
    """`d` and the operation, where the value is d²."""
    op = None if value is None else value.producer
    if op is None or op.inputs[0] is None:
        return None
    if op.kind is OpKind.POW and recogniser.scalar(op.inputs[1]) == 2.0:
        return op.inputs[0], op
    if op.kind is OpKind.MUL and op.inputs[0] is op.inputs[1]:
        return op.inputs[0], op
    return None


def _trailing_axis(mean: Op) -> int | None:
    """The first of the axes that a mean reduces, when they are the last ones and kept."""
    axes = sorted(mean.attr("axes"))
    rank = mean.operands[0].rank
    if not axes or not mean.attr("keepdims"):
        return None
    last = -1 if axes[0] < 0 or rank is None else rank - 1
    if axes[-1] != last or axes != list(range(axes[0], last + 1)):
        return None
    return int(axes[0])


def _divided_by_root(recogniser: Recogniser, mean: Op) -> tuple[Value, float, list[Op], Value] | None:
    """For d / sqrt(mean + eps): the numerator d, eps, the operations, and the quotient."""
    ops: list[Op] = []
    eps = 0.0
    inverse = False  # whether the walk has reached 1 / sqrt, or still has sqrt
    rooted = False
    value = mean.output
    while (user := recogniser.only_user(value)) is not None:
        ops.append(user)
        kind = user.kind
        if kind is OpKind.ADD and not rooted and eps == 0.0 and len(user.inputs) == 2:
            number = _other_scalar(recogniser, user, value)
            if number is None or user.scales != (1.0, 1.0):
                return None
            eps = number
        elif kind in (OpKind.SQRT, OpKind.RSQRT) and not rooted:
            rooted, inverse = True, kind is OpKind.RSQRT
        elif kind is OpKind.POW and not rooted and user.inputs[0] is value:
            exponent = recogniser.scalar(user.inputs[1])
            if exponent not in (0.5, -0.5):
                return None
            rooted, inverse = True, exponent < 0
        elif rooted and not inverse and _is_reciprocal(recogniser, user):
            inverse = True
        elif rooted and kind is (OpKind.MUL if inverse else OpKind.DIV):
            first, second = user.inputs
            numerator = first if second is value else second
            if numerator is None or numerator is value or (kind is OpKind.DIV and second is not value):
                return None
            return numerator, eps, ops, user.output
        elif kind is not OpKind.CAST:
            return None
        value = user.output
        if len(ops) > 6:
            return None
    return None


def _is_reciprocal(recogniser: Recogniser, op: Op) -> bool:
    if op.kind is OpKind.DIV:
        return close(recogniser.scalar(op.inputs[0]), 1.0)
    return op.kind is OpKind.RECIPROCAL


def _other_scalar(recogniser: Recogniser, op: Op, value: Value) -> float | None:
    first, second = op.inputs
    return recogniser.scalar(second if first is value else first)


def _centred(value: Value, square_mean: Op) -> tuple[Value, list[Op]] | None:
    """`x` and the operations, where the value is x − mean(x) over the same axes."""
    op = value.producer
    if op is None or op.kind is not OpKind.ADD or len(op.inputs) != 2 or op.scales != (1.0, -1.0):
        return None
    x, mean = op.inputs
    centre = None if mean is None else mean.producer
    if x is None or centre is None or centre.kind is not OpKind.MEAN or centre.inputs[0] is not x:
        return None
    if sorted(centre.attr("axes")) != sorted(square_mean.attr("axes")) or not centre.attr("keepdims"):
        return None
    return x, [op, centre]


def _affine(
    recogniser: Recogniser, kind: OpKind, ops: list[Op], x: Value, output: Value, axis: int, eps: float
) -> Op | None:
    """Extend the region by cast, weight, cast, bias, cast, as far as they are there, and cover it."""
    weight: Value | None = None
    bias: Value | None = None
    region, value = list(ops), output
    best = (list(ops), output, weight, bias) if output.dtype == x.dtype else None
    while (user := recogniser.only_user(value)) is not None and user.group is None:
        if user.kind in (OpKind.CAST, OpKind.IDENTITY):
            pass
        elif user.kind is OpKind.MUL and weight is None and bias is None:
            weight = _parameter(user, value, x.shape, axis)
            if weight is None:
                break
        elif user.kind is OpKind.ADD and kind is OpKind.LAYER_NORM and bias is None and user.scales == (1.0, 1.0):
            bias = _parameter(user, value, x.shape, axis)
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
    inputs = [x, weight, bias] if kind is OpKind.LAYER_NORM else [x, weight]
    return recogniser.cover(region, kind, inputs, value, {"axis": axis, "eps": eps})


def _parameter(op: Op, value: Value, shape: Shape | None, axis: int) -> Value | None:
    """The other operand, when it is a constant of exactly the normalised shape."""
    first, second = op.inputs
    other = second if first is value else first
    if other is None or not other.constant or shape is None or other.shape != shape[axis:]:
        return None
    return other
