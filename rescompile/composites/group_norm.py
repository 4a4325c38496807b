"""Group norm, as exporters write it: the channels of a group and all positions become one row, which is normalised.

y = reshape(N(reshape(x, [N, G, −1])), shape of x) · weight + bias        N: LayerNorm or InstanceNorm of a row
"""

from __future__ import annotations

import numpy as np

from rescompile.composites.region import Recogniser
from rescompile.graph import Op, Shape, Value
from rescompile.kinds import OpKind

_Step = tuple[OpKind, list[Value | None], Value, dict[str, object]]


def group_norm(recogniser: Recogniser, norm: Op) -> Op | None:
    """A GROUP_NORM in the place of a norm of rows between two reshapes; None when it is none."""
    if norm.kind not in (OpKind.LAYER_NORM, OpKind.INSTANCE_NORM):  # others take no mean away, or are of their own
        return None
    rows, back = norm.operands[0], recogniser.only_user(norm.output)
    first = rows.producer
    if first is None or back is None or first.kind is not OpKind.RESHAPE or back.kind is not OpKind.RESHAPE:
        return None
    x = first.operands[0]
    groups = _groups(x.shape, rows.shape)
    if groups is None or back.output.shape != x.shape or x.shape is None or not _plain(recogniser, norm):
        return None
    region = [norm, back]
    if recogniser.enclosed(first, region):
        region.append(first)
    channels = x.shape[1]
    before: list[_Step] = []
    value = back.output
    parts: list[Value | None] = []
    for kind in (OpKind.MUL, OpKind.ADD):
        user = recogniser.only_user(value)
        part = None if user is None or user.kind is not kind else _by_channel(user, value, len(x.shape), channels)
        if user is None or part is None:
            parts.append(None)
            continue
        parts.append(_flat(recogniser, part, f"{user.output.name}.vector", before))
        region.append(user)
        value = user.output
    attrs = {"groups": groups, "eps": norm.attr("eps")}
    return recogniser.cover(region, OpKind.GROUP_NORM, [x, *parts], value, attrs, before=before)


def _groups(shape: Shape | None, rows: Shape | None) -> int | None:
    """G, where rows of shape [N, G, ...] hold whole groups of the channels of [N, C, *spatial]."""
    if shape is None or rows is None or len(shape) < 3 or len(rows) < 3 or shape[0] != rows[0]:
        return None
    channels, groups = shape[1], rows[1]
    if not isinstance(channels, int) or not isinstance(groups, int) or channels % groups or shape == rows:
        return None
    return groups


def _plain(recogniser: Recogniser, norm: Op) -> bool:
    """Whether the norm is over whole rows, [N, G, all the rest], with no weight, or one that does nothing."""
    rank = norm.operands[0].rank
    if norm.kind is OpKind.LAYER_NORM and norm.attr("axis") not in (2, None if rank is None else 2 - rank):
        return False
    for value, number in ((norm.operand("weight"), 1.0), (norm.operand("bias"), 0.0)):
        if value is None:
            continue
        if value.producer is not None or not bool(np.all(recogniser.graph.data(value) == number)):
            return False
    return norm.kind in (OpKind.LAYER_NORM, OpKind.INSTANCE_NORM)


def _by_channel(op: Op, value: Value, rank: int, channels: object) -> Value | None:
    """The other operand, when it is a constant with one entry for each channel."""
    first, second = op.operands[:2]
    other = second if first is value else first
    if not other.constant or other.shape is None or len(other.shape) > rank or op.inputs[0] is op.inputs[1]:
        return None
    if op.kind is OpKind.ADD and op.scales != (1.0, 1.0):
        return None
    padded = (1,) * (rank - len(other.shape)) + other.shape
    return other if padded[1] == channels and all(extent == 1 for extent in (padded[0], *padded[2:])) else None


def _flat(recogniser: Recogniser, value: Value, name: str, before: list[_Step]) -> Value:
    """The constant as a vector."""
    maker = value.producer
    if maker is not None and maker.kind is OpKind.RESHAPE and maker.operands[0].rank == 1:
        return maker.operands[0]
    if value.rank == 1:
        return value
    size = max((extent for extent in value.shape or () if isinstance(extent, int)), default=1)
    vector = recogniser.new_value(name, (size,), value.dtype)
    vector.constant = True
    before.append((OpKind.RESHAPE, [value], vector, {}))
    return vector
