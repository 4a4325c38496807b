"""Times the candidate tiles of each spec on this machine and remembers the winners.

A spec's candidates that differ only in how tasks are split share one build, which takes the split as arguments. They
are timed in turns, on weights that rotate through copies larger than the caches, as in a whole network, where a
layer's weights were last used one inference ago.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import tvm
import tvm_ffi

from rescompile.backends.kernels.emit import TVM_ERRORS
from rescompile.backends.kernels.families import Spec, arguments, candidates, pack_weight, prim_func
from rescompile.backends.kernels.machine import Machine
from rescompile.backends.kernels.records import Records
from rescompile.backends.kernels.specs import Argument, ConvSpec, LinearSpec
from rescompile.backends.kernels.tiles import Tile

COLD_BYTES = 80 << 20
ALIGNMENT = 64
MOST_COPIES = 256
RUNS = 11
# A kernel far below the best rate of this session was probably disturbed, so it is timed again.
SUSPICIOUS = 0.6
TOLERANCE = {"float32": 1e-4, "float64": 1e-10, "float16": 1e-2, "bfloat16": 5e-2}
DYNAMIC_ROWS = 128  # the row count that a spec with dynamic rows is timed at


@dataclass(frozen=True)
class Choice:
    """The fastest tile of a spec, and what it was compared with.

    Attributes:
        seconds: of one call on cold weights; 0 where nothing was timed.
        gflops: 1e9 floating point operations per second.
        tried: all tiles that ran and gave the right numbers, with their seconds; empty for a remembered choice.
    """

    tile: Tile
    seconds: float = 0.0
    gflops: float = 0.0
    tried: tuple[tuple[Tile, float], ...] = ()


def choose(
    specs: Iterable[Spec], machine: Machine, cache_dir: str | Path | None = None, budget_s: float | None = None
) -> dict[Spec, Choice]:
    """The best tile of every spec, from the records in `cache_dir` (default: the user's cache) or by timing.

    A spec with a single candidate is not timed, and neither is any spec on a machine other than this one: both take
    the first candidate. Once `budget_s` seconds are used up the remaining specs do so too, without a record.
    Threads are those of TVM's pool; anything else that runs meanwhile disturbs the result.
    """
    deadline = float("inf") if budget_s is None else time.monotonic() + budget_s
    records = Records.load(cache_dir, machine)
    found: dict[Spec, Choice] = {}
    untimed: list[Spec] = []
    for spec in dict.fromkeys(specs):
        tiles = candidates(spec, machine)
        known = records.get(spec)
        if known is not None and known[0] in tiles:
            found[spec] = Choice(*known, _gflops(spec, known[1]))
        else:
            found[spec] = Choice(tiles[0])
            if len(tiles) > 1 and machine.is_host:
                untimed.append(spec)
    contests = [contest for contest in _contests(untimed, machine, deadline) if contest.entries]
    with own_core():
        for contest in contests:
            if time.monotonic() < deadline:
                found[contest.spec] = contest.choice()
        ceiling = max((found[contest.spec].gflops for contest in contests), default=0.0)
        for contest in contests:
            if 0 < found[contest.spec].gflops < SUSPICIOUS * ceiling and time.monotonic() < deadline:
                found[contest.spec] = contest.choice()
    for spec in untimed:
        if found[spec].tried:
            records.put(spec, found[spec].tile, found[spec].seconds)
    records.save()
    return found


@contextmanager
def own_core() -> Iterator[None]:
    """Keeps the calling thread off the cores that TVM has pinned its workers to, where the system can.

    A worker cannot leave its core, but the caller, who computes too, can be scheduled onto the same one and stay
    there: then two threads run at the speed of one, for seconds.
    """
    if not (hasattr(os, "sched_setaffinity") and Path("/proc/self/task").is_dir()):
        yield
        return
    allowed = os.sched_getaffinity(0)
    taken: set[int] = set()
    for task in os.listdir("/proc/self/task"):
        try:
            cores = os.sched_getaffinity(int(task))
        except OSError:  # a thread that has ended meanwhile
            continue
        if len(cores) == 1:
            taken |= cores
    free = allowed - taken
    if not taken or not free:
        yield
        return
    os.sched_setaffinity(0, {min(free)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, allowed)


def _gflops(spec: Spec, seconds: float) -> float:
    rows = DYNAMIC_ROWS if getattr(spec, "rows", 1) is None else 1
    return getattr(spec, "flops", 0) * rows / seconds / 1e9 if seconds > 0 else 0.0


def _contests(specs: Sequence[Spec], machine: Machine, deadline: float) -> list[_Contest]:
    """Builds all kernels first, in parallel: a build beside a timing would disturb it."""
    arena = Arena()
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        contests = []
        for spec in specs:
            built: dict[Tile, Future[Any]] = {}
            for tile in candidates(spec, machine):
                code = _code(spec, tile)
                if code not in built:
                    built[code] = pool.submit(_build, spec, tile, machine, deadline)
            contests.append((spec, built))
        ready = [(spec, {tile: future.result() for tile, future in built.items()}) for spec, built in contests]
    return [_Contest(spec, machine, built, arena) for spec, built in ready]


def _splits(spec: Spec) -> bool:
    """Whether the kernel can take its task counts as arguments."""
    return isinstance(spec, ConvSpec | LinearSpec)


def _code(spec: Spec, tile: Tile) -> Tile:
    """The tile less what does not change the code."""
    return replace(tile, row_tasks=1, block_tasks=1) if _splits(spec) else tile


def _build(spec: Spec, tile: Tile, machine: Machine, deadline: float) -> tuple[Any, Any] | None:
    """The executable and its function, or None where TVM rejects the kernel or the time is over."""
    if time.monotonic() > deadline:
        return None
    try:
        function = prim_func(spec, tile, "kernel", dynamic_tasks=_splits(spec))
        executable = tvm.compile(tvm.IRModule({"kernel": function}), target=machine.tvm_target())
        return executable, executable["kernel"]
    except TVM_ERRORS:
        return None


class Arena:
    """Random memory larger than the caches, from which cold weights are taken."""

    def __init__(self) -> None:
        self.random = np.random.default_rng(0)
        self.memory: dict[str, np.ndarray] = {}

    def tensor(self, shape: Sequence[int], dtype: str) -> np.ndarray:
        """Normally distributed values."""
        if dtype == "bool":
            return np.ones(shape, bool)
        values = self.random.standard_normal(shape, np.float32)
        return aligned(values.astype(_numpy(dtype)))

    def copies(self, shape: Sequence[int], dtype: str) -> list[np.ndarray]:
        """As many disjoint buffers of this shape as fit, at least two."""
        size = int(np.prod(shape))
        item = self.tensor((1,), dtype).itemsize
        stride = -(-size // 64) * 64
        needed = max(COLD_BYTES // item, 2 * stride)
        memory = self.memory.get(dtype)
        if memory is None or memory.size < needed:
            memory = aligned(np.resize(self.tensor((1 << 16,), dtype), needed))
            self.memory[dtype] = memory
        fitting = min(memory.size // stride, MOST_COPIES)
        return [memory[i * stride : i * stride + size].reshape(shape) for i in range(fitting)]


def aligned(values: np.ndarray) -> np.ndarray:
    """A copy that starts where TVM's own functions take for granted that a buffer starts."""
    memory = np.empty(values.nbytes + ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % ALIGNMENT
    copy = memory[start : start + values.nbytes].view(values.dtype).reshape(values.shape)
    copy[...] = values
    return copy


class _Contest:
    """The candidates of one spec that build and agree with the first, ready to be timed."""

    def __init__(self, spec: Spec, machine: Machine, built: dict[Tile, tuple[Any, Any] | None], arena: Arena) -> None:
        self.spec = spec
        self.tiles: list[Tile] = []
        self.entries: list[Entry] = []
        self.shared: dict[str, np.ndarray] = {}
        self.packed: dict[int, np.ndarray] = {}
        # Each call reads another copy: what one candidate has just read would be warm for the next.
        self.turns = count()
        reference: np.ndarray | None = None
        for tile in candidates(spec, machine):
            made = built.get(_code(spec, tile))
            if made is None:
                continue
            splits = _splits(spec)
            scalars = (tile.row_tasks, tile.block_tasks) if splits else ()
            entry = Entry(made, arguments(spec, tile), self._values(tile, arena), arena, splits, scalars)
            result = entry.result()
            if reference is None:
                reference = result
            if agree(result, reference, spec.dtype):
                self.tiles.append(tile)
                self.entries.append(entry)

    def _values(self, tile: Tile, arena: Arena) -> list[np.ndarray]:
        """Arguments for one tile: the same numbers for all, weights in the tile's packing."""
        values = []
        for argument in arguments(self.spec, tile):
            if argument.name == "weight" and isinstance(self.spec, ConvSpec | LinearSpec):
                if tile.lanes not in self.packed:
                    self.packed[tile.lanes] = pack_weight(self.spec, tile, self._weight(arena))
                values.append(self.packed[tile.lanes])
            else:
                if argument.name not in self.shared:
                    self.shared[argument.name] = arena.tensor(_static(argument), argument.dtype)
                values.append(self.shared[argument.name])
        return values

    def _weight(self, arena: Arena) -> np.ndarray:
        if "" not in self.shared:
            spec = self.spec
            shape: tuple[int, ...] = ()
            if isinstance(spec, ConvSpec):
                shape = (spec.out_channels, spec.in_channels // spec.groups, *spec.kernel)
            elif isinstance(spec, LinearSpec):
                shape = (spec.out_features, spec.in_features)
            self.shared[""] = arena.tensor(shape, "float32")
        return self.shared[""]

    def choice(self) -> Choice:
        """Times every entry in turns, on top of earlier timings, and takes the fastest."""
        tried = tuple(zip(self.tiles, in_turns(self.entries, self.turns), strict=True))
        tile, seconds = min(tried, key=lambda pair: pair[1])
        return Choice(tile, seconds, _gflops(self.spec, seconds), tried)


class Entry:
    """One candidate with its buffers."""

    def __init__(
        self,
        built: tuple[Any, Any],
        described: Sequence[Argument],
        values: Sequence[np.ndarray],
        arena: Arena,
        cold: bool,
        scalars: tuple[int, ...] = (),
    ) -> None:
        # The function dies with its executable.
        self.executable, self.function = built
        self.scalars = scalars
        self.seconds: list[float] = []
        self.output = next(i for i, argument in enumerate(described) if argument.output)
        self.shared = described[self.output].shared
        self.buffers = [[tensor_of(value)] for value in values]
        self.packed: dict[int, np.ndarray] = {}
        for i, argument in enumerate(described):
            if cold and argument.name == "weight":
                self.buffers[i] = [tensor_of(copy) for copy in arena.copies(_static(argument), argument.dtype)]
                self.packed[i] = values[i]

    def call(self, turn: int) -> float:
        """Runs on the turn-th copy of the weights and returns the seconds it took."""
        buffers = [copies[turn % len(copies)] for copies in self.buffers]
        start = time.perf_counter()
        self.function(*buffers, *self.scalars)
        return time.perf_counter() - start

    def result(self) -> np.ndarray:
        """The output for the shared numbers, as float64."""
        buffers = [copies[0] for copies in self.buffers]
        for i, packed in self.packed.items():
            buffers[i] = tensor_of(packed)
        blank = np.full(buffers[self.output].shape, 0.0 if self.shared else np.nan, np.float32)
        buffers[self.output].copyfrom(blank.astype(_numpy(str(buffers[self.output].dtype))))
        self.function(*buffers, *self.scalars)
        output: np.ndarray = buffers[self.output].numpy().astype(np.float64)
        return output


def in_turns(entries: Sequence[Entry], turns: Iterator[int]) -> list[float]:
    """Seconds of one call of each entry: the second best of all its timings, earlier ones included.

    Anything that disturbs a call makes it longer, and each call is as cold as the next, so the low end is the
    kernel itself; the very lowest may be a slip of the clock.
    """
    for entry in entries:
        entry.call(next(turns))
    for _ in range(RUNS):
        for entry in entries:
            entry.seconds.append(entry.call(next(turns)))
    return [sorted(entry.seconds)[1] for entry in entries]


def agree(result: np.ndarray, reference: np.ndarray, dtype: str) -> bool:
    """Whether two outputs are equal within the type's precision; NaN never is."""
    return bool(np.abs(result - reference).max() <= TOLERANCE[dtype] * np.abs(reference).max())


def _static(argument: Argument) -> tuple[int, ...]:
    return tuple(DYNAMIC_ROWS if extent is None else extent for extent in argument.shape)


def _numpy(dtype: str) -> Any:
    return ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype


def tensor_of(value: np.ndarray) -> Any:
    """A TVM tensor over the array's own memory; numpy cannot share bfloat16, which is copied."""
    if value.dtype == ml_dtypes.bfloat16:
        return tvm.runtime.tensor(value)
    return tvm_ffi.from_dlpack(value)
