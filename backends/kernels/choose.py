"""Times the candidate tiles of each spec on this machine and remembers the winners.

A spec's candidates that differ only in how tasks are split share one build, which takes the split as arguments. They
are timed in turns, on weights that rotate through copies larger than the caches, as in a whole network, where a
layer's weights were last used one inference ago.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import tvm

from rescompile.backends.kernels.families import Spec, arguments, candidates, prim_func
from rescompile.backends.kernels.machine import Machine
from rescompile.backends.kernels.records import Records
from rescompile.backends.kernels.specs import Argument, ConvSpec, LinearSpec
from rescompile.backends.kernels.tiles import Tile

COLD_BYTES = 80 << 20
COPIES = 24
RUNS = 9
# A kernel far below the best rate seen on this machine was probably disturbed, so it is timed again.
SUSPICIOUS = 0.6
TOLERANCE = {"float32": 1e-4, "float64": 1e-10, "float16": 1e-2, "bfloat16": 5e-2}
DYNAMIC_ROWS = 128  # the row count that a spec with dynamic rows is timed at


@dataclass(frozen=True)
class Choice:
    """The fastest tile of a spec, and what it was compared with.

    Attributes:
        seconds: of one call on cold weights; 0 where there was only one candidate and nothing was timed.
        gflops: 1e9 floating point operations per second.
        tried: all tiles that ran and gave the right numbers, with their seconds.
    """

    tile: Tile
    seconds: float = 0.0
    gflops: float = 0.0
    tried: tuple[tuple[Tile, float], ...] = ()


def choose(
    specs: Iterable[Spec], machine: Machine, cache_dir: str | Path | None = None, budget_s: float | None = None
) -> dict[Spec, Choice]:
    """The best tile of every spec, from the records in `cache_dir` (default: the user's cache) or by timing.

    Only specs with more than one candidate are timed, and only on the machine they are for: with a machine other
    than this one the first candidate is taken. After `budget_s` seconds the remaining specs take theirs too, and are
    not recorded. Threads are those of TVM's pool; nothing else should run meanwhile.
    """
    started = time.monotonic()
    records = Records.load(cache_dir, machine)
    found: dict[Spec, Choice] = {}
    open_specs: list[Spec] = []
    for spec in dict.fromkeys(specs):
        tiles = candidates(spec, machine)
        known = records.get(spec)
        if known is not None and known in tiles:
            seconds = records.seconds(spec)
            found[spec] = Choice(known, seconds, _gflops(spec, seconds))
        elif len(tiles) == 1 or not machine.is_host:
            found[spec] = Choice(tiles[0])
        else:
            open_specs.append(spec)
    ceiling = 0.0
    again: list[_Contest] = []
    for spec in open_specs:
        if budget_s is not None and time.monotonic() - started > budget_s:
            found[spec] = Choice(candidates(spec, machine)[0])
            continue
        contest = _Contest(spec, machine)
        contest.time()
        found[spec] = contest.choice()
        ceiling = max(ceiling, found[spec].gflops)
        if found[spec].gflops < SUSPICIOUS * ceiling:
            again.append(contest)
    for contest in again:
        if budget_s is not None and time.monotonic() - started > budget_s:
            break
        contest.time()
        found[contest.spec] = contest.choice()
    for spec in open_specs:
        if found[spec].tried:
            records.put(spec, found[spec].tile, found[spec].seconds)
    records.save()
    return found


def _gflops(spec: Spec, seconds: float) -> float:
    flops = getattr(spec, "flops", 0) * (DYNAMIC_ROWS if getattr(spec, "rows", 1) is None else 1)
    return flops / seconds / 1e9 if seconds > 0 else 0.0


class _Contest:
    """The candidates of one spec, built, checked against each other and ready to be timed."""

    def __init__(self, spec: Spec, machine: Machine) -> None:
        self.spec = spec
        self.entries: list[_Entry] = []
        functions: dict[str, tvm.tirx.PrimFunc] = {}
        names: dict[Tile, str] = {}
        splits = isinstance(spec, ConvSpec | LinearSpec)
        tiles = candidates(spec, machine)
        for tile in tiles:
            code = replace(tile, row_tasks=1, block_tasks=1) if splits else tile
            if code not in names:
                names[code] = f"k{len(names)}"
                functions[names[code]] = prim_func(spec, tile, names[code], dynamic_tasks=splits)
        built = _compile(functions, machine)
        first: np.ndarray | None = None
        values = {argument.name: _random(argument, spec) for argument in arguments(spec, tiles[0])}
        for tile in tiles:
            code = replace(tile, row_tasks=1, block_tasks=1) if splits else tile
            executable = built.get(names[code])
            if executable is None:
                continue
            scalars = (tile.row_tasks, tile.block_tasks) if splits else ()
            entry = _Entry(tile, executable, names[code], scalars, spec, values)
            result = entry.result()
            if first is None:
                first = result
            elif not _same(result, first, spec.dtype):
                continue
            self.entries.append(entry)

    def time(self) -> None:
        """One more round of timing for every entry, in turns."""
        for entry in self.entries:
            entry.call(0)
        for turn in range(RUNS):
            for entry in self.entries:
                entry.seconds.append(entry.call(turn + 1))

    def choice(self) -> Choice:
        """The entry with the lowest first quartile, which single disturbances do not reach."""
        tried = [(entry.tile, entry.quartile()) for entry in self.entries]
        tile, seconds = min(tried, key=lambda pair: pair[1])
        return Choice(tile, seconds, _gflops(self.spec, seconds), tuple(tried))


class _Entry:
    """One candidate with its buffers."""

    def __init__(
        self, tile: Tile, executable: Any, name: str, scalars: Sequence[int], spec: Spec, values: dict[str, np.ndarray]
    ) -> None:
        self.tile, self.scalars = tile, scalars
        self.executable, self.function = executable, executable[name]
        self.seconds: list[float] = []
        described = arguments(spec, tile)
        self.buffers: list[list[Any]] = []
        for argument in described:
            value = values[argument.name]
            if argument.name == "weight" and isinstance(spec, ConvSpec | LinearSpec):
                value = _weights(argument, value)
                # Copies are made once per process and shared by all contests of the same size.
                copies = max(2, min(COPIES, COLD_BYTES // max(1, value.nbytes)))
            else:
                copies = 1
            self.buffers.append([_tensor(value) for _ in range(copies)])

    def call(self, turn: int) -> float:
        """Runs on the turn-th copy of the weights and returns the seconds it took."""
        buffers = [copies[turn % len(copies)] for copies in self.buffers]
        start = time.perf_counter()
        self.function(*buffers, *self.scalars)
        return time.perf_counter() - start
