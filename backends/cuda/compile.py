"""Compile for an NVIDIA GPU, present or not: our norms, schedules for the rest, a cubin where there is a compiler."""

from __future__ import annotations

from dataclasses import asdict

from tvm import relax

from rescompile.backends import artifact, constants, lowering
from rescompile.backends.artifact import Manifest
from rescompile.backends.compile import Progress, describe
from rescompile.backends.cuda.cubin import Cubin, to_cubin
from rescompile.backends.cuda.executable import CudaExecutable, cuda_source
from rescompile.backends.cuda.rules import CUDA_RULES, CudaEmitter
from rescompile.backends.cuda.schedule import schedule_with_rules
from rescompile.backends.emitter import Region
from rescompile.backends.fallback import Imports
from rescompile.backends.program import Program
from rescompile.backends.regions import group_epilogues
from rescompile.backends.targets import CompileTarget
from rescompile.backends.working import working_copy
from rescompile.errors import RescompileError
from rescompile.graph import Graph

SOURCE = "kernels.cu"
_SOURCE_ONLY = "source only: neither nvcc nor NVRTC was there when it was compiled; TVM compiles it when it is loaded"


def compile_cuda(
    graph: Graph, target: CompileTarget, imports: Imports | None = None, progress: Progress | None = None
) -> Program:
    """A program for `target`, which is an NVIDIA GPU; this machine need not have one."""
    tell = progress or (lambda *_: None)
    work = working_copy(graph)
    constants.fold(work)
    group_epilogues(work)
    tell("lowering", 0, 3)
    lowered = lowering.lower(CudaEmitter(work), imports, rules=CUDA_RULES)
    module = lowering.finish(lowered.module, target.tvm, None)
    tell("scheduling", 1, 3)
    scheduled = schedule_with_rules(module, target.tvm)
    executable = relax.build(scheduled.module, target=target.tvm, relax_pipeline=lowering.build_passes())
    source = cuda_source(executable.mod)
    tell("assembling", 2, 3)
    cubin = to_cubin(source, _arch(target)) if source else None
    for name, rule in scheduled.rules.items():
        if name not in lowered.regions:
            lowered.regions[name] = Region(name, "generated", tile=rule)
    manifest = Manifest(
        target=target.name,
        device="cuda",
        inputs=artifact.infos(graph.inputs),
        outputs=artifact.infos(graph.outputs),
        model=graph.name,
        source_hash=artifact.fingerprint(describe(graph), lowered.weights),
        rescompile=artifact.version(),
        tvm=artifact.tvm_version(),
        sources={SOURCE: source},
        regions=[asdict(region) for region in lowered.regions.values()],
        note=_note(cubin),
    )
    return Program(CudaExecutable(executable.mod, cubin.data if cubin else None), lowered.weights, manifest)


def _note(cubin: Cubin | None) -> str:
    if cubin is None:
        return _SOURCE_ONLY
    worst = max(cubin.usage, key=lambda kernel: kernel.registers, default=None)
    spills = sum(kernel.spills for kernel in cubin.usage)
    most = f", at most {worst.registers} registers" if worst else ""
    return f"{len(cubin.usage)} kernels by {cubin.compiler}{most}, {spills} bytes of spills"


def _arch(target: CompileTarget) -> str:
    if target.arch is None:
        raise RescompileError(f"The target '{target.name}' is not an NVIDIA GPU: use cuda:sm_90.")
    return target.arch
