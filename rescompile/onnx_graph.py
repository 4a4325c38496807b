"""`OnnxGraph`: the graph protocol over an onnx_ir model, edited in place."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Self, TypeAlias, cast, get_args

import numpy as np
import onnx_ir

from rescompile import onnx_blocked, onnx_ort
from rescompile.composites import recognise
from rescompile.errors import GraphError, nearest
from rescompile.garbage import uncollected
from rescompile.graph import Body, Evaluator, Graph, Op, Value
from rescompile.kinds import OpKind, Trait
from rescompile.onnx_bodies import read_bodies
from rescompile.onnx_build import Builder, Request
from rescompile.onnx_emit import obstacle, write
from rescompile.onnx_functions import Known, call
from rescompile.onnx_import import read
from rescompile.onnx_literals import evaluate
from rescompile.onnx_native import Native, set_type
from rescompile.onnx_ops import (
    CONTRIB_DOMAIN,
    FUNCTION_DOMAIN,
    PARAMETER_KEY,
    PROVENANCE_KEY,
    Arg,
    is_runtimes_own,
    literal,
    nodes_within,
)
from rescompile.onnx_run import Optimiser, Session, node_runner
from rescompile.onnx_serial import in_memory_proto, save
from rescompile.values import numpy_dtype

Dialect: TypeAlias = Literal["functions", "ort"]
DIALECTS: tuple[str, ...] = get_args(Dialect)


class OnnxGraph(Graph):
    """A view of an `onnx_ir.Model`. Values have the model's names, operations those of its nodes.

    `notes` says which nodes are opaque although their operator is known, and why. Nodes that only compute shapes for
    operands that a kind does not list (a Reshape's target) are not shown: they stay in the model and follow its edits.
    """

    ir = "onnx"

    def __init__(self, name: str = "") -> None:
        super().__init__(name)
        self.native: Native
        self.notes: list[str] = []
        self.source = "ir"  # what the model came as: file, proto, ir, program
        self.origin: Any = None
        self.dialect: Dialect = "functions"
        self._session: Session | None = None
        self._functions: Known = {}
        self._optimiser = Optimiser()
        self._obstacles: dict[OpKind, str] = {}  # by kind, why the opset cannot hold it

    @classmethod
    def read(cls, model: onnx_ir.Model) -> Self:
        """The view of a model, which edits change from here on."""
        graph = cls(model.graph.name or "")
        with uncollected():
            graph._adopt(Native(model))
            read(graph)
            recognise(graph)
        return graph

    def _adopt(self, native: Native) -> None:
        self.native = native
        native.shown = self._shown
        native.symbol = self._symbol

    @property
    def model(self) -> onnx_ir.Model:
        """The model, as edited so far; in order after `commit`."""
        return self.native.model

    @property
    def opset(self) -> int:
        """Version of the standard operators that the model uses."""
        return self.native.opset

    @property
    def output_names(self) -> list[str]:
        """The outputs' outward names, which no edit changes."""
        return [value.name or "" for value in self.model.graph.outputs]

    def has_name(self, name: str) -> bool:
        """Whether a value or an operation has that name, hidden ones included."""
        return super().has_name(name) or self.native.has_name(name)

    def run(self, inputs: Mapping[str, np.ndarray[Any, Any]]) -> dict[str, np.ndarray[Any, Any]]:
        """Outputs by name, computed by ONNX Runtime on the CPU, or by onnx's reference where that is not installed."""
        if self._session is None:
            self.native.sort()
            self._session = Session(self.model, self._optimiser)
        return self._session.run(inputs)

    def to_user(self) -> Any:
        """The model as the kind of object that it came as: ModelProto, ONNXProgram, else (files too) onnx_ir.Model."""
        self.native.sort()
        if self.source == "proto":
            return in_memory_proto(self.model)
        if self.source == "program":
            return type(self.origin)(self.model, getattr(self.origin, "exported_program", None))
        return self.model

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the model, whole or not at all; external or very large tensors go to a file beside it."""
        self.native.sort()
        save(self.model, path)

    def cannot_emit(self, kind: OpKind) -> str:
        """Why the model's opset cannot hold an operation of this kind; empty when it can."""
        if kind not in self._obstacles:
            self._obstacles[kind] = obstacle(kind, self.opset)
        return self._obstacles[kind]

    def use_dialect(self, dialect: str) -> None:
        """Write fused operations as "functions" of the model, or as operators of ONNX Runtime ("ort") where it has
        them. Those that are there are written anew; with "functions" all that is in ONNX Runtime's own operators is."""
        if dialect not in DIALECTS:
            raise GraphError(
                f"There is no dialect '{dialect}'{nearest(dialect, DIALECTS)}: it is one of {', '.join(DIALECTS)}."
            )
        self.dialect = cast("Dialect", dialect)
        for op in self.ops:
            mine = any(node.domain == FUNCTION_DOMAIN for node in op.native)
            if (dialect == "functions" and self.foreign(op)) or (dialect == "ort" and mine and not self._missing(op)):
                self.respell(op)
        self.commit()

    def untouchable(self, op: Op) -> str:
        """What ONNX Runtime wrote for one processor."""
        return onnx_blocked.REASON if any(onnx_blocked.is_blocked(node) for node in op.native) else ""

    def foreign(self, op: Op) -> bool:
        """Whether ONNX Runtime's own operators are what the operation is written in."""
        return op.kind is not OpKind.OPAQUE and any(is_runtimes_own(node, self.opset) for node in op.native)

    def unspelled(self) -> dict[str, str]:
        """In the dialect "ort", the fused operations that are functions of the model, and why."""
        if self.dialect != "ort":
            return {}
        fused = (op for op in self if op.has(Trait.FUSED) and any(node.domain == FUNCTION_DOMAIN for node in op.native))
        return {op.name: reason for op in fused if (reason := self._missing(op))}

    def clone(self) -> Self:
        """A copy with a model of its own; tensors are shared."""
        with uncollected():
            copy = super().clone()
            native, nodes, values = self.native.clone()
            copy._adopt(native)
            for value in copy.values:
                if isinstance(value.native, onnx_ir.Value):
                    value.native = values[value.native]
            groups: dict[int, list[Op]] = {}
            for mine, theirs in zip(self, copy, strict=True):
                theirs.native = tuple(nodes[node] for node in mine.native)
                if mine.group is not None:
                    theirs.group = groups.setdefault(id(mine.group), [])
                    theirs.group.append(theirs)
            copy.source, copy.origin, copy.dialect = self.source, self.origin, self.dialect
            copy.notes, copy._optimiser = list(self.notes), self._optimiser
        return copy

    # ---- tensors -------------------------------------------------------------------------------------------------

    def native_data(self, value: Value) -> np.ndarray[Any, Any]:
        """Contents of an initializer or Constant node, or of what the model computes from literals alone."""
        native = value.native
        if not isinstance(native, onnx_ir.Value):
            return np.asarray(native)
        tensor = literal(native)
        if tensor is None:
            return evaluate(native, self.native.measured.get)
        try:
            return tensor.numpy()
        except (OSError, ValueError) as error:
            raise GraphError(f"The contents of '{value.name}' cannot be read: {error}") from error

    def native_evaluator(self, op: Op) -> Evaluator:
        """Computes the operation's one node by the runtime alone."""
        if len(op.native) != 1:
            raise GraphError(f"'{op.name}' stands for several nodes, which are not computed one by one.")
        run = node_runner(op.native[0], self.model.opset_imports)
        names = [None if value is None else value.native.name for value in op.inputs]

        def evaluate_node(operands: Sequence[np.ndarray[Any, Any] | None]) -> list[np.ndarray[Any, Any]]:
            pairs = zip(names, operands, strict=True)
            return run({name: array for name, array in pairs if name is not None and array is not None})

        return evaluate_node

    def native_add_parameter(self, value: Value, data: np.ndarray[Any, Any], trainable: bool) -> None:
        """A new initializer, marked as none of the exporter's literals, which readers tell by their having no mark."""
        value.native = self.native.initializer(value.name, data)
        value.native.metadata_props[PARAMETER_KEY] = "trained" if trainable else "fixed"
        self._session = None

    def native_add_literal(self, value: Value, number: float) -> None:
        """A new initializer."""
        value.native = self.native.initializer(
            value.name, np.asarray(number, dtype=numpy_dtype(value.dtype or "float32"))
        )
        self._session = None

    def native_set_data(self, value: Value, data: np.ndarray[Any, Any]) -> None:
        """Another tensor for the initializer."""
        value.native.const_value = onnx_ir.tensor(data, name=value.name)
        self._session = None

    def native_drop(self, value: Value) -> None:
        """Remove an initializer or a constant's node, unless a hidden node still reads it."""
        if isinstance(value.native, onnx_ir.Value):
            self.native.drop_constant(value.native)
            self._session = None

    def native_bodies(self, op: Op) -> tuple[Body, ...]:
        """The graphs of an If, a Loop, a Scan; what a call of a model-local function runs."""
        return read_bodies(self, op)

    # ---- edits ---------------------------------------------------------------------------------------------------

    def native_emit(self, op: Op) -> None:
        """New nodes for the operation, at the end; commit sorts them into place."""
        for value in op.operands:
            self._native(value)
        builder = Builder(self.opset, self._symbol, self._write_fused)
        outputs = write(builder, self._request(op))
        for value, native in zip(op.outputs, outputs, strict=False):
            native.name = self.native.fresh(value.name)
            set_type(native, value.type)
            value.native = native
        for node in builder.nodes:
            if op.provenance:
                node.metadata_props[PROVENANCE_KEY] = op.provenance
        builder.nodes[-1].name = op.name
        self.native.append(builder.nodes, op.output.name)
        self.native.optional.update(builder.optional)
        op.native = tuple(builder.nodes)
        self._session = None

    def native_set_shape(self, value: Value) -> None:
        """Declare the shape, also for what asks about it."""
        if isinstance(value.native, onnx_ir.Value):
            set_type(value.native, value.type)
            if value.native in self.native.measured:
                self.native.measured[value.native] = value.type
        self._session = None

    def native_respell(self, op: Op) -> None:
        """New nodes in the place of the operation's."""
        self._write_anew(op)

    def native_erase_nodes(self, nodes: tuple[Any, ...]) -> None:
        """Remove nodes, and what is not shown and served only them."""
        self.native.erase(nodes)
        self._session = None

    def native_redirect(self, old: Any, value: Value) -> None:
        """Readers and graph outputs go from `old` to the value's new native, which takes over name and metadata."""
        if old is None:
            # No node computed the value so far: those of its readers did, and read it from now on.
            for op in value.users:
                if op.native:
                    self._write_anew(op)
        elif isinstance(old, onnx_ir.Value) and old is not value.native:
            self.native.redirect(old, value.native)
        self._session = None

    def may_share(self, value: Value) -> bool:
        """Exporters merge equal tensors: fresh gains and shifts, of one number each, tell of no common layer."""
        data = self.data(value)
        return bool(data.size) and bool((data == data.flat[0]).all())

    def native_set_operand(self, op: Op, index: int, value: Value) -> None:
        """In place where the operand is one input of the operation's nodes, else by writing the operation anew."""
        old, new = op.inputs[index], self._native(value)
        slots = [] if old is None or old.native is None else self._slots(op, old.native)
        same = [position for position, operand in enumerate(op.inputs) if operand is old]
        if old is None and op.kind is OpKind.OPAQUE and index < len(op.native[0].inputs):
            op.native[0].replace_input_with(index, new)
        elif slots and len(same) == 1:
            for node, slot in slots:
                node.replace_input_with(slot, new)
        elif slots and len(same) == len(slots) and len(op.native) == 1:
            node, slot = slots[same.index(index)]
            node.replace_input_with(slot, new)
        else:
            self._rewrite(op, index, value)
        self.native.dirty = True
        self._session = None

    def native_ask_shape(self, old: Value, new: Value) -> None:
        """Hidden nodes that compute shapes."""
        if isinstance(old.native, onnx_ir.Value) and isinstance(new.native, onnx_ir.Value):
            for node, slot in tuple(old.native.uses()):
                if node in self.native.hidden:
                    node.replace_input_with(slot, new.native)
                    self.native.measured[new.native] = new.type
                    self.native.dirty = True

    def native_replace_output(self, old: Value, new: Value) -> None:
        """`new` takes the output's place and outward name; what cannot be renamed goes through an Identity."""
        source = self._native(new)
        for position, output in enumerate(self.outputs):
            if output is old:
                self.native.set_output(position, source, old.name)
        self._session = None

    def native_commit(self) -> None:
        """Sort and check the model, and drop functions that nobody calls."""
        self.native.commit()

    # ---- inside --------------------------------------------------------------------------------------------------

    def _missing(self, op: Op) -> str:
        return onnx_ort.missing(self._request(op))

    def _request(self, op: Op) -> Request:
        args = [None if value is None else Arg(value.native, value.shape, value.dtype) for value in op.inputs]
        return Request(op.kind, args, op.attrs, [value.type for value in op.outputs])

    def _write_fused(self, builder: Builder, request: Request) -> list[onnx_ir.Value]:
        written = onnx_ort.write(builder, request) if self.dialect == "ort" else None
        if not written:
            return call(self.model, builder, request, self._functions)
        self.model.opset_imports[CONTRIB_DOMAIN] = 1
        return written

    def _native(self, value: Value) -> onnx_ir.Value:
        """The value's native counterpart, made where the model did not spell it out."""
        if isinstance(value.native, np.ndarray):
            value.native = self.native.initializer(self.native.fresh(value.name), value.native)
        if value.native is None and value.producer is not None:
            producer = value.producer
            if producer.group is not None:
                self.materialise(producer)
            else:
                self._write_anew(producer)
        if not isinstance(value.native, onnx_ir.Value):
            raise GraphError(f"'{value.name}' has no counterpart in the ONNX model.")
        return value.native

    def _write_anew(self, op: Op) -> None:
        for value in op.operands:
            self._native(value)
        nodes = op.native
        natives = [value.native for value in op.outputs]
        self.native_emit(op)
        for old, value in zip(natives, op.outputs, strict=True):
            self.native_redirect(old, value)
        self.native.erase(nodes)

    def _rewrite(self, op: Op, index: int, value: Value) -> None:
        old = op.inputs[index]
        op.inputs[index] = value
        try:
            self._write_anew(op)
        finally:
            op.inputs[index] = old

    def _slots(self, op: Op, native: Any) -> list[tuple[onnx_ir.Node, int]]:
        """Where the operation's nodes, and the graphs inside them, read a native value."""
        return [
            (node, slot)
            for node in nodes_within(op.native)
            for slot, value in enumerate(node.inputs)
            if value is native
        ]

    def _shown(self, native: onnx_ir.Value) -> bool:
        value = self._values.get(native.name or "")
        return value is not None and value.native is native

    def _symbol(self, name: str) -> tuple[onnx_ir.Value, int] | None:
        for value in self.inputs:
            if value.shape is not None and name in value.shape:
                return value.native, value.shape.index(name)
        return None
