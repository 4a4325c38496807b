"""Fused kinds as model-local functions: a call that says what was fused, over a body of standard operators.

A runtime that knows nothing of rescompile inlines the body. One function serves every call of the same structure
(which operands are there, which activations); numbers travel as attributes of the call that the body refers to, and
where an operator of the model's opset cannot refer to one, as part of the function's name.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import onnx_ir as ir

from rescompile.fused import expand
from rescompile.graph import Attrs, Shape, ValueType
from rescompile.kinds import OpKind
from rescompile.onnx_build import Builder, Ref, Request
from rescompile.onnx_emit import write
from rescompile.onnx_ops import FUNCTION_DOMAIN, Arg, Reading, Step
from rescompile.onnx_site import Site

OLDEST_IR = 8  # the first IR version with functions in a model

_STEMS = {OpKind.FUSED_CONV: "FusedConv", OpKind.FUSED_LINEAR: "FusedLinear", OpKind.ADD_NORM: "AddNorm"}
_KINDS = {stem: kind for kind, stem in _STEMS.items()}
_TUPLES = ("stride", "pads", "dilation")
_OUTPUTS = {OpKind.ADD_NORM: ("y", "sum")}
# Attributes that decide what the body looks like; all others are numbers that the body refers to.
_STRUCTURE = ("inner", "outer", "norm", "transpose_weight")

# Which function a request of this kind, operand types and attributes got: a network asks for few, and for each often.
Known: TypeAlias = dict[tuple[OpKind, tuple[tuple[Shape | None, str | None] | None, ...], str], ir.OperatorIdentifier]


def call(model: ir.Model, b: Builder, r: Request, known: Known) -> list[ir.Value]:
    """A call of the function for this request, which is made where the model does not have it yet."""
    attrs = {name: r.attr(name) for name in r.kind.spec.attrs}
    types = tuple(None if arg is None else (arg.shape, arg.dtype) for arg in r.args)
    request = (r.kind, types, repr(attrs))
    key = known.get(request)
    if key is None or key not in model.functions:
        function = _function(b.opset, r, attrs)
        key = known[request] = function.identifier()
        if key not in model.functions:
            model.functions[key] = function
    model.opset_imports[FUNCTION_DOMAIN] = 1
    model.ir_version = max(model.ir_version, OLDEST_IR)
    present = [arg for arg in r.args if arg is not None]
    return b.many(key[1], present, r.kind.spec.outputs, FUNCTION_DOMAIN, **attrs)


def _function(opset: int, r: Request, attrs: Attrs) -> ir.Function:
    body = Builder(opset)
    names = [operand.rstrip("?") for operand in r.kind.spec.operands]
    args: list[Arg | None] = []
    inputs: list[ir.Value] = []
    for name, given in zip(names, (*r.args, *[None] * (len(names) - len(r.args))), strict=True):
        if given is None:
            args.append(None)
            continue
        inputs.append(ir.Value(name=name))
        args.append(Arg(inputs[-1], given.shape, given.dtype))
    referred = {name: value if name in _STRUCTURE else Ref(name, value) for name, value in attrs.items()}

    def emit(kind: OpKind, operands: Any, values: Attrs, /) -> Arg:
        first = next(operand for operand in operands if operand is not None)
        shape = None if first.shape is None else tuple(f"d{axis}" for axis in range(len(first.shape)))
        if kind in (OpKind.ADD, *_ACTIVATIONS):
            shape = first.shape
        kept = ValueType(shape, first.dtype)
        return Arg(write(body, Request(kind, operands, values, [kept]))[0], shape, first.dtype)

    results = expand(r.kind, args, referred, emit)
    for name, result in zip(_OUTPUTS.get(r.kind, ("y",)), results, strict=True):
        result.value.name = name
    graph = ir.Graph(
        inputs, [result.value for result in results], nodes=body.nodes, opset_imports={"": opset}, name="body"
    )
    first = r.arg(0)
    label = "_".join(_label(r, attrs, body, first))
    declared = [ir.Attr(name, ir.AttributeType.UNDEFINED, None) for name in attrs]
    return ir.Function(FUNCTION_DOMAIN, label, graph=graph, attributes=declared)


_ACTIVATIONS = tuple(kind for kind in OpKind if kind.name in ("RELU", "CLIP", "GELU", "SILU", "SIGMOID", "TANH"))


def _label(r: Request, attrs: Attrs, body: Builder, first: Arg) -> list[str]:
    parts = [_STEMS[r.kind]]
    if r.kind is OpKind.ADD_NORM:
        parts += [attrs["norm"], *(name for name, arg in zip(("weight", "bias"), r.args[2:], strict=False) if arg)]
    else:
        parts += ["bias"] if r.maybe(2) is not None else []
        parts += [attrs["inner"]] if attrs["inner"] != "none" else []
        parts += ["add"] if r.maybe(3) is not None else []
        parts += [attrs["outer"]] if attrs["outer"] != "none" else []
    if attrs.get("transpose_weight"):
        parts.append("transposed")
    gemm = any(node.op_type == "Gemm" for node in body.nodes)
    parts += ["rows"] if gemm else []
    parts += [f"{name}{_spelled(value)}" for name, value in sorted(body.baked.items()) if name not in _STRUCTURE]
    if body.typed and first.dtype not in (None, "float32"):
        parts.append(str(first.dtype))
    return parts


def _spelled(value: Any) -> str:
    text = "x".join(str(item) for item in value) if isinstance(value, (tuple, list)) else repr(value)
    return text.replace("-", "m").replace(".", "p").replace("+", "")


def read_call(s: Site, function: ir.Function) -> Reading:
    """A call of one of rescompile's own functions, back as the kind that it stands for."""
    kind = _KINDS.get(function.name.split("_")[0])
    if function.domain != FUNCTION_DOMAIN or kind is None:
        return f"it calls the model's function {function.domain}::{function.name}"
    given = {parameter.name: s.input(index) for index, parameter in enumerate(function.inputs)}
    inputs = [given.get(operand.rstrip("?")) for operand in kind.spec.operands]
    attrs: Attrs = {}
    for name, default in kind.spec.attrs.items():
        value = s.attr(name)
        if value is not None:
            attrs[name] = bool(value) if isinstance(default, bool) else tuple(value) if name in _TUPLES else value
    return Step(kind, inputs, attrs, tuple(range(kind.spec.outputs)))
