"""A view of a graph in which fused operations are written out, so that detection finds the same blocks in it.

The view is a plain `Graph` of its own; what is found in it is told in the original's operations and values.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rescompile.fused import expand
from rescompile.graph import Attrs, Graph, Op, Role, Value, ValueType
from rescompile.kinds import OpKind, Trait


def has_fused(graph: Graph) -> bool:
    """Whether there is anything to write out."""
    return any(op.has(Trait.FUSED) for op in graph)


def unfuse(graph: Graph) -> tuple[Graph, dict[Op, Op], dict[Value, Value]]:
    """The view, the original of each of its operations, and the original of each of its values that has one."""
    view = _View(graph)
    origin: dict[Op, Op] = {}
    twins: dict[Value, Value] = {}
    for value in graph.values:
        if value.role is Role.INPUT:
            continue
        if value.role is not Role.RESULT:
            twins[value] = view.add_constant(value.name, value.shape, value.dtype, value, value.role)
    for value in graph.inputs:
        twins[value] = view.add_input(value.name, value.shape, value.dtype, value)
    for op in graph:
        inputs = [None if value is None else twins[value] for value in op.inputs]
        if op.has(Trait.FUSED):
            made, results = _write_out(view, op, inputs)
        else:
            made = [_copy(view, op, inputs)]
            results = made[0].outputs
        origin.update((member, op) for member in made)
        twins.update(zip(op.outputs, results, strict=False))
    view.set_outputs([twins[value] for value in graph.outputs])
    view.commit()
    return view, origin, {twin: value for value, twin in twins.items()}


class _View(Graph):
    """Constants hold the original's values as their native ones."""

    def __init__(self, original: Graph) -> None:
        super().__init__(original.name)
        self._original = original

    def native_data(self, value: Value) -> Any:
        return self._original.native_data(value.native)


def _copy(view: Graph, op: Op, inputs: Sequence[Value | None]) -> Op:
    outputs = [(value.name, value.type) for value in op.outputs]
    copy = view.add_op(op.kind, inputs, outputs, dict(op.attrs), name=op.name, module=op.module)
    for value, twin in zip(op.outputs, copy.outputs, strict=True):
        twin.constant = value.constant
    return copy


def _write_out(view: Graph, op: Op, inputs: Sequence[Value | None]) -> tuple[list[Op], Sequence[Value]]:
    """The operations of the fused operation's expansion, and the values that stand for its outputs."""
    made: list[Op] = []

    def emit(kind: OpKind, operands: Sequence[Value | None], attrs: Attrs, /) -> Value:
        # Every kind of an expansion keeps the shape of the fused operation's first output.
        kind_ = ValueType(op.outputs[0].shape, op.outputs[0].dtype)
        label = view.unique_name(f"{op.name}.{kind.value}")
        made.append(view.add_op(kind, operands, [(label, kind_)], dict(attrs), module=op.module))
        return made[-1].output

    return made, expand(op.kind, inputs, op.attrs, emit)
