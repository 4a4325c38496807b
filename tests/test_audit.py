"""What fusion leaves, and how far from the least traffic: by hand-computed numbers, and by what must always hold."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings

from rescompile import api, fusion_audit_text
from rescompile.costs import graph_costs
from rescompile.detection import inspect_graph
from rescompile.fusion_audit import Audit, Unfused, audit
from rescompile.graph import Graph, Role, Shape, Value, ValueType
from rescompile.kinds import OpKind, Trait
from rescompile.passes.fuse_joins import FuseJoins
from rescompile.plans import Plan
from rescompile.traffic import graph_traffic
from tests.graphs import Builder, residual_mlp
from tests.residual_grammar import programs
from tests.residual_program import Program
from tests.residual_realisers import in_memory
from tests.test_structure_bodies import conditional

K = OpKind
F = "float32"
TOKENS = (2, 5, 16)
TENSOR = 4 * 2 * 5 * 16
FUSED = {kind for kind in K if kind.has(Trait.FUSED)}


class Build:
    """A graph in memory, one call an operation; results have the first operand's shape unless told otherwise."""

    def __init__(self, shape: Shape = TOKENS, dtype: str = F) -> None:
        self.graph = Graph("built")
        self.x = self.graph.add_input("x", shape, dtype)

    def op(self, name: str, kind: OpKind, *inputs: Value | None, shape: Shape | None = None, **attrs: Any) -> Value:
        first = next(value for value in inputs if value is not None)
        type_ = ValueType(first.shape if shape is None else shape, str(attrs.get("dtype", first.dtype)))
        return self.graph.add_op(kind, inputs, [(name, type_)], attrs).output

    def weight(self, name: str, *shape: int) -> Value:
        return self.graph.add_constant(name, shape, F, np.full(shape, 0.5, F))

    def linear(self, name: str, x: Value, width: int = 16) -> Value:
        assert x.shape is not None
        weight = self.weight(f"{name}.weight", width, int(x.shape[-1]))
        return self.op(name, K.LINEAR, x, weight, shape=(*x.shape[:-1], width))

    def branch(self, name: str = "fc", width: int = 16) -> Value:
        """A linear of something else than the input."""
        return self.linear(name, self.op("softmax", K.SOFTMAX, self.x, axis=2), width)

    def norm(self, name: str, x: Value) -> Value:
        return self.op(name, K.LAYER_NORM, x, axis=2)

    def add(self, name: str, *terms: Value) -> Value:
        return self.op(name, K.ADD, *terms)

    def done(self, *outputs: Value) -> Graph:
        self.graph.set_outputs(outputs)
        self.graph.commit()
        return self.graph


def audited(graph: Graph, extents: dict[str, int] | None = None) -> Audit:
    return api.audit(graph, extents=extents)


def only(graph: Graph) -> Unfused:
    (found,) = audited(graph).unfused
    return found


# ---- what a join costs ---------------------------------------------------------------------------------------------


def test_tail_of_a_block_costs_four_passes_and_two_as_an_epilogue() -> None:
    b = Build()
    found = only(b.done(b.add("add", b.x, b.branch())))
    assert found.passes == (4.0, 2.0)
    assert found.cost == 2 * TENSOR
    assert found.rule == "epilogue of linear 'fc'"


def test_skip_that_the_contraction_reads_anyway_costs_nothing_as_an_epilogue() -> None:
    b = Build()
    assert only(b.done(b.add("add", b.x, b.linear("fc", b.x)))).passes == (4.0, 1.0)


def test_cost_of_a_join_is_what_fusing_it_saves() -> None:
    def epilogue(b: Build) -> list[Value]:
        return [b.op("relu", K.RELU, b.add("add", b.x, b.branch()))]

    def norm(b: Build) -> list[Value]:
        total = b.add("add", b.x, b.branch())
        return [total, b.norm("norm", total)]

    def concat(b: Build) -> list[Value]:
        return [b.op("relu", K.RELU, b.op("cat", K.CONCAT, b.x, b.branch(), axis=2, shape=(2, 5, 32)))]

    for make in (epilogue, norm, concat):
        b = Build()
        graph = b.done(*make(b))
        after = api.rewrite(graph, "fuse", verify=False).graph
        assert not audited(after).unfused
        assert only(graph).cost == graph_costs(graph).bytes - graph_costs(after).bytes, make


def test_scale_and_activation_of_the_join_each_cost_two_more() -> None:
    b = Build()
    scaled = b.op("scaled", K.MUL, b.branch(), b.weight("gamma", 16))
    found = only(b.done(b.op("relu", K.RELU, b.add("add", b.x, scaled))))
    assert found.bytes == 8 * TENSOR + 64
    assert found.fused_bytes == 2 * TENSOR + 64, "the scale's vector is read either way"


@pytest.mark.parametrize(("read_again", "fused"), [(True, 4.0), (False, 3.0)])
def test_sum_and_its_norm_cost_five_passes_and_fewer_as_one(read_again: bool, fused: float) -> None:
    b = Build()
    total = b.add("add", b.x, b.branch())
    normed = b.norm("norm", total)
    found = only(b.done(normed, total) if read_again else b.done(normed))
    assert found.passes == (5.0, fused)
    assert found.rule == "add + layer_norm 'norm'"


def test_norm_at_the_branchs_end_takes_the_join() -> None:
    b = Build()
    found = only(b.done(b.add("add", b.x, b.norm("norm", b.branch()))))
    assert found.passes == (5.0, 3.0)
    assert found.rule == "layer_norm 'norm' + add"


def test_batch_norm_in_evaluation_rides_and_one_in_training_does_not() -> None:
    for training, passes in ((False, 6.0), (True, 3.0)):
        b = Build((1, 4, 8, 8))
        conv = b.op("conv", K.CONV, b.x, b.weight("w", 4, 4, 1, 1))
        normed = b.op("bn", K.BATCH_NORM, conv, None, None, None, None, training=training)
        assert only(b.done(b.add("add", b.x, normed))).passes[0] == passes


def test_branch_that_is_read_elsewhere_is_written_anyway() -> None:
    b = Build()
    branch = b.branch()
    found = only(b.done(b.add("add", b.x, branch), branch))
    assert found.passes == (3.0, 3.0)
    assert found.cost == 0
    assert found.rule == "one kernel of an add"


def test_concat_costs_two_copies_and_nothing_in_place() -> None:
    b = Build()
    branch = b.branch(width=8)
    joined = b.op("cat", K.CONCAT, b.x, branch, axis=2, shape=(2, 5, 24))
    found = only(b.done(joined, branch))
    assert found.passes == (2.0, 0.0)
    assert found.rule == "concat in place"


def test_concat_is_one_kernel_with_what_writes_a_part_of_it_and_what_reads_it_alone() -> None:
    b = Build()
    joined = b.op("cat", K.CONCAT, b.x, b.branch(), axis=2, shape=(2, 5, 32))
    found = only(b.done(b.op("relu", K.RELU, joined)))
    # In halves: the linear's write, the concat's four, the relu's four; as one the skip, and the write of both.
    assert (found.bytes, found.fused_bytes) == (9 * TENSOR, 3 * TENSOR)
    assert found.rule == "concat with linear 'fc' and relu 'relu'"


def test_sum_of_a_part_of_the_channels_is_one_kernel_with_the_concat_behind_it() -> None:
    b = Build()
    work = b.branch(width=32)
    ends = [("head", (0,), (16,)), ("tail", (16,), (32,))]
    head, tail = (
        b.op(name, K.SLICE, work, shape=TOKENS, axes=(2,), starts=starts, stops=stops, steps=(1,))
        for name, starts, stops in ends
    )
    found = only(b.done(b.op("cat", K.CONCAT, b.add("add", b.x, head), tail, axis=2, shape=(2, 5, 32))))
    # In halves: the linear's write 2, the sum's 3, the concat's 4; as one x, and the write of both.
    assert (found.block.join, found.rule) == ("add", "epilogue of linear 'fc'")
    assert (found.bytes, found.fused_bytes) == (9 * TENSOR, 3 * TENSOR)


def test_gated_mix_counts_its_factors() -> None:
    b = Build()
    gate = b.op("gate", K.SIGMOID, b.branch("t"))
    carry = b.op(
        "carry",
        K.ADD,
        b.graph.add_constant("one", (), F, np.float32(1), Role.CONSTANT),
        gate,
        shape=TOKENS,
        scales=(1.0, -1.0),
    )
    work = b.linear("h", b.op("softmax2", K.SOFTMAX, b.x, axis=2))
    fresh, kept = b.op("fresh", K.MUL, gate, work), b.op("kept", K.MUL, carry, b.x)
    found = only(b.done(b.add("add", fresh, kept)))
    assert found.block.kind == "gated"
    # One of the linears writes; sigmoid 2, carry 2, two products 6, sum 3; as one: the other linear's, x, and the sum.
    assert found.passes[0] == pytest.approx(14.0, abs=0.01)
    assert found.passes[1] == pytest.approx(3.0, abs=0.01)


def test_dynamic_extents_count_as_told_and_otherwise_as_one() -> None:
    b = Build(("N", 5, 16))
    graph = b.done(b.add("add", b.x, b.branch()))
    assert audited(graph).cost == 2 * 4 * 5 * 16
    eight = audited(graph, {"N": 8})
    assert eight.cost == 8 * 2 * 4 * 5 * 16
    assert eight.symbols == (("N", 8),)
    assert str(eight).endswith("that one call moves with N = 8")


def test_unknown_shape_costs_an_unknown_amount() -> None:
    b = Build()
    b.x.shape = None
    work = b.graph.add_op(K.LINEAR, [b.x, b.weight("w", 16, 16)], [("fc", ValueType(None, F))])
    total = b.graph.add_op(K.ADD, [b.x, work.output], [("add", ValueType(None, F))])
    found = only(b.done(total.output))
    assert (found.passes, found.cost) == ((0.0, 0.0), 0)
    assert "unknown shape" in str(audited(b.graph))


# ---- why it is not fused -------------------------------------------------------------------------------------------


def test_join_that_fuse_would_take_says_so() -> None:
    b = Build()
    found = only(b.done(b.add("add", b.x, b.branch())))
    assert found.verdict == "taken"
    assert found.reason == "fuse would take it: W·x + b + r  →  fused_linear(x, W, b, r)"


def test_join_that_fuse_leaves_has_the_refusals_reason() -> None:
    b = Build()
    graph = b.done(b.add("add", b.x, b.op("softmax", K.SOFTMAX, b.linear("fc", b.x), axis=2)))
    refusals = {refusal.where: refusal.reason for refusal in api.plan(graph, "fuse").refusals}
    found = only(graph)
    assert found.verdict == "refused"
    assert found.reason == refusals["add"]


def test_join_of_a_body_is_listed_with_its_path_and_counts_in_the_traffic() -> None:
    graph = conditional()
    found = audit(inspect_graph(graph), FuseJoins().plan(graph))
    inside = [each for each in found.unfused if each.block.path]
    assert [each.where for each in inside] == ["choose/then/join_0", "choose/then/join_1"]
    assert all(each.verdict == "refused" and "holds a graph of its own" in each.reason for each in inside)
    assert all(each.passes == (4.0, 2.0) for each in inside)
    assert found.traffic > graph_costs(graph).bytes


def test_fused_joins_are_not_listed_and_count() -> None:
    b = Build()
    first = b.add("add", b.x, b.branch())
    branch = b.linear("fc2", first)
    graph = b.done(b.op("cat", K.CONCAT, first, branch, axis=2, shape=(2, 5, 32)), branch)
    before, after = audited(graph), audited(api.rewrite(graph, "fuse", verify=False).graph)
    assert [each.where for each in before.unfused] == ["add", "cat"]
    assert (after.joins, [each.where for each in after.unfused]) == (2, ["cat"])
    assert after.cost < before.cost


def test_plan_that_says_nothing_leaves_no_join_without_a_reason() -> None:
    b = Build()
    graph = b.done(b.add("add", b.x, b.branch()))
    (found,) = audit(inspect_graph(graph), Plan()).unfused
    assert found.verdict == "unspoken"
    assert found.reason == "no rule is about an add join that ends in an add"


def test_join_that_is_fused_but_for_an_earlier_sum_is_listed_with_that_sum() -> None:
    b = Build()
    normed = b.norm("pre", b.x)
    one, other = (b.linear(f"down{i}", b.op(f"act{i}", K.GELU, b.linear(f"up{i}", normed))) for i in range(2))
    branches = b.add("branches", one, other)
    total = b.add("add", b.x, branches)
    graph = b.done(b.norm("norm", total), total)
    operands = [*graph.op("add").inputs, None, None]
    outputs = [graph.value("norm"), graph.value("add")]
    graph.fuse([graph.op("add"), graph.op("norm")], K.ADD_NORM, operands, outputs, {"axis": 2})
    graph.commit()
    (found,) = audit(inspect_graph(graph), Plan()).unfused
    assert found.reason == "the join is fused but for its earlier sum 'branches', which no rule is about"
    assert found.passes == (4.0, 2.0)


def test_a_long_list_has_the_costliest_joins_and_says_how_many_more() -> None:
    b = Builder()
    x = b.input(2, 8)
    for index in range(fusion_audit_text.ROWS + 30):
        wide = index == 7
        branch = b.linear(b.relu(b.linear(x, 8)), 8)
        x = b.add(x, b.mul(branch, 2.0) if wide else branch, name=f"join_{index}")
    report = inspect_graph(b.output(x))
    found = audit(report, Plan())
    costliest = max(found.unfused, key=lambda each: each.cost)
    lines = str(found).splitlines()
    assert sum("join_" in line for line in lines) == fusion_audit_text.ROWS
    assert any(f"{costliest.where} " in line for line in lines)
    assert any(line.startswith("and 30 more, none of which costs more") for line in lines)
    assert len(found.to_dict()["unfused"]) == fusion_audit_text.ROWS + 30
    assert "more, none" not in str(audit(inspect_graph(residual_mlp(3)), Plan()))


def test_model_without_residual_joins_has_nothing_to_list() -> None:
    b = Build()
    found = audited(b.done(b.branch()))
    assert (found.joins, found.unfused, found.cost, found.share) == (0, (), 0, 0.0)


# ---- the bounds ----------------------------------------------------------------------------------------------------


def bounds(graph: Graph) -> tuple[int, int, int]:
    traffic = graph_traffic(graph)
    assert traffic.bound <= traffic.kernel_bound <= traffic.bytes == graph_costs(graph).bytes
    return traffic.bytes, traffic.bound, traffic.kernel_bound


def test_one_contraction_is_at_both_bounds() -> None:
    b = Build()
    moved, bound, kernels = bounds(b.done(b.linear("fc", b.x)))
    assert moved == bound == kernels == 2 * TENSOR + 4 * 256


def test_what_rides_costs_nothing_and_what_crosses_a_write_and_a_read() -> None:
    b = Build()
    hidden = b.op("relu", K.RELU, b.linear("up", b.x))
    moved, bound, kernels = bounds(b.done(b.linear("down", hidden)))
    weights = 2 * 4 * 256
    assert moved == weights + 6 * TENSOR
    assert kernels == weights + 4 * TENSOR
    assert bound == weights + 2 * TENSOR


def test_residual_stage_costs_write_reads_and_the_skip() -> None:
    b = Build()
    total = b.add("add", b.x, b.linear("fc", b.x))
    _, _, kernels = bounds(b.done(b.linear("head", total)))
    # fc reads x, once for itself and the sum; it writes the sum; head reads that and writes the output.
    assert kernels == 2 * 4 * 256 + 4 * TENSOR
    b = Build()
    total = b.add("add", b.x, b.branch())
    _, _, kernels = bounds(b.done(b.linear("head", total)))
    # softmax reads and writes, fc reads; then as above, and the skip.
    assert kernels == 2 * 4 * 256 + 3 * TENSOR + 4 * TENSOR


def test_slice_of_a_result_is_all_that_has_to_be_kept() -> None:
    b = Build()
    last = b.op("last", K.SLICE, b.linear("fc", b.x), shape=(2, 1, 16), axes=(1,), starts=(4,), stops=(5,), steps=(1,))
    moved, bound, kernels = bounds(b.done(last))
    assert moved == 4 * 256 + 2 * TENSOR
    assert bound == kernels == 4 * 256 + TENSOR + TENSOR // 5


def test_parts_of_a_packed_result_are_read_once_each_and_views_not_twice() -> None:
    b = Build()
    packed = b.linear("qkv", b.x, 48)
    parts = b.graph.add_op(K.SPLIT, [packed], [(n, ValueType(TOKENS, F)) for n in "qkv"], {"axis": 2}).outputs
    _, _, kernels = bounds(b.done(b.op("attention", K.ATTENTION, *parts)))
    assert kernels == 4 * 48 * 16 + (1 + 3 + 3 + 1) * TENSOR
    b = Build((5, 16))
    turned = b.op("turned", K.PERMUTE, b.x, shape=(16, 5), perm=(1, 0))
    moved, _, kernels = bounds(b.done(b.op("gram", K.MATMUL, b.x, turned, shape=(5, 5))))
    assert (moved, kernels) == (2 * 320 + 100, 320 + 100)


def test_lookup_reads_the_rows_that_it_returns() -> None:
    b = Build((2, 3), "int64")
    rows = b.op("rows", K.EMBEDDING, b.weight("table", 1000, 8), b.x, shape=(2, 3, 8))
    moved, bound, _ = bounds(b.done(rows))
    assert moved == bound == 2 * 4 * 48 + 8 * 6


def test_output_that_is_a_view_of_an_input_moves_nothing() -> None:
    b = Build()
    assert bounds(b.done(b.op("flat", K.RESHAPE, b.x, shape=(160,)))) == (0, 0, 0)


def test_fusing_comes_nearer_to_the_bound_and_never_under_it() -> None:
    b = Build()
    total = b.add("add", b.x, b.branch())
    graph = b.done(b.add("add2", total, b.linear("fc2", b.norm("norm", total))))
    result = api.rewrite(graph, "fuse", verify=False)
    before, after = result.traffic
    bounds(result.graph)
    assert (before.bound, before.kernel_bound) == (after.bound, after.kernel_bound)
    assert before.kernel_percent < after.kernel_percent <= 100.0
    text = str(result)
    assert f"{before.percent:.1f} % → {after.percent:.1f} % of the byte bound" in text
    assert result.to_dict()["traffic"]["after"]["percent_of_kernel_bound"] == pytest.approx(
        after.kernel_percent, abs=1e-3
    )


@given(programs())
@settings(deadline=None, max_examples=30, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
def test_every_join_is_fused_or_has_a_reason_and_no_bound_is_exceeded(program: Program) -> None:
    graph = in_memory(program)
    for each in (graph, api.rewrite(graph, "fuse", verify=False).graph):
        bounds(each)
        report = inspect_graph(each)
        found = api.audit_report(each, report)
        open_joins = [block for block in report if not all(op.kind in FUSED for op in block.join_ops)]
        assert [entry.block.id for entry in found.unfused] == [block.id for block in open_joins]
        assert found.joins == len(report)
        for entry in found.unfused:
            assert entry.reason
            assert entry.cost >= 0
        assert found.cost <= found.traffic


# ---- the command line ----------------------------------------------------------------------------------------------

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> Graph:
    from rescompile import cli_models

    b = Build(("N", 5, 16))
    graph = b.done(b.add("add", b.x, b.branch()))
    monkeypatch.setattr(cli_models, "load_model", lambda *arguments: graph)
    return graph


@pytest.mark.usefixtures("loaded")
def test_inspect_unfused_prints_the_table_and_the_total(run: Run) -> None:
    code, out, err = run("inspect", "m.onnx", "--unfused", "--extent", "N=4")
    assert (code, err) == (0, "")
    assert "0 of 1 residual joins are fused" in out
    assert "4 → 2" in out
    assert "epilogue of linear 'fc'" in out
    assert "fuse would take it: W·x + b + r" in out
    assert "would save 2.56 kB, 25.6%, of the 9.98 kB that one call moves with N = 4" in out


@pytest.mark.usefixtures("loaded")
def test_inspect_unfused_as_json_is_the_report_and_the_audit(run: Run) -> None:
    code, out, _ = run("inspect", "m.onnx", "--unfused", "--json")
    data = json.loads(out)
    assert code == 0
    assert (data["schema"], len(data["blocks"])) == (1, 1)
    assert (data["audit"]["joins"], data["audit"]["fused"], data["audit"]["symbols"]) == (1, 0, {"N": 1})
    (entry,) = data["audit"]["unfused"]
    assert (entry["join"], entry["verdict"], entry["passes"]) == ("add", "taken", {"unfused": 4.0, "fused": 2.0})
    assert data["audit"]["cost"] == entry["bytes"]["cost"] == 2 * 4 * 80


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--unfused", "--gradients"], "leave out --gradients"),
        (["--unfused", "--extent", "N=many"], "write NAME=NUMBER"),
        (["--extent", "N=4"], "give --unfused too"),
    ],
)
@pytest.mark.usefixtures("loaded")
def test_wrong_usage_of_the_audit_is_code_2(run: Run, arguments: Sequence[str], said: str) -> None:
    code, _, err = run("inspect", "m.onnx", *arguments)
    assert code == 2
    assert said in err
