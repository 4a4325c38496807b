"""The report as text: the table of blocks, the counts, the recursion, the ways, the depth, what the skips cost."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING

from rich.markup import escape
from rich.table import Table
from rich.text import Text

from rescompile.structure.equations import recursion_lines
from rescompile.structure.overhead import BlockCosts, PathCost, overhead_line

if TYPE_CHECKING:
    from rescompile.blocks import Block, Report

_STRUCTURE = ("fork", "join", "ops", "shape")
_COSTS = ("join", "branch: params", "FLOPs", "bytes", "shortcut: params", "FLOPs", "bytes")


def report_parts(report: Report) -> Iterator[Text | Table | str]:
    """What rich prints of a report."""
    name = escape(report.model or "graph")
    yield f"[bold]{name}[/bold] ({report.ir}, {report.nodes:,} operations, {report.parameters:,} parameters)"
    if report.blocks:
        yield _table(report)
    summary = report.summary()
    counts = ", ".join(f"{count} {kind}" for kind, count in summary["by_kind"].items())
    nested = f", {summary['nested']} of them nested" if summary["nested"] else ""
    yield f"{summary['blocks']} residual blocks{nested}" + (f": {counts}" if counts else "")
    if report.not_residual:
        reasons = Counter(join.reason.split(":")[0] for join in report.not_residual)
        listed = ", ".join(f"{count} × {reason}" for reason, count in reasons.most_common())
        yield escape(f"{len(report.not_residual)} joins that are none: {listed}")
    if report.blocks:
        for line in meaning_lines(report):
            yield Text(line)


def meaning_lines(report: Report) -> list[str]:
    """What the structure means, line by line."""
    lines = recursion_lines(report.chains, report.blocks)
    lengths = report.lengths
    if lengths.log2_count:
        low, high = lengths.central()
        ways = f"{round(2**lengths.log2_count):,}" if lengths.log2_count < 20 else f"2^{lengths.log2_count:.6g}"
        lines.append(
            f"{ways} ways through {lengths.mean:.4g} branches on average; 95 % of them through {low} to {high}"
        )
    if report.dense_connections:
        total = sum(report.dense_connections)
        parts = " + ".join(map(str, report.dense_connections[:8])) + (
            " + ..." if len(report.dense_connections) > 8 else ""
        )
        lines.append(f"{total} dense connections" + (f" ({parts})" if len(report.dense_connections) > 1 else ""))
    depth = report.depth
    if depth is not None:
        lines.append(
            f"the longest way takes {depth.nominal} working operations ({depth.layers} layers), "
            f"the shortest {depth.shortest} ({depth.shortest_layers})"
        )
    if report.overhead is not None:
        lines.append(overhead_line(report.overhead))
    return lines


def _table(report: Report) -> Table:
    table = Table(box=None, pad_edge=False)
    priced = report.overhead if report.show_costs else None
    middle = ("scale", *_STRUCTURE) if priced is None else _COSTS
    right = {"", "ops", *_COSTS[1:]}
    inside = ["path"] if any(block.path for block in report.blocks) else []
    for title in ("", "kind", "shortcut", "norm", *middle, "module", *inside):
        table.add_column(title, justify="right" if title in right else "left", no_wrap=title != "module")
    depth: dict[int, int] = {}
    for block in reversed(report.blocks):
        depth[block.id] = 0 if block.parent is None else depth[block.parent] + 1
    for block in report.blocks:
        number = f"{'·' * min(depth[block.id], 8)}{block.id}"
        costs = None if priced is None else priced.blocks[block.id]
        cells = _structure_cells(block) if costs is None else _cost_cells(block, costs)
        path = [block.path] if inside else []
        table.add_row(*map(Text, (number, block.kind, block.shortcut, block.norm, *cells, block.module, *path)))
    return table


def _structure_cells(block: Block) -> list[str]:
    return [
        "" if block.scale is None else str(block.scale),
        block.fork,
        block.join + (" (fused)" if block.fused else ""),
        str(len(block.branch_ops)),
        "" if block.shape is None else "×".join(str(extent) for extent in block.shape),
    ]


def _cost_cells(block: Block, costs: BlockCosts) -> list[str]:
    return [block.join, *_cost_texts(costs.branch), *_cost_texts(costs.shortcut)]


def _cost_texts(cost: PathCost) -> list[str]:
    return [_short(cost.parameters), _short(cost.flops), _short(cost.bytes)]


def _short(number: int) -> str:
    """Three digits and a unit: 1.05M."""
    value = float(number)
    for unit in ("", "k", "M", "G"):
        if value < 999.5:
            return f"{value:.3g}{unit}"
        value /= 1000.0
    return f"{value:.3g}T"
