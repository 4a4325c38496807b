"""Fused operations back to the standard ones that they stand for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from rescompile.graph import Graph
from rescompile.kinds import Trait
from rescompile.plans import Plan, Preserves, Rewrite, Unfuse, gather


@dataclass(frozen=True)
class UnfuseAll:
    """y = fused(x, ...)  →  the operations of its definition, on the same operands"""

    name: ClassVar[str] = "unfuse"
    preserves: ClassVar[Preserves] = "values"

    def plan(self, graph: Graph) -> Plan:
        """One rewrite for each fused operation."""
        fused = (op for op in graph if op.has(Trait.FUSED))
        rewrites = (
            Rewrite(op.name, f"{op.kind.value}(...)  →  its definition", "as asked", (Unfuse(op.name),)) for op in fused
        )
        return gather(self.name, self.preserves, graph, rewrites)
