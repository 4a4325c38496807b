"""What the structure means: ways and their lengths, depth, the recursion, and what branches and shortcuts cost."""

from __future__ import annotations

import itertools
from functools import cache
from math import comb, log2

import numpy as np
import pytest
from hypothesis import given, settings

from benchmarks.detection import nested, one_fork
from rescompile.blocks import Report
from rescompile.costs import graph_costs, op_cost, trained_parameters
from rescompile.detection import Explainer, inspect_graph
from rescompile.graph import Graph, Op, Value
from rescompile.structure.depth import is_layer
from rescompile.structure.equations import block_equation
from rescompile.structure.overhead import PathCost
from tests.graphs import Builder, K, attention, mlp, residual_mlp, resnet_block, transformer_layer
from tests.test_detect_properties import residual_graphs


def resnet18() -> Graph:
    b = Builder("resnet18")
    x = b.input(1, 3, 64, 64, name="x")
    x = b.relu(b.batch_norm(b.conv(x, 8, 7, 2)))
    x = b.op(K.MAX_POOL, x, shape=(1, 8, 16, 16), kernel=(3, 3), stride=(2, 2), pads=(1, 1, 1, 1), dilation=(1, 1))
    for channels, stride in ((8, 1), (8, 1), (16, 2), (16, 1), (32, 2), (32, 1), (64, 2), (64, 1)):
        x = resnet_block(b, x, channels, stride)
    return b.output(b.linear(b.mean(x, 2, 3, keepdims=False), 10))


def u_net() -> Graph:
    b = Builder("u_net")

    def level(x: Value, widths: list[int]) -> Value:
        y = b.relu(b.conv(x, widths[0]))
        if len(widths) == 1:
            return y
        batch, _, height, width = y.shape or ()
        down = b.op(
            K.MAX_POOL,
            y,
            shape=(batch, widths[0], int(height) // 2, int(width) // 2),
            kernel=(2, 2),
            stride=(2, 2),
            pads=(0, 0, 0, 0),
            dilation=(1, 1),
        )
        inner = level(down, widths[1:])
        up = b.op(K.INTERPOLATE, inner, shape=(batch, inner.shape[1], height, width))
        return b.relu(b.conv(b.concat(y, up), widths[0]))

    return b.output(level(b.input(1, 3, 16, 16, name="x"), [4, 8, 16]))


def encoder_decoder() -> Graph:
    b = Builder("encoder_decoder")
    memory = b.layer_norm(b.linear(b.input(1, 5, 8, name="source"), 8))
    for _ in range(2):
        memory = transformer_layer(b, memory, "post")
    x = b.layer_norm(b.linear(b.input(1, 4, 8, name="target"), 8))
    mask = b.input(1, 1, 4, 4, name="mask")
    for _ in range(2):
        x = transformer_layer(b, x, "post", memory, mask)
    return b.output(b.linear(x, 3))


# ---- ways ----------------------------------------------------------------------------------------------------------


def test_published_shares_of_54_blocks() -> None:
    lengths = inspect_graph(residual_mlp(54)).lengths
    assert lengths.log2_count == 54.0
    assert lengths.mean == pytest.approx(27.0, abs=1e-9)
    assert lengths.share(5, 17) == pytest.approx(0.004537, abs=5e-7)
    assert lengths.share(19, 35) == pytest.approx(0.980, abs=5e-4)
    assert lengths.share(0, 54) == pytest.approx(1.0, abs=1e-11)
    assert lengths.share(60, 80) == 0.0


def test_lengths_of_plain_blocks_are_binomial() -> None:
    lengths = inspect_graph(residual_mlp(12)).lengths
    assert lengths.first == 0
    assert lengths.shares == pytest.approx([comb(12, k) / 2**12 for k in range(13)], rel=1e-12)
    assert lengths.central(0.95) == (3, 9)
    assert lengths.deviation == pytest.approx(3**0.5, rel=1e-9)


def test_lengths_of_ten_thousand_blocks() -> None:
    lengths = inspect_graph(residual_mlp(10_000)).lengths
    assert (lengths.log2_count, lengths.mean) == (10_000.0, 5_000.0)
    assert len(lengths.shares) < 1_000
    assert lengths.shares.sum() == pytest.approx(1.0, abs=1e-9)
    assert lengths.deviation == pytest.approx(50.0, rel=1e-6)


def test_lengths_of_blocks_nested_in_one_another_are_uniform() -> None:
    lengths = inspect_graph(nested(99)).lengths
    assert lengths.log2_count == pytest.approx(log2(101), abs=1e-9)
    assert lengths.shares == pytest.approx(np.full(101, 1 / 101), rel=1e-9)


def test_a_parallel_block_has_a_way_through_each_branch() -> None:
    b = Builder()
    x = b.input(1, 5, 8)
    n = b.layer_norm(x)
    report = inspect_graph(b.output(b.add(x, attention(b, n), mlp(b, n))))
    assert [block.kind for block in report] == ["parallel"]
    assert report.blocks[0].branch_count == 2
    assert report.lengths.log2_count == pytest.approx(log2(3), abs=1e-12)
    assert report.lengths.shares == pytest.approx([1 / 3, 2 / 3], rel=1e-12)


def test_different_factors_multiply() -> None:
    b = Builder()
    x = b.input(1, 5, 8)
    for _ in range(100):
        n = b.layer_norm(x)
        x = b.add(x, b.add(attention(b, n), mlp(b, n)))
    head = x
    for _ in range(2):
        x = b.add(x, b.linear(x, 8))
    x = b.add(head, b.linear(x, 8))
    lengths = inspect_graph(b.output(x)).lengths
    # (1 + 2z)¹⁰⁰ · (1 + z(1 + z)²)
    expected = np.convolve([comb(100, k) * (2 / 3) ** k * (1 / 3) ** (100 - k) for k in range(101)], [1, 1, 2, 1]) / 5
    found = np.zeros(104)
    found[lengths.first : lengths.first + len(lengths.shares)] = lengths.shares
    assert found == pytest.approx(expected, abs=2e-12)
    assert lengths.log2_count == pytest.approx(100 * log2(3) + log2(5), abs=1e-9)
    assert lengths.mean == pytest.approx(float((expected * np.arange(104)).sum()), rel=1e-9)


def test_a_sum_of_branches_without_a_skip_adds_no_way() -> None:
    b = Builder()
    x = b.relu(b.input(1, 8, 8, 8))
    report = inspect_graph(b.output(b.add(b.conv(x, 8, 3), b.conv(x, 8, 1))))
    assert [block.kind for block in report] == ["branches"]
    assert report.lengths.log2_count == 0.0


@pytest.mark.parametrize("anew", [True, False])
def test_a_dense_block_of_l_layers_has_l_times_l_plus_one_halves_connections(anew: bool) -> None:
    b = Builder()
    x = b.input(1, 8, 8, 8)
    for layers in (3, 5):
        features = [x]
        for _ in range(layers):
            features.append(b.conv(b.relu(x), 4))
            x = b.concat(*features) if anew else b.concat(x, features[-1])
        x = b.relu(b.conv(x, 8, 1))
    report = inspect_graph(b.output(x))
    assert report.dense_connections == (6, 15)
    assert inspect_graph(residual_mlp(3)).dense_connections == ()


# ---- depth ---------------------------------------------------------------------------------------------------------


def longest_way(graph: Graph) -> int:
    @cache
    def behind(value: Value) -> int | None:
        if value.producer is None:
            return None if value.constant else 0
        found = [steps for source in value.producer.operands if (steps := behind(source)) is not None]
        return max(found) + is_layer(value.producer) if found else None

    return behind(graph.outputs[0]) or 0


def test_resnet_18_has_18_layers_and_5_on_the_shortest_way() -> None:
    graph = resnet18()
    depth = inspect_graph(graph).depth
    assert depth is not None
    # The stem, three projections and the classifier are on every way; besides each conv's norm there is one pool.
    assert (depth.layers, depth.shortest_layers) == (18, 5)
    assert depth.layers == longest_way(graph)
    assert (depth.nominal, depth.shortest) == (36, 10)


def test_a_mask_or_a_memory_is_no_shortest_way() -> None:
    graph = encoder_decoder()
    depth = inspect_graph(graph).depth
    assert depth is not None
    # Longest: through the encoder into the last cross attention's keys. Shortest: embedding, norms, head.
    assert depth.layers == longest_way(graph)
    assert depth.shortest_layers == 2
    assert depth.shortest == 1 + 1 + 6 + 1


def test_the_shortest_way_through_dense_blocks_takes_their_skips() -> None:
    b = Builder()
    features = [b.input(1, 8, 8, 8)]
    joined = features[0]
    for _ in range(4):
        features.append(b.conv(b.relu(joined), 4))
        joined = b.concat(*features)
    depth = inspect_graph(b.output(joined)).depth
    assert depth is not None
    assert (depth.layers, depth.shortest_layers) == (4, 0)


def test_depth_of_a_graph_without_blocks_and_of_constants() -> None:
    b = Builder()
    depth = inspect_graph(b.output(b.relu(b.linear(b.linear(b.input(2, 8), 8), 8)))).depth
    assert depth is not None
    assert (depth.nominal, depth.shortest) == (2, 2)
    b = Builder()
    constant = b.relu(b.param(8))
    constant.constant = True
    depth = inspect_graph(b.output(constant)).depth
    assert depth is not None
    assert (depth.nominal, depth.shortest) == (0, 0)


# ---- recursion -----------------------------------------------------------------------------------------------------


def equations(graph: Graph) -> list[str]:
    return [block_equation(block) for block in inspect_graph(graph)]


@pytest.mark.parametrize(
    ("norm", "equation"),
    [
        ("pre", "x + F(N(x))"),
        ("post", "N(x + F(x))"),
        ("branch", "x + N(F(x))"),
        ("sandwich", "x + N(F(N(x)))"),
        ("none", "x + F(x)"),
    ],
)
def test_equation_of_each_norm_placement(norm: str, equation: str) -> None:
    b = Builder()
    x = transformer_layer(b, transformer_layer(b, b.linear(b.input(1, 5, 8), 8), norm), norm)
    assert equations(b.output(b.linear(x, 2))) == [equation] * 4


def test_equations_of_resnet_blocks() -> None:
    found = equations(resnet18())
    plain, projected = "relu(x + N(F(x)))", "relu(P(x) + N(F(x)))"
    assert found == [plain, plain, projected, plain, projected, plain, projected, plain]


def test_equations_of_other_kinds() -> None:
    b = Builder()
    x = b.relu(b.input(2, 8))
    assert equations(b.output(b.concat(x, b.linear(x, 8)))) == ["[x, F(x)]"]
    b = Builder()
    x = b.relu(b.input(2, 8))
    gate, new = b.op(K.SIGMOID, b.linear(x, 8)), b.linear(x, 8)
    graph = b.output(b.add(b.mul(gate, new), b.mul(b.sub(1.0, gate), x)))
    assert equations(graph) == ["T(x)·F(x) + (1 − T(x))·x"]
    b = Builder()
    x = b.relu(b.input(2, 8))
    assert equations(b.output(b.add(x, b.mul(b.linear(x, 8), b.param(8))))) == ["x + λ⊙F(x)"]
    b = Builder()
    x = b.relu(b.input(2, 8))
    assert equations(b.output(b.add(x, b.linear(x, 8), scales=(1.5, 1.0)))) == ["1.5·x + F(x)"]
    b = Builder()
    x = b.relu(b.input(2, 8))
    assert equations(b.output(b.add(x, b.linear(x, 8), scales=(1.0, -1.0)))) == ["x − F(x)"]
    b = Builder()
    x = b.relu(b.input(2, 8))
    assert equations(b.output(b.add(x, b.linear(x, 8), scales=(0.75, 0.25)))) == ["0.75·x + 0.25·F(x)"]
    b = Builder()
    x = b.input(1, 5, 8)
    n = b.layer_norm(x)
    assert equations(b.output(b.add(x, attention(b, n), mlp(b, n)))) == ["x + A(N(x)) + F(N(x))"]


def test_an_activation_that_is_not_alone_is_no_part_of_the_equation() -> None:
    b = Builder()
    x = b.relu(b.input(2, 8))
    total = b.add(x, b.linear(x, 8))
    assert equations(b.output(b.linear(b.relu(total), 8), b.linear(total, 8))) == ["x + F(x)"]


def test_a_network_is_one_recursion() -> None:
    (chain,) = inspect_graph(resnet18()).chains
    assert chain.equation == "head(R7(…R0(stem(x))))"
    assert chain.runs == (tuple(range(8)),)
    (chain,) = inspect_graph(residual_mlp(2)).chains
    assert chain.equation == "R1(R0(input_0))"


def test_work_between_blocks_parts_the_runs() -> None:
    b = Builder()
    x = b.input(2, 8, name="x")
    for _ in range(2):
        for _ in range(3):
            x = b.add(x, b.linear(x, 8))
        x = b.linear(x, 8)
    (chain,) = inspect_graph(b.output(x)).chains
    assert chain.runs == ((0, 1, 2), (3, 4, 5))
    assert chain.equation == "head(R5(…R3(g1(R2(…R0(x))))))"


def test_encoder_and_decoder_are_two_chains() -> None:
    found = inspect_graph(encoder_decoder()).chains
    assert [chain.start for chain in found] == ["source", "target"]
    assert [len(chain.blocks) for chain in found] == [4, 6]
    assert [chain.reads for chain in found] == [(), (0,)]
    assert [chain.head for chain in found] == [False, True]


def test_nested_blocks_are_chains_of_their_parent() -> None:
    report = inspect_graph(u_net())
    assert [block.kind for block in report] == ["long", "long"]
    assert [(chain.parent, chain.equation) for chain in report.chains] == [
        (1, "out(R0(in(x)))"),
        (None, "head(R1(stem(x)))"),
    ]
    assert "F1(x) = out(R0(in(x)))" in str(report)


def test_two_blocks_of_one_fork_are_two_chains() -> None:
    b = Builder()
    x = b.relu(b.input(2, 8, name="x"))
    first = b.add(x, b.linear(x, 8))
    left, right = b.add(first, b.linear(first, 8)), b.add(first, b.linear(first, 8))
    found = inspect_graph(b.output(left, right)).chains
    assert [chain.equation for chain in found] == ["R1(R0(x))", "R2(R0)"]


# ---- costs ---------------------------------------------------------------------------------------------------------


def priced(report: Report) -> dict[int, tuple[PathCost, PathCost]]:
    assert report.overhead is not None
    return {block: (costs.branch, costs.shortcut) for block, costs in report.overhead.blocks.items()}


def parameters_of(graph: Graph, ops: set[Op]) -> int:
    read = [value for value in trained_parameters(graph) if any(op in ops for op in value.users)]
    return sum(int(np.prod(value.shape or ())) for value in read)


def counted(graph: Graph, ops: set[Op]) -> PathCost:
    costs = [op_cost(op) for op in ops]
    return PathCost(parameters_of(graph, ops), sum(cost.flops for cost in costs), sum(cost.bytes for cost in costs))


@pytest.mark.parametrize("build", [resnet18, u_net, encoder_decoder, lambda: nested(6), lambda: one_fork(6)])
def test_costs_are_those_of_the_operations_on_each_path(build: object) -> None:
    graph = build() if callable(build) else Graph()
    report = inspect_graph(graph)
    for block in report:
        branch, shortcut = priced(report)[block.id]
        assert branch == counted(graph, set(report.all_branch_ops(block)))
        assert shortcut == counted(graph, {*block.shortcut_ops, block.join_op})
    assert report.overhead is not None
    skips = {op for block in report for op in (*block.shortcut_ops, block.join_op)}
    assert report.overhead.skips == counted(graph, skips)
    assert report.overhead.total == graph_costs(graph)


def test_an_add_costs_the_skip_two_reads_and_a_write() -> None:
    report = inspect_graph(residual_mlp(1))
    assert priced(report)[0][1] == PathCost(0, 16, 3 * 16 * 4)
    assert report.overhead is not None
    assert report.overhead.shares["flops"] == pytest.approx(16 / graph_costs(residual_mlp(1)).flops, rel=1e-12)


def test_a_term_of_a_sum_of_three_costs_one_addition_and_one_read() -> None:
    b = Builder()
    x = b.input(1, 5, 8)
    n = b.layer_norm(x)
    report = inspect_graph(b.output(b.add(x, attention(b, n), mlp(b, n))))
    assert priced(report)[0][1] == PathCost(0, 40, 160)


def test_a_parallel_block_pays_for_one_of_its_two_sums() -> None:
    b = Builder()
    x = b.input(1, 5, 8)
    n = b.layer_norm(x)
    graph = b.output(b.add(x, b.add(attention(b, n), mlp(b, n))))
    branch, shortcut = priced(inspect_graph(graph))[0]
    assert shortcut == PathCost(0, 40, 480)
    assert branch.flops + shortcut.flops == graph_costs(graph).flops


def test_the_factors_of_a_gate_are_paid_by_the_skip() -> None:
    b = Builder()
    x = b.relu(b.input(2, 8))
    gate, new = b.op(K.SIGMOID, b.linear(x, 8)), b.linear(x, 8)
    graph = b.output(b.add(b.mul(gate, new), b.mul(b.sub(1.0, gate), x)))
    report = inspect_graph(graph)
    branch, shortcut = priced(report)[0]
    assert shortcut.flops == 4 * 16
    assert branch.flops + shortcut.flops + 16 == graph_costs(graph).flops  # and the relu before the fork


def test_shared_parameters_count_once() -> None:
    b = Builder()
    x = b.relu(b.input(2, 8))
    weight = b.param(8, 8)
    y = x
    for _ in range(3):
        y = b.add(y, b.op(K.LINEAR, y, weight, None, shape=(2, 8)))
    report = inspect_graph(b.output(b.add(x, b.linear(y, 8))))
    costs = priced(report)
    assert [costs[block.id][0].parameters for block in report] == [64, 64, 64, 64 + 72]
    assert report.overhead is not None
    assert report.overhead.skips.parameters == 0


def test_a_parameter_that_branch_and_shortcut_share_is_no_overhead() -> None:
    b = Builder()
    x = b.relu(b.input(1, 8, 8, 8))
    own, shared = b.param(8, 8, 1, 1), b.param(8, 8, 1, 1)
    attrs = {"stride": (1, 1), "pads": (0, 0, 0, 0), "dilation": (1, 1), "groups": 1}

    def project(x: Value, weight: Value) -> Value:
        return b.op(K.CONV, x, weight, None, shape=x.shape, **attrs)

    y = b.add(project(x, own), b.relu(b.conv(b.relu(b.conv(x, 8)), 8)))
    z = b.add(project(y, shared), b.relu(project(b.relu(b.conv(y, 8)), shared)))
    report = inspect_graph(b.output(z))
    assert [block.shortcut for block in report] == ["projection", "projection"]
    assert report.overhead is not None
    assert report.overhead.skips.parameters == 64
    assert [costs[1].parameters for costs in priced(report).values()] == [64, 64]


def test_a_fused_join_pays_for_reading_the_skip() -> None:
    b = Builder()
    x = b.relu(b.input(1, 8, 8, 8))
    weight, attrs = b.param(8, 8, 3, 3), {"stride": (1, 1), "pads": (1, 1, 1, 1), "dilation": (1, 1), "groups": 1}
    z = b.op(K.FUSED_CONV, b.conv(x, 8), weight, None, x, shape=x.shape, inner="none", outer="relu", **attrs)
    graph = b.output(z)
    report = inspect_graph(graph)
    branch, shortcut = priced(report)[0]
    assert shortcut == PathCost(0, 512, 2048)
    assert branch.parameters == 2 * 8 * 8 * 9
    assert branch.flops + shortcut.flops + 512 == graph_costs(graph).flops
    assert block_equation(report.blocks[0]) == "relu(x + F(x))"
    assert report.depth is not None
    assert (report.depth.layers, report.depth.shortest_layers) == (2, 0)


def test_the_norm_of_a_fused_join_is_no_overhead() -> None:
    b = Builder()
    x = b.input(1, 5, 8)
    normed = b.layer_norm(x)
    for _ in range(2):
        op = b.ops(
            K.ADD_NORM, x, b.linear(normed, 8), b.param(8), b.param(8), shapes=[x.shape, x.shape], norm="layer", axis=2
        )
        normed, x = op.outputs
    report = inspect_graph(b.output(b.linear(normed, 4)))
    # Reading the skip and writing the sum; nothing reads the second sum.
    assert [shortcut for _, shortcut in priced(report).values()] == [PathCost(0, 40, 320), PathCost(0, 40, 160)]
    # The first block's branch holds a norm and a linear; the second's the norm of the fused operation and a linear.
    first, second = (branch for branch, _ in priced(report).values())
    assert (first.parameters, second.parameters) == (88, 88)
    assert first.flops == second.flops
    assert report.overhead is not None
    assert report.overhead.skips.parameters == 0


def test_an_operation_in_the_branches_of_two_nested_blocks_counts_once_in_the_outer_one() -> None:
    b = Builder()
    x = b.relu(b.input(2, 8))
    shared = b.linear(x, 8)
    inner = b.add(x, b.linear(shared, 8))
    graph = b.output(b.add(x, b.mul(b.linear(inner, 8), shared)))
    report = inspect_graph(graph)
    for block in report:
        assert priced(report)[block.id][0] == counted(graph, set(report.all_branch_ops(block)))


def test_unknown_and_symbolic_shapes_cost_what_is_known() -> None:
    b = Builder()
    x = b.input("N", 8)
    report = inspect_graph(b.output(b.add(x, b.linear(x, 8))))
    assert priced(report)[0][1] == PathCost(0, 8, 96)
    b = Builder()
    x = b.graph.add_input("x", None, None)
    y = b.op(K.OPAQUE, x, shape=None)
    report = inspect_graph(b.output(b.add(x, y)))
    assert len(report) == 1
    assert priced(report)[0] == (PathCost(), PathCost())
    assert report.to_dict()["costs"]["shares"] == {"parameters": 0.0, "flops": 0.0, "bytes": 0.0}


# ---- members -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("build", [u_net, lambda: nested(5), lambda: one_fork(5), resnet18])
def test_within_is_the_relation_of_parents(build: object) -> None:
    report = inspect_graph(build() if callable(build) else Graph())
    for inner, outer in itertools.product(report, report):
        around = inner.id
        while around != outer.id and report.blocks[around].parent is not None:
            around = report.blocks[around].parent or 0
        assert report.members.within(inner, outer) is (around == outer.id)


def test_members_are_as_many_as_the_operations_however_deep_blocks_nest() -> None:
    graph = nested(200)
    report = inspect_graph(graph)
    assert sum(len(report.members.of(op)) for op in graph) <= 2 * len(graph)


def test_table_with_costs_has_their_columns() -> None:
    from dataclasses import replace

    text = str(replace(inspect_graph(resnet18()), show_costs=True))
    assert "branch: params" in text
    assert "shortcut: params" in text
    assert max(map(len, text.splitlines())) <= 140


# ---- random graphs -------------------------------------------------------------------------------------------------


def polynomial(report: Report, parent: int | None) -> list[int]:
    """How many ways take k of the branches inside `parent`, for each k."""
    product = [1]
    for block in report.children.get(parent, []):
        factor = [1, *polynomial(report, block.id)]
        product = [int(count) for count in np.convolve(np.array(product, object), np.array(factor, object))]
    return product


def shortest_way(graph: Graph) -> int:
    """Over all edges: where nothing enters a branch from outside, the same as along the stream."""
    found = dict.fromkeys(graph.inputs, 0)
    for op in graph:
        steps = [found[value] for value in op.operands if value in found]
        if steps:
            found.update((value, min(steps) + is_layer(op)) for value in op.outputs)
    return found[graph.outputs[0]]


@given(residual_graphs())
@settings(max_examples=100, deadline=None)
def test_meaning_of_random_graphs_is_what_counting_one_by_one_gives(generated: tuple[Graph, object]) -> None:
    graph, _ = generated
    report = inspect_graph(graph)
    counts = polynomial(report, None)
    assert report.lengths.log2_count == pytest.approx(log2(sum(counts)), abs=1e-9)
    shares = [report.lengths.share(length, length) for length in range(len(counts))]
    assert shares == pytest.approx([count / sum(counts) for count in counts], abs=2e-12)
    assert report.depth is not None
    assert (report.depth.layers, report.depth.shortest_layers) == (longest_way(graph), shortest_way(graph))
    assert sorted(block for chain in report.chains for block in chain.blocks) == list(range(len(report)))
    for block in report:
        branch, shortcut = priced(report)[block.id]
        inside = [inner for inner in report if inner is not block and report.members.within(inner, block)]
        mixed = {op for inner in inside for op in report.members.mix.get(inner.id, ())}
        assert branch == counted(graph, {*report.all_branch_ops(block), *mixed})
        sums = block.join_ops if block.kind == "gated" else (block.join_op,)
        assert shortcut == counted(graph, {*block.shortcut_ops, *sums, *report.members.mix.get(block.id, ())})
    explainer = Explainer(graph, report)
    assert all(explainer.why(op.name).findings for op in graph)
