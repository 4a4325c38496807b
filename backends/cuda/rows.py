"""What kernels over rows share: how a row is cut, 128-bit reads and writes with their tails, sums over a row's threads.

A row is read once and stays in registers. Up to 1,024 elements it belongs to one warp, or to a part of one, and nothing
but shuffles is needed; a wider row belongs to a thread block, whose warps meet in shared memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
import tvm
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script.builder import ir as T

from rescompile.backends.cuda.scalars import is_portable, widest_lanes
from rescompile.backends.kernels import Argument

Expr = Any  # tvm.tirx expressions, buffers and Python integers alike

DTYPES = ("float32", "float16", "bfloat16")
WIDEST = 16384  # a wider row does not fit into a block's registers

_WARP = 32
_THREADS = 128  # of a block in which each warp, or part of one, has a row of its own
_ACCESS = 16  # bytes: the widest load and store
_PER_THREAD = 16  # elements that a thread of a block-wide row holds
_ONE_WARP = 1024  # the widest row that one warp holds: 32 elements a thread
_STREAMING = 512  # threads for a row that no block holds
_MOST = 1024  # threads of a block
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


def row_tiles(width: int, dtype: str) -> list[RowTile]:
    """The tiles for rows of `width` elements, `dtype` being the widest type that is read or written; the best first."""
    vector = min(_ACCESS // _bytes(dtype), widest_lanes())
    while width % vector:
        vector //= 2
    accesses = width // vector
    if width <= _ONE_WARP:
        threads = 1
        while threads < min(accesses, _WARP):
            threads *= 2
        chunks = -(-accesses // threads)
        # Without shuffles a row is summed in shared memory, by a block of its own.
        beside = (1,) if is_portable() else (_THREADS // threads, 2 * _THREADS // threads)
        return [RowTile(vector, threads, chunks, rows) for rows in beside]
    if width > WIDEST:
        return [RowTile(vector, threads, -(-accesses // threads), 1) for threads in (_STREAMING, 2 * _STREAMING)]
    found = []
    for held in (_PER_THREAD, _PER_THREAD // 2):
        threads = _WARP * min(-(-width // (_WARP * held)), -(-accesses // _WARP))
        if threads <= _MOST:
            found.append(RowTile(vector, threads, -(-accesses // threads), 1))
    return list(dict.fromkeys(found))


def row_function(
    name: str, arguments: Sequence[Argument], rows: int | None, tile: RowTile, body: Callable[[Row], None]
) -> tvm.tirx.PrimFunc:
    """A kernel, its threads bound, whose `body` emits the work of one thread; `rows` None is read at run time."""
    with IRBuilder() as builder, T.prim_func(s_tir=True), ExitStack() as threads:
        function_frame(name)
        count = tvm.tirx.Var("rows", "int64") if rows is None else rows
        buffers = {}
        for argument in arguments:
            shape = [count if extent is None else extent for extent in argument.shape]
            buffers[argument.name] = T.arg(argument.name, T.buffer(shape, argument.dtype))
        block = threads.enter_context(T.launch_thread("blockIdx.x", (count + tile.rows - 1) // tile.rows))
        inner = threads.enter_context(T.launch_thread("threadIdx.y", tile.rows))
        lane = threads.enter_context(T.launch_thread("threadIdx.x", tile.threads))
        width = next(argument.shape[-1] for argument in arguments)
        dtypes = {argument.name: argument.dtype for argument in arguments}
        body(Row(tile, int(width or 0), buffers, dtypes, count, block * tile.rows + inner, lane))
    return builder.get()


def function_frame(name: str) -> None:
    """Name a function that is being built, and say that its threads are bound."""
    T.func_name(name)
    T.func_attr({"global_symbol": name, "tirx.noalias": True, "op_pattern": _OPAQUE, "tirx.is_scheduled": True})


class Row:
    """One thread's part of one row."""

    def __init__(
        self,
        tile: RowTile,
        width: int,
        buffers: dict[str, Expr],
        dtypes: dict[str, str],
        rows: Expr,
        row: Expr,
        lane: Expr,
    ) -> None:
        self.tile, self.width, self.buffers, self.dtypes, self.lane = tile, width, buffers, dtypes, lane
        exact = tile.rows == 1 or (isinstance(rows, int) and rows % tile.rows == 0)
        # Rows past the end compute on the last one and write nothing: every lane takes part in every shuffle.
        self.row = row if exact else tvm.tirx.min(row, rows - 1)
        self.inside = None if exact else row < rows

    @property
    def elements(self) -> int:
        """Elements that a thread holds."""
        return self.tile.chunks * self.tile.vector

    def read(self, name: str, into: Expr, slot: int, chunk: Expr) -> None:
        """into[slot] = the thread's access of a chunk, of its row or of what all rows share; zeros past the end"""
        tile, source, column = self.tile, self.buffers[name], self.column(chunk)
        lead = [] if len(source.shape) == 1 else [self.row]

        def load() -> None:
            vector(tile.vector, lambda i: store(into, source[*lead, column + i], slot * tile.vector + i))

        if not self.ragged(chunk):
            load()
            return
        zero = tvm.tirx.const(0, self.dtypes[name])
        with T.If(column < self.width):
            with T.Then():
                load()
            with T.Else():
                unrolled(tile.vector, lambda i: store(into, zero, slot * tile.vector + i))

    def write(self, name: str, source: Expr, slot: int, chunk: Expr) -> None:
        """The thread's access of a chunk = source[slot]; nothing past the row's end."""
        tile, target, column = self.tile, self.buffers[name], self.column(chunk)
        with ExitStack() as guards:
            if self.inside is not None:
                guards.enter_context(T.If(self.inside))
                guards.enter_context(T.Then())
            if self.ragged(chunk):
                guards.enter_context(T.If(column < self.width))
                guards.enter_context(T.Then())
            vector(
                tile.vector,
                lambda i: T.buffer_store(target, source[slot * tile.vector + i], [self.row, column + i]),
            )

    def each(self, body: Callable[[int], None]) -> None:
        """body(chunk) for every chunk."""
        for chunk in range(self.tile.chunks):
            body(chunk)

    def reduce(self, term: Callable[[Expr], Expr], *, largest: bool = False) -> Expr:
        """The sum, or the largest, of term(i) over the elements of the row, known to all of its threads."""
        start = const(float(np.finfo(np.float32).min) if largest else 0.0)
        total = local(1)
        store(total, start, 0)
        for chunk in range(self.tile.chunks):
            here = self.column(chunk) < self.width if self.ragged(chunk) else None

            def add(i: Expr, first: int = chunk * self.tile.vector, here: Expr = here) -> None:
                value = term(first + i)
                value = value if here is None else T.Select(here, value, start)
                store(total, _joined(total[0], value, largest), 0)

            unrolled(self.tile.vector, add)
        across_threads(total, self.tile.threads, self.lane, start, largest)
        return total

    def column(self, chunk: Expr) -> Expr:
        """Where the thread's access of a chunk begins in the row."""
        return self.lane * self.tile.vector + chunk * self.tile.span

    def ragged(self, chunk: Expr) -> bool:
        """Whether some threads of the row have nothing to do in this chunk, or, where that is not known yet, in any."""
        last = chunk + 1 if isinstance(chunk, int) else self.tile.chunks
        return bool(last * self.tile.span > self.width)


def across_threads(
    total: Expr,
    threads: int,
    lane: Expr,
    start: Expr,
    largest: bool = False,
    shared: tuple[Expr, int] | None = None,
) -> None:
    """total[0] = the sum, or the largest, over the threads of a row, `start` being what none adds; in all of them.

    shared: where each warp's is to be kept, and from which place on; by default in memory of its own.
    """
    if is_portable():
        _in_shared(total, threads, lane, largest)
        return
    _shuffle(total, min(threads, _WARP), largest)
    if threads <= _WARP:
        return
    warps = threads // _WARP
    partial, first = shared or (T.alloc_buffer((warps,), total.dtype, scope="shared"), 0)
    inner = lane % _WARP
    with T.If(inner == 0), T.Then():
        store(partial, total[0], lane // _WARP + first)
    T.evaluate(T.tvm_storage_sync("shared"))
    if warps == _WARP:
        store(total, partial[inner + first], 0)
    else:
        with T.If(inner < warps):
            with T.Then():
                store(total, partial[inner + first], 0)
            with T.Else():
                store(total, start, 0)
    _shuffle(total, _WARP, largest)


def _in_shared(total: Expr, threads: int, lane: Expr, largest: bool) -> None:
    """The same without shuffles, of a block that has one row: a tree in shared memory."""
    if threads == 1:
        return
    partial = T.alloc_buffer((threads,), total.dtype, scope="shared")
    store(partial, total[0], lane)
    T.evaluate(T.tvm_storage_sync("shared"))
    half = 1
    while 2 * half < threads:
        half *= 2
    while half:
        with T.If(lane < min(half, threads - half)), T.Then():
            store(partial, _joined(partial[lane], partial[lane + half], largest), lane)
        T.evaluate(T.tvm_storage_sync("shared"))
        half //= 2
    store(total, partial[0], 0)


def local(size: int, dtype: str = "float32") -> Expr:
    """Registers of one thread."""
    return T.alloc_buffer((size,), dtype, scope="local")


def named(value: Expr) -> Expr:
    """A float32 computed once: a buffer of one element."""
    buffer = local(1)
    store(buffer, value, 0)
    return buffer


def vector(count: int, body: Callable[[Expr], None]) -> None:
    """One access of `count` elements."""
    if count == 1:
        body(0)
        return
    with T.vectorized(0, count) as i:
        body(i)


def unrolled(count: int, body: Callable[[Expr], None]) -> None:
    """body(i) for i in range(count), without a loop."""
    with T.unroll(0, count) as i:
        body(i)


def store(buffer: Expr, value: Expr, index: Expr) -> None:
    """buffer[index] = value"""
    T.buffer_store(buffer, value, [index])


def wide(value: Expr) -> Expr:
    """The value as float32."""
    return value.astype("float32")


def const(number: float) -> Expr:
    """A float32 literal, rounded here: a longer one makes compilers warn."""
    return tvm.tirx.const(float(np.float32(number)), "float32")


def _joined(a: Expr, b: Expr, largest: bool) -> Expr:
    return tvm.tirx.max(a, b) if largest else a + b


def _shuffle(total: Expr, lanes: int, largest: bool) -> None:
    """Sum, or largest, over groups of `lanes` neighbouring lanes, in all of them: a butterfly."""
    step = lanes // 2
    while step:
        other = T.tvm_warp_shuffle_xor(tvm.tirx.const(_EVERY_LANE, "uint32"), total[0], step, _WARP, _WARP)
        store(total, _joined(total[0], other, largest), 0)
        step //= 2


def _bytes(dtype: str) -> int:
    return int(dtype.removeprefix("bfloat").removeprefix("float")) // 8
