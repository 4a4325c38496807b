"""Plain networks, and hand-written residual twins with the same parameter names."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F


class PlainNet(nn.Module):
    """He et al. 2015, section 4.2: 6n + 2 layers on 32×32 images, with shortcuts where `residual`.

    `widths`: channels of the three stages; `option`: A (zero channels appended) or B (1×1 convolution and norm).
    """

    def __init__(
        self, n: int, residual: bool = False, widths: tuple[int, int, int] = (16, 32, 64), option: str = "A"
    ) -> None:
        super().__init__()
        self.residual, self.option = residual, option
        self.stem = nn.Sequential(nn.Conv2d(3, widths[0], 3, 1, 1, bias=False), nn.BatchNorm2d(widths[0]), nn.ReLU())
        self.layers = nn.ModuleList()
        self.projections = nn.ModuleDict()
        before = widths[0]
        for stage, width in enumerate(widths):
            for index in range(2 * n):
                stride = 2 if stage and index == 0 else 1
                if residual and option == "B" and index == 0 and before != width:
                    self.projections[str(len(self.layers))] = nn.Sequential(
                        nn.Conv2d(before, width, 1, stride, bias=False), nn.BatchNorm2d(width)
                    )
                conv = nn.Conv2d(before, width, 3, stride, 1, bias=False)
                self.layers.append(nn.Sequential(conv, nn.BatchNorm2d(width)))
                before = width
        self.head = nn.Linear(before, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        for index in range(0, len(self.layers), 2):
            y = self.layers[index + 1](F.relu(self.layers[index](x)))
            if self.residual:
                y = y + self.shortcut(x, y, index)
            x = F.relu(y)
        return self.head(x.mean((2, 3)))

    def shortcut(self, x: torch.Tensor, y: torch.Tensor, index: int) -> torch.Tensor:
        if x.shape == y.shape:
            return x
        if self.option == "B":
            projected: torch.Tensor = self.projections[str(index)](x)
            return projected
        return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 0, y.shape[1] - x.shape[1]))


def mlp(depth: int, width: int = 16, inputs: int = 16, outputs: int = 4) -> nn.Sequential:
    """A stem, `depth` hidden layers of one width, and a last layer."""
    hidden = [module for _ in range(depth) for module in (nn.Linear(width, width), nn.Tanh())]
    return nn.Sequential(nn.Linear(inputs, width), nn.Tanh(), *hidden, nn.Linear(width, outputs))


class StackedLstm(nn.Module):
    """Token embedding, LSTMs in a row, and a class from the last token."""

    def __init__(self, depth: int = 3, width: int = 8) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, width)
        self.layers = nn.ModuleList(nn.LSTM(width, width, batch_first=True) for _ in range(depth))
        self.head = nn.Linear(width, 3)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embedding(tokens)
        for layer in self.layers:
            x, _ = layer(x)
        return self.head(x[:, -1])


class Autoencoder(nn.Module):
    """Two resolutions down and up again; with `skips` the 1×1-merged U-Net that long shortcuts make of it."""

    def __init__(self, skips: bool = False) -> None:
        super().__init__()
        self.down = nn.ModuleList([self.pair(3, 8), self.pair(8, 16), self.pair(16, 32)])
        self.up = nn.ModuleList([self.pair(32, 16), self.pair(16, 8)])
        self.last = nn.Conv2d(8, 3, 1)
        self.merges = nn.ModuleList([nn.Conv2d(48, 32, 1, bias=False), nn.Conv2d(24, 16, 1, bias=False)] * skips)

    @staticmethod
    def pair(before: int, after: int) -> nn.Sequential:
        return nn.Sequential(nn.Conv2d(before, after, 3, 1, 1), nn.ReLU(), nn.Conv2d(after, after, 3, 1, 1), nn.ReLU())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        kept = []
        for level, block in enumerate(self.down):
            x = block(x if level == 0 else F.max_pool2d(x, 2))
            kept.append(x)
        for level, block in enumerate(self.up):
            x = F.interpolate(x, scale_factor=2)
            if self.merges:
                x = self.merges[level](torch.cat([kept[1 - level], x], 1))
            x = block(x)
        return self.last(x)
