"""ONNX Runtime's own operators: what each is read as, that standard operators for it give the same numbers, and that a
model which ONNX Runtime optimised has the blocks of the one it was made from."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from rescompile.detection import inspect_graph
from rescompile.graph import Graph
from rescompile.kinds import OpKind as K
from rescompile.onnx_files import load
from rescompile.onnx_serial import in_memory_proto
from rescompile.passes.fuse import Fuse
from rescompile.passes.unfuse import UnfuseAll
from rescompile.rewriting import run_passes
from tests.onnx_models import Array, Const, Fed, fed, graph_of, kinds, rewritten, same
from tests.optimised_models import MODELS, exported, optimised, session

CONTRIB = "com.microsoft"


@dataclass(frozen=True)
class Case:
    op: str
    operands: tuple[Const | Fed | None, ...]
    reads: tuple[K, ...]
    attrs: dict[str, Any] = field(default_factory=dict)
    outputs: tuple[str, ...] = ("y",)
    expect: dict[str, Any] = field(default_factory=dict)  # attributes of the last operation
    domain: str = CONTRIB
    runs: bool = True  # whether ONNX Runtime has a kernel for it on the CPU

    def __str__(self) -> str:
        parts = [self.op, *(f"{name}={value}" for name, value in self.attrs.items()), *self.outputs[1:]]
        shapes = ["x".join(map(str, item.data.shape)) if item is not None else "" for item in self.operands]
        return "-".join([*parts, *shapes]).replace(" ", "")


def built(item: Case | Refused) -> tuple[onnx.ModelProto, dict[str, Array]]:
    infos, tensors, names = [], [], []
    feeds: dict[str, Array] = {}
    for index, operand in enumerate(item.operands):
        name = "" if operand is None else f"i{index}"
        names.append(name)
        if isinstance(operand, Fed):
            feeds[name] = operand.data
            kind = helper.np_dtype_to_tensor_dtype(operand.data.dtype)
            infos.append(helper.make_tensor_value_info(name, kind, operand.data.shape))
        elif operand is not None:
            tensors.append(numpy_helper.from_array(operand.data, name))
    # An output "_" is there and nobody reads it.
    node = helper.make_node(item.op, names, item.outputs, name="node", domain=item.domain, **item.attrs)
    outs = [
        helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in item.outputs if name.strip("_")
    ]
    imports = [helper.make_opsetid("", 17), helper.make_opsetid(CONTRIB, 1)]
    body = helper.make_graph([node], "single", infos, outs, tensors)
    return helper.make_model(body, opset_imports=imports, ir_version=8), feeds


def whole(*shape: int, high: int = 4, dtype: str = "int32") -> Fed:
    return Fed(np.random.default_rng(3).integers(0, high, shape).astype(dtype))


X, SKIP = fed(2, 5, 8), fed(2, 5, 8, seed=9)
ROWS = fed(5, 8)
GAMMA, BETA, BIAS = (Const.random(8, seed=seed) for seed in (2, 3, 4))
IMAGE, KERNEL, SHIFT = fed(2, 3, 6, 6), Const.random(4, 3, 3, 3), Const.random(4)
Z = fed(2, 4, 6, 6, seed=4)
PADS = {"pads": [1, 1, 1, 1]}
QUERY, KEY, VALUE = (fed(2, n, 8, seed=n) for n in (5, 7, 7))
PACKED, PACKED_BIAS = Const.random(8, 24), Const.random(24)
A, B = fed(2, 3, 4, 5), fed(2, 3, 5, 6)
WORDS, PLACES, TYPES = Const.random(9, 8), Const.random(7, 8), Const.random(2, 8)
STREAM = ("y", "", "", "sum")
NORM = {"epsilon": 1e-5}
HEADS = {"num_heads": 2}
_HEADS = (K.RESHAPE, K.PERMUTE)
_ATTENDED = (K.ATTENTION, K.PERMUTE, K.RESHAPE)
_HIDING = (K.GREATER, K.RESHAPE, K.WHERE)

CASES = [
    # norms with a sum
    Case("SkipLayerNormalization", (X, SKIP, GAMMA, BETA), (K.ADD_NORM,), NORM, expect={"axis": 2, "eps": 1e-5}),
    Case("SkipLayerNormalization", (X, SKIP, GAMMA, BETA), (K.ADD_NORM,), NORM, STREAM, {"norm": "layer"}),
    Case("SkipLayerNormalization", (X, SKIP, GAMMA), (K.ADD_NORM,), expect={"eps": 1e-12}),
    Case("SkipLayerNormalization", (X, SKIP, GAMMA, None, BIAS), (K.ADD, K.ADD_NORM), NORM, STREAM),
    Case("SkipLayerNormalization", (X, SKIP, GAMMA, BETA, BIAS), (K.ADD, K.ADD_NORM), NORM),
    Case("SkipLayerNormalization", (ROWS, fed(5, 8, seed=7), GAMMA, BETA), (K.ADD_NORM,), expect={"axis": 1}),
    Case("SkipLayerNormalization", (X, ROWS, GAMMA, BETA), (K.ADD, K.LAYER_NORM), NORM),
    Case("SkipLayerNormalization", (X, fed(1, 5, 8), GAMMA, BETA), (K.ADD, K.LAYER_NORM), NORM, STREAM),
    Case("SkipLayerNormalization", (X, ROWS, GAMMA, BETA, BIAS), (K.ADD, K.ADD, K.LAYER_NORM), NORM, STREAM),
    Case("SkipSimplifiedLayerNormalization", (X, SKIP, GAMMA), (K.ADD_NORM,), NORM, STREAM, {"norm": "rms"}),
    Case("SkipSimplifiedLayerNormalization", (X, SKIP, GAMMA, BIAS), (K.ADD, K.ADD_NORM), NORM, STREAM),
    Case("SkipSimplifiedLayerNormalization", (X, ROWS, GAMMA), (K.ADD, K.RMS_NORM), NORM, STREAM),
    Case("SkipSimplifiedLayerNormalization", (ROWS, ROWS, GAMMA), (K.ADD_NORM,), NORM),
    Case("SimplifiedLayerNormalization", (X, GAMMA), (K.RMS_NORM,), NORM, domain="", expect={"axis": 2}),
    Case("EmbedLayerNormalization", (whole(2, 5), None, WORDS, PLACES, None, GAMMA, BETA),
         (K.EMBEDDING, K.SLICE, K.ADD, K.LAYER_NORM), NORM, ("y", "_")),
    Case("EmbedLayerNormalization", (whole(2, 5), whole(2, 5, high=2), WORDS, PLACES, TYPES, GAMMA, BETA),
         (K.EMBEDDING, K.SLICE, K.ADD, K.EMBEDDING, K.ADD, K.LAYER_NORM), NORM, ("y", "", "sum")),
    Case("EmbedLayerNormalization",
         (whole(2, 5), whole(2, 5, high=2), WORDS, PLACES, TYPES, GAMMA, BETA, None, whole(2, 5)),
         (K.EMBEDDING, K.EMBEDDING, K.ADD, K.EMBEDDING, K.ADD, K.LAYER_NORM), NORM, ("y", "_")),
    Case("GroupNorm", (fed(2, 6, 6, 8), GAMMA, BETA), (K.PERMUTE, K.GROUP_NORM, K.PERMUTE),
         {"groups": 2, "activation": 0}, runs=False),
    Case("GroupNorm", (fed(2, 8, 6, 6), GAMMA, BETA), (K.GROUP_NORM, K.SILU),
         {"groups": 2, "activation": 1, "channels_last": 0}, runs=False),
    Case("SkipGroupNorm", (fed(2, 6, 6, 8), GAMMA, BETA, fed(2, 8), BIAS),
         (K.RESHAPE, K.ADD, K.ADD, K.PERMUTE, K.GROUP_NORM, K.PERMUTE),
         {"groups": 2, "activation": 0}, ("y", "sum"), runs=False),
    # attention
    Case("Attention", (QUERY, PACKED, PACKED_BIAS), (K.LINEAR, K.SLICE, K.SLICE, K.SLICE, *_HEADS * 3, *_ATTENDED),
         HEADS),
    Case("Attention", (QUERY, PACKED, PACKED_BIAS), (K.LINEAR, K.SLICE, K.SLICE, K.SLICE, *_HEADS * 3, *_ATTENDED),
         {**HEADS, "unidirectional": 1, "scale": 0.3}),
    Case("Attention", (QUERY, PACKED, PACKED_BIAS, whole(2, 5, high=2)),
         (K.LINEAR, K.SLICE, K.SLICE, K.SLICE, *_HEADS * 3, *_HIDING, *_ATTENDED), HEADS),
    Case("Attention", (QUERY, PACKED, PACKED_BIAS, whole(2, 5, 5, high=2), None, fed(2, 2, 5, 5)),
         (K.LINEAR, K.SLICE, K.SLICE, K.SLICE, *_HEADS * 3, *_HIDING, K.ADD, *_ATTENDED), HEADS),
    Case("Attention", (QUERY, fed(8, 20), fed(20)),
         (K.MATMUL, K.ADD, K.SLICE, K.SLICE, K.SLICE, *_HEADS * 3, *_ATTENDED),
         {**HEADS, "qkv_hidden_sizes": [8, 8, 4]}),
    Case("MultiHeadAttention", (QUERY, KEY, VALUE), (*_HEADS * 3, *_ATTENDED), HEADS),
    Case("MultiHeadAttention", (QUERY, KEY, fed(2, 7, 4), Const.random(20)),
         (*(K.SLICE, K.ADD, *_HEADS) * 3, *_ATTENDED), {**HEADS, "scale": 0.2}),
    Case("MultiHeadAttention", (QUERY, KEY, VALUE, None, whole(2, 7, high=2), fed(1, 2, 5, 7)),
         (*_HEADS * 3, *_HIDING, K.ADD, *_ATTENDED), HEADS),
    Case("MultiHeadAttention", (QUERY, fed(2, 2, 7, 4), fed(2, 2, 7, 4, seed=8)), (*_HEADS, *_ATTENDED), HEADS),
    # convolutions
    Case("FusedConv", (IMAGE, KERNEL, SHIFT, Z), (K.FUSED_CONV,), {**PADS, "activation": "Relu"},
         expect={"outer": "relu", "inner": "none"}),
    Case("FusedConv", (IMAGE, KERNEL, None, Z), (K.FUSED_CONV,), PADS, expect={"outer": "none"}),
    Case("FusedConv", (IMAGE, KERNEL, SHIFT), (K.CONV,), PADS),
    Case("FusedConv", (IMAGE, KERNEL, SHIFT), (K.FUSED_CONV,), {"activation": "Sigmoid"}, expect={"outer": "sigmoid"}),
    Case("FusedConv", (IMAGE, KERNEL, SHIFT), (K.FUSED_CONV,), {"activation": "Tanh"}, expect={"outer": "tanh"}),
    Case("FusedConv", (IMAGE, KERNEL, SHIFT), (K.FUSED_CONV,),
         {"activation": "Clip", "activation_params": [0.0, 6.0]}, expect={"outer": "relu6"}),
    Case("FusedConv", (IMAGE, KERNEL, SHIFT, Z), (K.FUSED_CONV, K.CLIP),
         {**PADS, "activation": "Clip", "activation_params": [-0.3, 0.4]}, expect={"min": -0.3, "max": 0.4}),
    Case("FusedConv", (IMAGE, KERNEL, SHIFT), (K.CONV, K.LEAKY_RELU),
         {"activation": "LeakyRelu", "activation_params": [0.2]}, expect={"slope": 0.2}),
    Case("FusedConv", (IMAGE, KERNEL, SHIFT), (K.CONV, K.HARDSIGMOID),
         {"activation": "HardSigmoid", "activation_params": [0.3, 0.4]}, expect={"alpha": 0.3, "beta": 0.4}),
    Case("NhwcConv", (fed(2, 6, 6, 3), KERNEL, SHIFT), (K.PERMUTE, K.CONV, K.PERMUTE), PADS, runs=False),
    Case("NhwcFusedConv", (fed(2, 6, 6, 3), KERNEL, SHIFT, fed(2, 6, 6, 4)),
         (K.PERMUTE, K.CONV, K.PERMUTE, K.ADD, K.RELU, K.PERMUTE), {**PADS, "activation": "Relu"}, runs=False),
    # products
    Case("FusedMatMul", (A, B), (K.MATMUL, K.MUL), {"alpha": 0.25}),
    Case("FusedMatMul", (fed(2, 3, 5, 4), fed(2, 3, 6, 5)), (K.PERMUTE, K.PERMUTE, K.MATMUL),
         {"transA": 1, "transB": 1}),
    Case("FusedMatMul", (fed(4, 2, 3, 5), fed(5, 2, 3, 6)), (K.PERMUTE, K.PERMUTE, K.MATMUL),
         {"transBatchA": 1, "transBatchB": 1}),
    Case("FusedMatMul", (fed(5, 2, 3, 4), fed(6, 2, 3, 5)), (K.PERMUTE, K.PERMUTE, K.MATMUL, K.MUL),
         {"transA": 1, "transBatchA": 1, "transB": 1, "transBatchB": 1, "alpha": 0.5}),
    Case("FusedMatMul", (X, Const.random(6, 8)), (K.LINEAR,), {"transB": 1}, expect={"transpose_weight": True}),
    Case("FusedMatMul", (fed(8, 5), Const.random(8, 6)), (K.PERMUTE, K.LINEAR, K.MUL), {"transA": 1, "alpha": 2.0}),
    Case("TransposeMatMul", (A, B), (K.MATMUL, K.MUL), {"alpha": 0.25}),
    Case("FusedGemm", (ROWS, Const.random(6, 8), Const.random(6)), (K.FUSED_LINEAR,),
         {"transB": 1, "activation": "Relu"}, expect={"outer": "relu"}),
    Case("FusedGemm", (ROWS, Const.random(8, 6), Const.random(6)), (K.LINEAR, K.LEAKY_RELU),
         {"activation": "LeakyRelu", "activation_alpha": 0.2}, expect={"slope": 0.2}),
    Case("FusedGemm", (ROWS, Const.random(8, 6), fed(5, 6)), (K.LINEAR, K.ADD, K.TANH),
         {"alpha": 0.5, "beta": 2.0, "activation": "Tanh"}),
    Case("GemmFastGelu", (X, Const.random(8, 6), Const.random(6)), (K.FUSED_LINEAR,), runs=False,
         expect={"outer": "gelu_tanh"}),
    # elementwise
    Case("BiasGelu", (X, BIAS), (K.ADD, K.GELU), expect={"approximate": "none"}),
    Case("FastGelu", (X, BIAS), (K.ADD, K.GELU), expect={"approximate": "tanh"}),
    Case("FastGelu", (X,), (K.GELU,), expect={"approximate": "tanh"}),
    Case("Gelu", (X,), (K.GELU,), expect={"approximate": "none"}),
    Case("QuickGelu", (X,), (K.SILU,), {"alpha": 1.0}),
    Case("QuickGelu", (X,), (K.MUL, K.SIGMOID, K.MUL)),
    Case("BiasAdd", (X, BIAS, SKIP), (K.ADD, K.ADD), runs=False),
    Case("BiasDropout", (X, BIAS, SKIP, Const.scalar(0.2)), (K.ADD, K.ADD), runs=False),
    Case("BiasDropout", (X, BIAS, None, Const.scalar(0.2), Const(np.asarray(True))), (K.ADD, K.DROPOUT), runs=False),
    Case("BiasSoftmax", (fed(2, 2, 5, 7), fed(2, 1, 1, 7)), (K.ADD, K.SOFTMAX),
         {"axis": 3, "is_inner_broadcast": 1}, runs=False),
]  # fmt: skip


@pytest.mark.parametrize("item", CASES, ids=[f"{n}-{item}" for n, item in enumerate(CASES)])
def test_operator_reads_as_kinds_that_standard_operators_compute_alike(item: Case) -> None:
    proto, feeds = built(item)
    graph = graph_of(proto)
    assert tuple(kinds(graph)) == item.reads, graph.notes
    for name, value in item.expect.items():
        found = graph.ops[-1].attr(name)
        assert found == pytest.approx(value) if isinstance(value, float) else found == value, name
    copy = rewritten(graph)
    assert all(node.domain != CONTRIB for node in copy.model.graph)
    if item.runs:
        expected = graph.run(feeds)
        same(expected, copy.run(feeds), rtol=1e-4, atol=1e-5)


@dataclass(frozen=True)
class Refused:
    op: str
    operands: tuple[Const | Fed | None, ...]
    reason: str
    attrs: dict[str, Any] = field(default_factory=dict)
    outputs: tuple[str, ...] = ("y",)
    domain: str = CONTRIB


PAST = fed(2, 2, 2, 3, 4)
REFUSED = [
    Refused("SkipLayerNormalization", (X, SKIP, GAMMA, BETA), "statistics", outputs=("y", "mean")),
    Refused("EmbedLayerNormalization", (whole(2, 5), None, WORDS, PLACES, None, GAMMA, BETA, whole(2, 5)),
            "mask index", outputs=("y", "index")),
    Refused("Attention", (QUERY, PACKED, PACKED_BIAS, whole(2)), "number of tokens", HEADS),
    Refused("Attention", (QUERY, PACKED, PACKED_BIAS, None, PAST), "cache", HEADS, ("y", "present")),
    Refused("Attention", (QUERY, PACKED, PACKED_BIAS), "by their position", {**HEADS, "do_rotary": 1}),
    Refused("MultiHeadAttention", (fed(2, 5, 2, 3, 4),), "packed", HEADS),
    Refused("MultiHeadAttention", (QUERY, KEY, VALUE, None, None, None, fed(2, 2, 3, 4), fed(2, 2, 3, 4)), "cache",
            HEADS),
    Refused("GroupQueryAttention", (QUERY, KEY, VALUE, None, None, whole(2), whole(1)), "only a run knows",
            {**HEADS, "kv_num_heads": 2}),
    Refused("FusedConv", (IMAGE, KERNEL), "activation Selu is not known", {"activation": "Selu"}),
    Refused("FusedGemm", (ROWS, Const.random(8, 6)), "activation Selu is not known", {"activation": "Selu"}),
    Refused("BiasDropout", (X, BIAS, SKIP), "mask is used", outputs=("y", "mask")),
    Refused("BiasSoftmax", (fed(2, 2, 5, 7), fed(2, 2, 5, 7)), "several axes as one", {"is_inner_broadcast": 1}),
    Refused("SimplifiedLayerNormalization", (X, GAMMA), "statistics", outputs=("y", "deviation"), domain=""),
]  # fmt: skip


@pytest.mark.parametrize("item", REFUSED, ids=[f"{item.op}-{item.reason.replace(' ', '-')}" for item in REFUSED])
def test_operator_that_means_more_than_kinds_stays_opaque_with_a_reason(item: Refused) -> None:
    graph = graph_of(built(item)[0])
    assert kinds(graph) == [K.OPAQUE]
    assert any(item.reason in note for note in graph.notes), graph.notes


# ---- whole models ----------------------------------------------------------------------------------------------------

OPTIMISED = [
    *((name, "extended") for name in ("bert", "gpt2", "llama", "vit", "resnet", "mobilenet")),
    *((name, "tool") for name in ("bert", "gpt2", "llama", "vit")),
]


def blocks(graph: Graph) -> list[tuple[Any, ...]]:
    found = inspect_graph(graph).blocks
    return [(block.kind, block.shortcut, block.norm, block.scale is None, block.parent) for block in found]


@pytest.mark.parametrize(("name", "how"), OPTIMISED)
def test_optimised_model_has_the_blocks_of_the_plain_one_and_reads_as_the_same_numbers(name: str, how: str) -> None:
    plain, graph = graph_of(exported(name)), graph_of(optimised(name, how))
    assert any(node.domain for node in graph.model.graph), "the tool fused something"
    assert blocks(graph) == blocks(plain)
    unread = [op.attr("target") for op in graph if op.kind is K.OPAQUE]
    assert unread == [op.attr("target") for op in plain if op.kind is K.OPAQUE], graph.notes
    standard = rewritten(graph)
    assert not any(node.domain == CONTRIB for node in standard.model.graph)
    feeds = {plain.inputs[0].name: MODELS[name]()[1].numpy()}
    same(plain.run(feeds), standard.run(feeds), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["resnet", "mobilenet"])
def test_channels_blocked_for_one_processor_are_looked_through_and_not_rewritten(name: str) -> None:
    graph = graph_of(optimised(name, "all"))
    assert any(node.domain == "com.microsoft.nchwc" for node in graph.model.graph)
    assert blocks(graph) == blocks(graph_of(exported(name)))
    assert any("laid out for one processor" in note and "'extended'" in note for note in graph.notes)
    result = run_passes(graph, [Fuse()], check=False)
    assert not result.applied
    assert result.refused
    assert all("laid out for one processor" in refusal.reason for refusal in result.refused)


@pytest.mark.parametrize(("name", "how"), OPTIMISED)
def test_optimised_model_comes_apart_into_standard_operators(name: str, how: str) -> None:
    plain, graph = graph_of(exported(name)), graph_of(optimised(name, how))
    apart = run_passes(graph, [UnfuseAll()])
    assert apart.verification.ok
    assert {node.domain for node in apart.graph.model.graph} == {""}
    assert blocks(apart.graph) == blocks(plain)
    joins = [
        [rewrite for rewrite in run_passes(each, [Fuse()], check=False).applied if rewrite.pass_name == "fuse-joins"]
        for each in (apart.graph, plain)
    ]
    assert len(joins[0]) == len(joins[1])


@pytest.mark.parametrize(("name", "how"), OPTIMISED)
def test_joins_that_the_optimiser_left_are_fused_and_the_others_stay(name: str, how: str) -> None:
    graph = graph_of(optimised(name, how))
    result = run_passes(graph, [Fuse()], dialect="ort")
    assert result.verification.ok
    assert all(block.fused for block in inspect_graph(result.graph).blocks)
    assert result.graph.unspelled() == {}


# ---- opsets before the standard had the operator ---------------------------------------------------------------------

CENTRED = "m = ReduceMean<axes = [-1]>(s) d = Sub(s, m)"
SCALED = "two = Constant<value_float = 2.0>() q = Pow(d, two) v = ReduceMean<axes = [-1]>(q) "
SCALED += "e = Constant<value_float = 1e-5>() p = Add(v, e) r = Sqrt(p) n = Div(d, r) z = Mul(n, w)"


@pytest.mark.parametrize("norm", ["LayerNormalization", "SimplifiedLayerNormalization"])
def test_norm_in_the_standard_domain_of_an_opset_without_it(norm: str, tmp_path: Path) -> None:
    first = CENTRED if norm == "LayerNormalization" else "d = Identity(s)"
    last = "t = Add(z, b) y = Add(t, x)" if norm == "LayerNormalization" else "y = Add(z, x)"
    text = f"(float[2, 5, 8] x) => (float[2, 5, 8] y) {{ s = MatMul(x, g) {first} {SCALED} {last} }}"
    proto = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["" : 13]> g {text}')
    arrays = {"g": Const.random(8, 8).data, "w": GAMMA.data, "b": BETA.data}
    proto.graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in arrays.items())
    path = tmp_path / "optimised.onnx"
    session(proto, "extended", path)
    graph = load(path)
    assert norm in [node.op_type for node in graph.model.graph if node.domain == ""]
    assert blocks(graph) == blocks(graph_of(proto))
    apart = run_passes(graph, [UnfuseAll()])
    assert apart.verification.ok
    onnx.checker.check_model(in_memory_proto(apart.graph.model))
