"""`remove-shortcuts`: exactly where algebra allows, in both IRs; each condition with its twin that must not fire."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

import rescompile as rc
from rescompile.errors import RescompileError
from rescompile.graph import Graph
from rescompile.plans import Plan
from rescompile.printing import print_graph
from rescompile.rewriting import Result
from tests.plain_models import PlainNet, mlp
from tests.test_insert_shortcuts import IRS, captured, first_output

SIZE = 8


def image(channels: int, size: int = SIZE) -> tuple[torch.Tensor]:
    return (torch.randn(2, channels, size, size, generator=torch.Generator().manual_seed(0)),)


def lively(model: nn.Module) -> nn.Module:
    """Norms with statistics, scales and shifts of their own, in evaluation."""
    generator = torch.Generator().manual_seed(1)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1, generator=generator)
            module.running_var.uniform_(0.7, 1.3, generator=generator)
            nn.init.uniform_(module.weight, 0.5, 1.5, generator=generator)
            nn.init.normal_(module.bias, 0, 0.2, generator=generator)
    return model.eval()


def removed(model: nn.Module, inputs: tuple[torch.Tensor, ...], ir: str, spec: str = "remove-shortcuts") -> Result:
    """The result of the pass, which is verified and leaves no block behind."""
    result = rc.rewrite(captured(lively(model), inputs, ir), spec)
    assert not result.refused, result.refused
    assert result.applied
    assert result.verification.ok, result.verification
    assert not rc.inspect(result.graph).blocks
    return result


def refusal(model: nn.Module, inputs: tuple[torch.Tensor, ...], ir: str) -> str:
    """The one reason for which nothing is done."""
    result = rc.rewrite(captured(lively(model), inputs, ir), "remove-shortcuts", verify=False)
    assert not result.applied
    (refused,) = result.refused
    return refused.reason


def kinds(graph: Graph) -> list[str]:
    return [op.kind.value for op in graph]


def conv(inputs: int, outputs: int, kernel: Any = 3, stride: int = 1, **options: Any) -> nn.Conv2d:
    options.setdefault("padding", kernel // 2 if isinstance(kernel, int) else tuple(size // 2 for size in kernel))
    return nn.Conv2d(inputs, outputs, kernel, stride, **options)


def normed(*args: Any, **options: Any) -> nn.Sequential:
    convolution = conv(*args, bias=False, **options)
    return nn.Sequential(convolution, nn.BatchNorm2d(convolution.out_channels))


class Sum(nn.Module):
    """relu(Σ branches of the input), the input itself among them where `skip`, behind a stem."""

    def __init__(self, *branches: nn.Module, skip: bool = True, stem: nn.Module | None = None) -> None:
        super().__init__()
        self.stem = stem or nn.Identity()
        self.branches = nn.ModuleList(branches)
        self.skip = skip

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        y = x if self.skip else None
        for branch in self.branches:
            y = branch(x) if y is None else y + branch(x)
        return torch.relu(y)


class RepVgg(nn.Sequential):
    """Ding et al. 2021, figure 2: 3×3, 1×1 and, where shapes are equal, a norm alone."""

    def __init__(self, groups: int = 1) -> None:
        blocks = []
        for before, after, stride in ((3, 8, 2), (8, 8, 1), (8, 12, 2), (12, 12, 1)):
            shared = groups if before % groups == 0 else 1
            branches: list[nn.Module] = [
                normed(before, after, 3, stride, groups=shared),
                normed(before, after, 1, stride, groups=shared),
            ]
            if before == after:
                branches.append(nn.BatchNorm2d(after))
            blocks.append(Sum(*branches, skip=False))
        super().__init__(*blocks)


# ---- branches without an activation become one convolution --------------------------------------------------------


@pytest.mark.parametrize("ir", IRS)
@pytest.mark.parametrize("groups", [1, 2])
def test_repvgg_becomes_a_plain_stack(groups: int, ir: str) -> None:
    result = removed(RepVgg(groups), image(3, 16), ir)
    assert kinds(result.graph) == ["conv", "relu"] * 4
    before, after = result.costs
    assert after.parameters < before.parameters
    assert after.flops < before.flops


AFFINE: dict[str, nn.Module] = {
    "identity beside a convolution": Sum(conv(6, 6)),
    "identity beside a norm and a convolution": Sum(normed(6, 6)),
    "identity beside a depthwise convolution": Sum(conv(6, 6, groups=6)),
    "identity beside a grouped one": Sum(normed(6, 6, groups=3)),
    "1×1 projection": Sum(normed(6, 10), normed(6, 10, 1), skip=False),
    "projection with a stride": Sum(normed(6, 10, 3, 2), normed(6, 10, 1, 2), skip=False),
    "5×5 beside 3×3": Sum(conv(6, 6, 5), conv(6, 6, 3), conv(6, 6, 1)),
    "1×3 beside 3×1": Sum(conv(6, 6, (1, 3)), conv(6, 6, (3, 1))),
    "1×1 before 3×3": Sum(nn.Sequential(conv(6, 4, 1, bias=False), conv(4, 6))),
    "3×3 before 1×1": Sum(nn.Sequential(conv(6, 4), conv(4, 6, 1))),
    "average pool": Sum(conv(6, 6), nn.Sequential(conv(6, 6, 1, bias=False), nn.AvgPool2d(3, 1, 1)), skip=False),
    "pool with the convolution's stride": Sum(
        normed(6, 8, 3, 2), nn.Sequential(nn.AvgPool2d(2, 2), normed(6, 8, 1)), skip=False
    ),
    "norms alone": Sum(normed(6, 6), nn.BatchNorm2d(6), nn.BatchNorm2d(6)),
    "dilated beside dense": Sum(conv(6, 6, 5, groups=6), conv(6, 6, 3, dilation=2, padding=2, groups=6)),
    "depthwise beside all channels": Sum(normed(6, 6, groups=6), normed(6, 6, 1), nn.BatchNorm2d(6), skip=False),
    "many branches": Sum(*(normed(6, 6) for _ in range(4)), normed(6, 6, 1), nn.BatchNorm2d(6), skip=False),
}


@pytest.mark.parametrize("ir", IRS)
@pytest.mark.parametrize("name", AFFINE)
def test_affine_branches_merge(name: str, ir: str) -> None:
    result = removed(AFFINE[name], image(6), ir)
    assert kinds(result.graph) == ["conv", "relu"]


@pytest.mark.parametrize("name", AFFINE)
def test_merging_is_exact_in_double_precision(name: str) -> None:
    model = lively(AFFINE[name]).double()
    try:
        result = rc.rewrite(rc.capture(model, (image(6)[0].double(),)), "remove-shortcuts")
    finally:
        model.float()
    assert result.applied
    assert result.verification.ok
    assert all(check.tolerance <= 1e-12 for check in result.verification.checks)


class Scaled(nn.Module):
    """relu(λ·conv(x) + a·x): `shape` of λ and a, of which a divides where `divide`."""

    def __init__(self, shape: tuple[int, ...], divide: bool = False, alpha: float = 1.0, width: int = 6) -> None:
        super().__init__()
        self.work = normed(width, width)
        self.a = nn.Parameter(torch.rand(shape) + 0.5)
        self.gamma = nn.Parameter(torch.rand(shape) + 0.5)
        self.divide, self.alpha = divide, alpha

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        skip = x / self.a if self.divide else self.a * x
        return torch.relu(torch.add(skip, self.work(x) * self.gamma, alpha=self.alpha) - 0.5)


@pytest.mark.parametrize("ir", IRS)
@pytest.mark.parametrize("shape", [(), (1,), (6, 1, 1), (1, 6, 1, 1)])
@pytest.mark.parametrize(("divide", "alpha"), [(False, 1.0), (True, -0.5)])
def test_factors_on_skip_and_branch_merge(divide: bool, alpha: float, shape: tuple[int, ...], ir: str) -> None:
    result = removed(Scaled(shape, divide, alpha), image(6), ir)
    assert kinds(result.graph)[0] == "conv"
    assert kinds(result.graph).count("mul") == kinds(result.graph).count("div") == 0


@pytest.mark.parametrize("ir", IRS)
def test_factor_for_each_position_stays(ir: str) -> None:
    assert "not one number for each channel" in refusal(Scaled((6, SIZE, SIZE)), image(6), ir)


class Linears(nn.Module):
    """relu(W·x + b + x)"""

    def __init__(self, norm: bool = False, bias: bool = True) -> None:
        super().__init__()
        self.work = nn.Linear(6, 6, bias)
        self.norm = nn.BatchNorm1d(6) if norm else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(x + self.norm(self.work(x)))


@pytest.mark.parametrize("ir", IRS)
@pytest.mark.parametrize(
    ("shape", "norm", "bias"), [((4, 6), False, True), ((2, 5, 6), False, False), ((4, 6), True, True)]
)
def test_identity_beside_a_linear_merges(shape: tuple[int, ...], norm: bool, bias: bool, ir: str) -> None:
    result = removed(Linears(norm, bias), (torch.randn(shape),), ir)
    assert kinds(result.graph) == ["linear", "relu"]


@pytest.mark.parametrize("dims", [1, 3])
def test_convolutions_of_other_dimensions_merge(dims: int) -> None:
    work = {1: nn.Conv1d, 3: nn.Conv3d}[dims](6, 6, 3, padding=1)
    result = removed(Sum(work), (torch.randn(2, 6, *(5,) * dims),), "fx")
    assert kinds(result.graph) == ["conv", "relu"]


def test_dynamic_extents_merge() -> None:
    dim = torch.export.Dim.AUTO
    graph = rc.capture(lively(RepVgg()), image(3, 16), dynamic=({0: dim, 2: dim, 3: dim},))
    result = rc.rewrite(graph, "remove-shortcuts")
    assert len(result.applied) == 4
    assert result.verification.ok


@pytest.mark.parametrize(("name", "ir"), [("repvgg_a0", "fx"), ("repvgg_a0", "onnx"), ("mobileone_s0", "fx")])
def test_reparameterisable_networks_of_timm(name: str, ir: str, torchvision: ModuleType) -> None:
    timm = pytest.importorskip("timm")
    model = timm.create_model(name, num_classes=3)
    graph = captured(lively(model), image(3, 32), ir)
    found = rc.inspect(graph).summary()["by_kind"]["branches"]
    result = rc.rewrite(graph, "remove-shortcuts")
    assert len(result.applied) == found
    assert result.verification.ok
    assert not rc.inspect(result.graph).blocks


class Nested(nn.Module):
    """x + BN(conv₃(x) + conv₁(x) + x), without an activation (RepViT's token mixer)."""

    def __init__(self) -> None:
        super().__init__()
        self.large, self.small, self.norm = normed(6, 6, groups=6), conv(6, 6, 1, groups=6), nn.BatchNorm2d(6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(x + self.norm(self.large(x) + self.small(x) + x))


@pytest.mark.parametrize("ir", IRS)
def test_block_in_a_block_merges_with_it(ir: str) -> None:
    result = removed(Nested(), image(6), ir)
    assert kinds(result.graph) == ["conv", "relu"]
    assert len(result.applied) == 1


def test_block_in_a_block_merges_alone_where_the_outer_one_cannot() -> None:
    model = Sum(nn.Sequential(Sum(normed(6, 6), normed(6, 6, 1), skip=False), nn.Tanh()))
    graph = rc.capture(lively(model), image(6))
    result = rc.rewrite(graph, "remove-shortcuts")
    assert len(rc.inspect(graph).blocks) == 2
    assert len(result.applied) == len(result.refused) == 1
    assert result.verification.ok


def test_module_that_was_traced_symbolically_merges() -> None:
    model = torch.fx.symbolic_trace(lively(nn.Sequential(RepVgg(), Scaled((12, 1, 1), width=12))))
    graph = rc.capture(model, image(3, 16))
    result = rc.rewrite(graph, "remove-shortcuts")
    assert len(result.applied) == 5
    assert result.verification.ok
    torch.testing.assert_close(result.model(*image(3, 16)), model(*image(3, 16)), rtol=0, atol=2e-5)


class Bordered(nn.Module):
    """Pad, convolve: any kernel, border, dilation and groups that make ⌊(S − 1)/stride⌋ + 1 positions."""

    def __init__(self, kernel: int, before: int, dilation: int, groups: int, stride: int, norm: bool) -> None:
        super().__init__()
        reach = (kernel - 1) * dilation
        self.border = (min(before, reach), reach - min(before, reach))
        self.work = nn.Conv1d(4, 4, kernel, stride, dilation=dilation, groups=groups, bias=not norm)
        self.norm = nn.BatchNorm1d(4) if norm else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.work(F.pad(x, self.border)))


@settings(max_examples=15, deadline=None)
@given(st.data())
def test_any_borders_dilations_and_groups_merge_exactly(data: st.DataObject) -> None:
    stride = data.draw(st.integers(1, 3))
    branches = [
        Bordered(
            data.draw(st.integers(1, 5)),
            data.draw(st.integers(0, 8)),
            data.draw(st.integers(1, 3)),
            data.draw(st.sampled_from([1, 2, 4])),
            stride,
            data.draw(st.booleans()),
        )
        for _ in range(data.draw(st.integers(2 if stride > 1 else 1, 4)))
    ]
    model = lively(Sum(*branches, skip=stride == 1)).double()
    x = torch.randn(2, 4, data.draw(st.integers(16, 20)), dtype=torch.float64)
    result = rc.rewrite(rc.capture(model, (x,)), "remove-shortcuts", verify=False)
    found = kinds(result.graph)
    assert found.count("conv") == 1, result.refused
    assert "add" not in found
    torch.testing.assert_close(result.model(x), model(x), rtol=0, atol=1e-12)


# ---- what does not merge ------------------------------------------------------------------------------------------


class Positions(nn.Module):
    """One convolution whose result is as large as the input's half, and one that reads every other position."""

    def __init__(self) -> None:
        super().__init__()
        self.strided, self.cut = conv(6, 6, 3, 2), conv(6, 6, 3, padding=0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.strided(x) + self.cut(x))


REFUSED: dict[str, tuple[nn.Module, str]] = {
    "activation between, on an input that may be negative": (
        Sum(nn.Sequential(conv(6, 6), nn.ReLU(), conv(6, 6))),
        "may be negative",
    ),
    "activation behind the branch": (Sum(nn.Sequential(conv(6, 6), nn.ReLU())), "ends in an activation"),
    "two 3×3 in a row": (Sum(nn.Sequential(conv(6, 6), conv(6, 6))), "in a row"),
    "shift before a zero border": (Sum(nn.Sequential(nn.BatchNorm2d(6), conv(6, 6))), "a shift before"),
    "pool that counts no border": (
        Sum(conv(6, 6), nn.AvgPool2d(3, 1, 1, count_include_pad=False)),
        "fewer elements at the border",
    ),
    "max pool": (Sum(conv(6, 6), nn.MaxPool2d(3, 1, 1)), "no affine map"),
    "norm of the input's own statistics": (Sum(nn.Sequential(conv(6, 6), nn.GroupNorm(2, 6))), "no affine map"),
}


@pytest.mark.parametrize("ir", IRS)
@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_affine_is_refused(name: str, ir: str) -> None:
    model, reason = REFUSED[name]
    assert reason in refusal(model, image(6), ir)


@pytest.mark.parametrize("ir", IRS)
def test_different_strides_are_refused(ir: str) -> None:
    assert "strides differ" in refusal(Positions(), image(6, 5), ir)


def test_training_form_is_refused() -> None:
    result = rc.rewrite(rc.capture(RepVgg().train(), image(3, 16)), "remove-shortcuts", verify=False)
    assert not result.applied
    assert all("in training" in refused.reason for refused in result.refused)


class Read(nn.Module):
    """A convolution whose result is read beside the sum too, or is an output."""

    def __init__(self, output: bool) -> None:
        super().__init__()
        self.work, self.output = conv(6, 6), output

    def forward(self, x: torch.Tensor) -> Any:
        y = self.work(x)
        total = torch.relu(x + y)
        return (total, y) if self.output else total * torch.tanh(y)


@pytest.mark.parametrize("ir", IRS)
@pytest.mark.parametrize("output", [True, False])
def test_values_that_are_read_elsewhere_stay(output: bool, ir: str) -> None:
    assert "lies inside the block" in refusal(Read(output), image(6), ir)


class Shared(nn.Module):
    """One convolution in a residual block and outside it."""

    def __init__(self) -> None:
        super().__init__()
        self.work = conv(6, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.work(torch.relu(x + self.work(x)))


@pytest.mark.parametrize("ir", IRS)
def test_shared_weights_are_copied(ir: str) -> None:
    model = lively(Shared())
    result = removed(model, image(6), ir)
    names = {value.name: value for value in result.graph.parameters}
    assert set(names) == {"work.weight", "work.bias", "work.weight_merged", "work.bias_merged"}
    np.testing.assert_array_equal(result.graph.data(names["work.weight"]), model.work.weight.detach().numpy())
    assert "stays beside its copy" in result.applied[0].reason


# ---- a skip that is never negative goes through the branch's activations -------------------------------------------


class Basic(nn.Module):
    """He et al. 2015, figure 5: `depth` convolutions behind a stem that ends in `entry`."""

    def __init__(
        self,
        skip: nn.Module | None = None,
        widths: tuple[int, ...] = (8, 8),
        kernels: tuple[int, ...] = (3, 3),
        strides: tuple[int, ...] = (1, 1),
        groups: tuple[int, ...] = (1, 1),
        act: type[nn.Module] = nn.ReLU,
        entry: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.stem = nn.Sequential(normed(3, 8), entry or nn.ReLU())
        layers: list[nn.Module] = []
        before = 8
        for width, kernel, stride, group in zip(widths, kernels, strides, groups, strict=True):
            layers += [act()] * bool(layers) + [normed(before, width, kernel, stride, groups=group)]
            before = width
        self.work = nn.Sequential(*layers)
        self.skip = skip or nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        return torch.relu(self.work(x) + self.skip(x))


class PadSkip(nn.Module):
    """Option A: every other position, zero channels appended."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 2, 6))


RESERVED: dict[str, tuple[nn.Module, int]] = {
    "basic block": (Basic(), 3),
    "projection": (Basic(normed(8, 12, 1, 2), (12, 12), strides=(2, 1)), 3),
    "option A": (Basic(PadSkip(), (16, 16), strides=(2, 1)), 3),
    "pool before the projection": (
        Basic(nn.Sequential(nn.AvgPool2d(2, 2), normed(8, 12, 1)), (12, 12), strides=(2, 1)),
        3,
    ),
    "stride in the last convolution": (Basic(normed(8, 12, 1, 2), (12, 12), strides=(1, 2)), 3),
    "3×3 projection, stride at the end": (Basic(normed(8, 12, 3, 2), (12, 12), strides=(1, 2)), 3),
    "bottleneck": (Basic(normed(8, 16, 1, 2), (4, 4, 16), (1, 3, 1), (1, 2, 1), (1, 1, 1)), 4),
    "bottleneck with groups": (Basic(None, (16, 16, 8), (1, 3, 1), (1, 1, 1), (1, 4, 1)), 4),
    "inverted bottleneck": (Basic(None, (16, 16, 8), (1, 3, 1), (1, 1, 1), (1, 16, 1)), 4),
    "relu6 behind relu6": (Basic(act=nn.ReLU6, entry=nn.ReLU6()), 3),
    "leaky relu behind a sigmoid": (Basic(act=nn.LeakyReLU, entry=nn.Sigmoid()), 3),
    "behind a max pool": (Basic(entry=nn.Sequential(nn.ReLU(), nn.MaxPool2d(3, 2, 1))), 3),
    "behind an average pool": (Basic(entry=nn.Sequential(nn.ReLU(), nn.AvgPool2d(2))), 3),
}


@pytest.mark.parametrize("ir", IRS)
@pytest.mark.parametrize("name", RESERVED)
def test_skip_that_is_never_negative_is_reserved(name: str, ir: str) -> None:
    model, convolutions = RESERVED[name]
    result = removed(model, image(3), ir)
    assert kinds(result.graph).count("conv") == convolutions
    assert "add" not in kinds(result.graph)
    assert "parameters" in result.applied[0].reason
    assert "FLOPs" in result.applied[0].reason


@pytest.mark.parametrize("name", RESERVED)
def test_reserving_is_exact_in_double_precision(name: str) -> None:
    model = lively(RESERVED[name][0]).double()
    try:
        result = rc.rewrite(rc.capture(model, (image(3)[0].double(),)), "remove-shortcuts")
    finally:
        model.float()
    assert result.applied
    assert result.verification.ok
    assert all(check.tolerance <= 1e-12 for check in result.verification.checks)


class BorderedBranch(nn.Module):
    """relu(x), then s(x) + F(x), F of bordered convolutions with relus between them."""

    def __init__(self, layers: list[Bordered], stride: int) -> None:
        super().__init__()
        parts = [part for layer in layers for part in (nn.ReLU(), layer)]
        self.work = nn.Sequential(*parts[1:])
        self.skip = nn.Conv1d(4, 4, 1, stride) if stride > 1 else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(x)
        return torch.tanh(self.skip(x) + self.work(x))


@settings(max_examples=15, deadline=None)
@given(st.data())
def test_any_borders_dilations_and_strides_reserve_exactly(data: st.DataObject) -> None:
    depth = data.draw(st.integers(2, 4))
    strides = [data.draw(st.integers(1, 2)) for _ in range(depth)]
    layers = [
        Bordered(
            data.draw(st.integers(1, 4)),
            data.draw(st.integers(0, 6)),
            data.draw(st.integers(1, 2)),
            data.draw(st.sampled_from([1, 2, 4])) if 0 < number < depth - 1 else 1,
            stride,
            data.draw(st.booleans()),
        )
        for number, stride in enumerate(strides)
    ]
    model = lively(BorderedBranch(layers, int(np.prod(strides)))).double()
    x = torch.randn(2, 4, data.draw(st.integers(16, 20)), dtype=torch.float64)
    result = rc.rewrite(rc.capture(model, (x,)), "remove-shortcuts", verify=False)
    assert kinds(result.graph).count("conv") == depth, result.refused
    assert "add" not in kinds(result.graph)
    torch.testing.assert_close(result.model(x), model(x), rtol=0, atol=1e-12)


def test_dynamic_extents_are_reserved() -> None:
    dim = torch.export.Dim.AUTO
    model = lively(nn.Sequential(RESERVED["projection"][0], nn.Conv2d(12, 2, 1)))
    graph = rc.capture(model, image(3), dynamic=({0: dim, 2: dim, 3: dim},))
    result = rc.rewrite(graph, "remove-shortcuts")
    assert len(result.applied) == 1
    for size in (8, 13):
        torch.testing.assert_close(result.model(*image(3, size)), model(*image(3, size)), rtol=0, atol=2e-5)


NOT_RESERVED: dict[str, tuple[nn.Module, str]] = {
    "fork that may be negative": (Basic(entry=nn.Tanh()), "may be negative"),
    "fork behind a leaky relu": (Basic(entry=nn.LeakyReLU()), "may be negative"),
    "relu6 that would clip": (Basic(act=nn.ReLU6), "changes non-negative values"),
    "gelu": (Basic(act=nn.GELU), "changes non-negative values"),
    "groups of the last convolution": (Basic(groups=(1, 8)), "has groups"),
    "groups of the first": (Basic(groups=(8, 1)), "has groups"),
    "groups that the skip does not fill": (
        Basic(None, (12, 12, 8), (1, 3, 1), (1, 1, 1), (1, 4, 1)),
        "no whole groups",
    ),
}


@pytest.mark.parametrize("ir", IRS)
@pytest.mark.parametrize("name", NOT_RESERVED)
def test_what_would_change_the_skip_is_refused(name: str, ir: str) -> None:
    model, reason = NOT_RESERVED[name]
    assert reason in refusal(model, image(3), ir)


@pytest.mark.parametrize("ir", IRS)
def test_resnet_18_loses_every_skip(ir: str, torchvision: ModuleType) -> None:
    model = torchvision.models.resnet18(num_classes=4)
    result = removed(model, image(3, 32), ir)
    assert len(result.applied) == 8
    assert all("x ≥ 0" in rewrite.equation for rewrite in result.applied)


class PositiveMlp(nn.Module):
    """relu(x), then x + W₂·relu(W₁·x)"""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 10), nn.Linear(10, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(x)
        return torch.tanh(x + self.second(torch.relu(self.first(x))))


@pytest.mark.parametrize("ir", IRS)
@pytest.mark.parametrize("shape", [(4, 6), (2, 3, 6)])
def test_linears_are_reserved_too(shape: tuple[int, ...], ir: str) -> None:
    result = removed(PositiveMlp(), (torch.randn(shape),), ir)
    assert kinds(result.graph) == ["relu", "linear", "relu", "linear", "tanh"]


# ---- plain removal ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ir", IRS)
@pytest.mark.parametrize("option", ["A", "B"])
def test_plain_removal_gives_the_plain_network(option: str, ir: str) -> None:
    inputs = image(3, 16)
    residual = lively(PlainNet(1, residual=True, option=option))
    plain = PlainNet(1).eval()
    plain.load_state_dict({name: value for name, value in residual.state_dict().items() if "projections" not in name})
    result = removed(residual, inputs, ir, "remove-shortcuts{how=plain}")
    assert result.verification.preserves == "interface"
    assert all(rewrite.preserves == "interface" for rewrite in result.applied)
    assert not any("projections" in value.name for value in result.graph.parameters)
    with torch.no_grad():
        expected = plain(*inputs).numpy()
    np.testing.assert_allclose(first_output(result.graph, inputs), expected, rtol=0, atol=2e-5)


def test_plain_removal_keeps_names_and_trains() -> None:
    model = PlainNet(1, residual=True)
    result = rc.rewrite(rc.capture(model.train(), image(3, 16)), "remove-shortcuts{how=plain}")
    assert len(result.applied) == 3
    assert set(result.model.state_dict()) == set(model.state_dict())


@pytest.mark.parametrize("ir", IRS)
def test_plain_removal_of_a_parallel_block_leaves_its_branches(ir: str) -> None:
    branches = (nn.Sequential(conv(6, 6), nn.Tanh()), nn.Sequential(conv(6, 6), nn.Sigmoid()))
    result = rc.rewrite(captured(Sum(*branches), image(6), ir), "remove-shortcuts{how=plain}")
    assert len(result.applied) == 1
    assert kinds(result.graph).count("add") == 1


class Split(nn.Module):
    """x₂ + conv(x₁) of the two halves of x (a step of Res2Net)."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = conv(3, 3), conv(3, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        left, right = x.chunk(2, 1)
        left = torch.tanh(self.first(left))
        return torch.cat([left, self.second(right + left)], 1) + x


@pytest.mark.parametrize("ir", IRS)
def test_plain_removal_of_one_part_of_a_split(ir: str) -> None:
    graph = captured(Split(), image(6), ir)
    result = rc.rewrite(graph, "remove-shortcuts{how=plain}")
    assert len(result.applied) == rc.inspect(graph).summary()["by_kind"]["add"] == 2
    assert "add" not in kinds(result.graph)


@pytest.mark.parametrize("ir", IRS)
def test_branches_have_no_skip_to_remove_plainly(ir: str) -> None:
    result = rc.rewrite(captured(RepVgg().eval(), image(3, 16), ir), "remove-shortcuts{how=plain}")
    assert not result.applied
    assert all("'branches'" in refused.reason for refused in result.refused)


# ---- which blocks -------------------------------------------------------------------------------------------------


def test_blocks_by_id_join_and_module() -> None:
    graph = rc.capture(lively(RepVgg()), image(3, 16))
    blocks = rc.inspect(graph).blocks
    for name in ("1", blocks[1].join, blocks[1].module):
        result = rc.rewrite(graph, f'remove-shortcuts{{blocks=["{name}"]}}')
        assert [rewrite.where for rewrite in result.applied] == [blocks[1].join]
        untouched = [value.name for value in result.graph.parameters if value.name.startswith("0.")]
        assert untouched == [value.name for value in graph.parameters if value.name.startswith("0.")]


def test_unknown_block_is_an_error_with_the_nearest_name() -> None:
    graph = rc.capture(lively(RepVgg()), image(3, 16))
    with pytest.raises(RescompileError, match="did you mean"):
        rc.rewrite(graph, "remove-shortcuts{blocks=[ad_2]}")


def test_model_without_blocks_says_so() -> None:
    result = rc.rewrite(rc.capture(mlp(2), (torch.randn(2, 16),)), "remove-shortcuts")
    assert [refused.reason for refused in result.refused] == ["the model has no residual block"]


def test_plan_survives_json() -> None:
    graph = rc.capture(lively(Basic()), image(3))
    plan = Plan.from_json(rc.plan(graph, "remove-shortcuts").to_json())
    result = rc.apply(graph, plan)
    assert result.verification.ok
    assert not rc.inspect(result.graph).blocks


# ---- insert, then remove ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ir", IRS)
@pytest.mark.parametrize(
    "spec",
    [
        "insert-shortcuts{every=2}",
        "insert-shortcuts{every=2,match=pad}",
        "insert-shortcuts{every=2,join=after}",
        "insert-shortcuts{every=1,join=pre-activation}",
        "insert-shortcuts{every=2,kind=gated}",
    ],
)
def test_what_starts_as_nothing_goes_without_a_trace(spec: str, ir: str) -> None:
    graph = captured(lively(PlainNet(1)), image(3, 16), ir)
    inserted = rc.rewrite(graph, spec, verify=False)
    assert inserted.applied
    result = rc.rewrite(inserted.graph, "remove-shortcuts")
    assert len(result.applied) == len(inserted.applied)
    assert result.verification.ok
    assert print_graph(result.graph, comments=False) == print_graph(graph, comments=False)
    assert [value.name for value in result.graph.parameters] == [value.name for value in graph.parameters]


class Chained(nn.Module):
    """Blocks without an activation between them: x + g·conv(x), then x + conv(x)."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = conv(6, 6), conv(6, 6)
        self.gate = nn.Parameter(torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x) + self.gate * x
        return torch.relu(x + self.second(x))


@pytest.mark.parametrize("ir", IRS)
@pytest.mark.parametrize("how", ["exact", "plain"])
def test_block_whose_fork_is_the_join_of_a_block_that_goes(how: str, ir: str) -> None:
    result = removed(Chained(), image(6), ir, f"remove-shortcuts{{how={how}}}")
    assert len(result.applied) == 2
    assert kinds(result.graph) == ["conv", "conv", "relu"]


@pytest.mark.parametrize("ir", IRS)
def test_what_has_a_weight_goes_only_by_algebra(ir: str) -> None:
    graph = captured(mlp(4), (torch.randn(2, 16),), ir)
    inserted = rc.rewrite(graph, "insert-shortcuts{every=2,start=residual}", verify=False)
    result = rc.rewrite(inserted.graph, "remove-shortcuts", verify=False)
    assert not result.applied
    assert len(result.refused) == len(inserted.applied) == 2


@pytest.mark.parametrize("ir", IRS)
def test_a_branch_that_starts_as_nothing_is_no_skip(ir: str) -> None:
    graph = captured(mlp(4), (torch.randn(2, 16),), ir)
    inserted = rc.rewrite(graph, "insert-shortcuts{every=2,start=rezero}", verify=False)
    assert inserted.applied
    assert not rc.rewrite(inserted.graph, "remove-shortcuts", verify=False).applied
