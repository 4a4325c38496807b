"""Matrix products of two computed values, whatever follows them in the same kernel."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import tvm

from rescompile.backends.kernels.blocks import Blocks
from rescompile.backends.kernels.emit import Expr, Flat, div, let, minimum, mod, parallel, prim_func, serial
from rescompile.backends.kernels.machine import Machine
from rescompile.backends.kernels.register_tile import RegisterTile, pixels_for
from rescompile.backends.kernels.rows import SERIAL_ELEMENTS
from rescompile.backends.kernels.specs import Argument, Epilogue, compute_dtype
from rescompile.backends.kernels.tail import Following, Tail
from rescompile.backends.kernels.tiles import Tile, accumulators, lane_widths


@dataclass(frozen=True)
class ProductSpec:
    """tail(sum over k of a[..., m, k] * b[..., k, n]); a_lead and b_lead are `lead`, or all 1 where one is shared."""

    lead: tuple[int, ...]
    rows: int
    depth: int
    columns: int
    tail: Tail
    a_shared: bool = False
    b_shared: bool = False
    dtype: str = "float32"

    @property
    def flops(self) -> int:
        """Floating point operations: two per multiply-add."""
        return 2 * prod(self.lead) * self.rows * self.depth * self.columns


def arguments(spec: ProductSpec, tile: Tile | None = None) -> list[Argument]:
    """a, b, then the tail's buffers."""
    a = (1 if spec.a_shared else prod(spec.lead), spec.rows, spec.depth)
    b = (1 if spec.b_shared else prod(spec.lead), spec.depth, spec.columns)
    return [Argument("a", a, spec.dtype), Argument("b", b, spec.dtype), *spec.tail.arguments]


def candidates(spec: ProductSpec, machine: Machine) -> list[Tile]:
    """One: register tiles as of a linear, tasks of a few rows."""
    width = lane_widths(spec.columns, machine, spec.dtype)[0]
    pixels = pixels_for(spec.rows, max(1, accumulators(machine) // -(-width // machine.vector(spec.dtype))), 8)
    small = prod(spec.lead) * spec.rows * spec.columns <= SERIAL_ELEMENTS // 8
    return [Tile(pixels, width, 1 if small else machine.threads)]


def build(spec: ProductSpec, tile: Tile, name: str) -> tvm.tirx.PrimFunc:
    """The kernel."""
    blocks = Blocks.of(spec.depth, spec.columns, 1, tile.lanes)
    positions = -(-spec.rows // tile.pixels)

    def body(a: Flat, b: Flat, *given: Flat) -> None:
        following = Following(spec.tail, given)
        following.beside(tile, tile.row_tasks > 1)

        def line(batch: Expr, position: Expr) -> None:
            first = position * tile.pixels
            first = first if spec.rows % tile.pixels == 0 else let(minimum(first, spec.rows - tile.pixels))
            left = let((0 if spec.a_shared else batch * (spec.rows * spec.depth)) + first * spec.depth)
            right = 0 if spec.b_shared else let(batch * (spec.depth * spec.columns))

            def tile_of(block: Expr, width: int) -> None:
                # Lanes beyond the last column would read the next row's, so a partial block is narrow from the start.
                sums = RegisterTile(tile.pixels, width, compute_dtype(spec.dtype))
                column = block * tile.lanes
                sums.accumulate(
                    [spec.depth],
                    lambda pixel, index, lane: a[left + pixel * spec.depth + index[-1]],
                    lambda index, lane: b[right + index[-1] * spec.columns + column + lane],
                )
                row = let(batch * spec.rows + first)
                store = following.storer(lambda pixel: spec.tail.unflattened(row + pixel), column, tile.lanes)
                sums.store(Epilogue(), width, store)

            with serial(blocks.count) as block:
                blocks.with_width(block, lambda width: tile_of(block, width))

        total = prod(spec.lead) * positions
        loop = parallel(total) if tile.row_tasks > 1 else serial(total)
        with loop as task:
            batch = div(task, positions) if isinstance(task, int) else let(div(task, positions))
            line(batch, mod(task, positions) if isinstance(task, int) else let(mod(task, positions)))

    return prim_func(name, arguments(spec), body)
