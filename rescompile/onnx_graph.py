"""`OnnxGraph`: the graph protocol over an onnx_ir model, edited in place."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Self

import numpy as np
import onnx_ir as ir

from rescompile.composites import recognise
from rescompile.errors import GraphError
from rescompile.graph import Graph, Op, Shape, Value, ValueType
from rescompile.kinds import OpKind
from rescompile.onnx_build import Builder, Request
from rescompile.onnx_emit import obstacle, write
from rescompile.onnx_functions import call
from rescompile.onnx_import import read
from rescompile.onnx_literals import evaluate
from rescompile.onnx_ops import (
    FUNCTION_DOMAIN,
    OLDEST_INITIALIZERS,
    PROVENANCE_KEY,
    Arg,
    dtype_of,
    literal,
    nodes_within,
    numpy_dtype,
)
from rescompile.onnx_serial import in_memory_proto, save, uncollected


class OnnxGraph(Graph):
    """A view of an `onnx_ir.Model`. Values have the model's names, operations those of its nodes.

    `notes` says which nodes are opaque although their operator is known, and why. Nodes that only compute shapes for
    operands that a kind does not list (a Reshape's target) are `hidden`: they stay in the model and follow its edits.
    """

    ir = "onnx"

    def __init__(self, name: str = "") -> None:
        super().__init__(name)
        self.model: ir.Model
        self.notes: list[str] = []
        self.hidden: set[ir.Node] = set()
        self.measured: dict[ir.Value, ValueType] = {}  # what hidden Shape and CastLike nodes ask about
        self.source = "ir"  # what the model came as: file, proto, ir, program
        self.origin: Any = None
        self._native_names: set[str] = set()
        self._stubs: set[ir.Node] = set()  # Identity nodes that give a graph output its name
        self._native_dirty = False
        self._session: Any = None

    @classmethod
    def read(cls, model: ir.Model) -> Self:
        """The view of a model, which edits change from here on."""
        graph = cls(model.graph.name or "")
        graph.model = model
        with uncollected():
            graph._native_names = set(_all_names(model))
            read(graph)
            recognise(graph)
        return graph

    @property
    def opset(self) -> int:
        """Version of the standard operators that the model uses."""
        return self.model.opset_imports.get("", 1)

    @property
    def output_names(self) -> list[str]:
        """The outputs' outward names, which no edit changes."""
        return [value.name or "" for value in self.model.graph.outputs]

    def has_name(self, name: str) -> bool:
        """Whether a value or an operation has that name, hidden ones included."""
        return super().has_name(name) or name in self._native_names

    def run(self, inputs: Mapping[str, np.ndarray[Any, Any]]) -> dict[str, np.ndarray[Any, Any]]:
        """Outputs by name, computed by ONNX Runtime on the CPU, or by onnx's reference where that is not installed."""
        from rescompile.onnx_run import Session

        if self._session is None:
            self._sort_native()
            self._session = Session(self.model)
        return self._session.run(inputs)  # type: ignore[no-any-return]

    def to_user(self) -> Any:
        """The model as the kind of object that it came as: ModelProto, ONNXProgram, else (files too) onnx_ir.Model."""
        self._sort_native()
        if self.source == "proto":
            return in_memory_proto(self.model)
        if self.source == "program":
            return type(self.origin)(self.model, getattr(self.origin, "exported_program", None))
        return self.model

    def save(self, path: str) -> None:
        """Write the model, whole or not at all; external or very large tensors go to a file beside it."""
        self._sort_native()
        save(self.model, path)

    def cannot_emit(self, kind: OpKind) -> str:
        """Why the model's opset cannot hold an operation of this kind; empty when it can."""
        return obstacle(kind, self.opset)

    def clone(self) -> Self:
        """A copy with a model of its own; tensors are shared."""
        with uncollected():
            self._sort_native()
            copy = super().clone()
            copy.model = self.model.clone()
            nodes: dict[ir.Node, ir.Node] = {}
            natives: dict[ir.Value, ir.Value] = {}
            for mine, theirs in zip(self.model.graph, copy.model.graph, strict=True):
                nodes[mine] = theirs
                natives.update(zip(mine.outputs, theirs.outputs, strict=True))
            natives.update(zip(self.model.graph.inputs, copy.model.graph.inputs, strict=True))
            for name, value in self.model.graph.initializers.items():
                natives[value] = copy.model.graph.initializers[name]
            for value in copy.values:
                if isinstance(value.native, ir.Value):
                    value.native = natives[value.native]
            groups: dict[int, list[Op]] = {}
            for mine, theirs in zip(self, copy, strict=True):
                theirs.native = tuple(nodes[node] for node in mine.native)
                if mine.group is not None:
                    theirs.group = groups.setdefault(id(mine.group), [])
                    theirs.group.append(theirs)
            copy.source, copy.origin = self.source, self.origin
            copy.notes = list(self.notes)
            copy.hidden = {nodes[node] for node in self.hidden}
            copy.measured = {natives[value]: kind for value, kind in self.measured.items() if value in natives}
            copy._stubs = {nodes[node] for node in self._stubs}
            copy._native_names = set(self._native_names)
        return copy

    # ---- tensors -------------------------------------------------------------------------------------------------------

    def native_data(self, value: Value) -> np.ndarray[Any, Any]:
        """Contents of an initializer or Constant node, or of what the model computes from literals alone."""
        native = value.native
        if not isinstance(native, ir.Value):
            return np.asarray(native)
        tensor = literal(native)
        if tensor is not None:
            try:
                return tensor.numpy()
            except (OSError, ValueError) as error:
                raise GraphError(f"The contents of '{value.name}' cannot be read: {error}") from error
        return evaluate(native, self.measured.get)

    def native_add_parameter(self, value: Value, data: np.ndarray[Any, Any], trainable: bool) -> None:
        """A new initializer."""
        value.native = self._initializer(value.name, data)
        self._touch()

    def native_drop(self, value: Value) -> None:
        """Remove an initializer or a constant's node, unless a hidden node still reads it."""
        native = value.native
        if isinstance(native, ir.Value):
            self._drop_constant(native)
            self._touch()

    def _drop_constant(self, native: ir.Value) -> None:
        if native.uses() or native.is_graph_output():
            return
        graph = self.model.graph
        node = native.producer()
        if node is not None:
            self._remove([node])
        elif native.name in graph.initializers:
            del graph.initializers[native.name]
            if native.is_graph_input():
                graph.inputs.remove(native)

    def _initializer(self, name: str, data: np.ndarray[Any, Any]) -> ir.Value:
        data = np.ascontiguousarray(data).reshape(data.shape)
        tensor = ir.tensor(data, name=name)
        native = ir.Value(name=name, shape=ir.Shape(data.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)
        self.model.graph.register_initializer(native)
        self.model.ir_version = max(self.model.ir_version, OLDEST_INITIALIZERS)
        self._native_names.add(name)
        return native

    # ---- edits ---------------------------------------------------------------------------------------------------------

    def native_emit(self, op: Op) -> None:
        """New nodes for the operation, at the end; commit sorts them into place."""
        args = [None if value is None else Arg(self._native(value), value.shape, value.dtype) for value in op.inputs]
        builder = Builder(self.opset, self._symbol, lambda b, r: call(self.model, b, r))
        outputs = write(builder, Request(op.kind, args, op.attrs, [value.type for value in op.outputs]))
        final = set(outputs)
        for node in builder.nodes:
            if op.provenance:
                node.metadata_props[PROVENANCE_KEY] = op.provenance
            for native in node.outputs:
                if native not in final:
                    native.name = self._fresh(f"{op.output.name}.{node.op_type}")
        for value, native in zip(op.outputs, outputs, strict=False):
            native.name = self._fresh(value.name)
            self._type_native(native, value.type)
            value.native = native
        builder.nodes[-1].name = op.name
        self.model.graph.extend(builder.nodes)
        op.native = tuple(builder.nodes)
        self._touch()

    def native_erase_nodes(self, nodes: tuple[Any, ...]) -> None:
        """Remove nodes; hidden nodes that asked for the shape of what is gone read it elsewhere."""
        doomed = [node for node in nodes if node.graph is not None]
        gone = set(doomed)
        for node in doomed:
            for native in node.outputs:
                for reader, _ in tuple(native.uses()):
                    if reader not in gone:
                        self._remeasure(native, reader)
        self._remove(doomed)
        self._touch()

    def native_redirect(self, old: Any, value: Value) -> None:
        """Readers and graph outputs go from `old` to the value's new native, which takes over name and metadata."""
        if not isinstance(old, ir.Value) or old is value.native:
            return
        new: ir.Value = value.native
        name = old.name or self._fresh(value.name)
        outputs = self.model.graph.outputs
        for position, output in enumerate(outputs):
            if output is old:
                outputs[position] = new
                new.type, new.shape = old.type, None if old.shape is None else old.shape.copy()
        old.replace_all_uses_with(new)
        old.name = self._fresh(f"{name}.old")
        self._native_names.discard(new.name or "")
        new.name = name
        new.metadata_props.update(old.metadata_props)
        new.doc_string = old.doc_string
        if old in self.measured:
            self.measured[new] = self.measured.pop(old)
        self._touch()

    def native_set_operand(self, op: Op, index: int, value: Value) -> None:
        """In place where the operand is one input of the operation's nodes, else by writing the operation anew."""
        old, new = op.inputs[index], self._native(value)
        slots = [] if old is None else self._slots(op, old.native)
        same = [position for position, operand in enumerate(op.inputs) if operand is old]
        if old is None and op.kind is OpKind.OPAQUE and index < len(op.native[0].inputs):
            op.native[0].replace_input_with(index, new)
        elif slots and len(same) == 1:
            for node, slot in slots:
                _set_input(node, slot, new)
        elif slots and len(same) == len(slots) and len(op.native) == 1:
            node, slot = slots[same.index(index)]
            _set_input(node, slot, new)
        else:
            self._rewrite(op, index, value)
        self._touch()

    def native_replace_output(self, old: Value, new: Value) -> None:
        """`new` takes the output's place and outward name; what cannot be renamed goes through an Identity."""
        outputs = self.model.graph.outputs
        source = self._native(new)
        for position, output in enumerate(self.outputs):
            if output is not old:
                continue
            native = outputs[position]
            stub = native.producer() if native.producer() in self._stubs else None
            if stub is not None:
                _set_input(stub, 0, source)
            elif source.producer() is not None and not source.is_graph_output():
                self._take_name(native, source)
                outputs[position] = source
            else:
                outputs[position] = self._stub(native, source)
        self._touch()

    def _take_name(self, native: ir.Value, source: ir.Value) -> None:
        name = native.name
        if native.producer() is None:
            raise GraphError(f"The output '{name}' is an input of the graph as well: it cannot become something else.")
        native.name = self._fresh(f"{name}.inner")
        self._native_names.discard(source.name or "")
        source.name = name
        source.type, source.shape = native.type, None if native.shape is None else native.shape.copy()

    def _stub(self, native: ir.Value, source: ir.Value) -> ir.Value:
        node = ir.Node("", "Identity", [source], num_outputs=1)
        self._stubs.add(node)
        self._take_name(native, node.outputs[0])
        self.model.graph.append(node)
        return node.outputs[0]

    # ---- inside --------------------------------------------------------------------------------------------------------

    def native_commit(self) -> None:
        """Sort, drop rescompile's functions that nobody calls, and check that every input has a producer."""
        if not self._native_dirty:
            return
        self._sort_native()
        graph = self.model.graph
        called = {node.op_identifier() for node in nodes_within(graph)} if self.model.functions else set()
        for key in [key for key in self.model.functions if key[0] == FUNCTION_DOMAIN and key not in called]:
            del self.model.functions[key]
        if not any(key[0] == FUNCTION_DOMAIN for key in self.model.functions):
            self.model.opset_imports.pop(FUNCTION_DOMAIN, None)
        for node in graph:
            for value in node.inputs:
                if value is not None and value.producer() is None and value.graph is not graph:
                    raise GraphError(f"'{node.name}' reads '{value.name}', which nothing in the model produces.")
        self._native_dirty = False

    def _sort_native(self) -> None:
        if self._native_dirty:
            try:
                self.model.graph.sort()
            except ValueError as error:
                raise GraphError(f"The model's nodes cannot be put in order: {error}") from error

    def _touch(self) -> None:
        self._native_dirty = True
        self._session = None

    def _fresh(self, stem: str) -> str:
        name, count = stem, 0
        while name in self._native_names:
            count += 1
            name = f"{stem}_{count}"
        self._native_names.add(name)
        return name

    def _native(self, value: Value) -> ir.Value:
        """The value's native counterpart, made where the model did not spell it out."""
        if isinstance(value.native, np.ndarray):
            value.native = self._initializer(self._fresh(value.name), value.native)
        if value.native is None and value.producer is not None:
            producer = value.producer
            if producer.group is not None:
                self.materialise(producer)
            else:
                self._write_anew(producer)
        if not isinstance(value.native, ir.Value):
            raise GraphError(f"'{value.name}' has no counterpart in the ONNX model.")
        return value.native

    def _write_anew(self, op: Op) -> None:
        nodes = op.native
        natives = [value.native for value in op.outputs]
        self.native_emit(op)
        for old, value in zip(natives, op.outputs, strict=True):
            self.native_redirect(old, value)
        self.native_erase_nodes(nodes)

    def _rewrite(self, op: Op, index: int, value: Value) -> None:
        old = op.inputs[index]
        op.inputs[index] = value
        try:
            self._write_anew(op)
        finally:
            op.inputs[index] = old

    def _slots(self, op: Op, native: Any) -> list[tuple[ir.Node, int]]:
        """Where the operation's nodes, and the graphs inside them, read a native value."""
        nodes = nodes_within(op.native)
        return [(node, slot) for node in nodes for slot, value in enumerate(node.inputs) if value is native]

    def _symbol(self, name: str) -> tuple[ir.Value, int] | None:
        for value in self.inputs:
            if value.shape is not None and name in value.shape:
                return value.native, value.shape.index(name)
        return None

    def _remeasure(self, native: ir.Value, reader: ir.Node) -> None:
        """Let a hidden Shape node's readers have the shape from elsewhere, and a CastLike the type."""
        kind = self.measured.get(native)
        builder = Builder(self.opset, self._symbol)
        if reader.op_type == "CastLike" and kind is not None and kind.dtype is not None:
            example = builder.const(np.zeros((), numpy_dtype(kind.dtype)))
            self._hide(builder.nodes, f"{native.name}.type")
            reader.replace_input_with(1, example)
            return
        if reader not in self.hidden or reader.op_type != "Shape" or kind is None or kind.shape is None:
            raise GraphError(f"'{native.name}' cannot be removed: '{reader.name}' still reads it.")
        start, end = reader.attributes.get("start"), reader.attributes.get("end")
        shape: Shape = kind.shape[slice(start.value if start else 0, end.value if end else None)]
        result = builder.shape(shape, [])
        self._hide(builder.nodes, f"{native.name}.shape")
        reader.outputs[0].replace_all_uses_with(result)
        self._remove([reader])

    def _hide(self, nodes: list[ir.Node], stem: str) -> None:
        for node in nodes:
            for output in node.outputs:
                output.name = self._fresh(stem)
        self.model.graph.extend(nodes)
        self.hidden.update(nodes)

    def _remove(self, nodes: Iterable[ir.Node]) -> None:
        """Remove nodes, and then the hidden nodes and unlisted constants that served only them."""
        pending = list(nodes)
        while pending:
            node = pending.pop()
            if node.graph is None:
                continue
            sources = {value for value in node.inputs if value is not None}
            for inner in nodes_within((node,)):
                for slot in range(len(inner.inputs)):
                    inner.replace_input_with(slot, None)
            self.model.graph.remove(node)
            self.hidden.discard(node)
            self._stubs.discard(node)
            for source in sources:
                producer = source.producer()
                if source.uses() or source.is_graph_output() or self._listed(source):
                    continue
                if producer is not None and producer in self.hidden:
                    if not any(output.uses() for output in producer.outputs):
                        pending.append(producer)
                elif source.is_initializer() or _is_constant(producer):
                    self._drop_constant(source)

    def _listed(self, native: ir.Value) -> bool:
        value = self._values.get(native.name or "")
        return value is not None and value.native is native

    def _type_native(self, native: ir.Value, kind: ValueType) -> None:
        if kind.dtype is not None and kind.dtype != "string":
            native.type = ir.TensorType(dtype_of(kind.dtype))
        if kind.shape is not None:
            native.shape = ir.Shape(
                [extent if isinstance(extent, int) or extent.isidentifier() else None for extent in kind.shape]
            )


def _is_constant(node: ir.Node | None) -> bool:
    return node is not None and node.domain == "" and node.op_type == "Constant"


def _set_input(node: ir.Node, slot: int, value: ir.Value) -> None:
    node.replace_input_with(slot, value)


def _all_names(model: ir.Model) -> Iterable[str]:
    for value in (*model.graph.inputs, *model.graph.initializers.values()):
        yield value.name or ""
    for node in nodes_within(model.graph):
        for value in node.outputs:
            yield value.name or ""
