"""Readers of arithmetic, activations, reductions, and of what makes values out of nothing."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir

from rescompile.graph import ValueType
from rescompile.kinds import OpKind as K
from rescompile.onnx_ops import (
    INT64_MAX,
    PLAIN,
    REDUCTIONS,
    Reading,
    Step,
    dtype_name,
    is_static,
)
from rescompile.onnx_site import STATIC_ONLY, Reader, Site, shortest


def _plain(kind: K) -> Reader:
    return lambda s: s.one(kind, list(s.node.inputs))


# ---- arithmetic ------------------------------------------------------------------------------------------------------


def _sum(s: Site) -> Reading:
    if len(s.node.inputs) == 1:
        return s.one(K.IDENTITY, s.node.inputs)
    return s.one(K.ADD, list(s.node.inputs))


def _sub(s: Site) -> Reading:
    return s.one(K.ADD, s.inputs(2), scales=(1.0, -1.0))


def _mean(s: Site) -> Reading:
    count = len(s.node.inputs)
    return s.one(K.ADD, list(s.node.inputs), scales=(1.0 / count,) * count)


def _div(s: Site) -> Reading:
    dtype = s.dtype(0) or s.dtype(1)
    if dtype is not None and dtype.startswith(("int", "uint")):
        return "integer division rounds"
    return s.one(K.DIV, s.inputs(2))


def _mod(s: Site) -> Reading:
    return "fmod takes the sign of the dividend" if s.attr("fmod", 0) else s.one(K.MOD, s.inputs(2))


def _extremum(kind: K) -> Reader:
    def read(s: Site) -> Reading:
        values = list(s.node.inputs)
        if len(values) == 1:
            return s.one(K.IDENTITY, values)
        if len(values) == 2:
            return s.one(kind, values)
        steps = [Step(kind, values[:2], type=ValueType(None, s.dtype()))]
        for value in values[2:]:
            steps.append(Step(kind, [steps[-1], value], type=ValueType(None, s.dtype())))
        steps[-1].outputs = (0,)
        return steps

    return read


def _cast(s: Site) -> Reading:
    dtype = s.facts.type(s.node.outputs[0]).dtype
    if dtype is None and s.attr("to") is not None:
        dtype = dtype_name(ir.DataType(s.attr("to")))
    if dtype is None and s.has(1):
        dtype = s.dtype(1)
    if dtype in (None, "string"):
        return "it casts to strings"
    return s.one(K.IDENTITY, s.inputs(1)) if dtype == s.dtype() else s.one(K.CAST, s.inputs(1), dtype=dtype)


# ---- activations -----------------------------------------------------------------------------------------------------


def _clip(s: Site) -> Reading:
    """Clip 6 has attributes, Clip 11 inputs."""
    if s.opset < 11:
        low, high = s.attr("min"), s.attr("max")
    else:
        low, high = s.number(1), s.number(2)
        if (s.has(1) and low is None) or (s.has(2) and high is None):
            return STATIC_ONLY.format("range")
    limits = [None if bound is None else shortest(bound) for bound in (low, high)]
    low, high = (None if bound is None or abs(bound) > 3.4e38 else bound for bound in limits)
    if low is None and high is None:
        return s.one(K.IDENTITY, s.inputs(1))
    return s.one(K.CLIP, s.inputs(1), min=low, max=high)


def _prelu(s: Site) -> Reading:
    """A slope for each channel, spelled [C, 1, ...], or one for all."""
    slope, rank = s.shape(1), s.rank()
    if slope is None or rank is None or not is_static(slope):
        return "its slope's shape is unknown"
    extents = [(index - len(slope), extent) for index, extent in enumerate(slope) if extent != 1]
    if extents and (len(extents) > 1 or extents[0][0] != 1 - rank):
        return "its slope varies over more than the channels"
    return s.one(K.PRELU, s.inputs(2))


def _dropout(s: Site) -> Reading:
    """Dropout 7 and 10 do nothing, 12 and later drop when training_mode is true."""
    if s.used(1):
        return "its mask is used"
    ratio = s.number(1) if s.has(1) else s.attr("ratio", 0.5)
    rate = dropout(ratio, s.number(2) if s.opset >= 12 and s.has(2) else 0)
    if rate is None:
        return STATIC_ONLY.format("mode")
    return s.one(K.DROPOUT, s.inputs(1), p=rate) if rate else s.one(K.IDENTITY, s.inputs(1))


def dropout(ratio: float | None, mode: float | None) -> float | None:
    """The rate of a dropout of that ratio and training mode: 0 where it does nothing, None where that is unknown."""
    if mode == 0 or ratio == 0:
        return 0.0
    return None if mode is None or ratio is None else shortest(ratio)


def _swish(s: Site) -> Reading:
    return "its alpha is not 1" if s.attr("alpha", 1.0) != 1 else s.one(K.SILU, s.inputs(1))


def _attrs(kind: K, **names: tuple[str, Any]) -> Reader:
    """A one-operand operator whose attributes only change their names."""
    return lambda s: s.one(kind, s.inputs(1), **{ours: s.attr(*theirs) for ours, theirs in names.items()})


def _softmax(s: Site) -> Reading:
    """Softmax 13 works along one axis; before, over everything from `axis` (1 by default) on."""
    log = s.node.op_type == "LogSoftmax"
    shape, dtype = s.shape(0), s.dtype()
    axis = s.axis(-1 if s.opset >= 13 else 1)
    if shape is None or axis is None:
        return "its rank is unknown"
    tail = shape[axis + 1 :]
    if s.opset >= 13 or all(extent == 1 for extent in tail):
        return s.one(K.SOFTMAX, s.inputs(1), axis=axis, log=log)
    if not is_static(shape):
        return "it flattens extents that are unknown"
    sizes = [int(extent) for extent in shape]
    flat = (int(np.prod(sizes[:axis])), int(np.prod(sizes[axis:])))
    inner = Step(K.RESHAPE, s.inputs(1), type=ValueType(flat, dtype))
    scored = Step(K.SOFTMAX, [inner], {"axis": 1, "log": log}, type=ValueType(flat, dtype))
    return [inner, scored, s.one(K.RESHAPE, [scored])]


# ---- reductions ------------------------------------------------------------------------------------------------------


def _axes(s: Site, since: int) -> tuple[int, ...] | str:
    axes = s.attr("axes") if s.opset < since else s.integers(1)
    rank = s.rank()
    if rank is None:
        return "its rank is unknown"
    if s.opset >= since and s.has(1) and axes is None:
        return STATIC_ONLY.format("axes")
    if axes is None or len(axes) == 0:
        return () if s.attr("noop_with_empty_axes", 0) else tuple(range(rank))
    return tuple(sorted(axis % rank for axis in axes))


def _reduce(s: Site) -> Reading:
    kind, since = REDUCTIONS[s.node.op_type]
    axes = _axes(s, since)
    if isinstance(axes, str):
        return axes
    if not axes:
        return s.one(K.IDENTITY, s.inputs(1))
    return s.one(kind, s.inputs(1), axes=axes, keepdims=bool(s.attr("keepdims", 1)))


def _reduce_norm(s: Site) -> Reading:
    """ReduceL1, ReduceL2, ReduceSumSquare as a sum of absolute values or squares."""
    axes = _axes(s, 18)
    if isinstance(axes, str):
        return axes
    x, source = s.input(0), ValueType(s.shape(0), s.dtype())
    first = Step(K.ABS, [x], type=source) if s.node.op_type == "ReduceL1" else Step(K.MUL, [x, x], type=source)
    if not axes:
        return "it reduces nothing"
    total = Step(K.SUM, [first], {"axes": axes, "keepdims": bool(s.attr("keepdims", 1))}, (0,))
    if s.node.op_type != "ReduceL2":
        return [first, total]
    total.outputs, total.type = (), ValueType(s.named(), s.dtype())
    return [first, total, s.one(K.SQRT, [total])]


def _argmax(s: Site) -> Reading:
    axis = s.axis(0)
    if axis is None or axis < 0 or s.attr("select_last_index", 0):
        return "it takes the last of several"
    return s.one(K.ARGMAX, s.inputs(1), axes=(axis,), keepdims=bool(s.attr("keepdims", 1)))


def _cumsum(s: Site) -> Reading:
    axis, rank = s.number(1), s.rank()
    if axis is None or rank is None or s.attr("exclusive", 0) or s.attr("reverse", 0):
        return "it is exclusive, reversed, or along an unknown axis"
    return s.one(K.CUMSUM, s.inputs(1), axis=int(axis) % rank)


def _topk(s: Site) -> Reading:
    attrs = {"axis": s.axis(-1), "largest": bool(s.attr("largest", 1)), "sorted": bool(s.attr("sorted", 1))}
    if s.opset < 10:
        attrs["k"] = s.attr("k")
    return Step(K.TOPK, list(s.node.inputs), attrs, (0, 1))


# ---- out of nothing --------------------------------------------------------------------------------------------------


def _full(s: Site) -> Reading:
    tensor = s.attr("value")
    value = 0.0 if tensor is None else float(tensor.numpy().reshape(-1)[0])
    return s.one(K.FULL, list(s.node.inputs), value=value)


def _range(s: Site) -> Reading:
    start, step = s.number(0), s.number(2)
    if start is None or step is None:
        return STATIC_ONLY.format("start or step")
    if s.dtype() in (None, "int64", "int32", "int16"):
        start, step = int(start), int(step)
    return s.one(K.ARANGE, list(s.node.inputs), start=start, step=step)


def _shape(s: Site) -> Reading:
    """Shape 15 may take a part of the shape only."""
    rank = s.rank()
    start, end = s.attr("start", 0), s.attr("end", INT64_MAX)
    if start == 0 and end == INT64_MAX:
        return s.one(K.SHAPE, s.inputs(1))
    if rank is None:
        return "its rank is unknown"
    first, last, _ = slice(start, end).indices(rank)
    whole = Step(K.SHAPE, s.inputs(1), type=ValueType((rank,), "int64"))
    return [whole, s.one(K.SLICE, [whole], axes=(0,), starts=(first,), stops=(max(first, last),), steps=(1,))]


def _random(s: Site) -> Reading:
    extras = {name: attribute.value for name, attribute in s.node.attributes.items()}
    return s.one(K.RANDOM, list(s.node.inputs), op=s.node.op_type, **extras)


def _quantised(kind: K) -> Reader:
    """A scale for each tensor or each channel; one for each block of elements has the shape to show it."""
    return lambda s: s.one(kind, s.inputs(3), **{name: attr.value for name, attr in s.node.attributes.items()})


MATH_READERS: dict[str, Reader] = {
    **{row.op_type: _plain(row.kind) for row in PLAIN},
    **dict.fromkeys(REDUCTIONS, _reduce),
    "Sum": _sum,
    "Sub": _sub,
    "Mean": _mean,
    "Div": _div,
    "Mod": _mod,
    "Max": _extremum(K.MAXIMUM),
    "Min": _extremum(K.MINIMUM),
    "Cast": _cast,
    "CastLike": _cast,
    "QuantizeLinear": _quantised(K.QUANTIZE),
    "DequantizeLinear": _quantised(K.DEQUANTIZE),
    "Clip": _clip,
    "LeakyRelu": _attrs(K.LEAKY_RELU, slope=("alpha", 0.01)),
    "PRelu": _prelu,
    "Elu": _attrs(K.ELU, alpha=("alpha", 1.0)),
    "Gelu": _attrs(K.GELU, approximate=("approximate", "none")),
    "Swish": _swish,
    "HardSigmoid": _attrs(K.HARDSIGMOID, alpha=("alpha", 0.2), beta=("beta", 0.5)),
    "Dropout": _dropout,
    "Softmax": _softmax,
    "LogSoftmax": _softmax,
    "ReduceL1": _reduce_norm,
    "ReduceL2": _reduce_norm,
    "ReduceSumSquare": _reduce_norm,
    "ArgMax": _argmax,
    "CumSum": _cumsum,
    "TopK": _topk,
    "ConstantOfShape": _full,
    "Range": _range,
    "Shape": _shape,
    "RandomNormal": _random,
    "RandomNormalLike": _random,
    "RandomUniform": _random,
    "RandomUniformLike": _random,
    "Bernoulli": _random,
}
