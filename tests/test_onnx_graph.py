"""Edits of ONNX graphs: view and model change together, outward names never."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import helper, numpy_helper

from rescompile.errors import GraphError
from rescompile.graph import Role, ValueType
from rescompile.kinds import OpKind as K
from rescompile.onnx_graph import OnnxGraph
from rescompile.onnx_ops import PROVENANCE_KEY
from rescompile.onnx_serial import in_memory_proto
from tests.onnx_models import Array, check, graph_of, kinds, model_of, same

RNG = np.random.default_rng(3)


def floats(*shape: int) -> Array:
    return RNG.uniform(-1, 1, shape).astype(np.float32)


X = {"x": floats(2, 3, 8)}


def block(opset: int = 18) -> onnx.ModelProto:
    """y = LN(x + relu(x·W + b)·V), z = the sum"""
    nodes = [
        helper.make_node("MatMul", ["x", "W"], ["xw"], name="fc1/MatMul"),
        helper.make_node("Add", ["b", "xw"], ["xwb"], name="fc1/Add"),
        helper.make_node("Relu", ["xwb"], ["act"], name="act"),
        helper.make_node("MatMul", ["act", "V"], ["av"], name="fc2"),
        helper.make_node("Add", ["x", "av"], ["z"], name="join"),
        helper.make_node("LayerNormalization", ["z", "g", "h"], ["y"], name="norm"),
    ]
    constants = {"W": floats(8, 16), "b": floats(16), "V": floats(16, 8), "g": floats(8), "h": floats(8)}
    return model_of(nodes, {"x": ("N", 3, 8)}, ["y", "z"], constants, opset=opset)


@pytest.fixture
def graph() -> OnnxGraph:
    return graph_of(block())


def test_reading_presents_a_matmul_and_its_bias_as_one_linear(graph: OnnxGraph) -> None:
    assert kinds(graph) == [K.LINEAR, K.RELU, K.LINEAR, K.ADD, K.LAYER_NORM]
    linear = graph.op("fc1/Add")
    assert [node.op_type for node in linear.native] == ["MatMul", "Add"]
    assert [value.name if value else None for value in linear.inputs] == ["x", "W", "b"]
    assert linear.attr("transpose_weight") is False
    assert linear.module == "fc1"
    assert graph.op("join").output.shape == ("N", 3, 8)


@pytest.mark.parametrize("reason", ["bias is not constant", "bias is a matrix", "product is read twice", "output"])
def test_a_matmul_and_an_add_stay_apart_when(reason: str) -> None:
    outputs = ["y"]
    nodes = [helper.make_node("MatMul", ["x", "W"], ["p"]), helper.make_node("Add", ["p", "b"], ["y"])]
    inputs: dict[str, tuple[int | str, ...]] = {"x": (2, 3, 8)}
    constants = {"W": floats(8, 8), "b": floats(8)}
    if reason == "bias is not constant":
        del constants["b"]
        inputs["b"] = (8,)
    elif reason == "bias is a matrix":
        constants["b"] = floats(3, 8)
    elif reason == "product is read twice":
        nodes.append(helper.make_node("Relu", ["p"], ["r"]))
        outputs.append("r")
    else:
        outputs.append("p")
    assert kinds(graph_of(model_of(nodes, dict(inputs), outputs, constants)))[:2] == [K.LINEAR, K.ADD]


def test_a_transposed_weight_is_part_of_the_linear() -> None:
    nodes = [
        helper.make_node("Transpose", ["W"], ["Wt"], perm=[1, 0]),
        helper.make_node("MatMul", ["x", "Wt"], ["y"]),
    ]
    graph = graph_of(model_of(nodes, {"x": (2, 3, 8)}, ["y"], {"W": floats(5, 8)}))
    assert kinds(graph) == [K.LINEAR]
    assert graph.ops[0].attr("transpose_weight") is True
    assert graph.ops[0].operand("weight") is graph.value("W")


def test_a_transposed_weight_that_two_products_read_stays_an_operation() -> None:
    nodes = [
        helper.make_node("Transpose", ["W"], ["Wt"], perm=[1, 0]),
        helper.make_node("MatMul", ["x", "Wt"], ["y"]),
        helper.make_node("MatMul", ["y", "Wt"], ["z"]),
    ]
    graph = graph_of(model_of(nodes, {"x": (2, 3, 8)}, ["z"], {"W": floats(8, 8)}))
    assert kinds(graph) == [K.PERMUTE, K.LINEAR, K.LINEAR]
    assert graph.value("Wt").constant


def test_uses_name_operation_and_position(graph: OnnxGraph) -> None:
    assert [(op.name, index) for op, index in graph.value("x").uses] == [("fc1/Add", 0), ("join", 0)]
    assert [op.name for op in graph.value("z").users] == ["norm"]


def test_set_operand_changes_model_and_view(graph: OnnxGraph) -> None:
    bias = graph.add_parameter("c", floats(16))
    graph.set_operand(graph.op("fc1/Add"), 2, bias)
    graph.commit()
    check(graph)
    assert "b" not in graph.model.graph.initializers
    data = {name: numpy_helper.to_array(t) for t in block().graph.initializer for name in [t.name]}
    assert not any(value.name == "b" for value in graph.values)
    got = graph.run(X)["z"]
    del data
    np.testing.assert_array_equal(graph.data(bias), graph.data(graph.value("c")))
    assert got.shape == (2, 3, 8)


def test_set_operand_on_one_of_two_equal_operands_leaves_the_other() -> None:
    nodes = [helper.make_node("Add", ["x", "x"], ["s"], name="twice"), helper.make_node("Neg", ["x"], ["y"], name="n")]
    graph = graph_of(model_of([*nodes[1:], nodes[0]], {"x": (3,)}, ["s", "y"]))
    graph.set_operand(graph.op("twice"), 1, graph.value("y"))
    graph.commit()
    np.testing.assert_array_equal(graph.run({"x": np.ones(3, np.float32)})["s"], np.zeros(3, np.float32))


def test_giving_a_linear_a_bias_that_it_had_not(graph: OnnxGraph) -> None:
    before = graph.run(X)["z"]
    bias = graph.add_parameter("c", np.full(8, 2, np.float32))
    op = graph.op("fc2")
    copy = [*op.inputs[:2], bias]
    graph.fuse([op], K.LINEAR, copy, op.outputs, op.attrs)
    graph.commit()
    np.testing.assert_allclose(graph.run(X)["z"], before + 2, rtol=1e-5)


def test_replace_uses_moves_an_output_and_keeps_its_name(graph: OnnxGraph) -> None:
    expected = graph.run(X)
    graph.replace_uses(graph.value("y"), graph.value("act"))
    graph.erase(graph.op("norm"))
    graph.commit()
    check(graph)
    assert graph.output_names == ["y", "z"]
    got = graph.run(X)
    assert list(got) == ["y", "z"]
    assert got["y"].shape == (2, 3, 16)
    np.testing.assert_array_equal(got["z"], expected["z"])


@pytest.mark.parametrize("target", ["x", "z", "g"])
def test_an_output_can_become_an_input_another_output_or_a_parameter(graph: OnnxGraph, target: str) -> None:
    graph.replace_uses(graph.value("y"), graph.value(target))
    graph.erase(graph.op("norm"))
    graph.commit()
    check(graph)
    got = graph.run(X)
    assert list(got) == ["y", "z"]
    expected = {"x": X["x"], "z": got["z"], "g": graph.data(graph.value("g")) if target == "g" else None}[target]
    np.testing.assert_array_equal(got["y"], expected)
    # and once more, to a value that can carry the name itself
    graph.replace_uses(graph.outputs[0], graph.value("act"), outputs=True) if target == "g" else None
    graph.commit()
    assert graph.output_names == ["y", "z"]


def test_insert_and_erase_leave_the_model_as_it_was(graph: OnnxGraph) -> None:
    expected = graph.run(X)
    before = len(graph.model.graph)
    op = graph.insert(
        K.GELU, [graph.value("act")], [("bent", ValueType(("N", 3, 16), "float32"))], provenance="somepass"
    )
    graph.set_operand(graph.op("fc2"), 0, op.output)
    graph.commit()
    check(graph)
    assert op.native[-1].metadata_props[PROVENANCE_KEY] == "somepass"
    assert not np.allclose(graph.run(X)["z"], expected["z"])
    graph.replace_uses(op.output, graph.value("act"))
    graph.erase(op)
    graph.commit()
    assert len(graph.model.graph) == before
    same(expected, graph.run(X), rtol=0, atol=0)


def test_an_operation_that_is_read_cannot_be_erased(graph: OnnxGraph) -> None:
    with pytest.raises(GraphError, match="'norm' still reads 'z'"):
        graph.erase(graph.op("join"))


def fuse_all(graph: OnnxGraph) -> OnnxGraph:
    first, act, second, join, norm = graph.ops
    graph.fuse([first, act], K.FUSED_LINEAR, [*first.inputs, None], act.outputs, {**first.attrs, "outer": "relu"})
    graph.fuse(
        [join, norm],
        K.ADD_NORM,
        [*join.inputs, *norm.inputs[1:]],
        [norm.output, join.output],
        {"norm": "layer", "axis": 2, "eps": norm.attr("eps")},
        name="addnorm",
        provenance="fuse",
    )
    del second
    graph.commit()
    return graph


@pytest.mark.parametrize("opset", [18, 20, 22])
def test_fused_operations_are_functions_that_onnx_runtime_runs(opset: int) -> None:
    graph = graph_of(block(opset))
    expected = graph.run(X)
    fused = fuse_all(graph.clone())
    check(fused)
    assert kinds(fused) == [K.FUSED_LINEAR, K.LINEAR, K.ADD_NORM]
    proto = in_memory_proto(fused.model)
    assert sorted(function.name for function in proto.functions) == [
        "AddNorm_layer_weight_bias",
        "FusedLinear_bias_relu",
    ]
    assert {entry.domain: entry.version for entry in proto.opset_import} == {"": opset, "rescompile": 1}
    same(expected, fused.run(X))
    onnx.checker.check_model(proto, full_check=True)


def test_fused_operations_are_read_back_as_their_kinds() -> None:
    fused = fuse_all(graph_of(block()))
    again = graph_of(in_memory_proto(fused.model))
    assert kinds(again) == kinds(fused)
    for mine, theirs in zip(fused, again, strict=True):
        assert {name: mine.attr(name) for name in mine.kind.spec.attrs} == {
            name: theirs.attr(name) for name in theirs.kind.spec.attrs
        }
        assert [v.name if v else None for v in mine.inputs] == [v.name if v else None for v in theirs.inputs]
        assert mine.provenance == theirs.provenance
    same(fused.run(X), again.run(X), rtol=0, atol=0)


def test_one_function_serves_every_call_of_the_same_structure() -> None:
    nodes, constants, previous = [], {}, "x"
    for i, stride in enumerate((1, 1, 2)):
        nodes += [
            helper.make_node("Conv", [previous, f"w{i}"], [f"c{i}"], strides=[stride, stride], pads=[1, 1, 1, 1]),
            helper.make_node("Relu", [f"c{i}"], [f"r{i}"]),
        ]
        constants[f"w{i}"] = floats(3, 3, 3, 3)
        previous = f"r{i}"
    graph = graph_of(model_of(nodes, {"x": (1, 3, 8, 8)}, [previous], constants))
    feeds = {"x": floats(1, 3, 8, 8)}
    expected = graph.run(feeds)
    for conv, relu in zip(graph.ops[::2], graph.ops[1::2], strict=True):
        graph.fuse([conv, relu], K.FUSED_CONV, [*conv.inputs, None], relu.outputs, {**conv.attrs, "outer": "relu"})
    graph.commit()
    check(graph)
    assert [key[1] for key in graph.model.functions] == ["FusedConv_relu"]
    same(expected, graph.run(feeds))


@pytest.mark.parametrize("opset", [9, 13, 17])
def test_add_norm_below_its_operators_opset_is_a_decomposed_body(opset: int) -> None:
    nodes = [helper.make_node("Add", ["x", "r"], ["s"]), helper.make_node("Relu", ["s"], ["y"])]
    graph = graph_of(
        model_of(nodes, {"x": (2, 8), "r": (2, 8)}, ["y", "s"], opset=opset, ir_version=3 if opset == 9 else 8)
    )
    add, relu = graph.ops
    weight = graph.add_parameter("w", floats(8))
    graph.fuse(
        [add, relu],
        K.ADD_NORM,
        [*add.inputs, weight, None],
        [relu.output, add.output],
        {"norm": "layer", "axis": 1, "eps": 1e-3},
    )
    graph.commit()
    check(graph)
    x, r = floats(2, 8), floats(2, 8)
    s = x + r
    expected = (s - s.mean(1, keepdims=True)) / np.sqrt(s.var(1, keepdims=True) + 1e-3) * graph.data(weight)
    got = graph.run({"x": x, "r": r})
    np.testing.assert_allclose(got["y"], expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(got["s"], s)
    assert graph_of(in_memory_proto(graph.model)).ops[0].attr("eps") == pytest.approx(1e-3)


def test_functions_that_nobody_calls_any_more_go() -> None:
    graph = fuse_all(graph_of(block()))
    op = graph.op("addnorm")
    total = graph.insert(K.ADD, op.inputs[:2], [("total", ValueType(("N", 3, 8), "float32"))])
    normed = graph.insert(
        K.LAYER_NORM, [total.output, *op.inputs[2:]], [("normed", ValueType(("N", 3, 8), "float32"))], {"axis": 2}
    )
    expected = graph.run(X)
    graph.replace_uses(op.outputs[0], normed.output)
    graph.replace_uses(op.outputs[1], total.output)
    graph.erase(op)
    graph.commit()
    check(graph)
    assert [key[1] for key in graph.model.functions] == ["FusedLinear_bias_relu"]
    same(expected, graph.run(X))


def test_a_clone_is_edited_alone(graph: OnnxGraph) -> None:
    expected = graph.run(X)
    before = in_memory_proto(graph.model).SerializeToString(deterministic=True)
    copy = fuse_all(graph.clone())
    assert kinds(copy) != kinds(graph)
    assert in_memory_proto(graph.model).SerializeToString(deterministic=True) == before
    same(expected, graph.run(X), rtol=0, atol=0)
    assert copy.model.graph.initializers["W"].const_value is graph.model.graph.initializers["W"].const_value


def test_the_object_that_was_captured_stays_as_it_was() -> None:
    proto = block()
    model = ir.from_proto(proto)
    before = ir.to_proto(model).SerializeToString(deterministic=True)
    graph = graph_of(model)  # type: ignore[arg-type]
    fuse_all(graph)
    assert ir.to_proto(model).SerializeToString(deterministic=True) == before
    assert isinstance(graph.to_user(), ir.Model)
    assert isinstance(graph_of(proto).to_user(), onnx.ModelProto)


def test_a_constant_that_two_readers_share_survives_one_of_them() -> None:
    nodes = [helper.make_node("Mul", ["x", "s"], ["a"], name="a"), helper.make_node("Mul", ["a", "s"], ["y"], name="b")]
    graph = graph_of(model_of(nodes, {"x": (2, 8)}, ["y"], {"s": floats(8)}))
    other = graph.add_parameter("t", np.ones(8, np.float32))
    graph.set_operand(graph.op("b"), 1, other)
    graph.commit()
    assert "s" in graph.model.graph.initializers
    graph.set_operand(graph.op("a"), 1, other)
    graph.commit()
    assert "s" not in graph.model.graph.initializers
    assert graph.parameters == [other]


def test_add_parameter_takes_bfloat16_and_refuses_a_taken_name(graph: OnnxGraph) -> None:
    import ml_dtypes

    value = graph.add_parameter("half", np.arange(4).astype(ml_dtypes.bfloat16))
    assert (value.dtype, value.shape) == ("bfloat16", (4,))
    tensor = next(t for t in in_memory_proto(graph.model).graph.initializer if t.name == "half")
    assert tensor.data_type == onnx.TensorProto.BFLOAT16
    for taken in ("W", "xw", "x"):
        with pytest.raises(GraphError, match=f"something named '{taken}'"):
            graph.add_parameter(taken, floats(2))


def test_a_cycle_is_named(graph: OnnxGraph) -> None:
    graph.set_operand(graph.op("fc1/Add"), 0, graph.value("z"))
    with pytest.raises(GraphError, match="cycle"):
        graph.commit()


def test_constants_come_in_every_spelling() -> None:
    nodes = [
        helper.make_node("Constant", [], ["a"], value=numpy_helper.from_array(np.float32([1, 2]))),
        helper.make_node("Constant", [], ["b"], value_floats=[3.0, 4.0]),
        helper.make_node("ConstantOfShape", ["shape"], ["c"], value=numpy_helper.from_array(np.float32([5]))),
        helper.make_node("Sum", ["x", "a", "b", "c", "d"], ["y"], name="sum"),
    ]
    proto = model_of(
        nodes, {"x": (2,), "d": (2,)}, ["y"], {"shape": np.asarray([2]), "d": np.float32([6, 7])}, opset=13
    )
    graph = graph_of(proto)
    assert [value.name for value in graph.inputs] == ["x"]
    assert kinds(graph) == [K.ADD]
    roles = {value.name: value.role for value in graph.op("sum").operands}
    assert roles == {"x": Role.INPUT, "a": Role.CONSTANT, "b": Role.CONSTANT, "c": Role.CONSTANT, "d": Role.PARAMETER}
    sums = sum(graph.data(graph.value(name)) for name in "abcd")
    np.testing.assert_array_equal(graph.run({"x": np.zeros(2, np.float32)})["y"], sums)
    assert not graph.has_name("nothing")
    assert graph.has_name("shape")  # hidden, and still taken


def test_literals_computed_from_literals_are_constants_and_weights_are_not() -> None:
    nodes = [
        helper.make_node("Constant", [], ["zero"], value=numpy_helper.from_array(np.float32(0))),
        helper.make_node("Shape", ["W"], ["rows"], start=0, end=1),
        helper.make_node("Expand", ["zero", "rows"], ["bias"]),
        helper.make_node("Conv", ["x", "W", "bias"], ["c"], name="conv"),
        helper.make_node("Neg", ["g"], ["h"], name="neg"),
        helper.make_node("Mul", ["c", "h"], ["y"], name="scale"),
    ]
    graph = graph_of(model_of(nodes, {"x": (1, 3, 4, 4)}, ["y"], {"W": floats(5, 3, 1, 1), "g": floats(1)}))
    bias = graph.op("conv").operand("bias")
    assert bias is not None
    assert bias.role is Role.CONSTANT
    np.testing.assert_array_equal(graph.data(bias), np.zeros(5, np.float32))
    assert kinds(graph) == [K.CONV, K.NEG, K.MUL]
    assert graph.value("h").constant
    assert graph.value("h").role is Role.RESULT


def dynamic_reshape() -> OnnxGraph:
    nodes = [
        helper.make_node("Relu", ["x"], ["a"], name="first"),
        helper.make_node("Sigmoid", ["a"], ["s"], name="second"),
        helper.make_node("Shape", ["s"], ["shape"]),
        helper.make_node("Gather", ["shape", "zero"], ["n"]),
        helper.make_node("Concat", ["n", "rest"], ["target"], axis=0),
        helper.make_node("Reshape", ["s", "target"], ["y"], name="flat"),
    ]
    constants = {"zero": np.asarray([0]), "rest": np.asarray([-1])}
    proto = model_of(nodes, {"x": ("N", 3, 4)}, [], constants, opset=13)
    proto.graph.output.append(helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [None, None]))
    return graph_of(proto)


def test_shape_arithmetic_for_a_reshape_is_hidden() -> None:
    graph = dynamic_reshape()
    assert kinds(graph) == [K.RELU, K.SIGMOID, K.RESHAPE]
    assert [node.op_type for node in graph.model.graph if node in graph.native.hidden] == ["Shape", "Gather", "Concat"]
    assert graph.op("flat").output.shape == ("N", 12)
    assert [value.name for value in graph.parameters] == []


def test_shape_arithmetic_goes_with_its_reshape() -> None:
    graph = dynamic_reshape()
    flat = graph.op("flat")
    graph.replace_uses(flat.output, graph.value("s"))
    graph.erase(flat)
    graph.commit()
    assert [node.op_type for node in graph.model.graph] == ["Relu", "Sigmoid"]
    assert len(graph.model.graph.initializers) == 0


def test_a_shape_that_hidden_nodes_ask_of_a_removed_value_is_had_from_the_inputs() -> None:
    graph = dynamic_reshape()
    feeds = {"x": floats(5, 3, 4)}
    second = graph.op("second")
    graph.replace_uses(second.output, graph.value("a"))
    graph.erase(second)
    graph.commit()
    check(graph)
    np.testing.assert_array_equal(graph.run(feeds)["y"], np.maximum(feeds["x"], 0).reshape(5, 12))


def test_a_shape_that_real_operations_read_is_shown() -> None:
    nodes = [
        helper.make_node("Shape", ["x"], ["shape"], name="shape_op"),
        helper.make_node("Cast", ["shape"], ["f"], to=onnx.TensorProto.FLOAT),
        helper.make_node("ReduceProd", ["f"], ["y"], keepdims=0),
    ]
    graph = graph_of(model_of(nodes, {"x": ("N", 3)}, ["y"], opset=13))
    assert kinds(graph) == [K.SHAPE, K.CAST, K.PROD]


def branching(opset: int = 13) -> OnnxGraph:
    def branch(name: str, op: str) -> onnx.GraphProto:
        out = onnx.ValueInfoProto(name=f"{name}_y")
        out.type.tensor_type.elem_type = onnx.TensorProto.FLOAT
        return helper.make_graph([helper.make_node(op, ["a", "w"], [f"{name}_y"])], name, [], [out])

    nodes = [
        helper.make_node("Relu", ["x"], ["a"], name="relu"),
        helper.make_node("Neg", ["x"], ["b"], name="neg"),
        helper.make_node("ReduceMax", ["b"], ["m"], keepdims=0, name="max"),
        helper.make_node("Cast", ["m"], ["c"], to=onnx.TensorProto.BOOL, name="cast"),
        helper.make_node("If", ["c"], ["y"], name="if", then_branch=branch("t", "Add"), else_branch=branch("e", "Mul")),
    ]
    return graph_of(model_of(nodes, {"x": (4,)}, ["y"], {"w": floats(4)}, opset=opset))


def test_what_a_branch_captures_counts_as_a_use() -> None:
    graph = branching()
    op = graph.op("if")
    assert op.kind is K.OPAQUE
    assert [value.name for value in op.operands] == ["c", "a", "w"]
    with pytest.raises(GraphError, match="'if' still reads 'a'"):
        graph.erase(graph.op("relu"))


def test_what_a_branch_captures_can_be_replaced() -> None:
    graph = branching()
    feeds = {"x": np.float32([-1, 2, -3, 4])}
    graph.replace_uses(graph.value("a"), graph.value("b"))
    graph.erase(graph.op("relu"))
    graph.commit()
    check(graph)
    np.testing.assert_allclose(graph.run(feeds)["y"], -feeds["x"] + graph.data(graph.value("w")), rtol=1e-6)
    copy = graph.clone()
    same(graph.run(feeds), copy.run(feeds), rtol=0, atol=0)


def test_fusing_a_value_that_a_branch_captures_reaches_into_the_branch() -> None:
    graph = branching()
    feeds = {"x": np.float32([-1, 2, -3, 4])}
    expected = graph.run(feeds)
    relu = graph.op("relu")
    graph.fuse([relu], K.RELU, relu.inputs, relu.outputs)
    graph.commit()
    check(graph)
    same(expected, graph.run(feeds), rtol=0, atol=0)


def test_a_foreign_function_is_opaque_and_noted() -> None:
    proto = model_of(
        [helper.make_node("Twice", ["x"], ["y"], domain="other", name="call")], {"x": (4,)}, [], domains=["other"]
    )
    body = [helper.make_node("Add", ["a", "a"], ["b"])]
    proto.functions.append(helper.make_function("other", "Twice", ["a"], ["b"], body, [helper.make_opsetid("", 18)]))
    proto.graph.output.append(helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [4]))
    graph = graph_of(proto)
    assert graph.op("call").attr("target") == "other::Twice"
    assert "function other::Twice" in graph.notes[0]
    np.testing.assert_array_equal(graph.run({"x": np.ones(4, np.float32)})["y"], np.full(4, 2, np.float32))


def test_a_group_becomes_separate_nodes_when_one_of_its_operations_is_edited() -> None:
    proto = model_of(
        [helper.make_node("Gather", ["x", "i"], ["y"], axis=1, name="pick")],
        {"x": (2, 3, 4)},
        ["y"],
        {"i": np.asarray(-1)},
    )
    graph = graph_of(proto)
    feeds = {"x": floats(2, 3, 4)}
    cut, flat = graph.ops
    assert cut.group == [cut, flat]
    double = graph.insert(K.ADD, [cut.output, cut.output], [("double", ValueType((2, 1, 4), "float32"))])
    graph.set_operand(flat, 0, double.output)
    graph.commit()
    check(graph)
    assert graph.output_names == ["y"]
    np.testing.assert_array_equal(graph.run(feeds)["y"], 2 * feeds["x"][:, 2])


def keys(*, twice: bool = False, reshaped: bool = False) -> OnnxGraph:
    """softmax(q·kᵀ / 2)·v with heads; the keys' heads come forward and turn in one Transpose, or in a flat shape"""
    if reshaped:
        turn = [
            helper.make_node("Reshape", ["k", "flat"], ["k3"]),
            helper.make_node("Transpose", ["k3"], ["k3t"], perm=[0, 2, 1]),
            helper.make_node("Reshape", ["k3t", "deep"], ["kt"]),
        ]
        k: tuple[int, ...] = (2, 4, 5, 8)
    else:
        turn = [helper.make_node("Transpose", ["k"], ["kt"], perm=[0, 2, 3, 1], name="turn")]
        k = (2, 5, 4, 8)
    nodes = [
        *turn,
        helper.make_node("MatMul", ["q", "kt"], ["scores"]),
        helper.make_node("Mul", ["scores", "half"], ["scaled"]),
        helper.make_node("Softmax", ["scaled"], ["p"], axis=-1),
        helper.make_node("MatMul", ["p", "v"], ["y"]),
    ]
    constants = {"half": np.float32(0.5), "flat": np.asarray([8, 5, 8]), "deep": np.asarray([2, 4, 8, 5])}
    outputs = ["y"]
    if twice:
        nodes.append(helper.make_node("Relu", ["kt"], ["z"]))
        outputs.append("z")
    return graph_of(model_of(nodes, {"q": (2, 4, 5, 8), "k": k, "v": (2, 4, 5, 8)}, outputs, constants))


QKV = {"q": floats(2, 4, 5, 8), "k": floats(2, 5, 4, 8), "v": floats(2, 4, 5, 8)}


def attended(q: Array, k: Array, v: Array) -> Array:
    scores = np.exp(0.5 * q @ k.transpose(0, 1, 3, 2))
    return scores / scores.sum(-1, keepdims=True) @ v


def test_keys_whose_heads_come_forward_as_they_turn_make_an_attention() -> None:
    graph = keys()
    assert kinds(graph) == [K.PERMUTE, K.ATTENTION]
    assert graph.ops[0].native == ()
    assert graph.ops[1].operand("k") is graph.ops[0].output
    assert len(graph.model.graph) == 5


def test_keys_that_turn_in_a_flat_shape_make_an_attention() -> None:
    graph = keys(reshaped=True)
    assert kinds(graph) == [K.ATTENTION]
    assert graph.ops[0].operand("k") is graph.value("k")
    feeds = {**QKV, "k": floats(2, 4, 5, 8)}
    np.testing.assert_allclose(graph.run(feeds)["y"], attended(**feeds), rtol=1e-5, atol=1e-6)


def test_turned_keys_that_others_read_stay_an_operation() -> None:
    graph = keys(twice=True)
    assert kinds(graph)[:2] == [K.PERMUTE, K.MATMUL]
    assert graph.op("turn").attr("perm") == (0, 2, 3, 1)


@pytest.mark.parametrize("target", ["heads", "attention"])
def test_an_operation_that_no_node_computes_is_written_when_it_is_edited(target: str) -> None:
    graph = keys()
    heads, attention = graph.ops
    double = graph.insert(K.ADD, [graph.value("k")] * 2, [("double", graph.value("k").type)])
    if target == "heads":
        graph.set_operand(heads, 0, double.output)
        expected = attended(QKV["q"], 2 * QKV["k"].transpose(0, 2, 1, 3), QKV["v"])
    else:
        graph.erase(double)
        negated = graph.insert(K.NEG, [heads.output], [("negated", heads.output.type)])
        graph.set_operand(attention, 1, negated.output)
        expected = attended(QKV["q"], -QKV["k"].transpose(0, 2, 1, 3), QKV["v"])
    graph.commit()
    check(graph)
    np.testing.assert_allclose(graph.run(QKV)["y"], expected, rtol=1e-5, atol=1e-6)
    assert graph_of(in_memory_proto(graph.model)).op("y").kind in (K.ATTENTION, K.MATMUL)


def test_writing_an_operation_that_no_node_computes_reaches_its_readers() -> None:
    graph = keys()
    heads = graph.ops[0]
    made = graph.fuse([heads], K.PERMUTE, heads.inputs, heads.outputs, heads.attrs)
    graph.set_operand(made, 0, graph.insert(K.NEG, [graph.value("k")], [("n", graph.value("k").type)]).output)
    graph.commit()
    check(graph)
    expected = attended(QKV["q"], -QKV["k"].transpose(0, 2, 1, 3), QKV["v"])
    np.testing.assert_allclose(graph.run(QKV)["y"], expected, rtol=1e-5, atol=1e-6)


def test_a_recurrent_operation_of_which_only_the_last_state_is_wanted() -> None:
    nodes = [helper.make_node("GRU", ["x", "W", "R"], ["", "h"], hidden_size=3, name="gru")]
    proto = model_of(nodes, {"x": (5, 2, 4)}, ["h"], {"W": floats(1, 9, 4), "R": floats(1, 9, 3)}, opset=14)
    graph = graph_of(proto)
    op = graph.op("gru")
    assert [value.name for value in op.outputs][1] == "h"
    feeds = {"x": floats(5, 2, 4)}
    expected = graph.run(feeds)
    graph.fuse([op], K.RECURRENT, op.inputs, op.outputs, op.attrs)
    graph.commit()
    same(expected, graph.run(feeds))


def test_symbolic_extents_pass_convolutions_and_meet_again() -> None:
    nodes = [
        helper.make_node("Conv", ["x", "a"], ["p"], pads=[1, 1, 1, 1], strides=[2, 2]),
        helper.make_node("Conv", ["p", "a"], ["q"], pads=[1, 1, 1, 1]),
        helper.make_node("Conv", ["x", "b"], ["r"], strides=[2, 2]),
        helper.make_node("Add", ["q", "r"], ["y"], name="join"),
    ]
    constants = {"a": floats(3, 3, 3, 3), "b": floats(3, 3, 1, 1)}
    proto = model_of(nodes, {"x": ("N", 3, "H", "W")}, [], constants)
    proto.graph.output.append(helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, ["N", 3, "h", "w"]))
    graph = graph_of(proto)
    assert graph.value("p").shape == ("N", 3, "((H-1)//2+1)", "((W-1)//2+1)")
    assert graph.value("q").shape == graph.value("r").shape == graph.value("p").shape


def test_initializers_that_are_inputs_as_well_are_parameters() -> None:
    proto = model_of(
        [helper.make_node("Add", ["x", "w"], ["y"])], {"w": (4,), "x": (4,)}, ["y"], {"w": floats(4)}, ir_version=3
    )
    graph = graph_of(proto)
    assert [value.name for value in graph.inputs] == ["x"]
    assert [value.name for value in graph.parameters] == ["w"]
    assert graph.run({"x": np.zeros(4, np.float32)})["y"].shape == (4,)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({}, "input 'x' is missing"),
        ({"x": np.zeros((2, 3, 8)), "q": np.zeros(1)}, "no input 'q'"),
        ({"x": np.zeros((2, 3, 8))}, "float64"),
        ({"x": np.zeros((2, 4, 8), np.float32)}, r"float32\[2, 4, 8\]"),
        ({"x": np.zeros((3, 8), np.float32)}, r"float32\[3, 8\]"),
    ],
)
def test_run_says_what_is_wrong_with_its_inputs(graph: OnnxGraph, inputs: dict[str, Array], message: str) -> None:
    with pytest.raises(GraphError, match=message):
        graph.run(inputs)
