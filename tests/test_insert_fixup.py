"""`start=fixup` against the residual block that the paper's authors wrote (Zhang, Dauphin and Ma 2019), in both IRs."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import rescompile as rc
from rescompile.graph import Graph
from tests.plain_models import mlp

IRS = ("fx", "onnx")
SPEC = "insert-shortcuts{every=2,start=fixup}"


class Plain(nn.Module):
    """A stem, pairs of 3×3 convolutions with rectifiers, and a classifier; no norms. `width`s of the pairs."""

    def __init__(self, widths: tuple[int, ...] = (8, 8, 12), bias: bool = False) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, widths[0], 3, 1, 1, bias=False)
        before = (widths[0], *widths)
        self.first = nn.ModuleList(
            nn.Conv2d(i, o, 3, 1 + (i != o), 1, bias=bias) for i, o in zip(before, widths, strict=False)
        )
        self.second = nn.ModuleList(nn.Conv2d(width, width, 3, 1, 1, bias=bias) for width in widths)
        self.head = nn.Linear(widths[-1], 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.stem(x))
        for first, second in zip(self.first, self.second, strict=True):
            x = F.relu(second(F.relu(first(x))))
        return self.head(x.mean((2, 3)))


class FixupBlock(nn.Module):
    """As in the authors' code: a bias before each convolution and rectifier, one multiplier, last convolution zero."""

    def __init__(self, width: int, target: int) -> None:
        super().__init__()
        scalars = ("bias1a", "bias1b", "bias2a", "bias2b")
        self.scalars = nn.ParameterDict({name: nn.Parameter(torch.zeros(())) for name in scalars})
        self.scalars["scale"] = nn.Parameter(torch.ones(()))
        self.conv1 = nn.Conv2d(width, target, 3, 1 + (width != target), 1, bias=False)
        self.conv2 = nn.Conv2d(target, target, 3, 1, 1, bias=False)
        self.downsample = nn.Conv2d(width, target, 1, 2, bias=False) if width != target else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scalars = self.scalars
        out = F.relu(self.conv1(x + scalars["bias1a"]) + scalars["bias1b"])
        out = self.conv2(out + scalars["bias2a"]) * scalars["scale"] + scalars["bias2b"]
        return F.relu(out + (x if self.downsample is None else self.downsample(x + scalars["bias1a"])))


class FixupNet(nn.Module):
    """`Plain` of such blocks."""

    def __init__(self, widths: tuple[int, ...] = (8, 8, 12)) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, widths[0], 3, 1, 1, bias=False)
        self.blocks = nn.ModuleList(FixupBlock(i, o) for i, o in zip((widths[0], *widths), widths, strict=False))
        self.head = nn.Linear(widths[-1], 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.stem(x))
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean((2, 3)))


def hand_written(state: dict[str, torch.Tensor]) -> FixupNet:
    """The network of such blocks with the parameters of a rewritten one; every parameter has its place."""
    places = {}
    for name, tensor in state.items():
        part, number, *leaf = name.split(".", 2)
        if part in ("first", "second"):
            name = f"blocks.{number}.conv{1 + (part == 'second')}.weight"
        elif part == "shortcuts":
            name = f"blocks.{number}." + (
                "downsample.weight" if leaf[0] == "projection.weight" else f"scalars.{leaf[0]}"
            )
        places[name] = tensor
    target = FixupNet()
    target.load_state_dict(places)
    return target


def image() -> torch.Tensor:
    return torch.randn(2, 3, 9, 9, generator=torch.Generator().manual_seed(0))


def test_gradients_and_outputs_are_those_of_the_hand_written_blocks() -> None:
    result = rc.rewrite(rc.capture(Plain().eval(), (image(),)), SPEC).model
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in result.parameters():  # as after some training: no zero hides a missing term
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    target = hand_written(result.state_dict())
    ours, theirs = result(image()), target(image())
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-5)
    ours.square().sum().backward()
    theirs.square().sum().backward()
    wanted = dict(target.named_parameters())
    for number in range(3):
        for leaf in ("bias1a", "bias1b", "bias2a", "bias2b", "scale"):
            grad, expected = (
                result.get_parameter(f"shortcuts.{number}.{leaf}").grad,
                wanted[f"blocks.{number}.scalars.{leaf}"].grad,
            )
            torch.testing.assert_close(grad, expected, rtol=1e-3, atol=1e-3)


def outputs(graph: Graph) -> np.ndarray:
    return next(iter(graph.run({graph.inputs[0].name: image().numpy()}).values()))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("ir", IRS)
def test_it_starts_as_the_paper_says(ir: str, bias: bool) -> None:
    plain = Plain(bias=bias).eval()
    graph = (
        rc.capture(plain, (image(),))
        if ir == "fx"
        else rc.capture(torch.onnx.export(plain, (image(),), dynamo=True, verbose=False))
    )
    result = rc.rewrite(graph, SPEC)
    assert len(result.applied) == 3
    assert result.verification.ok
    assert "rescaled for 3 branches; the classifier, zero in the paper, is left" in result.applied[0].reason
    data = {value.name: result.graph.data(value) for value in result.graph.parameters}
    for number in range(3):  # three branches of two layers: L^(−1/(2m−2)) = 3^(−1/2)
        before = plain.first[number].weight.detach().numpy()
        np.testing.assert_allclose(data[f"first.{number}.weight"], before / math.sqrt(3), rtol=0, atol=1e-7)
        assert not data[f"second.{number}.weight"].any()
        assert all(data[f"shortcuts.{number}.{leaf}"] == 0 for leaf in ("bias1a", "bias1b", "bias2a", "bias2b"))
        assert data[f"shortcuts.{number}.scale"] == 1
    x = F.relu(plain.stem(image()))  # the skips alone, with their last rectifiers
    x = F.conv2d(x, torch.from_numpy(data["shortcuts.2.projection.weight"]), stride=2)
    expected = plain.head(F.relu(x).mean((2, 3))).detach().numpy()
    np.testing.assert_allclose(outputs(result.graph), expected, rtol=0, atol=1e-6)
    assert rc.inspect(result.graph).summary()["by_shortcut"] == {"identity": 2, "projection": 1}
    assert not rc.rewrite(result.graph, SPEC, verify=False).applied
    with torch.no_grad():
        assert plain.second[0].weight.any()  # the model that came in is as it was


def test_pre_activation_has_a_bias_before_each_activation_and_linear() -> None:
    model, x = mlp(4).eval(), torch.randn(3, 16)
    result = rc.rewrite(rc.capture(model, (x,)), "insert-shortcuts{every=2,start=fixup,join=pre-activation}").model
    state = result.state_dict()
    inner = {name.split(".", 2)[2] for name in state if name.startswith("shortcuts.0.")}
    assert inner == {"bias0b", "bias1a", "bias1b", "bias2a", "scale"}
    outer = {name.split(".", 2)[2] for name in state if name.startswith("shortcuts.1.")}
    assert outer == inner | {"bias2b"}  # of the activation behind it, which is in no branch


def test_norms_and_other_layers_are_refused() -> None:
    normed = nn.Sequential(
        nn.Linear(8, 8), *[m for _ in range(4) for m in (nn.Linear(8, 8), nn.LayerNorm(8), nn.ReLU())]
    )
    result = rc.rewrite(rc.capture(normed.eval(), (torch.randn(2, 8),)), SPEC)
    assert not result.applied
    assert "networks without norms" in str(result.refused[0])


def test_layers_of_two_branches_are_rescaled_for_one() -> None:
    graph = rc.capture(mlp(4).eval(), (torch.randn(2, 16),))
    result = rc.rewrite(graph, 'insert-shortcuts{start=fixup,between=["tanh:tanh_3","tanh_1:tanh_2"]}')
    assert len(result.applied) == 1
    assert "another holds these too" in str(result.refused[0])
