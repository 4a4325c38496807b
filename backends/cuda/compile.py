"""Compile for an NVIDIA GPU, present or not: our norms, schedules for the rest, a cubin where there is a compiler."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import tvm
from tvm import relax

from rescompile.backends import artifact, constants, lowering
from rescompile.backends.artifact import Manifest
from rescompile.backends.compile import Progress, describe
from rescompile.backends.cuda import device, intrinsics
from rescompile.backends.cuda.build import builder
from rescompile.backends.cuda.choose import KernelChoice
from rescompile.backends.cuda.cubin import Cubin, to_cubin
from rescompile.backends.cuda.device import Device
from rescompile.backends.cuda.executable import CudaExecutable, cross_compiling, cuda_source
from rescompile.backends.cuda.lower_contraction import region_refusal
from rescompile.backends.cuda.pipeline import generate
from rescompile.backends.cuda.rules import CUDA_RULES, CudaEmitter
from rescompile.backends.cuda.schedule import schedule, schedule_with_rules
from rescompile.backends.cuda.targets import architecture
from rescompile.backends.fallback import Imports
from rescompile.backends.program import Program
from rescompile.backends.regions import group_epilogues
from rescompile.backends.reports import Region, generated
from rescompile.backends.targets import CompileTarget
from rescompile.backends.working import working_copy
from rescompile.errors import RescompileError
from rescompile.graph import Graph

if TYPE_CHECKING:
    from rescompile.backends.tuning_contest import Contest

SOURCE = "kernels.cu"


def compile_cuda(
    graph: Graph,
    target: CompileTarget,
    imports: Imports | None = None,
    progress: Progress | None = None,
    contest: Contest | None = None,
    database: str | Path | None = None,
    tuning: int | None = None,
) -> Program:
    """A program for `target`, which is an NVIDIA GPU; this machine need not have one.

    What computes each region is measured where the GPU is at hand, for at most `tuning` seconds, and remembered in
    `database`. A `contest` puts tuned schedules beside those of the rules.
    """
    if target.arch is None:
        raise RescompileError(f"The target '{target.name}' is not an NVIDIA GPU: use cuda:sm_90.")
    tell = progress or (lambda *_: None)
    intrinsics.load()
    limits = architecture(target.arch)
    work = working_copy(graph, lambda op: not region_refusal(op, limits, target.tf32))
    constants.fold(work, imports or Imports())
    group_epilogues(work)
    tell("lowering", 0, 3)
    choice = KernelChoice(limits)
    lowering.lower(CudaEmitter(work, choice, tf32=target.tf32), imports, contents=False, rules=CUDA_RULES)
    choice.choose(_device(target), builder(target), database, None if tuning is None else float(tuning))
    lowered = lowering.lower(CudaEmitter(work, choice, tf32=target.tf32), imports, rules=CUDA_RULES)
    module = generate(lowered.module, target.tvm)
    tell("scheduling", 1, 3)
    if contest is not None:
        module = contest.replaced(module, {}, lambda one: schedule(tvm.IRModule({"main": one}), target.tvm)["main"])
    scheduled = schedule_with_rules(module, target.tvm)
    with cross_compiling():
        executable = relax.build(scheduled.module, target=target.tvm, relax_pipeline=lowering.build_passes())
    source = cuda_source(executable.mod)
    tell("assembling", 2, 3)
    cubin = to_cubin(source, target.arch) if source else Cubin(b"", (), "")
    regions = [*lowered.regions.values(), *generated(module, lowered.regions)]
    for region in regions:
        region.tile = region.tile or scheduled.rules.get(region.name, "")
    if contest is not None:
        contest.annotate(regions)
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
        compiler=cubin.compiler if cubin else "",
        cpu=target.arch,
        regions=[_described(region, cubin) for region in regions],
        note=" ".join(
            [_note(cubin), _libraries(regions), *(contest.report.notes if contest is not None else ())]
        ).strip(),
    )
    tell("assembling", 3, 3)
    return Program(CudaExecutable(executable.mod, source, cubin.data if cubin else None), lowered.weights, manifest)


def _device(target: CompileTarget) -> Device | None:
    """This machine's GPU where it is of the target's architecture."""
    found = device.here()
    return found if found is not None and found.facts["arch"] == target.arch else None


def _described(region: Region, cubin: Cubin | None) -> dict[str, object]:
    """A region's entry, with what its kernel takes of a multiprocessor."""
    usage = (
        next((kernel for kernel in cubin.usage if kernel.kernel == f"{region.name}_kernel"), None) if cubin else None
    )
    return {**asdict(region), **({"usage": asdict(usage)} if usage else {})}


def _libraries(regions: list[Region]) -> str:
    called = sum(region.tile.startswith("library ") for region in regions)
    return f"{called} regions are computed by torch's libraries: torch is needed where it runs" if called else ""


def _note(cubin: Cubin | None) -> str:
    if cubin is None:
        return "source only: neither nvcc nor NVRTC was there to compile it, so the machine that runs it needs one"
    if not cubin.usage:
        return ""
    registers = max(kernel.registers for kernel in cubin.usage)
    spills = sum(kernel.spills for kernel in cubin.usage)
    return f"{len(cubin.usage)} kernels, at most {registers} registers, {spills} bytes of spills"
