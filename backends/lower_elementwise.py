"""Elementwise operations: one Relax expression each, in whatever layout their largest operand lies.

Relax's own fusion then joins neighbours into one loop nest.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from tvm import relax

from rescompile.backends.emitter import Emitter, Expr
from rescompile.backends.layouts import CHANNELS_LAST, NATIVE, Layout, to_channels_last
from rescompile.graph import Attrs, Op, Value
from rescompile.kinds import ACTIVATIONS, OpKind

K = OpKind
R = relax.op

# Computed in float32 where the operand is narrower: the library calls behind them know no half precision.
_WIDENED = ("float16", "bfloat16")


def layout_of(e: Emitter, op: Op) -> Layout:
    """The layout in which an elementwise operation works: that of the operands that are as large as the output."""
    shape = op.output.shape
    if shape is None or len(shape) < 3:
        return NATIVE
    full = [value for value in op.operands if value.shape is None or tuple(value.shape) == tuple(shape)]
    return CHANNELS_LAST if any(e.lies_channels_last(value) for value in full) else NATIVE


def operand(e: Emitter, value: Value, layout: Layout, rank: int) -> Expr:
    """An operand, ready to broadcast against others of `rank` dimensions in that layout."""
    if not layout.channels_last:
        return e.get(value)
    if value.rank == rank:
        return e.get(value, CHANNELS_LAST)
    if value.rank == 0 or value.rank is None:
        return e.get(value)
    axes = to_channels_last(rank)
    if e.is_literal(value):
        lead = rank - value.rank
        return e.weight(
            f"{value.name}.channels_last{rank}",
            lambda: e.data(value).reshape((1,) * lead + e.data(value).shape).transpose(axes),
        )
    native = e.get(value)
    shape = e.shape(native)
    return e.permute(e.reshape(native, [1] * (rank - len(shape)) + shape), axes)


def elementwise(e: Emitter, op: Op) -> None:
    """y = f(x, ...) with broadcasting; operands take the output's dtype first, a comparison's their common one."""
    layout = layout_of(e, op)
    rank = len(op.output.shape or ())
    operands = [operand(e, value, layout, rank) for value in op.operands]
    operands = _common_dtype(e, op, operands)
    out = _RULES[op.kind](e, op, operands)
    out = e.cast(out, op.output.dtype)
    if op.kind is K.WHERE or len(operands) > 1:
        out = _full_shape(e, op, out, layout)
    e.bind(op.output, out, layout)


def activate(e: Emitter, name: str, x: Expr) -> Expr:
    """An activation that a fused kind carries, by name."""
    entry = ACTIVATIONS[name]
    return x if entry is None else activation(e, entry[0], dict(entry[1]), x)


def activation(e: Emitter, kind: OpKind, attrs: Attrs, x: Expr) -> Expr:
    """y = f(x) for an activation of one operand."""
    dtype = e.dtype(x)
    wide = e.cast(x, "float32") if dtype in _WIDENED else x
    return e.cast(_ACTIVATIONS[kind](e, {**kind.spec.attrs, **attrs}, wide), dtype)


def _common_dtype(e: Emitter, op: Op, operands: list[Expr]) -> list[Expr]:
    if op.kind in _COMPARISONS:
        dtypes = [e.dtype(x) for x in operands]
        ranked = [dtype for x, dtype in zip(operands, dtypes, strict=True) if e.shape(x)]
        # A number takes the type of the tensor that it is compared with, unless the tensor's cannot hold it.
        found = set(ranked or dtypes)
        if len(found) == 1 and not ("int" in next(iter(found)) and any("float" in dtype for dtype in dtypes)):
            common = found.pop()
        else:
            common = str(np.result_type(*[np.float32 if d == "bfloat16" else np.dtype(d) for d in dtypes]))
        return [e.cast(x, common) for x in operands]
    if op.kind in _LOGICAL:
        return [e.cast(x, "bool") for x in operands]
    if op.kind is K.WHERE:
        return [e.cast(operands[0], "bool"), *(e.cast(x, op.output.dtype) for x in operands[1:])]
    if len(operands) > 1:
        return [e.cast(x, op.output.dtype) for x in operands]
    return operands


def _full_shape(e: Emitter, op: Op, out: Expr, layout: Layout) -> Expr:
    """Where no operand spans the output (an exporter dropped an expand), broadcast to it."""
    shape = op.output.shape
    if shape is None or layout.channels_last or len(e.shape(out)) == len(shape):
        return out
    return e.emit(R.broadcast_to(out, tuple(e.target_shape(op, out))))


def _number(e: Emitter, x: Expr, number: float) -> Expr:
    return e.scalar(number, e.dtype(x))


def _add(e: Emitter, op: Op, xs: list[Expr]) -> Expr:
    scales = op.attr("scales") or (1.0,) * len(xs)
    total: Expr | None = None
    for x, scale in zip(xs, scales, strict=True):
        if total is not None and scale == -1:
            total = e.emit(R.subtract(total, x))
            continue
        term = x if scale == 1 else e.emit(R.multiply(x, _number(e, x, scale)))
        total = term if total is None else e.emit(R.add(total, term))
    return total


def _divide(e: Emitter, op: Op, xs: list[Expr]) -> Expr:
    return e.emit(R.divide(xs[0], xs[1]))


def _power(e: Emitter, op: Op, xs: list[Expr]) -> Expr:
    x, exponent = xs
    number = e.graph.scalar(op.inputs[1])
    if number is not None and number in (1.0, 2.0, 3.0, 4.0):
        square = x if number == 1 else e.emit(R.multiply(x, x))
        if number == 4:
            return e.emit(R.multiply(square, square))
        return e.emit(R.multiply(square, x)) if number == 3 else square
    if number in (0.5, -0.5, -1.0) and "float" in e.dtype(x):
        return _unary(e, {0.5: R.sqrt, -0.5: R.rsqrt, -1.0: _reciprocal(e)}[number], x)
    dtype = e.dtype(x)
    if dtype in _WIDENED:
        return e.cast(e.emit(R.power(e.cast(x, "float32"), e.cast(exponent, "float32"))), dtype)
    return e.emit(R.power(x, exponent))


def _reciprocal(e: Emitter) -> Callable[[Expr], Expr]:
    return lambda x: R.divide(_number(e, x, 1.0), x)


def _unary(e: Emitter, function: Callable[[Expr], Expr], x: Expr) -> Expr:
    dtype = e.dtype(x)
    if dtype in _WIDENED:
        return e.cast(e.emit(function(e.cast(x, "float32"))), dtype)
    return e.emit(function(x))


def _float_unary(function: Callable[[Expr], Expr]) -> Callable[[Emitter, Op, list[Expr]], Expr]:
    def rule(e: Emitter, op: Op, xs: list[Expr]) -> Expr:
        x = xs[0] if "float" in e.dtype(xs[0]) else e.cast(xs[0], op.output.dtype)
        return _unary(e, function, x)

    return rule


def _direct(function: Callable[..., Expr]) -> Callable[[Emitter, Op, list[Expr]], Expr]:
    return lambda e, op, xs: e.emit(function(*xs))


def _chain(function: Callable[..., Expr]) -> Callable[[Emitter, Op, list[Expr]], Expr]:
    """A function of two operands over two or more."""

    def rule(e: Emitter, op: Op, xs: list[Expr]) -> Expr:
        out = xs[0]
        for x in xs[1:]:
            out = e.emit(function(out, x))
        return out

    return rule


def _prelu(e: Emitter, op: Op, xs: list[Expr]) -> Expr:
    slope = op.operands[1]
    layout = layout_of(e, op)
    rank = len(op.output.shape or ())
    factor = operand(e, slope, layout, rank)
    if slope.rank == 1 and slope.shape != (1,) and e.graph.source_ir != "onnx" and rank > 1:
        # torch counts the slopes along the channels; ONNX broadcasts from the last dimension.
        channels = [1] * rank
        channels[-1 if layout.channels_last else 1] = -1
        factor = e.reshape(e.get(slope), channels)
    data = xs[0]
    zero = _number(e, data, 0.0)
    negative = e.emit(R.multiply(e.emit(R.minimum(data, zero)), e.cast(factor, e.dtype(data))))
    return e.emit(R.add(e.emit(R.maximum(data, zero)), negative))


def _activation_rule(e: Emitter, op: Op, xs: list[Expr]) -> Expr:
    x = xs[0]
    if op.kind is not K.RELU and op.kind is not K.CLIP and "float" not in e.dtype(x):
        x = e.cast(x, op.output.dtype)
    return activation(e, op.kind, op.attrs, x)


# ---- activations: (emitter, attrs, x) -> y -------------------------------------------------------------------------


def _clip(e: Emitter, attrs: Attrs, x: Expr) -> Expr:
    for bound, function in ((attrs["min"], R.maximum), (attrs["max"], R.minimum)):
        if bound is not None and not math.isinf(bound):
            x = e.emit(function(x, _number(e, x, bound)))
    return x


def _leaky_relu(e: Emitter, attrs: Attrs, x: Expr) -> Expr:
    zero = _number(e, x, 0.0)
    negative = e.emit(R.multiply(e.emit(R.minimum(x, zero)), _number(e, x, attrs["slope"])))
    return e.emit(R.add(e.emit(R.maximum(x, zero)), negative))


def _elu(e: Emitter, attrs: Attrs, x: Expr) -> Expr:
    zero, one = _number(e, x, 0.0), _number(e, x, 1.0)
    low = e.emit(R.subtract(e.emit(R.exp(e.emit(R.minimum(x, zero)))), one))
    negative = e.emit(R.multiply(low, _number(e, x, attrs["alpha"])))
    return e.emit(R.add(e.emit(R.maximum(x, zero)), negative))


def _gelu(e: Emitter, attrs: Attrs, x: Expr) -> Expr:
    if attrs["approximate"] == "tanh":
        cube = e.emit(R.multiply(e.emit(R.multiply(x, x)), x))
        inner = e.emit(R.add(x, e.emit(R.multiply(cube, _number(e, x, 0.044715)))))
        curve = e.emit(R.tanh(e.emit(R.multiply(inner, _number(e, x, math.sqrt(2.0 / math.pi))))))
    else:
        curve = e.emit(R.erf(e.emit(R.multiply(x, _number(e, x, math.sqrt(0.5))))))
    half = e.emit(R.multiply(x, _number(e, x, 0.5)))
    return e.emit(R.multiply(half, e.emit(R.add(curve, _number(e, x, 1.0)))))


def _silu(e: Emitter, attrs: Attrs, x: Expr) -> Expr:
    return e.emit(R.multiply(x, e.emit(R.sigmoid(x))))


def _hardsigmoid(e: Emitter, attrs: Attrs, x: Expr) -> Expr:
    line = e.emit(R.multiply(x, _number(e, x, attrs["alpha"])))
    return _clip(e, {"min": 0.0, "max": 1.0}, e.emit(R.add(line, _number(e, x, attrs["beta"]))))


def _hardswish(e: Emitter, attrs: Attrs, x: Expr) -> Expr:
    gate = _clip(e, {"min": 0.0, "max": 6.0}, e.emit(R.add(x, _number(e, x, 3.0))))
    return e.emit(R.multiply(e.emit(R.multiply(x, gate)), _number(e, x, 1.0 / 6.0)))


def _softplus(e: Emitter, attrs: Attrs, x: Expr) -> Expr:
    """log(1 + exp(x)) = max(x, 0) + log(1 + exp(-|x|)), which cannot overflow"""
    tail = e.emit(R.exp(e.emit(R.negative(e.emit(R.abs(x))))))
    tail = e.emit(R.log(e.emit(R.add(tail, _number(e, x, 1.0)))))
    return e.emit(R.add(e.emit(R.maximum(x, _number(e, x, 0.0))), tail))


def _mish(e: Emitter, attrs: Attrs, x: Expr) -> Expr:
    return e.emit(R.multiply(x, e.emit(R.tanh(_softplus(e, attrs, x)))))


_ACTIVATIONS: dict[OpKind, Callable[[Emitter, Attrs, Expr], Expr]] = {
    K.RELU: lambda e, attrs, x: e.emit(R.maximum(x, _number(e, x, 0))),
    K.CLIP: _clip,
    K.LEAKY_RELU: _leaky_relu,
    K.ELU: _elu,
    K.GELU: _gelu,
    K.SILU: _silu,
    K.SIGMOID: lambda e, attrs, x: e.emit(R.sigmoid(x)),
    K.TANH: lambda e, attrs, x: e.emit(R.tanh(x)),
    K.HARDSIGMOID: _hardsigmoid,
    K.HARDSWISH: _hardswish,
    K.SOFTPLUS: _softplus,
    K.MISH: _mish,
}

_COMPARISONS: dict[OpKind, Callable[..., Expr]] = {
    K.EQUAL: R.equal,
    K.NOT_EQUAL: R.not_equal,
    K.LESS: R.less,
    K.LESS_EQUAL: R.less_equal,
    K.GREATER: R.greater,
    K.GREATER_EQUAL: R.greater_equal,
}
_LOGICAL: dict[OpKind, Callable[..., Expr]] = {
    K.LOGICAL_AND: R.logical_and,
    K.LOGICAL_OR: R.logical_or,
    K.LOGICAL_NOT: R.logical_not,
}

_RULES: dict[OpKind, Callable[[Emitter, Op, list[Expr]], Any]] = {
    K.IDENTITY: lambda e, op, xs: xs[0],
    K.CAST: lambda e, op, xs: e.cast(xs[0], op.attr("dtype")),
    K.ADD: _add,
    K.MUL: _chain(R.multiply),
    K.DIV: _divide,
    K.POW: _power,
    K.MAXIMUM: _chain(R.maximum),
    K.MINIMUM: _chain(R.minimum),
    K.MOD: _direct(R.floor_mod),
    K.WHERE: _direct(R.where),
    K.NEG: _direct(R.negative),
    K.ABS: _direct(R.abs),
    K.EXP: _float_unary(R.exp),
    K.LOG: _float_unary(R.log),
    K.SQRT: _float_unary(R.sqrt),
    K.RSQRT: _float_unary(R.rsqrt),
    K.RECIPROCAL: lambda e, op, xs: _unary(e, _reciprocal(e), e.cast(xs[0], op.output.dtype)),
    K.ERF: _float_unary(R.erf),
    K.SIN: _float_unary(R.sin),
    K.COS: _float_unary(R.cos),
    K.FLOOR: _float_unary(R.floor),
    K.CEIL: _float_unary(R.ceil),
    K.ROUND: _float_unary(R.round),
    K.SIGN: _direct(R.sign),
    K.IS_NAN: _direct(R.isnan),
    K.PRELU: _prelu,
    **{kind: _direct(function) for kind, function in {**_COMPARISONS, **_LOGICAL}.items()},
    **dict.fromkeys(_ACTIVATIONS, _activation_rule),
}

ELEMENTWISE = frozenset(_RULES)
