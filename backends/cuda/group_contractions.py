"""Grow contractions of a GPU's working graph by the elementwise operations after them, as far as one kernel reaches.

`group_epilogues`, which every backend runs before, knows bias, activation and residual. A tensor-core kernel's epilogue
takes more: gates (silu(a)·b), scales by channel or row, clamps, casts, in any order, where each value in between is
read once. What is grown becomes a fused region; it computes in float32 what the operations would have rounded between.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from rescompile.backends.cuda.lower_contraction import region_refusal
from rescompile.backends.cuda.scalars import refusal as scalar_refusal
from rescompile.backends.cuda.targets import Architecture
from rescompile.backends.working import WorkingGraph
from rescompile.fused import program
from rescompile.fused_region import FUSIBLE, Region, Step
from rescompile.graph import Attrs, Op, Role, Value
from rescompile.kinds import OpKind, Trait

_STARTS = (
    OpKind.LINEAR,
    OpKind.FUSED_LINEAR,
    OpKind.CONV,
    OpKind.FUSED_CONV,
    OpKind.MATMUL,
    OpKind.FUSED_REGION,
)


def group_contractions(graph: WorkingGraph, limits: Architecture, *, tf32: bool = False) -> None:
    """Let each contraction's kernel go on with its readers."""
    for name in [op.name for op in graph if op.kind in _STARTS]:
        chain = [graph.op(name)]
        found: tuple[list[Value | None], Attrs] | None = None
        while (reader := _reader(graph, chain[-1])) is not None:
            described = _described(graph, [*chain, reader])
            trial = Op(OpKind.FUSED_REGION, name, described[0], [reader.output], described[1])
            if region_refusal(trial, limits, tf32):
                break
            chain.append(reader)
            found = described
        if found is not None:
            graph.fuse(chain, OpKind.FUSED_REGION, found[0], [chain[-1].output], found[1], name=name)
    graph.commit()


def _reader(graph: WorkingGraph, op: Op) -> Op | None:
    """The one operation that reads the result and computes each element of it alone; None where there is none."""
    if len(op.outputs) != 1 or graph.is_output(op.output) or len(op.output.users) != 1:
        return None
    reader = op.output.users[0]
    alone = reader.has(Trait.ELEMENTWISE) and reader.kind in FUSIBLE and not scalar_refusal(reader.kind)
    return reader if alone and reader.output.shape == op.output.shape is not None else None


def _described(graph: WorkingGraph, chain: list[Op]) -> tuple[list[Value | None], Attrs]:
    """Operands and attributes of the region that stands for a chain of operations."""
    inner = {op.output for op in chain[:-1]}
    operands = list(dict.fromkeys(value for op in chain for value in op.operands if value not in inner))
    numbers = {value: number for value in operands if (number := _number(graph, value)) is not None}
    operands = [value for value in operands if value not in numbers]
    places = {value: index for index, value in enumerate(operands)}
    steps: list[Step] = []

    def add(kind: OpKind, inputs: tuple[int | None, ...], attrs: Attrs) -> int:
        steps.append(Step(kind, inputs, attrs))
        return len(operands) + len(steps) - 1

    for value, number in numbers.items():
        places[value] = add(OpKind.FULL, (), {"value": number, "dtype": value.dtype})
    for op in chain:
        inputs = [None if value is None else places[value] for value in op.inputs]
        if not op.has(Trait.FUSED):
            defaults = op.kind.spec.attrs
            attrs = {name: value for name, value in op.attrs.items() if name in defaults and value != defaults[name]}
            places[op.output] = add(op.kind, tuple(inputs), attrs)
            continue
        part = program(op.kind, op.inputs, op.attrs)
        known = list(inputs)
        for step in part.steps:
            read = tuple(None if index is None else known[index] for index in step.inputs)
            known.append(add(step.kind, read, dict(step.attrs)))
        place = known[part.outputs[0]]
        if place is not None:
            places[op.output] = place
    region = Region(len(operands), tuple(steps), (places[chain[-1].output],))
    label = "_".join(op.kind.value for op in chain)
    return list(operands), {"label": label, "steps": region.text()}


def _number(graph: WorkingGraph, value: Value) -> float | None:
    """The number that a literal without dimensions is."""
    if value.role is not Role.CONSTANT or value.shape != () or value.dtype is None or "float" not in value.dtype:
        return None
    data: Any = np.asarray(graph.data(value), dtype=np.float64)
    return float(data) if math.isfinite(float(data)) else None
