"""Gradient flow before and after a rewrite: against gradients taken by hand, for moved norms and for inserted skips."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import rescompile as rc
from rescompile import api
from rescompile.errors import RescompileError
from rescompile.fx_initialise import initialise
from rescompile.fx_twin import twin
from rescompile.gradient_comparison import GradientComparison
from rescompile.gradients import GradientFlow
from rescompile.graph import Graph, Value
from rescompile.rewriting import Result
from tests.onnx_models import model_of

WIDTH = 8


def near(number: float | None, relative: float = 1e-4) -> Any:
    assert number is not None
    return pytest.approx(number, rel=relative)


class Stack(nn.Module):
    """`depth` feed-forward blocks, the norm behind the sum or at the branch's entry."""

    def __init__(self, depth: int = 3, pre: bool = False) -> None:
        super().__init__()
        self.work = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(depth))
        self.norm = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(depth))
        self.pre = pre

    def forward(self, x: Tensor) -> Tensor:
        for work, norm in zip(self.work, self.norm, strict=True):
            x = x + torch.tanh(work(norm(x))) if self.pre else norm(x + torch.tanh(work(x)))
        return x


def stacks(depth: int = 3) -> tuple[Stack, Stack]:
    """Post-norm and pre-norm, with the same weights."""
    torch.manual_seed(0)
    post, pre = Stack(depth), Stack(depth, pre=True)
    for norm in post.norm:  # norms that are equal would be one in an ONNX file
        nn.init.normal_(norm.weight, 1.0, 0.1)
        nn.init.normal_(norm.bias, 0.0, 0.1)
    pre.load_state_dict(post.state_dict())
    return post.eval(), pre.eval()


def graph_of(model: nn.Module, x: Tensor, ir: str) -> Graph:
    if ir == "fx":
        return api.capture(model, (x,))
    return api.capture(torch.onnx.export(model, (x,), dynamo=True, verbose=False, optimize=False))


def cotangent(flow: GradientFlow, shape: tuple[int, ...]) -> Tensor:
    """The random direction that the flow was measured with."""
    from rescompile.fx_gradients import _cotangent

    return _cotangent(torch.zeros(shape), flow.outputs[0], flow.seed)


# ---- moved norms -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ir", ["fx", "onnx"])
def test_parameter_gradients_are_those_taken_by_hand_over_what_both_branches_read(ir: str) -> None:
    x = torch.randn(4, WIDTH)
    models = stacks()
    graphs = [graph_of(model, x, ir) for model in models]
    comparison = rc.compare_gradients(*graphs, inputs=(x,))
    assert comparison.placements == (("post", "pre"),) * 3
    for model, flow in zip(models, (comparison.before, comparison.after), strict=True):
        model.zero_grad()
        y = model(x)
        (y * cotangent(flow, tuple(y.shape))).sum().backward()
        for work, block in zip(model.work, flow, strict=True):
            # The pre-norm branch holds its norm and the post-norm one does not: it counts in neither.
            grads = torch.cat([parameter.grad.reshape(-1) for parameter in work.parameters()])
            assert block.parameter_gradient == near(grads.norm().item())


def test_the_stream_is_measured_at_both_joins() -> None:
    x = torch.randn(4, WIDTH)
    post, pre = stacks(1)
    comparison = rc.compare_gradients(post, pre, (x,), inputs=(x,))
    ((before, after),) = comparison
    assert before.join is not None
    assert after.join is not None
    assert before.join.mean_square == near((x + torch.tanh(post.work[0](x))).square().mean().item())
    assert after.join.mean_square == near(pre(x).square().mean().item())
    assert after.join_gradient == near(cotangent(comparison.after, (4, WIDTH)).norm().item())


@pytest.mark.parametrize("ir", ["fx", "onnx"])
def test_a_converted_graph_is_compared_like_the_hand_written_one(ir: str) -> None:
    x = torch.randn(4, WIDTH)
    post, pre = stacks()
    result = rc.rewrite(graph_of(post, x, ir), "pre-norm{final-norm=none}")
    converted = result.compare_gradients((x,))
    written = rc.compare_gradients(result.original, graph_of(pre, x, ir), inputs=(x,))
    assert converted.placements == (("post", "pre"),) * 3
    assert converted.before.to_dict() == written.before.to_dict()
    assert converted.after.outputs == written.after.outputs == written.before.outputs
    for one, other in zip(converted.after, written.after, strict=True):
        assert one.join == other.join
        assert one.join_gradient == near(other.join_gradient)
        assert one.parameter_gradient == near(other.parameter_gradient)


def test_blocks_of_a_blend_that_the_original_has_no_place_for_are_counted() -> None:
    x = torch.randn(4, WIDTH)
    result = rc.rewrite(stacks()[0], "pre-norm{mode=gradual}", (x,))
    comparison = result.compare_gradients((x,))
    assert len(comparison.notes) == 1
    assert comparison.notes[0].endswith("blocks of the result have no counterpart.")
    own = [pair for pair, (was, _) in zip(comparison, comparison.placements, strict=True) if was == "post"]
    assert len(own) == 3
    for before, after in own:
        assert before.join is not None
        assert after.join is not None
        assert after.join.mean_square == near(before.join.mean_square)


def test_each_side_is_the_flow_of_its_own_graph() -> None:
    x = torch.randn(4, WIDTH)
    post, pre = stacks()
    comparison = rc.compare_gradients(post, pre, (x,), inputs=(x,))
    alone = rc.gradient_flow(post, (x,), inputs=(x,))
    assert [block.join_gradient for block in comparison.before] == [block.join_gradient for block in alone]
    assert comparison.before.to_dict()["slope"]["join"] == near(alone.slope)
    other = rc.gradient_flow(pre, (x,), inputs=(x,))
    assert comparison.after.growth == other.growth


def test_slopes_and_growth_are_least_squares_over_the_blocks() -> None:
    x = torch.randn(4, WIDTH)
    flow = rc.gradient_flow(stacks(5)[1], (x,), inputs=(x,))
    squares = [block.join.mean_square for block in flow if block.join is not None]
    assert flow.growth == near(np.polyfit(range(5), squares, 1)[0])
    assert flow.slope == near(np.polyfit(range(5), [math.log(block.join_gradient or 0) for block in flow], 1)[0])
    parameters = [math.log(block.parameter_gradient or 0) for block in flow]
    assert flow.parameter_slope == near(np.polyfit(range(5), parameters, 1)[0])
    assert flow.to_dict()["growth"] == near(flow.growth)


def test_layers_that_are_shared_correspond_in_order() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.work = nn.Linear(WIDTH, WIDTH)

        def forward(self, x: Tensor) -> Tensor:
            for _ in range(4):
                x = x + torch.tanh(self.work(x))
            return x

    model, x = Shared(), torch.randn(4, WIDTH)
    comparison = rc.compare_gradients(model, model, (x,), inputs=(x,))
    assert [block.block.join for block in comparison.before] == [block.block.join for block in comparison.after]
    assert comparison.before.to_dict() == comparison.after.to_dict()


def test_blocks_without_counterpart_are_counted() -> None:
    x = torch.randn(4, WIDTH)

    class Other(Stack):
        def __init__(self) -> None:
            super().__init__(3)
            self.extra = nn.Linear(WIDTH, WIDTH)

        def forward(self, x: Tensor) -> Tensor:
            x = super().forward(x)
            return x + torch.tanh(self.extra(x))

    comparison = rc.compare_gradients(Other(), Stack(4), (x,), inputs=(x,))
    assert comparison.notes[0] == "1 blocks of the original have no counterpart."
    assert comparison.placements == (*(("post", "post"),) * 3, ("no skip", "post"))


# ---- skips that one graph does not have ------------------------------------------------------------------------------


class Plain(nn.Module):
    """Layers without a skip, after one that stays outside."""

    def __init__(self, depth: int = 5) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.relu(layer(x))
        return x


@pytest.fixture
def inserted() -> Result:
    torch.manual_seed(0)
    spec = "insert-shortcuts{every=2,start=residual,join=after}"
    return rc.rewrite(Plain(), spec, (torch.zeros(4, WIDTH),), verify=False)


def test_inserted_skips_are_compared_with_the_same_places_of_the_plain_network(inserted: Result) -> None:
    torch.manual_seed(0)
    model, x = Plain(), torch.randn(4, WIDTH)
    comparison = inserted.compare_gradients((x,))
    assert comparison.placements == (("no skip", "none"),) * 2
    values = [x]
    for layer in model.layers:
        values.append(torch.relu(layer(values[-1])))
    direction = cotangent(comparison.before, (4, WIDTH))
    found = torch.autograd.grad((values[-1] * direction).sum(), [*values[3::2], *model.parameters()])
    for index, block in enumerate(comparison.before):
        end = values[3 + 2 * index]
        assert block.join is not None
        assert block.join.mean_square == near(end.square().mean().item())
        assert block.join_gradient == near(found[index].norm().item())
        parameters = found[2 + 2 * (1 + 2 * index) :][:4]  # weights and biases of two layers, the first left out
        assert block.parameter_gradient == near(torch.cat([g.reshape(-1) for g in parameters]).norm().item())


def test_removed_skips_are_compared_the_other_way_round(inserted: Result) -> None:
    x = torch.randn(4, WIDTH)
    removed = rc.rewrite(inserted.graph, "remove-shortcuts{how=plain}", verify=False)
    there, back = inserted.compare_gradients((x,)), removed.compare_gradients((x,))
    assert back.placements == (("none", "no skip"),) * 2
    for (one, other), (was, now) in zip(there, back, strict=True):
        assert was.join_gradient == near(other.join_gradient)
        assert now.join_gradient == near(one.join_gradient)
        assert now.parameter_gradient == near(one.parameter_gradient)


def test_two_networks_without_a_skip_have_nothing_to_compare() -> None:
    comparison = rc.compare_gradients(Plain(), Plain(), (torch.zeros(4, WIDTH),))
    assert comparison.placements == ()
    assert "no residual block" in str(comparison)


# ---- new weights -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ir", ["fx", "onnx"])
def test_new_weights_are_xaviers_and_biases_zero_and_gains_one(ir: str) -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(16, 48, 3, padding=1, groups=2), nn.GroupNorm(2, 48)
            self.linear, self.other = nn.Linear(48, 144), nn.Linear(144, 10)
            nn.init.constant_(self.norm.weight, 3.0)
            nn.init.constant_(self.norm.bias, 3.0)

        def forward(self, x: Tensor) -> Tensor:
            return self.other(self.linear(self.norm(self.conv(x)).mean((2, 3))))

    graph = graph_of(Mixed().eval(), torch.randn(2, 16, 8, 8), ir)
    module = twin(graph)
    names = {value.name for value in graph.parameters}
    assert initialise(module, graph, names, 0) == 3
    spreads = {"conv": math.sqrt(2 / ((8 + 48) * 9)), "linear": math.sqrt(2 / 192), "other": math.sqrt(2 / 154)}
    for name, deviation in spreads.items():
        weight = module.tensor(_parameter(graph, f"{name}.weight"))
        assert weight.std().item() == near(deviation, 0.1)
        assert abs(weight.mean().item()) < 0.1 * deviation
        assert module.tensor(_parameter(graph, f"{name}.bias")).abs().max() == 0.0
    assert bool((module.tensor(_parameter(graph, "norm.weight")) == 1.0).all())
    assert bool((module.tensor(_parameter(graph, "norm.bias")) == 0.0).all())


def _parameter(graph: Graph, name: str) -> Value:
    return next(value for value in graph.parameters if value.name == name)


def test_both_graphs_get_the_same_new_weights_and_keep_their_own() -> None:
    x = torch.randn(4, WIDTH)
    post, pre = stacks()
    before = {name: tensor.clone() for name, tensor in post.state_dict().items()}
    drawn = rc.compare_gradients(post, pre, (x,), inputs=(x,), init="xavier")
    assert drawn.weights == "new weights (Xavier, seed 0): 3 drawn"
    assert drawn.before.blocks[0].join_gradient != rc.gradient_flow(post, (x,), inputs=(x,)).blocks[0].join_gradient
    for name, tensor in post.state_dict().items():
        torch.testing.assert_close(tensor, before[name], rtol=0, atol=0)
    same = rc.compare_gradients(post, post, (x,), inputs=(x,), init="xavier")
    assert same.before.to_dict() == same.after.to_dict()
    other = rc.compare_gradients(post, pre, (x,), inputs=(x,), init="xavier", seed=1)
    assert other.before.to_dict() != drawn.before.to_dict()


def test_parameters_that_a_rewrite_brought_keep_their_start() -> None:
    """Skips that start as nothing leave the network as it was, with new weights too."""
    result = rc.rewrite(Plain(), "insert-shortcuts{every=2,join=after}", (torch.zeros(4, WIDTH),), verify=False)
    comparison = result.compare_gradients(init="xavier")
    for before, after in comparison:
        assert after.join_gradient == near(before.join_gradient)


def test_an_initialisation_that_is_not_known_is_refused() -> None:
    post, pre = stacks()
    with pytest.raises(RescompileError, match=r"no initialisation 'javier' .did you mean 'xavier'"):
        rc.compare_gradients(post, pre, (torch.zeros(2, WIDTH),), init="javier")


# ---- text, JSON, pictures --------------------------------------------------------------------------------------------


def test_text_and_json_hold_both_sides() -> None:
    x = torch.randn(4, WIDTH)
    comparison = rc.compare_gradients(*stacks(), (x,))
    text = str(comparison)
    assert "post → pre" in text
    assert "growth of E[x²] per block" in text
    content = json.loads(json.dumps(comparison.to_dict(), allow_nan=False))
    assert content["norm"] == [["post", "pre"]] * 3
    assert len(content["before"]["blocks"]) == len(content["after"]["blocks"]) == 3


@pytest.mark.parametrize("suffix", ["svg", "png"])
def test_the_picture_is_the_same_each_time(suffix: str, tmp_path: Path) -> None:
    comparison: GradientComparison = rc.compare_gradients(*stacks(), (torch.zeros(4, WIDTH),))
    comparison.plot(tmp_path / f"one.{suffix}")
    comparison.plot(tmp_path / f"two.{suffix}")
    assert (tmp_path / f"one.{suffix}").read_bytes() == (tmp_path / f"two.{suffix}").read_bytes()


def plain_file(folder: Path, middle: str = "Relu") -> Path:
    """y = Op(x·W₁)·W₂·W₃ as a file."""
    nodes, data = [], "x"
    for index in range(3):
        nodes.append(onnx.helper.make_node("MatMul", [data, f"w{index}"], [f"h{index}"], name=f"layer{index}"))
        nodes.append(onnx.helper.make_node(middle if index == 1 else "Relu", [f"h{index}"], [f"a{index}"]))
        data = f"a{index}"
    rng = np.random.default_rng(0)
    weights = {f"w{index}": rng.standard_normal((4, 4)).astype(np.float32) for index in range(3)}
    path = folder / "model.onnx"
    onnx.save(model_of(nodes, {"x": (4, 4)}, [data], weights), path)
    return path


def test_rewrite_prints_writes_and_draws_what_it_does_to_training(
    run: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    model, out, picture, data = plain_file(tmp_path), tmp_path / "out.onnx", tmp_path / "g.svg", tmp_path / "x.npz"
    np.savez(data, x=np.ones((4, 4), np.float32))
    arguments = ("rewrite", model, "-o", out, "--pass", "insert-shortcuts{every=1}")
    status, text, err = run(*arguments, "--gradients", "--plot", picture, "--input-file", data, "--init", "xavier")
    assert (status, err) == (0, "")
    assert "Gradient flow before → after, on the given inputs; new weights (Xavier, seed 0)" in text
    assert picture.read_bytes().startswith(b"<?xml")
    status, text, _ = run(*arguments, "--gradients", "--json")
    content = json.loads(text)
    assert content["schema"] == 1
    assert content["gradients"]["weights"] == "weights as given"
    assert len(content["gradients"]["norm"]) == len(content["applied"])


def test_a_dry_run_has_no_gradients(run: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    status, _, err = run("rewrite", plain_file(tmp_path), "--dry-run", "--gradients")
    assert status == 2
    assert "leave out --dry-run" in err


def test_a_comparison_that_torch_cannot_compute_leaves_the_rewrite(
    run: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    model, out = plain_file(tmp_path, "Trilu"), tmp_path / "out.onnx"
    status, text, err = run("rewrite", model, "-o", out, "--pass", "insert-shortcuts{every=1}", "--gradients")
    assert status == 1
    assert "insert-shortcuts" in text
    assert "no gradient goes through it" in err
    assert out.exists()


def test_functional_layer_norm_needs_no_weights() -> None:
    class Bare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.work = nn.Linear(WIDTH, WIDTH)

        def forward(self, x: Tensor) -> Tensor:
            return F.layer_norm(x + self.work(x), (WIDTH,))

    comparison = rc.compare_gradients(Bare(), Bare(), (torch.zeros(2, WIDTH),), init="xavier")
    assert comparison.weights == "new weights (Xavier, seed 0): 1 drawn"
