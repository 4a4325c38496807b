"""Compile for an NVIDIA GPU, which need not be here: dlight schedules what Relax generates, norms have their kernel."""

from __future__ import annotations

from dataclasses import asdict

import tvm
from tvm import relax
from tvm.s_tir import dlight

from rescompile.backends import artifact, constants, cuda_code, cuda_intrinsics, lowering
from rescompile.backends.artifact import Manifest
from rescompile.backends.compile import Progress, describe
from rescompile.backends.cuda_norms import CudaNorms
from rescompile.backends.emitter import Emitter
from rescompile.backends.fallback import Imports
from rescompile.backends.program import Program
from rescompile.backends.regions import drop_identities
from rescompile.backends.reports import generated
from rescompile.backends.targets import CompileTarget
from rescompile.backends.working import working_copy
from rescompile.graph import Graph


def compile_cuda(graph: Graph, target: CompileTarget, imports: Imports, progress: Progress | None) -> Program:
    """A program for `target`. Without nvcc or NVRTC it holds CUDA source, and its manifest says so."""
    tell = progress or (lambda what, done, of: None)
    cuda_intrinsics.load()
    work = working_copy(graph)
    constants.fold(work, imports)
    drop_identities(work)
    tell("lowering", 0, 3)
    lowered = lowering.lower(Emitter(work, norms=CudaNorms()), imports)
    module = lowering.finish(lowered.module, target.tvm, schedule_for_gpu())
    tell("generating code", 1, 3)
    executable = relax.build(module, target=target.tvm, relax_pipeline=lowering.build_passes(), exec_mode="bytecode")
    tell("compiling for the GPU", 2, 3)
    texts = cuda_code.sources(executable)
    arch = str(target.arch)
    compiled = [cuda_code.compile_source(text, arch) for text in texts]
    known = {cuda_code.digest(text): code for text, code in zip(texts, compiled, strict=True) if code is not None}
    manifest = Manifest(
        target=target.name,
        device="cuda",
        inputs=artifact.infos(graph.inputs),
        outputs=artifact.infos(graph.outputs),
        model=graph.name,
        source_hash=artifact.fingerprint(describe(graph), lowered.weights),
        rescompile=artifact.version(),
        tvm=artifact.tvm_version(),
        sources={f"{cuda_code.digest(text)}.cu": text for text in texts},
        note=""
        if len(known) == len(texts)
        else "source only: neither nvcc nor NVRTC was there to compile it, so the machine that runs it needs one",
        regions=[asdict(region) for region in [*lowered.regions.values(), *generated(module, lowered.regions)]],
    )
    tell("compiling for the GPU", 3, 3)
    return Program(executable, lowered.weights, manifest, cubins={name: code.code for name, code in known.items()})


def schedule_for_gpu() -> tvm.transform.Pass:
    """dlight's rules, the most specialised first; what is scheduled already stays as it is."""
    return dlight.ApplyDefaultSchedule(
        dlight.gpu.Matmul(),
        dlight.gpu.GEMV(),
        dlight.gpu.Reduction(),
        dlight.gpu.GeneralReduction(),
        dlight.gpu.Transpose(),
        dlight.gpu.Fallback(),
    )


