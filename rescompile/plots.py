"""Pictures of reports, by matplotlib, which is optional: `pip install 'rescompile[plot]'`."""

from __future__ import annotations

import io
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rescompile.errors import RescompileError
from rescompile.gradient_comparison import GradientComparison
from rescompile.gradients import BlockFlow, GradientFlow

if TYPE_CHECKING:
    from rescompile.exploring import Exploration

_FORMATS = ("png", "svg")


def format_of(path: str | os.PathLike[str]) -> str:
    """The format that a file's name asks for; RescompileError when it is neither PNG nor SVG."""
    suffix = Path(path).suffix.lower().removeprefix(".")
    if suffix not in _FORMATS:
        raise RescompileError(f"A picture is written as .png or .svg, and '{path}' is neither.")
    return suffix


def save(flow: GradientFlow, path: str | os.PathLike[str]) -> None:
    """Write the picture of a gradient flow to a file."""
    format_ = format_of(path)
    Path(path).write_bytes(draw(flow, format_))


def draw(flow: GradientFlow, format_: str) -> bytes:
    """Variances and gradient norms over the blocks, on logarithmic scales, as a PNG or SVG file's contents."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6.5), layout="constrained")
    signals, gradients = figure.subplots(2, 1, sharex=True)
    places = [block.block.id for block in flow]
    for name in ("fork", "join", "branch", "skip"):
        _line(signals, places, [_variance(getattr(block, name)) for block in flow], name)
    for name, label in (("fork", "∂L/∂fork"), ("join", "∂L/∂join"), ("parameter", "∂L/∂θ of the branch")):
        _line(gradients, places, [getattr(block, f"{name}_gradient") for block in flow], label)
    signals.set_ylabel("variance")
    gradients.set_ylabel("gradient norm")
    gradients.set_xlabel("block")
    # Ticks name the blocks by their ids, never halves between them.
    gradients.xaxis.get_major_locator().set_params(integer=True)
    for axes in (signals, gradients):
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.set_yscale("log")
            axes.legend(loc="best", fontsize="small")
    ratio = "" if flow.ratio is None else f"; gradient norm first/last {flow.ratio:.3g}"
    figure.suptitle(f"{flow.model or 'graph'}: {len(flow)} blocks on {flow.data}{ratio}", fontsize="medium")
    return _written(figure, format_)


def save_comparison(comparison: GradientComparison, path: str | os.PathLike[str]) -> None:
    """Write the picture of a comparison to a file."""
    format_ = format_of(path)
    Path(path).write_bytes(draw_comparison(comparison, format_))


def draw_comparison(comparison: GradientComparison, format_: str) -> bytes:
    """E[x²] and gradient norms over the blocks, before and after, as a PNG or SVG file's contents."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6.5), layout="constrained")
    panels = figure.subplots(3, 1, sharex=True)
    rows: tuple[tuple[str, Callable[[BlockFlow], float | None]], ...] = (
        ("E[x²] at the join", lambda flow: None if flow.join is None else flow.join.mean_square),
        ("‖∂L/∂x‖ at the join", lambda flow: flow.join_gradient),
        ("‖∂L/∂θ‖ of the branch", lambda flow: flow.parameter_gradient),
    )
    for axes, (label, number) in zip(panels, rows, strict=True):
        for name, flow in (("before", comparison.before), ("after", comparison.after)):
            _line(axes, range(len(flow)), list(map(number, flow)), name)
        axes.set_ylabel(label)
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.set_yscale("log")
            axes.legend(loc="best", fontsize="small")
    panels[-1].set_xlabel("block")
    panels[-1].xaxis.get_major_locator().set_params(integer=True)
    before = comparison.before
    figure.suptitle(f"{before.model or 'graph'} on {before.data}, {comparison.weights}", fontsize="medium")
    return _written(figure, format_)


def _written(figure: Any, format_: str) -> bytes:
    """The same figure gives the same file: no date, no random ids."""
    import matplotlib

    buffer = io.BytesIO()
    metadata: dict[str, Any] = {"Date": None} if format_ == "svg" else {"Software": None}
    with matplotlib.rc_context({"svg.hashsalt": "rescompile"}):
        figure.savefig(buffer, format=format_, metadata=metadata, dpi=120)
    return buffer.getvalue()


def save_exploration(exploration: Exploration, path: str | os.PathLike[str]) -> None:
    """Write the picture of an exploration to a file: loss, or gradient flow, against what each placement adds."""
    format_ = format_of(path)
    from matplotlib.figure import Figure

    tried = [candidate for candidate in exploration.candidates if not candidate.reason]
    trained = any(candidate.loss is not None for candidate in tried)
    figure = Figure(figsize=(9, 5), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for axes, (key, label) in zip(panels, (("flops", "added FLOPs"), ("parameters", "added parameters")), strict=True):
        for candidate in tried:
            height = candidate.loss if trained else candidate.ratio
            if height is None:
                continue
            across = candidate.added.get(key, 0)
            axes.scatter([across], [height], marker="x" if candidate.pruned else "o")
            name = candidate.spec.removeprefix("insert-shortcuts")
            axes.annotate(name, (across, height), fontsize="x-small", textcoords="offset points", xytext=(3, 3))
        axes.set_xlabel(label)
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("loss" if trained else "gradient, first layer over last")
    if not trained:
        panels[0].set_yscale("log")
    figure.suptitle(f"{exploration.model or 'model'}: placements of shortcuts", fontsize="medium")
    Path(path).write_bytes(_written(figure, format_))


def _variance(signal: Any) -> float | None:
    return None if signal is None else signal.variance


def _line(axes: Any, places: Any, numbers: list[float | None], label: str) -> None:
    """A line with gaps where a block has no number, or one that a logarithm has no place for."""
    heights = [number if number is not None and number > 0 else math.nan for number in numbers]
    if not all(math.isnan(height) for height in heights):
        axes.plot(places, heights, marker=".", linewidth=1, label=label)
