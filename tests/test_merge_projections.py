"""A projection shortcut inside the branch's last contraction: each condition beside the twin that must not fire."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from torch import nn
from torch.nn import functional as F

import rescompile as rc
from rescompile.graph import Graph
from rescompile.kinds import OpKind
from rescompile.rewriting import Result
from tests.residual_models import livened

IRS = ("fx", "onnx")


class Bottleneck(nn.Module):
    """1×1, k×k, 1×1, and beside them a projection: a convolution of one element with a stride, a norm behind each."""

    def __init__(
        self,
        width: int = 6,
        inner: int = 4,
        out: int = 10,
        stride: int = 1,
        last: int = 1,
        norm: bool = True,
        active: str = "",
        pooled: bool = False,
    ) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(width, inner, 1), nn.Conv2d(inner, inner, 3, stride, 1)
        self.conv3 = nn.Conv2d(inner, out, last, padding=last // 2, bias=not norm)
        self.bn3 = nn.BatchNorm2d(out) if norm else nn.Identity()
        pool = [nn.AvgPool2d(stride)] if pooled else []
        down = nn.Conv2d(width, out, 1, 1 if pooled else stride, bias=False)
        self.down = nn.Sequential(*pool, down, nn.BatchNorm2d(out) if norm else nn.Identity())
        self.active = active

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.bn3(self.conv3(F.relu(self.conv2(F.relu(self.conv1(x))))))
        y = torch.tanh(y) if self.active == "branch" else y
        skip = self.down(x)
        return F.relu(y + skip) if self.active != "none" else y + skip


class Mlp(nn.Module):
    """Two linears and a projection: P·x + W₂·gelu(W₁·x)."""

    def __init__(self, width: int = 6, out: int = 10, bias: bool = True) -> None:
        super().__init__()
        self.up, self.down, self.skip = nn.Linear(width, 8), nn.Linear(8, out, bias), nn.Linear(width, out, bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.skip(x) + self.down(F.gelu(self.up(x)))
        return y


def captured(model: nn.Module, inputs: tuple[Any, ...], ir: str) -> Graph:
    if ir == "fx":
        return rc.capture(model, inputs)
    return rc.capture(torch.onnx.export(model, inputs, dynamo=True, verbose=False, optimize=False))


def merged(model: nn.Module, x: torch.Tensor, ir: str, *specs: str) -> Result:
    result = rc.rewrite(captured(model, (x,), ir), list(specs) or ["fold-batch-norm", "merge-projections"])
    assert result.verification.ok, str(result.verification)
    assert not result.rolled_back
    assert not rc.plan(result.graph, ["merge-projections"]).rewrites, "once is enough"
    before, after = rc.inspect(result.original).blocks, rc.inspect(result.graph).blocks
    told = [[(block.kind, block.shortcut, block.fork) for block in blocks] for blocks in (before, after)]
    assert told[0] == told[1], "the residual blocks are as they were"
    return result


def regions(graph: Graph) -> list[str]:
    return [op.attr("label") for op in graph if op.kind is OpKind.FUSED_REGION]


def reasons(model: nn.Module, x: torch.Tensor, *specs: str) -> str:
    """Why the pass leaves the only block alone."""
    plan = rc.rewrite(captured(model, (x,), "fx"), [*specs, "merge-projections"]).plan
    assert not any(rewrite.pass_name == "merge-projections" for rewrite in plan.rewrites)
    (refusal,) = [refusal for refusal in plan.refusals if refusal.pass_name == "merge-projections"]
    return refusal.reason


IMAGE = torch.randn(1, 6, 9, 8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("ir", IRS)
@pytest.mark.parametrize("stride", [1, 2])
def test_both_contractions_the_join_and_its_activation_become_one_region(ir: str, stride: int) -> None:
    torch.manual_seed(0)
    result = merged(livened(Bottleneck(stride=stride)), IMAGE, ir)
    assert regions(result.graph) == [("slice_" if stride == 2 else "") + "concat_conv_relu"]
    count = Counter(op.kind.value for op in result.graph)
    assert (count["conv"], count["add"], count["batch_norm"]) == (2, 0, 0)
    (block,) = rc.inspect(result.graph).blocks
    assert block.fused
    costs = result.costs
    assert costs[1].bytes < costs[0].bytes
    assert costs[1].parameters <= costs[0].parameters


@pytest.mark.parametrize("ir", IRS)
@pytest.mark.parametrize("bias", [True, False])
def test_linears_are_concatenated_along_features(ir: str, bias: bool) -> None:
    torch.manual_seed(0)
    result = merged(Mlp(bias=bias).eval(), torch.randn(2, 3, 6), ir)
    assert regions(result.graph) == ["concat_linear"]
    kept = result.graph.value("down.weight_merged")
    assert sorted(kept.shape or ()) == [10, 14]
    assert result.graph.has_name("down.bias_merged") == bias


def test_a_pool_before_the_projection_stays_before_it() -> None:
    """ResNet-D (He et al. 2018): the shortcut's stride is an average pool."""
    torch.manual_seed(0)
    result = merged(livened(Bottleneck(stride=2, pooled=True)), IMAGE[..., :8, :], "fx")
    assert regions(result.graph) == ["concat_conv_relu"]
    assert any(op.kind is OpKind.AVG_POOL for op in result.graph)


def test_sum_without_activation_keeps_its_name() -> None:
    torch.manual_seed(0)
    result = merged(livened(Bottleneck(active="none")), IMAGE, "fx")
    assert regions(result.graph) == ["concat_conv"]
    assert [value.name for value in result.graph.outputs] == ["add"]


@pytest.mark.parametrize("ir", IRS)
def test_resnet_projections_merge_as_an_option_of_fuse(ir: str) -> None:
    torch.manual_seed(0)
    model = livened(nn.Sequential(Bottleneck(6, 4, 10), Bottleneck(10, 4, 12, 2)))
    result = merged(model, IMAGE, ir, "fuse{projections=true}")
    assert regions(result.graph) == ["concat_conv_relu", "slice_concat_conv_relu"]
    assert all(block.fused for block in rc.inspect(result.graph).blocks)
    assert not regions(rc.rewrite(result.original, ["fuse"]).graph), "off by default"


@pytest.mark.parametrize("ir", IRS)
def test_unfusing_gives_standard_operations_of_the_same_values(ir: str) -> None:
    torch.manual_seed(0)
    result = merged(livened(Bottleneck(stride=2)), IMAGE, ir)
    plain = rc.rewrite(result.graph, ["unfuse"])
    assert plain.verification.ok
    assert [op.kind.value for op in plain.graph][-4:] == ["slice", "concat", "conv", "relu"]


@pytest.mark.parametrize("ir", IRS)
def test_merged_model_saves_loads_and_runs_the_same(ir: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    result = merged(livened(Bottleneck(stride=2)), IMAGE, ir)
    path = tmp_path / ("model.onnx" if ir == "onnx" else "model.pt2")
    result.save(str(path))
    again = rc.load(path, trust=True)
    inputs = {value.name: IMAGE.numpy() for value in result.graph.inputs}
    for a, b in zip(result.graph.run(inputs).values(), again.run(inputs).values(), strict=True):
        np.testing.assert_array_equal(a, b)
    assert [block.shortcut for block in rc.inspect(again).blocks] == ["projection"]


@pytest.mark.parametrize("ir", IRS)
def test_key_map_leads_from_both_weights_to_the_merged_one(ir: str) -> None:
    keys = merged(Mlp().eval(), torch.randn(2, 3, 6), ir).key_map
    assert keys["down.weight"] == keys["skip.weight"] == ["down.weight_merged"]
    assert keys["down.bias"] == keys["skip.bias"] == ["down.bias_merged"]


def test_key_map_leads_through_a_folded_weight_that_is_gone() -> None:
    torch.manual_seed(0)
    keys = merged(livened(Bottleneck()), IMAGE, "fx").key_map
    both = ["conv3.weight_folded_merged", "conv3.bias_folded_merged"]
    assert keys["bn3.weight"] == keys["down.1.running_var"] == both
    assert keys["bn3.bias"] == both[1:]


def test_fp64_is_exact_to_rounding() -> None:
    torch.manual_seed(0)
    model = livened(Bottleneck(stride=2)).double()
    result = merged(model, IMAGE.double(), "fx")
    with torch.no_grad():
        torch.testing.assert_close(result.model(IMAGE.double()), model(IMAGE.double()), rtol=1e-12, atol=1e-12)


def test_dynamic_batch_survives() -> None:
    torch.manual_seed(0)
    shapes = ({0: torch.export.Dim("batch", max=8)},)
    program = torch.export.export(
        livened(Bottleneck(stride=2)), (IMAGE.repeat(2, 1, 1, 1),), dynamic_shapes=shapes, strict=False
    )
    result = rc.rewrite(rc.capture(program), ["fold-batch-norm", "merge-projections"])
    assert regions(result.graph) == ["slice_concat_conv_relu"]
    x = torch.randn(3, 6, 9, 8)
    (y,) = result.graph.run({result.graph.inputs[0].name: x.numpy()}).values()
    np.testing.assert_allclose(y, program.module()(x).detach().numpy(), rtol=1e-5, atol=1e-5)


# ---- twins that must not fire ----------------------------------------------------------------------------------------


def test_norm_that_is_not_folded_stays_between() -> None:
    assert "fold-batch-norm takes it away" in reasons(livened(Bottleneck()), IMAGE)


def test_kernel_of_several_elements_is_no_part_of_a_shared_reduction() -> None:
    assert "is 3×3" in reasons(Bottleneck(last=3, norm=False).eval(), IMAGE)


def test_activation_before_the_sum_is_no_part_of_it() -> None:
    assert "an activation lies between" in reasons(Bottleneck(norm=False, active="branch").eval(), IMAGE)


def test_join_that_is_fused_already_is_left_alone() -> None:
    assert "merge before fusing" in reasons(livened(Bottleneck()), IMAGE, "fuse")


def test_identity_shortcut_is_nothing_to_merge() -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(6, 6, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + torch.relu(self.conv(x))

    assert "no projection shortcut" in reasons(Plain().eval(), IMAGE)


def test_contraction_that_something_else_reads_stays() -> None:
    class Tapped(Bottleneck):
        def forward(self, x: torch.Tensor) -> Any:
            skip = self.down(x)
            return F.relu(self.conv3(F.relu(self.conv2(F.relu(self.conv1(x))))) + skip), skip

    assert "not the only reader" in reasons(Tapped(norm=False).eval(), IMAGE)


def test_weight_that_two_layers_share_stays() -> None:
    model = nn.Sequential(Mlp(6, 6), Mlp(6, 6))
    model[1].skip.weight = model[0].skip.weight
    plan = rc.plan(captured(model.eval(), (torch.randn(2, 3, 6),), "fx"), ["merge-projections"])
    assert not plan.rewrites
    assert all("also reads the weight" in refusal.reason for refusal in plan.refusals)


def test_training_form_keeps_both() -> None:
    model = nn.Sequential(Mlp(), nn.Dropout(0.1)).train()
    plan = rc.plan(rc.capture(model, (torch.randn(2, 3, 6),)), ["merge-projections"])
    assert not plan.rewrites
    assert "in training" in plan.refusals[0].reason


def test_concat_and_conv_of_a_dense_block_stay_a_dense_block() -> None:
    """Outside a region a contraction over a concatenation is what it says: DenseNet's bottleneck is no sum."""

    class Dense(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.grow, self.mix = nn.Conv2d(6, 4, 3, padding=1), nn.Conv2d(10, 5, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return F.relu(self.mix(torch.cat([x, F.relu(self.grow(x))], 1)))

    (block,) = rc.inspect(captured(Dense().eval(), (IMAGE,), "fx")).blocks
    assert block.kind == "dense"


@settings(max_examples=10, deadline=None)
@given(st.integers(1, 6), st.integers(1, 5), st.integers(1, 6), st.integers(1, 3), st.booleans(), st.integers(0, 999))
def test_random_blocks_keep_their_values(width: int, inner: int, out: int, stride: int, norm: bool, seed: int) -> None:
    torch.manual_seed(seed)
    model, x = livened(Bottleneck(width, inner, out, stride, norm=norm), seed), torch.randn(2, width, 7, 8)
    result = merged(model, x, "fx")
    assert len(regions(result.graph)) == 1
    with torch.no_grad():
        torch.testing.assert_close(result.model(x), model(x), rtol=1e-5, atol=1e-5)
