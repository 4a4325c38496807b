"""From one placement of norms to another: which blocks can be converted, and which cannot and why."""

from __future__ import annotations

from collections.abc import Iterator

from rescompile.blocks import Block
from rescompile.detection import inspect_graph
from rescompile.errors import RescompileError, nearest
from rescompile.graph import Graph, Op, Role
from rescompile.kinds import OpKind
from rescompile.passes.norm_blocks import NormedBlock
from rescompile.passes.norm_ends import Ends
from rescompile.passes.norm_stacks import Stacks
from rescompile.passes.norm_writers import Task, Writer, made_here
from rescompile.plans import FreshNames, Refusal, Rewrite

_ALREADY = {
    "pre": "it is pre-norm already",
    "post": "it is post-norm already",
    "branch": "its norm ends the branch already",
    "sandwich": "it has norms at both ends of its branch already",
    "deepnorm": "its skip is scaled and its norm behind the sum already",
}


class Conversion:
    """Decides, for each block that is asked for, whether its norms can go where `target` has them, and writes it."""

    def __init__(
        self, graph: Graph, target: str, asked: str | tuple[str, ...], finals: str | tuple[str, ...], writer: Writer
    ) -> None:
        self.graph = graph
        self.target = target
        self.report = inspect_graph(graph)
        self.stacks = Stacks(graph, self.report)
        self.asked = chosen(self.stacks.blocks, asked)
        self.by_name = asked != "all"
        self.finals = finals
        self.writer = writer

    def decisions(self) -> Iterator[Rewrite | Refusal]:
        """One for each block, in order."""
        fitting: dict[Block, NormedBlock] = {}
        refused: dict[Block, Refusal] = {}
        for block in self.asked:
            normed = self.stacks.read[block]
            reason = normed.reason if isinstance(normed, Refusal) else self._against(normed)
            if isinstance(normed, Refusal) or reason:
                refused[block] = Refusal(block.join, reason)
            else:
                fitting[block] = normed
        self._keep_sharers_together(fitting, refused)
        fresh = FreshNames(self.graph)
        ends = Ends(self.graph, self.stacks, self.target, self.finals, fitting, fresh)
        task = Task(self.graph, self.stacks, self.target, fitting, fresh, ends)
        yield from self.writer.begin(task)
        for block in self.asked:
            yield refused[block] if block in refused else self.writer.write(task, fitting[block])
        if not self.asked:
            yield Refusal(self.graph.name or "model", "the model has no residual block")

    def _against(self, normed: NormedBlock) -> str:
        """Why a block stays as it is; empty when it can be converted."""
        source, units = normed.placed, list(normed.units.values())
        if source == self.target:
            return _ALREADY[source]
        if normed.factor is not None and source != "deepnorm" and self.target == "deepnorm":
            return f"'{normed.factor.name}' scales its skip already"
        if source == "deepnorm" and normed.factor is not None and normed.factor.kind is not OpKind.MUL:
            return f"its skip is scaled by '{normed.factor.name}' ({normed.factor.kind.value})"
        if source == "deepnorm" and normed.factor is not None and not self._literal(normed.factor):
            return f"its skip is scaled by '{normed.factor.name}', and by no fixed number: the factor would be lost"
        if normed.block.scale is not None and normed.block.scale.on == "skip" and normed.factor is None:
            return "its skip is scaled in the sum itself"
        if len(units) == 2 and self.target != "sandwich" and sum(made_here(unit) for unit in units) != 1:
            return "it has two norms, and one of them would have to go with its weights"
        if self.target in ("branch", "sandwich") and len(normed.ends) != 1:
            return f"it has {len(normed.ends)} branches, which meet in the sum only"
        if not self.by_name and self.stacks.embeds(normed):
            return (
                "it embeds positions by a convolution, and its norm is the embedding's: name it in blocks to convert it"
            )
        return self.writer.against(normed) or self.stacks.stranger(normed)

    def _literal(self, factor: Op) -> bool:
        """Whether an operation multiplies by a number that is written down, and neither trained nor computed."""
        return any(value.role is Role.CONSTANT and self.graph.scalar(value) is not None for value in factor.operands)

    def _keep_sharers_together(self, fitting: dict[Block, NormedBlock], refused: dict[Block, Refusal]) -> None:
        """Blocks whose norms share weights are converted all or none."""
        changed = True
        while changed:
            changed = False
            for block, normed in list(fitting.items()):
                reason = self.stacks.borrower(normed, set(fitting))
                if reason:
                    refused[block] = Refusal(block.join, reason)
                    del fitting[block]
                    changed = True


def chosen(blocks: list[Block], asked: str | tuple[str, ...]) -> list[Block]:
    """The blocks that are named by id, by a range of ids (`0-5`), by join, or by module. RescompileError if none is."""
    if asked == "all":
        return blocks
    found: set[Block] = set()
    for item in (asked,) if isinstance(asked, str) else asked:
        first, _, last = item.partition("-")
        if first.isdecimal() and (last.isdecimal() or not last):
            wanted = range(int(first), int(last or first) + 1)
            named = [block for block in blocks if block.id in wanted]
        else:
            named = [
                block for block in blocks if item in (block.join, block.module) or block.module.startswith(f"{item}.")
            ]
        if not named:
            known = [name for block in blocks for name in (block.module, block.join) if name]
            raise RescompileError(f"There is no residual block '{item}'{nearest(item, known)}: `inspect` lists them.")
        found.update(named)
    return [block for block in blocks if block in found]
