"""Fusion of whole models, in both IRs from one implementation: what fires, and that the numbers stay."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import Phase, given, settings
from torch import nn

import rescompile as rc
from rescompile.graph import Graph
from rescompile.printing import print_graph
from rescompile.rewriting import Result
from tests.light_models import randomised
from tests.residual_models import Chain, ConvBlock, MlpBlock, livened

# A failing model is small enough as drawn; shrinking would export hundreds of them.
PHASES = (Phase.explicit, Phase.reuse, Phase.generate)
IRS = ("fx", "onnx")


def captured(model: nn.Module, inputs: tuple[Any, ...], ir: str) -> Graph:
    if ir == "fx":
        return rc.capture(model, inputs)
    return rc.capture(torch.onnx.export(model, inputs, dynamo=True, verbose=False, optimize=False))


def fused(model: nn.Module, inputs: tuple[Any, ...], ir: str, spec: str = "fuse") -> Result:
    result = rc.rewrite(captured(model, inputs, ir), [spec])
    assert result.verification.ok, str(result.verification)
    assert not result.rolled_back
    return result


def kinds(graph: Graph) -> Counter[str]:
    return Counter(op.kind.value for op in graph)


@pytest.mark.parametrize("ir", IRS)
def test_resnet50_becomes_53_convs_of_which_16_hold_join_and_activation(ir: str) -> None:
    import torchvision

    torch.manual_seed(0)
    model = livened(torchvision.models.resnet50())
    result = fused(model, (torch.randn(1, 3, 64, 64),), ir)
    count = kinds(result.graph)
    assert (count["conv"], count["fused_conv"], count["batch_norm"], count["add"]) == (37, 16, 0, 0)
    joined = [op for op in result.graph if op.kind.value == "fused_conv"]
    assert all(op.operand("residual") is not None and op.attr("outer") == "relu" for op in joined)


def test_light_resnet50_of_opset_9_fuses_alike() -> None:
    result = rc.rewrite(randomised("resnet50"), ["fuse"])
    assert result.verification.ok
    assert not result.verification.vacuous, "the weights make the output depend on the input"
    count = kinds(result.graph)
    assert (count["conv"], count["fused_conv"], count["batch_norm"], count["add"]) == (37, 16, 0, 0)


@pytest.mark.parametrize("ir", IRS)
def test_berts_two_joins_a_layer_become_add_norm(ir: str) -> None:
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    config = BertConfig(vocab_size=97, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=64)
    config._attn_implementation = "eager" if ir == "onnx" else "sdpa"
    model = livened(BertModel(config, add_pooling_layer=False))
    ids = torch.randint(0, 97, (2, 12))
    result = fused(model, (ids, torch.ones_like(ids)), ir)
    assert kinds(result.graph)["add_norm"] == 6
    assert sum(block.fused for block in rc.inspect(result.graph).blocks) == 6


@pytest.mark.parametrize("ir", IRS)
@pytest.mark.parametrize("norm_first", [False, True])
def test_transformer_encoder_fuses_every_join(ir: str, norm_first: bool) -> None:
    torch.backends.mha.set_fastpath_enabled(False)
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, norm_first=norm_first)
    model = livened(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False))
    result = fused(model, (torch.randn(2, 7, 32),), ir)
    count = kinds(result.graph)
    # The sum behind an attention, whose rows come transposed, is a region with its norm and the permutation. Pre-norm:
    # the last sum has no norm behind it, and goes into its linear past a dropout that is off.
    labels = [op.attr("label") for op in result.graph if op.kind.value == "fused_region"]
    assert labels == ["permute_add_layer_norm"] * 2
    expected = (1, 1, 0) if norm_first else (2, 0, 0)
    assert (count["add_norm"], count["fused_linear"], count["add"]) == expected


@pytest.mark.parametrize("spec", ["fuse", "fuse{activations=true}"])
def test_both_irs_print_the_same_graph_after_fusing(spec: str) -> None:
    torch.manual_seed(0)
    model = livened(Chain([ConvBlock(4, 4), ConvBlock(4, 8, 2)], set()))
    texts = [print_graph(fused(model, (torch.randn(1, 4, 6, 6),), ir, spec).graph, comments=False) for ir in IRS]
    assert texts[0] == texts[1]


@pytest.mark.parametrize("ir", IRS)
def test_fused_model_saves_loads_and_runs_the_same(ir: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.randn(1, 4, 6, 6)
    result = fused(livened(nn.Sequential(ConvBlock(4, 4), ConvBlock(4, 8, 2))), (x,), ir)
    path = tmp_path / ("model.onnx" if ir == "onnx" else "model.pt2")
    result.save(str(path))
    again = rc.load(path, trust=True)
    assert kinds(again) == kinds(result.graph)
    inputs = {value.name: x.numpy() for value in result.graph.inputs}
    for a, b in zip(result.graph.run(inputs).values(), again.run(inputs).values(), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("ir", IRS)
def test_key_map_leads_from_every_original_parameter_to_its_heirs(ir: str) -> None:
    result = fused(livened(ConvBlock(4, 4)), (torch.randn(1, 4, 6, 6),), ir)
    assert all(heirs for key, heirs in result.key_map.items() if "num_batches" not in key)
    assert {key for heirs in result.key_map.values() for key in heirs} <= {v.name for v in result.graph.parameters}


@st.composite
def chains(draw: st.DrawFn) -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(draw(st.integers(0, 1000)))
    count = draw(st.integers(1, 4))
    taps = draw(st.sets(st.integers(0, 3)))
    if draw(st.booleans()):
        widths = [draw(st.sampled_from([4, 8])) for _ in range(count + 1)]
        blocks: list[nn.Module] = [ConvBlock(a, b, draw(st.sampled_from([1, 2]))) for a, b in pairwise(widths)]
        return livened(Chain(blocks, taps)), torch.randn(1, widths[0], 9, 9)
    blocks = [
        MlpBlock(
            8,
            draw(st.sampled_from(["pre", "post", "none"])),
            draw(st.sampled_from(["relu", "gelu", "silu", "tanh"])),
            draw(st.booleans()),
        )
        for _ in range(count)
    ]
    return livened(Chain(blocks, taps)), torch.randn(2, 3, 8)


@settings(max_examples=12, deadline=None, phases=PHASES)
@given(chains())
def test_fusing_random_residual_chains_keeps_values_and_is_idempotent(case: tuple[nn.Module, torch.Tensor]) -> None:
    model, x = case
    result = fused(model, (x,), "fx")
    assert kinds(result.graph)["add"] == 0
    assert not rc.plan(result.graph, ["fuse"]).rewrites
    before, after = rc.inspect(result.original).summary(), rc.inspect(result.graph).summary()
    assert before["by_kind"] == after["by_kind"]


@settings(max_examples=4, deadline=None, phases=PHASES)
@given(chains())
def test_fusing_random_residual_chains_in_onnx(case: tuple[nn.Module, torch.Tensor]) -> None:
    model, x = case
    result = fused(model, (x,), "onnx")
    assert kinds(result.graph)["add"] == 0
    assert not rc.plan(result.graph, ["fuse"]).rewrites
