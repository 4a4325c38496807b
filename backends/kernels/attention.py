"""Attention in one kernel: scores of a few query rows at a time, softmax on them while they are in cache.

    out[i] = sum over j of p[i, j] * v[j],   p[i] = softmax over j of (scale * q[i]·k[j] + mask[i, j])

A task is one head and a range of its query rows. Keys are transposed once per task, so that scores are register
tiles of the same kind as a linear's; only (rows of one tile) x k_len scores exist at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import tvm

from rescompile.backends.kernels.activations import exp
from rescompile.backends.kernels.emit import (
    Expr,
    Flat,
    chunk,
    const,
    div,
    lanes,
    let,
    local,
    minimum,
    parallel,
    prim_func,
    scratch,
    select,
    serial,
    unflatten,
    when,
)
from rescompile.backends.kernels.machine import Machine
from rescompile.backends.kernels.register_tile import RegisterTile, pixels_for
from rescompile.backends.kernels.rows import LOWEST, add, fold, row_maximum
from rescompile.backends.kernels.specs import Argument, AttentionSpec, Epilogue, compute_dtype
from rescompile.backends.kernels.tiles import Tile, accumulators

MINUS_INFINITY = float("-inf")


@dataclass(frozen=True)
class _Rows:
    """Where row s of a head lies in a buffer: offset + batch*b + head*h + step*s."""

    buffer: Flat
    offset: int
    batch: int
    head: int
    step: int

    def start(self, batch: Expr, head: Expr) -> Expr:
        return let(self.offset + batch * self.batch + head * self.head)


def arguments(spec: AttentionSpec, tile: Tile | None = None) -> list[Argument]:
    """qkv, or q, k, v; [mask]; y. Shapes as in `AttentionSpec`."""
    q_heads, k_heads, d = spec.heads, spec.shared_heads, spec.head_dim
    if spec.layout == "qkv":
        found = [Argument("qkv", (spec.batch, spec.q_len, (q_heads + 2 * k_heads) * d), spec.dtype)]
    else:
        found = [
            Argument("q", _shape(spec.layout, spec.batch, spec.q_len, q_heads, d), spec.dtype),
            Argument("k", _shape(spec.layout, spec.batch, spec.k_len, k_heads, d), spec.dtype),
            Argument("v", _shape(spec.layout, spec.batch, spec.k_len, k_heads, d), spec.dtype),
        ]
    if spec.mask != "none":
        found.append(Argument("mask", spec.mask_shape, "bool" if spec.mask == "keep" else spec.dtype))
    out = _shape(spec.out_layout, spec.batch, spec.q_len, q_heads, d)
    return [*found, Argument("y", out, spec.dtype, output=True)]


def _shape(layout: str, batch: int, length: int, heads: int, depth: int) -> tuple[int, int, int, int]:
    return (batch, length, heads, depth) if layout == "bshd" else (batch, heads, length, depth)


def _rows(buffer: Flat, layout: str, length: int, heads: int, depth: int) -> _Rows:
    if layout == "bshd":
        return _Rows(buffer, 0, length * heads * depth, depth, heads * depth)
    return _Rows(buffer, 0, length * heads * depth, length * depth, depth)


def candidates(spec: AttentionSpec, machine: Machine) -> list[Tile]:
    """Splits of the query rows: whole heads where there are enough of them, since each task transposes its keys."""
    vector, most = machine.vector(spec.dtype), accumulators(machine)
    width = 2 * vector if spec.k_len > vector else vector
    pixels = pixels_for(spec.q_len, most // (width // vector), 8)
    row_tiles = -(-spec.q_len // pixels)
    heads = spec.batch * spec.heads
    small = spec.flops <= 4 * 65536
    splits = sorted({min(n, row_tiles) for n in (1, 2, machine.threads) if (heads * n) % machine.threads == 0})
    return [Tile(pixels, width, n) for n in ([1] if small else splits or [min(machine.threads, row_tiles)])]


def build(spec: AttentionSpec, tile: Tile, name: str) -> tvm.tirx.PrimFunc:
    """The kernel."""

    def body(*buffers: Flat) -> None:
        d, q_heads, k_heads = spec.head_dim, spec.heads, spec.shared_heads
        *inputs, y = buffers
        mask = inputs.pop() if spec.mask != "none" else None
        if spec.layout == "qkv":
            step = (q_heads + 2 * k_heads) * d
            offsets = (0, q_heads * d, (q_heads + k_heads) * d)
            q, k, v = (_Rows(inputs[0], offset, spec.q_len * step, d, step) for offset in offsets)
        else:
            q = _rows(inputs[0], spec.layout, spec.q_len, q_heads, d)
            k, v = (_rows(buffer, spec.layout, spec.k_len, k_heads, d) for buffer in inputs[1:])
        out = _rows(y, spec.out_layout, spec.q_len, q_heads, d)
        with parallel(spec.batch * q_heads * tile.row_tasks) as task:
            index, part = unflatten(task, tile.row_tasks)
            batch, head = unflatten(index, q_heads)
            _Head(spec, tile, q, k, v, out, mask, batch, head).emit(part)

    return prim_func(name, arguments(spec), body)


class _Head:
    """One head of one batch element."""

    def __init__(
        self, spec: AttentionSpec, tile: Tile, q: _Rows, k: _Rows, v: _Rows, out: _Rows, mask: Flat | None,
        batch: Expr, head: Expr,
    ) -> None:  # fmt: skip
        self.spec, self.tile, self.mask = spec, tile, mask
        self.q, self.k, self.v, self.out = q, k, v, out
        self.batch, self.head = batch, head
        self.compute = compute_dtype(spec.dtype)
        shared = div(head, spec.heads // spec.shared_heads)
        self.q_start, self.out_start = q.start(batch, head), out.start(batch, head)
        self.k_start, self.v_start = k.start(batch, shared), v.start(batch, shared)
        self.blocks = -(-spec.k_len // tile.lanes)
        self.keys = self.blocks * tile.lanes

    def emit(self, part: Expr) -> None:
        """All row tiles of the part-th share of this head."""
        spec, pixels = self.spec, self.tile.pixels
        transposed = scratch(spec.head_dim * self.keys, self.compute)
        scores = scratch(pixels * self.keys, self.compute)
        self._transpose_keys(transposed)
        first, last = chunk(part, self.tile.row_tasks, -(-spec.q_len // pixels))
        with serial(first, last) as position:
            row = let(minimum(position * pixels, spec.q_len - pixels))
            # Keys that no row of this tile may see are skipped block by block.
            limit = (row + (pixels - 1)) if spec.causal else spec.k_len - 1
            blocks = let(minimum(div(limit, self.tile.lanes) + 1, self.blocks)) if spec.causal else self.blocks
            self._scores(transposed, scores, row, blocks)
            scale = self._softmax(scores, blocks)
            self._mix(scores, scale, row, blocks)

    def _transpose_keys(self, transposed: Flat) -> None:
        spec, lanes_ = self.spec, self.tile.lanes
        scale = const(spec.scale, self.compute)
        full, rest = divmod(spec.k_len, lanes_)

        def column(first: Expr, d: Expr, width: int) -> None:
            with lanes(width) as lane:
                value = self.k.buffer[self.k_start + (first + lane) * self.k.step + d] * scale
                transposed.store(d * self.keys + first + lane, value)

        if full:
            with serial(full) as block, serial(spec.head_dim) as d:
                column(block * lanes_, d, lanes_)
        if rest:
            with serial(spec.head_dim) as d:
                column(full * lanes_, d, rest)
                with lanes(lanes_ - rest) as lane:
                    transposed.clear(d * self.keys + spec.k_len + lane)

    def _scores(self, transposed: Flat, scores: Flat, row: Expr, blocks: Expr) -> None:
        spec, tile = self.spec, self.tile
        full, rest = divmod(spec.k_len, tile.lanes)

        def block_of(block: Expr, width: int) -> None:
            first = block * tile.lanes
            sums = RegisterTile(tile.pixels, tile.lanes, self.compute)
            sums.accumulate(
                [spec.head_dim],
                lambda pixel, index, lane: self.q.buffer[self.q_start + (row + pixel) * self.q.step + index[-1]],
                lambda index, lane: transposed[index[-1] * self.keys + first + lane],
            )
            to: Callable[[int, Expr], Expr] = lambda pixel, lane: pixel * self.keys + first + lane  # noqa: E731
            sums.store(
                Epilogue(),
                width,
                lambda pixel, lane, value: scores.store(
                    to(pixel, lane), self._masked(value, row + pixel, first + lane)
                ),
            )
            if width < tile.lanes:
                for pixel in range(tile.pixels):
                    with lanes(tile.lanes - width) as lane:
                        scores.store(to(pixel, width + lane), const(MINUS_INFINITY, self.compute))

        if full:
            with serial(minimum(blocks, full)) as block:
                block_of(block, tile.lanes)
        if rest:
            with when(blocks > full) if spec.causal else serial(1):
                block_of(full, rest)

    def _masked(self, score: Expr, row: Expr, key: Expr) -> Expr:
        hidden = const(MINUS_INFINITY, self.compute)
        if self.mask is not None:
            index: Expr = 0
            positions = (self.batch, self.head, row, key)
            for extent, position in zip(self.spec.mask_shape, positions, strict=True):
                index = index * extent + (position if extent > 1 else 0)
            keep = self.spec.mask == "keep"
            score = select(self.mask[index], score, hidden) if keep else score + self.mask[index]
        return select(key <= row, score, hidden) if self.spec.causal else score

    def _softmax(self, scores: Flat, blocks: Expr) -> Flat:
        """Replaces scores by their exponentials and returns the factor of each row."""
        width = self.tile.lanes
        scale = local(self.tile.pixels, self.compute)

        def over(initial: float, row: Expr, combine: Callable[[Expr, Expr], Expr]) -> Expr:
            partial = local(width, self.compute)
            with lanes(width) as lane:
                partial.store(lane, const(initial, self.compute))
            with serial(blocks) as block, lanes(width) as lane:
                partial.store(lane, combine(partial[lane], scores[row + block * width + lane]))
            return fold(partial, width, combine)

        with serial(self.tile.pixels) as pixel:
            row = let(pixel * self.keys)
            top = over(LOWEST[self.compute], row, row_maximum)
            with serial(blocks) as block, lanes(width) as lane:
                at = row + block * width + lane
                scores.store(at, exp(scores[at] - top, self.compute))
            total = over(0.0, row, add)
            # A row that may see no key becomes zero, as in torch.
            zero, one = const(0.0, self.compute), const(1.0, self.compute)
            scale.store(pixel, select(total > zero, one / select(total > zero, total, one), zero))
        return scale

    def _mix(self, scores: Flat, scale: Flat, row: Expr, blocks: Expr) -> None:
        spec, tile = self.spec, self.tile
        full, rest = divmod(spec.k_len, tile.lanes)
        for first in range(0, spec.head_dim, tile.lanes):
            sums = RegisterTile(tile.pixels, min(tile.lanes, spec.head_dim - first), self.compute)

            def add_keys(start: Expr, count: int, sums: RegisterTile = sums, first: int = first) -> None:
                sums.accumulate(
                    [count],
                    lambda pixel, index, lane: scores[pixel * self.keys + start + index[-1]],
                    lambda index, lane: self.v.buffer[self.v_start + (start + index[-1]) * self.v.step + first + lane],
                )

            if full:
                with serial(minimum(blocks, full)) as block:
                    add_keys(block * tile.lanes, tile.lanes)
            if rest:
                with when(blocks > full) if spec.causal else serial(1):
                    add_keys(full * tile.lanes, rest)

            def finish(pixel: int, lane: Expr, value: Expr, first: int = first) -> None:
                at = self.out_start + (row + pixel) * self.out.step + first + lane
                self.out.buffer.store(at, value * scale[pixel])

            sums.store(Epilogue(), sums.width, finish)
