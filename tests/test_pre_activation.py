"""`pre-activation` and `post-activation` against networks written by hand in both forms, in both IRs."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import rescompile as rc
from rescompile.graph import Graph
from rescompile.printing import print_graph
from rescompile.rewriting import Result
from tests.activation_models import Block, Design, Network, both
from tests.test_insert_shortcuts import first_output

IRS = ("fx", "onnx")
ONNX_TOLERANCE = 1e-6


def image(size: int = 16, channels: int = 3) -> tuple[torch.Tensor]:
    return (torch.randn(2, channels, size, size, generator=torch.Generator().manual_seed(0)),)


def captured(model: nn.Module, inputs: tuple[torch.Tensor, ...], ir: str) -> Graph:
    """The graph with its batch norms, which the exporter's optimiser would fold into the convolutions."""
    model.eval()
    if ir == "fx":
        return rc.capture(model, inputs)
    folds = any(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    return rc.capture(torch.onnx.export(model, inputs, dynamo=True, verbose=False, optimize=not folds))


def converted(model: nn.Module, ir: str = "fx", spec: str = "pre-activation", size: int = 16) -> Result:
    result = rc.rewrite(captured(model, image(size), ir), spec)
    assert result.verification.ok
    return result


def reasons(result: Result) -> list[str]:
    return [refusal.reason for refusal in result.refused]


def difference(graph: Graph, target: nn.Module, inputs: tuple[torch.Tensor, ...]) -> float:
    with torch.no_grad():
        wanted = target(*inputs).numpy()
    return float(np.abs(first_output(graph, inputs) - wanted).max() / np.abs(wanted).max())


# ---- the hand-written twins ---------------------------------------------------------------------------------------

HE_2016 = {
    "cifar-20": Design(depths=(3, 3, 3), widths=(8, 12, 16), shortcut="A"),
    "cifar-56": Design(depths=(9, 9, 9), widths=(8, 12, 16), shortcut="A"),
    "cifar-110": Design(depths=(18, 18, 18), widths=(8, 9, 10), shortcut="A"),
    "projections": Design(depths=(3, 3, 3), widths=(8, 12, 16)),
    "bottleneck": Design(depths=(2, 2, 2), widths=(16, 24, 32), bottleneck=True),
    "bottleneck, padded": Design(depths=(2, 2, 2), widths=(16, 24, 32), bottleneck=True, shortcut="A"),
    "shared first activation": Design(first="shared"),
    "shared, bottleneck": Design(widths=(16, 24), bottleneck=True, first="shared"),
}
OTHERS = {
    "stem with a pool": Design(pool=True),
    "stem with a pool, projected": Design(widths=(16, 24), bottleneck=True, pool=True),
    "stem with a pool, shared": Design(pool=True, first="shared"),
    "group norm": Design(norm="group"),
    "no norm": Design(norm="none"),
    "no norm, pooled stem": Design(norm="none", pool=True),
    "squeeze and excite": Design(gate=True),
    "stochastic depth": Design(drop_path=0.2),
    "silu": Design(act=nn.SiLU),
    "leaky": Design(act=partial(nn.LeakyReLU, 0.1)),
    "prelu": Design(act=nn.PReLU),
    "wide, with dropout": Design(widths=(16, 32), dropout=0.3),
    "resnext": Design(widths=(16, 32), bottleneck=True, groups=4),
    "resnet-d": Design(shortcut="D"),
}
DESIGNS = HE_2016 | OTHERS


@pytest.mark.parametrize("name", DESIGNS)
def test_converted_network_is_the_hand_written_one_to_the_bit(name: str) -> None:
    design = DESIGNS[name]
    post, pre = both(design)
    result = converted(post, "fx", f"pre-activation{{first={design.first}}}")
    assert difference(result.graph, pre, image()) == 0.0
    assert difference(result.original, pre, image()) > 1e-3
    assert {op.kind.value for op in result.graph} == {op.kind.value for op in result.original}
    same = [refused for refused in reasons(result) if "the same in both forms" in refused]
    assert len(result.applied) + len(same) == sum(design.depths)
    assert reasons(result) == same


@pytest.mark.parametrize("name", [name for name in DESIGNS if sum(DESIGNS[name].depths) < 20])
def test_the_same_from_an_onnx_model(name: str) -> None:
    design = DESIGNS[name]
    post, pre = both(design)
    result = converted(post, "onnx", f"pre-activation{{first={design.first}}}")
    assert difference(result.graph, pre, image()) < ONNX_TOLERANCE
    assert len(result.applied) >= sum(design.depths) - 1
