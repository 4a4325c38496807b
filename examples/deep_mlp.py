"""A plain network of 1,000 layers learns nothing, and learns with shortcuts: `python -m examples.deep_mlp`.

Each layer shrinks the gradient on its way back, so that nothing of it reaches the first one. Behind shortcuts that
start as the identity (ReZero: y = x + α·F(x), α = 0; Bachlechner et al. 2020) all of it does.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional

import rescompile as rc
from examples.digits import data
from examples.training import draw_curves, fit, score

SHORTCUTS = "insert-shortcuts{every=2,join=after,start=rezero}"
RATE = 0.3


@dataclass
class Outcome:
    """Gradient of the first and the last layer's weights before training (root mean square), and how training went."""

    first: float
    last: float
    curve: list[float]
    loss: float
    accuracy: float


def deep_mlp(depth: int = 1000, width: int = 32) -> nn.Sequential:
    """`depth` linear layers with ReLUs between them, from images [N, 1, 8, 8] to scores [N, 10]."""
    hidden = [layer for _ in range(depth - 2) for layer in (nn.Linear(width, width), nn.ReLU())]
    return nn.Sequential(nn.Flatten(), nn.Linear(64, width), nn.ReLU(), *hidden, nn.Linear(width, 10))


def gradients(model: nn.Module) -> tuple[float, float]:
    """Root-mean-square gradient of the cross-entropy at the weights of the first and of the last layer."""
    images, labels, seen, _ = data()
    model.zero_grad()
    functional.cross_entropy(model(images[seen]), labels[seen]).backward()
    matrices = [tensor.grad for tensor in model.parameters() if tensor.ndim == 2 and tensor.grad is not None]
    first, last = matrices[0], matrices[-1]
    model.zero_grad()
    return first.square().mean().sqrt().item(), last.square().mean().sqrt().item()


def compare(depth: int = 1000, steps: int = 60, width: int = 32, seed: int = 0) -> dict[str, Outcome]:
    """The plain network, and the same with shortcuts."""
    torch.manual_seed(seed)
    plain = deep_mlp(depth, width)
    residual = rc.rewrite(plain, SHORTCUTS, (torch.zeros(2, 1, 8, 8),), verify=False).model
    outcomes = {}
    for name, model in (("plain", plain), ("with shortcuts", residual)):
        first, last = gradients(model)
        curve: list[float] = []
        loss = fit(model, lambda _, loss, curve=curve: curve.append(loss), steps, RATE, seed)
        outcomes[name] = Outcome(first, last, curve, loss, score(model)[1])
    return outcomes


def main() -> None:
    """Print the table and draw the picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(), help="folder for the picture")
    parser.add_argument("--depth", type=int, default=1000)
    parser.add_argument("--steps", type=int, default=60)
    options = parser.parse_args()
    torch.set_num_threads(1)  # operations this small are slower on more
    outcomes = compare(options.depth, options.steps)
    print(f"{options.depth:,} layers  {'gradient: first':>15} {'last':>9} {'ratio':>9} {'loss':>8} {'accuracy':>9}")
    for name, outcome in outcomes.items():
        ratio = outcome.first / outcome.last if outcome.last else float("nan")
        row = f"{outcome.first:>9.2g} {outcome.last:>9.2g} {ratio:>9.2g} {outcome.loss:>8.4f} {outcome.accuracy:>9.1%}"
        print(f"{name:<18} {row}")
    path = options.out / "deep_mlp.svg"
    curves = {name: [outcome.curve] for name, outcome in outcomes.items()}
    draw_curves(curves, f"Handwritten digits, {options.depth:,} layers", path)
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
