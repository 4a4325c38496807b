"""Concatenations that fuse: dense blocks, shuffles, U-Nets; beside each condition the twin that must not fire."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import rescompile as rc
from rescompile.graph import Graph
from rescompile.rewriting import Result
from tests.residual_models import livened

IRS = ("fx", "onnx")


def fused(model: nn.Module, x: torch.Tensor, ir: str, spec: str = "fuse-joins") -> Result:
    model.eval()
    graph: Graph = rc.capture(model, (x,))
    if ir == "onnx":
        graph = rc.capture(torch.onnx.export(model, (x,), dynamo=True, verbose=False, optimize=False))
    result = rc.rewrite(graph, [spec])
    assert result.verification.ok, str(result.verification)
    return result


def labels(result: Result) -> list[str]:
    return [str(op.attr("label")) for op in result.graph if op.kind.value == "fused_region"]


class Dense(nn.Module):
    """[x, h₀] → BN → ReLU → conv = h₁, and so on; with `tap` a concatenation is read once more."""

    def __init__(self, *, tap: bool = False) -> None:
        super().__init__()
        self.first = nn.Conv2d(4, 4, 3, padding=1)
        self.norms = nn.ModuleList(nn.BatchNorm2d(8 + 4 * i) for i in range(2))
        self.convs = nn.ModuleList(nn.Conv2d(8 + 4 * i, 4, 3, padding=1) for i in range(2))
        self.tap = tap

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        features = [x, self.first(x)]
        for norm, conv in zip(self.norms, self.convs, strict=True):
            joined = torch.cat(features, 1)
            h = conv(torch.relu(norm(joined)))
            features.append(h + joined.mean(1, keepdim=True) if self.tap else h)
        return torch.cat(features, 1)


@pytest.mark.parametrize("ir", IRS)
def test_a_dense_block_writes_its_features_once_and_normalised(ir: str) -> None:
    result = fused(livened(Dense()), torch.randn(2, 4, 8, 8), ir)
    assert labels(result)[:2] == ["concat_batch_norm_relu"] * 2
    assert "concat" not in [op.kind.value for op in result.graph if "region" not in op.kind.value]


@pytest.mark.parametrize("ir", IRS)
def test_a_concatenation_that_is_read_twice_keeps_its_norm_apart(ir: str) -> None:
    result = fused(livened(Dense(tap=True)), torch.randn(2, 4, 8, 8), ir)
    assert "concat_batch_norm_relu" not in labels(result)
    assert any("2 readers take the concatenation" in refusal.reason for refusal in result.refused)


class Shuffle(nn.Module):
    """ShuffleNet v2: half of the channels pass, the other half is worked on; then they are interleaved."""

    def __init__(self, *, late: bool = False) -> None:
        super().__init__()
        self.work = nn.Conv2d(4, 4, 3, padding=1)
        self.late = late

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        kept, worked = x.chunk(2, 1)
        worked = torch.relu(self.work(worked))
        joined = torch.cat([kept, worked], 1)
        shuffled = joined.reshape(x.shape[0], 2, 4, 8, 8).transpose(1, 2).reshape(x.shape[0], 8, 8, 8)
        return shuffled + worked.mean() if self.late else shuffled


@pytest.mark.parametrize("ir", IRS)
def test_the_convolution_writes_its_slice_and_the_shuffle_is_where_it_writes(ir: str) -> None:
    assert labels(fused(Shuffle(), torch.randn(2, 8, 8, 8), ir)) == ["conv_relu_concat_reshape_permute_reshape"]


@pytest.mark.parametrize("ir", IRS)
def test_a_convolution_that_is_read_elsewhere_stays_outside(ir: str) -> None:
    assert labels(fused(Shuffle(late=True), torch.randn(2, 8, 8, 8), ir)) == ["concat_reshape_permute_reshape"]


class Skip(nn.Module):
    """U-Net: the decoder's transposed convolution beside the encoder's features."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Conv2d(4, 8, 3, stride=2, padding=1)
        self.up = nn.ConvTranspose2d(8, 4, 2, stride=2)
        self.last = nn.Conv2d(8, 4, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(torch.cat([x, self.up(torch.relu(self.down(x)))], 1))


@pytest.mark.parametrize("ir", IRS)
def test_a_long_skip_is_written_beside_the_transposed_convolution(ir: str) -> None:
    assert labels(fused(Skip(), torch.randn(2, 4, 8, 8), ir)) == ["conv_transpose_concat"]


def test_concat_can_be_switched_off() -> None:
    result = fused(Skip(), torch.randn(2, 4, 8, 8), "fx", "fuse-joins{concat=false}")
    assert not labels(result)
    assert "no rule for it is switched on" in result.refused[0].reason


def test_a_batch_norm_in_training_stays_outside() -> None:
    model = Dense().train()
    graph = rc.capture(model, (torch.randn(2, 4, 8, 8),))
    assert graph.training
    assert "batch_norm" not in " ".join(labels(rc.rewrite(graph, ["fuse-joins"], verify=False)))
