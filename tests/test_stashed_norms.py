"""RMS norms that compute in float32 inside a float64 model: rewritten, they round where the model rounds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import rescompile as rc
from rescompile.composites import recognise
from rescompile.fused_region import parse
from rescompile.graph import Graph, Op
from rescompile.kinds import OpKind, Trait
from rescompile.passes.fuse_joins import FuseJoins
from rescompile.passes.merge_norms import MergeNorms
from rescompile.passes.unfuse import UnfuseAll
from rescompile.rewriting import run_passes
from rescompile.verify import relative_difference
from tests.graphs import Builder

K = OpKind
WIDTH, TOLERANCE = 16, 1e-12
STASHED = {"stash_type": "float32", "rounded": True}


class Norm(nn.Module):
    """γ ⊙ x / √(mean(x²) + ε), as models of transformers spell it."""

    def __init__(self, spelling: str) -> None:
        super().__init__()
        self.spelling = spelling
        self.gain = nn.Parameter(torch.rand(WIDTH) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        narrow = x.to(torch.float32)
        if self.spelling == "centred":
            narrow = narrow - narrow.mean(-1, keepdim=True)
        power = narrow.pow(2).mean(-1, keepdim=True) + 1e-6
        if self.spelling == "quotient":
            return self.gain * (narrow / torch.sqrt(power)).to(x.dtype)
        inverse = torch.rsqrt(power)
        if self.spelling == "t5":  # only the statistic is narrow
            return self.gain * (x * inverse)
        if self.spelling == "olmo":
            return (self.gain * (narrow * inverse)).to(x.dtype)
        if self.spelling == "gemma":  # the gain in float32, too
            return (narrow * inverse * (1.0 + self.gain.to(torch.float32))).to(x.dtype)
        if self.spelling == "gain first":
            return (narrow * (self.gain.to(torch.float32) * inverse)).to(x.dtype)
        return self.gain * (narrow * inverse).to(x.dtype)


IN_ORDER = ("llama", "olmo", "gemma", "t5")
OTHERS = ("gain first", "quotient", "centred")


class Rows(nn.Module):
    """x + N₁(W·x), then x + W·N₂(x), with each of the spellings."""

    def __init__(self, spellings: tuple[str, ...]) -> None:
        super().__init__()
        self.norms = nn.ModuleList(Norm(each) for each in spellings for _ in range(2))
        self.linears = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in self.norms)

    def forward(self, x: Tensor) -> Tensor:
        for index in range(0, len(self.norms), 2):
            x = x + self.norms[index](self.linears[index](x))
            x = x + self.linears[index + 1](self.norms[index + 1](x))
        return x


def rows(spellings: tuple[str, ...], ir: str) -> Graph:
    torch.manual_seed(0)
    model, x = Rows(spellings).double().eval(), torch.randn(2, 5, WIDTH, dtype=torch.float64)
    if ir == "fx":
        return rc.capture(model, (x,))
    return rc.capture(torch.onnx.export(model, (x,), dynamo=True, verbose=False, optimize=False))


def norms(graph: Graph) -> dict[OpKind, int]:
    found = [op for op in graph if op.kind in (K.RMS_NORM, K.LAYER_NORM, K.NORMALISE)]
    return {kind: sum(op.kind is kind for op in found) for kind in {op.kind for op in found}}


def furthest(graph: Graph, other: Graph, inputs: dict[str, Any] | None = None) -> float:
    feed = inputs or {"x": np.random.default_rng(0).standard_normal((2, 5, WIDTH))}
    one, two = graph.run(feed), other.run(feed)
    return max(relative_difference(one[name], two[name]) for name in one)


@pytest.mark.parametrize("ir", ["fx", "onnx"])
def test_a_fused_norm_rounds_where_the_model_does(ir: str) -> None:
    graph = rows(IN_ORDER, ir)
    assert norms(graph) == {K.RMS_NORM: 2 * len(IN_ORDER)}
    assert all(op.attr("stash_type") == "float32" for op in graph if op.kind is K.RMS_NORM)
    assert [op.attr("rounded") for op in graph if op.kind is K.RMS_NORM] == [True] * 6 + [False] * 2
    result = run_passes(graph, [FuseJoins()])
    assert not result.refused
    held = [sum(kind is K.RMS_NORM for kind in _kinds(op)) for op in result.graph if op.has(Trait.FUSED)]
    assert held == [2, 0] * len(IN_ORDER), "N₁ and N₂ are in the region of the sum between them"
    assert furthest(graph, result.graph) <= TOLERANCE
    plain = run_passes(result.graph, [UnfuseAll()]).graph
    assert not any(op.has(Trait.FUSED) for op in plain)
    assert furthest(graph, plain) <= TOLERANCE


def _kinds(op: Op) -> list[OpKind]:
    return [step.kind for step in parse(op.attr("steps")).steps] if op.kind is K.FUSED_REGION else []


@pytest.mark.parametrize("ir", ["fx", "onnx"])
def test_a_norm_in_another_order_stays_as_it_is_written(ir: str) -> None:
    graph = rows(OTHERS, ir)
    assert norms(graph) == {K.NORMALISE: 2 * len(OTHERS)}
    result = run_passes(graph, [FuseJoins()])
    assert result.verification.ok
    assert not result.rolled_back
    assert norms(result.graph) == norms(graph), "no rewrite writes it anew"
    assert furthest(graph, result.graph) <= TOLERANCE


@pytest.mark.parametrize("spelling", [*IN_ORDER, *OTHERS])
def test_a_float32_model_has_nothing_to_round(spelling: str) -> None:
    model = Rows((spelling,)).eval()
    graph = rc.capture(model, (torch.randn(2, 5, WIDTH),))
    found = [op for op in graph if op.kind in (K.RMS_NORM, K.LAYER_NORM)]
    assert all("stash_type" not in op.attrs for op in found)
    assert found or spelling == "gain first"


def test_norms_that_round_in_between_are_not_merged() -> None:
    class Twice(nn.Module):
        def __init__(self, *spellings: str) -> None:
            super().__init__()
            self.norms = nn.ModuleList(Norm(each) for each in spellings)
            for norm in self.norms:
                nn.init.ones_(norm.gain)

        def forward(self, x: Tensor) -> Tensor:
            for norm in self.norms:
                x = norm(x)
            return x

    wide = rc.capture(Twice("llama", "llama").eval(), (torch.randn(2, WIDTH),))
    assert run_passes(wide, [MergeNorms()]).applied
    narrow = rc.capture(Twice("llama", "llama").double().eval(), (torch.randn(2, WIDTH, dtype=torch.float64),))
    refused = run_passes(narrow, [MergeNorms()])
    assert not refused.applied
    assert any("rounds in between" in refusal.reason for refusal in refused.refused)


def test_a_compiled_norm_rounds_too() -> None:
    pytest.importorskip("tvm")
    torch.manual_seed(0)
    model, x = Rows(IN_ORDER).double().eval(), torch.randn(2, 5, WIDTH, dtype=torch.float64)
    for compiled in (model, rc.rewrite(rc.capture(model, (x,)), ["fuse"]).model):
        program = rc.compile(compiled, (x,))
        with torch.no_grad():
            torch.testing.assert_close(program(x), model(x), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("rounded", [True, False])
def test_the_gains_type_decides_where_it_multiplies(rounded: bool) -> None:
    b = Builder()
    x = b.input(2, WIDTH, dtype="float64")
    narrow = b.op(K.CAST, x, shape=x.shape, dtype="float32")
    inverse = b.op(K.RSQRT, b.add(b.mean(b.mul(narrow, narrow), 1), 1e-6))
    quotient = b.mul(narrow, inverse)
    if rounded:
        y = b.op(K.CAST, b.mul(quotient, b.param(WIDTH)), shape=x.shape, dtype="float64")
    else:  # a float32 gain times float64 numbers is neither of the orders that are written
        y = b.mul(b.op(K.CAST, quotient, shape=x.shape, dtype="float64"), b.param(WIDTH))
    graph = b.output(y)
    recognise(graph)
    (norm,) = [op for op in graph if op.has(Trait.NORM)]
    assert (norm.kind, norm.attrs.get("stash_type")) == ((K.RMS_NORM, "float32") if rounded else (K.NORMALISE, None))


# ---- models of transformers ------------------------------------------------------------------------------------------


def _decoder(name: str) -> nn.Module:
    import transformers

    config = getattr(transformers, f"{name}Config")(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, use_cache=False, attn_implementation="eager", eos_token_id=1,
    )  # fmt: skip
    return getattr(transformers, f"{name}Model")(config)  # type: ignore[no-any-return]


def _t5() -> nn.Module:
    from transformers import T5Config, T5EncoderModel

    return T5EncoderModel(T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4))


class Hidden(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> Tensor:
        return self.model(tokens).last_hidden_state  # type: ignore[no-any-return]


MODELS: dict[str, Callable[[], nn.Module]] = {
    "Llama": lambda: _decoder("Llama"),
    "Olmo2": lambda: _decoder("Olmo2"),
    "Gemma2": lambda: _decoder("Gemma2"),
    "T5": _t5,
}


@pytest.mark.parametrize("name", MODELS)
def test_models_in_float64_fuse_to_the_last_digits(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Hidden(MODELS[name]()).double().eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, 0.1 if parameter.ndim == 1 else 0.0, 0.3)
    tokens = torch.randint(0, 64, (1, 6))
    graph = rc.capture(model, (tokens,))
    result = rc.rewrite(graph, ["fuse"])
    assert result.verification.ok
    assert not result.rolled_back
    blocks = rc.inspect(graph).blocks
    assert len(blocks) == 4
    assert sum(op.kind is K.FUSED_REGION for op in result.graph) >= len(blocks)
    assert furthest(graph, result.graph, {graph.inputs[0].name: tokens.numpy()}) <= TOLERANCE
