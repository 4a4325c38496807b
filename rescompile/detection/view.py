"""A view of a graph in which fused operations and calls are written out, so that detection sees what they do.

A fused operation stands for its expansion, in which a contraction over a concatenation stands for a sum of
contractions. One that a pass made together with the split of its output stands for contractions side by side. A call
(of an ONNX model's function, of a region under autocast or under checkpointing) runs its body exactly once, so the body
stands in its place: a join inside may have its fork outside. At the body's edge an identity stands for each operand and
each result that is computed, under the name that it has there.

The view is a plain `Graph` of its own; what is found in it is told in the original's operations and values.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from rescompile.detection.stacked import side_by_side, sums
from rescompile.fused import program
from rescompile.fused_region import step_types
from rescompile.graph import Attrs, Body, Graph, Op, Role, Value, ValueType
from rescompile.kinds import OpKind, Trait


def written_out(graph: Graph) -> View | None:
    """The view; None where there is nothing to write out or to look into."""
    kinds = {op.kind for op in graph}
    bodies = _bodies(graph) if OpKind.OPAQUE in kinds else {}
    stacked = OpKind.SPLIT in kinds and any(side_by_side(graph, op) for op in graph)
    if not bodies and not stacked and not any(kind.has(Trait.FUSED) for kind in kinds):
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
        graph, original, *part = value.native  # what the constant stands for, and which part of it
        data = graph.native_data(original)
        return data[part[0]] if part else data

    def fill(
        self, graph: Graph, twins: dict[Value, Value], calls: tuple[Op, ...], bodies: Mapping[Op, tuple[Body, ...]]
    ) -> None:
        """Add a graph's operations. `twins`: what stands for its inputs and outer constants, completed here."""
        for value in graph.values:
            if value.role in (Role.PARAMETER, Role.CONSTANT) and value not in twins:
                name = self._free(path_of(calls, value.name))
                twins[value] = self.add_constant(name, value.shape, value.dtype, (graph, value), value.role)
                self.homes[twins[value]] = calls, value
        stacked = {op: whole for op in graph if (whole := side_by_side(graph, op))}
        parted = {op for whole in stacked.values() for op in whole}
        for op in graph:
            if op in parted:
                continue
            whole = stacked.get(op, ())
            inputs = [None if value is None else twins[value] for value in (*whole, op)[0].inputs]
            held = bodies.get(op, ())
            results: Sequence[Value]
            if whole:
                results = self._take_apart(whole, op, inputs, calls)
            elif op.has(Trait.FUSED):
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
        read = [None if x is None else x.shape for x in op.inputs]
        added = sums(region, op.inputs, [*read, *(type_.shape for type_ in types)])
        for step, type_ in zip(region.steps, types, strict=True):
            if len(known) in added.values():
                known.append(None)
                continue
            label = self._free(path_of(calls, f"{op.name}.{step.kind.value}"))
            if step.kind is OpKind.FULL:
                number = step.attrs["value"]
                known.append(self.add_constant(label, (), type_.dtype, number, Role.CONSTANT))
                continue
            operands = [None if index is None else known[index] for index in step.inputs]
            settings = step.settings(type_)
            if len(known) in added:
                concat = region.steps[added[len(known)] - region.operands]
                parts = [value for index in concat.inputs if index is not None and (value := known[index]) is not None]
                known.append(self._sum(op, step.kind, parts, operands[1:], type_, settings, calls))
                continue
            made = self.add_op(step.kind, operands, [(label, type_)], settings, module=op.module)
            self.levels[made] = (*calls, op)
            known.append(made.output)
        outputs = [known[index] for index in region.outputs]
        return [value for value in outputs if value is not None]

    def _sum(
        self,
        op: Op,
        kind: OpKind,
        parts: Sequence[Value],
        stored: Sequence[Value | None],
        type_: ValueType,
        attrs: Attrs,
        calls: tuple[Op, ...],
    ) -> Value:
        """W·h + P·x of a contraction with the weight [W P] over [h, x]; its bias is the first one's."""
        axis = 1 if kind is OpKind.CONV or attrs.get("transpose_weight", True) else 0
        terms, start = [], 0
        for number, part in enumerate(parts):
            columns = slice(start, start + int((part.shape or ())[1 if kind is OpKind.CONV else -1]))
            start = columns.stop
            weight = None if stored[0] is None else self._part(stored[0], axis, columns, number)
            operands = [part, weight, stored[1] if number == 0 and len(stored) > 1 else None]
            label = self._free(path_of(calls, f"{op.name}.{kind.value}"))
            term = self.add_op(kind, operands, [(label, type_)], dict(attrs), module=op.module)
            self.levels[term] = (*calls, op)
            terms.append(term.output)
        label = self._free(path_of(calls, f"{op.name}.{OpKind.ADD.value}"))
        total = self.add_op(OpKind.ADD, terms, [(label, type_)], module=op.module)
        self.levels[total] = (*calls, op)
        return total.output

    def _take_apart(
        self, whole: tuple[Op, ...], split: Op, inputs: Sequence[Value | None], calls: tuple[Op, ...]
    ) -> Sequence[Value]:
        """Contractions side by side, with their activations; the values that stand for the parts of the split."""
        work = whole[0]
        axis = 1 if work.kind is OpKind.LINEAR and not work.attr("transpose_weight") else 0
        results, start = [], 0
        for number, (part, size) in enumerate(zip(split.outputs, split.attr("sizes"), strict=True)):
            rows = slice(start, start + size)
            start += size
            stored = [
                None if value is None else self._part(value, at, rows, number)
                for value, at in zip(inputs[1:], (axis, 0), strict=False)
            ]
            operands: list[Value | None] = [inputs[0], *stored]
            for op in whole:
                label = self._free(path_of(calls, f"{op.name}.{number}"))
                made = self.add_op(op.kind, operands, [(label, part.type)], dict(op.attrs), module=op.module)
                self.levels[made] = (*calls, op)
                operands = [made.output]
            name = self._free(path_of(calls, part.name))
            end = self.add_op(OpKind.IDENTITY, operands, [(name, part.type)], module=split.module)
            self.levels[end] = (*calls, split)
            results.append(end.output)
        return results

    def _part(self, stored: Value, axis: int, along: slice, number: int) -> Value:
        """A part of a stored tensor."""
        shape = stored.shape or ()
        extents = (*shape[:axis], *((along.stop - along.start,) if shape else ()), *shape[axis + 1 :])
        native = (*stored.native[:2], (*(slice(None) for _ in range(axis)), along))
        part = self.add_constant(self._free(f"{stored.name}.{number}"), extents, stored.dtype, native, stored.role)
        self.homes[part] = self.homes[stored]
        return part

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
