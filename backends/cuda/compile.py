"""Compile for NVIDIA GPUs, present or not: our kernels, schedules for the rest, cubins where there is a compiler."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import tvm
from tvm import relax

from rescompile.backends import artifact, constants, lowering
from rescompile.backends.artifact import Code, Manifest
from rescompile.backends.compile import Progress, describe
from rescompile.backends.cuda import device, intrinsics
from rescompile.backends.cuda.build import builder
from rescompile.backends.cuda.choose import KernelChoice
from rescompile.backends.cuda.cubin import CUBIN_DRIVER, Cubin, code_arch, to_cubin
from rescompile.backends.cuda.device import Device
from rescompile.backends.cuda.executable import CudaExecutable, cross_compiling, cuda_source
from rescompile.backends.cuda.group_contractions import group_contractions
from rescompile.backends.cuda.lower_region import KeptRegions
from rescompile.backends.cuda.pipeline import generate
from rescompile.backends.cuda.ptx import to_ptx
from rescompile.backends.cuda.rules import CUDA_RULES, CudaEmitter
from rescompile.backends.cuda.schedule import schedule, schedule_with_rules
from rescompile.backends.cuda.storage import StoragePlan, plan_storage
from rescompile.backends.cuda.targets import architecture
from rescompile.backends.fallback import Imports
from rescompile.backends.heads import pack_heads
from rescompile.backends.program import Program
from rescompile.backends.regions import group_epilogues
from rescompile.backends.reports import Region, generated
from rescompile.backends.symbols import static
from rescompile.backends.targets import CompileTarget
from rescompile.backends.working import specialise, working_copy
from rescompile.errors import RescompileError
from rescompile.graph import Graph

if TYPE_CHECKING:
    from rescompile.backends.tuning_contest import Contest

SOURCE = "kernels.cu"
Extents = dict[str, int]  # symbols that have one value
# What PTX is made for where the code of the named architectures uses instructions of theirs alone.
_PLAIN = "sm_89"


@dataclass
class Settings:
    """How a model is compiled for GPUs.

    buckets: sizes of the batch to compile static code for, beside that for any; ptx: whether later GPUs are served.
    """

    imports: Imports
    progress: Progress
    contest: Contest | None = None
    database: str | Path | None = None
    tuning: int | None = None
    buckets: Sequence[int] = ()
    ptx: bool = True


@dataclass
class _Built:
    """The graph as code for one architecture and, perhaps, one size of batch."""

    module: Any
    source: str
    weights: dict[str, np.ndarray[Any, Any]]
    plan: StoragePlan
    regions: list[Region]
    libraries: list[str]
    note: str  # on what has no kernel of its own


@dataclass
class _Program:
    """What has been built so far."""

    codes: list[Code] = field(default_factory=list)
    executables: dict[str, Any] = field(default_factory=dict)
    weights: dict[str, np.ndarray[Any, Any]] = field(default_factory=dict)
    sources: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def add(
        self, built: _Built, arch: str, form: str, code: bytes | None, driver: tuple[int, int], at: Extents
    ) -> None:
        """Code, and the weights that it takes."""
        size = "".join(f".{name}={value}" for name, value in at.items())
        file = f"{arch}{size}.{form}.so"
        names = [self._weight(name, data) for name, data in built.weights.items()]
        self.codes.append(Code(file, arch, form, names, dict(at), driver, built.plan.peak))
        self.executables[file] = CudaExecutable(built.module, built.source, code, form)

    def _weight(self, name: str, data: np.ndarray[Any, Any]) -> str:
        """The name under which these contents are kept: once, whichever code takes them."""
        found, number = name, 1
        while found in self.weights:
            known = self.weights[found]
            if known.shape == data.shape and known.dtype == data.dtype and known.tobytes() == data.tobytes():
                return found
            number += 1
            found = f"{name}#{number}"
        self.weights[found] = data
        return found


_TORCH = "torch"  # in a target's `libs`: its libraries are there where the program runs


def compile_cuda(graph: Graph, targets: Sequence[CompileTarget], settings: Settings) -> Program:
    """A program for the GPUs of `targets`; this machine need not have one.

    What computes each region is measured where the GPU is at hand, for at most `tuning` seconds, and remembered in
    `database`. A contest puts tuned schedules beside those of the rules. RescompileError where a size of batch is asked
    for and rows of the batch are not independent.
    """
    for target in targets:
        if target.arch is None:
            raise RescompileError(f"The target '{target.name}' is not an NVIDIA GPU: use cuda:sm_90.")
    if settings.contest is not None and len(targets) > 1:
        raise RescompileError("Schedules are tuned for one architecture at a time: name one target, or tune nothing.")
    variants: list[Extents] = [{}, *_buckets(graph, settings.buckets)]
    intrinsics.load()
    program = _Program()
    built = {target.name: [_build(graph, target, extents, settings) for extents in variants] for target in targets}
    cubins = [
        _assemble(program, one, str(target.arch), extents)
        for target in targets
        for one, extents in zip(built[target.name], variants, strict=True)
    ]
    if settings.ptx and cubins[0] is not None:
        newest = max(targets, key=lambda target: architecture(str(target.arch)).number)
        _add_ptx(program, graph, newest, built[newest.name], variants, settings)
    first, cubin = built[targets[0].name][0], cubins[0]
    notes = [_note(cubin), _libraries(first.regions), first.note, *program.notes]
    notes += settings.contest.report.notes if settings.contest is not None else ()
    manifest = Manifest(
        target=_named(targets),
        device="cuda",
        inputs=artifact.infos(graph.inputs),
        outputs=artifact.infos(graph.outputs),
        model=graph.name,
        source_hash=artifact.fingerprint(describe(graph), first.weights),
        rescompile=artifact.version(),
        tvm=artifact.tvm_version(),
        sources=program.sources,
        compiler=cubin.compiler if cubin else "",
        cpu=",".join(str(target.arch) for target in targets),
        regions=[_described(region, cubin) for region in first.regions],
        note="; ".join(note for note in notes if note),
        weights=list(program.weights),
        codes=program.codes,
        symbols=list(dict.fromkeys(dim for value in graph.inputs for dim in value.shape or () if isinstance(dim, str))),
        libraries=first.libraries,
        storage=_storage(program, first.plan),
    )
    settings.progress("assembling", 3, 3)
    return Program(program.executables, program.weights, manifest)


def _build(graph: Graph, target: CompileTarget, extents: Extents, settings: Settings) -> _Built:
    """The graph as a virtual machine's code and CUDA source."""
    tell, contest = settings.progress, settings.contest
    limits = architecture(str(target.arch))
    kept = KeptRegions(limits, graph.ir, tf32=target.tf32)
    work = working_copy(graph, kept)
    if extents:
        specialise(work, extents)
    constants.fold(work, settings.imports)
    pack_heads(work)
    group_epilogues(work)
    group_contractions(work, limits, tf32=target.tf32)
    tell("lowering", 0, 3)
    choice = KernelChoice(limits, libraries=_TORCH in (target.tvm.attrs.get("libs") or ()))
    lowering.lower(CudaEmitter(work, choice, tf32=target.tf32), settings.imports, contents=False, rules=CUDA_RULES)
    limit = None if settings.tuning is None else float(settings.tuning)
    choice.choose(_device(target), builder(target), settings.database, limit)
    lowered = lowering.lower(CudaEmitter(work, choice, tf32=target.tf32), settings.imports, rules=CUDA_RULES)
    module = generate(lowered.module, target.tvm)
    tell("scheduling", 1, 3)
    if contest is not None:
        module = contest.replaced(module, {}, lambda one: schedule(tvm.IRModule({"main": one}), target.tvm)["main"])
    scheduled = schedule_with_rules(module, target.tvm)
    plans: list[StoragePlan] = []

    def own_storage(made: tvm.IRModule, _: tvm.transform.PassContext) -> tvm.IRModule:
        planned, plan = plan_storage(made)
        plans.append(plan)
        return planned

    with cross_compiling():
        passes = lowering.build_passes(tvm.transform.module_pass(own_storage, opt_level=0, name="PlanStorage"))
        executable = relax.build(scheduled.module, target=target.tvm, relax_pipeline=passes)
    regions = [*lowered.regions.values(), *generated(module, lowered.regions)]
    for region in regions:
        region.tile = region.tile or scheduled.rules.get(region.name, "")
    if contest is not None:
        contest.annotate(regions)
    source = cuda_source(executable.mod)
    return _Built(executable.mod, source, lowered.weights, plans[0], regions, packed_functions(module), kept.note())


def _assemble(program: _Program, built: _Built, arch: str, extents: Extents) -> Cubin | None:
    """Add the machine code, or the source where there is nothing to make machine code with."""
    exact = code_arch(built.source, arch)
    size = "".join(f".{name}={value}" for name, value in extents.items())
    program.sources[SOURCE if not program.sources else f"{arch}{size}.cu"] = built.source
    cubin = to_cubin(built.source, exact) if built.source else Cubin(b"", (), "none")
    if cubin is None:
        program.add(built, exact, "cuda", None, (0, 0), extents)
    else:
        program.add(built, exact, "cubin", cubin.data or None, CUBIN_DRIVER, extents)
    return cubin


def _add_ptx(
    program: _Program,
    graph: Graph,
    target: CompileTarget,
    built: Sequence[_Built],
    variants: Sequence[Extents],
    settings: Settings,
) -> None:
    """PTX for later GPUs: of the newest target's code, or, where that is its own alone, of code for any."""
    from rescompile.backends.targets import resolve

    if any(code_arch(one.source, str(target.arch)) != target.arch for one in built):
        target = replace(resolve(f"cuda:{_PLAIN}"), tf32=target.tf32)
        built = [_build(graph, target, extents, settings) for extents in variants]
    for one, extents in zip(built, variants, strict=True):
        ptx = to_ptx(one.source, str(target.arch)) if one.source else None
        if ptx is not None:
            program.add(one, str(target.arch), "ptx", ptx.data, ptx.driver, extents)
            program.notes += [ptx.note] if ptx.note and ptx.note not in program.notes else []


def _buckets(graph: Graph, sizes: Sequence[int]) -> list[Extents]:
    """The sizes of the batch to compile for. RescompileError where they make no sense, or rows are not independent."""
    if not sizes:
        return []
    from rescompile.backends.batches import batch_symbol, dependence

    if any(size < 1 for size in sizes):
        raise RescompileError(f"Sizes of the batch are positive, and {min(sizes)} is not.")
    symbol = batch_symbol(graph)
    reason = dependence(graph, symbol)
    if reason:
        raise RescompileError(
            f"Sizes of the batch cannot be compiled for: {reason}, so that rows added to fill the batch would change "
            f"the others; compile without sizes, or for one fixed batch."
        )
    return [{symbol: size} for size in sorted(set(sizes))]


def _named(targets: Sequence[CompileTarget]) -> str:
    """The targets as they are spelled."""
    if len(targets) == 1:
        return targets[0].name
    names = [str(target.arch) for target in targets]
    return f"cuda:{','.join(names)}{',tf32' if targets[0].tf32 else ''}"


def _storage(program: _Program, plan: StoragePlan) -> dict[str, int | None]:
    return {
        "weights": sum(int(data.nbytes) for data in program.weights.values()),
        "activations": plan.peak,
        "activations_unshared": static(plan.apart),
        "tensors": plan.tensors,
    }


def packed_functions(module: tvm.IRModule) -> list[str]:
    """What the code calls that neither it nor TVM's runtime holds."""
    found: dict[str, None] = {}

    def visit(node: Any) -> None:
        name = str(node.global_symbol)
        if not name.startswith(("vm.", "runtime.", "tvm.")):
            found[name] = None

    relax.analysis.post_order_visit(
        module["main"], lambda node: visit(node) if isinstance(node, relax.ExternFunc) else None
    )
    return list(found)


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
