"""The degradation problem on the handwritten digits, and its cure: `python -m examples.degradation`.

A plain network of 56 layers trains worse than one of 20, though it could compute the same (He et al. 2015, figure 1).
With shortcuts inserted it trains better than both. Same seeds, same initial weights, same batches.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean

import torch
from torch import nn

import rescompile as rc
from examples.training import draw_curves, fit, score

SHORTCUTS = "insert-shortcuts{every=2,match=pad,start=residual}"


class PlainNet(nn.Sequential):
    """6n + 2 layers on 8×8 images: three stages of 2n 3×3 convolutions each, w, 2w and 4w channels wide."""

    def __init__(self, depth: int, width: int = 8) -> None:
        if depth < 8 or depth % 6 != 2:
            raise ValueError(f"A network of three equal stages has 6n + 2 layers, not {depth}.")
        layers: list[nn.Module] = [nn.Conv2d(1, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
        before = width
        for stage in range(3):
            after = width << stage
            for _ in range((depth - 2) // 3):
                stride = 2 if before != after else 1
                layers += [nn.Conv2d(before, after, 3, stride, 1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]
                before = after
        super().__init__(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(before, 10))


@dataclass
class Outcome:
    """Training losses by step, the final loss and the accuracy on unseen images, one for each seed."""

    parameters: int
    curves: list[list[float]] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    accuracies: list[float] = field(default_factory=list)


def plain_56() -> tuple[nn.Module, tuple[torch.Tensor]]:
    """The deep network and its input: `rescompile explore examples.degradation:plain_56`."""
    torch.manual_seed(0)
    return PlainNet(56), (torch.zeros(2, 1, 8, 8),)


def with_shortcuts(model: nn.Module) -> nn.Module:
    """The same network with the same weights, and a shortcut around every two layers."""
    residual: nn.Module = rc.rewrite(model, SHORTCUTS, (torch.zeros(2, 1, 8, 8),), verify=False).model
    return residual


def compare(depths: tuple[int, int] = (20, 56), steps: int = 200, seeds: int = 2, width: int = 8) -> dict[str, Outcome]:
    """The shallow network, the deep one, and the deep one with shortcuts, each trained from the same seeds."""
    outcomes: dict[str, Outcome] = {}
    shallow, deep = depths
    for seed in range(seeds):
        for name, depth in ((f"plain-{shallow}", shallow), (f"plain-{deep}", deep), (f"plain-{deep} + skips", deep)):
            torch.manual_seed(seed)
            model: nn.Module = PlainNet(depth, width)
            if name.endswith("skips"):
                model = with_shortcuts(model)
            count = sum(parameter.numel() for parameter in model.parameters())
            outcome = outcomes.setdefault(name, Outcome(count))
            curve: list[float] = []
            outcome.losses.append(fit(model, lambda _, loss, curve=curve: curve.append(loss), steps, seed=seed))
            outcome.curves.append(curve)
            outcome.accuracies.append(score(model)[1])
    return outcomes


def main() -> None:
    """Print the table and draw the picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(), help="folder for the picture")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seeds", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(1)  # operations this small are slower on more
    outcomes = compare(steps=options.steps, seeds=options.seeds)
    print(f"{'network':<18} {'parameters':>10} {'training loss':>14} {'accuracy':>9}")
    for name, outcome in outcomes.items():
        row = f"{outcome.parameters:>10,} {mean(outcome.losses):>14.4f} {mean(outcome.accuracies):>9.1%}"
        print(f"{name:<18} {row}")
    path = options.out / "degradation.svg"
    curves = {name: outcome.curves for name, outcome in outcomes.items()}
    draw_curves(curves, f"Handwritten digits, mean of {options.seeds} seeds", path)
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
