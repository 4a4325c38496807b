"""The report: its JSON, its text, the paths, explanations; and detection on graphs that were fused."""

from __future__ import annotations

import json

import pytest

from rescompile.detection import explain, inspect_graph
from rescompile.errors import GraphError
from rescompile.graph import Graph, Value
from tests.graphs import Builder, K, residual_mlp, resnet_block, transformer_layer


def encoder(norm: str = "post") -> Graph:
    b = Builder("encoder")
    x = b.layer_norm(b.linear(b.input(1, 5, 8), 8))
    for _ in range(2):
        x = transformer_layer(b, x, norm)
    return b.output(x)


def test_json_has_the_fields_of_schema_1() -> None:
    data = json.loads(json.dumps(inspect_graph(encoder()).to_dict()))
    assert list(data) == [
        "schema",
        "model",
        "ir",
        "nodes",
        "parameters",
        "blocks",
        "not_residual",
        "summary",
        "paths",
    ]
    assert (data["schema"], data["model"], data["ir"]) == (1, "encoder", "memory")
    assert data["nodes"] == len(encoder())
    assert data["parameters"] == sum(value.shape[0] * (value.shape[1:] or (1,))[0] for value in encoder().parameters)
    assert list(data["blocks"][0]) == [
        "id",
        "kind",
        "parent",
        "shortcut",
        "norm",
        "scale",
        "fork",
        "join",
        "norms",
        "branch",
        "shape",
        "module",
        "fused",
        "path",
    ]
    assert data["summary"] == {
        "blocks": 4,
        "nested": 0,
        "by_kind": {"add": 4},
        "by_shortcut": {"identity": 4},
        "by_norm": {"post": 4},
    }
    assert data["paths"] == {"log2_count": 4.0, "mean_length": 2.0}


def test_text_names_every_block() -> None:
    report = inspect_graph(residual_mlp(3))
    text = str(report)
    assert "mlp (memory, 12 operations" in text
    assert all(f"join_{index}" in text for index in range(3))
    assert "3 residual blocks: 3 add" in text


def test_paths_of_nested_blocks_multiply() -> None:
    b = Builder()
    x = head = b.input(2, 8)
    for _ in range(2):
        x = b.add(x, b.linear(x, 8))
    report = inspect_graph(b.output(b.add(head, b.linear(x, 8))))
    # 1 way along the global skip, 2² through its branch
    assert report.paths()["log2_count"] == pytest.approx(2.321928, abs=1e-6)
    assert report.paths()["mean_length"] == pytest.approx(4 / 5 * (1 + 1), abs=1e-6)


def test_paths_of_a_very_deep_network_do_not_overflow() -> None:
    assert inspect_graph(residual_mlp(1500)).paths() == {"log2_count": 1500.0, "mean_length": 750.0}


def test_explain_tells_the_role_of_each_node() -> None:
    b = Builder()
    x = b.input(2, 8, name="x")
    n = b.layer_norm(x, name="norm")
    y = b.linear(n, 8, name="branch")
    total = b.add(x, y, name="join")
    shifted = b.add(total, b.param(8), name="shift")
    graph = b.output(b.linear(shifted, 2, name="head"))
    report = inspect_graph(graph)
    assert "'x' is the fork of block 0" in explain(graph, report, "x")
    assert "in the branch of block 0" in explain(graph, report, "branch")
    join = explain(graph, report, "join")
    assert "is the join of block 0" in join
    assert "norm placement: pre (norm)" in join
    assert "ends no residual block: bias" in explain(graph, report, "shift")
    assert "in no block" in explain(graph, report, "head")


def test_explain_says_where_the_paths_of_a_refused_join_meet() -> None:
    b = Builder()
    x = b.input(2, 8, name="x")
    graph = b.output(b.add(b.relu(b.linear(x, 8)), b.relu(b.linear(x, 8)), name="both"))
    text = explain(graph, inspect_graph(graph), "both")
    assert "ends no residual block: two working branches" in text
    assert "meet at 'x'" in text


def test_explain_names_the_nearest_node_for_an_unknown_one() -> None:
    graph = residual_mlp(2)
    with pytest.raises(GraphError, match="did you mean 'join_1'"):
        explain(graph, inspect_graph(graph), "joint_1")


# ---- fused graphs --------------------------------------------------------------------------------------------------


def test_fused_conv_with_residual_is_a_join() -> None:
    b = Builder()
    x = b.relu(b.input(1, 8, 8, 8))
    y = b.conv(x, 8)
    z = b.op(
        K.FUSED_CONV,
        y,
        b.param(8, 8, 3, 3),
        b.param(8),
        x,
        shape=x.shape,
        name="fused",
        stride=(1, 1),
        pads=(1, 1, 1, 1),
        dilation=(1, 1),
        groups=1,
        inner="none",
        outer="relu",
    )
    graph = b.output(z)
    report = inspect_graph(graph)
    assert len(report) == 1
    block = report.blocks[0]
    assert (block.join, block.fork_value, block.shortcut, block.fused) == ("fused", x, "identity", True)
    assert block.skip_index == 3
    assert block.join_op is graph.op("fused")
    assert block.join_value is None
    assert [op.kind for op in block.branch_ops] == [K.CONV, K.FUSED_CONV]
    assert report.nodes == len(graph)


def test_fused_linear_without_residual_is_no_join() -> None:
    b = Builder()
    x = b.input(2, 8)
    z = b.op(K.FUSED_LINEAR, x, b.param(8, 8), b.param(8), None, shape=(2, 8), outer="relu")
    report = inspect_graph(b.output(z))
    assert len(report) == 0


def add_norm(b: Builder, x: Value, residual: Value) -> tuple[Value, Value]:
    op = b.ops(K.ADD_NORM, x, residual, b.param(8), b.param(8), shapes=[x.shape, x.shape], norm="layer", axis=2)
    return op.outputs[0], op.outputs[1]


def test_add_norm_is_a_join_with_a_post_norm_where_the_normed_value_goes_on() -> None:
    b = Builder()
    x = b.input(1, 5, 8)
    for _ in range(2):
        x, _ = add_norm(b, b.linear(x, 8), x)
    report = inspect_graph(b.output(x))
    assert [(block.norm, block.fused, block.skip_index) for block in report] == [("post", True, 1)] * 2
    assert [block.norms for block in report] == [(block.join,) for block in report]


def test_add_norm_is_a_join_before_a_pre_norm_where_the_sum_goes_on() -> None:
    b = Builder()
    x = b.input(1, 5, 8)
    normed = b.layer_norm(x)
    for _ in range(2):
        normed, x = add_norm(b, x, b.linear(normed, 8))
    report = inspect_graph(b.output(b.linear(normed, 4)))
    assert [(block.norm, block.fused, block.skip_index) for block in report] == [("pre", True, 0)] * 2
    assert [block.join_value for block in report] == [op.outputs[1] for op in (block.join_op for block in report)]


def test_detection_leaves_the_graph_alone() -> None:
    b = Builder()
    graph = b.output(resnet_block(b, b.input(1, 8, 8, 8), 16, 2))
    before = [(op.name, op.kind, list(op.inputs), list(op.outputs)) for op in graph]
    inspect_graph(graph)
    assert [(op.name, op.kind, list(op.inputs), list(op.outputs)) for op in graph] == before
