"""CUDA kernels of residual add + LayerNorm or RMSNorm, with both outputs, and of the norms alone.

    s = x + residual;  y = (s − mean(s)) / sqrt(var(s) + eps) · weight + bias      (layer)
    s = x + residual;  y = s / sqrt(mean(s²) + eps) · weight                       (rms)

A row is read once, in accesses of 128 bits where its width allows that, and stays in registers: the statistics take two
passes over it (the variance is of the centred values), in float32, and cost no traffic. Up to 1,024 elements a row
belongs to one warp, or to a part of one, and nothing but shuffles is needed; a wider row belongs to a thread block.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import tvm
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script.builder import ir as T

from rescompile.backends.kernels import Argument, NormSpec

Expr = Any  # tvm.tirx expressions, buffers and Python integers alike

DTYPES = ("float32", "float16", "bfloat16")
WIDEST = 16384  # a wider row does not fit into a block's registers

_WARP = 32
_THREADS = 128  # of a block in which each warp, or part of one, has a row of its own
_ACCESS = 16  # bytes: the widest load and store
_PER_THREAD = 16  # elements that a thread of a block-wide row holds
_ONE_WARP = 1024  # the widest row that one warp holds: 32 elements a thread
_EVERY_LANE = 0xFFFFFFFF
_OPAQUE = 8  # Relax's op pattern "opaque": never fused into, never fused away


@dataclass(frozen=True)
class RowTile:
    """How a row is cut: `vector` elements an access, `threads` a row, `chunks` accesses a thread, `rows` a block."""

    vector: int
    threads: int
    chunks: int
    rows: int

    @property
    def span(self) -> int:
        """Elements that the threads of a row read at once."""
        return self.vector * self.threads


def takes(spec: NormSpec) -> bool:
    """Whether there is a kernel for the spec."""
    return spec.dtype in DTYPES and spec.width <= WIDEST


def row_tile(width: int, dtype: str) -> RowTile:
    """The tile for rows of `width` elements."""
    vector = _ACCESS // _bytes(dtype)
    while width % vector:
        vector //= 2
    accesses = width // vector
    if width <= _ONE_WARP:
        threads = 1
        while threads < min(accesses, _WARP):
            threads *= 2
        return RowTile(vector, threads, -(-accesses // threads), _THREADS // threads)
    warps = min(-(-width // (_WARP * _PER_THREAD)), -(-accesses // _WARP))
    threads = _WARP * warps
    return RowTile(vector, threads, -(-accesses // threads), 1)


def arguments(spec: NormSpec) -> list[Argument]:
    """x (rows, width), [residual (rows, width)], [weight (width)], [bias (width)], y, [sum]."""
    matrix = (spec.rows, spec.width)
    return [
        Argument("x", matrix, spec.dtype),
        *([Argument("residual", matrix, spec.dtype)] if spec.residual else []),
        *([Argument("weight", (spec.width,), spec.dtype)] if spec.weight else []),
        *([Argument("bias", (spec.width,), spec.dtype)] if spec.bias else []),
        Argument("y", matrix, spec.dtype, output=True),
        *([Argument("sum", matrix, spec.dtype, output=True)] if spec.sum_output else []),
    ]


def prim_func(spec: NormSpec, name: str) -> tvm.tirx.PrimFunc:
    """The kernel, its threads bound; a row count of None is read from the buffers' shape at run time."""
    tile = row_tile(spec.width, spec.dtype)
    with IRBuilder() as builder, T.prim_func(s_tir=True), ExitStack() as threads:
        T.func_name(name)
        T.func_attr({"global_symbol": name, "tirx.noalias": True, "op_pattern": _OPAQUE, "tirx.is_scheduled": True})
        rows = tvm.tirx.Var("rows", "int64") if spec.rows is None else spec.rows
        buffers = {}
        for argument in arguments(spec):
            shape = [rows if extent is None else extent for extent in argument.shape]
            buffers[argument.name] = T.arg(argument.name, T.buffer(shape, argument.dtype))
        block = threads.enter_context(T.launch_thread("blockIdx.x", (rows + tile.rows - 1) // tile.rows))
        inner = threads.enter_context(T.launch_thread("threadIdx.y", tile.rows))
        lane = threads.enter_context(T.launch_thread("threadIdx.x", tile.threads))
        _Row(spec, tile, buffers, rows, block * tile.rows + inner, lane).emit()
    return builder.get()


class _Row:
    """The work of one thread on one row."""

    def __init__(
        self, spec: NormSpec, tile: RowTile, buffers: dict[str, Expr], rows: Expr, row: Expr, lane: Expr
    ) -> None:
        self.spec, self.tile, self.buffers, self.lane = spec, tile, buffers, lane
        exact = isinstance(rows, int) and rows % tile.rows == 0
        # Rows past the end compute on the last one and write nothing: every lane takes part in every shuffle.
        self.row = row if exact or tile.rows == 1 else tvm.tirx.min(row, rows - 1)
        self.inside = None if exact or tile.rows == 1 else row < rows

    def emit(self) -> None:
        """Load the row, write the sum, reduce twice, write the norm."""
        spec, tile = self.spec, self.tile
        elements = tile.chunks * tile.vector
        held = T.alloc_buffer((elements,), spec.dtype, scope="local")
        staged = T.alloc_buffer((elements if spec.residual else tile.vector,), spec.dtype, scope="local")
        self._each_chunk(lambda chunk: self._read("x", held, chunk, chunk))
        if spec.residual:
            self._each_chunk(lambda chunk: self._read("residual", staged, chunk, chunk))
            self._each_chunk(lambda chunk: self._add(held, staged, chunk))
        inverse = _const(1.0 / spec.width)
        mean = None
        if spec.kind == "layer":
            total = self._reduce("total", lambda chunk, i: _wide(held[chunk * tile.vector + i]))
            mean = _named(total[0] * inverse)

        def square(chunk: int, i: Expr) -> Expr:
            value = _wide(held[chunk * tile.vector + i])
            value = value if mean is None else value - mean[0]
            return value * value

        power = self._reduce("power", square)
        scale = _named(T.rsqrt(power[0] * inverse + _const(spec.eps)))
        affine: dict[str, Any] = {
            name: T.alloc_buffer((tile.vector,), spec.dtype, scope="local")
            for name in ("weight", "bias")
            if name in self.buffers
        }
        self._each_chunk(lambda chunk: self._norm(held, staged, affine, mean, scale, chunk))

    def _each_chunk(self, body: Any) -> None:
        for chunk in range(self.tile.chunks):
            body(chunk)

    def _column(self, chunk: int) -> Expr:
        return self.lane * self.tile.vector + chunk * self.tile.span

    def _ragged(self, chunk: int) -> bool:
        """Whether some threads of the row have nothing to do in this chunk."""
        return (chunk + 1) * self.tile.span > self.spec.width

    def _read(self, name: str, into: Expr, slot: int, chunk: int) -> None:
        """into[slot] = the thread's access of this chunk, zeros past the row's end"""
        tile, source, column = self.tile, self.buffers[name], self._column(chunk)
        where = [column] if len(source.shape) == 1 else [self.row, column]

        def load() -> None:
            _vector(tile.vector, lambda i: _store(into, source[*where[:-1], column + i], slot * tile.vector + i))

        if not self._ragged(chunk):
            load()
            return
        zero = tvm.tirx.const(0, self.spec.dtype)
        with T.If(column < self.spec.width):
            with T.Then():
                load()
            with T.Else():
                _unrolled(tile.vector, lambda i: _store(into, zero, slot * tile.vector + i))

    def _write(self, name: str, source: Expr, slot: int, chunk: int) -> None:
        tile, target, column = self.tile, self.buffers[name], self._column(chunk)
        with ExitStack() as guards:
            if self.inside is not None:
                guards.enter_context(T.If(self.inside))
                guards.enter_context(T.Then())
            if self._ragged(chunk):
                guards.enter_context(T.If(column < self.spec.width))
                guards.enter_context(T.Then())
            _vector(
                tile.vector,
                lambda i: T.buffer_store(target, source[slot * tile.vector + i], [self.row, column + i]),
            )

    def _add(self, held: Expr, staged: Expr, chunk: int) -> None:
        """s = x + residual, rounded to the buffers' type, as the graph's own add does."""

        def add(i: Expr) -> None:
            at = chunk * self.tile.vector + i
            _store(held, (_wide(held[at]) + _wide(staged[at])).astype(self.spec.dtype), at)

        _unrolled(self.tile.vector, add)
        if "sum" in self.buffers:
            self._write("sum", held, chunk, chunk)

    def _reduce(self, name: str, term: Any) -> Expr:
        """The sum of term(chunk, i) over the row, known to all of its threads."""
        tile = self.tile
        total = T.alloc_buffer((1,), "float32", scope="local")
        _store(total, _const(0.0), 0)
        for chunk in range(tile.chunks):
            here = self._column(chunk) < self.spec.width if self._ragged(chunk) else None

            def add(i: Expr, chunk: int = chunk, here: Expr = here) -> None:
                value = term(chunk, i)
                value = value if here is None else T.Select(here, value, _const(0.0))
                _store(total, total[0] + value, 0)

            _unrolled(tile.vector, add)
        _shuffle(total, min(tile.threads, _WARP))
        if tile.threads > _WARP:
            self._across_warps(name, total)
        return total

    def _across_warps(self, name: str, total: Expr) -> None:
        warps = self.tile.threads // _WARP
        partial = T.alloc_buffer((warps,), "float32", scope="shared")
        with T.If(self.lane % _WARP == 0), T.Then():
            _store(partial, total[0], self.lane // _WARP)
        T.evaluate(T.tvm_storage_sync("shared"))
        lane = self.lane % _WARP
        if warps == _WARP:
            _store(total, partial[lane], 0)
        else:
            with T.If(lane < warps):
                with T.Then():
                    _store(total, partial[lane], 0)
                with T.Else():
                    _store(total, _const(0.0), 0)
        _shuffle(total, _WARP)

    def _norm(
        self, held: Expr, staged: Expr, affine: dict[str, Expr], mean: Expr | None, scale: Expr, chunk: int
    ) -> None:
        for name, part in affine.items():
            self._read(name, part, 0, chunk)

        def norm(i: Expr) -> None:
            value = _wide(held[chunk * self.tile.vector + i])
            value = (value if mean is None else value - mean[0]) * scale[0]
            if "weight" in affine:
                value = value * _wide(affine["weight"][i])
            if "bias" in affine:
                value = value + _wide(affine["bias"][i])
            _store(staged, value.astype(self.spec.dtype), i)

        _unrolled(self.tile.vector, norm)
        self._write("y", staged, 0, chunk)


def _shuffle(total: Expr, lanes: int) -> None:
    """Sum over groups of `lanes` neighbouring lanes, in all of them: a butterfly."""
    step = lanes // 2
    while step:
        other = T.tvm_warp_shuffle_xor(tvm.tirx.const(_EVERY_LANE, "uint32"), total[0], step, _WARP, _WARP)
        _store(total, total[0] + other, 0)
        step //= 2


def _named(value: Expr) -> Expr:
    buffer = T.alloc_buffer((1,), "float32", scope="local")
    _store(buffer, value, 0)
    return buffer


def _vector(count: int, body: Any) -> None:
    """One access of `count` elements."""
    if count == 1:
        body(0)
        return
    with T.vectorized(0, count) as i:
        body(i)


def _unrolled(count: int, body: Any) -> None:
    with T.unroll(0, count) as i:
        body(i)


def _store(buffer: Expr, value: Expr, index: Expr) -> None:
    T.buffer_store(buffer, value, [index])


def _wide(value: Expr) -> Expr:
    return value.astype("float32")


def _const(number: float) -> Expr:
    return tvm.tirx.const(number, "float32")


def _bytes(dtype: str) -> int:
    return int(dtype.removeprefix("bfloat").removeprefix("float")) // 8
