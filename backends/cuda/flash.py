"""Attention in one kernel on tensor cores, scores never in memory: a kernel family (sm_80 and later).

    y = softmax(scale·q·kᵀ + mask)·v, per head

After FlashAttention-2 (Dao 2023). A block takes some queries of one head and goes through the keys: scores of a tile in
float32 registers, their largest so far (m) and the sum of their powers (l), the output rescaled whenever m grows:

    m' = max(m, max s);  p = 2^(s − m');  l' = l·2^(m − m') + sum p;  o' = o·2^(m − m') + p·v;  y = o / l

Scores are in units of log 2. The layout of the scores' sums is that of the next product's left operand: p goes from one
to the other in registers. A row in which everything is masked gives zeros.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from math import e as euler
from math import log2, prod
from typing import Any

import tvm
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script.builder import ir as T

from rescompile.backends.cuda.contraction import NARROW
from rescompile.backends.cuda.epilogue import guarded
from rescompile.backends.cuda.mma_operand import MmaOperand, OperandTile
from rescompile.backends.cuda.mma_source import MatrixSource
from rescompile.backends.cuda.rows import local, store, unrolled
from rescompile.backends.cuda.scalars import call, literal
from rescompile.backends.cuda.targets import Architecture
from rescompile.backends.kernels import Argument, AttentionSpec
from rescompile.backends.kernels.attention import arguments as attention_arguments

Expr = Any  # tvm.tirx expressions, buffers and Python integers alike

WARP = 32
MASKED = -1e30  # stands for minus infinity, so that a row in which everything is masked has no NaN
_STAGES = 2
_OPAQUE = 8
_EVERY_LANE = 0xFFFFFFFF
_LARGEST = 1 << 31
_WIDEST_HEAD = 128
_NAMES = {
    "float16": ("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32", "cvt.rn.f16x2.f32"),
    "bfloat16": ("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32", "cvt.rn.bf16x2.f32"),
}


@dataclass(frozen=True)
class FlashTile:
    """A block computes `queries` rows, 16 of each warp, `keys` columns of scores at a time."""

    queries: int
    keys: int

    @property
    def threads(self) -> int:
        """Threads of a block."""
        return self.queries // 16 * WARP

    def shared_bytes(self, head_dim: int) -> int:
        """Shared memory: the queries, and keys and values of two tiles."""
        return (self.queries + 2 * _STAGES * self.keys) * head_dim * 2


def refusal(spec: Any, limits: Architecture) -> str:
    """Why there is no such kernel, one clause; empty when there is one."""
    if not isinstance(spec, AttentionSpec):
        return "it is no attention"
    if limits.number < 80:
        return f"{limits.name} has no asynchronous copies"
    if spec.dtype not in NARROW:
        return f"tensor cores do not multiply {spec.dtype}"
    if spec.head_dim % 16 or spec.head_dim > _WIDEST_HEAD:
        return f"a head is {spec.head_dim} wide: no multiple of 16 up to {_WIDEST_HEAD}"
    if any(prod(extent or 1 for extent in part.shape) >= _LARGEST for part in arguments(spec)):
        return "a buffer has 2^31 elements or more"
    return ""


def candidates(spec: AttentionSpec, limits: Architecture) -> list[FlashTile]:
    """Tiles worth timing; the first is the one to take where nothing can be timed."""
    heads = spec.batch * spec.heads
    # Few queries in all: smaller blocks, for more multiprocessors.
    order = (64, 128, 32, 16) if heads * -(-spec.q_len // 64) >= 96 else (32, 16, 64, 128)
    tiles = [FlashTile(queries, keys) for queries in order for keys in (64, 32)]
    useful = [tile for tile in tiles if tile.queries < 2 * max(spec.q_len, 16)]
    return [tile for tile in useful if tile.shared_bytes(spec.head_dim) < limits.shared_bytes - 1024]


def arguments(spec: AttentionSpec) -> list[Argument]:
    """qkv, or q, k, v; [mask]; y."""
    return attention_arguments(spec)


def prim_func(spec: AttentionSpec, tile: FlashTile, name: str) -> tvm.tirx.PrimFunc:
    """The kernel, its threads bound."""
    with IRBuilder() as builder, T.prim_func(s_tir=True), ExitStack() as frames:
        T.func_name(name)
        T.func_attr({"global_symbol": name, "tirx.noalias": True, "op_pattern": _OPAQUE, "tirx.is_scheduled": True})
        buffers = {}
        given = {part.name: T.arg(part.name, T.buffer(part.shape, part.dtype)) for part in arguments(spec)}
        for part in arguments(spec):
            flat = T.decl_buffer((prod(extent or 1 for extent in part.shape),), part.dtype, data=given[part.name].data)
            IRBuilder.name(part.name, flat)
            buffers[part.name] = flat
        down = -(-spec.q_len // tile.queries)
        block = frames.enter_context(T.launch_thread("blockIdx.x", down * spec.batch * spec.heads))
        thread = frames.enter_context(T.launch_thread("threadIdx.x", tile.threads))
        _Block(spec, tile, buffers, block, thread, down).emit()
    return builder.get()


class _Block:
    """The code of one thread block."""

    def __init__(
        self, spec: AttentionSpec, tile: FlashTile, buffers: dict[str, Expr], block: Expr, thread: Expr, down: int
    ) -> None:
        self.spec, self.tile, self.buffers, self.thread = spec, tile, buffers, thread
        self.lane, self.warp = thread % WARP, thread // WARP
        self.batch, self.head = block // (down * spec.heads), block // down % spec.heads
        # The last queries see the most keys: of a causal one they begin first.
        self.first = ((down - 1 - block % down) if spec.causal else block % down) * tile.queries
        self.masked = spec.causal or spec.mask != "none" or spec.k_len % tile.keys != 0

    def emit(self) -> None:
        """The whole kernel."""
        spec, tile = self.spec, self.tile
        self.shared = T.alloc_buffer((tile.shared_bytes(spec.head_dim),), "uint8", scope="shared.dyn")
        IRBuilder.name("staged", self.shared)
        queries, keys, values, scored = self._operands()
        wide = spec.head_dim // 8
        self.output = local(4 * wide)
        unrolled(4 * wide, lambda i: store(self.output, literal(0.0, "float32"), i))
        # Largest score and sum of powers of the two rows of which this thread holds a part.
        self.largest, self.total = local(2), local(2)
        for row in range(2):
            store(self.largest, literal(MASKED, "float32"), row)
            store(self.total, literal(0.0, "float32"), row)
        queries.copy(0, 0)
        keys.copy(0, 0)
        _commit()
        values.copy(0, 0)
        _commit()
        count = -(-spec.k_len // tile.keys)
        last = local(1, "int32")
        store(last, count, 0)
        if spec.causal:
            reached = (self.first + tile.queries + tile.keys - 1) // tile.keys
            store(last, T.min(reached.astype("int32"), count), 0)
        fragments = local(spec.head_dim // 16 * 4, "uint32")
        with T.serial(0, last[0]) as step:
            slot = step % _STAGES
            _wait(1)
            with guarded(step == 0):
                for part in range(spec.head_dim // 16):
                    self._query(queries, fragments, part)
            with guarded(step + 1 < last[0]):
                keys.copy(step + 1, (step + 1) % _STAGES)
            _commit()
            scores = self._scores(scored, fragments, slot)
            self._mask(scores, step)
            self._powers(scores)
            _wait(1)
            with guarded(step + 1 < last[0]):
                values.copy(step + 1, (step + 1) % _STAGES)
            _commit()
            self._accumulate(values, scores, slot)
        _wait(0)
        self._write()

    def _operands(self) -> tuple[MmaOperand, MmaOperand, MmaOperand, MmaOperand]:
        """Queries; keys as they are copied; values; keys as they are read."""
        spec, tile, depth = self.spec, self.tile, self.spec.head_dim
        shared, heads = spec.shared_heads, spec.heads
        group = heads // shared
        key_head = self.head // group

        def source(name: str, head: Expr, count: int, length: int, first: Expr, rows: bool) -> MatrixSource:
            buffer, lead = self.buffers.get(name), 0
            if spec.layout == "qkv":
                buffer = self.buffers["qkv"]
                stride = (heads + 2 * shared) * depth
                lead = {"q": 0, "k": heads, "v": heads + shared}[name] * depth
                base = self.batch * (length * stride) + head * depth + lead
            elif spec.layout == "bshd":
                stride, base = count * depth, self.batch * (length * count * depth) + head * depth
            else:
                stride, base = depth, (self.batch * count + head) * (length * depth)
            if rows:
                return MatrixSource(buffer, base, first, length, depth, True, False, stride)
            return MatrixSource(buffer, base, 0, depth, length, False, False, stride)

        def operand(left: bool, last: bool, extent: int, each: int, deep: int, first: int, made: Any) -> MmaOperand:
            cut = OperandTile(
                spec.dtype, left, last, extent, each, deep, deep // 16, 8, tile.threads, first, tile.keys * depth
            )
            return MmaOperand(cut, self.shared, made, self.thread, self.lane, self.warp if left else 0, 0)

        after = tile.queries * depth
        later = after + _STAGES * tile.keys * depth
        q = source("q", self.head, heads, spec.q_len, self.first, True)
        k = source("k", key_head, shared, spec.k_len, 0, False)
        v = source("v", key_head, shared, spec.k_len, 0, False)
        return (
            operand(True, True, tile.queries, 16, depth, 0, q),
            operand(False, False, depth, depth, tile.keys, after, k),
            operand(False, False, depth, depth, tile.keys, later, v),
            operand(False, True, tile.keys, tile.keys, depth, after, None),
        )

    @staticmethod
    def _query(queries: MmaOperand, fragments: Expr, part: int) -> None:
        held = _Shifted(fragments, 4 * part)
        queries.load(held, part, 0)

    def _scores(self, keys: MmaOperand, fragments: Expr, slot: Expr) -> Expr:
        """q·kᵀ of a tile of keys: this thread's sums."""
        tile, spec = self.tile, self.spec
        scores = local(tile.keys // 8 * 4)
        unrolled(tile.keys // 8 * 4, lambda i: store(scores, literal(0.0, "float32"), i))
        held = local(keys.tile.registers, "uint32")
        for part in range(spec.head_dim // 16):
            keys.load(held, part, slot)
            for column in range(tile.keys // 8):
                self._multiply(scores, column, [fragments[4 * part + i] for i in range(4)], held, column)
        return scores

    def _multiply(self, sums: Expr, column: int, left: list[Expr], right: Expr, at: int) -> None:
        into = [sums[column * 4 + i] for i in range(4)]
        pair = [right[at * 2 + i] for i in range(2)]
        T.evaluate(T.ptx[_NAMES[self.spec.dtype][0]](*into, *left, *pair, *into))

    # ---- scores ----------------------------------------------------------------------------------------------------

    def _mask(self, scores: Expr, step: Expr) -> None:
        """scores·scale + mask in units of log 2; MASKED where a key is not seen."""
        spec, tile = self.spec, self.tile
        factor = literal(spec.scale * log2(euler), "float32")
        unrolled(tile.keys // 8 * 4, lambda i: store(scores, scores[i] * factor, i))
        low = literal(MASKED, "float32")
        start = step * tile.keys
        if spec.mask != "none":
            for column, high, side in self._places():
                at = column * 4 + high * 2 + side
                key = T.min(start + self._key(column, side), spec.k_len - 1)
                given = self.buffers["mask"][self._mask_place(T.min(self._row(high), spec.q_len - 1), key)]
                if spec.mask == "keep":
                    store(scores, tvm.tirx.Select(given, scores[at], low), at)
                else:
                    more = scores[at] + given.astype("float32") * literal(log2(euler), "float32")
                    store(scores, tvm.tirx.Select(more < low, low, more), at)
        crossing = None
        if spec.causal:
            crossing = start + tile.keys > self.first + self.warp * 16
        if spec.k_len % tile.keys:
            ragged = start + tile.keys > spec.k_len
            crossing = ragged if crossing is None else tvm.tirx.any(crossing, ragged)
        if crossing is None:
            return
        with guarded(crossing):
            for column, high, side in self._places():
                key = start + self._key(column, side)
                seen = [key <= self._row(high)] if spec.causal else []
                seen += [key < spec.k_len] if spec.k_len % tile.keys else []
                at = column * 4 + high * 2 + side
                store(scores, tvm.tirx.Select(tvm.tirx.all(*seen) if len(seen) > 1 else seen[0], scores[at], low), at)

    def _places(self) -> list[tuple[int, int, int]]:
        return [(column, high, side) for column in range(self.tile.keys // 8) for high in range(2) for side in range(2)]

    def _row(self, high: int) -> Expr:
        return self.first + self.warp * 16 + self.lane // 4 + 8 * high

    def _key(self, column: int, side: int) -> Expr:
        return column * 8 + self.lane % 4 * 2 + side

    def _mask_place(self, row: Expr, key: Expr) -> Expr:
        at: Expr = 0
        for extent, index in zip(self.spec.mask_shape, (self.batch, self.head, row, key), strict=True):
            at = at * extent + (index if extent > 1 else 0)
        return at

    def _powers(self, scores: Expr) -> None:
        """Scores become powers of two below their row's largest; what was summed before is rescaled."""
        columns = self.tile.keys // 8
        for high in range(2):
            row = [column * 4 + high * 2 + side for column in range(columns) for side in range(2)]
            top = local(1)
            store(top, self.largest[high], 0)
            for at in row:
                store(top, T.max(top[0], scores[at]), 0)
            for step in (2, 1):
                other = T.tvm_warp_shuffle_xor(tvm.tirx.const(_EVERY_LANE, "uint32"), top[0], step, WARP, WARP)
                store(top, T.max(top[0], other), 0)
            shrink = local(1)
            store(shrink, call("exp2", self.largest[high] - top[0]), 0)
            store(self.largest, top[0], high)
            store(self.total, self.total[high] * shrink[0], high)
            for at in row:
                power = call("exp2", scores[at] - top[0])
                if self.masked:
                    seen = scores[at] > literal(MASKED, "float32")
                    power = tvm.tirx.Select(seen, power, literal(0.0, "float32"))
                store(scores, power, at)
                store(self.total, self.total[high] + scores[at], high)
            for column in range(self.spec.head_dim // 8):
                for side in range(2):
                    at = column * 4 + high * 2 + side
                    store(self.output, self.output[at] * shrink[0], at)

    def _accumulate(self, values: MmaOperand, powers: Expr, slot: Expr) -> None:
        """o += p·v"""
        held, left = local(values.tile.registers, "uint32"), local(4, "uint32")
        for part in range(self.tile.keys // 16):
            for word in range(4):
                at = (part * 2 + word // 2) * 4 + word % 2 * 2
                pack = T.ptx[_NAMES[self.spec.dtype][1]]
                T.evaluate(pack(left[word], powers[at + 1], powers[at]))
            values.load(held, part, slot)
            for column in range(self.spec.head_dim // 8):
                self._multiply(self.output, column, [left[i] for i in range(4)], held, column)

    # ---- result ----------------------------------------------------------------------------------------------------

    def _write(self) -> None:
        """y = o / l: a warp's rows through shared memory, where its queries were, so that stores are of 16 bytes."""
        spec, depth = self.spec, self.spec.head_dim
        for high in range(2):
            for step in (2, 1):
                other = T.tvm_warp_shuffle_xor(
                    tvm.tirx.const(_EVERY_LANE, "uint32"), self.total[high], step, WARP, WARP
                )
                store(self.total, self.total[high] + other, high)
            inverse = literal(1.0, "float32") / self.total[high]
            if self.masked:
                empty = tvm.tirx.EQ(self.total[high], literal(0.0, "float32"))
                inverse = tvm.tirx.Select(empty, literal(0.0, "float32"), inverse)
            store(self.total, inverse, high)
        word = local(1, "uint32")
        chunks = depth // 8
        for column in range(chunks):
            for high in range(2):
                at = column * 4 + high * 2
                scaled = [self.output[at + side] * self.total[high] for side in (1, 0)]
                T.evaluate(T.ptx[_NAMES[spec.dtype][1]](word[0], *scaled))
                row = self.lane // 4 + 8 * high
                T.evaluate(T.ptx["st.shared.b32"](self._staged(row, column, self.lane % 4 * 2), word[0]))
        T.evaluate(T.cuda.warp_sync())
        target = self.buffers["y"]
        count = 16 * chunks
        for index in range(-(-count // WARP)):
            number = self.lane + index * WARP
            row, chunk = number // chunks, number % chunks
            at = self._place(self.first + self.warp * 16 + row) + chunk * 8
            conditions = [] if spec.q_len % self.tile.queries == 0 else [self.first + self.warp * 16 + row < spec.q_len]
            conditions += [number < count] if count % WARP else []
            words = local(4, "uint32")
            with guarded(tvm.tirx.all(*conditions) if len(conditions) > 1 else (conditions or [None])[0]):
                T.evaluate(T.ptx["ld.shared.v4.b32"](*[words[i] for i in range(4)], self._staged(row, chunk, 0)))
                T.evaluate(T.ptx["st.global.v4.b32"](T.address_of(target[at]), *[words[i] for i in range(4)]))

    def _staged(self, row: Expr, chunk: Expr, inner: Expr) -> Expr:
        """Address of a result in the warp's part of shared memory, chunks of 16 bytes turned so that banks differ."""
        depth = self.spec.head_dim
        turned = (chunk + row) % (depth // 8)
        return T.address_of(self.shared[((self.warp * 16 + row) * depth + turned * 8 + inner) * 2])

    def _place(self, row: Expr) -> Expr:
        spec, depth = self.spec, self.spec.head_dim
        if spec.out_layout == "bshd":
            return ((self.batch * spec.q_len + row) * spec.heads + self.head) * depth
        return ((self.batch * spec.heads + self.head) * spec.q_len + row) * depth


class _Shifted:
    """Registers from a place on."""

    def __init__(self, buffer: Expr, start: int) -> None:
        self.buffer, self.start = buffer, start

    def __getitem__(self, index: int) -> Expr:
        return self.buffer[self.start + index]


def _commit() -> None:
    T.evaluate(T.ptx["cp.async.commit_group"]())


def _wait(but: int) -> None:
    T.evaluate(T.ptx["cp.async.wait_group"](but))
    T.evaluate(T.tvm_storage_sync("shared"))
