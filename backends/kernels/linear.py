"""Linear layers: weights packed at compile time as [out/lanes][in][lane], bias, residual and activation inside."""

from __future__ import annotations

import numpy as np
import tvm

from rescompile.backends.kernels.blocks import Blocks, as_dtype
from rescompile.backends.kernels.emit import Expr, Flat, prim_func
from rescompile.backends.kernels.machine import Machine
from rescompile.backends.kernels.matmul import emit_matmul
from rescompile.backends.kernels.register_tile import pixels_for
from rescompile.backends.kernels.specs import Argument, LinearSpec
from rescompile.backends.kernels.tail import Following
from rescompile.backends.kernels.tiles import Tile, accumulators, lane_widths, task_splits

FEW_ROWS = 8


def arguments(spec: LinearSpec, tile: Tile) -> list[Argument]:
    """x (rows, in), packed weight, [bias (out)], [residual (rows, out)], y (rows, out); with a tail, its buffers."""
    blocks = Blocks.of(spec.in_features, spec.out_features, 1, tile.lanes)
    given = [
        Argument("x", (spec.rows, spec.in_pitch or spec.in_features), spec.dtype),
        Argument("weight", (blocks.count, spec.in_features, tile.lanes), spec.dtype),
        *([Argument("bias", (spec.out_features,), spec.dtype)] if spec.epilogue.bias else []),
    ]
    if spec.tail is not None:
        return [*given, *spec.tail.arguments]
    return [
        *given,
        *([Argument("residual", (spec.rows, spec.out_features), spec.dtype)] if spec.epilogue.residual else []),
        Argument("y", (spec.rows, spec.out_features), spec.dtype, output=True),
    ]


def pack_weight(spec: LinearSpec, tile: Tile, weight: np.ndarray) -> np.ndarray:
    """[out, in] to [out/lanes, in, lane]."""
    return as_dtype(Blocks.of(spec.in_features, spec.out_features, 1, tile.lanes).pack(weight), spec.dtype)


def candidates(spec: LinearSpec, machine: Machine) -> list[Tile]:
    """Tiles worth timing; with few rows the weights are read once, so only their split over threads matters."""
    vector, most, threads = machine.vector(spec.dtype), accumulators(machine), machine.threads
    if spec.rows is not None and spec.rows <= FEW_ROWS:
        widths = [w for w in (8 * vector, 4 * vector, 2 * vector) if spec.rows * (w // vector) <= most]
        return [
            Tile(spec.rows, width, 1, min(tasks, -(-spec.out_features // width)))
            for width in widths[:2] or [vector]
            for tasks in (threads, 8 * threads)
        ]
    tiles = []
    for index, lanes in enumerate(lane_widths(spec.out_features, machine, spec.dtype)):
        blocks = -(-spec.out_features // lanes)
        limit = max(1, most // max(1, lanes // vector))
        pixels = min(8, limit) if spec.rows is None else pixels_for(spec.rows, limit, 8)
        rows = 16 * threads if spec.rows is None else -(-spec.rows // pixels)
        row_bytes = rows * pixels * spec.in_features * 4
        splits = task_splits(rows, blocks, threads, row_bytes, spec.in_features * spec.out_features * 4)
        tiles += [Tile(pixels, lanes, r, b) for r, b in splits[: 4 if index == 0 else 1]]
        if index == 0:
            tiles.append(Tile(pixels, lanes, *splits[0], order="pixels"))
    return tiles


def build(spec: LinearSpec, tile: Tile, name: str, dynamic_tasks: bool = False) -> tvm.tirx.PrimFunc:
    """The kernel; with `dynamic_tasks` it takes row_tasks and block_tasks as trailing int32 arguments."""

    def body(*given: Expr) -> None:
        operands = list(given)
        block_tasks: Expr = operands.pop() if dynamic_tasks else tile.block_tasks
        row_tasks: Expr = operands.pop() if dynamic_tasks else tile.row_tasks
        rows: Expr = operands.pop() if spec.rows is None else spec.rows
        x, weight, *rest = operands
        extra: list[Flat] = rest
        bias = extra.pop(0) if spec.epilogue.bias else None
        following = None if spec.tail is None else Following(spec.tail, extra)
        y = None if following is not None else extra.pop()
        emit_matmul(
            x, weight, bias, extra.pop(0) if spec.epilogue.residual else None, y,
            rows=rows, depth=spec.in_features, columns=spec.out_features, epilogue=spec.epilogue, tile=tile,
            row_tasks=row_tasks, block_tasks=block_tasks, dtype=spec.dtype,
            in_pitch=spec.in_pitch, in_first=spec.in_first, following=following,
        )  # fmt: skip

    return prim_func(name, arguments(spec, tile), body, ("row_tasks", "block_tasks") if dynamic_tasks else ())
