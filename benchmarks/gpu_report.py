"""From what was measured on a GPU to a table, a plot and records: results/gpu-DEVICE-DATE.{json,md,png}, records.

Nothing here needs a GPU, torch or TVM; the plot needs matplotlib and is left out where that is not installed.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeAlias

Line: TypeAlias = dict[str, Any]

INDUCTOR = "inductor max-autotune"
COPY_TARGET = 0.92  # of the measured copy's bandwidth, for add + norm of 1k to 16k at 2^24 elements or more
LIBRARY_TARGET = 1.05  # of the plain contraction's time
MODEL_TARGET = 1.15  # geometric mean over inductor
_LARGE = 1 << 24
_PEAKS = {
    "float16": "matmul_float16_flop_per_s",
    "bfloat16": "matmul_bfloat16_flop_per_s",
    "float32": "matmul_tf32_flop_per_s",
}


def stem(facts: Mapping[str, str], date: str) -> str:
    """gpu-nvidia-h200-2026-12-04"""
    name = "-".join("".join(c if c.isalnum() else " " for c in facts["device"]).lower().split())
    return f"gpu-{name}-{date}"


def today() -> str:
    """UTC, ISO 8601."""
    return datetime.now(UTC).date().isoformat()


def write(folder: Path, results: Mapping[str, Any]) -> list[Path]:
    """All files of one run; their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    name = stem(results["facts"], results["date"])
    data, text = folder / f"{name}.json", folder / f"{name}.md"
    data.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    text.write_text(markdown(results), encoding="utf-8")
    written = [data, text]
    found = records(results)
    if found["records"]:
        path = folder / f"records-{name.removeprefix('gpu-')}.json"
        path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        written.append(path)
    drawn = plot(results, folder / f"{name}.png")
    return written if drawn is None else [*written, drawn]


# ---- records ---------------------------------------------------------------------------------------------------


def records(results: Mapping[str, Any]) -> Line:
    """The fastest candidate of each region, as `backends/records` has it."""
    found = {}
    for line in results["kernels"].values():
        tried = {label: told["seconds"] for label, told in line["candidates"].items() if told.get("seconds")}
        if tried and line["kernels"] == results["set"]["kernels"]:
            best = min(tried, key=lambda label: tried[label])
            found[line["key"]] = {"candidate": best, "seconds": tried[best], "tried": tried}
    return {
        "schema": 1,
        "device": dict(results["facts"]),
        "date": results["date"],
        "versions": dict(results["set"]["versions"]),
        "kernels": results["set"]["kernels"],
        "records": found,
    }


# ---- one region ------------------------------------------------------------------------------------------------


def best(line: Line, *, own: bool) -> tuple[str, float] | None:
    """The fastest of our own candidates, or of the libraries', with its seconds."""
    mine = set(line["own"])
    times = {
        label: told["seconds"]
        for label, told in line["candidates"].items()
        if (label in mine) is own and told.get("seconds")
    }
    label = min(times, key=lambda name: times[name], default=None)
    return None if label is None else (label, times[label])


def share(line: Line, seconds: float, ceilings: Mapping[str, float]) -> tuple[float, str] | None:
    """How much of the device's own rate a region reaches, and which rate limits it."""
    found = []
    if ceilings.get("copy_bytes_per_s"):
        found.append((line["bytes"] / ceilings["copy_bytes_per_s"], "copy"))
    dtype = line["name"].rpartition("/")[2]
    peak = ceilings.get(_PEAKS.get(dtype, ""), 0.0)
    if peak and line["flops"] and line["group"] in ("linear", "matmul", "conv"):
        found.append((line["flops"] / peak, "matmul"))
    if not found:
        return None
    floor, which = max(found)
    return floor / seconds, which


def rival(line: Line, name: str) -> float | None:
    """Seconds of a rival."""
    told = line["rivals"].get(name)
    return None if told is None else float(told["seconds"])


def geometric_mean(values: Sequence[float]) -> float:
    """exp(mean(log(v)))"""
    return math.exp(sum(map(math.log, values)) / len(values))


# ---- text ------------------------------------------------------------------------------------------------------


def markdown(results: Mapping[str, Any]) -> str:
    """Everything as tables."""
    facts, ceilings = results["facts"], results["ceilings"]
    lines = [f"# {facts['device']}, {results['date']}", "", ", ".join(f"{key} {value}" for key, value in facts.items())]
    if ceilings:
        told = ", ".join(f"{key.replace('_', ' ')} {value:.3g}" for key, value in ceilings.items())
        lines += ["", f"Measured ceilings: {told}."]
    lines += ["", "## Targets", "", *targets(results)]
    lines += ["", "## Correctness", "", *_correctness(results)]
    lines += ["", "## Kernels", "", *_kernels(results)]
    lines += ["", "## Models", "", *_models(results)]
    notes = [f"- {note}" for note in results.get("notes", [])]
    return "\n".join([*lines, *(["", "## Notes", "", *notes] if notes else [])]) + "\n"


def targets(results: Mapping[str, Any]) -> list[str]:
    """What was to be reached, and what was."""
    ceilings, kernels = results["ceilings"], list(results["kernels"].values())
    norms, behind, products = [], [], []
    for line in kernels:
        ours = best(line, own=True)
        if ours is None:
            continue
        width = _width(line)
        if line["group"].startswith("add_") and 1024 <= width <= 16384 and _elements(line) >= _LARGE:
            reached = share(line, ours[1], ceilings)
            if reached is not None:
                norms.append((reached[0], line["name"]))
            theirs = rival(line, INDUCTOR)
            if theirs is not None and theirs < ours[1]:
                behind.append(f"{line['name']} ({ours[1] / theirs:.2f}× inductor's time)")
        plain = rival(line, "plain library")
        winner = min(filter(None, (ours, best(line, own=False))), key=lambda pair: pair[1])
        if plain is not None:
            products.append((winner[1] / plain, line["name"]))
    found = [
        _target("add + norm, share of the copy's bandwidth", COPY_TARGET, norms, low=True),
        f"- add + norm slower than inductor's: {'; '.join(behind) if behind else 'none of those measured'}",
        _target("contraction + epilogue over the plain library's time", LIBRARY_TARGET, products, low=False),
    ]
    ratios = list(_ratios(results, INDUCTOR).values())
    if ratios:
        mean = geometric_mean(ratios)
        found.append(
            f"- models: {mean:.2f}× inductor's speed in geometric mean over {len(ratios)} "
            f"({'reached' if mean >= MODEL_TARGET else 'missed'}: {MODEL_TARGET}), the lowest {min(ratios):.2f}×"
        )
    return found


def _target(what: str, wanted: float, named: Sequence[tuple[float, str]], *, low: bool) -> str:
    if not named:
        return f"- {what}: not measured"
    worst, name = min(named) if low else max(named)
    values = [value for value, _ in named]
    reached = sum(value >= wanted if low else value <= wanted for value in values)
    return f"- {what}: {reached} of {len(values)} reach {wanted}; the worst is {worst:.3f} ({name})"


def _correctness(results: Mapping[str, Any]) -> list[str]:
    groups: dict[str, list[Line]] = {}
    for line in results["kernels"].values():
        groups.setdefault(line["group"], []).append(line)
    rows = ["| family | regions | candidates | refused | largest gap to float64 |", "|---|---:|---:|---:|---:|"]
    refused = []
    for group, lines in groups.items():
        own = [
            (line, label, line["candidates"][label])
            for line in lines
            for label in line["own"]
            if label in line["candidates"]
        ]
        gaps = [gap for _, _, told in own if "refused" not in told for gap in told["gaps"].values() if gap is not None]
        bad = [f"- {line['name']}: {label}: {told['refused']}" for line, label, told in own if "refused" in told]
        refused += bad
        rows.append(f"| {group} | {len(lines)} | {len(own)} | {len(bad)} | {max(gaps, default=0):.1e} |")
    broken = [f"- {name}: ended the process that measured it" for name in results.get("broken", [])]
    return [*rows, *(["", *refused, *broken] if refused or broken else [])]


def _kernels(results: Mapping[str, Any]) -> list[str]:
    names = ["torch eager", INDUCTOR, "triton", "plain library"]
    rivals = " | ".join(f"{name}, µs" for name in names)
    rows = [
        f"| region | ours, µs | of the ceiling | library, µs | {rivals} | candidate |",
        "|---|---:|---:|---:|" + "---:|" * len(names) + "---|",
    ]
    for line in results["kernels"].values():
        ours, library = best(line, own=True), best(line, own=False)
        reached = None if ours is None else share(line, ours[1], results["ceilings"])
        cells = [
            line["name"],
            "–" if ours is None else f"**{ours[1] * 1e6:.2f}**",
            "–" if reached is None else f"{100 * reached[0]:.0f} % {reached[1]}",
            "–" if library is None else f"{library[1] * 1e6:.2f}",
            *(_micro(rival(line, name)) for name in names),
            "–" if ours is None else ours[0],
        ]
        rows.append("| " + " | ".join(cells) + " |")
    return rows


def _models(results: Mapping[str, Any]) -> list[str]:
    models = results["models"]
    names = list(dict.fromkeys(name for line in models.values() for name in line.get("milliseconds", {})))
    if not names:
        return ["None was measured."]
    rows = [
        f"| model | {' | '.join(f'{name}, ms' for name in names)} | max error |",
        "|---|" + "---:|" * (len(names) + 1),
    ]
    for model, line in models.items():
        found = line.get("milliseconds", {})
        ours = found.get("rescompile")
        cells = [_beside(found.get(name), ours, name) for name in names]
        error = line.get("error")
        rows.append(f"| {model} | {' | '.join(cells)} | {'–' if error is None else f'{error:.1e}'} |")
    for name in names:
        ratios = list(_ratios(results, name).values())
        if name != "rescompile" and ratios:
            rows.append(f"\nGeometric mean over {name}: {geometric_mean(ratios):.2f}× ({len(ratios)} models).")
    failures = [
        f"- {model}: {name}: {why}" for model, line in models.items() for name, why in line.get("failures", {}).items()
    ]
    return [*rows, *(["", *failures] if failures else [])]


def _ratios(results: Mapping[str, Any], name: str) -> dict[str, float]:
    found = {model: line.get("milliseconds", {}) for model, line in results["models"].items()}
    return {
        model: times[name] / times["rescompile"]
        for model, times in found.items()
        if times.get(name) and times.get("rescompile")
    }


def _beside(value: float | None, ours: float | None, name: str) -> str:
    if value is None:
        return "–"
    return f"**{value:.3f}**" if name == "rescompile" or ours is None else f"{value:.3f} ({value / ours:.2f}×)"


def _micro(seconds: float | None) -> str:
    return "–" if seconds is None else f"{seconds * 1e6:.2f}"


def _width(line: Line) -> int:
    return int(line["name"].split("/")[1].split("x")[1]) if line["group"].endswith("norm") else 0


def _elements(line: Line) -> int:
    rows, width = line["name"].split("/")[1].split("x")[:2]
    return int(rows) * int(width)


# ---- plot ------------------------------------------------------------------------------------------------------


def plot(results: Mapping[str, Any], path: Path) -> Path | None:
    """Share of the copy's bandwidth by row width, and models beside inductor; None where matplotlib is not there."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        return None
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(13, 5))
    for dtype in ("bfloat16", "float16", "float32"):
        for group in ("add_layer_norm", "add_rms_norm"):
            points = sorted(_bandwidth(results, group, dtype))
            if points:
                left.plot(*zip(*points, strict=True), marker="o", label=f"{group} {dtype}")
    left.axhline(100 * COPY_TARGET, color="grey", linestyle=":")
    left.set(
        xscale="log", xlabel="row width", ylabel="% of the copy's bandwidth", title=str(results["facts"]["device"])
    )
    if left.lines[:-1]:
        left.legend(fontsize=7)
    ratios = _ratios(results, INDUCTOR) or _ratios(results, "torch eager")
    right.barh(list(ratios), list(ratios.values()))
    right.axvline(1.0, color="grey")
    right.set(xlabel="times as fast as " + (INDUCTOR if _ratios(results, INDUCTOR) else "torch eager"))
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return path


def _bandwidth(results: Mapping[str, Any], group: str, dtype: str) -> Iterable[tuple[int, float]]:
    for line in results["kernels"].values():
        ours = best(line, own=True)
        if (
            line["group"] == group
            and line["name"].endswith(f"/{dtype}")
            and ours is not None
            and _elements(line) >= _LARGE
        ):
            reached = share(line, ours[1], results["ceilings"])
            if reached is not None and reached[1] == "copy":
                yield _width(line), 100 * reached[0]
