"""The processor that kernels are built for: vector width, registers, threads, LLVM target."""

from __future__ import annotations

import os
from dataclasses import dataclass

import tvm
import tvm_ffi

from rescompile.errors import RescompileError

# TVM turns a local buffer of at most this many bytes into an alloca (kMaxStackAlloca in tvm's codegen);
# a larger one is fetched from a workspace pool and can no longer live in registers.
STACK_ALLOCA_BYTES = 1024


@dataclass(frozen=True)
class Machine:
    """What a kernel's tile shapes depend on.

    Attributes:
        lanes: float32 elements of one vector register (16 AVX-512, 8 AVX2, 4 SSE or NEON).
        registers: architectural vector registers.
        threads: tasks that run at the same time.
        target: LLVM target options as sorted pairs, e.g. (("kind", "llvm"), ("mcpu", "skylake")).
    """

    lanes: int
    registers: int
    threads: int
    target: tuple[tuple[str, str | int], ...]

    @staticmethod
    def host(threads: int | None = None) -> Machine:
        """The machine this process runs on; `threads` defaults to TVM's own count."""
        name = str(tvm_ffi.get_global_func("tvm.codegen.llvm.GetHostCPUName")())
        found = tvm_ffi.get_global_func("tvm.codegen.llvm.GetHostCPUFeatures")()
        features = {str(k) for k, on in dict(found or {}).items() if bool(on)}
        if threads is None:
            threads = int(tvm_ffi.get_global_func("runtime.NumThreads")())
        # A hypervisor can hide what the processor's name promises: then the name would give illegal instructions.
        if features and not _promised(name) <= features:
            name = next(level for level in _X86_LEVELS if _promised(level) <= features)
        return _machine(name, None, threads)

    @staticmethod
    def named(mcpu: str, threads: int | None = None, triple: str | None = None) -> Machine:
        """A machine by LLVM's processor name, such as "x86-64-v3" or "skylake-avx512", for cross compilation.

        Raises:
            RescompileError: LLVM does not know the processor.
        """
        return _machine(mcpu, triple, threads or os.cpu_count() or 1)

    @property
    def is_host(self) -> bool:
        """Whether kernels for this machine can be timed by this process."""
        return self.target == Machine.host(self.threads).target

    def tvm_target(self) -> tvm.target.Target:
        """The TVM target that kernels for this machine are compiled with."""
        return tvm.target.Target({**dict(self.target), "num-cores": self.threads})

    def vector(self, dtype: str) -> int:
        """Elements of one register in the type that `dtype` is computed in."""
        return max(2, self.lanes // 2) if dtype == "float64" else self.lanes


_X86_LEVELS = ("x86-64-v4", "x86-64-v3", "x86-64-v2", "x86-64")
_WIDE = ("avx512f", "avx512vl", "avx512dq", "avx512bw", "avx2", "fma", "avx", "sse4.2")


def _has(target: tvm.target.Target, feature: str) -> bool:
    return bool(tvm_ffi.get_global_func("target.llvm_cpu_has_feature")(feature, target))


def _promised(mcpu: str) -> set[str]:
    """The vector extensions that LLVM would use for a processor of this name."""
    target = tvm.target.Target({"kind": "llvm", "mcpu": mcpu})
    return {feature for feature in _WIDE if _has(target, feature)}


def _machine(mcpu: str, triple: str | None, threads: int) -> Machine:
    options: dict[str, str | int] = {"kind": "llvm", "mcpu": mcpu}
    if triple is not None:
        options["mtriple"] = triple
    try:
        target = tvm.target.Target(options)
    except (ValueError, RuntimeError) as error:
        raise RescompileError(f"LLVM takes no target {options}: {error}; name a processor it knows.") from error
    system = str(tvm_ffi.get_global_func("target.llvm_get_system_triple")())
    if not tvm_ffi.get_global_func("target.llvm_is_valid_cpu")(mcpu, triple or system):
        raise RescompileError(f"LLVM knows no processor named '{mcpu}'; try 'x86-64-v3' or 'generic'.")
    if _has(target, "avx512f"):
        lanes, registers = 16, 32
    elif _has(target, "avx2"):
        lanes, registers = 8, 16
    else:
        arm = "aarch64" in str(target.attrs.get("mtriple", ""))
        lanes, registers = 4, 32 if arm else 16
    return Machine(lanes, registers, threads, tuple(sorted(options.items())))
