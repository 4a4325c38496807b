"""Compile for a processor: kernels with chosen tiles, channels last inside, the rest generated and scheduled."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from tvm import relax

from rescompile.backends import artifact, constants, lowering, threads
from rescompile.backends.artifact import Manifest
from rescompile.backends.compile import Progress, describe
from rescompile.backends.concat_in_place import share_concats
from rescompile.backends.emitter import Emitter
from rescompile.backends.fallback import Imports
from rescompile.backends.heads import pack_heads
from rescompile.backends.kernel_set import KernelSet
from rescompile.backends.kernels import schedule_default
from rescompile.backends.layouts import wanted_borders
from rescompile.backends.lower_conv import padded_input
from rescompile.backends.program import Program
from rescompile.backends.region_draft import why_not
from rescompile.backends.regions import group_epilogues
from rescompile.backends.reports import concatenations, generated, written_out
from rescompile.backends.rules import CPU_RULES
from rescompile.backends.schedule import schedule_generated
from rescompile.backends.targets import CompileTarget
from rescompile.backends.working import working_copy
from rescompile.errors import RescompileError
from rescompile.graph import Graph, Op

if TYPE_CHECKING:
    from rescompile.backends.tuning_contest import Contest


def compile_cpu(
    graph: Graph,
    target: CompileTarget,
    imports: Imports,
    database: str | Path | None,
    tuning: int | None,
    progress: Progress | None,
    contest: Contest | None = None,
) -> Program:
    """A program for `target`, which is a processor; a `contest` puts tuned schedules beside its kernels."""
    reasons: dict[str, str] = {}

    def keeps(op: Op) -> bool:
        reasons[op.name] = why_not(op, graph.ir == "onnx")
        return not reasons[op.name]

    work = working_copy(graph, keeps)
    constants.fold(work, imports)
    pack_heads(work)
    group_epilogues(work)
    shared = share_concats(work)
    borders = wanted_borders(work, padded_input)
    if target.machine is None:
        raise RescompileError(f"The target '{target.name}' is not a processor: use cpu.")
    kernels = KernelSet(target.machine)
    lowering.lower(Emitter(work, kernels, borders, shared), imports, contents=False, rules=CPU_RULES)
    threads.use(target.threads)
    kernels.choose(database, None if tuning is None else float(tuning))
    lowered = lowering.lower(Emitter(work, kernels, borders, shared), imports, rules=CPU_RULES)
    schedule = schedule_generated(lowered.regions)
    if contest is not None:
        schedule = contest.schedule(kernels.called(lowered.regions), schedule_default)
    module = lowering.finish(lowered.module, target.tvm, schedule)
    regions = [*lowered.regions.values(), *generated(module, lowered.regions), *concatenations(shared)]
    regions += written_out({name: why for name, why in reasons.items() if why})
    if contest is not None:
        contest.annotate(regions)
    executable = relax.build(module, target=target.tvm, relax_pipeline=lowering.build_passes(), exec_mode="compiled")
    manifest = Manifest(
        target=target.name,
        device="cpu",
        cpu=str(dict(target.machine.target).get("mcpu", "")),
        extensions=target.extensions,
        inputs=artifact.infos(graph.inputs),
        outputs=artifact.infos(graph.outputs),
        model=graph.name,
        source_hash=artifact.fingerprint(describe(graph), lowered.weights),
        threads=target.threads,
        rescompile=artifact.version(),
        tvm=artifact.tvm_version(),
        regions=[asdict(region) for region in regions],
        note="" if contest is None else " ".join(contest.report.notes),
    )
    return Program(executable, lowered.weights, manifest)
