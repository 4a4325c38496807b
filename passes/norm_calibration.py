"""Factors that keep a stream's proportions when its norms move to the branches (after Liu et al. 2020, Admin)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rescompile.arrays import load_arrays
from rescompile.blocks import Block
from rescompile.gradients import forward_signals
from rescompile.graph import Graph
from rescompile.kinds import OpKind
from rescompile.passes.norm_blocks import NormedBlock
from rescompile.passes.norm_moves import read
from rescompile.passes.norm_stacks import Stacks
from rescompile.passes.sketch import Sketch


def proportions(
    graph: Graph, stacks: Stacks, blocks: Sequence[NormedBlock], data: str | Mapping[str, Any] | None
) -> Mapping[Block, float]:
    """The factor of every branch, from one forward pass of the post-norm model.

    Where y = N(s), the stream that stays un-normed is S ≈ ρ·s with ρ = ∏ σ(s)/σ(y) over the blocks before: a branch
    that is multiplied by ρ brings to S what it brought to s. Exact where all norms have one gain and no shift, and all
    tokens one spread.
    """
    values = [value for normed in blocks for value in (normed.sum, normed.out)]
    signals = forward_signals(graph, values, load_arrays(Path(data)) if isinstance(data, str) else data)
    factors: dict[Block, float] = {}
    grown: dict[Block, float] = {}
    for normed in blocks:  # in topological order
        before = stacks.before(normed.block)
        factor = 1.0 if before is None else grown.get(before, 1.0)
        factors[normed.block] = factor
        spread, normal = signals[normed.sum].variance, signals[normed.out].variance
        ratio = (spread / normal) ** 0.5 if spread > 0 and normal > 0 else 1.0
        grown[normed.block] = factor * ratio
    return factors


def scale_branch(sketch: Sketch, normed: NormedBlock, factor: float) -> None:
    """Multiply what the branch brings to the sum by a trained scalar."""
    scalar = sketch.parameter("scale", (1,), "constant", value=factor)
    scaled = sketch.op(OpKind.MUL, normed.end, scalar, label="scaled", shape=normed.end.shape)
    for slot in normed.ends:
        read(sketch, slot, scaled)
