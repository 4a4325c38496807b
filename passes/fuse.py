"""The fusion of residual subgraphs as one request."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from rescompile.passes.fold_batch_norm import FoldBatchNorm
from rescompile.passes.fold_scale import FoldScale
from rescompile.passes.fuse_activations import FuseActivations
from rescompile.passes.fuse_joins import FuseJoins
from rescompile.passes.joins import Scope
from rescompile.passes.merge_affine import MergeBranches
from rescompile.passes.merge_parallel import MergeParallel
from rescompile.passes.merge_projections import MergeProjections
from rescompile.plans import Pass, Preserves


@dataclass(frozen=True)
class Fuse:
    """merge-branches, fold-batch-norm, fold-scale, merge-projections, merge-parallel, fuse-joins, fuse-activations

    Those that the options name: `merge` (with its `growth`), `batch_norm` and `scale` (with their `half`),
    `projections` and `parallel` (docs/fusion.md says where they pay), `activations`: contractions with an activation
    and no join, too.
    `joins`: "residual" for skips only, "all" for every sum of two computed values. `trainable`: nothing is folded, and
    no fusion takes along what training does otherwise (a batch norm, a dropout that evaluation switches off), so that
    the result trains as the original does.
    """

    name: ClassVar[str] = "fuse"
    preserves: ClassVar[Preserves] = "values"

    joins: Scope = "residual"
    merge: bool = True
    growth: float = 1.0
    batch_norm: bool = True
    half: bool = False
    scale: bool = True
    norm: bool = True
    epilogue: bool = True
    concat: bool = True
    hoist_bias: bool = False
    activations: bool = False
    trainable: bool = False
    parallel: bool = False
    projections: bool = False

    def stages(self) -> Sequence[Pass]:
        """The passes, in order."""
        joins = FuseJoins(self.joins, self.norm, self.epilogue, self.concat, self.trainable, self.hoist_bias)
        if self.trainable:
            return [joins, FuseActivations()] if self.activations else [joins]
        stages: list[Pass] = []
        if self.merge:
            stages.append(MergeBranches(growth=self.growth))
        if self.batch_norm:
            stages.append(FoldBatchNorm(half=self.half))
        if self.scale:
            stages.append(FoldScale(half=self.half))
        if self.projections:
            stages.append(MergeProjections())
        if self.parallel:
            stages.append(MergeParallel())
        stages.append(joins)
        if self.activations:
            stages.append(FuseActivations())
        return stages
