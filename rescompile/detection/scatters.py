"""Scatters: y = x with F(x) added at given places (index_add, scatter_add, a mixture's experts).

A scatter that adds is a sum of two, judged as one: x is the one operand, what is added the other. One that overwrites,
or keeps the larger, adds nothing up.
"""

from __future__ import annotations

from rescompile.detection.judgement import Draft, Judgement, Refusal
from rescompile.detection.sums import INTEGERS, sum_of_two
from rescompile.graph import Op


def residual_scatter(judgement: Judgement, op: Op) -> Draft | Refusal | None:
    """A block that ends in the scatter `op`, or why it is none; None when fewer than two values are joined."""
    x, source = op.inputs[0], op.inputs[-1]
    output = op.outputs[0]
    if x is None or source is None or source.constant:
        return None
    if output.dtype is not None and output.dtype.startswith(INTEGERS):
        return Refusal("integer arithmetic: the scatter computes positions or sizes, not features")
    reduction = op.attr("reduction")
    if x.constant:
        if reduction == "none":
            return None
        return Refusal(f"scatter onto a constant: '{x.name}' is no stream, what is added up are branches (experts)")
    if reduction == "none":
        meet = judgement.reach.meet(x, (source,))
        return Refusal(f"overwrites: '{source.name}' takes the place of elements of '{x.name}', nothing adds up", meet)
    if reduction != "add":
        meet = judgement.reach.meet(x, (source,))
        return Refusal(f"{reduction}: a scatter that does not add, so neither operand passes unchanged", meet)
    found = sum_of_two(judgement, op, (0, x), (len(op.inputs) - 1, source))
    if isinstance(found, Draft) and found.skip_index != 0 and found.shortcut == "identity":
        found.shortcut = "view"  # the skip goes to other places
    return found
