"""Writers of arithmetic, activations, reductions, and of what makes values out of nothing."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import onnx_ir as ir

from rescompile.errors import GraphError
from rescompile.kinds import OpKind as K
from rescompile.onnx_build import FLOATS, Builder, Request, Writer
from rescompile.onnx_ops import REDUCTIONS, Arg, dtype_of

# ---- arithmetic ------------------------------------------------------------------------------------------------------


def _add(b: Builder, r: Request) -> ir.Value:
    """scales[0]·x0 + scales[1]·x1 + ..."""
    args = [r.arg(index) for index in range(len(r.args))]
    scales = tuple(r.attr("scales")) or (1.0,) * len(args)
    if len(args) > 1 and len(set(scales)) == 1:
        floats = args[0].dtype in FLOATS and (b.opset >= 8 or len({arg.shape for arg in args}) == 1)
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
    if x.dtype not in FLOATS:
        b.since(10, "mod of integers")
        return b.node("Mod", [x, y])
    return b.node("Sub", [x, b.node("Mul", [y, b.node("Floor", [b.node("Div", [x, y])])])])


def _negated(op_type: str) -> Writer:
    return lambda b, r: b.node("Not", [b.node(op_type, list(r.args))])


def _pair(op_type: str) -> Writer:
    return lambda b, r: b.node(op_type, [r.arg(0), r.arg(1)])


def _cast(b: Builder, r: Request) -> ir.Value:
    return b.node("Cast", [r.arg(0)], to=int(dtype_of(r.attr("dtype"))))


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
    attrs: dict[str, Any] = {name: r.attrs.get(name) for name in ("axis", "largest", "sorted")}
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


MATH_WRITERS: dict[K, Writer] = {
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
    K.MATMUL: _pair("MatMul"),
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
    K.ARGMAX: _argmax,
    K.CUMSUM: _cumsum,
    K.TOPK: _topk,
    K.FULL: _full,
    K.ARANGE: _arange,
    K.SHAPE: _shape,
    K.RANDOM: _random,
}
