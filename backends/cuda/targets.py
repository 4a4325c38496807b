"""The NVIDIA GPUs to compile for, by compute capability, and what TVM's schedules may ask of each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import tvm

from rescompile.errors import RescompileError, nearest


@dataclass(frozen=True)
class Architecture:
    """Limits of a compute capability (CUDA C++ Programming Guide, technical specifications)."""

    name: str
    product: str
    shared_bytes: int  # the most that one block can ask for
    cache_bytes: int  # L2, of the product named

    @property
    def number(self) -> int:
        """The digits of its name: 90 for sm_90."""
        return int(self.name.removeprefix("sm_"))


ARCHITECTURES = {
    arch.name: arch
    for arch in (
        Architecture("sm_80", "A100", 163 << 10, 40 << 20),
        Architecture("sm_86", "RTX 30, A10", 99 << 10, 6 << 20),
        Architecture("sm_87", "Jetson Orin", 163 << 10, 4 << 20),
        Architecture("sm_89", "RTX 40, L4, L40", 99 << 10, 48 << 20),
        Architecture("sm_90", "H100, H200", 227 << 10, 50 << 20),
        Architecture("sm_100", "B200", 227 << 10, 126 << 20),
        Architecture("sm_103", "B300", 227 << 10, 126 << 20),
        Architecture("sm_120", "RTX 50", 99 << 10, 96 << 20),
    )
}

THREADS_PER_BLOCK = 1024
WARP = 32
REGISTERS = 65536  # of a block, and of a multiprocessor
# What a kernel may declare without a launch attribute; TVM's rules declare their shared memory so.
STATIC_SHARED_BYTES = 48 << 10


def architecture(name: str) -> Architecture:
    """The limits of sm_90, sm_90a, ...; RescompileError, with the nearest name, for one that is not known."""
    # dlight reads the number after sm_ and finds none in sm_90a: it would leave the tensor cores unused.
    plain = name.rstrip("af")
    if plain not in ARCHITECTURES:
        raise RescompileError(
            f"There are no schedules for the GPU '{name}'{nearest(plain, ARCHITECTURES)}: "
            f"use one of {', '.join(f'cuda:{known}' for known in ARCHITECTURES)}."
        )
    return ARCHITECTURES[plain]


def cuda_target(arch: str, options: Mapping[str, Any] | None = None) -> tvm.target.Target:
    """TVM's target of a compute capability; `options` are further attributes, which win over the limits known here."""
    limits = architecture(arch)
    attributes = {
        "max_threads_per_block": THREADS_PER_BLOCK,
        "max_num_threads": THREADS_PER_BLOCK,
        "max_shared_memory_per_block": STATIC_SHARED_BYTES,
        "registers_per_block": REGISTERS,
        "l2_cache_size_bytes": limits.cache_bytes,
        "thread_warp_size": WARP,
        **dict(options or {}),
    }
    return tvm.target.Target({**attributes, "kind": "cuda", "arch": limits.name}, host="llvm")
