"""What a pass costs at size: load, `fuse` and save of large ONNX files, beside what other tools take for theirs.

python -m benchmarks.fuse_scale [--sizes 1000,10000,100000] [--forms chain,transformer] [--rounds 3] [--limit 120]

The floor is onnx_ir's own load and save, which every tool that keeps an ONNX model in Python pays. Everything runs in
this process, in turn, so that a busy moment of the machine meets all alike; times are medians. A tool that took longer
than `--limit` seconds at one size is not tried at the next, and one that is not installed is said to be missing.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib.util
import io
import json
import logging
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import date
from importlib import metadata
from pathlib import Path

from benchmarks.scale_forms import FORMS, write_onnx
from rescompile import api
from rescompile.cli_files import write_text
from rescompile.machine import machine, versions

RESULTS = Path(__file__).parent / "results"
SIZES = (1_000, 10_000, 100_000)
FLOOR = "onnx_ir"
OURS = "rescompile"


@dataclass(frozen=True)
class Cost:
    """Seconds of one tool on one file: the median and all rounds, by the wall and by this process's processor time.

    `fused`: how many rewrites rescompile applied, None of others. `ratio`: to the floor's median, by processor time.
    """

    form: str
    nodes: int
    tool: str
    seconds: float
    processor_seconds: float
    ratio: float
    rounds: tuple[float, ...]
    fused: int | None = None


Tool = Callable[[Path, Path], int | None]


def floor(source: Path, target: Path) -> None:
    """Nothing but reading and writing."""
    import onnx_ir

    onnx_ir.save(onnx_ir.load(source), target)


def ours(source: Path, target: Path) -> int:
    """As `rescompile rewrite --pass fuse --no-verify` does."""
    result = api.rewrite(api.load(source), "fuse", verify=False, in_place=True)
    result.save(target)
    return len(result.applied)


def runtime(source: Path, target: Path) -> None:
    """ONNX Runtime's session, which optimises as it loads, at level extended, and writes what it made."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = str(target)
    options.log_severity_level = 3
    onnxruntime.InferenceSession(str(source), options, providers=["CPUExecutionProvider"])


def simplifier(source: Path, target: Path) -> None:
    """onnxsim"""
    import onnx
    import onnxsim

    model, _ = onnxsim.simplify(onnx.load(source))
    onnx.save(model, target)


def slimmer(source: Path, target: Path) -> None:
    """onnxslim"""
    import onnx
    import onnxslim

    onnx.save(onnxslim.slim(onnx.load(source)), target)


def optimizer(source: Path, target: Path) -> None:
    """onnxoptimizer, its default passes"""
    import onnx
    import onnxoptimizer

    onnx.save(onnxoptimizer.optimize(onnx.load(source)), target)


def rewriter(source: Path, target: Path) -> None:
    """onnxscript's rewriter, its default rules"""
    import onnx_ir
    from onnxscript import rewriter as onnxscript_rewriter

    onnx_ir.save(onnxscript_rewriter.rewrite(onnx_ir.load(source)), target)


# What runs each tool, by the module that it needs; the floor comes first.
TOOLS: dict[str, Tool] = {
    FLOOR: floor,
    OURS: ours,
    "onnxsim": simplifier,
    "onnxruntime": runtime,
    "onnxoptimizer": optimizer,
    "onnxscript": rewriter,
    "onnxslim": slimmer,
}


def measure(
    sizes: tuple[int, ...] = SIZES,
    forms: tuple[str, ...] = ("chain", "transformer"),
    rounds: int = 3,
    limit: float = 120.0,
    tools: tuple[str, ...] = tuple(TOOLS),
) -> tuple[list[Cost], list[str]]:
    """Every tool on every form at every size, and a line for each that was left out."""
    missing = [name for name in tools if importlib.util.find_spec(name) is None]
    found: list[Cost] = []
    notes = [f"{name} is not installed" for name in missing]
    with tempfile.TemporaryDirectory() as folder:
        warm = Path(folder) / "warm.onnx"
        write_onnx(FORMS["chain"](20), warm)
        _race("chain", 20, warm, [name for name in tools if name not in missing], 1, limit)  # what is imported, is
        for form in forms:
            slow: set[str] = set()
            for size in sizes:
                source = Path(folder) / f"{form}_{size}.onnx"
                made = FORMS[form](size)
                write_onnx(made, source)
                names = [name for name in tools if name not in slow and name not in missing]
                costs, failed = _race(form, len(made.layers) - 1, source, names, rounds, limit)
                found += costs
                notes += failed
                slow |= {cost.tool for cost in costs if cost.seconds > limit / 10 and cost.tool not in (FLOOR, OURS)}
                slow |= {note.split(":")[0] for note in failed}
                notes += [f"{name}: not tried on {form} beyond {size} nodes" for name in sorted(slow)]
    return found, list(dict.fromkeys(notes))


def _race(
    form: str, nodes: int, source: Path, names: list[str], rounds: int, limit: float
) -> tuple[list[Cost], list[str]]:
    wall: dict[str, list[float]] = {name: [] for name in names}
    processor: dict[str, list[float]] = {name: [] for name in names}
    fused: dict[str, int | None] = {}
    failed: list[str] = []
    target = source.with_name("out.onnx")
    for _ in range(rounds):
        for name in names:
            if any(note.startswith(f"{name}:") for note in failed) or sum(wall[name]) > limit:
                continue
            gc.collect()
            start, busy = time.perf_counter(), time.process_time()
            try:
                with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                    fused[name] = TOOLS[name](source, target)
            except Exception as error:  # noqa: BLE001 (whatever a tool raises is a line of the table)
                failed.append(f"{name}: fails on {form} of {nodes} nodes: {str(error).splitlines()[0][:120]}")
                continue
            wall[name].append(time.perf_counter() - start)
            processor[name].append(time.process_time() - busy)
    costs = []
    for name in names:
        if wall[name]:
            busy = statistics.median(processor[name])
            ratio = busy / statistics.median(processor[FLOOR]) if processor.get(FLOOR) else float("nan")
            costs.append(
                Cost(form, nodes, name, statistics.median(wall[name]), busy, ratio, tuple(wall[name]), fused[name])
            )
    return costs, failed


def table(costs: list[Cost]) -> str:
    """As Markdown: a row for each form and size, a column for each tool."""
    names = [name for name in TOOLS if any(cost.tool == name for cost in costs)]
    lines = ["| network | nodes | " + " | ".join(names) + " |", "|---|---:|" + "---:|" * len(names)]
    for form, nodes in dict.fromkeys((cost.form, cost.nodes) for cost in costs):
        cells = []
        for name in names:
            row = next((c for c in costs if (c.form, c.nodes, c.tool) == (form, nodes, name)), None)
            cells.append("–" if row is None else f"{row.seconds:.2f} s ({row.ratio:.1f}×)")
        lines.append(f"| {form} | {nodes:,} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Measure, print, write `results/fuse_scale.json`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default=",".join(map(str, SIZES)))
    parser.add_argument("--forms", default="chain,transformer", help=f"of {', '.join(FORMS)}")
    parser.add_argument("--tools", default=",".join(TOOLS), help="with commas")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--limit", type=float, default=120.0, help="seconds that one tool may take at one size")
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)
    sizes = tuple(int(size) for size in arguments.sizes.split(","))
    costs, notes = measure(
        sizes, tuple(arguments.forms.split(",")), arguments.rounds, arguments.limit, tuple(arguments.tools.split(","))
    )
    print(table(costs))
    for note in notes:
        print(note)
    packages = {name: metadata.version(name) for name in _installed()}
    data = {
        "date": str(date.today()),
        "machine": machine(),
        "versions": {**versions(), **packages},
        "costs": [asdict(cost) for cost in costs],
        "notes": notes,
    }
    write_text(RESULTS / "fuse_scale.json", json.dumps(data, indent=2) + "\n")


def _installed() -> list[str]:
    peers = ("onnxsim", "onnxslim", "onnxoptimizer", "onnxscript")
    return [name for name in peers if importlib.util.find_spec(name) is not None]


if __name__ == "__main__":
    main()
