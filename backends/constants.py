"""Compute at compile time what does not depend on the inputs: exporters' shape arithmetic, masks, generated weights."""

from __future__ import annotations

from typing import Any

import numpy as np
import tvm
from tvm import relax

from rescompile.backends.emitter import Emitter
from rescompile.backends.fallback import Imports
from rescompile.backends.lowering import build_passes, finish, lower
from rescompile.backends.rules import RULES
from rescompile.backends.working import WorkingGraph, foldable
from rescompile.graph import Op, Role, Value


def fold(graph: WorkingGraph, imports: Imports | None = None) -> int:
    """Replace values that are constant by their contents; returns how many operations that took away."""
    imports = imports or Imports()
    known = {value for value in graph.values if value.role in (Role.PARAMETER, Role.CONSTANT)}
    candidates = []
    for op in graph:
        if (op.kind in RULES or op.name in imports.found) and known.issuperset(op.operands) and foldable(op):
            known.update(op.outputs)
            candidates.append(op)
    if not candidates:
        return 0
    inside = set(candidates)
    wanted = [
        value
        for op in candidates
        for value in op.outputs
        if graph.is_output(value) or any(user not in inside for user in value.users)
    ]
    before = len(graph)
    for value, data in zip(wanted, _compute(graph, imports, candidates, wanted), strict=True):
        literal = graph.literal(f"{value.name}.folded", data)
        literal.dtype = value.dtype or literal.dtype
        graph.replace_uses(value, literal)
    graph.settle()
    return before - len(graph)


def _compute(graph: WorkingGraph, imports: Imports, ops: list[Op], wanted: list[Value]) -> list[np.ndarray[Any, Any]]:
    """Contents of `wanted`, which `ops` compute from constants: by the same lowering, run here and now."""
    part = WorkingGraph()
    part.source_ir = graph.source_ir
    twins: dict[Value, Value] = {}
    given: list[np.ndarray[Any, Any]] = []

    def twin(value: Value) -> Value:
        if value not in twins:
            data = np.asarray(graph.data(value), order="C") if value.role in (Role.PARAMETER, Role.CONSTANT) else None
            if data is not None and data.size > 1024:
                # An input rather than a constant of the code, whatever its size.
                twins[value] = part.add_input(value.name, tuple(data.shape), str(data.dtype))
                given.append(data)
            else:
                twins[value] = part.add_constant(value.name, value.shape, value.dtype, data, Role.CONSTANT)
        return twins[value]

    needed: set[Value] = set(wanted)
    kept: list[Op] = []
    for op in reversed(ops):
        if any(value in needed for value in op.outputs):
            needed.update(op.operands)
            kept.append(op)
    for op in reversed(kept):
        inputs = [None if value is None else twin(value) for value in op.inputs]
        made = part.add_op(
            op.kind, inputs, [(v.name, v.type) for v in op.outputs], dict(op.attrs), name=op.name, native=op.native
        )
        twins.update(zip(op.outputs, made.outputs, strict=True))
    part.set_outputs([twins[value] for value in wanted])
    lowered = lower(Emitter(part), imports)
    target = tvm.target.Target("llvm")
    executable = relax.build(finish(lowered.module, target, None), target=target, relax_pipeline=build_passes())
    run = relax.VirtualMachine(executable, tvm.cpu())["main"]
    weights = [tvm.runtime.tensor(data) for data in lowered.weights.values()]
    result = run(*[tvm.runtime.tensor(data) for data in given], weights)
    return [np.array(part.numpy()) for part in ([result] if len(wanted) == 1 else result)]
