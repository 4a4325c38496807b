"""Schedule tuning: search with MetaSchedule, keep the records, use them again.

    report = tune(module, "cpu", trials=200, database="tuned/")     # searches, writes records
    module, used = apply_database(module, "cpu", "tuned/")          # takes the fastest recorded schedules

What is tuned are the functions of a module that have no schedule yet: generated loop nests, and the plain forms of
fused regions (`tuning_rivals`). Whether a tuned schedule is used instead of a kernel of ours is decided by timing both
(`tuning_contest`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import tvm
from tvm import tirx

from rescompile.backends import targets
from rescompile.backends.kernels.emit import TVM_ERRORS
from rescompile.backends.targets import CompileTarget
from rescompile.backends.tuning_bench import Bench, Runner, parse_runner
from rescompile.backends.tuning_records import Database, replay
from rescompile.backends.tuning_search import Search, Searcher, Workload, gather, normalized, split_budget, why_not
from rescompile.errors import RescompileError

Progress = Callable[[str, int, int], None]
TargetLike = str | Mapping[str, Any] | CompileTarget


@dataclass
class TuningReport:
    """What tuning did.

    Attributes:
        spent: candidates that were built and timed, of the `trials` asked for.
        searches: one for each distinct workload, the most work first.
        skipped: functions that were not tuned, and why.
        database: the folder that holds the records, empty where nothing was tuned.
    """

    trials: int
    spent: int = 0
    failed: int = 0
    seconds: float = 0.0
    database: str = ""
    searches: list[Search] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)

    def __str__(self) -> str:
        lines = [
            f"{self.spent} of {self.trials} trials on {len(self.searches)} workloads in {self.seconds:.0f} s, "
            f"{self.failed} failed"
        ]
        for search in self.searches:
            best = "no schedule" if search.seconds is None else f"{search.seconds * 1e6:.1f} µs"
            lines.append(f"  {search.functions[0]}: {best} after {search.trials} trials, {search.failed} failed")
            lines += [f"    {reason}" for reason in search.reasons]
        lines += [f"  {name}: not tuned, {reason}" for name, reason in self.skipped.items()]
        return "\n".join([*lines, *(f"  {note}" for note in self.notes)])


@dataclass
class ApplyReport:
    """Which functions took a recorded schedule (with its seconds), and why others did not."""

    applied: dict[str, float] = field(default_factory=dict)
    missed: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def tune(
    module: tvm.IRModule,
    target: TargetLike,
    *,
    trials: int,
    database: str | Path | None = None,
    progress: Progress | None = None,
    runner: str | Runner | None = None,
    seed: int | None = None,
) -> TuningReport:
    """Search for schedules of a module's functions and keep what is found; the module does not change.

    Args:
        module: of Relax functions and loop nests, or of loop nests alone; equal ones are searched once.
        trials: candidates to build and time, split over the workloads by their floating point operations.
        database: the folder of records, made where there is none; by default one in the user's cache.
        progress: told of each batch of candidates.
        runner: `local`, or `rpc://host:port/key` for the machines at TVM's RPC tracker.
        seed: of the search; the timings differ from run to run all the same.

    Raises:
        RescompileError: a package is missing, the database or the runner cannot be used. A candidate or a workload
            that fails is reported, never raised.
    """
    if trials <= 0:
        return TuningReport(0)
    where = _resolved(target)
    place = parse_runner(runner)
    bench = Bench(where, place)
    records = Database.open(database, where, create=True, runner=str(place))
    workloads, skipped = gather(module)
    return search_all(workloads, where, bench, records, trials, progress, seed, skipped)


def search_all(
    workloads: list[Workload],
    target: CompileTarget,
    bench: Bench,
    records: Database,
    trials: int,
    progress: Progress | None = None,
    seed: int | None = None,
    skipped: dict[str, str] | None = None,
) -> TuningReport:
    """Spend trials on workloads; their results are in `records` afterwards."""
    started = time.monotonic()
    report = TuningReport(trials, database=str(records.folder), skipped=dict(skipped or {}))
    done = 0

    def step(count: int) -> None:
        nonlocal done
        done += count
        if progress is not None:
            progress("tune", done, trials)

    if workloads:
        with bench:
            searcher = Searcher(target, bench, records, trials, seed)
            # From the least work to the most: what a small space leaves of its share goes to the larger ones.
            for index in reversed(range(len(workloads))):
                work = [workload.work for workload in workloads[: index + 1]]
                search = searcher.search(workloads[index], split_budget(trials - report.spent, work)[index], step)
                report.searches.insert(0, search)
                report.spent += search.trials
                report.failed += search.failed
    report.notes += records.notes
    report.seconds = time.monotonic() - started
    return report


def apply_database(
    module: tvm.IRModule, target: TargetLike, database: str | Path | None = None
) -> tuple[tvm.IRModule, ApplyReport]:
    """The module with the fastest recorded schedule of each function that has one; the given module does not change.

    Raises:
        RescompileError: there is no such database, or a file in it is damaged.
    """
    records = Database.open(database, _resolved(target), create=False)
    report = ApplyReport(notes=records.notes)
    functions: dict[Any, Any] = {}
    for variable, function in module.functions.items():
        functions[variable] = function
        if not isinstance(function, tirx.PrimFunc):
            continue
        name = str(variable.name_hint)
        reason = why_not(function)
        found = None if reason is not None else fastest(records, function)
        if found is None:
            report.missed[name] = reason or "no record"
        elif isinstance(found, str):
            report.missed[name] = found
        else:
            functions[variable], report.applied[name] = found
    return tvm.IRModule(functions, attrs=module.attrs), report


def fastest(records: Database, function: tvm.tirx.PrimFunc) -> tuple[tvm.tirx.PrimFunc, float] | str | None:
    """A function in its fastest recorded schedule, with its seconds; None without a record, or why none fits."""
    reason: str | None = None
    for record in records.best(normalized(function), count=3):
        try:
            scheduled = replay(record)
        except TVM_ERRORS as error:
            lines = str(error).strip().splitlines()
            reason = f"its record does not replay: {lines[-1][:200] if lines else type(error).__name__}"
            continue
        attributes = {} if function.attrs is None else dict(function.attrs)
        scheduled = scheduled.with_attrs({**attributes, "tirx.is_scheduled": True})
        return scheduled, min(float(seconds) for seconds in record.run_secs)
    return reason


def _resolved(target: TargetLike) -> CompileTarget:
    if isinstance(target, CompileTarget):
        return target
    if not isinstance(target, str | Mapping):
        raise RescompileError(f"A {type(target).__name__} is no target: give its name, or a mapping as TVM's.")
    return targets.resolve(target)
