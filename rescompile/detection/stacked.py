"""Contractions with the weights of several: which of them stand for contractions side by side, or for a sum of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from rescompile.fused_region import Region
from rescompile.graph import Graph, Op, Role, Shape, Value
from rescompile.kinds import OpKind

_CONTRACTIONS = (OpKind.CONV, OpKind.LINEAR)


def side_by_side(graph: Graph, split: Op) -> Op | None:
    """The contraction of split([W₁; W₂; …]·x), where one pass made both and nothing else reads the whole."""
    if split.kind is not OpKind.SPLIT or not split.provenance:
        return None
    whole = split.operands[0]
    work = whole.producer
    if work is None or work.kind not in _CONTRACTIONS or work.provenance != split.provenance:
        return None
    if len(whole.uses) != 1 or graph.is_output(whole) or not all(map(_is_stored, work.inputs[1:])):
        return None
    features = 1 if work.kind is OpKind.CONV else (whole.rank or 0) - 1
    return work if split.attr("axis") == features else None


def sums(region: Region, operands: Sequence[Value | None], shapes: Sequence[Shape | None]) -> dict[int, int]:
    """Of [W P]·[h, x] = W·h + P·x inside a region: the value that each contraction makes, and the concat it reads.

    `shapes`: of the operands and of what each step makes.
    """
    reads = Counter(value for step in region.steps for value in step.inputs)
    found: dict[int, int] = {}
    for made, step in enumerate(region.steps, region.operands):
        if step.kind not in _CONTRACTIONS or step.attrs.get("groups", 1) != 1:
            continue
        whole, weight = step.inputs[0], step.inputs[1]
        if whole is None or weight is None or not region.operands <= whole or reads[whole] != 1:
            continue
        if whole in region.outputs or weight >= region.operands or not _is_stored(operands[weight]):
            continue
        concat, shape = region.steps[whole - region.operands], shapes[whole]
        if concat.kind is not OpKind.CONCAT or shape is None:
            continue
        axis = concat.attrs.get("axis", 0)
        if axis != (1 if step.kind is OpKind.CONV else len(shape) - 1):
            continue
        parts = [None if part is None else shapes[part] for part in concat.inputs]
        if all(part is not None and isinstance(part[axis], int) for part in parts):
            found[made] = whole
    return found


def _is_stored(value: Value | None) -> bool:
    return value is None or value.role in (Role.PARAMETER, Role.CONSTANT)
