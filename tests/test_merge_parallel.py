"""Contractions that share an input, as one: each condition beside the twin that must not fire, in both IRs."""

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
from rescompile.graph import Graph, Op, Value, ValueType
from rescompile.kinds import OpKind
from rescompile.passes.merge_parallel import MergeParallel
from rescompile.plans import Plan
from rescompile.rewriting import Result, make_plan
from tests.residual_models import livened

IRS = ("fx", "onnx")


def captured(model: nn.Module, inputs: tuple[Any, ...], ir: str) -> Graph:
    if ir == "fx":
        return rc.capture(model, inputs)
    return rc.capture(torch.onnx.export(model, inputs, dynamo=True, verbose=False, optimize=False))


def merged(model: nn.Module, inputs: tuple[Any, ...], ir: str, *specs: str) -> Result:
    result = rc.rewrite(captured(model, inputs, ir), list(specs) or ["merge-parallel"])
    assert result.verification.ok, str(result.verification)
    assert not result.rolled_back
    assert not rc.plan(result.graph, ["merge-parallel"]).rewrites, "once is enough"
    before, after = rc.inspect(result.original).blocks, rc.inspect(result.graph).blocks
    told = [[(block.kind, block.shortcut, block.fork) for block in blocks] for blocks in (before, after)]
    assert told[0] == told[1], "the residual blocks are as they were"
    return result


def splits(graph: Graph) -> list[tuple[int, ...]]:
    """The sizes of the parts, of each split that the pass made."""
    return [op.attr("sizes") for op in graph if op.kind is OpKind.SPLIT and op.provenance == "merge-parallel"]


# ---- models ----------------------------------------------------------------------------------------------------------


def bert(ir: str) -> tuple[nn.Module, tuple[Any, ...]]:
    from transformers import BertConfig, BertModel

    config = BertConfig(vocab_size=97, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=64)
    config._attn_implementation = "eager" if ir == "onnx" else "sdpa"
    return livened(BertModel(config, add_pooling_layer=False)), (torch.randint(0, 97, (2, 12)),)


def llama(ir: str) -> tuple[nn.Module, tuple[Any, ...]]:
    from transformers import LlamaConfig, LlamaModel

    config = LlamaConfig(
        vocab_size=97,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=64,
        use_cache=False,
    )
    config._attn_implementation = "eager"
    return livened(LlamaModel(config)), (torch.randint(0, 97, (2, 12)),)


def vit(_: str) -> tuple[nn.Module, tuple[Any, ...]]:
    from transformers import ViTConfig, ViTModel

    config = ViTConfig(
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        intermediate_size=64,
        image_size=32,
        patch_size=16,
    )
    return livened(ViTModel(config, add_pooling_layer=False)), (torch.randn(1, 3, 32, 32),)


MODELS: dict[str, tuple[Any, list[tuple[int, ...]]]] = {
    "BERT": (bert, [(32, 32, 32)]),
    "Llama with grouped queries": (llama, [(32, 16, 16), (64, 64)]),
    "ViT": (vit, [(32, 32, 32)]),
}


@pytest.mark.parametrize("ir", IRS)
@pytest.mark.parametrize("name", MODELS)
def test_projections_of_a_transformer_become_one_for_each_value_they_read(name: str, ir: str) -> None:
    torch.manual_seed(0)
    build, sizes = MODELS[name]
    result = merged(*build(ir), ir)
    assert splits(result.graph) == sizes
    flops = [costs.flops for costs in result.costs]
    assert flops[0] == flops[1]
    assert result.costs[1].bytes < result.costs[0].bytes


def test_a_packed_projection_is_left_as_it_is() -> None:
    import timm

    model = timm.create_model("vit_tiny_patch16_224", depth=1, embed_dim=48, img_size=32).eval()
    plan = rc.plan(captured(model, (torch.randn(1, 3, 32, 32),), "fx"), ["merge-parallel"])
    assert not plan.rewrites
    assert [refusal.reason for refusal in plan.refusals] == ["no two contractions of the model read the same value"]


class Bottleneck(nn.Module):
    """He et al. 2015: 1×1, 3×3, 1×1 and a projection, whose stride is in the first or in the second convolution."""

    def __init__(self, width: int, inner: int, out: int, strides: tuple[int, int] = (1, 1)) -> None:
        super().__init__()
        first, second = strides
        self.conv1, self.bn1 = nn.Conv2d(width, inner, 1, first, bias=False), nn.BatchNorm2d(inner)
        self.conv2, self.bn2 = nn.Conv2d(inner, inner, 3, second, 1, bias=False), nn.BatchNorm2d(inner)
        self.conv3, self.bn3 = nn.Conv2d(inner, out, 1, bias=False), nn.BatchNorm2d(out)
        self.down = nn.Sequential(nn.Conv2d(width, out, 1, first * second, bias=False), nn.BatchNorm2d(out))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))
        return F.relu(self.bn3(self.conv3(y)) + self.down(x))


@pytest.mark.parametrize("ir", IRS)
@pytest.mark.parametrize("strides", [(1, 1), (2, 1)])
def test_first_conv_and_projection_of_equal_stride_become_one(ir: str, strides: tuple[int, int]) -> None:
    model = livened(Bottleneck(8, 4, 16, strides))
    result = merged(model, (torch.randn(1, 8, 9, 9),), ir, "fold-batch-norm", "merge-parallel")
    assert splits(result.graph) == [(4, 16)]
    assert [block.shortcut for block in rc.inspect(result.graph).blocks] == ["projection"]


@pytest.mark.parametrize("ir", IRS)
def test_projection_of_another_stride_stays_and_says_so(ir: str) -> None:
    model = livened(Bottleneck(8, 4, 16, (1, 2)))
    plan = rc.rewrite(captured(model, (torch.randn(1, 8, 9, 9),), ir), ["fold-batch-norm", "merge-parallel"]).plan
    assert not any(rewrite.pass_name == "merge-parallel" for rewrite in plan.rewrites)
    reasons = [refusal.reason for refusal in plan.refusals]
    assert len(reasons) == 2
    assert all("stride is 1×1" in reason or "stride is 2×2" in reason for reason in reasons)


def test_fused_result_of_a_merged_block_has_its_join_in_the_last_conv() -> None:
    model = livened(Bottleneck(8, 4, 16))
    result = merged(model, (torch.randn(1, 8, 9, 9),), "fx", "fold-batch-norm", "merge-parallel", "fuse-joins")
    count = Counter(op.kind.value for op in result.graph)
    assert (count["conv"], count["fused_conv"], count["add"]) == (2, 1, 0)
    assert [block.shortcut for block in rc.inspect(result.graph).blocks] == ["projection"]


class Inception(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.three = nn.Conv2d(6, 4, 1), nn.Conv2d(6, 3, 1), nn.Conv2d(6, 2, 1, bias=False)
        self.wide, self.pooled = nn.Conv2d(3, 5, 3, padding=1), nn.Conv2d(6, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        pooled = self.pooled(F.max_pool2d(x, 3, 1, 1))
        return torch.cat([F.relu(self.one(x)), self.wide(F.relu(self.two(x))), self.three(x), pooled], 1)


@pytest.mark.parametrize("ir", IRS)
def test_branches_of_an_inception_module_share_one_conv_and_a_missing_bias_is_zeros(ir: str) -> None:
    torch.manual_seed(0)
    result = merged(Inception().eval(), (torch.randn(2, 6, 7, 7),), ir)
    assert splits(result.graph) == [(4, 3, 2)]
    (rewrite,) = result.applied
    if ir == "fx":  # the ONNX exporter writes the zeros itself
        assert "zeros as the bias of 'three'" in rewrite.reason
    bias = result.graph.value("one.bias_merged")
    np.testing.assert_array_equal(result.graph.data(bias)[7:], 0)


class Activated(nn.Module):
    """x + mix(f(a·x), g(b·x)) with one 1×1 convolution each."""

    def __init__(self, second: nn.Module) -> None:
        super().__init__()
        self.a, self.b, self.mix = nn.Conv2d(4, 3, 1), nn.Conv2d(4, 5, 1), nn.Conv2d(8, 4, 3, padding=1)
        self.second = second

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = x + self.mix(torch.cat([F.relu(self.a(x)), self.second(self.b(x))], 1))
        return y


@pytest.mark.parametrize("ir", IRS)
def test_activation_that_all_parts_have_goes_before_the_split(ir: str) -> None:
    torch.manual_seed(0)
    graph = merged(Activated(nn.ReLU()).eval(), (torch.randn(1, 4, 6, 6),), ir).graph
    assert splits(graph) == [(3, 5)]
    assert [op.kind.value for op in graph] == ["conv", "relu", "split", "concat", "conv", "add"]


def test_activations_that_differ_stay_behind_the_split() -> None:
    torch.manual_seed(0)
    graph = merged(Activated(nn.ReLU6()).eval(), (torch.randn(1, 4, 6, 6),), "fx").graph
    assert [op.kind.value for op in graph][:2] == ["conv", "split"]


@pytest.mark.parametrize("ir", IRS)
def test_cross_attention_merges_key_and_value_of_each_layer_and_not_across_layers(ir: str) -> None:
    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v, self.o = (nn.Linear(8, 8) for _ in range(4))

        def forward(self, x: torch.Tensor, memory: torch.Tensor) -> torch.Tensor:
            q, k, v = (part.unsqueeze(1) for part in (self.q(x), self.k(memory), self.v(memory)))
            return x + self.o(F.scaled_dot_product_attention(q, k, v).squeeze(1))

    class Decoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([Layer(), Layer()])

        def forward(self, x: torch.Tensor, memory: torch.Tensor) -> torch.Tensor:
            for layer in self.layers:
                x = layer(x, memory)
            return x

    torch.manual_seed(0)
    result = merged(Decoder().eval(), (torch.randn(1, 3, 8), torch.randn(1, 5, 8)), ir)
    assert splits(result.graph) == [(8, 8), (8, 8)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_merging_is_exact_in_every_float_dtype(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model, x = GatedMlp(8, 12, True, False).to(dtype).eval(), torch.randn(2, 3, 8, dtype=dtype)
    result = merged(model, (x,), "fx")
    tolerance = {torch.float64: 1e-12, torch.float16: 2e-3, torch.bfloat16: 2e-2}[dtype]
    with torch.no_grad():
        torch.testing.assert_close(result.model(x), model(x), rtol=tolerance, atol=tolerance)


class GatedMlp(nn.Module):
    """SwiGLU (Shazeer 2020)."""

    def __init__(self, width: int, inner: int, gate_bias: bool, up_bias: bool) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(width, inner, gate_bias), nn.Linear(width, inner, up_bias)
        self.down = nn.Linear(inner, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = x + self.down(F.silu(self.gate(x)) * self.up(x))
        return y


@pytest.mark.parametrize("ir", IRS)
def test_merged_model_saves_loads_runs_and_reads_the_same(ir: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.randn(1, 8, 9, 9)
    result = merged(livened(Bottleneck(8, 4, 16)), (x,), ir, "fold-batch-norm", "merge-parallel")
    path = tmp_path / ("model.onnx" if ir == "onnx" else "model.pt2")
    result.save(str(path))
    again = rc.load(path, trust=True)
    inputs = {value.name: x.numpy() for value in result.graph.inputs}
    for a, b in zip(result.graph.run(inputs).values(), again.run(inputs).values(), strict=True):
        np.testing.assert_array_equal(a, b)
    assert [block.shortcut for block in rc.inspect(again).blocks] == ["projection"]


@pytest.mark.parametrize("ir", IRS)
def test_key_map_leads_from_each_weight_to_the_merged_one(ir: str) -> None:
    result = merged(GatedMlp(8, 12, False, False).eval(), (torch.randn(2, 3, 8),), ir)
    heirs = [found for key, found in result.key_map.items() if key.startswith(("gate", "up"))]
    assert heirs == [["gate.weight_merged"]] * 2


@pytest.mark.parametrize("ir", IRS)
def test_symbolic_extents_survive(ir: str) -> None:
    torch.manual_seed(0)
    batch, length = torch.export.Dim("batch", max=64), torch.export.Dim("length", max=64)
    model, shapes = GatedMlp(8, 12, True, True).eval(), ({0: batch, 1: length},)
    program = torch.export.export(model, (torch.randn(2, 3, 8),), dynamic_shapes=shapes, strict=False)
    graph = rc.capture(program if ir == "fx" else torch.onnx.export(program, dynamo=True, verbose=False))
    result = rc.rewrite(graph, ["merge-parallel"])
    assert splits(result.graph) == [(12, 12)]
    x = torch.randn(4, 7, 8)
    (y,) = result.graph.run({result.graph.inputs[0].name: x.numpy()}).values()
    np.testing.assert_allclose(y, model(x).detach().numpy(), rtol=1e-5, atol=1e-6)


def test_training_form_keeps_its_parameters() -> None:
    model = nn.Sequential(GatedMlp(8, 12, True, True), nn.Dropout(0.1)).train()
    plan = rc.plan(rc.capture(model, (torch.randn(2, 3, 8),)), ["merge-parallel"])
    assert not plan.rewrites
    assert "in training" in plan.refusals[0].reason


# ---- graphs in memory: the twins that must not fire ------------------------------------------------------------------


class Build:
    """Linears and convolutions of one input, one call each."""

    def __init__(self, shape: tuple[int | str, ...]) -> None:
        self.graph = Graph("built")
        self.x = self.graph.add_input("x", shape, "float32")
        self.random = np.random.default_rng(0)

    def weight(self, name: str, shape: tuple[int, ...], dtype: str = "float32") -> Value:
        return self.graph.add_constant(name, shape, dtype, self.random.standard_normal(shape).astype(dtype))

    def linear(
        self, name: str, width: int = 4, x: Value | None = None, weight: Value | None = None, **attrs: Any
    ) -> Op:
        x = x or self.x
        assert x.shape is not None
        extents = (width, x.shape[-1]) if attrs.get("transpose_weight", True) else (x.shape[-1], width)
        weight = weight or self.weight(f"{name}.weight", tuple(int(extent) for extent in extents))
        bias = attrs.pop("bias", None)
        kind = ValueType((*x.shape[:-1], width), "float32")
        return self.graph.add_op(OpKind.LINEAR, [x, weight, bias], [(name, kind)], attrs)

    def conv(self, name: str, kernel: int = 1, **attrs: Any) -> Op:
        assert self.x.shape is not None
        groups = attrs.get("groups", 1)
        weight = self.weight(f"{name}.weight", (4, int(self.x.shape[1]) // groups, kernel, kernel))
        edge = kernel // 2
        attrs = {"pads": (edge,) * 4, **attrs}
        kind = ValueType((self.x.shape[0], 4, *self.x.shape[2:]), "float32")
        return self.graph.add_op(OpKind.CONV, [self.x, weight, None], [(name, kind)], attrs)

    def done(self, *outputs: Value) -> Graph:
        self.graph.set_outputs(outputs or [op.output for op in self.graph if not op.output.uses])
        self.graph.commit()
        return self.graph


IMAGE, ROWS = (1, 4, 8, 8), (2, 5, 4)


def computed_weight(b: Build) -> None:
    made = b.graph.add_op(OpKind.RELU, [b.weight("raw", (4, 4))], [("made", ValueType((4, 4), "float32"))]).output
    b.linear("a", weight=made)
    b.linear("b")


def shared_weight(b: Build) -> None:
    first = b.linear("a")
    b.linear("b")
    b.linear("c", x=b.graph.op("b").output, weight=first.inputs[1])


def half_bias(b: Build) -> None:
    b.linear("a", bias=b.weight("half", (4,), "float16"))
    b.linear("b")


def broadcast_bias(b: Build) -> None:
    b.linear("a", bias=b.weight("one", (1,)))
    b.linear("b")


REFUSED: dict[str, tuple[tuple[int, ...], Any, str]] = {
    "stride": (IMAGE, lambda b: (b.conv("a"), b.conv("b", stride=(2, 2))), "stride is 1×1 and that of 'b' 2×2"),
    "kernel": (IMAGE, lambda b: (b.conv("a"), b.conv("b", 3)), "kernel is 1×1 and that of 'b' 3×3"),
    "border": (IMAGE, lambda b: (b.conv("a", 3), b.conv("b", 3, pads=(0,) * 4)), "pads"),
    "dilation": (IMAGE, lambda b: (b.conv("a", 3), b.conv("b", 3, dilation=(2, 2))), "dilation is 1×1"),
    "groups": (IMAGE, lambda b: (b.conv("a"), b.conv("b", groups=2)), "groups each read a part"),
    "layout": (ROWS, lambda b: (b.linear("a"), b.linear("b", transpose_weight=False)), "lies transposed"),
    "kind": (IMAGE, lambda b: (b.linear("a"), b.conv("b")), "it is a linear and 'b' a conv"),
    "weight computed": (ROWS, computed_weight, "computed in the graph"),
    "weight shared": (ROWS, shared_weight, "a copy would untie"),
    "bias of another dtype": (ROWS, half_bias, "several dtypes"),
    "bias that is broadcast": (ROWS, broadcast_bias, "not one number for each output"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_differs_stays_apart_and_says_why(case: str) -> None:
    shape, build, reason = REFUSED[case]
    b = Build(shape)
    build(b)
    plan, _ = make_plan(b.done(), [MergeParallel()])
    assert not plan.rewrites
    assert any(reason in refusal.reason for refusal in plan.refusals), [str(refusal) for refusal in plan.refusals]


def test_different_inputs_share_nothing() -> None:
    b = Build(ROWS)
    b.linear("b", x=b.linear("a").output)
    plan, _ = make_plan(b.done(), [MergeParallel()])
    assert not plan.rewrites
    assert "no two contractions" in plan.refusals[0].reason


def test_copy_merges_a_weight_that_something_else_reads_too() -> None:
    b = Build(ROWS)
    shared_weight(b)
    plan, after = make_plan(b.done(), [MergeParallel(copy=True)])
    assert len(plan.rewrites) == 1
    assert after.op("c").inputs[1] is after.value("a.weight")
    np.testing.assert_array_equal(after.data(after.value("a.weight_merged"))[:4], after.data(after.value("a.weight")))


def test_parts_that_are_outputs_keep_their_names() -> None:
    b = Build(("N", 5, 4))
    parts = [b.linear("a").output, b.linear("b", 6).output]
    _, after = make_plan(b.done(*parts), [MergeParallel()])
    assert [value.name for value in after.outputs] == ["a", "b"]
    assert [value.shape for value in after.outputs] == [("N", 5, 4), ("N", 5, 6)]
    assert after.value("a_merged").shape == ("N", 5, 10)


def test_what_leads_to_a_later_join_stays_apart() -> None:
    """Side outputs of an early value that a much later block takes: they would be held all the way."""
    b = Build(ROWS)
    kind = ValueType(ROWS, "float32")
    late = b.linear("late").output
    stream = b.graph.add_op(OpKind.ADD, [b.x, b.linear("early").output], [("add", kind)]).output
    branch = b.linear("branch", x=stream).output
    with_late = b.graph.add_op(OpKind.MUL, [branch, late], [("gate", kind)]).output
    b.graph.add_op(OpKind.ADD, [stream, with_late], [("add2", kind)])
    plan, _ = make_plan(b.done(), [MergeParallel()])
    assert not plan.rewrites
    assert all("leads to another residual join" in refusal.reason for refusal in plan.refusals)


def test_a_split_that_the_model_wrote_itself_is_read_as_it_stands() -> None:
    """s, b = split(W·x); s + F(b): the fork of a hand-written split is W·x, for nothing says that it was two layers."""

    class Halves(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.both, self.work = nn.Conv2d(4, 8, 1), nn.Conv2d(4, 4, 3, padding=1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            skip, branch = self.both(x).split(4, 1)
            return skip + F.relu(self.work(branch))

    (block,) = rc.inspect(captured(Halves().eval(), (torch.randn(1, 4, 6, 6),), "fx")).blocks
    assert (block.shortcut, block.fork) == ("view", "conv2d")


def test_plan_goes_through_json_and_applies_to_another_copy() -> None:
    def built() -> Graph:
        b = Build(IMAGE)
        b.conv("a"), b.conv("b"), b.conv("c", 3)
        return b.done()

    plan, after = make_plan(built(), [MergeParallel()])
    again = built()
    Plan.from_json(plan.to_json()).apply(again)
    assert [op.kind for op in again] == [op.kind for op in after]
    np.testing.assert_array_equal(
        again.data(again.value("a.weight_merged")), after.data(after.value("a.weight_merged"))
    )


@st.composite
def shared_inputs(draw: st.DrawFn) -> tuple[nn.Module, torch.Tensor]:
    """A module whose layers, of random widths, with and without bias, linear or convolution, read one value."""
    torch.manual_seed(draw(st.integers(0, 1000)))
    width, image = draw(st.integers(1, 5)), draw(st.booleans())
    kernel = draw(st.sampled_from([1, 3]))
    layers: list[nn.Module] = []
    for _ in range(draw(st.integers(2, 4))):
        out, bias = draw(st.integers(1, 5)), draw(st.booleans())
        layers.append(nn.Conv2d(width, out, kernel, bias=bias) if image else nn.Linear(width, out, bias=bias))

    class Side(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(layers)

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
            return tuple(torch.tanh(layer(x)) for layer in self.layers)

    return Side().eval(), torch.randn(2, width, 5, 6) if image else torch.randn(2, 3, width)


@settings(max_examples=6, deadline=None)
@given(shared_inputs())
def test_random_layers_of_one_input_become_one_and_compute_the_same(case: tuple[nn.Module, torch.Tensor]) -> None:
    model, x = case
    result = merged(model, (x,), "fx")
    assert len(splits(result.graph)) == 1
    with torch.no_grad():
        for a, b in zip(result.model(x), model(x), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_merged_model_trains_to_the_same_weights_by_plain_gradient_descent() -> None:
    """What the docs say of training: a step on the merged weight is the step on its parts."""
    torch.manual_seed(0)
    model, x = GatedMlp(4, 6, True, True).eval(), torch.randn(2, 3, 4)
    other = merged(model, (x,), "fx").model
    for net in (model, other):
        net.train()
        optimiser = torch.optim.SGD(net.parameters(), 0.1)
        net(x).square().sum().backward()
        optimiser.step()
    state = other.state_dict()
    torch.testing.assert_close(state["gate.weight_merged"], torch.cat([model.gate.weight, model.up.weight]).detach())
    torch.testing.assert_close(state["gate.bias_merged"], torch.cat([model.gate.bias, model.up.bias]).detach())
