"""Convolutions as implicit matrix products over NHWC, borders and epilogue inside, and depthwise ones.

Weights are packed at compile time as [block][kh][kw][ic][lane]. A row of taps times channels is contiguous in both
x and the weights, so (kw, ic) is one reduction axis: a stem with three channels reduces over kw*3 floats.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from math import prod

import numpy as np
import tvm

from rescompile.backends.kernels.blocks import Blocks, as_dtype
from rescompile.backends.kernels.emit import (
    Expr,
    Flat,
    chunk,
    div,
    lanes,
    let,
    minimum,
    mod,
    parallel,
    prim_func,
    scratch,
    serial,
    unflatten,
    when,
)
from rescompile.backends.kernels.layout import bordered, copy_with_border
from rescompile.backends.kernels.machine import Machine
from rescompile.backends.kernels.matmul import emit_matmul
from rescompile.backends.kernels.register_tile import RegisterTile, pixels_for
from rescompile.backends.kernels.rows import SERIAL_ELEMENTS
from rescompile.backends.kernels.specs import Argument, ConvSpec, Pair, compute_dtype
from rescompile.backends.kernels.tail import Following
from rescompile.backends.kernels.tiles import Tile, accumulators, lane_widths, task_splits


def _is_matmul(spec: ConvSpec) -> bool:
    """A 1×1 convolution on plain buffers is a matrix product over all pixels."""
    # A tail has the borders of its results in its own hands.
    borders = spec.in_border if spec.tail is not None else (*spec.in_border, *spec.out_border, *spec.residual_border)
    plain = not any((*spec.pads, *borders))
    return spec.kernel == (1, 1) and spec.stride == (1, 1) and spec.groups == 1 and plain


def _blocks(spec: ConvSpec, tile: Tile) -> Blocks:
    if spec.depthwise:
        return Blocks(1, spec.in_channels, spec.out_channels, 1, tile.lanes)
    return Blocks.of(spec.in_channels, spec.out_channels, spec.groups, tile.lanes)


def arguments(spec: ConvSpec, tile: Tile) -> list[Argument]:
    """x NHWC with its border, packed weight, [bias (OC)], [residual NHWC with its border], y NHWC with its border.

    With a tail, its own buffers instead of residual and y.
    """
    blocks = _blocks(spec, tile)
    out = (spec.batch, spec.out_height, spec.out_width, spec.out_channels)
    depth = () if spec.depthwise else (blocks.group_in,)
    x = bordered((spec.batch, spec.height, spec.width, spec.in_pitch or spec.in_channels), spec.in_border)
    extra = []
    if spec.epilogue.bias:
        extra.append(Argument("bias", (spec.out_channels,), spec.dtype))
    if spec.epilogue.residual:
        extra.append(Argument("residual", bordered(out, spec.residual_border), spec.dtype))
    given = [
        Argument("x", x, spec.dtype),
        Argument("weight", (blocks.count, *spec.kernel, *depth, tile.lanes), spec.dtype),
        *extra,
    ]
    if spec.tail is not None:
        return [*given, *spec.tail.arguments]
    return [*given, Argument("y", bordered(out, spec.out_border), spec.dtype, output=True)]


def pack_weight(spec: ConvSpec, tile: Tile, weight: np.ndarray) -> np.ndarray:
    """torch's [oc, ic/groups, kh, kw] to the kernel's [block, kh, kw, ic, lane] (depthwise: no ic axis)."""
    if not spec.depthwise:
        return as_dtype(_blocks(spec, tile).pack(weight), spec.dtype)
    count = _blocks(spec, tile).count
    padded = np.zeros((count * tile.lanes, *spec.kernel), weight.dtype)
    padded[: spec.out_channels] = weight[:, 0]
    return as_dtype(np.moveaxis(padded.reshape(count, tile.lanes, *spec.kernel), 1, -1), spec.dtype)


def candidates(spec: ConvSpec, machine: Machine) -> list[Tile]:
    """Tiles worth timing."""
    vector, most = machine.vector(spec.dtype), accumulators(machine)
    matmul = _is_matmul(spec)
    extent = spec.batch * spec.out_height * spec.out_width if matmul else spec.out_width
    dense = Blocks.of(spec.in_channels, spec.out_channels, spec.groups, 2 * vector)
    channels = spec.out_channels if spec.depthwise else dense.group_out
    tiles: list[Tile] = []
    for index, width in enumerate(lane_widths(channels, machine, spec.dtype)):
        pixels = pixels_for(extent, max(1, most // -(-width // vector)), 8)
        rows = -(-extent // pixels) if matmul else spec.batch * spec.out_height
        count = _blocks(spec, Tile(pixels, width)).count
        row_bytes = spec.batch * spec.height * spec.width * spec.in_channels * 4
        weight_bytes = spec.out_channels * spec.in_channels // spec.groups * prod(spec.kernel) * 4
        splits = task_splits(rows, count, machine.threads, row_bytes, weight_bytes)
        tiles += [Tile(pixels, width, r, b) for r, b in splits[: 5 if index == 0 else 1]]
        if index == 0 and count > 1:
            tiles.append(Tile(pixels, width, *splits[0], order="pixels"))
    return tiles


def build(spec: ConvSpec, tile: Tile, name: str, dynamic_tasks: bool = False) -> tvm.tirx.PrimFunc:
    """The kernel; with `dynamic_tasks` it takes row_tasks and block_tasks as trailing int32 arguments."""

    def body(*given: Expr) -> None:
        operands = list(given)
        block_tasks: Expr = operands.pop() if dynamic_tasks else tile.block_tasks
        row_tasks: Expr = operands.pop() if dynamic_tasks else tile.row_tasks
        x, weight, *rest = operands
        extra: list[Flat] = rest
        bias = extra.pop(0) if spec.epilogue.bias else None
        following = None if spec.tail is None else Following(spec.tail, extra)
        y = None if following is not None else extra.pop()
        residual = extra.pop(0) if spec.epilogue.residual else None
        if _is_matmul(spec):
            emit_matmul(
                x,
                weight,
                bias,
                residual,
                y,
                rows=spec.batch * spec.height * spec.width,
                depth=spec.in_channels,
                columns=spec.out_channels,
                epilogue=spec.epilogue,
                tile=tile,
                row_tasks=row_tasks,
                block_tasks=block_tasks,
                dtype=spec.dtype,
                in_pitch=spec.in_pitch,
                in_first=spec.in_first,
                following=following,
            )
            return
        _emit_spatial(spec, tile, x, weight, bias, residual, y, row_tasks, block_tasks, following)

    return prim_func(name, arguments(spec, tile), body, ("row_tasks", "block_tasks") if dynamic_tasks else ())


def _emit_spatial(
    spec: ConvSpec, tile: Tile, x: Flat, weight: Flat, bias: Flat | None, residual: Flat | None, y: Flat | None,
    row_tasks: Expr, block_tasks: Expr, following: Following | None,
) -> None:  # fmt: skip
    blocks = _blocks(spec, tile)
    border = spec.in_border
    pitch, first_channel = spec.in_pitch or spec.in_channels, spec.in_first
    in_shape = (spec.batch, spec.height, spec.width, spec.in_channels)
    # What the last window reaches below and to the right; less than pads[2:] where the stride skips the end.
    reach = [
        (out - 1) * stride + (k - 1) * dilation + 1 - before - size
        for out, stride, k, dilation, before, size in zip(
            (spec.out_height, spec.out_width), spec.stride, spec.kernel, spec.dilation, spec.pads[:2],
            (spec.height, spec.width), strict=True,
        )
    ]  # fmt: skip
    needed = (max(spec.pads[0], reach[0], 0), max(spec.pads[1], reach[1], 0))
    if any(need > have for need, have in zip(needed, border, strict=True)):
        border = (max(border[0], needed[0]), max(border[1], needed[1]))
        padded = scratch(prod(bordered(in_shape, border)), spec.dtype)
        copy_with_border(x, padded, in_shape, spec.in_border, border, pitch, first_channel)
        x, pitch, first_channel = padded, spec.in_channels, 0
    out_shape = (spec.batch, spec.out_height, spec.out_width, spec.out_channels)
    _, out_h, out_w, _ = out_shape
    in_plane = bordered((*in_shape[:3], pitch), border)
    y_plane = bordered(out_shape, spec.out_border)
    r_plane = bordered(out_shape, spec.residual_border)

    def register_tile(block: Expr, image: Expr, row: Expr, column: Expr) -> None:
        top = row * spec.stride[0] + (border[0] - spec.pads[0])
        left = column * spec.stride[1] + (border[1] - spec.pads[1])
        channel = let(blocks.out_channel(block))
        origin = ((image * in_plane[1] + top) * in_plane[2] + left) * in_plane[3]
        origin = let(origin + (channel if spec.depthwise else blocks.in_channel(block)) + first_channel)
        to = let(_at(y_plane, spec.out_border, image, row, column) + channel)
        from_ = let(_at(r_plane, spec.residual_border, image, row, column) + channel) if residual is not None else 0
        step = spec.out_channels

        def reduced(width: int) -> RegisterTile:
            sums = RegisterTile(tile.pixels, width, compute_dtype(spec.dtype))
            _reduce(spec, tile, blocks, sums, x, weight, block, origin, in_plane)
            return sums

        aligned = tile.lanes if blocks.groups == 1 else 0

        def rows_of(pixel: int) -> list[Expr]:
            flat = following is not None and len(following.tail.program.shape(following.tail.root)) == 3
            return [image, column + pixel] if flat else [image, row, column + pixel]

        def write(pixel: int, lane: Expr, value: Expr) -> None:
            if y is not None:
                y.store(to + pixel * step + lane, value)

        def finish(sums: RegisterTile, width: int) -> None:
            sums.store(
                spec.epilogue,
                width,
                write if following is None else following.storer(rows_of, channel, aligned),
                None if bias is None else lambda lane: bias[channel + lane],
                None if residual is None else lambda pixel, lane: residual[from_ + pixel * step + lane],
            )

        if spec.depthwise:
            # Lanes beyond the last channel would read beyond x, so a partial block is narrow from the start.
            blocks.with_width(block, lambda width: finish(reduced(width), width))
        else:
            sums = reduced(tile.lanes)
            blocks.with_width(block, lambda width: finish(sums, width))

    if following is not None:
        following.beside(tile, prod(out_shape) > SERIAL_ELEMENTS)
    column_tiles = -(-out_w // tile.pixels)
    with parallel(block_tasks * row_tasks) as task:
        block_task, row_task = unflatten(task, row_tasks)
        first_block, last_block = chunk(block_task, block_tasks, blocks.count)
        first_row, last_row = chunk(row_task, row_tasks, spec.batch * out_h)

        def rows_of(block: Expr | None) -> None:
            with serial(first_row, last_row) as line:
                image, row = (0, line) if spec.batch == 1 else (let(div(line, out_h)), let(mod(line, out_h)))
                with ExitStack() as stack:
                    position = stack.enter_context(serial(column_tiles))
                    inner = stack.enter_context(serial(first_block, last_block)) if block is None else block
                    column = position * tile.pixels
                    aligned = out_w % tile.pixels == 0
                    register_tile(inner, image, row, column if aligned else let(minimum(column, out_w - tile.pixels)))
                if any(spec.out_border) and y is not None:
                    with ExitStack() as stack:
                        inner = stack.enter_context(serial(first_block, last_block)) if block is None else block
                        _zero_border(spec, blocks, y, y_plane, inner, image, row)

        if tile.order == "weights":
            with serial(first_block, last_block) as block:
                rows_of(block)
        else:
            rows_of(None)


def _at(plane: Sequence[int], border: Pair, image: Expr, row: Expr, column: Expr) -> Expr:
    return ((image * plane[1] + row + border[0]) * plane[2] + column + border[1]) * plane[3]


def _reduce(
    spec: ConvSpec, tile: Tile, blocks: Blocks, sums: RegisterTile, x: Flat, weight: Flat, block: Expr, origin: Expr,
    plane: Sequence[int],
) -> None:  # fmt: skip
    kh, kw = spec.kernel
    line, pixel_step = plane[2] * plane[3], spec.stride[1] * plane[3]
    down, right = spec.dilation[0] * line, spec.dilation[1] * plane[3]
    if spec.depthwise:
        sums.accumulate(
            [kh, kw],
            lambda pixel, index, lane: x[origin + index[0] * down + pixel * pixel_step + index[1] * right + lane],
            lambda index, lane: weight[((block * kh + index[0]) * kw + index[1]) * tile.lanes + lane],
            unroll=kw,
        )
    elif spec.dilation[1] == 1 and blocks.groups == 1 and plane[3] == spec.in_channels:
        depth = kw * blocks.group_in
        sums.accumulate(
            [kh, depth],
            lambda pixel, index, lane: x[origin + index[0] * down + pixel * pixel_step + index[1]],
            lambda index, lane: weight[((block * kh + index[0]) * depth + index[1]) * tile.lanes + lane],
            unroll=4 if depth % 4 == 0 or depth > 64 else next(n for n in (3, 5, 7, 2, 4) if depth % n == 0 or n == 4),
        )
    else:
        depth = blocks.group_in
        sums.accumulate(
            [kh, kw, depth],
            lambda pixel, index, lane: x[origin + index[0] * down + pixel * pixel_step + index[1] * right + index[2]],
            lambda index, lane: weight[
                (((block * kh + index[0]) * kw + index[1]) * depth + index[2]) * tile.lanes + lane
            ],
        )


def _zero_border(
    spec: ConvSpec, blocks: Blocks, y: Flat, plane: Sequence[int], block: Expr, image: Expr, row: Expr
) -> None:
    """Zeros left and right of one output row, and above the first and below the last, for one block's channels."""
    vertical, horizontal = spec.out_border
    channel = let(blocks.out_channel(block))

    def clear(line: Expr, columns: Sequence[int] | None) -> None:
        start = let(((image * plane[1] + line) * plane[2]) * plane[3] + channel)

        def store(width: int) -> None:
            with ExitStack() as stack:
                across = [stack.enter_context(serial(plane[2]))] if columns is None else columns
                for column in across:
                    with lanes(width) as lane:
                        y.clear(start + column * plane[3] + lane)

        blocks.with_width(block, store)

    if horizontal:
        sides = [*range(horizontal), *range(plane[2] - horizontal, plane[2])]
        clear(row + vertical, sides)
    if vertical:
        with when(row == 0):
            for line in range(vertical):
                clear(line, None)
        with when(row == spec.out_height - 1):
            for line in range(vertical):
                clear(spec.out_height + vertical + line, None)
