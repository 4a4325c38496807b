"""The twin of a graph computes what the graph computes, differentiates, and shows every value on the way."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.written_models import EDSR, Highway, Recurrent, Spellings, UNet
from rescompile import api
from rescompile.errors import GraphError
from rescompile.fx_twin import FxTwin, GraphTwin, twin
from rescompile.graph import Graph
from rescompile.kinds import Trait
from rescompile.verify import ADVERSARIES, make_inputs, relative_difference
from tests import test_detect_models as models
from tests import test_onnx_ops as operators
from tests.adapter_cases import FACTORIES, MODELS
from tests.light_models import randomised
from tests.onnx_models import Const, fed, model_of, single

TOLERANCE = 1e-5  # relative to the largest magnitude of an output, float32


def random_inputs(graph: Graph, seed: int = 0) -> dict[str, Any]:
    inputs = make_inputs(graph, ADVERSARIES["random"], seed)
    assert inputs is not None
    return inputs


def exported(model: nn.Module, x: tuple[Tensor, ...], **options: Any) -> Graph:
    return api.capture(torch.onnx.export(model.eval(), x, dynamo=True, verbose=False, **options))


def largest_difference(graph: Graph, inputs: dict[str, Any]) -> float:
    expected = graph.run(inputs)
    with torch.no_grad():
        outputs, _ = twin(graph).run(inputs)
    assert list(outputs) == list(expected)
    return max(relative_difference(expected[name], outputs[name].numpy()) for name in expected)


# ---- numbers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("adapter", FACTORIES)
def test_twin_computes_what_the_model_computes(adapter: str, model: str) -> None:
    case = FACTORIES[adapter](model)
    outputs = twin(case.graph)(*(case.inputs[value.name] for value in case.graph.inputs))
    for expected, actual in zip(case.expected, outputs, strict=True):
        assert relative_difference(expected, actual.detach().numpy()) < TOLERANCE


WRITTEN: dict[str, Callable[[], tuple[nn.Module, tuple[Tensor, ...]]]] = {
    "U-Net": lambda: (UNet(), (torch.randn(2, 3, 16, 16),)),
    "EDSR": lambda: (EDSR(), (torch.randn(1, 3, 8, 8),)),
    "highway": lambda: (Highway(), (torch.randn(2, 16),)),
    "spellings": lambda: (Spellings(), (torch.randn(1, 4, 8, 8),)),
    "LSTMs": lambda: (Recurrent(), (torch.randn(2, 5, 16),)),
    "GRUs": lambda: (Recurrent(nn.GRU), (torch.randn(2, 5, 16),)),
    "RNNs": lambda: (Recurrent(nn.RNN), (torch.randn(2, 5, 16),)),
}
TRANSFORMERS = {"BERT": models.bert, "GPT-2": models.gpt2, "ViT": models.vit}
VISION = {
    name: lambda name=name: models.vision(name)
    for name in ("resnet18", "mobilenet_v3_small", "shufflenet_v2_x0_5", "efficientnet_b0", "squeezenet1_1")
}


@pytest.mark.parametrize("name", [*WRITTEN, *TRANSFORMERS, *VISION])
def test_twin_of_a_torch_model(name: str) -> None:
    model, x = {**WRITTEN, **TRANSFORMERS, **VISION}[name]()
    graph = api.capture(model.eval(), x)
    assert largest_difference(graph, random_inputs(graph)) < TOLERANCE


@pytest.mark.parametrize("name", [*WRITTEN, *TRANSFORMERS])
def test_twin_of_an_exported_model(name: str) -> None:
    graph = exported(*{**WRITTEN, **TRANSFORMERS}[name]())
    assert largest_difference(graph, random_inputs(graph)) < TOLERANCE


@pytest.mark.parametrize("name", ["resnet50", "densenet121", "inception_v1", "shufflenet"])
def test_twin_of_a_light_onnx_model(name: str) -> None:
    graph = api.capture(randomised(name))
    assert largest_difference(graph, random_inputs(graph)) < TOLERANCE


@pytest.mark.parametrize(("item", "opset"), operators.PAIRS)
def test_every_onnx_operator_with_a_kind_gives_the_same_numbers(item: operators.Case, opset: int) -> None:
    proto, feeds = single(item.op, item.operands, opset, outputs=item.outputs, **item.attrs)
    graph = api.capture(proto)
    if any(op.has(Trait.RANDOM) for op in graph):
        pytest.skip("random numbers differ")
    assert largest_difference(graph, feeds) < TOLERANCE


@pytest.mark.parametrize("op_type", ["LSTM", "GRU", "RNN"])
@pytest.mark.parametrize("direction", ["forward", "reverse", "bidirectional"])
@pytest.mark.parametrize("options", [{}, {"linear_before_reset": 1}, {"states": True}])
def test_recurrent_layers_of_every_direction(op_type: str, direction: str, options: dict[str, Any]) -> None:
    gates, ways = {"LSTM": 4, "GRU": 3, "RNN": 1}[op_type], 1 + (direction == "bidirectional")
    if options.get("linear_before_reset") and op_type != "GRU":
        pytest.skip("an attribute of the GRU")
    operands: list[Any] = [fed(5, 2, 4), Const.random(ways, gates * 3, 4, seed=1), Const.random(ways, gates * 3, 3)]
    if options.get("states"):
        operands += [Const.random(ways, gates * 6, seed=3), None, fed(ways, 2, 3)]
        operands += [fed(ways, 2, 3, seed=9)] if op_type == "LSTM" else []
    attrs = {key: value for key, value in options.items() if key != "states"}
    outputs = 3 if op_type == "LSTM" else 2
    proto, feeds = single(op_type, operands, 14, outputs=outputs, hidden_size=3, direction=direction, **attrs)
    assert largest_difference(api.capture(proto), feeds) < TOLERANCE


# ---- names and tensors -----------------------------------------------------------------------------------------------


class Plain(nn.Module):
    """y = x + W₂·relu(W₁·x)"""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(F.relu(self.first(x)))


def in_both(model: nn.Module, x: Tensor) -> list[Graph]:
    return [api.capture(model, (x,)), exported(model, (x,))]


def test_state_of_the_twin_has_the_names_of_the_models_state() -> None:
    model, x = Plain(), torch.randn(3, 6)
    other = Plain()
    for graph in in_both(model, x):
        module = twin(graph)
        names = [name.removeprefix("module.") for name in module.state_dict()]
        assert sorted(names) == sorted(model.state_dict())
        for value in graph.parameters:
            torch.testing.assert_close(module.tensor(value).detach(), model.state_dict()[value.name], rtol=0, atol=0)
    module = twin(exported(model, (x,)))
    module.load_state_dict(other.state_dict())
    torch.testing.assert_close(module(x)[0], other(x), rtol=TOLERANCE, atol=TOLERANCE)


def test_a_name_that_is_a_prefix_of_another_is_told() -> None:
    node = onnx.helper.make_node("Mul", ["x", "scale"], ["h"], name="a")
    last = onnx.helper.make_node("Add", ["h", "scale.bias"], ["y"], name="b")
    constants = {"scale": np.full(4, 2.0, np.float32), "scale.bias": np.ones(4, np.float32)}
    graph = api.capture(model_of([node, last], {"x": (2, 4)}, ["y"], constants))
    module = twin(graph)
    assert isinstance(module, GraphTwin)
    assert module.names == {"scale": "scale", "scale.bias": "scale_bias"}
    assert largest_difference(graph, random_inputs(graph)) < TOLERANCE


def test_training_the_twin_leaves_the_graph_as_it_is() -> None:
    model, x = Plain(), torch.randn(3, 6)
    for graph in in_both(model, x):
        inputs = random_inputs(graph)
        before = graph.run(inputs)
        module = twin(graph)
        optimiser = torch.optim.SGD(module.parameters(), lr=0.5)
        losses = []
        for _ in range(5):
            optimiser.zero_grad()
            loss = next(iter(module.run(inputs)[0].values())).square().mean()
            loss.backward()
            optimiser.step()
            losses.append(loss.item())
        assert losses[-1] < losses[0]
        for name, expected in graph.run(inputs).items():
            np.testing.assert_array_equal(expected, before[name])
    assert all(parameter.grad is None for parameter in model.parameters())


# ---- gradients and values --------------------------------------------------------------------------------------------


def test_gradients_are_those_of_the_written_module() -> None:
    model, x = Plain(), torch.randn(3, 6)
    weight = torch.randn(3, 6)
    expected = torch.autograd.grad((model(x) * weight).sum(), list(model.parameters()))
    for graph in in_both(model, x):
        module = twin(graph)
        tensors = [module.tensor(graph.value(name)) for name, _ in model.named_parameters()]
        found = torch.autograd.grad((module(x)[0] * weight).sum(), tensors)
        for one, other in zip(expected, found, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_gradient_at_a_watched_value_is_that_of_this_value() -> None:
    model, x = Plain(), torch.randn(3, 6)
    hidden = F.relu(model.first(x))
    (expected,) = torch.autograd.grad((x + model.second(hidden)).sum(), hidden)
    for graph in in_both(model, x):
        relu = next(op for op in graph if op.kind.value == "relu").output
        outputs, found = twin(graph).run({graph.inputs[0].name: x}, [relu, graph.inputs[0]])
        at_relu, at_input = torch.autograd.grad(
            next(iter(outputs.values())).sum(), [found[relu], found[graph.inputs[0]]]
        )
        torch.testing.assert_close(at_relu, expected, rtol=1e-5, atol=1e-6)
        assert at_input.shape == x.shape
        assert not x.requires_grad


def test_values_that_one_tensor_stands_for_are_told_apart() -> None:
    class Same(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            y = x * 2
            return y.contiguous() * 3 + y * 5

    graph = api.capture(torch.fx.symbolic_trace(Same()))
    doubled, copied = (op.output for op in graph.ops[:2])
    assert copied.producer.kind.value == "identity"
    outputs, found = twin(graph).run({"x": torch.ones(3)}, [doubled, copied])
    gradients = torch.autograd.grad(next(iter(outputs.values())).sum(), [found[doubled], found[copied]])
    assert [gradient[0].item() for gradient in gradients] == [8.0, 3.0]


def test_a_frozen_model_has_gradients_at_watched_values() -> None:
    model = Plain().requires_grad_(False)
    graph = api.capture(model, (torch.randn(3, 6),))
    relu = next(op for op in graph if op.kind.value == "relu").output
    outputs, found = twin(graph).run({"x": torch.randn(3, 6)}, [relu])
    (gradient,) = torch.autograd.grad(next(iter(outputs.values())).sum(), found[relu])
    assert gradient.abs().sum() > 0


def test_values_inside_one_native_node_are_shown() -> None:
    class Inside(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.addcmul(x, x, x.sigmoid(), value=0.5)

    graph = api.capture(Inside(), (torch.randn(4),))
    product = next(op for op in graph if op.kind.value == "mul").output
    assert product.native is None
    x = torch.randn(4)
    _, found = twin(graph).run({"x": x}, [product])
    torch.testing.assert_close(found[product].detach(), x * x.sigmoid(), rtol=1e-6, atol=1e-6)


def test_a_value_that_is_changed_in_place_is_shown_as_it_was() -> None:
    class Changed(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            y = x * 2
            return y.relu_() + 1

    graph = api.capture(Changed(), (torch.randn(4),))
    _, found = twin(graph).run({"x": -torch.ones(4)}, [graph.ops[0].output])
    assert found[graph.ops[0].output].tolist() == [-2.0] * 4


def test_a_training_graphs_statistics_stay_as_they_are() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).train()
    graph = api.capture(model, (torch.randn(2, 3, 8, 8),))
    twin(graph)(torch.randn(2, 3, 8, 8))
    assert model[1].running_mean.abs().sum() == 0
    assert all(np.abs(graph.data(v)).sum() == 0 for v in graph.parameters if v.name.endswith("running_mean"))


# ---- dynamic extents, and what cannot be computed --------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 5])
def test_symbolic_extents_are_those_of_the_inputs(batch: int) -> None:
    class Heads(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            n, t, c = x.shape
            return x.reshape(n, t, 2, c // 2).transpose(1, 2).reshape(n * 2, t, c // 2).softmax(1)

    x = torch.randn(3, 4, 6)
    dims = ({0: torch.export.Dim("N"), 1: torch.export.Dim("T")},)
    graphs = [api.capture(Heads(), (x,), dynamic=dims), exported(Heads(), (x,), dynamic_shapes=dims)]
    for graph in graphs:
        inputs = {graph.inputs[0].name: np.random.default_rng(0).standard_normal((batch, 7, 6)).astype(np.float32)}
        assert largest_difference(graph, inputs) < TOLERANCE


def trilu(domain: str = "") -> Graph:
    """y = trilu(W·x): an operator without a kind, behind a weight."""
    nodes = [
        onnx.helper.make_node("MatMul", ["x", "w"], ["h"], name="matmul"),
        onnx.helper.make_node("Trilu", ["h"], ["y"], name="triangle", upper=1),
    ]
    return api.capture(model_of(nodes, {"x": (4, 4)}, ["y"], {"w": np.eye(4, dtype=np.float32)}))


def test_an_unknown_operation_is_computed_where_no_gradient_goes_through_it() -> None:
    graph = trilu()
    assert largest_difference(graph, random_inputs(graph)) < TOLERANCE


def test_an_unknown_operation_is_named_where_a_gradient_would_go_through_it() -> None:
    graph = trilu()
    with pytest.raises(GraphError, match=r"'triangle' \(.*Trilu\).*no gradient goes through it"):
        twin(graph).run(random_inputs(graph))


def test_inputs_that_do_not_fit_are_named() -> None:
    graph = exported(Plain(), (torch.randn(3, 6),))
    module = twin(graph)
    with pytest.raises(GraphError, match="no input 'y'"):
        module.run({"y": torch.randn(3, 6)})
    with pytest.raises(GraphError, match="'x' is missing"):
        module.run({})
    with pytest.raises(GraphError, match=r"'x' is float32\[2, 6\] and the model takes float32\[3, 6\]"):
        module.run({"x": torch.randn(2, 6)})


def test_each_ir_has_its_own_twin() -> None:
    first, second = (twin(graph) for graph in in_both(Plain(), torch.randn(3, 6)))
    assert isinstance(first, FxTwin)
    assert isinstance(second, GraphTwin)
