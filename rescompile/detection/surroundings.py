"""Where a node that is in no block lies: in the stem, between two blocks, in the head, or on the way into a branch."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from operator import attrgetter

from rescompile.blocks import Block, NotResidual, Report
from rescompile.graph import Graph, Op, Value
from rescompile.structure.members import NORM

_id = attrgetter("id")


@dataclass(frozen=True, slots=True)
class Place:
    """A role (stem, between, head, outside, beside, unread), the block it is told by, and the reason in words."""

    role: str
    text: str
    block: int | None = None


@dataclass(slots=True)
class _Ahead:
    """What a value comes to first, on all its ways."""

    forks: list[Block] = field(default_factory=list)
    entered: list[Block] = field(default_factory=list)  # blocks whose branch it enters past the fork
    outputs: list[Value] = field(default_factory=list)
    refused: Op | None = None


class Surroundings:
    """The forks of a graph, what enters its branches from outside, and what lies around everything else."""

    def __init__(self, graph: Graph, report: Report) -> None:
        self._report = report
        graphs = [graph, *report.bodies.values()]
        self._outputs = frozenset(value for each in graphs for value in each.outputs)
        named = {path: {op.name: op for op in body} for path, body in (("", graph), *report.bodies.items())}
        self.refused: dict[Op, NotResidual] = {}
        for join in report.not_residual:
            op = named.get(join.path, {}).get(join.join)
            if op is not None:
                self.refused[op] = join
        self.forks: dict[Value, list[Block]] = {}
        self.outside: dict[Value, list[Block]] = {}
        for block in report:
            self.forks.setdefault(block.fork_value, []).append(block)
            for value in block.outside:
                self.outside.setdefault(value, []).append(block)

    def place(self, op: Op) -> Place:
        """Where an operation in no block lies."""
        return self._place(op.outputs, self._behind(op), op)

    def place_of(self, value: Value) -> Place:
        """Where a value that nothing produces leads."""
        return self._place([value], [], None)

    def _place(self, values: Sequence[Value], behind: list[Block], op: Op | None) -> Place:
        ahead = self._ahead(values)
        own = op is not None and op in self.refused
        through = ""
        if ahead.refused is not None and not own:
            reason = self.refused[ahead.refused].reason.split(":")[0]
            through = f", by way of the join '{ahead.refused.name}', which ends no block ({reason})"
        if ahead.forks:
            first = min(ahead.forks, key=_id)
            if behind:
                last = max(behind, key=_id)
                return Place("between", f"it lies between block {last.id} and block {first.id}{through}", first.id)
            return Place("stem", f"it lies in the stem, before block {first.id}{through}", first.id)
        if ahead.entered:
            names = ", ".join(str(block.id) for block in ahead.entered[:8])
            plural = "es of blocks" if len(ahead.entered) > 1 else " of block"
            text = f"it leads into the branch{plural} {names}, but from outside, not from the fork{through}"
            return Place("outside", text, ahead.entered[0].id)
        if ahead.outputs:
            name = ahead.outputs[0].name
            if behind:
                last = max(behind, key=_id)
                text = f"it lies in the head, between block {last.id} and the output '{name}'{through}"
                return Place("head", text, last.id)
            whole = "the graph has none" if not self._report.blocks else "it comes from none and leads to none"
            return Place("beside", f"{whole} on the way to the output '{name}'{through}")
        if ahead.refused is not None and not own:
            return Place("beside", f"it leads to no output of the graph{through}")
        return Place("unread", "no output of the graph depends on it")

    def _ahead(self, values: Iterable[Value]) -> _Ahead:
        ahead = _Ahead()
        forks: dict[Block, None] = {}
        entered: dict[Block, None] = {}
        pending = deque(values)
        seen = set(pending)
        while pending:
            value = pending.popleft()
            if value in self._outputs:
                ahead.outputs.append(value)
            forks.update(dict.fromkeys(self.forks.get(value, ())))
            entered.update(dict.fromkeys(self.outside.get(value, ())))
            if value in self.forks or value in self.outside:
                continue
            for op, _ in value.uses:
                parts = [part for part in self._report.members.of(op) if part.role != NORM]
                entered.update((part.block, None) for part in parts)
                if parts:
                    continue
                if ahead.refused is None and op in self.refused:
                    ahead.refused = op
                fresh = [output for output in op.outputs if output not in seen]
                seen.update(fresh)
                pending.extend(fresh)
        ahead.forks, ahead.entered = list(forks), list(entered)
        return ahead

    def _behind(self, op: Op) -> list[Block]:
        """The blocks whose joins lead to the operation with no other join between."""
        found: dict[Block, None] = {}
        joins = self._report.members.by_join
        pending = [op]
        seen = {op}
        while pending:
            for value in pending.pop().operands:
                before = value.producer
                if before is None or before in seen:
                    continue
                seen.add(before)
                block = joins.get(before)
                if block is not None:
                    found[block] = None
                else:
                    pending.append(before)
        return list(found)


def constant_readers(values: Iterable[Value]) -> dict[Op, int]:
    """The operations that read constants on each call, directly or as computed from them once, and as which operand."""
    found: dict[Op, int] = {}
    pending = deque(values)
    seen: set[Op] = set()
    while pending:
        value = pending.popleft()
        for op, index in value.uses:
            if op in seen:
                continue
            seen.add(op)
            if op.outputs and all(output.constant for output in op.outputs):
                pending.extend(op.outputs)
            else:
                found[op] = index
    return found


def operand_name(op: Op, index: int) -> str:
    """What an operation's kind calls the operand: `weight`, `bias`, `mask`; `operand 1` where it has no name."""
    names = op.kind.spec.operands
    if index < len(names) and not names[index].startswith("*"):
        return names[index].rstrip("?")
    return f"operand {index}"
