"""Operations that do nothing go, so that the rules behind see the values that matter."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from rescompile.graph import Graph, Op, Value
from rescompile.kinds import OpKind
from rescompile.plans import Erase, Plan, Preserves, Refusal, ReplaceUses, Rewrite, gather, same_shape


@dataclass(frozen=True)
class Canonicalise:
    """y = x  →  (nothing), for identity, a cast to the dtype that x has, a reshape to the shape that x has, and x + 0

    1. The operation returns its operand unchanged.
    2. Its output is not an output of the graph, which would lose its name.
    3. A dropout that only training switches on stays, unless `dropout` says that the result is for inference alone.
    """

    name: ClassVar[str] = "canonicalise"
    preserves: ClassVar[Preserves] = "values"

    dropout: bool = False

    def plan(self, graph: Graph) -> Plan:
        """One rewrite for each operation that does nothing, or the reason why it stays."""
        return gather(self.name, self.preserves, graph, self._decisions(graph))

    def _decisions(self, graph: Graph) -> Iterator[Rewrite | Refusal]:
        stands: dict[Value, Value] = {}  # of what is gone by then: what its readers read instead
        for op in graph:
            source = _unchanged(graph, op)
            if source is None:
                continue
            source = stands.get(source, source)
            decision = self._decide(graph, op, source)
            if isinstance(decision, Rewrite):
                stands[op.output] = source
            yield decision

    def _decide(self, graph: Graph, op: Op, source: Value) -> Rewrite | Refusal:
        if graph.is_output(op.output):
            return Refusal(op.name, "its output is an output of the graph, whose name would be lost")
        if op.kind is OpKind.IDENTITY and op.attr("dropout") and not self.dropout:
            return Refusal(op.name, "it is a dropout in training: dropout=true drops it for a result that only infers")
        edits = (ReplaceUses(op.output.name, source.name), Erase(op.name))
        return Rewrite(op.name, f"{op.kind.value}(x)  →  x", "it returns its operand unchanged", edits)


def _unchanged(graph: Graph, op: Op) -> Value | None:
    """The operand that `op` returns as it is, None when it computes something."""
    source = op.inputs[0] if op.inputs else None
    if source is None:
        return None
    same_type = op.output.dtype == source.dtype and same_shape(op.output, source)
    if op.kind is OpKind.IDENTITY or (op.kind in (OpKind.CAST, OpKind.RESHAPE) and same_type):
        return source
    if op.kind is OpKind.ADD and all(scale == 1 for scale in op.attr("scales")):
        rest = [value for value in op.operands if graph.scalar(value) != 0]
        if len(rest) == 1 and rest[0].type == op.output.type:
            return rest[0]
    return None
