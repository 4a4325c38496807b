"""Rule: a residual add and the norm that reads it become one operation with two outputs."""

from __future__ import annotations

from rescompile.graph import Graph, Op, Value
from rescompile.kinds import OpKind
from rescompile.passes.joins import plain_sum
from rescompile.plans import Refusal, Rewrite, fuse_edit

_NORMS = {OpKind.LAYER_NORM: "layer", OpKind.RMS_NORM: "rms"}


def add_norm(graph: Graph, join: Op, skip: Value | None = None) -> Rewrite | Refusal:
    """s = x + r; y = N(s)  →  y, s = add_norm(x, r)

    1. A layer norm or RMS norm reads the sum; other readers of the sum, graph outputs included, read the second output.
    2. The sum is plain: two operands of equal shape and dtype, neither constant.
    3. The norm's scale and shift are parameters or literals.
    """
    reader = next((user for user in join.output.users if user.kind in _NORMS and user.inputs[0] is join.output), None)
    if reader is None:
        return Refusal(join.name, "no layer norm or RMS norm reads the sum")
    refused = plain_sum(join)
    if refused is not None:
        return refused
    if reader.kind is OpKind.RMS_NORM and reader.attr("stash_type"):
        return Refusal(join.name, f"'{reader.name}' computes in {reader.attr('stash_type')}, which add_norm does not")
    affine = reader.inputs[1:]
    if any(value is not None and not value.constant for value in affine):
        return Refusal(join.name, f"the scale or shift of '{reader.name}' is computed from the graph's inputs")
    if reader.output.dtype != join.output.dtype:  # a norm keeps the shape, whatever its extents are called
        return Refusal(join.name, f"'{reader.name}' changes the dtype of the sum")
    unable = graph.cannot_emit(OpKind.ADD_NORM)
    if unable:
        return Refusal(join.name, unable)
    weight, bias = [*affine, None, None][:2]
    edit = fuse_edit(
        [join, reader],
        OpKind.ADD_NORM,
        [*join.operands, weight, bias],
        [reader.output, join.output],
        norm=_NORMS[reader.kind],
        axis=reader.attr("axis"),
        eps=reader.attr("eps"),
    )
    others = len(join.output.users) - 1 + graph.is_output(join.output)
    reason = f"with '{reader.name}'; the sum has {others} other reader{'s' if others != 1 else ''}"
    return Rewrite(join.name, "s = x + r; y = N(s)  →  y, s = add_norm(x, r)", reason, (edit,))
