"""Activations as vector arithmetic: float32 transcendentals are polynomials, so that they stay in registers.

exp, tanh and erf follow Cephes and Eigen (rational minimax approximations); errors measured in
tests/test_kernels_activations.py are below 1e-6 relative for exp and 3e-7 absolute for tanh and erf. float64 calls
the C library.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import tvm
from tvm.tirx.script.builder import ir as T

from rescompile.backends.kernels.emit import Expr, const, let, maximum, minimum, select

_LOG2E = 1.44269504088896341
_LN2_HIGH, _LN2_LOW = 0.693359375, -2.12194440e-4
_EXP = (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1)
_EXP_RANGE = (-87.33, 88.37)
_SQRT_HALF = 0.70710678118654752440
_LOG = (
    7.0376836292e-2,
    -1.1514610310e-1,
    1.1676998740e-1,
    -1.2420140846e-1,
    1.4249322787e-1,
    -1.6668057665e-1,
    2.0000714765e-1,
    -2.4999993993e-1,
    3.3333331174e-1,
)
_TANH_RANGE = 7.90531110763549805
_TANH_P = (
    -2.76076847742355e-16,
    2.00018790482477e-13,
    -8.60467152213735e-11,
    5.12229709037114e-08,
    1.48572235717979e-05,
    6.37261928875436e-04,
    4.89352455891786e-03,
)
_TANH_Q = (1.19825839466702e-06, 1.18534705686654e-04, 2.26843463243900e-03, 4.89352518554385e-03)
_ERF_RANGE = 4.0
_ERF_P = (
    -2.72614225801306e-10,
    2.77068142495902e-08,
    -2.10102402082508e-06,
    -5.69250639462346e-05,
    -7.34990630326855e-04,
    -2.95459980854025e-03,
    -1.60960333262415e-02,
)
_ERF_Q = (
    -1.45660718464996e-05,
    -2.13374055278905e-04,
    -1.68282697438203e-03,
    -7.37332916720468e-03,
    -1.42647390514189e-02,
)


def _horner(x: Expr, coefficients: Sequence[float], dtype: str) -> Expr:
    total: Expr = const(coefficients[0], dtype)
    for coefficient in coefficients[1:]:
        total = total * x + const(coefficient, dtype)
    return total


def exp(x: Expr, dtype: str) -> Expr:
    """e^x; float32 arguments are clamped to the range of normal results, with e^x = 0 below it."""
    if dtype == "float64":
        return T.exp(x)
    low, high = (const(bound, dtype) for bound in _EXP_RANGE)
    clamped = let(maximum(minimum(x, high), low))
    n = let(T.floor(clamped * const(_LOG2E, dtype) + const(0.5, dtype)))
    r = let(clamped - n * const(_LN2_HIGH, dtype) - n * const(_LN2_LOW, dtype))
    mantissa = _horner(r, _EXP, dtype) * r * r + r + const(1.0, dtype)
    scale = T.reinterpret("float32", T.shift_left(n.astype("int32") + const(127, "int32"), const(23, "int32")))
    return select(x < low, const(0.0, dtype), mantissa * scale)


def log(x: Expr, dtype: str) -> Expr:
    """ln x; float32 below the normal numbers counts as the smallest of them, zero gives −∞, negative numbers NaN."""
    if dtype == "float64":
        return T.log(x)
    x = let(x)
    smallest, one = const(1.17549435e-38, dtype), const(1.0, dtype)
    # TVM 0.27 analyses vectors of integers that are bound to a name, and fails on them.
    bits = T.reinterpret("int32", maximum(x, smallest))
    exponent = T.shift_right(bits, const(23, "int32")) - const(126, "int32")
    half = const(0x3F000000, "int32")
    mantissa = let(T.reinterpret("float32", (bits & const(0x007FFFFF, "int32")) | half))
    low = mantissa < const(_SQRT_HALF, dtype)
    power = let(exponent.astype(dtype) - select(low, one, const(0.0, dtype)))
    r = let(select(low, mantissa + mantissa, mantissa) - one)
    square = let(r * r)
    tail = _horner(r, _LOG, dtype) * r * square + power * const(_LN2_LOW, dtype) - square * const(0.5, dtype)
    result = let(r + tail + power * const(_LN2_HIGH, dtype))
    endless = const(float("inf"), dtype)
    result = select(x < endless, result, x)
    zero = const(0.0, dtype)
    edge = select(tvm.tirx.EQ(x, zero), -endless, const(float("nan"), dtype))
    return select(x > zero, result, edge)


def _odd_quotient(x: Expr, limit: float, over: Sequence[float], under: Sequence[float], dtype: str) -> Expr:
    """x * over(x²) / under(x²) inside ±limit and exactly ±1 outside, so that 1 + erf(x) vanishes far below zero."""
    bound, one = const(limit, dtype), const(1.0, dtype)
    x = let(x)
    clamped = let(maximum(minimum(x, bound), -bound))
    square = let(clamped * clamped)
    quotient = clamped * _horner(square, over, dtype) / _horner(square, under, dtype)
    return select(x >= bound, one, select(x <= -bound, -one, quotient))


def tanh(x: Expr, dtype: str) -> Expr:
    """tanh(x)"""
    if dtype == "float64":
        return T.tanh(x)
    return _odd_quotient(x, _TANH_RANGE, _TANH_P, _TANH_Q, dtype)


def erf(x: Expr, dtype: str) -> Expr:
    """erf(x)"""
    if dtype == "float64":
        return T.erf(x)
    return _odd_quotient(x, _ERF_RANGE, _ERF_P, _ERF_Q, dtype)


def _relu(x: Expr, dtype: str) -> Expr:
    return maximum(x, const(0.0, dtype))


def _relu6(x: Expr, dtype: str) -> Expr:
    return minimum(maximum(x, const(0.0, dtype)), const(6.0, dtype))


def _gelu(x: Expr, dtype: str) -> Expr:
    return x * const(0.5, dtype) * (const(1.0, dtype) + erf(x * const(0.7071067811865476, dtype), dtype))


def _gelu_tanh(x: Expr, dtype: str) -> Expr:
    inner = x * const(0.7978845608028654, dtype) * (const(1.0, dtype) + const(0.044715, dtype) * x * x)
    return x * const(0.5, dtype) * (const(1.0, dtype) + tanh(inner, dtype))


def _sigmoid(x: Expr, dtype: str) -> Expr:
    return const(1.0, dtype) / (const(1.0, dtype) + exp(-x, dtype))


def _silu(x: Expr, dtype: str) -> Expr:
    return x * _sigmoid(x, dtype)


def _hardswish(x: Expr, dtype: str) -> Expr:
    return x * _relu6(x + const(3.0, dtype), dtype) * const(1 / 6, dtype)


_RULES: dict[str, Callable[[Expr, str], Expr]] = {
    "none": lambda x, dtype: x,
    "relu": _relu,
    "relu6": _relu6,
    "gelu": _gelu,
    "gelu_tanh": _gelu_tanh,
    "silu": _silu,
    "sigmoid": _sigmoid,
    "tanh": tanh,
    "hardswish": _hardswish,
}


def activate(name: str, x: Expr, dtype: str) -> Expr:
    """The activation `name` (one of `specs.ACTIVATIONS`) of x, computed in `dtype`."""
    if name == "none":
        return x
    # TVM 0.27 runs a C library call lane by lane outside the scope of a vector bound here.
    return _RULES[name](x if dtype == "float64" else let(x), dtype)
