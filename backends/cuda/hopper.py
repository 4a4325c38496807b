"""What sm_90 adds for matrix products, as TIR: tensor maps and TMA, barriers that count bytes, wgmma.

Each function emits one instruction (or returns the expression that one needs) by TVM's PTX dialect. Addresses in shared
memory are 32-bit numbers of the shared window, as PTX has them: what is written there by TMA and read by wgmma never
passes through a buffer of TIR. Instruction names refer to their sections in the PTX ISA, 8.0 and later.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import tvm
from tvm.tirx.script.builder import ir as T

Expr = Any

SWIZZLE = 128  # bytes of a row of a tile in shared memory; the 16-byte chunks of 8 rows are permuted within 1,024 bytes
ATOM = 1024  # bytes after which the permutation repeats; every tile begins on such a boundary
WARPGROUP = 128  # threads that issue a wgmma together
LARGEST_BOX = 256  # elements of a tensor map's box along any axis
ALIGNMENT = 16  # bytes, of a tensor's address and of each of its strides

_SWIZZLE_128B, _PROMOTE_L2_256B = 3, 3  # CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B
_HOLD = "hold_float"
_HOLD_SOURCE = (
    f'__forceinline__ __device__ void {_HOLD}(float& value) {{\n  asm volatile("" : "+f"(value) : : "memory");\n}}\n'
)
# TVM has it for generic pointers alone.
_WAIT = "wait_for_cluster"
_WAIT_SOURCE = f"""__forceinline__ __device__ void {_WAIT}(unsigned barrier, int parity) {{
  asm volatile(
      "{{\\n"
      ".reg .pred done;\\n"
      "AGAIN:\\n"
      "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [%0], %1;\\n"
      "@!done bra.uni AGAIN;\\n"
      "}}\\n" : : "r"(barrier), "r"(parity) : "memory");
}}
"""
_VECTORS = {1: "", 2: ".v2", 4: ".v4"}
_PTX_DTYPES = {"float16": "f16", "bfloat16": "bf16"}


def u32(value: int) -> Expr:
    """A literal."""
    return tvm.tirx.const(value, "uint32")


def tensor_map(
    name: str, data: Expr, dtype: str, extents: Sequence[Expr], box: Sequence[int], steps: Sequence[int] = ()
) -> Expr:
    """A tensor map that the host makes before the launch, of a dense tensor, its innermost axis first.

    A copy brings box[i] elements along axis i, each `steps[i]` from the one before.

    What a box covers outside of the tensor reads as zero (CUDA driver API, cuTensorMapEncodeTiled, which demands: the
    address and all strides multiples of 16 bytes, boxes of at most 256 elements, the innermost one 128 bytes wide with
    this swizzle). The kernel gets it by value, as a __grid_constant__ parameter.
    """
    handle = tvm.tirx.Var(name, T.handle("tensormap").ty)
    T.Bind(T.tvm_stack_alloca("tensormap", 1), var=handle)
    shape = [_int64(extent) for extent in extents]
    strides, pitch = [], tvm.tirx.const(_bytes(dtype), "int64")
    for extent in shape[:-1]:
        pitch = pitch * extent
        strides.append(pitch)
    steps = steps or [1] * len(box)
    T.evaluate(
        T.tensormap_encode_tiled(
            handle,
            data,
            *shape,
            *strides,
            # The API counts what a box spans: ceil(span / step) elements are copied.
            *(_int64(side * step) for side, step in zip(box, steps, strict=True)),
            *(_int64(step) for step in steps),
            descriptor_dtype=dtype,
            rank=len(shape),
            swizzle=_SWIZZLE_128B,
            l2_promotion=_PROMOTE_L2_256B,
        )
    )
    return handle


def load_box(to: Expr, handle: Expr, at: Sequence[Expr], barrier: Expr, ctas: int = 0) -> None:
    """Begin to copy a box to shared memory; one thread. The barrier is told of its bytes as they land, zeros included.

    PTX ISA, cp.async.bulk.tensor. `ctas`, a mask, has it land in each of these blocks of the cluster, at the same
    offset, and tell each one's barrier.
    """
    name = f"cp.async.bulk.tensor.{len(at)}d.shared::cluster.global.mbarrier::complete_tx::bytes"
    operands = [to, T.address_of(handle), *(_int32(coordinate) for coordinate in at), barrier]
    if ctas:
        T.evaluate(T.ptx[f"{name}.multicast::cluster"](*operands, tvm.tirx.const(ctas, "uint16")))
    else:
        T.evaluate(T.ptx[name](*operands))


def prefetch_map(handle: Expr) -> None:
    """Fetch a tensor map into the constant cache before its first use."""
    T.evaluate(T.ptx["prefetch.tensormap"](T.address_of(handle)))


def init_barrier(barrier: Expr, arrivals: int) -> None:
    """A barrier in phase 0 that completes a phase after so many arrivals and all bytes that were announced."""
    T.evaluate(T.ptx["mbarrier.init.shared::cta.b64"](barrier, u32(arrivals)))


def publish_barriers() -> None:
    """After the inits: makes them known to the copy engine and to the cluster (PTX ISA, fence.mbarrier_init)."""
    T.evaluate(T.ptx["fence.mbarrier_init.release.cluster"]())


def expect_bytes(barrier: Expr, count: int) -> None:
    """Arrive, and announce the bytes that this phase is to wait for (PTX ISA, mbarrier.arrive.expect_tx)."""
    T.evaluate(T.ptx["mbarrier.arrive.expect_tx.shared::cta.b64"](barrier, u32(count)))


def arrive(barrier: Expr) -> None:
    """Arrive once, with release semantics at the scope of the block."""
    T.evaluate(T.ptx["mbarrier.arrive.shared::cta.b64"](barrier, u32(1)))


def arrive_at(barrier: Expr, rank: Expr) -> None:
    """Arrive at the barrier of this offset in another block of the cluster, with release semantics at its scope."""
    mapped = T.alloc_buffer((1,), "uint32", scope="local")
    T.evaluate(T.ptx["mapa.shared::cluster.u32"](mapped[0], barrier, rank.astype("uint32")))
    T.evaluate(T.ptx["mbarrier.arrive.release.cluster.shared::cluster.b64"](mapped[0], u32(1)))


def wait(barrier: Expr, parity: Expr, *, cluster: bool = False) -> None:
    """Wait until the phase of this parity is complete; what was done before its arrivals is then visible.

    `cluster`: also where it was done by other blocks of the cluster.

    A new barrier counts as if the phase before its first, of parity 1, were complete (PTX ISA, mbarrier.try_wait).
    """
    if cluster:
        T.evaluate(T.cuda.func_call(_WAIT, barrier, parity, source_code=_WAIT_SOURCE))
    else:
        T.evaluate(T.cuda.mbarrier_wait(barrier, parity))


@dataclass(frozen=True)
class Panel:
    """A tile of an operand in shared memory: `extent` rows (of a or of b) by 64 terms of the sum, 128 B swizzle.

    With the sum's axis innermost in memory it is one array of `extent` rows of 128 bytes. Otherwise it is `extent`/64
    arrays of 64 rows, one for each term, of 128 bytes: 64 neighbours along the other axis.
    """

    extent: int
    depth_last: bool

    TERMS = SWIZZLE // 2  # of a tile
    BLOCK = 64 * SWIZZLE  # bytes of 64 rows, whichever way they lie

    @property
    def bytes(self) -> int:
        """Of the tile."""
        return self.extent * SWIZZLE

    @property
    def box(self) -> tuple[int, int]:
        """What one copy brings, innermost axis first."""
        return (self.TERMS, self.extent) if self.depth_last else (64, self.TERMS)

    def load(
        self, to: Expr, handle: Expr, start: Expr, term: Expr, rest: Sequence[Expr], barrier: Expr, ctas: int = 0
    ) -> None:
        """Begin to copy the tile that begins at this row and term; `rest` are coordinates of further axes."""
        if self.depth_last:
            load_box(to, handle, [term, start, *rest], barrier, ctas)
            return
        for block in range(self.extent // 64):
            load_box(to + u32(block * self.BLOCK), handle, [start + block * 64, term, *rest], barrier, ctas)

    def descriptor(self, address: Expr, block: int, step: int) -> Expr:
        """The matrix descriptor (PTX ISA, wgmma, Matrix Descriptor Format) of 64·`block` and following rows.

        And of terms 16·`step` to 16·`step` + 15.
        Bits 0-13 the address, 16-29 the leading and 32-45 the stride byte offset, all in units of 16 bytes, 62-63 the
        swizzle: 1 for 128 bytes. The permutation is a function of address bits, so a descriptor may begin inside an
        atom along the sum (32 bytes a step) as long as the tile begins on an atom's boundary (base offset 0).
        With the sum innermost, the stride offset leads from 8 rows to the next 8, and the leading one is not used (1).
        Otherwise the stride offset leads from 8 terms to the next 8, the leading one from 64 rows to the next 64.
        """
        leading, stride, advance = (16, ATOM, 32) if self.depth_last else (self.BLOCK, ATOM, 16 * SWIZZLE)
        constant = (leading >> 4) << 16 | (stride >> 4) << 32 | 1 << 62
        begin = address + u32(block * self.BLOCK + step * advance)
        # The window of shared memory ends at 228 KiB: the address fits into 14 bits of 16-byte units.
        return tvm.tirx.const(constant, "uint64") | T.Cast("uint64", tvm.tirx.shift_right(begin, u32(4)))


def multiply(dtype: str, sums: Sequence[Expr], a: Expr, b: Expr, panels: tuple[Panel, Panel], keep: Expr) -> None:
    """sums = a·bᵀ, plus the sums where `keep`; 64 rows by 2·len(sums) columns, 16 terms (PTX ISA, wgmma.mma_async).

    Thread t of the warpgroup has, for each 8 columns, of rows 16·(t / 32) + t % 32 / 4 and 8 further down the columns
    2·(t % 4) and its neighbour.
    """
    kind = _PTX_DTYPES[dtype]
    name = f"wgmma.mma_async.sync.aligned.m64n{2 * len(sums)}k16.f32.{kind}.{kind}"
    turned = [0 if panel.depth_last else 1 for panel in panels]
    T.evaluate(T.ptx[name](*sums, a, b, T.ptx.pred(keep), 1, 1, *turned))


def begin_products() -> None:
    """Order accesses to the registers of the sums before the wgmmas that follow.

    PTX ISA, wgmma.fence: before the first wgmma, and whenever registers have been changed since.
    """
    T.evaluate(T.ptx["wgmma.fence.sync.aligned"]())


def commit_products() -> None:
    """Everything since the last commit becomes a group (PTX ISA, wgmma.commit_group)."""
    T.evaluate(T.ptx["wgmma.commit_group.sync.aligned"]())


def await_products(pending: int) -> None:
    """Until at most `pending` groups are under way: the others have read shared memory and written their sums."""
    T.evaluate(T.ptx["wgmma.wait_group.sync.aligned"](pending))


def hold(value: Expr) -> None:
    """Keep the compiler from moving accesses of a register over this place: it sees no tie to an asynchronous wgmma."""
    T.evaluate(T.cuda.func_call(_HOLD, value, source_code=_HOLD_SOURCE))


def store_shared(to: Expr, values: Sequence[Expr]) -> None:
    """Write 1, 2 or 4 neighbouring float32 to shared memory: an access that TVM does not plan barriers for."""
    T.evaluate(T.ptx[f"st.shared{_VECTORS[len(values)]}.f32"](to, *values))


def load_shared(into: Sequence[Expr], address: Expr) -> None:
    """Read 1, 2 or 4 neighbouring float32 of shared memory."""
    T.evaluate(T.ptx[f"ld.shared{_VECTORS[len(into)]}.f32"](*into, address))


def store_index(to: Expr, value: Expr) -> None:
    """Write an int32 to shared memory."""
    T.evaluate(T.ptx["st.shared.s32"](to, value))


def load_index(into: Expr, address: Expr) -> None:
    """Read an int32 of shared memory."""
    T.evaluate(T.ptx["ld.shared.s32"](into, address))


def take_registers(count: int) -> None:
    """Raise the registers of each thread of this warpgroup, once others have given theirs (PTX ISA, setmaxnreg)."""
    T.evaluate(T.ptx["setmaxnreg.inc.sync.aligned.u32"](count))


def give_registers(count: int) -> None:
    """Lower the registers of each thread of this warpgroup."""
    T.evaluate(T.ptx["setmaxnreg.dec.sync.aligned.u32"](count))


def _int64(value: Expr) -> Expr:
    return tvm.tirx.const(value, "int64") if isinstance(value, int) else value.astype("int64")


def _int32(value: Expr) -> Expr:
    return tvm.tirx.const(value, "int32") if isinstance(value, int) else value.astype("int32")


def _bytes(dtype: str) -> int:
    return int(dtype.removeprefix("bfloat").removeprefix("float")) // 8
