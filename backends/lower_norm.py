"""Normalisations. With kernels they run over rows in one pass each; without, they are said in simpler Relax operations.

The variance is taken of the centred values (not as a difference of moments), sums are in float32 at least.
"""

from __future__ import annotations

from math import prod
from typing import Any

import numpy as np
from tvm import relax

from rescompile.backends.emitter import DTYPES, Emitter, Expr
from rescompile.backends.kernels import NormSpec
from rescompile.backends.layouts import CHANNELS_LAST, NATIVE
from rescompile.backends.lower_reduce import product, widened
from rescompile.graph import Op, Value
from rescompile.kinds import OpKind
from rescompile.values import numpy_dtype

R = relax.op


def batch_norm(e: Emitter, op: Op) -> None:
    """y = x·s + t per channel, s = weight / sqrt(var + eps), t = bias − mean·s"""
    value = op.operands[0]
    weight, bias, mean, var = (op.operand(name) for name in ("weight", "bias", "mean", "var"))
    layout = CHANNELS_LAST if e.lies_channels_last(value) else NATIVE
    x = e.get(value, layout)
    rank = len(e.shape(x))
    where = [1] * rank
    where[-1 if layout.channels_last else 1] = -1
    statistics = [part for part in (weight, bias, mean, var) if part is not None]
    if all(e.is_literal(part) for part in statistics):
        scale, shift = _folded(e, op, (weight, bias, mean, var))
        name = f"{op.name}.{'last' if layout.channels_last else 'first'}"
        factor = e.weight(f"{name}.scale", lambda: scale.reshape(where).astype(_of(e, x)))
        offset = e.weight(f"{name}.shift", lambda: shift.reshape(where).astype(_of(e, x)))
        e.bind(op.output, e.emit(R.add(e.emit(R.multiply(x, factor)), offset)), layout)
        return
    parts = {
        name: None if part is None else e.cast(e.reshape(e.get(part), where), e.dtype(x))
        for name, part in zip(("weight", "bias", "mean", "var"), (weight, bias, mean, var), strict=True)
    }
    out = x if parts["mean"] is None else e.emit(R.subtract(x, parts["mean"]))
    if parts["var"] is not None:
        out = e.emit(R.multiply(out, _inverse_root(e, parts["var"], op.attr("eps"))))
    e.bind(op.output, _affine(e, out, parts["weight"], parts["bias"]), layout)


def layer_norm(e: Emitter, op: Op) -> None:
    """y = (x − mean) / sqrt(var + eps)·weight + bias over the dimensions from `axis` to the last"""
    weight, bias = op.operand("weight"), op.operand("bias") if op.kind is OpKind.LAYER_NORM else None
    x = e.get(op.operands[0])
    axis = op.attr("axis") % len(e.shape(x))
    if _kernel_takes(e, x, axis):
        e.bind(op.output, norm_by_kernel(e, op, x, None, axis)[0])
    else:
        e.bind(op.output, row_norm(e, op, x, axis, weight, bias, rms=op.kind is OpKind.RMS_NORM))


def add_norm(e: Emitter, op: Op) -> None:
    """sum = x + residual; y = N(sum); outputs y, sum"""
    x, residual = (e.cast(e.get(value), op.outputs[1].dtype) for value in op.operands[:2])
    same = e.shape(x) == e.shape(residual) and all(isinstance(extent, int) for extent in e.shape(x))
    if (same or op.operands[0].shape == op.operands[1].shape) and _kernel_takes(
        e, x, op.attr("axis") % len(e.shape(x))
    ):
        outputs = norm_by_kernel(e, op, x, residual, op.attr("axis") % len(e.shape(x)))
        for value, out in zip(op.outputs, outputs, strict=True):
            e.bind(value, out)
        return
    total = e.emit(R.add(x, residual))
    axis = op.attr("axis") % len(e.shape(total))
    rms = op.attr("norm") == "rms"
    weight, bias = op.operand("weight"), None if rms else op.operand("bias")
    e.bind(op.outputs[0], row_norm(e, op, total, axis, weight, bias, rms=rms))
    e.bind(op.outputs[1], total)


def _kernel_takes(e: Emitter, x: Expr, axis: int) -> bool:
    width = product(e.shape(x)[axis:])
    return e.kernels is not None and isinstance(width, int) and e.dtype(x) in DTYPES


def norm_by_kernel(e: Emitter, op: Op, x: Expr, residual: Expr | None, axis: int) -> list[Expr]:
    """One kernel over rows of the dimensions from `axis` on; with a residual both outputs, if both are read."""
    shape = e.shape(x)
    rows, width = product(shape[:axis]), product(shape[axis:])
    rms = op.kind is OpKind.RMS_NORM or (op.kind is OpKind.ADD_NORM and op.attr("norm") == "rms")
    weight, bias = op.operand("weight"), None if rms else op.operand("bias")
    spec = NormSpec(
        rows if isinstance(rows, int) else None,
        width,
        "rms" if rms else "layer",
        residual=residual is not None,
        sum_output=residual is not None,
        weight=weight is not None,
        bias=bias is not None,
        eps=float(op.attr("eps")),
        dtype=e.dtype(x),
    )
    given = {"x": x, "residual": residual}
    for name, value in (("weight", weight), ("bias", bias)):
        if value is not None:
            given[name] = e.cast(e.get(value), e.dtype(x))
    return [e.reshape(out, shape) for out in e.call(op, spec, given, rows)]


def row_norm(e: Emitter, op: Op, x: Expr, axis: int, weight: Value | None, bias: Value | None, *, rms: bool) -> Expr:
    """Layer or RMS norm of `x` over its last dimensions, in Relax operations."""
    dtype = e.dtype(x)
    wide = widened(e, x)
    over = list(range(axis, len(e.shape(x))))
    if not rms:
        wide = e.emit(R.subtract(wide, e.emit(R.mean(wide, over, True))))
    power = e.emit(R.mean(e.emit(R.multiply(wide, wide)), over, True))
    out = e.emit(R.multiply(wide, _inverse_root(e, power, op.attr("eps"))))
    parts = [None if part is None else e.cast(e.get(part), e.dtype(out)) for part in (weight, bias)]
    return e.cast(_affine(e, out, parts[0], parts[1]), dtype)


def group_norm(e: Emitter, op: Op) -> None:
    """Each group of channels of each sample normalised over channels and positions; per-channel weight and bias"""
    value = op.operands[0]
    weight, bias = op.operand("weight"), op.operand("bias")
    x = e.get(value)
    shape = e.shape(x)
    groups = shape[1] if op.kind is OpKind.INSTANCE_NORM else op.attr("groups")
    where = [1, -1] + [1] * (len(shape) - 2)
    if e.kernels is not None and e.dtype(x) in DTYPES and all(isinstance(extent, int) for extent in shape):
        rows = shape[0] * groups
        spec = NormSpec(
            rows, product(shape) // rows, weight=False, bias=False, eps=float(op.attr("eps")), dtype=e.dtype(x)
        )
        out = e.reshape(e.call(op, spec, {"x": x})[0], shape)
        parts = [None if part is None else e.cast(e.reshape(e.get(part), where), e.dtype(x)) for part in (weight, bias)]
        e.bind(op.output, _affine(e, out, parts[0], parts[1]))
        return
    grouped = widened(e, e.reshape(x, [shape[0], groups, shape[1] // groups, _size(shape[2:])]))
    centred = e.emit(R.subtract(grouped, e.emit(R.mean(grouped, [2, 3], True))))
    power = e.emit(R.mean(e.emit(R.multiply(centred, centred)), [2, 3], True))
    out = e.reshape(e.emit(R.multiply(centred, _inverse_root(e, power, op.attr("eps")))), shape)
    parts = [None if part is None else e.cast(e.reshape(e.get(part), where), e.dtype(out)) for part in (weight, bias)]
    e.bind(op.output, e.cast(_affine(e, out, parts[0], parts[1]), e.dtype(x)))


def local_response_norm(e: Emitter, op: Op) -> None:
    """y = x / (bias + alpha/size·sum of x² over `size` neighbouring channels)^beta"""
    x = e.get(op.operands[0])
    shape = e.shape(x)
    size = int(op.attr("size"))
    square = e.emit(R.multiply(x, x))
    width = [0, 0, size // 2, (size - 1) // 2] + [0, 0] * (len(shape) - 2)
    padded = e.emit(R.nn.pad(square, width))
    total: Expr = None
    for shift in range(size):
        part = e.slice(padded, [1], [shift], [shape[1] + shift])
        total = part if total is None else e.emit(R.add(total, part))
    alpha, beta, bias = (e.scalar(n, e.dtype(x)) for n in (op.attr("alpha") / size, op.attr("beta"), op.attr("bias")))
    base = e.emit(R.add(e.emit(R.multiply(total, alpha)), bias))
    e.bind(op.output, e.emit(R.divide(x, e.emit(R.power(base, beta)))))


def _folded(e: Emitter, op: Op, parts: tuple[Value | None, ...]) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    weight, bias, mean, var = (None if part is None else e.data(part).astype(np.float64) for part in parts)
    scale = 1.0 if var is None else 1.0 / np.sqrt(var + op.attr("eps"))
    scale = np.asarray(scale if weight is None else scale * weight)
    shift = np.asarray(0.0 if bias is None else bias)
    return scale, shift if mean is None else shift - mean * scale


def _of(e: Emitter, x: Expr) -> Any:
    return numpy_dtype(e.dtype(x))


def _inverse_root(e: Emitter, x: Expr, eps: float) -> Expr:
    dtype = e.dtype(x)
    wide = widened(e, x)
    return e.cast(e.emit(R.rsqrt(e.emit(R.add(wide, e.scalar(eps, e.dtype(wide)))))), dtype)


def _affine(e: Emitter, x: Expr, weight: Expr | None, bias: Expr | None) -> Expr:
    if weight is not None:
        x = e.emit(R.multiply(x, weight))
    return x if bias is None else e.emit(R.add(x, bias))


def _size(extents: list[Any]) -> Any:
    return prod(extents) if all(isinstance(extent, int) for extent in extents) else -1


NORMS = {
    OpKind.BATCH_NORM: batch_norm,
    OpKind.LAYER_NORM: layer_norm,
    OpKind.RMS_NORM: layer_norm,
    OpKind.ADD_NORM: add_norm,
    OpKind.GROUP_NORM: group_norm,
    OpKind.INSTANCE_NORM: group_norm,
    OpKind.LOCAL_RESPONSE_NORM: local_response_norm,
}
