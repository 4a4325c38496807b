"""Lane blocks: how output channels, and the groups of a grouped convolution, map to register lanes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

from rescompile.backends.kernels.emit import Expr, branch, div, mod


@dataclass(frozen=True)
class Blocks:
    """Output channels in blocks of `lanes`; the last block of a group may be partly filled.

    Attributes:
        groups: dense groups after neighbouring narrow ones were merged.
        group_in, group_out: channels of one dense group.
        merged: original groups per dense group.
        lanes: lanes of a block.
    """

    groups: int
    group_in: int
    group_out: int
    merged: int
    lanes: int

    @staticmethod
    def of(in_channels: int, out_channels: int, groups: int, lanes: int) -> Blocks:
        """The blocks of a contraction; groups narrower than a block are merged, their weights block-diagonal."""
        narrow = out_channels // groups
        merged = max((n for n in range(1, groups + 1) if groups % n == 0 and n * narrow <= lanes), default=1)
        dense = groups // merged
        return Blocks(dense, in_channels // dense, out_channels // dense, merged, lanes)

    @property
    def per_group(self) -> int:
        """Blocks of one dense group."""
        return -(-self.group_out // self.lanes)

    @property
    def count(self) -> int:
        """All blocks."""
        return self.groups * self.per_group

    @property
    def tail(self) -> int:
        """Lanes that hold channels in the last block of a group."""
        return self.group_out - (self.per_group - 1) * self.lanes

    def out_channel(self, block: Expr) -> Expr:
        """First output channel of a block."""
        if self.groups == 1:
            return block * self.lanes
        if self.per_group == 1:
            return block * self.group_out
        return div(block, self.per_group) * self.group_out + mod(block, self.per_group) * self.lanes

    def in_channel(self, block: Expr) -> Expr:
        """First input channel that a block reads."""
        return 0 if self.groups == 1 else div(block, self.per_group) * self.group_in

    def with_width(self, block: Expr, emit: Any) -> None:
        """Calls emit(width) with the static number of filled lanes, under a branch where blocks differ."""
        if self.per_group == 1 or self.tail == self.lanes:
            emit(self.tail)
            return
        last = self.per_group - 1
        position = block if self.groups == 1 else mod(block, self.per_group)
        branch(position < last, lambda: emit(self.lanes), lambda: emit(self.tail))

    def pack(self, weight: np.ndarray) -> np.ndarray:
        """[out, in/groups, *taps] (torch) to [block, *taps, in, lane], absent weights zero."""
        out, narrow_in = weight.shape[:2]
        taps = weight.shape[2:]
        step = out // (self.groups * self.merged)
        # Weights of merged groups stand on the diagonal of a matrix over the merged channels.
        dense = np.zeros((self.groups, self.per_group * self.lanes, self.group_in, *taps), weight.dtype)
        split = weight.reshape(self.groups, self.merged, step, narrow_in, *taps)
        for i in range(self.merged):
            dense[:, i * step : (i + 1) * step, i * narrow_in : (i + 1) * narrow_in] = split[:, i]
        blocked = dense.reshape(self.count, self.lanes, self.group_in, *taps)
        return np.ascontiguousarray(np.moveaxis(blocked, (1, 2), (-1, -2)))


def as_dtype(array: np.ndarray, dtype: str) -> np.ndarray:
    """A contiguous array of the kernel's element type."""
    return np.ascontiguousarray(array.astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype))
