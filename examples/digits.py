"""A small residual network for the handwritten digits that come with scikit-learn (1,797 images of 8×8 pixels).

The command line takes it too: `rescompile inspect examples.digits:trained`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn
from torch.nn import functional

EPOCHS = 8
BATCH = 64


class Block(nn.Module):
    """y = relu(F(x) + x), F two 3×3 convs with batch norms; a 1×1 projection where the widths differ."""

    def __init__(self, inside: int, outside: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inside, outside, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outside)
        self.conv2 = nn.Conv2d(outside, outside, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outside)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inside != outside:
            self.shortcut = nn.Sequential(nn.Conv2d(inside, outside, 1, stride, bias=False), nn.BatchNorm2d(outside))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        branch = functional.relu(self.bn1(self.conv1(x)))
        return functional.relu(self.bn2(self.conv2(branch)) + self.shortcut(x))


class DigitsNet(nn.Module):
    """Images [N, 1, 8, 8] to scores [N, 10], through four residual blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
        self.blocks = nn.Sequential(Block(16, 16), Block(16, 32, stride=2), Block(32, 32), Block(32, 64, stride=2))
        self.head = nn.Linear(64, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        features = self.blocks(self.stem(x)).mean(dim=(2, 3))
        scores: torch.Tensor = self.head(features)
        return scores


@dataclass(frozen=True)
class Digits:
    """A trained network and the images that it has not seen."""

    model: DigitsNet
    images: torch.Tensor  # [360, 1, 8, 8]
    labels: torch.Tensor  # [360]

    def accuracy(self, scores: torch.Tensor) -> float:
        """Share of the unseen images whose highest score is the right digit's."""
        return float((scores.argmax(dim=1) == self.labels).float().mean())


def data() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Images [1797, 1, 8, 8] from 0 to 1, their labels [1797], and the indices to train on and the 360 to test on."""
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
    labels = torch.tensor(digits.target)
    seen, unseen = train_test_split(torch.arange(len(labels)), test_size=360, random_state=0, stratify=digits.target)
    return images, labels, seen, unseen


def train() -> Digits:
    """Train for a few seconds; the same network on every run."""
    torch.manual_seed(0)
    images, labels, seen, unseen = data()
    model = DigitsNet()
    optimiser = torch.optim.AdamW(model.parameters(), lr=5e-3)
    steps = EPOCHS * -(-len(seen) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, max_lr=5e-3, total_steps=steps)
    for _ in range(EPOCHS):
        for batch in seen[torch.randperm(len(seen))].split(BATCH):
            loss = functional.cross_entropy(model(images[batch]), labels[batch])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
    return Digits(model.eval(), images[unseen], labels[unseen])


def trained() -> tuple[DigitsNet, tuple[torch.Tensor]]:
    """The trained network with the unseen images as its example input."""
    digits = train()
    return digits.model, (digits.images,)
