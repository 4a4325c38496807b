"""Measuring a model compiled by rescompile beside other runtimes, in one process, interleaved in blocks."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any, TypeAlias

import numpy as np

from rescompile import api
from rescompile.backends.measure import measure
from rescompile.backends.runtimes import Compiled, Runtime, prepare
from rescompile.cli_output import table
from rescompile.errors import RescompileError
from rescompile.graph import Graph
from rescompile.machine import available_cores, machine, versions
from rescompile.printing import print_type
from rescompile.verify import make_inputs, relative_difference

Array: TypeAlias = np.ndarray[Any, Any]
OURS = "rescompile"


@dataclass(frozen=True)
class Timing:
    """One runtime on one model. `error`: largest difference from the first runtime, relative to its largest output."""

    name: str
    milliseconds: float
    low: float  # 10th percentile
    high: float  # 90th percentile
    calls: int
    prepared_in: float  # seconds
    error: float


@dataclass(frozen=True)
class Measured:
    """A model measured on several runtimes. Prints as a table."""

    model: str
    inputs: tuple[str, ...]
    threads: int
    timings: tuple[Timing, ...]
    failures: tuple[tuple[str, str], ...]  # runtime, why it could not run the model
    outputs: tuple[Array, ...] = field(repr=False)  # of rescompile

    def timing(self, name: str) -> Timing | None:
        """The timing of one runtime, None where it could not run the model."""
        return next((timing for timing in self.timings if timing.name == name), None)

    def ratio(self, name: str) -> float | None:
        """How many times as long as rescompile a runtime takes."""
        ours, theirs = self.timing(OURS), self.timing(name)
        return None if ours is None or theirs is None else theirs.milliseconds / ours.milliseconds

    def conditions(self) -> str:
        """Machine and threads, in words."""
        found = machine()
        return f"{found['processor']}, {self.threads} threads"

    def to_dict(self) -> dict[str, Any]:
        """As plain data."""
        return {
            "schema": 1,
            "model": self.model,
            "inputs": list(self.inputs),
            "threads": self.threads,
            "machine": machine(),
            "versions": versions(),
            "runtimes": {
                timing.name: {
                    "median_ms": timing.milliseconds,
                    "p10_ms": timing.low,
                    "p90_ms": timing.high,
                    "calls": timing.calls,
                    "prepare_s": timing.prepared_in,
                    "max_relative_error": timing.error,
                    "ratio_to_rescompile": self.ratio(timing.name),
                }
                for timing in self.timings
            },
            "failures": dict(self.failures),
        }

    def __str__(self) -> str:
        rows = []
        for timing in self.timings:
            ratio = self.ratio(timing.name)
            rows.append(
                [
                    timing.name,
                    f"{timing.milliseconds:.2f}",
                    f"{timing.low:.2f} … {timing.high:.2f}",
                    "" if ratio is None else f"{ratio:.2f}×",
                    f"{timing.error:.1e}",
                    f"{timing.prepared_in:.1f} s",
                ]
            )
        text = table(["runtime", "median ms", "10 … 90 %", "of rescompile", "max error", "prepared in"], rows)
        lines = [f"{self.model}: {', '.join(self.inputs)}; {self.conditions()}", text]
        lines += [f"{name} could not run it: {reason}" for name, reason in self.failures]
        return "\n".join(lines)


def bench_graph(
    graph: Graph,
    against: Sequence[str],
    *,
    inputs: Sequence[Array] | None = None,
    threads: int | None = None,
    rounds: int = 12,
) -> Measured:
    """Compile `graph`, prepare the runtimes `against`, and time all of them on the same inputs.

    `inputs`: one array for each input of the graph, random ones otherwise. `threads`: all available by default.
    Errors are relative to the first of `against` that runs the model.
    """
    threads = threads or available_cores()
    arrays = list(inputs) if inputs is not None else _random_inputs(graph)
    calls: dict[str, Any] = {}
    outputs: dict[str, tuple[Array, ...]] = {}
    seconds: dict[str, float] = {}
    failures: list[tuple[str, str]] = []
    for name in [*against, OURS]:
        start = time.perf_counter()
        try:
            runtime = _compiled(graph, threads) if name == OURS else prepare(graph, name, threads=threads)
            outputs[name] = runtime.run(arrays)
        except RescompileError as error:
            if name == OURS:
                raise
            failures.append((name, str(error)))
            continue
        seconds[name] = time.perf_counter() - start
        calls[name] = runtime.bind(arrays)
    times = measure(calls, rounds=rounds)
    reference = outputs[next(iter(outputs))]
    timings = []
    for name, found in times.items():
        low, high = np.quantile(found, [0.1, 0.9]) * 1e3
        gap = max(relative_difference(a, b) for a, b in zip(reference, outputs[name], strict=True))
        timings.append(
            Timing(name, median(found) * 1e3, float(low), float(high), len(found), seconds[name], float(gap))
        )
    described = tuple(
        f"{value.name}: {print_type(a.shape, str(a.dtype))}" for value, a in zip(graph.inputs, arrays, strict=True)
    )
    return Measured(graph.name, described, threads, tuple(timings), tuple(failures), outputs[OURS])


def _compiled(graph: Graph, threads: int) -> Runtime:
    return Compiled(api.compile(graph, threads=threads))


def _random_inputs(graph: Graph) -> list[Array]:
    found = make_inputs(graph, lambda rng, shape: rng.standard_normal(shape), seed=0)
    if found is None:
        raise RescompileError("An input of the model has no known shape or dtype: nothing to measure it on.")
    return [found[value.name] for value in graph.inputs]
