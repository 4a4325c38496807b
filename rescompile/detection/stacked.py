"""Contractions with the weights of several: which of them stand for contractions side by side, or for a sum of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from rescompile.fused_region import Region
from rescompile.graph import Graph, Op, Role, Shape, Value
from rescompile.kinds import OpKind, Trait

_CONTRACTIONS = (OpKind.CONV, OpKind.LINEAR)


def side_by_side(graph: Graph, split: Op) -> tuple[Op, ...]:
    """The contraction, and the activation if there is one, of split(f([W₁; W₂; …]·x)), where one pass made all of them
    and nothing else reads the whole; nothing for any other split."""
    ops: list[Op] = []
    made, value = split.provenance, split.operands[0] if split.operands else None
    if split.kind is not OpKind.SPLIT or not made or value is None:
        return ()
    features = len(value.shape or ()) - 1
    while value is not None and value.producer is not None:
        op = value.producer
        if op.provenance != made or len(value.uses) != 1 or graph.is_output(value):
            return ()
        ops.insert(0, op)
        if op.kind in _CONTRACTIONS:
            axis = 1 if op.kind is OpKind.CONV else features
            return tuple(ops) if split.attr("axis") == axis and all(map(_is_stored, op.inputs[1:])) else ()
        value = op.inputs[0] if op.has(Trait.ACTIVATION) and len(ops) == 1 else None
    return ()


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
