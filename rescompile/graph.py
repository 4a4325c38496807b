"""The graph protocol: what detection, passes and lowering see of a model, whatever IR it is in.

A `Graph` is a view in single static assignment form over somebody's own object (a `torch.fx.GraphModule`, an
`onnx_ir.Model`). Its `Op`s are *logical*: one `Op` may cover several native nodes (a layer norm that an exporter
decomposed), and one native node may stand for several `Op`s (`addcmul` is a mul and an add). Edits change the view and
the native object together; nothing else changes either. A plain `Graph` has no native object and serves as the model of
the protocol in tests and as the body of fused operations.

Adapters subclass `Graph`, read their object with `add_input`, `add_constant` and `add_op`, and implement the `native_*`
methods.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np

from rescompile.errors import GraphError, nearest
from rescompile.fused import program
from rescompile.fused_region import step_types
from rescompile.kinds import OpKind, Trait
from rescompile.native import Evaluator, Native
from rescompile.values import Attrs, Dim, Op, Role, Shape, Value, ValueType

__all__ = ["Attrs", "Body", "Dim", "Evaluator", "Graph", "Op", "Role", "Shape", "Value", "ValueType"]


class Graph(Native):
    """Values and operations in topological order, and the edits that change them."""

    ir = "memory"

    def __init__(self, name: str = "") -> None:
        self.name = name
        self.inputs: list[Value] = []
        self.outputs: list[Value] = []
        self._ops: dict[str, Op] = {}
        self._values: dict[str, Value] = {}
        self._orphans: dict[Value, None] = {}  # constants whose last use an edit took away
        self._dirty = False

    # ---- reading -----------------------------------------------------------------------------------------------

    @property
    def ops(self) -> list[Op]:
        """The operations, in topological order once edits are committed."""
        return list(self._ops.values())

    def __iter__(self) -> Iterator[Op]:
        return iter(self._ops.values())

    def __len__(self) -> int:
        return len(self._ops)

    @property
    def values(self) -> Iterable[Value]:
        """All values, constants included."""
        return self._values.values()

    @property
    def parameters(self) -> list[Value]:
        """The named tensors of the model's state, in its order."""
        role = Role.PARAMETER
        return [value for value in self._values.values() if value.role is role]

    @property
    def training(self) -> bool:
        """Whether the graph is the training form of its model."""
        return False

    def may_share(self, value: Value) -> bool:
        """Whether one tensor may stand for several of the user's model, because an exporter merged equal ones."""
        return False

    def value(self, name: str) -> Value:
        """The value of that name; GraphError with the nearest name when there is none."""
        try:
            return self._values[name]
        except KeyError:
            raise GraphError(f"There is no value '{name}' in the graph{nearest(name, self._values)}.") from None

    def op(self, name: str) -> Op:
        """The operation of that name; GraphError with the nearest name when there is none."""
        try:
            return self._ops[name]
        except KeyError:
            raise GraphError(f"There is no operation '{name}' in the graph{nearest(name, self._ops)}.") from None

    def has_op(self, name: str) -> bool:
        """Whether an operation has that name."""
        return name in self._ops

    def has_name(self, name: str) -> bool:
        """Whether a value or an operation has that name."""
        return name in self._values or name in self._ops

    def bodies(self, op: Op) -> tuple[Body, ...]:
        """The graphs that an operation holds: a condition's branches, a loop's body, what a call runs."""
        return self.native_bodies(op) if op.kind is OpKind.OPAQUE else ()

    def is_output(self, value: Value) -> bool:
        """Whether the value is one of the graph's outputs."""
        return any(value is output for output in self.outputs)

    def data(self, value: Value) -> np.ndarray[Any, Any]:
        """The contents of a parameter or literal (bfloat16 as ml_dtypes.bfloat16). GraphError for other values."""
        if value.role not in (Role.PARAMETER, Role.CONSTANT):
            raise GraphError(f"'{value.name}' is computed by the graph: only parameters and literals have data.")
        return self.native_data(value)

    def scalar(self, value: Value | None) -> float | None:
        """The number that a literal or parameter of one element holds, None for anything else."""
        if value is None or value.role not in (Role.PARAMETER, Role.CONSTANT) or value.shape is None:
            return None
        if any(extent != 1 for extent in value.shape):
            return None
        if isinstance(value.native, float):
            return value.native  # as it was written: a call computes with it before anything is rounded
        return float(self.data(value).reshape(-1)[0])

    # ---- building (used by adapters while reading their object, and for graphs in memory) ----------------------

    def add_input(self, name: str, shape: Shape | None, dtype: str | None, native: Any = None) -> Value:
        """A graph input."""
        value = self._register(Value(name, shape, dtype, Role.INPUT, native))
        self.inputs.append(value)
        return value

    def add_constant(
        self, name: str, shape: Shape | None, dtype: str | None, native: Any = None, role: Role = Role.PARAMETER
    ) -> Value:
        """A parameter or literal that is already part of the native object."""
        return self._register(Value(name, shape, dtype, role, native))

    def add_op(
        self,
        kind: OpKind,
        inputs: Sequence[Value | None],
        outputs: Sequence[tuple[str, ValueType]],
        attrs: Attrs | None = None,
        *,
        name: str = "",
        native: tuple[Any, ...] = (),
        natives: Sequence[Any] | None = None,
        module: str = "",
    ) -> Op:
        """An operation that is already part of the native object. `natives`: one native value for each output."""
        values = [Value(label, kind_.shape, kind_.dtype, Role.RESULT) for label, kind_ in outputs]
        if natives is not None:
            for value, native_value in zip(values, natives, strict=False):
                value.native = native_value
        op = Op(kind, self.unique_op_name(name or values[0].name), inputs, values, attrs or {}, native, module)
        self._link(op)
        return op

    def cover(
        self,
        ops: Sequence[Op],
        kind: OpKind,
        inputs: Sequence[Value | None],
        outputs: Sequence[Value],
        attrs: Attrs | None = None,
        *,
        before: Sequence[tuple[OpKind, Sequence[Value | None], Value, Attrs]] = (),
    ) -> Op:
        """Present `ops` as one logical operation that covers their native nodes; the native object does not change.

        `before`: operations, each with its inputs, one new value and attributes, that prepare operands out of what the
        region reads; together with the one they stand for the native nodes. Only while reading, and only for operations
        that together stand for whole native nodes.
        """
        inside, kept = frozenset(ops), frozenset(outputs)
        for op in ops:
            if op.group is not None and not set(op.group) <= set(ops):
                raise GraphError(f"'{op.name}' shares its native node with others and cannot be covered without them.")
            self._check_unread(op, inside, kept)
        orphans = dict(self._orphans)
        for op in ops:
            self._unlink(op, keep=kept)
        self._orphans = orphans  # the native nodes still read the constants that the view no longer shows
        native = tuple(dict.fromkeys(node for op in ops for node in op.native))
        makers = {op.provenance for op in ops if not op.has(Trait.FREE)}
        maker = makers.pop() if len(makers) == 1 else ""
        order = max(member.order for member in ops)
        members = []
        for step_kind, step_inputs, step_outputs, step_attrs in (
            *((made, reads, (value,), settings) for made, reads, value, settings in before),
            (kind, inputs, outputs, attrs or {}),
        ):
            label = self.unique_op_name(step_outputs[0].name)
            op = Op(step_kind, label, step_inputs, step_outputs, step_attrs, native, module=ops[-1].module)
            self._link(op)
            op.order = order
            op.provenance = maker
            members.append(op)
        if before:
            for op in members:
                op.group = members
        self._dirty = True
        return members[-1]

    def sort(self) -> None:
        """Put the operations in topological order and number them; the native object does not change."""
        if self._dirty:
            self._sort()
        for order, op in enumerate(self):
            op.order = order
        self._dirty = False

    def set_outputs(self, outputs: Sequence[Value]) -> None:
        """Name the graph's outputs."""
        self.outputs = list(outputs)

    # ---- edits -------------------------------------------------------------------------------------------------

    def insert(
        self,
        kind: OpKind,
        inputs: Sequence[Value | None],
        outputs: Sequence[tuple[str, ValueType]],
        attrs: Attrs | None = None,
        *,
        name: str = "",
        module: str = "",
        provenance: str = "",
    ) -> Op:
        """A new operation, native node included. Outputs are named, and typed, by the caller."""
        op = self.add_op(kind, inputs, outputs, attrs, name=name, module=module)
        op.provenance = provenance
        self.native_emit(op)
        self._dirty = True
        return op

    def add_parameter(self, name: str, data: np.ndarray[Any, Any], *, trainable: bool = True) -> Value:
        """A new named tensor in the model's state."""
        if self.has_name(name):
            raise GraphError(f"The model already has something named '{name}': choose another name.")
        value = Value(name, tuple(int(extent) for extent in data.shape), str(data.dtype), Role.PARAMETER)
        self._register(value)
        self.native_add_parameter(value, data, trainable)
        return value

    def add_literal(self, name: str, number: float, dtype: str) -> Value:
        """A new number, without dimensions."""
        if self.has_name(name):
            raise GraphError(f"The model already has something named '{name}': choose another name.")
        value = self._register(Value(name, (), dtype, Role.CONSTANT))
        self.native_add_literal(value, number)
        return value

    def set_data(self, value: Value, data: np.ndarray[Any, Any]) -> None:
        """Give a parameter other contents, of its own shape and dtype. Clones made before keep theirs."""
        if value.role is not Role.PARAMETER or value.shape != data.shape:
            raise GraphError(f"'{value.name}' does not take contents of shape {list(data.shape)}: it is {value.shape}.")
        self.native_set_data(value, data)

    def set_operand(self, op: Op, index: int, value: Value) -> None:
        """Let operand `index` of `op` be `value`."""
        old = op.inputs[index]
        if old is value:
            return
        self.materialise(op)
        self.native_set_operand(op, index, value)
        if old is not None:
            del old.uses[op, index]
            self._note_orphan(old)
        op.inputs[index] = value
        value.uses[op, index] = None
        self._dirty = True

    def replace_uses(self, old: Value, new: Value, *, outputs: bool = True) -> None:
        """Let every reader of `old` read `new`; with `outputs`, the graph's outputs too (they keep their names)."""
        for op, index in list(old.uses):
            self.set_operand(op, index, new)
        earlier = new.producer is None or (old.producer is not None and new.producer.order < old.producer.order)
        if earlier and new.shape is not None and new.shape == old.shape:
            self.native_ask_shape(old, new)
        if outputs and self.is_output(old):
            self.native_replace_output(old, new)
            self.outputs = [new if value is old else value for value in self.outputs]
        self._dirty = True

    def set_shape(self, value: Value, shape: Shape | None) -> None:
        """Declare the shape of an operation's result anew, after what the operation reads got another one."""
        if value.role is not Role.RESULT:
            raise GraphError(f"'{value.name}' keeps its shape: nothing in the graph computes it.")
        value.shape = shape
        self.native_set_shape(value)

    def erase(self, op: Op, *, for_good: bool = False) -> None:
        """Remove an operation that nobody reads any more; with `for_good` the model's other form lacks it too."""
        self._check_unread(op, inside=frozenset((op,)))
        self.materialise(op)
        if for_good:
            self.native_forgo(op)
        self._unlink(op)
        self.native_erase(op)
        self._dirty = True

    def fuse(
        self,
        ops: Sequence[Op],
        kind: OpKind,
        inputs: Sequence[Value | None],
        outputs: Sequence[Value],
        attrs: Attrs | None = None,
        *,
        name: str = "",
        provenance: str = "",
    ) -> Op:
        """One operation in the place of `ops`. `outputs` are values that they produce; names and readers stay."""
        inside = frozenset(ops)
        kept = frozenset(outputs)
        for op in ops:
            self._check_unread(op, inside, kept)
        for op in ops:
            self.materialise(op)
        old_natives = [value.native for value in outputs]
        module = ops[0].module
        for op in ops:
            self._unlink(op, keep=kept)
        new = Op(kind, self.unique_op_name(name or outputs[0].name), inputs, outputs, attrs or {}, module=module)
        new.provenance = provenance
        self._link(new)
        self.native_emit(new)
        for old, value in zip(old_natives, outputs, strict=True):
            self.native_redirect(old, value)
        for op in sorted(ops, key=lambda op: op.order, reverse=True):
            self.native_erase(op)
        self._dirty = True
        return new

    def unfuse(self, op: Op, *, provenance: str = "") -> list[Op]:
        """The operations that a fused one stands for, in its place; its outputs keep their names and readers."""
        self.materialise(op)
        region = program(op.kind, op.inputs, op.attrs)
        types = step_types(region, [None if x is None else x.type for x in op.inputs], [x.type for x in op.outputs])
        kept = dict(zip(region.outputs, op.outputs, strict=True))
        for output, value in zip(region.outputs, op.outputs, strict=True):
            if kept[output] is not value or output < region.operands:
                raise GraphError(f"'{op.name}' cannot be taken apart: it returns a value under two names.")
        native, operands, produced = op.native, list(op.inputs), [(value, value.native) for value in op.outputs]
        orphans = dict(self._orphans)
        self._unlink(op, keep=frozenset(op.outputs))
        self._orphans = orphans
        known: list[Value | None] = operands
        members: list[Op] = []
        for step, type_ in zip(region.steps, types, strict=True):
            label = self.unique_name(f"{op.name}.{step.kind.value}")
            if step.kind is OpKind.FULL:
                known.append(self.add_literal(label, step.attrs["value"], type_.dtype or "float32"))
                continue
            value = kept.get(len(known)) or Value(label, type_.shape, type_.dtype, Role.RESULT)
            name = self.unique_op_name(value.name)
            inputs = [None if index is None else known[index] for index in step.inputs]
            made = Op(step.kind, name, inputs, [value], step.settings(type_), module=op.module)
            made.provenance, made.order = provenance, op.order
            self._link(made)
            self.native_emit(made)
            members.append(made)
            known.append(value)
        for value, old in produced:
            self.native_redirect(old, value)
        self.native_erase_nodes(native)
        self._dirty = True
        return members

    def respell(self, op: Op, *, provenance: str = "") -> None:
        """Write an operation, and those that it shares native nodes with, as an edit would; nothing else changes."""
        op.provenance = provenance or op.provenance
        if op.group is not None:
            self.materialise(op)
        else:
            self.native_respell(op)
        self._dirty = True

    def materialise(self, op: Op) -> None:
        """Give each operation of a group (several operations that one native node stands for) its own native node."""
        group = op.group
        if group is None:
            return
        native = op.native
        produced = [(value, value.native) for member in group for value in member.outputs if value.native is not None]
        for member in group:
            member.group = None
            member.native = ()
            self.native_emit(member)
        for value, old in produced:
            self.native_redirect(old, value)
        self.native_erase_nodes(native)
        self._dirty = True

    def commit(self) -> None:
        """Sort topologically (stable), drop parameters that edits left unread, and check the native object.

        GraphError names a cycle, or what the native checker says.
        """
        if self._dirty:
            self._sort()
        for value in list(self._orphans):
            if not value.uses and not self.is_output(value):
                del self._values[value.name]
                self.native_drop(value)
        self._orphans.clear()
        for order, op in enumerate(self):
            op.order = order
        self.native_commit()
        self._dirty = False

    def clone(self) -> Self:
        """A copy that can be edited alone; tensors are shared until an edit replaces them."""
        copy = type(self)(self.name)
        self._copy_to(copy)
        for value, twin in zip(self.values, copy.values, strict=True):
            twin.native = value.native
        return copy

    def outline(self) -> Graph:
        """The view alone, as a graph in memory: what was there, its names, types and uses, but no data."""
        copy = Graph(self.name)
        self._copy_to(copy)
        return copy

    def _copy_to(self, copy: Graph) -> None:
        values: dict[Value, Value] = {}
        for value in self._values.values():
            twin = Value(value.name, value.shape, value.dtype, value.role)
            twin.constant = value.constant
            values[value] = copy._values[twin.name] = twin
        for op in self:
            inputs = [None if value is None else values[value] for value in op.inputs]
            twin_op = Op(op.kind, op.name, inputs, [values[out] for out in op.outputs], dict(op.attrs), (), op.module)
            twin_op.provenance, twin_op.order = op.provenance, op.order
            copy._link(twin_op)
        copy.inputs = [values[value] for value in self.inputs]
        copy.outputs = [values[value] for value in self.outputs]

    def unique_name(self, stem: str) -> str:
        """`stem`, or `stem_1`, `stem_2`, ...: the first that neither a value nor an operation has."""
        name, count = stem, 0
        while self.has_name(name):
            count += 1
            name = f"{stem}_{count}"
        return name

    def unique_op_name(self, stem: str) -> str:
        """As `unique_name`, among operations only: an operation may be named after its output."""
        name, count = stem, 0
        while name in self._ops:
            count += 1
            name = f"{stem}_{count}"
        return name

    def run(self, inputs: Mapping[str, np.ndarray[Any, Any]]) -> dict[str, np.ndarray[Any, Any]]:
        """Execute the native object: outputs by name. GraphError where there is nothing to execute."""
        raise GraphError("A graph in memory cannot be run: only graphs of torch and ONNX models can.")

    def to_user(self) -> Any:
        """The model as the kind of object that came in."""
        raise GraphError("A graph in memory stands for no model: only graphs of torch and ONNX models do.")

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the model to `path`, whole or not at all."""
        raise GraphError("A graph in memory cannot be saved: only graphs of torch and ONNX models can.")

    def cannot_emit(self, kind: OpKind) -> str:
        """Why the model's IR (its opset, its mode) cannot hold an operation of this kind; empty when it can."""
        return ""

    def use_dialect(self, dialect: str) -> None:
        """Write fused operations in this way from here on. GraphError where the model's IR has one way only."""
        raise GraphError(
            f"The dialect '{dialect}' says how fused operations are written into ONNX models, and this model is none: "
            "leave it out."
        )

    def foreign(self, op: Op) -> bool:
        """Whether only one runtime has the operators that the operation is written in."""
        return False

    def untouchable(self, op: Op) -> str:
        """Why no pass may change an opaque operation, where that has a reason of its own; empty otherwise."""
        return ""

    def unspelled(self) -> dict[str, str]:
        """Fused operations, by name, that the dialect has no operator for, and why."""
        return {}

    # ---- inside ------------------------------------------------------------------------------------------------

    def _register(self, value: Value) -> Value:
        if value.name in self._values:
            raise GraphError(f"Two values of the graph have the name '{value.name}': names must be unique.")
        self._values[value.name] = value
        return value

    def _link(self, op: Op) -> None:
        op.order = len(self._ops)
        self._ops[op.name] = op
        alone, constant = True, True
        for index, value in enumerate(op.inputs):
            if value is not None:
                value.uses[op, index] = None
                alone = False
                constant = constant and value.constant
        if constant:
            constant = not (op.kind is OpKind.OPAQUE or op.has(Trait.RANDOM) or (alone and not op.has(Trait.SOURCE)))
        for value in op.outputs:
            if self._values.get(value.name) is not value:
                self._register(value)
            value.producer = op
            value.constant = constant

    def _unlink(self, op: Op, keep: frozenset[Value] = frozenset()) -> None:
        del self._ops[op.name]
        for index, value in enumerate(op.inputs):
            if value is not None:
                value.uses.pop((op, index), None)
                self._note_orphan(value)
        for value in op.outputs:
            value.producer = None
            if value not in keep:
                del self._values[value.name]

    def _note_orphan(self, value: Value) -> None:
        if not value.uses and value.role in (Role.PARAMETER, Role.CONSTANT):
            self._orphans[value] = None

    def _check_unread(self, op: Op, inside: frozenset[Op], kept: frozenset[Value] = frozenset()) -> None:
        for value in op.outputs:
            if value in kept:
                continue
            reader = next((user for user in value.users if user not in inside), None)
            if reader is not None:
                raise GraphError(f"'{op.name}' cannot be removed: '{reader.name}' still reads '{value.name}'.")
            if self.is_output(value):
                raise GraphError(f"'{op.name}' cannot be removed: '{value.name}' is an output of the graph.")

    def _sort(self) -> None:
        """Stable: an operation keeps its place unless one that it reads comes later."""
        done: dict[str, Op] = {}
        entered: set[Op] = set()
        for root in self:
            if root.name in done:
                continue
            stack: list[tuple[Op, Iterator[Value]]] = [(root, iter(root.operands))]
            entered.add(root)
            while stack:
                op, operands = stack[-1]
                for value in operands:
                    producer = value.producer
                    if producer is None or producer.name in done:
                        continue
                    if producer in entered:
                        raise GraphError(
                            f"The graph has a cycle through '{producer.name}': undo the edit that made it."
                        )
                    entered.add(producer)
                    stack.append((producer, iter(producer.operands)))
                    break
                else:
                    stack.pop()
                    done[op.name] = op
        self._ops = done


@dataclass(frozen=True, slots=True)
class Body:
    """A graph inside an operation. It is a copy: editing it changes nothing.

    What it captures from outside is an input of it, or a constant where it is one outside. `operands`: the values of
    the outer graph that its inputs and constants are on every run; others, like what a loop carries, are not listed.
    `call`: it runs exactly once, and its outputs are the operation's.
    """

    label: str
    graph: Graph
    operands: Mapping[Value, Value]
    call: bool = False
