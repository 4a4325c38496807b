"""Where an axis of features goes: through operations that move positions about and leave every feature where it is."""

from __future__ import annotations

import math

import numpy as np

from rescompile.graph import Graph, Op, Shape, Value
from rescompile.kinds import OpKind as K
from rescompile.passes.tracing import is_stored

_PER_CHANNEL = (K.INTERPOLATE, K.AVG_POOL, K.ADAPTIVE_AVG_POOL)
_OF_ALL_OPERANDS = (K.ADD, K.CONCAT)


def moved(op: Op, index: int, axis: int, output: Value) -> int | None:
    """The axis of `output` along which `axis` of operand `index` lies, where each element of the output is one of the
    operand's, of the same feature. None where features are mixed, cut or joined by others."""
    value = op.inputs[index]
    if value is None or value.shape is None or output.shape is None or index != 0:
        return None
    before, after, kind = value.shape, output.shape, op.kind
    if kind is K.IDENTITY:
        return axis
    if kind is K.RESHAPE:
        return _reshaped(before, after, axis)
    if kind is K.PERMUTE:
        return tuple(op.attr("perm")).index(axis)
    if kind in (K.SLICE, K.ROLL):
        return axis if op.attr("axes") and axis not in op.attr("axes") else None
    if kind is K.SPLIT:
        return axis if axis != op.attr("axis") else None
    if kind is K.GATHER:
        indices = op.inputs[1]
        at = op.attr("axis")
        if at == axis or indices is None or indices.rank is None:
            return None
        return axis if axis < at else axis + indices.rank - 1
    if kind in (K.EXPAND, K.TILE):
        return _aligned(before, after, axis)
    return None


def carried(op: Op, index: int, axis: int, output: Value) -> int | None:
    """As `moved`, where the output is linear in its operands and treats all features alike: a sum of vectors without
    mean has none. Factors may differ between positions, not between features."""
    value = op.inputs[index]
    if value is None or value.shape is None or output.shape is None:
        return None
    before, after, kind = value.shape, output.shape, op.kind
    if kind is K.ADD:
        return _aligned(before, after, axis)
    if kind is K.CONCAT:
        return axis if axis != op.attr("axis") else None
    if kind in (K.MUL, K.DIV):
        other = op.inputs[1 - index]
        place = _aligned(before, after, axis)
        if place is None or other is None or other.shape is None or (kind is K.DIV and index):
            return None
        own = place - (len(after) - len(other.shape))
        return place if own < 0 or other.shape[own] == 1 else None
    if index:
        return None
    if kind is K.NEG or (kind is K.CAST and _is_float(output) and _is_float(value)):
        return axis
    if kind is K.PAD:
        pads, rank = op.attr("pads"), len(before)
        quiet = op.attr("mode") != "constant" or op.attr("value") == 0
        return axis if quiet and pads and not pads[axis] and not pads[axis + rank] else None
    if kind in (K.MEAN, K.SUM):
        axes = op.attr("axes")
        if not axes or axis in axes:
            return None
        return axis if op.attr("keepdims") else axis - sum(gone < axis for gone in axes)
    if kind in _PER_CHANNEL:
        return axis if axis == 1 else None
    return moved(op, index, axis, output)


def carriers(output: Value, axis: int) -> list[tuple[int, int]] | None:
    """The operands, each with its axis, that the features along `axis` of a value are carried over from.

    None where its producer does not carry features, or where a term of it has none.
    """
    op = output.producer
    if op is None:
        return None
    found = []
    for index, value in enumerate(op.inputs):
        axes = range(value.rank or 0) if value is not None else ()
        place = next((own for own in axes if carried(op, index, own, output) == axis), None)
        if place is not None and value is not None and (value.shape or ())[place] == (output.shape or ())[axis]:
            found.append((index, place))
        elif op.kind in _OF_ALL_OPERANDS:
            return None
    if op.kind in (K.MUL, K.DIV) and len(found) != 1:
        return None
    return found or None


def normed_axis(norm: Op) -> int | str:
    """The one axis along which a norm has a gain and a bias; text where there is none."""
    x = norm.inputs[0]
    if x is None or x.shape is None:
        return "the shape of what it reads is not known"
    axis = 1
    if norm.kind in (K.LAYER_NORM, K.RMS_NORM):
        axis = norm.attr("axis") % len(x.shape)
        if axis != len(x.shape) - 1:
            return "it normalises over several axes"
    extent = x.shape[axis]
    if not isinstance(extent, int) or extent < 2:
        return "how many features it has is not known, or they are one"
    return axis


def held(value: Value | None) -> Value | None:
    """The stored vector that a gain or bias is, or a view of; None where it is computed."""
    while value is not None and value.producer is not None:
        value = value.producer.inputs[0] if value.producer.kind in (K.IDENTITY, K.RESHAPE) else None
    return value if value is not None and is_stored(value) else None


def uniform(graph: Graph, value: Value | None, absent: float) -> float | None:
    """The number that every element of a stored value has, `absent` where there is no value, None for anything else."""
    if value is None:
        return absent
    stored = held(value)
    if stored is None:
        return None
    data = graph.data(stored)
    return float(data.reshape(-1)[0]) if data.size and bool(np.all(data == data.reshape(-1)[0])) else None


def _reshaped(before: Shape, after: Shape, axis: int) -> int | None:
    inside = before[axis + 1 :]
    if not all(isinstance(extent, int) for extent in inside):
        return None
    wanted, passed = math.prod(extent for extent in inside if isinstance(extent, int)), 1
    for place in reversed(range(len(after))):
        extent = after[place]
        if passed == wanted and extent == before[axis]:
            return place
        if not isinstance(extent, int) or passed * extent > wanted:
            return None
        passed *= extent
    return None


def _aligned(before: Shape, after: Shape, axis: int) -> int | None:
    """Broadcasting counts axes from the last one."""
    place = axis + len(after) - len(before)
    return place if after[place] == before[axis] else None


def _is_float(value: Value) -> bool:
    return value.dtype is not None and "float" in value.dtype
