"""Pictures of reports, by matplotlib, which is optional: `pip install 'rescompile[plot]'`."""

from __future__ import annotations

import io
import math
import os
from pathlib import Path
from typing import Any

from rescompile.errors import RescompileError
from rescompile.gradients import GradientFlow

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
    import matplotlib
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
    buffer = io.BytesIO()
    # The same flow gives the same file: no date, no random ids.
    metadata: dict[str, Any] = {"Date": None} if format_ == "svg" else {"Software": None}
    with matplotlib.rc_context({"svg.hashsalt": "rescompile"}):
        figure.savefig(buffer, format=format_, metadata=metadata, dpi=120)
    return buffer.getvalue()


def _variance(signal: Any) -> float | None:
    return None if signal is None else signal.variance


def _line(axes: Any, places: Any, numbers: list[float | None], label: str) -> None:
    """A line with gaps where a block has no number, or one that a logarithm has no place for."""
    heights = [number if number is not None and number > 0 else math.nan for number in numbers]
    if not all(math.isnan(height) for height in heights):
        axes.plot(places, heights, marker=".", linewidth=1, label=label)
