"""Readers of ONNX Runtime's operators (domain com.microsoft): what its session and its transformers tool write.

An operator whose meaning is exactly a kind's, or that of several in a row, reads as these, so that a model somebody
already optimised has the blocks of the model that it was made from. (ONNX Runtime, ContribOperators.md, version 1 of
each; the activations of a fused operator come after everything else that it does.)
"""

from __future__ import annotations

from typing import Any

import numpy as np

from rescompile.graph import Attrs
from rescompile.kinds import OpKind as K
from rescompile.kinds import activation_name
from rescompile.onnx_contrib_attention import ATTENTION_READERS
from rescompile.onnx_contrib_norms import NORM_READERS
from rescompile.onnx_ops import Reading, Step
from rescompile.onnx_read_math import MATH_READERS, dropout
from rescompile.onnx_read_nn import conv_attrs, gemm
from rescompile.onnx_site import STATIC_ONLY, Reader, Site, Steps, shortest

# ---- activations -----------------------------------------------------------------------------------------------------

_BOUNDLESS = 3.4e38  # what stands for no bound in a float32


def _clip(parameters: list[float]) -> Attrs | None:
    if len(parameters) != 2:
        return None
    low, high = (None if abs(bound) > _BOUNDLESS else bound for bound in parameters)
    return {"min": low, "max": high}


def _activation(name: str, parameters: list[float]) -> tuple[K, Attrs] | None:
    """The activation of a fused operator; None where it is not known."""
    if name == "Clip":
        bounds = _clip(parameters)
        return None if bounds is None else (K.CLIP, bounds)
    plain = {"Relu": K.RELU, "Tanh": K.TANH, "Sigmoid": K.SIGMOID, "Softplus": K.SOFTPLUS}.get(name)
    if plain is not None:
        return plain, {}
    first = parameters[0] if parameters else None
    if name in ("LeakyRelu", "Elu"):
        key, default = {"LeakyRelu": ("slope", 0.01), "Elu": ("alpha", 1.0)}[name]
        return (K.LEAKY_RELU if name == "LeakyRelu" else K.ELU), {key: default if first is None else first}
    if name == "HardSigmoid":
        alpha, beta = parameters if len(parameters) == 2 else (0.2, 0.5)
        return K.HARDSIGMOID, {"alpha": alpha, "beta": beta}
    return None


# ---- convolutions ----------------------------------------------------------------------------------------------------


def _fused_conv(s: Site) -> Reading:
    """y = activation(conv(x) + z)"""
    attrs = conv_attrs(s)
    if isinstance(attrs, str):
        return attrs
    name = s.attr("activation", "")
    act = _activation(name, [shortest(number) for number in s.attr("activation_params") or ()]) if name else None
    if name and act is None:
        return f"its activation {name} is not known"
    carried = activation_name(*act) if act is not None else "none"
    if carried is not None and (act is not None or s.has(3)):
        return s.one(K.FUSED_CONV, s.inputs(4), **attrs, inner="none", outer=carried)
    steps = Steps()
    if s.has(3):
        steps.add(K.FUSED_CONV, s.inputs(4), {**attrs, "inner": "none", "outer": "none"})
    else:
        steps.add(K.CONV, s.inputs(3), attrs)
    if act is not None:
        steps.add(act[0], steps[-1:], act[1])
    return steps.ending(0)


def _channels_last_conv(s: Site) -> Reading:
    """NhwcConv, NhwcFusedConv: y = activation(conv(x) + z), the channels of x, z and y being the last axis"""
    shape, weight = s.shape(0), s.shape(1)
    if shape is None or len(shape) < 3 or weight is None or s.attr("auto_pad", "NOTSET") not in ("NOTSET", "VALID"):
        return "its extents are unknown"
    attrs = conv_attrs(s)
    name = s.attr("activation", "")
    act = _activation(name, [shortest(number) for number in s.attr("activation_params") or ()]) if name else None
    if isinstance(attrs, str) or (name and act is None):
        return attrs if isinstance(attrs, str) else f"its activation {name} is not known"
    rank = len(shape)
    first, last = (0, rank - 1, *range(1, rank - 1)), (0, *range(2, rank), 1)
    steps = Steps()
    image = steps.add(K.PERMUTE, [s.input(0)], {"perm": first})
    result = steps.add(K.CONV, [image, s.input(1), s.input(2)], attrs)
    if s.has(3):
        result = steps.add(K.ADD, [result, steps.add(K.PERMUTE, [s.input(3)], {"perm": first})])
    if act is not None:
        result = steps.add(act[0], [result], act[1])
    steps.add(K.PERMUTE, [result], {"perm": last})
    return steps.ending(0)


# ---- products --------------------------------------------------------------------------------------------------------


def _fused_matmul(s: Site) -> Reading:
    """alpha·A'·B', each with its last two axes swapped (trans), and before that its first axis moved behind its batch
    axes (transBatch)"""
    steps = Steps()
    if s.constant(1) and s.rank(1) == 2 and s.rank(0) not in (None, 0, 1):
        left = _turned(s, steps, 0)
        if isinstance(left, str):
            return left
        steps.add(K.LINEAR, [left, s.input(1), None], {"transpose_weight": bool(s.attr("transB", 0))})
    else:
        operands = [_turned(s, steps, index) for index in (0, 1)]
        unknown = next((operand for operand in operands if isinstance(operand, str)), None)
        if unknown is not None:
            return unknown
        steps.add(K.MATMUL, operands)
    alpha = s.attr("alpha", 1.0)
    if alpha != 1:
        steps.add(K.MUL, [steps[-1], np.asarray(alpha, dtype=s.dtype() or "float32")])
    return steps.ending(0)


def _turned(s: Site, steps: Steps, index: int) -> Any:
    """An operand of a product as it enters it; why that is unknown."""
    side = "AB"[index]
    swap, batch = bool(s.attr(f"trans{side}", 0)), bool(s.attr(f"transBatch{side}", 0))
    if not swap and not batch:
        return s.input(index)
    rank = s.rank(index)
    if rank is None or rank < 2:
        return "it transposes an operand of unknown rank"
    perm = [*range(1, rank - 1), 0, rank - 1] if batch else list(range(rank))
    if swap:
        perm[-2:] = reversed(perm[-2:])
    return steps.add(K.PERMUTE, [s.input(index)], {"perm": tuple(perm)})


def _fused_gemm(s: Site) -> Reading:
    """activation(alpha·A'·B' + beta·C)"""
    name = s.attr("activation", "")
    given = (s.attr(f"activation_{parameter}") for parameter in ("alpha", "beta", "gamma"))
    act = _activation(name, [number for number in given if number is not None]) if name else None
    if name and act is None:
        return f"its activation {name} is not known"
    reading = gemm(s)
    if act is None or isinstance(reading, str):
        return reading
    return _activated(reading, *act)


def _activated(reading: Step | list[Step], kind: K, attrs: Attrs) -> Reading:
    carried = activation_name(kind, attrs)
    if isinstance(reading, Step) and reading.kind is K.LINEAR and carried is not None:
        inputs = [*reading.inputs, None]
        return Step(K.FUSED_LINEAR, inputs, {**reading.attrs, "inner": "none", "outer": carried}, (0,))
    steps = Steps(reading if isinstance(reading, list) else [reading])
    steps[-1].outputs = ()
    steps.add(kind, steps[-1:], attrs)
    return steps.ending(0)


def _gemm_fast_gelu(s: Site) -> Reading:
    """gelu(x·W + b), by the tangent"""
    gelu: Attrs = {"approximate": "tanh"}
    if s.constant(1) and s.rank(1) == 2 and s.rank(0) not in (None, 0, 1) and (not s.has(2) or s.constant(2)):
        return _activated(s.one(K.LINEAR, s.inputs(3), transpose_weight=False), K.GELU, gelu)
    steps = Steps()
    steps.add(K.MATMUL, s.inputs(2))
    if s.has(2):
        steps.add(K.ADD, [steps[-1], s.input(2)])
    steps.add(K.GELU, steps[-1:], gelu)
    return steps.ending(0)


# ---- elementwise -----------------------------------------------------------------------------------------------------


def _bias_gelu(s: Site, approximate: str) -> Reading:
    if not s.has(1):
        return s.one(K.GELU, s.inputs(1), approximate=approximate)
    steps = Steps()
    steps.add(K.ADD, s.inputs(2))
    steps.add(K.GELU, steps[-1:], {"approximate": approximate})
    return steps.ending(0)


def _quick_gelu(s: Site) -> Reading:
    """x·sigmoid(alpha·x), which is SiLU for alpha = 1"""
    alpha = s.attr("alpha", 1.702)
    if alpha == 1:
        return s.one(K.SILU, s.inputs(1))
    steps = Steps()
    x = s.input(0)
    steps.add(K.MUL, [x, np.asarray(alpha, dtype=s.dtype() or "float32")])
    steps.add(K.SIGMOID, steps[-1:])
    steps.add(K.MUL, [x, steps[-1]])
    return steps.ending(0)


def _bias_add(s: Site) -> Reading:
    """x + bias + skip"""
    steps = Steps()
    steps.add(K.ADD, s.inputs(2))
    steps.add(K.ADD, [steps[-1], s.input(2)])
    return steps.ending(0)


def _bias_dropout(s: Site) -> Reading:
    """dropout(x + bias) + residual"""
    if s.used(1):
        return "its mask is used"
    rate = dropout(s.number(3) if s.has(3) else 0.5, s.number(4) if s.has(4) else 0)
    if rate is None:
        return STATIC_ONLY.format("mode")
    steps = Steps()
    steps.add(K.ADD, s.inputs(2))
    if rate:
        steps.add(K.DROPOUT, steps[-1:], {"p": rate})
    if s.has(2):
        steps.add(K.ADD, [steps[-1], s.input(2)])
    return steps.ending(0)


def _bias_softmax(s: Site) -> Reading:
    """softmax(x + bias) along the last axis"""
    rank, bias = s.rank(), s.rank(1)
    axis = s.axis(1)
    if rank is None or bias is None or axis != rank - 1:
        return "it takes several axes as one, or its rank is unknown"
    if bias != rank and s.attr("is_inner_broadcast", 0):
        return "its bias is broadcast along axes that it does not have"
    steps = Steps()
    steps.add(K.ADD, s.inputs(2))
    steps.add(K.SOFTMAX, steps[-1:], {"axis": axis, "log": False})
    return steps.ending(0)


CONTRIB_READERS: dict[str, Reader] = {
    **NORM_READERS,
    **ATTENTION_READERS,
    "FusedConv": _fused_conv,
    "NhwcConv": _channels_last_conv,
    "NhwcFusedConv": _channels_last_conv,
    "FusedMatMul": _fused_matmul,
    "TransposeMatMul": _fused_matmul,
    "FusedGemm": _fused_gemm,
    "GemmFastGelu": _gemm_fast_gelu,
    "BiasGelu": lambda s: _bias_gelu(s, "none"),
    "FastGelu": lambda s: _bias_gelu(s, "tanh"),
    "Gelu": lambda s: _bias_gelu(s, "none"),
    "QuickGelu": _quick_gelu,
    "BiasAdd": _bias_add,
    "BiasDropout": _bias_dropout,
    "BiasSoftmax": _bias_softmax,
    "BiasSplitGelu": lambda s: "it splits its operand between a gate and what it gates",
    "QuantizeLinear": MATH_READERS["QuantizeLinear"],
    "DequantizeLinear": MATH_READERS["DequantizeLinear"],
}
