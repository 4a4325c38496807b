"""Work on contiguous rows: vector reductions, and the split of rows over threads."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rescompile.backends.kernels.emit import Expr, chunk, const, lanes, let, local, maximum, parallel, serial
from rescompile.backends.kernels.machine import Machine
from rescompile.backends.kernels.tiles import Tile

# Below this many elements a parallel launch (a few microseconds) costs more than it saves.
SERIAL_ELEMENTS = 8192

Combine = Callable[[Expr, Expr], Expr]


def add(a: Expr, b: Expr) -> Expr:
    """a + b"""
    return a + b


LOWEST = {"float32": -3.4028234e38, "float64": -1.7976931348623157e308}


def row_tile(rows: int | None, width: int, machine: Machine, dtype: str) -> Tile:
    """One tile: vectors of four registers, so that four sums run side by side, and rows split over the threads."""
    lanes_ = 4 * machine.vector(dtype)
    small = rows is not None and rows * width <= SERIAL_ELEMENTS
    tasks = 1 if small else machine.threads if rows is None else min(rows, machine.threads)
    return Tile(1, lanes_, tasks)


@contextmanager
def each_row(rows: Expr, tile: Tile) -> Iterator[Expr]:
    """for row in range(rows), the rows split into `tile.row_tasks`"""
    with parallel(tile.row_tasks) as task:
        first, last = chunk(task, tile.row_tasks, rows)
        with serial(first, last) as row:
            yield row


def reduce_row(count: int, width: int, dtype: str, term: Callable[[Expr], Expr], combine: Combine = add) -> Expr:
    """combine over i in range(count) of term(i), in `width` (a power of two) interleaved partial results."""
    while width > count:
        width //= 2
    partial = local(width, dtype)
    start = 0.0 if combine is add else LOWEST[dtype]
    with lanes(width) as lane:
        partial.store(lane, const(start, dtype))
    with serial(count // width) as block, lanes(width) as lane:
        partial.store(lane, combine(partial[lane], term(block * width + lane)))
    if count % width:
        with lanes(count % width) as lane:
            partial.store(lane, combine(partial[lane], term(count // width * width + lane)))
    return fold(partial, width, combine)


def fold(partial: Expr, width: int, combine: Combine) -> Expr:
    """All lanes of a local vector combined, halving it."""
    while width > 1:
        width //= 2
        with lanes(width) as lane:
            partial.store(lane, combine(partial[lane], partial[lane + width]))
    return let(partial[0])


def row_maximum(a: Expr, b: Expr) -> Expr:
    """max(a, b), as a `Combine`."""
    return maximum(a, b)
