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
from rescompile.plans import Pass, Preserves


@dataclass(frozen=True)
class Fuse:
    """merge-branches, fold-batch-norm, fold-scale, then fuse-joins, then (with `activations`) fuse-activations

    `joins`: "residual" for skips only, "all" for every sum of two computed values. `activations`: contractions with an
    activation and no join, too. `merge`, `batch_norm`, `scale`: the stages before the joins; `growth`: of merging.
    """

    name: ClassVar[str] = "fuse"
    preserves: ClassVar[Preserves] = "values"

    joins: Scope = "residual"
    merge: bool = True
    growth: float = 1.0
    batch_norm: bool = True
    scale: bool = True
    norm: bool = True
    epilogue: bool = True
    concat: bool = True
    activations: bool = False

    def stages(self) -> Sequence[Pass]:
        """The passes, in order."""
        stages: list[Pass] = []
        if self.merge:
            stages.append(MergeBranches(growth=self.growth))
        if self.batch_norm:
            stages.append(FoldBatchNorm())
        if self.scale:
            stages.append(FoldScale())
        stages.append(FuseJoins(joins=self.joins, norm=self.norm, epilogue=self.epilogue, concat=self.concat))
        if self.activations:
            stages.append(FuseActivations())
        return stages
