"""Convolutional blocks whose sum is followed by an activation, as the passes that move norm and activation see them.

```
post   y = σ(s(x) + N(t))     t: what the branch's last contraction makes of x, gates and factors behind it left out
pre    y = σ(N(s(r) + t))     r: what σ, or σ∘N, made x of; a projection s reads x itself
```

In both the branch reads x and everything behind the block reads y: only where N stands, and what the skip reads,
differ. A block is described once, whichever form it is in, and can be written in either.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TypeAlias

from rescompile.blocks import Block, Report
from rescompile.detection.flavours import is_random_factor
from rescompile.graph import Graph, Op, Value
from rescompile.kinds import OpKind as K
from rescompile.kinds import Trait
from rescompile.plans import Refusal, same_shape

Use: TypeAlias = tuple[Op, int]

_PASSING = (K.IDENTITY, K.DROPOUT)
_CONTRACTIONS = (K.CONV, K.CONV_TRANSPOSE, K.LINEAR)
_KINDS = ("add", "stochastic")


@dataclass(frozen=True, slots=True, eq=False)
class Closing:
    """σ, or σ∘N, on one value that nothing else but skips reads."""

    value: Value
    norm: Op | None
    act: Op

    @property
    def first(self) -> Op:
        """The operation that reads the value."""
        return self.act if self.norm is None else self.norm


@dataclass(frozen=True, slots=True, eq=False)
class Lead:
    """What makes the x that a block starts from.

    c → N → σ → pools where `pools_last`, else c → pools → N → σ. `c`: what comes in, `x`: what goes out. `stem`: σ
    closes no other block. `pools_move`: the pools can change sides, since only this block depends on where they are.
    """

    closing: Closing
    pools: tuple[Op, ...]
    pools_last: bool
    c: Value
    x: Value
    stem: bool
    pools_move: bool

    @property
    def bare(self) -> Value:
        """What norm and activation work on."""
        return self.closing.value


@dataclass(frozen=True, slots=True, eq=False)
class ActivatedBlock:
    """One block. `ends`: who reads t, or N(t), on the way to the join. `skip`: who reads the fork for the skip.

    `norm_behind`: the block's norm stands behind the join. `bare`: the skip reads r. `projected`: weights lie on it.
    """

    block: Block
    tail: Value
    ends: tuple[Use, ...]
    norm: Op | None
    norm_behind: bool
    closing: Closing
    lead: Lead | None
    skip: tuple[Use, ...]
    bare: bool
    projected: bool
    skip_norm: Op | None  # the norm that a projection ends in

    @property
    def total(self) -> Value:
        """The sum, as norm or activation reads it."""
        return self.closing.value


class ActivatedBlocks:
    """Reads the blocks of one graph."""

    def __init__(self, graph: Graph, report: Report) -> None:
        self._graph = graph
        self._starting = Counter(block.fork_value for block in report.blocks)
        self._skips: dict[Value, set[Use]] = {}
        for block in report.blocks:
            self._skips.setdefault(block.fork_value, set()).update(_skip_uses(block))
        ends = (self._closing(block.join_value) for block in report.blocks if block.join_value is not None)
        self._closes = {end.act for end in ends if isinstance(end, Closing)}

    def read(self, block: Block) -> ActivatedBlock | Refusal:
        """The block's description, or why it has none."""
        found = self._read(block)
        return Refusal(block.join, found) if isinstance(found, str) else found

    def _read(self, block: Block) -> ActivatedBlock | str:
        join, total = block.join_op, block.join_value
        if block.kind not in _KINDS or join.kind is not K.ADD or total is None:
            return f"a block of kind '{block.kind}' whose paths a {join.kind.value} brings together has no such form"
        if len(block.join_ops) != 1 or len(join.inputs) != 2:
            return "its sum has more than two terms"
        closing = self._closing(total)
        if isinstance(closing, str):
            return closing
        tail = self._tail(block)
        if isinstance(tail, str):
            return tail
        made, norm, ends = tail
        if norm is not None and closing.norm is not None:
            return f"a norm stands on either side of the join, '{norm.name}' and '{closing.norm.name}'"
        norm_behind = closing.norm is not None
        if norm is None and closing.norm is not None:
            norm = closing.norm
        if norm is not None and not same_shape(made, norm.output, total):
            known = all(value.shape is not None for value in (made, total))
            return f"'{norm.name}' does not work on the shape of the sum" if known else "its shapes are not known"
        skip = _skip_uses(block)
        if not skip:
            return "how the skip reads the fork cannot be told"
        lead, bare = self._lead(block.fork_value)
        return ActivatedBlock(
            block=block,
            tail=made,
            ends=tuple(ends),
            norm=norm,
            norm_behind=norm_behind,
            closing=closing,
            lead=lead,
            skip=tuple(skip),
            bare=bare,
            projected=any(op.has(Trait.PARAMETRIC) for op in block.shortcut_ops),
            skip_norm=_skip_norm(block),
        )

    def _closing(self, value: Value) -> Closing | str:
        """The norm and activation that follow a value; text where none do, or something else reads it too."""
        while True:
            if self._graph.is_output(value):
                return f"the sum '{value.name}' is an output of the graph"
            skips = self._skips.get(value, set())
            readers = list(dict.fromkeys(op for op, index in value.uses if (op, index) not in skips))
            if len(readers) > 1:
                return f"the sum is read elsewhere too: by {_quoted(readers)}"
            if not readers:
                return "no activation follows the join: its readers are skips only"
            if readers[0].kind not in _PASSING:
                break
            value = readers[0].output
        op, norm = readers[0], None
        if op.has(Trait.NORM) and op.inputs[0] is value:
            norm = op
            if self._graph.is_output(norm.output) or len(norm.output.uses) != 1:
                return f"no activation alone follows the join and its norm '{norm.name}'"
            op = norm.output.users[0]
        if not op.has(Trait.ACTIVATION):
            return f"no activation follows the join, but '{op.name}' ({op.kind.value})"
        return Closing(value, norm, op)

    def _tail(self, block: Block) -> tuple[Value, Op | None, list[Use]] | str:
        """What the last contraction makes, the norm behind it, and who reads the one or the other."""
        join, inside = block.join_op, set(block.branch_ops)
        passed = {join}
        value = join.operands[1 - block.skip_index]
        while True:
            op = value.producer
            if op is None or op not in inside:
                return "the branch does not end in an operation of its own"
            if op.has(Trait.NORM) or op.kind in _CONTRACTIONS:
                foreign = [user for user in value.users if user not in passed]
                if foreign or self._graph.is_output(value):
                    return f"'{op.name}', which ends the branch, is read elsewhere too: by {_quoted(foreign)}"
                ends = list(value.uses)
                if not op.has(Trait.NORM):
                    return value, None, ends
                before = op.operands[0]
                return (before, op, ends) if before.producer in inside else "its branch is a norm alone"
            if op.has(Trait.ACTIVATION):
                return f"the branch ends in the activation '{op.name}', before the join"
            passed.add(op)
            step = op.operands[0] if op.kind in _PASSING else _through_factor(op, passed)
            if step is None:
                return f"the branch ends in '{op.name}' ({op.kind.value}), not in a contraction and its norm"
            value = step

    def _lead(self, fork: Value) -> tuple[Lead | None, bool]:
        """What activates the fork, None where nothing does; and whether it does so in the branch."""
        closing = self._closing(fork)
        if isinstance(closing, Closing):
            return self._pools_first(closing), True
        pools: list[Op] = []
        value = fork
        alone = self._alone(fork)
        while (op := value.producer) is not None and op.kind in (*_PASSING, K.PAD, K.MAX_POOL, K.AVG_POOL):
            if op.kind not in _PASSING:
                pools.append(op)
            value = op.operands[0]
            alone = alone and len(value.uses) == 1 and not self._graph.is_output(value)
        if op is None or not op.has(Trait.ACTIVATION):
            return None, False
        source = op.operands[0]
        norm = source.producer
        if norm is None or not norm.has(Trait.NORM) or source.users != [op] or self._graph.is_output(source):
            norm = None
        c = source if norm is None else norm.operands[0]
        found = Closing(c, norm, op)
        if not pools:
            return self._pools_first(found), False
        stem = op not in self._closes
        return Lead(found, tuple(reversed(pools)), True, c, fork, stem, stem and alone), False

    def _pools_first(self, closing: Closing) -> Lead:
        """A lead of which nothing follows the activation but what passes values on."""
        pools: list[Op] = []
        value = closing.value
        alone = self._alone(value)
        while (op := value.producer) is not None and op.kind in (K.PAD, K.MAX_POOL, K.AVG_POOL):
            pools.append(op)
            value = op.operands[0]
            alone = alone and len(value.uses) == 1 and not self._graph.is_output(value)
        stem = closing.act not in self._closes
        alone = alone and op is not None and op.kind in _CONTRACTIONS and not self._graph.is_output(closing.act.output)
        x = closing.act.output
        while len(x.uses) == 1 and x.users[0].kind in _PASSING and not self._graph.is_output(x):
            x = x.users[0].output
        return Lead(closing, tuple(reversed(pools)), False, value, x, stem, stem and alone)

    def _alone(self, value: Value) -> bool:
        """Whether at most one block starts from a value, and the graph does not return it."""
        return self._starting[value] <= 1 and not self._graph.is_output(value)


def _skip_uses(block: Block) -> list[Use]:
    """Where the skip reads the fork."""
    ops = set(block.shortcut_ops)
    join = (block.join_op, block.skip_index)
    return [use for use in block.fork_value.uses if use[0] in ops or use == join]


def _skip_norm(block: Block) -> Op | None:
    """The norm behind a projection's contraction, which the join alone reads."""
    op = block.join_op.operands[block.skip_index].producer if len(block.join_op.inputs) == 2 else None
    if op is None or op not in block.shortcut_ops or not op.has(Trait.NORM) or len(op.output.uses) != 1:
        return None
    return op if any(other.kind in _CONTRACTIONS for other in block.shortcut_ops) else None


def _through_factor(op: Op, passed: set[Op]) -> Value | None:
    """The value that a product scales by a constant, by chance, or by a gate made of that value itself."""
    if op.kind not in (K.MUL, K.DIV) or len(op.operands) != 2:
        return None
    first, second = op.operands
    pairs = [(first, second)] if op.kind is K.DIV else [(first, second), (second, first)]
    for value, factor in pairs:
        if not value.constant and (factor.constant or is_random_factor(factor)):
            return value
    for value, factor in pairs:
        gate = _made_of(factor, value)
        if gate:
            passed |= gate
            return value
    return None


def _made_of(factor: Value, source: Value) -> set[Op]:
    """The operations that lead from `source` to `factor`; none where `factor` does not depend on it."""
    floor = -1 if source.producer is None else source.producer.order
    cone: dict[Op, None] = {}
    pending = [factor]
    while pending:
        op = pending.pop().producer
        if op is not None and op.order > floor and op not in cone:
            cone[op] = None
            pending.extend(op.operands)
    reached: set[Op] = set()
    for op in sorted(cone, key=lambda member: member.order):
        if any(value is source or value.producer in reached for value in op.operands):
            reached.add(op)
    return reached if factor.producer in reached else set()


def _quoted(ops: Iterable[Op]) -> str:
    return " and ".join(f"'{op.name}'" for op in ops) or "the graph's caller"
