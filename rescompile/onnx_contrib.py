"""Readers of ONNX Runtime's operators (domain com.microsoft), where their meaning is exactly a kind's."""

from __future__ import annotations

from typing import Any

from rescompile.graph import ValueType
from rescompile.kinds import OpKind as K
from rescompile.kinds import activation_name
from rescompile.onnx_ops import Reading, Step
from rescompile.onnx_read_math import MATH_READERS
from rescompile.onnx_read_nn import conv_attrs
from rescompile.onnx_site import Reader, Site


def _skip_norm(s: Site, *, rms: bool) -> Reading:
    """(x + bias + residual) normalised; outputs: normalised, mean, inverse deviation, sum."""
    if s.used(1) or s.used(2):
        return "its statistics are used"
    x: Any = s.input(0)
    residual, weight = s.input(1), s.input(2)
    beta, bias = (None, s.input(3)) if rms else (s.input(3), s.input(4))
    shape, skip = s.shape(0), s.shape(1)
    if shape is None or skip is None or len(skip) > len(shape):
        return "its rank is unknown"
    steps = []
    if bias is not None:
        steps.append(Step(K.ADD, [x, bias], type=ValueType(shape, s.dtype())))
        x = steps[-1]
    attrs = {"norm": "rms" if rms else "layer", "axis": len(shape) - 1, "eps": s.attr("epsilon", 1e-12)}
    return [*steps, Step(K.ADD_NORM, [x, residual, weight, beta], attrs, (0, 3))]


def _fused_conv(s: Site) -> Reading:
    """y = activation(conv(x) + z)"""
    attrs = conv_attrs(s)
    if isinstance(attrs, str):
        return attrs
    name, parameters = s.attr("activation", ""), tuple(s.attr("activation_params") or ())
    outer: str | None
    if name == "Clip" and len(parameters) == 2:
        outer = activation_name(K.CLIP, {"min": parameters[0], "max": parameters[1]})
    else:
        outer = {"": "none", "Relu": "relu", "Tanh": "tanh", "Sigmoid": "sigmoid"}.get(name)
    if outer is None:
        return f"its activation {name} cannot be carried by a fused convolution"
    return s.one(K.FUSED_CONV, s.inputs(4), **attrs, inner="none", outer=outer)


def _bias_gelu(s: Site, approximate: str) -> Reading:
    if not s.has(1):
        return s.one(K.GELU, s.inputs(1), approximate=approximate)
    total = Step(K.ADD, s.inputs(2), type=ValueType(s.shape(0), s.dtype()))
    return [total, s.one(K.GELU, [total], approximate=approximate)]


def _quick_gelu(s: Site) -> Reading:
    return (
        s.one(K.SILU, s.inputs(1)) if s.attr("alpha", 1.702) == 1 else "x·sigmoid(alpha·x) is SiLU for alpha = 1 only"
    )


def _fused_matmul(s: Site) -> Reading:
    if s.attr("alpha", 1.0) != 1 or any(s.attr(name, 0) for name in ("transA", "transB", "transBatchA", "transBatchB")):
        return "it scales or transposes"
    return s.one(K.MATMUL, s.inputs(2))


CONTRIB_READERS: dict[str, Reader] = {
    "SkipLayerNormalization": lambda s: _skip_norm(s, rms=False),
    "SkipSimplifiedLayerNormalization": lambda s: _skip_norm(s, rms=True),
    "FusedConv": _fused_conv,
    "BiasGelu": lambda s: _bias_gelu(s, "none"),
    "FastGelu": lambda s: _bias_gelu(s, "tanh"),
    "Gelu": lambda s: _bias_gelu(s, "none"),
    "QuickGelu": _quick_gelu,
    "QuantizeLinear": MATH_READERS["QuantizeLinear"],
    "DequantizeLinear": MATH_READERS["DequantizeLinear"],
    "FusedMatMul": _fused_matmul,
}
