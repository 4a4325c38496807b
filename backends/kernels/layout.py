"""Copies between layouts: NCHW to NHWC with a border of zeros, back, and NHWC to NHWC with another border."""

from __future__ import annotations

from collections.abc import Callable

import tvm

from rescompile.backends.kernels.emit import (
    Expr,
    Flat,
    branch,
    div,
    each,
    lanes,
    let,
    mod,
    parallel,
    prim_func,
    serial,
)
from rescompile.backends.kernels.machine import Machine
from rescompile.backends.kernels.specs import Argument, LayoutSpec, Pair
from rescompile.backends.kernels.tiles import Tile

Shape = tuple[int, int, int, int]


def bordered(shape: Shape, border: Pair) -> Shape:
    """NHWC shape of a buffer with `border` (vertical, horizontal) zeros on each side."""
    batch, height, width, channels = shape
    return batch, height + 2 * border[0], width + 2 * border[1], channels


def arguments(spec: LayoutSpec, tile: Tile | None = None) -> list[Argument]:
    """x, y; NHWC ones with their borders."""
    shape = (spec.batch, spec.height, spec.width, spec.channels)
    planes = (spec.batch, spec.channels, spec.height, spec.width)
    return [
        Argument("x", planes if spec.source == "NCHW" else bordered(shape, spec.in_border), spec.dtype),
        Argument("y", planes if spec.target == "NCHW" else bordered(shape, spec.out_border), spec.dtype, output=True),
    ]


def candidates(spec: LayoutSpec, machine: Machine) -> list[Tile]:
    """One: there is nothing to choose in a copy."""
    return [Tile(1, machine.lanes, 1)]


def build(spec: LayoutSpec, tile: Tile, name: str) -> tvm.tirx.PrimFunc:
    """The kernel."""
    shape = (spec.batch, spec.height, spec.width, spec.channels)

    def body(x: Flat, y: Flat) -> None:
        if spec.target == "NCHW":
            _to_nchw(x, y, shape, spec.in_border)
        elif spec.source == "NCHW":
            _from_nchw(x, y, shape, spec.out_border)
        else:
            copy_with_border(x, y, shape, spec.in_border, spec.out_border)

    return prim_func(name, arguments(spec), body)


def copy_with_border(
    x: Flat, y: Flat, shape: Shape, x_border: Pair, y_border: Pair, pitch: int = 0, first: int = 0
) -> None:
    """Emits y = x where both are NHWC of `shape` inside their own borders; y's border becomes zero.

    x may be the channels from `first` on of a buffer of `pitch` channels.
    """
    _, x_height, x_width, channels = bordered(shape, x_border)
    pitch = pitch or channels

    def row(image: Expr, line: Expr, start: Expr) -> None:
        source = let(((image * x_height + line + x_border[0]) * x_width + x_border[1]) * pitch + first)
        if pitch == channels:
            each(shape[2] * channels, lambda i: y.raw.store(start + i, x.raw[source + i]))
            return
        with serial(shape[2]) as column:
            each(channels, lambda i: y.raw.store(start + column * channels + i, x.raw[source + column * pitch + i]))

    bordered_rows(y, shape, y_border, row)


def bordered_rows(y: Flat, shape: Shape, border: Pair, row: Callable[[Expr, Expr, Expr], None]) -> None:
    """Emits row(image, line, start) for each row of y inside its border, and the zeros around them."""
    batch, height, width, channels = shape
    _, y_height, y_width, _ = bordered(shape, border)

    def clear(start: Expr, count: int) -> None:
        if count:
            each(count, lambda i: y.clear(start + i))

    with parallel(batch * y_height) as task:
        image, line = let(div(task, y_height)), let(mod(task, y_height) - border[0])
        start = let(task * (y_width * channels))

        def inside() -> None:
            clear(start, border[1] * channels)
            row(image, line, let(start + border[1] * channels))
            clear(start + (border[1] + width) * channels, border[1] * channels)

        if border[0]:
            within = tvm.tirx.all(line >= 0, line < height)
            branch(within, inside, lambda: clear(start, y_width * channels))
        else:
            inside()


def _from_nchw(x: Flat, y: Flat, shape: Shape, border: Pair) -> None:
    _, height, width, channels = shape
    plane = height * width

    def row(image: Expr, line: Expr, start: Expr) -> None:
        source = let((image * channels * height + line) * width)
        if channels < 8:

            def column(i: Expr) -> None:
                for channel in range(channels):
                    y.raw.store(start + i * channels + channel, x.raw[source + channel * plane + i])

            each(width, column)
            return
        with serial(width) as i:
            each(channels, lambda c: y.raw.store(start + i * channels + c, x.raw[source + c * plane + i]))

    bordered_rows(y, shape, border, row)


def _to_nchw(x: Flat, y: Flat, shape: Shape, border: Pair) -> None:
    batch, height, width, channels = shape
    _, x_height, x_width, _ = bordered(shape, border)
    with parallel(batch * height) as task:
        image, line = let(div(task, height)), let(mod(task, height))
        source = let(((image * x_height + line + border[0]) * x_width + border[1]) * channels)
        target = let((image * channels * height + line) * width)
        # A few columns at a time for all channels: their cache lines of x are read once.
        for first in range(0, width, 16):
            count = min(16, width - first)
            with serial(channels) as channel, lanes(count) as i:
                value = x.raw[source + (first + i) * channels + channel]
                y.raw.store(target + channel * (height * width) + first + i, value)
