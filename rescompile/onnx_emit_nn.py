"""Writers of convolutions, pools, contractions, norms and softmax."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import onnx_ir as ir

from rescompile.errors import GraphError
from rescompile.kinds import OpKind as K
from rescompile.onnx_build import HALF, Builder, Ref, Request, Writer, target_of
from rescompile.onnx_ops import Arg, dtype_of, is_static
from rescompile.values import numpy_dtype

# ---- convolutions and pools ------------------------------------------------------------------------------------------


def _conv(b: Builder, r: Request) -> ir.Value:
    names = {"strides": "stride", "pads": "pads", "dilations": "dilation", "group": "groups"}
    attrs = {theirs: r.attr(ours) for theirs, ours in names.items()}
    if r.kind is K.CONV_TRANSPOSE:
        extra = r.attr("output_padding")
        return b.node("ConvTranspose", list(r.args[:3]), **attrs, output_padding=extra if any(extra) else None)
    return b.node("Conv", list(r.args[:3]), **attrs)


def _pool(b: Builder, r: Request) -> ir.Value:
    kernel = r.attr("kernel")
    attrs: dict[str, Any] = {
        "kernel_shape": kernel,
        "strides": r.attr("stride") or None,
        "pads": r.attr("pads") or None,
    }
    if r.attr("ceil_mode"):
        b.since(10, "a pool with ceil_mode")
        attrs["ceil_mode"] = 1
    if r.kind is K.AVG_POOL:
        return b.node("AveragePool", [r.arg(0)], **attrs, count_include_pad=int(r.attr("count_include_pad")))
    dilation = r.attr("dilation")
    if dilation and any(step != 1 for step in dilation):
        b.since(10, "a dilated pool")
        attrs["dilations"] = dilation
    return b.node("MaxPool", [r.arg(0)], **attrs)


def _adaptive_pool(b: Builder, r: Request) -> ir.Value:
    """Global when the output is 1 everywhere; even windows where they divide the input."""
    size, shape = r.attr("output_size"), r.arg(0).shape
    if all(extent == 1 for extent in size):
        return b.node("GlobalAveragePool", [r.arg(0)])
    if shape is not None and is_static(shape):
        given = [int(extent) for extent in shape[-len(size) :]]
        if all(extent % wanted == 0 for extent, wanted in zip(given, size, strict=True)):
            window = tuple(extent // wanted for extent, wanted in zip(given, size, strict=True))
            return b.node("AveragePool", [r.arg(0)], kernel_shape=window, strides=window)
    raise GraphError(f"Adaptive pooling of {shape} to {tuple(size)} is uneven: ONNX has no operator for it.")


_RESIZE: dict[str, tuple[str, dict[str, Any]]] = {
    "nearest": ("nearest", {"coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}),
    "linear": ("linear", {}),
    "cubic": ("cubic", {"cubic_coeff_a": -0.75}),
}


def _resize(b: Builder, r: Request) -> ir.Value:
    x, target = r.arg(0), target_of(r)
    mode, attrs = _RESIZE[r.attr("mode")]
    if mode != "nearest":
        where = "align_corners" if r.attr("align_corners") else "half_pixel"
        attrs = {**attrs, "coordinate_transformation_mode": where}
    if b.opset >= 11:
        # Optional inputs: left out from opset 13 on, empty before.
        optional = [None, None] if b.opset >= 13 else [b.const(np.zeros(0, np.float32))] * 2
        return b.node("Resize", [x, *optional, b.shape(target, r.args)], mode=mode, **attrs)
    if r.attr("mode") != "nearest" or not is_static(target) or not is_static(x.shape):
        b.since(11, "resizing other than nearest by known factors")
    scales = [float(out) / float(extent) for out, extent in zip(target, x.shape or (), strict=True)]
    if b.opset < 9:
        return b.node("Upsample", [x], mode=mode, scales=scales)
    return b.node("Upsample" if b.opset < 10 else "Resize", [x, b.const(np.asarray(scales, np.float32))], mode=mode)


# ---- contractions ----------------------------------------------------------------------------------------------------


def _linear(b: Builder, r: Request) -> ir.Value:
    x, weight, bias = r.arg(0), r.arg(1), r.maybe(2)
    transposed = b.bake(r.attr("transpose_weight"))
    floats = x.dtype in ("float32", "float64", "float16", None)
    if x.rank == 2 and floats and (transposed or bias is not None) and (bias is not None or b.opset >= 11):
        return b.node("Gemm", [x, weight, bias], transB=1 if transposed else None)
    matrix: ir.Value | Arg = b.node("Transpose", [weight], perm=(1, 0)) if transposed else weight
    product = b.node("MatMul", [x, matrix])
    return product if bias is None else b.node("Add", [product, bias])


def _einsum(b: Builder, r: Request) -> ir.Value:
    return b.node("Einsum", list(r.args), equation=r.attr("equation"))


def _attention(b: Builder, r: Request) -> ir.Value:
    """softmax(scale·q·kᵀ + mask)·v"""
    q, k, v, mask = r.arg(0), r.arg(1), r.arg(2), r.maybe(3)
    scale, causal = r.attr("scale"), r.attr("causal")
    if b.opset >= 23 and q.rank == 4:
        return b.node("Attention", [q, k, v, mask], scale=float(scale), is_causal=int(causal))
    rank = q.rank
    if rank is None:
        raise GraphError("The rank of an attention's query is unknown, so it cannot be written as ONNX nodes.")
    keys, values = _repeat_heads(b, q, k), _repeat_heads(b, q, v)
    perm = (*range(rank - 2), rank - 1, rank - 2)
    scores = b.node("MatMul", [b.node("Mul", [q, b.like(scale, q)]), b.node("Transpose", [keys], perm=perm)])
    if causal:
        b.since(14, "causal attention")
        lengths = [b.node("Gather", [b.node("Shape", [arg]), b.const([rank - 2])], axis=0) for arg in (q, k)]
        low = np.asarray([np.finfo(np.float32).min / 2], dtype=np.float32)
        full = b.node("ConstantOfShape", [b.node("Concat", lengths, axis=0)], value=ir.tensor(low))
        above = b.node("Trilu", [full, b.const(np.asarray(1, np.int64))], upper=1)
        scores = b.node("Add", [scores, b.node("Cast", [above], to=int(dtype_of(q.dtype or "float32")))])
    if mask is not None and mask.dtype == "bool":
        b.since(9, "attention with a boolean mask")
        scores = b.node("Where", [mask, scores, b.like(-math.inf, q)])
    elif mask is not None:
        scores = b.node("Add", [scores, mask])
    return b.node("MatMul", [_softmax_last(b, scores, rank), values])


def _repeat_heads(b: Builder, q: Arg, k: Arg) -> ir.Value | Arg:
    """Each key head serves the same number of query heads in a row."""
    if q.rank != 4 or q.shape is None or k.shape is None or q.shape[1] == k.shape[1]:
        return k
    heads, given = q.shape[1], k.shape[1]
    if not isinstance(heads, int) or not isinstance(given, int) or not isinstance(k.shape[3], int):
        raise GraphError("The number of heads is symbolic, so grouped attention cannot be written as ONNX nodes.")
    repeats, width = heads // given, k.shape[3]
    apart = b.node("Reshape", [k, b.shape((k.shape[0], given, 1, k.shape[2], width), [k])])
    wide = b.node("Expand", [apart, b.const([1, 1, repeats, 1, 1])])
    return b.node("Reshape", [wide, b.shape((k.shape[0], heads, k.shape[2], width), [k])])


def _recurrent(b: Builder, r: Request) -> list[ir.Value]:
    mode = r.attr("mode")
    extras = {name: value for name, value in r.attrs.items() if name != "mode"}
    recurrence = r.arg(2)
    if recurrence.shape is None or not isinstance(recurrence.shape[-1], int):
        raise GraphError("The hidden size of a recurrent operation is unknown, so it cannot be written as ONNX nodes.")
    extras.setdefault("hidden_size", recurrence.shape[-1])
    op_type = "RNN" if mode.startswith("rnn") else mode.upper()
    if mode == "rnn_relu":
        extras["activations"] = ["Relu"] * (2 if extras.get("direction") == "bidirectional" else 1)
    return b.many(op_type, list(r.args), max(len(r.outputs), 1), **extras)


def _fft(b: Builder, r: Request) -> ir.Value:
    return b.node("DFT", [r.arg(0)], **r.attrs)


def _gather(b: Builder, r: Request) -> ir.Value:
    return b.node("Gather", [r.arg(0), r.arg(1)], axis=r.attr("axis") if r.kind is K.GATHER else 0)


# ---- norms -----------------------------------------------------------------------------------------------------------


def _channels(r: Request) -> int:
    shape = r.arg(0).shape
    if shape is None or not isinstance(shape[1], int):
        raise GraphError(f"A {r.kind.value} without weights needs a known number of channels to be written as ONNX.")
    return shape[1]


def _or_filled(b: Builder, r: Request, index: int, value: float) -> Arg | ir.Value:
    arg = r.maybe(index)
    return arg if arg is not None else b.filled(value, (_channels(r),), r.arg(0).dtype)


def _batch_norm(b: Builder, r: Request) -> ir.Value:
    if r.attr("training"):
        raise GraphError("A batch norm in training cannot be written into an ONNX model: export it in evaluation.")
    operands = [_or_filled(b, r, index, value) for index, value in ((1, 1.0), (2, 0.0), (3, 0.0), (4, 1.0))]
    return b.node("BatchNormalization", [r.arg(0), *operands], epsilon=r.attr("eps"))


def _instance_norm(b: Builder, r: Request) -> ir.Value:
    operands = [_or_filled(b, r, 1, 1.0), _or_filled(b, r, 2, 0.0)]
    return b.node("InstanceNormalization", [r.arg(0), *operands], epsilon=r.attr("eps"))


def _group_norm(b: Builder, r: Request) -> ir.Value:
    """Before opset 21: instance norm of [N, groups, rest], then the channels' scale and shift."""
    x, groups = r.arg(0), r.attr("groups")
    if b.opset >= 21:
        operands = [_or_filled(b, r, 1, 1.0), _or_filled(b, r, 2, 0.0)]
        return b.node("GroupNormalization", [x, *operands], num_groups=groups, epsilon=r.attr("eps"))
    if x.rank is None:
        raise GraphError("The rank of a group norm's input is unknown, so it cannot be written as ONNX nodes.")
    ones, zeros = (b.filled(value, (groups,), x.dtype) for value in (1.0, 0.0))
    flat = b.node("Reshape", [x, b.const([0, groups, -1])])
    normed = b.node("InstanceNormalization", [flat, ones, zeros], epsilon=r.attr("eps"))
    value = b.node("Reshape", [normed, b.node("Shape", [x])])
    for op_type, index in (("Mul", 1), ("Add", 2)):
        arg = r.maybe(index)
        if arg is not None:
            column = b.node("Reshape", [arg, b.const([-1, *[1] * (x.rank - 2)])])
            value = b.node(op_type, [value, column])
    return value


def _layer_norm(b: Builder, r: Request) -> ir.Value:
    """(x − E x) / √(Var x + eps) · weight + bias; one operator from opset 17 on."""
    x, weight, bias = r.arg(0), r.maybe(1), r.maybe(2)
    if b.opset >= 17 and _holds_eps(r) and not _mixed(r):
        return b.node(
            "LayerNormalization", [x, weight or _ones(b, r), bias], axis=r.attr("axis"), epsilon=r.attr("eps")
        )
    axes = _normed_axes(b, r)
    wide, narrow = _widened(b, x)
    centred = b.node("Sub", [wide, b.axes("ReduceMean", wide, axes, 18, keepdims=True)])
    return _scaled(b, r, centred, axes, narrow)


def _rms_norm(b: Builder, r: Request) -> ir.Value:
    """x / √(E x² + eps) · weight; one operator from opset 23 on."""
    x, weight = r.arg(0), r.maybe(1)
    if b.bake(r.attr("stash_type")):
        return _stashed_rms_norm(b, r)
    if b.opset >= 23 and _holds_eps(r) and not _mixed(r):
        return b.node("RMSNormalization", [x, weight or _ones(b, r)], axis=r.attr("axis"), epsilon=r.attr("eps"))
    wide, narrow = _widened(b, x)
    return _scaled(b, r, wide, _normed_axes(b, r), narrow)


def _stashed_rms_norm(b: Builder, r: Request) -> ir.Value:
    """In the order and the types in which exporters write it, so that it rounds as they do."""
    x, weight, inner = r.arg(0), r.maybe(1), b.bake(r.attr("stash_type"))
    if x.dtype is None or (weight is not None and weight.dtype is None):
        raise GraphError("An RMS norm that computes in a narrower type needs operands of known type.")
    b.typed = True

    def cast(value: ir.Value | Arg, old: str, new: str) -> ir.Value | Arg:
        return value if old == new else b.node("Cast", [value], to=int(dtype_of(new)))

    narrow = cast(x, x.dtype, inner)
    power = b.axes("ReduceMean", b.node("Mul", [narrow, narrow]), _normed_axes(b, r), 18, keepdims=True)
    root = b.node("Sqrt", [b.node("Add", [power, b.like(b.bake(r.attr("eps")), inner)])])
    inverse, dtype = b.node("Reciprocal", [root]), inner if b.bake(r.attr("rounded")) else x.dtype
    y: ir.Value | Arg = b.node("Mul", [narrow if dtype == inner else x, cast(inverse, inner, dtype)])
    if weight is not None and weight.dtype is not None:
        widest = max((dtype, weight.dtype), key=lambda name: numpy_dtype(name).itemsize)
        y = b.node("Mul", [cast(weight, weight.dtype, widest), cast(y, dtype, widest)])
        dtype = widest
    value = cast(y, dtype, x.dtype)
    return value.value if isinstance(value, Arg) else value


def _holds_eps(r: Request) -> bool:
    """The attribute is a float32, which in double precision may be another number."""
    eps = r.attr("eps")
    number = eps.value if isinstance(eps, Ref) else eps
    return r.arg(0).dtype != "float64" or float(np.float32(number)) == number


def _normed_axes(b: Builder, r: Request) -> list[int]:
    """The normalised axes counted from the end, so that they need no rank where that is unknown."""
    axis, rank = b.bake(r.attr("axis")), r.arg(0).rank
    if axis >= 0:
        if rank is None:
            raise GraphError(f"The rank of a {r.kind.value}'s input is unknown, so its axes cannot be written.")
        axis -= rank
    return list(range(axis, 0))


def _ones(b: Builder, r: Request) -> ir.Value:
    shape, axis = r.arg(0).shape, b.bake(r.attr("axis"))
    if shape is None or not is_static(shape[axis:]):
        raise GraphError(f"A {r.kind.value} without a weight needs known extents to be written as an ONNX operator.")
    extents = tuple(int(extent) for extent in shape[axis:])
    b.baked["shape"] = extents
    return b.filled(1.0, extents, r.arg(0).dtype)


def _widened(b: Builder, x: Arg) -> tuple[ir.Value, str | None]:
    """Norms of half precision are computed in float32; the type to return to."""
    if x.dtype in HALF:
        return b.node("Cast", [x], to=int(ir.DataType.FLOAT)), x.dtype
    return x.value, None


def _scaled(b: Builder, r: Request, x: ir.Value, axes: list[int], narrow: str | None) -> ir.Value:
    kind = "float32" if narrow is not None else r.arg(0).dtype
    power = b.axes("ReduceMean", b.node("Mul", [x, x]), axes, 18, keepdims=True)
    root = b.node("Sqrt", [b.node("Add", [power, b.like(b.bake(r.attr("eps")), kind)])])
    value = b.node("Div", [x, root])
    mixed = _mixed(r)
    if narrow is not None and not mixed:
        value = b.node("Cast", [value], to=int(dtype_of(narrow)))
        b.typed = True
    for op_type, arg in (("Mul", r.maybe(1)), ("Add", r.maybe(2))):
        if arg is not None:
            part = b.node("Cast", [arg], to=int(dtype_of(kind or "float32"))) if mixed and arg.dtype != kind else arg
            value = b.node(op_type, [value, part])
    if narrow is not None and mixed:
        value = b.node("Cast", [value], to=int(dtype_of(narrow)))
        b.typed = True
    return value


def _mixed(r: Request) -> bool:
    """Whether the weight or the bias is of another type than the input: they are applied in the wider one."""
    parts = [arg.dtype for arg in (r.maybe(1), r.maybe(2)) if arg is not None]
    return any(dtype is not None and dtype != r.arg(0).dtype for dtype in parts)


def _lrn(b: Builder, r: Request) -> ir.Value:
    names = ("size", "alpha", "beta", "bias")
    return b.node("LRN", [r.arg(0)], **{name: r.attr(name) for name in names})


# ---- softmax ---------------------------------------------------------------------------------------------------------


def _softmax(b: Builder, r: Request) -> ir.Value:
    x, axis = r.arg(0), r.attr("axis")
    op_type = "LogSoftmax" if r.attr("log") else "Softmax"
    if b.opset >= 13:
        return b.node(op_type, [x], axis=axis)
    if x.rank is None:
        raise GraphError("The rank of a softmax's input is unknown, so it cannot be written below opset 13.")
    return _softmax_last(b, x, x.rank, axis % x.rank, op_type)


def _softmax_last(
    b: Builder, x: ir.Value | Arg, rank: int, axis: int | None = None, op_type: str = "Softmax"
) -> ir.Value:
    """Before opset 13 everything from `axis` on is one vector, so the axis goes last."""
    if b.opset >= 13 or axis is None or axis == rank - 1:
        return b.node(op_type, [x], axis=rank - 1 if axis is None else axis)
    perm = list(range(rank))
    perm[axis], perm[-1] = perm[-1], perm[axis]
    turned = b.node(op_type, [b.node("Transpose", [x], perm=perm)], axis=rank - 1)
    return b.node("Transpose", [turned], perm=perm)


NN_WRITERS: dict[K, Writer] = {
    K.GATHER: _gather,
    K.EMBEDDING: _gather,
    K.CONV: _conv,
    K.CONV_TRANSPOSE: _conv,
    K.MAX_POOL: _pool,
    K.AVG_POOL: _pool,
    K.ADAPTIVE_AVG_POOL: _adaptive_pool,
    K.INTERPOLATE: _resize,
    K.LINEAR: _linear,
    K.EINSUM: _einsum,
    K.ATTENTION: _attention,
    K.RECURRENT: _recurrent,
    K.FFT: _fft,
    K.BATCH_NORM: _batch_norm,
    K.LAYER_NORM: _layer_norm,
    K.RMS_NORM: _rms_norm,
    K.GROUP_NORM: _group_norm,
    K.INSTANCE_NORM: _instance_norm,
    K.LOCAL_RESPONSE_NORM: _lrn,
    K.SOFTMAX: _softmax,
}
