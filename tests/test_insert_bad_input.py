"""What `insert-shortcuts` is asked that cannot be, and networks of every layout that it can match, in both IRs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

import rescompile as rc
from rescompile.cli import main
from rescompile.graph import Graph
from tests.plain_models import PlainNet, mlp

IRS = ("fx", "onnx")
Shape = tuple[int, ...]


def captured(model: nn.Module, inputs: tuple[torch.Tensor, ...], ir: str) -> Graph:
    model.eval()
    if ir == "fx":
        return rc.capture(model, inputs)
    return rc.capture(torch.onnx.export(model, inputs, dynamo=True, verbose=False))


def numbers(*shape: int) -> tuple[torch.Tensor]:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(0)),)


def outputs(graph: Graph, inputs: tuple[torch.Tensor, ...]) -> np.ndarray[Any, Any]:
    arrays = {value.name: tensor.numpy() for value, tensor in zip(graph.inputs, inputs, strict=True)}
    return next(iter(graph.run(arrays).values()))


def refused(graph: Graph, spec: str) -> str:
    """The reasons, where nothing was inserted."""
    result = rc.rewrite(graph, spec, verify=False)
    assert not result.applied
    assert len(list(result.graph)) == len(list(graph))
    return " | ".join(refusal.reason for refusal in result.refused)


def between(graph: Graph, fork: str, join: str) -> str:
    """A place by the names of the values that come `fork`-th and `join`-th of the activations."""
    return f'insert-shortcuts{{between=["{fork}:{join}"]}}'


def activations(graph: Graph) -> list[str]:
    return [op.output.name for op in graph if op.kind.value in ("tanh", "relu")]


# ---- where -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ir", IRS)
def test_nearest_name_is_suggested(ir: str) -> None:
    graph = captured(mlp(4), numbers(2, 16), ir)
    first, last = activations(graph)[0], activations(graph)[-1]
    with pytest.raises(rc.RescompileError, match=rf"'{last}x' in the graph \(did you mean '{last}'"):
        rc.rewrite(graph, between(graph, first, f"{last}x"))


@pytest.mark.parametrize("ir", IRS)
def test_join_before_its_fork(ir: str) -> None:
    graph = captured(mlp(4), numbers(2, 16), ir)
    names = activations(graph)
    with pytest.raises(rc.RescompileError, match=f"'{names[1]}' lies before it"):
        rc.rewrite(graph, between(graph, names[3], names[1]))


@pytest.mark.parametrize("ir", IRS)
def test_fork_that_is_its_join(ir: str) -> None:
    graph = captured(mlp(4), numbers(2, 16), ir)
    name = activations(graph)[1]
    with pytest.raises(rc.RescompileError, match="lies before it"):
        rc.rewrite(graph, between(graph, name, name))


class Parallel(nn.Module):
    """Two ways that do not meet before the end."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.left, self.right = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.stem(x))
        return torch.cat([torch.tanh(self.left(x)), torch.tanh(self.right(x))], 1)


@pytest.mark.parametrize("ir", IRS)
def test_fork_that_does_not_lead_to_the_join(ir: str) -> None:
    graph = captured(Parallel(), numbers(2, 8), ir)
    _, left, right = activations(graph)
    with pytest.raises(rc.RescompileError, match=f"'{right}' does not come from '{left}'"):
        rc.rewrite(graph, between(graph, left, right))


@pytest.mark.parametrize("ir", IRS)
def test_requests_that_overlap(ir: str) -> None:
    graph = captured(mlp(4), numbers(2, 16), ir)
    a, b, c, d = activations(graph)[:4]
    with pytest.raises(rc.RescompileError, match="overlap: nest them or keep them apart"):
        rc.rewrite(graph, f'insert-shortcuts{{between=["{a}:{c}","{b}:{d}"]}}')
    for pairs in (f'"{a}:{d}","{b}:{c}"', f'"{a}:{b}","{b}:{d}"'):  # nested, and one after the other
        assert len(rc.rewrite(graph, f"insert-shortcuts{{between=[{pairs}]}}").applied) == 2


def test_every_and_between_at_once() -> None:
    with pytest.raises(rc.RescompileError, match="give one of them"):
        rc.rewrite(mlp(4), 'insert-shortcuts{every=2,between=["a:b"]}', numbers(2, 16))


@pytest.mark.parametrize("every", [0, -1])
def test_group_of_no_layers(every: int) -> None:
    with pytest.raises(rc.RescompileError, match="at least one layer"):
        rc.rewrite(mlp(4), f"insert-shortcuts{{every={every}}}", numbers(2, 16))


@pytest.mark.parametrize("ir", IRS)
def test_group_longer_than_the_network(ir: str) -> None:
    assert "a rest gets no shortcut" in refused(captured(mlp(4), numbers(2, 16), ir), "insert-shortcuts{every=9}")


@pytest.mark.parametrize("ir", IRS)
def test_residual_network_says_that_it_is_one(ir: str) -> None:
    graph = captured(PlainNet(1, residual=True, widths=(4, 4, 4)), numbers(2, 3, 8, 8), ir)
    for spec in ("insert-shortcuts", "insert-shortcuts{every=2}", "insert-shortcuts{every=1,kind=gated}"):
        assert "residual blocks already" in refused(graph, spec)


def test_command_writes_nothing_where_nothing_was_inserted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    graph = captured(PlainNet(1, residual=True, widths=(4, 4, 4)), numbers(2, 3, 8, 8), "onnx")
    rc.rewrite(graph, "canonicalise").save(tmp_path / "residual.onnx")
    with pytest.raises(SystemExit) as left:
        main(
            [
                "rewrite",
                str(tmp_path / "residual.onnx"),
                "--pass",
                "insert-shortcuts{every=2}",
                "-o",
                str(tmp_path / "out.onnx"),
            ]
        )
    printed = capsys.readouterr()
    assert "residual blocks already" in printed.err
    assert left.value.code == 1
    assert not (tmp_path / "out.onnx").exists()


# ---- tensors -----------------------------------------------------------------------------------------------------


class Rounded(nn.Module):
    """Linear layers with integers between two of them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        whole = (self.first(x) * 10).to(torch.int32)
        return self.second(torch.relu(whole * 2 + 1).to(torch.float32))


@pytest.mark.parametrize("ir", IRS)
def test_integers_get_no_shortcut(ir: str) -> None:
    graph = captured(Rounded(), numbers(2, 8), ir)
    whole = [op.output.name for op in graph if op.output.dtype == "int32"]
    assert "int32, not floating point" in refused(graph, between(graph, whole[0], whole[-1]))


@pytest.mark.parametrize("ir", IRS)
def test_branch_that_changes_the_type_gets_no_shortcut(ir: str) -> None:
    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8, dtype=torch.float16)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.relu(self.second(torch.relu(self.first(x)).half()))

    graph = captured(Half(), numbers(2, 8), ir)
    first, last = activations(graph)
    assert "from float32 to float16" in refused(graph, between(graph, first, last))


def quantised() -> Graph:
    """Three 1×1 convolutions with quantised values between them."""
    rng = np.random.default_rng(0)
    scale, zero = numpy_helper.from_array(np.float32(0.05), "scale"), numpy_helper.from_array(np.uint8(128), "zero")
    tensors, nodes, value = [scale, zero], [], "x"
    for index in range(3):
        tensors.append(numpy_helper.from_array(rng.standard_normal((4, 4, 1, 1)).astype(np.float32), f"w{index}"))
        nodes += [
            helper.make_node("Conv", [value, f"w{index}"], [f"conv{index}"]),
            helper.make_node("Relu", [f"conv{index}"], [f"relu{index}"]),
            helper.make_node("QuantizeLinear", [f"relu{index}", "scale", "zero"], [f"whole{index}"]),
            helper.make_node("DequantizeLinear", [f"whole{index}", "scale", "zero"], [f"real{index}"]),
        ]
        value = f"real{index}"
    image = [2, 4, 5, 5]
    graph = helper.make_graph(
        nodes,
        "quantised",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, image)],
        [helper.make_tensor_value_info(value, TensorProto.FLOAT, image)],
        tensors,
    )
    return rc.capture(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10))


def test_quantised_values_get_no_shortcut_and_the_real_ones_between_them_do() -> None:
    graph = quantised()
    assert "uint8, not floating point" in refused(graph, between(graph, "whole0", "whole1"))
    result = rc.rewrite(graph, "insert-shortcuts{every=1}")
    assert result.verification.ok
    for rewrite in result.applied:
        assert "whole" not in rewrite.where


@pytest.mark.parametrize("frozen", [True, False])
def test_new_parameters_of_a_frozen_network_are_trained(frozen: bool) -> None:
    model = mlp(4).requires_grad_(not frozen)
    rewritten = rc.rewrite(model, "insert-shortcuts{every=2,kind=gated}", numbers(2, 16)).model
    for name, parameter in rewritten.named_parameters():
        assert parameter.requires_grad == (name.startswith("shortcuts.") or not frozen)
    rewritten(*numbers(2, 16)).sum().backward()
    assert all(p.grad is not None for name, p in rewritten.named_parameters() if name.startswith("shortcuts."))


class Shared(nn.Module):
    """One layer three times."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.layer = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.tanh(self.stem(x))
        for _ in range(3):
            x = torch.tanh(self.layer(x))
        return x


@pytest.mark.parametrize("ir", IRS)
def test_layer_that_others_share_is_left_alone(ir: str) -> None:
    assert "shares its weights" in refused(captured(Shared(), numbers(2, 8), ir), "insert-shortcuts{every=1}")


# ---- shapes ------------------------------------------------------------------------------------------------------


def onnx_convs(shape: list[Any] | None) -> Graph:
    rng = np.random.default_rng(0)
    tensors = [numpy_helper.from_array(rng.standard_normal((4, 4, 1, 1)).astype(np.float32), f"w{i}") for i in range(3)]
    nodes, value = [], "x"
    for index in range(3):
        nodes += [
            helper.make_node("Conv", [value, f"w{index}"], [f"conv{index}"]),
            helper.make_node("Relu", [f"conv{index}"], [f"relu{index}"]),
        ]
        value = f"relu{index}"
    info = helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)
    out = helper.make_tensor_value_info(value, TensorProto.FLOAT, None)
    graph = helper.make_graph(nodes, "convs", [info], [out], tensors)
    return rc.capture(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10))


def test_unknown_rank_is_refused_in_words() -> None:
    assert "unknown" in refused(onnx_convs(None), "insert-shortcuts{every=2}")


def test_symbolic_batch_and_image_are_no_obstacle() -> None:
    graph = onnx_convs(["n", 4, "h", "w"])
    result = rc.rewrite(graph, "insert-shortcuts{every=2}")
    assert len(result.applied) == 1
    assert result.verification.ok


@pytest.mark.parametrize("ir", IRS)
def test_number_of_tokens_that_changes_is_refused_with_both_shapes(ir: str) -> None:
    class Merge(nn.Module):
        """Two neighbouring tokens become one."""

        def __init__(self) -> None:
            super().__init__()
            self.stem, self.first, self.merge = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(16, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = torch.relu(self.stem(x))
            x = torch.relu(self.first(x))
            return torch.relu(self.merge(x.reshape(2, 3, 16)))

    said = refused(captured(Merge(), numbers(2, 6, 6), ir), "insert-shortcuts{every=2}")
    assert "[2, 6, 8]" in said
    assert "[2, 3, 8]" in said


def convs(dims: int, last: int, stride: int, kernel: int = 3, border: int = 1) -> nn.Sequential:
    kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
    layers = [kind(3, 8, 3, 1, 1), nn.ReLU(), kind(8, 8, 3, 1, 1), nn.ReLU(), kind(8, last, kernel, stride, border)]
    return nn.Sequential(*layers, nn.ReLU())


def around(middle: nn.Module, last: int = 12) -> nn.Sequential:
    """Two layers with `middle` between them, behind a stem."""
    first = [nn.Conv2d(3, 8, 3, 1, 1), nn.ReLU(), nn.Conv2d(8, 8, 3, 1, 1), nn.ReLU()]
    return nn.Sequential(*first, middle, nn.Conv2d(8, last, 3, 1, 1), nn.ReLU())


REFUSALS = {
    "pad narrows": (convs(2, 4, 1), (2, 3, 8, 8), "match=pad", "[2, 8, 8, 8]", "[2, 4, 8, 8]"),
    "none": (convs(2, 12, 2), (2, 3, 8, 8), "match=none", "[2, 8, 8, 8]", "[2, 12, 4, 4]"),
    "lengthens": (convs(2, 8, 1, 3, 2), (2, 3, 8, 8), "match=projection", "[2, 8, 8, 8]", "[2, 8, 10, 10]"),
    "odd factor": (
        around(nn.Upsample(size=(11, 11))),
        (2, 3, 7, 7),
        "match=projection",
        "[2, 8, 7, 7]",
        "[2, 12, 11, 11]",
    ),
    "dense, none": (convs(1, 8, 2), (2, 3, 8), "kind=dense,match=none", "[2, 8, 8]", "[2, 8, 4]"),
}


@pytest.mark.parametrize("ir", IRS)
@pytest.mark.parametrize("name", REFUSALS)
def test_refusal_names_both_shapes(name: str, ir: str) -> None:
    model, shape, options, fork, join = REFUSALS[name]
    said = refused(captured(model, numbers(*shape), ir), f"insert-shortcuts{{every=2,{options}}}")
    assert fork in said
    assert join in said


class Nhwc(nn.Module):
    """Channels last, with permutes around every convolution."""

    def __init__(self, stride: int = 1, last: int = 8, transposed: bool = False) -> None:
        super().__init__()
        kind = nn.ConvTranspose2d if transposed else nn.Conv2d
        self.layers = nn.ModuleList(
            [nn.Conv2d(3, 8, 3, 1, 1), nn.Conv2d(8, 8, 3, 1, 1), kind(8, last, 4 if transposed else 3, stride, 1)]
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = torch.relu(layer(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))
        return x


def sequence(last: int) -> nn.Sequential:
    first = [nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 8), nn.LayerNorm(8), nn.GELU()]
    return nn.Sequential(*first, nn.Linear(8, last), nn.LayerNorm(last), nn.GELU())


# name: the model, its input, and the shortcut of a group of two with match=projection and with match=pad
LAYOUTS: dict[str, tuple[nn.Module, Shape, str, str]] = {
    "channels last": (Nhwc(), (2, 9, 9, 3), "identity", "identity"),
    "channels last, strided": (Nhwc(2, 12), (2, 9, 9, 3), "projection", "pad"),
    "channels last, transposed": (Nhwc(2, 12, transposed=True), (2, 9, 9, 3), "", ""),
    "1-D": (convs(1, 8, 1), (2, 3, 11), "identity", "identity"),
    "1-D, strided": (convs(1, 12, 2), (2, 3, 11), "projection", "pad"),
    "3-D, strided": (convs(3, 12, 2), (2, 3, 5, 6, 7), "projection", "pad"),
    "sequence": (sequence(8), (2, 5, 6), "identity", "identity"),
    "sequence, wider": (sequence(12), (2, 5, 6), "projection", "pad"),
    "no border": (convs(2, 12, 1, 3, 0), (2, 3, 9, 9), "projection", "pad"),
    "odd pool": (around(nn.MaxPool2d(2)), (2, 3, 15, 15), "projection", "pad"),
    "odd pool, rounding up": (around(nn.MaxPool2d(2, ceil_mode=True)), (2, 3, 15, 15), "projection", "pad"),
    "overlapping pool": (around(nn.MaxPool2d(3, 2)), (2, 3, 15, 15), "projection", "pad"),
    "adaptive pool": (around(nn.AdaptiveAvgPool2d(5)), (2, 3, 15, 15), "projection", "pad"),
    "upsampling": (around(nn.Upsample(scale_factor=2)), (2, 3, 7, 7), "", ""),
    "smooth upsampling": (around(nn.Upsample(scale_factor=2, mode="bilinear")), (2, 3, 7, 7), "", ""),
    "transposed": (around(nn.ConvTranspose2d(8, 8, 3, 2, 1, 1)), (2, 3, 7, 7), "", ""),
}


@pytest.mark.parametrize("ir", IRS)
@pytest.mark.parametrize("name", LAYOUTS)
def test_layout_is_matched(name: str, ir: str) -> None:
    model, shape, projected, padded = LAYOUTS[name]
    torch.manual_seed(0)
    graph = captured(model, numbers(*shape), ir)
    expected = outputs(graph, numbers(*shape))
    for options, shortcut in (
        ("match=projection", projected),
        ("match=pad", padded),
        ("match=projection,start=residual", projected),
        ("match=pool", None),
        ("kind=gated", projected),
        ("kind=dense", None),
        ("kind=dense,match=pool", None),
    ):
        result = rc.rewrite(graph, f"insert-shortcuts{{every=2,{options}}}")
        assert len(result.applied) == 1, options
        assert result.verification.ok
        summary = rc.inspect(result.graph).summary()
        assert sum(summary["by_kind"].values()) == 1, options
        if shortcut:
            assert summary["by_shortcut"] == {shortcut: 1}, options
        if "residual" in options:
            assert not np.array_equal(outputs(result.graph, numbers(*shape)), expected)
        else:
            np.testing.assert_array_equal(outputs(result.graph, numbers(*shape)), expected)


def test_models_pass_the_checker() -> None:
    onnx.checker.check_model(quantised().to_user())
