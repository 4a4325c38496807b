"""Kinds other than plain sums: dense, long, gated, recurrent, stochastic; each beside what must not be taken for it."""

from __future__ import annotations

import pytest

from rescompile.blocks import Block
from rescompile.detection import inspect_graph
from rescompile.graph import Graph, Value
from tests.graphs import Builder, K, mlp


def only(graph: Graph) -> Block:
    report = inspect_graph(graph)
    assert len(report) == 1, report
    return report.blocks[0]


def kinds(graph: Graph) -> list[str]:
    return [block.kind for block in inspect_graph(graph)]


def layer(b: Builder, x: Value, growth: int = 4) -> Value:
    return b.conv(b.relu(b.batch_norm(x)), growth)


# ---- dense ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spelling", ["all features each time", "two at a time"])
def test_dense_layers(spelling: str) -> None:
    b = Builder()
    x = b.input(1, 8, 8, 8)
    features, joined = [x], x
    for _ in range(4):
        new = layer(b, joined)
        features.append(new)
        joined = b.concat(*features) if spelling == "all features each time" else b.concat(joined, new)
    report = inspect_graph(b.output(joined))
    assert [block.kind for block in report] == ["dense"] * 4
    assert [block.fork for block in report][1:] == [block.join for block in report][:-1]
    assert all(block.parent is None for block in report)
    assert report.summary()["by_shortcut"] == {}


@pytest.mark.parametrize("part", ["split", "slices", "slice emitted last"])
def test_concat_of_half_and_work_on_the_other_half(part: str) -> None:
    b = Builder()
    x = b.relu(b.input(1, 8, 8, 8))
    if part == "split":
        first, second = b.ops(K.SPLIT, x, shapes=[(1, 4, 8, 8)] * 2, axis=1, sizes=(4, 4)).outputs
        joined = b.concat(first, b.conv(second, 4))
    elif part == "slices":
        first, second = b.slice(x, 1, 0, 4), b.slice(x, 1, 4, 8)
        joined = b.concat(first, b.conv(second, 4))
    else:
        worked = b.conv(b.slice(x, 1, 0, 4), 4)
        joined = b.concat(worked, b.slice(x, 1, 4, 8))
    block = only(b.output(joined))
    assert (block.kind, block.shortcut, block.fork_value) == ("dense", "view", x)


@pytest.mark.parametrize("why", ["two working branches", "pooled branch", "halves swapped", "constant", "one value"])
def test_concat_that_is_not_residual(why: str) -> None:
    b = Builder()
    x = b.relu(b.input(1, 8, 8, 8))
    parts = {
        "two working branches": lambda: (b.relu(b.conv(x, 4, 1)), b.relu(b.conv(x, 4, 3))),
        "pooled branch": lambda: (b.op(K.MAX_POOL, x, shape=x.shape), b.conv(x, 4)),
        "halves swapped": lambda: (b.op(K.NEG, b.slice(x, 1, 4, 8)), b.slice(x, 1, 0, 4)),
        "constant": lambda: (b.param(1, 1, 8, 8), x),
        "one value": lambda: (x,),
    }[why]()
    report = inspect_graph(b.output(b.concat(*parts)))
    assert len(report) == 0
    assert [entry.reason for entry in report.not_residual]


def resized(b: Builder, kind: K, x: Value, extent: int) -> Value:
    return b.op(kind, x, shape=(1, (x.shape or ())[1], extent, extent))


@pytest.mark.parametrize("kind", [K.AVG_POOL, K.INTERPOLATE])
@pytest.mark.parametrize("order", [1, -1])
def test_fork_brought_to_the_resolution_of_its_branch_is_dense(kind: K, order: int) -> None:
    b = Builder()
    x = b.relu(b.conv(b.input(1, 8, 8, 8), 8))
    extent = 4 if kind is K.AVG_POOL else 16
    new = b.relu(b.conv(resized(b, kind, b.relu(b.conv(x, 8)), extent), 12))
    block = only(b.output(b.concat(*(resized(b, kind, x, extent), new)[::order])))
    assert (block.kind, block.shortcut, block.fork_value) == ("dense", "pool", x)


@pytest.mark.parametrize("why", ["maximum", "enlarged last", "two pools", "weights on both", "three parts"])
def test_concat_of_resized_values_that_is_not_residual(why: str) -> None:
    b = Builder()
    x = b.relu(b.conv(b.input(1, 8, 8, 8), 8))
    small, large = resized(b, K.AVG_POOL, x, 4), resized(b, K.INTERPOLATE, x, 16)
    made = b.relu(b.conv(resized(b, K.MAX_POOL, b.conv(x, 8), 4), 8))
    parts = {
        "maximum": lambda: (resized(b, K.MAX_POOL, x, 4), made),
        "enlarged last": lambda: (large, resized(b, K.INTERPOLATE, b.relu(b.conv(b.relu(b.conv(x, 8)), 8)), 16)),
        "two pools": lambda: (small, resized(b, K.MAX_POOL, x, 4)),
        "weights on both": lambda: (b.relu(b.conv(small, 8, 1)), made),
        "three parts": lambda: (small, made, b.relu(b.conv(resized(b, K.MAX_POOL, x, 4), 8))),
    }[why]()
    report = inspect_graph(b.output(b.concat(*parts)))
    assert len(report) == 0
    assert [entry.reason for entry in report.not_residual]


def test_class_token_in_front_of_the_tokens_is_no_dense_block() -> None:
    b = Builder()
    x, token = b.linear(b.input(1, 5, 8), 8), b.param(1, 1, 8)
    for _ in range(2):
        both = b.concat(token, x, axis=1)
        q, k = b.linear(token, 8), b.linear(both, 8)
        token = b.add(token, b.linear(b.op(K.ATTENTION, q, k, k, None, shape=token.shape), 8))
    assert kinds(b.output(token)) == ["add", "add"]


@pytest.mark.parametrize("axis", [1, 2])
@pytest.mark.parametrize("transposed", [False, True])
def test_tokens_beside_tokens_are_positions_and_features_beside_features_are_dense(axis: int, transposed: bool) -> None:
    b = Builder()
    x = b.layer_norm(b.input(1, 5, 8))
    kept = b.slice(x, axis, 0, 2)
    made = b.linear(b.slice(x, axis, 2, 5 if axis == 1 else 8), 8)
    joined = b.concat(kept, made, axis=axis)
    joined = b.reshape(b.reshape(joined, *(1, 1, *(joined.shape or ())[1:])), *(joined.shape or ()))
    if transposed:
        joined = b.permute(joined, 0, 2, 1)
        joined = b.op(K.CONV, joined, b.param(8, int((joined.shape or ())[1]), 1), None, shape=(1, 8, 5), groups=1)
    else:
        joined = b.linear(joined, 8)
    report = inspect_graph(b.output(joined))
    assert [block.kind for block in report] == (["dense"] if axis == 2 else [])
    assert [entry.reason.split(":")[0] for entry in report.not_residual] == ([] if axis == 2 else ["positions"])


# ---- long ----------------------------------------------------------------------------------------------------------


def up(b: Builder, x: Value) -> Value:
    n, c, height, width = x.shape or ()
    return b.op(K.INTERPOLATE, x, shape=(n, c, int(height) * 2, int(width) * 2))


def test_u_net_has_one_long_skip_a_level() -> None:
    b = Builder()
    x = b.input(1, 3, 16, 16)
    e1 = b.relu(b.conv(x, 8))
    e2 = b.relu(b.conv(b.op(K.MAX_POOL, e1, shape=(1, 8, 8, 8)), 16))
    e3 = b.relu(b.conv(b.op(K.MAX_POOL, e2, shape=(1, 16, 4, 4)), 32))
    d2 = b.relu(b.conv(b.concat(up(b, e3), e2), 16))
    d1 = b.relu(b.conv(b.concat(e1, up(b, d2)), 8))
    report = inspect_graph(b.output(b.conv(d1, 1, 1)))
    assert [(block.kind, block.fork_value) for block in report] == [("long", e2), ("long", e1)]
    assert [block.parent for block in report] == [1, None]


@pytest.mark.parametrize("made", [True, False])
def test_streams_that_a_matrix_of_each_position_mixes_are_gated(made: bool) -> None:
    b = Builder()
    x = b.reshape(b.linear(b.input(1, 6, 32), 32), 6, 4, 8)
    flat = b.layer_norm(b.reshape(x, 6, 32))
    matrix = b.op(K.SOFTMAX, b.reshape(b.linear(flat, 16), 6, 4, 4), axis=-1) if made else b.param(6, 4, 4)
    branch = b.op(K.EXPAND, b.reshape(mlp(b, b.mean(x, 1, keepdims=False)), 6, 1, 8), shape=(6, 4, 8))
    report = inspect_graph(b.output(b.add(b.matmul(matrix, x), branch, name="join")))
    assert [(block.kind, block.shortcut) for block in report] == [("gated", "identity")] * made


def test_scores_of_an_attention_with_a_bias_of_the_query_are_no_mix() -> None:
    b = Builder()
    packed = b.reshape(b.linear(b.input(1, 8, 24), 24), 3, 8, 8)
    q, k, v = (b.reshape(b.slice(packed, 0, index, index + 1), 8, 8) for index in range(3))
    scores = b.add(b.matmul(q, b.permute(k, 1, 0)), b.matmul(q, b.param(8, 8)))
    masked = b.op(K.WHERE, b.op(K.EQUAL, scores, 0.0), 0.0, b.op(K.SOFTMAX, scores, axis=-1))
    report = inspect_graph(b.output(b.linear(b.matmul(masked, v), 4)))
    assert len(report) == 0
    assert report.not_residual[0].reason.startswith("two working branches")


def fusing(b: Builder, resize: bool = True, work: bool = True, streams: int = 3) -> Value:
    """Streams of one fork, a block in each, and the sum of all of them at the resolution of the first."""
    x = b.relu(b.conv(b.input(1, 3, 16, 16), 8))
    ends = []
    for level in range(streams):
        y = b.relu(b.conv(x, 8))
        for _ in range(level if resize else 0):
            y = b.relu(b.conv(y, 8, stride=2 if resize else 1))
        if work:
            y = b.relu(b.add(y, b.conv(b.relu(b.conv(y, 8)), 8)))
        if level:
            y = b.batch_norm(b.conv(y, 8, 1))
            if resize:
                y = b.op(K.INTERPOLATE, y, shape=(1, 8, 16, 16))
        ends.append(y)
    total = ends[0]
    for index, end in enumerate(ends[1:]):
        total = b.add(total, end, name=f"fuse_{index}")
    return b.conv(b.relu(total), 4)


@pytest.mark.parametrize("streams", [2, 3])
def test_streams_of_several_resolutions_are_added_up_as_branches(streams: int) -> None:
    b = Builder()
    report = inspect_graph(b.output(fusing(b, streams=streams)))
    assert [block.kind for block in report] == ["add"] * streams + ["branches"]
    block = report.blocks[-1]
    assert (block.join, block.branch_count) == (f"fuse_{streams - 2}", streams)
    assert [op.name for op in block.join_ops] == [f"fuse_{index}" for index in range(streams - 1)]
    assert all(other.parent is None for other in report)
    assert not report.not_residual
    assert ("F3(x)" if streams == 3 else "F(x)") in str(report)


@pytest.mark.parametrize(("resize", "work"), [(False, True), (True, False)])
def test_streams_of_one_resolution_and_maps_without_streams_are_two_working_branches(resize: bool, work: bool) -> None:
    b = Builder()
    report = inspect_graph(b.output(fusing(b, resize, work, streams=2)))
    assert "fuse_0" not in {block.join for block in report}
    assert [entry.reason.split(":")[0] for entry in report.not_residual] == ["two working branches"]


def test_levels_of_a_pyramid_that_are_added_up_once_more_are_two_working_branches() -> None:
    b = Builder()
    c2 = b.relu(b.conv(b.input(1, 3, 16, 16), 8))
    c3 = b.relu(b.conv(c2, 8, stride=2))
    c4 = b.relu(b.conv(c3, 8, stride=2))
    p3 = b.add(b.conv(c3, 8, 1), b.op(K.INTERPOLATE, b.conv(c4, 8, 1), shape=(1, 8, 8, 8)), name="p3")
    p2 = b.add(b.conv(c2, 8, 1), b.op(K.INTERPOLATE, p3, shape=(1, 8, 16, 16)), name="p2")
    n3 = b.add(b.conv(p3, 8), b.conv(b.conv(p2, 8), 8, stride=2), name="n3")
    report = inspect_graph(b.output(b.conv(n3, 4)))
    assert [(block.join, block.kind) for block in report] == [("p3", "long"), ("p2", "long")]
    assert [entry.join for entry in report.not_residual] == ["n3"]


def test_feature_pyramid_is_long_skips_with_projections() -> None:
    b = Builder()
    c2 = b.relu(b.conv(b.input(1, 3, 16, 16), 8))
    c3 = b.relu(b.conv(c2, 8, stride=2))
    c4 = b.relu(b.conv(c3, 8, stride=2))
    p4 = b.conv(c4, 8, 1)
    p3 = b.add(b.conv(c3, 8, 1), up(b, p4))
    p2 = b.add(b.conv(c2, 8, 1), up(b, p3))
    report = inspect_graph(b.output(b.conv(p2, 8), b.conv(p3, 8), b.conv(p4, 8)))
    assert [(block.kind, block.shortcut, block.fork_value) for block in report] == [
        ("long", "projection", c3),
        ("long", "projection", c2),
    ]


@pytest.mark.parametrize("shuffled", [True, False])
def test_pixel_shuffle_on_the_branch_makes_it_long_and_another_reshape_does_not(shuffled: bool) -> None:
    b = Builder()
    x = b.relu(b.input(1, 8, 8, 8))
    y = b.conv(x, 32, stride=2)
    if shuffled:
        y = b.permute(b.reshape(y, 1, 8, 2, 2, 4, 4), 0, 1, 4, 2, 5, 3)
        y = b.reshape(y, 1, 8, 8, 8)
    else:
        y = b.reshape(b.permute(b.reshape(y, 1, 32, 16), 0, 2, 1), 1, 8, 8, 8)
    assert kinds(b.output(b.add(x, y))) == ["long" if shuffled else "add"]


@pytest.mark.parametrize("gated", [True, False])
def test_branch_that_an_enlarged_map_only_weighs_is_not_long(gated: bool) -> None:
    b = Builder()
    x = b.relu(b.input(1, 8, 8, 8))
    small = b.conv(b.op(K.AVG_POOL, x, shape=(1, 8, 4, 4)), 8)
    y = b.mul(b.conv(x, 8), b.op(K.SIGMOID, up(b, small))) if gated else b.mul(up(b, small), b.param(1, 8, 1, 1))
    assert kinds(b.output(b.add(x, y))) == ["add" if gated else "long"]


def test_global_skip_at_one_resolution_is_not_long() -> None:
    b = Builder()
    x = b.relu(b.input(1, 8, 8, 8))
    assert kinds(b.output(b.add(x, b.conv(b.relu(b.conv(x, 8)), 8)))) == ["add"]


# ---- gated ---------------------------------------------------------------------------------------------------------


def highway(b: Builder, x: Value, spelling: str) -> Value:
    gate = b.op(K.SIGMOID, b.linear(x, 8))
    new = b.relu(b.linear(x, 8))
    if spelling == "difference":
        return b.add(x, b.mul(gate, b.sub(new, x)))
    carried = b.mul(b.sub(1.0, gate), x)
    return b.add(b.mul(gate, new), carried) if spelling == "convex" else b.add(carried, b.mul(new, gate))


@pytest.mark.parametrize("spelling", ["convex", "swapped", "difference"])
def test_highway_layers_are_gated(spelling: str) -> None:
    b = Builder()
    x = b.input(2, 8)
    for _ in range(3):
        x = highway(b, x, spelling)
    report = inspect_graph(b.output(x))
    assert [(block.kind, block.shortcut, block.parent) for block in report] == [("gated", "identity", None)] * 3
    assert all(len(block.branch_ops) >= 4 for block in report)


def two_gates(kind: K, of_the_fork: bool) -> Graph:
    b = Builder()
    x, other = b.input(2, 8), b.input(2, 8, name="other")
    gate, carry = b.op(kind, b.linear(x, 8)), b.op(kind, b.linear(x if of_the_fork else other, 8))
    return b.output(b.add(b.mul(gate, b.linear(x, 8)), b.mul(carry, x)))


def test_highway_with_a_carry_gate_of_its_own_is_gated() -> None:
    assert kinds(two_gates(K.SIGMOID, of_the_fork=True)) == ["gated"]


@pytest.mark.parametrize("why", ["factors without bounds", "gate of another stream"])
def test_mix_by_two_factors_is_not_gated(why: str) -> None:
    assert kinds(two_gates(K.RELU if why == "factors without bounds" else K.SIGMOID, why[0] == "f")) == []


def test_gate_that_closes_the_block_before_is_no_carry_gate() -> None:
    b = Builder()
    x = b.linear(b.input(2, 8), 8)
    y = b.mul(b.op(K.SIGMOID, b.linear(x, 8)), x)
    branch = b.linear(b.relu(b.linear(y, 8)), 8)
    total = b.add(b.mul(b.op(K.SIGMOID, b.linear(branch, 8)), branch), y)
    assert kinds(b.output(total)) == ["add"]


@pytest.mark.parametrize("cancels", [True, False])
def test_straight_through_sum_is_no_block(cancels: bool) -> None:
    b = Builder()
    x = b.input(2, 8)
    difference = b.sub(mlp(b, x), x if cancels else b.relu(x))
    report = inspect_graph(b.output(b.add(x, difference)))
    assert len(report) == (0 if cancels else 1)
    assert not cancels or any("cancels" in entry.reason for entry in report.not_residual)


@pytest.mark.parametrize("crossed", [True, False])
def test_streams_that_feed_each_other_keep_their_own_skips(crossed: bool) -> None:
    b = Builder()
    x = b.input(2, 8)
    first = second = x
    for _ in range(3):
        first = b.add(first, mlp(b, second if crossed else first))
        second = b.add(second, mlp(b, first if crossed else second))
    report = inspect_graph(b.output(b.add(first, second)))
    assert [(block.kind, block.shortcut) for block in report] == [("add", "identity")] * 6
    assert report.not_residual[-1].reason.startswith("two working branches")


@pytest.mark.parametrize("gates", [True, False])
def test_sum_of_two_maps_that_only_makes_a_gate_is_no_block(gates: bool) -> None:
    b = Builder()
    x = b.input(2, 8)
    y = b.relu(b.linear(b.relu(b.linear(x, 8)), 8))
    total = b.add(b.linear(x, 8), b.linear(y, 8))
    graph = b.output(b.mul(b.op(K.SIGMOID, total), y) if gates else b.op(K.SIGMOID, total))
    assert kinds(graph) == ([] if gates else ["add"])


def test_mix_by_a_constant_gate_is_a_scaled_sum() -> None:
    b = Builder()
    x = b.input(2, 8)
    graph = b.output(b.add(x, b.mul(b.param(1), b.sub(mlp(b, x), x))))
    block = only(graph)
    assert (block.kind, block.shortcut) == ("add", "identity")
    assert len(block.join_ops) == 2


# ---- recurrent -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["lstm", "gru", "rnn_tanh"])
def test_sum_around_a_recurrent_layer(mode: str) -> None:
    b = Builder()
    x = b.input(2, 5, 8)
    for _ in range(3):
        out = b.ops(K.RECURRENT, x, b.param(32, 8), b.param(32, 8), shapes=[(2, 5, 8), (1, 2, 8)], mode=mode).outputs[0]
        x = b.add(x, out)
    assert kinds(b.output(x)) == ["recurrent"] * 3


def unrolled(shared: bool) -> Graph:
    b = Builder()
    x = b.input(4, 2, 8)
    projected = b.linear(x, 8)
    steps = [b.reshape(b.slice(projected, 0, index, index + 1), 2, 8) for index in range(4)]
    weight = b.param(8, 8)
    h, hidden = steps[0], [b.op(K.TANH, steps[0])]
    for step in steps[1:]:
        h = b.op(K.LINEAR, hidden[-1], weight if shared else b.param(8, 8), None, shape=(2, 8))
        hidden.append(b.op(K.TANH, b.add(h, step)))
    y = b.concat(*(b.reshape(h, 1, 2, 8) for h in hidden), axis=0)
    return b.output(b.add(x, y))


def test_steps_of_an_unrolled_recurrence_are_no_blocks() -> None:
    report = inspect_graph(unrolled(shared=True))
    assert [block.kind for block in report] == ["recurrent"]
    reasons = [entry.reason.split(":")[0] for entry in report.not_residual]
    assert reasons == ["unrolled recurrence"] * 3 + ["a stack"]


def test_hierarchical_sums_with_weights_of_their_own_are_nested_blocks() -> None:
    report = inspect_graph(unrolled(shared=False))
    assert [(block.kind, block.shortcut) for block in report] == [("add", "view")] * 3 + [("add", "identity")]


# ---- stochastic ----------------------------------------------------------------------------------------------------


def test_branch_that_is_dropped_as_a_whole_is_stochastic() -> None:
    b = Builder()
    x = b.input(2, 8)
    for _ in range(3):
        kept = b.op(K.DIV, b.op(K.RANDOM, shape=(2, 1)), 0.8)
        x = b.add(x, b.mul(mlp(b, x), kept))
    assert kinds(b.output(x)) == ["stochastic"] * 3


def test_branch_with_elementwise_dropout_is_not_stochastic() -> None:
    b = Builder()
    x = b.input(2, 8)
    dropped = b.op(K.DROPOUT, mlp(b, x), p=0.1)
    assert kinds(b.output(b.add(x, b.mul(dropped, b.op(K.RANDOM, shape=(2, 8)))))) == ["add"]
