"""How the cost of `inspect` grows with the size of a network, beside the cost of loading it.

Sizes from a thousand operations to a hundred thousand; forms that would betray what is not linear: a chain, one fork
that feeds every join, blocks nested in each other, transformer layers, dense blocks; from a graph in memory, from an
ONNX file and from a torch.fx module.
"""

from __future__ import annotations

import gc
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.scale_forms import FORMS, Form, fx_module, in_memory, write_onnx
from rescompile import api
from rescompile.graph import Graph

SIZES = (1_000, 10_000, 100_000)


@dataclass(frozen=True)
class Scale:
    """One network in one format.

    `load_seconds`: from the file or the module to the graph; None in memory. `library_seconds`: what of it the format's
    own library takes to read the file. `inspect_mib`: the most memory that the analysis held, its report included.
    """

    form: str
    source: str
    nodes: int
    blocks: int
    load_seconds: float | None
    library_seconds: float | None
    inspect_seconds: float
    microseconds_per_node: float
    inspect_mib: float


def measure_inspect(
    sizes: tuple[int, ...] = SIZES, repeats: int = 3, forms: tuple[str, ...] = tuple(FORMS)
) -> list[Scale]:
    """Every form at every size from every source; times are the best of `repeats`."""
    found = []
    for name in forms:
        for size in sizes:
            form = FORMS[name](size)
            for source, load, library in _sources(form, repeats):
                found.append(_measure(form, source, load, library, repeats))
                gc.collect()
    return found


def _sources(form: Form, repeats: int) -> Iterator[tuple[str, Callable[[], Graph], float | None]]:
    """Each source's name, how to load from it, and the seconds that its library alone takes."""
    graph = in_memory(form)
    yield "memory", lambda: graph, None
    with tempfile.TemporaryDirectory() as folder:
        import onnx_ir

        path = Path(folder) / "model.onnx"
        write_onnx(form, path)
        yield "onnx", lambda: api.load(path), _best(lambda: onnx_ir.load(path), 1)
    module = fx_module(form)
    yield "fx", lambda: api.capture(module), None


def _measure(form: Form, source: str, load: Callable[[], Graph], library: float | None, repeats: int) -> Scale:
    start = time.perf_counter()
    graph = load()  # once: it takes ten times as long as what is measured
    loading = None if source == "memory" else time.perf_counter() - start
    seconds = _best(lambda: api.inspect(graph), repeats)
    gc.collect()
    tracemalloc.start()
    report = api.inspect(graph)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    per_node = seconds / len(graph) * 1e6
    return Scale(
        form.name, source, len(graph), len(report), loading, library, seconds, per_node, round(peak / 2**20, 2)
    )


def _best(call: Callable[[], object], repeats: int) -> float:
    best = float("inf")
    for _ in range(repeats):
        gc.collect()
        start = time.perf_counter()
        kept = call()
        best = min(best, time.perf_counter() - start)
        del kept
    return best


def print_scale(rows: list[Scale]) -> str:
    """As a Markdown table."""
    lines = [
        "| network | from | operations | blocks | load, s | library alone, s | inspect, s | µs an operation | MiB |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        times = ["–" if each is None else f"{each:.3f}" for each in (row.load_seconds, row.library_seconds)]
        lines.append(
            f"| {row.form} | {row.source} | {row.nodes:,} | {row.blocks:,} | {times[0]} | {times[1]} "
            f"| {row.inspect_seconds:.3f} | {row.microseconds_per_node:.1f} | {row.inspect_mib:.1f} |"
        )
    return "\n".join(lines)


def scale_data(rows: list[Scale]) -> list[dict[str, object]]:
    """As plain data."""
    return [asdict(row) for row in rows]


if __name__ == "__main__":
    print(print_scale(measure_inspect()))
