"""Which code computes each region of a GPU program: own kernels, generated schedules, libraries; measured, remembered.

Emission first records what it needs (`KernelChoice.pick` answers with the first candidate), then `choose` decides, and
emission runs again. A choice comes from, in this order: this GPU's own records, timing where the target's GPU is at
hand, the records that come with the package, and the candidates' static order. Each says which it was.

A candidate may win only if its numbers agree with the reference: float64 on the device where torch can compute the
region, else the first candidate that runs.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeAlias

from rescompile.backends.cuda import contest as contests
from rescompile.backends.cuda import plain
from rescompile.backends.cuda.choice_records import OwnRecords, Record, ShippedRecords, lookup, read_shipped
from rescompile.backends.cuda.contest import Buffers
from rescompile.backends.cuda.device import Device
from rescompile.backends.cuda.libraries import LibraryCall
from rescompile.backends.cuda.library_candidates import library_candidates
from rescompile.backends.cuda.reference import described
from rescompile.backends.cuda.targets import Architecture
from rescompile.backends.kernels import Argument
from rescompile.backends.kernels.emit import TVM_ERRORS
from rescompile.errors import RescompileError

MOST_TILES = 8  # of a family that are built and timed: those that it expects most of
STATIC_ORDER = "first by static order: no GPU to time on, no record"

Built: TypeAlias = Callable[..., object]  # takes the buffers in order


class Family(Protocol):
    """A module that makes the kernels of one kind of spec."""

    def refusal(self, spec: Any, limits: Architecture) -> str:
        """Why there is no kernel, one clause; empty when there is one."""

    def candidates(self, spec: Any, limits: Architecture) -> Sequence[Any]:
        """Tiles, the first being the one to take where nothing can be timed."""

    def arguments(self, spec: Any) -> list[Argument]:
        """Inputs, then outputs."""

    def prim_func(self, spec: Any, tile: Any, name: str) -> Any:
        """The kernel."""


@dataclass(frozen=True)
class Candidate:
    """One way to compute a spec: a family's kernel with a tile, or a library's call."""

    label: str
    family: Any = None
    tile: Any = None
    library: LibraryCall | None = None

    @property
    def inline(self) -> bool:
        """Whether it is no kernel: whoever asked for it emits the operations themselves."""
        return bool(getattr(self.family, "INLINE", False))

    def prim_func(self, spec: Any, name: str) -> Any:
        """The kernel. RescompileError for a library."""
        if self.family is None:
            raise RescompileError(f"'{self.label}' is no kernel that is compiled: it is called from a library.")
        return self.family.prim_func(spec, self.tile, name)


@dataclass(frozen=True)
class Choice:
    """The candidate to use, how that was decided, and the seconds of all that were timed."""

    candidate: Candidate
    reason: str = STATIC_ORDER
    seconds: float = 0.0
    tried: tuple[tuple[str, float], ...] = ()
    refused: tuple[tuple[str, str], ...] = ()  # candidates that may not win, and why


@dataclass(frozen=True)
class Wanted:
    """What a program needs: the families that may serve a spec, the preferred one first."""

    spec: Any
    families: tuple[Any, ...]

    @property
    def arguments(self) -> list[Argument]:
        """The buffers, the same for every candidate."""
        found: list[Argument] = self.families[0].arguments(self.spec)
        return found


def candidates(wanted: Wanted, limits: Architecture, *, libraries: bool = True) -> list[Candidate]:
    """Every way to compute the spec, in static order: our kernels, the plain form, libraries, what is composed."""
    own = [
        Candidate(f"{_stem(family)} {tile}", family, tile)
        for family in wanted.families
        if not family.refusal(wanted.spec, limits)
        for tile in family.candidates(wanted.spec, limits)[:MOST_TILES]
    ]
    found = [candidate for candidate in own if not candidate.inline]
    if not plain.refusal(wanted.spec, limits):
        found += [Candidate(f"schedule {tile}", plain, tile) for tile in plain.candidates(wanted.spec, limits)]
    if libraries:
        names = tuple(argument.name for argument in wanted.arguments)
        found += [Candidate(str(call), library=call) for call in library_candidates(wanted.spec, names)]
    return [*found, *(candidate for candidate in own if candidate.inline)]


class KernelChoice:
    """The kernels of one program: what it wants, and what was chosen."""

    def __init__(self, limits: Architecture, *, libraries: bool = False) -> None:
        """`libraries`: whether torch's may be called also where nothing can be measured."""
        self.limits = limits
        self.libraries = libraries
        self.wanted: dict[Any, Wanted] = {}
        self.choices: dict[Any, Choice] = {}

    def pick(self, spec: Any, families: Sequence[Any]) -> Choice:
        """What computes the spec; before the choice the first candidate.

        RescompileError when no family takes it.
        """
        wanted = self.wanted.setdefault(spec, Wanted(spec, tuple(families)))
        if spec not in self.choices:
            own = candidates(wanted, self.limits, libraries=self.libraries)
            if not own:
                why = "; ".join(str(family.refusal(spec, self.limits)) for family in families)
                raise RescompileError(f"No kernel computes {spec} on {self.limits.name}: {why}.")
            self.choices[spec] = Choice(own[0])
        return self.choices[spec]

    def choose(
        self,
        device: Device | None,
        build: Callable[[Any], Built | None],
        cache_dir: str | Path | None = None,
        budget_s: float | None = None,
        *,
        captured: bool = True,
        shipped: Sequence[ShippedRecords] | None = None,
    ) -> bool:
        """Decide about all that is wanted; whether emission has to run again.

        Args:
            device: a GPU of the target's architecture, None where there is none.
            build: compiles a kernel into a function of its buffers; None where that fails.
            budget_s: seconds for timing; what is left then takes a record or the static order.
            captured: whether the program will be replayed from a CUDA graph, where a call costs the processor nothing.
            shipped: records from elsewhere; by default those of the package.
        """
        before = {spec: choice.candidate for spec, choice in self.choices.items()}
        shipped = read_shipped() if shipped is None else shipped
        own = None if device is None else OwnRecords.load(cache_dir, device.facts)
        deadline = None if budget_s is None else time.monotonic() + budget_s
        entrants = {
            spec: candidates(wanted, self.limits, libraries=self.libraries or device is not None)
            for spec, wanted in self.wanted.items()
        }
        found: dict[Any, Choice | None] = {}
        for spec, listed in entrants.items():
            known = None if own is None else own.get(spec)
            found[spec] = None if known is None else _recorded(listed, known, "remembered from this GPU")
        if device is not None and own is not None:
            open_ = [spec for spec, listed in entrants.items() if found[spec] is None and len(listed) > 1]
            built = _all_built({spec: entrants[spec] for spec in open_}, build, deadline)
            for spec in open_:
                if deadline is None or time.monotonic() < deadline:
                    found[spec] = choice = contest(self.wanted[spec], built[spec], device, captured=captured)
                    if choice.tried:
                        own.put(spec, Record(choice.candidate.label, choice.seconds, dict(choice.tried)))
            own.save()
        name = None if device is None else device.facts["device"]
        for spec, listed in entrants.items():
            elsewhere = lookup(shipped, spec, self.limits.name, name) if found[spec] is None else None
            choice = found[spec] or (None if elsewhere is None else _recorded(listed, *elsewhere))
            self.choices[spec] = choice or Choice(listed[0], _unmeasured(device, len(listed)))
        return any(before[spec] != choice.candidate or choice.tried for spec, choice in self.choices.items())


def contest(
    wanted: Wanted, entrants: Sequence[tuple[Candidate, Built | None]], device: Device, *, captured: bool = True
) -> Choice:
    """The fastest of the candidates with the right numbers; None stands for one that does not build."""
    ready = [(candidate.label, _torchs(candidate, wanted.spec, device) or built) for candidate, built in entrants]
    verdicts = contests.contest(described(wanted.spec), Buffers(wanted.arguments, device), ready, device)
    costs = {
        verdict.label: verdict.timing.cost(captured=captured) for verdict in verdicts if verdict.timing is not None
    }
    refused = tuple((verdict.label, verdict.refused) for verdict in verdicts if verdict.refused)
    if not costs:
        reasons = "; ".join(f"{label}: {why}" for label, why in refused)
        return Choice(entrants[0][0], f"first by static order: no candidate could be timed ({reasons})")
    label = min(costs, key=lambda name: costs[name])
    winner = next(candidate for candidate, _ in entrants if candidate.label == label)
    reason = f"fastest of {len(costs)} timed on {device.facts['device']}"
    return Choice(winner, reason, costs[label], tuple(costs.items()), refused)


def _torchs(candidate: Candidate, spec: Any, device: Device) -> Built | None:
    """What torch runs in a candidate's place; None for a kernel of ours."""
    if candidate.library is not None:
        return candidate.library.function(device.torch)
    made: Built | None = candidate.family.stand_in(spec, device.torch) if candidate.inline else None
    return made


def _all_built(
    entrants: Mapping[Any, Sequence[Candidate]], build: Callable[[Any], Built | None], deadline: float | None
) -> dict[Any, list[tuple[Candidate, Built | None]]]:
    """Every kernel compiled, several at a time, before any is timed."""
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        futures = {
            spec: [(candidate, pool.submit(_built, candidate, spec, build, deadline)) for candidate in listed]
            for spec, listed in entrants.items()
        }
        return {
            spec: [(candidate, future.result()) for candidate, future in started] for spec, started in futures.items()
        }


def _built(
    candidate: Candidate, spec: Any, build: Callable[[Any], Built | None], deadline: float | None
) -> Built | None:
    if candidate.library is not None or candidate.inline or (deadline is not None and time.monotonic() > deadline):
        return None
    try:
        return build(candidate.prim_func(spec, "kernel"))
    except (*TVM_ERRORS, RescompileError):
        return None


def _recorded(entrants: Sequence[Candidate], record: Record, reason: str) -> Choice | None:
    """The fastest recorded candidate that is one; None where none of them is."""
    by_label = {candidate.label: candidate for candidate in entrants}
    known = sorted((seconds, label) for label, seconds in record.tried.items() if label in by_label)
    if not known:
        return None
    seconds, label = known[0]
    return Choice(by_label[label], reason, seconds, tuple(record.tried.items()))


def _unmeasured(device: Device | None, count: int) -> str:
    if count == 1:
        return "the only candidate"
    return STATIC_ORDER if device is None else "first by static order: no time left to measure"


def _stem(family: Any) -> str:
    name = getattr(family, "__name__", type(family).__name__)
    return str(name).rpartition(".")[2]


def explained(choice: Choice) -> Mapping[str, Any]:
    """What a report says of a choice."""
    return {
        "chosen": choice.reason,
        "tried": [{"tile": label, "microseconds": round(seconds * 1e6, 2)} for label, seconds in choice.tried]
        + [{"tile": label, "refused": why} for label, why in choice.refused],
        "microseconds": round(choice.seconds * 1e6, 2) if choice.seconds else None,
    }
