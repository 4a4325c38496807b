"""CUDA kernels of max and average pools, and of the mean over all positions, NHWC.

    y[n, i, j, c] = max or mean over the window of x[n, i*s - p + k*d, j*s - p + l*d, c]
    y[n, c] = mean over h, w of x[n, h, w, c]

Sums are in float32. A NaN in a window is its maximum, as in torch.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass

import tvm
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script.builder import ir as T

from rescompile.backends.cuda.rows import Expr, const, local, named, store, unrolled, vector, wide
from rescompile.backends.cuda.scalars import is_portable, scalar
from rescompile.backends.cuda.windows import (
    SIZES,
    THREADS,
    Patch,
    Window,
    WindowTile,
    access,
    accumulators,
    elements,
    flat_buffers,
    guarded_read,
    index,
    outside_bits,
    settled,
    started,
    widest,
    window_function,
    window_tiles,
)
from rescompile.backends.kernels import Argument
from rescompile.kinds import OpKind

_FLIGHT = 4  # loads of a thread that are in flight together
_INFINITY = float("inf")
_WORD = 4  # bytes


@dataclass(frozen=True)
class Pool:
    """max or avg over windows of x (batch, H, W, C); a mean counts padding as zeros, or not. `batch` None: dynamic."""

    kind: str
    batch: int | None
    window: Window
    count_include_pad: bool = True
    dtype: str = "float32"

    @property
    def flops(self) -> int | None:
        """One operation a tap; None where the batch is dynamic."""
        if self.batch is None:
            return None
        return self.batch * self.window.out_height * self.window.out_width * self.window.channels * self.window.taps


def refusal(spec: Pool, limits: object = None) -> str:
    """Why there is no kernel for the spec; empty when there is."""
    return "" if spec.dtype in SIZES else f"windows are not pooled in {spec.dtype}"


def candidates(spec: Pool, limits: object = None) -> list[WindowTile]:
    """Tiles; the first is the one to take where nothing can be timed."""
    return window_tiles(spec.window, spec.batch, spec.dtype, weights=False)


def arguments(spec: Pool) -> list[Argument]:
    """x, y."""
    return [
        Argument("x", spec.window.image(spec.batch), spec.dtype),
        Argument("y", spec.window.result(spec.batch), spec.dtype, output=True),
    ]


def prim_func(spec: Pool, tile: WindowTile, name: str) -> tvm.tirx.PrimFunc:
    """The kernel, its threads bound."""
    return window_function(name, arguments(spec), spec.window, spec.batch, tile, lambda patch: _emit(spec, patch))


def _emit(spec: Pool, patch: Patch) -> None:
    if spec.kind == "max" and not is_portable() and patch.tile.vector * SIZES[spec.dtype] % _WORD == 0:
        _maximum_in_words(spec, patch)
        return
    count, largest = patch.tile.vector, spec.kind == "max"
    start = -_INFINITY if largest else 0.0
    total = accumulators(patch, lambda _: const(start))
    held = local(len(patch.offsets) * count, spec.dtype)

    def join(i: Expr, at: int, slot: int) -> None:
        value = wide(held[slot * count + i])
        joined = scalar(OpKind.MAXIMUM, {}, [value, total[at + i]]) if largest else total[at + i] + value
        store(total, joined, at + i)

    def row(tap: Expr) -> None:
        patch.read_row("x", held, spec.dtype, tap, start)
        _each_tap(spec, patch, lambda pixel, slot: unrolled(count, lambda i: join(i, pixel * count, slot)))

    patch.rows(row)
    staged = local(count, spec.dtype)
    for pixel in range(patch.tile.columns):
        scale = None if largest else named(const(1.0) / _divisor(spec, patch, pixel))

        def finish(i: Expr, pixel: int = pixel, scale: Expr = scale) -> None:
            value = total[pixel * count + i]
            store(staged, (value if scale is None else value * scale[0]).astype(spec.dtype), i)

        unrolled(count, finish)
        patch.write_pixel("y", staged, pixel)


def _each_tap(spec: Pool, patch: Patch, body: Callable[[int, int], None]) -> None:
    for pixel in range(patch.tile.columns):
        for column in range(spec.window.kernel[1]):
            body(pixel, patch.slot(pixel, column))


def _maximum_in_words(spec: Pool, patch: Patch) -> None:
    """The same without float32: one instruction for a word of 32 bits, which holds two numbers of 16."""
    dtype, code = _MAXIMA[spec.dtype]
    words, columns = patch.tile.vector * SIZES[spec.dtype] // _WORD, patch.tile.columns
    held = local(len(patch.offsets) * patch.tile.vector, spec.dtype)
    total = local(columns * patch.tile.vector, spec.dtype)
    # A literal −∞ of 16 bits would be no valid CUDA: it is written as bits.
    bits = T.decl_buffer((columns * words,), "uint32", data=total.data)
    unrolled(columns * words, lambda i: store(bits, outside_bits(spec.dtype, -_INFINITY), i))
    best, seen = (
        T.decl_buffer((size * words,), dtype, data=of.data)
        for size, of in ((columns, total), (len(patch.offsets), held))
    )
    name = code.split("(")[0].split()[-1]

    def join(i: Expr, at: int, slot: int) -> None:
        joined = T.cuda.func_call(name, best[at + i], seen[slot * words + i], source_code=code, return_type=dtype)
        store(best, joined, at + i)

    def row(tap: Expr) -> None:
        patch.read_row("x", held, spec.dtype, tap, -_INFINITY)
        _each_tap(spec, patch, lambda pixel, slot: unrolled(words, lambda i: join(i, pixel * words, slot)))

    patch.rows(row)
    for pixel in range(columns):
        patch.write_pixel("y", total, pixel, pixel * patch.tile.vector)


def _maximum(name: str, kind: str, constraint: str, instruction: str) -> str:
    """A device function that keeps a NaN, which CUDA's own maximum drops."""
    operands = f'"={constraint}"(c) : "{constraint}"(a), "{constraint}"(b)'
    return (
        f"__device__ __forceinline__ {kind} {name}({kind} a, {kind} b) {{\n"
        f'  {kind} c;\n  asm("{instruction} %0, %1, %2;" : {operands});\n  return c;\n}}\n'
    )


_MAXIMA = {
    "float32": ("float32", _maximum("larger_f32", "float", "f", "max.NaN.f32")),
    "float16": ("uint32", _maximum("larger_f16x2", "unsigned", "r", "max.NaN.f16x2")),
    "bfloat16": ("uint32", _maximum("larger_bf16x2", "unsigned", "r", "max.NaN.bf16x2")),
}


def _divisor(spec: Pool, patch: Patch, pixel: int) -> Expr:
    """How many elements the mean of an output pixel divides by."""
    total = _counted(spec, 0, patch.row) * _counted(spec, 1, patch.column + pixel)
    return tvm.tirx.const(total, "float32") if isinstance(total, int) else total.astype("float32")


def _counted(spec: Pool, axis: int, position: Expr) -> Expr:
    window = spec.window
    size, before, after = (window.height, window.width)[axis], window.pads[axis], window.pads[axis + 2]
    low, high = (-before, size + after) if spec.count_include_pad else (0, size)
    first = position * window.stride[axis] - before
    last = (window.out_height, window.out_width)[axis] * window.stride[axis] - window.stride[axis] - before
    if -before >= low and last + window.kernel[axis] <= high:
        return window.kernel[axis]
    # A pixel past the row's end, which is not written, may have no element: it divides by one.
    end = tvm.tirx.min(first + window.kernel[axis], high)
    return tvm.tirx.max(end - tvm.tirx.max(first, low), 1)


# ---- the mean over all positions -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class GlobalMean:
    """y (batch, C) = mean of x (batch, positions, C) over the positions. `batch` None: dynamic."""

    batch: int | None
    positions: int
    channels: int
    dtype: str = "float32"

    @property
    def flops(self) -> int | None:
        """One addition an element; None where the batch is dynamic."""
        return None if self.batch is None else self.batch * self.positions * self.channels


@dataclass(frozen=True)
class MeanTile:
    """`vector` channels an access, `lanes` threads along the channels, `strands` along the positions."""

    vector: int
    lanes: int
    strands: int


class GlobalMeans:
    """The family of `GlobalMean`."""

    @staticmethod
    def refusal(spec: GlobalMean, limits: object = None) -> str:
        """Why there is no kernel for the spec; empty when there is."""
        return "" if spec.dtype in SIZES else f"positions are not averaged in {spec.dtype}"

    @staticmethod
    def candidates(spec: GlobalMean, limits: object = None) -> list[MeanTile]:
        """Tiles: lines of 128 bytes and more strands, or of 256."""
        count = widest(spec.channels, spec.dtype)
        found = []
        for line in (128, 256):
            lanes = 1
            while lanes < min(-(-spec.channels // count), line // (count * SIZES[spec.dtype])):
                lanes *= 2
            strands = 1
            while strands < min(spec.positions, 2 * THREADS // lanes):
                strands *= 2
            found.append(MeanTile(count, lanes, strands))
        return list(dict.fromkeys(found))

    @staticmethod
    def arguments(spec: GlobalMean) -> list[Argument]:
        """x, y."""
        return [
            Argument("x", (spec.batch, spec.positions, spec.channels), spec.dtype),
            Argument("y", (spec.batch, spec.channels), spec.dtype, output=True),
        ]

    @staticmethod
    def prim_func(spec: GlobalMean, tile: MeanTile, name: str) -> tvm.tirx.PrimFunc:
        """The kernel, its threads bound: a strand sums every so-many-th position; strands meet in shared memory."""
        blocks = -(-spec.channels // (tile.lanes * tile.vector))
        with IRBuilder() as builder, T.prim_func(s_tir=True), ExitStack() as threads:
            count = started(name, spec.batch)
            buffers = flat_buffers(GlobalMeans.arguments(spec), count)
            block = threads.enter_context(T.launch_thread("blockIdx.x", count * blocks))
            strand = threads.enter_context(T.launch_thread("threadIdx.y", tile.strands))
            lane = threads.enter_context(T.launch_thread("threadIdx.x", tile.lanes))
            unit = settled(index(block % blocks) * tile.lanes + lane)
            _mean(spec, tile, buffers, (block // blocks, strand, lane, unit))
        return builder.get()


def _mean(spec: GlobalMean, tile: MeanTile, buffers: dict[str, Expr], place: tuple[Expr, ...]) -> None:
    image, strand, lane, unit = place
    width, shape = tile.vector, (tile.strands, tile.lanes * tile.vector)
    ragged = spec.channels % (tile.lanes * tile.vector) != 0
    inside = unit * width < spec.channels if ragged else None
    total = local(width)
    unrolled(width, lambda i: store(total, const(0.0), i))
    held = local(_FLIGHT * width, spec.dtype)
    steps = -(-spec.positions // tile.strands)
    full = spec.positions // tile.strands

    def read(step: Expr, slot: int, *, sure: bool) -> None:
        position = step * tile.strands + strand
        tests = [] if inside is None else [inside]
        tests += [] if sure else [position < spec.positions]
        guarded_read(
            buffers["x"], image, position * (spec.channels // width) + unit, tests, held, spec.dtype, slot, width, 0.0
        )

    def add(slot: int) -> None:
        unrolled(width, lambda i: store(total, total[i] + wide(held[slot * width + i]), i))

    def group(first: Expr, size: int, *, sure: bool) -> None:
        for slot in range(size):
            read(first + slot, slot, sure=sure)
        for slot in range(size):
            add(slot)

    groups = full // _FLIGHT
    if groups:
        with T.serial(0, groups) as turn:
            group(turn * _FLIGHT, _FLIGHT, sure=True)
    done, left = groups * _FLIGHT, steps - groups * _FLIGHT
    if left // _FLIGHT:
        with T.serial(0, left // _FLIGHT) as turn:
            group(done + turn * _FLIGHT, _FLIGHT, sure=False)
    if left % _FLIGHT:
        group(done + left // _FLIGHT * _FLIGHT, left % _FLIGHT, sure=False)
    if tile.strands > 1:
        _meet(shape, total, strand, lane, width)
    staged = local(width, spec.dtype)
    inverse = const(1.0 / spec.positions)
    tests = [strand == 0] if tile.strands > 1 else []
    tests += [] if inside is None else [inside]
    with ExitStack() as guards:
        if tests:
            guards.enter_context(T.If(tvm.tirx.all(*tests)))
            guards.enter_context(T.Then())
        unrolled(width, lambda i: store(staged, (total[i] * inverse).astype(spec.dtype), i))
        at = elements(unit, width, image)
        access(width, at, lambda i: T.buffer_store(buffers["y"], staged[i], [image, at + i]))


def _meet(shape: tuple[int, int], total: Expr, strand: Expr, lane: Expr, width: int) -> None:
    """total = the sum over the strands, in the first of them: a tree in shared memory."""
    shared = T.alloc_buffer(shape, "float32", scope="shared")
    half = shape[0] // 2
    while half:
        with T.If(tvm.tirx.all(strand >= half, strand < 2 * half)), T.Then():
            vector(min(width, 4), lambda i: T.buffer_store(shared, total[i], [strand, lane * width + i]))
            if width > 4:
                vector(4, lambda i: T.buffer_store(shared, total[4 + i], [strand, lane * width + 4 + i]))
        T.evaluate(T.tvm_storage_sync("shared"))
        with T.If(strand < half), T.Then():

            def add(i: Expr, other: Expr = strand + half) -> None:
                store(total, total[i] + shared[other, lane * width + i], i)

            unrolled(width, add)
        half //= 2
