"""`insert-shortcuts` against hand-written residual networks, in both IRs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import rescompile as rc
from rescompile.graph import Graph
from tests.plain_models import Autoencoder, PlainNet, StackedLstm, mlp

IRS = ("fx", "onnx")


def captured(model: nn.Module, inputs: tuple[torch.Tensor, ...], ir: str) -> Graph:
    model.eval()
    if ir == "fx":
        return rc.capture(model, inputs)
    return rc.capture(torch.onnx.export(model, inputs, dynamo=True, verbose=False))


def image(size: int = 32, batch: int = 2) -> tuple[torch.Tensor]:
    return (torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(0)),)


def first_output(graph: Graph, inputs: tuple[torch.Tensor, ...]) -> np.ndarray[Any, Any]:
    arrays = {value.name: tensor.numpy() for value, tensor in zip(graph.inputs, inputs, strict=True)}
    return next(iter(graph.run(arrays).values()))


def livened(model: nn.Module) -> nn.Module:
    """Running statistics other than 0 and 1, so that no norm is the identity."""
    generator = torch.Generator().manual_seed(1)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1, generator=generator)
            module.running_var.uniform_(0.7, 1.3, generator=generator)
    return model.eval()


# ---- published numbers -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("depth", "millions"), [(20, 0.27), (32, 0.46), (44, 0.66), (56, 0.85), (110, 1.7)])
def test_option_a_adds_no_parameter_to_the_networks_of_he_2015(depth: int, millions: float) -> None:
    plain = PlainNet((depth - 2) // 6).eval()
    result = rc.rewrite(rc.capture(plain, image()), "insert-shortcuts{every=2,match=pad,start=residual}", verify=False)
    report = rc.inspect(result.graph)
    assert round(report.parameters / 1e6, 2 if millions < 1 else 1) == millions
    assert report.parameters == sum(parameter.numel() for parameter in plain.parameters())
    assert report.summary()["by_kind"] == {"add": (depth - 2) // 2}
    assert report.summary()["by_shortcut"] == {"identity": (depth - 2) // 2 - 2, "pad": 2}


@pytest.mark.parametrize("ir", IRS)
@pytest.mark.parametrize("option", ["A", "B"])
def test_plain_network_becomes_the_hand_written_one(option: str, ir: str) -> None:
    plain = livened(PlainNet(1))
    match = {"A": "pad", "B": "projection"}[option]
    norm = "auto" if ir == "fx" else "batch"  # the exporter folds the batch norms that `auto` would go by
    result = rc.rewrite(
        captured(plain, image(), ir), f"insert-shortcuts{{every=2,match={match},start=residual,norm={norm}}}"
    )
    target = PlainNet(1, residual=True, option=option)
    state = dict(plain.state_dict())
    for parameter in result.graph.parameters:
        if parameter.name.startswith("shortcuts."):
            number, leaf = parameter.name.removeprefix("shortcuts.").split(".", 1)
            place = {"projection": "0", "norm": "1"}[leaf.split(".")[0]]
            name = f"projections.{2 * int(number)}.{place}.{leaf.split('.', 1)[1]}"
            state[name] = torch.from_numpy(result.graph.data(parameter))
    missing = target.load_state_dict(state, strict=False)
    assert all(name.endswith("num_batches_tracked") for name in missing.missing_keys)
    assert not missing.unexpected_keys
    with torch.no_grad():
        expected = target.eval()(*image()).numpy()
    np.testing.assert_allclose(first_output(result.graph, image()), expected, rtol=0, atol=2e-5)
    by_hand = rc.inspect(rc.capture(target, image()))
    by_pass = rc.inspect(result.graph)
    assert [(block.kind, block.shortcut) for block in by_hand] == [(block.kind, block.shortcut) for block in by_pass]


# ---- what start=preserve preserves -------------------------------------------------------------------------------


SPECS = [
    "insert-shortcuts{every=2}",
    "insert-shortcuts{every=1,join=after}",
    "insert-shortcuts{every=2,join=pre-activation}",
    "insert-shortcuts{every=2,match=pad}",
    "insert-shortcuts{every=2,match=pool,norm=none}",
    "insert-shortcuts{every=3,match=always}",
    "insert-shortcuts{every=2,norm=batch,activation=relu}",
    "insert-shortcuts{every=2,kind=gated}",
    "insert-shortcuts{every=2,kind=dense}",
    "insert-shortcuts",
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("spec", SPECS)
def test_preserve_is_exact_to_the_bit(spec: str, dtype: torch.dtype) -> None:
    plain = livened(PlainNet(1)).to(dtype)
    inputs = (image(16)[0].to(dtype),)
    result = rc.rewrite(rc.capture(plain, inputs), spec, verify=False)
    assert result.applied
    with torch.no_grad():
        assert torch.equal(result.model(*inputs), plain(*inputs))


@pytest.mark.parametrize("spec", SPECS)
def test_preserve_is_exact_in_onnx(spec: str) -> None:
    graph = captured(livened(PlainNet(1)), image(16), "onnx")
    result = rc.rewrite(graph, spec)
    assert result.applied
    assert result.verification.ok
    np.testing.assert_array_equal(first_output(result.graph, image(16)), first_output(graph, image(16)))


@pytest.mark.parametrize(
    "spec", [*SPECS, "insert-shortcuts{every=2,start=rezero}", "insert-shortcuts{start=layerscale}"]
)
def test_inserting_twice_changes_nothing_the_second_time(spec: str) -> None:
    result = rc.rewrite(rc.capture(livened(PlainNet(2)), image(16)), spec, verify=False)
    assert result.applied
    assert not rc.rewrite(result.graph, spec, verify=False).applied


@pytest.mark.parametrize("ir", IRS)
@pytest.mark.parametrize(
    "options",
    ["start=preserve", "start=rezero", "start=layerscale", "start=fixup", "kind=gated", "kind=dense", "match=always"],
)
def test_asking_twice_for_named_places_changes_nothing_the_second_time(options: str, ir: str) -> None:
    graph = captured(mlp(4), (torch.randn(2, 16),), ir)
    spec = f"insert-shortcuts{{between=tanh:tanh_2,between=tanh_2:linear_4,{options}}}"
    result = rc.rewrite(graph, spec, verify=False)
    assert len(result.applied) == 2
    again = rc.rewrite(result.graph, spec, verify=False)
    assert not again.applied
    assert all("there is a shortcut already" in refused.reason for refused in again.refused)


@pytest.mark.parametrize("ir", IRS)
@pytest.mark.parametrize("kind", ["add", "gated", "dense"])
@pytest.mark.parametrize("join", ["before-activation", "after", "pre-activation"])
def test_detection_finds_exactly_what_was_inserted(kind: str, join: str, ir: str) -> None:
    graph = captured(livened(PlainNet(1)), image(16), ir)
    result = rc.rewrite(graph, f"insert-shortcuts{{every=2,kind={kind},join={join}}}", verify=False)
    assert rc.inspect(result.graph).summary()["by_kind"] == {kind: len(result.applied)} == {kind: 3}


def upsampling(mode: str) -> nn.Sequential:
    first = [nn.Conv2d(3, 8, 3, 1, 1), nn.ReLU(), nn.Conv2d(8, 8, 3, 1, 1), nn.ReLU()]
    return nn.Sequential(*first, nn.Upsample(scale_factor=2, mode=mode), nn.Conv2d(8, 12, 3, 1, 1), nn.ReLU())


@pytest.mark.parametrize("ir", IRS)
@pytest.mark.parametrize("mode", ["nearest", "bilinear"])
@pytest.mark.parametrize("options", ["every=1,join=after", "every=2", "every=2,kind=dense", "every=2,kind=gated"])
def test_preserve_is_exact_across_upsampling_and_found_again(options: str, mode: str, ir: str) -> None:
    graph = captured(upsampling(mode), image(7), ir)
    result = rc.rewrite(graph, f"insert-shortcuts{{{options}}}")
    assert result.applied
    assert len(rc.inspect(result.graph)) == len(result.applied)
    np.testing.assert_array_equal(first_output(result.graph, image(7)), first_output(graph, image(7)))


@pytest.mark.parametrize("ir", IRS)
@pytest.mark.parametrize("spec", [*SPECS, "insert-shortcuts{every=2,start=layerscale,match=pool}"])
def test_costs_of_the_shortcuts_add_up_to_what_the_network_costs_more(spec: str, ir: str) -> None:
    result = rc.rewrite(captured(livened(PlainNet(1)), image(16), ir), spec, verify=False)
    pattern = r": ([\d,]+) parameters?, ([\d,]+) FLOPs, ([\d,]+) bytes moved"
    found = [re.search(pattern, rewrite.reason) for rewrite in result.applied]
    stated = [sum(int(match[1 + at].replace(",", "")) for match in found if match) for at in range(3)]
    before, after = result.costs
    assert all(found)
    assert stated[0] == after.parameters - before.parameters
    assert stated[1] == after.flops - before.flops
    assert stated[2] == after.bytes - before.bytes


# ---- sums that would be no residual connection -------------------------------------------------------------------


def widening(last: int, *between: nn.Module) -> nn.Sequential:
    """A stem, a layer that keeps the width, and one that changes it, with modules behind its linear map."""
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, last), *between)


@pytest.mark.parametrize("ir", IRS)
def test_projection_around_one_layer_joins_behind_its_activation(ir: str) -> None:
    graph = captured(widening(12, nn.Tanh(), nn.Linear(12, 12)), (torch.randn(2, 6),), ir)
    result = rc.rewrite(graph, "insert-shortcuts{every=1}")
    assert [("one linear map" in rewrite.reason) for rewrite in result.applied] == [False, True, False]
    assert rc.inspect(result.graph).summary()["by_kind"] == {"add": 3}
    assert not rc.rewrite(result.graph, "insert-shortcuts{every=1}", verify=False).applied


@pytest.mark.parametrize("ir", IRS)
def test_projection_around_a_bare_linear_map_is_refused(ir: str) -> None:
    graph = captured(widening(12), (torch.randn(2, 6),), ir)
    result = rc.rewrite(graph, "insert-shortcuts{every=1}")
    assert len(result.applied) == 1
    assert "W·x + P·x is one linear map" in result.refused[0].reason


@pytest.mark.parametrize("spec", ["every=1,join=after,activation=relu", "every=1,join=after,norm=layer"])
def test_projection_with_an_activation_beside_the_same_is_refused_and_one_with_a_norm_is_told(spec: str) -> None:
    graph = captured(widening(12, nn.ReLU()), (torch.randn(2, 6),), "fx")
    result = rc.rewrite(graph, f"insert-shortcuts{{{spec}}}")
    told = "norm" in spec
    assert [refused.reason.count("projections alike") for refused in result.refused] == [1] * (not told)
    assert rc.inspect(result.graph).summary()["by_kind"] == {"add": 1 + told}


# ---- what the other starts compute -------------------------------------------------------------------------------


def started(start: str, kind: str = "add") -> tuple[nn.Sequential, nn.Module, torch.Tensor]:
    model, x = mlp(4).eval(), torch.randn(3, 16)
    result = rc.rewrite(rc.capture(model, (x,)), f"insert-shortcuts{{every=2,start={start},kind={kind}}}")
    assert len(result.applied) == 2
    assert result.verification.ok
    assert result.verification.preserves == "interface"
    return model, result.model, x


def by_hand(model: nn.Sequential, x: torch.Tensor, join: Any) -> torch.Tensor:
    """The MLP with `join(x, F(x), number)` before the activation of each second hidden layer."""
    x = torch.tanh(model[0](x))
    for number, at in enumerate((2, 6)):
        x = torch.tanh(join(x, model[at + 2](torch.tanh(model[at](x))), number))
    y: torch.Tensor = model[10](x)
    return y


@pytest.mark.parametrize("start", ["rezero", "skipinit"])
def test_rezero_starts_with_the_skips_alone(start: str) -> None:
    model, result, x = started(start)
    with torch.no_grad():
        assert torch.equal(result(x), by_hand(model, x, lambda x, f, _: x))


def test_layer_scale_starts_with_a_tenth_of_each_branch() -> None:
    model, result, x = started("layerscale")
    with torch.no_grad():
        torch.testing.assert_close(result(x), by_hand(model, x, lambda x, f, _: x + 0.1 * f), rtol=0, atol=1e-6)


def test_highway_starts_with_its_bias() -> None:
    model, result, x = started("highway", kind="gated")
    state = result.state_dict()

    def mix(x: torch.Tensor, f: torch.Tensor, number: int) -> torch.Tensor:
        weight, bias = (state[f"shortcuts.{number}.gate.{leaf}"] for leaf in ("weight", "bias"))
        assert torch.equal(bias, torch.full((16,), -2.0))
        gate = torch.sigmoid(nn.functional.linear(x, weight, bias))
        return gate * f + (1 - gate) * x

    with torch.no_grad():
        torch.testing.assert_close(result(x), by_hand(model, x, mix), rtol=0, atol=1e-6)


# ---- other networks ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ir", IRS)
def test_mlp_gets_a_shortcut_for_each_group_behind_its_stem(ir: str) -> None:
    graph = captured(mlp(6), (torch.randn(2, 16),), ir)
    result = rc.rewrite(graph, "insert-shortcuts{every=3}")
    assert result.verification.ok
    assert rc.inspect(result.graph).summary()["by_shortcut"] == {"identity": 2}
    assert len(result.refused) == 1  # the last layer is a rest


@pytest.mark.parametrize("ir", IRS)
def test_stacked_lstm_gets_recurrent_blocks(ir: str) -> None:
    graph = captured(StackedLstm(), (torch.randint(0, 20, (2, 5)),), ir)
    result = rc.rewrite(graph, "insert-shortcuts{every=1}")
    assert result.verification.ok
    assert rc.inspect(result.graph).summary()["by_kind"] == {"recurrent": 3}


@pytest.mark.parametrize("ir", IRS)
@pytest.mark.parametrize("combine", ["concat", "add"])
def test_autoencoder_gets_long_skips(combine: str, ir: str) -> None:
    graph = captured(Autoencoder(), image(16, 1), ir)
    result = rc.rewrite(graph, f"insert-shortcuts{{kind=long,combine={combine}}}")
    assert result.verification.ok
    assert rc.inspect(result.graph).summary()["by_kind"] == {"long": 2}


def test_long_skips_take_a_dynamic_batch_and_refuse_symbolic_resolutions_in_words() -> None:
    dim = torch.export.Dim.AUTO
    model, inputs = Autoencoder().eval(), image(16, 2)
    result = rc.rewrite(rc.capture(model, inputs, dynamic=({0: dim},)), "insert-shortcuts{kind=long}")
    assert len(result.applied) == 2
    graph = rc.capture(model, inputs, dynamic=({0: dim, 2: dim, 3: dim},))
    refused = rc.rewrite(graph, "insert-shortcuts{kind=long}", verify=False).refused
    assert refused
    assert all("odd sizes would not come back" in entry.reason for entry in refused)


def test_network_of_one_resolution_gets_no_long_skip() -> None:
    assert "does not lower its resolution" in refusal(mlp(4), (torch.randn(2, 16),), "insert-shortcuts{kind=long}")


def test_autoencoder_becomes_the_hand_written_u_net() -> None:
    model = Autoencoder()
    result = rc.rewrite(rc.capture(model.eval(), image(16, 1)), "insert-shortcuts{kind=long,start=residual}")
    target = Autoencoder(skips=True).eval()
    state = dict(model.state_dict())
    for level in range(2):
        name = f"shortcuts.{level}.transition.weight"
        state[f"merges.{level}.weight"] = result.model.state_dict()[name]
    target.load_state_dict(state)
    with torch.no_grad():
        difference = (result.model(*image(16, 1)) - target(*image(16, 1))).abs().max()
    assert float(difference) <= 1e-6


def test_vgg_of_the_onnx_package() -> None:
    onnx = pytest.importorskip("onnx")
    path = Path(onnx.__file__).parent / "backend/test/data/light/light_vgg19.onnx"
    result = rc.rewrite(rc.load(path), "insert-shortcuts{every=2}", verify=False)
    summary = rc.inspect(result.graph).summary()
    assert summary["by_shortcut"] == {"identity": 3, "projection": 4}


@pytest.mark.parametrize("size", [31, 32, 33])
@pytest.mark.parametrize("match", ["projection", "pad", "pool"])
def test_odd_and_dynamic_sizes(match: str, size: int) -> None:
    plain = livened(PlainNet(1))
    dim = torch.export.Dim.AUTO
    graph = rc.capture(plain, image(24), dynamic=({0: dim, 2: dim, 3: dim},))
    result = rc.rewrite(graph, f"insert-shortcuts{{every=2,match={match}}}", verify=False)
    assert len(result.applied) == 3
    inputs = image(size, 3)
    with torch.no_grad():
        assert torch.equal(result.model(*inputs), plain(*inputs))


# ---- the result trains -------------------------------------------------------------------------------------------


def test_result_keeps_every_key_and_trains() -> None:
    plain = PlainNet(1)
    result = rc.rewrite(rc.capture(plain.eval(), image(16)), "insert-shortcuts{every=2}")
    model = result.model
    assert set(plain.state_dict()) <= set(model.state_dict())
    model.load_state_dict(plain.state_dict(), strict=False)
    model.train()
    optimiser = torch.optim.SGD(model.parameters(), 0.05)
    inputs, losses = image(16, 8)[0], []
    for _ in range(8):
        loss = nn.functional.cross_entropy(model(inputs), torch.arange(8))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    state = model.state_dict()
    assert all(float(state[name].abs().sum()) > 0 for name in state if name.endswith((".gate", "norm.weight")))
    assert float(state["shortcuts.1.norm.running_mean"].abs().sum()) > 0
    model.eval()
    assert torch.equal(model(inputs), model(inputs))


# ---- refusals ------------------------------------------------------------------------------------------------------


def refusal(model: nn.Module, inputs: tuple[torch.Tensor, ...], spec: str) -> str:
    result = rc.rewrite(rc.capture(model.eval(), inputs), spec, verify=False)
    assert not result.applied
    return " ".join(str(refused) for refused in result.refused)


def test_residual_network_is_left_alone() -> None:
    said = refusal(PlainNet(1, residual=True), image(16), "insert-shortcuts{every=2}")
    assert "residual" in said


def test_pad_cannot_take_channels_away() -> None:
    narrowing = nn.Sequential(
        nn.Conv2d(3, 8, 3, 1, 1), nn.ReLU(), nn.Conv2d(8, 8, 3, 1, 1), nn.ReLU(), nn.Conv2d(8, 4, 3, 1, 1)
    )
    assert "narrows 8 channels to 4" in refusal(narrowing, image(16), "insert-shortcuts{every=2,match=pad}")


def test_match_none_takes_equal_shapes_only() -> None:
    result = rc.rewrite(rc.capture(PlainNet(1).eval(), image(16)), "insert-shortcuts{every=2,match=none}")
    assert len(result.applied) == 1
    assert all("differ" in refused.reason for refused in result.refused)
    assert len(result.refused) == 2


def test_layer_that_is_used_twice_is_left_alone() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.layer = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = torch.relu(self.stem(x))
            return torch.relu(self.layer(torch.relu(self.layer(x))))

    assert "shares its weights" in refusal(Shared(), (torch.randn(2, 8),), "insert-shortcuts{every=1}")


@pytest.mark.parametrize(
    ("pairs", "said"),
    [
        ('["relu:linear_9"]', "There is no value"),
        ('["tanh_3:tanh_1"]', "before it"),
        ('["tanh:tanh_2","tanh_1:tanh_3"]', "overlap"),
        ('["tanh:tanh_2","tanh_1:tanh_2"]', "end in one value"),
        ('["tanh"]', "FORK:JOIN"),
    ],
)
def test_places_that_cannot_be(pairs: str, said: str) -> None:
    graph = rc.capture(mlp(4).eval(), (torch.randn(2, 16),))
    with pytest.raises(rc.RescompileError, match=said):
        rc.rewrite(graph, f"insert-shortcuts{{between={pairs}}}")


def test_place_by_the_names_of_values_and_modules() -> None:
    graph = rc.capture(mlp(4).eval(), (torch.randn(2, 16),))
    for places in ('between=["tanh:tanh_2","5:tanh_4"]', "between=tanh:tanh_2,between=5:tanh_4"):
        result = rc.rewrite(graph, f"insert-shortcuts{{{places}}}")
        assert len(result.applied) == 2
        assert rc.inspect(result.graph).summary()["by_shortcut"] == {"identity": 2}
