"""A conv or linear and the activation behind it become one operation, where no join is involved."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from rescompile.graph import Graph
from rescompile.kinds import OpKind
from rescompile.passes.epilogue import activation_epilogue
from rescompile.plans import Plan, Preserves, Rewrite, gather


@dataclass(frozen=True)
class FuseActivations:
    """f(W·x + b)  →  fused(x, W, b; outer=f)

    1. f is an activation that fused operations carry, and alone reads the contraction.
    """

    name: ClassVar[str] = "fuse-activations"
    preserves: ClassVar[Preserves] = "values"

    def plan(self, graph: Graph) -> Plan:
        """One rewrite for each contraction that an activation follows; the others ask for nothing."""
        works = (op for op in graph if op.kind in (OpKind.CONV, OpKind.LINEAR))
        decisions = (activation_epilogue(graph, work) for work in works)
        return gather(self.name, self.preserves, graph, (found for found in decisions if isinstance(found, Rewrite)))
