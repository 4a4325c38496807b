"""The fusion passes on graphs in memory: each condition beside the twin that must not fire."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from rescompile.graph import Graph, Value, ValueType
from rescompile.kinds import OpKind
from rescompile.passes import PASSES
from rescompile.passes.fold_batch_norm import FoldBatchNorm
from rescompile.passes.fuse import Fuse
from rescompile.passes.fuse_joins import FuseJoins
from rescompile.plans import Plan
from rescompile.rewriting import make_plan

C = 4
IMAGE = (1, C, 8, 8)
TOKENS = (2, 5, C)


class Build:
    """A graph in memory, one call an operation."""

    def __init__(self, shape: tuple[int | str, ...]) -> None:
        self.graph = Graph("built")
        self.x = self.graph.add_input("x", shape, "float32")
        self.rng = np.random.default_rng(0)

    def weight(self, name: str, *shape: int) -> Value:
        data = self.rng.uniform(0.5, 1.5, shape).astype("float32")
        return self.graph.add_constant(name, shape, "float32", data)

    def op(self, name: str, kind: OpKind, *inputs: Value | None, **attrs: Any) -> Value:
        first = next(value for value in inputs if value is not None)
        return self.graph.add_op(kind, inputs, [(name, ValueType(first.shape, first.dtype))], attrs).output

    def conv(self, name: str, x: Value) -> Value:
        return self.op(name, OpKind.CONV, x, self.weight(f"{name}.weight", C, C, 3, 3), None, pads=(1, 1, 1, 1))

    def norm(self, name: str, x: Value) -> Value:
        stats = [self.weight(f"{name}.{part}", C) for part in ("weight", "bias", "mean", "var")]
        return self.op(name, OpKind.BATCH_NORM, x, *stats, eps=1e-5)

    def linear(self, name: str, x: Value) -> Value:
        return self.op(name, OpKind.LINEAR, x, self.weight(f"{name}.weight", C, C), self.weight(f"{name}.bias", C))

    def layer_norm(self, name: str, x: Value) -> Value:
        weight, bias = self.weight(f"{name}.weight", C), self.weight(f"{name}.bias", C)
        return self.op(name, OpKind.LAYER_NORM, x, weight, bias, axis=len(x.shape or ()) - 1)

    def done(self, *outputs: Value) -> Graph:
        self.graph.set_outputs(outputs)
        self.graph.commit()
        return self.graph


def planned(graph: Graph, item: Any) -> tuple[Plan, Graph, list[str]]:
    plan, after = make_plan(graph, [item])
    return plan, after, [op.kind.value for op in after]


def block(tail: str, *, relu_first: bool = False, swapped: bool = False) -> Graph:
    b = Build(IMAGE)
    y = b.norm("bn2", b.conv("conv2", b.op("relu1", OpKind.RELU, b.norm("bn1", b.conv("conv1", b.x)))))
    if relu_first:
        y = b.op("relu_inner", OpKind.RELU, y)
    y = b.op("add", OpKind.ADD, *((b.x, y) if swapped else (y, b.x)))
    if tail == "relu":
        y = b.op("out", OpKind.RELU, y)
    return b.done(y)


@pytest.mark.parametrize("swapped", [False, True])
def test_resnet_block_becomes_two_convs_with_the_join_inside_the_second(swapped: bool) -> None:
    plan, after, kinds = planned(block("relu", swapped=swapped), Fuse())
    assert kinds == ["conv", "relu", "fused_conv"]
    fused = after.op("out")
    assert (fused.attr("inner"), fused.attr("outer")) == ("none", "relu")
    assert fused.operand("residual") is after.value("x")
    assert not plan.refusals
    assert {rewrite.pass_name for rewrite in plan.rewrites} == {"fold-batch-norm", "fuse-joins"}


def test_relu_before_the_add_is_not_relu_after_it() -> None:
    _, after, _ = planned(block("", relu_first=True), Fuse())
    fused = after.op("add")
    assert (fused.attr("inner"), fused.attr("outer")) == ("relu", "none")


def test_activations_option_takes_the_first_conv_too() -> None:
    _, after, kinds = planned(block("relu"), Fuse(activations=True))
    assert kinds == ["fused_conv", "fused_conv"]
    assert after.op("relu1").operand("residual") is None


def test_folding_computes_the_published_formula() -> None:
    graph = block("relu")
    _, after, _ = planned(graph, FoldBatchNorm())
    weight, gamma, beta, mean, var = (
        graph.data(graph.value(name)).astype("float64")
        for name in ("conv1.weight", "bn1.weight", "bn1.bias", "bn1.mean", "bn1.var")
    )
    factor = gamma / np.sqrt(var + 1e-5)
    np.testing.assert_allclose(
        after.data(after.value("conv1.weight_folded")), weight * factor[:, None, None, None], rtol=1e-6
    )
    np.testing.assert_allclose(after.data(after.value("conv1.bias_folded")), beta - mean * factor, rtol=1e-5)
    assert not after.has_name("bn1.mean"), "the statistics are no longer part of the model"


def test_norm_in_training_is_refused() -> None:
    b = Build(IMAGE)
    stats = [b.weight(part, C) for part in ("weight", "bias", "mean", "var")]
    y = b.op("bn", OpKind.BATCH_NORM, b.conv("conv", b.x), *stats, training=True)
    plan, _, _ = planned(b.done(y), FoldBatchNorm())
    assert not plan.rewrites
    assert "training" in plan.refusals[0].reason


@pytest.mark.parametrize("half", [False, True])
def test_weights_of_16_bits_are_rounded_once_more_only_where_that_is_asked_for(half: bool) -> None:
    graph = block("relu")
    for value in graph.values:
        value.dtype = "float16"
    plan, _, kinds = planned(graph, FoldBatchNorm(half=half))
    assert ("batch_norm" in kinds) != half
    assert half or "rounded once more" in plan.refusals[0].reason


def test_norm_of_a_conv_that_is_read_twice_is_refused() -> None:
    b = Build(IMAGE)
    conv = b.conv("conv", b.x)
    plan, _, _ = planned(b.done(b.norm("bn", conv), conv), FoldBatchNorm())
    assert not plan.rewrites
    assert "'conv' is also read elsewhere" in plan.refusals[0].reason


def test_norm_before_the_conv_is_refused() -> None:
    b = Build(IMAGE)
    plan, _, _ = planned(b.done(b.conv("conv", b.norm("bn", b.x))), FoldBatchNorm())
    assert not plan.rewrites
    assert "a graph input" in plan.refusals[0].reason


def transformer(*, post: bool) -> Graph:
    b = Build(TOKENS)
    inner = b.x if post else b.layer_norm("norm1", b.x)
    h = b.op("gelu", OpKind.GELU, b.linear("up", inner))
    s = b.op("add", OpKind.ADD, b.x, b.linear("down", h))
    if post:
        return b.done(b.layer_norm("norm1", s))
    t = b.layer_norm("norm2", s)
    return b.done(b.op("add2", OpKind.ADD, s, b.linear("second", t)))


def test_post_norm_join_becomes_add_norm() -> None:
    _, after, kinds = planned(transformer(post=True), Fuse())
    assert kinds == ["linear", "gelu", "linear", "add_norm"]
    assert [value.name for value in after.outputs] == ["norm1"]


def test_sum_that_the_next_skip_reads_survives_as_second_output() -> None:
    _, after, kinds = planned(transformer(post=False), Fuse())
    assert kinds == ["layer_norm", "linear", "gelu", "linear", "add_norm", "fused_linear"]
    fused = after.op("norm2")
    assert [value.name for value in fused.outputs] == ["norm2", "add"]
    assert after.op("add2").operand("residual") is after.value("add")


def test_sum_as_graph_output_survives_as_second_output() -> None:
    b = Build(TOKENS)
    s = b.op("add", OpKind.ADD, b.x, b.linear("fc", b.x))
    _, after, kinds = planned(b.done(b.layer_norm("norm", s), s), FuseJoins())
    assert kinds == ["linear", "add_norm"]
    assert [value.name for value in after.outputs] == ["norm", "add"]


def test_two_norms_of_one_sum_fuse_once() -> None:
    b = Build(TOKENS)
    s = b.op("add", OpKind.ADD, b.x, b.linear("fc", b.x))
    _, after, kinds = planned(b.done(b.layer_norm("norm1", s), b.layer_norm("norm2", s)), FuseJoins())
    assert kinds == ["linear", "add_norm", "layer_norm"]
    assert after.op("norm2").inputs[0] is after.value("add")


REFUSED = {"symbolic": "extents that are unknown may differ", "mixed dtype": "dtypes"}


@pytest.mark.parametrize("case", REFUSED)
def test_join_that_no_kernel_takes_is_refused_with_its_reason(case: str) -> None:
    b = Build(TOKENS)
    branch = b.linear("fc", b.x)
    if case == "symbolic":
        b.x.shape = ("N", 5, C)
    if case == "mixed dtype":
        b.x.dtype = "float16"
    plan, _, kinds = planned(b.done(b.op("add", OpKind.ADD, branch, b.x)), FuseJoins(joins="all"))
    assert not plan.rewrites
    assert "add" in kinds
    assert [REFUSED[case] in refusal.reason for refusal in plan.refusals] == [True]


def test_bias_add_is_not_a_join() -> None:
    b = Build(TOKENS)
    plan, _, kinds = planned(b.done(b.op("add", OpKind.ADD, b.linear("fc", b.x), b.weight("bias", *TOKENS))), Fuse())
    assert kinds == ["linear", "add"]
    assert not plan.rewrites


def test_symbolic_extents_with_one_name_are_equal() -> None:
    b = Build(("N", 5, C))
    y = b.op("add", OpKind.ADD, b.linear("fc", b.x), b.x)
    _, _, kinds = planned(b.done(y), FuseJoins(joins="all"))
    assert kinds == ["fused_linear"]


@pytest.mark.parametrize("make", [lambda: block("relu"), lambda: transformer(post=False)])
def test_fusing_twice_is_fusing_once(make: Any) -> None:
    _, once, kinds = planned(make(), Fuse())
    plan, _, again = planned(once, Fuse())
    assert not plan.rewrites
    assert again == kinds


def test_planning_leaves_the_graph_as_it_was() -> None:
    graph = block("relu")
    before = [(op.name, op.kind, [value.name for value in op.operands]) for op in graph]
    planned(graph, Fuse())
    assert [(op.name, op.kind, [value.name for value in op.operands]) for op in graph] == before


def test_plan_goes_through_json_and_applies_to_another_copy() -> None:
    plan, after, kinds = planned(block("relu"), Fuse())
    again = block("relu")
    Plan.from_json(plan.to_json()).apply(again)
    assert [op.kind.value for op in again] == kinds
    np.testing.assert_array_equal(
        again.data(again.value("conv2.weight_folded")), after.data(after.value("conv2.weight_folded"))
    )


def test_catalogue_has_each_pass_under_its_own_name() -> None:
    assert all(name == item.name for name, item in PASSES.items())
