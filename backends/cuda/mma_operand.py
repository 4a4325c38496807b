"""One operand of an mma.sync contraction: global to shared memory by cp.async, from there to registers by ldmatrix.

A step of the operand lies in shared memory as it lies in global memory: rows along its outer axis with depth last, or
rows along depth with the outer axis last. Chunks of 16 bytes change places within a row by an exclusive or with bits of
the row's number, so that the eight rows that a matrix is read from lie in different banks.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import gcd
from typing import Any

import tvm
from tvm.tirx.script.builder import ir as T

from rescompile.backends.cuda.contraction import ACCESS, BYTES
from rescompile.backends.cuda.epilogue import guarded
from rescompile.backends.cuda.mma_source import ImageSource, MatrixSource
from rescompile.backends.cuda.rows import local, store
from rescompile.backends.cuda.scalars import literal

Expr = Any  # tvm.tirx expressions, buffers and Python integers alike


@dataclass(frozen=True)
class OperandTile:
    """`extent` rows (or columns) of a block, `each` of a warp, `depth` terms a step, of which a warp sums `steps`
    products of 32 bytes; `vector` elements a copy. `first`, `stride`: elements of shared memory, of a stage."""

    dtype: str
    left: bool
    depth_last: bool
    extent: int
    each: int
    depth: int
    steps: int
    vector: int
    threads: int
    first: int
    stride: int

    @property
    def size(self) -> int:
        """Bytes of an element."""
        return BYTES[self.dtype]

    @property
    def chunk(self) -> int:
        """Elements of 16 bytes."""
        return ACCESS // self.size

    @property
    def width(self) -> int:
        """Elements of a row in shared memory."""
        return self.depth if self.depth_last else self.extent

    @property
    def units(self) -> int:
        """Copies of a row."""
        return self.width // self.vector

    @property
    def copies(self) -> int:
        """Copies of a step, by all threads."""
        return self.extent * self.depth // self.vector

    @property
    def registers(self) -> int:
        """Words of a thread's fragments of one product."""
        return self.each // 4


class MmaOperand:
    """The code of one operand. `thread`, `lane`: of this thread; `warp`, `slice`: its warp's place along both axes."""

    def __init__(
        self,
        tile: OperandTile,
        shared: Expr,
        source: MatrixSource | ImageSource | None,
        thread: Expr,
        lane: Expr,
        warp: Expr,
        slice: Expr,
    ) -> None:
        self.tile, self.shared, self.source = tile, shared, source
        self.thread, self.lane, self.warp, self.slice = thread, lane, warp, slice
        if source is None:  # what another copies
            return
        accesses = -(-tile.copies // tile.threads)
        source.begin(accesses, tile.depth, tile.vector)
        self.units = [self._unit(index) for index in range(accesses)]
        for index, (row, element) in enumerate(self.units):
            source.place(index, row, element)

    def _unit(self, index: int) -> tuple[Expr, Expr]:
        """Row of the tile and element of the row that this thread's copy of that number begins with."""
        tile = self.tile
        if self._keeps_column:
            row = self.thread // tile.units + index * (tile.threads // tile.units)
            return row, self.thread % tile.units * tile.vector
        unit = self.thread + index * tile.threads
        return unit // tile.units, unit % tile.units * tile.vector

    @property
    def _keeps_column(self) -> bool:
        """Whether the threads copy whole rows at a time, so that each stays at its place in the row."""
        return self.tile.threads % self.tile.units == 0

    def copy(self, step: Expr, slot: Expr) -> None:
        """Issue this thread's copies of a step into a slot."""
        tile, source = self.tile, self.source
        if source is None:
            raise TypeError("an operand without a source copies nothing")
        for index, (row, element) in enumerate(self.units):
            if index == 0 or not self._keeps_column:
                source.advance(step, element)
            where, inside = source.access(index, row, element, step)
            to = tile.first + slot * tile.stride + self._swizzled(row, element)
            some = (index + 1) * tile.threads > tile.copies
            with guarded(self.thread + index * tile.threads < tile.copies if some else None):
                self._copy(to, source.buffer, where, inside)

    def _copy(self, to: Expr, buffer: Expr, where: Expr, inside: Expr) -> None:
        size = self.tile.vector * self.tile.size
        if size < 4:  # less than an asynchronous copy moves
            value = local(1, self.tile.dtype)
            store(value, buffer[where] if inside is None else self._or_zero(inside, buffer[where]), 0)
            word = T.reinterpret("uint16", value[0])
            T.evaluate(T.ptx["st.shared.b16"](self._address(to), word))
            return
        read = tvm.tirx.const(size, "uint32")
        if inside is not None:
            read = tvm.tirx.Select(inside, read, tvm.tirx.const(0, "uint32"))
        name = f"cp.async.{'cg' if size == ACCESS else 'ca'}.shared.global"
        T.evaluate(T.ptx[name](self._address(to), T.address_of(buffer[where]), size, read))

    def _address(self, element: Expr) -> Expr:
        return T.address_of(self.shared[element * self.tile.size])

    def _or_zero(self, inside: Expr, value: Expr) -> Expr:
        return T.if_then_else(inside, value, literal(0, self.tile.dtype))

    def _swizzled(self, row: Expr, element: Expr) -> Expr:
        """Where an element of a row lies in the tile."""
        tile = self.tile
        chunk = (element // tile.chunk) ^ self._bits(row)
        return row * tile.width + chunk * tile.chunk + element % tile.chunk

    def _bits(self, row: Expr) -> Expr:
        """What the numbers of a row's chunks are joined with by exclusive or."""
        chunks = self.tile.width // self.tile.chunk
        if self._words:
            return row % 4 * 2  # four rows are read at a time, two chunks of each
        # Of chunks in a row, as many as divide it change places: eight rows of as many chunks each fill all banks.
        turning = gcd(chunks, 8)
        return row // (8 // turning) % turning

    @property
    def _words(self) -> bool:
        """Whether fragments are read word by word: ldmatrix cannot turn matrices of 32-bit elements."""
        return self.tile.size == 4 and not self.tile.depth_last

    def load(self, registers: Expr, step: int, slot: Expr) -> None:
        """registers = the warp's fragments of one of the products that it sums in a slot."""
        if self._words:
            self._load_words(registers, step, slot)
            return
        tile, lane = self.tile, self.lane
        # Which row, of 16, and which chunk, of 2, a lane names: the order of a fragment's four matrices.
        by_half, by_quarter = (lane % 16, lane // 16), (lane // 16 * 8 + lane % 8, lane // 8 % 2)
        row, chunk = by_half if tile.left == tile.depth_last else by_quarter
        base = tile.first + slot * tile.stride
        for part in range(tile.each // 16):
            if tile.depth_last:
                # Powers of two: what is fixed for a lane is joined before what is fixed for a product.
                fixed = self._bits(row) ^ chunk ^ (self.slice * (2 * tile.steps))
                at = (self.warp * tile.each + part * 16 + row) * tile.width + (fixed ^ (2 * step)) * tile.chunk
            else:
                deep = (self.slice * tile.steps + step) * 16 + row
                across = self.warp * (tile.each // tile.chunk) + part * 2 + chunk
                at = deep * tile.width + (across ^ self._bits(row)) * tile.chunk
            name = f"ldmatrix.sync.aligned.m8n8.x4{'' if tile.depth_last else '.trans'}.shared.b16"
            into = [registers[part * 4 + i] for i in range(4)]
            T.evaluate(T.ptx[name](*into, self._address(base + at)))

    def _load_words(self, registers: Expr, step: int, slot: Expr) -> None:
        tile, lane = self.tile, self.lane
        base = tile.first + slot * tile.stride
        for part in range(tile.each // 8):
            column = self.warp * tile.each + part * 8 + lane // 4
            for high in range(2):
                row = (self.slice * tile.steps + step) * 8 + high * 4 + lane % 4
                # A fragment of 16 rows holds its halves of rows side by side, one of 8 columns its halves of depth.
                index = part // 2 * 4 + high * 2 + part % 2 if tile.left else part * 2 + high
                word = self._address(base + self._swizzled(row, column))
                T.evaluate(T.ptx["ld.shared.b32"](registers[index], word))

    def round(self, registers: Expr) -> None:
        """Round fragments of float32 to tf32, to nearest: the multiplication would cut them off."""
        if self.tile.size == 4:
            for index in range(self.tile.registers):
                value = T.reinterpret("float32", registers[index])
                T.evaluate(T.ptx["cvt.rna.tf32.f32"](registers[index], value))
