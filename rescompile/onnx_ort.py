"""Fused operations as ONNX Runtime's own operators (domain com.microsoft), where one of them computes just that.

What is matched is the program that a fused operation stands for, so that the same sum and norm become one operator
whichever kind holds them. ONNX Runtime's kernels take some ranks, element types and activations only; a program that
goes beyond them has a reason, and stays a function of the model. (ContribOperators.md, version 1; the kernels of
ONNX Runtime 1.30 and 1.31 on the CPU.)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import onnx_ir as ir

from rescompile.fused import program
from rescompile.fused_region import Step, step_types
from rescompile.graph import Attrs, ValueType
from rescompile.kinds import OpKind as K
from rescompile.kinds import Trait
from rescompile.onnx_build import Builder, Request
from rescompile.onnx_ops import CONTRIB_DOMAIN, Arg, is_static


@dataclass(frozen=True, slots=True)
class Ones:
    """An operand of ones, for an operator that cannot go without it."""

    extent: int
    dtype: str | None


@dataclass(frozen=True, slots=True)
class Call:
    """A node. `outputs`: for each output of the fused operation, which of the operator's it is."""

    op_type: str
    inputs: Sequence[Arg | Ones | None]
    attrs: Attrs = field(default_factory=dict)
    outputs: tuple[int, ...] = (0,)


def write(b: Builder, r: Request) -> list[ir.Value] | None:
    """The operation's outputs, computed by one of ONNX Runtime's operators; None where it has none."""
    call = match(r)
    if isinstance(call, str):
        return None
    inputs = [b.filled(1.0, (item.extent,), item.dtype) if isinstance(item, Ones) else item for item in call.inputs]
    values = b.many(call.op_type, inputs, max(call.outputs) + 1, CONTRIB_DOMAIN, **call.attrs)
    for index, value in enumerate(values):
        if index not in call.outputs:
            value.name = ""
        elif index:
            b.optional.append(value)
    return [values[index] for index in call.outputs]


def missing(r: Request) -> str:
    """Why ONNX Runtime has no operator for it; empty where it has one."""
    call = match(r)
    return call if isinstance(call, str) else ""


def match(r: Request) -> Call | str:
    """The operator that computes what a fused operation stands for, or why there is none."""
    p = Program(r)
    rule = next((rule for kind, rule in _RULES.items() if any(step.kind is kind for step in p.steps)), None)
    if rule is None:
        return f"ONNX Runtime has no operator for {p.told()}"
    return rule(p)


class Program:
    """The steps of a fused operation. Values are numbered: the operands, then what each step makes."""

    def __init__(self, r: Request) -> None:
        region = program(r.kind, r.args, r.attrs)
        operands = [None if arg is None else ValueType(arg.shape, arg.dtype) for arg in r.args]
        self.args = list(r.args)
        self.steps = region.steps
        self.outputs = region.outputs
        made = step_types(region, operands, r.outputs)
        self._types = [*(kind or ValueType(None, None) for kind in operands), *made]
        self._readers: dict[int, list[Step]] = {}
        for step in self.steps:
            for value in step.inputs:
                if value is not None:
                    self._readers.setdefault(value, []).append(step)

    def told(self) -> str:
        """The kinds of the steps, in order."""
        return " + ".join(step.kind.value for step in self.work())

    def work(self) -> list[Step]:
        """The steps that are no numbers."""
        return [step for step in self.steps if step.kind is not K.FULL]

    def the(self, *kinds: K) -> Step:
        """The first step of one of the kinds."""
        return next(step for step in self.steps if step.kind in kinds)

    def place(self, step: Step) -> int:
        """The value that a step makes."""
        return len(self.args) + next(index for index, other in enumerate(self.steps) if other is step)

    def maker(self, value: int) -> Step | None:
        """The step that makes a value; None for an operand."""
        return self.steps[value - len(self.args)] if value >= len(self.args) else None

    def type(self, value: int) -> ValueType:
        """Type of a value."""
        return self._types[value]

    def arg(self, value: int | None) -> Arg | None:
        """An operand; None for what is absent, or made by a step."""
        return self.args[value] if value is not None and value < len(self.args) else None

    def number(self, value: int | None) -> float | None:
        """The number that a step without operands makes."""
        step = None if value is None else self.maker(value)
        return float(step.attrs["value"]) if step is not None and step.kind is K.FULL else None

    def attr(self, step: Step, name: str) -> object:
        """An attribute of a step, by the kind's default where it is not set."""
        return step.attrs.get(name, step.kind.spec.attrs.get(name))

    def after(self, step: Step) -> Step | None:
        """The one step that reads what a step makes, None where others read it too or it is returned."""
        place = self.place(step)
        readers = self._readers.get(place, [])
        return readers[0] if len(readers) == 1 and place not in self.outputs else None

    def chain(self, step: Step) -> list[Step] | None:
        """The steps behind a step, each the only reader of the one before, when no others are there."""
        found = [step]
        while (following := self.after(found[-1])) is not None:
            found.append(following)
        return found[1:] if len(found) == len(self.work()) and self.outputs == (self.place(found[-1]),) else None


Rule: TypeAlias = Callable[[Program], "Call | str"]


def _plain_sum(p: Program, step: Step | None) -> bool:
    return (
        step is not None
        and step.kind is K.ADD
        and len(step.inputs) > 1
        and not any(scale != 1 for scale in tuple(step.attrs.get("scales", ())))
    )


def _wrong_dtype(op_type: str, dtype: str | None, known: Sequence[str]) -> str:
    if dtype in known:
        return ""
    kernels = f"{', '.join(known[:-1])} and {known[-1]}" if len(known) > 1 else f"{known[0]} only"
    return f"ONNX Runtime's {op_type} has kernels for {kernels}, and it is {dtype or 'of unknown type'}"


# ---- sums and norms --------------------------------------------------------------------------------------------------

_SKIP_NORMS = {K.LAYER_NORM: "SkipLayerNormalization", K.RMS_NORM: "SkipSimplifiedLayerNormalization"}


def _skip_norm(p: Program) -> Call | str:
    """s = x + skip + bias; y = N(s)  →  y, _, _, s = SkipLayerNormalization(x, skip, weight, shift, bias)

    1. N is over the last axis; x is [B, S, H] or [T, H]; weight, shift and bias are [H].
    2. skip has the shape of x, or beside [B, S, H] is [1, S, H] or [S, H].
    """
    norm = p.the(*_SKIP_NORMS)
    op_type = _SKIP_NORMS[norm.kind]
    others = [step for step in p.work() if step is not norm]
    source = norm.inputs[0]
    if source is None or any(not _plain_sum(p, step) for step in others) or not others:
        return f"ONNX Runtime's {op_type} adds and normalises only, and this is {p.told()}"
    total = p.type(source)
    if total.shape is None:
        return "its rank is unknown"
    rank, hidden = len(total.shape), total.shape[-1] if total.shape else None
    if rank not in (2, 3):
        return f"ONNX Runtime's {op_type} takes 2 or 3 dimensions, and the sum has {rank}"
    axis = p.attr(norm, "axis")
    if not isinstance(axis, int) or axis % rank != rank - 1:
        return f"ONNX Runtime's {op_type} normalises the last axis, and this norm more than that"
    wrong = _wrong_dtype(op_type, total.dtype, ("float32", "float16", "bfloat16"))
    if wrong:
        return wrong
    terms = _terms(p, source, len(others))
    if terms is None or any(p.arg(term) is None for term in terms):
        return f"ONNX Runtime's {op_type} takes one sum of two values and a bias, and this is {p.told()}"
    streams = _streams(p, terms, rank)
    vectors = [term for term in terms if term not in streams and p.type(term).shape == (hidden,)]
    if len(streams) != 2 or len(vectors) > 1 or len(streams) + len(vectors) != len(terms):
        return f"ONNX Runtime's {op_type} takes one sum of two values and a bias, which these shapes are not"
    weight, shift = [*norm.inputs[1:], None, None][:2]
    affine: list[Arg | Ones | None] = []
    for value in (weight, shift):
        arg = p.arg(value)
        if (arg is None) != (value is None) or (arg is not None and arg.shape != (hidden,)):
            return f"ONNX Runtime's {op_type} takes a scale and a shift of shape [{hidden}]"
        if arg is not None and arg.dtype != total.dtype:
            return f"ONNX Runtime's {op_type} takes one element type, and the norm's scale has another than the sum"
        affine.append(arg)
    if affine[0] is None:
        if not isinstance(hidden, int):
            return f"ONNX Runtime's {op_type} takes a scale, and of how many elements is unknown"
        affine[0] = Ones(hidden, total.dtype)
    bias = p.arg(vectors[0]) if vectors else None
    ends = {p.place(norm): 0, source: 3}
    if any(value not in ends for value in p.outputs):
        return f"ONNX Runtime's {op_type} returns the norm and the whole sum, and this returns another value"
    operands = [*(p.arg(term) for term in streams), *(affine if norm.kind is K.LAYER_NORM else affine[:1]), bias]
    return Call(op_type, operands, {"epsilon": p.attr(norm, "eps")}, tuple(ends[value] for value in p.outputs))


def _streams(p: Program, terms: Sequence[int], rank: int) -> list[int]:
    """The terms that have the sum's shape, whatever its extents are called, and those that are broadcast to it."""
    for first in terms:
        shape = p.type(first).shape
        if shape is None or len(shape) != rank:
            continue
        narrow = ((1, *shape[1:]), shape[1:]) if rank == 3 else ()
        wide = [term for term in terms if p.type(term).shape == shape]
        found = [*wide, *(term for term in terms if p.type(term).shape in narrow and term not in wide)]
        if len(found) > 1:
            return found
    return []


def _terms(p: Program, total: int, count: int) -> list[int] | None:
    """The operands of nested sums, which are so many and of which only the outermost one is read from outside."""
    terms: list[int] = []
    pending, seen = [total], 0
    while pending:
        value = pending.pop(0)
        step = p.maker(value)
        if step is None or step.kind is not K.ADD:
            terms.append(value)
            continue
        if value != total and p.after(step) is None:
            return None
        seen += 1
        pending = [*(item for item in step.inputs if item is not None), *pending]
    return terms if seen == count else None


# ---- products with an epilogue ---------------------------------------------------------------------------------------


def _activation(p: Program, step: Step) -> Attrs | None:
    """As attributes of a fused convolution; None for an activation that it does not have."""
    name = {K.RELU: "Relu", K.SIGMOID: "Sigmoid", K.TANH: "Tanh"}.get(step.kind)
    if name is not None:
        return {"activation": name}
    names = {K.CLIP: ("Clip", "min", "max"), K.LEAKY_RELU: ("LeakyRelu", "slope"),
             K.HARDSIGMOID: ("HardSigmoid", "alpha", "beta")}  # fmt: skip
    if step.kind not in names:
        return None
    name, *keys = names[step.kind]
    numbers = [p.attr(step, key) for key in keys]
    bounds = [-_LARGEST, _LARGEST] if name == "Clip" else [0.0, 0.0]
    given = [default if number is None else number for number, default in zip(numbers, bounds, strict=False)]
    return {"activation": name, "activation_params": tuple(float(str(number)) for number in given)}


_LARGEST = 3.4028234663852886e38


def _epilogue(p: Program, work: Step, op_type: str) -> tuple[Arg | None, Step | None] | str:
    """The skip that is added and the activation behind that, of a product that nothing else is behind."""
    chain = p.chain(work)
    if chain is None:
        return f"ONNX Runtime's {op_type} is one product, what is added to it and an activation, and this is {p.told()}"
    before = work
    skip: Arg | None = None
    if len(chain) > 1 and chain[0].kind.has(Trait.ACTIVATION) and chain[1].kind is K.ADD:
        return f"its activation comes before the addition, and ONNX Runtime's {op_type} adds before it activates"
    if chain and _plain_sum(p, chain[0]) and len(chain[0].inputs) == 2:
        place = p.place(work)
        other = next((value for value in chain[0].inputs if value != place), None)
        skip = p.arg(other)
        if skip is None or skip.shape is None or skip.shape != p.type(p.place(chain[0])).shape:
            return f"ONNX Runtime's {op_type} adds a tensor of its own result's shape, and this skip is broadcast"
        before, chain = chain[0], chain[1:]
    if len(chain) > 1 or (chain and not chain[0].kind.has(Trait.ACTIVATION)):
        return f"ONNX Runtime's {op_type} is one product, what is added to it and an activation, and this is {p.told()}"
    return (skip, chain[0] if chain else None) if before is not work or chain else f"{op_type} would fuse nothing"


def _conv(p: Program) -> Call | str:
    """y = f(conv(x, w, b) + z)  →  FusedConv(x, w, b, z), the addition before the activation"""
    conv = p.the(K.CONV)
    found = _epilogue(p, conv, "FusedConv")
    if isinstance(found, str):
        return found
    skip, activation = found
    attrs: Attrs = {} if activation is None else _activation(p, activation) or {}
    if activation is not None and not attrs:
        return f"ONNX Runtime's FusedConv has no {activation.kind.value}"
    x, weight, bias = (p.arg(value) for value in [*conv.inputs, None][:3])
    if x is None or weight is None or (bias is None and len(conv.inputs) > 2 and conv.inputs[2] is not None):
        return f"ONNX Runtime's FusedConv is one product, and this is {p.told()}"
    wrong = _wrong_dtype("FusedConv", x.dtype, ("float32",))
    if wrong:
        return wrong
    names = {"strides": "stride", "pads": "pads", "dilations": "dilation", "group": "groups"}
    attrs = {**attrs, **{theirs: p.attr(conv, ours) for theirs, ours in names.items()}}
    if weight.shape is not None and is_static(weight.shape):
        attrs["kernel_shape"] = weight.shape[2:]
    return Call("FusedConv", [x, weight, bias, skip], attrs)


def _gemm(p: Program) -> Call | str:
    """y = f(x·W + c)  →  FusedGemm(x, W, c), c the bias or the skip"""
    linear = p.the(K.LINEAR)
    found = _epilogue(p, linear, "FusedGemm")
    if isinstance(found, str):
        return found
    skip, activation = found
    x, weight, bias = (p.arg(value) for value in [*linear.inputs, None][:3])
    if x is None or weight is None:
        return f"ONNX Runtime's FusedGemm is one product, and this is {p.told()}"
    if x.rank != 2:
        return f"ONNX Runtime's FusedGemm multiplies matrices, and the input has {x.rank or 'unknown'} dimensions"
    wrong = _wrong_dtype("FusedGemm", x.dtype, ("float32",))
    if wrong:
        return wrong
    name = None if activation is None else {K.RELU: "Relu", K.SIGMOID: "Sigmoid", K.TANH: "Tanh"}.get(activation.kind)
    if name is None:
        what = "no activation" if activation is None else activation.kind.value
        return f"ONNX Runtime's FusedGemm activates by relu, sigmoid or tanh, and this has {what}"
    if skip is not None and bias is not None:
        return "ONNX Runtime's FusedGemm adds one tensor, and here are a bias and a skip"
    turned = int(bool(p.attr(linear, "transpose_weight")))
    return Call("FusedGemm", [x, weight, bias or skip], {"activation": name, "transB": turned})


def _matmul(p: Program) -> Call | str:
    """y = α·A'·B'  →  FusedMatMul(A, B), either with its last two axes swapped"""
    product = p.the(K.MATMUL)
    operands: list[Arg | None] = []
    attrs: Attrs = {}
    taken = 1
    for side, value in zip("AB", product.inputs, strict=True):
        step = None if value is None else p.maker(value)
        if step is not None and step.kind is K.PERMUTE and _swaps(step) and p.after(step) is product:
            attrs[f"trans{side}"] = 1
            value, taken = step.inputs[0], taken + 1
        operands.append(p.arg(value))
    scaled = p.after(product)
    if scaled is not None:
        factor = _factor(p, scaled, p.place(product))
        if factor is None:
            return f"ONNX Runtime's FusedMatMul scales a product by a number, and this is {p.told()}"
        attrs["alpha"], taken = factor, taken + 1
    last = product if scaled is None else scaled
    if None in operands or taken != len(p.work()) or p.outputs != (p.place(last),):
        return f"ONNX Runtime's FusedMatMul is one product of values, and this is {p.told()}"
    wrong = _wrong_dtype("FusedMatMul", p.type(p.place(product)).dtype, ("float32",))
    return wrong or Call("FusedMatMul", operands, attrs)


def _swaps(step: Step) -> bool:
    perm: tuple[int, ...] = tuple(step.attrs.get("perm", ()))
    rank = len(perm)
    return rank > 1 and perm == (*range(rank - 2), rank - 1, rank - 2)


def _factor(p: Program, step: Step, of: int) -> float | None:
    """The number that a step multiplies a value by."""
    if step.kind is K.ADD and len(step.inputs) == 1:
        return float((*step.attrs.get("scales", ()), 1.0)[0])
    if step.kind is K.MUL:
        return p.number(next((value for value in step.inputs if value != of), None))
    divisor = p.number(step.inputs[1]) if step.kind is K.DIV and step.inputs[0] == of else None
    return 1.0 / divisor if divisor else None


# ---- activations -----------------------------------------------------------------------------------------------------


def _gelu(p: Program) -> Call | str:
    """y = gelu(x + b)  →  BiasGelu(x, b), or FastGelu where gelu is by the tangent; b: [H]"""
    gelu = p.the(K.GELU)
    op_type = "FastGelu" if p.attr(gelu, "approximate") == "tanh" else "BiasGelu"
    total = None if gelu.inputs[0] is None else p.maker(gelu.inputs[0])
    if total is None or not _plain_sum(p, total) or len(total.inputs) != 2 or p.chain(total) != [gelu]:
        return f"ONNX Runtime's {op_type} is a gelu of a sum with a bias, and this is {p.told()}"
    shape = p.type(p.place(total)).shape
    values = [value for value in total.inputs if value is not None]
    bias = next((value for value in values if shape and p.type(value).shape == (shape[-1],)), None)
    other = next((value for value in values if value != bias and p.type(value).shape == shape), None)
    x, b = p.arg(other), p.arg(bias)
    if x is None or b is None or shape is None or len(shape) < 2:
        return f"ONNX Runtime's {op_type} takes a bias along the last axis, and this sum is of other shapes"
    return _wrong_dtype(op_type, x.dtype, ("float32",)) or Call(op_type, [x, b])


def _quick_gelu(p: Program) -> Call | str:
    """y = x·sigmoid(α·x)  →  QuickGelu(x)"""
    sigmoid = p.the(K.SIGMOID)
    refused = f"ONNX Runtime has no operator for {p.told()}"
    inner = sigmoid.inputs[0]
    scaled = None if inner is None else p.maker(inner)
    alpha, x, taken = 1.0, inner, 2
    if scaled is not None:
        x = next((value for value in scaled.inputs if value is not None and p.number(value) is None), None)
        factor = None if x is None else _factor(p, scaled, x)
        if factor is None or p.after(scaled) is not sigmoid:
            return refused
        alpha, taken = factor, 3
    product = p.after(sigmoid)
    arg = p.arg(x)
    if product is None or product.kind is not K.MUL or x not in product.inputs or arg is None:
        return refused
    if taken != len(p.work()) or p.outputs != (p.place(product),):
        return refused
    return _wrong_dtype("QuickGelu", arg.dtype, ("float32",)) or Call("QuickGelu", [arg], {"alpha": alpha})


# The first kind that a program has says which operators it may be.
_RULES: dict[K, Rule] = {
    K.LAYER_NORM: _skip_norm,
    K.RMS_NORM: _skip_norm,
    K.CONV: _conv,
    K.LINEAR: _gemm,
    K.MATMUL: _matmul,
    K.GELU: _gelu,
    K.SIGMOID: _quick_gelu,
}
