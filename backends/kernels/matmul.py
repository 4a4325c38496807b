"""y[m, n] = epilogue(sum over k of x[m, k] * w[n, k]): linears, and 1×1 convolutions seen as rows of pixels."""

from __future__ import annotations

from collections.abc import Callable

from rescompile.backends.kernels.blocks import Blocks
from rescompile.backends.kernels.emit import (
    Expr,
    Flat,
    chunk,
    div,
    let,
    minimum,
    mod,
    parallel,
    serial,
    unflatten,
    when,
)
from rescompile.backends.kernels.register_tile import RegisterTile
from rescompile.backends.kernels.rows import SERIAL_ELEMENTS
from rescompile.backends.kernels.specs import Epilogue, compute_dtype
from rescompile.backends.kernels.tail import Following
from rescompile.backends.kernels.tiles import Tile


def emit_matmul(
    x: Flat, weight: Flat, bias: Flat | None, residual: Flat | None, y: Flat | None, *,
    rows: Expr, depth: int, columns: int, epilogue: Epilogue, dtype: str,
    tile: Tile, row_tasks: Expr, block_tasks: Expr, in_pitch: int = 0, in_first: int = 0,
    following: Following | None = None,
) -> None:  # fmt: skip
    """Emits the loops: tasks > (weights or pixels outermost) > reduction > register tile.

    The last row tile is moved back to end at the last row, so that no smaller tile is needed: it writes a few rows
    again, with the same values. Only a dynamic row count below the tile's takes tiles of 4, 2 and 1 rows. With
    `following` that writes the results, and there is no y.
    """
    blocks = Blocks.of(depth, columns, 1, tile.lanes)
    pitch = in_pitch or depth

    def register_tile(block: Expr, first: Expr, pixels: int) -> None:
        tile_sums = RegisterTile(pixels, tile.lanes, compute_dtype(dtype))
        column = block * tile.lanes
        tile_sums.accumulate(
            [depth],
            lambda pixel, index, lane: x[(first + pixel) * pitch + index[-1] + in_first],
            lambda index, lane: weight[(block * depth + index[-1]) * tile.lanes + lane],
        )
        if following is None:
            write = _writer(y, first, columns, column)
        else:
            write = following.storer(lambda pixel: following.tail.unflattened(first + pixel), column, tile.lanes)
        blocks.with_width(
            block,
            lambda width: tile_sums.store(
                epilogue,
                width,
                write,
                None if bias is None else lambda lane: bias[column + lane],
                None if residual is None else lambda pixel, lane: residual[(first + pixel) * columns + column + lane],
            ),
        )

    def tiles_of(pixels: int) -> None:
        count = -(-rows // pixels) if isinstance(rows, int) else div(rows + (pixels - 1), pixels)

        def one(block: Expr, position: Expr) -> None:
            first = position * pixels
            aligned = isinstance(rows, int) and rows % pixels == 0
            register_tile(block, first if aligned else let(minimum(first, rows - pixels)), pixels)

        with parallel(block_tasks * row_tasks) as task:
            block_task, row_task = unflatten(task, row_tasks)
            first_block, last_block = chunk(block_task, block_tasks, blocks.count)
            first_row, last_row = chunk(row_task, row_tasks, count)
            if tile.order == "weights":
                with serial(first_block, last_block) as block, serial(first_row, last_row) as position:
                    one(block, position)
            else:
                with serial(first_row, last_row) as position, serial(first_block, last_block) as block:
                    one(block, position)

    if following is not None:
        following.beside(tile, not isinstance(rows, int) or rows * columns > SERIAL_ELEMENTS)
    if isinstance(rows, int):
        tiles_of(tile.pixels)
        return
    with when(rows >= tile.pixels):
        tiles_of(tile.pixels)
    with when(rows < tile.pixels), parallel(blocks.count) as block:
        size = 1
        while size * 2 < tile.pixels:
            size *= 2
        while size:
            with when(mod(div(rows, size), 2) == 1):
                register_tile(block, div(rows, size * 2) * (size * 2), size)
            size //= 2


def _writer(y: Flat | None, first: Expr, columns: int, column: Expr) -> Callable[[int, Expr, Expr], None]:
    def write(pixel: int, lane: Expr, value: Expr) -> None:
        if y is not None:
            y.store((first + pixel) * columns + column + lane, value)

    return write
