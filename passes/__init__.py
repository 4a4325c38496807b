"""The catalogue of passes, by the name that users write."""

from __future__ import annotations

from rescompile.passes.canonicalise import Canonicalise
from rescompile.passes.fold_batch_norm import FoldBatchNorm
from rescompile.passes.freeze_blend import FreezeBlend
from rescompile.passes.fuse import Fuse
from rescompile.passes.fuse_activations import FuseActivations
from rescompile.passes.fuse_joins import FuseJoins
from rescompile.passes.insert_shortcuts import InsertShortcuts
from rescompile.passes.norm_placement import BranchNorm, DeepNorm, PostNorm, PreNorm, SandwichNorm
from rescompile.passes.remove_shortcuts import RemoveShortcuts
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
    "fuse": Fuse,
    "fold-batch-norm": FoldBatchNorm,
    "fuse-joins": FuseJoins,
    "fuse-activations": FuseActivations,
}
