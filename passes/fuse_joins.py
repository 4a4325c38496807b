"""Every residual join that can be part of a fused operation becomes one; every other keeps its reason."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from rescompile.detection import inspect_graph
from rescompile.graph import Graph, Op, Value
from rescompile.kinds import OpKind
from rescompile.passes.add_norm import add_norm
from rescompile.passes.epilogue import residual_epilogue
from rescompile.passes.joins import Scope
from rescompile.passes.norm_region import norm_region
from rescompile.plans import Decide, Plan, Preserves, Refusal, Rewrite, gather


@dataclass(frozen=True)
class FuseJoins:
    """s = x + F(x)  →  one operation, by the first rule that fits

    1. `add_norm`: a layer or RMS norm reads the sum; both outputs survive.
    2. `residual_epilogue`: a conv or linear, with its activation, ends in the sum.

    `joins`: the residual joins only, or all sums of two computed values.
    """

    name: ClassVar[str] = "fuse-joins"
    preserves: ClassVar[Preserves] = "values"

    joins: Scope = "residual"
    norm: bool = True
    epilogue: bool = True

    def plan(self, graph: Graph) -> Plan:
        """One rewrite or refusal for each join."""
        return gather(self.name, self.preserves, graph, self._decisions(graph))

    def _decisions(self, graph: Graph) -> Iterator[Rewrite | Refusal]:
        blocks = inspect_graph(graph).blocks
        skips = {block.join_op: block.join_op.inputs[block.skip_index] for block in blocks if not block.path}
        rules: list[Decide] = []
        if self.norm:
            rules += [norm_region, add_norm]
        if self.epilogue:
            rules.append(residual_epilogue)
        taken: set[str] = set()
        for join in graph:
            if join.kind is not OpKind.ADD or (self.joins == "residual" and join not in skips):
                continue
            decision = _first(graph, join, skips.get(join), rules, taken)
            if isinstance(decision, Rewrite):
                taken.update(name for edit in decision.edits for name in getattr(edit, "ops", ()))
            yield decision
        for block in blocks:
            if block.path or block.join_op.kind is OpKind.OPAQUE:
                where = f"{block.path}/{block.join}" if block.path else block.join
                yield Refusal(where, "it is inside an operation that holds a graph of its own, where no pass rewrites")


def _first(graph: Graph, join: Op, skip: Value | None, rules: list[Decide], taken: set[str]) -> Rewrite | Refusal:
    reasons = []
    for rule in rules:
        decision = rule(graph, join, skip)
        if isinstance(decision, Rewrite):
            clash = next((n for e in decision.edits for n in getattr(e, "ops", ()) if n in taken), None)
            if clash is None:
                return decision
            reasons.append(f"'{clash}' already went into another fusion")
        else:
            reasons.append(decision.reason)
    return Refusal(join.name, "; ".join(dict.fromkeys(reasons)))
