"""One element of every elementwise kind, as vector arithmetic: what a region's program is emitted with.

float32 exponentials, logarithms and error functions are polynomials (activations.py); float64, sines and general powers
call the C library.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import tvm
from tvm.tirx.script.builder import ir as T

from rescompile.backends.kernels.activations import activate, erf, exp, log
from rescompile.backends.kernels.emit import Expr, const, maximum, minimum, select
from rescompile.kinds import OpKind
from rescompile.values import Attrs

K = OpKind
_FLOATS = ("float32", "float64")


def uses_library(kind: OpKind, attrs: Attrs, dtype: str) -> bool:
    """Whether the kind calls the C library, lane by lane; no vector may then be bound to a name around it."""
    if kind in (K.SIN, K.COS):
        return True
    if kind is K.POW:
        return attrs.get("exponent") not in _POWERS
    transcendental = (K.EXP, K.LOG, K.ERF, K.GELU, K.SILU, K.SIGMOID, K.TANH, K.ELU)
    return dtype == "float64" and kind in transcendental


def scalar(kind: OpKind, attrs: Attrs, xs: Sequence[Expr], dtype: str) -> Expr:
    """f(x, ...) of operands that are of the type `dtype` already, which is also that of the result.

    A comparison's operands share a type of their own, and a choice's first operand is a truth value.
    """
    return _RULES[kind](attrs, list(xs), dtype)


def has_rule(kind: OpKind) -> bool:
    """Whether there is arithmetic for the kind."""
    return kind in _RULES


def _add(attrs: Attrs, xs: list[Expr], dtype: str) -> Expr:
    scales = attrs.get("scales") or (1.0,) * len(xs)
    total: Expr | None = None
    for x, scale in zip(xs, scales, strict=True):
        if total is not None and scale in (1, -1):
            total = total + x if scale == 1 else total - x
            continue
        term = x if scale == 1 else x * const(scale, dtype)
        total = term if total is None else total + term
    return total


_POWERS: dict[Any, Callable[[Expr, str], Expr]] = {
    1.0: lambda x, dtype: x,
    2.0: lambda x, dtype: x * x,
    3.0: lambda x, dtype: x * x * x,
    4.0: lambda x, dtype: (x * x) * (x * x),
    0.5: lambda x, dtype: T.sqrt(x),
    -0.5: lambda x, dtype: const(1.0, dtype) / T.sqrt(x),
    -1.0: lambda x, dtype: const(1.0, dtype) / x,
}


def _pow(attrs: Attrs, xs: list[Expr], dtype: str) -> Expr:
    exponent = attrs.get("exponent")
    if exponent in _POWERS:
        return _POWERS[exponent](xs[0], dtype)
    return tvm.tirx.pow(xs[0], xs[1])


def _clip(attrs: Attrs, xs: list[Expr], dtype: str) -> Expr:
    x = xs[0]
    for bound, function in ((attrs.get("min"), maximum), (attrs.get("max"), minimum)):
        if bound is not None and not math.isinf(bound):
            x = function(x, const(bound, dtype))
    return x


def _two_sided(x: Expr, negative: Expr, dtype: str) -> Expr:
    """x above zero, `negative`, which is 0 there, below."""
    return maximum(x, const(0, dtype)) + negative


def _leaky(attrs: Attrs, xs: list[Expr], dtype: str) -> Expr:
    return _two_sided(xs[0], minimum(xs[0], const(0, dtype)) * const(attrs.get("slope", 0.01), dtype), dtype)


def _prelu(attrs: Attrs, xs: list[Expr], dtype: str) -> Expr:
    return _two_sided(xs[0], minimum(xs[0], const(0, dtype)) * xs[1], dtype)


def _elu(attrs: Attrs, xs: list[Expr], dtype: str) -> Expr:
    below = exp(minimum(xs[0], const(0, dtype)), dtype) - const(1.0, dtype)
    return _two_sided(xs[0], below * const(attrs.get("alpha", 1.0), dtype), dtype)


def _round(x: Expr, dtype: str) -> Expr:
    """To the nearest whole number, halves to the even one. TVM's own rule for vectors leaves names unbound."""
    above = T.floor(x + const(0.5, dtype))
    odd = above - const(2.0, dtype) * T.floor(above * const(0.5, dtype))
    even = T.Select(x + const(0.5, dtype) == above, above - odd, above)
    # From here on every number is whole.
    return T.Select(_magnitude(x, dtype) < const(2.0**52 if dtype == "float64" else 2.0**23, dtype), even, x)


def _hardsigmoid(attrs: Attrs, xs: list[Expr], dtype: str) -> Expr:
    line = xs[0] * const(attrs.get("alpha", 1 / 6), dtype) + const(attrs.get("beta", 0.5), dtype)
    return minimum(maximum(line, const(0.0, dtype)), const(1.0, dtype))


def _magnitude(x: Expr, dtype: str) -> Expr:
    return maximum(x, -x)


def _sign(attrs: Attrs, xs: list[Expr], dtype: str) -> Expr:
    zero, one = const(0, dtype), const(1, dtype)
    return select(xs[0] > zero, one, select(xs[0] < zero, -one, xs[0]))


def _named(name: str) -> Callable[[Attrs, list[Expr], str], Expr]:
    return lambda attrs, xs, dtype: activate(name, xs[0], dtype)


def _chain(function: Callable[[Expr, Expr], Expr]) -> Callable[[Attrs, list[Expr], str], Expr]:
    def rule(attrs: Attrs, xs: list[Expr], dtype: str) -> Expr:
        out = xs[0]
        for x in xs[1:]:
            out = function(out, x)
        return out

    return rule


def _divide(attrs: Attrs, xs: list[Expr], dtype: str) -> Expr:
    return xs[0] / xs[1] if dtype in _FLOATS else tvm.tirx.truncdiv(xs[0], xs[1])


_RULES: dict[OpKind, Callable[[Attrs, list[Expr], str], Expr]] = {
    K.IDENTITY: lambda attrs, xs, dtype: xs[0],
    K.CAST: lambda attrs, xs, dtype: xs[0],
    K.ADD: _add,
    K.MUL: _chain(lambda a, b: a * b),
    K.DIV: _divide,
    K.POW: _pow,
    K.MAXIMUM: _chain(maximum),
    K.MINIMUM: _chain(minimum),
    K.WHERE: lambda attrs, xs, dtype: select(xs[0], xs[1], xs[2]),
    K.EQUAL: lambda attrs, xs, dtype: tvm.tirx.EQ(xs[0], xs[1]),
    K.NOT_EQUAL: lambda attrs, xs, dtype: tvm.tirx.NE(xs[0], xs[1]),
    K.LESS: lambda attrs, xs, dtype: xs[0] < xs[1],
    K.LESS_EQUAL: lambda attrs, xs, dtype: xs[0] <= xs[1],
    K.GREATER: lambda attrs, xs, dtype: xs[0] > xs[1],
    K.GREATER_EQUAL: lambda attrs, xs, dtype: xs[0] >= xs[1],
    K.LOGICAL_AND: lambda attrs, xs, dtype: tvm.tirx.And(xs[0], xs[1]),
    K.LOGICAL_OR: lambda attrs, xs, dtype: tvm.tirx.Or(xs[0], xs[1]),
    K.LOGICAL_NOT: lambda attrs, xs, dtype: tvm.tirx.Not(xs[0]),
    K.NEG: lambda attrs, xs, dtype: -xs[0],
    K.ABS: lambda attrs, xs, dtype: _magnitude(xs[0], dtype),
    K.EXP: lambda attrs, xs, dtype: exp(xs[0], dtype),
    K.LOG: lambda attrs, xs, dtype: log(xs[0], dtype),
    K.SQRT: lambda attrs, xs, dtype: T.sqrt(xs[0]),
    K.RSQRT: lambda attrs, xs, dtype: const(1.0, dtype) / T.sqrt(xs[0]),
    K.RECIPROCAL: lambda attrs, xs, dtype: const(1.0, dtype) / xs[0],
    K.ERF: lambda attrs, xs, dtype: erf(xs[0], dtype),
    K.SIN: lambda attrs, xs, dtype: T.sin(xs[0]),
    K.COS: lambda attrs, xs, dtype: T.cos(xs[0]),
    K.FLOOR: lambda attrs, xs, dtype: T.floor(xs[0]),
    K.CEIL: lambda attrs, xs, dtype: T.ceil(xs[0]),
    K.ROUND: lambda attrs, xs, dtype: _round(xs[0], dtype),
    K.SIGN: _sign,
    K.RELU: _named("relu"),
    K.CLIP: _clip,
    K.LEAKY_RELU: _leaky,
    K.PRELU: _prelu,
    K.ELU: _elu,
    K.GELU: lambda attrs, xs, dtype: activate(
        "gelu" if attrs.get("approximate", "none") == "none" else "gelu_tanh", xs[0], dtype
    ),
    K.SILU: _named("silu"),
    K.SIGMOID: _named("sigmoid"),
    K.TANH: _named("tanh"),
    K.HARDSIGMOID: _hardsigmoid,
    K.HARDSWISH: _named("hardswish"),
}
