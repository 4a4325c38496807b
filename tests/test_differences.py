"""What changed between two graphs: each kind of difference, and its twin that must not be reported."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from rescompile.differences import diff_graphs
from rescompile.graph import Graph, Role, Value, ValueType
from rescompile.kinds import OpKind

KIND = ValueType((2, 4), "float32")


class OtherIr(Graph):
    """A graph in memory that claims another IR, where names mean nothing."""

    ir = "other"


def two_blocks(make: Callable[[], Graph] = Graph, prefix: str = "", *, stored: str = "oi") -> Graph:
    """h = x + relu(fc1(x)); y = h + relu(fc2(h)), weights stored [out, in] or [in, out]."""
    graph = make()
    random = np.random.default_rng(0)
    value = graph.add_input("x", (2, 4), "float32")
    for block in (1, 2):
        data = random.standard_normal((4, 4)).astype(np.float32)
        data = data if stored == "oi" else data.T.copy()
        weight = graph.add_constant(f"{prefix}fc{block}.weight", (4, 4), "float32", data)
        attrs = {} if stored == "oi" else {"transpose_weight": False}
        fc = graph.add_op(OpKind.LINEAR, [value, weight], [(f"{prefix}fc{block}", KIND)], attrs)
        relu = graph.add_op(OpKind.RELU, fc.outputs, [(f"{prefix}relu{block}", KIND)])
        join = graph.add_op(OpKind.ADD, [value, relu.output], [(f"{prefix}join{block}", KIND)])
        value = join.output
    graph.set_outputs([value])
    return graph


def test_equal_graphs_have_no_difference() -> None:
    diff = diff_graphs(two_blocks(), two_blocks())
    assert not diff
    assert str(diff).endswith("No difference.")
    assert diff.to_dict()["identical"] is True


def test_equal_graphs_of_different_irs_have_no_difference_whatever_their_names() -> None:
    diff = diff_graphs(two_blocks(), two_blocks(OtherIr, "other."))
    assert not diff
    assert diff.ops.same == 6


def test_how_a_linear_stores_its_weight_is_no_difference() -> None:
    assert not diff_graphs(two_blocks(), two_blocks(OtherIr, "other.", stored="io"))


def test_an_added_operation_and_the_rewired_one_are_named() -> None:
    after = two_blocks()
    join = after.op("join1")
    scale = after.add_constant("scale", (), "float32", np.float32(0.5))
    mul = after.insert(OpKind.MUL, [after.value("relu1"), scale], [("scaled", KIND)], provenance="re-zero")
    after.set_operand(join, 1, mul.output)
    after.commit()
    diff = diff_graphs(two_blocks(), after)
    assert [entry.to_dict() for entry in diff.ops.added] == [{"name": "scaled", "what": "mul (re-zero)"}]
    assert [str(change) for change in diff.ops.changed] == ["join1: operand 1 relu1 → scaled"]
    assert [entry.name for entry in diff.parameters.added] == ["scale"]
    assert diff.ops.removed == ()
    assert diff.ops.same == 5


def test_a_removed_operation_is_named() -> None:
    after = two_blocks()
    after.replace_uses(after.value("relu2"), after.value("fc2"))
    after.erase(after.op("relu2"))
    after.commit()
    diff = diff_graphs(two_blocks(), after)
    assert [entry.name for entry in diff.ops.removed] == ["relu2"]
    assert [str(change) for change in diff.ops.changed] == ["join2: operand 1 relu2 → fc2"]
    assert diff.kinds == (("relu", 2, 1),)


def test_a_fused_region_is_one_change_and_the_removal_of_its_parts() -> None:
    after = two_blocks()
    ops = [after.op(name) for name in ("fc1", "relu1", "join1")]
    inputs: list[Value | None] = [after.value("x"), after.value("fc1.weight"), None, after.value("x")]
    after.fuse(ops, OpKind.FUSED_LINEAR, inputs, ops[-1].outputs, {"inner": "relu"}, provenance="fuse")
    after.commit()
    diff = diff_graphs(two_blocks(), after)
    assert {entry.name for entry in diff.ops.removed} == {"relu1", "join1"}
    assert [str(change) for change in diff.ops.changed] == ["fc1 → join1: linear → fused_linear (fuse)"]
    assert diff.ops.added == ()
    assert not diff.parameters
    assert diff.costs[0].flops == diff.costs[1].flops
    assert diff.costs[0].bytes > diff.costs[1].bytes


def test_a_value_that_another_operation_computes_now_is_told_of_that_operation_only() -> None:
    after = two_blocks()
    inputs: list[Value | None] = [after.value("x"), after.value("fc1.weight")]
    after.fuse([after.op("fc1"), after.op("relu1")], OpKind.LINEAR, inputs, after.op("relu1").outputs)
    after.commit()
    diff = diff_graphs(two_blocks(), after)
    assert [entry.name for entry in diff.ops.removed] == ["relu1"]
    assert [str(change) for change in diff.ops.changed] == []


def test_names_that_only_count_do_not_decide() -> None:
    """A torch program that is saved and loaded names its operations anew: the second block's are now the first's."""
    before, after = two_blocks(), Graph()
    value = after.add_input("x", (2, 4), "float32")
    weight = after.add_constant("fc2.weight", (4, 4), "float32", before.value("fc2.weight").native)
    fc = after.add_op(OpKind.LINEAR, [value, weight], [("fc1", KIND)])
    relu = after.add_op(OpKind.RELU, fc.outputs, [("relu1", KIND)])
    after.set_outputs(after.add_op(OpKind.ADD, [value, relu.output], [("join1", KIND)]).outputs)
    diff = diff_graphs(before, after)
    assert {entry.name for entry in diff.ops.removed} == {"fc1", "relu1", "join1"}
    assert [entry.name for entry in diff.parameters.removed] == ["fc1.weight"]
    assert not diff.parameters.changed


def test_a_weight_that_a_pass_renamed_is_matched_by_its_module() -> None:
    after = two_blocks()
    folded = after.add_parameter("fc1.weight_folded", after.value("fc1.weight").native + np.float32(0.5))
    after.set_operand(after.op("fc1"), 1, folded)
    after.commit()
    diff = diff_graphs(two_blocks(), after)
    assert not diff.parameters.added
    assert [str(change) for change in diff.parameters.changed] == [
        "fc1.weight → fc1.weight_folded: contents, by up to 0.5; renamed"
    ]


def test_a_renamed_operation_is_matched_by_structure() -> None:
    after = two_blocks(prefix="new.")
    diff = diff_graphs(two_blocks(), after)
    assert not diff.ops
    assert [change.what for change in diff.parameters.changed] == [("renamed",), ("renamed",)]


@pytest.mark.parametrize(
    ("attrs", "said"),
    [({"scales": (1.0, -1.0)}, ["join1: scales () → (1.0, -1.0)"]), ({"scales": ()}, [])],
)
def test_attributes_are_compared_by_their_defaults(attrs: dict[str, Any], said: list[str]) -> None:
    after = two_blocks()
    after.op("join1").attrs.update(attrs)
    assert [str(change) for change in diff_graphs(two_blocks(), after).ops.changed] == said


def test_a_number_kept_as_float32_is_the_same_number() -> None:
    def normed(eps: float) -> Graph:
        graph = Graph()
        x = graph.add_input("x", (2, 4), "float32")
        graph.set_outputs(graph.add_op(OpKind.LAYER_NORM, [x], [("y", KIND)], {"eps": eps}).outputs)
        return graph

    assert not diff_graphs(normed(1e-5), normed(float(np.float32(1e-5))))
    assert diff_graphs(normed(1e-5), normed(1e-6))


def test_changed_contents_of_a_parameter_are_measured() -> None:
    after = two_blocks()
    weight = after.value("fc1.weight")
    weight.native = weight.native + np.float32(0.25)
    assert [str(change) for change in diff_graphs(two_blocks(), after).parameters.changed] == [
        "fc1.weight: contents, by up to 0.25"
    ]
    assert not diff_graphs(two_blocks(), after, data=False)


def test_literals_are_compared_by_their_contents() -> None:
    def scaled(by: float) -> Graph:
        graph = Graph()
        x = graph.add_input("x", (2, 4), "float32")
        factor = graph.add_constant("factor", (), "float32", np.float32(by), Role.CONSTANT)
        graph.set_outputs(graph.add_op(OpKind.MUL, [x, factor], [("y", KIND)]).outputs)
        return graph

    assert not diff_graphs(scaled(0.5), scaled(0.5))
    assert [str(change) for change in diff_graphs(scaled(0.5), scaled(0.75)).ops.changed] == ["y: b 0.5 → 0.75"]


def test_inputs_and_outputs_are_compared() -> None:
    after = two_blocks()
    after.inputs[0].shape = ("N", 4)
    after.set_outputs([after.value("join2"), after.value("join1")])
    diff = diff_graphs(two_blocks(), after)
    assert [str(change) for change in diff.interface.changed] == ["input x: f32[2,4] → f32[N,4]"]
    assert [entry.to_dict() for entry in diff.interface.added] == [{"name": "join1", "what": "output f32[2,4]"}]


def test_an_output_that_another_operation_computes_is_reported() -> None:
    after = two_blocks()
    after.set_outputs([after.value("join1")])
    assert [str(change) for change in diff_graphs(two_blocks(), after).interface.changed] == [
        "output join2 → output join1: computed by another operation"
    ]


def test_text_and_json_tell_the_same() -> None:
    after = two_blocks()
    after.replace_uses(after.value("relu2"), after.value("fc2"))
    after.erase(after.op("relu2"))
    after.commit()
    diff = diff_graphs(two_blocks(), after, ("a.onnx", "b.onnx"))
    text, plain = str(diff), json.loads(json.dumps(diff.to_dict()))
    assert "operations: 0 added, 1 removed, 1 changed, 4 the same" in text
    assert "  - relu2: relu" in text
    assert plain["ops"]["removed"] == [{"name": "relu2", "what": "relu"}]
    assert plain["before"]["model"] == "a.onnx"
    assert plain["after"]["costs"]["ops"] == 5
