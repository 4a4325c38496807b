"""A hand-written architecture, and the residual structure that follows from its definition."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rescompile.blocks import Report


@dataclass(frozen=True)
class Case:
    """One architecture, tiny.

    `expect`: counts over all blocks: `add` blocks by their shortcut (identity, projection, pad, pool, view), the others
    by kind; `nested` where it is part of the definition. What is not named must not be found.
    `norm`: the placement of the majority. `folded`: the placement that is left where ONNX export folds batch norms.
    `scales`: how many blocks have one.
    """

    build: Callable[[], nn.Module]
    inputs: Callable[[], tuple[Tensor, ...]]
    expect: dict[str, int]
    norm: str | None = None
    folded: str | None = None
    scales: int | None = None
    training: bool = False
    onnx: dict[str, int] | None = field(default=None)  # where the exporter destroys information
    traced: bool = True  # whether torch.fx.symbolic_trace takes it

    def model(self) -> nn.Module:
        """The model, in the mode that it is looked at in."""
        torch.manual_seed(0)
        return self.build().train(self.training)

    def graph(self, ir: str, folder: Path) -> Any:
        """The graph in one of "fx", "symbolic", "onnx"."""
        from rescompile import fx_capture, onnx_files

        model, inputs = self.model(), self.inputs()
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            if ir == "fx":
                return fx_capture.capture(model, inputs)
            if ir == "symbolic":
                return fx_capture.capture(torch.fx.symbolic_trace(model), inputs)
            mode = torch.onnx.TrainingMode.PRESERVE if self.training else torch.onnx.TrainingMode.EVAL
            program = torch.onnx.export(model, inputs, dynamo=True, verbose=False, training=mode)
            path = folder / "model.onnx"
            program.save(str(path))
            return onnx_files.load(path)

    def differences(self, report: Report, ir: str = "fx") -> list[str]:
        """What the report says otherwise than the definition: empty when nothing does."""
        expect = self.onnx if ir == "onnx" and self.onnx is not None else self.expect
        counts = {**counted(report), "nested": report.summary()["nested"]}
        names = [name for name in counts if name != "nested" or "nested" in expect]
        names += [name for name in expect if name not in counts]
        wrong = [
            f"{name} {counts.get(name, 0)}, not {expect.get(name, 0)}"
            for name in names
            if counts.get(name, 0) != expect.get(name, 0)
        ]
        norms = report.summary()["by_norm"]
        norm = self.folded if ir == "onnx" and self.folded is not None else self.norm
        if norm is not None and norms and max(norms, key=lambda name: norms[name]) != norm:
            wrong.append(f"norm {norms}, not {norm}")
        scales = sum(block.scale is not None for block in report)
        if self.scales is not None and scales != self.scales:
            wrong.append(f"{scales} scales, not {self.scales}")
        return wrong


def counted(report: Report) -> dict[str, int]:
    """`add` blocks by their shortcut, the others by their kind."""
    counts: dict[str, int] = {}
    for block in report:
        name = block.shortcut if block.kind == "add" else block.kind
        counts[name] = counts.get(name, 0) + 1
    return counts


def image(channels: int = 3, size: int = 16, batch: int = 1) -> Callable[[], tuple[Tensor, ...]]:
    """One image [N, C, H, W]."""
    return floats((batch, channels, size, size))


def floats(*shapes: tuple[int, ...]) -> Callable[[], tuple[Tensor, ...]]:
    """Random floats of the given shapes."""
    return lambda: tuple(torch.randn(shape) for shape in shapes)


def tokens(batch: int = 2, length: int = 8, vocabulary: int = 11) -> Callable[[], tuple[Tensor, ...]]:
    """Token indices [N, T]."""
    return lambda: (torch.randint(0, vocabulary, (batch, length)),)
