"""What the structure means where blocks lie inside graphs that operations hold: branches of a condition, calls."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest

from rescompile.blocks import Report
from rescompile.detection import Explainer, inspect_graph
from rescompile.graph import Body, Graph, Op
from tests.graphs import Builder, K, residual_mlp


class Holding(Graph):
    """A graph in memory whose operations hold others."""

    def __init__(self, name: str = "") -> None:
        super().__init__(name)
        self.held: dict[str, tuple[Body, ...]] = {}

    def native_bodies(self, op: Op) -> tuple[Body, ...]:
        return self.held.get(op.name, ())


def conditional() -> Graph:
    """A stem, a block around a choice between two blocks and a linear, a block behind it, a head."""
    b = Builder()
    graph = b.graph = Holding("conditional")
    x = b.linear(b.input(2, 8, name="x"), 8, name="stem")
    choice = b.op(K.OPAQUE, x, shape=(2, 8), name="choose")
    other = Builder()
    plain = other.output(other.linear(other.input(2, 8), 8))
    taken = residual_mlp(2)
    graph.held["choose"] = tuple(
        Body(label, body, {body.inputs[0]: x}) for label, body in (("then", taken), ("else", plain))
    )
    y = b.add(x, choice, name="outer")
    y = b.add(y, b.linear(y, 8), name="second")
    return b.output(b.linear(y, 3, name="head"))


def called() -> Graph:
    """Two calls, each of two blocks."""
    b = Builder()
    graph = b.graph = Holding("called")
    x = b.input(2, 8, name="x")
    for number in range(2):
        body = residual_mlp(2)
        y = b.op(K.OPAQUE, x, shape=(2, 8), name=f"call{number}")
        graph.held[f"call{number}"] = (Body("body", body, {body.inputs[0]: x}, call=True),)
        x = y
    return b.output(x)


def names(graph: Graph, report: Report) -> list[str]:
    found = [member.name for member in (*graph, *graph.values)]
    for path, body in report.bodies.items():
        found += [f"{path}/{member.name}" for member in (*body, *body.values)]
    return found


@pytest.mark.parametrize("build", [conditional, called])
def test_everything_can_be_told_of_blocks_inside_operations(build: Callable[[], Graph]) -> None:
    graph = build()
    report = inspect_graph(graph)
    assert sum(block.path != "" for block in report) == (2 if graph.name == "conditional" else 4)
    assert all(block.path in str(report) for block in report)
    data = json.loads(json.dumps(report.to_dict()))
    assert all(block["costs"]["shortcut"]["flops"] == 16 for block in data["blocks"])
    assert sorted(block for chain in report.chains for block in chain.blocks) == [block.id for block in report]
    explainer = Explainer(graph, report)
    for name in names(graph, report):
        assert explainer.why(name).findings, name


def test_blocks_of_a_condition_are_a_chain_inside_the_block_around_it() -> None:
    graph = conditional()
    report = inspect_graph(graph)
    inner = [block for block in report if block.path]
    outer = next(block for block in report if block.join == "outer")
    assert [block.parent for block in inner] == [outer.id, outer.id]
    (chain,) = (chain for chain in report.chains if chain.path)
    assert (chain.parent, chain.blocks, chain.path) == (outer.id, tuple(block.id for block in inner), inner[0].path)
    # 1 way along the outer skip and 2² through the choice, twice with the block behind it
    assert report.paths()["log2_count"] == pytest.approx(3.321928, abs=1e-6)
    assert report.overhead is not None
    inside = sum(report.overhead.blocks[block.id].branch.parameters for block in inner)
    assert report.overhead.blocks[outer.id].branch.parameters == inside


def test_why_tells_of_the_operation_that_holds_blocks() -> None:
    graph = conditional()
    explainer = Explainer(graph, inspect_graph(graph))
    assert "holds" in [finding.role for finding in explainer.why("choose").findings]
    assert [finding.role for finding in explainer.why("join_0").findings] == ["join", "fork"]
    assert " in choose/then)" in str(explainer.why("choose/then/join_0"))
