"""What the rules for composites share: bounded walks over single-use values, and the check before covering."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rescompile.graph import Attrs, Graph, Op, Role, Shape, Value
from rescompile.kinds import OpKind

TOLERANCE = 1e-4  # relative; constants that exporters rounded (0.7071, 0.79788) stay recognisable


def close(number: float | None, target: float) -> bool:
    """Whether a constant of the graph is the one that the composite's equation has."""
    return number is not None and abs(number - target) <= TOLERANCE * max(abs(target), 1e-3)


class Recogniser:
    """A graph that is being read, and the operations that composites have taken so far."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.count = 0
        self._covered: set[Op] = set()
        self._outputs = set(graph.outputs)

    def covered(self, op: Op) -> bool:
        """Whether a composite already stands in the place of the operation."""
        return op in self._covered

    def scalar(self, value: Value | None) -> float | None:
        """The number that a constant holds, None for anything else."""
        return self.graph.scalar(value)

    def only_user(self, value: Value) -> Op | None:
        """The one operation that reads the value; None when there are several or the value leaves the graph."""
        if value in self._outputs or not value.uses:
            return None
        users = iter(value.uses)
        first = next(users)[0]
        return first if all(op is first for op, _ in users) else None

    def enclosed(self, op: Op, inside: Iterable[Op]) -> bool:
        """Whether nothing but `inside` reads what the operation produces."""
        inside = set(inside)
        return all(value not in self._outputs and all(user in inside for user, _ in value.uses) for value in op.outputs)

    def through(self, value: Value, *kinds: OpKind) -> tuple[Value, list[Op]]:
        """The value behind operations of the given one-operand kinds, and those operations, last first."""
        passed: list[Op] = []
        while (op := value.producer) is not None and op.kind in kinds and op.inputs[0] is not None:
            passed.append(op)
            value = op.inputs[0]
        return value, passed

    def new_value(self, stem: str, shape: Shape | None, dtype: str | None) -> Value:
        """A value for an operation that prepares an operand."""
        return Value(self.graph.unique_name(stem), shape, dtype, Role.RESULT)

    def cover(
        self,
        ops: Iterable[Op],
        kind: OpKind,
        inputs: Sequence[Value | None],
        output: Value,
        attrs: Attrs | None = None,
        before: Sequence[tuple[OpKind, Sequence[Value | None], Value, Attrs]] = (),
    ) -> Op | None:
        """Cover a region; None, and no change, when one of its interior values is read elsewhere.

        `before`: as in `Graph.cover`.
        """
        region = sorted(set(ops), key=lambda op: op.order)
        inside = set(region)
        for op in region:
            if op.group is not None and not inside.issuperset(op.group):
                return None
            if output not in op.outputs and not self.enclosed(op, inside):
                return None
        covering = self.graph.cover(region, kind, inputs, (output,), attrs, before=before)
        self._covered |= inside
        self.count += 1
        return covering
