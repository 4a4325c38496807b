"""Reading an onnx_ir model into a graph's view.

Three passes over the nodes: forward, each node becomes logical operations (a MatMul and the Add of its bias become one
linear); backward, what only computes shapes that other operations keep to themselves is set aside; forward again, the
rest is presented.
"""

from __future__ import annotations

import math
from collections import Counter
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from rescompile.errors import GraphError
from rescompile.graph import Op, Role, Value, ValueType
from rescompile.kinds import OpKind as K
from rescompile.kinds import Trait
from rescompile.onnx_functions import read_call
from rescompile.onnx_literals import evaluate, is_literal
from rescompile.onnx_merge import Item, Merger
from rescompile.onnx_ops import PROVENANCE_KEY, Step, dtype_name, is_static, literal, own_graphs
from rescompile.onnx_read import reader_of
from rescompile.onnx_read_moves import read_split
from rescompile.onnx_shapes import Facts, name_extents
from rescompile.onnx_site import Site
from rescompile.result_types import complete, merge, result_dtype
from rescompile.values import PartialShape

if TYPE_CHECKING:
    from rescompile.onnx_graph import OnnxGraph

SCOPES_KEY = "pkg.torch.onnx.name_scopes"
# torch says of each parameter and buffer what it is; a number without it is a literal of the module's code.
_SIGNATURE_KEY = "pkg.torch.export.graph_signature.InputSpec.kind"

# Operators without a kind that are elementwise, or reductions, or move elements.
_IDLE = {
    *("Acos", "Acosh", "Asin", "Asinh", "Atan", "Atanh", "Celu", "Cosh", "Selu", "Shrink", "Sinh", "Softsign", "Tan"),
    *("BitShift", "BitwiseAnd", "BitwiseNot", "BitwiseOr", "BitwiseXor", "IsInf", "ThresholdedRelu", "Xor"),
    *("GatherElements", "GatherND", "Tile", "Trilu"),
    *("ReduceL1", "ReduceL2", "ReduceLogSum", "ReduceLogSumExp", "ReduceSumSquare"),
}


def read(graph: OnnxGraph) -> None:
    """Fill an empty view from `graph.model`."""
    _Import(graph).run()


class _Import:
    def __init__(self, graph: OnnxGraph) -> None:
        self.graph = graph
        self.model = graph.model
        self.facts = Facts(graph.model)
        self.constants: set[ir.Value] = set()  # values that do not depend on the graph's inputs
        self.items: dict[ir.Node, Item] = {}  # by the node that is read
        self.merger = Merger(self.items, self.facts, self.constants)
        self.taken: set[ir.Node] = set()  # nodes that are part of an earlier node's item
        self.values: dict[ir.Value, Value] = {}

    def run(self) -> None:
        native = self.model.graph
        self.constants.update(native.initializers.values())
        for node in native:
            self._read_node(node)
        needed = self._set_aside()
        for value in native.inputs:
            if value.name not in native.initializers:
                kind = self.facts.type(value)
                self.values[value] = self.graph.add_input(_name(value), kind.shape, kind.dtype, value)
        exported = any(_SIGNATURE_KEY in value.metadata_props for value in native.initializers.values())
        for value in native.initializers.values():
            if value in needed:
                number = value.shape is not None and math.prod(value.shape.numpy()) == 1
                written = exported and number and not value.metadata_props
                self._present_constant(value, Role.CONSTANT if written else Role.PARAMETER)
        self._present(needed)
        self.graph.set_outputs([self.values[value] for value in native.outputs])

    # ---- forward: nodes to steps -------------------------------------------------------------------------------------

    def _read_node(self, node: ir.Node) -> None:
        facts = self.facts
        if is_literal(node, facts) and self._type_literals(node):
            facts.literals.update(node.outputs)
            self.constants.update(node.outputs)
            facts.follow(node)
            if node.op_type != "Constant":
                self._hide(node)
            return
        if node in self.taken:
            return
        if node.op_type == "SplitToSequence" and node.domain == "" and self._read_split(node):
            return
        steps = self._steps(node)
        outputs = tuple(node.outputs)
        self._note_types(outputs, steps)
        facts.follow(node)
        item = Item((node,), steps, outputs)
        if self._constant(steps):
            self.constants.update(outputs)
        elif len(steps) == 1:
            self.merger.merge(item)
        self.items[node] = item

    def _read_split(self, node: ir.Node) -> bool:
        found = read_split(self._site(node))
        if found is None:
            return False
        step, readers = found
        outputs = tuple(reader.outputs[0] for reader in readers)
        self._note_types(outputs, [step])
        self.taken.update(readers)
        self.items[node] = Item((*readers, node), [step], outputs)
        return True

    def _constant(self, steps: list[Step]) -> bool:
        """Whether the results do not depend on the graph's inputs."""
        found = False
        for step in steps:
            if step.kind is K.OPAQUE or step.kind.has(Trait.RANDOM):
                return False
            for operand in step.inputs:
                if operand is None or isinstance(operand, np.ndarray):
                    continue
                if operand not in self.constants and operand not in steps:
                    return False
                found = True
        return found

    def _type_literals(self, node: ir.Node) -> bool:
        """Whether types and extents of all outputs are known, if need be by computing them."""
        for value in node.outputs:
            kind = self.facts.type(value)
            if kind.dtype is None or not is_static(kind.shape):
                try:
                    array = evaluate(value, self.facts.type)
                except GraphError:
                    return False
                self.facts.types[value] = ValueType(array.shape, str(array.dtype))
        return True

    def _steps(self, node: ir.Node) -> list[Step]:
        function = self.model.functions.get(node.op_identifier()) if self.model.functions else None
        reader = reader_of(node)
        if function is not None:
            reading = read_call(self._site(node), function)
        elif reader is not None:
            reading = reader(self._site(node))
        else:
            reading = ""
        if isinstance(reading, Step):
            return [reading]
        if isinstance(reading, list):
            return reading
        label = f"{node.domain}::{node.op_type}" if node.domain else node.op_type
        if reading:
            self.graph.notes.append(f"'{node.name or _name(node.outputs[0])}' ({label}) is opaque: {reading}.")
        inputs = [*node.inputs, *captured(node)]
        attrs = {"target": label} | ({"works": False} if label in _IDLE else {})
        return [Step(K.OPAQUE, inputs, attrs, tuple(range(len(node.outputs))))]

    def _site(self, node: ir.Node) -> Site:
        opset = self.model.opset_imports.get(node.domain, 1)
        return Site(node, opset, self.facts, self.constants)

    def _note_types(self, outputs: tuple[ir.Value, ...], steps: list[Step]) -> None:
        """Types of inner results and of the node's outputs, with the extents that follow by kind."""
        stem = _name(outputs[0])
        for step in steps:
            if step.kind is K.OPAQUE:
                continue
            if not step.outputs:
                step.type = self._completed(step, step.type.shape, step.type.dtype, stem, 0)
            for position, index in enumerate(step.outputs):
                value = outputs[index] if index < len(outputs) else None
                if value is not None and value.name:
                    shape, dtype = self.facts.partial_type(value)
                    shape = merge(shape, step.extents)
                    self.facts.types[value] = self._completed(step, shape, dtype, value.name, position)

    def _completed(
        self, step: Step, shape: PartialShape | None, dtype: str | None, stem: str, position: int
    ) -> ValueType:
        if shape is None or None in shape or dtype is None:
            operands = [self.merger.type(operand) for operand in step.inputs if operand is not None]
            shape = complete(step.kind, step.attrs, [operand.shape for operand in operands], shape, position)
            dtype = dtype or result_dtype(step.kind, step.attrs, [operand.dtype for operand in operands])
        return ValueType(name_extents(shape, stem), dtype)

    # ---- backward: what is only shape arithmetic ---------------------------------------------------------------------

    def _set_aside(self) -> set[ir.Value]:
        """The values that presented operations list; nodes that serve only unlisted operands are hidden."""
        needed: set[ir.Value] = set(self.model.graph.outputs)
        for item in reversed(self.items.values()):
            read = any(value.uses() for value in item.outputs)
            item.shown = not read or any(value in needed for value in item.outputs)
            if item.shown:
                needed.update(v for step in item.steps for v in step.inputs if isinstance(v, ir.Value))
            else:
                for node in item.nodes:
                    self._hide(node)
        return needed

    def _hide(self, node: ir.Node) -> None:
        """Keep the node out of the view; the shape that it asks for must be had otherwise once the value is gone."""
        self.graph.native.hidden.add(node)
        self._measure(node)

    def _measure(self, node: ir.Node) -> None:
        slot = {"Shape": 0, "CastLike": 1}.get(node.op_type)
        source = None if slot is None else node.inputs[slot]
        if source is not None:
            self.graph.native.measured[source] = self.facts.type(source)

    # ---- forward: presentation ---------------------------------------------------------------------------------------

    def _present(self, needed: set[ir.Value]) -> None:
        names = Counter(node.name for node in self.model.graph)
        for node in self.model.graph:
            item = self.items.get(node)
            if item is None:
                for value in node.outputs:
                    if value in needed and value in self.facts.literals:
                        self._present_constant(value, Role.CONSTANT)
            elif item.shown:
                name = node.name if node.name and names[node.name] == 1 else _name(node.outputs[0])
                self._present_item(item, name)

    def _present_constant(self, value: ir.Value, role: Role) -> None:
        tensor = literal(value)
        if tensor is not None:
            kind = ValueType(tuple(tensor.shape.numpy()), dtype_name(tensor.dtype))
        else:
            kind = self.facts.type(value)
        self.values[value] = self.graph.add_constant(_name(value), kind.shape, kind.dtype, value, role)

    def _present_item(self, item: Item, name: str) -> None:
        node = item.nodes[-1]
        if node.op_type == "CastLike":
            self._measure(node)
        module = module_path(node)
        results: dict[Step, Value] = {}
        group: list[Op] = []
        for step in item.steps:
            inputs = [self._operand(operand, results, name) for operand in step.inputs]
            label = name if step is item.steps[-1] else self.graph.unique_op_name(f"{name}.{step.kind.value}")
            outputs, natives = self._outputs(step, item, label)
            op = self.graph.add_op(
                step.kind,
                inputs,
                outputs,
                step.attrs,
                name=label,
                native=() if step.virtual else item.nodes,
                natives=natives,
                module=module,
            )
            op.provenance = node.metadata_props.get(PROVENANCE_KEY, "")
            for value in op.outputs:
                if value.native is not None:
                    self.values[value.native] = value
            if op.outputs:
                results[step] = op.outputs[0]
            if not step.virtual:
                group.append(op)
        if len(group) > 1:
            for op in group:
                op.group = group

    def _outputs(self, step: Step, item: Item, label: str) -> tuple[list[tuple[str, ValueType]], list[Any]]:
        if not step.outputs:
            return [(self.graph.unique_name(f"{_name(item.outputs[0])}.{step.kind.value}"), step.type)], [None]
        outputs: list[tuple[str, ValueType]] = []
        natives: list[Any] = []
        named = [index for index, value in enumerate(item.outputs) if value.name]
        last = named[-1] if named else 0
        for position, index in enumerate(step.outputs):
            value = item.outputs[index] if index < len(item.outputs) else None
            if value is not None and value.name:
                outputs.append((value.name, self.facts.type(value)))
                natives.append(value)
            elif step.kind.spec.outputs > position or (step.kind is K.RECURRENT and position < last):
                # The kind has this output although the node leaves it out.
                first = item.outputs[step.outputs[0]]
                kind = self.facts.type(first) if first.name else ValueType(None, None)
                outputs.append((self.graph.unique_name(f"{label}.{position}"), kind))
                natives.append(None)
        return outputs, natives

    def _operand(self, operand: Any, results: dict[Step, Value], name: str) -> Value | None:
        if operand is None:
            return None
        if isinstance(operand, Step):
            return results[operand]
        if isinstance(operand, np.ndarray):
            label = self.graph.unique_name(f"{name}.constant")
            return self.graph.add_constant(label, operand.shape, str(operand.dtype), operand, Role.CONSTANT)
        value = self.values.get(operand)
        if value is None:
            raise GraphError(
                f"'{name}' reads '{operand.name}' before anything produces it: the model's nodes are not in order."
            )
        return value


def _name(value: ir.Value) -> str:
    return value.name or ""


def captured(node: ir.Node) -> list[ir.Value]:
    """Values of the outer graph that the node's own graphs (the branches of an If, the body of a Loop) read."""
    found: dict[ir.Value, None] = {}
    for inner in own_graphs(node):
        _captured_by(inner, set(), found)
    return list(found)


def _captured_by(inner: ir.Graph, outside: set[ir.Value], found: dict[ir.Value, None]) -> None:
    own = outside | set(inner.inputs) | set(inner.initializers.values())
    for node in inner:
        own.update(node.outputs)
    for node in inner:
        found.update((value, None) for value in node.inputs if value is not None and value not in own)
        for deeper in own_graphs(node):
            _captured_by(deeper, own, found)
    found.update((value, None) for value in inner.outputs if value not in own)


def module_path(node: ir.Node) -> str:
    """Dotted path of the module that made the node: torch's scopes, else the path in the node's name."""
    scopes = node.metadata_props.get(SCOPES_KEY)
    if scopes:
        parts = scopes.strip("[]").split("', '")
        return parts[-2].strip("'\"") if len(parts) > 1 else ""
    name = node.name or ""
    if "/" not in name:
        return ""
    path: list[str] = []
    for part in name.strip("/").split("/")[:-1]:
        # torch's older exporter repeats a container's name in its members': layer1, layer1.0, conv1
        if path and part.startswith(path[-1] + "."):
            path[-1] = part
        else:
            path.append(part)
    return ".".join(path)
