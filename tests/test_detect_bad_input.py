"""Graphs that are broken, bare, unusual or only half known: one clear sentence, or what can be found in them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import pytest
import torch
import torch.ao.quantization.fx._decomposed
import torch.nn.functional as F
from onnx import helper, numpy_helper
from torch import nn
from torch.export import Dim

import rescompile as rc
from rescompile.blocks import Block, Report
from rescompile.cli import main
from rescompile.detection import explain, inspect_graph
from rescompile.errors import RescompileError
from rescompile.graph import Role
from rescompile.onnx_files import capture as capture_onnx
from rescompile.onnx_ops import nodes_within
from tests.graphs import Builder
from tests.graphs import K as Kind

HEAD = '<ir_version: 10, opset_import: ["" : 18{}]>\n'
WEIGHT = "<float[4, 4] w = {1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16}>"


def parse(text: str, domains: str = "") -> onnx.ModelProto:
    return onnx.parser.parse_model(HEAD.format(domains) + text)


def found(model: onnx.ModelProto) -> Report:
    return inspect_graph(capture_onnx(model))


def one(report: Report) -> Block:
    assert len(report.blocks) == 1, report.to_dict()
    return report.blocks[0]


def written(nodes: list[onnx.NodeProto], inputs: list[Any], outputs: list[Any], **tensors: np.ndarray) -> Any:
    """A model; inputs and outputs are names, then without a type, or (name, shape)."""

    def info(item: Any) -> onnx.ValueInfoProto:
        typed = not isinstance(item, str)
        return helper.make_tensor_value_info(item[0], 1, item[1]) if typed else onnx.ValueInfoProto(name=item)

    constants = [numpy_helper.from_array(array, name) for name, array in tensors.items()]
    graph = helper.make_graph(nodes, "g", list(map(info, inputs)), list(map(info, outputs)), constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


class Run(nn.Module):
    def __init__(self, run: Any) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.run = run

    def forward(self, x: torch.Tensor) -> Any:
        return self.run(self.fc, x)


def captured(run: Any) -> rc.Graph:
    return rc.capture(Run(run).eval(), torch.randn(3, 4))


# ---- what cannot be served -----------------------------------------------------------------------------------------

IF = """g (float[N, 4] x, bool p) => (float[N, 4] y) {{ y = If (p) <
    then_branch = t () => (float[N, 4] c) {{ {then} }},
    else_branch = e () => (float[N, 4] k) {{ k = Identity(x) }} > }}"""

BROKEN = {
    "cycle": (
        "g (float[N, 4] x) => (float[N, 4] y) { a = Add(x, b)  b = Relu(a)  y = Add(a, x) }",
        "has a cycle through",
    ),
    "reads itself": ("g (float[N, 4] x) => (float[N, 4] a) { a = Add(x, a) }", r"cycle through the node 'a' \(Add\)"),
    "cycle in a branch": (IF.format(then="c = Add(x, d)  d = Relu(c)"), "has a cycle"),
    "a branch reads what follows it": (
        """g (float[N, 4] x, bool p) => (float[N, 4] z) { y = If (p) < then_branch = t () => (float[N, 4] c) {
        c = Add(x, z) }, else_branch = e () => (float[N, 4] k) { k = Identity(x) } >  z = Relu(y) }""",
        "has a cycle",
    ),
    "dangling operand": (
        "g (float[N, 4] x) => (float[N, 4] y) { y = Add(x, no) }",
        "reads 'no', which nothing produces",
    ),
    "dangling operand in a branch": (IF.format(then="c = Add(x, no)"), "reads 'no', which nothing produces"),
    "dangling output": ("g (float[N, 4] x) => (float[N, 4] no) { y = Relu(x) }", "output 'no', which nothing produces"),
    "a value made twice": ("g (float[N, 4] x) => (float[N, 4] a) { a = Relu(x)  a = Tanh(x) }", "'a' is redeclared"),
    "an input made again": ("g (float[N, 4] x) => (float[N, 4] x) { x = Relu(x) }", "'x' is redeclared"),
    "unknown standard operator": ("g (float[N, 4] x) => (float[N, 4] y) { y = Foo(x) }", "operator Foo"),
    "unknown domain": ("g (float[N, 4] x) => (float[N, 4] y) { y = my.Op(x) }", "does not import that domain"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_broken_model_is_refused_in_one_sentence(
    what: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    text, message = BROKEN[what]
    path = tmp_path / "model.onnx"
    path.write_bytes(parse(text).SerializeToString())
    with pytest.raises(RescompileError, match=message):
        rc.load(path)
    with pytest.raises(SystemExit) as stop:
        main(["inspect", str(path)])
    assert stop.value.code == 1
    said = capsys.readouterr()
    assert not said.out
    assert "Traceback" not in said.err
    assert said.err.strip()


@pytest.mark.parametrize("inside", [False, True])
def test_constants_that_an_optimiser_left_out_of_a_model_in_memory_are_taken_up(inside: bool) -> None:
    text = IF.format(then="c = Mul(x, x)") if inside else "g (float[N, 4] x) => (float[N, 4] y) { y = Mul(x, x) }"
    model = ir.from_proto(parse(text))
    node = next(node for node in nodes_within(model.graph) if node.op_type == "Mul")
    stray = ir.Value(name="w", const_value=ir.tensor(np.ones(4, np.float32), name="w"))
    node.replace_input_with(1, stray)
    native = capture_onnx(model).model.graph
    kept = native.initializers["w"]
    assert kept is not stray
    assert kept.const_value is stray.const_value
    assert [user for user, _ in kept.uses()] == [one for one in nodes_within(native) if one.op_type == "Mul"]
    assert [user for user, _ in stray.uses()] == [node]
    node.replace_input_with(1, ir.Value(name="no"))
    with pytest.raises(RescompileError, match="reads 'no', which nothing produces"):
        capture_onnx(model)


def test_sparse_tensors_are_refused() -> None:
    sparse = onnx.SparseTensorProto(dims=[4, 4])
    sparse.values.CopyFrom(numpy_helper.from_array(np.ones(2, np.float32), "w"))
    sparse.indices.CopyFrom(numpy_helper.from_array(np.array([0, 5], np.int64), "at"))
    model = parse("g (float[N, 4] x) => (float[N, 4] y) { f = MatMul(x, w)  y = Add(x, f) }")
    kept = onnx.ModelProto()
    kept.CopyFrom(model)
    kept.graph.sparse_initializer.append(sparse)
    node = helper.make_node("Constant", [], ["w"])
    node.attribute.append(helper.make_attribute("sparse_value", sparse))
    model.graph.node.insert(0, node)
    for broken in (kept, model):
        with pytest.raises(RescompileError, match="keeps 'w' as a sparse tensor"):
            capture_onnx(broken)


def test_module_that_fails_is_refused_with_its_line() -> None:
    with pytest.raises(RescompileError, match="fails on the example inputs"):
        captured(lambda fc, x: x + fc(x).nope)


# ---- unusual, and served -------------------------------------------------------------------------------------------


def test_nodes_out_of_order_are_put_in_order() -> None:
    model = parse(f"g (float[N, 4] x) => (float[N, 4] y) {WEIGHT} {{ y = Add(x, f)  f = MatMul(x, w) }}")
    graph = capture_onnx(model)
    assert [op.name for op in graph] == ["f", "y"]
    assert one(inspect_graph(graph)).fork == "x"


def test_nodes_that_share_a_name() -> None:
    model = parse(f"g (float[N, 4] x) => (float[N, 4] y) {WEIGHT} {{ f = MatMul(x, w)  y = Add(x, f) }}")
    for node in model.graph.node:
        node.name = "same"
    assert one(found(model)).join == "y"


BARE = {
    "no nodes": "g () => () { }",
    "output = input": "g (float[N, 4] x) => (float[N, 4] x) { }",
    "output = constant": f"g (float[N, 4] x) => (float[4, 4] w) {WEIGHT} {{ y = Relu(x) }}",
    "output = Constant node": "g () => (float[1] c) { c = Constant <value_floats = [1.0]> () }",
    "one node": "g (float[N, 4] x) => (float[N, 4] y) { y = Relu(x) }",
}


@pytest.mark.parametrize("text", BARE.values(), ids=BARE)
def test_bare_onnx_model(text: str) -> None:
    report = found(parse(text))
    assert not report.blocks
    assert not report.not_residual
    assert report.summary()["blocks"] == 0
    assert report.paths()["log2_count"] == report.paths()["mean_length"] == 0.0
    assert "0 residual blocks" in str(report)


@pytest.mark.parametrize(
    "run", [lambda fc, x: x, lambda fc, x: fc.weight, lambda fc, x: x.relu(), lambda fc, x: ()], ids=range(4)
)
def test_bare_torch_module(run: Any) -> None:
    report = inspect_graph(captured(run))
    assert not report.blocks
    assert not report.not_residual


def test_join_alone_is_x_plus_x() -> None:
    assert "x + x" in found(parse("g (float[N, 4] x) => (float[N, 4] y) { y = Add(x, x) }")).not_residual[0].reason
    assert "x + x" in inspect_graph(captured(lambda fc, x: x + x)).not_residual[0].reason


def test_results_that_nobody_reads() -> None:
    text = f"g (float[N, 4] x) => (float[N, 4] y) {WEIGHT} {{ f = MatMul(x, w)  q = Add(x, f)  y = Relu(x) }}"
    assert one(found(parse(text))).join == "q"


def test_outputs_without_a_name() -> None:
    nodes = [
        helper.make_node("Dropout", ["x"], ["d", ""]),
        helper.make_node("Relu", ["x"], [""]),
        helper.make_node("MatMul", ["d", "w"], ["f"]),
        helper.make_node("Add", ["f", "x"], ["y"]),
    ]
    model = written(nodes, [("x", ["N", 4])], [("y", ["N", 4])], w=np.ones((4, 4), np.float32))
    assert one(found(model)).join == "y"


def test_operator_of_an_unknown_domain_is_a_working_branch() -> None:
    text = "g (float[N, 4] x) => (float[N, 4] y) { f = my.Op <k = 3> (x)  y = Add(f, x) }"
    assert one(found(parse(text, ', "my" : 1'))).branch == ("f",)


@torch.library.custom_op("rescompile_tests::unknown", mutates_args=())
def unknown(x: torch.Tensor) -> torch.Tensor:
    return x.clone()


@unknown.register_fake
def _(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x)


def test_custom_operator_of_torch_is_a_working_branch() -> None:
    assert one(inspect_graph(captured(lambda fc, x: x + unknown(x)))).branch == ("unknown",)


SEQUENCES = {
    "made and read": "g (float[N, 4] x) => (float[N, 4] y) {} {{ s = SequenceConstruct(x, x)"
    "  i = Constant <value_int = 0> ()  e = SequenceAt(s, i)  f = MatMul(e, w)  y = Add(f, x) }}",
    "an input": "g (seq(float[N, 4]) s) => (float[N, 4] y) {} {{ i = Constant <value_int = 0> ()"
    "  e = SequenceAt(s, i)  f = MatMul(e, w)  y = Add(f, e) }}",
    "optional": "g (optional(float[N, 4]) s) => (float[N, 4] y) {} {{ e = OptionalGetElement(s)"
    "  f = MatMul(e, w)  y = Add(f, e) }}",
}


@pytest.mark.parametrize("text", SEQUENCES.values(), ids=SEQUENCES)
def test_sequences_and_optionals(text: str) -> None:
    assert one(found(parse(text.format(WEIGHT)))).join == "y"


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "double"])
def test_other_floating_types_in_onnx(dtype: str) -> None:
    text = f"g ({dtype}[N, 4] x, {dtype}[4, 4] w) => ({dtype}[N, 4] y) {{ f = MatMul(x, w)  y = Add(f, x) }}"
    assert one(found(parse(text))).kind == "add"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_floating_types_in_torch(dtype: torch.dtype) -> None:
    graph = rc.capture(Run(lambda fc, x: x + fc(x)).to(dtype).eval(), torch.randn(3, 4, dtype=dtype))
    assert one(inspect_graph(graph)).kind == "add"


def test_sum_of_ten_thousand_operands() -> None:
    b = Builder()
    x = b.input(2, 4)
    works = b.output(b.op(Kind.ADD, x, *(b.linear(x, 4) for _ in range(9999)), shape=(2, 4)))
    block = one(inspect_graph(works))
    assert (block.kind, block.fork, len(block.branch_ops)) == ("parallel", x.name, 9999)


def test_sum_of_ten_thousand_operands_that_work_nothing() -> None:
    b = Builder()
    x = b.input(2, 4)
    report = inspect_graph(b.output(b.op(Kind.ADD, x, *(b.relu(x) for _ in range(9999)), shape=(2, 4))))
    assert not report.blocks
    assert len(report.not_residual[0].reason) < 500


# ---- quantised models ----------------------------------------------------------------------------------------------

QDQ = """g (float[1, 4, 8, 8] x) => (float[1, 4, 8, 8] y)
  <float s = {0.1}, int8 z = {0}, int8[4, 4, 1, 1] w = {1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16},
   float[4] sw = {1,1,1,1}, int8[4] zw = {0,0,0,0}> {
  xq = QuantizeLinear(x, s, z)  xd = DequantizeLinear(xq, s, z)
  wd = DequantizeLinear <axis = 0> (w, sw, zw)
  c = Conv(xd, wd)  r = Relu(c)
  rq = QuantizeLinear(r, s, z)  rd = DequantizeLinear(rq, s, z)
  d = Conv(rd, wd)  dq = QuantizeLinear(d, s, z)  dd = DequantizeLinear(dq, s, z)
  SKIP
  a = Add(dd, skip)
  aq = QuantizeLinear(a, s, z)  y = DequantizeLinear(aq, s, z) }"""


@pytest.mark.parametrize(
    ("skip", "shortcut"),
    [
        ("skip = Identity(xd)", "identity"),
        ("q2 = QuantizeLinear(x, s, z)  skip = DequantizeLinear(q2, s, z)", "identity"),
        ("p = Conv(xd, wd)  pq = QuantizeLinear(p, s, z)  skip = DequantizeLinear(pq, s, z)", "projection"),
    ],
)
def test_quantised_around_the_add_in_onnx(skip: str, shortcut: str) -> None:
    block = one(found(parse(QDQ.replace("SKIP", skip))))
    assert (block.kind, block.shortcut) == ("add", shortcut)


def test_sum_of_a_value_and_its_quantised_form_is_no_block() -> None:
    text = """g (float[N, 4] x) => (float[N, 4] y) <float s = {0.1}, int8 z = {0}> {
      q = QuantizeLinear(x, s, z)  d = DequantizeLinear(q, s, z)  y = Add(x, d) }"""
    report = found(parse(text))
    assert not report.blocks
    assert "no working branch" in report.not_residual[0].reason


QLINEAR = """g (float[1, 4, 8, 8] x) => (float[1, C, 8, 8] y)
  <float s = {0.1}, uint8 z = {128}, int8[4, 4, 1, 1] w = {1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16},
   float[4] sw = {1,1,1,1}, int8[4] zw = {0,0,0,0}, int32[4] b = {1,2,3,4}, uint8[4, 1, 1] t = {1,2,3,4}> {
  xq = QuantizeLinear(x, s, z)
  c = QLinearConv(xq, s, z, w, sw, zw, s, z, b)  r = com.microsoft.QLinearSigmoid(c, s, z, s, z)
  d = QLinearConv(r, s, z, w, sw, zw, s, z)
  jq = JOIN
  y = DequantizeLinear(jq, s, z) }"""


def quantised_join(join: str, channels: int = 4) -> Report:
    text = QLINEAR.replace("JOIN", join).replace("[1, C, 8, 8]", f"[1, {channels}, 8, 8]")
    return found(parse(text, ', "com.microsoft" : 1'))


@pytest.mark.parametrize(
    ("join", "kind", "equation"),
    [
        ("com.microsoft.QLinearAdd(xq, s, z, d, s, z, s, z)", "add", "x + F(x)"),
        ("com.microsoft.QLinearConcat <axis = 1> (s, z, xq, s, z, d, s, z)", "dense", "[x, F(x)]"),
    ],
)
def test_quantised_join_in_one_operator(join: str, kind: str, equation: str) -> None:
    report = quantised_join(join, 8 if kind == "dense" else 4)
    block = one(report)
    assert (block.kind, block.shortcut, block.fork, block.join) == (kind, "identity", "xq", "jq")
    assert block.branch == ("c", "r", "d")
    assert block.undecided == ()
    assert report.to_dict()["blocks"][0]["equation"] == equation


@pytest.mark.parametrize(
    ("join", "reason"),
    [
        ("com.microsoft.QLinearAdd(d, s, z, t, s, z, s, z)", "bias"),
        ("com.microsoft.QLinearAdd(r, s, z, c, s, z, s, z)", "no working branch"),
    ],
    ids=["a constant", "an activation of the other"],
)
def test_quantised_join_of_no_block_has_a_reason(join: str, reason: str) -> None:
    report = quantised_join(join)
    assert not report.blocks
    assert [each.reason.split(":")[0] for each in report.not_residual] == [reason]


@pytest.mark.parametrize(("second", "reasons"), [("d", ["opaque"]), ("t", [])], ids=["two streams", "a constant"])
def test_opaque_join_whose_shape_nobody_knows_has_a_reason(second: str, reasons: list[str]) -> None:
    report = quantised_join(f"com.microsoft.QLinearMystery(xq, s, z, {second}, s, z, s, z)")
    assert not report.blocks
    assert [each.reason.split(":")[0] for each in report.not_residual] == reasons


def test_quantised_product_is_no_join() -> None:
    report = quantised_join("com.microsoft.QLinearMul(xq, s, z, d, s, z, s, z)")
    assert not report.blocks
    assert not report.not_residual


def test_quantised_around_the_add_in_torch() -> None:
    decomposed = torch.ops.quantized_decomposed

    def coarse(x: torch.Tensor) -> torch.Tensor:
        limits = (0.1, 0, -128, 127, torch.int8)
        return decomposed.dequantize_per_tensor(decomposed.quantize_per_tensor(x, *limits), *limits)

    def run(fc: nn.Module, x: torch.Tensor) -> torch.Tensor:
        x = coarse(x)
        return coarse(coarse(fc(x)) + coarse(x))

    block = one(inspect_graph(captured(run)))
    assert (block.kind, block.shortcut) == ("add", "identity")


# ---- half known ----------------------------------------------------------------------------------------------------


def residual_nodes() -> list[onnx.NodeProto]:
    return [helper.make_node("MatMul", ["x", "w"], ["f"]), helper.make_node("Add", ["x", "f"], ["y"])]


def test_every_extent_symbolic_in_onnx() -> None:
    model = written(residual_nodes(), [("x", ["a", "b", "c"])], [("y", ["d", "e", "f"])], w=np.ones((4, 4), np.float32))
    assert one(found(model)).undecided == ()


def test_shapes_that_nobody_declared_are_said_to_be_unknown() -> None:
    model = written(residual_nodes(), ["x"], ["y"], w=np.ones((4, 4), np.float32))
    graph = capture_onnx(model)
    report = inspect_graph(graph)
    block = one(report)
    assert block.undecided == ("whether 'x' is broadcast: its shape, or the sum's, is not known",)
    assert report.to_dict()["blocks"][0]["undecided"] == list(block.undecided)
    assert "undecided: whether 'x' is broadcast" in explain(graph, report, "y")


def test_known_shapes_leave_nothing_undecided() -> None:
    model = written(residual_nodes(), [("x", ["N", 4])], ["y"], w=np.ones((4, 4), np.float32))
    assert one(found(model)).undecided == ()


def test_kernel_of_unknown_shape_is_said_to_be_undecided() -> None:
    b = Builder()
    x = b.input(1, 4, 8, 8)
    weights = [b.graph.add_constant(f"w_{index}", None, "float32", None) for index in range(3)]
    branch = b.op(
        Kind.CONV, b.relu(b.op(Kind.CONV, x, weights[0], None, shape=x.shape)), weights[1], None, shape=x.shape
    )
    y = b.add(b.op(Kind.CONV, x, weights[2], None, shape=x.shape), branch)
    report = inspect_graph(b.output(y))
    assert not report.blocks
    assert "undecided: whether the kernel of" in report.not_residual[0].reason


def test_convolutions_that_nothing_is_known_of() -> None:
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["s"]),
        helper.make_node("Conv", ["x", "v"], ["f"]),
        helper.make_node("Conv", ["f", "v"], ["g"]),
        helper.make_node("Add", ["s", "g"], ["y"]),
    ]
    report = found(written(nodes, ["x", "w", "v"], ["y"]))
    assert not report.blocks
    reasons = {entry.join: entry.reason for entry in report.not_residual}
    assert "undecided: whether" in reasons["y"]


def test_dtypes_that_nobody_declared() -> None:
    b = Builder()
    x = b.graph.add_input("x", (2, 4), None)
    assert one(inspect_graph(b.output(b.add(x, b.linear(x, 4))))).kind == "add"


def test_every_dimension_dynamic_in_torch() -> None:
    def run(fc: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return x + F.silu(x @ x.transpose(-1, -2)) @ x

    program = torch.export.export(
        Run(run).eval(), (torch.randn(3, 5, 7),), dynamic_shapes=(dict.fromkeys(range(3), Dim.AUTO),)
    )
    block = one(inspect_graph(rc.capture(program)))
    assert block.fork == "x"
    assert block.shape is not None
    assert all(isinstance(extent, str) for extent in block.shape)


def test_traced_without_shapes_says_what_it_could_not_decide() -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.fc(x)

    block = one(inspect_graph(rc.capture(torch.fx.symbolic_trace(Plain().eval()))))
    assert block.undecided


def test_shortcut_that_enlarges_too_makes_no_long_block_where_no_shapes_are_known() -> None:
    b = Builder()
    x = b.input(1, 4, 8, 8)
    wide = [b.op(Kind.INTERPOLATE, value, shape=(1, 4, 16, 16)) for value in (x, b.relu(b.conv(x, 4)))]
    assert one(untyped(b.output(b.conv(b.add(wide[0], b.conv(wide[1], 4)), 4)))).kind == "add"


def untyped_network(up: bool) -> Report:
    """[x, F(x)] with F by a smaller image and back, or not, and nothing known of any shape but the weights'"""
    b = Builder()
    x = b.input(1, 4, 8, 8)
    y = b.relu(b.conv(b.relu(b.conv(x, 4, stride=2 if up else 1)), 4))
    y = b.op(Kind.INTERPOLATE, y, shape=(1, 4, 8, 8)) if up else y
    return untyped(b.output(b.conv(b.concat(x, y), 4)))


def untyped(graph: rc.Graph) -> Report:
    for value in graph.values:
        if value.role is not Role.PARAMETER:
            value.shape = None
    return inspect_graph(graph)


def test_upsampling_without_shapes_makes_a_long_block_and_says_what_is_not_known() -> None:
    block = one(untyped_network(up=True))
    assert block.kind == "long"
    assert any("comes back from another resolution" in text for text in block.undecided)


def test_no_upsampling_without_shapes_makes_no_long_block() -> None:
    block = one(untyped_network(up=False))
    assert (block.kind, block.undecided) == ("dense", ())


# ---- structural surprises ------------------------------------------------------------------------------------------


def test_fork_is_the_value_written_in_place() -> None:
    def run(fc: nn.Module, x: torch.Tensor) -> torch.Tensor:
        h = x * 2
        torch.relu_(h)
        return h + fc(h)

    block = one(inspect_graph(captured(run)))
    assert block.fork_value.producer is not None
    assert block.fork_value.producer.kind is Kind.RELU


SPELLINGS = {
    "sum of a list starts at zero": lambda fc, x: sum([x, fc(x)]),
    "lerp": lambda fc, x: torch.lerp(x, fc(x), 0.5),
    "addcmul": lambda fc, x: torch.addcmul(x, fc(x), x.sigmoid()),
    "addmm": lambda fc, x: torch.addmm(x, x.relu(), fc.weight),
    "x - f(-x)": lambda fc, x: x - fc(-x),
    "stack and sum": lambda fc, x: torch.stack([x, fc(x)]).sum(0),
}


@pytest.mark.parametrize("run", SPELLINGS.values(), ids=SPELLINGS)
def test_spellings_of_a_residual_join(run: Any) -> None:
    assert one(inspect_graph(captured(run))).fork == "x"


@pytest.mark.parametrize(
    "run",
    [
        lambda fc, x: torch.maximum(x, fc(x)),
        lambda fc, x: x.index_add(0, torch.arange(3), fc(x)),
        lambda fc, x: x.scatter_add(0, torch.zeros(3, 4, dtype=torch.int64), fc(x)),
    ],
    ids=["maximum", "index_add", "scatter_add"],
)
def test_other_joins_are_never_silently_absent(run: Any) -> None:
    report = inspect_graph(captured(run))
    assert report.blocks or report.not_residual
