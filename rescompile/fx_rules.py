"""Rules: what a spelled torch call means, as one or several operations of the vocabulary.

A rule takes the `Site` of a call and gives the `Step` whose output is the call's result, or None when the call has no
kind in the vocabulary. A step's operands may be further steps, so that `addcmul` is an add that reads a mul.
`RULES` holds the ones that compute; `rescompile.fx_rules_shape` those that move elements.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from torch import fx

from rescompile.fx_ops import Attr
from rescompile.fx_types import static_shape
from rescompile.graph import Attrs, Shape, Value, ValueType
from rescompile.kinds import OpKind as K


class Step:
    """One operation to be read. `types`: of its outputs, None for the type of the native node's own result."""

    __slots__ = ("attrs", "inputs", "kind", "native", "suffix", "types")

    def __init__(
        self,
        kind: K,
        inputs: Sequence[Any],
        attrs: Attrs | None = None,
        *,
        suffix: str = "",
        types: Sequence[ValueType] | None = None,
        native: tuple[fx.Node, ...] = (),
    ) -> None:
        self.kind = kind
        self.inputs = inputs
        self.attrs = attrs if attrs is not None else {}
        self.suffix = suffix  # names the output of a step that is not the last
        self.types = types
        self.native = native  # nodes covered besides the one being read


class Lookup(Protocol):
    """Finds the value that an argument stands for."""

    def peek(self, argument: fx.Node | Attr) -> Value | None: ...


class Site:
    """A call in its graph: named arguments, what is known of the operands, and the type of the result."""

    __slots__ = ("args", "lookup", "name", "node", "out", "outs")

    def __init__(
        self, name: str, args: dict[str, Any], node: fx.Node, lookup: Lookup, outs: Sequence[ValueType]
    ) -> None:
        self.name = name
        self.args = args
        self.node = node
        self.lookup = lookup
        self.outs = outs  # one for each result of the native node
        self.out = outs[0] if outs else ValueType(None, None)

    def __getitem__(self, name: str) -> Any:
        return self.args[name]

    def get(self, name: str, default: Any = None) -> Any:
        """An argument, `default` where it is absent."""
        return self.args.get(name, default)

    def value(self, argument: Any) -> Value | None:
        """The value of an argument, None when it is not a tensor."""
        return self.lookup.peek(argument) if isinstance(argument, fx.Node | Attr) else None

    def shape(self, argument: Any = None) -> Shape | None:
        """Shape of an operand (`input` when not given)."""
        value = self.value(self.args["input"] if argument is None else argument)
        return None if value is None else value.shape

    def rank(self, argument: Any = None) -> int | None:
        """Number of dimensions of an operand."""
        shape = self.shape(argument)
        return None if shape is None else len(shape)

    def axis(self, dim: int, argument: Any = None) -> int:
        """A dimension counted from the front where the rank is known."""
        rank = self.rank(argument)
        return dim + rank if dim < 0 and rank is not None else dim

    def axes(self, dims: Any) -> tuple[int, ...]:
        """Dimensions counted from the front; all of them for None and for an empty list."""
        if isinstance(dims, int):
            return (self.axis(dims),)
        if not dims:
            return tuple(range(self.rank() or 0))
        return tuple(self.axis(dim) for dim in dims)

    def retype(self, shape: Shape | None) -> tuple[ValueType]:
        """The result's dtype with another shape, for a step in between."""
        return (ValueType(shape, self.out.dtype),)


# Several steps: the results of a native node that has several.
Rule = Callable[[Site], Step | tuple[Step, ...] | None]


def is_number(argument: Any) -> bool:
    """Whether an argument is a Python number."""
    return isinstance(argument, int | float | bool)


def _unary(kind: K) -> Rule:
    return lambda c: Step(kind, [c["input"]])


def _binary(kind: K) -> Rule:
    return lambda c: Step(kind, [c["input"], c["other"]])


def _scaled(a: Any, b: Any, first: float, second: float) -> Step:
    return Step(K.ADD, [a, b], {} if first == 1 and second == 1 else {"scales": (float(first), float(second))})


def _adds_nothing(c: Site, zero: Any, x: Any) -> bool:
    return is_number(zero) and zero == 0 and c.shape(x) == c.out.shape and _same_dtype(c, x)


def _same_dtype(c: Site, x: Any) -> bool:
    value = c.value(x)
    return value is not None and value.dtype == c.out.dtype


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
        return Step(K.IDENTITY, [c["input"]], {"dropout": float(c["p"])})
    # Dropping whole channels, or to SELU's statistics, is not what DROPOUT means.
    return Step(K.DROPOUT, [c["input"]], {"p": float(c["p"])}) if c.name == "dropout" else None


def _softmax(log: bool) -> Rule:
    def rule(c: Site) -> Step | None:
        if c["dim"] is None:
            return None
        x, attrs = c["input"], {"axis": c.axis(c["dim"]), "log": log}
        if c.get("dtype") is not None and not _same_dtype(c, x):
            x = Step(K.CAST, [x], {"dtype": c.out.dtype}, suffix="cast")
        return Step(K.SOFTMAX, [x], attrs)

    return rule


def _square(c: Site) -> Step:
    return Step(K.MUL, [c["input"], c["input"]])


def _reduction(kind: K) -> Rule:
    def rule(c: Site) -> Step:
        x, dtype = c["input"], c.get("dtype")
        if dtype is not None and not _same_dtype(c, x):
            x = Step(K.CAST, [x], {"dtype": c.out.dtype}, suffix="cast", types=c.retype(c.shape(x)))
        return Step(kind, [x], {"axes": c.axes(c.get("dim")), "keepdims": bool(c.get("keepdim", False))})

    return rule


def _extreme(kind: K, both: K, position: K) -> Rule:
    """max and min: of two tensors, of all elements, or along a dimension (values and indices)"""

    def rule(c: Site) -> Step | tuple[Step, ...] | None:
        if "other" in c.args:
            return Step(both, [c["input"], c["other"]])
        attrs = {"axes": c.axes(c.get("dim")), "keepdims": bool(c.get("keepdim", False))}
        if "dim" not in c.args:
            return Step(kind, [c["input"]], attrs)
        if position is not K.ARGMAX:
            return None
        return (
            Step(kind, [c["input"]], attrs, types=c.outs[:1]),
            Step(position, [c["input"]], dict(attrs), types=c.outs[1:2]),
        )

    return rule


def _spread(c: Site) -> Step | None:
    """var = Σ(x − mean)² / (n − correction)"""
    shape = c.shape()
    axes = c.axes(c.get("dim"))
    known = static_shape(shape)
    correction = c.get("correction", 1 if c.get("unbiased", True) else 0)
    correction = 1 if correction is None else correction
    if shape is None or not is_number(correction):
        return None
    kept = tuple(1 if axis in axes else extent for axis, extent in enumerate(shape))
    mean = Step(K.MEAN, [c["input"]], {"axes": axes, "keepdims": True}, suffix="mean", types=c.retype(kept))
    centred = Step(K.ADD, [c["input"], mean], {"scales": (1.0, -1.0)}, suffix="centred", types=c.retype(shape))
    squared = Step(K.MUL, [centred, centred], suffix="squared", types=c.retype(shape))
    attrs = {"axes": axes, "keepdims": bool(c.get("keepdim", False))}
    if correction == 0:
        return Step(K.MEAN, [squared], attrs)
    if known is None:
        return None
    count = math.prod(known[axis] for axis in axes)
    if count <= correction:
        return None
    return Step(K.MUL, [Step(K.MEAN, [squared], attrs, suffix="mean_squared"), count / (count - correction)])


def _deviation(c: Site) -> Step | None:
    variance = _spread(c)
    if variance is None:
        return None
    variance.suffix = "var"
    return Step(K.SQRT, [variance])


def _vector_norm(c: Site) -> Step | None:
    """√Σx²"""
    order = c.get("ord", c.get("p", 2))
    if not is_number(order) or order != 2 or c.get("dtype") is not None:
        return None
    squared = Step(K.MUL, [c["input"], c["input"]], suffix="squared", types=c.retype(c.shape()))
    attrs = {"axes": c.axes(c.get("dim")), "keepdims": bool(c.get("keepdim", False))}
    return Step(K.SQRT, [Step(K.SUM, [squared], attrs, suffix="sum")])


def _argmax(c: Site) -> Step:
    return Step(K.ARGMAX, [c["input"]], {"axes": c.axes(c.get("dim")), "keepdims": bool(c.get("keepdim", False))})


def _cumsum(c: Site) -> Step:
    return Step(K.CUMSUM, [c["input"]], {"axis": c.axis(c["dim"])})


def _full(value: float | None) -> Rule:
    def rule(c: Site) -> Step | None:
        number = c.get("fill_value", c.get("s", value)) if value is None else value
        return Step(K.FULL, [], {"value": number}) if is_number(number) else None

    return rule


def _arange(c: Site) -> Step | None:
    start, step = c.get("start", 0), c.get("step", 1)
    if not is_number(start) or not is_number(step):
        return None
    end = c.get("end")
    return Step(K.ARANGE, [end] if isinstance(end, fx.Node) else [], {"start": start, "step": step})


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

RULES: dict[str, Rule] = {
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
    "mean": _reduction(K.MEAN),
    "sum": _reduction(K.SUM),
    "amax": _reduction(K.AMAX),
    "amin": _reduction(K.AMIN),
    "prod": _reduction(K.PROD),
    "max": _extreme(K.AMAX, K.MAXIMUM, K.ARGMAX),
    "min": _extreme(K.AMIN, K.MINIMUM, K.OPAQUE),
    "var": _spread,
    "std": _deviation,
    **dict.fromkeys(("linalg_vector_norm", "norm"), _vector_norm),
    "argmax": _argmax,
    "cumsum": _cumsum,
    **dict.fromkeys(("zeros", "zeros_like", "new_zeros"), _full(0)),
    **dict.fromkeys(("ones", "ones_like", "new_ones"), _full(1)),
    **dict.fromkeys(("full", "full_like", "new_full", "scalar_tensor"), _full(None)),
    "arange": _arange,
    **dict.fromkeys(("sym_size", "size"), _extent),
}
