"""Movements of elements that an exporter wrote as parts put together again."""

from __future__ import annotations

from rescompile.composites.region import Recogniser
from rescompile.graph import Op, Value
from rescompile.kinds import OpKind


def roll(recogniser: Recogniser, concat: Op) -> Op | None:
    """y = [x[k:], x[:k]] along one axis → ROLL(x) by n − k, where n is the known extent of x."""
    if len(concat.inputs) != 2:
        return None
    axis = concat.attr("axis")
    back, front = (_part(value, axis) for value in concat.inputs)
    if back is None or front is None or back[0].inputs[0] is not front[0].inputs[0]:
        return None
    source = front[0].inputs[0]
    extent = None if source is None or source.shape is None else source.shape[axis]
    if not isinstance(extent, int) or front[1] != 0 or back[1] != front[2] or back[2] < extent:
        return None
    attrs = {"axes": (axis,), "shifts": (extent - back[1],)}
    return recogniser.cover([back[0], front[0], concat], OpKind.ROLL, [source], concat.output, attrs)


def _part(value: Value | None, axis: int) -> tuple[Op, int, int] | None:
    """The slice along one axis that makes a value, its start and its end."""
    op = None if value is None else value.producer
    if (
        op is None
        or op.kind is not OpKind.SLICE
        or tuple(op.attr("axes")) != (axis,)
        or tuple(op.attr("steps")) != (1,)
    ):
        return None
    start, stop = op.attr("starts")[0], op.attr("stops")[0]
    return (op, start, stop) if isinstance(start, int) and isinstance(stop, int) and 0 <= start < stop else None
