"""Residual add and norm as one CUDA kernel with both outputs: sum = x + residual; y = N(sum)·weight + bias.

A row is held in registers by one warp, or by one block where it is long; x and the residual are read once, both
outputs written once, 16 bytes at a time where the width allows. Statistics are in float32, the variance of centred
values, of the sum as rounded to the output's type (as torch computes it). Rows may be dynamic. Widths need not divide
by anything: the threads past the end of a row hold zeros.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Any

import tvm
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script.builder import ir as T

from rescompile.errors import RescompileError

Expr = Any

WARP = 32
DTYPES = {"float32": 4, "float16": 2, "bfloat16": 2}
_VECTOR_BYTES = 16
_ROW_ELEMENTS = 32  # of a row, in the registers of one thread
_MAX_THREADS = 1024
_BLOCK_THREADS = 128
_OPAQUE = 8


@dataclass(frozen=True)
class AddNormSpec:
    """What the kernel computes; `rows` None leaves the row count to run time."""

    rows: int | None
    width: int
    kind: str = "layer"  # or rms
    weight: bool = True
    bias: bool = True
    eps: float = 1e-5
    dtype: str = "float32"

    def __post_init__(self) -> None:
        if self.kind not in ("layer", "rms") or self.dtype not in DTYPES or self.width < 1:
            raise RescompileError(f"There is no CUDA kernel for {self}: use a layer or rms norm of {', '.join(DTYPES)}.")


@dataclass(frozen=True)
class Shape:
    """How a row lies on threads: `threads` × `steps` × `vector` ≥ width, `rows` rows to a block."""

    threads: int
    steps: int
    vector: int
    rows: int


def shape_of(spec: AddNormSpec) -> Shape:
    """Threads for a row of this width."""
    vector = _VECTOR_BYTES // DTYPES[spec.dtype]
    while spec.width % vector:
        vector //= 2
    chunks = spec.width // vector
    threads = WARP
    while threads < _MAX_THREADS and -(-chunks // threads) * vector > _ROW_ELEMENTS:
        threads *= 2
    rows = max(1, _BLOCK_THREADS // threads) if threads == WARP else 1
    return Shape(threads, -(-chunks // threads), vector, rows)


def buffers(spec: AddNormSpec) -> list[tuple[str, tuple[int | None, ...]]]:
    """Names and shapes of the kernel's buffers in order: inputs, then y, sum. None is the dynamic row count."""
    row: tuple[int | None, ...] = (spec.rows, spec.width)
    found = [("x", row), ("residual", row)]
    if spec.weight:
        found.append(("weight", (spec.width,)))
    if spec.bias:
        found.append(("bias", (spec.width,)))
    return [*found, ("y", row), ("total", row)]


def prim_func(spec: AddNormSpec, name: str) -> tvm.tirx.PrimFunc:
    """The kernel, its parameters in the order of `buffers`."""
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_name(name)
        T.func_attr({"global_symbol": name, "tirx.noalias": True, "op_pattern": _OPAQUE, "tirx.is_scheduled": True})
        rows = tvm.tirx.Var("rows", "int64") if spec.rows is None else spec.rows
        given = {}
        for label, extents in buffers(spec):
            shape = [rows if extent is None else extent for extent in extents]
            given[label] = T.arg(label, T.buffer(shape, spec.dtype)), prod(shape[1:], start=shape[0])
        flat = {
            label: T.decl_buffer((size,), spec.dtype, data=buffer.data) for label, (buffer, size) in given.items()
        }
        _Kernel(spec, shape_of(spec), flat, rows).emit()
    return builder.get()


class _Kernel:
    """The body, one step of it a method."""

    def __init__(self, spec: AddNormSpec, shape: Shape, flat: dict[str, Expr], rows: Expr) -> None:
        self.spec, self.shape, self.flat, self.rows = spec, shape, flat, rows
        self.exact = shape.threads * shape.steps * shape.vector == spec.width

    def emit(self) -> None:
        """Load and add, reduce, normalise."""
        spec, shape = self.spec, self.shape
        blocks = -(-spec.rows // shape.rows) if spec.rows is not None else (self.rows + (shape.rows - 1)) // shape.rows
        with T.launch_thread("blockIdx.x", blocks) as block:
            if shape.rows == 1:
                with T.launch_thread("threadIdx.x", shape.threads) as thread:
                    self._row(block.astype("int64"), thread)
                return
            with T.launch_thread("threadIdx.y", shape.rows) as line:
                with T.launch_thread("threadIdx.x", shape.threads) as thread:
                    self._row(block.astype("int64") * shape.rows + line.astype("int64"), thread)

    def _row(self, row: Expr, thread: Expr) -> None:
        # A warp has its row alone, so a whole warp is inside or outside; a block of one row is never outside.
        whole = self.shape.rows == 1 or (self.spec.rows is not None and self.spec.rows % self.shape.rows == 0)
        if whole:
            self._work(row, thread)
        else:
            with T.If(row < self.rows), T.Then():
                self._work(row, thread)

    def _work(self, row: Expr, thread: Expr) -> None:
        spec, shape = self.spec, self.shape
        values = T.alloc_buffer((shape.steps * shape.vector,), "float32", scope="local")
        start = T.bind(row * spec.width)

        def load(step: int, chunk: Expr) -> None:
            at = start + chunk.astype("int64") * shape.vector
            x, residual, total = self._fetched("x", at), self._fetched("residual", at), self._staging()
            for lane in range(shape.vector):
                rounded = (x[lane].astype("float32") + residual[lane].astype("float32")).astype(spec.dtype)
                T.buffer_store(total, rounded, [lane])
                T.buffer_store(values, total[lane].astype("float32"), [step * shape.vector + lane])
            self._put("total", at, total)

        def blank(step: int) -> None:
            for lane in range(shape.vector):
                T.buffer_store(values, T.float32(0), [step * shape.vector + lane])

        self._chunks(thread, load, blank)
        count = shape.steps * shape.vector
        mean: Expr = None
        if spec.kind == "layer":
            mean = T.bind(self._reduced(thread, lambda: _sum([values[i] for i in range(count)])) * T.float32(1 / spec.width))
            self._centre(thread, values, mean)
        power = self._reduced(thread, lambda: _sum([values[i] * values[i] for i in range(count)]))
        scale = T.bind(T.rsqrt(power * T.float32(1 / spec.width) + T.float32(spec.eps)))

        def store(step: int, chunk: Expr) -> None:
            at = chunk.astype("int64") * shape.vector
            weight = self._fetched("weight", at) if spec.weight else None
            bias = self._fetched("bias", at) if spec.bias else None
            out = self._staging()
            for lane in range(shape.vector):
                value = values[step * shape.vector + lane] * scale
                if weight is not None:
                    value = value * weight[lane].astype("float32")
                if bias is not None:
                    value = value + bias[lane].astype("float32")
                T.buffer_store(out, value.astype(spec.dtype), [lane])
            self._put("y", start + at, out)

        self._chunks(thread, store, None)

    def _centre(self, thread: Expr, values: Expr, mean: Expr) -> None:
        def subtract(step: int, chunk: Expr) -> None:
            for lane in range(self.shape.vector):
                at = step * self.shape.vector + lane
                T.buffer_store(values, values[at] - mean, [at])

        self._chunks(thread, subtract, None)

    def _chunks(
        self, thread: Expr, inside: Callable[[int, Expr], None], outside: Callable[[int], None] | None
    ) -> None:
        """inside(step, chunk) for each piece of the row that this thread holds, outside(step) past the row's end."""
        last = self.spec.width // self.shape.vector
        for step in range(self.shape.steps):
            chunk = thread + step * self.shape.threads
            if self.exact or (step + 1) * self.shape.threads <= last:
                inside(step, chunk)
                continue
            with T.If(chunk < last):
                with T.Then():
                    inside(step, chunk)
                if outside is not None:
                    with T.Else():
                        outside(step)

    def _reduced(self, thread: Expr, partial: Callable[[], Expr]) -> Expr:
        """The sum of `partial` over the threads of a row, in all of them."""
        mask = T.uint32(0xFFFFFFFF)
        held = T.alloc_buffer((1,), "float32", scope="local")
        T.buffer_store(held, partial(), [0])

        def across(lanes: int) -> None:
            step = lanes // 2
            while step:
                other = T.tvm_warp_shuffle_xor(mask, held[0], step, WARP, WARP)
                T.buffer_store(held, held[0] + other, [0])
                step //= 2

        across(WARP)
        warps = self.shape.threads // WARP
        if warps > 1:
            shared = T.alloc_buffer((warps,), "float32", scope="shared")
            with T.If(thread % WARP == 0), T.Then():
                T.buffer_store(shared, held[0], [thread // WARP])
            T.evaluate(T.tvm_storage_sync("shared"))
            T.buffer_store(held, T.if_then_else(thread % WARP < warps, shared[thread % WARP % warps], T.float32(0)), [0])
            across(WARP)
        return held[0]

    def _staging(self) -> Expr:
        """Registers for one piece of a row: TVM moves whole vectors into them and takes single elements out."""
        return T.alloc_buffer((self.shape.vector,), self.spec.dtype, scope="local")

    def _fetched(self, label: str, at: Expr) -> Expr:
        """A piece of a buffer, in registers."""
        piece = self._staging()
        T.buffer_store(piece, self.flat[label][self._lanes(at)], [self._lanes(0)])
        return piece

    def _put(self, label: str, at: Expr, piece: Expr) -> None:
        """Write a piece of a buffer."""
        T.buffer_store(self.flat[label], piece[self._lanes(0)], [self._lanes(at)])

    def _lanes(self, at: Expr) -> Expr:
        if self.shape.vector == 1:
            return at
        wide = not isinstance(at, int)
        return tvm.tirx.Ramp(at if wide else T.int32(at), T.int64(1) if wide else T.int32(1), self.shape.vector)


def _sum(terms: list[Expr]) -> Expr:
    """A balanced sum, which is more exact than one in order."""
    while len(terms) > 1:
        terms = [
            terms[i] + terms[i + 1] if i + 1 < len(terms) else terms[i] for i in range(0, len(terms), 2)
        ]
    return terms[0]
