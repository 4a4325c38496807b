"""Contractions on tensor cores by mma.sync, for sm_80 and later: a kernel family (see `contraction` for what they are).

Steps of both operands go to shared memory by asynchronous copies, several in flight; a warp loads the fragments of the
next product while it multiplies this one. Sums go through shared memory to the epilogue, so that each thread reads,
computes and writes neighbouring columns of a row.
"""

from __future__ import annotations

from contextlib import ExitStack
from math import prod
from typing import Any

import tvm
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script.builder import ir as T

from rescompile.backends.cuda.contraction import ContractionSpec, arguments
from rescompile.backends.cuda.epilogue import Call, Epilogue, contraction_function, guarded
from rescompile.backends.cuda.mma_operand import MmaOperand, OperandTile
from rescompile.backends.cuda.mma_source import ImageSource, MatrixSource, as_kind
from rescompile.backends.cuda.mma_tiles import WARP, MmaTile, candidates, refusal
from rescompile.backends.cuda.rows import local, store, unrolled
from rescompile.backends.cuda.scalars import literal

__all__ = ["MmaTile", "arguments", "candidates", "prim_func", "refusal"]

Expr = Any  # tvm.tirx expressions, buffers and Python integers alike

_NAMES = {
    "float16": "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32",
    "bfloat16": "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32",
    "float32": "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32",
}
_GROUP = 8  # blocks of neighbouring rows that run together: they read the same columns while L2 holds them
_LARGEST = 1 << 31


def prim_func(spec: ContractionSpec, tile: MmaTile, name: str) -> tvm.tirx.PrimFunc:
    """The kernel, its threads bound; an extent of None is read from the buffers' shape at run time."""
    with contraction_function(spec, name) as call, ExitStack() as threads:
        down = _blocks(call.rows, tile.rows)
        across = -(-spec.columns // tile.columns)
        count = call.batch * down * across
        block = threads.enter_context(T.launch_thread("blockIdx.x", count))
        thread = threads.enter_context(T.launch_thread("threadIdx.x", tile.threads))
        _Block(spec, tile, call, block, thread, down, across).emit()
    return call.function


def _blocks(rows: Expr, each: int) -> Expr:
    return (rows + each - 1) // each


class _Block:
    """The code of one thread block."""

    def __init__(
        self, spec: ContractionSpec, tile: MmaTile, call: Call, block: Expr, thread: Expr, down: Expr, across: int
    ) -> None:
        self.spec, self.tile, self.call, self.thread = spec, tile, call, thread
        self.lane, warp = thread % WARP, thread // WARP
        warps = tile.warps
        self.warp_row, self.warp_column = warp % warps[0], warp // warps[0] % warps[1]
        self.warp_slice = warp // (warps[0] * warps[1])
        self.warp = warp
        self.wide = _wide(spec)
        # Computed once: these are divisions by what only the run knows.
        places = local(3, "int32")
        for index, value in enumerate(_place(block, down, across)):
            store(places, value if isinstance(value, int) else value.astype("int32"), index)
        self.batch = places[0] if spec.batch != 1 else 0
        self.first_row, self.first_column = places[1] * tile.rows, places[2] * tile.columns

    def emit(self) -> None:
        """The whole kernel."""
        spec, tile = self.spec, self.tile
        # Bytes: kernels of one source may differ in their types, and dynamic shared memory is one array for all.
        self.shared = T.alloc_buffer((tile.shared_bytes(spec.dtype),), "uint8", scope="shared.dyn")
        IRBuilder.name("staged", self.shared)
        left, right = self._operands()
        sums_each = tile.warp_rows * tile.warp_columns // WARP
        self.sums = local(sums_each)
        unrolled(sums_each, lambda i: store(self.sums, literal(0.0, "float32"), i))
        self._main_loop(left, right)
        _wait(0)
        self._finish()

    # ---- operands --------------------------------------------------------------------------------------------------

    def _operands(self) -> tuple[MmaOperand, MmaOperand]:
        spec, tile, call, wide = self.spec, self.tile, self.call, self.wide
        vectors = spec.vectors
        steps = tile.depth // (16 if spec.dtype != "float32" else 8) // tile.warps[2]
        stages = tile.stages

        def made(left: bool) -> OperandTile:
            extent = tile.rows if left else tile.columns
            return OperandTile(
                spec.dtype,
                left,
                spec.a_depth_last if left else spec.b_depth_last,
                extent,
                tile.warp_rows if left else tile.warp_columns,
                tile.depth,
                steps,
                min(vectors[0 if left else 1], tile.depth),
                tile.threads,
                0 if left else stages * tile.rows * tile.depth,
                extent * tile.depth,
            )

        self.steps = steps
        a: MatrixSource | ImageSource
        if spec.conv is not None and not (spec.conv.is_product and spec.groups == 1):
            a = ImageSource(spec, call.buffers["a"], self.batch, self.first_row, call.rows, wide)
        else:
            a = MatrixSource(
                call.buffers["a"],
                self._matrix(spec.a_share, call.rows * spec.depth, wide),
                self.first_row,
                call.rows,
                spec.depth,
                spec.a_depth_last,
                wide,
            )
        b = MatrixSource(
            call.buffers["b"],
            self._matrix(spec.b_share, spec.columns * spec.depth, wide),
            self.first_column,
            spec.columns,
            spec.depth,
            spec.b_depth_last,
            wide,
        )
        # All threads know the warp: what is told by it is kept in registers that they share.
        place = (self.thread, self.lane)
        return (
            MmaOperand(made(True), self.shared, a, *place, self.warp_row, self.warp_slice),
            MmaOperand(made(False), self.shared, b, *place, self.warp_column, self.warp_slice),
        )

    def _matrix(self, share: int, size: Expr, wide: bool) -> Expr:
        """Where the matrix of this block's product begins."""
        if share == 0 or self.spec.batch == 1:
            return 0
        number: Expr = self.batch if share == 1 else self.batch // share
        return number.astype("int64" if wide else "int32") * size

    # ---- main loop -------------------------------------------------------------------------------------------------

    def _main_loop(self, left: MmaOperand, right: MmaOperand) -> None:
        tile, stages = self.tile, self.tile.stages
        total = -(-self.spec.depth // tile.depth)
        both = (left, right)
        # Two sets of fragments: one is multiplied while the other is loaded.
        held = [[local(operand.tile.registers, "uint32") for operand in both] for _ in range(2)]

        def fill(step: Expr, slot: Expr) -> None:
            for operand in both:
                operand.copy(step, slot)

        def load(parity: int, step: int, slot: Expr) -> None:
            for operand, registers in zip(both, held[parity], strict=True):
                operand.load(registers, step, slot)

        for step in range(stages - 1):
            if step < total:
                fill(step, step)
            _commit()
        _wait(stages - 2)
        load(0, 0, 0)
        with T.serial(0, total) as step:
            slot = local(2, "int32")
            store(slot, step % stages, 0)
            store(slot, (step + 1) % stages, 1)
            for product in range(self.steps):
                last = product == self.steps - 1
                if last:
                    _wait(stages - 2)
                load((product + 1) % 2, (product + 1) % self.steps, slot[1] if last else slot[0])
                if product == 0:
                    ahead = step + (stages - 1)
                    with guarded(ahead < total):
                        fill(ahead, ahead % stages)
                    _commit()
                for operand, registers in zip(both, held[product % 2], strict=True):
                    operand.round(registers)
                self._multiply(*held[product % 2])

    def _multiply(self, a: Expr, b: Expr) -> None:
        down, across = self.tile.warp_rows // 16, self.tile.warp_columns // 8
        for i in range(down):
            for step in range(across):
                # To and fro: neighbouring products share a fragment.
                j = step if i % 2 == 0 else across - 1 - step
                at = (i * across + j) * 4
                sums = [self.sums[at + part] for part in range(4)]
                left = [a[i * 4 + part] for part in range(4)]
                right = [b[j * 2 + part] for part in range(2)]
                T.evaluate(T.ptx[_NAMES[self.spec.dtype]](*sums, *left, *right, *sums))

    # ---- epilogue --------------------------------------------------------------------------------------------------

    def _finish(self) -> None:
        """Sixteen rows of every warp at a time: sums to shared memory, from there to whoever computes their columns."""
        spec, tile = self.spec, self.tile
        width, stride = spec.result_vector, tile.sums_stride
        slices, across = tile.warps[2], tile.warp_columns // 8
        each = 16 * stride
        plane = tile.warps[0] * tile.warps[1] * each  # sums of one part of the depth
        own = self.warp * each
        base = (self.warp % (tile.warps[0] * tile.warps[1])) * each
        epilogue = Epilogue(spec, self.call)
        units = tile.warp_columns // width
        lanes = WARP * slices
        rounds = -(-16 * units // lanes)
        total, more = local(width), local(4)
        for part in range(tile.warp_rows // 16):
            if part > 0:
                self._sync()
            for j in range(across):
                for high in range(2):
                    at = own + (self.lane // 4 + 8 * high) * stride + j * 8 + self.lane % 4 * 2
                    source = (part * across + j) * 4 + high * 2
                    pair = [self.sums[source + i] for i in range(2)]
                    T.evaluate(T.ptx["st.shared.v2.f32"](self._staged(at), *pair))
            first = self.first_row + self.warp_row * tile.warp_rows + part * 16

            def unit(index: Expr) -> tuple[Expr, Expr, Expr]:
                number = self.warp_slice * WARP + self.lane + index * lanes
                row, column = number // units, number % units * width
                return number, row, column

            def inside(index: Expr, first: Expr = first) -> Expr:
                number, row, column = unit(index)
                conditions = []
                if 16 * units % lanes:
                    conditions.append(number < 16 * units)
                if not isinstance(self.call.rows, int) or self.call.rows % tile.rows:
                    conditions.append(first + row < self.call.rows)
                if spec.columns % tile.columns:
                    conditions.append(self._column(column) < spec.columns)
                return tvm.tirx.all(*conditions) if len(conditions) > 1 else (conditions or [None])[0]

            def compute(index: Expr, held: list[Expr], first: Expr = first) -> None:
                _, row, column = unit(index)
                at = base + row * stride + column
                for piece in range(slices):
                    for start in range(0, width, 4):
                        count = min(4, width - start)
                        read = [total[start + i] if piece == 0 else more[i] for i in range(count)]
                        name = f"ld.shared.{f'v{count}.' if count > 1 else ''}f32"
                        T.evaluate(T.ptx[name](*read, self._staged(at + piece * plane + start)))
                        if piece > 0:
                            unrolled(count, _added(total, start, more))
                epilogue.write(total, 0, held, self.batch, self._row(first + row), self._column(column), inside(index))

            if rounds <= 4:
                held = []
                for index in range(rounds):
                    _, row, column = unit(index)
                    held.append(epilogue.read(self.batch, self._row(first + row), self._column(column), inside(index)))
                self._sync()
                for index in range(rounds):
                    with guarded(unit(index)[0] < 16 * units if 16 * units % lanes else None):
                        compute(index, held[index])
            else:
                self._sync()
                partial = 16 * units % lanes > 0
                with T.serial(0, rounds) as index, guarded(unit(index)[0] < 16 * units if partial else None):
                    _, row, column = unit(index)
                    compute(
                        index, epilogue.read(self.batch, self._row(first + row), self._column(column), inside(index))
                    )

    def _staged(self, at: Expr) -> Expr:
        """Address of a sum in shared memory, where the operands were."""
        return T.address_of(self.shared[at * 4])

    def _row(self, row: Expr) -> Expr:
        return as_kind(row, "int64") if self.wide else row

    def _column(self, column: Expr) -> Expr:
        return self.first_column + self.warp_column * self.tile.warp_columns + column

    def _sync(self) -> None:
        """Between whoever writes and whoever reads sums."""
        if self.tile.warps[2] > 1:
            T.evaluate(T.tvm_storage_sync("shared"))
        else:
            T.evaluate(T.cuda.warp_sync())


def _place(block: Expr, down: Expr, across: int) -> tuple[Expr, Expr, Expr]:
    """Product, row and column of a block's tile, in units of tiles."""
    batch, rest = block // (down * across), block % (down * across)
    if across == 1 or (isinstance(down, int) and down <= _GROUP):
        return batch, rest % down, rest // down
    first = rest // (_GROUP * across) * _GROUP
    height = _GROUP if isinstance(down, int) and down % _GROUP == 0 else T.min(down - first, _GROUP)
    within = rest % (_GROUP * across)
    return batch, first + within % height, within // height


def _wide(spec: ContractionSpec) -> bool:
    """Whether places in the buffers need more than 32 bits, or may."""
    shapes = [argument.shape for argument in arguments(spec)]
    return any(None in shape or prod(extent or 1 for extent in shape) >= _LARGEST for shape in shapes)


def _commit() -> None:
    T.evaluate(T.ptx["cp.async.commit_group"]())


def _wait(but: int) -> None:
    """Until all copies but the latest are there, this thread's and everyone's."""
    T.evaluate(T.ptx["cp.async.wait_group"](but))
    T.evaluate(T.tvm_storage_sync("shared"))


def _added(total: Expr, start: int, more: Expr) -> Any:
    return lambda i: store(total, total[start + i] + more[i], start + i)
