"""What rules say of a join, and what they share while a graph is judged."""

from __future__ import annotations

from dataclasses import dataclass, field

from rescompile.detection.reach import Reach
from rescompile.graph import Graph, Op, Value
from rescompile.kinds import OpKind


@dataclass(slots=True, eq=False)
class Draft:
    """A block as a rule found it; what depends on the whole graph (parent, norm placement, ...) is added later."""

    kind: str
    shortcut: str
    fork: Value
    join_op: Op
    join_value: Value
    skip_index: int
    branches: list[Value]  # the operands (or what a gate mixes in) that branches end in
    branch_ops: list[Op]
    shortcut_ops: list[Op]
    outside: list[Value]
    join_ops: list[Op] = field(default_factory=list)  # all sums that make up the join, `join_op` last
    undecided: list[str] = field(default_factory=list)  # what could not be told, for want of shapes

    @property
    def skip(self) -> Value:
        """The join's operand that the shortcut ends in."""
        value = self.join_op.inputs[self.skip_index]
        return self.fork if value is None else value


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a join is not residual, and the nearest value that its operands both come from."""

    reason: str
    meet: Value | None = None
    working: bool = False  # both sides work: the join may turn out to be a part of a parallel block's branch

    def __bool__(self) -> bool:
        return False


class Judgement:
    """The state of one pass over a graph: the ways back, and what was said of each join so far."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.outputs = frozenset(graph.outputs)
        self.reach = Reach(graph)
        self.drafts: dict[Op, Draft] = {}  # by join
        self.refusals: dict[Op, Refusal] = {}
        self.recurrences: set[Op] = set()  # sums that are steps of an unrolled recurrence
        self.closing: set[Op] = set()  # norms that are the post norm of a block
        self.long: set[Op] = set()  # joins of long blocks, once the kinds are told
        self.budget = 2000 + 4 * len(graph)  # values that searches across streams may visit, all together
        self.concats: dict[tuple[Value, ...], Value] = {}  # what was concatenated before, by its parts
        self._origins: dict[Value, Value] = {}  # of a join: the first value of its stream, each skip as it is

    def only_user(self, value: Value) -> Op | None:
        """The one operation that reads the value; None when there are several or the value leaves the graph."""
        if value in self.outputs:
            return None
        users = iter(value.uses)
        first = next(users, None)
        if first is None or any(op is not first[0] for op, _ in users):
            return None
        return first[0]

    def accept(self, draft: Draft) -> None:
        """A join that ends a block. Sums that it completes are part of it from now on."""
        for op in draft.join_ops:
            self.drafts.pop(op, None)
            self.refusals.pop(op, None)
        if draft.join_op not in draft.join_ops:
            draft.join_ops.append(draft.join_op)
        self.drafts[draft.join_op] = draft
        self.reach.contract(draft.join_value, draft.fork)
        plain = draft.kind in ("add", "parallel") and draft.shortcut == "identity" and not draft.shortcut_ops
        if plain and all(op.kind is OpKind.ADD and set(op.scales) == {1.0} for op in draft.join_ops):
            self._origins[draft.join_value] = self._origins.get(draft.fork, draft.fork)

    def is_gone(self, op: Op) -> bool:
        """Whether a difference is (x + F(x)) - x, or of two later values of one stream: x itself goes out of it.

        The first sum of the stream need be no block: x may be a constant that its branch was computed from beforehand.
        """
        if len(op.inputs) != 2 or op.scales[0] != -op.scales[1]:
            return False
        ends = [self._origin(value) for value in op.inputs]
        for end, other in (ends, ends[::-1]):
            sum_ = None if end is None else end.producer
            if other is not None and (end is other or (sum_ is not None and _adds(sum_, other))):
                return True
        return False

    def _origin(self, value: Value | None) -> Value | None:
        while value is not None and value not in self._origins and (op := value.producer) is not None:
            if op.kind not in (OpKind.IDENTITY, OpKind.CAST):
                break
            value = op.operands[0]
        return None if value is None else self._origins.get(value, value)


def _adds(op: Op, value: Value) -> bool:
    """Whether the operation adds the value, once, to something."""
    return op.kind is OpKind.ADD and [op.scales[at] for at, own in enumerate(op.inputs) if own is value] == [1.0]
