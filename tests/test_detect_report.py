"""The report: its JSON, its text, the paths, explanations; and detection on graphs that were fused."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest

from benchmarks.detection import dense, nested, positions
from rescompile.detection import Explainer, explain, inspect_graph
from rescompile.errors import GraphError
from rescompile.graph import Graph, Value
from tests.graphs import Builder, K, attention, residual_mlp, resnet_block, transformer_layer


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
        "chains",
        "costs",
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
        "undecided",
        "equation",
        "costs",
    ]
    assert data["blocks"][0]["equation"] == "N(x + F(x))"
    assert {side: list(cost) for side, cost in data["blocks"][0]["costs"].items()} == {
        "branch": ["parameters", "flops", "bytes"],
        "shortcut": ["parameters", "flops", "bytes"],
    }
    assert data["summary"] == {
        "blocks": 4,
        "nested": 0,
        "by_kind": {"add": 4},
        "by_shortcut": {"identity": 4},
        "by_norm": {"post": 4},
    }
    assert data["paths"] == {
        "log2_count": 4.0,
        "mean_length": 2.0,
        "deviation": 1.0,
        "central": [0, 4],
        "lengths": {"first": 0, "shares": [0.0625, 0.25, 0.375, 0.25, 0.0625]},
        "depth": {"nominal": 16, "shortest": 6, "layers": 9, "shortest_layers": 1},
        "dense_connections": [],
    }
    assert [chain["equation"] for chain in data["chains"]] == ["R3(…R0(stem(input_0)))"]
    assert list(data["costs"]) == ["total", "skips", "shares"]


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
    paths = inspect_graph(residual_mlp(1500)).paths()
    assert (paths["log2_count"], paths["mean_length"]) == (1500.0, 750.0)


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


def roles(graph: Graph, name: str) -> list[tuple[str, int | None]]:
    found = Explainer(graph, inspect_graph(graph)).why(name)
    return [(finding.role, finding.block) for finding in found.findings]


def two_stages() -> Graph:
    """Stem, block 0 with a block nested in it, a layer between, block 1 with a projection and a mask, head."""
    b = Builder()
    x = b.layer_norm(b.linear(b.input(1, 5, 8, name="x"), 8, name="stem"))
    inner = b.linear(x, 8, name="inner_fork")
    nested = b.add(inner, b.linear(b.relu(inner), 8), name="nested")
    x = b.add(x, b.mul(b.linear(nested, 8), b.param(8, name="gamma"), name="scaled"), name="outer")
    x = b.linear(x, 8, name="between")
    mask = b.op(K.NEG, b.input(1, 1, 5, 5, name="mask"), name="negated")
    total = b.add(b.linear(x, 8, name="projection"), attention(b, x, None, mask), name="second")
    x = b.layer_norm(total, name="post")
    b.op(K.RELU, x, name="unread")
    return b.output(b.linear(b.add(x, b.param(8, name="shift"), name="shifted"), 2, name="head"))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("x", [("input", 1)]),
        ("stem", [("stem", 1)]),
        ("inner_fork", [("branch", 1), ("fork", 0)]),
        ("nested", [("join", 0), ("branch", 1)]),
        ("scaled", [("branch", 1)]),
        ("gamma", [("scale", 1), ("parameter", 1)]),
        ("outer", [("join", 1)]),
        ("between", [("fork", 2), ("between", 2)]),
        ("negated", [("outside", 2), ("outside", 2)]),
        ("mask", [("input", 2)]),
        ("projection", [("shortcut", 2)]),
        ("second", [("join", 2)]),
        ("post", [("norm", 2)]),
        ("unread", [("unread", None)]),
        ("shifted", [("refused", None), ("head", 2)]),
        ("shift", [("parameter", 2)]),
        ("head", [("head", 2)]),
    ],
)
def test_why_tells_every_role(name: str, expected: list[tuple[str, int | None]]) -> None:
    assert roles(two_stages(), name) == expected


def test_why_says_where_an_operation_in_no_block_lies() -> None:
    graph = two_stages()
    report = inspect_graph(graph)
    assert "it lies in the stem, before block 1" in explain(graph, report, "stem")
    assert "it lies between block 1 and block 2" in explain(graph, report, "between")
    assert "it lies in the head, between block 2 and the output 'head'" in explain(graph, report, "head")
    assert "from outside, not from the fork" in explain(graph, report, "negated")
    assert "where it scales the branch by 'gamma'" in explain(graph, report, "scaled")
    assert "inside the branch of block 1" in explain(graph, report, "nested")
    assert "weight of 'stem'" in explain(graph, report, graph.op("stem").inputs[1].name)
    assert "no output of the graph depends on it" in explain(graph, report, "unread")


def test_why_names_the_refused_join_on_the_way() -> None:
    b = Builder()
    x = b.input(2, 8, name="x")
    left, right = b.relu(b.linear(x, 8, name="left")), b.relu(b.linear(x, 8))
    graph = b.output(b.linear(b.add(left, right, name="both"), 2))
    text = explain(graph, inspect_graph(graph), "left")
    assert "the graph has none on the way to the output" in text
    assert "by way of the join 'both', which ends no block (two working branches)" in text


def test_why_as_json() -> None:
    graph = two_stages()
    data = json.loads(json.dumps(Explainer(graph, inspect_graph(graph)).why("shifted").to_dict()))
    assert list(data) == ["node", "explanation", "block", "role", "rule", "meet", "roles"]
    assert (data["role"], data["rule"], data["block"]) == ("refused", "bias", 2)
    b = Builder()
    x = b.input(2, 8, name="x")
    graph = b.output(b.add(b.relu(b.linear(x, 8)), b.relu(b.linear(x, 8)), name="both"))
    data = Explainer(graph, inspect_graph(graph)).why("both").to_dict()
    assert (data["role"], data["rule"], data["meet"], data["block"]) == ("refused", "two working branches", "x", None)


def gated_network() -> Graph:
    b = Builder()
    x = b.relu(b.input(2, 8))
    for _ in range(2):
        gate, new = b.op(K.SIGMOID, b.linear(x, 8)), b.linear(x, 8)
        x = b.add(b.mul(gate, new, name=""), b.mul(b.sub(1.0, gate), x))
    half = b.add(x, b.mul(b.sub(b.linear(x, 8), x), 0.5))
    return b.output(b.linear(half, 2))


def test_why_tells_the_factors_of_a_gate() -> None:
    graph = gated_network()
    report = inspect_graph(graph)
    found = [roles(graph, op.name)[0][0] for op in graph if op.kind is K.MUL]
    assert found == ["mix"] * 5
    assert "is a factor in the join of block 0 (gated" in explain(graph, report, next(iter(report.members.mix[0])).name)


@pytest.mark.parametrize(
    "build", [encoder, two_stages, gated_network, lambda: dense(3), lambda: nested(3), lambda: positions(2)]
)
def test_why_has_an_answer_for_every_node(build: Callable[[], Graph]) -> None:
    graph = build()
    explainer = Explainer(graph, inspect_graph(graph))
    for name in [*(op.name for op in graph), *(value.name for value in graph.values)]:
        found = explainer.why(name)
        assert found.findings
        assert f"'{name}'" in str(found)
        json.dumps(found.to_dict())


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
