"""`rms-norm`, `fold-norm-affine` and `merge-norms`: the same values in both IRs; each condition with its twin."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import rescompile as rc
from rescompile.graph import Graph
from rescompile.rewriting import Result

IRS = ("fx", "onnx")
DTYPES = (torch.float32, torch.float64)
CASES = (("fx", torch.float32), ("fx", torch.float64), ("onnx", torch.float32))
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}
D = 8


def lively(model: nn.Module) -> nn.Module:
    """Weights with a mean, gains and biases that differ between features."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2 + 0.1)
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                buffer.normal_(0, 0.3, generator=generator)
            if name.endswith("running_var"):
                buffer.uniform_(0.5, 1.5, generator=generator)
    return model.eval()


def captured(model: nn.Module, inputs: tuple[torch.Tensor, ...], ir: str, **options: Any) -> Graph:
    model.eval()
    if ir == "fx":
        return rc.capture(model, inputs)
    return rc.capture(torch.onnx.export(model, inputs, dynamo=True, verbose=False, **options))


def tokens(width: int = D, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor]:
    return (torch.randn(2, 5, width, generator=torch.Generator().manual_seed(0)).to(dtype),)


def outputs(graph: Graph, inputs: tuple[torch.Tensor, ...]) -> list[np.ndarray[Any, Any]]:
    arrays = {value.name: tensor.numpy() for value, tensor in zip(graph.inputs, inputs, strict=True)}
    return list(graph.run(arrays).values())


def rewritten(
    model: nn.Module, inputs: tuple[torch.Tensor, ...], ir: str, spec: str, dtype: torch.dtype = torch.float32
) -> Result:
    """The result, which equals the original, is verified and is left alone by a second run."""
    model = lively(model).to(dtype)
    inputs = tuple(tensor.to(dtype) if tensor.is_floating_point() else tensor for tensor in inputs)
    graph = captured(model, inputs, ir)
    result = rc.rewrite(graph, spec)
    assert result.applied, result.refused
    assert not result.rolled_back, result.rolled_back
    assert result.verification.ok, result.verification
    for before, after in zip(outputs(graph, inputs), outputs(result.graph, inputs), strict=True):
        assert np.abs(before - after).max() <= TOLERANCE[dtype] * np.abs(before).max()
    assert not rc.plan(result.graph, spec).rewrites, "a second run finds nothing to do"
    return result


def refusals(model: nn.Module, inputs: tuple[torch.Tensor, ...], ir: str, spec: str) -> list[str]:
    """Why nothing is done."""
    plan = rc.plan(captured(lively(model), inputs, ir), spec)
    assert not plan.rewrites, plan
    return [refusal.reason for refusal in plan.refusals]


def kinds(graph: Graph) -> Counter[str]:
    return Counter(op.kind.value for op in graph)


# ---- models ----------------------------------------------------------------------------------------------------------


class Branch(nn.Module):
    """A feed-forward branch, its norm in front of it; `scale` is a LayerScale."""

    def __init__(self, width: int = D, *, scale: bool = False, bias: bool = True) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 2 * width, bias=bias)
        self.down = nn.Linear(2 * width, width, bias=bias)
        self.scale = nn.Parameter(torch.ones(width)) if scale else None
        self.dropout = nn.Dropout(0.1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.dropout(self.down(torch.relu(self.up(self.norm(x)))))
        return y if self.scale is None else y * self.scale


class Stack(nn.Module):
    """Pre-norm: a stem that writes the stream, branches, a final norm, a head."""

    def __init__(
        self, stem: nn.Module, *branches: nn.Module, final: nn.Module | None = None, factor: float = 1.0
    ) -> None:
        super().__init__()
        self.stem = stem
        self.branches = nn.ModuleList(branches)
        self.final = nn.LayerNorm(D) if final is None else final
        self.head = nn.Linear(D, 3)
        self.factor = factor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        for branch in self.branches:
            x = x + (branch(x) if self.factor == 1 else self.factor * branch(x))
        return self.head(self.final(x))


class Patches(nn.Module):
    """ViT: a convolution's channels as tokens, a class token before them, positions added."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Conv2d(3, D, 4, 4)
        self.token = nn.Parameter(torch.zeros(1, 1, D))
        self.positions = nn.Parameter(torch.zeros(1, 5, D))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.project(x).flatten(2).transpose(1, 2)
        return torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1) + self.positions


class Language(nn.Module):
    """Decoder-only: token and position tables, branches, a head that may be tied to the first table."""

    def __init__(self, *, tied: bool) -> None:
        super().__init__()
        self.words, self.positions = nn.Embedding(11, D), nn.Embedding(5, D)
        self.branches = nn.ModuleList([Branch(), Branch()])
        self.final, self.head = nn.LayerNorm(D), nn.Linear(D, 11, bias=False)
        if tied:
            self.head.weight = self.words.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.words(ids) + self.positions(torch.arange(5))
        for branch in self.branches:
            x = x + branch(x)
        return self.head(self.final(x))


class Shared(nn.Module):
    """ALBERT: one branch, three times."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.branch, self.final = nn.Linear(D, D), Branch(), nn.LayerNorm(D)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        for _ in range(3):
            x = x + self.branch(x)
        return self.final(x)


def encoder(**options: Any) -> nn.Module:
    layer = nn.TransformerEncoderLayer(D, 2, 16, batch_first=True, norm_first=True)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False, **options)


IDS = (torch.tensor([[1, 4, 7, 2, 9], [0, 3, 10, 5, 6]]),)
IMAGE = (torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)),)

# ---- rms-norm --------------------------------------------------------------------------------------------------------

# Model, inputs, norms, means taken off at run time.
CENTRED: dict[str, tuple[Any, tuple[torch.Tensor, ...], int, int]] = {
    "linear stem": (lambda: Stack(nn.Linear(D, D), Branch(), Branch()), tokens(), 3, 0),
    "patches, token and positions": (lambda: Stack(Patches(), Branch(), Branch()), IMAGE, 3, 0),
    "tables": (lambda: Language(tied=False), IDS, 3, 0),
    "table that the head reads too": (lambda: Language(tied=True), IDS, 3, 1),
    "stream that is given": (lambda: encoder(norm=nn.LayerNorm(D)), tokens(), 5, 1),
    "stem with an activation": (
        lambda: Stack(nn.Sequential(nn.Linear(D, D), nn.ReLU()), Branch(), Branch()), tokens(), 3, 1
    ),
    "LayerScale": (lambda: Stack(nn.Linear(D, D), Branch(scale=True), Branch(scale=True)), tokens(), 3, 0),
    "factor on the branch": (lambda: Stack(nn.Linear(D, D), Branch(), factor=0.5), tokens(), 2, 0),
    "no bias": (lambda: Stack(nn.Linear(D, D, bias=False), Branch(bias=False)), tokens(), 2, 0),
    "one branch three times": (Shared, tokens(), 4, 0),
    "norm that no skip passes": (lambda: nn.Sequential(nn.Linear(D, D), nn.LayerNorm(D)), tokens(), 1, 0),
    "norm without a gain": (
        lambda: nn.Sequential(nn.Linear(D, D), nn.LayerNorm(D, elementwise_affine=False)), tokens(), 1, 0
    ),
}  # fmt: skip


@pytest.mark.parametrize(("ir", "dtype"), CASES, ids=str)
@pytest.mark.parametrize("name", CENTRED)
def test_layer_norms_of_a_centred_stream_are_rms_norms(name: str, ir: str, dtype: torch.dtype) -> None:
    make, inputs, norms, means = CENTRED[name]
    if ir == "onnx" and name == "table that the head reads too":
        means = 0  # the exporter gives the head a transposed copy
    model = make()
    result = rewritten(model, inputs, ir, "rms-norm", dtype)
    assert not result.refused
    found = kinds(result.graph)
    assert (found["layer_norm"], found["rms_norm"], found["mean"]) == (0, norms, means)
    if ir == "fx":
        scales = {key for key in model.state_dict() if key.endswith(".scale")}
        assert set(result.model.state_dict()) == set(model.state_dict()) - scales, "other keys stay"


def test_onnx_in_double_precision() -> None:
    rewritten(encoder(norm=nn.LayerNorm(D)), tokens(), "onnx", "rms-norm", torch.float64)
    rewritten(Gated(nn.LayerNorm(D)), tokens(), "onnx", "fold-norm-affine", torch.float64)


@pytest.mark.parametrize("ir", IRS)
def test_writers_have_no_mean_afterwards(ir: str) -> None:
    result = rewritten(Stack(nn.Linear(D, D), Branch()), tokens(), ir, "rms-norm")
    assert result.key_map["stem.bias"] == ["stem.bias"]
    assert abs(result.graph.data(result.graph.value("stem.bias")).mean()) < 1e-7
    (stem,) = [op for op in result.graph if op.kind.value == "linear" and op.inputs[0] is result.graph.inputs[0]]
    weight = result.graph.data(stem.inputs[1])
    assert np.abs(weight.mean(0 if stem.attr("transpose_weight") else 1)).max() < 1e-7


def test_layer_scale_goes_into_the_weights() -> None:
    result = rewritten(Stack(nn.Linear(D, D), Branch(scale=True)), tokens(), "fx", "rms-norm")
    assert "branches.0.scale" not in result.model.state_dict()
    assert set(result.key_map["branches.0.scale"]) == {"branches.0.down.weight", "branches.0.down.bias"}
    assert kinds(result.graph)["mul"] == 0


@pytest.mark.parametrize("opset", [17, 18, 23])
def test_any_opset_has_the_norm(opset: int, tmp_path: Path) -> None:
    """One operator from opset 23 on, its parts before; both are read as an RMS norm again."""
    graph = captured(lively(Stack(nn.Linear(D, D), Branch())), tokens(), "onnx", opset_version=opset)
    result = rc.rewrite(graph, "rms-norm")
    assert result.verification.ok, result.verification
    result.save(tmp_path / "rms.onnx")
    again = rc.load(tmp_path / "rms.onnx")
    assert kinds(again)["rms_norm"] == 2
    np.testing.assert_allclose(outputs(again, tokens())[0], outputs(graph, tokens())[0], rtol=1e-4, atol=1e-5)


class Read(nn.Module):
    """A stack whose stream something else than a norm reads as well."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.stem, self.first, self.second = nn.Linear(D, D), Branch(), Branch()
        self.final, self.other = nn.LayerNorm(D), nn.Linear(D, D)
        self.square = nn.RMSNorm(D)
        self.how = how

    def forward(self, x: torch.Tensor) -> Any:
        x = self.stem(x)
        x = x + self.first(x)
        x = x + self.second(x)
        y = self.final(x)
        if self.how == "output":
            return y, x
        if self.how == "linear":
            return y + self.other(x)
        if self.how == "norm":
            return y + self.square(x)
        if self.how == "concat":
            return torch.cat([y, x], -1)
        return y


READ = {
    "output": "is an output of the graph",
    "linear": "(linear) reads 'add_1' with its mean",
    "norm": "(rms_norm) reads 'add_1' with its mean",
    "concat": "(concat) reads 'add_1' with its mean",
}


@pytest.mark.parametrize("ir", IRS)
@pytest.mark.parametrize("how", READ)
def test_raw_stream_that_is_read_elsewhere_keeps_the_mean(how: str, ir: str) -> None:
    reasons = refusals(Read(how), tokens(), ir, "rms-norm")
    assert all(READ[how] in reason for reason in reasons), reasons


@pytest.mark.parametrize("ir", IRS)
def test_raw_stream_that_norms_alone_read_has_none(ir: str) -> None:
    rewritten(Read("no"), tokens(), ir, "rms-norm")


@pytest.mark.parametrize("ir", IRS)
def test_post_norm_would_cost_what_it_saves(ir: str) -> None:
    layer = nn.TransformerEncoderLayer(D, 2, 16, batch_first=True, norm_first=False)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    reasons = refusals(model, tokens(), ir, "rms-norm")
    assert len(reasons) == 4
    assert all("as much as is saved" in reason for reason in reasons)


@pytest.mark.parametrize("ir", IRS)
def test_norm_over_two_axes_is_refused(ir: str) -> None:
    model = nn.Sequential(nn.Linear(D, D), nn.LayerNorm([5, D]))
    assert refusals(model, tokens(), ir, "rms-norm") == ["it normalises over several axes"]


@pytest.mark.parametrize("ir", IRS)
def test_grouped_convolution_cannot_be_centred(ir: str) -> None:
    class Grouped(nn.Module):
        def __init__(self, groups: int) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv1d(D, D, 1, groups=groups), nn.LayerNorm(D)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.norm(self.conv(x.transpose(1, 2)).transpose(1, 2))

    assert "has a mean that no weight holds" in refusals(Grouped(2), tokens(), ir, "rms-norm")[0]
    rewritten(Grouped(1), tokens(), ir, "rms-norm")


def test_training_form_keeps_layer_norms() -> None:
    graph = rc.capture(Stack(nn.Linear(D, D), Branch()).train(), tokens())
    plan = rc.plan(graph, "rms-norm")
    assert not plan.rewrites
    assert "in training" in plan.refusals[0].reason


def test_model_of_rms_norms_has_nothing_to_convert() -> None:
    assert refusals(nn.Sequential(nn.Linear(D, D), nn.RMSNorm(D)), tokens(), "fx", "rms-norm") == [
        "the model has no layer norm"
    ]


# ---- fold-norm-affine ------------------------------------------------------------------------------------------------


class Gated(nn.Module):
    """SwiGLU: two linears read the norm."""

    def __init__(self, norm: nn.Module, *, bias: bool = False) -> None:
        super().__init__()
        self.norm, self.gate, self.up = norm, nn.Linear(D, 6, bias=bias), nn.Linear(D, 6, bias=bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(x)
        return nn.functional.silu(self.gate(y)) * self.up(y)


class Channels(nn.Module):
    """A norm over channels, then a convolution."""

    def __init__(self, norm: nn.Module, **options: Any) -> None:
        super().__init__()
        self.norm, self.conv = norm, nn.Conv2d(4, 6, **options)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(self.norm(x))


class Pooled(nn.Module):
    """A norm, one token or the mean of all of them, a head."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.norm, self.head, self.how = nn.LayerNorm(D), nn.Linear(D, 3), how

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(x)
        return self.head(y[:, 0] if self.how == "token" else y.mean(1))


MAPS = (torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(0)),)

FOLDED: dict[str, tuple[Any, tuple[torch.Tensor, ...]]] = {
    "layer norm": (lambda: Gated(nn.LayerNorm(D), bias=True), tokens()),
    "layer norm, no bias behind it": (lambda: Gated(nn.LayerNorm(D)), tokens()),
    "layer norm without a bias": (lambda: Gated(nn.LayerNorm(D, bias=False)), tokens()),
    "RMS norm": (lambda: Gated(nn.RMSNorm(D)), tokens()),
    "one token": (lambda: Pooled("token"), tokens()),
    "mean of tokens": (lambda: Pooled("mean"), tokens()),
    "group norm": (lambda: Channels(nn.GroupNorm(2, 4), kernel_size=1), MAPS),
    "group norm, strided": (lambda: Channels(nn.GroupNorm(2, 4), kernel_size=3, stride=2), MAPS),
    "group norm, grouped convolution": (lambda: Channels(nn.GroupNorm(2, 4), kernel_size=3, groups=2), MAPS),
    "instance norm": (lambda: Channels(nn.InstanceNorm2d(4, affine=True), kernel_size=1), MAPS),
}


@pytest.mark.parametrize(("ir", "dtype"), CASES, ids=str)
@pytest.mark.parametrize("name", FOLDED)
def test_gain_and_bias_go_into_what_reads_the_norm(name: str, ir: str, dtype: torch.dtype) -> None:
    make, inputs = FOLDED[name]
    result = rewritten(make(), inputs, ir, "fold-norm-affine", dtype)
    (norm,) = [op for op in result.graph if op.kind.value.endswith("_norm")]
    assert norm.inputs[1:] == [None] * len(norm.inputs[1:])


def test_parts_of_a_norm_in_double_precision_stay_with_a_gain_of_one() -> None:
    """They may round between, as those of many models do."""
    result = rewritten(Gated(nn.RMSNorm(D)), tokens(), "onnx", "fold-norm-affine", torch.float64)
    (norm,) = [op for op in result.graph if op.kind.value == "rms_norm"]
    assert (result.graph.data(norm.inputs[1]) == 1).all()


@pytest.mark.parametrize("ir", IRS)
@pytest.mark.parametrize("groups", [1, 2])
def test_batch_norm_goes_as_a_whole(groups: int, ir: str) -> None:
    result = rewritten(Channels(nn.BatchNorm2d(4), kernel_size=3, groups=groups), MAPS, ir, "fold-norm-affine")
    assert kinds(result.graph) == {"conv": 1}


def test_folding_computes_the_formula() -> None:
    model = Gated(nn.LayerNorm(D))
    result = rewritten(model, tokens(), "fx", "fold-norm-affine", torch.float64)
    state = result.model.state_dict()
    gamma, beta, weight = (tensor.detach() for tensor in (model.norm.weight, model.norm.bias, model.up.weight))
    torch.testing.assert_close(state["up.weight"], weight * gamma, rtol=1e-14, atol=0.0)
    torch.testing.assert_close(state["up.bias"], weight @ beta, rtol=1e-13, atol=1e-15)
    assert result.key_map["norm.bias"] == ["gate.bias", "up.bias"]
    assert result.key_map["up.weight"] == ["up.weight", "up.bias"]
    assert result.key_map["norm.weight"] == ["gate.weight", "up.weight"]
    assert not [key for key in state if key.startswith("norm.")]


@pytest.mark.parametrize("ir", IRS)
def test_border_of_zeros_keeps_the_bias_out(ir: str) -> None:
    model = Channels(nn.GroupNorm(2, 4), kernel_size=3, padding=1)
    assert "border of zeros" in refusals(model, MAPS, ir, "fold-norm-affine")[0]


def test_gain_alone_passes_a_border_of_zeros() -> None:
    graph = captured(lively(Channels(nn.GroupNorm(2, 4), kernel_size=3, padding=1)), MAPS, "fx")
    graph.set_data(graph.value("norm.bias"), np.zeros(4, "float32"))
    result = rc.rewrite(graph, "fold-norm-affine")
    assert result.applied
    assert result.verification.ok, result.verification


class Elsewhere(nn.Module):
    """A norm that a linear reads, and something else."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.norm, self.linear, self.other = nn.LayerNorm(D), nn.Linear(D, D), nn.LayerNorm(D)
        self.how = how

    def forward(self, x: torch.Tensor) -> Any:
        y = self.norm(x)
        z = self.linear(y)
        if self.how == "sum":
            return z + y
        if self.how == "output":
            return z, y
        if self.how == "weights":
            return z, self.linear(x)
        if self.how == "softmax":
            return z + y.softmax(-1)
        return z


ELSEWHERE = {
    "sum": "(add) reads it, which cannot take its gain",
    "output": "is an output of the graph",
    "weights": "also reads the weight of",
    "softmax": "(softmax) reads it",
}


@pytest.mark.parametrize("ir", IRS)
@pytest.mark.parametrize("how", ELSEWHERE)
def test_norm_that_more_than_linears_read_keeps_its_gain(how: str, ir: str) -> None:
    reasons = refusals(Elsewhere(how), tokens(), ir, "fold-norm-affine")
    assert ELSEWHERE[how] in reasons[0]


@pytest.mark.parametrize("ir", IRS)
def test_norm_that_one_linear_reads_does_not(ir: str) -> None:
    rewritten(Elsewhere("no"), tokens(), ir, "fold-norm-affine")


@pytest.mark.parametrize("ir", IRS)
def test_shared_weights_are_copied_on_request(ir: str) -> None:
    result = rewritten(Elsewhere("weights"), tokens(), ir, "fold-norm-affine{copy=true}")
    assert "copies of 64 parameters" in result.applied[0].reason


def test_head_tied_to_a_table_keeps_the_gain_before_it() -> None:
    result = rewritten(Language(tied=True), IDS, "fx", "fold-norm-affine")
    (refused,) = result.refused
    assert "also reads the weight of" in refused.reason
    assert "88 parameters (copy=true)" in refused.reason


@pytest.mark.parametrize("ir", IRS)
def test_one_branch_three_times_is_folded_once(ir: str) -> None:
    result = rewritten(Shared(), tokens(), ir, "fold-norm-affine")
    (applied,) = result.applied
    assert "with 2 more norms" in applied.reason
    before, after = result.costs
    assert after.parameters == before.parameters - 2 * D


def test_a_sole_gain_of_one_is_nothing_to_fold() -> None:
    graph = rc.capture(Gated(nn.LayerNorm(D)).eval(), tokens())
    plan = rc.plan(graph, "fold-norm-affine")
    assert not plan.rewrites
    assert plan.refusals[0].reason == "its gain is one and its bias zero already"


def test_batch_norm_in_training_is_refused() -> None:
    graph = rc.capture(Channels(nn.BatchNorm2d(4), kernel_size=3).train(), MAPS)
    plan = rc.plan(graph, "fold-norm-affine")
    assert not plan.rewrites
    assert "batch's own" in plan.refusals[0].reason


def test_training_form_is_folded_right() -> None:
    model = lively(Gated(nn.LayerNorm(D))).train()
    graph = rc.capture(model, tokens())
    result = rc.rewrite(graph, "fold-norm-affine")
    assert result.applied
    with torch.no_grad():
        torch.testing.assert_close(result.model(*tokens()), model(*tokens()), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("ir", IRS)
def test_folded_then_converted_is_a_stack_of_bare_rms_norms(ir: str, tmp_path: Path) -> None:
    model, inputs = lively(Stack(nn.Linear(D, D), Branch(), Branch())), tokens()
    graph = captured(model, inputs, ir)
    result = rc.rewrite(graph, ["fold-norm-affine", "rms-norm"])
    assert result.verification.ok, result.verification
    assert all(op.operand("weight") is None for op in result.graph if op.kind.value == "rms_norm")
    assert kinds(result.graph)["add"] == 2
    path = tmp_path / ("model.onnx" if ir == "onnx" else "model.pt2")
    result.save(path)
    again = rc.load(path, trust=True)
    np.testing.assert_allclose(outputs(again, inputs)[0], outputs(graph, inputs)[0], rtol=1e-4, atol=1e-5)
    assert not rc.plan(again, ["fold-norm-affine", "rms-norm"]).rewrites


# ---- merge-norms -----------------------------------------------------------------------------------------------------


def constant(norm: nn.Module, gain: float, bias: float | None = None) -> nn.Module:
    nn.init.constant_(norm.weight, gain)
    if bias is not None:
        nn.init.constant_(norm.bias, bias)
    return norm


def bare(**options: Any) -> nn.LayerNorm:
    return nn.LayerNorm(D, elementwise_affine=False, **options)


def of(second: nn.Module) -> nn.Module:
    """A norm whose gain differs between features."""
    return lively(second)


PAIRS: dict[str, Any] = {
    "bare before a gain": lambda: nn.Sequential(bare(), of(nn.LayerNorm(D))),
    "both bare": lambda: nn.Sequential(bare(), bare()),
    "large eps": lambda: nn.Sequential(bare(eps=0.5), of(nn.LayerNorm(D, eps=0.25))),
    "one number as gain and as bias": lambda: nn.Sequential(constant(nn.LayerNorm(D), -2.0, 3.0), of(nn.LayerNorm(D))),
    "RMS norms": lambda: nn.Sequential(nn.RMSNorm(D, eps=0.1, elementwise_affine=False), of(nn.RMSNorm(D, eps=0.2))),
    "RMS behind layer norm": lambda: nn.Sequential(bare(eps=0.1), of(nn.RMSNorm(D, eps=0.2))),
    "three": lambda: nn.Sequential(bare(eps=0.1), constant(nn.LayerNorm(D, eps=0.2), 2.0, 1.0), of(nn.LayerNorm(D))),
    "view between": lambda: nn.Sequential(bare(), nn.Flatten(0, 1), of(nn.LayerNorm(D))),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("ir", IRS)
@pytest.mark.parametrize("name", PAIRS)
def test_norm_of_a_norm_is_one_norm(name: str, ir: str, dtype: torch.dtype) -> None:
    model, inputs = PAIRS[name]().eval().to(dtype), tokens(dtype=dtype)
    graph = captured(model, inputs, ir)
    result = rc.rewrite(graph, "merge-norms")
    assert result.applied, result.refused
    assert not result.refused
    assert result.verification.ok, result.verification
    before, after = outputs(graph, inputs)[0], outputs(result.graph, inputs)[0]
    assert np.abs(before - after).max() <= TOLERANCE[dtype] * np.abs(before).max()
    assert sum(count for kind, count in kinds(result.graph).items() if kind.endswith("_norm")) == 1
    assert not rc.plan(result.graph, "merge-norms").rewrites


def test_eps_and_gain_follow_the_formula() -> None:
    graph = captured(nn.Sequential(constant(nn.LayerNorm(D, eps=0.5), 3.0, 1.0), bare(eps=0.25)), tokens(), "fx")
    result = rc.rewrite(graph, "merge-norms")
    (norm,) = list(result.graph)
    assert math.isclose(norm.attr("eps"), 0.5 * 0.25 / (9 + 0.25))
    np.testing.assert_allclose(result.graph.data(norm.inputs[1]), 3 / math.sqrt(9.25), rtol=1e-6)


@pytest.mark.parametrize("ir", IRS)
def test_group_norms_of_as_many_groups_merge(ir: str) -> None:
    first, second = nn.GroupNorm(2, 4, affine=False, eps=0.1), of(nn.GroupNorm(2, 4))
    result = rc.rewrite(captured(nn.Sequential(first, second), MAPS, ir), "merge-norms")
    assert result.applied
    assert result.verification.ok, result.verification
    other = nn.Sequential(nn.GroupNorm(4, 4, affine=False), nn.GroupNorm(2, 4))
    assert "other statistics" in rc.plan(captured(other, MAPS, ir), "merge-norms").refusals[0].reason


KEPT: dict[str, tuple[Any, str]] = {
    "gain": (lambda: nn.Sequential(of(nn.LayerNorm(D)), nn.LayerNorm(D)), "its gain differs between features"),
    "bias": (
        lambda: nn.Sequential(constant(nn.LayerNorm(D), 1.0), nn.RMSNorm(D, elementwise_affine=False)),
        "its bias is a mean",
    ),
    "mean": (
        lambda: nn.Sequential(nn.RMSNorm(D, elementwise_affine=False), nn.LayerNorm(D)),
        "takes other statistics",
    ),
    "nothing": (
        lambda: constant(nn.LayerNorm(D), 0.0) and nn.Sequential(constant(nn.LayerNorm(D), 0.0), bare()),
        "zero",
    ),
}


@pytest.mark.parametrize("ir", IRS)
@pytest.mark.parametrize("name", KEPT)
def test_norm_that_another_does_not_stand_for_stays(name: str, ir: str) -> None:
    make, reason = KEPT[name]
    model = make()
    if name == "bias":
        nn.init.constant_(model[0].bias, 0.5)
    plan = rc.plan(captured(model, tokens(), ir), "merge-norms")
    assert not plan.rewrites
    assert reason in plan.refusals[0].reason


@pytest.mark.parametrize("ir", IRS)
def test_norm_that_something_else_reads_stays(ir: str) -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = bare(), nn.LayerNorm(D)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.first(x)
            return y + self.second(y)

    assert "more than" in refusals(Twice(), tokens(), ir, "merge-norms")[0]


def test_gain_that_is_trained_stays() -> None:
    model = nn.Sequential(nn.LayerNorm(D), nn.LayerNorm(D), nn.Dropout(0.1)).train()
    assert "are trained" in rc.plan(rc.capture(model, tokens()), "merge-norms").refusals[0].reason
    model = nn.Sequential(bare(), nn.LayerNorm(D), nn.Dropout(0.1)).train()
    assert rc.plan(rc.capture(model, tokens()), "merge-norms").rewrites


# ---- models that people have -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("ir", IRS)
def test_gpt2_of_transformers(ir: str) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        vocab_size=20, n_positions=8, n_embd=D, n_layer=2, n_head=2, use_cache=False, bos_token_id=0, eos_token_id=0
    )

    class Logits(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = transformers.GPT2LMHeadModel(config)

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.model(ids).logits

    result = rewritten(Logits(), IDS, ir, "rms-norm", torch.float64)
    assert kinds(result.graph)["rms_norm"] == 5
    result = rewritten(Logits(), IDS, ir, "fold-norm-affine", torch.float64)
    assert len(result.applied) == (4 if ir == "fx" else 5)
