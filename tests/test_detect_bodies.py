"""Blocks inside what operations hold: branches of conditions, bodies of loops, functions, regions that run once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import onnx
import onnx.parser
import pytest
import torch
from torch import nn
from torch._higher_order_ops.associative_scan import associative_scan
from torch._higher_order_ops.map import map as torch_map
from torch._higher_order_ops.scan import scan
from torch._higher_order_ops.while_loop import while_loop
from torch.utils.checkpoint import checkpoint

import rescompile as rc
from rescompile.blocks import Block, Report
from rescompile.detection import explain, inspect_graph
from rescompile.errors import GraphError, RescompileError
from rescompile.onnx_files import capture as capture_onnx


def one(report: Report) -> Block:
    assert len(report.blocks) == 1, report.to_dict()
    return report.blocks[0]


def parsed(text: str) -> rc.Graph:
    model = onnx.parser.parse_model(text)
    onnx.checker.check_model(model)
    return capture_onnx(model)


HEAD = '<ir_version: 10, opset_import: ["" : 18{}]>\n'

# ---- torch ---------------------------------------------------------------------------------------------------------


class Held(nn.Module):
    """A linear, and a forward of its own for each operation that holds graphs."""

    def __init__(self, run: Callable[[nn.Module, torch.Tensor], Any]) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.run = run

    def forward(self, x: torch.Tensor) -> Any:
        return self.run(self.fc, x)


def capture(run: Callable[[nn.Module, torch.Tensor], Any]) -> rc.Graph:
    return rc.capture(Held(run).eval(), torch.randn(3, 4))


def condition(fc: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return torch.cond(x.sum() > 0, lambda x: x + fc(x), lambda x: x.clone(), (x,))


def test_branch_of_cond() -> None:
    report = inspect_graph(capture(condition))
    block = one(report)
    assert (block.path, block.kind, block.shortcut) == ("cond/true_graph_0", "add", "identity")
    assert block.fork_value.role.value == "input"
    assert report.to_dict()["blocks"][0]["path"] == "cond/true_graph_0"
    assert report.summary()["blocks"] == 1
    assert "cond/true_graph_0" in str(report)


def test_parameters_of_a_body_count_once() -> None:
    assert inspect_graph(capture(condition)).parameters == 20


def test_stochastic_depth_as_a_condition_around_the_branch() -> None:
    def run(fc: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return x + torch.cond(x.sum() > 0, lambda x: fc(x), lambda x: torch.zeros_like(x), (x,))

    block = one(inspect_graph(capture(run)))
    assert (block.path, block.branch) == ("", ("sum_1", "gt", "cond"))


def coin(fc: nn.Module, x: torch.Tensor, skipped: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    return torch.cond(torch.rand(()) < 0.8, lambda x: torch.relu(x + fc(x)), skipped, (x,))


def test_coin_that_runs_past_a_block_makes_it_stochastic() -> None:
    block = one(inspect_graph(capture(lambda fc, x: coin(fc, x, torch.relu))))
    assert (block.kind, block.path) == ("stochastic", "cond/true_graph_0")


def test_coin_between_a_block_and_another_branch_leaves_it_a_sum() -> None:
    assert one(inspect_graph(capture(lambda fc, x: coin(fc, x, lambda x: fc(x))))).kind == "add"


def test_coin_that_drops_the_branch_makes_the_block_stochastic() -> None:
    def run(fc: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return x + torch.cond(torch.rand(()) < 0.8, lambda x: fc(x) / 0.8, lambda x: torch.zeros_like(x), (x,))

    assert one(inspect_graph(capture(run))).kind == "stochastic"


def test_condition_on_the_data_is_no_coin() -> None:
    assert one(inspect_graph(capture(condition))).kind == "add"


@pytest.mark.parametrize(
    ("skipped", "kind"), [("s = Identity (x)", "stochastic"), ("s = MatMul (x, w)", "add")], ids=["skips", "works"]
)
def test_if_by_a_number_that_the_model_is_given(skipped: str, kind: str) -> None:
    block = one(
        inspect_graph(
            parsed(
                HEAD.format("")
                + f"""agraph (float[2, 4] x, bool keep) => (float[2, 4] y)
                <float[4, 4] w = {{1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16}}> {{
                    y = If (keep) <
                        then_branch = kept () => (float[2, 4] r) {{ f = MatMul (x, w) r = Add (x, f) }},
                        else_branch = left () => (float[2, 4] s) {{ {skipped} }}
                    >
                }}"""
            )
        )
    )
    assert block.kind == kind


def test_block_in_a_branch_of_cond_has_the_block_around_it_as_parent() -> None:
    def run(fc: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return x + torch.cond(x.sum() > 0, lambda x: fc(x + fc(x)), lambda x: x.clone(), (x,))

    report = inspect_graph(capture(run))
    assert [(block.id, block.parent, block.path) for block in report] == [(0, 1, "cond/true_graph_0"), (1, None, "")]
    assert report.all_branch_ops(report.blocks[1])
    assert report.paths()["log2_count"] > 0


def test_body_of_while_loop() -> None:
    def run(fc: nn.Module, x: torch.Tensor) -> torch.Tensor:
        done = while_loop(lambda i, x: i < 3, lambda i, x: (i + 1, x + fc(x)), (torch.tensor(0), x))
        return done[1]

    block = one(inspect_graph(capture(run)))
    assert block.path == "while_loop/while_loop_body_graph_0"
    assert block.fork_value.role.value == "input"


def test_body_of_scan() -> None:
    def step(carried: torch.Tensor, item: torch.Tensor, fc: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
        state = carried + fc(carried * item)
        return state, state.clone()

    def run(fc: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return scan(lambda carried, item: step(carried, item, fc), x[0], x, dim=0)[1]

    assert one(inspect_graph(capture(run))).path == "scan/scan_combine_graph_0"


def test_body_of_map() -> None:
    block = one(inspect_graph(capture(lambda fc, x: torch_map(lambda row: row + fc(row), x))))
    assert block.path == "map_impl/body_graph_0"


def test_sum_of_associative_scan_is_no_block() -> None:
    def run(fc: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return associative_scan(lambda a, b: a + b, fc(x), dim=0, combine_mode="generic")

    report = inspect_graph(capture(run))
    assert not report.blocks
    assert report.not_residual


def test_checkpoint_is_seen_through() -> None:
    block = one(inspect_graph(capture(lambda fc, x: x + checkpoint(fc, x, use_reentrant=False))))
    assert (block.path, block.fork) == ("", "x")


def test_region_under_autocast_is_seen_through() -> None:
    def run(fc: nn.Module, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = fc(x)
        return x + y

    graph = capture(run)
    block = one(inspect_graph(graph))
    assert (block.path, block.fork, block.module) == ("", "x", "fc")
    assert all(op in graph.ops for op in (*block.branch_ops, block.join_op))


def test_block_inside_a_region_under_autocast_has_its_path() -> None:
    def run(fc: nn.Module, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = x + fc(x)
        return y * 2

    graph = capture(run)
    block = one(inspect_graph(graph))
    assert block.path in {op.name for op in graph}
    assert block.fork not in {value.name for value in graph.values if value.role.value != "input"}


def test_join_in_a_region_with_its_fork_outside() -> None:
    def run(fc: nn.Module, x: torch.Tensor) -> torch.Tensor:
        y = fc(x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            z = x + y
        return z * 2

    graph = capture(run)
    block = one(inspect_graph(graph))
    assert (block.path, block.fork, block.branch) == ("", "x", ("linear",))
    assert block.join_op in graph.ops
    assert block.join_op.inputs[block.skip_index] is block.fork_value


def test_nested_graph_module_that_is_called() -> None:
    inner = torch.fx.symbolic_trace(Held(lambda fc, x: x + fc(x)).eval())
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    first = graph.call_module("inner", (x,))
    graph.output(graph.call_module("inner", (first,)))
    outer = torch.fx.GraphModule({"inner": inner}, graph)
    report = inspect_graph(rc.capture(outer, torch.randn(3, 4)))
    assert [block.path for block in report] == ["inner", "inner_1"]
    assert report.parameters == 20


def test_branches_that_hold_no_block() -> None:
    report = inspect_graph(capture(lambda fc, x: torch.cond(x.sum() > 0, lambda x: fc(x) + 1, lambda x: fc(x), (x,))))
    assert not report.blocks
    assert [(entry.path, entry.reason.split(":")[0]) for entry in report.not_residual] == [
        ("cond/true_graph_0", "constant")
    ]


def test_fusing_leaves_bodies_as_they_are() -> None:
    result = rc.rewrite(capture(condition), ["fuse"])
    assert not result.applied
    assert [(refusal.where, "inside an operation" in refusal.reason) for refusal in result.refused] == [
        ("cond/true_graph_0/add", True)
    ]
    assert one(inspect_graph(result.graph)).path == "cond/true_graph_0"


# ---- --why ---------------------------------------------------------------------------------------------------------


def test_why_finds_a_node_of_a_body_by_path_and_by_its_name_where_that_is_unique() -> None:
    graph = capture(condition)
    report = inspect_graph(graph)
    by_path = explain(graph, report, "cond/true_graph_0/add")
    assert "is the join of block 0" in by_path
    assert explain(graph, report, "add") == by_path
    assert "'cond' holds block 0" in explain(graph, report, "cond")


def test_why_asks_for_the_path_where_a_name_is_not_unique() -> None:
    graph = capture(
        lambda fc, x: torch.cond(x.sum() > 0, lambda x: x + fc(x), lambda x: x + fc(fc(x)), (x,)),
    )
    with pytest.raises(GraphError, match="say which, 'cond/true_graph_0/add', 'cond/false_graph_0/add'"):
        explain(graph, inspect_graph(graph), "add")


# ---- ONNX ----------------------------------------------------------------------------------------------------------

BRANCHES = (
    HEAD.format("")
    + """g (float[N, 4] x, bool p, float[4, 4] w) => (float[N, 4] y)
    {{
      h = Relu(x)
      y = If (p) <
        then_branch = t () => (float[N, 4] a) {{ f = MatMul(h, {weight})  a = Add(h, f) }},
        else_branch = e () => (float[N, 4] b) {{ b = Identity(h) }}
      >
    }}"""
)


def test_branch_of_if_that_captures_the_stream() -> None:
    graph = parsed(BRANCHES.format(weight="w"))
    block = one(inspect_graph(graph))
    assert block.path.endswith("/then_branch")
    assert (block.fork, block.join, block.branch) == ("h", "a", ("f",))
    assert [op.name for op in graph] == ["h", "y"]


def test_parameters_of_a_branch_count_once() -> None:
    text = """
    g (float[N, 4] x, bool p) => (float[N, 4] y) <float[4, 4] w = {1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16}>
    {
      h = MatMul(x, w)
      y = If (p) <
        then_branch = t () => (float[N, 4] a) <float[4] own = {1,2,3,4}> {
            f = MatMul(h, w)  s = Mul(f, own)  a = Add(h, s) },
        else_branch = e () => (float[N, 4] b) { b = MatMul(h, w) }
      >
    }"""
    report = inspect_graph(parsed(HEAD.format("") + text))
    assert report.parameters == 20
    block = one(report)
    assert block.branch_ops[0].kind.value == "linear"
    assert block.scale is not None
    assert (block.scale.type, block.scale.factor) == ("vector", "own")


def test_body_of_loop_that_carries_the_stream() -> None:
    text = """
    g (float[N, 4] x, float[4, 4] w, int64 n, bool c) => (float[N, 4] y)
    {
      y = Loop (n, c, x) <
        body = b (int64 i, bool go, float[N, 4] s) => (bool on, float[N, 4] t) {
            on = Identity(go)  f = MatMul(s, w)  r = Relu(f)  t = Add(s, r) }
      >
    }"""
    block = one(inspect_graph(parsed(HEAD.format("") + text)))
    assert (block.path, block.fork, block.branch) == ("y/body", "s", ("f", "r"))


def test_body_of_scan_in_onnx() -> None:
    text = """
    g (float[4] x, float[7, 4] rows, float[4, 4] w) => (float[4] y, float[7, 4] ys)
    {
      y, ys = Scan <num_scan_inputs = 1, body = b (float[4] s, float[4] row) => (float[4] t, float[4] u) {
            m = Mul(s, row)  f = MatMul(m, w)  t = Add(s, f)  u = Identity(t) }>
        (x, rows)
    }"""
    block = one(inspect_graph(parsed(HEAD.format("") + text)))
    assert (block.path, block.fork) == ("y/body", "s")


def test_loop_within_a_branch_that_captures_through_both() -> None:
    text = """
    g (float[N, 4] x, float[4, 4] w, int64 n, bool c) => (float[N, 4] y)
    {
      h = Relu(x)
      y = If (c) <
        then_branch = t () => (float[N, 4] a) {
          a = Loop (n, c, h) <body = b (int64 i, bool go, float[N, 4] s) => (bool on, float[N, 4] t) {
                on = Identity(go)  f = MatMul(h, w)  t = Add(h, f) }> },
        else_branch = e () => (float[N, 4] b) { b = Identity(h) }
      >
    }"""
    block = one(inspect_graph(parsed(HEAD.format("") + text)))
    assert (block.path, block.fork) == ("y/then_branch/a/body", "h")


LOCAL = HEAD.format(', "local" : 1')


def test_function_that_only_adds_joins_what_forked_outside() -> None:
    text = """
    g (float[N, 4] x, float[4, 4] w) => (float[N, 4] y)
    {
      f = MatMul(x, w)
      y = local.residual_add(x, f)
    }
    <domain: "local", opset_import: ["" : 18]>
    residual_add (a, b) => (c) { c = Add(a, b) }"""
    graph = parsed(LOCAL + text)
    block = one(inspect_graph(graph))
    assert (block.path, block.fork, block.branch, block.join) == ("", "x", ("f",), "y")
    assert block.join_op is graph.op("y")
    assert block.shape == ("N", 4)


def test_function_that_is_a_block_is_one_at_every_call() -> None:
    text = """
    g (float[N, 4] x) => (float[N, 4] y)
      <float[4, 4] w = {1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16}, float[4] g = {1,2,3,4}>
    {
      h = local.block(x, w, g)
      i = Relu(h)
      y = local.block(i, w, g)
    }
    <domain: "local", opset_import: ["" : 18]>
    block (a, weight, gain) => (c) {
        n = LayerNormalization<axis = -1>(a, gain)
        f = MatMul(n, weight)
        c = Add(a, f)
    }"""
    report = inspect_graph(parsed(LOCAL + text))
    assert [(b.path, b.fork, b.join, b.branch, b.norm) for b in report] == [
        ("h", "a", "c", ("n", "f"), "pre"),
        ("y", "a", "c", ("n", "f"), "pre"),
    ]
    assert report.parameters == 20
    assert [block.shape for block in report] == [("N", 4), ("N", 4)]


def test_nested_calls_and_attributes_that_functions_refer_to() -> None:
    text = """
    g (float[N, 4] x, float[4, 4] w) => (float[N, 4] y)
    {
      y = local.layer <slope = 0.5> (x, w)
    }
    <domain: "local", opset_import: ["" : 18, "local" : 1]>
    layer <slope> (a, w) => (c) {
        b = local.block <s: float = @slope> (a, w)
        c = local.block <s = 1.0> (b, w)
    }
    <domain: "local", opset_import: ["" : 18]>
    block <s: float = 2.0> (a, w) => (c) {
        m = MatMul(a, w)
        r = LeakyRelu <alpha: float = @s> (m)
        c = Add(a, r)
    }"""
    report = inspect_graph(parsed(LOCAL + text))
    assert [block.path for block in report] == ["y/b", "y/c"]
    assert [block.branch_ops[1].attr("slope") for block in report] == [0.5, 1.0]


def test_function_whose_optional_operand_and_output_are_absent() -> None:
    text = """
    g (float[N, 3, 8, 8] x) => (float[N, 3, 8, 8] y) <float[3, 3, 1, 1] w = {1,2,3,4,5,6,7,8,9}>
    {
      y = local.block(x, w)
    }
    <domain: "local", opset_import: ["" : 18]>
    block (a, w, bias) => (c, f) {
        f = Conv(a, w, bias)
        c = Add(a, f)
    }"""
    block = one(inspect_graph(parsed(LOCAL + text)))
    assert (block.path, block.branch) == ("y", ("f",))
    assert block.branch_ops[0].inputs[2] is None


def test_function_that_calls_itself_is_refused() -> None:
    text = """
    g (float[N, 4] x) => (float[N, 4] y) { y = local.again(x) }
    <domain: "local", opset_import: ["" : 18, "local" : 1]>
    again (a) => (c) { c = local.again(a) }"""
    with pytest.raises(RescompileError, match=r"function local::again calls itself"):
        capture_onnx(onnx.parser.parse_model(LOCAL + text))


def test_functions_that_double_at_every_level_stay_opaque() -> None:
    levels = "\n".join(
        f"""<domain: "local", opset_import: ["" : 18, "local" : 1]>
        f{level} (a) => (c) {{ b = local.f{level + 1}(a)  c = local.f{level + 1}(b) }}"""
        for level in range(40)
    )
    text = f"""
    g (float[N, 4] x) => (float[N, 4] y) {{ f = local.f0(x)  y = Add(x, f) }}
    {levels}
    <domain: "local", opset_import: ["" : 18]>
    f40 (a) => (c) {{ c = Relu(a) }}"""
    block = one(inspect_graph(capture_onnx(onnx.parser.parse_model(LOCAL + text))))
    assert block.branch == ("f",)


def test_fused_functions_of_rescompile_stay_what_they_are() -> None:
    text = """
    g (float[N, 3, 8, 8] x) => (float[N, 3, 8, 8] y) <float[3, 3, 1, 1] w = {1,2,3,4,5,6,7,8,9}>
    { t = Tanh(x)  f = Conv(t, w)  y = Add(x, f) }"""
    result = rc.rewrite(parsed(HEAD.format("") + text), ["fuse"])
    assert result.applied
    block = one(inspect_graph(result.graph))
    assert (block.path, block.fused) == ("", True)
