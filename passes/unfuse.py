"""Fused operations back to the standard ones that they stand for."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from rescompile.graph import Graph, Op
from rescompile.kinds import Trait
from rescompile.plans import Plan, Preserves, Rewrite, Unfuse, gather


@dataclass(frozen=True)
class UnfuseAll:
    """y = fused(x, ...)  →  the operations of its definition, on the same operands

    What a runtime's own optimiser wrote in operators that only it has becomes standard operators too.
    """

    name: ClassVar[str] = "unfuse"
    preserves: ClassVar[Preserves] = "values"

    def plan(self, graph: Graph) -> Plan:
        """One rewrite for each fused operation."""
        return gather(self.name, self.preserves, graph, self._rewrites(graph))

    def _rewrites(self, graph: Graph) -> Iterator[Rewrite]:
        told: set[Op] = set()
        for op in graph:
            if op in told:
                continue
            group = op.group or [op]
            fused = [member for member in group if member.has(Trait.FUSED)]
            told.update(group)
            for member in fused:
                equation = f"{member.kind.value}(...)  →  its definition"
                yield Rewrite(member.name, equation, "as asked", (Unfuse(member.name),))
            if not fused and graph.foreign(op):
                equation = f"one runtime's operator  →  {', '.join(member.kind.value for member in group)}"
                yield Rewrite(op.name, equation, "as asked", (Unfuse(op.name),))
