"""Composites: each spelling is recognised, and each near miss is left alone."""

from __future__ import annotations

import math

import pytest

from rescompile.composites import recognise
from rescompile.graph import Graph, Op, Value
from rescompile.kinds import OpKind
from tests.graphs import Builder, K


def kinds(graph: Graph) -> list[OpKind]:
    return [op.kind for op in graph]


def the(graph: Graph, kind: OpKind) -> Op:
    found = [op for op in graph if op.kind is kind]
    assert len(found) == 1, kinds(graph)
    return found[0]


# ---- norms ---------------------------------------------------------------------------------------------------------


def rstd(b: Builder, variance: Value, spelling: str, eps: float = 1e-5) -> Value:
    shifted = b.add(variance, eps) if spelling != "eps first" else b.add(eps, variance)
    if spelling == "pow":
        return b.op(K.POW, shifted, -0.5)
    if spelling == "rsqrt":
        return b.op(K.RSQRT, shifted)
    root = b.op(K.SQRT, shifted)
    if spelling == "one over":
        return b.op(K.DIV, 1.0, root)
    return b.op(K.RECIPROCAL, root)


def normalised(b: Builder, x: Value, centred: Value, spelling: str) -> Value:
    square = b.mul(centred, centred) if spelling in ("rsqrt", "one over") else b.op(K.POW, centred, 2.0)
    variance = b.mean(square, 2)
    if spelling == "div":
        return b.op(K.DIV, x, b.op(K.SQRT, b.add(variance, 1e-5)))
    return b.mul(x, rstd(b, variance, spelling)) if spelling != "pow" else b.mul(rstd(b, variance, spelling), x)


SPELLINGS = ["div", "pow", "rsqrt", "one over", "reciprocal", "eps first"]


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("affine", ["none", "weight", "both"])
def test_layer_norm_is_recognised(spelling: str, affine: str) -> None:
    b = Builder()
    x = b.input(2, 7, 16)
    d = b.sub(x, b.mean(x, 2))
    y = normalised(b, d, d, spelling)
    weight, bias = b.param(16), b.param(16)
    if affine != "none":
        y = b.mul(weight, y)
    if affine == "both":
        y = b.add(y, bias)
    graph = b.output(y)
    recognise(graph)
    op = the(graph, K.LAYER_NORM)
    assert len(graph) == 1
    assert op.inputs == [x, weight if affine != "none" else None, bias if affine == "both" else None]
    assert op.attr("axis") == 2
    assert op.attr("eps") == pytest.approx(1e-5)
    assert graph.outputs == [op.output]


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_rms_norm_is_recognised(spelling: str) -> None:
    b = Builder()
    x = b.input(2, 7, 16)
    y = normalised(b, x, x, spelling)
    weight = b.param(16)
    graph = b.output(b.linear(b.mul(y, weight), 4))
    recognise(graph)
    assert kinds(graph) == [K.RMS_NORM, K.LINEAR]
    assert the(graph, K.RMS_NORM).inputs == [x, weight]


def test_rms_norm_with_casts_around_is_one_op() -> None:
    b = Builder()
    x = b.input(2, 7, 16, dtype="float16")
    wide = b.op(K.CAST, x, dtype="float32")
    y = b.mul(wide, b.op(K.RSQRT, b.add(b.mean(b.op(K.POW, wide, 2.0), 2), 1e-6)))
    weight = b.param(16)
    graph = b.output(b.mul(weight, b.op(K.CAST, y, dtype="float16")))
    graph.ops[-1].output.dtype = "float16"
    recognise(graph)
    assert kinds(graph) == [K.RMS_NORM]
    assert the(graph, K.RMS_NORM).inputs == [x, weight]


def test_rms_norm_of_grouped_rows_is_no_group_norm() -> None:
    b = Builder()
    rows = b.reshape(b.input(2, 4, 8), 2, 2, 16)
    squares = b.mean(b.mul(rows, rows), 2)
    normed = b.mul(rows, rstd(b, squares, "rsqrt"))
    graph = b.output(b.reshape(normed, 2, 4, 8))
    recognise(graph)
    assert kinds(graph) == [K.RESHAPE, K.RMS_NORM, K.RESHAPE]


def test_rms_norm_whose_weight_is_one_plus_a_parameter_keeps_the_sum_outside() -> None:
    b = Builder()
    x = b.input(2, 7, 16)
    weight = b.add(b.param(16), 1.0)
    graph = b.output(b.mul(normalised(b, x, x, "rsqrt"), weight))
    recognise(graph)
    assert kinds(graph) == [K.ADD, K.RMS_NORM]
    assert the(graph, K.RMS_NORM).inputs == [x, weight]


def test_rotary_table_is_not_the_weight_of_a_norm() -> None:
    b = Builder()
    x, positions = b.input(2, 7, 16), b.input(7, 16)
    y = normalised(b, x, x, "rsqrt")
    graph = b.output(b.mul(y, b.op(K.COS, positions)))
    recognise(graph)
    assert set(kinds(graph)) == {K.RMS_NORM, K.COS, K.MUL}
    assert the(graph, K.RMS_NORM).inputs == [x, None]


def test_constant_table_of_two_dimensions_is_not_the_weight_of_a_norm() -> None:
    b = Builder()
    x = b.input(2, 7, 16)
    graph = b.output(b.mul(normalised(b, x, x, "rsqrt"), b.param(7, 16)))
    recognise(graph)
    assert kinds(graph) == [K.RMS_NORM, K.MUL]


def test_norm_over_another_axis_is_a_norm_of_its_own() -> None:
    b = Builder()
    x = b.input(2, 16, 7)
    d = b.sub(x, b.mean(x, 1))
    variance = b.mean(b.op(K.POW, d, 2.0), 1)
    graph = b.output(b.op(K.DIV, d, b.op(K.SQRT, b.add(variance, 1e-5))))
    recognise(graph)
    assert kinds(graph) == [K.NORMALISE]
    assert (graph.ops[0].inputs, graph.ops[0].attr("axes"), graph.ops[0].attr("centred")) == ([x], (1,), True)


def test_norm_whose_variance_is_read_elsewhere_is_left_alone() -> None:
    b = Builder()
    x = b.input(2, 7, 16)
    d = b.sub(x, b.mean(x, 2))
    variance = b.mean(b.op(K.POW, d, 2.0), 2)
    y = b.op(K.DIV, d, b.op(K.SQRT, b.add(variance, 1e-5)))
    graph = b.output(y, variance)
    before = len(graph)
    recognise(graph)
    assert len(graph) == before


def test_sum_of_centred_values_of_another_tensor_is_no_norm() -> None:
    b = Builder()
    x, other = b.input(2, 7, 16), b.input(2, 7, 16)
    d, e = b.sub(x, b.mean(x, 2)), b.sub(other, b.mean(other, 2))
    y = b.op(K.DIV, e, b.op(K.SQRT, b.add(b.mean(b.mul(d, d), 2), 1e-5)))
    graph = b.output(y)
    before = len(graph)
    recognise(graph)
    assert len(graph) == before


# ---- activations ---------------------------------------------------------------------------------------------------


def erf_gate(b: Builder, x: Value, constant: float = 1.0) -> Value:
    return b.add(b.op(K.ERF, b.op(K.DIV, x, math.sqrt(2.0))), constant)


@pytest.mark.parametrize("spelling", ["half first", "half last", "half with gate", "halved", "product"])
def test_gelu_by_erf_is_recognised(spelling: str) -> None:
    b = Builder()
    x = b.linear(b.input(2, 16), 16)
    gate = erf_gate(b, x) if spelling != "product" else b.add(1.0, b.op(K.ERF, b.mul(0.70710677, x)))
    y = {
        "half first": lambda: b.mul(b.mul(0.5, x), gate),
        "half last": lambda: b.mul(b.mul(x, gate), 0.5),
        "half with gate": lambda: b.mul(x, b.mul(gate, 0.5)),
        "halved": lambda: b.op(K.DIV, b.mul(gate, x), 2.0),
        "product": lambda: b.mul(x, b.mul(gate, 0.5)),
    }[spelling]()
    graph = b.output(y)
    recognise(graph)
    assert kinds(graph) == [K.LINEAR, K.GELU]
    assert the(graph, K.GELU).inputs == [x]
    assert the(graph, K.GELU).attr("approximate") == "none"


@pytest.mark.parametrize("cube", ["pow", "products", "factored"])
def test_gelu_by_tanh_is_recognised(cube: str) -> None:
    b = Builder()
    x = b.add(b.input(2, 16), b.input(2, 16))
    if cube == "factored":
        inner = b.mul(b.mul(0.7978845608, x), b.add(1.0, b.mul(0.044715, b.mul(x, x))))
    else:
        power = b.op(K.POW, x, 3.0) if cube == "pow" else b.mul(b.mul(x, x), x)
        inner = b.mul(math.sqrt(2 / math.pi), b.add(x, b.mul(power, 0.044715)))
    graph = b.output(b.mul(b.mul(0.5, x), b.add(b.op(K.TANH, inner), 1.0)))
    recognise(graph)
    assert kinds(graph) == [K.ADD, K.GELU]
    assert the(graph, K.GELU).inputs == [x]
    assert the(graph, K.GELU).attr("approximate") == "tanh"


def test_gelu_with_another_constant_is_left_alone() -> None:
    b = Builder()
    x = b.input(2, 16)
    graph = b.output(b.mul(b.mul(0.5, x), erf_gate(b, x, constant=0.9)))
    before = len(graph)
    recognise(graph)
    assert len(graph) == before


def test_gelu_gate_on_another_value_is_left_alone() -> None:
    b = Builder()
    x, other = b.input(2, 16), b.input(2, 16)
    graph = b.output(b.mul(b.mul(0.5, other), erf_gate(b, x)))
    before = len(graph)
    recognise(graph)
    assert len(graph) == before


def test_silu_is_recognised() -> None:
    b = Builder()
    x = b.input(2, 16)
    graph = b.output(b.mul(b.op(K.SIGMOID, x), x))
    recognise(graph)
    assert kinds(graph) == [K.SILU]


def test_sigmoid_gate_on_another_value_is_no_silu() -> None:
    b = Builder()
    x, other = b.input(2, 16), b.input(2, 16)
    graph = b.output(b.mul(b.op(K.SIGMOID, x), other))
    recognise(graph)
    assert kinds(graph) == [K.SIGMOID, K.MUL]


def test_sigmoid_that_is_also_an_output_is_no_silu() -> None:
    b = Builder()
    x = b.input(2, 16)
    gate = b.op(K.SIGMOID, x)
    graph = b.output(b.mul(gate, x), gate)
    recognise(graph)
    assert kinds(graph) == [K.SIGMOID, K.MUL]


def test_mish_is_recognised() -> None:
    b = Builder()
    x = b.input(2, 16)
    graph = b.output(b.mul(x, b.op(K.TANH, b.op(K.SOFTPLUS, x))))
    recognise(graph)
    assert kinds(graph) == [K.MISH]


@pytest.mark.parametrize("spelling", ["x·c/6", "x·(c/6)", "hardsigmoid"])
def test_hardswish_is_recognised(spelling: str) -> None:
    b = Builder()
    x = b.input(2, 16)
    clip = b.op(K.CLIP, b.add(x, 3.0), min=0.0, max=6.0)
    y = {
        "x·c/6": lambda: b.op(K.DIV, b.mul(x, clip), 6.0),
        "x·(c/6)": lambda: b.mul(x, b.mul(clip, 1 / 6)),
        "hardsigmoid": lambda: b.mul(x, b.op(K.HARDSIGMOID, x)),
    }[spelling]()
    graph = b.output(y)
    recognise(graph)
    the(graph, K.HARDSWISH)


def test_hardsigmoid_is_recognised() -> None:
    b = Builder()
    x, features = b.input(2, 16), b.input(2, 16)
    gate = b.op(K.DIV, b.op(K.CLIP, b.add(x, 3.0), min=0.0, max=6.0), 6.0)
    graph = b.output(b.mul(features, gate))
    recognise(graph)
    assert kinds(graph) == [K.HARDSIGMOID, K.MUL]
    assert the(graph, K.HARDSIGMOID).attr("alpha") == pytest.approx(1 / 6)


def test_clipped_sum_is_no_hardsigmoid() -> None:
    b = Builder()
    graph = b.output(b.op(K.CLIP, b.add(b.input(2, 16), 3.0), min=0.0, max=6.0))
    recognise(graph)
    assert kinds(graph) == [K.ADD, K.CLIP]


# ---- linear --------------------------------------------------------------------------------------------------------


def test_bias_added_after_a_linear_joins_it() -> None:
    b = Builder()
    x, bias = b.input(2, 7, 16), b.param(8)
    graph = b.output(b.add(bias, b.linear(x, 8, bias=False)))
    recognise(graph)
    assert kinds(graph) == [K.LINEAR]
    assert the(graph, K.LINEAR).inputs[2] is bias


@pytest.mark.parametrize("why", ["second bias", "table", "scaled", "read twice"])
def test_sum_that_is_no_bias_stays(why: str) -> None:
    b = Builder()
    product = b.linear(b.input(2, 7, 16), 8, bias=why == "second bias")
    other = b.param(7, 8) if why == "table" else b.param(8)
    y = b.add(product, other, scales=(1.0, 2.0) if why == "scaled" else ())
    graph = b.output(y, product) if why == "read twice" else b.output(y)
    recognise(graph)
    assert kinds(graph) == [K.LINEAR, K.ADD]


# ---- attention -----------------------------------------------------------------------------------------------------


def qkv(b: Builder) -> tuple[Value, Value, Value]:
    return b.input(2, 4, 7, 8, name="q"), b.input(2, 4, 9, 8, name="k"), b.input(2, 4, 9, 8, name="v")


@pytest.mark.parametrize("spelling", ["plain", "div", "mul", "both", "mask", "where"])
def test_softmax_attention_is_recognised(spelling: str) -> None:
    b = Builder()
    q, k, v = qkv(b)
    mask = b.input(2, 1, 7, 9, dtype="bool" if spelling == "where" else "float32")
    left, right = q, b.permute(k, 0, 1, 3, 2)
    if spelling == "both":
        left, right = b.mul(q, 8**-0.25), b.mul(right, 8**-0.25)
    scores = b.matmul(left, right)
    if spelling == "div":
        scores = b.op(K.DIV, scores, math.sqrt(8))
    elif spelling not in ("plain", "both"):
        scores = b.mul(scores, 8**-0.5)
    if spelling == "mask":
        scores = b.add(scores, mask)
    if spelling == "where":
        scores = b.op(K.WHERE, mask, scores, float("-inf"), shape=scores.shape)
    weights = b.op(K.SOFTMAX, scores, axis=3)
    if spelling == "where":
        weights = b.op(K.WHERE, b.op(K.IS_NAN, weights), 0.0, weights, shape=scores.shape)
    graph = b.output(b.matmul(weights, v))
    recognise(graph)
    op = the(graph, K.ATTENTION)
    assert len(graph) == 1
    assert op.inputs == [q, k, v, mask if spelling in ("mask", "where") else None]
    assert op.attr("scale") == pytest.approx(1.0 if spelling == "plain" else 8**-0.5)


def test_transposition_of_keys_that_was_merged_with_the_splitting_of_heads_is_taken_apart() -> None:
    b = Builder()
    q, source, v = b.input(2, 4, 7, 8), b.input(2, 9, 4, 8), b.input(2, 4, 9, 8)
    scores = b.matmul(q, b.permute(source, 0, 2, 3, 1))
    graph = b.output(b.matmul(b.op(K.SOFTMAX, scores, axis=3), v))
    recognise(graph)
    assert kinds(graph) == [K.PERMUTE, K.ATTENTION]
    permute, op = graph.ops
    assert permute.attr("perm") == (0, 2, 1, 3)
    assert permute.output.shape == (2, 4, 9, 8)
    assert op.inputs == [q, permute.output, v, None]
    assert permute.group == op.group == [permute, op]
    assert permute.native == op.native


def test_reshape_of_the_batch_between_transposition_and_product_is_taken_apart() -> None:
    b = Builder()
    q, source, v = b.input(2, 4, 7, 8), b.input(8, 9, 8), b.input(2, 4, 9, 8)
    keys = b.mul(b.reshape(b.permute(source, 0, 2, 1), 2, 4, 8, 9), 0.5)
    graph = b.output(b.matmul(b.op(K.SOFTMAX, b.matmul(b.mul(q, 0.5), keys), axis=3), v))
    recognise(graph)
    assert kinds(graph) == [K.RESHAPE, K.ATTENTION]
    assert graph.ops[0].output.shape == (2, 4, 9, 8)
    assert the(graph, K.ATTENTION).attr("scale") == pytest.approx(0.25)


def test_reshape_that_regroups_the_keys_themselves_is_left_alone() -> None:
    b = Builder()
    q, source, v = b.input(2, 4, 7, 8), b.input(8, 9, 8), b.input(2, 4, 9, 8)
    keys = b.reshape(b.permute(source, 0, 2, 1), 2, 4, 8, 9)
    keys.producer.inputs[0].shape = (8, 6, 12)  # as if the permutation gave another width
    graph = b.output(b.matmul(b.op(K.SOFTMAX, b.matmul(q, keys), axis=3), v))
    recognise(graph)
    assert K.ATTENTION not in kinds(graph)


def test_several_masks_become_one() -> None:
    b = Builder()
    q, k, v = qkv(b)
    bias, mask = b.input(1, 4, 7, 9), b.input(2, 1, 1, 9)
    scores = b.add(mask, b.add(b.matmul(q, b.permute(k, 0, 1, 3, 2)), bias))
    graph = b.output(b.matmul(b.op(K.SOFTMAX, scores, axis=3), v))
    recognise(graph)
    assert kinds(graph) == [K.ADD, K.ATTENTION]
    total = graph.ops[0]
    assert total.inputs == [bias, mask]
    assert total.output.shape == (2, 4, 7, 9)
    assert the(graph, K.ATTENTION).inputs[3] is total.output


@pytest.mark.parametrize("why", ["axis", "weights returned", "scaled after the mask", "keys not transposed"])
def test_near_attention_is_left_alone(why: str) -> None:
    b = Builder()
    q, k, v = qkv(b)
    scores = b.matmul(q, b.input(2, 4, 8, 9) if why == "keys not transposed" else b.permute(k, 0, 1, 3, 2))
    if why == "scaled after the mask":
        scores = b.mul(b.add(scores, b.input(2, 1, 7, 9)), 0.5)
    weights = b.op(K.SOFTMAX, scores, axis=2 if why == "axis" else 3)
    y = b.matmul(weights, v)
    graph = b.output(y, weights) if why == "weights returned" else b.output(y)
    recognise(graph)
    assert K.ATTENTION not in kinds(graph)


# ---- moves ---------------------------------------------------------------------------------------------------------


def test_two_slices_joined_the_other_way_round_are_a_roll() -> None:
    b = Builder()
    x = b.input("N", 7, 16)
    y = b.concat(b.slice(x, 1, 5, 7), b.slice(x, 1, 0, 5), axis=1)
    graph = b.output(b.relu(y))
    recognise(graph)
    assert kinds(graph) == [K.ROLL, K.RELU]
    rolled = the(graph, K.ROLL)
    assert (rolled.attr("axes"), rolled.attr("shifts"), rolled.output) == ((1,), (2,), y)


@pytest.mark.parametrize("why", ["gap", "overlap", "other axis", "two values", "in order", "read elsewhere"])
def test_near_roll_is_left_alone(why: str) -> None:
    b = Builder()
    x = b.input(2, 8, 8)
    axis = 2 if why == "other axis" else 1
    stop = {"gap": 4, "overlap": 6}.get(why, 5)
    back, front = b.slice(x, axis, 5, 8), b.slice(b.input(2, 8, 8) if why == "two values" else x, axis, 0, stop)
    y = b.concat(*((front, back) if why == "in order" else (back, front)), axis=1)
    graph = b.output(y, back) if why == "read elsewhere" else b.output(y)
    recognise(graph)
    assert kinds(graph) == [K.SLICE, K.SLICE, K.CONCAT]


# ---- the scan ------------------------------------------------------------------------------------------------------


def test_recognised_graphs_stay_in_topological_order_and_are_recognised_once() -> None:
    b = Builder()
    x = b.input(2, 7, 16)
    for _ in range(3):
        d = b.sub(x, b.mean(x, 2))
        y = b.mul(normalised(b, d, d, "div"), b.param(16))
        y = b.add(b.linear(y, 32, bias=False), b.param(32))
        y = b.mul(b.mul(y, 0.5), erf_gate(b, y))
        x = b.add(x, b.linear(y, 16))
    graph = b.output(x)
    recognise(graph)
    assert kinds(graph) == [K.LAYER_NORM, K.LINEAR, K.GELU, K.LINEAR, K.ADD] * 3
    position = {op: index for index, op in enumerate(graph)}
    for op in graph:
        assert op.order == position[op]
        assert all(value.producer is None or position[value.producer] < position[op] for value in op.operands)
    recognise(graph)
    assert len(graph) == 15


@pytest.mark.parametrize("all_inside", [True, False])
def test_operations_that_share_a_native_node_are_covered_together_or_not_at_all(all_inside: bool) -> None:
    b = Builder()
    x = b.relu(b.input(2, 16))
    graph = b.output(b.mul(b.op(K.SIGMOID, x), x))
    group = graph.ops[1:] if all_inside else graph.ops
    for op in group:
        op.group = group
    recognise(graph)
    assert kinds(graph) == ([K.RELU, K.SILU] if all_inside else [K.RELU, K.SIGMOID, K.MUL])


def test_mean_of_what_is_made_out_of_nothing_is_no_norm() -> None:
    b = Builder()
    ones = b.ops(K.FULL, shapes=[(4, 16)], value=1.0).output
    graph = b.output(b.mul(b.input(4, 16), b.mean(ones, 1)))
    recognise(graph)
    assert kinds(graph) == [K.FULL, K.MEAN, K.MUL]
