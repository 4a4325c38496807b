"""`make bench`: the corpus on every runtime, and how `inspect` grows; results as JSON, and as the README's tables.

python -m benchmarks.run [MODEL ...] [--against eager,inductor,onnxruntime] [--threads N] [--no-readme]
"""

from __future__ import annotations

import argparse
import json
import re
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import rescompile as rc
from benchmarks.corpus import CORPUS
from benchmarks.kernels import ceiling_gflops
from benchmarks.scale import SIZES, measure_inspect, print_scale, scale_data
from rescompile.backends.kernels import Machine
from rescompile.cli_bench import OURS, Measured, bench_graph
from rescompile.cli_files import write_text
from rescompile.costs import graph_costs
from rescompile.machine import machine, versions

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
DEFAULT = ("resnet50", "bert_base")
RUNTIMES = ("eager", "inductor", "onnxruntime")


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", metavar="MODEL", help=f"of {', '.join(CORPUS)}; else {', '.join(DEFAULT)}")
    parser.add_argument("--against", default=",".join(RUNTIMES), help="runtimes to measure against, with commas")
    parser.add_argument("--threads", type=int, default=None, help="threads of every runtime; all available otherwise")
    parser.add_argument("--no-readme", action="store_true", help="leave the README's tables as they are")
    arguments = parser.parse_args()
    unknown = [name for name in arguments.models if name not in CORPUS]
    if unknown:
        parser.error(f"there is no model '{unknown[0]}' in the corpus: choose from {', '.join(CORPUS)}")
    RESULTS.mkdir(exist_ok=True)

    print(json.dumps({"machine": machine(), "versions": versions()}, indent=2), flush=True)
    scale = measure_inspect()
    print(print_scale(scale), flush=True)
    write_text(
        RESULTS / "inspect.json", _json({"machine": machine(), "date": str(date.today()), "inspect": scale_data(scale)})
    )
    measured = []
    for name in arguments.models or DEFAULT:
        found = measure_model(name, arguments.against.split(","), arguments.threads)
        bound = Bound(found.flops, ceiling_gflops(Machine.host(found.timings.threads)))
        print(f"{found.timings}\n{bound.describe(found.timings)}", flush=True)
        data = {
            "date": str(date.today()),
            **found.timings.to_dict(),
            "flops": bound.flops,
            "multiply_add_ceiling_gflops": bound.ceiling,
        }
        write_text(RESULTS / f"{name}.json", _json(data))
        measured.append((found.timings, bound))
    if not arguments.no_readme:
        largest = [row for row in scale if row.nodes > 2 * SIZES[-2]]
        fill_readme("\n".join([*bench_table(measured), "", print_scale(largest)]))


@dataclass(frozen=True)
class Bound:
    """What the machine could do at best: a model's arithmetic at the rate of multiply-adds on registers alone."""

    flops: int  # of one call
    ceiling: float  # GFLOP/s

    def percent(self, found: Measured) -> float:
        """How much of the ceiling rescompile reaches over the whole model, in percent."""
        ours = found.timing(OURS)
        return 0.0 if ours is None else 100 * self.flops / (ours.milliseconds * 1e6) / self.ceiling

    def describe(self, found: Measured) -> str:
        """In words."""
        return (
            f"{self.flops / 1e9:.2f} GFLOP a call; rescompile reaches {self.percent(found):.0f} % of "
            f"{self.ceiling:.0f} GFLOP/s"
        )


@dataclass(frozen=True)
class ModelTimings:
    """A model of the corpus on every runtime, and the arithmetic of one call."""

    timings: Measured
    flops: int


def measure_model(name: str, against: list[str], threads: int | None) -> ModelTimings:
    """One model of the corpus on every runtime."""
    model, inputs = CORPUS[name]()
    graph = rc.capture(model, inputs)
    graph.name = name
    timings = bench_graph(graph, against, inputs=[tensor.numpy() for tensor in inputs], threads=threads)
    return ModelTimings(timings, graph_costs(graph).flops)


def bench_table(measured: list[tuple[Measured, Bound]]) -> list[str]:
    """Medians and ratios as a Markdown table, with what they were measured on."""
    found = machine()
    present = versions()
    listed = ", ".join(f"{name} {present[name]}" for name in ("torch", "onnxruntime", "apache-tvm") if name in present)
    lines = [
        f"fp32, batch 1, {measured[0][0].threads} threads of {found['processor']}; {listed}; {date.today()}.",
        "Medians in ms of calls that are interleaved in blocks; in brackets, how many times as long as rescompile. The",
        "bound is the model's arithmetic at the rate of multiply-adds on registers alone, measured in the same run.",
        "",
        "| model | input | rescompile | " + " | ".join(RUNTIMES) + " | of the bound | max error | compiled in |",
        "|---|---|---:|" + "---:|" * len(RUNTIMES) + "---:|---:|---:|",
    ]
    for row, bound in measured:
        ours = row.timing(OURS)
        if ours is None:
            continue
        cells = [row.model, "; ".join(row.inputs), f"**{ours.milliseconds:.1f}**"]
        cells += [_cell(row, name) for name in RUNTIMES]
        cells += [f"{bound.percent(row):.0f} %", f"{ours.error:.1e}", f"{ours.prepared_in:.0f} s"]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def fill_readme(text: str) -> None:
    """Put the tables between the README's two marks."""
    path = ROOT / "README.md"
    before = path.read_text(encoding="utf-8")
    marks = re.compile(r"(<!-- bench -->\n).*?(<!-- /bench -->)", re.DOTALL)
    after = marks.sub(lambda found: f"{found[1]}{text}\n{found[2]}", before)
    write_text(path, after)


def _cell(row: Measured, name: str) -> str:
    timing, ratio = row.timing(name), row.ratio(name)
    return "–" if timing is None or ratio is None else f"{timing.milliseconds:.1f} ({ratio:.2f}×)"


def _json(data: object) -> str:
    return json.dumps(data, indent=2) + "\n"


if __name__ == "__main__":
    main()
