"""GPUs that are not NVIDIA's: what the schedules may ask of each, and what TVM's code generator makes for it.

The kernels are those for CUDA, built without shuffles, tensor cores and library functions of CUDA (`scalars.portable`):
a row's sums meet in shared memory, accesses are of 128 bits, products are schedules by rule.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import tvm
import tvm_ffi

from rescompile.backends.cuda.targets import Architecture

KIB = 1 << 10


@dataclass(frozen=True)
class GpuLimits(Architecture):
    """Limits that every device of a kind keeps, not those of its largest.

    Attributes:
        threads: of a block; warp: threads that run together, 1 where that is not known.
        lanes: elements of the widest vector type of its language; doubles: whether that has numbers of 64 bits.
        suffix: of a file of its code; runs: what has to be there for the code to run.
    """

    threads: int = 256
    warp: int = 1
    lanes: int = 8
    doubles: bool = True
    suffix: str = ""
    runs: str = ""

    @property
    def number(self) -> int:
        """No compute capability of NVIDIA's: the families that need one refuse."""
        return 0

    @property
    def kind(self) -> str:
        """TVM's name of the target's kind."""
        return self.name.partition(":")[0]


def _rocm(chip: str, product: str, warp: int) -> GpuLimits:
    # HIP programming guide, hardware features: 64 KiB of LDS a workgroup, 1,024 work items.
    runs = "an AMD GPU with ROCm, and a build of TVM with the runtime for it"
    return GpuLimits(f"rocm:{chip}", product, 64 * KIB, 0, threads=1024, warp=warp, suffix="s", runs=runs)


_OPENCL = "an OpenCL driver, and a build of TVM with the runtime for it; the kernels alone run with any OpenCL host"
_METAL = "an Apple GPU, and a build of TVM with the runtime for it"
_WEBGPU = "a browser, and TVM's runtime for it"
# OpenCL 1.2, table 4.3 (minima: 32 KiB of local memory); Metal feature set tables (all families from Apple 4 on);
# WebGPU, limits (defaults).
GPU_LIMITS = {
    limits.name: limits
    for limits in (
        GpuLimits("opencl", "devices of OpenCL 1.2", 32 * KIB, 0, suffix="cl", runs=_OPENCL),
        _rocm("gfx90a", "MI200", 64),
        _rocm("gfx942", "MI300", 64),
        _rocm("gfx1100", "RX 7900", 32),
        GpuLimits("metal", "Apple GPUs", 32 * KIB, 0, 1024, 32, lanes=4, doubles=False, suffix="metal", runs=_METAL),
        GpuLimits("webgpu", "browsers", 16 * KIB, 0, lanes=4, doubles=False, suffix="wgsl", runs=_WEBGPU),
    )
}


def gpu_target(name: str) -> tvm.target.Target:
    """TVM's target of one of `GPU_LIMITS`."""
    limits = GPU_LIMITS[name]
    attributes: dict[str, Any] = {
        "kind": limits.kind,
        "max_num_threads": limits.threads,
        "max_shared_memory_per_block": limits.shared_bytes,
        "thread_warp_size": limits.warp,
    }
    if limits.kind == "rocm":
        attributes["mcpu"] = name.partition(":")[2]
    return tvm.target.Target(attributes, host="llvm")


def refusal(name: str, dtypes: set[str]) -> str:
    """Why a model with these element types cannot be compiled for a target here, one clause; empty when it can."""
    limits = GPU_LIMITS[name]
    if tvm_ffi.get_global_func(f"target.build.{limits.kind}", allow_missing=True) is None:
        return f"this build of TVM has no code generator for {limits.kind}"
    return "" if limits.doubles or "float64" not in dtypes else f"{limits.kind} has no numbers of 64 bits"
