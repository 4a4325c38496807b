"""Plain networks of other families: shortcuts in both IRs, found again, exact at first, and trained."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm

import rescompile as rc
from rescompile.graph import Graph

IRS = ("fx", "onnx")
Inputs = tuple[torch.Tensor, ...]


def numbers(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape)))


def tokens(*shape: int) -> torch.Tensor:
    return torch.randint(0, 20, shape, generator=torch.Generator().manual_seed(0))


def layer(before: int, after: int, stride: int = 1, **options: int) -> nn.Sequential:
    conv = nn.Conv2d(before, after, 3, stride, 1, **options)
    return nn.Sequential(conv, nn.BatchNorm2d(after), nn.ReLU())


def classifier(width: int) -> list[nn.Module]:
    return [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 3)]


class Mixer(nn.Module):
    """Tokens and channels mixed in turn, without skips."""

    def __init__(self, depth: int = 2, count: int = 4, width: int = 6) -> None:
        super().__init__()
        self.patches, self.head = nn.Conv2d(3, width, 4, 4), nn.Linear(width, 3)
        sizes = [count, width] * depth
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in sizes)
        self.wide = nn.ModuleList(nn.Linear(size, 2 * size) for size in sizes)
        self.back = nn.ModuleList(nn.Linear(2 * size, size) for size in sizes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        for index, (norm, wide, back) in enumerate(zip(self.norms, self.wide, self.back, strict=True)):
            x = norm(x) if index % 2 else norm(x).transpose(1, 2)
            x = back(F.gelu(wide(x)))
            x = x if index % 2 else x.transpose(1, 2)
        return self.head(x.mean(1))


class ImageAsSequence(nn.Module):
    """Convolutions, whose columns two bidirectional LSTMs read."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.Sequential(layer(1, 4), nn.MaxPool2d(2), layer(4, 4), layer(4, 4))
        self.lstms = nn.ModuleList(nn.LSTM(16, 8, batch_first=True, bidirectional=True) for _ in range(3))
        self.head = nn.Linear(16, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.convs(x).permute(0, 3, 1, 2).flatten(2)
        for lstm in self.lstms:
            x = lstm(x)[0]
        return self.head(x[:, -1])


class Points(nn.Module):
    """PointNet: layers on each point, the largest of each feature, a head."""

    def __init__(self) -> None:
        super().__init__()
        widths = (3, 8, 8, 12, 12)
        pairs = list(pairwise(widths))
        self.layers = nn.ModuleList(nn.Sequential(nn.Conv1d(i, o, 1), nn.BatchNorm1d(o), nn.ReLU()) for i, o in pairs)
        self.head = nn.Sequential(nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for member in self.layers:
            x = member(x)
        return self.head(x.max(2)[0])


class UNet(nn.Module):
    """A U-Net without its skips, with transposed convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.ModuleList([nn.Sequential(layer(3, 4), layer(4, 4)), nn.Sequential(layer(4, 8), layer(8, 8))])
        self.up, self.merge = nn.ConvTranspose2d(8, 4, 2, 2), nn.Sequential(layer(4, 4), layer(4, 4))
        self.last = nn.Conv2d(4, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.down[1](F.max_pool2d(self.down[0](x), 2))
        return self.last(self.merge(self.up(x)))


class TwoInputs(nn.Module):
    """Two towers, joined by a concatenation."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.tail = (self.tower(width) for width in (5, 6, 16))

    @staticmethod
    def tower(width: int) -> nn.Sequential:
        hidden = [module for _ in range(2) for module in (nn.Linear(8, 8), nn.ReLU())]
        return nn.Sequential(nn.Linear(width, 8), nn.ReLU(), *hidden)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return self.tail(torch.cat([self.left(x), self.right(y)], 1))


class EncoderDecoder(nn.Module):
    """GRUs that start from the states of GRUs."""

    def __init__(self) -> None:
        super().__init__()
        self.source, self.target = nn.Embedding(20, 8), nn.Embedding(20, 8)
        self.encoder, self.decoder = (nn.ModuleList(nn.GRU(8, 8, batch_first=True) for _ in range(2)) for _ in range(2))
        self.head = nn.Linear(8, 20)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        x, y, states = self.source(x), self.target(y), []
        for gru in self.encoder:
            x, state = gru(x)
            states.append(state)
        for gru, state in zip(self.decoder, states, strict=True):
            y, _ = gru(y, state)
        return self.head(y)


class Partly(nn.Module):
    """Plain layers in front of, and behind, a residual block."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(layer(3, 4), layer(4, 4), layer(4, 4))
        self.branch = nn.Sequential(layer(4, 4), nn.Conv2d(4, 4, 3, 1, 1))
        self.last = nn.Sequential(layer(4, 8, 2), layer(8, 8), *classifier(8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        return self.last(F.relu(x + self.branch(x)))


def separable() -> nn.Module:
    parts = [[layer(8, 8, s, groups=8), nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8), nn.ReLU6()] for s in (1, 2)]
    return nn.Sequential(layer(3, 8), *parts[0], *parts[1], *classifier(8))


def generator() -> nn.Module:
    """Transposed convolutions from a vector to an image."""
    steps = [(6, 8, 4, 1, 0), (8, 8, 4, 2, 1), (8, 4, 4, 2, 1)]
    parts = [[nn.ConvTranspose2d(*step, bias=False), nn.BatchNorm2d(step[1]), nn.ReLU()] for step in steps]
    return nn.Sequential(*[module for part in parts for module in part], nn.ConvTranspose2d(4, 3, 3, 1, 1), nn.Tanh())


def normed() -> nn.Module:
    """Weight normalisation: weights computed from their direction and length."""
    convs = [weight_norm(nn.Conv1d(i, o, 3, 1, 1)) for i, o in ((2, 4), (4, 4), (4, 6), (6, 6))]
    return nn.Sequential(*[module for conv in convs for module in (conv, nn.ELU())], nn.Conv1d(6, 1, 1))


EVERY = "insert-shortcuts{every=2}"
# name: the model, its inputs, the pass, and the kinds of what it inserts
MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Inputs], str, dict[str, int]]] = {
    "mixer": (Mixer, lambda: (numbers(2, 3, 8, 8),), "insert-shortcuts", {"add": 4}),
    "image as sequence": (
        ImageAsSequence,
        lambda: (numbers(2, 1, 8, 6),),
        "insert-shortcuts{every=1}",
        {"add": 2, "recurrent": 3},
    ),
    "points": (Points, lambda: (numbers(2, 3, 9),), "insert-shortcuts{every=1}", {"add": 3}),
    "u-net": (UNet, lambda: (numbers(1, 3, 8, 8),), "insert-shortcuts{kind=long}", {"long": 1}),
    "u-net, dense": (UNet, lambda: (numbers(1, 3, 8, 8),), "insert-shortcuts{every=2,kind=dense}", {"dense": 3}),
    "two inputs": (TwoInputs, lambda: (numbers(2, 5), numbers(2, 6)), EVERY, {"add": 3}),
    "encoder and decoder": (
        EncoderDecoder,
        lambda: (tokens(2, 4), tokens(2, 3)),
        "insert-shortcuts{every=1,join=after}",
        {"recurrent": 3},
    ),
    "partly residual": (Partly, lambda: (numbers(2, 3, 8, 8),), EVERY, {"add": 2}),
    "separable": (separable, lambda: (numbers(2, 3, 9, 9),), "insert-shortcuts{every=2,match=pool}", {"add": 2}),
    "generator": (generator, lambda: (numbers(2, 6, 1, 1),), "insert-shortcuts{every=1,kind=gated}", {"gated": 3}),
    "weight norm": (normed, lambda: (numbers(2, 2, 9),), "insert-shortcuts{every=1,kind=dense}", {"dense": 4}),
}


def captured(model: nn.Module, inputs: Inputs, ir: str) -> Graph:
    model.eval()
    if ir == "fx":
        return rc.capture(model, inputs)
    return rc.capture(torch.onnx.export(model, inputs, dynamo=True, verbose=False))


@pytest.mark.parametrize("ir", IRS)
@pytest.mark.parametrize("name", MODELS)
def test_family_gets_shortcuts(name: str, ir: str) -> None:
    make, given, spec, kinds = MODELS[name]
    torch.manual_seed(0)
    model, inputs = make(), given()
    graph = captured(model, inputs, ir)
    result = rc.rewrite(graph, spec)
    assert result.verification.ok
    assert not result.rolled_back
    before, after = rc.inspect(graph).summary()["by_kind"], rc.inspect(result.graph).summary()["by_kind"]
    assert {kind: after[kind] - before.get(kind, 0) for kind in after if after[kind] != before.get(kind, 0)} == kinds
    assert len(result.applied) == sum(kinds.values())
    assert not rc.rewrite(result.graph, spec, verify=False).applied
    arrays = {value.name: tensor.numpy() for value, tensor in zip(graph.inputs, inputs, strict=True)}
    for old, new in zip(graph.run(arrays).values(), result.graph.run(arrays).values(), strict=True):
        np.testing.assert_array_equal(new, old)
    if ir == "fx":
        rewritten = result.model
        assert set(model.state_dict()) <= set(rewritten.state_dict())
        rewritten.train()(*inputs).square().mean().backward()
        new_ones = [p for key, p in rewritten.named_parameters() if key.startswith("shortcuts.")]
        assert new_ones
        assert all(parameter.grad is not None for parameter in new_ones)
