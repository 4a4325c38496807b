"""The search for a schedule of one workload, by MetaSchedule's evolution of traces, and the budget for several."""

from __future__ import annotations

import logging
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import tvm
from tvm import relax, s_tir, tirx
from tvm.s_tir import meta_schedule as ms
from tvm.s_tir.analysis import estimate_tir_flops
from tvm.s_tir.meta_schedule import _ffi_api
from tvm.s_tir.meta_schedule.logging import get_logging_func

from rescompile.backends import threads
from rescompile.backends.kernels.emit import TVM_ERRORS
from rescompile.backends.targets import CompileTarget
from rescompile.backends.tuning_bench import Bench, Timing
from rescompile.backends.tuning_records import Database, hash_of

BATCH = 32  # candidates that are built before any is timed
POPULATION = 512
# MetaSchedule's cost model guesses at random until it has seen this many candidates.
WARM_UP = 100
# What moving one element costs beside one floating point operation: a copy has none, and takes time all the same.
OPERATIONS_PER_ELEMENT = 4
_SERIAL = 0  # tirx.ForKind


@dataclass
class Workload:
    """A function to find a schedule for, in the form in which records know it.

    Attributes:
        functions: names of the functions of the module that are this one.
        calls: of all of them in one run of the module.
        work: estimated floating point operations of those calls, or what its memory traffic counts for.
    """

    module: Any
    functions: list[str]
    calls: int
    work: float


@dataclass
class Search:
    """What a search did for one workload."""

    functions: list[str]
    work: float
    trials: int = 0
    failed: int = 0
    seconds: float | None = None  # of the fastest candidate, past runs included
    reasons: list[str] = field(default_factory=list)  # why candidates failed, and why the search ended early


def normalized(function: Any) -> Any:
    """The function alone in a module, without what does not change its code."""
    for name in ("global_symbol", "op_pattern"):
        function = function.without_attr(name)
    return tvm.IRModule({"main": function.with_attr("global_symbol", "main").with_attr("tirx.noalias", True)})


def why_not(function: Any) -> str | None:
    """Why no schedule is searched for a function, None when one is."""
    if function.attrs is not None and function.attrs.get("tirx.is_scheduled"):
        return "it is scheduled already"
    if function.attrs is not None and function.attrs.get("tirx.is_host_func"):
        return "it runs on the host"
    for parameter in function.params:
        shape = getattr(parameter, "shape", None)
        if shape is None or any(not isinstance(extent, int | tirx.IntImm) for extent in shape):
            return "its shapes are known at run time only"
    try:
        schedule = s_tir.Schedule(normalized(function))
        blocks = schedule.get_child_blocks(schedule.get_sblock("root", func_name="main"))
        kinds = {int(schedule.get(loop).kind) for block in blocks for loop in schedule.get_loops(block)}
    except TVM_ERRORS:
        return "it is a finished kernel"
    if not blocks:
        return "it is a finished kernel"
    return None if kinds <= {_SERIAL} else "it is scheduled already"


def gather(module: tvm.IRModule) -> tuple[list[Workload], dict[str, str]]:
    """The workloads of a module, equal ones once, the most work first; and why the other functions are none."""
    calls = call_counts(module)
    found: dict[str, Workload] = {}
    skipped: dict[str, str] = {}
    for variable, function in module.functions.items():
        name = str(variable.name_hint)
        if not isinstance(function, tirx.PrimFunc):
            continue
        reason = why_not(function)
        if reason is not None:
            skipped[name] = reason
            continue
        one = normalized(function)
        workload = found.setdefault(hash_of(one), Workload(one, [], 0, 0.0))
        workload.functions.append(name)
        workload.calls += calls.get(name, 1)
        workload.work += calls.get(name, 1) * _work(one)
    return sorted(found.values(), key=lambda workload: -workload.work), skipped


def call_counts(module: tvm.IRModule) -> dict[str, int]:
    """How often the module's functions call each loop nest."""
    counts: dict[str, int] = {}

    def visit(expr: Any) -> None:
        if isinstance(expr, relax.Call) and isinstance(expr.op, tvm.ir.Op) and expr.op.name == "relax.call_tir":
            name = str(expr.args[0].name_hint)
            counts[name] = counts.get(name, 0) + 1

    for function in module.functions.values():
        if isinstance(function, relax.Function):
            relax.analysis.post_order_visit(function, visit)
    return counts


def _work(module: Any) -> float:
    moved = sum(math.prod(int(extent) for extent in parameter.shape) for parameter in module["main"].params)
    try:
        flops = float(estimate_tir_flops(module))
    except TVM_ERRORS:
        flops = 0.0
    return max(flops, OPERATIONS_PER_ELEMENT * moved)


def split_budget(trials: int, work: Sequence[float]) -> list[int]:
    """`trials` in proportion to `work`, to the largest remainders; the sum is `trials`."""
    total = sum(work)
    if not work or total <= 0:
        return [0] * len(work)
    exact = [trials * part / total for part in work]
    shares = [int(share) for share in exact]
    order = sorted(range(len(work)), key=lambda i: (shares[i] - exact[i], i))
    for i in order[: trials - sum(shares)]:
        shares[i] += 1
    return shares


class _Context(ms.TuneContext):  # type: ignore[misc]
    """MetaSchedule's context, less its import of the tensor intrinsics of all GPUs and DSPs, which takes 20 s."""

    def __init__(self, module: Any, target: Any, strategy: Any, seed: int) -> None:
        kind = str(target.kind.name)
        # The rules of the plain kind: those of a kind with tensor instructions need the intrinsics, and no float32.
        space = ms.space_generator.PostOrderApply(
            sch_rules=ms.schedule_rule.ScheduleRule.create(kind),
            postprocs=ms.postproc.Postproc.create(kind),
            mutator_probs=ms.mutator.Mutator.create(kind),
        )
        say = get_logging_func(logging.getLogger(__name__))
        # `__init_handle_by_constructor__` is how TVM's own classes are made; the class is registered by TVM.
        self.__init_handle_by_constructor__(
            _ffi_api.TuneContext, module, target, space, strategy, "main", threads.available(), seed, say
        )
        _ffi_api.TuneContextInitialize(self)


class Searcher:
    """Searches workloads one after the other; what one candidate or one workload breaks, it breaks for itself."""

    def __init__(self, target: CompileTarget, bench: Bench, database: Database, trials: int, seed: int | None) -> None:
        self.target = target
        self.bench = bench
        self.database = database
        self.random = random.Random(seed)
        models = ms.cost_model
        self.model = models.XGBModel(num_tuning_cores=threads.available()) if trials > WARM_UP else models.RandomModel()

    def search(self, workload: Workload, trials: int, step: Callable[[int], None]) -> Search:
        """Spend trials on a workload; `step` is told how many candidates were timed."""
        search = Search(list(workload.functions), workload.work)
        if trials:
            try:
                self._evolve(workload, trials, search, step)
            except (*TVM_ERRORS, OSError, AttributeError, KeyError) as error:
                lines = str(error).strip().splitlines()
                search.reasons.append(f"the search ended: {lines[-1][:300] if lines else type(error).__name__}")
        best = self.database.best(workload.module)
        if best:
            search.seconds = min(float(seconds) for seconds in best[0].run_secs)
        return search

    def _evolve(self, workload: Workload, trials: int, search: Search, step: Callable[[int], None]) -> None:
        batch = min(BATCH, trials)
        population = min(POPULATION, max(32, 4 * trials))
        strategy = ms.search_strategy.EvolutionarySearch(
            population_size=population, init_min_unmeasured=min(50, population // 2)
        )
        context = _Context(workload.module, self.target.tvm, strategy, self.random.randrange(1, 1 << 30))
        context.pre_tuning(trials, batch, None, self.database.memory, self.model)
        try:
            while search.trials < trials:
                candidates = context.generate_measure_candidates()
                if not candidates:
                    break
                timings = self.bench.times(
                    [candidate.sch.mod for candidate in candidates], [candidate.args_info for candidate in candidates]
                )
                results = [timing.as_result() for timing in timings]
                context.notify_runner_results(candidates, results)
                self.model.update(context, candidates, results)
                self._keep(workload, candidates, timings, search)
                step(len(candidates))
        finally:
            context.post_tuning()

    def _keep(self, workload: Workload, candidates: Sequence[Any], timings: Sequence[Timing], search: Search) -> None:
        for candidate, timing in zip(candidates, timings, strict=True):
            search.trials += 1
            if timing.seconds is None:
                search.failed += 1
                if timing.reason not in search.reasons:
                    search.reasons.append(timing.reason)
            else:
                trace, infos = candidate.sch.trace, candidate.args_info
                self.database.add(workload.module, trace, timing.seconds, self.target.tvm, infos)
