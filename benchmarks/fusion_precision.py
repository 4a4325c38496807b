"""Is a fused torch model as exact as it was? `python -m benchmarks.fusion_precision GROUND_TRUTH.json [--only WORDS]`.

    float64          largest relative difference of the fused model's outputs, at most 1e-12
    float16, bfloat16   d = √(mean (y − r)²) / max |r|,   r the same model, its weights in 16 bits, computed in float64

Each model gets norms that are no identity, and is cast, captured, and fused. ρ = d(fused) / d(original) is pooled over
random inputs of several seeds; its standard error, from what ρ is for each seed alone, tells whether 1.02 is more than
luck. `--seeds 8` draws more.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import math
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.ground_truth import Case, build
from rescompile import api
from rescompile.cli_files import write_text
from rescompile.fx_reference import Reference
from rescompile.graph import Graph
from rescompile.machine import machine, versions
from rescompile.verify import ADVERSARIES, TOLERANCES, make_inputs, relative_difference

RESULTS = Path(__file__).parent / "results"
NARROW = {"float16": torch.float16, "bfloat16": torch.bfloat16}
SEEDS = 3
LUCK = 3.0  # standard errors that a ratio above one may be away from it
SLACK = 0.02


@dataclass
class Narrow:
    """One model in one 16-bit type: distances from float64 of original and fused, by seed."""

    original: list[float]
    fused: list[float]

    @property
    def ratio(self) -> float:
        """d(fused) / d(original), of the mean squares over all seeds."""
        before, after = (math.sqrt(sum(d * d for d in each)) for each in (self.original, self.fused))
        return after / before if before else 1.0 if not after else math.inf

    @property
    def error(self) -> float:
        """Standard error of the ratio, from its logarithm by seed."""
        pairs = [(a, b) for a, b in zip(self.original, self.fused, strict=True) if a > 0 and b > 0]
        if len(pairs) < 2:
            return 0.0
        return float(np.std([math.log(b / a) for a, b in pairs], ddof=1) / math.sqrt(len(pairs)))

    @property
    def ok(self) -> bool:
        """Whether the fused model is no further, as far as these inputs tell."""
        return self.ratio <= 1.0 + max(SLACK, LUCK * self.error)


@dataclass
class Row:
    """One model. `float64`: the largest relative difference; `failures`: what could not be measured, by type."""

    model: str
    float64: float | None = None
    narrow: dict[str, Narrow] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)


def measure(case: Case, seeds: int = SEEDS, spec: str = "fuse") -> Row:
    """All types of one model. The case's model is left as it is."""
    row = Row(case.title)
    for name, dtype in {"float64": torch.float64, **NARROW}.items():
        try:
            graph = _captured(case, dtype)
            fused = api.rewrite(graph, [spec], verify=False).graph
            if name == "float64":
                row.float64 = max(_equal(graph, fused, feed) for feed in _feeds(graph, seeds))
            else:
                row.narrow[name] = _narrow(graph, fused, seeds)
        except Exception as error:  # noqa: BLE001 (what torch cannot run in a type is a line of the table)
            row.failures[name] = f"{type(error).__name__}: {str(error).strip().splitlines()[0][:120]}"
        gc.collect()
    return row


def _captured(case: Case, dtype: torch.dtype) -> Graph:
    model = _with_norms(copy.deepcopy(case.model)).to(dtype)
    inputs = case.inputs.items() if isinstance(case.inputs, dict) else enumerate(case.inputs)
    cast = {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in inputs}
    return api.capture(model, cast if isinstance(case.inputs, dict) else tuple(cast.values()))


def _with_norms(model: torch.nn.Module) -> torch.nn.Module:
    """Norms with scales, shifts and statistics of their own: what folds, and what is summed, is no one and no zero."""
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if "norm" in type(module).__name__.lower():
            own = (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
            for name, tensor in own:
                if tensor.is_floating_point():
                    low, high = (-0.2, 0.2) if name in ("bias", "running_mean") else (0.7, 1.3)
                    tensor.data.uniform_(low, high, generator=generator)
    return model


def _feeds(graph: Graph, seeds: int) -> Iterator[dict[str, np.ndarray[Any, Any]]]:
    for seed in range(seeds):
        feed = make_inputs(graph, ADVERSARIES["random"], seed)
        if feed is not None:
            yield feed


def _equal(graph: Graph, fused: Graph, feed: dict[str, np.ndarray[Any, Any]]) -> float:
    pairs = zip(graph.run(feed).values(), fused.run(feed).values(), strict=True)
    return max(relative_difference(a, b) for a, b in pairs)


def _narrow(graph: Graph, fused: Graph, seeds: int) -> Narrow:
    reference, found = Reference(graph), Narrow([], [])
    for feed in _feeds(graph, seeds):
        exact = reference.outputs(feed)
        if exact is None:
            raise RuntimeError("there is no float64 run to compare with")
        for distances, each in ((found.original, graph), (found.fused, fused)):
            distances.append(max(_distance(r, y) for r, y in zip(exact, each.run(feed).values(), strict=True)))
    return found


def _distance(exact: np.ndarray[Any, Any], actual: np.ndarray[Any, Any]) -> float:
    if exact.dtype != np.float64 or not exact.size:
        return 0.0
    scale = float(np.abs(exact).max()) or 1.0
    return float(np.sqrt(np.mean((actual.astype(np.float64) - exact) ** 2))) / scale


# ---- as text ---------------------------------------------------------------------------------------------------------


def table(rows: list[Row]) -> str:
    """As Markdown."""
    lines = [
        "| model | float64 | float16: original | fused | ρ | bfloat16: original | fused | ρ |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        cells = ["fails" if row.float64 is None else f"{row.float64:.0e}"]
        for name in NARROW:
            found = row.narrow.get(name)
            if found is None:
                cells += ["–", "–", "–"]
                continue
            before, after = (math.sqrt(np.mean(np.square(each))) for each in (found.original, found.fused))
            cells += [f"{before:.2e}", f"{after:.2e}", f"{found.ratio:.3f} ± {found.error:.3f}"]
        lines.append(f"| {_short(row.model)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def summary(rows: list[Row]) -> list[str]:
    """What holds of all, and each exception."""
    equal = [row for row in rows if row.float64 is not None and row.float64 <= TOLERANCES["float64"]]
    measured = [(row, name, found) for row in rows for name, found in row.narrow.items()]
    kept = [found for _, _, found in measured if found.ok]
    lines = [
        f"{len(equal)} of {sum(row.float64 is not None for row in rows)} models equal within "
        f"{TOLERANCES['float64']:g} in float64; {len(kept)} of {len(measured)} no further from float64 in 16 bits "
        f"(ρ ≤ 1 + max({SLACK}, {LUCK:g} standard errors))"
    ]
    for row in rows:
        if row.float64 is not None and row not in equal:
            lines.append(f"- {_short(row.model)}: {row.float64:.1e} in float64")
        lines += [f"- {_short(row.model)}: {name} not measured: {why}" for name, why in row.failures.items()]
    lines += [
        f"- {_short(row.model)}: {found.ratio:.3f} ± {found.error:.3f} times as far in {name}"
        for row, name, found in measured
        if not found.ok
    ]
    return lines


def _short(title: str) -> str:
    head, _, rest = title.partition(":")
    return rest.split("(")[0].strip() if head == "transformers" else title


def main() -> None:
    """Measure, print, and write `results/fusion_precision.json` and `.md`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="models and their blocks, as JSON")
    parser.add_argument("--only", default="", help="a part of the model's name")
    parser.add_argument("--pass", dest="spec", default="fuse", help="the pass to run")
    parser.add_argument("--seeds", type=int, default=SEEDS, help="how many random inputs")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    kept = {row.model: row for row in _read()}
    for entry in json.loads(arguments.file.read_text())["models"]:
        text = entry["model"]
        if text.startswith("onnx/") or arguments.only.lower() not in text.lower():
            continue
        for case in build(entry):
            row = measure(case, arguments.seeds, arguments.spec)
            kept[row.model] = row
            print(table([row]).splitlines()[-1], *summary([row])[1:], sep="\n", flush=True)
            _write(list(kept.values()), arguments.spec)
        gc.collect()
    print("\n".join(["", table(list(kept.values())), "", *summary(list(kept.values()))]))


def _read() -> list[Row]:
    path = RESULTS / "fusion_precision.json"
    if not path.exists():
        return []
    rows = json.loads(path.read_text())["models"]
    return [Row(**{**row, "narrow": {name: Narrow(**found) for name, found in row["narrow"].items()}}) for row in rows]


def _write(rows: list[Row], spec: str) -> None:
    known = {"date": str(date.today()), "pass": spec, "machine": machine(), "versions": versions()}
    found = {**known, "models": [asdict(row) for row in rows]}
    write_text(RESULTS / "fusion_precision.json", json.dumps(found, indent=1) + "\n")
    head = [
        f"# How exact fused models are, `{spec}`",
        "",
        f"{known['date']}; " + ", ".join(f"{name} {version}" for name, version in versions().items()) + ".",
        "float64: largest relative difference to the original. 16 bits: distance from the float64 run of the same "
        "weights, root mean square over the outputs relative to their largest magnitude; ρ the fused model's over the "
        "original's, with its standard error over the seeds.",
        "",
    ]
    write_text(RESULTS / "fusion_precision.md", "\n".join([*head, table(rows), "", *summary(rows)]) + "\n")


if __name__ == "__main__":
    main()
