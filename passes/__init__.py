"""The catalogue of passes, by the name that users write."""

from __future__ import annotations

from rescompile.passes.canonicalise import Canonicalise
from rescompile.passes.fold_batch_norm import FoldBatchNorm
from rescompile.passes.fold_norm_affine import FoldNormAffine
from rescompile.passes.fold_scale import FoldScale
from rescompile.passes.freeze_blend import FreezeBlend
from rescompile.passes.fuse import Fuse
from rescompile.passes.fuse_activations import FuseActivations
from rescompile.passes.fuse_joins import FuseJoins
from rescompile.passes.insert_shortcuts import InsertShortcuts
from rescompile.passes.merge_affine import MergeBranches
from rescompile.passes.merge_norms import MergeNorms
from rescompile.passes.merge_parallel import MergeParallel
from rescompile.passes.merge_projections import MergeProjections
from rescompile.passes.norm_placement import BranchNorm, DeepNorm, PostNorm, PreNorm, SandwichNorm
from rescompile.passes.pre_activation import PostActivation, PreActivation
from rescompile.passes.remove_shortcuts import RemoveShortcuts
from rescompile.passes.rms_norm import RmsNorm
from rescompile.passes.unfuse import UnfuseAll
from rescompile.plans import Pass, Pipeline

PASSES: dict[str, type[Pass] | type[Pipeline]] = {
    "canonicalise": Canonicalise,
    "insert-shortcuts": InsertShortcuts,
    "remove-shortcuts": RemoveShortcuts,
    "pre-norm": PreNorm,
    "post-norm": PostNorm,
    "branch": BranchNorm,
    "sandwich": SandwichNorm,
    "deepnorm": DeepNorm,
    "freeze-blend": FreezeBlend,
    "rms-norm": RmsNorm,
    "fold-norm-affine": FoldNormAffine,
    "merge-norms": MergeNorms,
    "merge-parallel": MergeParallel,
    "merge-projections": MergeProjections,
    "pre-activation": PreActivation,
    "post-activation": PostActivation,
    "fuse": Fuse,
    "fold-batch-norm": FoldBatchNorm,
    "fold-scale": FoldScale,
    "merge-branches": MergeBranches,
    "fuse-joins": FuseJoins,
    "fuse-activations": FuseActivations,
    "unfuse": UnfuseAll,
}
