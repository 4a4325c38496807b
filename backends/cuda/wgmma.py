"""Contractions for sm_90a: TMA copies by one warpgroup, wgmma by the others, a ring of tiles between them.

    acc[s, i, j] = sum over k of a[s, i, k]·b[s, j, k]           y[s, i, j] = cast(program(acc, operands))

A block stays and takes tile after tile. Its first warpgroup only copies: stage after stage of a and b, 64 terms of the
sum each, into a ring in shared memory. The other warpgroups multiply. Each stage has two barriers: `full` (one arrival,
and the bytes of both tiles) and `empty` (one arrival of each warp that reads it).

Either two warpgroups share a tile, half of its rows each, or each has a tile of its own (`alternate`): they then take
turns with the tensor cores, and one's epilogue is hidden behind the other's products. The blocks of a `cluster` have
neighbouring tiles, one below the other, with the same tile of b: each copies a part of it to all of them.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import tvm
from tvm.tirx.script.builder import ir as T

from rescompile.backends.cuda import hopper
from rescompile.backends.cuda.contraction import ContractionSpec, arguments
from rescompile.backends.cuda.epilogue import Call, Epilogue, contraction_function, guarded
from rescompile.backends.cuda.hopper import Panel
from rescompile.backends.cuda.targets import WARP
from rescompile.backends.cuda.wgmma_rows import ImageRows, MatrixRows, several, shared_matrix
from rescompile.backends.cuda.wgmma_tiles import PITCH, STAGED, TURNED, WARPS, WgmmaTile, candidates, refusal

__all__ = ["WgmmaTile", "arguments", "candidates", "prim_func", "refusal"]

Expr = Any

_GROUP = 8  # rows of tiles that are worked off together, column by column: what they read stays in the L2 cache
_PRODUCER_REGISTERS, _CONSUMER_REGISTERS = 40, 232  # 128·(40 + 2·232) is within a multiprocessor's 65,536
_STEP = 16  # terms of a wgmma


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
        image = spec.conv is not None and not spec.conv.is_product
        self.rows: MatrixRows | ImageRows = (ImageRows if image else MatrixRows)(spec, tile.rows, call)
        self.a = self.rows.panel
        self.b = Panel(tile.columns, spec.b_depth_last)
        self.part_b = Panel(tile.columns // tile.cluster, spec.b_depth_last)  # that one block copies
        self.map_b = self._map_b()

    def _map_b(self) -> Expr:
        spec, box = self.spec, self.part_b.box
        data = self.call.buffers["b"].data
        if isinstance(self.rows, ImageRows):
            # An axis for the taps: where a tap's channels end, so does the box.
            extents = [self.rows.channels, self.rows.taps, spec.columns]
            return hopper.tensor_map("map_b", data, spec.dtype, extents, [box[0], 1, box[1]])
        inner = [spec.depth, spec.columns] if self.b.depth_last else [spec.columns, spec.depth]
        matrices = [self.call.batch // spec.b_share] if several(spec, spec.b_share) else []
        return hopper.tensor_map("map_b", data, spec.dtype, [*inner, *matrices], [*box, *(1 for _ in matrices)])

    def launch(self, scope: ExitStack) -> None:
        """Grid, threads, shared memory."""
        tile = self.tile
        self.columns_of_tiles = -(-self.spec.columns // tile.columns)
        # Of a cluster's tiles together: it takes them, and they are counted, as one.
        rows_of_tiles = (self.rows.tiles + (tile.cluster - 1)) // tile.cluster
        tiles = rows_of_tiles * self.columns_of_tiles * self.call.batch
        most = tile.blocks // tile.cluster
        grid = min(tiles, most) if isinstance(tiles, int) else tvm.tirx.min(tiles, tvm.tirx.const(most, "int64"))
        self.rank: Expr = _int32(0)
        if tile.cluster > 1:
            self.rank = scope.enter_context(T.launch_thread("clusterCtaIdx.x", tile.cluster))
        block = scope.enter_context(T.launch_thread("blockIdx.x", grid * tile.cluster))
        self.thread = scope.enter_context(T.launch_thread("threadIdx.x", tile.threads))
        # Without it the assembler ignores setmaxnreg.
        scope.enter_context(T.attr(_int32(0), "tirx.launch_bounds_min_blocks_per_sm", _int32(1)))
        self.block = (
            block.astype("int32") if tile.cluster == 1 else tvm.tirx.truncdiv(block.astype("int32"), tile.cluster)
        )
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
        readers = WARPS * (1 if tile.alternate else tile.consumers) * tile.cluster
        with guarded(self.thread == 0):
            for stage in range(tile.stages):
                at = _int32(stage)
                hopper.init_barrier(self.full(at), 1)
                hopper.init_barrier(self.empty(at), readers)
            for consumer in range(tile.consumers if tile.alternate else 0):
                hopper.init_barrier(self.turn_of(_int32(consumer)), WARPS)
            hopper.publish_barriers()
            hopper.prefetch_map(self.rows.map)
            hopper.prefetch_map(self.map_b)
        self.meet()
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
        if tile.cluster > 1:
            # No block may end while another one copies to it, or arrives at its barriers.
            T.evaluate(T.cuda.warp_sync())
            self.meet()

    def meet(self) -> None:
        """All threads of the block, or of the cluster."""
        T.evaluate(T.cuda.cluster_sync() if self.tile.cluster > 1 else T.tvm_storage_sync("shared"))

    def release(self, stage: Expr) -> None:
        """A warp: it has read a stage; its own block's copies may fill it, and those of the cluster's other blocks."""
        if self.tile.cluster == 1:
            with guarded(self.lane == 0):
                hopper.arrive(self.empty(stage))
            return
        with guarded(self.lane < self.tile.cluster):
            hopper.arrive_at(self.empty(stage), self.lane)

    def produce(self) -> None:
        """One thread: fill the ring, tile after tile."""
        tile = self.tile
        stage, phase = _variable("int32", 0), _variable("int32", 0)
        with T.serial(0, self._tiles_from(self.block, self.grid)) as turn:
            row, column, matrix = self._place(self.block + turn * self.grid)
            with T.serial(0, self.rows.steps) as step:
                # In the first round nobody has read the stage: the wait for parity 1 passes at once.
                hopper.wait(self.empty(stage[0]), phase[0] ^ 1, cluster=tile.cluster > 1)
                hopper.expect_bytes(self.full(stage[0]), self.rows.bytes + self.b.bytes)
                base = self.ring[0] + stage[0].astype("uint32") * hopper.u32(tile.stage_bytes)
                self.rows.load(base, row, step, matrix, self.full(stage[0]))
                part = tile.columns // tile.cluster
                to = base + hopper.u32(self.a.bytes) + (self.rank * (part * hopper.SWIZZLE)).astype("uint32")
                ctas = (1 << tile.cluster) - 1 if tile.cluster > 1 else 0
                start = column * tile.columns + self.rank * part
                if isinstance(self.rows, ImageRows):
                    channel, tap = self.rows.term(step)
                    hopper.load_box(to, self.map_b, [channel, tap, start], self.full(stage[0]), ctas)
                else:
                    rest = [shared_matrix(matrix, self.spec.b_share)] if several(self.spec, self.spec.b_share) else []
                    term = step * Panel.TERMS
                    self.part_b.load(to, self.map_b, start, term, rest, self.full(stage[0]), ctas)
                self._advance(stage, phase)

    def consume(self) -> None:
        """A warpgroup that multiplies: its tiles, their sums in registers, the epilogue."""
        tile = self.tile
        self.lane = lane = self.thread % WARP
        self.group = self.thread // hopper.WARPGROUP - 1
        self.warp = self.thread // WARP % WARPS
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
                before = (turn * tile.consumers + self.group) * self.rows.steps
                T.buffer_store(stage, before % tile.stages, [0])
                T.buffer_store(phase, before // tile.stages % 2, [0])
            # Zeroed here, and not by a first product that drops them: the epilogue then need not keep the old ones.
            for index in range(blocks * each):
                T.buffer_store(sums, tvm.tirx.const(0.0, "float32"), [index])
            with T.serial(0, self.rows.steps) as step:
                hopper.wait(self.full(stage[0]), phase[0], cluster=tile.cluster > 1)
                base = self.ring[0] + stage[0].astype("uint32") * hopper.u32(tile.stage_bytes)
                own = 0 if tile.alternate else self.group * (tile.rows_each * hopper.SWIZZLE)
                start = base if tile.alternate else base + own.astype("uint32")
                self._multiply(sums, blocks, each, start, base + hopper.u32(self.a.bytes))
                hopper.commit_products()
                # The group before this one is done, and so is its reading: its stage may be filled again.
                hopper.await_products(1)
                with guarded(step > 0):
                    self.release(last[0])
                T.buffer_store(last, stage[0], [0])
                self._advance(stage, phase)
            if tile.alternate:
                with guarded(lane == 0):
                    hopper.arrive(self.turn_of((self.group + 1) % tile.consumers))
            hopper.await_products(0)
            for index in range(blocks * each):
                hopper.hold(sums[index])
            self.release(last[0])
            self._epilogue(sums, blocks, each, row, column, matrix)

    def _multiply(self, sums: Expr, blocks: int, each: int, a: Expr, b: Expr) -> None:
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
                    tvm.tirx.const(True, "bool"),
                )

    def _epilogue(self, sums: Expr, blocks: int, each: int, row: Expr, column: Expr, matrix: Expr) -> None:
        """From fragments to rows by way of shared memory, a warp for itself; then the program, 16 bytes an access."""
        tile, lane = self.tile, self.lane
        own = _variable("uint32", self.turned[0] + ((self.group * WARPS + self.warp) * TURNED).astype("uint32"))[0]
        epilogue = Epilogue(self.spec, self.call)
        lanes = STAGED // epilogue.width  # that share a row
        turns = 16 * lanes // WARP
        values = T.alloc_buffer((epilogue.width,), "float32", scope="local")
        top = self.warp * 16 + (0 if tile.alternate else self.group * tile.rows_each)
        chunks = [(block, chunk) for block in range(blocks) for chunk in range(tile.columns // STAGED)]

        def places(block: int, chunk: int) -> list[tuple[Expr, Expr, Expr]]:
            across = column * tile.columns + (chunk * STAGED + lane % lanes * epilogue.width)
            found = []
            for turn in range(turns):
                down, inside = self.rows.place(row, top + (block * 64 + turn * (WARP // lanes)) + lane // lanes)
                found.append((down, across, tvm.tirx.And(inside, across < self.spec.columns)))
            return found

        # Addresses that come out of shared memory after a barrier: else the assembler begins the reads of all parts at
        # once, and spills the sums to hold what they bring.
        position = (self.row, self.column)
        for index, value in enumerate(position):
            hopper.store_index(own + hopper.u32(TURNED - 8 + 4 * index), value[0])
        following = self._read(epilogue, matrix, places(*chunks[0]))
        for number, (block, chunk) in enumerate(chunks):
            held = following
            T.evaluate(T.cuda.warp_sync())
            for eight in range(STAGED // 8):
                for half in range(2):
                    to = (lane // 4 + half * 8) * PITCH + eight * 8 + lane % 4 * 2
                    at = block * each + (chunk * STAGED // 8 + eight) * 4 + half * 2
                    hopper.store_shared(own + _bytes(to), [sums[at], sums[at + 1]])
            T.evaluate(T.cuda.warp_sync())
            if number + 1 < len(chunks):
                # What the next part's program reads is under way while this part is computed.
                for index, value in enumerate(position):
                    hopper.load_index(value[0], own + hopper.u32(TURNED - 8 + 4 * index))
                following = self._read(epilogue, matrix, places(*chunks[number + 1]))
            for turn, (down, across, inside) in enumerate(places(block, chunk)):
                begin = (turn * (WARP // lanes) + lane // lanes) * PITCH + lane % lanes * epilogue.width
                count = min(epilogue.width, 4)
                for start in range(0, epilogue.width, count):
                    into = [values[start + i] for i in range(count)]
                    hopper.load_shared(into, own + _bytes(begin + start))
                place = (self._wide(matrix), self._wide(down), self._wide(across))
                epilogue.write(values, 0, held[turn], *place, inside)

    def _read(self, epilogue: Epilogue, matrix: Expr, places: list[tuple[Expr, Expr, Expr]]) -> list[list[Expr]]:
        """What the program reads for these rows, from top to bottom; what they share once.

        Outside of the result the last row's, or columns', in its place: registers that are left as they were would be
        kept, for all parts, from tile to tile.
        """
        read: list[list[Expr]] = []
        for down, across, _ in places:
            row = tvm.tirx.min(down, _int32(self.call.rows) - 1)
            column = tvm.tirx.min(across, self.spec.columns - epilogue.width)
            place = (self._wide(matrix), self._wide(row), self._wide(column))
            read.append(epilogue.read(*place, above=read[0] if read else ()))
        return read

    def _wide(self, index: Expr) -> Expr:
        """An index from which offsets are computed: 64 bits where the result may have 2^31 elements."""
        spec = self.spec
        small = spec.rows and spec.batch and spec.rows * spec.channels * spec.batch < 1 << 31
        return index if small else index.astype("int64")

    def _tiles_from(self, first: Expr, stride: Expr) -> Expr:
        """How many tiles there are at first, first + stride, ..."""
        return tvm.tirx.truncdiv(tvm.tirx.max(self.tiles - first, 0) + stride - 1, stride)

    def _place(self, number: Expr) -> tuple[Expr, Expr, Expr]:
        """Row and column of a tile, in tiles, and its matrix: groups of rows, within them column after column."""
        tile, columns, divide, rest = self.tile, self.columns_of_tiles, tvm.tirx.truncdiv, tvm.tirx.truncmod
        each = self.rows_of_tiles * columns
        matrix, inside = _int32(0), number
        if self.spec.batch != 1:
            matrix, inside = _variable("int32", divide(number, each))[0], rest(number, each)
        group = divide(inside, _int32(_GROUP * columns))
        high = tvm.tirx.min(self.rows_of_tiles - group * _GROUP, _GROUP)
        within = rest(inside, _int32(_GROUP * columns))
        self.row = _variable("int32", (group * _GROUP + rest(within, high)) * tile.cluster + self.rank)
        self.column = _variable("int32", divide(within, high))
        # In tiles: TVM has to see where they are used that accesses are aligned.
        return self.row[0], self.column[0], matrix

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
