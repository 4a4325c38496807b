"""Tuned schedules against our own kernels and default schedules: both are timed, the faster one is used and remembered.

For each fused region of a program the candidates are the kernel with its chosen tile and the plain form of the same
region in its fastest recorded schedule; for a generated loop nest, its default schedule and its fastest recorded one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import tvm
from tvm import relax, tirx
from tvm.s_tir import meta_schedule as ms

from rescompile.backends import threads
from rescompile.backends.kernels import Argument, Spec, Tile, arguments
from rescompile.backends.kernels.chooser import Arena, Entry, agree, aligned, in_turns, own_core
from rescompile.backends.kernels.emit import TVM_ERRORS
from rescompile.backends.reports import Region
from rescompile.backends.targets import CompileTarget
from rescompile.backends.tuning import Progress, TuningReport, fastest, search_all
from rescompile.backends.tuning_bench import Bench, Remote, Runner, parse_runner, runs_here
from rescompile.backends.tuning_records import Database, hash_of
from rescompile.backends.tuning_rivals import rival
from rescompile.backends.tuning_search import gather, normalized, why_not

TUNED = "tuned schedule"
DEFAULT = "default schedule"


@dataclass(frozen=True)
class Outcome:
    """Seconds of one call of our own function and of the tuned one; None where it was not timed."""

    own: float | None
    tuned: float | None
    remembered: bool = False

    @property
    def tuned_wins(self) -> bool:
        """Whether the tuned one is used: it is faster, or the only one that was ever timed."""
        return self.tuned is not None and (self.own is None or self.tuned < self.own)


def measure(
    function: tvm.tirx.PrimFunc,
    target: CompileTarget,
    buffers: Sequence[Argument],
    runner: str | Runner | None = None,
) -> float | None:
    """Seconds of one call of a function that takes `buffers`; None when it does not build or run.

    A buffer named `weight` is cold: each call reads another copy.

    Raises:
        RescompileError: the target cannot be timed here, or the runner does not answer.
    """
    return race([function], target, buffers, parse_runner(runner))[0]


def race(
    functions: Sequence[tvm.tirx.PrimFunc],
    target: CompileTarget,
    buffers: Sequence[Argument],
    runner: Runner,
) -> list[float | None]:
    """Seconds of one call of each function, timed in turns as the kernels' tiles are.

    None for one that does not build or run, or (where it is timed on this processor) gives other numbers than the
    first: such a one must not win.
    """
    if target.machine is None or isinstance(runner, Remote):
        return _race_elsewhere(functions, target, runner)
    if not runs_here(target):
        Bench(target, runner)  # says that it cannot be timed here
    threads.use(target.threads)
    arena = Arena()
    values = [_values(buffer, arena) for buffer in buffers]
    entries: dict[int, Entry] = {}
    reference: np.ndarray[Any, Any] | None = None
    dtype = next(buffer.dtype for buffer in buffers if buffer.output)
    for index, function in enumerate(functions):
        try:
            module = tvm.IRModule({"kernel": function.with_attr("global_symbol", "kernel")})
            executable = tvm.compile(module, target=target.tvm)
            entry = Entry((executable, executable["kernel"]), buffers, values, arena, cold=True)
            result = entry.result()
        except TVM_ERRORS:
            continue
        reference = result if reference is None else reference
        if agree(result, reference, dtype):
            entries[index] = entry
    with own_core():
        seconds = dict(zip(entries, in_turns(list(entries.values()), count()), strict=True))
    return [seconds.get(index) for index in range(len(functions))]


def _race_elsewhere(functions: Sequence[Any], target: CompileTarget, runner: Runner) -> list[float | None]:
    infos = [ms.arg_info.ArgInfo.from_prim_func(function) for function in functions]
    with Bench(target, runner) as bench:
        timings = bench.times([normalized(function) for function in functions], infos)
    return [timing.best if timing.seconds else None for timing in timings]


def _values(buffer: Argument, arena: Arena) -> np.ndarray[Any, Any]:
    """Numbers for which roots and logarithms exist, and zeros where they may be positions."""
    shape = tuple(extent or 1 for extent in buffer.shape)
    if "int" in buffer.dtype:
        return aligned(np.zeros(shape, buffer.dtype))
    values = arena.tensor(shape, buffer.dtype)
    return aligned(values if buffer.dtype == "bool" or buffer.name == "weight" else np.abs(values))


class Contest:
    """Tunes what a program is made of, and picks the faster function of each region."""

    def __init__(
        self,
        target: CompileTarget,
        trials: int = 0,
        database: str | Path | None = None,
        runner: str | Runner | None = None,
        progress: Progress | None = None,
    ) -> None:
        """RescompileError when the database or the place to time on cannot be used."""
        self.target = target
        self.trials = max(0, trials)
        self.runner = parse_runner(runner)
        self.bench = Bench(target, self.runner) if self.trials else None
        self.records = Database.open(database, target, create=self.trials > 0, runner=str(self.runner))
        self.progress = progress
        self.outcomes: dict[str, Outcome] = {}
        self.report = TuningReport(self.trials, notes=self.records.notes)

    def winners(
        self,
        module: tvm.IRModule,
        kernels: Mapping[str, tuple[Spec, Tile]],
        by_default: Callable[[tvm.tirx.PrimFunc], tvm.tirx.PrimFunc],
    ) -> dict[str, tvm.tirx.PrimFunc]:
        """The tuned functions that are faster than what they would replace, by name in the module.

        Args:
            kernels: specs and tiles of the module's functions that are kernels.
            by_default: schedules a generated function as it is used when nothing was tuned.
        """
        plain, buffers = self._entrants(module, kernels)
        if self.bench is not None:
            workloads, skipped = gather(plain)
            self.report = search_all(
                workloads, self.target, self.bench, self.records, self.trials, self.progress, skipped=skipped
            )
        found: dict[str, Any] = {}
        for variable, function in plain.functions.items():
            name = str(variable.name_hint)
            tuned = fastest(self.records, function) if name in buffers else None
            if isinstance(tuned, str):
                self.report.notes.append(f"{name}: {tuned}")
            if tuned is None or isinstance(tuned, str):
                continue
            own = module[variable] if name in kernels else by_default(module[variable])
            self.outcomes[name] = self._compare(own, tuned, buffers[name], is_kernel=name in kernels)
            if self.outcomes[name].tuned_wins:
                attributes = {} if module[variable].attrs is None else dict(module[variable].attrs)
                found[name] = tuned[0].with_attrs({**attributes, "tirx.is_scheduled": True})
        return found

    def _entrants(
        self, module: tvm.IRModule, kernels: Mapping[str, tuple[Spec, Tile]]
    ) -> tuple[tvm.IRModule, dict[str, list[Argument]]]:
        """The module with plain forms instead of kernels, and the buffers of the functions that can be tuned."""
        functions: dict[Any, Any] = {}
        buffers: dict[str, list[Argument]] = {}
        inputs = _input_counts(module)
        for variable, function in module.functions.items():
            name = str(variable.name_hint)
            functions[variable] = function
            if name in kernels:
                plain = rival(*kernels[name])
                if not isinstance(plain, str):
                    functions[variable] = plain
                    buffers[name] = arguments(*kernels[name])
            elif isinstance(function, tirx.PrimFunc) and why_not(function) is None and name in inputs:
                buffers[name] = _described(function, inputs[name])
        return tvm.IRModule(functions), buffers

    def _compare(self, own: Any, tuned: tuple[Any, float], buffers: Sequence[Argument], *, is_kernel: bool) -> Outcome:
        key = f"{hash_of(normalized(own))}:{hash_of(normalized(tuned[0]))}"
        known = self.records.choice(key)
        if known is not None:
            return Outcome(known.get("own"), known.get("tuned"), remembered=True)
        if self.bench is None and not runs_here(self.target):
            # Nothing can be timed: a kernel stays, and a record is better than a schedule that nobody timed.
            return Outcome(None, None if is_kernel else tuned[1])
        own_seconds, tuned_seconds = race([own, tuned[0]], self.target, buffers, self.runner)
        outcome = Outcome(own_seconds, tuned_seconds)
        if outcome.own is not None:
            self.records.remember(key, {"own": outcome.own, "tuned": outcome.tuned})
        return outcome

    def replaced(
        self,
        module: tvm.IRModule,
        kernels: Mapping[str, tuple[Spec, Tile]],
        by_default: Callable[[tvm.tirx.PrimFunc], tvm.tirx.PrimFunc],
    ) -> tvm.IRModule:
        """The module with the `winners` in it."""
        found = self.winners(module, kernels, by_default)
        functions = {
            variable: found.get(str(variable.name_hint), function) for variable, function in module.functions.items()
        }
        return tvm.IRModule(functions, attrs=module.attrs)

    def schedule(
        self, kernels: Mapping[str, tuple[Spec, Tile]], by_default: Callable[[tvm.tirx.PrimFunc], tvm.tirx.PrimFunc]
    ) -> tvm.transform.Pass:
        """The pass that puts in the winners and schedules what is left, kernels excepted, by default."""

        @tvm.transform.module_pass(opt_level=0, name="ScheduleTuned")  # type: ignore[untyped-decorator]
        def run(module: tvm.IRModule, _: tvm.transform.PassContext) -> tvm.IRModule:
            after = self.replaced(module, kernels, by_default)
            for variable, function in module.functions.items():
                same = isinstance(function, tirx.PrimFunc) and after[variable].same_as(function)
                if same and str(variable.name_hint) not in kernels:
                    after.update_func(variable, by_default(function))
            return after

        return run

    def annotate(self, regions: Iterable[Region]) -> None:
        """Write into regions what was timed, and which won."""
        for region in regions:
            outcome = self.outcomes.get(region.name)
            if outcome is None:
                continue
            own = region.tile or DEFAULT
            for tile, seconds in ((own, outcome.own), (TUNED, outcome.tuned)):
                if seconds is not None:
                    region.tried.append({"tile": tile, "microseconds": round(seconds * 1e6, 1)})
            region.tile = TUNED if outcome.tuned_wins else own
            used = outcome.tuned if outcome.tuned_wins else outcome.own
            if used is not None:
                region.microseconds = round(used * 1e6, 1)


def _input_counts(module: tvm.IRModule) -> dict[str, int]:
    """How many of a function's buffers are inputs; its outputs follow them."""
    counts: dict[str, int] = {}

    def visit(expr: Any) -> None:
        if isinstance(expr, relax.Call) and isinstance(expr.op, tvm.ir.Op) and expr.op.name == "relax.call_tir":
            counts[str(expr.args[0].name_hint)] = len(expr.args[1].fields)

    for function in module.functions.values():
        if isinstance(function, relax.Function):
            relax.analysis.post_order_visit(function, visit)
    return counts


def _described(function: Any, inputs: int) -> list[Argument]:
    return [
        Argument(f"buffer{index}", tuple(int(extent) for extent in buffer.shape), str(buffer.dtype), index >= inputs)
        for index, buffer in enumerate(function.params)
    ]
