"""Residual networks of convolutions, written by hand in both forms, and which weights are which.

post   He et al. 2015: x → conv, norm, act, conv, norm; act(x + ·); a projection has a norm
pre    He et al. 2016: x → norm, act, conv, norm, act, conv; x + ·; a projection reads act(norm(x)) and has none
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

NORMS: dict[str, Callable[[int], nn.Module]] = {
    "batch": nn.BatchNorm2d,
    "group": lambda width: nn.GroupNorm(2, width),
    "none": lambda width: nn.Identity(),
}


@dataclass(frozen=True)
class Design:
    """What a network is made of; `pool`: the stem ends in a max pool; `shortcut`: A pads, B projects, D pools first."""

    depths: tuple[int, ...] = (2, 2)
    widths: tuple[int, ...] = (8, 12)
    bottleneck: bool = False
    norm: str = "batch"
    act: Callable[[], nn.Module] = nn.ReLU
    shortcut: str = "B"
    pool: bool = False
    gate: bool = False
    dropout: float = 0.0
    drop_path: float = 0.0
    groups: int = 1
    first: str = "own"  # in the pre form: where the first norm and activation stand, see the pass


class Gate(nn.Module):
    """Squeeze and excite."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.down, self.up = nn.Conv2d(width, 2, 1), nn.Conv2d(2, width, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.sigmoid(self.up(F.relu(self.down(x.mean((2, 3), keepdim=True)))))


class DropPath(nn.Module):
    """Stochastic depth."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training or not self.rate:
            return x
        return x * x.new_empty((x.shape[0], 1, 1, 1)).bernoulli_(1 - self.rate).div_(1 - self.rate)


class Block(nn.Module):
    """A basic or a bottleneck block, in the form that the network has."""

    def __init__(self, design: Design, before: int, after: int, stride: int, pre: bool, entry: bool = True) -> None:
        super().__init__()
        self.pre, self.entry, self.design = pre, entry, design
        self.stride, self.wider = stride, after - before
        inner = after // 4 * 2
        shapes = [(before, after, 3), (after, after, 3)]
        if design.bottleneck:
            shapes = [(before, inner, 1), (inner, inner, 3), (inner, after, 1)]
        at = 1 if design.bottleneck else 0  # the convolution that strides
        self.convs = nn.ModuleList(
            nn.Conv2d(i, o, k, stride if n == at else 1, k // 2, bias=design.norm == "none", groups=design.groups)
            for n, (i, o, k) in enumerate(shapes)
        )
        widths = [i for i, _, _ in shapes] if pre else [o for _, o, _ in shapes]
        self.norms = nn.ModuleList(NORMS[design.norm](width) for width in widths)
        if pre and not entry:
            self.norms[0] = nn.Identity()
        self.act = design.act()
        self.gate = Gate(after) if design.gate else nn.Identity()
        self.dropout, self.drop_path = nn.Dropout(design.dropout), DropPath(design.drop_path)
        self.projected = design.shortcut != "A" and (stride != 1 or before != after)
        if self.projected:
            pools = design.shortcut == "D"
            self.down = nn.Conv2d(before, after, 1, 1 if pools else stride, bias=False)
            self.pool = nn.AvgPool2d(stride, stride) if pools else nn.Identity()
            self.down_norm = nn.Identity() if pre else NORMS[design.norm](after)

    def skip(self, x: torch.Tensor) -> torch.Tensor:
        if self.projected:
            return self.down_norm(self.down(self.pool(x)))
        if self.wider == 0 and self.stride == 1:
            return x
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.wider))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        last = len(self.convs) - 1
        y = x
        for index, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            if self.pre:
                y = self.act(norm(y)) if index or self.entry else y
                if index == 0 and self.projected:
                    x = y
                y = conv(self.dropout(y) if index == last else y)
            else:
                y = norm(conv(self.dropout(y) if index == last else y))
                y = self.act(y) if index < last else y
        y = self.drop_path(self.gate(y)) + self.skip(x)
        return y if self.pre else self.act(y)


class Network(nn.Module):
    """A stem, stages of blocks, and a linear head."""

    def __init__(self, design: Design, pre: bool = False) -> None:
        super().__init__()
        self.pre, self.design = pre, design
        shared = pre and design.first == "shared"
        self.conv = nn.Conv2d(3, 8, 3, 1, 1, bias=design.norm == "none")
        self.norm = NORMS[design.norm](8) if not pre or shared else nn.Identity()
        self.act = design.act() if not pre or shared else nn.Identity()
        self.pool = nn.MaxPool2d(3, 2, 1) if design.pool else nn.Identity()
        self.blocks = nn.ModuleList()
        before = 8
        for stage, (depth, width) in enumerate(zip(design.depths, design.widths, strict=True)):
            for index in range(depth):
                stride = 2 if stage and not index else 1
                self.blocks.append(Block(design, before, width, stride, pre, bool(self.blocks) or not shared))
                before = width
        self.last_norm = NORMS[design.norm](before) if pre else nn.Identity()
        self.last_act = design.act() if pre else nn.Identity()
        self.head = nn.Linear(before, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.pool(self.act(self.norm(self.conv(x))))
        for block in self.blocks:
            x = block(x)
        return self.head(self.last_act(self.last_norm(x)).mean((2, 3)))


def both(design: Design) -> tuple[Network, Network]:
    """The network in both forms with the same weights: a norm goes to whatever it stands in front of now."""
    torch.manual_seed(0)
    post, pre = Network(design), Network(design, pre=True)
    for module in post.modules():
        if isinstance(module, nn.BatchNorm2d | nn.GroupNorm):
            nn.init.uniform_(module.weight, -0.5, 1.5)  # some are negative: no pool commutes with those
            nn.init.normal_(module.bias, 0, 0.2)
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.7, 1.3)
    hand_over(post, pre)
    return post.eval(), pre.eval()


def hand_over(post: Network, pre: Network) -> None:
    """Give the pre-activation network the weights of the other."""
    copy(post.conv, pre.conv)
    copy(post.head, pre.head)
    held: nn.Module = post.norm
    if post.design.first == "shared":
        copy(held, pre.norm)
    for index, (mine, theirs) in enumerate(zip(post.blocks, pre.blocks, strict=True)):
        if index or post.design.first == "own":
            copy(held, theirs.norms[0])
        for inner, norm in zip(mine.norms[:-1], theirs.norms[1:], strict=True):
            copy(inner, norm)
        held = mine.norms[-1]
        for name in ("convs", "gate", "down"):
            if hasattr(mine, name):
                copy(getattr(mine, name), getattr(theirs, name))
    copy(held, pre.last_norm)


def copy(source: Any, target: Any) -> None:
    target.load_state_dict(source.state_dict())
