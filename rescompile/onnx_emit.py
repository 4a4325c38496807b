"""From kinds to ONNX nodes, at the model's own opset.

A writer makes the nodes of one logical operation and returns its outputs. Where an operator is younger than the model's
opset the writer spells it in older ones; where that is impossible GraphError says which opset it takes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir

from rescompile.errors import GraphError
from rescompile.graph import Shape
from rescompile.kinds import OpKind as K
from rescompile.kinds import Trait
from rescompile.onnx_build import Builder, Request
from rescompile.onnx_ops import INT64_MAX, PAD_MODES, PLAIN, REDUCTIONS, Arg, dtype_of, is_static

Writer = Callable[[Builder, Request], "ir.Value | list[ir.Value]"]

_HALF = ("float16", "bfloat16")
_FLOATS = (*_HALF, "float32", "float64", None)


# The opset from which a kind can be written, where that is not the first.
_SINCE: dict[K, int] = {
    K.EXPAND: 8,
    K.ERF: 9,
    K.SIGN: 9,
    K.IS_NAN: 9,
    K.WHERE: 9,
    K.FULL: 9,
    K.FLIP: 10,
    K.ROUND: 11,
    K.CUMSUM: 11,
    K.EINSUM: 12,
    K.DROPOUT: 12,
    K.FFT: 17,
}


def obstacle(kind: K, opset: int) -> str:
    """Why a model of that opset cannot hold an operation of this kind; empty when it can."""
    if kind not in WRITERS and kind not in _PLAIN and not kind.has(Trait.FUSED):
        return f"{kind.value} has no spelling in ONNX"
    since = _SINCE.get(kind, 1)
    if opset < since:
        return f"{kind.value} needs opset {since} and the model has {opset}: convert it with onnx.version_converter"
    return ""


def write(b: Builder, r: Request) -> list[ir.Value]:
    """The operation's outputs, computed by new nodes of `b`."""
    reason = obstacle(r.kind, b.opset)
    if reason:
        raise GraphError(f"The operation cannot be written into the model: {reason}.")
    if r.kind.has(Trait.FUSED) and b.call is not None:
        return b.call(b, r)
    since, op_type = _PLAIN.get(r.kind, (math.inf, ""))
    if b.opset >= since:
        return [b.node(op_type, list(r.args))]
    result = WRITERS[r.kind](b, r)
    return result if isinstance(result, list) else [result]


# ---- arithmetic ------------------------------------------------------------------------------------------------------


def _add(b: Builder, r: Request) -> ir.Value:
    """scales[0]·x0 + scales[1]·x1 + ..."""
    args = [r.arg(index) for index in range(len(r.args))]
    scales = tuple(r.attr("scales")) or (1.0,) * len(args)
    if len(args) > 1 and len(set(scales)) == 1:
        floats = args[0].dtype in _FLOATS and (b.opset >= 8 or len({arg.shape for arg in args}) == 1)
        total = b.node("Sum", args) if len(args) > 2 and floats else _chain(b, "Add", args)
        return total if scales[0] == 1 else b.node("Mul", [total, b.like(scales[0], args[0])])
    total = args[0].value if scales[0] == 1 else b.node("Mul", [args[0], b.like(scales[0], args[0])])
    for arg, scale in zip(args[1:], scales[1:], strict=True):
        term = arg if abs(scale) == 1 else b.node("Mul", [arg, b.like(abs(scale), arg)])
        total = b.node("Sub" if scale < 0 else "Add", [total, term])
    return total if len(args) > 1 or scales[0] != 1 else b.node("Identity", [total])


def _chain(b: Builder, op_type: str, args: list[Arg]) -> ir.Value:
    total = args[0].value
    for arg in args[1:]:
        total = b.node(op_type, [total, arg])
    return total


def _mod(b: Builder, r: Request) -> ir.Value:
    """x − y·floor(x / y) for floats; Mod of integers has the divisor's sign by itself."""
    x, y = r.arg(0), r.arg(1)
    if x.dtype not in _FLOATS:
        b.since(10, "mod of integers")
        return b.node("Mod", [x, y])
    return b.node("Sub", [x, b.node("Mul", [y, b.node("Floor", [b.node("Div", [x, y])])])])


def _negated(op_type: str) -> Writer:
    return lambda b, r: b.node("Not", [b.node(op_type, list(r.args))])


def _pair(op_type: str) -> Writer:
    return lambda b, r: b.node(op_type, [r.arg(0), r.arg(1)])


def _cast(b: Builder, r: Request) -> ir.Value:
    return b.node("Cast", [r.arg(0)], to=int(dtype_of(r.attr("dtype"))))


# ---- views -----------------------------------------------------------------------------------------------------------


def _target(r: Request) -> Shape:
    if r.out.shape is None:
        raise GraphError(f"The shape of a {r.kind.value}'s output is unknown, so its target cannot be written.")
    return r.out.shape


def _reshape(b: Builder, r: Request) -> ir.Value:
    """Extents that stay in place are 0, one more that is symbolic is −1."""
    x, target = r.arg(0), _target(r)
    source = x.shape or ()
    entries: list[Any] = [
        0 if isinstance(extent, str) and axis < len(source) and source[axis] == extent else extent
        for axis, extent in enumerate(target)
    ]
    unknown = [axis for axis, extent in enumerate(entries) if isinstance(extent, str)]
    if len(unknown) == 1 and 0 not in target:
        entries[unknown[0]] = -1
        unknown = []
    if not unknown and not (0 in target and any(entry == -1 for entry in entries)):
        zeros = 0 in target
        return b.node("Reshape", [x, b.const(entries)], allowzero=1 if zeros and b.opset >= 14 else None)
    return b.node("Reshape", [x, b.shape(target, r.args)])


def _expand(b: Builder, r: Request) -> ir.Value:
    return b.node("Expand", [r.arg(0), b.shape(_target(r), r.args)])


def _slice(b: Builder, r: Request) -> ir.Value:
    starts, stops, axes, steps = (list(r.attr(name)) for name in ("starts", "stops", "axes", "steps"))
    shape = r.arg(0).shape
    for i, axis in enumerate(axes):
        if shape is not None and isinstance(stops[i], str) and stops[i] == shape[axis]:
            stops[i] = INT64_MAX
    steps = steps or [1] * len(axes)
    if b.opset < 10:
        if any(isinstance(bound, str) for bound in (*starts, *stops)) or set(steps) - {1}:
            b.since(10, "a slice with steps or symbolic bounds")
        return b.node("Slice", [r.arg(0)], starts=starts, ends=stops, axes=axes)
    return _slice_by(b, r, starts, stops, axes, steps)


def _slice_by(b: Builder, r: Request, starts: list[Any], stops: list[Any], axes: list[int], steps: list[int]) -> Any:
    bounds = [b.shape(tuple(bound), r.args) for bound in (starts, stops)]
    return b.node("Slice", [r.arg(0), *bounds, b.const(axes), b.const(steps)])


def _flip(b: Builder, r: Request) -> ir.Value:
    axes = list(r.attr("axes"))
    return _slice_by(b, r, [-1] * len(axes), [-INT64_MAX] * len(axes), axes, [-1] * len(axes))


def _roll(b: Builder, r: Request) -> ir.Value:
    """Each axis: the last `shift` entries, then the others."""
    value: ir.Value | Arg = r.arg(0)
    for axis, shift in zip(r.attr("axes"), r.attr("shifts"), strict=True):
        extent = _target(r)[axis]
        if not isinstance(extent, int):
            raise GraphError(f"A roll along the symbolic extent '{extent}' cannot be written as ONNX nodes.")
        cut = (extent - shift) % extent if extent else 0
        if cut:
            parts = [_cut(b, value, axis, cut, INT64_MAX), _cut(b, value, axis, 0, cut)]
            value = b.node("Concat", parts, axis=axis)
    return value if isinstance(value, ir.Value) else b.node("Identity", [value])


def _cut(b: Builder, x: ir.Value | Arg, axis: int, start: int, stop: int) -> ir.Value:
    if b.opset < 10:
        return b.node("Slice", [x], starts=[start], ends=[stop], axes=[axis])
    return b.node("Slice", [x, b.const([start]), b.const([stop]), b.const([axis])])


def _split(b: Builder, r: Request) -> list[ir.Value]:
    sizes, axis, count = list(r.attr("sizes")), r.attr("axis"), len(r.outputs)
    if b.opset < 13:
        return b.many("Split", [r.arg(0)], count, axis=axis, split=sizes)
    return b.many("Split", [r.arg(0), b.const(sizes)], count, axis=axis)


def _pad(b: Builder, r: Request) -> ir.Value:
    mode = {ours: theirs for theirs, ours in PAD_MODES.items()}[r.attr("mode")]
    if mode == "wrap":
        b.since(19, "circular padding")
    pads, value = list(r.attr("pads")), r.attr("value")
    if b.opset < 11:
        return b.node("Pad", [r.arg(0)], pads=pads, mode=mode, value=float(value))
    fill = b.like(value, r.arg(0)) if mode == "constant" else None
    return b.node("Pad", [r.arg(0), b.const(pads), fill], mode=mode)


def _tile(b: Builder, r: Request) -> ir.Value:
    return b.node("Tile", [r.arg(0), b.const(list(r.attr("repeats")))])


def _scatter(b: Builder, r: Request) -> ir.Value:
    op_type = r.attrs.get("op")
    if op_type is None:
        raise GraphError("A scatter that does not come from an ONNX model cannot be written as ONNX nodes.")
    extras = {name: value for name, value in r.attrs.items() if name not in ("op", "accumulate")}
    return b.node(op_type, list(r.args), **extras)


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
    x, target = r.arg(0), _target(r)
    mode, attrs = _RESIZE[r.attr("mode")]
    if mode != "nearest":
        where = "align_corners" if r.attr("align_corners") else "pytorch_half_pixel"
        attrs = {**attrs, "coordinate_transformation_mode": where}
    if b.opset >= 11:
        empty = b.const(np.zeros(0, np.float32))
        optional = [None, None] if b.opset >= 13 else [empty, empty]
        return b.node("Resize", [x, *optional, b.shape(target, r.args)], mode=mode, **attrs)
    if r.attr("mode") != "nearest" or not is_static(target) or not is_static(x.shape):
        b.since(11, "resizing other than nearest by known factors")
    scales = [float(out) / float(extent) for out, extent in zip(target, x.shape or (), strict=True)]  # type: ignore[arg-type]
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
    if b.opset >= 17:
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
    if b.opset >= 23:
        return b.node("RMSNormalization", [x, weight or _ones(b, r)], axis=r.attr("axis"), epsilon=r.attr("eps"))
    wide, narrow = _widened(b, x)
    return _scaled(b, r, wide, _normed_axes(b, r), narrow)


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
    if x.dtype in _HALF:
        return b.node("Cast", [x], to=int(ir.DataType.FLOAT)), x.dtype
    return x.value, None


def _scaled(b: Builder, r: Request, x: ir.Value, axes: list[int], narrow: str | None) -> ir.Value:
    kind = "float32" if narrow is not None else r.arg(0).dtype
    power = b.axes("ReduceMean", b.node("Mul", [x, x]), axes, 18, keepdims=True)
    root = b.node("Sqrt", [b.node("Add", [power, b.like(b.bake(r.attr("eps")), kind)])])
    value = b.node("Div", [x, root])
    if narrow is not None:
        value = b.node("Cast", [value], to=int(dtype_of(narrow)))
        b.typed = True
    for op_type, arg in (("Mul", r.maybe(1)), ("Add", r.maybe(2))):
        value = b.node(op_type, [value, arg]) if arg is not None else value
    return value


def _lrn(b: Builder, r: Request) -> ir.Value:
    names = ("size", "alpha", "beta", "bias")
    return b.node("LRN", [r.arg(0)], **{name: r.attr(name) for name in names})


# ---- activations -----------------------------------------------------------------------------------------------------


def _clip(b: Builder, r: Request) -> ir.Value:
    x, low, high = r.arg(0), r.attr("min"), r.attr("max")
    if b.opset < 11:
        limits = [None if bound is None else float(bound) for bound in (low, high)]
        return b.node("Clip", [x], min=limits[0], max=limits[1])
    return b.node("Clip", [x, *(None if bound is None else b.like(bound, x) for bound in (low, high))])


def _prelu(b: Builder, r: Request) -> ir.Value:
    """A slope for each channel stands along axis 1: [C, 1, ...]."""
    x, slope = r.arg(0), r.arg(1)
    if slope.rank == 1 and slope.shape != (1,) and x.rank is not None and x.rank > 2:
        return b.node("PRelu", [x, b.node("Reshape", [slope, b.const([-1, *[1] * (x.rank - 2)])])])
    return b.node("PRelu", [x, slope])


def _gelu(b: Builder, r: Request) -> ir.Value:
    """x/2·(1 + erf(x/√2)), or x/2·(1 + tanh(√(2/π)·(x + 0.044715·x³)))"""
    x = r.arg(0)
    if b.opset >= 20:
        return b.node("Gelu", [x], approximate=r.attr("approximate"))
    if r.attr("approximate") == "tanh":
        cube = b.node("Mul", [x, b.node("Mul", [x, x])])
        inner = b.node("Add", [x, b.node("Mul", [cube, b.like(0.044715, x)])])
        bent = b.node("Tanh", [b.node("Mul", [inner, b.like(math.sqrt(2.0 / math.pi), x)])])
    else:
        b.since(9, "gelu")
        bent = b.node("Erf", [b.node("Mul", [x, b.like(math.sqrt(0.5), x)])])
    half = b.node("Mul", [x, b.like(0.5, x)])
    return b.node("Mul", [half, b.node("Add", [bent, b.like(1.0, x)])])


def _silu(b: Builder, r: Request) -> ir.Value:
    x = r.arg(0)
    return b.node("Swish", [x]) if b.opset >= 24 else b.node("Mul", [x, b.node("Sigmoid", [x])])


def _hardswish(b: Builder, r: Request) -> ir.Value:
    x = r.arg(0)
    return b.node("Mul", [x, b.node("HardSigmoid", [x], alpha=1.0 / 6.0, beta=0.5)])


def _mish(b: Builder, r: Request) -> ir.Value:
    x = r.arg(0)
    return b.node("Mul", [x, b.node("Tanh", [b.node("Softplus", [x])])])


def _dropout(b: Builder, r: Request) -> ir.Value:
    ratio, mode = b.const(np.asarray(r.attr("p"), np.float32)), b.const(np.asarray(True))
    return b.node("Dropout", [r.arg(0), ratio, mode])


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


# ---- reductions ------------------------------------------------------------------------------------------------------

_REDUCERS = {kind: (op_type, since) for op_type, (kind, since) in REDUCTIONS.items()}


def _reduce(b: Builder, r: Request) -> ir.Value:
    op_type, since = _REDUCERS[r.kind]
    return b.axes(op_type, r.arg(0), list(r.attr("axes")), since, keepdims=bool(r.attr("keepdims")))


def _argmax(b: Builder, r: Request) -> ir.Value:
    return b.node("ArgMax", [r.arg(0)], axis=r.attr("axes")[0], keepdims=int(r.attr("keepdims")))


def _cumsum(b: Builder, r: Request) -> ir.Value:
    return b.node("CumSum", [r.arg(0), b.const(np.asarray(r.attr("axis"), np.int64))])


def _topk(b: Builder, r: Request) -> list[ir.Value]:
    attrs = {name: r.attrs.get(name) for name in ("axis", "largest", "sorted")}
    if b.opset < 10:
        return b.many("TopK", [r.arg(0)], 2, axis=attrs["axis"], k=r.attrs.get("k"))
    if b.opset < 11:
        attrs = {"axis": attrs["axis"]}
    return b.many("TopK", list(r.args), 2, **attrs)


# ---- out of nothing --------------------------------------------------------------------------------------------------


def _full(b: Builder, r: Request) -> ir.Value:
    shape, given = r.out.shape, r.maybe(0)
    value = b.filled(r.attr("value"), (1,), r.out.dtype).producer()
    tensor = value.attributes["value"].as_tensor() if value is not None else None
    b.nodes.pop()
    listed = given.value if given is not None and given.rank == 1 else None
    return b.node("ConstantOfShape", [listed or b.shape(shape or (), r.args)], value=tensor)


def _arange(b: Builder, r: Request) -> ir.Value:
    if len(r.args) == 3:
        b.since(11, "arange of computed bounds")
        return b.node("Range", list(r.args))
    shape = r.out.shape
    if shape is None or not isinstance(shape[0], int):
        raise GraphError("An arange of unknown length without bounds cannot be written as ONNX nodes.")
    values = r.attr("start") + r.attr("step") * np.arange(shape[0])
    return b.const(values.astype(r.out.dtype or "int64"))


def _shape(b: Builder, r: Request) -> ir.Value:
    """All extents, or one of them as a scalar."""
    shape, axis = b.node("Shape", [r.arg(0)]), r.attr("axis")
    return shape if axis is None else b.node("Gather", [shape, b.const(np.asarray(axis, np.int64))], axis=0)


def _random(b: Builder, r: Request) -> ir.Value:
    op_type = r.attrs.get("op")
    if op_type is None:
        raise GraphError("A random operation that does not come from an ONNX model cannot be written as ONNX nodes.")
    return b.node(op_type, list(r.args), **{name: value for name, value in r.attrs.items() if name != "op"})


_PLAIN: dict[K, tuple[int, str]] = {
    row.kind: (row.since, row.op_type) for row in PLAIN if row.kind not in (K.ADD, K.SHAPE)
}

WRITERS: dict[K, Writer] = {
    **dict.fromkeys(_REDUCERS, _reduce),
    K.ADD: _add,
    K.MAXIMUM: _pair("Max"),
    K.MINIMUM: _pair("Min"),
    K.MOD: _mod,
    K.NOT_EQUAL: _negated("Equal"),
    K.LESS_EQUAL: _negated("Greater"),
    K.GREATER_EQUAL: _negated("Less"),
    K.CAST: _cast,
    K.RSQRT: lambda b, r: b.node("Reciprocal", [b.node("Sqrt", [r.arg(0)])]),
    K.RESHAPE: _reshape,
    K.EXPAND: _expand,
    K.PERMUTE: lambda b, r: b.node("Transpose", [r.arg(0)], perm=tuple(r.attr("perm"))),
    K.SLICE: _slice,
    K.FLIP: _flip,
    K.ROLL: _roll,
    K.SPLIT: _split,
    K.PAD: _pad,
    K.TILE: _tile,
    K.CONCAT: lambda b, r: b.node("Concat", list(r.args), axis=r.attr("axis")),
    K.GATHER: _gather,
    K.EMBEDDING: _gather,
    K.SCATTER: _scatter,
    K.CONV: _conv,
    K.CONV_TRANSPOSE: _conv,
    K.MAX_POOL: _pool,
    K.AVG_POOL: _pool,
    K.ADAPTIVE_AVG_POOL: _adaptive_pool,
    K.INTERPOLATE: _resize,
    K.LINEAR: _linear,
    K.MATMUL: _pair("MatMul"),
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
    K.CLIP: _clip,
    K.LEAKY_RELU: lambda b, r: b.node("LeakyRelu", [r.arg(0)], alpha=r.attr("slope")),
    K.PRELU: _prelu,
    K.ELU: lambda b, r: b.node("Elu", [r.arg(0)], alpha=r.attr("alpha")),
    K.GELU: _gelu,
    K.SILU: _silu,
    K.HARDSIGMOID: lambda b, r: b.node("HardSigmoid", [r.arg(0)], alpha=r.attr("alpha"), beta=r.attr("beta")),
    K.HARDSWISH: _hardswish,
    K.MISH: _mish,
    K.DROPOUT: _dropout,
    K.SOFTMAX: _softmax,
    K.ARGMAX: _argmax,
    K.CUMSUM: _cumsum,
    K.TOPK: _topk,
    K.FULL: _full,
    K.ARANGE: _arange,
    K.SHAPE: _shape,
    K.RANDOM: _random,
}
