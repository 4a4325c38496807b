"""Gradient flow: against gradients taken by hand, what the literature says of depth, and on the command line."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import rescompile as rc
from benchmarks.written_models import EDSR, Highway, Recurrent, UNet
from rescompile import api, cli_gradients
from rescompile.cli import main
from rescompile.errors import RescompileError
from rescompile.fx_twin import twin
from rescompile.gradients import GradientFlow, Signal, pooled
from rescompile.graph import Graph
from tests.light_models import randomised
from tests.onnx_models import model_of
from tests.test_twin import Plain

WIDTH = 64


def near(number: float, relative: float = 1e-4) -> Any:
    return pytest.approx(number, rel=relative)


# ---- by hand ---------------------------------------------------------------------------------------------------------


class Two(nn.Module):
    """h = x + 2·W₂·relu(W₁·x); y = h + U·h"""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(width, width), nn.Linear(width, width)
        self.third = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        h = x + 2.0 * self.second(F.relu(self.first(x)))
        return h + self.third(h)


def cotangent(flow: GradientFlow, shape: tuple[int, ...]) -> Tensor:
    """The random direction that the flow was measured with, found by its own documentation: N(0, 1) from the seed."""
    from rescompile.fx_gradients import _cotangent

    return _cotangent(torch.zeros(shape), flow.outputs[0], flow.seed)


@pytest.fixture(scope="module")
def exported() -> Graph:
    torch.manual_seed(0)
    return api.capture(torch.onnx.export(Two().eval(), (torch.randn(4, 6),), dynamo=True, verbose=False))


def norm_of(*tensors: Tensor) -> float:
    return torch.cat([tensor.reshape(-1) for tensor in tensors]).norm().item()


@pytest.mark.parametrize("ir", ["fx", "onnx"])
def test_signals_and_gradients_are_those_taken_by_hand(ir: str, exported: Graph) -> None:
    torch.manual_seed(0)
    model, x = Two(), torch.randn(4, 6)
    graph = exported if ir == "onnx" else api.capture(model, (x,))
    flow = rc.gradient_flow(graph, inputs={graph.inputs[0].name: x})
    x = x.clone().requires_grad_()
    branch = 2.0 * model.second(F.relu(model.first(x)))
    h = x + branch
    y = h + model.third(h)
    one = [*model.first.parameters(), *model.second.parameters()]
    found = torch.autograd.grad((y * cotangent(flow, y.shape)).sum(), [x, h, y, *one, *model.third.parameters()])
    of_first, of_third = found[3 : 3 + len(one)], found[3 + len(one) :]
    first, second = flow.blocks
    assert first.fork_gradient == near(norm_of(found[0]))
    assert first.join_gradient == second.fork_gradient == near(norm_of(found[1]))
    assert second.join_gradient == near(norm_of(found[2]))
    assert first.parameter_gradient == near(norm_of(*of_first))
    assert second.parameter_gradient == near(norm_of(*of_third))
    for signal, tensor in ((first.fork, x), (first.branch, branch), (first.skip, x), (first.join, h), (second.join, y)):
        assert signal is not None
        assert signal.variance == near(tensor.var(correction=0).item())
        assert signal.mean_square == near(tensor.square().mean().item())
    assert first.share == near((branch.var() / x.var()).item())
    assert flow.ratio == near(norm_of(found[1]) / norm_of(found[2]))
    assert flow.stream_ratio == near(norm_of(found[0]) / norm_of(found[2]))
    assert flow.parameter_ratio == near(norm_of(*of_first) / norm_of(*of_third))


def test_the_model_stays_as_it_is() -> None:
    model = nn.Sequential(nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2))

    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, x: Tensor) -> Tensor:
            return x + self.inner(x)

    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    flow = rc.gradient_flow(Residual().train(), (torch.randn(3, 2, 4, 4),))
    assert flow.blocks[0].parameter_gradient
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, before[name], rtol=0, atol=0)


def test_the_same_seed_gives_the_same_numbers_and_another_others() -> None:
    model, x = Two(), (torch.randn(4, 6),)
    one, same, other = (rc.gradient_flow(model, x, seed=seed).to_dict() for seed in (0, 0, 1))
    assert one == same
    assert one["blocks"] != other["blocks"]
    assert one["inputs"] == "random inputs, seed 0"


# ---- the literature --------------------------------------------------------------------------------------------------


class Stack(nn.Module):
    """`depth` layers x ← skip·x + N(f(W·x)), with or without norm on the branch."""

    def __init__(self, depth: int, skip: bool, norm: bool = False, activation: Any = torch.tanh) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(depth))
        self.skip, self.norm, self.activation = skip, norm, activation

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            y = self.activation(layer(x))
            y = F.layer_norm(y, (WIDTH,)) if self.norm else y
            x = x + y if self.skip else y
        return x


def test_the_gradient_of_a_plain_stack_vanishes_and_that_of_a_residual_one_does_not() -> None:
    """He 2015, 2016: 50 layers in torch's default initialisation."""
    torch.manual_seed(0)
    x = torch.randn(32, WIDTH)
    graph = api.capture(Stack(50, skip=False), (x,))
    layers = [op.output for op in graph if op.kind.value == "tanh"]
    outputs, found = twin(graph).run({"x": x}, [layers[0], layers[-1]])
    first, last = torch.autograd.grad(next(iter(outputs.values())).square().sum(), list(found.values()))
    assert first.norm() < 1e-6 * last.norm()
    flow = rc.gradient_flow(Stack(50, skip=True), (x,), inputs=(x,))
    assert len(flow) == 50
    assert flow.ratio is not None
    assert 0.1 < flow.ratio < 100


def test_the_variance_of_a_stream_with_normalised_branches_is_l_plus_one() -> None:
    """And without the norm it doubles with every block (De and Smith 2020)."""
    torch.manual_seed(0)
    x = torch.randn(64, WIDTH)
    model = Stack(30, skip=True, norm=True)
    flow = rc.gradient_flow(model, (x,), inputs=(x,))
    for depth, block in enumerate(flow, start=1):
        assert block.join is not None
        assert block.join.variance == near(depth + 1, 0.15)
        assert block.branch is not None
        assert block.branch.variance == near(1.0, 1e-3)
    doubling = Stack(10, skip=True, activation=lambda y: y)
    for layer in doubling.layers:
        nn.init.normal_(layer.weight, std=WIDTH**-0.5)
        nn.init.zeros_(layer.bias)
    last = rc.gradient_flow(doubling, (x,), inputs=(x,)).blocks[-1].join
    assert last is not None
    assert math.log2(last.variance) == near(10, 0.15)


class Xiong(nn.Module):
    """Feed-forward sublayers with Xavier weights, norm before or behind; a last norm where it stands before."""

    def __init__(self, depth: int, pre: bool) -> None:
        super().__init__()
        self.up = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(depth))
        self.down = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(depth))
        for layer in (*self.up, *self.down):
            nn.init.normal_(layer.weight, std=WIDTH**-0.5)
            nn.init.zeros_(layer.bias)
        self.pre = pre

    def forward(self, x: Tensor) -> Tensor:
        for up, down in zip(self.up, self.down, strict=True):
            if self.pre:
                x = x + down(F.relu(up(F.layer_norm(x, (WIDTH,)))))
            else:
                x = F.layer_norm(x + down(F.relu(up(x))), (WIDTH,))
        return F.layer_norm(x, (WIDTH,)) if self.pre else x


def last_gradient(depth: int, pre: bool) -> float:
    """Root mean square over draws of the weights."""
    squares = []
    for seed in range(4):
        torch.manual_seed(seed)
        x = torch.randn(64, WIDTH)
        last = rc.gradient_flow(Xiong(depth, pre), (x,), inputs=(x,), seed=seed).blocks[-1].parameter_gradient
        assert last is not None
        squares.append(last**2)
    return math.sqrt(sum(squares) / len(squares))


def test_the_last_layers_gradient_shrinks_with_depth_before_a_norm_and_not_behind_it() -> None:
    """Xiong 2020: at initialisation post-norm flat in L, pre-norm as L^(−1/2), here sqrt((1 + 2/2) / (1 + 16/2))."""
    assert last_gradient(16, pre=False) / last_gradient(2, pre=False) == near(1.0, 0.2)
    assert last_gradient(16, pre=True) / last_gradient(2, pre=True) == near(math.sqrt(2 / 9), 0.2)


def test_the_pre_norm_stream_grows_by_one_half_a_sublayer() -> None:
    """Xiong 2020, lemma 2: E‖x_l‖² = (1 + l/2)·d."""
    torch.manual_seed(0)
    x = torch.randn(64, WIDTH)
    for depth, block in enumerate(rc.gradient_flow(Xiong(16, pre=True), (x,), inputs=(x,)), start=1):
        assert block.join is not None
        assert block.join.mean_square == near(1 + depth / 2, 0.15)


# ---- every kind of block ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "shape", "count"),
    [
        (UNet(), (1, 3, 16, 16), 2),
        (EDSR(), (1, 3, 8, 8), 4),
        (Highway(), (2, 16), 3),
        (Recurrent(), (2, 5, 16), 3),
    ],
    ids=["long", "nested", "gated", "recurrent"],
)
def test_every_kind_of_block_is_measured(model: nn.Module, shape: tuple[int, ...], count: int) -> None:
    flow = rc.gradient_flow(model.eval(), (torch.randn(shape),))
    assert len(flow) == count
    for block in flow:
        assert None not in (block.fork, block.join, block.branch, block.skip)
        assert None not in (block.fork_gradient, block.join_gradient, block.parameter_gradient)
    assert flow.notes == ()


def test_two_branches_of_one_block_count_as_their_sum() -> None:
    class Parallel(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            n = F.layer_norm(x, (8,))
            return x + self.one(n) + self.two(n)

    torch.manual_seed(0)
    model, x = Parallel(), torch.randn(5, 8)
    (block,) = rc.gradient_flow(model, (x,), inputs=(x,)).blocks
    assert block.block.kind == "parallel"
    n = F.layer_norm(x, (8,))
    assert block.branch is not None
    assert block.branch.variance == near((model.one(n) + model.two(n)).var(correction=0).item())


def test_what_lies_side_by_side_is_pooled() -> None:
    a, b = torch.randn(3, 4) + 5, torch.randn(7) - 2
    signals = [Signal(t.mean().item(), t.var(correction=0).item(), t.numel()) for t in (a, b)]
    both = torch.cat([a.reshape(-1), b])
    result = pooled(signals)
    assert result is not None
    assert result.variance == near(both.var(correction=0).item())
    assert result.mean == near(both.mean().item())


def test_a_light_onnx_model() -> None:
    flow = rc.gradient_flow(randomised("resnet50"))
    assert len(flow.stream) == 16
    assert flow.ratio is not None
    assert math.isfinite(flow.ratio)


def test_fused_operations_have_gradients() -> None:
    model, x = Plain(), torch.randn(4, 6)
    graph = api.capture(model, (x,))
    fused = rc.rewrite(graph, ["fuse"]).graph
    plain, tight = rc.gradient_flow(graph, inputs=(x,)), rc.gradient_flow(fused, inputs=(x,))
    for one, other in zip(plain, tight, strict=True):
        assert other.block.fused
        assert other.fork_gradient == near(one.fork_gradient or 0.0)
        assert other.join_gradient == near(one.join_gradient or 0.0)
        assert other.branch is None


# ---- where gradients are not -----------------------------------------------------------------------------------------


def test_frozen_parameters_have_no_gradient_and_the_stream_keeps_its_own() -> None:
    torch.manual_seed(0)
    model, x = Two(), torch.randn(4, 6)
    free = rc.gradient_flow(model, (x,), inputs=(x,))
    frozen = rc.gradient_flow(model.requires_grad_(False), (x,), inputs=(x,))
    for one, other in zip(free, frozen, strict=True):
        assert other.parameter_gradient is None
        assert other.fork_gradient == near(one.fork_gradient or 0.0)
    assert frozen.parameter_ratio is None


def test_integer_inputs_have_a_stream_with_gradients() -> None:
    class Words(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.work = nn.Embedding(11, 8), nn.Linear(8, 8)

        def forward(self, tokens: Tensor) -> Tensor:
            x = self.table(tokens)
            return x + torch.relu(self.work(x))

    flow = rc.gradient_flow(Words(), (torch.randint(0, 11, (2, 5)),))
    assert flow.blocks[0].fork_gradient


def test_a_model_without_a_float_output_is_refused() -> None:
    class Best(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.work = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return (x + self.work(x)).argmax(-1)

    with pytest.raises(RescompileError, match=r"There is no gradient: none of the model's outputs \(argmax\)"):
        rc.gradient_flow(Best(), (torch.randn(2, 8),))


def test_blocks_in_front_of_a_detached_value_have_no_gradient() -> None:
    class Cut(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            x = (x + self.one(x)).detach()
            x = x.sin()
            return x + self.two(x)

    flow = rc.gradient_flow(Cut(), (torch.randn(2, 8),))
    first, second = flow.blocks
    assert first.fork_gradient is None
    assert first.parameter_gradient is None
    assert second.fork_gradient
    assert flow.stream[0] is second or flow.stream[0].fork_gradient is None


def test_outputs_that_another_goes_beyond_add_nothing_to_the_loss() -> None:
    class Caches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))

        def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
            caches = []
            for layer in self.layers:
                caches.append(torch.tanh(x) * 2)
                x = x + layer(x)
            return x, caches

    flow = rc.gradient_flow(Caches(), (torch.randn(2, 8),))
    assert len(flow.outputs) == 1
    assert flow.blocks[-1].join_gradient == near(math.sqrt(16), 0.7)


def test_a_model_without_blocks_says_so() -> None:
    flow = rc.gradient_flow(nn.Linear(3, 3), (torch.randn(2, 3),))
    assert flow.blocks == ()
    assert flow.ratio is None
    assert "no residual block" in str(flow)


def test_values_that_are_not_finite_are_named_and_null_in_json() -> None:
    model = Two()
    with torch.no_grad():
        model.third.weight[0, 0] = math.inf
    flow = rc.gradient_flow(model, (torch.randn(4, 6),))
    assert "not finite" in flow.notes[-1]
    json.dumps(flow.to_dict(), allow_nan=False)


def test_data_that_does_not_fit_is_refused() -> None:
    model, x = Two(), torch.randn(4, 6)
    with pytest.raises(RescompileError, match="takes 1 inputs"):
        rc.gradient_flow(model, (x,), inputs=(x, x))
    with pytest.raises(RescompileError, match="no input 'z'"):
        rc.gradient_flow(model, (x,), inputs={"z": x})


# ---- the command line ------------------------------------------------------------------------------------------------


def call(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as left:
        main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return int(left.value.code or 0), captured.out, captured.err


def residual_model(op_type: str, folder: Path, batch: int | str = 4) -> Path:
    """y = x + Op(x·W) as a file."""
    nodes = [
        onnx.helper.make_node("MatMul", ["x", "w"], ["h"], name="work"),
        onnx.helper.make_node(op_type, ["h"], ["f"], name="branch_end"),
        onnx.helper.make_node("Add", ["x", "f"], ["y"], name="join"),
    ]
    weight = np.random.default_rng(0).standard_normal((4, 4)).astype(np.float32)
    path = folder / "model.onnx"
    onnx.save(model_of(nodes, {"x": (batch, 4)}, ["y"], {"w": weight}), path)
    return path


def test_inspect_prints_the_report_and_the_flow(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    status, out, err = call(capsys, "inspect", residual_model("Relu", tmp_path, "N"), "--gradients")
    assert (status, err) == (0, "")
    assert "1 residual blocks" in out
    assert "Gradient flow on random inputs, seed 0, N = 2, of y" in out
    assert "gradient norms:" in out


def test_inspect_json_holds_the_flow_on_given_data(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    model, data = residual_model("Relu", tmp_path), tmp_path / "data.npz"
    x = np.random.default_rng(1).standard_normal((4, 4)).astype(np.float32)
    np.savez(data, x=x)
    status, out, _ = call(capsys, "inspect", model, "--gradients", "--json", "--input-file", data)
    found = json.loads(out)
    assert status == 0
    assert found["schema"] == 1
    flow = found["gradients"]
    assert flow["inputs"] == "the given inputs"
    assert flow["blocks"][0]["variance"]["fork"] == near(float(x.var()))
    assert flow["ratio"]["join"] == 1.0
    status, _, err = call(capsys, "inspect", model, "--input-file", tmp_path / "none.npz")
    assert status == 1
    assert "Cannot read" in err


@pytest.mark.parametrize(("suffix", "magic"), [("png", b"\x89PNG"), ("svg", b"<?xml")])
def test_inspect_draws(suffix: str, magic: bytes, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    picture, page = tmp_path / f"flow.{suffix}", tmp_path / "report.html"
    model = residual_model("Relu", tmp_path)
    assert call(capsys, "inspect", model, "--plot", picture, "--html", page)[0] == 0
    first = picture.read_bytes()
    assert first.startswith(magic)
    assert page.read_text().count("<svg") == 1
    assert call(capsys, "inspect", model, "--plot", picture)[0] == 0
    assert picture.read_bytes() == first


def test_a_refused_flow_leaves_the_report(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    model, picture = residual_model("Trilu", tmp_path), tmp_path / "flow.png"
    status, out, err = call(capsys, "inspect", model, "--gradients", "--plot", picture)
    assert status == 1
    assert "1 residual blocks" in out
    assert "'branch_end' (" in err
    assert "no gradient goes through it" in err
    assert not picture.exists()
    status, out, _ = call(capsys, "inspect", model, "--gradients", "--json")
    assert status == 1
    assert "branch_end" in json.loads(out)["gradients"]["refused"]


def test_a_picture_of_no_known_format_is_refused_before_long_work(capsys: pytest.CaptureFixture[str]) -> None:
    status, _, err = call(capsys, "inspect", "no.model:at_all", "--plot", "flow.bmp")
    assert status == 1
    assert "neither" in err


def test_a_missing_matplotlib_is_named_before_long_work(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli_gradients, "find_spec", lambda name: None)
    status, _, err = call(capsys, "inspect", "no.model:at_all", "--plot", tmp_path / "flow.png")
    assert status == 1
    assert "rescompile[plot]" in err
