"""Names of machines to compile for: `cpu`, `cpu:NAME`, `cuda:sm_90[,sm_80][,tf32]`, or anything TVM calls a target."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import tvm
import tvm_ffi

from rescompile.backends import threads as threading
from rescompile.backends.cuda.targets import cuda_target
from rescompile.backends.gpu_limits import GPU_LIMITS, GpuLimits, gpu_target
from rescompile.backends.kernels import Machine
from rescompile.errors import RescompileError, nearest

_EXTENSIONS = ("avx", "fma", "avx2", "avx512f", "avx512bw", "avx512dq", "avx512vl")
_NAMED = ("cpu", "cuda:sm_90", "cuda:sm_80", *GPU_LIMITS)


@dataclass(frozen=True)
class CompileTarget:
    """A machine to compile for. `machine` describes a processor to the kernels; None for a GPU."""

    name: str
    tvm: Any
    machine: Machine | None
    threads: int
    host: bool  # whether this very machine: then kernels can be timed and the program can run
    tf32: bool = False  # whether a GPU's products of float32 may be rounded to 10 bits after the point

    @property
    def extensions(self) -> list[str]:
        """Vector extensions of x86 that code for this machine may use, by Linux's names."""
        if self.machine is None:
            return []
        has = tvm_ffi.get_global_func("target.llvm_cpu_has_feature")
        return [name for name in _EXTENSIONS if has(name, self.tvm)]

    @property
    def cuda(self) -> bool:
        """Whether it is an NVIDIA GPU."""
        return str(self.tvm.kind.name) == "cuda"

    @property
    def arch(self) -> str | None:
        """Compute capability of an NVIDIA GPU, such as sm_90."""
        return str(self.tvm.attrs["arch"]) if self.cuda else None

    @property
    def gpu(self) -> GpuLimits | None:
        """The limits of a GPU that is not NVIDIA's."""
        return GPU_LIMITS.get(self.name)


def resolve_all(target: str | Mapping[str, Any], threads: int | None = None) -> list[CompileTarget]:
    """The machines of that name: several GPUs of NVIDIA's where it lists them, `cuda:sm_80,sm_90[,tf32]`."""
    if not isinstance(target, str) or not target.startswith("cuda:"):
        return [resolve(target, threads)]
    parts = [part.strip().removeprefix("cuda:") for part in target.removeprefix("cuda:").split(",")]
    names = [part for part in parts if part != "tf32"]
    if len(names) < 2:
        return [resolve(target, threads)]
    option = ",tf32" if "tf32" in parts else ""
    return list({name: resolve(f"cuda:{name}{option}") for name in names}.values())


def resolve(target: str | Mapping[str, Any], threads: int | None = None) -> CompileTarget:
    """The machine of that name. RescompileError, with the nearest name, when there is none."""
    threading.prepare()
    count = threads or threading.available()
    if target == "cpu":
        machine = Machine.host(count)
        return CompileTarget("cpu", machine.tvm_target(), machine, count, host=True)
    if isinstance(target, str) and target.startswith("cpu:"):
        machine = Machine.named(target.removeprefix("cpu:"), count)
        return CompileTarget(target, machine.tvm_target(), machine, count, host=False)
    found = re.fullmatch(r"cuda:(sm_\d+)(,tf32)?", target) if isinstance(target, str) else None
    if found is not None:
        return replace(_cuda(str(target), {"arch": found[1]}), tf32=found[2] is not None)
    if isinstance(target, str) and target in GPU_LIMITS:
        return CompileTarget(target, gpu_target(target), None, 1, host=False)
    return _of_tvm(target, count)


def _of_tvm(target: str | Mapping[str, Any], threads: int) -> CompileTarget:
    spelled = target if isinstance(target, str) else json.dumps(dict(target))
    if isinstance(target, str) and target.split(":")[0] in {name.split(":")[0] for name in GPU_LIMITS}:
        raise RescompileError(
            f"There is no target '{target}'{nearest(target, GPU_LIMITS)}: use {', '.join(GPU_LIMITS)}."
        )
    try:
        made = tvm.target.Target(target if isinstance(target, str) else dict(target))
    except (ValueError, TypeError, RuntimeError) as error:
        known = [*_NAMED, *(str(kind) for kind in tvm.target.Target.list_kinds())]
        raise RescompileError(
            f"There is no target '{spelled}'{nearest(spelled, known)}: use {', '.join(_NAMED)}, "
            f"or a TVM target as JSON."
        ) from error
    kind = str(made.kind.name)
    if kind == "cuda":
        options = {str(key): value for key, value in dict(made.attrs).items()}
        return _cuda(spelled, options)
    if kind != "llvm":
        raise RescompileError(
            f"The target '{spelled}' is of kind {kind}, which this build of TVM generates no code for, or which there "
            f"are no schedules for: use {', '.join(_NAMED)}."
        )
    mcpu, triple = made.attrs.get("mcpu"), made.attrs.get("mtriple")
    if mcpu is None:
        machine = Machine.host(threads)
        return CompileTarget(spelled, machine.tvm_target(), machine, threads, host=True)
    machine = Machine.named(str(mcpu), threads, str(triple) if triple is not None else None)
    host = dict(machine.target).get("mcpu") == dict(Machine.host(threads).target).get("mcpu") and triple is None
    return CompileTarget(spelled, machine.tvm_target(), machine, threads, host=host)


def _cuda(name: str, options: dict[str, Any]) -> CompileTarget:
    return CompileTarget(name, cuda_target(str(options["arch"]), options), None, 1, host=False)
