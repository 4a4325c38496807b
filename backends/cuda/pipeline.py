"""From an emitted Relax module to one of loop nests, neighbours joined into kernels."""

from __future__ import annotations

from typing import Any

import tvm
from tvm import relax

from rescompile.backends.cuda.outputs import own_outputs
from rescompile.backends.cuda.transposed_matmul import join_transposed_matmul


def generate(module: tvm.IRModule, target: tvm.target.Target) -> tvm.IRModule:
    """Loop nests for what no kernel serves, epilogues joined to their products, the weights gathered in a tuple."""
    passes: list[Any] = [
        relax.transform.InlinePrivateFunctions(),
        relax.transform.CanonicalizeBindings(),
        # x·wᵀ is one loop nest that reads w as it lies, not a transposition and a product. Products that share w have
        # each a transposition of their own as yet.
        join_transposed_matmul,
        relax.transform.EliminateCommonSubexpr(),
        relax.transform.DeadCodeElimination(),
        relax.backend.DispatchSortScan(),
        # A reshape is another view of the same memory; inside a generated loop it would cost divisions.
        relax.transform.LegalizeOps(skip_ops=["relax.reshape"]),
        relax.transform.AnnotateTIROpPattern(),
        relax.transform.FuseOps(),
        relax.transform.FuseTIR(),
        relax.transform.DeadCodeElimination(),
        relax.transform.BundleModelParams("weights"),
    ]
    with target:
        return own_outputs(tvm.transform.Sequential(passes)(module))
