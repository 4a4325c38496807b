"""Contractions for sm_90a: TMA copies by one warpgroup, wgmma by the others, a ring of tiles between them.

    acc[s, i, j] = sum over k of a[s, i, k]·b[s, j, k]           y[s, i, j] = cast(program(acc, operands))

A block stays and takes tile after tile. Its first warpgroup only copies: stage after stage of a and b, 64 terms of the
sum each, into a ring in shared memory. The other warpgroups multiply. Each stage has two barriers: `full` (one arrival,
and the bytes of both tiles) and `empty` (one arrival of each warp that reads it).

Either two warpgroups share a tile, half of its rows each, or each has a tile of its own (`alternate`): they then take
turns with the tensor cores, and one's epilogue is hidden behind the other's products.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import tvm
from tvm.tirx.script.builder import ir as T

from rescompile.backends.cuda import hopper
from rescompile.backends.cuda.contraction import ACCESS, BYTES, NARROW, ContractionSpec, arguments
from rescompile.backends.cuda.epilogue import Call, Epilogue, contraction_function, guarded
from rescompile.backends.cuda.hopper import Panel
from rescompile.backends.cuda.targets import WARP, Architecture

__all__ = ["WgmmaTile", "arguments", "candidates", "prim_func", "refusal"]

Expr = Any

SM = "sm_90"

_WARPS = hopper.WARPGROUP // WARP
_GROUP = 8  # rows of tiles that are worked off together, column by column: what they read stays in the L2 cache
_PRODUCER_REGISTERS, _CONSUMER_REGISTERS = 40, 232  # 128·(40 + 2·232) is within a multiprocessor's 65,536
_STEP = 16  # terms of a wgmma
_STAGED = 32  # columns of the sums that a warp turns at once, in shared memory, from fragments to rows
_PITCH = _STAGED + 8  # elements: the rows of a fragment fall into different banks


@dataclass(frozen=True)
class WgmmaTile:
    """How a product is cut: rows and columns of a tile, stages of the ring, who computes it.

    `consumers` warpgroups share each tile, or have tiles of their own and alternate. `blocks` take tile after tile.
    """

    rows: int
    columns: int
    stages: int
    consumers: int = 2
    alternate: bool = False
    blocks: int = 132  # multiprocessors of an H100 or H200; with fewer, some begin late, with more, some stay empty

    @property
    def rows_each(self) -> int:
        """Rows that a warpgroup computes."""
        return self.rows if self.alternate else self.rows // self.consumers

    @property
    def threads(self) -> int:
        """Of a block."""
        return hopper.WARPGROUP * (1 + self.consumers)

    @property
    def stage_bytes(self) -> int:
        """A tile of a and a tile of b."""
        return (self.rows + self.columns) * hopper.SWIZZLE

    @property
    def shared_bytes(self) -> int:
        """Of a block: slack up to an atom's boundary, the ring, what the epilogue turns, barriers."""
        barriers = 2 * self.stages + (self.consumers if self.alternate else 0)
        return hopper.ATOM + self.stages * self.stage_bytes + self.turned_bytes + 8 * barriers

    @property
    def turned_bytes(self) -> int:
        """Of all warps' buffers in which sums become rows."""
        return self.consumers * _WARPS * 16 * _PITCH * 4


def refusal(spec: ContractionSpec, limits: Architecture) -> str:
    """Why this family cannot do it, one clause; empty when it can."""
    if limits.name != SM:
        return f"wgmma is {SM}a's"
    if spec.dtype not in NARROW:
        return f"its tiles are of 16-bit numbers, not of {spec.dtype}"
    if spec.conv is not None and (not spec.conv.is_product or spec.batch != 1):
        return "a convolution with taps, strides, borders or groups is gathered, not copied"
    whole = ACCESS // BYTES[spec.dtype]
    inner = {
        "a": spec.depth if spec.a_depth_last else spec.rows,
        "b": spec.depth if spec.b_depth_last else spec.columns,
    }
    for name, extent in inner.items():
        if extent is None or extent % whole:
            return f"the rows of {name} are not known to be multiples of {ACCESS} bytes"
    if spec.batch is None and (spec.a_share > 1 or spec.b_share > 1):
        return "with a dynamic batch matrices are shared by all products or by none"
    return ""


def candidates(spec: ContractionSpec, limits: Architecture) -> list[WgmmaTile]:
    """Tiles that are worth timing, the likeliest first; none where the family refuses."""
    if refusal(spec, limits):
        return []
    found = [tile for tile in _TILES if _fits(spec, tile)]
    return sorted(found, key=lambda tile: _expected(spec, tile))


_TILES = (
    WgmmaTile(128, 256, 4),
    WgmmaTile(256, 128, 4),
    WgmmaTile(128, 128, 6, alternate=True),
    WgmmaTile(64, 256, 5, alternate=True),
    WgmmaTile(128, 128, 6),
    WgmmaTile(64, 128, 8, alternate=True),
    WgmmaTile(128, 64, 8),
    WgmmaTile(64, 128, 6, consumers=1),
    WgmmaTile(64, 64, 8, consumers=1),
)


def _fits(spec: ContractionSpec, tile: WgmmaTile) -> bool:
    """Whether no half of the tile lies outside of the product: a smaller one does the same then."""
    rows = spec.rows is None or spec.rows > tile.rows // 2 or tile.rows == 64
    return rows and (spec.columns > tile.columns // 2 or tile.columns == 64)


def _expected(spec: ContractionSpec, tile: WgmmaTile) -> float:
    """Time in arbitrary units: full rounds over the multiprocessors, each as long as a tile's products and sides."""
    tiles = (spec.batch or 1) * -(-(spec.rows or 4096) // tile.rows) * -(-spec.columns // tile.columns)
    rounds = -(-tiles // tile.blocks)
    steps = -(-spec.depth // Panel.TERMS)
    # A step's products against the bytes of its tiles; the epilogue, which alternating warpgroups hide but once.
    products = tile.rows * tile.columns / 32
    copies = (tile.rows + tile.columns) * hopper.SWIZZLE / 38
    epilogue = tile.rows * tile.columns * 4 / 48
    hidden = 1 if tile.alternate else rounds
    return rounds * steps * max(products, copies) + hidden * epilogue


def prim_func(spec: ContractionSpec, tile: WgmmaTile, name: str) -> tvm.tirx.PrimFunc:
    """The kernel, with the tensor maps that its launch needs made on the host."""
    with contraction_function(spec, name) as call, ExitStack() as scope:
        kernel = _Kernel(spec, tile, call)
        kernel.launch(scope)
        kernel.body()
    return call.function


class _Kernel:
    """One kernel being emitted."""

    def __init__(self, spec: ContractionSpec, tile: WgmmaTile, call: Call) -> None:
        self.spec, self.tile, self.call = spec, tile, call
        self.a = Panel(tile.rows, spec.a_depth_last)
        self.b = Panel(tile.columns, spec.b_depth_last)
        self.steps = -(-spec.depth // Panel.TERMS)
        self.map_a = self._map("a", self.a, spec.a_share, call.rows)
        self.map_b = self._map("b", self.b, spec.b_share, spec.columns)

    def _map(self, name: str, panel: Panel, share: int, extent: Expr) -> Expr:
        spec = self.spec
        inner = [spec.depth, extent] if panel.depth_last else [extent, spec.depth]
        matrices = [self.call.batch // share] if self._apart(share) else []
        box = [*panel.box, *(1 for _ in matrices)]
        return hopper.tensor_map(f"map_{name}", self.call.buffers[name].data, spec.dtype, [*inner, *matrices], box)

    def _apart(self, share: int) -> bool:
        """Whether the operand has several matrices."""
        return share != 0 and self.spec.batch != 1

    def launch(self, scope: ExitStack) -> None:
        """Grid, threads, shared memory."""
        tile = self.tile
        self.columns_of_tiles = -(-self.spec.columns // tile.columns)
        rows_of_tiles = (self.call.rows + (tile.rows - 1)) // tile.rows
        tiles = rows_of_tiles * self.columns_of_tiles * self.call.batch
        most = tile.blocks
        grid = min(tiles, most) if isinstance(tiles, int) else tvm.tirx.min(tiles, tvm.tirx.const(most, "int64"))
        block = scope.enter_context(T.launch_thread("blockIdx.x", grid))
        self.thread = scope.enter_context(T.launch_thread("threadIdx.x", tile.threads))
        # Without it the assembler ignores setmaxnreg.
        scope.enter_context(T.attr(_int32(0), "tirx.launch_bounds_min_blocks_per_sm", _int32(1)))
        self.block = block.astype("int32")
        self.grid = grid if isinstance(grid, int) else grid.astype("int32")
        self.rows_of_tiles = _int32(rows_of_tiles)
        self.tiles = _int32(tiles)
        # One allocation: what TMA and wgmma do with it TVM does not see, and could not plan around.
        self.shared = T.alloc_buffer((tile.shared_bytes // 4,), "float32", scope="shared.dyn")
        window = T.cuda.cvta_generic_to_shared(self.shared.access_ptr("rw"))
        self.ring = _variable("uint32", (window + hopper.u32(hopper.ATOM - 1)) & hopper.u32(-hopper.ATOM & 0xFFFFFFFF))
        self.turned = _variable("uint32", self.ring[0] + hopper.u32(tile.stages * tile.stage_bytes))
        self.barriers = _variable("uint32", self.turned[0] + hopper.u32(tile.turned_bytes))

    def full(self, stage: Expr) -> Expr:
        """Address of the barrier of a stage's bytes."""
        return self.barriers[0] + stage.astype("uint32") * hopper.u32(8)

    def empty(self, stage: Expr) -> Expr:
        """Address of the barrier of a stage's readers."""
        return self.full(stage) + hopper.u32(8 * self.tile.stages)

    def turn_of(self, consumer: Expr) -> Expr:
        """Address of the barrier that says that a warpgroup may multiply its next tile."""
        return self.barriers[0] + hopper.u32(16 * self.tile.stages) + consumer.astype("uint32") * hopper.u32(8)

    def body(self) -> None:
        """All threads: barriers, then each warpgroup its role."""
        tile = self.tile
        readers = _WARPS * (1 if tile.alternate else tile.consumers)
        with guarded(self.thread == 0):
            for stage in range(tile.stages):
                at = _int32(stage)
                hopper.init_barrier(self.full(at), 1)
                hopper.init_barrier(self.empty(at), readers)
            for consumer in range(tile.consumers if tile.alternate else 0):
                hopper.init_barrier(self.turn_of(_int32(consumer)), _WARPS)
            hopper.publish_barriers()
            hopper.prefetch_map(self.map_a)
            hopper.prefetch_map(self.map_b)
        T.evaluate(T.tvm_storage_sync("shared"))
        limited = tile.consumers > 1
        with T.If(self.thread < hopper.WARPGROUP):
            with T.Then():
                if limited:
                    hopper.give_registers(_PRODUCER_REGISTERS)
                with guarded(self.thread == 0):
                    self.produce()
            with T.Else():
                if limited:
                    hopper.take_registers(_CONSUMER_REGISTERS)
                self.consume()

    def produce(self) -> None:
        """One thread: fill the ring, tile after tile."""
        tile = self.tile
        stage, phase = _variable("int32", 0), _variable("int32", 0)
        with T.serial(0, self._tiles_from(self.block, self.grid)) as turn:
            row, column, matrix = self._place(self.block + turn * self.grid)
            with T.serial(0, self.steps) as step:
                # In the first round nobody has read the stage: the wait for parity 1 passes at once.
                hopper.wait(self.empty(stage[0]), phase[0] ^ 1)
                hopper.expect_bytes(self.full(stage[0]), tile.stage_bytes)
                base = self.ring[0] + stage[0].astype("uint32") * hopper.u32(tile.stage_bytes)
                term = step * Panel.TERMS
                self.a.load(base, self.map_a, row, term, self._matrix(matrix, self.spec.a_share), self.full(stage[0]))
                self.b.load(
                    base + hopper.u32(self.a.bytes),
                    self.map_b,
                    column,
                    term,
                    self._matrix(matrix, self.spec.b_share),
                    self.full(stage[0]),
                )
                self._advance(stage, phase)

    def _matrix(self, matrix: Expr, share: int) -> list[Expr]:
        if not self._apart(share):
            return []
        return [matrix if share == 1 else matrix // share]

    def consume(self) -> None:
        """A warpgroup that multiplies: its tiles, their sums in registers, the epilogue."""
        tile = self.tile
        self.lane = lane = self.thread % WARP
        self.group = self.thread // hopper.WARPGROUP - 1
        self.warp = self.thread // WARP % _WARPS
        blocks = tile.rows_each // 64
        each = tile.columns // 2
        sums = T.alloc_buffer((blocks * each,), "float32", scope="local")
        stage, phase, last = _variable("int32", 0), _variable("int32", 0), _variable("int32", 0)
        first, stride = self.block, self.grid
        if tile.alternate:
            first, stride = self.block + self.group * self.grid, self.grid * tile.consumers
        with T.serial(0, self._tiles_from(first, stride)) as turn:
            row, column, matrix = self._place(first + turn * stride)
            if tile.alternate:
                # The ring holds the other warpgroups' stages, too. A wait by parity is right only for the phase that a
                # barrier is in or the one before: not until the others have seen all of their stages may this one
                # wait for its own. The first of them need not wait for its first tile (parity 1: a new barrier).
                hopper.wait(self.turn_of(self.group), (turn + tvm.tirx.Select(self.group == 0, 1, 0)) % 2)
                before = (turn * tile.consumers + self.group) * self.steps
                T.buffer_store(stage, before % tile.stages, [0])
                T.buffer_store(phase, before // tile.stages % 2, [0])
            with T.serial(0, self.steps) as step:
                hopper.wait(self.full(stage[0]), phase[0])
                base = self.ring[0] + stage[0].astype("uint32") * hopper.u32(tile.stage_bytes)
                own = 0 if tile.alternate else self.group * (tile.rows_each * hopper.SWIZZLE)
                start = base if tile.alternate else base + own.astype("uint32")
                self._multiply(sums, blocks, each, start, base + hopper.u32(self.a.bytes), step)
                hopper.commit_products()
                # The group before this one is done, and so is its reading: its stage may be filled again.
                hopper.await_products(1)
                with guarded(tvm.tirx.And(step > 0, lane == 0)):
                    hopper.arrive(self.empty(last[0]))
                T.buffer_store(last, stage[0], [0])
                self._advance(stage, phase)
            if tile.alternate:
                with guarded(lane == 0):
                    hopper.arrive(self.turn_of((self.group + 1) % tile.consumers))
            hopper.await_products(0)
            for index in range(blocks * each):
                hopper.hold(sums[index])
            with guarded(lane == 0):
                hopper.arrive(self.empty(last[0]))
            self._epilogue(sums, blocks, each, row, column, matrix)

    def _multiply(self, sums: Expr, blocks: int, each: int, a: Expr, b: Expr, step: Expr) -> None:
        """All products of a stage."""
        for index in range(blocks * each):
            hopper.hold(sums[index])
        hopper.begin_products()
        for part in range(Panel.TERMS // _STEP):
            for block in range(blocks):
                hopper.multiply(
                    self.spec.dtype,
                    [sums[block * each + index] for index in range(each)],
                    self.a.descriptor(a, block, part),
                    self.b.descriptor(b, 0, part),
                    (self.a, self.b),
                    tvm.tirx.const(True, "bool") if part else step > 0,
                )

    def _epilogue(self, sums: Expr, blocks: int, each: int, row: Expr, column: Expr, matrix: Expr) -> None:
        """From fragments to rows by way of shared memory, a warp for itself; then the program, 16 bytes an access."""
        tile, lane = self.tile, self.lane
        own = _variable("uint32", self.turned[0] + _bytes((self.group * _WARPS + self.warp) * (16 * _PITCH)))[0]
        epilogue = Epilogue(self.spec, self.call)
        lanes = _STAGED // epilogue.width  # that share a row
        turns = 16 * lanes // WARP
        values = T.alloc_buffer((epilogue.width,), "float32", scope="local")
        top = row + self.warp * 16 + (0 if tile.alternate else self.group * tile.rows_each)
        batch = self._wide(matrix)
        for block in range(blocks):
            for chunk in range(tile.columns // _STAGED):
                across = column + (chunk * _STAGED + lane % lanes * epilogue.width)
                downs = [top + (block * 64 + turn * (WARP // lanes)) + lane // lanes for turn in range(turns)]
                insides = [tvm.tirx.And(down < _int32(self.call.rows), across < self.spec.columns) for down in downs]
                places = [(batch, self._wide(down), self._wide(across)) for down in downs]
                # What the program reads is under way while the sums are turned.
                held = [epilogue.read(*place, inside) for place, inside in zip(places, insides, strict=True)]
                T.evaluate(T.cuda.warp_sync())
                for eight in range(_STAGED // 8):
                    for half in range(2):
                        to = (lane // 4 + half * 8) * _PITCH + eight * 8 + lane % 4 * 2
                        at = block * each + (chunk * _STAGED // 8 + eight) * 4 + half * 2
                        hopper.store_shared(own + _bytes(to), [sums[at], sums[at + 1]])
                T.evaluate(T.cuda.warp_sync())
                for turn in range(turns):
                    begin = (turn * (WARP // lanes) + lane // lanes) * _PITCH + lane % lanes * epilogue.width
                    count = min(epilogue.width, 4)
                    for start in range(0, epilogue.width, count):
                        read = [values[start + i] for i in range(count)]
                        hopper.load_shared(read, own + _bytes(begin + start))
                    epilogue.write(values, 0, held[turn], *places[turn], insides[turn])

    def _wide(self, index: Expr) -> Expr:
        """An index from which offsets are computed: 64 bits where the result may have 2^31 elements."""
        spec = self.spec
        small = spec.rows and spec.batch and spec.rows * spec.channels * spec.batch < 1 << 31
        return index if small else index.astype("int64")

    def _tiles_from(self, first: Expr, stride: Expr) -> Expr:
        """How many tiles there are at first, first + stride, ..."""
        return tvm.tirx.truncdiv(tvm.tirx.max(self.tiles - first, 0) + stride - 1, stride)

    def _place(self, number: Expr) -> tuple[Expr, Expr, Expr]:
        """First row, first column and matrix of a tile: groups of rows of tiles, within one column after column."""
        tile, columns, divide, rest = self.tile, self.columns_of_tiles, tvm.tirx.truncdiv, tvm.tirx.truncmod
        each = self.rows_of_tiles * columns
        matrix, inside = _int32(0), number
        if self.spec.batch != 1:
            matrix, inside = _variable("int32", divide(number, each))[0], rest(number, each)
        group = divide(inside, _int32(_GROUP * columns))
        high = tvm.tirx.min(self.rows_of_tiles - group * _GROUP, _GROUP)
        within = rest(inside, _int32(_GROUP * columns))
        row = _variable("int32", group * _GROUP + rest(within, high))
        column = _variable("int32", divide(within, high))
        # Multiplied in each place where they are used: there TVM has to see that accesses are aligned.
        return row[0] * tile.rows, column[0] * tile.columns, matrix

    def _advance(self, stage: Expr, phase: Expr) -> None:
        T.buffer_store(stage, stage[0] + 1, [0])
        with guarded(stage[0] == self.tile.stages):
            T.buffer_store(stage, 0, [0])
            T.buffer_store(phase, phase[0] ^ 1, [0])


def _variable(dtype: str, value: Expr) -> Expr:
    """A register with a first value; element 0 is it."""
    buffer = T.alloc_buffer((1,), dtype, scope="local")
    T.buffer_store(buffer, tvm.tirx.const(value, dtype) if isinstance(value, int) else value, [0])
    return buffer


def _int32(value: Expr) -> Expr:
    return tvm.tirx.const(value, "int32") if isinstance(value, int) else value.astype("int32")


def _bytes(elements: Expr) -> Expr:
    """An offset in float32 elements, in bytes of the window of shared memory."""
    return (elements * 4).astype("uint32")
