"""Rules for elementwise arithmetic, activations, and values made out of nothing."""

from __future__ import annotations

from typing import Any

from torch import fx

from rescompile.fx_ops import Attr
from rescompile.fx_rules import Rule, Site, Step, is_number
from rescompile.kinds import OpKind as K


def _unary(kind: K) -> Rule:
    return lambda c: Step(kind, [c["input"]])


def _binary(kind: K) -> Rule:
    return lambda c: Step(kind, [c["input"], c["other"]])


def _scaled(a: Any, b: Any, first: float, second: float) -> Step:
    return Step(K.ADD, [a, b], {} if first == 1 and second == 1 else {"scales": (float(first), float(second))})


def _adds_nothing(c: Site, zero: Any, x: Any) -> bool:
    return is_number(zero) and zero == 0 and c.shape(x) == c.out.shape and c.keeps_dtype(x)


def _add(c: Site) -> Step | None:
    """x + alpha·y; `0 + x`, with which Python's sum() begins, is x"""
    a, b, alpha = c["input"], c["other"], c.get("alpha", 1)
    if not is_number(alpha):
        return None
    if _adds_nothing(c, b, a):
        return Step(K.IDENTITY, [a])
    if alpha == 1 and _adds_nothing(c, a, b):
        return Step(K.IDENTITY, [b])
    return _scaled(a, b, 1, alpha)


def _sub(c: Site) -> Step | None:
    alpha = c.get("alpha", 1)
    return _scaled(c["input"], c["other"], 1, -alpha) if is_number(alpha) else None


def _rsub(c: Site) -> Step | None:
    alpha = c.get("alpha", 1)
    return _scaled(c["other"], c["input"], 1, -alpha) if is_number(alpha) else None


def _addc(kind: K) -> Rule:
    def rule(c: Site) -> Step | None:
        if not is_number(c["value"]):
            return None
        term = Step(kind, [c["tensor1"], c["tensor2"]], suffix=kind.value)
        return _scaled(c["input"], term, 1, c["value"])

    return rule


def _lerp(c: Site) -> Step:
    """x + w·(y − x)"""
    weight = c["weight"]
    if is_number(weight):
        return _scaled(c["input"], c["end"], 1 - weight, weight)
    difference = Step(K.ADD, [c["end"], c["input"]], {"scales": (1.0, -1.0)}, suffix="sub")
    return Step(K.ADD, [c["input"], Step(K.MUL, [weight, difference], suffix="mul")])


def _div(c: Site) -> Step | None:
    rounding = c.get("rounding_mode")
    if rounding is None:
        return Step(K.DIV, [c["input"], c["other"]])
    if rounding != "floor":
        return None
    return Step(K.FLOOR, [Step(K.DIV, [c["input"], c["other"]], suffix="div")])


def _floor_divide(c: Site) -> Step:
    return Step(K.FLOOR, [Step(K.DIV, [c["input"], c["other"]], suffix="div")])


def _pow(c: Site) -> Step:
    return Step(K.POW, [c["input"], c["exponent"] if "exponent" in c.args else c["other"]])


def _masked_fill(c: Site) -> Step:
    return Step(K.WHERE, [c["mask"], c["value"], c["input"]])


def _logical(kind: K) -> Rule:
    """A bitwise operation, which on booleans is the logical one"""

    def rule(c: Site) -> Step | None:
        if c.out.dtype != "bool":
            return None
        return Step(kind, [c[name] for name in ("input", "other") if name in c.args])

    return rule


def _clip(lowest: str, highest: str) -> Rule:
    def rule(c: Site) -> Step | None:
        low, high = c.get(lowest), c.get(highest)
        if isinstance(low, fx.Node | Attr) or isinstance(high, fx.Node | Attr):
            return None
        return Step(K.CLIP, [c["input"]], {"min": low, "max": high})

    return rule


def _elu(c: Site) -> Step | None:
    if c.get("scale", 1) != 1 or c.get("input_scale", 1) != 1:
        return None
    return Step(K.ELU, [c["input"]], {"alpha": float(c.get("alpha", 1.0))})


def _softplus(c: Site) -> Step | None:
    return Step(K.SOFTPLUS, [c["input"]]) if c.get("beta", 1) == 1 and c.get("threshold", 20) == 20 else None


def _gelu(c: Site) -> Step:
    return Step(K.GELU, [c["input"]], {"approximate": c.get("approximate", "none")})


def _quantised(kind: K, scale: str, zero: str) -> Rule:
    return lambda c: Step(kind, [c["input"], c[scale], c.get(zero, None)])


def _glu(c: Site) -> Step | None:
    """a·sigmoid(b), a and b the halves along `dim`"""
    shape, axis = c.out.shape, c.axis(c.get("dim", -1))
    if shape is None or not isinstance(shape[axis], int):
        return None
    halves = Step(
        K.SPLIT, [c["input"]], {"axis": axis, "sizes": (shape[axis],) * 2}, suffix="half", types=(c.out, c.out)
    )
    return Step(K.MUL, [(halves, 0), Step(K.SIGMOID, [(halves, 1)], suffix="gate")])


def _dropout(c: Site) -> Step | None:
    if not c.get("train", c.get("training", True)) or c["p"] == 0:
        return Step(K.IDENTITY, [c["input"]], {"dropout": float(c["p"])} if c["p"] else {})
    # Dropping whole channels, or to SELU's statistics, is not what DROPOUT means.
    return Step(K.DROPOUT, [c["input"]], {"p": float(c["p"])}) if c.name == "dropout" else None


def _stochastic_depth(c: Site) -> Step | None:
    return None if c["training"] and c["p"] > 0 else Step(K.IDENTITY, [c["input"]])


def _softmax(log: bool) -> Rule:
    def rule(c: Site) -> Step | None:
        if c["dim"] is None:
            return None
        x, attrs = c["input"], {"axis": c.axis(c["dim"]), "log": log}
        if c.get("dtype") is not None and not c.keeps_dtype(x):
            x = Step(K.CAST, [x], {"dtype": c.out.dtype}, suffix="cast")
        return Step(K.SOFTMAX, [x], attrs)

    return rule


def _square(c: Site) -> Step:
    return Step(K.MUL, [c["input"], c["input"]])


def _full(value: float | None) -> Rule:
    def rule(c: Site) -> Step | None:
        number = c.get("fill_value", c.get("s", c.get("value"))) if value is None else value
        return Step(K.FULL, [], {"value": number}) if is_number(number) else None

    return rule


def _arange(c: Site) -> Step | None:
    start, step = c.get("start", 0), c.get("step", 1)
    if not is_number(start) or not is_number(step):
        return None
    end = c.get("end")
    return Step(K.ARANGE, [end] if isinstance(end, fx.Node) else [], {"start": start, "step": step})


def _ndim(c: Site) -> Step | None:
    rank = c.rank()
    return None if rank is None else Step(K.FULL, [], {"value": rank})


def _random(c: Site) -> Step:
    return Step(K.RANDOM, [c.args[name] for name in ("input", "p") if isinstance(c.get(name), fx.Node)])


def _extent(c: Site) -> Step:
    dim = c.get("dim", c.get("other"))
    return Step(K.SHAPE, [c["input"]], {} if dim is None else {"axis": c.axis(dim)})


_UNARY = {
    "neg": K.NEG,
    "abs": K.ABS,
    "exp": K.EXP,
    "log": K.LOG,
    "sqrt": K.SQRT,
    "rsqrt": K.RSQRT,
    "reciprocal": K.RECIPROCAL,
    "erf": K.ERF,
    "sin": K.SIN,
    "cos": K.COS,
    "floor": K.FLOOR,
    "ceil": K.CEIL,
    "round": K.ROUND,
    "sign": K.SIGN,
    "isnan": K.IS_NAN,
    "logical_not": K.LOGICAL_NOT,
    "relu": K.RELU,
    "silu": K.SILU,
    "sigmoid": K.SIGMOID,
    "tanh": K.TANH,
    "hardsigmoid": K.HARDSIGMOID,
    "hardswish": K.HARDSWISH,
    "mish": K.MISH,
}
_BINARY = {
    "mul": K.MUL,
    "maximum": K.MAXIMUM,
    "minimum": K.MINIMUM,
    "remainder": K.MOD,
    "eq": K.EQUAL,
    "ne": K.NOT_EQUAL,
    "lt": K.LESS,
    "le": K.LESS_EQUAL,
    "gt": K.GREATER,
    "ge": K.GREATER_EQUAL,
    "logical_and": K.LOGICAL_AND,
    "logical_or": K.LOGICAL_OR,
}
_RANDOM_NAMES = ("rand", "randn", "randint", "rand_like", "randn_like", "bernoulli", "randperm", "normal", "uniform")

MATH_RULES: dict[str, Rule] = {
    **{name: _unary(kind) for name, kind in _UNARY.items()},
    **{name: _binary(kind) for name, kind in _BINARY.items()},
    **dict.fromkeys(_RANDOM_NAMES, _random),
    "add": _add,
    "sub": _sub,
    "rsub": _rsub,
    "addcmul": _addc(K.MUL),
    "addcdiv": _addc(K.DIV),
    "lerp": _lerp,
    "div": _div,
    "floor_divide": _floor_divide,
    "pow": _pow,
    "square": _square,
    "masked_fill": _masked_fill,
    "where": lambda c: Step(K.WHERE, [c["condition"], c["input"], c["other"]]) if "other" in c.args else None,
    **dict.fromkeys(("bitwise_and", "__and__"), _logical(K.LOGICAL_AND)),
    **dict.fromkeys(("bitwise_or", "__or__"), _logical(K.LOGICAL_OR)),
    "bitwise_not": _logical(K.LOGICAL_NOT),
    "relu6": lambda c: Step(K.CLIP, [c["input"]], {"min": 0.0, "max": 6.0}),
    "hardtanh": _clip("min_val", "max_val"),
    "clamp": _clip("min", "max"),
    "clamp_min": _clip("min", ""),
    "clamp_max": _clip("", "max"),
    "leaky_relu": lambda c: Step(K.LEAKY_RELU, [c["input"]], {"slope": float(c.get("negative_slope", 0.01))}),
    "prelu": lambda c: Step(K.PRELU, [c["input"], c["weight"]]),
    "elu": _elu,
    "gelu": _gelu,
    "glu": _glu,
    "softplus": _softplus,
    **dict.fromkeys(("dropout", "feature_dropout", "alpha_dropout", "dropout1d", "dropout2d", "dropout3d"), _dropout),
    **dict.fromkeys(("softmax", "_softmax"), _softmax(log=False)),
    **dict.fromkeys(("log_softmax", "_log_softmax"), _softmax(log=True)),
    **dict.fromkeys(("zeros", "zeros_like", "new_zeros", "zero"), _full(0)),
    **dict.fromkeys(("ones", "ones_like", "new_ones"), _full(1)),
    **dict.fromkeys(("full", "full_like", "new_full", "scalar_tensor"), _full(None)),
    "stochastic_depth": _stochastic_depth,
    "arange": _arange,
    "quantize_per_tensor": _quantised(K.QUANTIZE, "scale", "zero_point"),
    "dequantize_per_tensor": _quantised(K.DEQUANTIZE, "scale", "zero_point"),
    "quantize_per_channel": _quantised(K.QUANTIZE, "scales", "zero_points"),
    "dequantize_per_channel": _quantised(K.DEQUANTIZE, "scales", "zero_points"),
    "ndim": _ndim,
    **dict.fromkeys(("sym_size", "size"), _extent),
}
