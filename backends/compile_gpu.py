"""Compile for a GPU that is not NVIDIA's: the same kernels without what only CUDA has, as source or as AMD's code."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import tvm_ffi
from tvm import relax

from rescompile.backends import artifact, constants, lowering
from rescompile.backends.artifact import Manifest
from rescompile.backends.compile import Progress, describe
from rescompile.backends.cuda.choose import KernelChoice
from rescompile.backends.cuda.lower_region import KeptRegions
from rescompile.backends.cuda.pipeline import generate
from rescompile.backends.cuda.rules import CUDA_RULES, CudaEmitter
from rescompile.backends.cuda.scalars import portable
from rescompile.backends.cuda.schedule import schedule_with_rules
from rescompile.backends.fallback import Imports
from rescompile.backends.gpu_limits import GpuLimits, refusal
from rescompile.backends.program import Program
from rescompile.backends.regions import group_epilogues
from rescompile.backends.reports import generated
from rescompile.backends.targets import CompileTarget
from rescompile.backends.working import working_copy
from rescompile.errors import RescompileError
from rescompile.graph import Graph

_UNLINKED = "its code objects are not linked: ROCm, with its device libraries and ld.lld, is not here"


def compile_gpu(
    graph: Graph, target: CompileTarget, imports: Imports | None = None, progress: Progress | None = None
) -> Program:
    """A program for one of `gpu_limits.GPU_LIMITS`; nothing of it can be run or timed here.

    RescompileError when the target's code generator is missing, or has not the graph's types.
    """
    limits = target.gpu
    if limits is None:
        raise RescompileError(
            f"The target '{target.name}' is none of the other GPUs: use opencl, metal, webgpu or rocm."
        )
    reason = refusal(limits.name, {value.dtype or "" for value in graph.values})
    if reason:
        raise RescompileError(f"The model cannot be compiled for {target.name}: {reason}.")
    tell = progress or (lambda *_: None)
    with portable(limits.lanes):
        kept = KeptRegions(limits, graph.ir)
        work = working_copy(graph, kept)
        constants.fold(work, imports or Imports())
        group_epilogues(work)
        tell("lowering", 0, 2)
        lowered = lowering.lower(CudaEmitter(work, KernelChoice(limits)), imports, rules=CUDA_RULES)
        module = generate(lowered.module, target.tvm)
        scheduled = schedule_with_rules(module, target.tvm)
    tell("generating", 1, 2)
    with _linking(limits) as linked:
        executable = relax.build(scheduled.module, target=target.tvm, relax_pipeline=lowering.build_passes())
    regions = [*lowered.regions.values(), *generated(module, lowered.regions)]
    for region in regions:
        region.tile = region.tile or scheduled.rules.get(region.name, "")
    notes = [f"it runs with {limits.runs}", *([] if linked else [_UNLINKED]), kept.note()]
    manifest = Manifest(
        target=target.name,
        device=limits.kind,
        inputs=artifact.infos(graph.inputs),
        outputs=artifact.infos(graph.outputs),
        model=graph.name,
        source_hash=artifact.fingerprint(describe(graph), lowered.weights),
        rescompile=artifact.version(),
        tvm=artifact.tvm_version(),
        sources={f"kernels.{limits.suffix}": _source(executable.mod)},
        regions=[asdict(region) for region in regions],
        note="; ".join(note for note in notes if note),
    )
    tell("generating", 2, 2)
    return Program(executable, lowered.weights, manifest)


def _source(module: Any) -> str:
    """The code of all GPU modules that a module imports, as text."""
    found, stack = [], [module]
    while stack:
        here = stack.pop()
        for imported in here.imports:
            stack.append(imported)
            if imported.kind not in ("llvm", "c", "relax.VMExecutable"):
                found.append(str(imported.inspect_source()))
    return "\n".join(found)


@contextmanager
def _linking(limits: GpuLimits) -> Iterator[bool]:
    """Let TVM make AMD's code objects where no ROCm is: they are not linked then. Whether what is made is linked."""
    if limits.kind != "rocm" or _rocm_is_here():
        yield True
        return
    names = ("tvm_callback_rocm_bitcode_path", "tvm_callback_rocm_link")
    before: dict[str, Callable[..., Any]] = {
        name: found for name in names if (found := tvm_ffi.get_global_func(name, allow_missing=True)) is not None
    }
    tvm_ffi.register_global_func(names[0], lambda *_: [], override=True)
    tvm_ffi.register_global_func(names[1], lambda code: code, override=True)
    try:
        yield False
    finally:
        for name, function in before.items():
            tvm_ffi.register_global_func(name, function, override=True)


def _rocm_is_here() -> bool:
    from tvm.support import rocm

    try:
        return bool(rocm.find_rocm_path() and rocm.find_lld(required=False))
    except RuntimeError:
        return False
