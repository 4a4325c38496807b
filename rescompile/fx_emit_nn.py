"""Writing back what carries weights or works across positions, and the fused kinds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from rescompile.errors import GraphError
from rescompile.fx_torch import Emitter, Torch, aten
from rescompile.fx_types import TORCH_DTYPES
from rescompile.graph import Attrs
from rescompile.kinds import OpKind as K


def _symmetric(pads: Sequence[int]) -> tuple[int, ...] | None:
    half = len(pads) // 2
    return tuple(pads[:half]) if tuple(pads[:half]) == tuple(pads[half:]) else None


def _spatial_pad(t: Torch, x: Any, pads: Sequence[int], value: float = 0.0) -> Any:
    half = len(pads) // 2
    flat = [amount for axis in reversed(range(half)) for amount in (pads[axis], pads[axis + half])]
    return t(aten.constant_pad_nd.default, x, flat, value)


def _conv(t: Torch, inputs: list[Any], attrs: Attrs) -> Any:
    x, weight, bias = inputs
    padding = _symmetric(attrs["pads"])
    if padding is None:
        x, padding = _spatial_pad(t, x, attrs["pads"]), (0,) * (len(attrs["pads"]) // 2)
    overload = {1: aten.conv1d, 2: aten.conv2d, 3: aten.conv3d}[len(padding)].default
    stride, dilation = list(attrs["stride"]), list(attrs["dilation"])
    return t(overload, x, weight, bias, stride, list(padding), dilation, attrs["groups"])


def _conv_transpose(t: Torch, inputs: list[Any], attrs: Attrs) -> Any:
    x, weight, bias = inputs
    pads = attrs["pads"]
    dims = len(pads) // 2
    padding = _symmetric(pads)
    table = {1: aten.conv_transpose1d.default, 2: aten.conv_transpose2d.input, 3: aten.conv_transpose3d.input}
    extra = list(attrs["output_padding"]), attrs["groups"], list(attrs["dilation"])
    y = t(table[dims], x, weight, bias, list(attrs["stride"]), list(padding or (0,) * dims), *extra)
    # Pads of a transposed convolution cut its result.
    return y if padding is not None else _spatial_pad(t, y, [-amount for amount in pads])


def _linear(t: Torch, inputs: list[Any], attrs: Attrs) -> Any:
    x, weight, bias = inputs
    if not attrs["transpose_weight"]:
        weight = t(aten.permute.default, weight, [1, 0])
    return t(aten.linear.default, x, weight, bias)


def _attention(t: Torch, inputs: list[Any], attrs: Attrs) -> Any:
    q, k, v, mask = inputs
    heads, kv_heads = t.shape(q), t.shape(k)
    grouped = heads is not None and kv_heads is not None and len(heads) > 2 and heads[-3] != kv_heads[-3]
    options: dict[str, Any] = {"scale": attrs["scale"]}
    if grouped:
        options["enable_gqa"] = True
    return t(aten.scaled_dot_product_attention.default, q, k, v, mask, 0.0, attrs["causal"], **options)


def _batch_norm(t: Torch, inputs: list[Any], attrs: Attrs) -> Any:
    x, weight, bias, mean, var = inputs
    return t(aten.batch_norm.default, x, weight, bias, mean, var, attrs["training"], 0.1, attrs["eps"], False)


def _normalized_shape(t: Torch, x: Any, weight: Any, axis: int) -> list[Any]:
    shape = t.shape(weight) if weight is not None else None
    if shape is None:
        whole = t.shape(x)
        if whole is None:
            raise GraphError("A norm without weight needs an operand of known shape.")
        shape = whole[axis:]
    if any(isinstance(extent, str) for extent in shape):
        raise GraphError("A norm over a symbolic dimension has no torch form: normalise over fixed ones.")
    return list(shape)


def _layer_norm(t: Torch, inputs: list[Any], attrs: Attrs) -> Any:
    x, weight, bias = inputs
    shape = _normalized_shape(t, x, weight, attrs["axis"])
    return t(aten.layer_norm.default, x, shape, weight, bias, attrs["eps"], False)


def _rms_norm(t: Torch, inputs: list[Any], attrs: Attrs) -> Any:
    x, weight = inputs
    if attrs["stash_type"]:
        return _stashed_rms_norm(t, x, weight, attrs)
    return t(aten.rms_norm.default, x, _normalized_shape(t, x, weight, attrs["axis"]), weight, attrs["eps"])


def _stashed_rms_norm(t: Torch, x: Any, weight: Any, attrs: Attrs) -> Any:
    """In the order and the types in which models write it, so that it rounds as they do."""
    known = t.dtype(x)
    if known is None:
        raise GraphError("An RMS norm that computes in a narrower type needs an operand of known type.")
    narrow = t(aten.to.dtype, x, TORCH_DTYPES[attrs["stash_type"]])
    axes = list(range(attrs["axis"], 0)) if attrs["axis"] < 0 else _axes_from(t, x, attrs["axis"])
    power = t(aten.mean.dim, t(aten.pow.Tensor_Scalar, narrow, 2), axes, True)
    inverse = t(aten.rsqrt.default, t(aten.add.Tensor, power, attrs["eps"]))
    y = t(aten.mul.Tensor, narrow if attrs["rounded"] else x, inverse)
    y = y if weight is None else t(aten.mul.Tensor, weight, y)
    return t(aten.to.dtype, y, TORCH_DTYPES[known])


def _axes_from(t: Torch, x: Any, axis: int) -> list[int]:
    shape = t.shape(x)
    if shape is None:
        raise GraphError("A norm over axes counted from the front needs an operand of known rank.")
    return list(range(axis, len(shape)))


def _group_norm(t: Torch, inputs: list[Any], attrs: Attrs) -> Any:
    x, weight, bias = inputs
    return t(aten.group_norm.default, x, attrs["groups"], weight, bias, attrs["eps"], False)


def _instance_norm(t: Torch, inputs: list[Any], attrs: Attrs) -> Any:
    x, weight, bias = inputs
    return t(aten.instance_norm.default, x, weight, bias, None, None, True, 0.1, attrs["eps"], False)


def _softmax(t: Torch, x: list[Any], attrs: Attrs) -> Any:
    return t(aten.log_softmax.int if attrs["log"] else aten.softmax.int, x[0], attrs["axis"])


def _max_pool(t: Torch, x: list[Any], attrs: Attrs) -> Any:
    value, padding = x[0], _symmetric(attrs["pads"])
    dims = len(attrs["kernel"])
    if padding is None or any(2 * pad > extent for pad, extent in zip(padding, attrs["kernel"], strict=True)):
        if attrs["ceil_mode"]:
            raise GraphError("A max pool with uneven pads and ceil_mode has no torch form: leave it as it is.")
        value, padding = _spatial_pad(t, value, attrs["pads"], -math.inf), (0,) * dims
    overload = {1: aten.max_pool1d, 2: aten.max_pool2d, 3: aten.max_pool3d}[dims].default
    lists = [list(attrs["kernel"]), list(attrs["stride"]), list(padding), list(attrs["dilation"] or (1,) * dims)]
    return t(overload, value, *lists, attrs["ceil_mode"])


def _avg_pool(t: Torch, x: list[Any], attrs: Attrs) -> Any:
    padding = _symmetric(attrs["pads"])
    if padding is None:
        return _uneven_avg_pool(t, x[0], attrs)
    overload = {1: aten.avg_pool1d, 2: aten.avg_pool2d, 3: aten.avg_pool3d}[len(padding)].default
    lists = [list(attrs["kernel"]), list(attrs["stride"]), list(padding)]
    return t(overload, x[0], *lists, attrs["ceil_mode"], attrs["count_include_pad"])


def _uneven_avg_pool(t: Torch, x: Any, attrs: Attrs) -> Any:
    """The average over the padded operand, divided by the share of each window that is no padding."""
    if attrs["ceil_mode"]:
        raise GraphError("An average pool with uneven pads and ceil_mode has no torch form: leave it as it is.")
    plain = {**attrs, "pads": (0,) * len(attrs["pads"])}
    pooled = _avg_pool(t, [_spatial_pad(t, x, attrs["pads"])], plain)
    if attrs["count_include_pad"]:
        return pooled
    ones = t(aten.ones_like.default, x)
    return t(aten.div.Tensor, pooled, _avg_pool(t, [_spatial_pad(t, ones, attrs["pads"])], plain))


def _adaptive_avg_pool(t: Torch, x: list[Any], attrs: Attrs) -> Any:
    size = list(attrs["output_size"])
    table = {1: aten.adaptive_avg_pool1d, 2: aten.adaptive_avg_pool2d, 3: aten.adaptive_avg_pool3d}
    return t(table[len(size)].default, x[0], size)


def _interpolate(t: Torch, x: list[Any], attrs: Attrs) -> Any:
    size = list(t.out_shape()[2:])
    dims, mode, corners = len(size), attrs["mode"], attrs["align_corners"]
    if mode == "nearest":
        table = {1: aten.upsample_nearest1d, 2: aten.upsample_nearest2d, 3: aten.upsample_nearest3d}
        return t(table[dims].vec, x[0], size, None)
    if mode == "linear":
        smooth = {1: aten.upsample_linear1d, 2: aten.upsample_bilinear2d, 3: aten.upsample_trilinear3d}
        return t(smooth[dims].vec, x[0], size, corners, None)
    return t(aten.upsample_bicubic2d.vec, x[0], size, corners, None)


def _fused_conv(t: Torch, inputs: list[Any], attrs: Attrs) -> Any:
    lists = [list(attrs[name]) for name in ("stride", "pads", "dilation")]
    target = torch.ops.rescompile.fused_conv.default
    return t(target, *inputs, *lists, attrs["groups"], attrs["inner"], attrs["outer"])


def _fused_linear(t: Torch, inputs: list[Any], attrs: Attrs) -> Any:
    target = torch.ops.rescompile.fused_linear.default
    return t(target, *inputs, attrs["transpose_weight"], attrs["inner"], attrs["outer"])


def _add_norm(t: Torch, inputs: list[Any], attrs: Attrs) -> Any:
    return t(torch.ops.rescompile.add_norm.default, *inputs, attrs["norm"], attrs["axis"], float(attrs["eps"]))


def _fused_region(t: Torch, inputs: list[Any], attrs: Attrs) -> Any:
    return t(torch.ops.rescompile.fused_region.default, inputs, attrs["label"], attrs["steps"])


NN_EMITTERS: dict[K, Emitter] = {
    K.CONV: _conv,
    K.CONV_TRANSPOSE: _conv_transpose,
    K.LINEAR: _linear,
    K.ATTENTION: _attention,
    K.BATCH_NORM: _batch_norm,
    K.LAYER_NORM: _layer_norm,
    K.RMS_NORM: _rms_norm,
    K.GROUP_NORM: _group_norm,
    K.INSTANCE_NORM: _instance_norm,
    K.SOFTMAX: _softmax,
    K.MAX_POOL: _max_pool,
    K.AVG_POOL: _avg_pool,
    K.ADAPTIVE_AVG_POOL: _adaptive_avg_pool,
    K.INTERPOLATE: _interpolate,
    K.FUSED_CONV: _fused_conv,
    K.FUSED_LINEAR: _fused_linear,
    K.ADD_NORM: _add_norm,
    K.FUSED_REGION: _fused_region,
}
