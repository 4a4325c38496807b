"""Tile shapes: how a kernel cuts its work, apart from what it computes."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from rescompile.backends.kernels.machine import Machine
from rescompile.errors import RescompileError

ORDERS = ("weights", "pixels")
TASK_BYTES = 256 << 10  # of x per task: a fraction of the second-level cache of any recent processor


@dataclass(frozen=True)
class Tile:
    """How a kernel is cut into register tiles and tasks.

    Attributes:
        pixels: rows of the register tile (output pixels, or rows of a matrix).
        lanes: columns of the register tile (output channels), a multiple of the vector width where that pays.
        row_tasks: parallel parts of the pixel range.
        block_tasks: parallel parts of the range of lane blocks.
        order: "weights" runs all pixels of a task under one block of weights, "pixels" all blocks under one pixel tile.
    """

    pixels: int
    lanes: int
    row_tasks: int = 1
    block_tasks: int = 1
    order: str = "weights"

    def to_json(self) -> dict[str, Any]:
        """Plain values for a JSON file."""
        return asdict(self)

    @staticmethod
    def from_json(data: Any) -> Tile:
        """The tile that `to_json` wrote.

        Raises:
            RescompileError: the data is no tile.
        """
        try:
            tile = Tile(**data)
            sizes = (tile.pixels, tile.lanes, tile.row_tasks, tile.block_tasks)
            if any(not isinstance(size, int) or size < 1 for size in sizes) or tile.order not in ORDERS:
                raise ValueError(f"{tile}")
        except (TypeError, ValueError) as error:
            raise RescompileError(f"Not a kernel tile: {error}; delete the record and choose again.") from error
        return tile


def accumulators(machine: Machine) -> int:
    """Registers that a register tile may fill; the others hold weights and a broadcast value."""
    return 24 if machine.registers >= 32 else 12


def lane_widths(channels: int, machine: Machine, dtype: str) -> list[int]:
    """Lane counts worth trying for this many output channels, the most promising first."""
    vector = machine.vector(dtype)
    if channels <= vector:
        return [max(4, _round_up(channels, 4))]
    # Two registers of weights per step is the proportion at which loads stay well below multiply-adds.
    widths = sorted(
        (2 * vector, vector, 3 * vector, 4 * vector), key=lambda w: (_round_up(channels, w), abs(w - 2 * vector))
    )
    return widths[:2]


def task_splits(rows: int, blocks: int, threads: int, row_bytes: int, weight_bytes: int) -> list[tuple[int, int]]:
    """Pairs (row_tasks, block_tasks) that keep `threads` busy, the most promising first.

    Args:
        rows: parts that the pixel range can be split into; blocks: the same for the lane blocks.
        row_bytes: bytes of x that all rows together read; weight_bytes: of the weights.
    """
    # A task runs all its blocks over its part of x, which must stay in the second-level cache meanwhile.
    fitting = threads * max(1, -(-row_bytes // (threads * TASK_BYTES)))
    by_rows, by_blocks = (fitting, 1), (1, threads)
    first = by_blocks if weight_bytes > row_bytes and row_bytes <= 2 * TASK_BYTES else by_rows
    second = by_rows if first == by_blocks else by_blocks
    wanted = [first, second, (threads, 1), (4 * threads, 1), (1, blocks), (14 * threads, 1), (threads, 8)]
    splits: list[tuple[int, int]] = []
    for row_tasks, block_tasks in wanted:
        split = (min(row_tasks, rows), min(block_tasks, blocks))
        tasks = split[0] * split[1]
        # A few tasks that do not divide evenly leave a thread idle for most of the last round.
        if split not in splits and (tasks % threads == 0 or tasks >= 8 * threads or tasks == rows * blocks):
            splits.append(split)
    return splits or [(1, 1)]


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
