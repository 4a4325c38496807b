"""What rules say of a join, and what they share while a graph is judged."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import msgspec

from rescompile.detection.chains import order
from rescompile.detection.reach import Reach
from rescompile.graph import Graph, Op, Value
from rescompile.kinds import OpKind

_FACTORS = 8  # factors and casts between a stream and a sum, at most


class Draft(msgspec.Struct, eq=False):
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
    join_ops: list[Op] = []  # all sums that make up the join, `join_op` last
    undecided: list[str] = []  # what could not be told, for want of shapes
    streams: list[Value] = []  # that a sum of streams fuses: where each of them ends
    kinds: frozenset[OpKind] = frozenset()  # of the branch's operations, once the block is accepted

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
        self.dropped: set[Op] = set()  # what a coin decides about: operations that return zeros or what they compute
        self.long: set[Op] = set()  # joins of long blocks, once the kinds are told
        self.budget = 2000 + 4 * len(graph)  # values that searches across streams may visit, all together
        self.concats: dict[tuple[Value, ...], Value] = {}  # what was concatenated before, by its parts
        self._origins: dict[Value, Value] = {}  # of a join: the first value of its stream, each skip as it is
        self._streams: dict[Value, Value] = {}  # likewise, skips with a factor on them included

    def only_user(self, value: Value) -> Op | None:
        """The one operation that reads the value; None when there are several or the value leaves the graph."""
        if value in self.outputs:
            return None
        found: Op | None = None
        for op, _ in value.uses:
            if found is None:
                found = op
            elif op is not found:
                return None
        return found

    def accept(self, draft: Draft) -> None:
        """A join that ends a block. Sums that it completes are part of it from now on."""
        for op in draft.join_ops:
            self.drafts.pop(op, None)
            self.refusals.pop(op, None)
        if draft.join_op not in draft.join_ops:
            draft.join_ops.append(draft.join_op)
        draft.kinds = frozenset([op.kind for op in draft.branch_ops])
        self.drafts[draft.join_op] = draft
        if not draft.streams:
            self.reach.contract(draft.join_value, draft.fork)
        if draft.kind in ("add", "parallel") and draft.shortcut == "identity":
            self._streams[draft.join_value] = self._streams.get(draft.fork, draft.fork)
            if not draft.shortcut_ops and all(map(_is_plain, draft.join_ops)):
                self._origins[draft.join_value] = self._origins.get(draft.fork, draft.fork)

    def mix(self, op: Op) -> Value | None:
        """The last of the values of one stream that a sum takes a constant share of each; None where it is no mix.

        Σ cᵢ·sᵢ goes on as the stream itself: hyper-connections (Zhu et al. 2025), weighted averages over depth.
        """
        shares = self._shares(op)
        streams = {self._streams.get(share, share) for share in shares}
        if any(share is value for share, value in zip(shares, op.inputs, strict=False)):
            return None
        if len(set(op.inputs)) < 2 or len(shares) != len(op.inputs) or len(streams) != 1 or self.is_gone(op):
            return None
        last = max(shares, key=order)
        self._streams[op.output] = next(iter(streams))
        self.reach.pass_through(op.output, last)
        return last

    def joins_siblings(self, op: Op) -> bool:
        """Whether a sum is of blocks that start from one value, beside each other: (x + A(x)) + (x + F(x))."""
        drafts: set[Draft] = set()
        for value in op.inputs:
            maker = value.producer if value in self._streams else None
            draft = None if maker is None else self.drafts.get(maker)
            if draft is None:
                return False
            drafts.add(draft)
        return len(drafts) == len(op.inputs) > 1 and len({draft.fork for draft in drafts}) == 1

    def _shares(self, op: Op) -> list[Value]:
        moving = (value for value in op.inputs if value is not None and not value.constant)
        return [_without_factor(value, self._streams) for value in moving]

    def is_gone(self, op: Op) -> bool:
        """Whether a difference is (x + F(x)) - x, or of two later values of one stream: x itself goes out of it.

        The first sum of the stream need be no block: x may be a constant that its branch was computed from beforehand.
        """
        if "scales" not in op.attrs or len(op.inputs) != 2 or op.scales[0] != -op.scales[1]:
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


def _without_factor(value: Value, streams: Mapping[Value, Value]) -> Value:
    """The value that constants are multiplied with, as far as one operand leads back to it."""
    for _ in range(_FACTORS):
        op = None if value in streams else value.producer
        if op is None:
            break
        if op.kind in (OpKind.MUL, OpKind.DIV):
            moving = [operand for operand in op.operands if not operand.constant]
            if len(moving) != 1 or moving[0].shape != value.shape:
                break
            value = moving[0]
        elif op.kind in (OpKind.IDENTITY, OpKind.CAST, OpKind.NEG):
            value = op.operands[0]
        else:
            break
    return value


def _is_plain(op: Op) -> bool:
    """Whether the operation adds its operands as they are."""
    return op.kind is OpKind.ADD and ("scales" not in op.attrs or set(op.scales) == {1.0})


def _adds(op: Op, value: Value) -> bool:
    """Whether the operation adds the value, once, to something."""
    return op.kind is OpKind.ADD and [op.scales[at] for at, own in enumerate(op.inputs) if own is value] == [1.0]
