"""What stands beside a fused sum: a skip that is broadcast, what training keeps, bodies that read it, quantisation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import rescompile as rc
from rescompile.fused_region import parse
from rescompile.graph import Graph, Op
from rescompile.kinds import OpKind, Trait
from rescompile.passes.fuse_joins import FuseJoins
from rescompile.rewriting import run_passes
from rescompile.verify import relative_difference
from tests.graphs import Builder
from tests.residual_models import livened

K = OpKind
N, T, C = 2, 5, 8


def captured(model: nn.Module, x: Tensor, ir: str) -> Graph:
    if ir == "fx":
        return rc.capture(model, (x,))
    return rc.capture(torch.onnx.export(model, (x,), dynamo=True, verbose=False, optimize=False))


def fused_ops(graph: Graph) -> list[Op]:
    return [op for op in graph if op.has(Trait.FUSED)]


def steps(op: Op) -> list[str]:
    """The kinds that a fused operation holds, in order."""
    if op.kind is not K.FUSED_REGION:
        return [op.kind.value]
    return [step.kind.value for step in parse(op.attr("steps")).steps if step.kind is not K.FULL]


def same(graph: Graph, other: Graph, x: Tensor, tolerance: float = 1e-6) -> None:
    name = graph.inputs[0].name
    pairs = zip(graph.run({name: x.numpy()}).values(), other.run({name: x.numpy()}).values(), strict=True)
    assert max(relative_difference(a, b) for a, b in pairs) <= tolerance


# ---- a skip that is broadcast ----------------------------------------------------------------------------------------


class Summed(nn.Module):
    """relu(W·x + s), LN(W·x + 2·s), s + W·x read by two, W·s + x: s the mean over tokens, x, or both of them turned."""

    def __init__(self, case: str) -> None:
        super().__init__()
        self.case, self.linear, self.norm = case, nn.Linear(C, C), nn.LayerNorm(C)

    def forward(self, x: Tensor) -> Any:
        s = x.mean(1, keepdim=True)
        if self.case == "activation":
            return F.relu(self.linear(x) + s)
        if self.case == "norm":
            return self.norm(self.linear(x) + 2.0 * s)
        if self.case == "norm and sum":
            y = s + self.linear(x)
            return self.norm(y), y
        if self.case == "fewer axes":
            return F.gelu(x.mean((0, 1)) + self.linear(x))
        return F.relu(self.linear(s) + x)  # the branch is broadcast, so no epilogue of its contraction is the sum


HELD = {
    "activation": ["linear", "add", "relu"],
    "norm": ["mul", "add", "layer_norm"],
    "norm and sum": ["add", "layer_norm"],
    "fewer axes": ["linear", "add", "gelu"],
    "branch": ["add", "relu"],
}


@pytest.mark.parametrize("ir", ["fx", "onnx"])
@pytest.mark.parametrize("case", HELD)
def test_a_skip_of_known_extents_may_be_broadcast(case: str, ir: str) -> None:
    torch.manual_seed(0)
    model, x = Summed(case).eval(), torch.randn(N, T, C)
    graph = captured(model, x, ir)
    result = run_passes(graph, [FuseJoins(joins="all")])
    assert not result.rolled_back
    found = [[kind for kind in steps(op) if kind != "mul"] for op in fused_ops(result.graph)]
    assert found == [[kind for kind in HELD[case] if kind != "mul"]]
    same(graph, result.graph, x)
    assert not run_passes(result.graph, [FuseJoins(joins="all")], check=False).applied, "fusing twice is fusing once"


def test_a_scale_of_what_is_broadcast_is_computed_before_the_kernel() -> None:
    b = Builder()
    x = b.input(N, T, C)
    scaled = b.mul(b.input(N, 1, C), 2.0)
    graph = b.output(b.relu(b.add(b.linear(x, C), scaled, name="join")))
    (region,) = fused_ops(run_passes(graph, [FuseJoins(joins="all")], check=False).graph)
    assert steps(region) == ["linear", "add", "relu"], "in the kernel it would be computed once for each token"


@pytest.mark.parametrize("shape", [(N, "N", C), ("N", 1, C), (N, 1, "N")])
def test_a_skip_of_unknown_extents_is_refused(shape: tuple[int | str, ...]) -> None:
    b = Builder()
    x = b.input(N, T, C)
    total = b.op(K.ADD, b.linear(x, C), b.input(*shape), shape=x.shape, name="join")
    result = run_passes(b.output(b.relu(total)), [FuseJoins(joins="all")], check=False)
    assert not fused_ops(result.graph)
    assert "extents that are unknown may differ" in result.refused[0].reason


def test_a_compiled_broadcast_computes_the_same() -> None:
    pytest.importorskip("tvm")
    torch.manual_seed(0)
    model, x = Summed("activation").eval(), torch.randn(N, T, C)
    fused = run_passes(captured(model, x, "fx"), [FuseJoins(joins="all")]).graph
    torch.testing.assert_close(rc.compile(fused, (x,))(x), model(x), rtol=1e-5, atol=1e-5)


# ---- what training keeps ---------------------------------------------------------------------------------------------


class Dropped(nn.Module):
    """LN(x + ½·dropout(gelu(W·x)))"""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm, self.dropout = nn.Linear(C, C), nn.LayerNorm(C), nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Any:
        return self.norm(x + 0.5 * self.dropout(F.gelu(self.linear(x))))


class Normed(nn.Module):
    """relu(x + ½·BN(W·x)), and LN(BN(x) + W·x)"""

    def __init__(self, *, behind: bool) -> None:
        super().__init__()
        self.behind = behind
        self.linear, self.batch, self.norm = nn.Linear(C, C), nn.BatchNorm1d(T), nn.LayerNorm(C)

    def forward(self, x: Tensor) -> Any:
        if self.behind:
            return self.norm(0.5 * self.batch(x) + self.linear(x))
        return F.relu(x + 0.5 * self.batch(self.linear(x)))


SHORTER: dict[str, tuple[Callable[[], nn.Module], list[str], list[str]]] = {
    "dropout": (Dropped, ["gelu", "mul", "add", "layer_norm"], ["mul", "add", "layer_norm"]),
    "branch": (lambda: Normed(behind=False), ["linear", "batch_norm", "mul", "add", "relu"], ["mul", "add", "relu"]),
    "skip": (lambda: Normed(behind=True), ["batch_norm", "mul", "add", "layer_norm"], ["mul", "add", "layer_norm"]),
}


@pytest.mark.parametrize("case", SHORTER)
def test_where_training_wants_a_part_the_region_is_shorter(case: str) -> None:
    torch.manual_seed(0)
    make, whole, part = SHORTER[case]
    model, x = livened(make()), torch.randn(N, T, C)
    graph = rc.capture(model, (x,))
    assert [steps(op) for op in fused_ops(run_passes(graph, [FuseJoins(joins="all")]).graph)] == [whole]
    result = run_passes(graph, [FuseJoins(joins="all", trainable=True)])
    assert [steps(op) for op in fused_ops(result.graph)] == [part]
    assert not result.refused
    same(graph, result.graph, x)
    fused = result.model
    for each in (model, fused):
        each.train()
        torch.manual_seed(3)
        each.grads = torch.autograd.grad(each(x).square().sum(), list(each.parameters()), allow_unused=True)
    for one, other in zip(model.grads, fused.grads, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


# ---- readers in a body -----------------------------------------------------------------------------------------------


class Conditional(nn.Module):
    """s = x + W·x; y = LN(s) or relu(s); a condition's branches read s, too."""

    def __init__(self, *, norm: bool) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(C, C), nn.LayerNorm(C) if norm else nn.ReLU()

    def forward(self, x: Tensor) -> Any:
        s = x + F.gelu(self.linear(x))
        held = torch.cond(x.sum() > 0, lambda s: s.sin(), lambda s: s.cos() * 2.0, (s,))
        return self.norm(s) + held


@pytest.mark.parametrize("norm", [True, False])
def test_a_sum_that_a_torch_condition_reads_is_returned(norm: bool) -> None:
    torch.manual_seed(0)
    x = torch.randn(N, T, C)
    graph = rc.capture(Conditional(norm=norm).eval(), (x,))
    _returned(graph, x)


def _returned(graph: Graph, x: Tensor) -> None:
    total = next(op for op in graph if op.kind is K.ADD).output
    assert any(graph.bodies(user) for user in total.users)
    result = run_passes(graph, [FuseJoins(joins="all")])
    assert result.verification.ok
    assert not result.rolled_back
    makers = [op for op in fused_ops(result.graph) if total.name in {value.name for value in op.outputs}]
    assert len(makers) == 1, "one fused operation returns the sum"
    readers = makers[0].outputs[[value.name for value in makers[0].outputs].index(total.name)].users
    assert any(result.graph.bodies(user) for user in readers)
    for sign in (1, -1):
        same(graph, result.graph, sign * x.abs())


IF = """m (float[2, 5, 8] x) => (float[2, 5, 8] y) <float[8, 8] w, float[8] g, float[8] h> {
  p = MatMul(x, w)  f = Relu(p)
  s = Add(f, x)
  NORM
  total = ReduceSum <keepdims = 0> (x)  zero = Constant <value = float {0}> ()  c = Greater(total, zero)
  held = If (c) <then_branch = t () => (float[2, 5, 8] a) { a = Sin(s) },
                 else_branch = e () => (float[2, 5, 8] b) { b = Cos(s) }>
  y = Add(n, held) }"""


@pytest.mark.parametrize("norm", ["n = LayerNormalization <axis = -1> (s, g, h)", "n = Sigmoid(s)"])
def test_a_sum_that_an_onnx_branch_reads_from_outside_is_returned(norm: str) -> None:
    onnx = pytest.importorskip("onnx")
    header = '<ir_version: 9, opset_import: ["" : 20]>\n'
    model = onnx.parser.parse_model(header + IF.replace("NORM", norm))
    rng = np.random.default_rng(0)
    shapes = {"w": (C, C), "g": (C,), "h": (C,)}
    del model.graph.initializer[:]
    for name, shape in shapes.items():
        model.graph.initializer.append(onnx.numpy_helper.from_array(rng.standard_normal(shape).astype("f4"), name))
    graph = rc.capture(model)
    _returned(graph, torch.from_numpy(rng.standard_normal((N, T, C)).astype("f4")))


def test_a_sum_inside_a_body_is_left_there_with_a_reason() -> None:
    class Inside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(C, C)

        def forward(self, x: Tensor) -> Tensor:
            return torch.cond(x.sum() > 0, lambda x: F.relu(x + self.linear(x)), lambda x: x.clone(), (x,))

    graph = rc.capture(Inside().eval(), (torch.randn(N, C),))
    result = run_passes(graph, [FuseJoins()])
    assert not result.applied
    assert "graph" in result.refused[0].reason


# ---- quantised neighbours --------------------------------------------------------------------------------------------

ONE_SIDE = """g (float[1, 4, 8, 8] x) => (float[1, 4, 8, 8] y)
  <float s = {0.1}, int8 z = {0}, float[4, 4, 1, 1] w = {1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16}> {
  c = Conv(x, w)
  SIDES
  a = Add(branch, skip)  y = Relu(a) }"""


@pytest.mark.parametrize(
    ("sides", "fused", "told"),
    [
        ("q = QuantizeLinear(c, s, z)  branch = DequantizeLinear(q, s, z)  skip = Identity(x)", False, True),
        ("q = QuantizeLinear(x, s, z)  skip = DequantizeLinear(q, s, z)  branch = Identity(c)", True, True),
        ("skip = Identity(x)  branch = Identity(c)", True, False),
    ],
    ids=["branch", "skip", "neither"],
)
def test_quantisation_on_one_side_only_is_reported(sides: str, fused: bool, told: bool) -> None:
    onnx = pytest.importorskip("onnx")
    header = '<ir_version: 9, opset_import: ["" : 20]>\n'
    graph = rc.capture(onnx.parser.parse_model(header + ONE_SIDE.replace("SIDES", sides)))
    result = run_passes(graph, [FuseJoins(joins="all")])
    assert not result.rolled_back
    convs = [op for op in fused_ops(result.graph) if "conv" in steps(op)[0]]
    assert bool(convs) is fused
    reasons = [each.reason for each in (*result.applied, *result.refused)]
    assert any("is quantised on its way to the sum, and the other operand is not" in r for r in reasons) is told
    assert sum(op.kind in (K.QUANTIZE, K.DEQUANTIZE) for op in result.graph) == (2 if told else 0)
