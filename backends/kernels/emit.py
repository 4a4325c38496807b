"""Short words over TVM's IR builder: buffers seen flat, loops, vectors, bound values.

Kernels are emitted as finished loop nests rather than scheduled from a naive one: a tail or a border is then one
more line, and a kernel takes milliseconds to make. Indices are 32-bit; a dynamic extent makes them 64-bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import tvm
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script.builder import ir as T

from rescompile.backends.kernels.specs import Argument, compute_dtype
from rescompile.errors import RescompileError

Expr = Any  # tvm.tirx expressions, buffers and Python integers alike
# What TVM raises when it rejects a function: Python's own types, wherever in the compiler it happens.
TVM_ERRORS = (RuntimeError, ValueError, TypeError, IndexError)
OPAQUE = 8  # Relax's op pattern "opaque": never fused into, never fused away


class Flat:
    """A buffer seen as one dimension, read and written in the type that the kernel computes in.

    bfloat16 is kept as its bits: TVM 0.27 mistranslates bfloat16 values that are bound to a name, and literals.
    """

    def __init__(self, buffer: Expr, dtype: str, compute: str) -> None:
        self.buffer, self.dtype, self.compute = buffer, dtype, compute

    def __getitem__(self, index: Expr) -> Expr:
        value = self.buffer[index]
        if self.dtype == self.compute:
            return value
        if self.dtype == "bfloat16":
            return T.reinterpret("float32", value.astype("uint32") << const(16, "uint32"))
        return value.astype(self.compute)

    def store(self, index: Expr, value: Expr) -> None:
        """Writes a scalar, or inside `lanes` one lane of a vector."""
        if self.dtype == "bfloat16" and self.compute == "float32":
            value = _bfloat16_bits(value).astype("uint16")
        elif self.dtype != self.compute:
            value = value.astype(self.dtype)
        T.buffer_store(self.buffer, value, [index])

    def clear(self, index: Expr) -> None:
        """Writes a zero."""
        T.buffer_store(self.buffer, const(0, _storage(self.dtype)), [index])

    @property
    def raw(self) -> Flat:
        """The same buffer in its storage type, for copies."""
        return Flat(self.buffer, self.dtype, self.dtype)


def _bfloat16_bits(value: Expr) -> Expr:
    bits = let(T.reinterpret("uint32", value))
    odd = (bits >> const(16, "uint32")) & const(1, "uint32")  # ties go to the even neighbour
    return (bits + odd + const(0x7FFF, "uint32")) >> const(16, "uint32")


def rounded(value: Expr, dtype: str) -> Expr:
    """A float32 value as a 16-bit type holds it."""
    if dtype == "bfloat16":
        return T.reinterpret("float32", _bfloat16_bits(value) << const(16, "uint32"))
    return value.astype(dtype).astype("float32")


def _storage(dtype: str) -> str:
    return "uint16" if dtype == "bfloat16" else dtype


def prim_func(
    name: str, arguments: Sequence[Argument], body: Callable[..., None], scalars: Sequence[str] = ()
) -> tvm.tirx.PrimFunc:
    """A kernel whose `body` is called with one `Flat` per argument, then the dynamic row count if there is one, then
    one int32 per name in `scalars`.
    """
    dynamic = any(extent is None for argument in arguments for extent in argument.shape)
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_name(name)
        T.func_attr({"global_symbol": name, "tirx.noalias": True, "op_pattern": OPAQUE})
        rows = tvm.tirx.Var("rows", "int64") if dynamic else None
        buffers = []
        for argument in arguments:
            shape = [rows if extent is None else extent for extent in argument.shape]
            # By default TVM trusts buffers to be 64-byte aligned, and slices of a user's tensor crash.
            buffers.append(T.arg(argument.name, T.buffer(shape, argument.dtype, align=_bytes(argument.dtype))))
        values = [T.arg(scalar, T.int32()) for scalar in scalars]
        flats = []
        for argument, buffer in zip(arguments, buffers, strict=True):
            size: Expr = 1
            for extent in argument.shape:
                size = size * (rows if extent is None else extent)
            if not dynamic and size >= 2**31:
                raise RescompileError(f"Buffer {argument.name} of {name} has 2^31 elements or more; split the batch.")
            view = T.decl_buffer((size,), _storage(argument.dtype), data=buffer.data, align=_bytes(argument.dtype))
            flats.append(Flat(view, argument.dtype, compute_dtype(argument.dtype)))
        body(*flats, *([] if rows is None else [rows]), *values)
    return builder.get()


@contextmanager
def serial(start: Expr, stop: Expr | None = None) -> Iterator[Expr]:
    """for i in range(start) or range(start, stop)"""
    first, last = (0, start) if stop is None else (start, stop)
    if _is(first, 0) and _is(last, 1):
        yield 0
        return
    with T.serial(first, last) as i:
        yield i


@contextmanager
def parallel(extent: Expr) -> Iterator[Expr]:
    """One task per iteration; a single one runs in the caller's thread, since a launch costs microseconds."""
    if _is(extent, 1):
        yield 0
        return
    with T.parallel(0, extent) as i:
        yield i


@contextmanager
def lanes(count: int) -> Iterator[Expr]:
    """One vector statement of `count` lanes; everything inside happens to all lanes at once."""
    if count == 1:
        yield 0
        return
    with T.vectorized(0, count) as i:
        yield i


def each(count: int, body: Callable[[Expr], None], width: int = 16) -> None:
    """body(i) for i in range(count), in vectors of `width` lanes and a shorter one at the end"""
    full = count // width
    if full:
        with serial(full) as block, lanes(width) as lane:
            body(block * width + lane)
    if count % width:
        with lanes(count % width) as lane:
            body(full * width + lane)


@contextmanager
def when(condition: Expr) -> Iterator[None]:
    """if condition: ..."""
    with T.If(condition), T.Then():
        yield


def select(condition: Expr, yes: Expr, no: Expr) -> Expr:
    """yes if condition else no, lane by lane; both are evaluated"""
    return T.Select(condition, yes, no)


def sqrt(x: Expr) -> Expr:
    """Square root."""
    return T.sqrt(x)


def log(x: Expr) -> Expr:
    """Natural logarithm, by the C library."""
    return T.log(x)


def branch(condition: Expr | bool, yes: Callable[[], None], no: Callable[[], None]) -> None:
    """if condition: yes() else: no(); decided here where the condition is a Python bool"""
    if isinstance(condition, bool):
        (yes if condition else no)()
        return
    with T.If(condition):
        with T.Then():
            yes()
        with T.Else():
            no()


def let(value: Expr) -> Expr:
    """`value` computed once, under a name of its own."""
    return value if isinstance(value, int) else T.bind(value)


def local(size: int, dtype: str) -> Flat:
    """Registers (or the stack) of one thread; at most `STACK_ALLOCA_BYTES` to stay there."""
    return Flat(T.alloc_buffer((size,), dtype, scope="local"), dtype, dtype)


def scratch(size: int, dtype: str) -> Flat:
    """Workspace memory from TVM's pool, private to the thread where allocated inside `parallel`."""
    return Flat(T.alloc_buffer((size,), _storage(dtype), scope="global"), dtype, compute_dtype(dtype))


def const(value: float, dtype: str) -> Expr:
    """A literal of type `dtype`."""
    return tvm.tirx.const(value, dtype)


def chunk(index: Expr, count: Expr, extent: Expr) -> tuple[Expr, Expr]:
    """The index-th of `count` nearly equal parts of range(extent), as (start, stop)."""
    if _is(count, 1):
        return 0, extent
    start, stop = tvm.tirx.floordiv(index * extent, count), tvm.tirx.floordiv((index + 1) * extent, count)
    return (let(start), let(stop)) if isinstance(count, int) else (_opaque(start), _opaque(stop))


def unflatten(index: Expr, inner: Expr) -> tuple[Expr, Expr]:
    """(index // inner, index % inner)"""
    if _is(inner, 1):
        return index, 0
    outer, rest = tvm.tirx.floordiv(index, inner), tvm.tirx.floormod(index, inner)
    return (let(outer), let(rest)) if isinstance(inner, int) else (_opaque(outer), _opaque(rest))


def _opaque(value: Expr) -> Expr:
    """`value` through memory: TVM's simplifier spends a second on quotients by an unknown number."""
    cell = T.alloc_buffer((1,), str(value.ty.dtype), scope="local")
    T.buffer_store(cell, value, [0])
    return let(cell[0])


def div(a: Expr, b: int) -> Expr:
    """a // b for non-negative a"""
    return a // b if isinstance(a, int) else tvm.tirx.floordiv(a, b)


def mod(a: Expr, b: int) -> Expr:
    """a % b for non-negative a"""
    return a % b if isinstance(a, int) else tvm.tirx.floormod(a, b)


def minimum(a: Expr, b: Expr) -> Expr:
    """min(a, b)"""
    return min(a, b) if isinstance(a, int) and isinstance(b, int) else tvm.tirx.min(a, b)


def maximum(a: Expr, b: Expr) -> Expr:
    """max(a, b)"""
    return max(a, b) if isinstance(a, int) and isinstance(b, int) else tvm.tirx.max(a, b)


def _is(value: Expr, literal: int) -> bool:
    return isinstance(value, int) and value == literal


def _bytes(dtype: str) -> int:
    return 1 if dtype == "bool" else int(dtype.lstrip("abcdefghijklmnopqrstuvwxyz")) // 8
