"""Residual networks of convolutions in the other form: post-activation (He et al. 2015), pre-activation (2016).

Both passes read the same description of a block, `passes.activated_blocks`, and write it in their own form. A block's
edits are right whether or not those of its neighbours are made: the branch reads the activated value in both forms, and
the skip reads it, or what it is the activation of, wherever the norm of the block before stands by then.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal, TypeAlias

from rescompile.detection import inspect_graph
from rescompile.graph import Graph
from rescompile.kinds import OpKind
from rescompile.passes import activation_moves as moves
from rescompile.passes.activated_blocks import ActivatedBlock, ActivatedBlocks
from rescompile.passes.norm_conversion import chosen
from rescompile.passes.sketch import Sketch
from rescompile.plans import FreshNames, Plan, Preserves, Refusal, Rewrite, gather

First: TypeAlias = Literal["own", "shared"]
Kept: TypeAlias = Literal["drop", "keep"]
Added: TypeAlias = Literal["new", "none"]
Names: TypeAlias = str | tuple[str, ...]

# Notes on what the edits do; a block that reads the same in both forms has none.
_Writer: TypeAlias = Callable[[Sketch, ActivatedBlock], list[str]]


@dataclass(frozen=True)
class PreActivation:
    """y = σ(x + N(F(x)))  →  y = x + F(σ(N(x)))

    1. The block is a sum of two terms that an activation follows, and nothing else but skips reads the sum.
    2. The branch ends in a convolution or a linear, then at most a norm, gates (squeeze-and-excite), factors, dropout
       and stochastic depth. The norm, which nothing else reads and which works on the shape of the sum, moves behind
       the join: to the entry of the next block, or before the head. Without a norm the activation moves alone.
    3. A skip without weights (identity, zero-padded, pooled) reads the bare sum. A projection reads the activated
       value, and loses the norm that it ends in (`projection_norm=drop`: He et al. 2016) or keeps it (`keep`).
    4. `first=own`: the first block takes the stem's norm and activation, which go behind the pool that the stem ends
       in. `first=shared` (He et al. 2016, section 4.1): the stem keeps them, and both paths read the stem's result.

    Another function of the same weights, which keep their names. `blocks`: which ones, as ids, ranges (`0-5`), joins or
    modules. What the conditions do not turn down is converted, whatever becomes of the blocks around it.
    """

    name: ClassVar[str] = "pre-activation"
    first: First = "own"
    projection_norm: Kept = "drop"
    blocks: Names = "all"

    @property
    def preserves(self) -> Preserves:
        """The interface only."""
        return "interface"

    def plan(self, graph: Graph) -> Plan:
        """One rewrite or refusal for each block."""
        return gather(self.name, self.preserves, graph, _decisions(graph, self.blocks, "pre", self._write))

    def _write(self, sketch: Sketch, block: ActivatedBlock) -> list[str]:
        notes = []
        if block.norm is not None and not block.norm_behind:
            moves.norm_behind_join(sketch, block, block.norm)
            notes.append(f"'{block.norm.name}' goes behind the join")
        lead = None if block.bare else block.lead
        if lead is not None and not (lead.stem and self.first == "shared"):
            if lead.pools_last and lead.pools_move:
                moves.pools_before_activation(sketch, block, lead)
                notes.append(f"'{lead.closing.first.name}' goes behind '{lead.pools[-1].name}'")
            elif not lead.pools_last and not block.projected:
                for op, index in block.skip:
                    moves.read(sketch, op, index, lead.bare)
                notes.append(f"the skip reads '{lead.bare.name}'")
        if block.skip_norm is not None and not block.bare and self.projection_norm == "drop":
            moves.without_norm(sketch, block, block.skip_norm)
            notes.append(f"the projection loses its norm '{block.skip_norm.name}'")
        if notes and block.norm is None:
            notes.append("the branch ends in no norm, so the activation moves alone")
        return notes


@dataclass(frozen=True)
class PostActivation:
    """y = x + F(σ(N(x)))  →  y = σ(x + N(F(x)))

    The inverse of `pre-activation`, under its conditions 1 and 2.

    1. The norm behind the join, which the next block or the head took to its entry, goes to the branch's end.
    2. Every skip reads the activated value.
    3. A pool between the stem's convolution and its norm goes behind the activation.
    4. A projection without a norm gets one (`projection_norm=new`: of the kind of the block's own, starting with gain
       one and shift zero) or stays without (`none`).
    """

    name: ClassVar[str] = "post-activation"
    projection_norm: Added = "new"
    blocks: Names = "all"

    @property
    def preserves(self) -> Preserves:
        """The interface only."""
        return "interface"

    def plan(self, graph: Graph) -> Plan:
        """One rewrite or refusal for each block."""
        return gather(self.name, self.preserves, graph, _decisions(graph, self.blocks, "post", self._write))

    def _write(self, sketch: Sketch, block: ActivatedBlock) -> list[str]:
        notes = []
        if block.norm is not None and block.norm_behind:
            moves.norm_before_join(sketch, block, block.norm)
            notes.append(f"'{block.norm.name}' goes to the end of the branch")
        lead = block.lead
        if lead is not None and not lead.pools_last and lead.pools and lead.pools_move:
            moves.pools_behind_activation(sketch, block, lead)
            notes.append(f"'{lead.closing.first.name}' goes before '{lead.pools[0].name}'")
        elif lead is not None and block.bare:
            for op, index in block.skip:
                moves.read(sketch, op, index, lead.x)
            notes.append(f"the skip reads '{lead.x.name}'")
        if block.norm_behind and block.norm is not None and self._lacks_norm(block):
            made = moves.with_norm(sketch, block, block.norm)
            notes.append(f"the projection gets a norm, '{made.name}'")
        return notes

    def _lacks_norm(self, block: ActivatedBlock) -> bool:
        return block.projected and block.skip_norm is None and self.projection_norm == "new"


def _decisions(graph: Graph, wanted: Names, form: str, write: _Writer) -> Iterator[Rewrite | Refusal]:
    report = inspect_graph(graph)
    asked = chosen(list(report.blocks), wanted)
    if not asked:
        yield Refusal(graph.name or "model", "the model has no residual block")
    blocks, fresh = ActivatedBlocks(graph, report), FreshNames(graph)
    for block in asked:
        if block.path or block.join_op.kind is OpKind.OPAQUE:
            where = f"{block.path}/{block.join}" if block.path else block.join
            yield Refusal(where, "it is inside an operation that holds a graph of its own, where no pass rewrites")
            continue
        found = blocks.read(block)
        if isinstance(found, Refusal):
            yield found
            continue
        sketch = Sketch(graph, fresh, f"projections.{block.id}", found.total.dtype or "float32", 0)
        notes = write(sketch, found)
        if notes:
            yield Rewrite(block.join, _equation(found, form), "; ".join(notes), tuple(sketch.edits))
        else:
            yield Refusal(block.join, _nothing(found, form))


def _nothing(block: ActivatedBlock, form: str) -> str:
    if block.norm is None and not block.bare and (block.projected or block.lead is None):
        skip = "is a projection" if block.projected else "starts from what no activation makes"
        return f"without a norm behind its branch, and with a skip that {skip}, it is the same in both forms"
    return f"it has the {form}-activation form already"


def _equation(block: ActivatedBlock, form: str) -> str:
    norm, inner, skip = ("N(F(x))", "σ(N(x))", "x") if block.norm is not None else ("F(x)", "σ(x)", "x")
    post = f"y = σ({'N(P(x))' if block.skip_norm else 'P(x)' if block.projected else skip} + {norm})"
    pre = f"y = {f'P({inner})' if block.projected else skip} + F({inner})"
    return f"{post}  →  {pre}" if form == "pre" else f"{pre}  →  {post}"
