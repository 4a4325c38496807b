"""Windows that slide over NHWC images on a GPU: their geometry, how the work is cut, one thread's share of it.

A thread has `vector` neighbouring channels of `columns` neighbouring pixels of one output row: an input pixel is read
once for all of the windows of the thread that hold it, by one access of up to 128 bits. The threads of a block lie side
by side along the channels, then along a row and down a column, so that what their windows share is in the L1 cache.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from math import prod
from typing import Any

import tvm
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script.builder import ir as T

from rescompile.backends.cuda.rows import Expr, local, store, unrolled, vector
from rescompile.backends.cuda.scalars import dtype_of, widest_lanes
from rescompile.backends.kernels import Argument
from rescompile.errors import RescompileError

Pair = tuple[int, int]

SIZES = {"float32": 4, "float16": 2, "bfloat16": 2}
ACCESS = 16  # bytes: the widest load and store
THREADS = 128  # of a block
_LINE = 128  # bytes that a block's threads read side by side where there are as many channels: a cache line
_ACCUMULATORS = 64  # of a thread, at most
_FEW_TAPS = 9  # up to which memory is what limits: then half of them, for twice the threads
_FILL = 1 << 17  # threads below which a GPU is not full: then a thread gets less work
_ROLLED = 5  # taps below each other from which they are a loop: the code of 7x7 would not fit into the caches
_INT32 = 1 << 31
# 32 bits of what stands for an element outside of the image.
_BITS = {
    **{(dtype, 0.0): 0 for dtype in SIZES},
    ("float32", -float("inf")): 0xFF800000,
    ("float16", -float("inf")): 0xFC00FC00,
    ("bfloat16", -float("inf")): 0xFF80FF80,
}


@dataclass(frozen=True)
class Window:
    """out[i, j] = f(in[i*s - p + k*d, ...] for k in kernel): extents of the image and of what slides over it.

    `ceil` lets the last window reach past the padding, as torch's pools do. RescompileError when there is no output.
    """

    height: int
    width: int
    channels: int
    kernel: Pair
    stride: Pair = (1, 1)
    pads: tuple[int, int, int, int] = (0, 0, 0, 0)  # top, left, bottom, right
    dilation: Pair = (1, 1)
    ceil: bool = False

    def __post_init__(self) -> None:
        if min(self.out_height, self.out_width, self.channels, *self.stride, *self.dilation) < 1:
            raise RescompileError(f"The window {self} has no output; check input size, kernel, pads and strides.")

    @property
    def out_height(self) -> int:
        """Output rows."""
        return self._extent(0)

    @property
    def out_width(self) -> int:
        """Output columns."""
        return self._extent(1)

    @property
    def taps(self) -> int:
        """Elements of a window."""
        return prod(self.kernel)

    def _extent(self, axis: int) -> int:
        size, before, after = (self.height, self.width)[axis], self.pads[axis], self.pads[axis + 2]
        spare = size + before + after - (self.kernel[axis] - 1) * self.dilation[axis] - 1
        stride = self.stride[axis]
        count = (-(-spare // stride) if self.ceil else spare // stride) + 1
        # torch: a window rounded up must still start inside the input or the padding before it.
        return count - 1 if self.ceil and (count - 1) * stride >= size + before else count

    def image(self, batch: int | None) -> tuple[int | None, ...]:
        """The shape of the input."""
        return batch, self.height, self.width, self.channels

    def result(self, batch: int | None) -> tuple[int | None, ...]:
        """The shape of the output."""
        return batch, self.out_height, self.out_width, self.channels


@dataclass(frozen=True)
class WindowTile:
    """`vector` channels and `columns` pixels a thread; `lanes` threads along channels, `across` a row, `down` rows."""

    vector: int
    columns: int
    lanes: int
    across: int
    down: int


def widest(channels: int, dtype: str) -> int:
    """Channels that one access can move."""
    count = min(ACCESS // SIZES[dtype], widest_lanes())
    while channels % count:
        count //= 2
    return count


def window_tiles(window: Window, batch: int | None, dtype: str, *, weights: bool) -> list[WindowTile]:
    """Tiles from the best by a count of what is read, to others worth timing; `weights` are read for each tap, too."""
    width = widest(window.channels, dtype)
    lanes = 1
    while lanes < min(-(-window.channels // width), max(1, _LINE // (width * SIZES[dtype]))):
        lanes *= 2
    scored = []
    for columns in (1, 2, 3, 4, 5, 6, 7, 8):
        held = columns * width * (2 if window.taps <= _FEW_TAPS else 1)
        if held > _ACCUMULATORS or columns > window.out_width:
            continue
        groups = -(-window.out_width // columns)
        distinct = len(
            {p * window.stride[1] + k * window.dilation[1] for p in range(columns) for k in _taps(window, 1)}
        )
        # Neighbours along the image read the same weights: an access of them is a quarter of one of pixels.
        loads = window.kernel[0] * (distinct + (window.kernel[1] / 4 if weights else 0)) + columns
        threads = (batch or 32) * window.out_height * groups * (window.channels // width)
        wasted = max(1.0, _FILL / threads) ** 0.5
        scored.append((groups * loads * wasted, columns))
    return [_tile(window, width, columns, lanes) for _, columns in sorted(scored)[:3]]


def _tile(window: Window, width: int, columns: int, lanes: int) -> WindowTile:
    groups, left = -(-window.out_width // columns), THREADS // lanes
    across = 1
    while across < min(groups, 4, left):
        across *= 2
    down = 1
    while down < min(window.out_height, left // across):
        down *= 2
    return WindowTile(width, columns, lanes, across, down)


def _taps(window: Window, axis: int) -> range:
    return range(window.kernel[axis])


class Patch:
    """One thread's outputs: `columns` pixels from (`row`, `column`) on, `vector` channels from `channel` on."""

    def __init__(self, window: Window, tile: WindowTile, buffers: dict[str, Expr], place: Sequence[Expr]) -> None:
        self.window, self.tile, self.buffers = window, tile, buffers
        self.image, self.row, self.column, self.channel = place
        top, left = self.row * window.stride[0] - window.pads[0], self.column * window.stride[1] - window.pads[1]
        self._wide = window.channels // tile.vector  # accesses of a pixel
        unit = tvm.tirx.floordiv(self.channel, tile.vector)
        self._from = settled((top * window.width + left) * self._wide + unit)
        self._to = settled((self.row * window.out_width + self.column) * self._wide + unit)
        self.offsets = sorted(
            {p * window.stride[1] + k * window.dilation[1] for p in range(tile.columns) for k in _taps(window, 1)}
        )

    def slot(self, pixel: int, tap: int) -> int:
        """Where `read_row` put the input of a pixel's tap."""
        return self.offsets.index(pixel * self.window.stride[1] + tap * self.window.dilation[1])

    def rows(self, body: Callable[[Expr], None]) -> None:
        """body(tap) for each row of the window: written out where it is short."""
        if self.window.kernel[0] < _ROLLED:
            for tap in _taps(self.window, 0):
                body(tap)
            return
        with T.serial(0, self.window.kernel[0]) as tap:
            body(tap)

    def read_row(self, name: str, into: Expr, dtype: str, tap: Expr, outside: float) -> None:
        """into = the input pixels of one row of the thread's windows, `outside` (0 or −∞) where there are none."""
        window = self.window
        line = self.row * window.stride[0] + tap * window.dilation[0] - window.pads[0]
        first = self.column * window.stride[1] - window.pads[1]
        down = tap * (window.dilation[0] * window.width * self._wide)
        start = settled(self._from + down) if not isinstance(tap, int) else self._from + down
        lines = self._inside(line, 0)
        for slot, offset in enumerate(self.offsets):
            tests = [*lines, *self._inside(first + offset, 1, offset)]
            at = start + offset * self._wide
            guarded_read(self.buffers[name], self.image, at, tests, into, dtype, slot, self.tile.vector, outside)

    def read_channels(self, name: str, into: Expr, slot: Expr, row: Expr = 0) -> None:
        """into[slot] = what the thread's channels have in a row of a (rows, channels) matrix."""
        count, at = self.tile.vector, row * self.window.channels + self.channel
        vector(count, lambda i: store(into, self.buffers[name][0, at + i], slot * count + i))

    def read_pixel(self, name: str, into: Expr, pixel: int) -> None:
        """into[pixel] = an element of the output's shape; nothing past the row's end."""
        self._at_pixel(
            pixel, lambda at, i: store(into, self.buffers[name][self.image, at + i], pixel * self.tile.vector + i)
        )

    def write_pixel(self, name: str, source: Expr, pixel: int, first: int = 0) -> None:
        """The output's pixel = source from `first` on; nothing past the row's end."""
        target = self.buffers[name]
        self._at_pixel(pixel, lambda at, i: T.buffer_store(target, source[first + i], [self.image, at + i]))

    def _at_pixel(self, pixel: int, body: Callable[[Expr, Expr], None]) -> None:
        window = self.window
        at = elements(self._to + pixel * self._wide, self.tile.vector, self.image)
        with ExitStack() as guards:
            if pixel and window.out_width % self.tile.columns:
                guards.enter_context(T.If(self.column + pixel < window.out_width))
                guards.enter_context(T.Then())
            access(self.tile.vector, at, lambda i: body(at, i))

    def _inside(self, at: Expr, axis: int, offset: int | None = None) -> list[Expr]:
        """Tests whether a coordinate is in the image; none where it must be."""
        window = self.window
        size, pad, stride = (window.height, window.width)[axis], window.pads[axis], window.stride[axis]
        tests = []
        if pad and (offset is None or offset < pad):
            tests.append(at >= 0)
        if axis:
            starts = -(-window.out_width // self.tile.columns) * self.tile.columns - self.tile.columns
            last = starts * stride + (offset or 0) - pad
        else:
            last = (window.out_height - 1) * stride + (window.kernel[0] - 1) * window.dilation[0] - pad
        return [*tests, at < size] if last >= size else tests


def window_function(
    name: str,
    arguments: Sequence[Argument],
    window: Window,
    batch: int | None,
    tile: WindowTile,
    body: Callable[[Patch], None],
) -> tvm.tirx.PrimFunc:
    """A kernel, its threads bound, whose `body` emits the work of one thread; a batch of None is read at run time."""
    spans = (tile.lanes * tile.vector, tile.across * tile.columns, tile.down)
    parts = [
        -(-size // span)
        for size, span in zip((window.channels, window.out_width, window.out_height), spans, strict=True)
    ]
    with IRBuilder() as builder, T.prim_func(s_tir=True), ExitStack() as threads:
        count = started(name, batch)
        buffers = flat_buffers(arguments, count)
        block = threads.enter_context(T.launch_thread("blockIdx.x", count * prod(parts)))
        down = threads.enter_context(T.launch_thread("threadIdx.z", tile.down))
        across = threads.enter_context(T.launch_thread("threadIdx.y", tile.across))
        lane = threads.enter_context(T.launch_thread("threadIdx.x", tile.lanes))
        here = index(block % prod(parts))
        image = block // prod(parts)
        channel = (here % parts[0] * tile.lanes + lane) * tile.vector
        column = (here // parts[0] % parts[1] * tile.across + across) * tile.columns
        row = here // (parts[0] * parts[1]) * tile.down + down
        extents = (window.channels, window.out_width, window.out_height)
        places = (channel, column, row)
        tests = [at < size for at, size, span in zip(places, extents, spans, strict=True) if size % span]
        if tests:
            threads.enter_context(T.If(tvm.tirx.all(*tests)))
            threads.enter_context(T.Then())
        body(Patch(window, tile, buffers, (image, row, column, channel)))
    return builder.get()


def started(name: str, batch: int | None) -> Expr:
    """Attributes of the function that is being built; its number of images."""
    T.func_name(name)
    T.func_attr({"global_symbol": name, "tirx.noalias": True, "op_pattern": 8, "tirx.is_scheduled": True})
    return tvm.tirx.Var("images", "int64") if batch is None else batch


def flat_buffers(arguments: Sequence[Argument], count: Expr) -> dict[str, Expr]:
    """Parameters of the function, as matrices with a row for each image; one without images has a row only."""
    found = {}
    parameters = []
    for argument in arguments:
        shape = [count if extent is None else extent for extent in argument.shape]
        parameters.append((argument, shape, T.arg(argument.name, T.buffer(shape, argument.dtype))))
    for argument, shape, given in parameters:
        batched = argument.shape[0] is None or len(argument.shape) > 2 or argument.output
        inner = [int(extent or 1) for extent in argument.shape[batched:]]
        lead = shape[0] if batched else 1
        # Beyond 2^31 elements an index is of 64 bits, as it is where the number of images is not known.
        if isinstance(lead, int) and lead * prod(inner) >= _INT32:
            lead = tvm.tirx.const(lead, "int64")
        view = T.decl_buffer((lead, prod(inner)), argument.dtype, data=given.data)
        IRBuilder.name(argument.name, view)
        found[argument.name] = view
    return found


def settled(value: Expr) -> Expr:
    """A 32-bit number that is computed once: a sum of several 64-bit terms makes compilers split an access to it."""
    kept = local(1, "int32")
    store(kept, value, 0)
    return kept[0]


def elements(units: Expr, count: int, image: Expr) -> Expr:
    """`units` accesses as elements, in the type that images are numbered in: it shows that they are a multiple."""
    return units.astype(dtype_of(image)) * count


def access(count: int, at: Expr, body: Callable[[Expr], None]) -> None:
    """One access of `count` elements from `at` on, whose type the elements' numbers have, too."""
    if count == 1:
        body(0)
        return
    dtype = dtype_of(at)
    with T.vectorized(tvm.tirx.const(0, dtype), tvm.tirx.const(count, dtype)) as i:
        body(i)


def index(value: Expr) -> Expr:
    """The number in 32 bits: within an image there is no need for more."""
    return value if isinstance(value, int) else value.astype("int32")


def guarded_read(
    source: Expr,
    image: Expr,
    units: Expr,
    tests: Sequence[Expr],
    into: Expr,
    dtype: str,
    slot: int,
    count: int,
    outside: float,
) -> None:
    """into[slot] = the access of source[image] after `units` others, or `outside` (0 or −∞) where a test fails.

    Without a branch, so that loads do not wait for each other: what is read in vain is the image's first element, and
    its bits are masked.
    """
    if tests:
        inside = tvm.tirx.all(*tests)
        units = settled(tvm.tirx.Select(inside, units, 0))
    at = elements(units, count, image)
    access(count, at, lambda i: store(into, source[image, at + i], slot * count + i))
    if not tests:
        return
    size = SIZES[dtype] * count
    word = "uint32" if size % 4 == 0 else "uint16"
    words = size // (4 if word == "uint32" else 2)
    bits = T.decl_buffer((into.shape[0] * SIZES[dtype] // (size // words),), word, data=into.data)
    mask = local(1, word)
    store(mask, tvm.tirx.Select(inside, tvm.tirx.const(2 ** int(word[4:]) - 1, word), tvm.tirx.const(0, word)), 0)
    filler = outside_bits(dtype, outside, word)

    def masked(i: Expr) -> None:
        kept = bits[slot * words + i] & mask[0]
        store(bits, kept | (filler & ~mask[0]) if outside else kept, slot * words + i)

    unrolled(words, masked)


def outside_bits(dtype: str, outside: float, word: str = "uint32") -> Expr:
    """0 or −∞ as bits; twice, where a word has room for two."""
    return tvm.tirx.const(_BITS[dtype, outside] % 2 ** int(word[4:]), word)


def accumulators(patch: Patch, start: Callable[[Expr], Expr]) -> Any:
    """Float32 registers for every output of the thread, `start(i)` in channel i of each."""
    total = local(patch.tile.columns * patch.tile.vector)
    for pixel in range(patch.tile.columns):

        def begin(i: Expr, first: int = pixel * patch.tile.vector) -> None:
            store(total, start(i), first + i)

        unrolled(patch.tile.vector, begin)
    return total
