"""What a norm reduces over, in the axes of the sum that it is fused with: two norms of one kernel share their rows."""

from __future__ import annotations

from typing import TypeAlias

from rescompile.graph import Op, Shape, Value
from rescompile.kinds import OpKind, Trait

K = OpKind

Axes: TypeAlias = tuple[int | None, ...]  # for each axis of a value the sum's axis that it is, None where it is none
Rows: TypeAlias = tuple[frozenset[int], int]  # the sum's axes reduced over, and into how many groups they are cut


def row_of(norm: Op, axes: Axes) -> Rows | None:
    """What the norm reduces over, None where it is not a set of the sum's axes. `axes`: of the norm's input."""
    over, groups = axes[1:], 1
    if norm.kind is K.GROUP_NORM:
        groups = int(norm.attr("groups"))
    elif norm.kind is K.INSTANCE_NORM:
        over = axes[2:]
    elif norm.kind in (K.LAYER_NORM, K.RMS_NORM):
        over = axes[norm.attr("axis") % len(axes) :] if axes else ()
    found = frozenset(axis for axis in over if axis is not None)
    return (found, groups) if over and len(found) == len(over) else None


def carried(op: Op, axes: Axes) -> Axes:
    """Axes of the operation's output, given its first operand's."""
    source = op.operands[0]
    if op.kind is K.PERMUTE:
        return tuple(axes[axis] for axis in op.attr("perm"))
    if op.kind is K.RESHAPE:
        return _viewed(axes, source.shape, op.output.shape)
    return axes


def origins(op: Op, axes: Axes) -> list[tuple[Value, Axes]]:
    """The operands that have every element of the operation's output, with their axes, given the output's."""
    shape = op.output.shape
    if op.kind is K.PERMUTE:
        perm = op.attr("perm")
        return [(op.operands[0], tuple(axes[perm.index(axis)] for axis in range(len(perm))))]
    if op.kind is K.RESHAPE:
        return [(op.operands[0], _viewed(axes, shape, op.operands[0].shape))]
    if op.kind in (K.ROLL, K.FLIP, K.SLICE):
        moved = op.attr("axes")
        return [(op.operands[0], tuple(None if axis in moved else at for axis, at in enumerate(axes)))]
    if op.has(Trait.NORM):
        return [(op.operands[0], axes)]
    return [(value, axes) for value in op.operands if value.shape == shape]


def _viewed(axes: Axes, old: Shape | None, new: Shape | None) -> Axes:
    """Axes after a reshape: those before the first and behind the last extent that changed are what they were."""
    if old is None or new is None:
        return (None,) * len(new or ())
    shared = min(len(old), len(new))
    first = next((index for index in range(shared) if old[index] != new[index]), shared)
    last = next((index for index in range(shared - first) if old[-1 - index] != new[-1 - index]), shared - first)
    tail = axes[len(axes) - last :]
    return (*axes[:first], *(None,) * (len(new) - first - last), *tail)
