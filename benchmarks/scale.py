"""How the cost of `inspect` grows: a chain of residual blocks, from a thousand operations to a hundred thousand."""

from __future__ import annotations

import gc
import time
from dataclasses import asdict, dataclass

from rescompile import api
from rescompile.graph import Graph, ValueType
from rescompile.kinds import OpKind

SIZES = (1_000, 10_000, 100_000)
_OPS_PER_BLOCK = 5


@dataclass(frozen=True)
class Scale:
    """One size: operations, blocks found, seconds of analysis, microseconds for each operation."""

    nodes: int
    blocks: int
    seconds: float
    microseconds_per_node: float


def chain(nodes: int, width: int = 64) -> Graph:
    """x ← relu(x + linear(relu(linear(x)))), as often as makes `nodes` operations."""
    graph = Graph(f"chain of {nodes:,} operations")
    kind = ValueType((1, width), "float32")
    value = graph.add_input("x", kind.shape, kind.dtype)
    for block in range(nodes // _OPS_PER_BLOCK):
        first, second = (graph.add_constant(f"w{block}_{index}", (width, width), "float32") for index in (1, 2))
        inner = graph.add_op(OpKind.LINEAR, [value, first], [(f"a{block}", kind)]).output
        inner = graph.add_op(OpKind.RELU, [inner], [(f"b{block}", kind)]).output
        inner = graph.add_op(OpKind.LINEAR, [inner, second], [(f"c{block}", kind)]).output
        joined = graph.add_op(OpKind.ADD, [value, inner], [(f"d{block}", kind)]).output
        value = graph.add_op(OpKind.RELU, [joined], [(f"e{block}", kind)]).output
    graph.set_outputs([value])
    graph.commit()
    return graph


def measure_inspect(sizes: tuple[int, ...] = SIZES, repeats: int = 3) -> list[Scale]:
    """The best of `repeats` analyses of each size, loading not counted."""
    found = []
    for size in sizes:
        graph = chain(size)
        best, blocks = float("inf"), 0
        for _ in range(repeats):
            gc.collect()
            start = time.perf_counter()
            blocks = len(api.inspect(graph))
            best = min(best, time.perf_counter() - start)
        found.append(Scale(len(graph), blocks, best, best / len(graph) * 1e6))
    return found


def print_scale(rows: list[Scale]) -> str:
    """As a Markdown table."""
    lines = ["| operations | residual blocks | inspect, s | µs an operation |", "|---:|---:|---:|---:|"]
    lines += [
        f"| {row.nodes:,} | {row.blocks:,} | {row.seconds:.3f} | {row.microseconds_per_node:.1f} |" for row in rows
    ]
    return "\n".join(lines)


def scale_data(rows: list[Scale]) -> list[dict[str, float]]:
    """As plain data."""
    return [asdict(row) for row in rows]
