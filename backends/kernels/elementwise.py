"""Regions that no contraction and no norm is in: one loop nest, each part of a concatenation in its place."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from math import prod

import tvm

from rescompile.backends.kernels.emit import Expr, Flat, div, each, let, mod, parallel, prim_func, serial, when
from rescompile.backends.kernels.machine import Machine
from rescompile.backends.kernels.moves import Index
from rescompile.backends.kernels.region import Extents, Place, Program, Values
from rescompile.backends.kernels.rows import SERIAL_ELEMENTS
from rescompile.backends.kernels.specs import Argument
from rescompile.backends.kernels.tiles import Tile
from rescompile.kinds import OpKind

CHUNK = 4096  # elements of a task where one long row is all there is


@dataclass(frozen=True)
class RegionSpec:
    """The program's results, walking over the value `anchor`; its channels innermost where `channels_last`."""

    program: Program
    anchor: int
    channels_last: bool = False
    dtype: str = "float32"

    @property
    def rows(self) -> int | None:
        """None where a dimension is dynamic."""
        shape = self.program.shape(self.anchor)
        return None if None in shape else prod(extent or 1 for extent in shape[:-1])


def arguments(spec: RegionSpec, tile: Tile | None = None) -> list[Argument]:
    """The operands, then the results."""
    operands, results = spec.program.arguments("x")
    return [*operands, *results]


def candidates(spec: RegionSpec, machine: Machine) -> list[Tile]:
    """One."""
    size = prod(extent or SERIAL_ELEMENTS for extent in spec.program.shape(spec.anchor))
    return [Tile(1, 2 * machine.vector(spec.dtype), 1 if size <= SERIAL_ELEMENTS else machine.threads)]


def build(spec: RegionSpec, tile: Tile, name: str) -> tvm.tirx.PrimFunc:
    """The kernel."""
    program = spec.program

    def body(*given: Expr) -> None:
        values, rows = bound(program, given)
        clear_borders(program, values.results, tile.row_tasks > 1)
        emit_anchor(values, spec.anchor, spec.channels_last, tile, rows)

    return prim_func(name, arguments(spec), body)


def bound(program: Program, given: Sequence[Expr]) -> tuple[Values, Expr | None]:
    """The program's values over a kernel's buffers, operands first, and the dynamic row count behind them."""
    buffers = iter(given)
    operands = [None if place is None else next(buffers) for place in program.operands]
    results = [next(buffers) for _ in program.results]
    return Values(program, operands, results), next(buffers, None)


def emit_anchor(
    values: Values, anchor: int, channels_last: bool, tile: Tile, rows: Expr | None = None, given: int | None = None
) -> None:
    """Loops over the anchor; of a concatenation over its parts, without the one that is `given` by other loops."""
    program = values.program
    step = program.step(anchor)
    shape = program.shape(anchor)
    reached = {anchor, *program.following(anchor)}
    others = [made for made in dict.fromkeys(program.region.outputs) if made not in reached]

    def finish(index: Index, value: Expr) -> None:
        values.follow(anchor, index, value)
        for other in others:
            values.store(other, index)

    if step is None or step.kind is not OpKind.CONCAT:
        nest(
            shape,
            channels_last,
            tile,
            rows,
            [(0, 0, shape)],
            lambda _, index: finish(index, values.at(anchor, index)),
            values,
        )
        return
    axis = step.attrs.get("axis", 0)
    parts: list[tuple[int, int, Extents]] = []
    start = 0
    for value in step.inputs:
        extents = program.shape(value or 0)
        if value != given:
            parts.append((value or 0, start, extents))
        start += int(extents[axis] or 0)

    def part(entry: tuple[int, int, Extents], index: Index) -> None:
        moved = list(index)
        moved[axis] = moved[axis] + entry[1]
        finish(tuple(moved), values.at(entry[0], index))

    inner = 1 if channels_last and len(shape) > 2 else len(shape) - 1
    groups = [parts] if axis == inner else [[entry] for entry in parts]
    for group in groups:
        nest(group[0][2], channels_last, tile, rows, group, part, values)


def nest(
    shape: Extents,
    channels_last: bool,
    tile: Tile,
    rows: Expr | None,
    parts: Sequence[tuple[int, int, Extents]],
    body: Callable[[tuple[int, int, Extents], Index], None],
    values: Values,
) -> None:
    """body(part, index) for all elements of parts that differ in their innermost extent only."""
    order = list(range(len(shape)))
    if channels_last and len(order) > 2:
        order = [0, *order[2:], 1]
    if not order:
        each(1, lambda _: body(parts[0], ()), 1)
        return
    *outer, inner = order
    extents: list[Expr] = [rows if shape[axis] is None else shape[axis] for axis in outer]
    widths = [int(part[2][inner] or 0) for part in parts]
    count: Expr = 1
    for extent in extents:
        count = count * extent
    several = tile.row_tasks > 1

    def line(position: Expr, first: Expr = 0, only: int | None = None) -> None:
        index: list[Expr] = [0] * len(shape)
        rest = position
        for axis, extent in reversed(list(zip(outer, extents, strict=True))):
            if axis == outer[0]:
                index[axis] = rest if isinstance(rest, int) else let(rest)
            else:
                index[axis] = mod(rest, extent) if isinstance(rest, int) else let(mod(rest, extent))
                rest = div(rest, extent)
        for part, width in zip(parts, widths, strict=True):

            def element(i: Expr, part: tuple[int, int, Extents] = part) -> None:
                index[inner] = first + i
                body(part, tuple(index))
                values.forget()

            each(width if only is None else only, element, tile.lanes)

    long = len(parts) == 1 and isinstance(count, int) and count < 4 * tile.row_tasks and widths[0] > 2 * CHUNK
    if several and long:
        full, rest = divmod(widths[0], CHUNK)
        with parallel(count * full) as task:
            line(let(div(task, full)), let(mod(task, full) * CHUNK), CHUNK)
        if rest:
            with serial(count) as position:
                line(position, full * CHUNK, rest)
        return
    with ExitStack() as stack:
        line(stack.enter_context(parallel(count) if several else serial(count)))


def clear_borders(program: Program, results: Sequence[Flat], several: bool) -> None:
    """Zeros around the results that have a border."""
    for place, flat in zip(program.results, results, strict=True):
        if any(place.border):
            clear_border(place, flat, several)


def clear_border(place: Place, flat: Flat, several: bool) -> None:
    """Zeros above, below, left and right of a value that lies channels last."""
    batch, channels, *spatial = (int(extent or 0) for extent in place.shape)
    height, width = [1, *spatial][-2:]
    vertical, horizontal = place.border
    line = place.strides[-1] * (width + 2 * horizontal)
    lines = height + 2 * vertical

    def zeros(start: Expr, columns: Sequence[int]) -> None:
        for column in columns:
            at = start + column * place.strides[-1]
            each(channels, lambda i, at=at: flat.clear(at + i))  # type: ignore[misc]

    first = place.offset - vertical * line - horizontal * place.strides[-1]
    with ExitStack() as stack:
        task = stack.enter_context(parallel(batch * lines) if several else serial(batch * lines))
        image, row = div(task, lines), mod(task, lines)
        start = let(image * place.strides[0] + row * line + first) if not isinstance(task, int) else first
        if horizontal:
            zeros(start, [*range(horizontal), *range(horizontal + width, width + 2 * horizontal)])
        if vertical:
            outside = tvm.tirx.any(row < vertical, row >= height + vertical)
            with when(outside), serial(width) as column:
                each(channels, lambda i: flat.clear(start + (column + horizontal) * place.strides[-1] + i))
