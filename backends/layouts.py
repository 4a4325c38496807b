"""Where the elements of a value lie: as the graph says, or channels last with a border of zeros.

A value of logical shape [N, C, *spatial] lies channels last as [N, *spatial, C]. With a border (v, h) the last two
spatial extents H, W are stored as H + 2v, W + 2h, and the frame holds zeros: what a padded convolution reads. The
producer of a value writes the widest border that any reader wants, so that no reader copies to pad.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rescompile.graph import Graph, Op, Value

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
    return spatial_pads_of(op.attr("pads"))


def spatial_pads_of(given: Sequence[int]) -> tuple[int, int, int, int]:
    """The same of the attribute."""
    pads = tuple(given)
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


def wanted_borders(
    graph: Graph, readers: Callable[[Op], tuple[Value, tuple[int, int, int, int]] | None]
) -> dict[Value, Pair]:
    """For each value, the border that operations read around it: `readers` says which, and how much padding."""
    wanted: dict[Value, Pair] = {}
    for op in graph:
        found = readers(op)
        if found is None:
            continue
        value, (top, left, bottom, right) = found
        vertical, horizontal = wanted.get(value, (0, 0))
        border = (max(vertical, top, bottom), max(horizontal, left, right))
        if border != (0, 0):
            wanted[value] = border
    return wanted
