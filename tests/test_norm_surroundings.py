"""Stacks whose norms move while what is around them is unusual: factors on the skip, outer skips, files in between."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import rescompile as rc
from rescompile.verify import verify
from tests.norm_models import Stack, livened
from tests.test_norm_placement import IRS, X, captured, converted, difference, encoder, outputs

E = (torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(1)),)


class Scaled(nn.Module):
    """y = N(αx + F(x)); with `pre`, y = x + F(N(x))."""

    def __init__(self, alpha: Any, pre: bool = False) -> None:
        super().__init__()
        self.linears = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))
        self.norms = nn.ModuleList(nn.LayerNorm(8) for _ in range(2))
        self.alpha, self.pre = alpha, pre

    def forward(self, x: Tensor) -> Tensor:
        for linear, norm in zip(self.linears, self.norms, strict=True):
            x = x + linear(norm(x)).relu() if self.pre else norm(x * self.alpha + linear(x).relu())
        return x


@pytest.mark.parametrize("ir", IRS)
def test_a_fixed_factor_goes_from_the_skip_where_the_norm_goes_to_the_branch(ir: str) -> None:
    model = livened(Scaled(2.0))
    result = converted(captured(model, X, ir), "pre-norm{final-norm=none}", 2)
    pre = Scaled(1.0, pre=True)
    pre.load_state_dict(model.state_dict())
    assert difference(result.graph, pre.eval(), X) <= (0.0 if ir == "fx" else 1e-6)


@pytest.mark.parametrize("shape", [(), (8,)])
def test_a_trained_factor_on_the_skip_is_not_dropped(shape: tuple[int, ...]) -> None:
    model = livened(Scaled(nn.Parameter(torch.full(shape, 1.5))))
    result = rc.rewrite(captured(model, X), "pre-norm")
    assert not result.applied
    assert all("the factor would be lost" in refusal.reason for refusal in result.refused)


class Around(nn.Module):
    """A stack with one more skip around all of it, or the sum of what its layers make."""

    def __init__(self, placement: str, what: str) -> None:
        super().__init__()
        self.layers = Stack(placement, depth=2, embedded=False).layers
        self.what = what

    def forward(self, x: Tensor) -> Tensor:
        first = x
        made = []
        for layer in self.layers:
            x = layer(x)
            made.append(x)
        return made[0] + made[1] if self.what == "dense" else x + first


@pytest.mark.parametrize("ir", IRS)
@pytest.mark.parametrize("what", ["dense", "long"])
def test_a_norm_that_ends_two_blocks_is_the_inner_ones(what: str, ir: str) -> None:
    model = livened(Around("post", what))
    graph = captured(model, X, ir)
    result = rc.rewrite(graph, "pre-norm{final-norm=none}")
    assert len(result.applied) == 2
    (refusal,) = result.refused
    assert "a block inside its branch" in refusal.reason
    pre = Around("pre", what)
    pre.load_state_dict(model.state_dict())
    tolerance = 0.0 if ir == "fx" else 2e-6
    assert difference(result.graph, pre.eval(), X) <= tolerance
    assert not rc.diff(graph, rc.rewrite(result.graph, "post-norm").graph)


@pytest.mark.parametrize(("ir", "suffix"), [("fx", ".pt2"), ("onnx", ".onnx")])
@pytest.mark.parametrize("value", [0.0, 1.0])
def test_a_blend_is_frozen_also_after_it_was_a_file(value: float, ir: str, suffix: str, tmp_path: Path) -> None:
    graph = captured(livened(encoder(False)), E, ir)
    path = tmp_path / f"blended{suffix}"
    rc.rewrite(graph, "pre-norm{mode=gradual}").save(path)
    loaded = rc.load(path, trust=True)
    loaded.set_data(loaded.value("norm_blend"), np.asarray(value, np.float32))
    frozen = converted(loaded, "freeze-blend", 1).graph
    expected = graph if value == 0.0 else rc.rewrite(graph, "pre-norm").graph
    tolerance = 0.0 if ir == "fx" else 1e-6
    np.testing.assert_allclose(outputs(frozen, E), outputs(expected, E), rtol=0, atol=tolerance)
    parameters = {parameter.name for parameter in frozen.parameters}
    assert parameters == {parameter.name for parameter in expected.parameters}
    kinds = [op.kind.value for op in frozen if op.kind.value != "identity"]  # which name an output in a file
    assert kinds == [op.kind.value for op in expected if op.kind.value != "identity"]


def test_a_new_parameter_of_one_element_is_one_in_the_file_too(tmp_path: Path) -> None:
    graph = captured(livened(encoder(False)), E, "onnx")
    result = rc.rewrite(graph, "pre-norm{mode=calibrated}")
    result.save(tmp_path / "m.onnx")
    names = {value.name for value in rc.load(tmp_path / "m.onnx").parameters}
    assert names == {value.name for value in result.graph.parameters}


def test_an_unknown_extent_that_a_file_names_twice_is_one_extent(tmp_path: Path) -> None:
    import onnx

    model = livened(Stack("post"))
    extents = {0: torch.export.Dim("batch"), 1: torch.export.Dim("length")}
    path = tmp_path / "m.onnx"
    torch.onnx.export(model, X, path, dynamo=True, verbose=False, external_data=False, dynamic_shapes={"x": extents})
    written = onnx.load(path)
    for axis, name in enumerate(("out_batch", "out_length")):  # as the older exporter declares it
        written.graph.output[0].type.tensor_type.shape.dim[axis].dim_param = name
    onnx.save(written, path)
    result = converted(rc.load(path), "pre-norm{final-norm=none}", 3)
    assert rc.inspect(result.graph).summary()["by_norm"] == {"pre": 3}
    converted(result.graph, "post-norm", 3)


def test_extents_that_inputs_have_do_not_change_places_in_an_output() -> None:
    class Turned(nn.Module):
        def __init__(self, turned: bool) -> None:
            super().__init__()
            self.turned = turned

        def forward(self, x: Tensor) -> Tensor:
            y = x.relu()
            return y.transpose(0, 1) if self.turned else y

    extents = {0: torch.export.Dim("batch"), 1: torch.export.Dim("length")}
    straight, turned = (rc.capture(Turned(way), X, dynamic=(extents,)) for way in (False, True))
    assert verify(straight, straight, "interface").ok
    assert not verify(straight, turned, "interface").ok
