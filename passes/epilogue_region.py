"""Rule: a sum, and all that is elementwise or index arithmetic around it, moves into the epilogue of a contraction."""

from __future__ import annotations

from rescompile.graph import Graph, Op, Value
from rescompile.passes.epilogue import residual_epilogue
from rescompile.passes.one_pass import CONTRACTIONS, Kernel, searched
from rescompile.passes.region_rewrite import rewrite_of, unsuited
from rescompile.plans import Fuse, Refusal, Rewrite


def epilogue_region(graph: Graph, join: Op, skip: Value | None = None) -> Rewrite | Refusal:
    """y = g(e(W·x) + s(r))  →  y = fused_region(x, W, r, ...)

    1. e is a chain of activations, constant biases and factors, gates computed elsewhere, batch norms in evaluation,
       casts and moves that are index arithmetic, behind a convolution, a linear or a matrix product.
    2. s is such a chain that the sum alone reads; g one that alone reads the sum, or its one activation.
    3. Where others read the contraction or e, too, and the kernel needs nothing that they compute, it returns both.
    4. A sum that `residual_epilogue` takes as a whole stays its own.
    """
    plain = residual_epilogue(graph, join, skip)
    refused = unsuited(join, skip)
    if refused is not None:
        return plain or refused
    reasons: list[str] = []
    kernel = searched(graph, join, skip, CONTRACTIONS, reasons.append)
    if kernel is None or kernel.root is None:
        reason = "; ".join(dict.fromkeys(reasons)) or "no contraction ends in it by elementwise operations and moves"
        return plain or Refusal(join.name, reason)
    if isinstance(plain, Rewrite) and _holds(plain, kernel):
        return plain
    where = f"the {kernel.root.kind.value} of '{kernel.root.module or kernel.root.name}'"
    return rewrite_of(graph, join, kernel, f"into the epilogue of {where}")


def _holds(plain: Rewrite, kernel: Kernel) -> bool:
    """Whether a plain fused operation has all that the kernel computes."""
    held = {name for edit in plain.edits if isinstance(edit, Fuse) for name in edit.ops}
    return all(op.name in held for op in kernel.computing)
