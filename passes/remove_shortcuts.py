"""Networks without the skips that they were trained with: exactly, where algebra allows, or plainly."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from msgspec.structs import replace

from rescompile.blocks import Block, Report
from rescompile.detection import inspect_graph
from rescompile.errors import RescompileError, nearest
from rescompile.graph import Graph, Op
from rescompile.kinds import OpKind
from rescompile.passes.drop_skip import drop_skip, drop_zero
from rescompile.passes.merge_branches import Replacement, change, merge_branches
from rescompile.passes.reserve import reserve
from rescompile.passes.tracing import Trace, layout_of
from rescompile.plans import (
    Edit,
    Erase,
    FreshNames,
    Fuse,
    Insert,
    Plan,
    Preserves,
    Refusal,
    ReplaceUses,
    Rewrite,
    gather,
)

How = Literal["exact", "plain"]


@dataclass(frozen=True)
class RemoveShortcuts:
    """y = F(x) + s(x)  →  y = G(x), G without a skip

    how=exact, by the first rule that fits, else refused with the reason:
    1. `drop_zero`: the skip adds nothing but zeros.
    2. `merge_branches`: F has no activation, so F + s is one convolution or linear (RepVGG, MobileOne, DiracNet).
    3. `reserve`: x is nowhere negative, so extra channels carry it through F's activations (RMNet).
    how=plain: G = F, which is another function; a projection on the skip goes with it.

    `blocks`: by id, join or module; all where none are given.
    """

    name: ClassVar[str] = "remove-shortcuts"
    how: How = "exact"
    blocks: tuple[str, ...] = ()

    @property
    def preserves(self) -> Preserves:
        """Values, but for how=plain."""
        return "values" if self.how == "exact" else "interface"

    def plan(self, graph: Graph) -> Plan:
        """One rewrite or refusal for each block; blocks inside one that went need none."""
        return gather(self.name, self.preserves, graph, self._decisions(graph))

    def _decisions(self, graph: Graph) -> Iterator[Rewrite | Refusal]:
        report = inspect_graph(graph)
        chosen = _chosen(report, self.blocks)
        if not chosen:
            yield Refusal(graph.name or "model", "the model has no residual block")
        fresh = FreshNames(graph)
        stands: dict[str, str] = {}  # of a join that is gone by then: what its readers read instead
        taken: dict[Op, str] = {}
        for block in chosen:
            if block.path or block.join_op.kind is OpKind.OPAQUE:
                where = f"{block.path}/{block.join}" if block.path else block.join
                yield Refusal(where, "it is inside an operation that holds a graph of its own, where no pass rewrites")
                continue
            if all(op in taken for op in block.join_ops):
                continue
            decision = self._decide(report, graph, block, fresh)
            if isinstance(decision, Rewrite):
                ops = _removed(graph, decision)
                clash = next((op for op in ops if op in taken), None)
                if clash is not None:
                    other = taken[clash]
                    yield Refusal(block.join, f"'{clash.name}' goes with '{other}' first: run the pass once more")
                    continue
                taken |= dict.fromkeys(ops, block.join)
                decision = _standing(decision, stands)
            yield decision

    def _decide(self, report: Report, graph: Graph, block: Block, fresh: FreshNames) -> Rewrite | Refusal:
        if self.how == "plain":
            dropped = drop_skip(graph, block)
            if isinstance(dropped, Refusal):
                return dropped
            return Rewrite(block.join, "y = F(x) + s(x)  →  y = F(x)", "another function, as asked", tuple(dropped))
        if graph.training:
            reason = "in training the statistics are the batch's own, and the skip's weights are trained for themselves"
            return Refusal(block.join, f"{reason}: capture the model in evaluation")
        dropped = drop_zero(graph, block)
        if not isinstance(dropped, Refusal):
            return Rewrite(block.join, "y = F(x) + 0  →  y = F(x)", "the skip adds zeros", tuple(dropped))
        return _exact(report, graph, block, fresh)


def _exact(report: Report, graph: Graph, block: Block, fresh: FreshNames) -> Rewrite | Refusal:
    if any(op.kind is not OpKind.ADD for op in block.join_ops) or block.join_value is None:
        kind = block.join_op.kind.value
        return Refusal(block.join, f"a {kind} brings the paths together, and no convolution does the same")
    fork, join = block.fork_value, block.join_value
    layout = layout_of([*report.all_branch_ops(block), *block.shortcut_ops], fork)
    if isinstance(layout, str):
        return Refusal(block.join, layout)
    trace = Trace(graph, fork, layout)
    ends = trace.maps(join)
    if isinstance(ends, Refusal):
        return Refusal(block.join, ends.reason)
    if list(ends) == [fork]:
        made: Replacement | Refusal = merge_branches(trace, join, fork, ends[fork], fresh)
        equation = "W·x + b + P(x) + BN(x) + x  →  W'·x + b'"
        what = "one affine map"
    else:
        made = reserve(graph, fork, join, layout, fresh)
        equation = "W₂·f(W₁·x) + P(x)  →  [W₂ P]·f([W₁; I]·x), x ≥ 0"
        what = "the skip in reserved channels"
    if isinstance(made, Refusal):
        return Refusal(block.join, made.reason)
    return Rewrite(block.join, equation, f"{what}; {change(graph, made)}", tuple(made.edits))


def _chosen(report: Report, wanted: Sequence[str]) -> list[Block]:
    """The blocks asked for, outer ones first. RescompileError where a name fits none."""
    depth: dict[int, int] = {}
    parents = {block.id: block.parent for block in report.blocks}
    for block in report.blocks:
        at, levels = block.parent, 0
        while at is not None:
            at, levels = parents[at], levels + 1
        depth[block.id] = levels
    found: dict[int, Block] = {}
    for name in wanted:
        fits = [block for block in report.blocks if name in (str(block.id), block.join)]
        fits = fits or [block for block in report.blocks if f"{block.module}.".startswith(f"{name}.")]
        if not fits:
            known = [text for block in report.blocks for text in (block.join, block.module) if text]
            raise RescompileError(f"No block has the id, join or module '{name}'{nearest(name, known)}.")
        found |= {block.id: block for block in fits}
    blocks = list(found.values()) if wanted else list(report.blocks)
    return sorted(blocks, key=lambda block: (depth[block.id], block.id))


def _removed(graph: Graph, rewrite: Rewrite) -> list[Op]:
    names: list[str] = []
    for edit in rewrite.edits:
        if isinstance(edit, Fuse):
            names.extend(edit.ops)
        elif isinstance(edit, Erase):
            names.append(edit.op)
    return [graph.op(name) for name in names]


def _standing(rewrite: Rewrite, stands: dict[str, str]) -> Rewrite:
    """The same with the names that values go by once the rewrites before are done; its own are noted in `stands`."""

    def now(name: str | None) -> str | None:
        while name in stands:
            name = stands[name]
        return name

    edits: list[Edit] = []
    for edit in rewrite.edits:
        if isinstance(edit, ReplaceUses):
            edit = ReplaceUses(edit.old, now(edit.new) or edit.new)
            stands[edit.old] = edit.new
        elif isinstance(edit, Fuse | Insert):
            edit = replace(edit, inputs=tuple(now(name) for name in edit.inputs))
        edits.append(edit)
    return replace(rewrite, edits=tuple(edits))
