"""From kinds to torch: the one table by which operations are written back.

A rule calls ATen operations through a `Torch`: with fx nodes it makes nodes, with tensors it computes. So the same
lines emit native nodes for inserted operations and are the reference implementation of the fused ones.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch

from rescompile.errors import GraphError
from rescompile.fx_types import TORCH_DTYPES
from rescompile.graph import Attrs, Shape
from rescompile.kinds import OpKind as K

aten = torch.ops.aten


class Torch(Protocol):
    """Calls torch, and tells what is known of values."""

    def __call__(self, target: Any, *args: Any, **kwargs: Any) -> Any:
        """The result of a call: a node, or a tensor."""
        ...

    def shape(self, value: Any) -> Shape | None:
        """Shape of an operand."""
        ...

    def dtype(self, value: Any) -> str | None:
        """Dtype of an operand."""
        ...

    def out_shape(self, index: int = 0) -> Sequence[Any]:
        """Shape that the operation's output shall have, as arguments for torch."""
        ...

    def out_dtype(self) -> torch.dtype | None:
        """Dtype that the operation's output shall have."""
        ...


Emitter = Callable[[Torch, list[Any], Attrs], Any]


class Eager:
    """Computes: the arguments are tensors."""

    def __call__(self, target: Any, *args: Any, **kwargs: Any) -> Any:
        return target(*args, **kwargs)

    def shape(self, value: Any) -> Shape | None:
        return tuple(value.shape)

    def dtype(self, value: Any) -> str | None:
        return str(value.dtype)[6:]

    def out_shape(self, index: int = 0) -> Sequence[Any]:
        raise GraphError("An operation whose result's shape is not a function of its operands cannot be computed here.")

    def out_dtype(self) -> torch.dtype | None:
        return None


def emit(t: Torch, kind: K, inputs: Sequence[Any], attrs: Attrs) -> Any:
    """The torch result, or the tuple of results, of one operation."""
    rule = EMITTERS.get(kind)
    if rule is None:
        raise GraphError(
            f"torch nodes cannot be made for '{kind.value}': leave the operations of that kind as they are."
        )
    return rule(t, list(inputs), {**kind.spec.attrs, **attrs})


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float | bool)


def _tensor(t: Torch, value: Any) -> Any:
    """A number as a tensor without dimensions, for the operations that take no numbers."""
    if not _is_number(value):
        return value
    dtype = t.out_dtype()
    if dtype is None or not dtype.is_floating_point:
        dtype = torch.float32 if isinstance(value, float) else torch.bool if isinstance(value, bool) else torch.int64
    return t(aten.scalar_tensor.default, value, dtype=dtype)


def _unary(overload: Any) -> Emitter:
    return lambda t, x, _: t(overload, x[0])


def _binary(overload: Any, scalar: Any = None, *, commutes: bool = False) -> Emitter:
    def rule(t: Torch, x: list[Any], _: Attrs) -> Any:
        a, b = x
        if _is_number(a) and not _is_number(b) and commutes:
            a, b = b, a
        if _is_number(b) and not _is_number(a) and scalar is not None:
            return t(scalar, a, b)
        return t(overload, _tensor(t, a), b if scalar is None and not _is_number(b) else _tensor(t, b))

    return rule


def _add(t: Torch, x: list[Any], attrs: Attrs) -> Any:
    scales = list(attrs["scales"]) or [1.0] * len(x)
    terms = sorted(zip(x, scales, strict=True), key=lambda term: (_is_number(term[0]), term[1] != 1.0))
    total, first = terms[0]
    total = _tensor(t, total)
    if first != 1.0:
        total = t(aten.mul.Tensor, total, first)
    for term, scale in terms[1:]:
        if scale == 1.0:
            total = t(aten.add.Tensor, total, term)
        elif scale == -1.0:
            total = t(aten.sub.Tensor, total, term)
        else:
            total = t(aten.add.Tensor, total, term, alpha=_whole(scale))
    return total


def _whole(scale: float) -> float:
    """Integers stay integers: `alpha` of an integer sum must be one."""
    return int(scale) if float(scale).is_integer() else scale


def _pow(t: Torch, x: list[Any], _: Attrs) -> Any:
    base, exponent = x
    if _is_number(exponent):
        return t(aten.pow.Tensor_Scalar, base, exponent)
    return t(aten.pow.Scalar, base, exponent) if _is_number(base) else t(aten.pow.Tensor_Tensor, base, exponent)


def _where(t: Torch, x: list[Any], _: Attrs) -> Any:
    return t(aten.where.self, x[0], _tensor(t, x[1]), _tensor(t, x[2]))


def _clip(t: Torch, x: list[Any], attrs: Attrs) -> Any:
    return t(aten.clamp.default, x[0], attrs["min"], attrs["max"])


def _cast(t: Torch, x: list[Any], attrs: Attrs) -> Any:
    return t(aten.to.dtype, _tensor(t, x[0]), TORCH_DTYPES[attrs["dtype"]])


def _reshape(t: Torch, x: list[Any], _: Attrs) -> Any:
    return t(aten.reshape.default, x[0], list(t.out_shape()))


def _expand(t: Torch, x: list[Any], _: Attrs) -> Any:
    return t(aten.expand.default, x[0], list(t.out_shape()))


def _slice(t: Torch, x: list[Any], attrs: Attrs) -> Any:
    result = x[0]
    bounds = zip(attrs["axes"], attrs["starts"], attrs["stops"], attrs["steps"], strict=True)
    for axis, start, stop, step in bounds:
        if start is None or stop is None:
            raise GraphError("A slice whose bounds the graph computes cannot be made anew: leave it as it is.")
        result = t(aten.slice.Tensor, result, axis, start, stop, step)
    return result


def _split(t: Torch, x: list[Any], attrs: Attrs) -> Any:
    return t(aten.split_with_sizes.default, x[0], list(attrs["sizes"]), attrs["axis"])


def _pad(t: Torch, x: list[Any], attrs: Attrs) -> Any:
    rank = len(attrs["pads"]) // 2
    pads = [amount for axis in reversed(range(rank)) for amount in (attrs["pads"][axis], attrs["pads"][axis + rank])]
    if attrs["mode"] == "constant":
        return t(aten.constant_pad_nd.default, x[0], pads, attrs["value"])
    while len(pads) > 2 and pads[-2:] == [0, 0]:
        pads = pads[:-2]
    return t(aten.pad.default, x[0], pads, attrs["mode"])


def _symmetric(pads: Sequence[int]) -> tuple[int, ...] | None:
    half = len(pads) // 2
    return tuple(pads[:half]) if tuple(pads[:half]) == tuple(pads[half:]) else None


def _spatial_pad(t: Torch, x: Any, pads: Sequence[int]) -> Any:
    half = len(pads) // 2
    flat = [amount for axis in reversed(range(half)) for amount in (pads[axis], pads[axis + half])]
    return t(aten.constant_pad_nd.default, x, flat)


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
    padding = _symmetric(attrs["pads"])
    if padding is None:
        raise GraphError("A transposed convolution with uneven pads has no torch form: leave it as it is.")
    table = {1: aten.conv_transpose1d.default, 2: aten.conv_transpose2d.input, 3: aten.conv_transpose3d.input}
    extra = list(attrs["output_padding"]), attrs["groups"], list(attrs["dilation"])
    return t(table[len(padding)], x, weight, bias, list(attrs["stride"]), list(padding), *extra)


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
    return t(aten.rms_norm.default, x, _normalized_shape(t, x, weight, attrs["axis"]), weight, attrs["eps"])


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
    if padding is None:
        raise GraphError("A max pool with uneven pads has no torch form: leave it as it is.")
    overload = {1: aten.max_pool1d, 2: aten.max_pool2d, 3: aten.max_pool3d}[dims].default
    lists = [list(attrs["kernel"]), list(attrs["stride"]), list(padding), list(attrs["dilation"] or (1,) * dims)]
    return t(overload, value, *lists, attrs["ceil_mode"])


def _avg_pool(t: Torch, x: list[Any], attrs: Attrs) -> Any:
    padding = _symmetric(attrs["pads"])
    if padding is None:
        raise GraphError("An average pool with uneven pads has no torch form: leave it as it is.")
    overload = {1: aten.avg_pool1d, 2: aten.avg_pool2d, 3: aten.avg_pool3d}[len(padding)].default
    lists = [list(attrs["kernel"]), list(attrs["stride"]), list(padding)]
    return t(overload, x[0], *lists, attrs["ceil_mode"], attrs["count_include_pad"])


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


def _reduction(overload: Any) -> Emitter:
    return lambda t, x, attrs: t(overload, x[0], list(attrs["axes"]), attrs["keepdims"])


def _prod(t: Torch, x: list[Any], attrs: Attrs) -> Any:
    result = x[0]
    for axis in sorted(attrs["axes"], reverse=True):
        result = t(aten.prod.dim_int, result, axis, attrs["keepdims"])
    return result


def _argmax(t: Torch, x: list[Any], attrs: Attrs) -> Any:
    axes = attrs["axes"]
    if len(axes) == 1:
        return t(aten.argmax.default, x[0], axes[0], attrs["keepdims"])
    return t(aten.argmax.default, x[0])


def _full(t: Torch, _: list[Any], attrs: Attrs) -> Any:
    return t(aten.full.default, list(t.out_shape()), attrs["value"], dtype=t.out_dtype())


def _arange(t: Torch, bounds: list[Any], attrs: Attrs) -> Any:
    start, step = attrs["start"], attrs["step"]
    end = bounds[-1] if bounds else start + step * t.out_shape()[0]
    return t(aten.arange.start_step, start, end, step, dtype=t.out_dtype())


def _extent(t: Torch, x: list[Any], attrs: Attrs) -> Any:
    if attrs["axis"] is None:
        raise GraphError("A shape as a tensor cannot be made in torch: ask for one extent of it.")
    return t(aten.sym_size.int, x[0], attrs["axis"])


def _gather(t: Torch, x: list[Any], attrs: Attrs) -> Any:
    indices = t.shape(x[1])
    if indices is not None and len(indices) == 1:
        return t(aten.index_select.default, x[0], attrs["axis"], x[1])
    return t(aten.index.Tensor, x[0], [None] * attrs["axis"] + [x[1]])


def _topk(t: Torch, x: list[Any], attrs: Attrs) -> Any:
    count = x[1] if len(x) > 1 else attrs["k"]
    return t(aten.topk.default, x[0], count, attrs["axis"], attrs["largest"])


def _fused_conv(t: Torch, inputs: list[Any], attrs: Attrs) -> Any:
    lists = [list(attrs[name]) for name in ("stride", "pads", "dilation")]
    target = torch.ops.rescompile.fused_conv.default
    return t(target, *inputs, *lists, attrs["groups"], attrs["inner"], attrs["outer"])


def _fused_linear(t: Torch, inputs: list[Any], attrs: Attrs) -> Any:
    target = torch.ops.rescompile.fused_linear.default
    return t(target, *inputs, attrs["transpose_weight"], attrs["inner"], attrs["outer"])


def _add_norm(t: Torch, inputs: list[Any], attrs: Attrs) -> Any:
    return t(torch.ops.rescompile.add_norm.default, *inputs, attrs["norm"], attrs["axis"], float(attrs["eps"]))


EMITTERS: dict[K, Emitter] = {
    K.IDENTITY: lambda t, x, _: t(aten.alias.default, x[0]),
    K.CAST: _cast,
    K.RESHAPE: _reshape,
    K.PERMUTE: lambda t, x, attrs: t(aten.permute.default, x[0], list(attrs["perm"])),
    K.SLICE: _slice,
    K.SPLIT: _split,
    K.EXPAND: _expand,
    K.ROLL: lambda t, x, attrs: t(aten.roll.default, x[0], list(attrs["shifts"]), list(attrs["axes"])),
    K.FLIP: lambda t, x, attrs: t(aten.flip.default, x[0], list(attrs["axes"])),
    K.PAD: _pad,
    K.TILE: lambda t, x, attrs: t(aten.repeat.default, x[0], list(attrs["repeats"])),
    K.ADD: _add,
    K.CONCAT: lambda t, x, attrs: t(aten.cat.default, list(x), attrs["axis"]),
    K.MUL: _binary(aten.mul.Tensor, aten.mul.Tensor, commutes=True),
    K.DIV: _binary(aten.div.Tensor, aten.div.Tensor),
    K.POW: _pow,
    K.MAXIMUM: _binary(aten.maximum.default, commutes=True),
    K.MINIMUM: _binary(aten.minimum.default, commutes=True),
    K.MOD: _binary(aten.remainder.Tensor, aten.remainder.Scalar),
    K.WHERE: _where,
    K.EQUAL: _binary(aten.eq.Tensor, aten.eq.Scalar, commutes=True),
    K.NOT_EQUAL: _binary(aten.ne.Tensor, aten.ne.Scalar, commutes=True),
    K.LESS: _binary(aten.lt.Tensor, aten.lt.Scalar),
    K.LESS_EQUAL: _binary(aten.le.Tensor, aten.le.Scalar),
    K.GREATER: _binary(aten.gt.Tensor, aten.gt.Scalar),
    K.GREATER_EQUAL: _binary(aten.ge.Tensor, aten.ge.Scalar),
    K.LOGICAL_AND: _binary(aten.logical_and.default),
    K.LOGICAL_OR: _binary(aten.logical_or.default),
    K.LOGICAL_NOT: _unary(aten.logical_not.default),
    K.NEG: _unary(aten.neg.default),
    K.ABS: _unary(aten.abs.default),
    K.EXP: _unary(aten.exp.default),
    K.LOG: _unary(aten.log.default),
    K.SQRT: _unary(aten.sqrt.default),
    K.RSQRT: _unary(aten.rsqrt.default),
    K.RECIPROCAL: _unary(aten.reciprocal.default),
    K.ERF: _unary(aten.erf.default),
    K.SIN: _unary(aten.sin.default),
    K.COS: _unary(aten.cos.default),
    K.FLOOR: _unary(aten.floor.default),
    K.CEIL: _unary(aten.ceil.default),
    K.ROUND: _unary(aten.round.default),
    K.SIGN: _unary(aten.sign.default),
    K.IS_NAN: _unary(aten.isnan.default),
    K.RELU: _unary(aten.relu.default),
    K.CLIP: _clip,
    K.LEAKY_RELU: lambda t, x, attrs: t(aten.leaky_relu.default, x[0], attrs["slope"]),
    K.PRELU: lambda t, x, _: t(aten.prelu.default, x[0], x[1]),
    K.ELU: lambda t, x, attrs: t(aten.elu.default, x[0], attrs["alpha"]),
    K.GELU: lambda t, x, attrs: t(aten.gelu.default, x[0], approximate=attrs["approximate"]),
    K.SILU: _unary(aten.silu.default),
    K.SIGMOID: _unary(aten.sigmoid.default),
    K.TANH: _unary(aten.tanh.default),
    K.HARDSIGMOID: _unary(aten.hardsigmoid.default),
    K.HARDSWISH: _unary(aten.hardswish.default),
    K.SOFTPLUS: _unary(aten.softplus.default),
    K.MISH: _unary(aten.mish.default),
    K.DROPOUT: lambda t, x, attrs: t(aten.dropout.default, x[0], attrs["p"], True),
    K.CONV: _conv,
    K.CONV_TRANSPOSE: _conv_transpose,
    K.LINEAR: _linear,
    K.MATMUL: lambda t, x, _: t(aten.matmul.default, x[0], x[1]),
    K.EINSUM: lambda t, x, attrs: t(aten.einsum.default, attrs["equation"], list(x)),
    K.ATTENTION: _attention,
    K.EMBEDDING: lambda t, x, _: t(aten.embedding.default, x[0], x[1]),
    K.GATHER: _gather,
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
    K.MEAN: _reduction(aten.mean.dim),
    K.SUM: _reduction(aten.sum.dim_IntList),
    K.AMAX: _reduction(aten.amax.default),
    K.AMIN: _reduction(aten.amin.default),
    K.PROD: _prod,
    K.ARGMAX: _argmax,
    K.CUMSUM: lambda t, x, attrs: t(aten.cumsum.default, x[0], attrs["axis"]),
    K.TOPK: _topk,
    K.FULL: _full,
    K.ARANGE: _arange,
    K.SHAPE: _extent,
    K.FUSED_CONV: _fused_conv,
    K.FUSED_LINEAR: _fused_linear,
    K.ADD_NORM: _add_norm,
}
