"""Where should the skips go? Candidates with what each costs, how gradients flow through it, and how it trains.

Placement is an empirical question: the tool makes trying cheap. Without a training function candidates are ranked by
gradient flow, the gradient of the first layer's weights over that of the last layer's at the given weights, which is
near 1 in a network whose layers all learn; with one they are ranked by its loss.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, TypeAlias

from rescompile.costs import Costs, graph_costs
from rescompile.errors import RescompileError
from rescompile.graph import Graph
from rescompile.plans import Pass, Pipeline
from rescompile.rewriting import make_plan
from rescompile.specs import format_pass

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult

BASELINE = "as it is"
EVERY = (1, 2, 3)
JOINS = ("before-activation", "after", "pre-activation")
KINDS = ("add", "gated", "dense")
Progress: TypeAlias = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Candidate:
    """One placement. `added`: parameters, FLOPs and bytes moved on top of the original's, on one call.

    `ratio`: root-mean-square gradient of the first layer's weights over that of the last layer's. `loss`, `steps`: what
    training came to, and after how many steps; `pruned`: it was given up early. `reason`: why there is nothing to try.
    """

    spec: str
    shortcuts: int = 0
    added: Mapping[str, int] = field(default_factory=dict)
    ratio: float | None = None
    loss: float | None = None
    steps: int = 0
    pruned: bool = False
    reason: str = ""

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "spec": self.spec,
            "shortcuts": self.shortcuts,
            "added": dict(self.added),
            "gradient_ratio": self.ratio,
            "loss": self.loss if self.loss is not None and math.isfinite(self.loss) else None,
            "steps": self.steps,
            "pruned": self.pruned,
            "reason": self.reason,
        }


@dataclass(frozen=True)
class Exploration:
    """The candidates, the best first; the model as it is stands among them."""

    model: str
    candidates: tuple[Candidate, ...]

    def to_dict(self) -> dict[str, Any]:
        """As JSON, schema 1."""
        return {
            "schema": 1,
            "model": self.model,
            "candidates": [candidate.to_dict() for candidate in self.candidates],
        }

    def plot(self, path: Any) -> None:
        """Loss (or gradient flow) against added FLOPs and parameters, as PNG or SVG."""
        from rescompile.plots import save_exploration

        save_exploration(self, path)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        from rich.markup import escape
        from rich.table import Table
        from rich.text import Text

        yield f"[bold]{escape(self.model or 'model')}[/bold]: {len(self.candidates)} placements"
        trained = any(candidate.loss is not None for candidate in self.candidates)
        table = Table(box=None, pad_edge=False)
        for title in ("placement", "skips", "parameters", "FLOPs", "bytes", "gradient", *(["loss"] if trained else [])):
            table.add_column(title, justify="left" if title == "placement" else "right", no_wrap=True)
        for candidate in self.candidates:
            if candidate.reason:
                continue
            added = [f"{candidate.added.get(name, 0):+,}" for name in ("parameters", "flops", "bytes")]
            loss = "" if candidate.loss is None else f"{candidate.loss:.4g}{' (pruned)' if candidate.pruned else ''}"
            ratio = "" if candidate.ratio is None else f"{candidate.ratio:.2g}"
            row = [candidate.spec, str(candidate.shortcuts), *added, ratio, *([loss] if trained else [])]
            table.add_row(*map(Text, row))
        yield table
        for candidate in self.candidates:
            if candidate.reason:
                yield escape(f"{candidate.spec}: {candidate.reason}")

    def __str__(self) -> str:
        from rescompile.plain_text import plain_text

        return plain_text(self)


@dataclass(frozen=True)
class Training:
    """A training function, for how many steps it runs, and where results are kept.

    `function(model, report, steps)` trains the torch module, calls `report(step, loss)` now and then, and returns the
    final loss. `storage`: the URL of a database that Optuna takes; several processes may work on one study there.
    """

    function: Callable[[Any, Callable[[int, float], None], int], float]
    steps: int = 100
    storage: str | None = None
    study: str = "rescompile"
    seed: int = 0


def explore(
    graph: Graph,
    passes: Sequence[Pass | Pipeline],
    *,
    inputs: Any = None,
    training: Training | None = None,
    seed: int = 0,
    progress: Progress = lambda text: None,
) -> Exploration:
    """Try each pass on a copy of `graph`, and the graph as it is. RescompileError where torch cannot run the graph."""
    from rescompile.fx_training import first_to_last

    before = graph_costs(graph)
    graphs: dict[str, Graph] = {BASELINE: graph}
    found = [Candidate(BASELINE, ratio=first_to_last(graph, inputs, seed))]
    for item in passes:
        spec = format_pass(item)
        progress(spec)
        plan, rewritten = make_plan(graph, [item])
        if not plan.rewrites:
            reason = plan.refusals[0].reason if plan.refusals else "nothing to do"
            found.append(Candidate(spec, reason=f"no place for a shortcut ({reason})"))
            continue
        graphs[spec] = rewritten
        ratio = first_to_last(rewritten, inputs, seed)
        found.append(Candidate(spec, len(plan.rewrites), _added(before, graph_costs(rewritten)), ratio))
    if training is not None:
        try:
            from rescompile.studies import run_study
        except ImportError as error:
            raise RescompileError("Training placements needs Optuna: pip install 'rescompile[explore]'.") from error
        results = run_study({spec: graphs[spec] for spec in graphs}, training, progress)
        found = [_trained(candidate, results) for candidate in found]
    return Exploration(graph.name, tuple(sorted(found, key=_rank)))


def _trained(candidate: Candidate, results: Mapping[str, tuple[float, int, bool]]) -> Candidate:
    if candidate.spec not in results:
        return candidate
    loss, steps, pruned = results[candidate.spec]
    return replace(candidate, loss=loss, steps=steps, pruned=pruned)


def _added(before: Costs, after: Costs) -> dict[str, int]:
    return {
        "parameters": after.parameters - before.parameters,
        "flops": after.flops - before.flops,
        "bytes": after.bytes - before.bytes,
    }


def _rank(candidate: Candidate) -> tuple[Any, ...]:
    """The pruned come last; then by loss, then by how far the gradient ratio is from 1, then by bytes."""
    ratio = candidate.ratio
    uneven = abs(math.log10(ratio)) if ratio is not None and 0 < ratio < math.inf else math.inf
    loss = math.inf if candidate.loss is None or math.isnan(candidate.loss) else candidate.loss
    return bool(candidate.reason), candidate.pruned, loss, round(uneven, 1), candidate.added.get("bytes", 0)


def grid(every: Iterable[int], joins: Iterable[str], kinds: Iterable[str]) -> list[str]:
    """Specs of `insert-shortcuts` for every combination, from which plain sums start as sums."""
    specs = []
    for kind in kinds:
        start = "highway" if kind == "gated" else "residual"
        if kind == "long":
            specs.append(f"insert-shortcuts{{kind=long,start={start}}}")
            continue
        for count in every:
            specs += [f"insert-shortcuts{{every={count},kind={kind},join={join},start={start}}}" for join in joins]
    if not specs:
        raise RescompileError("There is no placement to explore: give at least one of every, join and kind each.")
    return specs
