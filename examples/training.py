"""Training on the handwritten digits, the same for every network that is compared.

`rescompile explore MODEL --train examples.training:fit` takes it.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional

from examples.digits import data

BATCH = 64
RATE = 0.05
RECENT = 20  # steps that a loss is averaged over


def fit(model: nn.Module, report: Callable[[int, float], None], steps: int, rate: float = RATE, seed: int = 0) -> float:
    """Train for `steps` batches by SGD with momentum 0.9, the rate falling to 0 as half a cosine wave.

    `report(step, loss)` is called after each; the result is the cross-entropy on all training images, in evaluation
    mode. The order of the batches depends on `seed` alone.
    """
    images, labels, seen, _ = data()
    generator = torch.Generator().manual_seed(seed)
    optimiser = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    model.train()
    for step in range(steps):
        batch = seen[torch.randperm(len(seen), generator=generator)[:BATCH]]
        loss = functional.cross_entropy(model(images[batch]), labels[batch])
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimiser.step()
        schedule.step()
        report(step, loss.item())
    return score(model)[0]


def score(model: nn.Module) -> tuple[float, float]:
    """Cross-entropy on the training images, and the share of the unseen ones that is recognised; evaluation mode."""
    images, labels, seen, unseen = data()
    model.eval()
    with torch.no_grad():
        loss = functional.cross_entropy(model(images[seen]), labels[seen]).item()
        right = (model(images[unseen]).argmax(1) == labels[unseen]).float().mean().item()
    return loss, right


def smoothed(curve: list[float]) -> tuple[list[int], list[float]]:
    """Steps, and the running mean of the losses that ends at each of them."""
    losses = torch.tensor(curve)
    smooth = losses.unfold(0, min(RECENT, len(losses)), 1).mean(1)
    return list(range(len(losses) - len(smooth), len(losses))), smooth.tolist()


def draw_curves(curves: dict[str, list[list[float]]], title: str, path: str | os.PathLike[str]) -> None:
    """Training losses over steps: one line for each network, the mean over its seeds of a running mean."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for name, runs in curves.items():
        axes.plot(*smoothed(torch.tensor(runs).mean(0).tolist()), label=name)
    axes.set_xlabel("step")
    axes.set_ylabel("training loss")
    axes.set_yscale("log")
    axes.grid(alpha=0.3)
    axes.legend()
    axes.set_title(title, fontsize="medium")
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
