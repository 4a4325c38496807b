"""Which operations make up which block, and as what.

A block nested in another's branch lists its own operations; the outer block lists the inner one's join only. So all
lists together are as long as the graph, however deep blocks nest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from rescompile.graph import Op, Value
from rescompile.kinds import OpKind, Trait

if TYPE_CHECKING:
    from rescompile.blocks import Block

BRANCH, SHORTCUT, JOIN, SUM, MIX, NORM = "branch", "shortcut", "join", "sum", "mix", "norm"

# Kinds whose join may hold operations besides its sums: the factors of a gate, or of a constant mix.
_MIXED = ("gated", "add", "stochastic")


@dataclass(frozen=True, slots=True)
class Membership:
    """One operation's part in one block.

    `role`: "branch", "shortcut", "join" (the last sum), "sum" (an earlier sum of the same join), "mix" (a factor of the
    join: T·h, 1 − T), "norm" (a norm in front of the fork or behind the join).
    """

    block: Block
    role: str


class Members:
    """The parts that the operations of a graph have in its blocks."""

    def __init__(self, blocks: Sequence[Block]) -> None:
        self.blocks = tuple(blocks)
        self.mix: dict[int, tuple[Op, ...]] = {}  # by block: the factors of its join
        self._of: dict[Op, list[Membership]] = {}
        for block in self.blocks:
            self._add(block)

    def of(self, op: Op) -> list[Membership]:
        """The operation's parts, the innermost block first; empty for one in no block."""
        return self._of.get(op, [])

    @cached_property
    def by_id(self) -> dict[int, Block]:
        """The blocks by their ids."""
        return {block.id: block for block in self.blocks}

    @cached_property
    def by_join(self) -> dict[Op, Block]:
        """The block that ends in each join."""
        return {block.join_op: block for block in self.blocks}

    def within(self, inner: Block, outer: Block) -> bool:
        """Whether `inner` is `outer`, or lies inside its branch at any depth. Constant time."""
        first, last = self._spans[outer.id]
        return first <= self._spans[inner.id][0] <= last

    @cached_property
    def preorder(self) -> dict[int, int]:
        """Position of each block when every block comes before those nested in it."""
        return {block: span[0] for block, span in self._spans.items()}

    @cached_property
    def _spans(self) -> dict[int, tuple[int, int]]:
        """By block: its position in preorder, and the last position inside it."""
        sizes = dict.fromkeys((block.id for block in self.blocks), 1)
        for block in self.blocks:  # a block's id is higher than those of the blocks nested in it
            if block.parent is not None:
                sizes[block.parent] += sizes[block.id]
        spans: dict[int, tuple[int, int]] = {}
        free: dict[int | None, int] = {None: 0}
        for block in reversed(self.blocks):
            first = free[block.parent]
            free[block.parent] = first + sizes[block.id]
            free[block.id] = first + 1
            spans[block.id] = first, first + sizes[block.id] - 1
        return spans

    def _add(self, block: Block) -> None:
        roles: dict[Op, str] = {block.join_op: JOIN}
        for role, ops in ((SUM, block.join_ops), (SHORTCUT, block.shortcut_ops), (BRANCH, block.branch_ops)):
            for op in ops:
                roles.setdefault(op, role)
        mix = _mix_ops(block, roles)
        if mix:
            self.mix[block.id] = mix
        for op in mix:
            roles[op] = MIX
        for op in block.norm_ops:
            roles.setdefault(op, NORM)
        for op, role in roles.items():
            self._of.setdefault(op, []).append(Membership(block, role))


def _mix_ops(block: Block, known: dict[Op, str]) -> tuple[Op, ...]:
    """What stands between the block's paths and its sums: the factors T and 1 − T of a mix."""
    if block.kind not in _MIXED or block.join_op.kind is not OpKind.ADD:
        return ()
    bound = -1 if block.fork_value.producer is None else block.fork_value.producer.order
    found: dict[Op, None] = {}
    pending: list[Value] = [value for op in block.join_ops for value in op.operands]
    while pending:
        value = pending.pop()
        op = value.producer
        if op is None or op in known or op in found or op.order <= bound:
            continue
        if value is block.fork_value or value.constant or not op.has(Trait.ELEMENTWISE):
            continue
        found[op] = None
        pending.extend(op.operands)
    return tuple(sorted(found, key=lambda op: op.order))


def skip_of(block: Block) -> Value:
    """The join's operand that the shortcut ends in; the fork, where a call that holds the join stands for it."""
    inputs = block.join_op.inputs
    value = inputs[block.skip_index] if block.skip_index < len(inputs) else None
    return block.fork_value if value is None else value
