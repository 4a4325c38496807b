"""`merge-branches` and `fold-scale`: exact in both IRs; each condition with its twin that must not fire."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import rescompile as rc
from rescompile.graph import Graph, Value, ValueType
from rescompile.kinds import OpKind as K
from rescompile.passes.bias import hoisted_bias
from rescompile.passes.fold_batch_norm import FoldBatchNorm
from rescompile.passes.fold_scale import FoldScale
from rescompile.passes.fuse import Fuse
from rescompile.passes.merge_affine import MergeBranches
from rescompile.plans import Plan, region_edit
from rescompile.rewriting import Result, make_plan
from tests.test_fuse import Build

C = 4
IMAGE = (1, C, 6, 6)
TOKENS = (2, 5, C)
IRS = ("fx", "onnx", "onnx optimised")


def captured(model: nn.Module, inputs: tuple[torch.Tensor, ...], ir: str) -> Graph:
    model.eval()
    if ir == "fx":
        return rc.capture(model, inputs)
    optimize = ir == "onnx optimised"
    return rc.capture(torch.onnx.export(model, inputs, dynamo=True, verbose=False, optimize=optimize))


def rewritten(model: nn.Module, inputs: tuple[torch.Tensor, ...], ir: str, *passes: Any) -> Result:
    """Verified on random and adversarial inputs within 1e-5 (float64: 1e-12), and the plan survives JSON."""
    result = rc.rewrite(captured(model, inputs, ir), list(passes))
    assert result.verification.ok, result.verification
    assert not result.verification.vacuous
    assert not result.rolled_back
    limit = 1e-12 if inputs[0].dtype == torch.float64 else 1e-5
    assert all(check.difference <= limit for check in result.verification.checks if not check.note)
    assert Plan.from_json(result.plan.to_json()).rewrites
    return result


def planned(graph: Graph, item: Any) -> tuple[Plan, Graph, list[str]]:
    plan, after = make_plan(graph, [item])
    return plan, after, [op.kind.value for op in after]


def drawn(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=dtype)


def lively(model: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(1)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1, generator=generator)
            module.running_var.uniform_(0.7, 1.3, generator=generator)
            nn.init.uniform_(module.weight, 0.5, 1.5, generator=generator)
            nn.init.normal_(module.bias, 0, 0.2, generator=generator)
    return model.eval()


# ---- branches -----------------------------------------------------------------------------------------------------


def conv(inputs: int, outputs: int, kernel: int = 3, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, **options)


def normed(*args: Any, **options: Any) -> nn.Sequential:
    convolution = conv(*args, bias=False, **options)
    return nn.Sequential(convolution, nn.BatchNorm2d(convolution.out_channels))


class Mixer(nn.Module):
    """x + λ⊙(Σ convᵢ(x) − BN(x)): RepMixer of FastViT (Vasu et al. 2023, section 3.1)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.large, self.small = normed(width, width, groups=width), normed(width, width, 1, groups=width)
        self.norm = nn.BatchNorm2d(width)
        self.scale = nn.Parameter(torch.full((width, 1, 1), 0.3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.scale * (self.large(x) + self.small(x) - self.norm(x))


class Vgg(nn.Module):
    """relu(BN(conv₃(x)) + BN(conv₁(x)) + BN(x)), the last where shapes allow."""

    def __init__(self, before: int, after: int, stride: int = 1) -> None:
        super().__init__()
        self.large, self.small = normed(before, after, stride=stride), normed(before, after, 1, stride=stride)
        self.norm = nn.BatchNorm2d(before) if before == after and stride == 1 else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.large(x) + self.small(x)
        return torch.relu(y if self.norm is None else y + self.norm(x))


class Token(nn.Module):
    """BN(conv₃(x) + conv₁(x) + x), the token mixer of RepViT: the norm reads the sum."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.large, self.small = normed(width, width, groups=width), conv(width, width, 1, groups=width)
        self.norm = nn.BatchNorm2d(width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.norm(self.large(x) + self.small(x) + x))


class Dirac(nn.Module):
    """relu(conv(x) + a⊙x) with one factor a channel (Zagoruyko and Komodakis 2017)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.work, self.a = conv(width, width), nn.Parameter(torch.rand(width, 1, 1) + 0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.work(x) + self.a * x)


def branches() -> nn.Sequential:
    return nn.Sequential(Vgg(3, 8, 2), Vgg(8, 8), Mixer(8), Token(8), Dirac(8))


@pytest.mark.parametrize("ir", IRS)
def test_networks_of_re_parameterisation_become_plain_stacks(ir: str) -> None:
    model = lively(branches())
    result = rewritten(model, (drawn(2, 3, 12, 12),), ir, "fuse")
    left = [op.kind.value for op in result.graph]
    assert left == ["conv", "relu", "conv", "relu", "conv", "conv", "relu", "conv", "relu"]
    assert not result.refused
    before, after = result.costs
    assert after.parameters < before.parameters
    assert after.flops < before.flops
    assert not rc.rewrite(result.graph, "fuse").applied, "idempotent"
    if ir == "fx":  # what becomes of each parameter, through several stages
        assert all(heirs for name, heirs in result.key_map.items() if "num_batches" not in name)
        assert {"0.large.0.weight_merged", "0.large.0.bias_merged"} == set(result.key_map["0.large.1.weight"])


def test_merging_and_folding_are_exact_in_double_precision() -> None:
    rewritten(lively(branches().double()), (drawn(2, 3, 12, 12, dtype=torch.float64),), "fx", "fuse")


class Sum(nn.Module):
    """Σ branches of the input."""

    def __init__(self, *branches: nn.Module) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branches)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.stack([branch(x) for branch in self.branches]).sum(0) if not self.branches else self.total(x)

    def total(self, x: torch.Tensor) -> torch.Tensor:
        y = self.branches[0](x)
        for branch in self.branches[1:]:
            y = y + branch(x)
        return y


@pytest.mark.parametrize(
    ("name", "parts", "merges"),
    [
        ("an identity costs a 3×3 nothing", [conv(8, 8), nn.Identity()], True),
        ("an identity costs a depthwise convolution nothing", [conv(8, 8, groups=8), nn.Identity()], True),
        ("an average pool is a convolution", [conv(8, 8), nn.AvgPool2d(3, 1, 1)], True),
        ("a low rank added to a full one", [conv(8, 8, 1), nn.Sequential(conv(8, 2, 1), conv(2, 8, 1))], True),
        (
            "depthwise and pointwise in a row",
            [nn.Sequential(conv(8, 8, groups=8), conv(8, 8, 1)), nn.Identity()],
            False,
        ),
        ("a low rank alone", [nn.Sequential(conv(8, 2, 1), conv(2, 8, 1)), nn.Identity()], False),
        ("groups without a common divisor", [conv(6, 6, groups=2), conv(6, 6, groups=3)], False),
        ("dilated beside dense", [conv(8, 8), nn.Conv2d(8, 8, 3, padding=2, dilation=2)], False),
    ],
)
def test_what_would_take_more_operations_is_refused_with_the_numbers(
    name: str, parts: list[nn.Module], merges: bool
) -> None:
    width = 6 if "divisor" in name else 8
    graph = rc.capture(Sum(*parts).eval(), (drawn(1, width, 9, 9),))
    result = rc.rewrite(graph, ["merge-branches"])
    assert bool(result.applied) == merges
    assert result.verification.ok
    before, after = result.costs
    assert after.flops <= before.flops
    if not merges:
        (refusal,) = result.refused
        assert "one map takes more: parameters" in refusal.reason
        assert "FLOPs" in refusal.reason
        grown = rc.rewrite(graph, ["merge-branches{growth=40}"])
        assert len(grown.applied) == 1, "the option allows it"
        assert grown.verification.ok


def test_pool_that_divides_by_less_at_the_border_is_refused() -> None:
    pool = nn.AvgPool2d(3, 1, 1, count_include_pad=False)
    (refusal,) = rc.rewrite(rc.capture(Sum(conv(8, 8), pool).eval(), (drawn(1, 8, 9, 9),)), "merge-branches").refused
    assert "divides by fewer elements at the border" in refusal.reason


def test_dynamic_extents_are_compared_by_cost_too() -> None:
    dim = torch.export.Dim.AUTO
    model = nn.Sequential(lively(Vgg(3, 8, 2)), Sum(nn.Sequential(conv(8, 8, groups=8), conv(8, 8, 1)), nn.Identity()))
    result = rc.rewrite(rc.capture(model.eval(), (drawn(2, 3, 12, 12),), dynamic=({2: dim, 3: dim},)), "merge-branches")
    assert len(result.applied) == 1
    assert "takes more" in result.refused[0].reason
    assert result.verification.ok


def affine_sum(build: Build, spoil: str = "") -> Graph:
    """conv(x) + BN(x) + x behind a relu."""
    x = build.op("relu", K.RELU, build.x)
    y = build.conv("conv", x)
    if spoil == "an activation between":
        y = build.op("inner", K.RELU, y)
    z = build.norm("bn", x)
    if spoil == "a stride":
        y = build.op("half", K.SLICE, y, axes=(2,), starts=(0,), stops=(6,), steps=(2,))
        y.shape = (1, C, 3, 6)
        z = build.op("rows", K.SLICE, z, axes=(2,), starts=(0,), stops=(3,), steps=(1,))
        z.shape = x.shape = (1, C, 3, 6)
    out = build.op("sum", K.ADD, build.op("first", K.ADD, y, z), x)
    return build.done(*[out, *([y] if spoil == "read elsewhere" else [])])


def test_sum_of_affine_maps_becomes_one() -> None:
    plan, _, kinds = planned(affine_sum(Build(IMAGE)), MergeBranches())
    assert kinds == ["relu", "conv"]
    assert "FLOPs" in plan.rewrites[0].reason
    assert not plan.refusals


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [("an activation between", ""), ("read elsewhere", "output of the graph"), ("a stride", "part")],
)
def test_sum_that_is_no_one_map_stays(spoil: str, reason: str) -> None:
    plan, _, kinds = planned(affine_sum(Build(IMAGE), spoil), MergeBranches())
    assert "add" in kinds
    if spoil == "an activation between":  # what lies before it still meets: BN(x) + x has no contraction
        assert not plan.rewrites
        return
    assert any(reason in refusal.reason for refusal in plan.refusals), plan


def test_identity_in_half_precision_stays_apart() -> None:
    build = Build(IMAGE)
    graph = affine_sum(build)
    for value in graph.values:
        value.dtype = "float16"
    plan, _, _ = planned(graph, MergeBranches())
    assert "rounds what is small in W" in plan.refusals[0].reason


def test_training_form_is_refused() -> None:
    model = nn.Sequential(Vgg(3, 3), Mixer(3)).train()
    result = rc.rewrite(rc.capture(model, (drawn(2, 3, 8, 8),)), ["merge-branches", "fold-scale"], verify=False)
    assert not result.applied
    assert {refusal.pass_name for refusal in result.refused} == {"merge-branches", "fold-scale"}
    assert all("in training" in refusal.reason for refusal in result.refused)


@settings(max_examples=12, deadline=None, derandomize=True)
@given(st.data())
def test_random_sets_of_affine_branches_merge_exactly(data: st.DataObject) -> None:
    width = data.draw(st.sampled_from([4, 6]))
    depthwise = data.draw(st.booleans())
    groups = width if depthwise else 1
    parts: list[nn.Module] = [conv(width, width, 5, groups=groups)]
    makers = {
        "identity": nn.Identity,
        "norm": lambda: nn.BatchNorm2d(width),
        "small": lambda: normed(width, width, 1, groups=groups),
        "equal": lambda: normed(width, width, 3, groups=groups),
        "pool": lambda: nn.AvgPool2d(3, 1, 1),
        "dilated": lambda: nn.Conv2d(width, width, 3, padding=2, dilation=2, groups=groups, bias=False),
        "normed pool": lambda: nn.Sequential(nn.AvgPool2d(5, 1, 2), nn.BatchNorm2d(width)),
    }
    for kind in data.draw(st.lists(st.sampled_from(sorted(makers)), min_size=1, max_size=4)):
        parts.insert(data.draw(st.integers(0, len(parts))), makers[kind]())
    model = lively(nn.Sequential(Sum(*parts), nn.ReLU())).double()
    result = rewritten(model, (drawn(2, width, 7, 7, dtype=torch.float64),), "fx", "merge-branches")
    assert [op.kind.value for op in result.graph] == ["conv", "relu"]
    before, after = result.costs
    assert after.flops <= before.flops


# ---- scales -------------------------------------------------------------------------------------------------------


class Images(nn.Module):
    """Every spelling of a constant factor beside a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = conv(6, 6), conv(6, 6, bias=False), conv(6, 6)
        self.up = nn.ConvTranspose2d(6, 6, 3, padding=1, groups=3)
        self.norm, self.valid = nn.BatchNorm2d(6), nn.Conv2d(6, 6, 3, groups=2)
        self.one, self.two = conv(6, 6, 1), conv(6, 6)
        self.gamma = nn.Parameter(torch.rand(6, 1, 1) - 0.5)
        self.delta = nn.Parameter(torch.rand(1, 6, 1, 1) + 0.5)
        self.alpha = nn.Parameter(torch.tensor(0.3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(x)
        x = x + torch.dropout(self.first(x), 0.1, False) * self.gamma
        x = torch.relu(x)
        x = torch.add(x, torch.relu(self.second(x)) / self.delta, alpha=0.5)
        x = torch.relu(self.up(torch.tanh(x)) * self.delta + 0.25) + self.alpha * torch.tanh(x)
        x = torch.tanh(x)
        y = torch.relu(x * self.delta)
        x = self.one(y) + torch.tanh(self.two(y))
        x = self.valid(self.norm(torch.tanh(x)))
        return torch.tanh(x) - self.third(torch.tanh(x)) * 0.1


@pytest.mark.parametrize("ir", IRS)
def test_factors_beside_convolutions_go_into_them(ir: str) -> None:
    result = rewritten(lively(Images()), (drawn(2, 6, 8, 8),), ir, "fold-scale")
    left = [op.kind.value for op in result.graph]
    assert left.count("div") == left.count("batch_norm") == 0
    assert left.count("mul") == 1, "alpha scales an activation that others read"
    assert [str(refusal) for refusal in result.refused if "tanh" not in refusal.reason] == []
    assert all(scale == 1 for op in result.graph if op.kind is K.ADD for scale in op.scales)


class Rows(nn.Module):
    """The same beside linears: LayerScale, Affine of ResMLP, gains of norms."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(6)
        self.up, self.down, self.out = nn.Linear(6, 8), nn.Linear(8, 6), nn.Linear(6, 6, bias=False)
        self.conv = nn.Conv2d(6, 6, 1)
        self.gain, self.shift = nn.Parameter(torch.rand(6) + 0.5), nn.Parameter(torch.rand(6))
        self.gamma, self.image = nn.Parameter(torch.rand(6)), nn.Parameter(torch.rand(6, 1, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.gamma * self.down(nn.functional.gelu(self.up(torch.addcmul(self.shift, self.gain, x))))
        x = x + (self.out(self.norm(x) * self.gamma * 2.0) / 3.0)
        y = torch.tanh(x).transpose(1, 2).reshape(-1, 6, 2, 2)
        y = self.conv(y).flatten(2) * self.image.flatten(1)
        return x + y.transpose(1, 2)


@pytest.mark.parametrize("ir", IRS)
def test_factors_beside_linears_go_into_them(ir: str) -> None:
    result = rewritten(Rows(), (drawn(2, 4, 6),), ir, "fold-scale")
    left = [op.kind.value for op in result.graph]
    assert left.count("mul") == left.count("div") == 0
    assert left.count("add") == 3
    assert not result.refused


def test_folding_is_exact_in_double_precision() -> None:
    rewritten(lively(Images().double()), (drawn(2, 6, 8, 8, dtype=torch.float64),), "fx", "fold-scale")
    rewritten(Rows().double(), (drawn(2, 4, 6, dtype=torch.float64),), "fx", "fold-scale")


def test_sum_with_a_layer_scale_fuses() -> None:
    build = Build(TOKENS)
    h = build.linear("down", build.op("gelu", K.GELU, build.linear("up", build.x)))
    scaled = build.op("scaled", K.MUL, h, build.weight("gamma", C))
    plan, after, kinds = planned(build.done(build.op("sum", K.ADD, build.x, scaled)), Fuse())
    assert kinds == ["linear", "gelu", "fused_linear"]
    np.testing.assert_allclose(
        after.data(after.value("down.weight_folded")),
        build.graph.data(build.graph.value("down.weight")) * build.graph.data(build.graph.value("gamma"))[:, None],
        rtol=1e-6,
    )
    assert not plan.refusals


class Net(Build):
    """One factor between two values, spoiled in one way."""

    def constant(self, *shape: int, value: float | None = None) -> Value:
        data = np.full(shape, value, "float32") if value is not None else self.rng.uniform(0.5, 1.5, shape)
        return self.graph.add_constant(f"c{len(self.graph.parameters)}", shape, "float32", data.astype("float32"))


def refusals(build: Build, *outputs: Value, **options: Any) -> str:
    plan, _, _ = planned(build.done(*outputs), FoldScale(**options))
    assert not plan.rewrites
    (refusal,) = plan.refusals
    return refusal.reason


def test_factor_behind_an_activation_stays() -> None:
    b = Net(IMAGE)
    y = b.op("mul", K.MUL, b.op("gelu", K.GELU, b.conv("conv", b.x)), b.constant(C, 1, 1))
    assert "'gelu' (gelu) lies between" in refusals(b, b.op("out", K.ADD, b.x, y))


@pytest.mark.parametrize("value", [-0.5, 0.5])
def test_a_rectifier_lets_only_positive_factors_pass(value: float) -> None:
    b = Net(IMAGE)
    y = b.op("mul", K.MUL, b.op("relu", K.RELU, b.conv("conv", b.x)), b.constant(C, 1, 1, value=value))
    plan, _, _ = planned(b.done(b.op("out", K.ADD, b.x, y)), FoldScale())
    assert len(plan.rewrites) == (value > 0)
    assert all("only positive factors" in refusal.reason for refusal in plan.refusals)


def test_value_that_is_read_unscaled_stays() -> None:
    b = Net(IMAGE)
    work = b.conv("conv", b.x)
    reason = refusals(b, b.op("out", K.ADD, b.op("mul", K.MUL, work, b.constant(C, 1, 1)), work))
    assert "'conv' is also read elsewhere" in reason


def test_value_that_is_an_output_stays() -> None:
    b = Net(IMAGE)
    work = b.conv("conv", b.x)
    assert "'conv' is also read elsewhere: it is an output" in refusals(
        b, b.op("mul", K.MUL, work, b.constant(C, 1, 1)), work
    )


def test_shift_before_a_border_of_zeros_stays_and_a_factor_goes() -> None:
    b = Net(IMAGE)
    y = b.conv("conv", b.op("shift", K.ADD, b.op("tanh", K.TANH, b.x), b.constant(C, 1, 1)))
    assert "border of zeros, which the shift does not reach" in refusals(b, y)
    b = Net(IMAGE)
    y = b.conv("conv", b.op("mul", K.MUL, b.op("tanh", K.TANH, b.x), b.constant(C, 1, 1)))
    assert planned(b.done(y), FoldScale())[2] == ["tanh", "conv"]


def test_norm_before_a_border_of_zeros_stays() -> None:
    b = Net(IMAGE)
    assert "border of zeros" in refusals(b, b.conv("conv", b.norm("bn", b.op("tanh", K.TANH, b.x))))


def test_factor_over_another_axis_stays() -> None:
    b = Net((1, C, C, C))
    y = b.op("mul", K.MUL, b.conv("conv", b.x), b.constant(C))
    assert "other features than those of the factor" in refusals(b, b.op("out", K.ADD, b.x, y))


def test_factor_for_each_position_is_no_place_for_the_pass() -> None:
    b = Net(IMAGE)
    y = b.op("mul", K.MUL, b.conv("conv", b.x), b.constant(C, 6, 6))
    plan, _, _ = planned(b.done(b.op("out", K.ADD, b.x, y)), FoldScale())
    assert not plan.rewrites
    assert not plan.refusals


def test_shared_weight_stays_or_is_copied() -> None:
    def net() -> tuple[Net, Value]:
        b = Net(IMAGE)
        first = b.conv("conv", b.x)
        weight = b.graph.value("conv.weight")
        h = b.op("relu", K.RELU, first)
        second = b.op("again", K.CONV, h, weight, None, pads=(1, 1, 1, 1))
        return b, b.op("out", K.ADD, b.op("mul", K.MUL, second, b.constant(C, 1, 1)), b.x)

    reason = refusals(*net())
    assert "'conv' also reads the weight of 'again' as it is; a copy would cost 144 parameters (copy=true)" in reason
    b, out = net()
    _, after, kinds = planned(b.done(out), FoldScale(copy=True))
    assert kinds == ["conv", "relu", "conv", "add"]
    np.testing.assert_array_equal(after.data(after.op("conv").inputs[1]), b.graph.data(b.graph.value("conv.weight")))


def test_factor_goes_into_weights_that_are_a_view_of_stored_ones() -> None:
    b = Net(IMAGE)
    flat, factor = b.weight("flat", C, C * 9), b.constant(C, 1, 1)
    view = b.graph.add_op(K.RESHAPE, [flat], [("view", ValueType((C, C, 3, 3), "float32"))]).output
    work = b.op("conv", K.CONV, b.x, view, None, pads=(1, 1, 1, 1))
    _, after, kinds = planned(b.done(b.op("out", K.ADD, b.op("mul", K.MUL, work, factor), b.x)), FoldScale())
    assert kinds == ["reshape", "conv", "add"]
    expected = b.graph.data(flat) * b.graph.data(factor).reshape(C, 1)
    np.testing.assert_allclose(after.data(after.value("flat_folded")), expected, rtol=1e-6)


def test_constants_that_only_a_folded_factor_read_go_with_it() -> None:
    b = Net(TOKENS)
    view = b.graph.add_op(K.RESHAPE, [b.constant(C, 1)], [("view", ValueType((C,), "float32"))]).output
    scaled = b.op("mul", K.MUL, b.linear("fc", b.x), view)
    assert planned(b.done(b.op("out", K.ADD, scaled, b.x)), FoldScale())[2] == ["linear", "add"]
    b = Net(TOKENS)
    view = b.graph.add_op(K.RESHAPE, [b.constant(C, 1)], [("view", ValueType((C,), "float32"))]).output
    scaled = b.op("mul", K.MUL, b.linear("fc", b.x), view)
    assert planned(b.done(b.op("out", K.ADD, scaled, b.x)), MergeBranches())[2] == ["linear"]


def in_half_precision(factor: float) -> Graph:
    b = Net(TOKENS)
    y = b.op("mul", K.MUL, b.linear("fc", b.x), b.constant(C, value=factor))
    out = b.op("out", K.ADD, b.x, y)
    for value in b.graph.values:
        value.dtype = "float16"
    return b.done(out)


def test_factor_that_leaves_half_precision_stays() -> None:
    plan, _, _ = planned(in_half_precision(1e-6), FoldScale(half=True))
    assert "would lose what is small" in plan.refusals[0].reason


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("factor", [0.25, 0.3])
def test_factor_in_16_bits_moves_exponents_or_is_asked_for(factor: float, half: bool) -> None:
    plan, _, kinds = planned(in_half_precision(factor), FoldScale(half=half))
    assert ("mul" not in kinds) == (half or factor == 0.25)
    assert "mul" not in kinds or "rounded once more" in plan.refusals[0].reason


def test_shift_behind_a_dropout_stays_for_training() -> None:
    b = Net(TOKENS)
    dropped = b.op("drop", K.IDENTITY, b.linear("fc", b.x), dropout=0.1)
    assert "in training" in refusals(b, b.op("shift", K.ADD, dropped, b.constant(C)))


def test_long_chains_end_in_a_reason() -> None:
    b = Net(TOKENS)
    y = b.op("tanh", K.TANH, b.x)
    for index in range(2000):
        y = b.op(f"shift{index}", K.ADD, y, b.constant(*TOKENS))
    assert "more than 64 operations away" in refusals(b, b.op("mul", K.MUL, y, b.constant(C)))


class Standardised(nn.Conv2d):
    """Weights normalised over what each output reads, times a gain (Brock et al. 2021, section 2)."""

    def __init__(self, width: int) -> None:
        super().__init__(width, width, 3, padding=1)
        self.gain = nn.Parameter(torch.rand(width, 1, 1, 1) + 0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        flat, gain = self.weight.reshape(1, self.out_channels, -1), (self.gain * 0.2).view(-1)
        weight = nn.functional.batch_norm(flat, None, None, weight=gain, training=True).reshape_as(self.weight)
        return torch.conv2d(x, weight, self.bias, padding=1)


class NormFree(nn.Module):
    """x + f(x/β)·α·g, f with a gate behind its convolutions and rectifiers of gain γ: a block of NFNet."""

    def __init__(self, gate: bool) -> None:
        super().__init__()
        self.one, self.two, self.skip_gain = Standardised(4), Standardised(4), nn.Parameter(torch.tensor(0.7))
        self.gate = gate

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.two(torch.relu(self.one(torch.relu(x) * 1.7 / 1.1)) * 1.7)
        if self.gate:
            y = y * torch.sigmoid(y.mean((2, 3), keepdim=True)) * 2.0
        return x + y * self.skip_gain * 0.2


@pytest.mark.parametrize("gate", [False, True])
def test_factors_go_into_standardised_weights_or_into_one_another(gate: bool) -> None:
    graph = rc.capture(nn.Sequential(NormFree(gate), NormFree(gate)).eval(), (drawn(1, 4, 6, 6),))
    assert not graph.training, "weights that are normalised by their own statistics are the same in evaluation"
    result = rc.rewrite(graph, "fold-scale")
    assert result.verification.ok
    left = [op for op in result.graph if op.kind in (K.MUL, K.DIV) and not op.output.constant]
    assert len(left) == (4 if gate else 0), "behind a gate: its product and one factor"


class Tokens(nn.Module):
    """BN(W·x) of tokens, in the layouts of networks that mix both: rows of a matrix (LeViT), channels before tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.rows, self.columns = nn.Linear(6, 6, bias=False), nn.Linear(6, 6)
        self.up = nn.ConvTranspose2d(6, 4, 2, groups=2)
        self.norms = nn.ModuleList([nn.BatchNorm1d(6), nn.BatchNorm1d(6), nn.BatchNorm2d(4)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.rows(x)
        x = x + self.norms[0](y.flatten(0, 1)).reshape_as(y)
        x = torch.tanh(x)
        x = x + self.norms[1](self.columns(x).transpose(1, 2)).transpose(1, 2)
        return self.norms[2](self.up(torch.tanh(x).transpose(1, 2).unflatten(2, (2, 2))))


@pytest.mark.parametrize("ir", IRS[:2])
def test_norms_fold_through_views_that_keep_channels_apart(ir: str) -> None:
    result = rewritten(lively(Tokens()), (drawn(2, 4, 6),), ir, "fold-batch-norm")
    assert K.BATCH_NORM not in {op.kind for op in result.graph}
    assert not result.refused


def test_norm_over_tokens_is_not_one_over_features() -> None:
    build = Build(TOKENS)
    work = build.linear("fc", build.x)
    stats = [build.weight(part, TOKENS[1]) for part in ("weight", "bias", "mean", "var")]
    graph = build.done(build.op("bn", K.BATCH_NORM, work, *stats))
    assert "writes other features" in planned(graph, FoldBatchNorm())[0].refusals[0].reason


# ---- bias ---------------------------------------------------------------------------------------------------------


class PreNorm(nn.Module):
    """Two stages that end in x + W·f(x) + b and a norm of it; the first contraction is a 1×1 convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.down, self.norm = nn.Conv2d(6, 6, 1), nn.Linear(6, 6), nn.LayerNorm(6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = (x + self.conv(torch.tanh(x))).flatten(2).transpose(1, 2)
        x = torch.tanh(x)
        s = x + self.down(torch.tanh(x))
        return s * 0.5 + self.norm(s)


@pytest.mark.parametrize("ir", IRS[:2])
def test_a_bias_moves_into_the_region_that_writes_the_sum(ir: str) -> None:
    graph = captured(PreNorm(), (drawn(2, 6, 3, 3),), ir)
    inputs = {graph.inputs[0].name: drawn(2, 6, 3, 3).numpy()}
    (expected,) = graph.run(inputs).values()
    after = graph.clone()
    moved = 0
    for kind, tail in ((K.CONV, []), (K.LINEAR, [K.LAYER_NORM])):
        work = next(op for op in after if op.kind is kind)
        (join,) = work.output.users
        norms = [op for op in join.output.users if op.kind in tail]
        found = hoisted_bias(after, join, work.output)
        assert found is not None
        outputs = [join.output, *(norm.output for norm in norms)]
        region = region_edit(after, [*found.ops, join, *norms], outputs)
        assert not isinstance(region, str), region
        for edit in found.placed(region):
            edit.apply(after, "test")
        after.commit()
        moved += 1
    left = [op for op in after if op.kind in (K.CONV, K.LINEAR)]
    assert moved == len(left) == 2
    assert all(op.operand("bias") is None for op in left)
    (actual,) = after.run(inputs).values()
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("ir", IRS[:2])
def test_fuse_hoists_biases_where_that_is_asked_for(ir: str) -> None:
    graph = captured(PreNorm(), (drawn(2, 6, 3, 3),), ir)
    result = rc.rewrite(graph, ["fuse-joins{hoist_bias=true}"])
    assert result.verification.ok
    assert [op.operand("bias") is None for op in result.graph if op.kind is K.LINEAR] == [True]
    assert "add_add_layer_norm" in [op.attr("label") for op in result.graph if op.kind is K.FUSED_REGION]
    plain = rc.rewrite(graph, ["fuse-joins"])
    assert [op.operand("bias") is None for op in plain.graph if op.kind is K.LINEAR] == [False]


def test_a_bias_stays_where_something_else_reads_the_product() -> None:
    b = Build(TOKENS)
    work = b.linear("fc", b.x)
    out = b.op("sum", K.ADD, b.op("tanh", K.TANH, b.x), work)
    graph = b.done(out, work)
    assert hoisted_bias(graph, graph.op("sum"), work) is None


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_bias_stays_in_half_precision(dtype: str) -> None:
    b = Build(TOKENS)
    work = b.linear("fc", b.x)
    graph = b.done(b.op("sum", K.ADD, b.op("tanh", K.TANH, b.x), work))
    work.dtype = dtype
    assert (hoisted_bias(graph, graph.op("sum"), work) is None) == (dtype == "float16")
