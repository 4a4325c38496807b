"""One printed form for the graphs of every IR, in single static assignment.

```
%0: f32[2,3,8] = input x
%1: f32[2,3,8] = linear %0 f32[8,8] f32[8]   # aten.linear.default fc.weight fc.bias
%2: f32[2,3,8] = add %1 %0                   # aten.add.Tensor
return %2
```

Inputs and results are numbered in order. Parameters stand where they are read, as their type; a literal of one element
as its number; an absent operand as `_`. Attributes appear where they differ from the kind's default. What differs
between IRs, native operators and the names of parameters, is in the comment only: without comments the text of a model
is the same in all of them, which is what golden tests compare. A linear's weight is shown as [out, in] in both layouts.
"""

from __future__ import annotations

from typing import Any

from rescompile.fused_region import Region, parse
from rescompile.graph import Graph, Op, Role, Shape, Value
from rescompile.kinds import OpKind

_SHORT = {
    "float64": "f64",
    "float32": "f32",
    "float16": "f16",
    "bfloat16": "bf16",
    "int64": "i64",
    "int32": "i32",
    "int16": "i16",
    "int8": "i8",
    "uint8": "u8",
}
_COLUMN = 60  # where comments start, unless the line is longer


def print_graph(graph: Graph, *, comments: bool = True) -> str:
    """The whole graph as text, one line for each input and operation."""
    numbers: dict[Value, int] = {}
    lines = []
    for value in graph.inputs:
        numbers[value] = len(numbers)
        lines.append(f"{_defined(value, numbers)} = input {value.name}")
    for op in graph:
        lines.append(_line(graph, op, numbers, comments))
    returned = " ".join(_operand(graph, value, numbers) for value in graph.outputs)
    return "\n".join([*lines, f"return {returned}".rstrip(), ""])


def print_type(shape: Shape | None, dtype: str | None) -> str:
    """`f32[2,3,8]`; symbolic extents by name; `*` for an unknown shape, `?` for an unknown dtype."""
    extents = "*" if shape is None else ",".join(str(extent) for extent in shape)
    return f"{_SHORT.get(dtype or '?', dtype or '?')}[{extents}]"


def native_name(op: Op) -> str:
    """The native operators that an operation covers, in its IR's own spelling; empty for a graph in memory."""
    names = []
    for node in op.native:
        # An ONNX node has an op_type and a domain, a torch.fx node a target; neither library is imported here.
        op_type = getattr(node, "op_type", None)
        if op_type is not None:
            domain = getattr(node, "domain", "")
            names.append(f"{domain}.{op_type}" if domain else str(op_type))
            continue
        target = getattr(node, "target", None)
        if target is not None:
            names.append(target if isinstance(target, str) else _callable_name(target))
    return "+".join(names)


def _callable_name(target: Any) -> str:
    text = str(target)
    return text if not text.startswith("<") else str(getattr(target, "__name__", text))


def _line(graph: Graph, op: Op, numbers: dict[Value, int], comments: bool) -> str:
    operands = [_operand(graph, value, numbers) for value in op.inputs]
    attrs = {name: value for name, value in op.attrs.items() if op.kind.spec.attrs.get(name) != value}
    if op.kind in (OpKind.LINEAR, OpKind.FUSED_LINEAR) and not op.attr("transpose_weight"):
        weight = op.operand("weight")
        if weight is not None and weight not in numbers and weight.shape is not None:
            operands[1] = print_type(weight.shape[::-1], weight.dtype)
            del attrs["transpose_weight"]
    if op.kind is OpKind.FUSED_REGION:
        attrs = {"steps": _steps(parse(op.attr("steps")))}
    while operands and operands[-1] == "_":
        operands.pop()
    for value in op.outputs:
        numbers[value] = len(numbers)
    text = ", ".join(_defined(value, numbers) for value in op.outputs)
    text = " ".join([f"{text} = {op.kind.value}", *operands])
    if attrs:
        order = [name for name in op.kind.spec.attrs if name in attrs]
        order += sorted(name for name in attrs if name not in op.kind.spec.attrs)
        text += " {" + ", ".join(f"{name}={_attribute(attrs[name])}" for name in order) + "}"
    if comments:
        said = [native_name(op), *(value.name for value in op.operands if _is_tensor_constant(value))]
        if op.provenance:
            said.append(f"(made by {op.provenance})")
        comment = " ".join(part for part in said if part)
        text = f"{text:<{_COLUMN}}   # {comment}" if comment else text
    return text


def _steps(region: Region) -> str:
    """`[3: linear 0 1; 4: add 3 2 | 4]`: operands count from 0, then the steps; behind the bar is what is returned."""
    lines = []
    for index, step in enumerate(region.steps, region.operands):
        read = " ".join("_" if place is None else str(place) for place in step.inputs)
        attrs = ", ".join(f"{name}={_attribute(value)}" for name, value in sorted(step.attrs.items()))
        text = f"{step.kind.value} {read}".rstrip() + (f" {{{attrs}}}" if attrs else "")
        lines.append(f"{index}: {text}")
    return f"[{'; '.join(lines)} | {' '.join(map(str, region.outputs))}]"


def _defined(value: Value, numbers: dict[Value, int]) -> str:
    return f"%{numbers[value]}: {print_type(value.shape, value.dtype)}"


def _operand(graph: Graph, value: Value | None, numbers: dict[Value, int]) -> str:
    if value is None:
        return "_"
    if value in numbers:
        return f"%{numbers[value]}"
    if value.role is Role.CONSTANT:
        number = graph.scalar(value)
        if number is not None:
            return _attribute(number if value.dtype is None or "float" in value.dtype else int(number))
    return print_type(value.shape, value.dtype)


def _is_tensor_constant(value: Value) -> bool:
    return value.role is Role.PARAMETER


def _attribute(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if value is None:
        return "none"
    if isinstance(value, float):
        return f"{value:.7g}"
    if isinstance(value, tuple | list):
        return "[" + ",".join(_attribute(item) for item in value) + "]"
    return str(value)
