"""Small models, and the adapters that read them, for the contract that every adapter keeps.

A factory takes the name of a model of `MODELS` and gives a `Case`. Another adapter joins the suite with one line in
`FACTORIES`; `torch_model` gives it the module and its inputs to export from.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest

from rescompile.graph import Graph

torch = pytest.importorskip("torch")
nn = torch.nn


@dataclass
class Case:
    """A graph, named inputs for it, what the model gives for them, and how to read the edited object anew."""

    graph: Graph
    inputs: dict[str, np.ndarray]
    expected: list[np.ndarray]
    reread: Callable[[Graph], Graph]


class ConvBlock(nn.Module):
    """relu(bn(conv(x)) + x), twice"""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(4)
        self.second = nn.Conv2d(4, 4, 1)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x):
        x = self.relu(self.norm(self.first(x)) + x)
        return self.relu(self.second(x) + x)


class NormBlock(nn.Module):
    """s = x + linear(x); outputs norm(s) and s"""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.norm = nn.LayerNorm(8)

    def forward(self, x):
        total = x + self.linear(x)
        return self.norm(total), total


class Split(nn.Module):
    """Halves swapped and joined again, one of them activated"""

    def forward(self, x):
        first, second = x.chunk(2, 1)
        return torch.cat([second.tanh(), first], 1)


class Tied(nn.Module):
    """One weight, read twice"""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(8, 8, bias=False)
        self.two = nn.Linear(8, 8, bias=False)
        self.two.weight = self.one.weight

    def forward(self, x):
        return self.two(torch.sigmoid(self.one(x)))


class Scaled(nn.Module):
    """Two calls that stand for several operations each, and a number"""

    def forward(self, x):
        y = torch.addcmul(x, x, x.sigmoid(), value=0.5)
        return y[:, 0] * 3.0


MODELS = {
    "conv": (ConvBlock, (2, 4, 6, 6)),
    "norm": (NormBlock, (2, 3, 8)),
    "split": (Split, (2, 4)),
    "tied": (Tied, (2, 8)),
    "scaled": (Scaled, (2, 3, 4)),
}


def torch_model(name):
    """A model in evaluation mode with parameters that matter, and its input."""
    torch.manual_seed(7)
    kind, shape = MODELS[name]
    model = kind().eval()
    for key, tensor in model.state_dict().items():
        if tensor.is_floating_point():
            tensor.copy_(torch.rand_like(tensor) + 0.5 if key.endswith(("var", "norm.weight")) else tensor)
            if key.endswith(("mean", "norm.bias")):
                tensor.copy_(torch.randn_like(tensor) * 0.1)
    return model, torch.randn(shape)


def _case(graph, model, x, reread):
    with torch.no_grad():
        result = model(x.clone())
    outputs = [t.numpy() for t in (result if isinstance(result, tuple) else (result,))]
    return Case(graph, {graph.inputs[0].name: x.numpy()}, outputs, reread)


def _fx(source):
    def factory(name):
        from rescompile.fx_capture import capture
        from rescompile.fx_graph import FxGraph

        model, x = torch_model(name)
        graph = capture(source(model, x), x)
        return _case(graph, model, x, lambda edited: FxGraph.read(edited.module))

    return factory


def _onnx(**options):
    def factory(name):
        from rescompile.onnx_files import capture

        model, x = torch_model(name)
        program = torch.onnx.export(model, (x,), dynamo=True, verbose=False, **options)
        return _case(capture(program), model, x, lambda edited: capture(edited.model))

    return factory


FACTORIES: dict[str, Callable[[str], Case]] = {
    "fx-module": _fx(lambda model, x: model),
    "fx-trace": _fx(lambda model, x: torch.fx.symbolic_trace(model)),
    "fx-program": _fx(lambda model, x: torch.export.export(model, (x,), strict=False)),
    "fx-core": _fx(lambda model, x: torch.export.export(model, (x,), strict=False).run_decompositions()),
    "onnx-18": _onnx(opset_version=18, optimize=False),
    "onnx-20": _onnx(opset_version=20, optimize=False),
}
