"""Graphs that ONNX nodes hold, the branches of If and the bodies of Loop and Scan, and what a call of a function runs.

Each is read as a model of its own: a copy whose nodes share their tensors with the original, with the types of what it
captures or is called with, since a function declares none.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import onnx_ir as ir

from rescompile import onnx_blocked
from rescompile.graph import Body, Op, Role, Value
from rescompile.onnx_import import captured
from rescompile.onnx_native import set_type
from rescompile.onnx_ops import FUNCTION_DOMAIN, SMALL, can_be_written_out, is_static, literal, nodes_within
from rescompile.onnx_quantised import quantised, written_out

if TYPE_CHECKING:
    from rescompile.onnx_graph import OnnxGraph


def read_bodies(graph: OnnxGraph, op: Op) -> tuple[Body, ...]:
    """The graphs of the operation's node."""
    if len(op.native) != 1:
        return ()
    node: ir.Node = op.native[0]
    given = [*node.inputs, *captured(node)]
    if len(given) != len(op.inputs):
        return ()
    outer = {native: value for native, value in zip(given, op.inputs, strict=True) if native is not None and value}
    function = graph.model.functions.get(node.op_identifier()) if graph.model.functions else None
    if function is not None:
        if function.domain == FUNCTION_DOMAIN or not can_be_written_out(graph.model.functions, function):
            return ()
        return (_called(graph, node, function, outer),)
    row = quantised(node)
    if row is not None:
        return (_called(graph, node, written_out(node, row), outer),)
    if onnx_blocked.is_blocked(node):
        blocked = onnx_blocked.written_out(node)
        return () if blocked is None else (_called(graph, node, blocked, outer),)
    found: list[Body] = []
    for name, attribute in node.attributes.items():
        if attribute.type is ir.AttributeType.GRAPH:
            found.append(_held(graph, name, attribute.as_graph(), outer))
        elif attribute.type is ir.AttributeType.GRAPHS:
            found += [_held(graph, f"{name}_{at}", inner, outer) for at, inner in enumerate(attribute.as_graphs())]
    return tuple(found)


# ---- copies ----------------------------------------------------------------------------------------------------------


def _held(graph: OnnxGraph, label: str, inner: ir.Graph, outer: Mapping[ir.Value, Value]) -> Body:
    """A branch or a loop's body: its own inputs differ on each run, what it captures does not."""
    copy = _Copy(graph, {})
    for value in inner.inputs:
        copy.input(value)
    for value in inner.initializers.values():
        if value.const_value is not None:
            copy.constant(value, value.const_value)
    for native, operand in outer.items():
        copy.bind(native, operand, operand.name)
    return copy.body(label, inner, inner.outputs, graph.model.opset_imports, call=False)


def _called(graph: OnnxGraph, node: ir.Node, function: ir.Function, outer: Mapping[ir.Value, Value]) -> Body:
    """What a call runs, with its operands and attributes in the place of the function's parameters."""
    attributes = {name: attribute for name, attribute in function.attributes.items() if attribute.value is not None}
    copy = _Copy(graph, {**attributes, **node.attributes})
    for at, parameter in enumerate(function.inputs):
        operand = node.inputs[at] if at < len(node.inputs) else None
        if operand is None or operand not in outer:
            copy.values[parameter] = None
        else:
            copy.bind(parameter, outer[operand], parameter.name or "", operand)
    read = [function.outputs[at] for at, value in enumerate(node.outputs) if value.name and at < len(function.outputs)]
    return copy.body("", function, read, function.opset_imports or graph.model.opset_imports, call=True)


class _Copy:
    """A graph being copied into a model. `values`: what stands for each value, None for an absent operand."""

    def __init__(self, outer: OnnxGraph, attributes: Mapping[str, ir.Attr]) -> None:
        self.values: dict[ir.Value, ir.Value | None] = {}
        self._outer = outer
        self._attributes = attributes
        self._inputs: list[ir.Value] = []
        self._initializers: list[ir.Value] = []
        self._operands: dict[ir.Value, Value] = {}
        self._names: set[str] = set()

    def input(self, value: ir.Value) -> ir.Value:
        """An input like that one."""
        twin = self._twin(value, value.name or "")
        self._inputs.append(twin)
        return twin

    def constant(self, value: ir.Value, tensor: ir.TensorProtocol, name: str = "") -> ir.Value:
        """An initializer in the place of that value."""
        twin = self._twin(value, name or value.name or "")
        twin.const_value = tensor
        twin.type, twin.shape = ir.TensorType(tensor.dtype), ir.Shape(tensor.shape.numpy())
        self._initializers.append(twin)
        return twin

    def bind(self, place: ir.Value, value: Value, name: str, native: ir.Value | None = None) -> None:
        """What stands for `place`, which is `value` of the outer graph on every run."""
        tensor = self._tensor(native if native is not None else place, value)
        if tensor is not None:
            twin = self.constant(place, tensor, name)
        else:
            twin = self._twin(place, name)
            set_type(twin, value.type)
            if value.shape is not None:
                twin.shape = ir.Shape(value.shape)
            self._inputs.append(twin)
        self._operands[twin] = value

    def _tensor(self, native: ir.Value, value: Value) -> ir.TensorProtocol | None:
        if value.role not in (Role.PARAMETER, Role.CONSTANT):
            return None
        tensor = literal(native)
        if tensor is None and is_static(value.shape) and _small(value):
            tensor = ir.tensor(self._outer.data(value))
        return tensor

    def _twin(self, value: ir.Value, name: str) -> ir.Value:
        stem, count = name, 0
        while name and name in self._names:
            count += 1
            name = f"{stem}_{count}"
        self._names.add(name)
        twin = ir.Value(name=name, shape=None if value.shape is None else value.shape.copy(), type=value.type)
        self.values[value] = twin
        return twin

    def body(
        self,
        label: str,
        inner: ir.Graph | ir.Function,
        outputs: Iterable[ir.Value],
        opsets: Mapping[str, int],
        *,
        call: bool,
    ) -> Body:
        """The copy, read."""
        from rescompile.onnx_graph import OnnxGraph as Read

        nodes = [self._node(node) for node in inner]
        results = [self._get(value) for value in outputs]
        imports = {**self._outer.model.opset_imports, **opsets}
        made = ir.Graph(
            self._inputs,
            [value for value in results if value is not None],
            nodes=nodes,
            initializers=self._initializers,
            opset_imports=imports,
            name=label or inner.name,
        )
        functions = _reachable(self._outer.model.functions, nodes)
        model = ir.Model(made, ir_version=self._outer.model.ir_version, functions=functions)
        graph = Read.read(model)
        bound = {value: self._operands[value.native] for value in graph.values if value.native in self._operands}
        return Body(label, graph, bound, call)

    def _get(self, value: ir.Value | None) -> ir.Value | None:
        return None if value is None else self.values.get(value, value)

    def _node(self, node: ir.Node) -> ir.Node:
        return ir.Node(
            node.domain,
            node.op_type,
            [self._get(value) for value in node.inputs],
            [made for attribute in node.attributes.values() if (made := self._attribute(attribute)) is not None],
            overload=node.overload,
            outputs=[self._twin(value, value.name or "") for value in node.outputs],
            name=node.name,
            metadata_props=dict(node.metadata_props),
        )

    def _attribute(self, attribute: ir.Attr) -> ir.Attr | None:
        if attribute.is_ref():
            given = self._attributes.get(attribute.ref_attr_name or "")
            return None if given is None else ir.Attr(attribute.name, given.type, given.value)
        if attribute.type is ir.AttributeType.GRAPH:
            return ir.AttrGraph(attribute.name, self._graph(attribute.as_graph()))
        if attribute.type is ir.AttributeType.GRAPHS:
            return ir.AttrGraphs(attribute.name, [self._graph(inner) for inner in attribute.as_graphs()])
        return attribute

    def _graph(self, inner: ir.Graph) -> ir.Graph:
        """A graph further in: it captures the copies."""
        inputs = [self._twin(value, value.name or "") for value in inner.inputs]
        initializers = []
        for value in inner.initializers.values():
            twin = self.values.get(value) or self._twin(value, value.name or "")
            twin.const_value = value.const_value
            initializers.append(twin)
        nodes = [self._node(node) for node in inner]
        outputs = [made for output in inner.outputs if (made := self._get(output)) is not None]
        return ir.Graph(inputs, outputs, nodes=nodes, initializers=initializers, name=inner.name)


def _reachable(functions: Mapping[ir.OperatorIdentifier, ir.Function], nodes: Iterable[ir.Node]) -> list[ir.Function]:
    """The functions that the nodes, or other functions of them, call."""
    found: dict[ir.OperatorIdentifier, ir.Function] = {}
    pending = list(nodes)
    while pending and functions:
        for node in nodes_within((pending.pop(),)):
            name = node.op_identifier()
            if name in functions and name not in found:
                found[name] = functions[name]
                pending.extend(functions[name])
    return list(found.values())


def _small(value: Value) -> bool:
    size = 1
    for extent in value.shape or ():
        size *= int(extent)
    return size <= SMALL
