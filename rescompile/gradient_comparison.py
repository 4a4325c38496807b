"""Gradient flow before and after a rewrite, block by block: what the rewrite does to training.

Rows are the blocks of the graph that has more of them, each measured in both graphs with the same inputs and the same
direction at the outputs. In the other graph it is the block whose branch reads the same parameters; where that graph
has no skip, the same values are measured without one, so that a plain network is compared with a residual one.
‖∂L/∂θ‖ is over the parameters that both branches read: a norm that moved in or out of a branch counts on neither side.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from rescompile.blocks import Report
from rescompile.gradients import BlockFlow, GradientFlow, Probe, probes_of, short
from rescompile.graph import Graph, Role, Value

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult
    from rich.table import Table

PLAIN = "no skip"


@dataclass(frozen=True, eq=False)
class Pair:
    """Where one block is measured in both graphs; `was`, `now`: its norm placement there, or that it has no skip."""

    before: Probe
    after: Probe
    was: str
    now: str


@dataclass(frozen=True)
class GradientComparison:
    """Two gradient flows whose blocks correspond in order, and the norm placement of each block, before and after."""

    before: GradientFlow
    after: GradientFlow
    placements: tuple[tuple[str, str], ...]
    weights: str  # which the networks had
    notes: tuple[str, ...] = ()

    def __iter__(self) -> Iterator[tuple[BlockFlow, BlockFlow]]:
        return zip(self.before, self.after, strict=True)

    def to_dict(self) -> dict[str, Any]:
        """As in `rewrite --gradients --json`."""
        return {
            "weights": self.weights,
            "before": self.before.to_dict(),
            "after": self.after.to_dict(),
            "norm": [list(pair) for pair in self.placements],
            "notes": list(self.notes),
        }

    def plot(self, path: Any) -> None:
        """Write E[x²] and gradient norms over the blocks, before and after, as `.png` or `.svg`. Needs matplotlib."""
        from rescompile.plots import save_comparison

        save_comparison(self, path)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        from rich.markup import escape

        yield escape(f"Gradient flow before → after, on {self.before.data}; {self.weights}")
        if self.placements:
            yield self._table()
            for what, name in _SUMMARY:
                yield escape(f"{what}: {short(getattr(self.before, name))} → {short(getattr(self.after, name))}")
        for note in self.notes:
            yield escape(note)

    def _table(self) -> Table:
        from rich.table import Table
        from rich.text import Text

        table = Table(box=None, pad_edge=False)
        numbers = (f"{what} {when}" for what in ("E[x²]", "‖∂L/∂x‖", "‖∂L/∂θ‖") for when in ("before", "after"))
        for title in ("", "join", "norm", *numbers):
            justify: Any = "left" if title in ("join", "norm") else "right"
            table.add_column(Text(title.replace(" ", "\n")), justify=justify, no_wrap=True)
        for (before, after), (was, now) in zip(self, self.placements, strict=True):
            squares = [None if flow.join is None else flow.join.mean_square for flow in (before, after)]
            gradients = (before.join_gradient, after.join_gradient, before.parameter_gradient, after.parameter_gradient)
            nested = "·" if after.block.parent is not None else ""
            cells = (
                f"{nested}{after.block.id}",
                after.block.join,
                was if was == now else f"{was} → {now}",
                *map(short, (*squares, *gradients)),
            )
            table.add_row(*map(Text, cells))
        return table

    def __str__(self) -> str:
        from rescompile.plain_text import plain_text

        return plain_text(self)


_SUMMARY = (
    ("‖∂L/∂x‖, first block over last", "ratio"),
    ("‖∂L/∂θ‖, first block over last", "parameter_ratio"),
    ("slope of ln ‖∂L/∂x‖ per block", "slope"),
    ("slope of ln ‖∂L/∂θ‖ per block", "parameter_slope"),
    ("growth of E[x²] per block", "growth"),
)


# ---- which block is which --------------------------------------------------------------------------------------------


def pairs_of(before: tuple[Graph, Report], after: tuple[Graph, Report]) -> tuple[list[Pair], tuple[str, ...]]:
    """Where both graphs are measured, in the order of the one with more blocks, and notes on what has no partner."""
    old, new = probes_of(*before), probes_of(*after)
    forwards = len(new) >= len(old)
    lead, other, graph = (new, old, before[0]) if forwards else (old, new, after[0])
    partners = _partners(lead, other)
    pairs = []
    for probe in lead:
        partner = partners.get(probe) or _without_skip(probe, graph)
        if partner.join is None:
            continue
        mine, theirs = _same_parameters(probe, partner)
        here, there = probe.block.norm, partner.block.norm if probe in partners else PLAIN
        pairs.append(Pair(theirs, mine, there, here) if forwards else Pair(mine, theirs, here, there))
    left = {"original": len(other) - len(partners), "result": len(lead) - len(pairs)}
    if not forwards:
        left = {"original": left["result"], "result": left["original"]}
    notes = tuple(f"{count} blocks of the {side} have no counterpart." for side, count in left.items() if count)
    return pairs, notes


def _partners(lead: list[Probe], other: list[Probe]) -> dict[Probe, Probe]:
    """For each block of `lead` the one of `other` whose branch shares most of its parameters, in order where equal;
    of two that read none, those with the same join."""
    readers: dict[str, list[Probe]] = {}
    for probe in other:
        for name in _names(probe):
            readers.setdefault(name, []).append(probe)
    joins = {probe.block.join: probe for probe in other}
    taken: set[Probe] = set()
    found: dict[Probe, Probe] = {}
    for probe in lead:
        names = _names(probe)
        rivals = dict.fromkeys(rival for name in names for rival in readers.get(name, ()) if rival not in taken)
        best = max(rivals, key=lambda rival: _overlap(names, _names(rival)), default=None)
        namesake = joins.get(probe.block.join)
        if best is None and namesake is not None and not (names or _names(namesake)) and namesake not in taken:
            best = namesake
        if best is not None:
            found[probe] = best
            taken.add(best)
    return found


def _overlap(one: Mapping[str, Value], other: Mapping[str, Value]) -> float:
    return len(one.keys() & other.keys()) / len(one.keys() | other.keys())


def _without_skip(probe: Probe, graph: Graph) -> Probe:
    """The same place in a graph that has no skip there: fork, end of the branch and parameters by their names."""
    named = {value.name: value for value in graph.values}
    ends = [value for value, _ in probe.branches] if len(probe.branches) == 1 else []
    ends += [value for op in reversed(probe.block.branch_ops) for value in op.outputs]
    ends = [named[value.name] for value in ends if value.name in named]
    fork = named.get(probe.block.fork)
    parameters = [named[name] for name in _names(probe) if name in named and named[name].role is Role.PARAMETER]
    return Probe(probe.block, fork, ends[0] if ends else None, parameters=parameters)


def _same_parameters(one: Probe, other: Probe) -> tuple[Probe, Probe]:
    """Both, restricted to the parameters that both read; as they are where that is none (a rewrite made new ones)."""
    mine, theirs = _names(one), _names(other)
    common = [name for name in mine if name in theirs]
    if not common:
        return one, other
    return (
        replace(one, parameters=[mine[name] for name in common]),
        replace(other, parameters=[theirs[name] for name in common]),
    )


def _names(probe: Probe) -> dict[str, Value]:
    return {value.name: value for value in probe.parameters}
