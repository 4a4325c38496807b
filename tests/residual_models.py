"""Small torch models with residual connections, made by hand or at random, whose weights make every part matter."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F


def livened(model: nn.Module, seed: int = 0) -> nn.Module:
    """The model in evaluation mode, its norms' statistics, scales and shifts random: none of them is the identity."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        for name, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            if not isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d | nn.LayerNorm | nn.RMSNorm):
                continue
            if not tensor.is_floating_point():
                continue
            low, high = (-0.2, 0.2) if name in ("bias", "running_mean") else (0.7, 1.3)
            with torch.no_grad():
                tensor.uniform_(low, high, generator=generator)
    return model.eval()


class ConvBlock(nn.Module):
    """The basic block of ResNet: norm inside, activation behind the add; a projection where the shape changes."""

    def __init__(self, width: int, out: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out)
        self.conv2 = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out)
        projected = stride != 1 or width != out
        self.down = (
            nn.Sequential(nn.Conv2d(width, out, 1, stride, bias=False), nn.BatchNorm2d(out)) if projected else None
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        y = y + (x if self.down is None else self.down(x))
        return F.relu(y)


class MlpBlock(nn.Module):
    """Linear, activation, linear around which the skip goes; norm before (pre), behind (post) or nowhere."""

    def __init__(self, width: int, placement: str, activation: str, swapped: bool) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width) if placement != "none" else nn.Identity()
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.placement, self.activation, self.swapped = placement, activation, swapped

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        act: Any = {"relu": F.relu, "gelu": F.gelu, "silu": F.silu, "tanh": torch.tanh}[self.activation]
        y = self.down(act(self.up(self.norm(x) if self.placement == "pre" else x)))
        y = y + x if self.swapped else x + y
        return self.norm(y) if self.placement == "post" else y


class Chain(nn.Module):
    """Blocks in a row; some also return their stream, so that sums have further readers."""

    def __init__(self, blocks: list[nn.Module], taps: set[int]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.taps = taps

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        tapped = []
        for index, block in enumerate(self.blocks):
            x = block(x)
            if index in self.taps:
                tapped.append(x * 2)
        return (x, *tapped)
