"""Fused kinds as model-local functions: a call that says what was fused, over a body of standard operators.

A runtime that knows nothing of rescompile inlines the body. One function serves every call of the same structure
(which operands are there, which activations); numbers travel as attributes of the call that the body refers to, and
where an operator of the model's opset cannot refer to one, as part of the function's name.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any, TypeAlias

import onnx_ir as ir

from rescompile.errors import GraphError
from rescompile.fused import expand, program
from rescompile.fused_region import parse, step_types
from rescompile.graph import Attrs, ValueType
from rescompile.kinds import OpKind
from rescompile.onnx_build import Builder, Ref, Request
from rescompile.onnx_emit import write
from rescompile.onnx_ops import FUNCTION_DOMAIN, Arg, Reading, Step
from rescompile.onnx_site import Site

OLDEST_IR = 8  # the first IR version with functions in a model

_STEMS = {
    OpKind.FUSED_CONV: "FusedConv",
    OpKind.FUSED_LINEAR: "FusedLinear",
    OpKind.ADD_NORM: "AddNorm",
    OpKind.FUSED_REGION: "FusedRegion",
}
_KINDS = {stem: kind for kind, stem in _STEMS.items()}
_TUPLES = ("stride", "pads", "dilation")
_OUTPUTS = {OpKind.ADD_NORM: ("y", "sum")}
# Attributes that decide what the body looks like; all others are numbers that the body refers to.
_STRUCTURE = ("inner", "outer", "norm", "transpose_weight", "label", "steps")

# Which function a request of this kind, operand types and attributes got: a network asks for few, and for each often.
Known: TypeAlias = dict[tuple[OpKind, tuple[ValueType | None, ...], tuple[ValueType, ...], str], ir.OperatorIdentifier]


def call(model: ir.Model, b: Builder, r: Request, known: Known) -> list[ir.Value]:
    """A call of the function for this request, which is made where the model does not have it yet."""
    attrs = {name: r.attr(name) for name in r.kind.spec.attrs}
    operands = tuple(None if arg is None else ValueType(arg.shape, arg.dtype) for arg in r.args)
    request = (r.kind, operands, tuple(r.outputs), repr(attrs))
    key = known.get(request)
    if key is None or key not in model.functions:
        function = _function(b.opset, r, attrs)
        key = known[request] = function.identifier()
        if key not in model.functions:
            model.functions[key] = function
    model.opset_imports[FUNCTION_DOMAIN] = 1
    model.ir_version = max(model.ir_version, OLDEST_IR)
    present = [arg for arg in r.args if arg is not None]
    return b.many(key[1], present, len(r.outputs), FUNCTION_DOMAIN, **attrs)


def _function(opset: int, r: Request, attrs: Attrs) -> ir.Function:
    body = Builder(opset)
    names = _operand_names(r.kind, len(r.args))
    given = [*r.args, *[None] * (len(names) - len(r.args))]
    args: list[Arg | None] = []
    inputs: list[ir.Value] = []
    for name, arg in zip(names, given, strict=True):
        if arg is None:
            args.append(None)
            continue
        inputs.append(ir.Value(name=name))
        args.append(Arg(inputs[-1], arg.shape, arg.dtype))
    referred = {name: value if name in _STRUCTURE else Ref(name, value) for name, value in attrs.items()}
    operands = [None if arg is None else ValueType(arg.shape, arg.dtype) for arg in args]
    types = step_types(program(r.kind, args, attrs), operands, r.outputs)
    if r.kind is not OpKind.FUSED_REGION:  # whose name tells its body apart: others serve values of every extent
        types = [_open(type_) for type_ in types]
    pending = iter(types)

    def emit(kind: OpKind, operands: Any, values: Attrs, /) -> Arg:
        made = next(pending)
        if kind is OpKind.FULL:
            return Arg(body.like(values["value"], values["dtype"]), (), made.dtype)
        return Arg(write(body, Request(kind, operands, values, [made]))[0], made.shape, made.dtype)

    results = [result.value for result in expand(r.kind, args, referred, emit)]
    for index, value in enumerate(results):
        if value in (*inputs, *results[:index]):  # ONNX returns neither an input nor a value twice
            results[index] = body.node("Identity", [value])
    digest = _digest(body, results)
    for name, value in zip(_output_names(r.kind, len(results)), results, strict=True):
        value.name = name
    graph = ir.Graph(inputs, results, nodes=body.nodes, opset_imports={"": opset}, name="body")
    label = "_".join(_label(r, attrs, body, r.arg(0), digest))
    declared = [ir.Attr(name, ir.AttributeType.UNDEFINED, None) for name in attrs]
    return ir.Function(FUNCTION_DOMAIN, label, graph=graph, attributes=declared)


def _open(type_: ValueType) -> ValueType:
    shape = None if type_.shape is None else tuple(f"d{axis}" for axis in range(len(type_.shape)))
    return ValueType(shape, type_.dtype)


def _operand_names(kind: OpKind, count: int) -> list[str]:
    if kind is OpKind.FUSED_REGION:
        return [f"x{index}" for index in range(count)]
    return [operand.rstrip("?") for operand in kind.spec.operands]


def _output_names(kind: OpKind, count: int) -> list[str]:
    named = _OUTPUTS.get(kind, ("y",))
    return list(named) if count == len(named) else [f"y{index}" for index in range(count)]


def _digest(body: Builder, results: Sequence[ir.Value]) -> str:
    """A few characters that tell two bodies apart: their nodes, with what each reads, and what is returned, by the node
    that made it."""
    places: dict[ir.Value, str] = {}
    lines = []
    for number, node in enumerate(body.nodes):
        read = [None if value is None else places.get(value, value.name) for value in node.inputs]
        lines.append(f"{node.domain}.{node.op_type}{read}{sorted(map(_told, node.attributes.values()))}")
        places.update((value, f"{number}.{index}") for index, value in enumerate(node.outputs))
    lines.append(f"{[places[value] for value in results]}")
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:8]


def _told(attribute: ir.Attr) -> str:
    value = attribute.value
    if attribute.type is ir.AttributeType.TENSOR:
        value = (str(value.dtype), value.numpy().tolist())
    return f"{attribute.name}={value}"


def _label(r: Request, attrs: Attrs, body: Builder, first: Arg, digest: str) -> list[str]:
    if r.kind is OpKind.FUSED_REGION:
        return [_STEMS[r.kind], attrs["label"], digest]
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
    inputs = [given.get(name) for name in _operand_names(kind, len(function.inputs))]
    attrs: Attrs = {}
    for name, default in kind.spec.attrs.items():
        value = s.attr(name)
        if value is not None:
            attrs[name] = bool(value) if isinstance(default, bool) else tuple(value) if name in _TUPLES else value
    if kind is OpKind.FUSED_REGION:
        try:
            region = parse(attrs.get("steps", ""))
        except GraphError as error:
            return str(error)
        if region.operands != len(inputs) or len(region.outputs) != len(function.outputs):
            return "its program does not fit its operands"
    return Step(kind, inputs, attrs, tuple(range(len(function.outputs))))
