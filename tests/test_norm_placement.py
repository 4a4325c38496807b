"""Passes that move norms, against modules written by hand and by others; each refusal beside what is converted."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import rescompile as rc
from rescompile.errors import RescompileError
from rescompile.graph import Graph
from rescompile.plans import Plan
from rescompile.rewriting import Result
from tests.norm_models import Stack, livened, twin

IRS = ("fx", "onnx")
X = (torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0)),)
IMAGE = (torch.randn(2, 8, 4, 4, generator=torch.Generator().manual_seed(0)),)


def captured(model: nn.Module, inputs: tuple[torch.Tensor, ...], ir: str = "fx") -> Graph:
    if ir == "fx":
        return rc.capture(model, inputs)
    return rc.capture(torch.onnx.export(model, inputs, dynamo=True, verbose=False))


def outputs(graph: Graph, inputs: tuple[torch.Tensor, ...]) -> np.ndarray[Any, Any]:
    names = [value.name for value in graph.inputs]
    arrays = {name: tensor.numpy() for name, tensor in zip(names, inputs, strict=True)}
    return next(iter(graph.run(arrays).values()))


def difference(graph: Graph, model: nn.Module, inputs: tuple[torch.Tensor, ...]) -> float:
    with torch.no_grad():
        expected = model(*inputs)
    return float(np.abs(outputs(graph, inputs) - expected.numpy()).max())


def converted(graph: Graph, spec: str, count: int) -> Result:
    result = rc.rewrite(graph, spec)
    assert not result.refused, result.refused
    assert len(result.applied) == count
    assert result.verification.ok
    return result


def reasons(model: nn.Module, spec: str = "pre-norm", inputs: tuple[torch.Tensor, ...] = X) -> list[str]:
    return [refusal.reason for refusal in rc.rewrite(captured(livened(model), inputs), spec).refused]


# ---- against modules written by hand ---------------------------------------------------------------------------------


@pytest.mark.parametrize("ir", IRS)
@pytest.mark.parametrize("norm", ["layer", "rms", "group"])
@pytest.mark.parametrize("target", ["pre", "branch", "sandwich"])
def test_a_post_norm_stack_becomes_the_module_written_with_the_other_placement(target: str, norm: str, ir: str) -> None:
    inputs = IMAGE if norm == "group" else X
    model = livened(Stack("post", norm, layer_scale=True))
    other = twin(model, Stack(target, norm, layer_scale=True, final=True))
    spec = "pre-norm" if target == "pre" else target
    result = converted(captured(model, inputs, ir), spec, 3)
    assert difference(result.graph, other, inputs) <= (0.0 if ir == "fx" else 1e-6)
    assert rc.inspect(result.graph).summary()["by_norm"] == {target: 3}
    back = converted(result.graph, "post-norm", 3)
    assert difference(back.graph, model, inputs) <= (0.0 if ir == "fx" else 1e-6)


@pytest.mark.parametrize("norm", ["spelled rms", "spelled layer"])
@pytest.mark.parametrize(
    ("source", "spec"), [("post", "pre-norm{final-norm=none}"), ("pre", "branch"), ("pre", "post-norm")]
)
def test_a_norm_that_several_operations_spell_moves_to_the_bit_in_half_precision(
    norm: str, source: str, spec: str
) -> None:
    target = {"pre-norm{final-norm=none}": "pre", "branch": "branch", "post-norm": "post"}[spec]
    model = livened(Stack(source, norm)).half()
    other = Stack(target, norm).half()
    other.load_state_dict(model.state_dict())
    inputs = (X[0].half(),)
    result = converted(captured(model, inputs), spec, 3)
    assert difference(result.graph, other.eval(), inputs) == 0.0


@pytest.mark.parametrize("source", ["pre", "branch", "sandwich"])
def test_every_placement_becomes_post_norm(source: str) -> None:
    model = livened(Stack(source))
    graph = captured(model, X)
    if source == "sandwich":
        assert all("one of them would have to go" in reason for reason in reasons(model, "post-norm"))
        return
    result = converted(graph, "post-norm", 3)
    assert difference(result.graph, twin(model, Stack("post")), X) == 0.0


def test_a_norm_of_the_model_behind_the_stack_stays_unless_it_is_named() -> None:
    model = livened(Stack("pre", final=True))
    kept = converted(captured(model, X), "post-norm", 3)
    assert difference(kept.graph, twin(model, Stack("post", final=True)), X) == 0.0
    gone = converted(captured(model, X), "post-norm{final-norm=final_norm}", 3)
    plain = Stack("post")
    plain.load_state_dict({key: value for key, value in model.state_dict().items() if "final" not in key})
    assert difference(gone.graph, plain.eval(), X) == 0.0


def test_deepnorm_scales_skip_and_weights_by_depth() -> None:
    model = livened(Stack("post", depth=4))
    other = twin(model, Stack("deepnorm", depth=4))
    with torch.no_grad():
        for layer in other.layers:
            layer.alpha = 4**0.25  # (2N)^¼ for N = 2 layers of two branches
            for linear in (layer.ff.up, layer.ff.down):
                linear.weight *= 16**-0.25  # (8N)^−¼
    result = converted(captured(model, X), "deepnorm", 4)
    assert difference(result.graph, other, X) < 1e-6
    assert rc.inspect(result.graph).blocks[0].scale is not None


def test_deepnorm_scales_values_and_not_queries_of_a_packed_projection() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model = livened(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False))
    result = converted(captured(model, X), "deepnorm", 4)
    before, after = model.state_dict(), result.model.state_dict()
    key = "layers.0.self_attn.in_proj_weight"
    beta = 16**-0.25
    torch.testing.assert_close(after[key][:16], before[key][:16], rtol=0, atol=0)
    torch.testing.assert_close(after[key][16:], before[key][16:] * beta, rtol=1e-6, atol=0)
    key = "layers.0.self_attn.out_proj.weight"
    torch.testing.assert_close(after[key], before[key] * beta, rtol=1e-6, atol=0)


def test_deepnorm_has_factors_of_their_own_for_an_encoder_before_a_decoder() -> None:
    model = livened(nn.Transformer(8, 2, 2, 3, 16, batch_first=True))
    plan = rc.plan(captured(model, (X[0], X[0])), "deepnorm")
    encoder, decoder = plan.rewrites[0].reason, plan.rewrites[-1].reason
    depth = (2**4 * 3) ** (1 / 16)
    assert f"α = {0.81 * depth:.4g}, β = {0.87 / depth:.4g}" in encoder
    assert f"α = {9**0.25:.4g}, β = {36**-0.25:.4g}" in decoder


# ---- against public siblings -----------------------------------------------------------------------------------------

D = {"d_model": 16, "nhead": 2, "dim_feedforward": 32}
S = (torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(1)),)
M = (torch.randn(2, 7, 16, generator=torch.Generator().manual_seed(2)),)


def encoder(norm_first: bool, batch_first: bool = True) -> nn.Module:
    layer = nn.TransformerEncoderLayer(**D, batch_first=batch_first, norm_first=norm_first)
    return nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)


def decoder(norm_first: bool) -> nn.Module:
    return nn.TransformerDecoder(nn.TransformerDecoderLayer(**D, batch_first=True, norm_first=norm_first), 2)


def whole(norm_first: bool) -> nn.Module:
    return nn.Transformer(16, 2, 2, 2, 32, batch_first=True, norm_first=norm_first)


@pytest.fixture(autouse=True)
def _slow_path() -> Any:
    """The fused path of torch's encoder computes otherwise, and takes evaluation for granted."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    yield
    torch.backends.mha.set_fastpath_enabled(before)


@pytest.mark.parametrize("ir", IRS)
@pytest.mark.parametrize(
    ("make", "inputs", "blocks"), [(encoder, S, 6), (decoder, S + M, 6), (whole, S + M, 10)], ids=["enc", "dec", "both"]
)
def test_torch_transformers_become_their_norm_first_form_and_come_back(
    make: Any, inputs: tuple[torch.Tensor, ...], blocks: int, ir: str
) -> None:
    tolerance = 0.0 if ir == "fx" else 1e-6
    model = livened(make(False))
    graph = captured(model, inputs, ir)
    result = converted(graph, "pre-norm{final-norm=none}", blocks)
    assert difference(result.graph, twin(model, make(True)), inputs) <= tolerance
    again = rc.rewrite(result.graph, "pre-norm{final-norm=none}")
    assert not again.applied
    assert {refusal.reason for refusal in again.refused} == {"it is pre-norm already"}
    back = converted(result.graph, "post-norm", blocks)
    assert not rc.diff(graph, back.graph)
    assert difference(back.graph, model, inputs) <= tolerance


def test_dropout_keeps_its_place_in_training() -> None:
    torch.manual_seed(0)
    model = livened(encoder(False))
    pre = twin(model, encoder(True)).train()
    result = converted(captured(model, S), "pre-norm{final-norm=none}", 6)
    trained = result.model.train()
    torch.manual_seed(3)
    expected = pre(*S)
    torch.manual_seed(3)
    torch.testing.assert_close(trained(*S), expected, rtol=0, atol=0)


class Hidden(nn.Module):
    """A transformers model as a function of its tensors."""

    def __init__(self, model: nn.Module, *names: str) -> None:
        super().__init__()
        self.model, self.names = model, names

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        out = self.model(**dict(zip(self.names, inputs, strict=True)), return_dict=True)
        return out.logits if "logits" in out else out.last_hidden_state


IDS = torch.randint(3, 50, (2, 7), generator=torch.Generator().manual_seed(0))


def opt() -> tuple[nn.Module, nn.Module, tuple[torch.Tensor, ...], str, Any]:
    import transformers

    shape = {"vocab_size": 50, "hidden_size": 16, "ffn_dim": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    models = []
    for first in (False, True):
        config = transformers.OPTConfig(
            **shape, max_position_embeddings=32, word_embed_proj_dim=16, do_layer_norm_before=first, use_cache=False
        )
        models.append(Hidden(transformers.OPTForCausalLM(config), "input_ids"))
    return *models, (IDS,), "final-norm=model.model.decoder.final_layer_norm", lambda key: key


def roberta() -> tuple[nn.Module, nn.Module, tuple[torch.Tensor, ...], str, Any]:
    import transformers

    shape = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    shape |= {"intermediate_size": 32, "max_position_embeddings": 32, "pad_token_id": 1}
    post = transformers.RobertaModel(transformers.RobertaConfig(**shape), add_pooling_layer=False)
    config = transformers.RobertaPreLayerNormConfig(**shape)
    pre = transformers.RobertaPreLayerNormModel(config, add_pooling_layer=False)

    def rename(key: str) -> str:
        if "encoder" not in key:
            return key
        key = key.replace("attention.output.LayerNorm", "attention.LayerNorm")
        return key.replace(".output.LayerNorm", ".intermediate.LayerNorm")

    return Hidden(post, "input_ids"), Hidden(pre, "input_ids"), (IDS,), "final-norm=model.LayerNorm", rename


def bart() -> tuple[nn.Module, nn.Module, tuple[torch.Tensor, ...], str, Any]:
    import transformers

    shape = {"vocab_size": 50, "d_model": 16, "max_position_embeddings": 32, "use_cache": False}
    for side in ("encoder", "decoder"):
        shape |= {f"{side}_layers": 2, f"{side}_attention_heads": 2, f"{side}_ffn_dim": 32}
    post = Hidden(transformers.BartModel(transformers.BartConfig(**shape)), "input_ids", "decoder_input_ids")
    pre = Hidden(transformers.MBartModel(transformers.MBartConfig(**shape)), "input_ids", "decoder_input_ids")
    names = "final-norm=model.encoder.layer_norm,final-norm=model.decoder.layer_norm"
    return post, pre, (IDS, IDS), names, lambda key: key


def wav2vec2() -> tuple[nn.Module, nn.Module, tuple[torch.Tensor, ...], str, Any]:
    import transformers

    shape: dict[str, Any] = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    shape |= {"intermediate_size": 32, "conv_dim": (16, 16), "conv_stride": (5, 2), "conv_kernel": (10, 3)}
    shape |= {"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2, "feat_extract_norm": "layer"}
    models = []
    for stable in (False, True):
        config = transformers.Wav2Vec2Config(**shape, num_feat_extract_layers=2, do_stable_layer_norm=stable)
        models.append(Hidden(transformers.Wav2Vec2Model(config), "input_values"))
    wave = (torch.randn(1, 400, generator=torch.Generator().manual_seed(0)),)
    return *models, wave, "final-norm=encoder.layer_norm", lambda key: key


@pytest.mark.parametrize("make", [opt, roberta, bart, wav2vec2])
def test_public_post_norm_models_become_their_pre_norm_siblings(make: Any) -> None:
    post, pre, inputs, finals, rename = make()
    result = rc.rewrite(captured(livened(post), inputs), f"pre-norm{{{finals}}}")
    allowed = ["positions by a convolution"] if make is wav2vec2 else []
    assert [any(word in refusal.reason for word in allowed) for refusal in result.refused] == [True] * len(allowed)
    assert difference(result.graph, twin(post, pre, rename), inputs) == 0.0
    back = rc.rewrite(result.graph, "post-norm")
    if make is not wav2vec2:  # where the norm before the stack went behind it, which `post-norm` leaves there
        assert difference(back.graph, post, inputs) == 0.0


@pytest.mark.parametrize("make", [opt, roberta, bart])
def test_files_in_onnx_convert_as_the_module_does(make: Any, tmp_path: Any) -> None:
    post, pre, inputs, finals, rename = make()
    livened(post)
    path = tmp_path / "post.onnx"
    torch.onnx.export(post, inputs, path, dynamo=True, verbose=False, external_data=False)
    result = rc.rewrite(rc.load(path), f"pre-norm{{{finals}}}")
    assert not result.refused
    result.save(tmp_path / "pre.onnx")
    assert difference(rc.load(tmp_path / "pre.onnx"), twin(post, pre, rename), inputs) < 2e-6


# ---- which blocks, and the end of the stack --------------------------------------------------------------------------


@pytest.mark.parametrize("ir", IRS)
def test_every_block_can_be_converted_alone_and_in_any_order(ir: str) -> None:
    graph = captured(livened(Stack("post")), X, ir)
    plan = rc.plan(graph, "pre-norm")
    some = rc.apply(graph, Plan(plan.model, plan.ir, [plan.rewrites[2], plan.rewrites[0]]))
    asked = converted(graph, "pre-norm{blocks=[0,2]}", 2)
    np.testing.assert_array_equal(outputs(some.graph, X), outputs(asked.graph, X))
    assert [block.norm for block in rc.inspect(asked.graph).blocks] == ["pre", "post", "pre"]
    one_by_one = graph
    for name in ("layers.1", "layers.0", "layers.2"):
        one_by_one = converted(one_by_one, f"pre-norm{{blocks={name}}}", 1).graph
    np.testing.assert_array_equal(outputs(one_by_one, X), outputs(converted(graph, "pre-norm", 3).graph, X))


def test_ranges_of_blocks_and_unknown_ones() -> None:
    graph = captured(livened(Stack("post")), X)
    assert len(rc.plan(graph, "pre-norm{blocks=1-2}").rewrites) == 2
    with pytest.raises(RescompileError, match=r"There is no residual block 'layers\.7'"):
        rc.plan(graph, "pre-norm{blocks=layers.7}")


@pytest.mark.parametrize("ir", IRS)
def test_a_final_norm_is_added_named_or_left_out(ir: str) -> None:
    model = livened(Stack("post"))
    graph = captured(model, X, ir)
    keys = {value.name for value in graph.parameters}
    added = {
        spec: {value.name for value in converted(graph, spec, 3).graph.parameters} - keys
        for spec in ("pre-norm", "pre-norm{final-norm=head.ln}", "pre-norm{final-norm=none}")
    }
    assert list(added.values()) == [
        {"final_norm.weight", "final_norm.bias"},
        {"head.ln.weight", "head.ln.bias"},
        set(),
    ]
    normed = captured(livened(Stack("post", final=True)), X, ir)
    assert len(converted(normed, "pre-norm", 3).graph.parameters) == len(normed.parameters)


def test_the_final_norm_that_was_added_goes_on_the_way_back() -> None:
    graph = captured(livened(Stack("post")), X)
    back = converted(converted(graph, "pre-norm", 3).graph, "post-norm", 3)
    assert not rc.diff(graph, back.graph)


def test_more_stacks_than_names_is_an_error() -> None:
    graph = captured(livened(nn.ModuleDict({"m": Two()})["m"]), X * 2)
    with pytest.raises(RescompileError, match="name one for each"):
        rc.plan(graph, "pre-norm{final-norm=only}")


class Two(nn.Module):
    """Two stacks side by side."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = Stack("post"), Stack("post")

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return self.a(x) * self.b(y)


def test_keys_stay_and_old_checkpoints_load() -> None:
    model = livened(encoder(False))
    result = converted(captured(model, S), "pre-norm", 6)
    missing, unexpected = result.model.load_state_dict(model.state_dict(), strict=False)
    assert (missing, unexpected) == (["final_norm.weight", "final_norm.bias"], [])
    assert all(result.key_map[key] == [key] for key in model.state_dict())


def test_shared_layers_move_together_or_not_at_all() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = Stack("post", depth=1, embedded=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layer(self.layer(self.layer(x)))

    graph = captured(livened(Shared()), X)
    assert len(rc.plan(graph, "pre-norm").rewrites) == 3
    plan = rc.plan(graph, "pre-norm{blocks=0-1}")
    assert not plan.rewrites
    assert all("shares its layers" in refusal.reason for refusal in plan.refusals)


# ---- modes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ir", IRS)
def test_reblocking_is_exact_and_says_so(ir: str) -> None:
    model = livened(encoder(False))
    graph = captured(model, S, ir)
    result = converted(graph, "pre-norm{mode=reblock}", 6)
    assert result.verification.preserves == "values"
    assert result.verification.worst is not None
    assert result.verification.worst.difference == 0.0
    assert all("exact: the function stays the same" in rewrite.reason for rewrite in result.applied)
    assert "this changes the function" in converted(graph, "pre-norm", 6).applied[0].reason


def test_the_report_states_the_measured_difference() -> None:
    class Head(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stack, self.head = Stack("post"), nn.Linear(8, 11)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.stack(x))

    model = livened(Head())
    result = converted(captured(model, X), "pre-norm", 3)
    (effect,) = result.verification.effects
    inputs = (torch.from_numpy(_random_input(result.original)),)
    with torch.no_grad():
        a, b = model(*inputs).double(), result.model(*inputs).double()
    cosine = torch.nn.functional.cosine_similarity(a.ravel(), b.ravel(), dim=0)
    divergence = torch.nn.functional.kl_div(b.log_softmax(-1), a.log_softmax(-1), log_target=True, reduction="none")
    assert effect.cosine == pytest.approx(float(cosine), abs=1e-6)
    assert effect.divergence == pytest.approx(float(divergence.sum(-1).mean()), rel=1e-5)
    assert "the function changed" in str(result)
    assert f"cosine {effect.cosine:.3f}" in str(result)


def _random_input(graph: Graph) -> np.ndarray[Any, Any]:
    from rescompile.verify import ADVERSARIES, make_inputs

    arrays = make_inputs(graph, ADVERSARIES["random"], 0)
    assert arrays is not None
    return next(iter(arrays.values()))


@pytest.mark.parametrize("ir", IRS)
def test_a_gradual_conversion_starts_at_the_original_and_ends_at_the_converted_model(ir: str) -> None:
    model = livened(encoder(False))
    graph = captured(model, S, ir)
    blended = converted(graph, "pre-norm{mode=gradual}", 7)
    # ONNX Runtime fuses the one and the other graph in different ways.
    tolerance = 0.0 if ir == "fx" else 1e-6
    np.testing.assert_allclose(outputs(blended.graph, S), outputs(graph, S), rtol=0, atol=tolerance)
    there = converted(graph, "pre-norm", 6)
    blend = blended.graph.value("norm_blend")
    untouched = blended.graph.clone()
    blended.graph.set_data(blend, np.asarray(1.0, np.float32))
    np.testing.assert_allclose(outputs(blended.graph, S), outputs(there.graph, S), rtol=0, atol=tolerance)
    frozen = converted(blended.graph, "freeze-blend", 1)
    assert not rc.diff(there.graph, frozen.graph)
    back = converted(untouched, "freeze-blend", 1)
    np.testing.assert_array_equal(outputs(back.graph, S), outputs(graph, S))
    assert "norm_blend" not in {value.name for value in back.graph.parameters}
    assert len(back.graph) == len(graph)


def test_the_blend_is_the_models_own_and_trains_halfway() -> None:
    model = livened(encoder(False))
    blended = converted(captured(model, S), "pre-norm{mode=gradual}", 7).model
    buffers = dict(blended.named_buffers())
    buffers["norm_blend"].fill_(0.5)
    optimiser = torch.optim.SGD(blended.parameters(), lr=0.01)
    before = blended(*S).detach()
    blended(*S).square().sum().backward()
    optimiser.step()
    assert not torch.equal(before, blended(*S))
    refused = rc.rewrite(rc.capture(blended, S), "freeze-blend").refused
    assert [refusal.reason for refusal in refused] == [
        "it is 0.5: a blend is frozen at 1, or at 0 for the original form"
    ]


def test_calibration_starts_nearer_than_conversion_does(tmp_path: Any) -> None:
    model = livened(Stack("post", depth=8))
    for name, parameter in model.named_parameters():
        if "norm" in name:
            nn.init.constant_(parameter, float(name.endswith("weight")))
        elif parameter.dim() > 1:
            parameter.data *= 2.5
    graph = captured(model, X)
    data = tmp_path / "x.npz"
    np.savez(data, **{graph.inputs[0].name: X[0].numpy()})

    def cosine(spec: str) -> float:
        a, b = outputs(graph, X), outputs(converted(graph, spec, 8).graph, X)
        return float((a * b).sum() / np.linalg.norm(a) / np.linalg.norm(b))

    calibrated, plain = cosine(f'pre-norm{{mode=calibrated,data="{data}"}}'), cosine("pre-norm")
    assert 1 - calibrated < (1 - plain) / 2


def test_data_is_for_calibration_only() -> None:
    with pytest.raises(RescompileError, match="mode=calibrated"):
        rc.plan(captured(livened(Stack("post")), X), "pre-norm{data=x.npz}")


# ---- what is refused -------------------------------------------------------------------------------------------------


class Odd(nn.Module):
    """A post-norm stack of two blocks with one thing that no conversion fits."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.what = what
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
        self.norm, self.other = nn.LayerNorm(8), nn.LayerNorm(8)
        if what == "batch norm":
            self.norm = nn.BatchNorm1d(5)
        if what == "axes":
            self.norm = nn.LayerNorm((5, 8))
        if what == "transposed":
            self.second, self.other = nn.Linear(5, 5), nn.LayerNorm(5)

    def forward(self, x: torch.Tensor) -> Any:
        s = x + self.first(x).relu()
        y = self.norm(s)
        if self.what == "transposed":
            y = y.transpose(1, 2)
        other = self.norm if self.what == "shared" else self.other
        z = other(y + self.second(y).relu())
        if self.what == "norm read":
            return z * y.sigmoid()
        if self.what == "sum read":
            return z * s.sigmoid()
        return (z, y) if self.what == "output" else z


REFUSED = {
    "batch norm": "is a batch norm: its running statistics are those of what it normalises now",
    "axes": "normalises other axes than the last",
    "transposed": "changes the axis",
    "shared": "is also the norm of",
    "norm read": "in the middle of the stack, is also read by",
    "sum read": "the sum is also read by",
    "output": "in the middle of the stack, is an output of the graph",
}


@pytest.mark.parametrize("ir", IRS)
@pytest.mark.parametrize("what", REFUSED)
def test_what_does_not_fit_is_refused_by_block_and_the_rest_done(what: str, ir: str) -> None:
    result = rc.rewrite(captured(livened(Odd(what)), X, ir), "pre-norm")
    assert any(REFUSED[what] in refusal.reason for refusal in result.refused), result.refused
    assert len(result.applied) == (0 if what == "shared" else 1)
    assert result.verification.ok


def test_the_plain_twin_of_what_is_refused_is_converted() -> None:
    converted(captured(livened(Odd("nothing")), X), "pre-norm", 2)


def test_a_view_of_the_stream_that_others_read_too_is_left_alone() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.norm, self.other = nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            turned = x.transpose(0, 1)
            y = self.norm(x + self.linear(turned).relu().transpose(0, 1))
            return y * self.other(turned).transpose(0, 1)

    assert any("rearranges the stream for" in reason for reason in reasons(Shared()))


@pytest.mark.parametrize("placement", ["post", "branch"])
def test_blocks_with_an_activation_between_them_are_for_another_pass(placement: str) -> None:
    stack = Stack(placement, "group")
    stack.layers = nn.ModuleList(nn.Sequential(layer, nn.ReLU()) for layer in stack.layers)
    found = reasons(stack, inputs=IMAGE)
    assert sum("is for pre-activation to move" in reason for reason in found) == 2


def test_mixed_placement_all_or_nothing() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.post, self.pre = Stack("post", depth=2), Stack("pre", depth=2, embedded=False, final=True)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.pre(self.post(x))

    graph = captured(livened(Mixed()), X)
    result = rc.rewrite(graph, "pre-norm")
    assert len(result.applied) == 2
    assert {refusal.reason for refusal in result.refused} == {"it is pre-norm already"}
    with pytest.raises(RescompileError, match="Nothing was done, because 2 places were refused"):
        rc.rewrite(graph, "pre-norm", all_or_nothing=True)


def test_blocks_without_norms_at_their_ends_have_nothing_to_move() -> None:
    bare = nn.ModuleDict({"m": Odd("nothing")})["m"]
    bare.norm = bare.other = nn.Identity()
    assert all("it has no norm" in reason for reason in reasons(bare))


def test_the_command_line_writes_nothing_on_all_or_nothing(run: Any, tmp_path: Any) -> None:
    path = tmp_path / "m.onnx"
    torch.onnx.export(livened(Odd("sum read")), X, path, dynamo=True, verbose=False, external_data=False)
    out = tmp_path / "out.onnx"
    code, _, error = run("rewrite", path, "-o", out, "--pass", "pre-norm", "--all-or-nothing")
    assert (code, out.exists()) == (1, False)
    assert "the sum is also read by" in error
    code, text, _ = run("rewrite", path, "-o", out, "--pass", "pre-norm")
    assert (code, out.exists()) == (0, True)
    assert "the function changed" in text


# ---- with other passes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ir", IRS)
def test_converted_stacks_fuse_into_add_norms_with_both_outputs_and_compile(ir: str) -> None:
    pytest.importorskip("tvm")
    model = livened(encoder(False))
    result = rc.rewrite(captured(model, S, ir), ["pre-norm", "fuse"])
    joins = [op for op in result.graph if op.kind.value in ("add_norm", "fused_region")]
    assert sum("add_layer_norm" in str(op.attrs.get("label", "add_layer_norm")) for op in joins) == 6
    read = [sum(bool(value.uses) for value in op.outputs) for op in joins]
    assert read.count(2) == 5  # the last one's sum is read by nobody
    program = rc.compile(result.graph, target="cpu", passes=())
    pre = twin(model, Finished(encoder(True)), lambda key: f"stack.{key}")
    with torch.no_grad():
        expected = pre(*S)
    torch.testing.assert_close(torch.as_tensor(program(*S)), expected, rtol=1e-5, atol=1e-5)


class Finished(nn.Module):
    """A stack with a norm behind it."""

    def __init__(self, stack: nn.Module) -> None:
        super().__init__()
        self.stack, self.norm = stack, nn.LayerNorm(16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.norm(self.stack(x))
        return y


def test_equal_norms_that_an_exporter_merged_are_no_shared_norm() -> None:
    model = encoder(False).eval()  # gains 1, shifts 0
    graph = captured(model, S, "onnx")
    assert len({value for op in graph if op.kind.value == "layer_norm" for value in op.inputs[1:]}) == 2
    result = converted(graph, "pre-norm", 6)
    assert difference(result.graph, twin(model, Finished(encoder(True)), lambda key: f"stack.{key}"), S) < 1e-5
