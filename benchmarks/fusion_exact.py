"""How far a fused file is from the original's outputs in float64, beside how far the original is: `fusion --verify`.

d(y) = √(mean (y − r)²) / max(max |r|, t),   r the outputs in float64, t = 2⁻¹²⁶ the smallest normal number of float32

Both run in ONNX Runtime with its optimisation off and on ("default"), each against the float64 run of the original
(rescompile.fx_reference), over four draws of the kind of input on which fused and original differ most. The root of
the mean square is taken because a maximum over so few draws is luck. Below t numbers are 2⁻¹⁴⁹ apart, whatever their
size, so no relative distance can be asked of them: 1e-5 of t is 84 such steps. An input of 1e-40 is itself known to
1e-5 only, and every sum of such numbers is rounded as coarsely in the original.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.fusion_tools import outputs
from rescompile.fx_reference import Reference
from rescompile.graph import Graph
from rescompile.kinds import Trait
from rescompile.verify import ADVERSARIES, make_inputs, relative_difference

DRAWS = 4
TOLERANCE = 1e-5  # relative, of float32
FURTHER = 1.1  # times the original's distance, where the two differ by more than the tolerance
_SMALLEST = float(np.finfo(np.float32).smallest_normal)


@dataclass(frozen=True)
class Exactness:
    """One file at one level of the runtime. `inputs`: the kind on which original and fused differ most."""

    level: str
    inputs: str
    difference: float  # largest, over all kinds
    original: float | None  # distances from float64; None where there is no such run
    fused: float | None

    @property
    def ok(self) -> bool:
        """Whether the fused file is equal within the tolerance, or no further from float64 than the original."""
        if self.difference <= TOLERANCE:
            return True
        return self.original is not None and self.fused is not None and self.fused <= FURTHER * self.original


def exactness(source: Path, target: Path, graph: Graph) -> list[Exactness]:
    """Both levels, for the files of original and fused; `graph`: of the original.

    Empty where there is nothing to compare: an input is unknown, or the file draws random numbers on each call.
    """
    if any(op.has(Trait.RANDOM) for op in graph):
        return []
    feeds = {kind: make_inputs(graph, make, 0) for kind, make in ADVERSARIES.items()}
    known = {kind: feed for kind, feed in feeds.items() if feed is not None}
    if not known:
        return []
    found = []
    reference = Reference(graph)
    expected = outputs(source, list(known.values()), "off")
    for level in ("off", "default"):
        actual = outputs(target, list(known.values()), level)
        by_kind = {kind: _furthest(a, b) for kind, a, b in zip(known, expected, actual, strict=True)}
        worst = max(by_kind, key=lambda kind: by_kind[kind])
        distances = _distances(source, target, graph, worst, level, reference)
        found.append(Exactness(level, worst, by_kind[worst], *distances))
    return found


def _furthest(one: list[Any], other: list[Any]) -> float:
    return max(relative_difference(a, b) for a, b in zip(one, other, strict=True))


def _distances(
    source: Path, target: Path, graph: Graph, kind: str, level: str, reference: Reference
) -> tuple[float | None, float | None]:
    feeds = [feed for seed in range(DRAWS) if (feed := make_inputs(graph, ADVERSARIES[kind], seed)) is not None]
    exact = [reference.outputs(feed) for feed in feeds]
    if None in exact:
        return None, None
    found = [
        np.sqrt(np.mean([_squared(r or [], run) for r, run in zip(exact, outputs(path, feeds, level), strict=True)], 0))
        for path in (source, target)
    ]
    return (float(found[0].max()), float(found[1].max())) if found[0].size else (None, None)


def _squared(exact: list[Any], run: list[Any]) -> list[float]:
    """The mean square of each float output's distance."""
    pairs = [(r, y) for r, y in zip(exact, run, strict=True) if y.dtype.kind == "f"]
    return [float(np.mean(((y - r) / max(np.abs(r).max(initial=0.0), _SMALLEST)) ** 2)) for r, y in pairs]


def table(rows: list[tuple[str, list[Exactness]]]) -> str:
    """As Markdown, by model: the difference of fused and original, and the distances of both, off / default."""
    lines = [
        "| model | fused − original | on inputs | original − float64 | fused − float64 | |",
        "|---|---:|---|---:|---:|---|",
    ]
    for name, found in rows:
        if not found:
            lines.append(f"| {name} | – | | – | – | random numbers, or inputs of unknown shape |")
            continue
        cells = [
            " / ".join(f"{each.difference:.1e}" for each in found),
            " / ".join(dict.fromkeys(each.inputs for each in found)),
            " / ".join(_number(each.original) for each in found),
            " / ".join(_number(each.fused) for each in found),
            "" if all(each.ok for each in found) else "further",
        ]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.1e}"


def verdicts(rows: list[tuple[str, list[Exactness]]]) -> list[str]:
    """How many are equal, how many as exact as the original, and which are neither."""
    levels = [(name, each) for name, found in rows for each in found]
    equal = sum(each.difference <= TOLERANCE for _, each in levels)
    exact = [(name, each) for name, each in levels if each.difference > TOLERANCE and each.ok]
    lines = [
        f"{equal} of {len(levels)} comparisons within {TOLERANCE:g} of the original's outputs; {len(exact)} more no "
        f"further from float64 than the original (at most {FURTHER} times)"
    ]
    lines += [
        f"{name}, optimisation {each.level}: {each.difference:.1e} on {each.inputs} inputs, and {_number(each.fused)} "
        f"from float64 where the original is {_number(each.original)}"
        for name, each in levels
        if not each.ok or each in [one for _, one in exact]
    ]
    return lines
