"""A view of a graph in which fused operations and calls are written out, so that detection sees what they do.

A fused operation stands for its expansion. A call (of an ONNX model's function, of a region under autocast or under
checkpointing) runs its body exactly once, so the body stands in its place: a join inside may have its fork outside. At
the body's edge an identity stands for each operand and each result that is computed, under the name that it has there.

The view is a plain `Graph` of its own; what is found in it is told in the original's operations and values.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from rescompile.fused import program
from rescompile.fused_region import step_types
from rescompile.graph import Body, Graph, Op, Role, Value
from rescompile.kinds import OpKind, Trait


def written_out(graph: Graph) -> View | None:
    """The view; None where there is nothing to write out or to look into."""
    kinds = {op.kind for op in graph}
    bodies = _bodies(graph) if OpKind.OPAQUE in kinds else {}
    if not bodies and not any(kind.has(Trait.FUSED) for kind in kinds):
        return None
    view = View(graph)
    twins = {value: view.add_input(value.name, value.shape, value.dtype, (graph, value)) for value in graph.inputs}
    view.homes.update((twin, ((), value)) for value, twin in twins.items())
    view.fill(graph, twins, (), bodies)
    view.set_outputs([twins[value] for value in graph.outputs])
    view.commit()
    return view


class View(Graph):
    """`levels`: for each operation the calls that it is in, outermost first, and what it is of the graph it is in; ()
    for one that stands for nothing.
    `homes`: for each value the calls that it is in, and what it is there. `held`: graphs that run any number of times,
    and the operation of the view that holds each. `called`: the bodies written out, by their path."""

    def __init__(self, original: Graph) -> None:
        super().__init__(original.name)
        self.levels: dict[Op, tuple[Op, ...]] = {}
        self.homes: dict[Value, tuple[tuple[Op, ...], Value]] = {}
        self.held: list[tuple[Op, Body]] = []
        self.called: dict[str, Body] = {}

    def native_data(self, value: Value) -> Any:
        if not isinstance(value.native, tuple):
            return np.asarray(value.native)  # a number that a fused operation holds
        graph, original = value.native  # constants hold the graph and the value that they stand for
        return graph.native_data(original)

    def fill(
        self, graph: Graph, twins: dict[Value, Value], calls: tuple[Op, ...], bodies: Mapping[Op, tuple[Body, ...]]
    ) -> None:
        """Add a graph's operations. `twins`: what stands for its inputs and outer constants, completed here."""
        for value in graph.values:
            if value.role in (Role.PARAMETER, Role.CONSTANT) and value not in twins:
                name = self._free(path_of(calls, value.name))
                twins[value] = self.add_constant(name, value.shape, value.dtype, (graph, value), value.role)
                self.homes[twins[value]] = calls, value
        for op in graph:
            inputs = [None if value is None else twins[value] for value in op.inputs]
            held = bodies.get(op, ())
            results: Sequence[Value]
            if op.has(Trait.FUSED):
                results = self._write_out(op, inputs, calls)
            elif len(held) == 1 and held[0].call and len(held[0].graph.outputs) == len(op.outputs):
                results = self._call(op, held[0], twins, calls)
            else:
                copy = self._copy(op, inputs, calls)
                results = copy.outputs
                self.held += [(copy, body) for body in held]
            for value, twin in zip(op.outputs, results, strict=False):
                twins[value] = twin
                self.homes[twin] = calls, value

    def _copy(self, op: Op, inputs: Sequence[Value | None], calls: tuple[Op, ...]) -> Op:
        outputs = [(self._free(path_of(calls, value.name)), value.type) for value in op.outputs]
        name = self.unique_op_name(path_of(calls, op.name))
        copy = self.add_op(op.kind, inputs, outputs, dict(op.attrs), name=name, module=op.module)
        for value, twin in zip(op.outputs, copy.outputs, strict=True):
            twin.constant |= value.constant
        self.levels[copy] = (*calls, op)
        return copy

    def _call(self, op: Op, body: Body, twins: Mapping[Value, Value], calls: tuple[Op, ...]) -> list[Value]:
        """The body's operations; the values that stand for the call's results."""
        inner = (*calls, op)
        self.called[path_of(inner)] = body
        known: dict[Value, Value] = {}
        for value, operand in body.operands.items():
            known[value] = twins[operand]
            if not twins[operand].constant:
                known[value] = self._edge(op, twins[operand], path_of(inner, value.name))
                self.homes[known[value]] = inner, value
        for value in body.graph.inputs:
            if value not in known:
                known[value] = self.add_input(self._free(path_of(inner, value.name)), value.shape, value.dtype)
                self.homes[known[value]] = inner, value
        self.fill(body.graph, known, inner, _bodies(body.graph))
        results = zip(op.outputs, body.graph.outputs, strict=True)
        return [self._edge(op, known[value], path_of(calls, out.name)) for out, value in results]

    def _edge(self, op: Op, value: Value, name: str) -> Value:
        """An identity where a value goes into a body, or comes out of it; nobody is told of it."""
        name = self._free(name)
        edge = self.add_op(OpKind.IDENTITY, [value], [(name, value.type)], name=self.unique_op_name(name))
        edge.module = op.module
        self.levels[edge] = ()
        return edge.output

    def _write_out(self, op: Op, inputs: Sequence[Value | None], calls: tuple[Op, ...]) -> Sequence[Value]:
        """The operations of the fused operation's expansion; the values that stand for its outputs."""
        region = program(op.kind, inputs, op.attrs)
        types = step_types(region, [None if x is None else x.type for x in op.inputs], [x.type for x in op.outputs])
        known: list[Value | None] = list(inputs)
        for step, type_ in zip(region.steps, types, strict=True):
            label = self._free(path_of(calls, f"{op.name}.{step.kind.value}"))
            if step.kind is OpKind.FULL:
                number = step.attrs["value"]
                known.append(self.add_constant(label, (), type_.dtype, number, Role.CONSTANT))
                continue
            operands = [None if index is None else known[index] for index in step.inputs]
            made = self.add_op(step.kind, operands, [(label, type_)], step.settings(type_), module=op.module)
            self.levels[made] = (*calls, op)
            known.append(made.output)
        outputs = [known[index] for index in region.outputs]
        return [value for value in outputs if value is not None]

    def _free(self, name: str) -> str:
        """The name, or where another value has it one like it."""
        return self.unique_name(name) if name in self._values else name

    # ---- telling it in the original's terms ----------------------------------------------------------------------

    def told_op(self, op: Op, depth: int) -> Op | None:
        """What an operation is to somebody who stands inside so many calls; None for the edge of a call further in."""
        levels = self.levels[op]
        return levels[depth] if depth < len(levels) else None

    def told_ops(self, ops: Iterable[Op], depth: int) -> tuple[Op, ...]:
        """The operations as that somebody sees them, each once."""
        return tuple(dict.fromkeys(told for op in ops if (told := self.told_op(op, depth)) is not None))

    def told_value(self, value: Value, depth: int) -> Value:
        """What a value is to that somebody; one inside a call further in is the call's first result."""
        calls, told = self.homes.get(value, ((), value))
        return told if len(calls) <= depth else calls[depth].outputs[0]

    def visible(self, value: Value, depth: int) -> Value | None:
        """As `told_value`; None for one that is inside a call further in, or inside a fused operation."""
        calls, told = self.homes.get(value, (None, value))
        return told if calls is not None and len(calls) <= depth else None

    def common(self, op: Op, value: Value) -> tuple[Op, ...]:
        """The calls that an operation and a value are both in."""
        left, right = self.levels[op][:-1], self.homes.get(value, ((), value))[0]
        depth = 0
        while depth < min(len(left), len(right)) and left[depth] is right[depth]:
            depth += 1
        return left[:depth]


def _bodies(graph: Graph) -> dict[Op, tuple[Body, ...]]:
    return {op: bodies for op in graph if op.kind is OpKind.OPAQUE and (bodies := graph.bodies(op))}


def path_of(calls: Sequence[Op], name: str = "") -> str:
    """The path of what has that name inside those calls."""
    names = [op.name for op in calls]
    return "/".join([*names, name] if name else names)
