"""Sums over the blocks of a cluster, through each other's shared memory (sm_90 and later).

Source: PTX ISA, mapa, ld.shared::cluster, barrier.cluster; CUDA C++ Programming Guide, distributed shared memory.
"""

from __future__ import annotations

from typing import Any

from tvm.tirx.script.builder import ir as T

from rescompile.backends.cuda.rows import store

MOST = 8  # blocks of a cluster that every GPU with clusters can run

_MEET = "cluster_meet"
_MEET_SOURCE = f"""
__device__ __forceinline__ void {_MEET}() {{
  asm volatile("barrier.cluster.arrive.release.aligned;\\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}}
"""
_PEER = {"float32": ("peer_f32", "float", "f32", "f"), "float64": ("peer_f64", "double", "f64", "d")}


def meet() -> None:
    """Wait for all threads of the cluster; what they wrote before to shared memory can be read then."""
    T.evaluate(T.cuda.func_call(_MEET, source_code=_MEET_SOURCE))


def peer(place: Any, rank: Any, dtype: str) -> Any:
    """What lies at `place`, an element of shared memory, in the block of that rank."""
    name, spelled, short, constraint = _PEER[dtype]
    source = f"""
__device__ __forceinline__ {spelled} {name}({spelled}* place, int rank) {{
  unsigned mine = static_cast<unsigned>(__cvta_generic_to_shared(place)), there;
  {spelled} value;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(mine), "r"(rank));
  asm volatile("ld.shared::cluster.{short} %0, [%1];" : "={constraint}"(value) : "r"(there) : "memory");
  return value;
}}
"""
    return T.cuda.func_call(name, T.address_of(place), rank, source_code=source, return_type=dtype)


def across_cluster(total: Any, blocks: int, shared: Any, slot: int, lane: Any) -> None:
    """total[0] = the sum over the blocks of each block's total, in all threads; `slot` of `shared` is for this alone."""
    with T.If(lane == 0), T.Then():
        store(shared, total[0], slot)
    meet()
    dtype = str(total.dtype)
    value: Any = None
    for rank in range(blocks):
        other = peer(shared[slot], rank, dtype)
        value = other if value is None else value + other
    store(total, value, 0)
