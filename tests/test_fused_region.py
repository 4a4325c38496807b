"""Fused regions: what a program may hold, and that it means the same in both IRs, saved, read again and taken apart."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import rescompile as rc
from rescompile.errors import GraphError, RescompileError
from rescompile.fused_region import parse
from rescompile.graph import Graph, ValueType
from rescompile.kinds import OpKind
from rescompile.passes.unfuse import UnfuseAll
from rescompile.plans import Plan, Rewrite, region_edit
from rescompile.printing import print_graph
from rescompile.rewriting import apply_plan, run_passes


class Tail(nn.Module):
    """Views, a gain, a number, two outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.work = nn.Linear(6, 6)
        self.gain = nn.Parameter(torch.rand(6) + 0.5)
        self.norm = nn.LayerNorm(6)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        h = (self.work(x) * self.gain).reshape(x.shape[0], 2, 2, 6).permute(0, 2, 1, 3).flip(1).roll(1, 2)
        s = x + h.reshape(x.shape[0], 4, 6) * 0.5
        return self.norm(s), torch.relu(1 - torch.sigmoid(s))


class Image(nn.Module):
    """Windows: convolutions up and down, pools, a pad, a concatenation, a batch norm and a group norm."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Conv2d(4, 4, 3, stride=2, padding=1)
        self.up = nn.ConvTranspose2d(4, 4, 2, stride=2)
        self.norm = nn.BatchNorm2d(8)
        self.groups = nn.GroupNorm(2, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.up(torch.nn.functional.hardswish(self.down(x)))
        pooled = torch.nn.functional.max_pool2d(x, 3, 1, 1) - torch.nn.functional.avg_pool2d(x, 3, 1, 1)
        joined = torch.cat([x + h, torch.nn.functional.pad(pooled[:, :, 1:], (0, 0, 0, 1))], 1)
        return self.groups(self.norm(joined).clamp(-1, 3))


MODELS: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "tail": (Tail().eval(), (3, 4, 6)),
    "image": (Image().eval(), (2, 4, 8, 8)),
}


def captured(name: str, ir: str, *, batch: str | None = None) -> tuple[Any, torch.Tensor, nn.Module]:
    model, shape = MODELS[name]
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    shapes = {"x": {0: torch.export.Dim(batch)}} if batch else None
    program = torch.export.export(model, (x,), dynamic_shapes=shapes)
    if ir == "fx":
        return rc.capture(program, (x,)), x, model
    return rc.capture(torch.onnx.export(program, dynamo=True, verbose=False)), x, model


def fused(graph: Any) -> Any:
    edit = region_edit(graph, [op for op in graph if op.kind is not OpKind.SHAPE], graph.outputs)
    assert not isinstance(edit, str), edit
    plan = Plan(graph.name, graph.ir, [Rewrite("all", "everything  →  one", "as asked", (edit,))])
    return apply_plan(graph, Plan.from_json(plan.to_json()))


@pytest.mark.parametrize("ir", ["fx", "onnx"])
@pytest.mark.parametrize("name", list(MODELS))
def test_a_region_computes_what_its_operations_did(name: str, ir: str) -> None:
    graph, _, _ = captured(name, ir)
    result = fused(graph)
    assert [op.kind for op in result.graph] == [OpKind.FUSED_REGION]
    assert result.verification.ok
    assert result.costs[0].flops == result.costs[1].flops
    assert result.costs[0].bytes > result.costs[1].bytes


@pytest.mark.parametrize("ir", ["fx", "onnx"])
@pytest.mark.parametrize("name", list(MODELS))
def test_a_region_is_read_again_and_comes_apart_as_it_was(name: str, ir: str, tmp_path: Path) -> None:
    graph, x, _ = captured(name, ir)
    result = fused(graph)
    if ir == "fx":
        again = rc.capture(result.model, (x,))
    else:
        result.save(tmp_path / "fused.onnx")
        again = rc.load(tmp_path / "fused.onnx")
    assert print_graph(again, comments=False) == print_graph(result.graph, comments=False)
    apart = run_passes(again, [UnfuseAll()])
    assert apart.verification.ok
    assert print_graph(apart.graph, comments=False) == print_graph(graph, comments=False)


@pytest.mark.parametrize("ir", ["fx", "onnx"])
@pytest.mark.parametrize("name", list(MODELS))
def test_detection_looks_inside(name: str, ir: str) -> None:
    graph, _, _ = captured(name, ir)
    before, after = rc.inspect(graph), rc.inspect(fused(graph).graph)
    assert [(b.kind, b.shortcut, b.norm) for b in after.blocks] == [(b.kind, b.shortcut, b.norm) for b in before.blocks]
    assert all(block.fused for block in after.blocks)
    assert after.to_dict()["paths"] == before.to_dict()["paths"]


@pytest.mark.parametrize("ir", ["fx", "onnx"])
def test_one_program_serves_any_batch(ir: str) -> None:
    graph, _, model = captured("tail", ir, batch="batch")
    result = fused(graph)
    x = torch.randn(7, 4, 6)
    with torch.no_grad():
        expected = [y.numpy() for y in model(x)]
    found = list(result.graph.run({"x": x.numpy()}).values())
    for y, wanted in zip(found, expected, strict=True):
        np.testing.assert_allclose(y, wanted, atol=2e-6)


def test_regions_compile() -> None:
    graph, x, model = captured("tail", "fx")
    program = rc.compile(fused(graph).model, (x,))
    with torch.no_grad():
        for y, wanted in zip(program(x), model(x), strict=True):
            torch.testing.assert_close(y, wanted, atol=2e-6, rtol=1e-5)


def test_a_region_trains_as_its_operations_do() -> None:
    x = torch.randn(2, 4, 6, dtype=torch.float64, requires_grad=True)
    module = fused(rc.capture(Tail().double(), (x.detach(),))).model
    assert torch.autograd.gradcheck(module, (x,))


def chain() -> Graph:
    graph = Graph("chain")
    x = graph.add_input("x", (2, 3), "float32")
    a = graph.add_op(OpKind.RELU, [x], [("a", ValueType((2, 3), "float32"))]).output
    b = graph.add_op(OpKind.OPAQUE, [a], [("b", ValueType((2, 3), "float32"))], {"target": "unknown"}).output
    c = graph.add_op(OpKind.ADD, [a, b], [("c", ValueType((2, 3), "float32"))]).output
    graph.set_outputs([c])
    graph.commit()
    return graph


def test_what_nobody_knows_is_in_no_region() -> None:
    graph = chain()
    assert "nothing that a fused operation can hold" in str(region_edit(graph, graph.ops, graph.outputs))


def test_what_leaves_a_region_does_not_come_back_into_it() -> None:
    graph = chain()
    a, c = graph.value("a"), graph.value("c")
    ops = [graph.op("a"), graph.op("c")]
    assert "is computed from what it returns" in str(region_edit(graph, ops, [a, c]))


def test_a_value_that_is_read_outside_must_be_an_output() -> None:
    graph = chain()
    assert "also read by 'b'" in str(region_edit(graph, [graph.op("a"), graph.op("c")], [graph.value("c")]))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        '{"operands":1,"steps":[],"outputs":[1]}',
        '{"operands":1,"steps":[["opaque",[0],{}]],"outputs":[1]}',
        '{"operands":1,"steps":[["relu",[1],{}]],"outputs":[1]}',
        '{"operands":1,"steps":[["exec",[0],{}]],"outputs":[1]}',
        '{"operands":1,"steps":[["relu",[0],{}]],"outputs":[]}',
        '{"operands":1,"steps":[["relu",[0],{}]],"outputs":[1],"more":1}',
        " " * (1 << 17),
    ],
)
def test_texts_that_are_no_program_are_refused(text: str) -> None:
    with pytest.raises(GraphError):
        parse(text)


def test_unfuse_refuses_what_is_not_fused() -> None:
    from rescompile.plans import Unfuse

    with pytest.raises(RescompileError, match="not a fused operation"):
        Unfuse("a").apply(chain(), "")
