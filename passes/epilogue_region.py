"""Rule: a sum, and all that is elementwise or index arithmetic around it, moves into the epilogue of a contraction."""

from __future__ import annotations

from collections.abc import Mapping

from rescompile.graph import Graph, Op, Value
from rescompile.kinds import OpKind as K
from rescompile.kinds import Trait
from rescompile.passes.epilogue import residual_epilogue
from rescompile.passes.one_pass import CONTRACTIONS, Place, searched
from rescompile.passes.region_rewrite import branch_end, rewrite_of, unsuited
from rescompile.plans import Fuse, Refusal, Rewrite

_NO_PART = CONTRACTIONS | {K.MAX_POOL, K.ATTENTION, K.RECURRENT, K.EMBEDDING}  # in no epilogue but their own


def epilogue_region(
    graph: Graph, join: Op, skip: Value | None = None, *, closed: Mapping[str, str] | None = None
) -> Rewrite | Refusal:
    """y = g(e(W·x) + s(r))  →  y = fused_region(x, W, r, ...)

    1. e is a chain of activations, constant biases and factors, gates computed elsewhere, batch norms in evaluation,
       casts and moves that are index arithmetic, behind a convolution, a linear or a matrix product.
    2. s is such a chain that the sum alone reads; g one that alone reads the sum, or its one activation.
    3. Where others read the contraction or e, too, and the kernel needs nothing that they compute, it returns both.
    4. A sum that `residual_epilogue` takes as a whole stays its own.

    `closed`: operations that no kernel may hold, each with the reason.
    """
    place = Place(graph, closed or {})
    plain = residual_epilogue(graph, join, skip)
    if isinstance(plain, Rewrite):
        plain = next((Refusal(join.name, place.closed[name]) for name in _held(plain) if name in place.closed), plain)
    refused = unsuited(join, skip)
    if refused is not None:
        return plain or refused
    if isinstance(plain, Rewrite) and _stands_alone(graph, plain):
        return plain
    reasons: list[str] = []
    kernel = searched(place, join, skip, CONTRACTIONS, reasons.append)
    if kernel is None or kernel.root is None:
        reason = "; ".join(dict.fromkeys(reasons)) or branch_end(place, join, skip)
        return plain or Refusal(join.name, reason)
    if isinstance(plain, Rewrite) and _held(plain) >= {op.name for op in kernel.computing}:
        return plain
    where = f"the {kernel.root.kind.value} of '{kernel.root.module or kernel.root.name}'"
    return rewrite_of(place, join, kernel, f"into the epilogue of {where}")


def _stands_alone(graph: Graph, plain: Rewrite) -> bool:
    """Whether nothing beside a plain fused operation could be in its kernel, which saves the search for it."""
    (edit,) = (edit for edit in plain.edits if isinstance(edit, Fuse))
    result, residual = graph.value(edit.outputs[0]), graph.value(edit.inputs[3] or "")
    maker = residual.producer
    before = maker is None or maker.kind in _NO_PART or len(residual.users) > 1
    readers = result.users
    after = all(reader.kind in CONTRACTIONS or reader.has(Trait.NORM) for reader in readers if reader.kind is not K.ADD)
    return before and after and (len(readers) != 1 or readers[0].kind is not K.ADD)


def _held(rewrite: Rewrite) -> set[str]:
    """The operations that a rewrite makes one of."""
    return {name for edit in rewrite.edits if isinstance(edit, Fuse) for name in edit.ops}
