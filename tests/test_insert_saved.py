"""A model with inserted shortcuts goes where any model goes: into files, to ONNX Runtime, through TVM. In both IRs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import rescompile as rc
from rescompile.graph import Graph
from tests.plain_models import Autoencoder, PlainNet, StackedLstm, mlp

pytest.importorskip("tvm")

IRS = ("fx", "onnx")
LARGE = ("alexnet", "vgg11")
LARGEST = 1e-5  # difference, relative to the largest output
Case = tuple[nn.Module, tuple[torch.Tensor, ...], str, int]


def numbers(*shape: int) -> tuple[torch.Tensor]:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(0)),)


def with_small_head(model: Any, width: int) -> nn.Module:
    """The convolutions of a network of torchvision; its head of 4,096 features holds most of the weights."""
    model.avgpool = nn.AdaptiveAvgPool2d(1)
    model.classifier = nn.Sequential(nn.Dropout(), nn.Linear(width, 32), nn.ReLU(), nn.Linear(32, 10))
    network: nn.Module = model
    return network


# The model, its inputs, the pass, and how many shortcuts it inserts.
CASES: dict[str, Callable[[ModuleType], Case]] = {
    "convolutions": lambda _: (
        PlainNet(1, widths=(4, 8, 16)),
        numbers(2, 3, 16, 16),
        "insert-shortcuts{every=2,start=residual}",
        3,
    ),
    "mlp": lambda _: (mlp(4), numbers(2, 16), "insert-shortcuts{every=2,kind=gated,start=highway}", 2),
    "lstm": lambda _: (
        StackedLstm(),
        (torch.randint(0, 20, (2, 5), generator=torch.Generator().manual_seed(0)),),
        "insert-shortcuts{every=1,start=residual}",
        3,
    ),
    "autoencoder": lambda _: (
        Autoencoder(),
        numbers(1, 3, 16, 16),
        "insert-shortcuts{kind=long,start=residual}",
        2,
    ),
    "alexnet": lambda torchvision: (
        with_small_head(torchvision.models.alexnet(), 256),
        numbers(1, 3, 64, 64),
        "insert-shortcuts{every=2,start=residual}",
        2,
    ),
    "vgg11": lambda torchvision: (
        with_small_head(torchvision.models.vgg11(), 512),
        numbers(1, 3, 32, 32),
        "insert-shortcuts{every=2,start=residual}",
        3,
    ),
}


def captured(model: nn.Module, inputs: tuple[torch.Tensor, ...], ir: str) -> Graph:
    model.eval()
    if ir == "fx":
        return rc.capture(model, inputs)
    return rc.capture(torch.onnx.export(model, inputs, dynamo=True, verbose=False))


def outputs(graph: Graph, inputs: tuple[torch.Tensor, ...]) -> np.ndarray[Any, Any]:
    arrays = {value.name: tensor.numpy() for value, tensor in zip(graph.inputs, inputs, strict=True)}
    return next(iter(graph.run(arrays).values()))


def difference(found: np.ndarray[Any, Any], expected: np.ndarray[Any, Any]) -> float:
    return float(np.abs(found - expected).max() / np.abs(expected).max())


@pytest.mark.parametrize("ir", IRS)
@pytest.mark.parametrize("name", CASES)
def test_result_is_saved_exported_and_compiled(name: str, ir: str, torchvision: ModuleType, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, inputs, spec, count = CASES[name](torchvision)
    graph = captured(model, inputs, ir)
    result = rc.rewrite(graph, spec)
    assert len(result.applied) == count
    expected = outputs(result.graph, inputs)
    assert difference(outputs(graph, inputs), expected) > 1e-3  # the shortcuts do something

    path = tmp_path / ("saved.pt2" if ir == "fx" else "saved.onnx")
    result.save(path)
    loaded = rc.load(path, trust=True)
    assert difference(outputs(loaded, inputs), expected) <= LARGEST
    assert rc.inspect(loaded).summary() == rc.inspect(result.graph).summary()
    assert {value.name for value in loaded.parameters} == {value.name for value in result.graph.parameters}

    if ir == "fx":
        exported = rc.capture(torch.onnx.export(result.model, inputs, dynamo=True, verbose=False))
        assert difference(outputs(exported, inputs), expected) <= LARGEST

    if name in LARGE and ir == "onnx":
        return  # its kernels are those that were compiled from torch
    program = rc.compile(result.graph)
    assert difference(program(*(tensor.numpy() for tensor in inputs)), expected) <= LARGEST
