"""One element of any elementwise kind, as an expression of what one GPU thread computes.

    scalar(kind, attributes, operands)        y = f(a, b, ...), in the operands' type: float32, float64, integers, bool

Functions are those of CUDA's mathematical library, not the fast approximations into which TVM would turn them: what is
verified on a processor must hold on the GPU. A NaN goes through (max, min and relu in CUDA would drop it), as in torch.
Inside `portable`, for other GPUs, they are TVM's operators.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeAlias

import numpy as np
from tvm import tirx

from rescompile.errors import GraphError
from rescompile.kinds import OpKind
from rescompile.values import Attrs

Expr: TypeAlias = Any  # a tirx expression
K = OpKind

_TVM_NAMES = {"rint": "nearbyint"}
_WIDEST = 8  # elements of an access
_portable: ContextVar[bool] = ContextVar("portable", default=False)
_lanes: ContextVar[int] = ContextVar("lanes", default=_WIDEST)


def scalar(kind: OpKind, attrs: Attrs, operands: Sequence[Expr]) -> Expr:
    """One element of an operation's output; operands of one type, `where` with its condition first.

    An operand may stand in the expression several times: hand in variables or buffer elements, not long expressions.
    GraphError for a kind of which `refusal` says why not.
    """
    rule = _RULES.get(kind)
    if rule is None:
        raise GraphError(f"No GPU thread computes an element of '{kind.value}' alone.")
    return rule({**kind.spec.attrs, **attrs}, list(operands))


def refusal(kind: OpKind) -> str:
    """Why `scalar` cannot do the kind, one clause; empty when it can."""
    return "" if kind in _RULES else f"{kind.value} is more than one element's work"


def literal(number: float | bool, dtype: str) -> Expr:
    """A number of that type, rounded here: a longer literal makes compilers warn."""
    if dtype == "float32":
        return tirx.const(float(np.float32(number)), dtype)
    if dtype == "float64" and float(f"{number:.12f}") != number:
        # The code generator writes a float64 with so many places: its bits say it exactly.
        return tirx.reinterpret(dtype, tirx.const(int(np.float64(number).view(np.int64)), "int64"))
    return tirx.const(float(number) if "float" in dtype else int(number), dtype)


def convert(value: Expr, dtype: str) -> Expr:
    """The value in another type; a float becomes true where it is not 0."""
    have = dtype_of(value)
    if have == dtype:
        return value
    if dtype == "bool":
        return tirx.NE(value, literal(0, have))
    if have == "bool" and "float" in dtype:
        return tirx.Select(value, literal(1, dtype), literal(0, dtype))
    if "float" in have and "int" in dtype:
        return tirx.Cast(dtype, value)  # towards zero, as in C and in torch
    return value.astype(dtype)


def call(name: str, *operands: Expr) -> Expr:
    """A function of CUDA's library, in the operands' type: exp, erf, tanh, rsqrt, ..."""
    if _portable.get():
        return getattr(tirx, _TVM_NAMES.get(name, name))(*operands)
    dtype = dtype_of(operands[0])
    return tirx.call_pure_extern(dtype, f"{name}f" if dtype == "float32" else name, *operands)


@contextmanager
def portable(lanes: int = _WIDEST) -> Iterator[None]:
    """Kernels built inside call TVM's own operators, which the code generators of other GPUs know, too.

    `lanes`: elements of the widest vector type that there is.
    """
    tokens = _portable.set(True), _lanes.set(lanes)
    try:
        yield
    finally:
        _portable.reset(tokens[0])
        _lanes.reset(tokens[1])


def widest_lanes() -> int:
    """Elements of the widest vector type of the GPU that is built for."""
    return _lanes.get()


def is_portable() -> bool:
    """Whether what is built now is for other GPUs, too."""
    return _portable.get()


def dtype_of(value: Expr) -> str:
    """The element type of an expression."""
    found = getattr(value, "dtype", None)
    return str(value.ty.dtype if found is None else found)


# ---- kinds -----------------------------------------------------------------------------------------------------------

Rule: TypeAlias = Callable[[Attrs, list[Expr]], Expr]


def _number(x: Expr, number: float) -> Expr:
    return literal(number, dtype_of(x))


def _add(attrs: Attrs, xs: list[Expr]) -> Expr:
    total: Expr = None
    for x, scale in zip(xs, attrs["scales"] or (1.0,) * len(xs), strict=True):
        if total is not None and scale == -1:
            total = total - x
            continue
        term = x if scale == 1 else x * _number(x, scale)
        total = term if total is None else total + term
    return total


def _chain(join: Callable[[Expr, Expr], Expr]) -> Rule:
    def rule(_: Attrs, xs: list[Expr]) -> Expr:
        out = xs[0]
        for x in xs[1:]:
            out = join(out, x)
        return out

    return rule


def _larger(a: Expr, b: Expr) -> Expr:
    return tirx.max(a, b) if "float" not in dtype_of(a) else tirx.Select(tirx.any(a > b, tirx.isnan(a)), a, b)


def _smaller(a: Expr, b: Expr) -> Expr:
    return tirx.min(a, b) if "float" not in dtype_of(a) else tirx.Select(tirx.any(a < b, tirx.isnan(a)), a, b)


def _power(_: Attrs, xs: list[Expr]) -> Expr:
    x, exponent = xs
    number = getattr(exponent, "value", None)
    if number in (1, 2, 3, 4):
        square = x if number == 1 else x * x
        return square * square if number == 4 else square * x if number == 3 else square
    if number in (0.5, -0.5):
        return call("sqrt" if number == 0.5 else "rsqrt", x)
    return _number(x, 1) / x if number == -1 else call("pow", x, exponent)


def _of_float(name: str) -> Rule:
    return lambda _, xs: call(name, xs[0])


def _sign(_: Attrs, xs: list[Expr]) -> Expr:
    x, zero, one = xs[0], _number(xs[0], 0), _number(xs[0], 1)
    return tirx.Select(x > zero, one, tirx.Select(x < zero, -one, zero))


def _clip(attrs: Attrs, xs: list[Expr]) -> Expr:
    x = xs[0]
    low, high = (None if bound is None or math.isinf(bound) else _number(x, bound) for bound in _bounds(attrs))
    if low is not None:
        x = tirx.Select(x < low, low, x)
    return x if high is None else tirx.Select(x > high, high, x)


def _bounds(attrs: Attrs) -> tuple[float | None, float | None]:
    return attrs["min"], attrs["max"]


def _relu(_: Attrs, xs: list[Expr]) -> Expr:
    zero = _number(xs[0], 0)
    return tirx.Select(xs[0] < zero, zero, xs[0])


def _leaky(slope: Expr, x: Expr) -> Expr:
    return tirx.Select(x > _number(x, 0), x, x * slope)


def _elu(attrs: Attrs, xs: list[Expr]) -> Expr:
    x = xs[0]
    return tirx.Select(x > _number(x, 0), x, _expm1(x) * _number(x, attrs["alpha"]))


def _expm1(x: Expr) -> Expr:
    return call("exp", x) - _number(x, 1) if _portable.get() else call("expm1", x)


def _gelu(attrs: Attrs, xs: list[Expr]) -> Expr:
    x = xs[0]
    half, one = _number(x, 0.5), _number(x, 1)
    if attrs["approximate"] == "tanh":
        inner = (x + x * x * x * _number(x, 0.044715)) * _number(x, math.sqrt(2 / math.pi))
        return x * half * (call("tanh", inner) + one)
    return x * half * (call("erf", x * _number(x, math.sqrt(0.5))) + one)


def _sigmoid(_: Attrs, xs: list[Expr]) -> Expr:
    one = _number(xs[0], 1)
    return one / (one + call("exp", -xs[0]))


def _silu(_: Attrs, xs: list[Expr]) -> Expr:
    return xs[0] / (_number(xs[0], 1) + call("exp", -xs[0]))


def _hardsigmoid(attrs: Attrs, xs: list[Expr]) -> Expr:
    x, zero, one = xs[0], _number(xs[0], 0), _number(xs[0], 1)
    line = x * _number(x, attrs["alpha"]) + _number(x, attrs["beta"])
    return tirx.Select(line < zero, zero, tirx.Select(line > one, one, line))


def _hardswish(_: Attrs, xs: list[Expr]) -> Expr:
    x, zero, six = xs[0], _number(xs[0], 0), _number(xs[0], 6)
    gate = x + _number(x, 3)
    return x * tirx.Select(gate < zero, zero, tirx.Select(gate > six, six, gate)) * _number(x, 1 / 6)


def _softplus(_: Attrs, xs: list[Expr]) -> Expr:
    """log(1 + exp(x)) = max(x, 0) + log(1 + exp(−|x|)), which cannot overflow"""
    x = xs[0]
    tail = call("exp", -tirx.abs(x))
    return _relu({}, [x]) + (call("log", _number(x, 1) + tail) if _portable.get() else call("log1p", tail))


def _mish(_: Attrs, xs: list[Expr]) -> Expr:
    return xs[0] * call("tanh", _softplus({}, xs))


def _batch_norm(attrs: Attrs, xs: list[Expr]) -> Expr:
    """(x − mean)·rsqrt(var + eps)·weight + bias; operands that are not there are None."""
    x, weight, bias, mean, var = [*xs, None, None, None, None][:5]
    out = x if mean is None else x - mean
    if var is not None:
        out = out * call("rsqrt", var + _number(x, attrs["eps"]))
    out = out if weight is None else out * weight
    return out if bias is None else out + bias


_RULES: Mapping[OpKind, Rule] = {
    K.IDENTITY: lambda _, xs: xs[0],
    K.CAST: lambda attrs, xs: convert(xs[0], str(attrs["dtype"])),
    K.ADD: _add,
    K.MUL: _chain(lambda a, b: a * b),
    K.DIV: lambda _, xs: xs[0] / xs[1] if "float" in dtype_of(xs[0]) else tirx.truncdiv(xs[0], xs[1]),
    K.POW: _power,
    K.MAXIMUM: _chain(_larger),
    K.MINIMUM: _chain(_smaller),
    K.WHERE: lambda _, xs: tirx.Select(xs[0], xs[1], xs[2]),
    K.EQUAL: lambda _, xs: tirx.EQ(xs[0], xs[1]),
    K.NOT_EQUAL: lambda _, xs: tirx.NE(xs[0], xs[1]),
    K.LESS: lambda _, xs: xs[0] < xs[1],
    K.LESS_EQUAL: lambda _, xs: xs[0] <= xs[1],
    K.GREATER: lambda _, xs: xs[0] > xs[1],
    K.GREATER_EQUAL: lambda _, xs: xs[0] >= xs[1],
    K.LOGICAL_AND: _chain(lambda a, b: tirx.all(convert(a, "bool"), convert(b, "bool"))),
    K.LOGICAL_OR: _chain(lambda a, b: tirx.any(convert(a, "bool"), convert(b, "bool"))),
    K.LOGICAL_NOT: lambda _, xs: tirx.Not(convert(xs[0], "bool")),
    K.NEG: lambda _, xs: -xs[0],
    K.ABS: lambda _, xs: tirx.abs(xs[0]),
    **{
        kind: _of_float(name)
        for kind, name in {
            K.EXP: "exp",
            K.LOG: "log",
            K.SQRT: "sqrt",
            K.RSQRT: "rsqrt",
            K.ERF: "erf",
            K.SIN: "sin",
            K.COS: "cos",
            K.ROUND: "rint",
            K.TANH: "tanh",
        }.items()
    },
    K.RECIPROCAL: lambda _, xs: _number(xs[0], 1) / xs[0],
    K.FLOOR: lambda _, xs: tirx.floor(xs[0]),
    K.CEIL: lambda _, xs: tirx.ceil(xs[0]),
    K.SIGN: _sign,
    K.IS_NAN: lambda _, xs: tirx.isnan(xs[0]),
    K.RELU: _relu,
    K.CLIP: _clip,
    K.LEAKY_RELU: lambda attrs, xs: _leaky(_number(xs[0], attrs["slope"]), xs[0]),
    K.PRELU: lambda _, xs: _leaky(xs[1], xs[0]),
    K.ELU: _elu,
    K.GELU: _gelu,
    K.SILU: _silu,
    K.SIGMOID: _sigmoid,
    K.HARDSIGMOID: _hardsigmoid,
    K.HARDSWISH: _hardswish,
    K.SOFTPLUS: _softplus,
    K.MISH: _mish,
    K.BATCH_NORM: _batch_norm,
}
