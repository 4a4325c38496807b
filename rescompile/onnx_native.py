"""The onnx_ir model under a graph: names, initializers, removal, order. Knows nothing of logical operations."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import onnx_ir as ir

from rescompile.errors import GraphError
from rescompile.graph import Shape, ValueType
from rescompile.onnx_build import Builder
from rescompile.onnx_ops import (
    CONTRIB_DOMAIN,
    FUNCTION_DOMAIN,
    OLDEST_INITIALIZERS,
    dtype_of,
    nodes_within,
)
from rescompile.onnx_wiring import sort
from rescompile.values import numpy_dtype


class Native:
    """A model that is edited, with what must be remembered of the nodes that its view does not show.

    `hidden`: nodes that only serve operands which kinds do not list (a Reshape's target), or compute literals.
    `measured`: types of the values that hidden Shape nodes and CastLike nodes ask about, so that the answer can be had
    elsewhere once the value is gone. `optional`: outputs that their nodes go without, nameless, as long as nobody reads
    them. `stubs`: Identity nodes that give a graph output its name, and the value that had
    the name before.
    """

    def __init__(self, model: ir.Model) -> None:
        self.model = model
        self.hidden: set[ir.Node] = set()
        self.measured: dict[ir.Value, ValueType] = {}
        self.optional: set[ir.Value] = set()
        self.stubs: dict[ir.Node, ir.Value] = {}
        self.dirty = False
        # Whether the view shows this constant, and where a symbolic extent can be read off; set by the graph.
        self.shown: Callable[[ir.Value], bool] = lambda _: False
        self.symbol: Callable[[str], tuple[ir.Value, int] | None] = lambda _: None
        self._names = set(_all_names(model))

    @property
    def opset(self) -> int:
        """Version of the standard operators."""
        return self.model.opset_imports.get("", 1)

    # ---- names and types -----------------------------------------------------------------------------------------

    def has_name(self, name: str) -> bool:
        """Whether a value has that name."""
        return name in self._names

    def fresh(self, stem: str) -> str:
        """`stem`, or the first of `stem_1`, `stem_2`, ... that no value has; taken from now on."""
        name, count = stem, 0
        while name in self._names:
            count += 1
            name = f"{stem}_{count}"
        self._names.add(name)
        return name

    def rename(self, value: ir.Value, name: str) -> None:
        """Give the value a name that its holder has given up."""
        self._names.discard(value.name or "")
        self._names.add(name)
        value.name = name

    # ---- adding ----------------------------------------------------------------------------------------------------

    def initializer(self, name: str, data: np.ndarray[Any, Any]) -> ir.Value:
        """A new initializer."""
        data = np.array(data, order="C", copy=True)
        tensor = ir.tensor(data, name=name)
        value = ir.Value(name=name, shape=ir.Shape(data.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)
        self.model.graph.register_initializer(value)
        self.model.ir_version = max(self.model.ir_version, OLDEST_INITIALIZERS)
        self._names.add(name)
        return value

    def append(self, nodes: Iterable[ir.Node], stem: str, *, hidden: bool = False) -> None:
        """New nodes at the end, for `sort` to put into place; outputs without a name get one from the stem."""
        nodes = list(nodes)
        for node in nodes:
            for output in node.outputs:
                if output.name is None:
                    output.name = self.fresh(f"{stem}.{node.op_type}")
        self.model.graph.extend(nodes)
        if hidden:
            self.hidden.update(nodes)
        self.dirty = True

    # ---- removing --------------------------------------------------------------------------------------------------

    def erase(self, nodes: Iterable[ir.Node]) -> None:
        """Remove nodes; hidden nodes that asked for the shape or type of what is gone have it from elsewhere."""
        doomed = [node for node in nodes if node.graph is not None]
        gone = set(doomed)
        for node in doomed:
            for value in node.outputs:
                for reader, _ in tuple(value.uses()):
                    if reader not in gone:
                        self._ask_elsewhere(value, reader)
        self._remove(doomed)

    def drop_constant(self, value: ir.Value) -> None:
        """Remove an initializer or what computes a literal, unless something still reads it."""
        if value.uses() or value.is_graph_output():
            return
        graph, node = self.model.graph, value.producer()
        if node is not None:
            self._remove([node])
        elif value.name is not None and value.name in graph.initializers:
            del graph.initializers[value.name]
            self._names.discard(value.name)
            if value.is_graph_input():
                graph.inputs.remove(value)
        self.dirty = True

    def _remove(self, nodes: Iterable[ir.Node]) -> None:
        """Remove nodes, and then the hidden nodes and unlisted constants that served only them."""
        pending = list(nodes)
        while pending:
            node = pending.pop()
            if node.graph is None:
                continue
            sources = {value for inner in nodes_within((node,)) for value in inner.inputs if value is not None}
            for inner in nodes_within((node,)):
                for slot in range(len(inner.inputs)):
                    inner.replace_input_with(slot, None)
            self.model.graph.remove(node)
            self.hidden.discard(node)
            self.stubs.pop(node, None)
            self._names.difference_update(output.name or "" for output in node.outputs)
            for source in sources:
                producer = source.producer()
                if source.uses() or source.is_graph_output() or self.shown(source):
                    continue
                if producer is not None and producer in self.hidden:
                    if not any(output.uses() for output in producer.outputs):
                        pending.append(producer)
                elif source.is_initializer() or (producer is not None and producer.op_type == "Constant"):
                    self.drop_constant(source)
        self.dirty = True

    def _ask_elsewhere(self, value: ir.Value, reader: ir.Node) -> None:
        kind = self.measured.get(value)
        builder = Builder(self.opset, self.symbol)
        if reader.op_type == "CastLike" and kind is not None and kind.dtype is not None:
            example = builder.const(np.zeros((), numpy_dtype(kind.dtype)))
            self.append(builder.nodes, f"{value.name}.type", hidden=True)
            reader.replace_input_with(1, example)
            return
        if reader not in self.hidden or reader.op_type != "Shape" or kind is None or kind.shape is None:
            raise GraphError(f"'{value.name}' cannot be removed: '{reader.name}' still reads it.")
        start, end = reader.attributes.get("start"), reader.attributes.get("end")
        shape: Shape = kind.shape[slice(start.value if start else 0, end.value if end else None)]
        result = builder.shape(shape, [])
        self.append(builder.nodes, f"{value.name}.shape", hidden=True)
        reader.outputs[0].replace_all_uses_with(result)
        self._remove([reader])

    # ---- redirecting -----------------------------------------------------------------------------------------------

    def redirect(self, old: ir.Value, new: ir.Value) -> None:
        """Readers and graph outputs go from `old` to `new`, which takes over name, metadata and declared type."""
        name = old.name or ""
        outputs = self.model.graph.outputs
        for position, output in enumerate(outputs):
            if output is old:
                outputs[position] = new
                _declare(new, old)
        for reader, _ in tuple(old.uses()):
            # A literal that has the old value's shape or type, and that the new value's own node reads.
            if reader in self.hidden and self._serves(reader, new.producer()):
                self._ask_elsewhere(old, reader)
        old.replace_all_uses_with(new)
        if name:  # an output that its node went without had none
            old.name = self.fresh(f"{name}.old")
            self.rename(new, name)
        new.metadata_props.update(old.metadata_props)
        new.doc_string = old.doc_string
        if old in self.measured:
            self.measured[new] = self.measured.pop(old)
        self.dirty = True

    def _serves(self, node: ir.Node, reader: ir.Node | None) -> bool:
        pending, seen = [node], {node}
        while pending:
            for value in pending.pop().outputs:
                for user, _ in value.uses():
                    if user is reader:
                        return True
                    if user in self.hidden and user not in seen:
                        seen.add(user)
                        pending.append(user)
        return False

    def set_output(self, position: int, source: ir.Value, former: str) -> None:
        """Let a graph output be `source`, through an Identity that has the output's outward name and declared type.

        `former`: the name that the value which was the output goes by from now on.
        """
        outputs = self.model.graph.outputs
        current = outputs[position]
        node = current.producer()
        self.dirty = True
        if node is not None and node in self.stubs:
            node.replace_input_with(0, source)
            return
        if node is None:
            raise GraphError(
                f"The output '{current.name}' is an input of the graph as well: it cannot become something else."
            )
        stub = ir.Node("", "Identity", [source], num_outputs=1)
        self.stubs[stub] = current
        named, name = stub.outputs[0], current.name or ""
        current.name = self.fresh(former)
        self.rename(named, name)
        _declare(named, current)
        self.append([stub], name)
        outputs[position] = named

    def _settle_outputs(self) -> None:
        """Where the value that had an output's name is gone, its successor takes the name and needs no Identity."""
        outputs = self.model.graph.outputs
        for stub, former in list(self.stubs.items()):
            source, named = stub.inputs[0], stub.outputs[0]
            maker = former.producer()
            if source is None or source.producer() is None or source.is_graph_output() or named.uses():
                continue
            if maker is not None and maker.graph is not None and former is not source:
                continue
            outputs[next(position for position, output in enumerate(outputs) if output is named)] = source
            name = named.name or ""
            self._remove([stub])
            self.rename(source, name)
            _declare(source, named)

    # ---- the whole -------------------------------------------------------------------------------------------------

    def sort(self) -> None:
        """Put the nodes in topological order. GraphError where there is none, or where nothing produces an operand."""
        if not self.dirty:
            return
        sort(self.model.graph)

    def commit(self) -> None:
        """Sort, check that every operand has a producer, and drop rescompile's functions that nobody calls."""
        if not self.dirty:
            return
        self._settle_outputs()
        self.sort()
        graph, functions = self.model.graph, self.model.functions
        called = {node.op_identifier() for node in nodes_within(graph)} if functions else set()
        for key in [key for key in functions if key[0] == FUNCTION_DOMAIN and key not in called]:
            del functions[key]
        if not any(key[0] == FUNCTION_DOMAIN for key in functions):
            self.model.opset_imports.pop(FUNCTION_DOMAIN, None)
        self._settle_optional()
        used = CONTRIB_DOMAIN in self.model.opset_imports
        if used and not any(node.domain == CONTRIB_DOMAIN for node in self._everywhere()):
            del self.model.opset_imports[CONTRIB_DOMAIN]
        self.dirty = False

    def _everywhere(self) -> Iterator[ir.Node]:
        yield from nodes_within(self.model.graph)
        for function in self.model.functions.values():
            yield from nodes_within(function)

    def _settle_optional(self) -> None:
        """Outputs that nobody reads lose their names, which is how ONNX leaves them out; others have one."""
        for value in list(self.optional):
            node = value.producer()
            if node is None or node.graph is None:
                self.optional.discard(value)
            elif value.uses() or value.is_graph_output():
                value.name = value.name or self.fresh(f"{node.outputs[0].name}.{value.index()}")
            elif value.name:
                self._names.discard(value.name)
                value.name = ""

    def clone(self) -> tuple[Native, dict[ir.Node, ir.Node], dict[ir.Value, ir.Value]]:
        """A copy that shares tensors, and which of its nodes and values stand for which of these."""
        self.sort()
        copy = Native(self.model.clone())
        mine, theirs = self.model.graph, copy.model.graph
        nodes = dict(zip(mine, theirs, strict=True))
        values = dict(zip(mine.inputs, theirs.inputs, strict=True))
        for node, twin in nodes.items():
            values.update(zip(node.outputs, twin.outputs, strict=True))
        for name, value in mine.initializers.items():
            values[value] = theirs.initializers[name]
        copy.hidden = {nodes[node] for node in self.hidden}
        copy.optional = {values[value] for value in self.optional if value in values}
        copy.stubs = {nodes[node]: values.get(former, former) for node, former in self.stubs.items()}
        copy.measured = {values[value]: kind for value, kind in self.measured.items() if value in values}
        copy.dirty = self.dirty
        copy._names |= self._names
        return copy, nodes, values


def set_type(value: ir.Value, kind: ValueType) -> None:
    """Declare a value's type; extents that the model has no name for stay open."""
    if kind.dtype is not None and kind.dtype != "string":
        value.type = ir.TensorType(dtype_of(kind.dtype))
    if kind.shape is not None:
        value.shape = ir.Shape(
            [extent if isinstance(extent, int) or extent.isidentifier() else None for extent in kind.shape]
        )


def _declare(value: ir.Value, like: ir.Value) -> None:
    value.type = like.type
    value.shape = None if like.shape is None else like.shape.copy()


def _all_names(model: ir.Model) -> Iterable[str]:
    for value in (*model.graph.inputs, *model.graph.initializers.values()):
        yield value.name or ""
    for node in nodes_within(model.graph):
        for value in node.outputs:
            yield value.name or ""
