"""Small torch models, one for each residual construction that no model library holds in a pure form."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Recurrent(nn.Module):
    """x ← x + rnn(x), three times."""

    def __init__(self, layer: type[nn.RNNBase] = nn.LSTM, width: int = 16) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layer(width, width, batch_first=True) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x)[0]
        return x


class Highway(nn.Module):
    """Three highway layers; `difference`: x + T·(H − x) in the place of T·H + (1 − T)·x."""

    def __init__(self, difference: bool = False, width: int = 16) -> None:
        super().__init__()
        self.work = nn.ModuleList(nn.Linear(width, width) for _ in range(3))
        self.gate = nn.ModuleList(nn.Linear(width, width) for _ in range(3))
        self.difference = difference

    def forward(self, x: Tensor) -> Tensor:
        for work, gate in zip(self.work, self.gate, strict=True):
            h, t = F.relu(work(x)), torch.sigmoid(gate(x))
            x = x + t * (h - x) if self.difference else t * h + (1 - t) * x
        return x


class UNet(nn.Module):
    """Two levels down, two up, a concatenation on each."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.ModuleList([nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 16, 3, padding=1)])
        self.bottom = nn.Conv2d(16, 32, 3, padding=1)
        self.widen = nn.ModuleList([nn.ConvTranspose2d(32, 16, 2, 2), nn.ConvTranspose2d(16, 8, 2, 2)])
        self.up = nn.ModuleList([nn.Conv2d(32, 16, 3, padding=1), nn.Conv2d(16, 8, 3, padding=1)])

    def forward(self, x: Tensor) -> Tensor:
        first = F.relu(self.down[0](x))
        second = F.relu(self.down[1](F.max_pool2d(first, 2)))
        x = F.relu(self.bottom(F.max_pool2d(second, 2)))
        x = F.relu(self.up[0](torch.cat([second, self.widen[0](x)], 1)))
        return F.relu(self.up[1](torch.cat([first, self.widen[1](x)], 1)))


class EDSR(nn.Module):
    """Three scaled blocks under one global skip (Lim 2017)."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.head, self.tail = nn.Conv2d(3, width, 3, padding=1), nn.Conv2d(width, width, 3, padding=1)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, width, 3, padding=1))
            for _ in range(3)
        )

    def forward(self, x: Tensor) -> Tensor:
        head = x = self.head(x)
        for block in self.blocks:
            x = x + 0.1 * block(x)
        return head + self.tail(x)


class Spellings(nn.Module):
    """y += x; addcmul with a ReZero scalar; lerp."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in range(3))
        self.alpha = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.convs[0](x))
        y += x
        x = F.relu(y)
        x = torch.addcmul(x, self.alpha, F.relu(self.convs[1](x)))
        return torch.lerp(x, F.relu(self.convs[2](x)), 0.3)


class Keras(nn.Module):
    """Dense, batch norm, dense, batch norm, add, relu."""

    def __init__(self, width: int = 128) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(width, width), nn.Linear(width, width)
        self.norms = nn.ModuleList([nn.BatchNorm1d(width), nn.BatchNorm1d(width)])

    def forward(self, x: Tensor) -> Tensor:
        y = self.norms[1](self.second(F.relu(self.norms[0](self.first(x)))))
        return F.relu(x + y)


class StochasticDepth(nn.Module):
    """x + drop_path(f(x)), three times, in training."""

    training_only = True

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.branches = nn.ModuleList(nn.Sequential(nn.Linear(width, width), nn.ReLU()) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for branch in self.branches:
            y = branch(x)
            if self.training:
                kept = torch.empty(x.shape[0], 1, device=x.device).bernoulli_(0.8)
                y = y * kept / 0.8
            x = x + y
        return x


# what ground_truth.json says of a written model → how to build it; a text may stand for several
WRITTEN: dict[str, tuple[Callable[[], nn.Module], ...]] = {
    "three LSTMs": (Recurrent, lambda: Recurrent(nn.GRU), lambda: Recurrent(nn.RNN)),
    "highway network": (Highway, lambda: Highway(difference=True)),
    "U-Net with two concat skips": (UNet,),
    "EDSR": (EDSR,),
    "addcmul (ReZero), lerp": (Spellings,),
    "Keras residual block": (Keras,),
    "stochastic depth": (StochasticDepth,),
}
