"""Costs: floating-point operations and bytes by hand-computed numbers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from rescompile.costs import Cost, graph_costs, op_cost, trained_parameters
from rescompile.graph import Graph, Op, Shape, Value, ValueType
from rescompile.kinds import OpKind

F = "float32"


def single(
    kind: OpKind, operands: Sequence[Shape | None], out: Shape, attrs: dict[str, Any] | None = None, outputs: int = 1
) -> Op:
    """One operation; its first operand is a graph input, the others parameters, None an absent one."""
    graph = Graph()
    values: list[Value | None] = []
    for index, shape in enumerate(operands):
        if shape is None:
            values.append(None)
        elif index == 0:
            values.append(graph.add_input("x", shape, F))
        else:
            values.append(graph.add_constant(f"p{index}", shape, F))
    return graph.add_op(kind, values, [(f"y{i}", ValueType(out, F)) for i in range(outputs)], attrs)


@pytest.mark.parametrize(
    ("kind", "operands", "out", "attrs", "flops"),
    [
        (OpKind.CONV, [(1, 3, 8, 8), (4, 3, 3, 3)], (1, 4, 8, 8), {}, 256 * 2 * 27),
        (OpKind.CONV, [(1, 3, 8, 8), (4, 3, 3, 3), (4,)], (1, 4, 8, 8), {}, 256 * (2 * 27 + 1)),
        (OpKind.CONV, [(1, 4, 8, 8), (4, 1, 3, 3)], (1, 4, 8, 8), {"groups": 4}, 256 * 18),
        (OpKind.LINEAR, [(2, 16), (8, 16)], (2, 8), {}, 2 * 8 * 32),
        (OpKind.LINEAR, [(2, 16), (16, 8), (8,)], (2, 8), {"transpose_weight": False}, 2 * 8 * 33),
        (OpKind.MATMUL, [(2, 5, 16), (2, 16, 7)], (2, 5, 7), {}, 2 * 5 * 7 * 32),
        (OpKind.EINSUM, [(5, 16), (16, 7)], (5, 7), {"equation": "ik,kj->ij"}, 5 * 7 * 32),
        (OpKind.ATTENTION, [(1, 2, 5, 8), (1, 2, 7, 8), (1, 2, 7, 8)], (1, 2, 5, 8), {}, 70 * (2 * 16 + 5)),
        (OpKind.RELU, [(2, 16)], (2, 16), {}, 32),
        (OpKind.ADD, [(2, 16), (2, 16)], (2, 16), {}, 32),
        (OpKind.ADD, [(2, 16), (2, 16), (2, 16)], (2, 16), {}, 64),
        (OpKind.MAX_POOL, [(1, 1, 8, 8)], (1, 1, 4, 4), {"kernel": (2, 2)}, 64),
        (OpKind.MEAN, [(2, 16)], (2,), {"axes": (1,)}, 32),
        (OpKind.SOFTMAX, [(2, 16)], (2, 16), {}, 160),
        (OpKind.BATCH_NORM, [(1, 4, 2, 2), (4,), (4,), (4,), (4,)], (1, 4, 2, 2), {}, 32),
        (OpKind.LAYER_NORM, [(2, 16), (16,), (16,)], (2, 16), {}, 256),
        (OpKind.RESHAPE, [(2, 16)], (32,), {}, 0),
        (OpKind.OPAQUE, [(2, 16)], (2, 16), {"target": "mystery"}, 0),
    ],
)
def test_flops_of_a_kind(kind: OpKind, operands: list[Shape], out: Shape, attrs: dict[str, Any], flops: int) -> None:
    assert op_cost(single(kind, operands, out, attrs)).flops == flops


def test_a_fused_conv_costs_what_its_parts_cost() -> None:
    shape = (1, 4, 8, 8)
    operands = [(1, 3, 8, 8), (4, 3, 3, 3), (4,), shape]
    same = {"pads": (1, 1, 1, 1)}
    fused = op_cost(single(OpKind.FUSED_CONV, operands, shape, {"outer": "relu", **same}))
    parts = [
        op_cost(single(OpKind.CONV, operands[:3], shape, same)),
        op_cost(single(OpKind.ADD, [shape, shape], shape)),
        op_cost(single(OpKind.RELU, [shape], shape)),
    ]
    assert fused.flops == sum(part.flops for part in parts)
    assert fused.bytes == sum(part.bytes for part in parts) - 4 * 4 * 256  # conv→add and add→relu: write and read


def test_an_add_norm_moves_four_tensors() -> None:
    shape = (2, 128, 768)
    cost = op_cost(single(OpKind.ADD_NORM, [shape, shape, (768,), (768,)], shape, outputs=2))
    assert cost.bytes == 4 * (4 * 2 * 128 * 768 + 2 * 768)


def test_a_view_moves_nothing_but_a_concat_does() -> None:
    assert op_cost(single(OpKind.PERMUTE, [(2, 16)], (16, 2), {"perm": (1, 0)})) == Cost()
    assert op_cost(single(OpKind.CONCAT, [(2, 16), (2, 16)], (2, 32), {"axis": 1})).bytes == 4 * 128


def test_an_operand_read_twice_is_counted_once() -> None:
    graph = Graph()
    x = graph.add_input("x", (4,), F)
    assert op_cost(graph.add_op(OpKind.ADD, [x, x], [("y", ValueType((4,), F))])).bytes == 32


def test_what_depends_on_constants_only_costs_nothing() -> None:
    graph = Graph()
    weight = graph.add_constant("w", (8, 16), F)
    op = graph.add_op(OpKind.MUL, [weight, weight], [("ww", ValueType((8, 16), F))])
    assert op_cost(op) == Cost()


def test_symbolic_extents_count_as_told_and_otherwise_as_one() -> None:
    op = single(OpKind.RELU, [("N", 16)], ("N", 16))
    assert op_cost(op).flops == 16
    assert op_cost(op, {"N": 8}).flops == 128
    assert op_cost(single(OpKind.RELU, [("2*N + 1",)], ("2*N + 1",)), {"N": 8}).flops == 17


@pytest.mark.parametrize("text", ["unk__0?", "9**9**9**9", "(" * 1000, "__import__('os')", "N//0"])
def test_a_symbolic_extent_may_be_any_text(text: str) -> None:
    assert op_cost(single(OpKind.RELU, [(text, 2)], (text, 2))).flops <= 18


def test_an_unknown_shape_counts_as_nothing() -> None:
    graph = Graph()
    x = graph.add_input("x", None, None)
    assert op_cost(graph.add_op(OpKind.RELU, [x], [("y", ValueType(None, None))])) == Cost()


def test_batch_norm_statistics_are_not_parameters_and_ties_count_once() -> None:
    graph = Graph()
    x = graph.add_input("x", ("N", 4, 2, 2), F)
    weight = graph.add_constant("bn.weight", (4,), F)
    mean = graph.add_constant("bn.mean", (4,), F)
    var = graph.add_constant("bn.var", (4,), F)
    graph.add_constant("positions", (9,), "int64")
    kind = ValueType(("N", 4, 2, 2), F)
    first = graph.add_op(OpKind.BATCH_NORM, [x, weight, weight, mean, var], [("y", kind)])
    second = graph.add_op(OpKind.BATCH_NORM, [first.output, weight, None, mean, var], [("z", kind)])
    opaque = graph.add_op(OpKind.OPAQUE, second.outputs, [("w", kind)], {"target": "mystery"})
    graph.set_outputs(opaque.outputs)
    assert trained_parameters(graph) == [weight]
    costs = graph_costs(graph, {"N": 2})
    assert costs.to_dict() == {
        "parameters": 4,
        "parameter_bytes": 16,
        "flops": 2 * 2 * 32,
        "bytes": 4 * (6 * 32 + 2 * 3 * 4),
        "ops": 3,
        "uncounted": 1,
        "symbols": {"N": 2},
    }
