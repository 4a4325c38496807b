"""Sums: every condition of a residual add, and beside each the trap that must not fire."""

from __future__ import annotations

import pytest

from rescompile.blocks import Block, Report
from rescompile.detection import inspect_graph
from rescompile.graph import Graph, Value
from rescompile.kinds import OpKind
from tests.graphs import Builder, K, attention, mlp, residual_mlp, resnet_block, transformer_layer


def only(graph: Graph) -> Block:
    report = inspect_graph(graph)
    assert len(report) == 1, report
    return report.blocks[0]


def refused(graph: Graph, join: str | None = None) -> str:
    report = inspect_graph(graph)
    assert len(report) == 0, report
    reasons = {entry.join: entry.reason for entry in report.not_residual}
    return reasons[join] if join else next(iter(reasons.values()))


def covers_every_join(graph: Graph, report: Report) -> bool:
    joins = {op.name for op in graph if op.kind in (K.ADD, K.CONCAT)}
    told = {op.name for block in report for op in block.join_ops} | {entry.join for entry in report.not_residual}
    return joins <= told


# ---- shortcuts -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("swapped", [False, True])
def test_identity_shortcut(swapped: bool) -> None:
    b = Builder()
    x = b.input(2, 8, name="x")
    y = b.linear(x, 8, name="f")
    block = only(b.output(b.add(*((y, x) if swapped else (x, y)), name="join")))
    assert (block.kind, block.shortcut, block.norm, block.scale) == ("add", "identity", "none", None)
    assert (block.fork, block.join, block.branch) == ("x", "join", ("f",))
    assert block.skip_index == (1 if swapped else 0)
    assert block.shape == (2, 8)
    assert block.dominated
    assert block.parent is None


def test_projection_shortcut_of_a_resnet_block() -> None:
    b = Builder()
    x = b.relu(b.input(1, 8, 8, 8))
    block = only(b.output(resnet_block(b, x, 16, stride=2)))
    assert (block.shortcut, block.norm) == ("projection", "branch")
    assert [op.kind for op in block.shortcut_ops] == [K.CONV, K.BATCH_NORM]
    assert [op.kind for op in block.branch_ops] == [K.CONV, K.BATCH_NORM, K.RELU, K.CONV, K.BATCH_NORM]
    assert block.fork_value is x


def test_projection_behind_a_pool() -> None:
    b = Builder()
    x = b.input(1, 8, 8, 8)
    y = b.batch_norm(b.conv(b.relu(b.conv(x, 16, 3, 2)), 16, 3))
    pooled = b.op(K.AVG_POOL, x, shape=(1, 8, 4, 4), kernel=(2, 2), stride=(2, 2), pads=(0, 0, 0, 0))
    assert only(b.output(b.add(y, b.batch_norm(b.conv(pooled, 16, 1))))).shortcut == "projection"


def test_convolution_of_three_by_three_is_no_shortcut() -> None:
    b = Builder()
    x = b.input(1, 8, 8, 8)
    y = b.conv(b.relu(b.conv(x, 8)), 8)
    assert refused(b.output(b.add(y, b.relu(b.conv(x, 8))))).startswith("two working branches")


@pytest.mark.parametrize("kind", [K.AMAX, K.MEAN])
@pytest.mark.parametrize("projected", [True, False])
def test_pool_as_a_reduction_over_windows(kind: OpKind, projected: bool) -> None:
    b = Builder()
    x = b.layer_norm(b.input(1, 16, 8))
    y = b.linear(b.op(K.MAX_POOL, b.linear(x, 8), shape=(1, 4, 8)), 8)
    skip = b.reshape(b.linear(x, 8) if projected else x, 1, 4, 4, 8)
    skip = b.op(kind, skip, shape=(1, 4, 8), axes=(1,), keepdims=False)
    assert only(b.output(b.add(skip, y))).shortcut == ("projection" if projected else "pool")


def test_two_pools_beside_each_other() -> None:
    b = Builder()
    x = b.layer_norm(b.input(1, 16, 8))
    pools = [b.op(kind, x, shape=(1, 4, 8)) for kind in (K.MAX_POOL, K.AVG_POOL)]
    y = b.linear(b.op(K.GELU, b.linear(b.op(K.MAX_POOL, x, shape=(1, 4, 8)), 16)), 16)
    assert only(b.output(b.add(b.concat(*pools, axis=2), y))).shortcut == "pool"


@pytest.mark.parametrize("whole", [True, False])
def test_pool_behind_a_class_token(whole: bool) -> None:
    b = Builder()
    x = b.layer_norm(b.input(1, 17, 8))

    def pooled(value: Value) -> Value:
        tokens = b.op(K.MAX_POOL, b.slice(value, 1, 1, 17), shape=(1, 4, 8))
        return b.concat(b.slice(value if whole else b.input(1, 17, 8), 1, 0, 1), tokens)

    y = b.linear(b.op(K.GELU, b.linear(pooled(b.linear(x, 8)), 8)), 8)
    report = inspect_graph(b.output(b.layer_norm(b.add(pooled(x), y))))
    assert [block.shortcut for block in report] == (["pool"] if whole else [])


@pytest.mark.parametrize("spelling", ["strided", "strided depthwise", "separable", "separable, pointwise first"])
def test_projection_of_a_larger_kernel(spelling: str) -> None:
    b = Builder()
    x = b.relu(b.input(1, 8, 8, 8))
    stride = 2 if spelling.startswith("strided") else 1
    channels = 8 if spelling == "strided depthwise" else 16
    y = b.batch_norm(b.conv(b.relu(b.conv(x, 16, 3, stride)), channels, 3))
    skip = {
        "strided": lambda: b.conv(x, 16, 3, 2),
        "strided depthwise": lambda: b.conv(x, 8, 3, 2, groups=8),
        "separable": lambda: b.conv(b.batch_norm(b.conv(x, 8, 3, groups=8)), 16, 1),
        "separable, pointwise first": lambda: b.conv(b.conv(x, 16, 1), 16, 3, groups=16),
    }[spelling]()
    block = only(b.output(b.add(b.batch_norm(skip), y)))
    assert (block.shortcut, block.fork_value) == ("projection", x)


@pytest.mark.parametrize("why", ["depthwise at one resolution", "activation", "two full convolutions"])
def test_convolution_that_is_no_projection(why: str) -> None:
    b = Builder()
    x = b.relu(b.input(1, 8, 8, 8))
    stride = 1 if why == "depthwise at one resolution" else 2
    y = b.conv(b.relu(b.conv(x, 8, 3, stride)), 8)
    skip = {
        "depthwise at one resolution": lambda: b.conv(x, 8, 3, groups=8),
        "activation": lambda: b.relu(b.conv(x, 8, 3, 2)),
        "two full convolutions": lambda: b.conv(b.conv(x, 8, 3, 2), 8),
    }[why]()
    assert refused(b.output(b.add(skip, y))).startswith("two working branches")


@pytest.mark.parametrize("spelling", ["pad", "concat"])
def test_shortcut_of_padded_channels(spelling: str) -> None:
    b = Builder()
    x = b.input(1, 8, 8, 8)
    y = b.conv(b.relu(b.conv(x, 16, 3, 2)), 16, 3)
    half = b.op(K.SLICE, x, shape=(1, 8, 4, 4), axes=(2, 3), starts=(0, 0), stops=(8, 8), steps=(2, 2))
    if spelling == "pad":
        skip = b.op(K.PAD, half, shape=(1, 16, 4, 4), pads=(0, 4, 0, 0, 0, 4, 0, 0))
    else:
        skip = b.concat(half, b.param(1, 8, 4, 4))
    assert only(b.output(b.add(skip, y))).shortcut == "pad"


def test_shortcut_that_only_pools() -> None:
    b = Builder()
    x = b.input(1, 8, 8, 8)
    y = b.conv(b.relu(b.conv(x, 8, 3, 2)), 8, 3)
    skip = b.op(K.MAX_POOL, x, shape=(1, 8, 4, 4), kernel=(2, 2), stride=(2, 2), pads=(0, 0, 0, 0))
    assert only(b.output(b.add(skip, y))).shortcut == "pool"


def test_shortcut_that_is_a_view() -> None:
    b = Builder()
    x = b.input(1, 8, 8, 8)
    tokens = b.permute(b.reshape(x, 1, 8, 64), 0, 2, 1)
    block = only(b.output(b.add(tokens, mlp(b, tokens))))
    assert (block.shortcut, block.fork_value) == ("identity", tokens)
    b = Builder()
    x = b.input(1, 64, 8)
    y = b.reshape(mlp(b, x), 1, 8, 64)
    block = only(b.output(b.add(y, b.reshape(x, 1, 8, 64))))
    assert (block.shortcut, block.fork_value) == ("view", x)


@pytest.mark.parametrize("step", [1, -1])
def test_a_slice_of_all_elements_in_order_is_no_view(step: int) -> None:
    b = Builder()
    x = b.input(2, 4, 8)
    attrs = {"axes": (1,), "starts": (0,), "stops": (4,), "steps": (step,)}
    whole = b.op(K.SLICE, x, shape=(2, 4, 8), **attrs)
    assert only(b.output(b.add(whole, mlp(b, x)))).shortcut == ("identity" if step == 1 else "view")


@pytest.mark.parametrize(("shape", "shortcut"), [((2, 4, 8), "identity"), ((2, 8, 4), "view")])
def test_a_reshape_to_the_shape_that_was_there_is_no_view(shape: tuple[int, ...], shortcut: str) -> None:
    b = Builder()
    x = b.input(2, 4, 8)
    assert only(b.output(b.add(b.reshape(x, *shape), b.reshape(mlp(b, x), *shape)))).shortcut == shortcut


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("late", [True, False])
def test_parts_that_the_branch_read_one_by_one_are_put_together_for_the_sum(late: bool, whole: bool) -> None:
    b = Builder()
    x = b.linear(b.input(1, 9, 8), 8)
    early = None if late else b.slice(x, 1, 0, 1)
    patches = b.slice(x, 1, 1, 9)
    patches = b.add(patches, b.linear(patches, 8), name="first")
    token = early or b.slice(x, 1, 0, 1)
    tokens = b.op(K.EXPAND, token, shape=(2, 1, 8)) if whole else b.param(2, 1, 8)
    y = attention(b, b.concat(tokens, b.reshape(patches, 2, 4, 8), axis=1))
    token_part = b.op(K.MEAN, b.slice(y, 1, 0, 1), shape=(1, 1, 8), axes=(0,), keepdims=True)
    y = b.concat(token_part, b.reshape(b.slice(y, 1, 1, 5), 1, 8, 8), axis=1)
    report = inspect_graph(b.output(b.layer_norm(b.add(b.concat(token, patches, axis=1), y, name="second"))))
    assert [(block.fork, block.join, block.shortcut) for block in report][1:] == [("first", "second", "view")] * whole


def test_slices_of_one_split_are_views_of_its_input() -> None:
    b = Builder()
    x = b.input(1, 8, 8, 8, name="x")
    split = b.ops(K.SPLIT, x, shapes=[(1, 4, 8, 8)] * 2, axis=1, sizes=(4, 4))
    first, second = split.outputs
    graph = b.output(b.add(b.conv(first, 4), second))
    block = only(graph)
    assert (block.shortcut, block.fork) == ("view", "x")


@pytest.mark.parametrize("rest", [True, False])
def test_sum_with_a_part_of_the_branch_is_a_view_where_the_rest_is_kept_beside_it(rest: bool) -> None:
    b = Builder()
    x = b.input(1, 4, 8, 8)
    wide = b.conv(x, 8)
    joined = b.add(b.slice(wide, 1, 0, 4), x)
    joined = b.concat(joined, b.slice(wide, 1, 4, 8)) if rest else b.conv(joined, 4)
    assert only(b.output(joined)).shortcut == ("view" if rest else "identity")


def test_graph_input_parameter_and_constant_can_start_a_stream() -> None:
    b = Builder()
    token = b.param(1, 1, 8, name="token")
    x = b.input(1, 5, 8)
    h = b.add(token, attention(b, token, x), name="join")
    block = only(b.output(h))
    assert (block.fork, block.shortcut) == ("token", "identity")
    assert [value.producer.inputs[0] for value in block.outside if value.producer] == [x, x]
    assert not block.dominated


def test_stream_of_queries_computed_from_constants() -> None:
    b = Builder()
    memory = b.input(1, 5, 8)
    queries, position = b.param(5, 8), b.param(5, 8)
    start = b.op(K.EXPAND, queries, shape=(1, 5, 8))
    start.constant = True
    y = b.layer_norm(b.add(start, attention(b, b.add(start, position)), name="self"))
    y = b.layer_norm(b.add(y, attention(b, b.add(y, position), memory), name="cross"))
    report = inspect_graph(b.output(y))
    assert [(block.join, block.shortcut) for block in report] == [("self", "identity"), ("cross", "identity")]


# ---- traps ---------------------------------------------------------------------------------------------------------


def test_trap_bias() -> None:
    b = Builder()
    x = b.input(2, 8)
    assert refused(b.output(b.add(b.linear(x, 8, bias=False), b.param(8)))).startswith("bias")


def test_trap_number() -> None:
    b = Builder()
    assert refused(b.output(b.add(b.linear(b.input(2, 8), 8), 1.0))).startswith("constant")


def test_trap_position_embedding_table() -> None:
    b = Builder()
    x = b.linear(b.input(2, 5, 8), 8)
    assert refused(b.output(b.add(x, b.param(5, 8)))).startswith("constant table")


def test_trap_position_embedding_that_every_layer_adds_to_its_queries() -> None:
    b = Builder()
    x, position = b.input(1, 5, 8), b.input(1, 5, 8, name="position")
    for index in range(3):
        queries = b.add(x, position, name=f"queries_{index}")
        q, k, v = b.linear(queries, 8), b.linear(queries, 8), b.linear(x, 8)
        y = b.linear(b.op(K.ATTENTION, q, k, v, None, shape=x.shape), 8)
        x = b.layer_norm(b.add(x, y, name=f"join_{index}"))
    report = inspect_graph(b.output(x))
    assert [block.join for block in report] == ["join_0", "join_1", "join_2"]
    assert [entry.join for entry in report.not_residual] == ["queries_0", "queries_1", "queries_2"]


def test_trap_mask_that_reaches_every_attention() -> None:
    b = Builder()
    x, mask = b.input(1, 5, 8), b.input(1, 1, 5, 5, name="mask")
    for index in range(3):
        q, k = (b.permute(b.reshape(b.linear(x, 8), 1, 5, 1, 8), 0, 2, 1, 3) for _ in range(2))
        scores = b.add(b.matmul(q, b.permute(k, 0, 1, 3, 2)), mask, name=f"mask_{index}")
        y = b.matmul(b.op(K.SOFTMAX, scores, axis=3), k)
        y = b.linear(b.reshape(b.permute(y, 0, 2, 1, 3), 1, 5, 8), 8)
        x = b.add(x, y, name=f"join_{index}")
    report = inspect_graph(b.output(x))
    assert [block.join for block in report] == ["join_0", "join_1", "join_2"]
    assert all(block.outside == (mask,) for block in report)
    assert {entry.join for entry in report.not_residual} == {"mask_0", "mask_1", "mask_2"}


@pytest.mark.parametrize("computed", [False, True])
def test_trap_relative_position_bias_shared_by_all_layers(computed: bool) -> None:
    b = Builder()
    x = b.input(1, 5, 8)
    bias = b.op(K.MUL, b.param(1, 1, 5, 5), b.param(1, 1, 5, 5), shape=(1, 1, 5, 5))
    if computed:  # of the inputs, behind the embedding from which the stream starts
        segments, x = x, b.linear(x, 8)
        bias = b.reshape(b.linear(b.matmul(segments, b.permute(segments, 0, 2, 1)), 5), 1, 1, 5, 5)
    for index in range(3):
        q, k = (b.permute(b.reshape(b.linear(x, 8), 1, 5, 1, 8), 0, 2, 1, 3) for _ in range(2))
        scores = b.add(b.matmul(q, b.permute(k, 0, 1, 3, 2)), bias, name=f"bias_{index}")
        y = b.matmul(b.op(K.SOFTMAX, scores, axis=3), k)
        x = b.add(x, b.linear(b.reshape(b.permute(y, 0, 2, 1, 3), 1, 5, 8), 8), name=f"join_{index}")
    report = inspect_graph(b.output(x))
    assert [block.join for block in report] == ["join_0", "join_1", "join_2"]


@pytest.mark.parametrize("measured", [True, False])
def test_trap_distance_of_a_loss(measured: bool) -> None:
    b = Builder()
    x = b.input(2, 8)
    difference = b.sub(b.linear(b.relu(b.linear(x, 16)), 8), x)
    squared = b.mul(difference, difference)
    outputs = [b.mean(squared, 0, 1)] if measured else [b.mean(squared, 0, 1), difference]
    assert len(inspect_graph(b.output(*outputs))) == (0 if measured else 1)


def test_trap_x_plus_x() -> None:
    b = Builder()
    x = b.linear(b.input(2, 8), 8)
    assert refused(b.output(b.add(x, x))).startswith("x + x")


def test_trap_sum_of_two_inputs() -> None:
    b = Builder()
    x, y = b.input(2, 8), b.input(2, 8)
    assert refused(b.output(b.add(b.linear(x, 8), b.linear(y, 8)))).startswith("no common origin")


def test_trap_sum_of_two_working_branches() -> None:
    b = Builder()
    x = b.input(2, 8)
    assert refused(b.output(b.add(mlp(b, x), mlp(b, x)))).startswith("two working branches")


def test_trap_sum_of_two_activated_projections() -> None:
    b = Builder()
    x = b.input(2, 8)
    assert refused(b.output(b.add(b.relu(b.linear(x, 8)), b.relu(b.linear(x, 8))))).startswith("two working branches")


@pytest.mark.parametrize("order", [1, -1])
def test_of_two_normed_projections_the_one_without_an_activation_is_the_shortcut(order: int) -> None:
    b = Builder()
    x = b.linear(b.input(2, 8), 8)
    normed, active = b.layer_norm(b.linear(x, 8)), b.relu(b.layer_norm(b.linear(x, 8)))
    block = only(b.output(b.add(*(normed, active)[::order])))
    assert (block.shortcut, block.shortcut_ops[-1].output) == ("projection", normed)


def test_two_normed_projections_are_alike() -> None:
    b = Builder()
    x = b.linear(b.input(2, 8), 8)
    joined = b.add(b.layer_norm(b.linear(x, 8)), b.layer_norm(b.linear(x, 8)))
    assert refused(b.output(joined)).startswith("two working branches")


@pytest.mark.parametrize("swapped", [False, True])
def test_affine_projection_beside_an_activated_one_is_the_shortcut(swapped: bool) -> None:
    b = Builder()
    x = b.input(2, 8)
    sides = [b.linear(x, 8, name="projection"), b.relu(b.linear(x, 8))]
    block = only(b.output(b.add(*(sides[::-1] if swapped else sides))))
    assert (block.shortcut, [op.name for op in block.shortcut_ops]) == ("projection", ["projection"])


def test_trap_polynomial_inside_an_activation() -> None:
    b = Builder()
    x = b.linear(b.input(2, 8), 8)
    y = b.add(x, b.mul(b.op(K.POW, x, 3.0), 0.044715))
    assert refused(b.output(b.op(K.TANH, y))).startswith("no working branch")


@pytest.mark.parametrize("works", [True, False])
def test_an_unknown_operation_works_unless_it_is_known_not_to(works: bool) -> None:
    # xIELU's (expm1(min(x, 0)) - x)·a is an activation, x - logsumexp(x) a softmax
    b = Builder()
    x = b.linear(b.input(2, 8), 8)
    y = b.op(K.OPAQUE, x, shape=(2, 8), target="expm1", works=works)
    graph = b.output(b.linear(b.sub(y, x), 8))
    if works:
        assert only(graph).shortcut == "identity"
    else:
        assert refused(graph).startswith("no working branch")


def test_trap_rotary_embedding() -> None:
    b = Builder()
    x, cos, sin = b.input(1, 5, 8), b.input(5, 8), b.input(5, 8)
    q = b.linear(x, 8)
    turned = b.concat(b.op(K.NEG, b.slice(q, 2, 4, 8)), b.slice(q, 2, 0, 4), axis=2)
    graph = b.output(b.add(b.mul(q, cos), b.mul(turned, sin), name="rotary"))
    report = inspect_graph(graph)
    assert len(report) == 0
    assert covers_every_join(graph, report)


def test_trap_global_response_norm() -> None:
    b = Builder()
    x = b.conv(b.input(1, 8, 4, 4), 8)
    energy = b.op(K.SQRT, b.op(K.SUM, b.mul(x, x), shape=(1, 8, 1, 1), axes=(2, 3), keepdims=True))
    scaled = b.mul(x, b.op(K.DIV, energy, b.add(b.mean(energy, 1), 1e-6)))
    graph = b.output(b.add(x, b.mul(scaled, b.param(1, 8, 1, 1)), name="grn"))
    assert refused(graph, "grn").startswith("no working branch")


def test_trap_integer_arithmetic() -> None:
    b = Builder()
    x = b.input(5, dtype="int64")
    assert refused(b.output(b.add(x, b.op(K.MATMUL, x, x, shape=(5,))))).startswith("integer")


def test_trap_smaller_value_that_is_added_everywhere() -> None:
    b = Builder()
    x = b.input(2, 1, 8)
    y = b.op(K.MATMUL, b.input(2, 5, 1), mlp(b, x), shape=(2, 5, 8))
    assert refused(b.output(b.add(x, y))).startswith("broadcast")


def test_branch_may_be_broadcast_where_the_shortcut_is_not() -> None:
    b = Builder()
    x = b.input(2, 8, 4, 4)
    context = b.conv(b.mean(x, 2, 3), 8, 1)
    assert only(b.output(b.add(x, context))).shortcut == "identity"


def test_squeeze_and_excite_gate_is_no_join() -> None:
    b = Builder()
    x = b.input(2, 8, 4, 4)
    gate = b.op(K.SIGMOID, b.conv(b.relu(b.conv(b.mean(x, 2, 3), 2, 1)), 8, 1))
    report = inspect_graph(b.output(b.mul(x, gate)))
    assert len(report) == 0
    assert report.not_residual == ()


# ---- several blocks ------------------------------------------------------------------------------------------------


def test_chain_of_blocks() -> None:
    report = inspect_graph(residual_mlp(5))
    assert [block.join for block in report] == [f"join_{index}" for index in range(5)]
    assert [block.fork for block in report][1:] == [f"join_{index}" for index in range(4)]
    assert [block.module for block in report] == [f"blocks.{index}" for index in range(5)]
    assert all(block.parent is None for block in report)
    assert (report.lengths.log2_count, report.lengths.mean) == (5.0, 2.5)


def test_global_skip_encloses_the_blocks_inside() -> None:
    b = Builder()
    head = b.conv(b.input(1, 3, 8, 8), 8)
    x = head
    for _ in range(3):
        y = b.conv(b.relu(b.conv(x, 8)), 8)
        x = b.add(b.mul(y, 0.1), x)
    graph = b.output(b.add(head, b.conv(x, 8), name="global"))
    report = inspect_graph(graph)
    assert [block.parent for block in report] == [3, 3, 3, None]
    assert report.blocks[3].fork_value is head
    assert [op.kind for op in report.blocks[3].branch_ops] == [K.ADD, K.ADD, K.ADD, K.CONV]
    assert report.summary()["nested"] == 3
    assert len(report.all_branch_ops(report.blocks[3])) == 3 * 5 + 1


@pytest.mark.parametrize("inside", [True, False])
def test_a_block_in_a_shortcut_is_nested_where_that_shortcut_is(inside: bool) -> None:
    b = Builder()
    fork = b.conv(b.input(1, 4, 16, 16), 4)

    def level(x: Value, depth: int) -> Value:
        skip = b.add(x, b.conv(x, 4), name=f"skip_{depth}")
        down = b.op(K.AVG_POOL, x, shape=(1, 4, *(int(extent) // 2 for extent in (x.shape or ())[2:])))
        down = level(down, depth - 1) if depth > 1 else b.conv(down, 4)
        return b.add(skip, b.op(K.INTERPOLATE, down, shape=x.shape), name=f"level_{depth}")

    report = inspect_graph(b.output(level(fork, 2 if inside else 1)))
    parents = {block.join: None if block.parent is None else report.blocks[block.parent].join for block in report}
    nested = {"skip_1": "level_2", "level_1": "level_2", "skip_2": None, "level_2": None}
    assert parents == (nested if inside else {"skip_1": None, "level_1": None})
    assert "R(x) = " in str(report)


def test_one_fork_that_feeds_every_join() -> None:
    b = Builder()
    x = b.input(2, 8, name="x")
    y = x
    for index in range(6):
        y = b.add(x, b.linear(b.relu(y), 8), name=f"join_{index}")
    report = inspect_graph(b.output(y))
    assert [block.fork for block in report] == ["x"] * 6
    assert [block.parent for block in report] == [1, 2, 3, 4, 5, None]


@pytest.mark.parametrize("spelling", ["x + (a + f)", "(x + a) + f", "one sum", "(a + x) + f"])
def test_parallel_branches_are_one_block(spelling: str) -> None:
    b = Builder()
    x = b.input(1, 5, 8, name="x")
    n = b.layer_norm(x)
    a, f = attention(b, n), mlp(b, n)
    total = {
        "x + (a + f)": lambda: b.add(x, b.add(a, f)),
        "(x + a) + f": lambda: b.add(b.add(x, a), f),
        "(a + x) + f": lambda: b.add(b.add(a, x), f),
        "one sum": lambda: b.add(x, a, f),
    }[spelling]()
    graph = b.output(total)
    report = inspect_graph(graph)
    block = only(graph)
    assert (block.kind, block.fork, block.shortcut, block.norm) == ("parallel", "x", "identity", "pre")
    assert {op.kind for op in block.branch_ops} >= {K.LAYER_NORM, K.ATTENTION, K.GELU}
    assert covers_every_join(graph, report)


@pytest.mark.parametrize("linears", [1, 2])
def test_parallel_branches_may_share_one_linear_and_no_more(linears: int) -> None:
    b = Builder()
    x = b.input(1, 5, 8)
    both = b.layer_norm(x)
    for _ in range(linears):
        both = b.linear(both, 32)
    q, k, v, f = b.ops(K.SPLIT, both, shapes=[(1, 5, 8)] * 4, axis=2, sizes=(8,) * 4).outputs
    a = b.linear(b.op(K.ATTENTION, q, k, v, None, shape=q.shape), 8)
    block = only(b.output(b.add(x, b.add(a, b.linear(b.op(K.GELU, f), 8)))))
    assert block.kind == ("parallel" if linears == 1 else "add")


@pytest.mark.parametrize("convolved", [False, True])
def test_parallel_branches_may_share_a_norm_and_an_activation_but_no_convolution(convolved: bool) -> None:
    b = Builder()
    x = b.input(1, 4, 8, 8)
    both = b.relu(b.batch_norm(b.conv(x, 4) if convolved else x))
    one, two = (b.conv(b.relu(b.conv(both, 4)), 4) for _ in range(2))
    block = only(b.output(b.add(x, b.add(one, two))))
    assert (block.kind, block.shortcut) == ("add" if convolved else "parallel", "identity")


def test_the_largest_of_a_router_beside_the_others_are_no_new_features() -> None:
    b = Builder()
    logits = b.linear(b.input(2, 8), 6)
    best = b.op(K.TOPK, b.slice(logits, 1, 0, 4), shape=(2, 2))
    assert refused(b.output(b.linear(b.concat(best, b.slice(logits, 1, 4, 6)), 3))).startswith("no working branch")


def test_a_block_inside_the_branch_from_a_slice_is_no_step_of_a_recurrence() -> None:
    b = Builder()
    x = b.linear(b.input(2, 8), 8)
    part = b.slice(x, 1, 0, 4)
    inner = b.add(part, b.linear(part, 4), name="inner")
    rest = b.add(b.slice(x, 1, 4, 8), b.relu(inner), name="outer")
    report = inspect_graph(b.output(b.linear(rest, 3)))
    assert [(block.join, block.kind, block.shortcut) for block in report] == [
        ("inner", "add", "identity"),
        ("outer", "add", "view"),
    ]


@pytest.mark.parametrize("same", [True, False])
def test_a_sum_that_takes_away_what_it_adds_is_none(same: bool) -> None:
    # x + stop_gradient(h - x), as vector quantisation writes h
    b = Builder()
    x = b.input(2, 8)
    h = b.linear(b.relu(b.linear(x, 8)), 8)
    inner = b.op(K.IDENTITY, b.add(h, x if same else b.input(2, 8), scales=(1.0, -1.0)))
    graph = b.output(b.add(x, inner, name="join"))
    if same:
        assert refused(graph, "join").startswith("cancels")
        assert covers_every_join(graph, inspect_graph(graph))
    else:
        assert only(graph).join == "join"


@pytest.mark.parametrize("pooled", [True, False])
def test_projection_shortcut_with_a_maximum_over_windows(pooled: bool) -> None:
    # where tokens are merged, the shortcut takes the maximum of each window's; a global one is a statistic
    b = Builder()
    n = b.layer_norm(b.input(1, 8, 8))

    def merge(value: Value) -> Value:
        windows = b.reshape(value, 1, 2, 4, 16) if pooled else b.reshape(value, 1, 1, 8, 16)
        return b.op(K.AMAX, windows, shape=(1, windows.shape[1], 16), axes=(2,), keepdims=False)

    skip = merge(b.linear(n, 16))
    branch = b.linear(b.matmul(b.permute(b.linear(n, 2), 0, 2, 1), b.linear(n, 16)), 16)
    graph = b.output(b.add(skip, branch))
    if pooled:
        assert (only(graph).shortcut, only(graph).norm) == ("projection", "pre")
    else:
        assert refused(graph).startswith("broadcast")


@pytest.mark.parametrize("beside", ["shared expert", "attention"])
def test_a_mixture_of_experts_is_one_branch(beside: str) -> None:
    b = Builder()
    x = b.input(1, 5, 8)
    n = b.layer_norm(x)
    chosen = b.op(K.TOPK, b.linear(n, 8), shape=(1, 5, 8))
    routed = b.mul(mlp(b, n), chosen)
    other = mlp(b, n) if beside == "shared expert" else attention(b, n)
    block = only(b.output(b.add(x, b.add(other, routed, name="sum"))))
    assert block.kind == ("add" if beside == "shared expert" else "parallel")
    assert block.norm == "pre"


def test_two_blocks_in_a_row_are_not_parallel() -> None:
    b = Builder()
    x = transformer_layer(b, b.input(1, 5, 8))
    report = inspect_graph(b.output(x))
    assert [block.kind for block in report] == ["add", "add"]


@pytest.mark.parametrize("affine", [True, False])
def test_sum_of_convolutions_of_one_fork_is_branches_unless_one_bends(affine: bool) -> None:
    b = Builder()
    x = b.relu(b.input(1, 8, 8, 8))
    y = b.batch_norm(b.conv(x, 8, 3, groups=8))
    total = b.add(b.batch_norm(b.conv(x, 8, 5, groups=8)), y if affine else b.relu(y))
    total = b.add(total, b.batch_norm(b.conv(x, 8, 1, groups=8)))
    report = inspect_graph(b.output(b.relu(total)))
    assert [block.kind for block in report] == (["branches"] if affine else ["parallel"])
    assert len(report.blocks[0].join_ops) == 2


def test_sum_of_two_heads_on_two_tokens_is_no_branches() -> None:
    b = Builder()
    x = b.layer_norm(b.input(1, 5, 8))
    heads = [b.linear(b.reshape(b.slice(x, 1, index, index + 1), 1, 8), 4) for index in range(2)]
    assert refused(b.output(b.add(*heads))).startswith("two working branches")


def test_sum_of_a_head_on_one_token_and_a_pooled_head_on_the_others_is_no_block() -> None:
    b = Builder()
    x = b.layer_norm(b.input(1, 5, 8))
    first = b.linear(b.reshape(b.slice(x, 1, 0, 1), 1, 8), 4)
    rest = b.linear(b.slice(b.op(K.IDENTITY, x), 1, 1, 5), 4)
    graph = b.output(b.add(first, b.op(K.AMAX, rest, shape=(1, 4), axes=(1,), keepdims=False)))
    assert refused(graph).startswith("two working branches")


def test_sum_of_affine_branches_is_reported_for_reparameterisation() -> None:
    b = Builder()
    x = b.relu(b.input(1, 8, 8, 8))
    y = b.add(b.batch_norm(b.conv(x, 8, 3)), b.batch_norm(b.conv(x, 8, 1)))
    y = b.add(b.batch_norm(x), y)
    report = inspect_graph(b.output(b.relu(y)))
    assert [block.kind for block in report] == ["branches"]
    assert len(report.blocks[0].join_ops) == 2
    assert report.summary() == {
        "blocks": 0,
        "nested": 0,
        "by_kind": {"branches": 1},
        "by_shortcut": {},
        "by_norm": {},
    }


def test_identity_beside_an_affine_branch_is_a_residual_block() -> None:
    b = Builder()
    x = b.relu(b.input(1, 8, 8, 8))
    assert only(b.output(b.add(x, b.batch_norm(b.conv(x, 8, 3))))).kind == "add"


# ---- norm placement ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", ["pre", "post", "branch", "sandwich", "none"])
def test_norm_placement_of_transformer_layers(norm: str) -> None:
    b = Builder()
    x = b.linear(b.input(1, 5, 8), 8)
    memory, mask = b.input(1, 7, 8), b.input(1, 1, 5, 5)
    for _ in range(2):
        x = transformer_layer(b, x, norm, memory, mask)
    if norm == "pre":
        x = b.layer_norm(x)
    graph = b.output(b.linear(x, 3))
    report = inspect_graph(graph)
    assert [block.norm for block in report] == [norm] * 6
    assert [len(block.norms) for block in report] == [{"none": 0, "sandwich": 2}.get(norm, 1)] * 6
    assert covers_every_join(graph, report)


def test_norm_inside_the_branch_is_inner_also_where_a_norm_follows_that_leaves_the_stream() -> None:
    b = Builder()
    x = b.input(1, 5, 8)
    for _ in range(2):
        x = b.add(x, b.linear(b.layer_norm(b.linear(x, 8)), 8))
    graph = b.output(b.linear(b.layer_norm(x), 4))
    assert [block.norm for block in inspect_graph(graph)] == ["inner", "inner"]


def test_norm_that_one_of_two_readers_applies_is_not_post() -> None:
    b = Builder()
    x = b.input(2, 8)
    y = b.add(x, b.linear(x, 8))
    block = only(b.output(b.layer_norm(y), y))
    assert block.norm == "none"


@pytest.mark.parametrize("inner", [False, True])
def test_norm_of_a_permuted_sum_is_post_where_its_output_goes_on(inner: bool) -> None:
    # channels first outside the norm, and the norm's gain a factor of its own
    b = Builder()
    x = b.input(1, 8, 5, name="x")
    for _ in range(2):
        y = b.linear(b.permute(x, 0, 2, 1), 8)
        total = b.add(x, b.permute(b.linear(b.layer_norm(y), 8) if inner else y, 0, 2, 1))
        normed = b.op(K.RMS_NORM, b.permute(total, 0, 2, 1), None, shape=(1, 5, 8))
        x = b.permute(b.mul(b.param(8), normed), 0, 2, 1)
    assert [block.norm for block in inspect_graph(b.output(x))] == ["post", "post"]


@pytest.mark.parametrize("closing", [True, False])
def test_norm_that_closes_a_block_does_not_open_the_next(closing: bool) -> None:
    b = Builder()
    x = b.input(2, 8)
    x = b.add(x, b.linear(b.relu(b.linear(x, 8)), 8)) if closing else b.linear(x, 8)
    x = b.layer_norm(x)
    y = b.add(b.linear(x, 8), b.linear(b.relu(b.linear(x, 8)), 8))
    norms = [block.norm for block in inspect_graph(b.output(b.linear(y, 3)))]
    assert norms == (["post", "none"] if closing else ["pre"])


@pytest.mark.parametrize("carried", [False, True])
def test_activated_norm_between_projected_blocks_opens_the_next_one_unless_an_identity_skip_carries_it(
    carried: bool,
) -> None:
    # He et al. 2016, figure 4: full pre-activation, and batch norm after addition
    b = Builder()
    x = b.relu(b.batch_norm(b.conv(b.input(1, 3, 8, 8), 8)))
    for _ in range(2):
        branch = b.conv(b.relu(b.batch_norm(b.conv(x, 8))), 8)
        x = b.relu(b.batch_norm(b.add(b.conv(x, 8, 1), branch)))
        if carried:
            x = b.relu(b.batch_norm(b.add(x, b.conv(b.relu(b.batch_norm(b.conv(x, 8))), 8))))
    norms = [block.norm for block in inspect_graph(b.output(x))]
    assert norms == (["post"] * 4 if carried else ["pre"] * 2)


# ---- scale ---------------------------------------------------------------------------------------------------------


def test_layer_scale_is_a_vector_on_the_branch() -> None:
    b = Builder()
    x = b.input(2, 5, 8)
    block = only(b.output(b.add(x, b.mul(mlp(b, x), b.param(8, name="gamma")))))
    assert block.scale is not None
    assert block.scale.to_dict() == {"on": "branch", "type": "vector", "factor": "gamma"}


def test_rezero_is_a_scalar_on_the_branch() -> None:
    b = Builder()
    x = b.input(2, 5, 8)
    block = only(b.output(b.add(b.mul(b.param(1, name="alpha"), mlp(b, x)), x)))
    assert block.scale is not None
    assert block.scale.to_dict() == {"on": "branch", "type": "scalar", "factor": "alpha"}


@pytest.mark.parametrize("spelling", ["alpha", "mul", "div"])
def test_constant_on_the_branch(spelling: str) -> None:
    b = Builder()
    x = b.input(2, 5, 8)
    y = mlp(b, x)
    y = {"alpha": lambda: y, "mul": lambda: b.mul(y, 0.5), "div": lambda: b.op(K.DIV, y, 2.0)}[spelling]()
    block = only(b.output(b.add(x, y, scales=(1.0, 0.5) if spelling == "alpha" else ())))
    assert block.scale is not None
    assert block.scale.to_dict() == {"on": "branch", "type": "constant", "factor": 0.5}


def test_constant_on_the_skip() -> None:
    b = Builder()
    x = b.input(2, 5, 8)
    block = only(b.output(b.layer_norm(b.add(b.mul(x, 2.0), mlp(b, x)))))
    assert block.scale is not None
    assert block.scale.to_dict() == {"on": "skip", "type": "constant", "factor": 2.0}
    assert (block.shortcut, block.norm) == ("identity", "post")


def test_factor_that_depends_on_the_input_is_no_scale() -> None:
    b = Builder()
    x = b.input(2, 5, 8)
    block = only(b.output(b.add(x, b.mul(mlp(b, x), b.op(K.SIGMOID, x)))))
    assert block.scale is None


# ---- sums of other spellings ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 0, 2)])
def test_sum_of_three_with_a_bias(order: tuple[int, ...]) -> None:
    b = Builder()
    x = b.input(2, 8, name="x")
    operands: list[Value] = [x, b.linear(x, 8), b.param(8)]
    block = only(b.output(b.add(*(operands[index] for index in order))))
    assert (block.kind, block.fork) == ("add", "x")
    assert block.join_op.inputs[block.skip_index] is x


def test_difference_is_a_sum() -> None:
    b = Builder()
    x = b.input(2, 8)
    assert only(b.output(b.sub(x, mlp(b, x)))).shortcut == "identity"
