"""The printed form: numbered in order, the same for every IR but for the comments."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np

from rescompile.graph import Graph, Role, Value, ValueType
from rescompile.kinds import OpKind
from rescompile.printing import native_name, print_graph, print_type

F = "float32"


def residual_linear(transpose_weight: bool) -> Graph:
    """y = relu(linear(x)·0.5 + x), the weight in either layout."""
    graph = Graph("net")
    x = graph.add_input("x", ("N", 8), F)
    weight = graph.add_constant("fc.weight", (8, 4) if transpose_weight else (4, 8), F)
    bias = graph.add_constant("fc.bias", (8,), F)
    half = graph.add_constant("half", (), F, np.float32(0.5), Role.CONSTANT)
    wide = ValueType(("N", 8), F)
    narrow = graph.add_op(OpKind.SLICE, [x], [("narrow", ValueType(("N", 4), F))], {"axes": (1,), "stops": (4,)})
    attrs = {} if transpose_weight else {"transpose_weight": False}
    fc = graph.add_op(OpKind.LINEAR, [narrow.output, weight, bias], [("fc", wide)], attrs)
    scaled = graph.add_op(OpKind.MUL, [fc.output, half], [("scaled", wide)])
    joined = graph.add_op(OpKind.ADD, [scaled.output, x], [("joined", wide)], {"scales": (1.0, -1.0)})
    relu = graph.add_op(OpKind.RELU, [joined.output], [("y", wide)])
    graph.set_outputs([relu.output])
    return graph


GOLDEN = """\
%0: f32[N,8] = input x
%1: f32[N,4] = slice %0 {axes=[1], stops=[4]}
%2: f32[N,8] = linear %1 f32[8,4] f32[8]
%3: f32[N,8] = mul %2 0.5
%4: f32[N,8] = add %3 %0 {scales=[1,-1]}
%5: f32[N,8] = relu %4
return %5
"""


def test_values_are_numbered_in_order_and_attributes_shown_where_they_differ() -> None:
    assert print_graph(residual_linear(True), comments=False) == GOLDEN


def test_both_layouts_of_a_linear_print_the_same() -> None:
    assert print_graph(residual_linear(False), comments=False) == GOLDEN


def test_a_computed_weight_keeps_its_layout() -> None:
    graph = Graph()
    x = graph.add_input("x", (2, 4), F)
    weight = graph.add_input("w", (4, 8), F)
    op = graph.add_op(OpKind.LINEAR, [x, weight], [("y", ValueType((2, 8), F))], {"transpose_weight": False})
    graph.set_outputs(op.outputs)
    assert "= linear %0 %1 {transpose_weight=false}\n" in print_graph(graph)


def test_comments_name_native_operators_parameters_and_the_pass() -> None:
    graph = residual_linear(True)
    graph.op("fc").native = (SimpleNamespace(target="aten.linear.default"),)
    graph.op("y").provenance = "fuse"
    lines = print_graph(graph).splitlines()
    assert lines[2].endswith("   # aten.linear.default fc.weight fc.bias")
    assert lines[5].endswith("   # (made by fuse)")
    assert "#" not in lines[3]


def test_native_names_of_both_irs() -> None:
    def spelled(*nodes: SimpleNamespace) -> str:
        op = Graph().add_op(OpKind.RELU, [], [("y", ValueType((), F))])
        op.native = nodes
        return native_name(op)

    assert spelled(SimpleNamespace(op_type="MatMul", domain=""), SimpleNamespace(op_type="Add", domain="")) == (
        "MatMul+Add"
    )
    assert spelled(SimpleNamespace(op_type="FusedConv", domain="com.microsoft")) == "com.microsoft.FusedConv"
    assert spelled(SimpleNamespace(target=len)) == "len"
    assert spelled() == ""


def test_absent_operands_and_several_outputs() -> None:
    graph = Graph()
    x: Value = graph.add_input("x", (2, 8), F)
    bias = graph.add_constant("bias", (8,), F)
    kind = ValueType((2, 8), F)
    op = graph.add_op(OpKind.ADD_NORM, [x, x, None, bias], [("y", kind), ("sum", kind)], {"norm": "layer", "eps": 1e-6})
    norm = graph.add_op(OpKind.LAYER_NORM, [op.output, None, None], [("z", kind)], {"axis": -1})
    graph.set_outputs([norm.output, op.outputs[1]])
    assert print_graph(graph, comments=False) == (
        "%0: f32[2,8] = input x\n"
        "%1: f32[2,8], %2: f32[2,8] = add_norm %0 %0 _ f32[8] {eps=1e-06}\n"
        "%3: f32[2,8] = layer_norm %1\n"
        "return %3 %2\n"
    )


def test_types_that_are_not_known() -> None:
    assert print_type(None, None) == "?[*]"
    assert print_type((), "bfloat16") == "bf16[]"
    assert print_type(("N", 3), "complex64") == "complex64[N,3]"
