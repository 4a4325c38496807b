"""Fusion in both dialects of ONNX: the cases that other tools got wrong, and what becomes of each fused operation.

Outputs are those of the plain model without any optimisation, computed by ONNX Runtime at its default level.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import numpy_helper

import rescompile as rc
from rescompile.errors import GraphError
from rescompile.graph import Graph
from rescompile.kinds import OpKind, Trait
from rescompile.onnx_graph import OnnxGraph
from rescompile.onnx_serial import in_memory_proto
from rescompile.passes.unfuse import UnfuseAll
from rescompile.plans import Plan, Rewrite, region_edit
from rescompile.rewriting import Result, apply_plan, run_passes
from tests.onnx_models import Array, graph_of

DIALECTS = ("functions", "ort")
FUSE = "fuse{merge=false}"  # the branches here are affine, and would become part of the skip
CONTRIB = "com.microsoft"
LEVELS = onnxruntime.GraphOptimizationLevel


def model(text: str, opset: int = 18) -> onnx.ModelProto:
    """`W(2, 3)` in the text stands for a random initializer of that shape, `W(2, 3; 7)` for another one."""
    rng = np.random.default_rng(0)
    tensors: dict[str, Array] = {}
    while (at := text.find("W(")) >= 0:
        end = text.index(")", at)
        spec = text[at + 2 : end]
        name = "w_" + "".join(letter if letter.isalnum() else "_" for letter in spec)
        shape = tuple(int(extent) for extent in spec.split(";")[0].split(","))
        tensors.setdefault(name, (rng.uniform(0.5, 1.5, shape) * rng.choice([-1, 1], shape)).astype(np.float32))
        text = text[:at] + name + text[end + 1 :]
    proto = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["" : {opset}]> g {text}')
    proto.graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in tensors.items())
    onnx.checker.check_model(proto)
    return proto


def inputs_of(graph: Graph) -> dict[str, Array]:
    rng = np.random.default_rng(1)
    shapes = {value.name: [n if isinstance(n, int) else 3 for n in value.shape or ()] for value in graph.inputs}
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def computed(proto: onnx.ModelProto, feeds: dict[str, Array], level: Any = LEVELS.ORT_ENABLE_ALL) -> list[Array]:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = level
    session = onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return list(session.run(None, feeds))


def proto_of(result: Result) -> onnx.ModelProto:
    assert isinstance(result.graph, OnnxGraph)
    return in_memory_proto(result.graph.model)


def operators(result: Result) -> Counter[str]:
    return Counter(node.op_type for node in proto_of(result).graph.node if node.domain == CONTRIB)


def fused(proto: onnx.ModelProto, dialect: str, spec: str = FUSE) -> Result:
    """The result, which computes what the plain model does."""
    graph = graph_of(proto)
    feeds = inputs_of(graph)
    expected = computed(proto, feeds, LEVELS.ORT_DISABLE_ALL)
    result = rc.rewrite(graph, [spec], dialect=dialect)
    assert result.verification.ok
    assert not result.rolled_back
    for a, b in zip(expected, computed(proto_of(result), feeds), strict=True):
        np.testing.assert_allclose(b, a, rtol=1e-5, atol=1e-5 * max(1.0, float(np.abs(a).max())))
    domains = {node.domain for node in proto_of(result).graph.node}
    assert {entry.domain for entry in proto_of(result).opset_import} == domains | {""}
    return result


NORM = "LayerNormalization(s, W(8), W(8; 2))"
TOKENS = "(float[2, 5, 8] x) => (float[2, 5, 8] y)"
IMAGE = "(float[2, 4, 6, 6] x) => (float[2, 4, 6, 6] y)"
CONV = "Conv<pads = [1, 1, 1, 1]>(x, W(4, 4, 3, 3), W(4))"

# A model, what it becomes in ONNX Runtime's operators, and where that is nothing, why it stays a function.
CASES: dict[str, tuple[str, str, str]] = {
    "default attributes": (f"{TOKENS} {{ f = MatMul(x, W(8, 8)) s = Add(f, x) y = {NORM} }}",
                           "SkipLayerNormalization", ""),
    "operands the other way round": (f"{TOKENS} {{ f = MatMul(x, W(8, 8)) s = Add(x, f) y = {NORM} }}",
                                     "SkipLayerNormalization", ""),
    "a sum of the operator Sum": (f"{TOKENS} {{ f = MatMul(x, W(8, 8)) s = Sum(x, f) y = {NORM} }}",
                                  "SkipLayerNormalization", ""),
    "the sum has a second reader": (
        f"{TOKENS} {{ f = MatMul(x, W(8, 8)) s = Add(f, x) n = {NORM} y = Mul(n, s) }}",
        "SkipLayerNormalization", ""),
    "the sum is an output": (
        "(float[2, 5, 8] x) => (float[2, 5, 8] y, float[2, 5, 8] s) "
        f"{{ f = MatMul(x, W(8, 8)) s = Add(f, x) y = {NORM} }}", "SkipLayerNormalization", ""),
    "a bias in the branch, the sum read twice": (
        f"{TOKENS} {{ m = MatMul(x, W(8, 8)) f = Add(m, W(8; 3)) s = Add(f, x) n = {NORM} "
        "y = Mul(s, n) }", "SkipLayerNormalization", ""),
    "symbolic extents": (
        f"(float[N, S, 8] x) => (float[N, S, 8] y) {{ f = MatMul(x, W(8, 8)) s = Add(f, x) y = {NORM} }}",
        "SkipLayerNormalization", ""),
    "extents that go by another name behind the sum": (
        f"(float[N, 5, 8] x) => (float[M, L, 8] y, float[K, 5, 8] s) "
        f"{{ f = MatMul(x, W(8, 8)) s = Add(f, x) y = {NORM} }}", "SkipLayerNormalization", ""),
    "two dimensions": (f"(float[5, 8] x) => (float[5, 8] y) {{ f = MatMul(x, W(8, 8)) s = Add(f, x) y = {NORM} }}",
                       "SkipLayerNormalization", ""),
    "no shift": (f"{TOKENS} {{ f = MatMul(x, W(8, 8)) s = Add(f, x) "
                 "y = LayerNormalization<epsilon = 0.01>(s, W(8)) }", "SkipLayerNormalization", ""),
    "a gamma of three dimensions": (f"{TOKENS} {{ f = MatMul(x, W(8, 8)) s = Add(f, x) "
                                    "y = LayerNormalization(s, W(1, 1, 8), W(1, 1, 8; 2)) }",
                                    "SkipLayerNormalization", ""),
    "an axis that is not the last": (f"{TOKENS} {{ f = MatMul(x, W(8, 8)) s = Add(f, x) "
                                     "y = LayerNormalization<axis = 1>(s, W(5, 8), W(5, 8; 2)) }",
                                     "", "normalises the last axis"),
    "four dimensions": (
        f"(float[2, 3, 5, 8] x) => (float[2, 3, 5, 8] y) {{ f = MatMul(x, W(8, 8)) s = Add(f, x) y = {NORM} }}",
        "", "takes 2 or 3 dimensions, and the sum has 4"),
    "an activation after the sum": (f"{IMAGE} {{ c = {CONV} s = Add(c, x) y = Relu(s) }}", "FusedConv", ""),
    "an activation before the sum": (f"{IMAGE} {{ c = {CONV} r = Relu(c) y = Add(r, x) }}", "",
                                     "its activation comes before the addition"),
    "activations on both sides": (f"{IMAGE} {{ c = {CONV} r = Sigmoid(c) s = Add(x, r) y = Relu(s) }}", "",
                                  "its activation comes before the addition"),
    "no activation": (f"{IMAGE} {{ c = {CONV} y = Add(c, x) }}", "FusedConv", ""),
    "an activation that is not there": (f"{IMAGE} {{ c = {CONV} s = Add(c, x) y = HardSwish(s) }}", "",
                                        "has no hardswish"),
    "bounds": (f"{IMAGE} {{ c = {CONV} s = Add(c, x) l = Constant<value_float = 0.0>() "
               "h = Constant<value_float = 6.0>() y = Clip(s, l, h) }", "FusedConv", ""),
    "groups": (f"{IMAGE} {{ c = Conv<pads = [1, 1, 1, 1], group = 2>(x, W(4, 2, 3, 3)) s = Add(c, x) "
               "y = Tanh(s) }", "FusedConv", ""),
    "a depthwise convolution": (f"{IMAGE} {{ c = Conv<pads = [1, 1, 1, 1], group = 4>(x, W(4, 1, 3, 3), W(4)) "
                                "y = Add(x, c) }", "FusedConv", ""),
    "a convolution of sequences": ("(float[2, 4, 7] x) => (float[2, 4, 7] y) "
                                   "{ c = Conv<pads = [1, 1]>(x, W(4, 4, 3), W(4)) s = Add(c, x) y = Relu(s) }",
                                   "FusedConv", ""),
    "a product of matrices": ("(float[5, 8] x) => (float[5, 8] y) { f = MatMul(x, W(8, 8)) s = Add(f, x) "
                              "y = Relu(s) }", "FusedGemm", ""),
    "a product of matrices with bias and skip": (
        "(float[5, 8] x) => (float[5, 8] y) { f = Gemm(x, W(8, 8), W(8)) s = Add(f, x) y = Relu(s) }", "",
        "a bias and a skip"),
    "a linear of tokens": (f"{TOKENS} {{ m = MatMul(x, W(8, 8)) f = Add(m, W(8)) y = Add(f, x) }}", "",
                           "multiplies matrices, and the input has 3 dimensions"),
}  # fmt: skip


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("name", CASES)
def test_join_is_fused_and_computes_the_same(name: str, dialect: str) -> None:
    text, operator, reason = CASES[name]
    result = fused(model(text), dialect)
    assert [op.has(Trait.FUSED) for op in result.graph if op.kind is not OpKind.OPAQUE].count(True) == 1
    if dialect == "functions":
        assert not operators(result)
        assert result.graph.unspelled() == {}
        return
    assert operators(result) == (Counter([operator]) if operator else Counter())
    assert [reason in told for told in result.graph.unspelled().values()] == ([True] if reason else [])
    assert reason in str(result)


REFUSALS: dict[str, tuple[str, str]] = {
    "extents that may differ": (
        "(float[N, 5, 8] x, float[M, 5, 8] r) => (float[K, 5, 8] y) "
        f"{{ f = MatMul(r, W(8, 8)) s = Add(x, f) y = {NORM} }}", "unknown extent"),
    "a constant behind a grouped convolution": (
        f"{IMAGE} {{ c = Conv<pads = [1, 1, 1, 1], group = 2>(x, W(4, 2, 3, 3)) y = Add(c, W(1, 4, 6, 6)) }}",
        "is a constant"),
    "a sum with itself": (f"{TOKENS} {{ f = MatMul(x, W(8, 8)) s = Add(f, f) y = {NORM} }}", "to itself"),
}  # fmt: skip


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("name", REFUSALS)
def test_join_is_refused_with_a_reason_and_computes_the_same(name: str, dialect: str) -> None:
    text, reason = REFUSALS[name]
    result = fused(model(text), dialect, "fuse{joins=all,merge=false}")
    assert not result.applied
    assert [reason in refusal.reason for refusal in result.refused] == [True]


QUANTISED = """(float[2, 4, 6, 6] x) => (float[2, 4, 6, 6] y) <float q = {{0.05}}, uint8 z = {{128}}> {{
  c = {0} BRANCH {1} y = Relu(s) }}"""
ONE_SIDE = "u = QuantizeLinear(c, q, z) d = DequantizeLinear(u, q, z)"


@pytest.mark.parametrize("dialect", DIALECTS)
def test_sum_of_which_one_side_is_quantised_leaves_the_convolution_out_and_says_so(dialect: str) -> None:
    text = QUANTISED.format(CONV, "s = Add(d, x)").replace("BRANCH", ONE_SIDE)
    result = fused(model(text), dialect)
    told = [*(each.reason for each in result.applied), *(each.reason for each in result.refused)]
    assert ["'d' is quantised on its way to the sum, and the other operand is not" in reason for reason in told] == [
        True
    ]
    assert OpKind.CONV in [op.kind for op in result.graph], "rounding comes between it and the sum"


@pytest.mark.parametrize("dialect", DIALECTS)
def test_skip_that_is_quantised_alone_is_fused_and_told(dialect: str) -> None:
    sides = "u = QuantizeLinear(x, q, z) d = DequantizeLinear(u, q, z)"
    text = QUANTISED.format(CONV, "s = Add(c, d)").replace("BRANCH", sides)
    result = fused(model(text), dialect)
    assert ["'d' is quantised" in each.reason for each in result.applied] == [True]
    assert operators(result) == (Counter(["FusedConv"]) if dialect == "ort" else Counter())


BRANCHED = """(float[2, 5, 8] x, bool b) => (float[2, 5, 8] y) {
  f = MatMul(x, W(8, 8)) s = Add(f, x) n = LayerNormalization(s, W(8), W(8; 2))
  y = If (b) <then_branch = yes () => (float[2, 5, 8] t) { t = Add(n, s) },
              else_branch = no () => (float[2, 5, 8] e) { e = Identity(n) }> }"""


@pytest.mark.parametrize("dialect", DIALECTS)
def test_sum_that_a_body_reads_stays_an_output(dialect: str) -> None:
    proto = model(BRANCHED)
    result = rc.rewrite(graph_of(proto), [FUSE], dialect=dialect)
    assert len(result.applied) == 1
    for flag in (True, False):
        feeds = {"x": np.random.default_rng(0).standard_normal((2, 5, 8)).astype(np.float32), "b": np.asarray(flag)}
        expected = computed(proto, feeds, LEVELS.ORT_DISABLE_ALL)[0]
        np.testing.assert_allclose(computed(proto_of(result), feeds)[0], expected, rtol=1e-5, atol=1e-5)


# ---- element types ---------------------------------------------------------------------------------------------------


def typed(text: str, dtype: str) -> onnx.ModelProto:
    """The model in another element type."""
    proto = model(text.replace("float[", f"{dtype}["))
    kind = {"float16": np.float16, "double": np.float64, "bfloat16": ml_dtypes.bfloat16}[dtype]
    for tensor in proto.graph.initializer:
        array = numpy_helper.to_array(tensor)
        if array.dtype == np.float32:
            tensor.CopyFrom(numpy_helper.from_array(array.astype(kind), tensor.name))
    return proto


@pytest.mark.parametrize(
    ("case", "dtype", "reason"),
    [
        ("default attributes", "float16", ""),
        ("default attributes", "bfloat16", ""),
        ("default attributes", "double", "float32, float16 and bfloat16, and it is float64"),
        ("an activation after the sum", "float16", "float32 only, and it is float16"),
        ("an activation after the sum", "double", "float32 only, and it is float64"),
    ],
)
def test_element_types_without_a_kernel_stay_functions(case: str, dtype: str, reason: str) -> None:
    runs = dtype == "float16" or (case, dtype) == ("default attributes", "double")  # ONNX Runtime, on the CPU
    result = rc.rewrite(graph_of(typed(CASES[case][0], dtype)), [FUSE], verify=runs, dialect="ort")
    assert result.verification.ok == runs
    assert [reason in told for told in result.graph.unspelled().values()] == ([True] if reason else [])
    assert bool(operators(result)) == (not reason)


# ---- regions ---------------------------------------------------------------------------------------------------------

REGIONS: dict[str, tuple[str, str, str]] = {
    "bias, sum and norm": (
        "(float[2, 5, 8] x, float[2, 5, 8] r) => (float[2, 5, 8] y, float[2, 5, 8] s) "
        f"{{ b = Add(x, W(8; 3)) s = Add(b, r) y = {NORM} }}", "SkipLayerNormalization", ""),
    "bias, sum and rms norm": (
        "(float[2, 5, 8] x, float[2, 5, 8] r) => (float[2, 5, 8] y) { b = Add(W(8; 3), x) s = Add(r, b) "
        "two = Constant<value_float = 2.0>() e = Constant<value_float = 1e-5>() q = Pow(s, two) "
        "m = ReduceMean<keepdims = 1>(q, a) v = Add(m, e) d = Sqrt(v) n = Div(s, d) y = Mul(n, W(8)) }",
        "SkipSimplifiedLayerNormalization", ""),
    "a sum within the sum is returned": (
        "(float[2, 5, 8] x, float[2, 5, 8] r) => (float[2, 5, 8] y, float[2, 5, 8] b) "
        f"{{ b = Add(x, W(8; 3)) s = Add(b, r) y = {NORM} }}", "", "one sum of two values and a bias"),
    "three streams": (
        "(float[2, 5, 8] x, float[2, 5, 8] r, float[2, 5, 8] t) => (float[2, 5, 8] y) "
        f"{{ b = Add(x, r) s = Add(b, t) y = {NORM} }}", "", "one sum of two values and a bias"),
    "a skip of all rows": (
        f"(float[2, 5, 8] x, float[5, 8] r) => (float[2, 5, 8] y) {{ s = Add(x, r) y = {NORM} }}",
        "SkipLayerNormalization", ""),
    "a scaled branch": (
        "(float[2, 5, 8] x, float[2, 5, 8] r) => (float[2, 5, 8] y) "
        f"{{ b = Mul(x, W(8; 3)) s = Add(b, r) y = {NORM} }}", "", "adds and normalises only"),
    "gelu of a sum with a bias": (f"{TOKENS} {{ b = Add(x, W(8)) y = Gelu(b) }}", "BiasGelu", ""),
    "gelu by the tangent": (f'{TOKENS} {{ b = Add(W(8), x) y = Gelu<approximate = "tanh">(b) }}', "FastGelu", ""),
    "gelu of a sum of streams": (
        "(float[2, 5, 8] x, float[2, 5, 8] r) => (float[2, 5, 8] y) { b = Add(x, r) y = Gelu(b) }", "",
        "a bias along the last axis"),
    "a scaled product": (
        "(float[2, 5, 8] x, float[2, 7, 8] r) => (float[2, 5, 7] y) { t = Transpose<perm = [0, 2, 1]>(r) "
        "m = MatMul(x, t) c = Constant<value_float = 0.25>() y = Mul(m, c) }", "FusedMatMul", ""),
    "a divided product": (
        "(float[2, 5, 8] x, float[2, 8, 7] r) => (float[2, 5, 7] y) "
        "{ m = MatMul(x, r) c = Constant<value_float = 4.0>() y = Div(m, c) }", "FusedMatMul", ""),
    "a number divided by a product": (
        "(float[2, 5, 8] x, float[2, 8, 7] r) => (float[2, 5, 7] y) "
        "{ m = MatMul(x, r) c = Constant<value_float = 4.0>() y = Div(c, m) }", "", "scales a product by a number"),
    "a sigmoid unit": (f"{TOKENS} {{ c = Constant<value_float = 1.702>() m = Mul(x, c) g = Sigmoid(m) "
                       "y = Mul(g, x) }", "QuickGelu", ""),
    "a leaky activation": (f"{IMAGE} {{ c = {CONV} s = Add(x, c) y = LeakyRelu<alpha = 0.3>(s) }}", "FusedConv", ""),
    "a linear activation": (f"{IMAGE} {{ c = {CONV} s = Add(x, c) y = HardSigmoid<alpha = 0.3>(s) }}", "FusedConv", ""),
    "other bounds": (f"{IMAGE} {{ c = {CONV} s = Add(x, c) l = Constant<value_float = -0.25>() y = Clip(s, l) }}",
                     "FusedConv", ""),
    "nothing that is known": (f"{TOKENS} {{ e = Exp(x) y = Add(e, x) }}", "", "has no operator for exp + add"),
}  # fmt: skip


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("name", REGIONS)
def test_region_that_is_one_operator_becomes_it(name: str, dialect: str) -> None:
    text, operator, reason = REGIONS[name]
    if "ReduceMean" in text:
        text = text.replace("{ b", "{ a = Constant<value_ints = [-1]>() b", 1)
    proto = model(text, 20)
    graph = graph_of(proto)
    edit = region_edit(graph, list(graph), graph.outputs)
    assert not isinstance(edit, str), edit
    plan = Plan(graph.name, graph.ir, [Rewrite("all", "all  →  one", "as asked", (edit,))])
    result = apply_plan(graph, plan, dialect=dialect)
    feeds = inputs_of(graph)
    for a, b in zip(computed(proto, feeds, LEVELS.ORT_DISABLE_ALL), computed(proto_of(result), feeds), strict=True):
        np.testing.assert_allclose(b, a, rtol=2e-5, atol=2e-5)
    assert result.verification.ok
    told = list(result.graph.unspelled().values())
    if dialect == "ort":
        assert operators(result) == (Counter([operator]) if operator else Counter())
        assert [reason in each for each in told] == ([True] if reason else []), told
    else:
        assert not operators(result)


# ---- the dialect as a setting ----------------------------------------------------------------------------------------

CHAIN = (f"{TOKENS} {{ f = MatMul(x, W(8, 8)) s = Add(f, x) n = {NORM} g = MatMul(n, W(8, 8; 2)) t = Add(g, s) "
         "m = LayerNormalization(t, W(8), W(8; 2)) y = Identity(m) }")  # fmt: skip


def test_sum_is_an_output_only_where_somebody_reads_it() -> None:
    result = fused(model(CHAIN), "ort")
    nodes = [node for node in proto_of(result).graph.node if node.domain == CONTRIB]
    assert [[bool(name) for name in node.output] for node in nodes] == [[True, False, False, True], [True]]


def test_saved_model_reads_as_the_same_operations_and_asks_for_nothing_more(tmp_path: Path) -> None:
    result = fused(model(CHAIN), "ort")
    result.save(tmp_path / "fused.onnx")
    again = rc.load(tmp_path / "fused.onnx")
    assert [op.kind for op in again] == [op.kind for op in result.graph]
    assert rc.plan(again, [FUSE], dialect="ort").rewrites == []


def test_unfusing_leaves_no_operator_and_no_import_of_the_runtimes() -> None:
    proto = model(CHAIN)
    result = fused(proto, "ort")
    plain = run_passes(result.graph, [UnfuseAll()])
    assert plain.verification.ok
    assert {entry.domain for entry in proto_of(plain).opset_import} == {""}
    assert Counter(node.op_type for node in proto_of(plain).graph.node) == Counter(
        node.op_type for node in proto.graph.node if node.op_type != "Constant"
    )


def test_model_changes_dialect_and_back() -> None:
    first = fused(model(CHAIN), "ort")
    second = rc.rewrite(first.graph, [], dialect="functions")
    assert second.verification.ok
    assert {node.domain for node in proto_of(second).graph.node} == {"", "rescompile"}
    third = rc.rewrite(second.graph, [], dialect="ort")
    assert operators(third) == operators(first)
    assert {entry.domain for entry in proto_of(third).opset_import} == {"", CONTRIB}
    assert not first.graph.model.functions, "the graph that went in stays as it was"


def test_graph_itself_stays_in_its_own_dialect() -> None:
    graph = graph_of(model(CHAIN))
    before = in_memory_proto(graph.model).SerializeToString()
    rc.rewrite(graph, [FUSE], dialect="ort")
    assert graph.dialect == "functions"
    assert in_memory_proto(graph.model).SerializeToString() == before


def test_model_without_a_join_is_as_it_was_in_either_dialect() -> None:
    proto = model(f"{TOKENS} {{ f = MatMul(x, W(8, 8)) y = Relu(f) }}")
    for dialect in DIALECTS:
        assert proto_of(rc.rewrite(graph_of(proto), [FUSE], dialect=dialect)) == in_memory_proto(graph_of(proto).model)


def test_torch_models_have_no_dialect() -> None:
    graph = rc.capture(torch.nn.Linear(4, 4).eval(), (torch.randn(2, 4),))
    for refused in (rc.rewrite, rc.plan):
        with pytest.raises(GraphError, match="this model is none"):
            refused(graph, [FUSE], dialect="ort")


def test_unknown_dialect_names_the_nearest() -> None:
    with pytest.raises(GraphError, match="did you mean 'functions'"):
        rc.rewrite(graph_of(model(CHAIN)), [FUSE], dialect="function")


def test_result_tells_in_json_what_is_no_operator() -> None:
    result = fused(model(CASES["four dimensions"][0]), "ort")
    told = json.loads(json.dumps(result.to_dict()))["unspelled"]
    assert list(told) == ["y"]
    assert told["y"].endswith("takes 2 or 3 dimensions, and the sum has 4")


def test_command_line_writes_the_dialect(tmp_path: Path) -> None:
    from rescompile.cli import main

    onnx.save(model(CHAIN), tmp_path / "plain.onnx")
    plan, out, again = tmp_path / "p.json", tmp_path / "a.onnx", tmp_path / "b.onnx"
    base = [str(tmp_path / "plain.onnx"), "--dialect", "ort"]
    for arguments in (
        ["rewrite", *base, "--pass", FUSE, "-o", str(out), "--plan-out", str(plan)],
        ["apply", base[0], str(plan), "--dialect", "ort", "-o", str(again)],
    ):
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        assert stop.value.code == 0
    for path in (out, again):
        assert CONTRIB in {node.domain for node in onnx.load(path).graph.node}
