"""Max, mean and global mean pooling over NHWC, vectors along the channels."""

from __future__ import annotations

from collections.abc import Callable
from math import prod

import tvm

from rescompile.backends.kernels.emit import (
    Expr,
    Flat,
    const,
    div,
    each,
    lanes,
    let,
    local,
    maximum,
    minimum,
    mod,
    parallel,
    prim_func,
    select,
    serial,
)
from rescompile.backends.kernels.layout import bordered, bordered_rows
from rescompile.backends.kernels.machine import Machine
from rescompile.backends.kernels.rows import LOWEST, SERIAL_ELEMENTS
from rescompile.backends.kernels.specs import Argument, GlobalMeanSpec, PoolSpec, compute_dtype
from rescompile.backends.kernels.tail import Following
from rescompile.backends.kernels.tiles import Tile


def arguments(spec: PoolSpec, tile: Tile | None = None) -> list[Argument]:
    """x, y: NHWC with their borders; with a tail, its own buffers instead of y."""
    x = bordered((spec.batch, spec.height, spec.width, spec.in_pitch or spec.channels), spec.in_border)
    if spec.tail is not None:
        return [Argument("x", x, spec.dtype), *spec.tail.arguments]
    y = bordered((spec.batch, spec.out_height, spec.out_width, spec.channels), spec.out_border)
    return [Argument("x", x, spec.dtype), Argument("y", y, spec.dtype, output=True)]


def candidates(spec: PoolSpec, machine: Machine) -> list[Tile]:
    """One."""
    return [Tile(1, 4 * machine.vector(spec.dtype))]


def build(spec: PoolSpec, tile: Tile, name: str) -> tvm.tirx.PrimFunc:
    """The kernel."""
    shape = (spec.batch, spec.out_height, spec.out_width, spec.channels)

    def followed(x: Flat, following: Following) -> None:
        flat = len(following.tail.program.shape(following.tail.root)) == 3
        following.beside(tile, prod(shape) > SERIAL_ELEMENTS)
        with parallel(spec.batch * spec.out_height) as task, serial(spec.out_width) as column:
            image, line = let(div(task, spec.out_height)), let(mod(task, spec.out_height))
            at = [image, column] if flat else [image, line, column]
            _window(spec, tile, x, image, line, column, lambda c, value: following.store(at, c, value))

    def body(x: Flat, *given: Flat) -> None:
        if spec.tail is not None:
            followed(x, Following(spec.tail, given))
            return
        y = given[0]

        def row(image: Expr, line: Expr, start: Expr) -> None:
            with serial(spec.out_width) as column:
                to = let(start + column * spec.channels)
                _window(spec, tile, x, image, line, column, lambda c, value: y.store(to + c, value))

        bordered_rows(y, shape, spec.out_border, row)

    return prim_func(name, arguments(spec), body)


def _window(
    spec: PoolSpec,
    tile: Tile,
    x: Flat,
    image: Expr,
    line: Expr,
    column: Expr,
    store: Callable[[Expr, Expr], None],
) -> None:
    compute = compute_dtype(spec.dtype)
    plane = bordered((spec.batch, spec.height, spec.width, spec.in_pitch or spec.channels), spec.in_border)
    rows, row_inside = _axis(spec, 0, line)
    columns, column_inside = _axis(spec, 1, column)
    largest = spec.kind == "max"
    scale = None if largest else let(const(1.0, compute) / _divisor(spec, line, column).astype(compute))
    # Coordinates outside are moved to the edge, where a load is legal, and their value is replaced.
    taps = []
    for i in range(spec.kernel[0]):
        for j in range(spec.kernel[1]):
            at = (image * plane[1] + rows[i] + spec.in_border[0]) * plane[2] + columns[j] + spec.in_border[1]
            inside = [test for test in (row_inside[i], column_inside[j]) if test is not None]
            taps.append((let(at * plane[3] + spec.in_first), let(tvm.tirx.all(*inside)) if inside else None))
    neutral = const(LOWEST[compute] if largest else 0.0, compute)

    def channel(c: Expr) -> None:
        total = None
        for at, inside in taps:
            value = x[at + c] if inside is None else select(inside, x[at + c], neutral)
            total = value if total is None else maximum(total, value) if largest else total + value
        store(c, total if scale is None else total * scale)

    each(spec.channels, channel, tile.lanes)


def _axis(spec: PoolSpec, axis: int, position: Expr) -> tuple[list[Expr], list[Expr | None]]:
    """For each tap its coordinate, moved inside, and the test whether it was inside (None: always)."""
    size = (spec.height, spec.width)[axis]
    last = ((spec.out_height, spec.out_width)[axis] - 1) * spec.stride[axis]
    places: list[Expr] = []
    tests: list[Expr | None] = []
    for tap in range(spec.kernel[axis]):
        offset = tap * spec.dilation[axis] - spec.pads[axis]
        at = let(position * spec.stride[axis] + offset)
        if offset >= 0 and last + offset < size:
            places.append(at)
            tests.append(None)
        else:
            places.append(let(maximum(minimum(at, size - 1), 0)))
            tests.append(tvm.tirx.all(at >= 0, at < size))
    return places, tests


def _divisor(spec: PoolSpec, line: Expr, column: Expr) -> Expr:
    total: Expr = 1
    for axis, position in ((0, line), (1, column)):
        size, before, after = (spec.height, spec.width)[axis], spec.pads[axis], spec.pads[axis + 2]
        low, high = (-before, size + after) if spec.count_include_pad else (0, size)
        inside: Expr = const(0, "int32")
        for tap in range(spec.kernel[axis]):
            at = position * spec.stride[axis] + (tap * spec.dilation[axis] - before)
            inside = inside + select(tvm.tirx.all(at >= low, at < high), const(1, "int32"), const(0, "int32"))
        total = total * inside
    return total


class GlobalMean:
    """The family of `GlobalMeanSpec`."""

    @staticmethod
    def arguments(spec: GlobalMeanSpec, tile: Tile | None = None) -> list[Argument]:
        """x NHWC with its border, y (N, C)."""
        x = bordered((spec.batch, spec.height, spec.width, spec.channels), spec.in_border)
        return [Argument("x", x, spec.dtype), Argument("y", (spec.batch, spec.channels), spec.dtype, output=True)]

    @staticmethod
    def candidates(spec: GlobalMeanSpec, machine: Machine) -> list[Tile]:
        """One: a task per block of channels."""
        lanes_ = 4 * machine.vector(spec.dtype)
        small = spec.batch * spec.height * spec.width * spec.channels <= SERIAL_ELEMENTS
        return [Tile(1, lanes_, 1 if small else min(machine.threads, spec.batch * -(-spec.channels // lanes_)))]

    @staticmethod
    def build(spec: GlobalMeanSpec, tile: Tile, name: str) -> tvm.tirx.PrimFunc:
        """The kernel."""
        compute = compute_dtype(spec.dtype)
        _, height, width, channels = bordered((spec.batch, spec.height, spec.width, spec.channels), spec.in_border)
        full, rest = divmod(channels, tile.lanes)
        scale = const(1.0 / (spec.height * spec.width), compute)

        def block(x: Flat, y: Flat, image: Expr, first: Expr, count: int) -> None:
            total = local(count, compute)
            with lanes(count) as lane:
                total.store(lane, const(0.0, compute))
            with serial(spec.height) as i, serial(spec.width) as j:
                at = ((image * height + i + spec.in_border[0]) * width + j + spec.in_border[1]) * channels + first
                with lanes(count) as lane:
                    total.store(lane, total[lane] + x[at + lane])
            with lanes(count) as lane:
                y.store(image * channels + first + lane, total[lane] * scale)

        def body(x: Flat, y: Flat) -> None:
            if full:
                with parallel(spec.batch * full if tile.row_tasks > 1 else 1) as task:
                    if tile.row_tasks > 1:
                        block(x, y, let(div(task, full)), let(mod(task, full) * tile.lanes), tile.lanes)
                    else:
                        with serial(spec.batch) as image, serial(full) as part:
                            block(x, y, image, part * tile.lanes, tile.lanes)
            if rest:
                with serial(spec.batch) as image:
                    block(x, y, image, full * tile.lanes, rest)

        return prim_func(name, GlobalMean.arguments(spec), body)
