"""Sums of affine maps of one value as a pass: what the networks of re-parameterisation are deployed as."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from rescompile.graph import Graph, Op, Value
from rescompile.kinds import OpKind as K
from rescompile.passes.merge_branches import Replacement, change, merge_branches
from rescompile.passes.tracing import Layout, Trace, is_affine, layout_of
from rescompile.plans import FreshNames, Plan, Preserves, Refusal, Rewrite, gather

_HALF = ("float16", "bfloat16")
_TYPICAL = 64  # what an extent that is not known counts as, where costs are compared
_LARGEST = 256


@dataclass(frozen=True)
class MergeBranches:
    """Σ Wᵢ·x + BN(x) + a·x  →  W'·x + b',  W' = Σ pad(Wᵢ) + diag(γ/√(σ²+ε) + a)

    RepVGG, MobileOne, DiracNet, RepMixer, LoRA; the outermost sum of all that start from one value.
    1. Every term is affine in evaluation: convolutions, linears, batch norms, factors, average pools whose window
       counts its border; at most one kernel of more than one element in a row.
    2. Strides agree, and nothing else reads what lies between.
    3. It takes at most `growth` times the floating-point operations.
    4. In 16 bits no term is x itself: W + 1 would round what is small in W.
    A norm or a factor that alone reads the sum goes with it.
    """

    name: ClassVar[str] = "merge-branches"
    preserves: ClassVar[Preserves] = "values"
    growth: float = 1.0

    def plan(self, graph: Graph) -> Plan:
        """One rewrite or refusal for each sum of affine maps of one value; other sums are no place for this pass."""
        return gather(self.name, self.preserves, graph, self._decisions(graph))

    def _decisions(self, graph: Graph) -> Iterator[Rewrite | Refusal]:
        fresh = FreshNames(graph)
        extents = _extents(graph)
        taken: set[Op] = set()
        found: list[Rewrite | Refusal] = []
        for join in reversed(graph.ops):
            if join.kind is not K.ADD or join in taken or join.output.constant:
                continue
            region = _region(join)
            if region is None:
                continue
            if isinstance(region, Refusal):
                found.append(region)
                continue
            made = self._merged(graph, join, region, extents, fresh)
            if isinstance(made, Refusal):
                found.append(made)
                continue
            clash = next((op for op in made.replaced(graph) if op in taken), None)
            if clash is not None:
                found.append(Refusal(join.name, f"'{clash.name}' goes with another sum first: run the pass once more"))
                continue
            taken.update(made.replaced(graph))
            equation = "Σ Wᵢ·x + BN(x) + a·x  →  W'·x + b'"
            found.append(Rewrite(join.name, equation, f"one affine map; {change(graph, made)}", tuple(made.edits)))
        yield from reversed(found)

    def _merged(
        self, graph: Graph, join: Op, region: _Region, extents: dict[str, int], fresh: FreshNames
    ) -> Replacement | Refusal:
        if graph.training:
            reason = "in training the statistics are the batch's own, and each branch's weights are trained for itself"
            return Refusal(join.name, f"{reason}: capture the model in evaluation")
        layout = layout_of(region.ops, region.fork)
        if isinstance(layout, str):
            return Refusal(join.name, layout)
        reason = ""
        for end in _ends(graph, join.output):
            made = _whole(graph, end, region.fork, layout, extents, fresh)
            if isinstance(made, Refusal):
                reason = made.reason
                continue
            before = made.flops_before(graph)
            if made.flops > self.growth * before:
                reason = f"one map takes more: {change(graph, made)} (growth={made.flops / max(before, 1):.2f})"
                continue
            return made
        return Refusal(join.name, reason)


@dataclass(frozen=True, slots=True)
class _Region:
    """`ops`: what lies between the one value that all of a sum's terms start from and the sum."""

    fork: Value
    ops: list[Op]


def _region(join: Op) -> _Region | Refusal | None:
    """What the sum adds, back to where all its terms meet; None where something on the way is no affine map."""
    ahead = dict.fromkeys(_computed(join))
    if sum(not value.constant for value in join.operands) < 2:
        return None
    ops = [join]
    while len(ahead) > 1:
        value = max(ahead, key=lambda value: -1 if value.producer is None else value.producer.order)
        op = value.producer
        if op is None or not is_affine(op):
            return None
        if len(ops) == _LARGEST:
            return Refusal(join.name, f"its terms meet behind more than {_LARGEST} operations")
        del ahead[value]
        ahead |= dict.fromkeys(_computed(op))
        ops.append(op)
    (fork,) = ahead
    return _Region(fork, ops) if any(op.kind in (K.CONV, K.LINEAR) for op in ops) else None


def _computed(op: Op) -> list[Value]:
    return [value for value in op.operands if not value.constant]


def _ends(graph: Graph, value: Value) -> list[Value]:
    """The sum and what norms and factors make of it, each reading it alone; the last one first."""
    ends = [value]
    while len(value.uses) == 1 and not graph.is_output(value):
        (reader,) = value.users
        alone = reader.kind in (K.BATCH_NORM, K.MUL, K.DIV, K.NEG) or (
            reader.kind is K.ADD and len(_computed(reader)) == 1
        )
        if not alone or not is_affine(reader) or reader.output.shape != value.shape:
            break
        value = reader.output
        ends.insert(0, value)
    return ends


def _whole(
    graph: Graph, end: Value, fork: Value, layout: Layout, extents: dict[str, int], fresh: FreshNames
) -> Replacement | Refusal:
    trace = Trace(graph, fork, layout)
    maps = trace.maps(end)
    if isinstance(maps, Refusal):
        return maps
    if end.dtype in _HALF and trace.program.adds_input():
        return Refusal(end.name, f"in {end.dtype} W + 1 rounds what is small in W: merge in float32, before the cast")
    return merge_branches(trace, end, fork, maps[fork], fresh, extents)


def _extents(graph: Graph) -> dict[str, int]:
    dims = [dim for value in graph.inputs for dim in value.shape or () if isinstance(dim, str)]
    return dict.fromkeys([*dims, *(name for dim in dims for name in re.findall(r"[A-Za-z_]\w*", dim))], _TYPICAL)
