"""From kinds to torch: the one table by which operations are written back."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch

from rescompile.errors import GraphError
from rescompile.fx_emit_nn import NN_EMITTERS
from rescompile.fx_torch import Emitter, Torch, aten
from rescompile.fx_types import TORCH_DTYPES
from rescompile.graph import Attrs
from rescompile.kinds import OpKind as K


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
    if first == -1.0 and len(terms) == 2 and _is_number(terms[1][0]):
        return t(aten.rsub.Scalar, total, terms[1][0] * terms[1][1])
    total = _tensor(t, total)
    if len(terms) == 2 and first != 1.0 and abs(first + terms[1][1] - 1.0) < 1e-12 and not _is_number(terms[1][0]):
        other, weight = terms[1]
        if t.dtype(total) == t.dtype(other):
            return t(aten.lerp.Scalar, total, other, weight)  # rounds once
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
    numbers = _is_number(x[1]), _is_number(x[2])
    table = {
        (False, False): aten.where.self,
        (True, False): aten.where.ScalarSelf,
        (False, True): aten.where.ScalarOther,
        (True, True): aten.where.Scalar,
    }
    return t(table[numbers], x[0], x[1], x[2])


def _hardsigmoid(t: Torch, x: list[Any], attrs: Attrs) -> Any:
    """torch's has a slope of one sixth only."""
    if abs(attrs["alpha"] - 1 / 6) < 1e-6 and attrs["beta"] == 0.5:
        return t(aten.hardsigmoid.default, x[0])
    line = t(aten.add.Tensor, t(aten.mul.Tensor, x[0], attrs["alpha"]), attrs["beta"])
    return t(aten.clamp.default, line, 0.0, 1.0)


def _clip(t: Torch, x: list[Any], attrs: Attrs) -> Any:
    return t(aten.clamp.default, x[0], attrs["min"], attrs["max"])


def _cast(t: Torch, x: list[Any], attrs: Attrs) -> Any:
    return t(aten.to.dtype, _tensor(t, x[0]), TORCH_DTYPES[attrs["dtype"]])


def _reshape(t: Torch, x: list[Any], attrs: Attrs) -> Any:
    return t(aten.reshape.default, x[0], list(attrs["shape"] or t.out_shape()))


def _expand(t: Torch, x: list[Any], _: Attrs) -> Any:
    return t(aten.expand.default, x[0], list(t.out_shape()))


def _slice(t: Torch, x: list[Any], attrs: Attrs) -> Any:
    result = x[0]
    bounds = zip(attrs["axes"], attrs["starts"], attrs["stops"], attrs["steps"], strict=True)
    for axis, start, stop, step in bounds:
        if start is None or stop is None:
            raise GraphError("A slice whose bounds the graph computes cannot be made anew: leave it as it is.")
        if isinstance(stop, str):  # the extent itself, by its name
            stop = sys.maxsize
        result = t(aten.slice.Tensor, result, axis, start, stop, step)
    return result


def _permute(t: Torch, x: list[Any], attrs: Attrs) -> Any:
    if not attrs["perm"]:
        raise GraphError(
            "A permutation of an operand of unknown rank cannot be made anew: capture with example inputs."
        )
    return t(aten.permute.default, x[0], list(attrs["perm"]))


def _split(t: Torch, x: list[Any], attrs: Attrs) -> Any:
    if not attrs["sizes"]:
        raise GraphError("A split into parts of unknown size cannot be made anew: capture with example inputs.")
    return t(aten.split_with_sizes.default, x[0], list(attrs["sizes"]), attrs["axis"])


def _pad(t: Torch, x: list[Any], attrs: Attrs) -> Any:
    rank = len(attrs["pads"]) // 2
    pads = [amount for axis in reversed(range(rank)) for amount in (attrs["pads"][axis], attrs["pads"][axis + rank])]
    if attrs["mode"] == "constant":
        return t(aten.constant_pad_nd.default, x[0], pads, attrs["value"])
    while len(pads) > 2 and pads[-2:] == [0, 0]:
        pads = pads[:-2]
    return t(aten.pad.default, x[0], pads, attrs["mode"])


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


EMITTERS: dict[K, Emitter] = {
    **NN_EMITTERS,
    K.IDENTITY: lambda t, x, _: t(aten.alias.default, x[0]),
    K.CAST: _cast,
    K.RESHAPE: _reshape,
    K.PERMUTE: _permute,
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
    K.HARDSIGMOID: _hardsigmoid,
    K.HARDSWISH: _unary(aten.hardswish.default),
    K.SOFTPLUS: _unary(aten.softplus.default),
    K.MISH: _unary(aten.mish.default),
    K.DROPOUT: lambda t, x, attrs: t(aten.dropout.default, x[0], attrs["p"], True),
    K.MATMUL: lambda t, x, _: t(aten.matmul.default, x[0], x[1]),
    K.EINSUM: lambda t, x, attrs: t(aten.einsum.default, attrs["equation"], list(x)),
    K.EMBEDDING: lambda t, x, _: t(aten.embedding.default, x[0], x[1]),
    K.GATHER: _gather,
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
}
