"""The audit as text: a table of the joins that are not fused, and what they cost together.

A table lays out every cell of every row, so it has the costliest rows only where there are more than anybody reads.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from rich.markup import escape
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from rescompile.fusion_audit import Audit, Unfused

ROWS = 200


def audit_parts(audit: Audit) -> Iterator[Text | Table | str]:
    """What rich prints of an audit."""
    fused = audit.joins - len(audit.unfused)
    name = escape(audit.model or "graph")
    yield f"[bold]{name}[/bold] ({audit.ir}): {fused} of {audit.joins} residual joins are fused"
    symbols = ", ".join(f"{name} = {extent}" for name, extent in audit.symbols)
    total = f"the {size(audit.traffic)} that one call moves" + (f" with {symbols}" if symbols else "")
    if audit.unfused:
        shown = _shown(audit.unfused)
        yield _table(shown)
        rest = len(audit.unfused) - len(shown)
        if rest:
            cost = size(audit.cost - sum(each.cost for each in shown))
            yield Text(f"and {rest:,} more, none of which costs more: {cost} together; --json lists them all")
        saved = f"would save {size(audit.cost)}, {audit.share:.1%}, of {total}"
        yield Text(f"fusing the {len(audit.unfused)} others {saved}")
    else:
        yield Text(f"no residual join is left to fuse in {total}")


def _shown(unfused: Sequence[Unfused]) -> Sequence[Unfused]:
    """All, or the `ROWS` that cost most, in the order that they had."""
    if len(unfused) <= ROWS:
        return unfused
    kept = sorted(range(len(unfused)), key=lambda index: -unfused[index].cost)[:ROWS]
    return [unfused[index] for index in sorted(kept)]


def _table(unfused: Sequence[Unfused]) -> Table:
    table = Table(box=None, pad_edge=False)
    for title in ("", "kind", "join", "passes", "costs", "nearest rule", "why"):
        table.add_column(title, justify="right" if title in ("", "costs") else "left", no_wrap=title in _NARROW)
    above = ""
    for each in unfused:
        table.add_row(*map(Text, _cells(each, "as above" if each.reason == above else each.reason)))
        above = each.reason
    return table


_NARROW = ("", "kind", "passes", "costs")


def _cells(each: Unfused, reason: str) -> list[str]:
    now, least = each.passes
    passes = f"{now:.3g} → {least:.3g}" if each.tensor else "unknown shape"
    return [str(each.block.id), each.block.kind, each.where, passes, size(each.cost), each.rule, reason]


def size(count: int) -> str:
    """Three digits and a unit: 1.05 MB."""
    value = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 999.5:
            return f"{value:.3g} {unit}"
        value /= 1000.0
    return f"{value:.3g} TB"
