"""Readers of convolutions, pools, contractions and norms."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from rescompile.graph import Attrs, Shape, ValueType
from rescompile.kinds import OpKind as K
from rescompile.onnx_ops import (
    Reading,
    Step,
    is_static,
)
from rescompile.onnx_site import STATIC_ONLY, Reader, Site, Steps

# ---- convolutions and pools ------------------------------------------------------------------------------------------


def _window(s: Site, kernel: Sequence[int]) -> dict[str, Any] | str:
    """stride, pads and dilation over the spatial dimensions, auto_pad resolved."""
    spatial = len(kernel)
    stride = tuple(s.attr("strides") or (1,) * spatial)
    dilation = tuple(s.attr("dilations") or (1,) * spatial)
    auto = s.attr("auto_pad", "NOTSET")
    pads = tuple(s.attr("pads") or (0,) * (2 * spatial))
    if auto == "VALID":
        pads = (0,) * (2 * spatial)
    elif auto in ("SAME_UPPER", "SAME_LOWER"):
        shape = s.shape(0)
        totals = []
        for axis in range(spatial):
            span = dilation[axis] * (kernel[axis] - 1) + 1
            extent = shape[axis + 2] if shape is not None else None
            if stride[axis] == 1:
                totals.append(span - 1)
            elif isinstance(extent, int):
                totals.append(max((-(-extent // stride[axis]) - 1) * stride[axis] + span - extent, 0))
            else:
                return f"auto_pad={auto} needs an extent that is unknown"
        pads = _share(totals, more_at_end=auto == "SAME_UPPER")
    return {"stride": stride, "pads": pads, "dilation": dilation}


def _share(totals: Sequence[int], *, more_at_end: bool) -> tuple[int, ...]:
    small, large = [total // 2 for total in totals], [total - total // 2 for total in totals]
    return tuple(small + large) if more_at_end else tuple(large + small)


def _kernel(s: Site) -> tuple[int, ...] | None:
    kernel = s.attr("kernel_shape")
    if kernel is not None:
        return tuple(kernel)
    weight = s.shape(1)
    if weight is None or not is_static(weight[2:]):
        return None
    return tuple(int(extent) for extent in weight[2:])


def conv_attrs(s: Site) -> dict[str, Any] | str:
    """Attributes of a convolution."""
    kernel = _kernel(s)
    if kernel is None:
        return "its kernel's extents are unknown"
    window = _window(s, kernel)
    return window if isinstance(window, str) else {**window, "groups": s.attr("group", 1)}


def _conv(s: Site) -> Reading:
    attrs = conv_attrs(s)
    return attrs if isinstance(attrs, str) else s.one(K.CONV, s.inputs(3), **attrs)


def _conv_transpose(s: Site) -> Reading:
    kernel = _kernel(s)
    if kernel is None:
        return "its kernel's extents are unknown"
    spatial = len(kernel)
    stride = tuple(s.attr("strides") or (1,) * spatial)
    dilation = tuple(s.attr("dilations") or (1,) * spatial)
    extra = tuple(s.attr("output_padding") or (0,) * spatial)
    auto, wanted = s.attr("auto_pad", "NOTSET"), s.attr("output_shape")
    pads = tuple(s.attr("pads") or (0,) * (2 * spatial))
    spans = [extra[i] + dilation[i] * (kernel[i] - 1) + 1 for i in range(spatial)]
    if wanted is not None:
        shape = s.shape(0)
        if shape is None or not is_static(shape[2:]):
            return "output_shape needs extents that are unknown"
        given = [int(extent) for extent in shape[2:]]
        totals = [stride[i] * (given[i] - 1) + spans[i] - wanted[-spatial:][i] for i in range(spatial)]
    elif auto in ("SAME_UPPER", "SAME_LOWER"):
        totals = [spans[i] - stride[i] for i in range(spatial)]
    else:
        totals = None
        pads = (0,) * (2 * spatial) if auto == "VALID" else pads
    if totals is not None:
        if min(totals) < 0:
            return "its output is larger than its windows reach"
        pads = _share(totals, more_at_end=auto == "SAME_UPPER")
    return s.one(
        K.CONV_TRANSPOSE,
        s.inputs(3),
        stride=stride,
        pads=pads,
        dilation=dilation,
        groups=s.attr("group", 1),
        output_padding=extra,
    )


def _pool(s: Site, *, average: bool) -> Reading:
    kernel = tuple(s.attr("kernel_shape"))
    window = _window(s, kernel)
    if isinstance(window, str):
        return window
    ceil_mode = bool(s.attr("ceil_mode", 0))
    if not average:
        if s.used(1):
            return "its indices are used"
        return s.one(K.MAX_POOL, s.inputs(1), kernel=kernel, ceil_mode=ceil_mode, **window)
    if any(step != 1 for step in window.pop("dilation")):
        return "its window is dilated"
    include = bool(s.attr("count_include_pad", 0))
    return s.one(K.AVG_POOL, s.inputs(1), kernel=kernel, ceil_mode=ceil_mode, count_include_pad=include, **window)


def _global_pool(s: Site) -> Reading:
    rank = s.rank()
    if rank is None:
        return "its rank is unknown"
    if s.node.op_type == "GlobalMaxPool":
        return s.one(K.AMAX, s.inputs(1), axes=tuple(range(2, rank)), keepdims=True)
    return s.one(K.ADAPTIVE_AVG_POOL, s.inputs(1), output_size=(1,) * (rank - 2))


def _resize(s: Site) -> Reading:
    """Upsample 7 and 9, Resize 10 (asymmetric, floor), Resize 11 and later."""
    shape, out = s.shape(0), s.out_shape()
    if shape is None:
        return "its rank is unknown"
    mode = s.attr("mode", "nearest")
    modern = s.node.op_type == "Resize" and s.opset >= 11
    slot = 1 if s.opset < 11 else 2
    where = s.attr("coordinate_transformation_mode", "half_pixel") if modern else "asymmetric"
    rounding = s.attr("nearest_mode", "round_prefer_floor") if modern else "floor"
    sized = modern and s.has(3)
    if s.attr("antialias", 0) or s.attr("exclude_outside", 0) or s.attr("axes") is not None:
        return "antialias, exclude_outside and axes have no counterpart"
    if sized and s.attr("keep_aspect_ratio_policy", "stretch") != "stretch":
        return "keep_aspect_ratio_policy has no counterpart"
    scales: Sequence[float] | None = None
    if not sized:
        array = s.array(slot)
        scales = s.attr("scales") if s.opset < 9 else None if array is None else [float(scale) for scale in array]
    elif s.vector(3) is None:
        return STATIC_ONLY.format("size")
    if scales is None and not sized:
        return STATIC_ONLY.format("scale")
    if sized and out is not None and is_static(shape[2:]) and all(isinstance(extent, int) for extent in out[2:]):
        scales = [1.0, 1.0, *(int(b or 0) / int(a) for a, b in zip(shape[2:], out[2:], strict=True))]
    if scales is not None:
        if any(scale != 1 for scale in scales[:2]):
            return "it resizes batch or channels"
        exact = all(isinstance(extent, int) for extent in shape[2:]) and all(
            (int(extent) * scale).is_integer() for extent, scale in zip(shape[2:], scales[2:], strict=True)
        )
        if not sized and not exact and not all(float(scale).is_integer() for scale in scales):
            return "its output is not the input's extent times the scale"
    if not _samples_as_torch(mode, where, rounding, scales, s.attr("cubic_coeff_a", -0.75)):
        return f"{mode} with {where} and {rounding} has no counterpart"
    if where == "pytorch_half_pixel" and out is not None and 1 in out[2:]:
        return "it samples an extent of 1 at the beginning, not in the middle"
    return s.one(K.INTERPOLATE, s.inputs(1), mode=mode, align_corners=where == "align_corners")


def _samples_as_torch(mode: str, where: str, rounding: str, scales: Sequence[float] | None, coefficient: float) -> bool:
    """Whether the samples are taken where torch's interpolate takes them in this mode."""
    if mode == "nearest":
        if where == "asymmetric" and rounding == "floor":
            return True
        whole = scales is not None and all(float(scale).is_integer() for scale in scales)
        # A whole factor puts every sample between the same two ties, so the half-pixel roundings agree with floor.
        half = where == "half_pixel" and rounding in ("round_prefer_floor", "round_prefer_ceil")
        return whole and half
    if where not in ("half_pixel", "pytorch_half_pixel", "align_corners"):
        return False
    return mode == "linear" or (mode == "cubic" and coefficient == -0.75)


# ---- contractions ----------------------------------------------------------------------------------------------------


def _matmul(s: Site) -> Reading:
    if s.constant(1) and s.rank(1) == 2 and s.rank(0) not in (None, 0, 1):
        return s.one(K.LINEAR, [*s.inputs(2), None], transpose_weight=False)
    return s.one(K.MATMUL, s.inputs(2))


def gemm(s: Site) -> Reading:
    """alpha·A'·B' + beta·C: a linear where alpha and beta are 1 and A is not transposed, else what it says."""
    a, b, c = s.inputs(3)
    alpha, beta = s.attr("alpha", 1.0), s.attr("beta", 1.0)
    transposed = bool(s.attr("transB", 0))
    shape_a, shape_b, dtype = s.shape(0), s.shape(1), s.dtype()
    if c is not None and beta == 0:
        c = None
    simple = not s.attr("transA", 0) and s.constant(1)
    folded = c is None or (beta == 1 and alpha == 1 and s.constant(2) and _is_bias(s.shape(2), shape_b, transposed))
    if simple and alpha == 1 and folded:
        return s.one(K.LINEAR, [a, b, c], transpose_weight=transposed)
    steps: list[Step] = []

    def turned(value: ir.Value | None, shape: Shape | None, turn: bool) -> ir.Value | Step | None:
        if not turn:
            return value
        flipped = None if shape is None else tuple(reversed(shape))
        steps.append(Step(K.PERMUTE, [value], {"perm": (1, 0)}, type=ValueType(flipped, dtype)))
        return steps[-1]

    left = turned(a, shape_a, bool(s.attr("transA", 0)))
    out = ValueType(s.named(), dtype)
    if s.constant(1):
        steps.append(Step(K.LINEAR, [left, b, None], {"transpose_weight": transposed}, type=out))
    else:
        steps.append(Step(K.MATMUL, [left, turned(b, shape_b, transposed)], type=out))
    product = steps[-1]
    if c is not None:
        scales = () if alpha == beta == 1 else (alpha, beta)
        steps.append(Step(K.ADD, [product, c], {"scales": scales} if scales else {}))
    elif alpha != 1:
        steps.append(Step(K.ADD, [product], {"scales": (alpha,)}))
    steps[-1].outputs = (0,)
    return steps


def _is_bias(bias: Shape | None, weight: Shape | None, transposed: bool) -> bool:
    return bias is not None and weight is not None and bias == (weight[0 if transposed else 1],)


def _einsum(s: Site) -> Reading:
    return s.one(K.EINSUM, list(s.node.inputs), equation=str(s.attr("equation")).replace(" ", ""))


def _attention(s: Site) -> Reading:
    """Attention 23 with heads as a dimension, without a cache."""
    shape = s.shape(0)
    if shape is None or len(shape) != 4 or not isinstance(shape[3], int):
        return "its heads are not a dimension of their own"
    if any(s.has(index) for index in (4, 5, 6)) or any(s.used(index) for index in (1, 2, 3)):
        return "it keeps a cache or returns its scores"
    if s.attr("softcap", 0.0) or s.attr("qk_matmul_output_mode", 0):
        return "it caps its scores"
    scale = s.attr("scale", float(shape[3]) ** -0.5)
    return s.one(K.ATTENTION, s.inputs(4), scale=scale, causal=bool(s.attr("is_causal", 0)))


_RECURRENT_DEFAULTS = {"LSTM": ("Sigmoid", "Tanh", "Tanh"), "GRU": ("Sigmoid", "Tanh")}


def _recurrent(s: Site) -> Reading:
    name = s.node.op_type
    extras = {key: attribute.value for key, attribute in s.node.attributes.items() if key != "activations"}
    activations = tuple(s.attr("activations") or ())
    if name == "RNN":
        distinct = set(activations) or {"Tanh"}
        mode = {"Tanh": "rnn_tanh", "Relu": "rnn_relu"}.get(distinct.pop()) if len(distinct) == 1 else None
    else:
        expected = _RECURRENT_DEFAULTS[name]
        mode = name.lower() if activations in ((), expected, expected * 2) else None
    if mode is None:
        return "its activations are not the usual ones"
    attrs = {"mode": mode, **extras}
    return Step(K.RECURRENT, list(s.node.inputs), attrs, tuple(range(len(s.node.outputs))))


def _dft(s: Site) -> Reading:
    extras = {name: attribute.value for name, attribute in s.node.attributes.items()}
    return "its length is given" if len(s.node.inputs) > 1 else s.one(K.FFT, s.inputs(1), **extras)


# ---- norms -----------------------------------------------------------------------------------------------------------


def norm_eps(s: Site, default: float = 1e-5) -> float:
    """The attribute is a float32. In double precision what that holds is not the decimal that was meant."""
    value = float(s.attr("epsilon", default))
    return float(np.float32(value)) if s.dtype() == "float64" else value


def _batch_norm(s: Site) -> Reading:
    """BatchNormalization 7 and 9 train when they have more outputs, 14 and later when training_mode says so."""
    if s.attr("training_mode", 0) or any(s.used(index) for index in range(1, len(s.node.outputs))):
        return "it is in training"
    if s.attr("spatial", 1) == 0:
        return "its statistics are not by channel"
    return s.one(K.BATCH_NORM, s.inputs(5), eps=norm_eps(s), training=False)


def _layer_norm(s: Site) -> Reading:
    if s.used(1) or s.used(2):
        return "its statistics are used"
    return _affine_norm(s, K.LAYER_NORM, 3)


def rms_norm(s: Site) -> Reading:
    """RMSNormalization 23, and the operator that ONNX Runtime had before."""
    if s.used(1):
        return "its statistics are used"
    return _affine_norm(s, K.RMS_NORM, 2)


def _affine_norm(s: Site, kind: K, count: int) -> Reading:
    """A norm over the axes from one on, with a scale and perhaps a shift.

    The operators broadcast these. Where they have the normalised extents but for ones in front, these go; where they
    are others, they follow the norm.
    """
    axis, rank = s.axis(-1), s.rank()
    attrs: Attrs = {"axis": axis, "eps": norm_eps(s)}
    operands = s.inputs(count)
    affine = [(index, s.shape(index)) for index in range(1, count) if s.has(index)]
    if axis is None:
        return "its axis is unknown"
    wanted = (s.shape(0) or ())[axis:]
    if rank is None or all(shape is None or _covers(shape, wanted) for _, shape in affine):
        return s.one(kind, operands, **attrs)
    steps = Steps()
    if all(shape is not None and _without_ones(shape) == _without_ones(wanted) for _, shape in affine):
        given: list[Any] = list(operands)
        for index, shape in affine:
            if shape != wanted:
                given[index] = steps.add(K.RESHAPE, [given[index]], type=ValueType(wanted, s.dtype(index)))
        steps.add(kind, given, attrs)
        return steps.ending(0)
    if any(s.dtype(index) != s.dtype() for index, _ in affine):
        return "its scale is broadcast, and of another element type"
    steps.add(kind, [operands[0], *[None] * (count - 1)], attrs)
    for index, _ in affine:
        steps.add(K.MUL if index == 1 else K.ADD, [steps[-1], operands[index]])
    return steps.ending(0)


def _covers(shape: Shape, wanted: Shape) -> bool:
    """Whether the shape has the wanted extents, as far as they are known."""
    pairs = zip(shape, wanted, strict=False)
    return len(shape) == len(wanted) and not any(extent == 1 != other for extent, other in pairs)


def _without_ones(shape: Shape) -> Shape:
    """The shape without the ones that it begins with."""
    first = next((at for at, extent in enumerate(shape) if extent != 1), len(shape))
    return shape[first:]


def _group_norm(s: Site) -> Reading:
    """GroupNormalization 18 has a scale for each group, 21 for each channel."""
    groups, shape = s.attr("num_groups"), s.shape(0)
    weight: Any
    weight, bias = s.inputs(3)[1:]
    if s.opset < 21 and (shape is None or shape[1] != groups):
        scale, shift = s.array(1), s.array(2)
        channels = shape[1] if shape is not None else None
        if scale is None or shift is None or not isinstance(channels, int):
            return "its scale for each group is not a constant"
        weight, bias = (np.repeat(array, channels // groups) for array in (scale, shift))  # type: ignore[assignment]
    return s.one(K.GROUP_NORM, [s.input(0), weight, bias], groups=groups, eps=norm_eps(s))


def _instance_norm(s: Site) -> Reading:
    return s.one(K.INSTANCE_NORM, s.inputs(3), eps=norm_eps(s))


def _lrn(s: Site) -> Reading:
    return s.one(
        K.LOCAL_RESPONSE_NORM,
        s.inputs(1),
        size=s.attr("size"),
        alpha=s.attr("alpha", 1e-4),
        beta=s.attr("beta", 0.75),
        bias=s.attr("bias", 1.0),
    )


NN_READERS: dict[str, Reader] = {
    "Conv": _conv,
    "ConvTranspose": _conv_transpose,
    "MaxPool": lambda s: _pool(s, average=False),
    "AveragePool": lambda s: _pool(s, average=True),
    "GlobalAveragePool": _global_pool,
    "GlobalMaxPool": _global_pool,
    "Upsample": _resize,
    "Resize": _resize,
    "MatMul": _matmul,
    "Gemm": gemm,
    "Einsum": _einsum,
    "Attention": _attention,
    "LSTM": _recurrent,
    "GRU": _recurrent,
    "RNN": _recurrent,
    "DFT": _dft,
    "BatchNormalization": _batch_norm,
    "LayerNormalization": _layer_norm,
    "RMSNormalization": rms_norm,
    "SimplifiedLayerNormalization": rms_norm,
    "GroupNormalization": _group_norm,
    "InstanceNormalization": _instance_norm,
    "LRN": _lrn,
}
