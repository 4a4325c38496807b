"""Every residual join that can be part of a fused operation becomes one; every other keeps its reason."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import msgspec

from rescompile.detection import inspect_graph
from rescompile.graph import Graph, Op, Value
from rescompile.kinds import OpKind, Trait
from rescompile.passes.add_norm import add_norm
from rescompile.passes.bias import hoisting
from rescompile.passes.concat_region import concat_region
from rescompile.passes.elementwise_region import elementwise_region
from rescompile.passes.epilogue_region import epilogue_region
from rescompile.passes.joins import Scope, quantised_side
from rescompile.passes.norm_region import norm_region
from rescompile.plans import Decide, Plan, Preserves, Refusal, Rewrite, gather

_HOLDER = "an operation that holds a graph of its own"


@dataclass(frozen=True)
class FuseJoins:
    """s = x + F(x)  →  one operation, by the first rule that fits

    1. `norm_region`, `add_norm`: a norm reads the sum, or ends a branch; both outputs survive.
    2. `epilogue_region`: a contraction, with what is elementwise or index arithmetic behind it, ends in the sum.
    3. `elementwise_region`: the sum and the elementwise operations around it.
    4. `concat_region`: what reads a concatenation alone, or the contraction that ends in it, computes it on the way.

    `joins`: the residual joins only, or all sums of two computed values. `trainable`: fusions end before
    what training does otherwise, a batch norm or a dropout that evaluation switches off. `hoist_bias`: a
    sum with a norm adds the bias of the contraction before it, too, which then needs no epilogue.
    """

    name: ClassVar[str] = "fuse-joins"
    preserves: ClassVar[Preserves] = "values"

    joins: Scope = "residual"
    norm: bool = True
    epilogue: bool = True
    concat: bool = True
    trainable: bool = False
    hoist_bias: bool = False

    def plan(self, graph: Graph) -> Plan:
        """One rewrite or refusal for each join."""
        return gather(self.name, self.preserves, graph, self._decisions(graph))

    def _rules(self, closed: dict[str, str]) -> dict[OpKind, list[Decide]]:
        """By the kind of operation that brings the paths together: the rules, in order.

        `closed`: operations that no fusion may take any more, each with the reason.
        """
        sums: list[Decide] = []
        if self.norm:
            norms: list[Decide] = [partial(norm_region, closed=closed), add_norm]
            sums += [partial(hoisting, rule=rule) for rule in norms] if self.hoist_bias else norms
        if self.epilogue:
            sums += [partial(rule, closed=closed) for rule in (epilogue_region, elementwise_region)]
        return {OpKind.ADD: sums, OpKind.CONCAT: [concat_region] if self.concat else []}

    def _decisions(self, graph: Graph) -> Iterator[Rewrite | Refusal]:
        blocks = inspect_graph(graph).blocks
        own = [block for block in blocks if not block.path]
        skips = {block.join_op: block.join_op.inputs[block.skip_index] for block in own}
        closed = {op.name: _modal(op) for op in graph if self.trainable and _follows_mode(op)}
        rules = self._rules(closed)
        for join in graph:
            if join not in skips and (self.joins == "residual" or join.kind is not OpKind.ADD):
                continue
            if join.has(Trait.FUSED) or join.name in closed:
                continue  # a fusion holds it already
            if join.kind not in rules:
                if join.kind is not OpKind.OPAQUE:
                    yield Refusal(
                        join.name, f"a {join.kind.value} brings the paths together, which no fused kernel does"
                    )
                continue
            decision = _first(graph, join, skips.get(join), rules[join.kind], closed)
            if isinstance(decision, Rewrite):
                closed.update((name, f"'{name}' already went into another fusion") for name in _consumed(decision))
            yield decision
        for block in blocks:
            if block.path or block.join_op.kind is OpKind.OPAQUE:
                where = f"{block.path}/{block.join}" if block.path else block.join
                why = _held(graph, block.path or block.join_op.name)
                yield Refusal(where, why or f"it is inside {_HOLDER}, where no pass rewrites")


def _follows_mode(op: Op) -> bool:
    """Whether training does something else than evaluation."""
    return op.kind is OpKind.BATCH_NORM or (op.kind is OpKind.IDENTITY and bool(op.attr("dropout")))


def _modal(op: Op) -> str:
    return f"'{op.name}' does something else in training: trainable=false lets it go into the fusion"


def _first(
    graph: Graph, join: Op, skip: Value | None, rules: list[Decide], closed: dict[str, str]
) -> Rewrite | Refusal:
    """The first rule's rewrite, of what neither another fusion nor training wants; or all reasons."""
    reasons = []
    for rule in rules:
        decision = rule(graph, join, skip)
        if isinstance(decision, Rewrite):
            clash = next((name for name in _consumed(decision) if name in closed), None)
            if clash is None:
                return _noted(decision, quantised_side(join))
            reasons.append(closed[clash])
        else:
            reasons.append(decision.reason)
    rounded = quantised_side(join)
    if rounded:
        reasons.insert(0, rounded)
    return Refusal(join.name, "; ".join(dict.fromkeys(reasons)) or "no rule for it is switched on")


def _noted(rewrite: Rewrite, note: str) -> Rewrite:
    return msgspec.structs.replace(rewrite, reason=f"{rewrite.reason}; {note}") if note else rewrite


def _held(graph: Graph, path: str) -> str:
    """Why the operation that a path begins with, whose name may be a path too, is left alone."""
    while path and not graph.has_op(path):
        path = path.rpartition("/")[0]
    return graph.untouchable(graph.op(path)) if path else ""


def _consumed(rewrite: Rewrite) -> list[str]:
    """The operations that a rewrite replaces."""
    return [name for edit in rewrite.edits for name in getattr(edit, "ops", ())]
