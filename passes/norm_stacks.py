"""Stacks of normed blocks: which block reads which one's result, which end is the last, and what else listens in."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property

from rescompile.blocks import Block, Report
from rescompile.graph import Graph, Op, Role, Value
from rescompile.kinds import OpKind, Trait
from rescompile.passes.norm_blocks import NormedBlock, keeps_features
from rescompile.passes.norm_reading import read_block
from rescompile.plans import Refusal

_TURNS = (OpKind.RESHAPE, OpKind.PERMUTE)
_PASSED = (OpKind.IDENTITY, OpKind.DROPOUT, OpKind.CAST, OpKind.MUL, OpKind.ADD, *_TURNS)
_KINDS = ("add", "parallel", "recurrent", "stochastic")
_LOOKED_AT = 8  # operations between two blocks of a stack


def _convolves(block: Block) -> bool:
    return any(op.kind is OpKind.CONV for op in block.branch_ops)


class Stacks:
    """The residual blocks of a graph as the passes that move norms see them, and how they follow one another."""

    def __init__(self, graph: Graph, report: Report) -> None:
        self.graph = graph
        self.report = report
        self.blocks = [block for block in report.blocks if block.kind != "branches"]
        self.read = {block: read_block(graph, report, block) for block in self.blocks}
        self._keep_innermost()
        self._out = {self._result(block): block for block in self.blocks}
        self._next: dict[Value, list[tuple[Block, tuple[Op, ...]]]] = {}
        for block in self.blocks:
            for value, way in self._ways_back(block.fork_value):
                self._next.setdefault(value, []).append((block, way))

    def next_blocks(self, block: Block) -> list[tuple[Block, tuple[Op, ...]]]:
        """The blocks that start from this one's result, each with the operations between."""
        return self._next.get(self._result(block), [])

    def before(self, block: Block) -> Block | None:
        """The block whose result this one starts from."""
        return next((self._out[value] for value, _ in self._ways_back(block.fork_value) if value in self._out), None)

    def stack_of(self, block: Block) -> list[Block]:
        """The blocks of the stack that a block is in, in order."""
        return self._stacks[block]

    def decoder_of(self, block: Block) -> list[Block] | None:
        """The stack whose branches read the result of the stack that the block is in; None where none does."""
        return self._decoders.get(self._stacks[block][-1])

    @cached_property
    def _stacks(self) -> dict[Block, list[Block]]:
        found: dict[Block, list[Block]] = {}
        for block in self.blocks:  # in topological order
            before = self.before(block)
            stack = [] if before is None or found[before][-1] is not before else found[before]
            stack.append(block)
            found[block] = stack
        return found

    @cached_property
    def _decoders(self) -> dict[Block, list[Block]]:
        """By the last block of a stack, the stack that attends to its result."""
        found: dict[Block, list[Block]] = {}
        for block in self.blocks:
            pending, seen = list(block.outside), set(block.outside)
            while pending:
                value = pending.pop()
                encoder = self._out.get(value)
                if encoder is not None and encoder.kind in _KINDS:
                    if self._stacks[encoder] is not self._stacks[block]:
                        found[encoder] = self._stacks[block]
                elif value.producer is not None:
                    fresh = [operand for operand in value.producer.operands if operand not in seen]
                    seen.update(fresh)
                    pending.extend(fresh)
        return found

    def stranger(self, normed: NormedBlock) -> str:
        """Why the stream behind a block cannot become another one; empty when it can.

        Behind a block that others follow, it may be read by those, and through norms.
        """
        following = self.next_blocks(normed.block)
        whole = any(unit.norm.kind is OpKind.GROUP_NORM for unit in normed.units.values())
        turn = next((op for _, way in following for op in way if op.kind in _TURNS), None)
        if turn is not None and (whole or not keeps_features(turn)):
            return f"between its norm and the next block's '{turn.name}' ({turn.kind.value}) changes the axis"
        act = next((op for op in normed.out.users if op.has(Trait.ACTIVATION) and op.output in self._next), None)
        if act is not None:
            return f"'{act.name}' activates its result before the next block, which is for pre-activation to move"
        if not following:
            return ""
        if self.graph.is_output(normed.out):
            return f"'{normed.out.name}', in the middle of the stack, is an output of the graph"
        known: set[Op] = set()
        for block, way in following:
            known.update(self.report.all_branch_ops(block), block.shortcut_ops, block.join_ops, block.norm_ops, way)
        for op in normed.out.users:
            if op not in known and not op.has(Trait.NORM):
                return f"'{normed.out.name}', in the middle of the stack, is also read by '{op.name}'"
        return ""

    def embeds(self, normed: NormedBlock) -> bool:
        """Whether a block is no layer of its stack but what leads to it: a convolution of the input (wav2vec 2.0).

        It is the stack's first, its branch convolves, and no later branch does.
        """
        stack = self.stack_of(normed.block)
        if stack[0] is not normed.block or len(stack) == 1:
            return False
        return _convolves(normed.block) and not any(_convolves(block) for block in stack[1:])

    def ends_unnormed(self, normed: NormedBlock, stream: Value) -> bool:
        """Whether the block is its stack's last and something reads `stream`, its result, other than through a norm."""
        if self.next_blocks(normed.block):
            return False
        return self.graph.is_output(stream) or any(not self._normed(op) for op in stream.users)

    def borrower(self, normed: NormedBlock, moving: set[Block]) -> str:
        """Why the norm's weights hold it where it is: somebody else's norm has them too. Empty when nobody's does.

        Blocks that share all their layers (ALBERT) move together.
        """
        own = {op for unit in normed.units.values() for op in unit.ops}
        for value in {operand for op in own for operand in op.operands if operand.role is Role.PARAMETER}:
            for op in () if self.graph.may_share(value) else value.users:
                if op in own:
                    continue
                other = self._by_norm.get(op)
                if other is None:
                    return f"its norm shares '{value.name}' with '{op.name}', which is no block's norm"
                if other.weights.isdisjoint(normed.weights):
                    return f"its norm is also the norm of '{other.name}', a block with other layers"
                if other.block not in moving:
                    return f"it shares its layers with '{other.name}', which stays as it is"
        return ""

    @cached_property
    def _by_norm(self) -> dict[Op, NormedBlock]:
        found: dict[Op, NormedBlock] = {}
        for normed in self.read.values():
            if not isinstance(normed, Refusal):
                found.update((op, normed) for unit in normed.units.values() for op in unit.ops)
        return found

    def _keep_innermost(self) -> None:
        """Where a norm ends the branch of one block and closes another inside it, it is the inner one's."""
        owners: dict[Op, Block] = {}
        for block in sorted(self.blocks, key=lambda block: len(self.report.all_branch_ops(block))):
            normed = self.read[block]
            if isinstance(normed, Refusal):
                continue
            ops = [op for unit in normed.units.values() for op in unit.ops]
            taken = next((op for op in ops if op in owners), None)
            if taken is None:
                owners.update(dict.fromkeys(ops, block))
            else:
                reason = f"'{taken.name}' is the norm of '{owners[taken].join}', a block inside its branch"
                self.read[block] = Refusal(block.join, reason)

    def _normed(self, op: Op) -> bool:
        while op.kind in (OpKind.IDENTITY, OpKind.CAST) and len(op.output.uses) == 1:
            op = op.output.users[0]
        return op.has(Trait.NORM)

    def _result(self, block: Block) -> Value:
        normed = self.read[block]
        if not isinstance(normed, Refusal):
            return normed.out
        if block.norm == "post" and not block.path and block.norm_ops:
            return block.norm_ops[0].output
        return block.join_op.outputs[0] if block.join_value is None else block.join_value

    def _ways_back(self, value: Value) -> Iterator[tuple[Value, tuple[Op, ...]]]:
        """The value and those before it, each with the operations that lead from there, as far as blocks may chain."""
        pending: list[tuple[Value, tuple[Op, ...]]] = [(value, ())]
        seen = {value}
        while pending:
            value, way = pending.pop()
            yield value, way
            op = value.producer
            if op is None or value in self._out or op.kind not in _PASSED or len(way) >= _LOOKED_AT:
                continue
            for operand in op.operands:
                if operand not in seen and not operand.constant:
                    seen.add(operand)
                    pending.append((operand, (op, *way)))
