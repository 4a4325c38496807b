"""Where the elements of a value lie: as the graph says, or channels last with a border of zeros.

A value of logical shape [N, C, *spatial] lies channels last as [N, *spatial, C]. With a border (v, h) the last two
spatial extents H, W are stored as H + 2v, W + 2h, and the frame holds zeros: what a padded convolution reads. The
producer of a value writes the widest border that any reader wants, so that no reader copies to pad.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rescompile.graph import Graph, Op, Value
from rescompile.kinds import OpKind

Pair = tuple[int, int]


@dataclass(frozen=True)
class Layout:
    """How a value lies in memory."""

    channels_last: bool = False
    border: Pair = (0, 0)
    swapped: bool = False  # [a, b, c, d] lies as [a, c, b, d]: attention heads inside the sequence


NATIVE = Layout()
CHANNELS_LAST = Layout(channels_last=True)
SWAPPED = Layout(swapped=True)
SWAP = (0, 2, 1, 3)


def to_channels_last(rank: int) -> tuple[int, ...]:
    """The permutation from [N, C, *spatial] to [N, *spatial, C]."""
    return (0, *range(2, rank), 1)


def to_channels_first(rank: int) -> tuple[int, ...]:
    """The permutation from [N, *spatial, C] to [N, C, *spatial]."""
    return (0, rank - 1, *range(1, rank - 1))


def spatial_pads(op: Op) -> tuple[int, int, int, int]:
    """Top, left, bottom, right of a convolution or pool; a one-dimensional one has height 1."""
    pads = tuple(op.attr("pads"))
    if len(pads) == 2:
        return 0, pads[0], 0, pads[1]
    if len(pads) == 0:
        return 0, 0, 0, 0
    top, left, bottom, right = pads
    return top, left, bottom, right


def pair(extents: Sequence[int], flat: bool) -> Pair:
    """Kernel size, stride or dilation of two dimensions; a one-dimensional one has height 1."""
    found = [int(extent) for extent in extents]
    return (1, found[0]) if flat else (found[0], found[1])


def wanted_borders(graph: Graph, readers: frozenset[OpKind]) -> dict[Value, Pair]:
    """For each value, the border that the operations of the kinds `readers` read around it."""
    wanted: dict[Value, Pair] = {}
    for op in graph:
        if op.kind not in readers or len(op.attr("pads")) > 4:
            continue
        value = op.inputs[0]
        if value is None:
            continue
        top, left, bottom, right = spatial_pads(op)
        vertical, horizontal = wanted.get(value, (0, 0))
        border = (max(vertical, top, bottom), max(horizontal, left, right))
        if border != (0, 0):
            wanted[value] = border
    return wanted
