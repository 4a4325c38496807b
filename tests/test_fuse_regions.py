"""Sums as epilogues of contractions, and as one kernel with what is elementwise around them: each condition beside the
twin that must not fire."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import rescompile as rc
from rescompile.fused_region import parse
from rescompile.graph import Graph, Op, Role, Value, ValueType
from rescompile.kinds import OpKind, Trait
from rescompile.passes.fuse_joins import FuseJoins
from rescompile.plans import Plan
from rescompile.rewriting import run_passes
from tests.test_fuse import IMAGE, TOKENS, Build, C, planned

K = OpKind


class Tails(Build):
    """With what stands between a contraction and a sum."""

    def shaped(
        self, name: str, kind: OpKind, shape: tuple[int | str, ...], *inputs: Value | None, **attrs: Any
    ) -> Value:
        first = next(value for value in inputs if value is not None)
        return self.graph.add_op(kind, inputs, [(name, ValueType(shape, first.dtype))], attrs).output

    def number(self, name: str, value: float) -> Value:
        return self.graph.add_constant(name, (), "float32", value, Role.CONSTANT)

    def input(self, name: str, *shape: int | str) -> Value:
        return self.graph.add_input(name, shape, "float32")

    def fixed(self, name: str, x: Value) -> Value:
        """Work that no region holds."""
        return self.op(name, K.RECURRENT, x, mode="lstm")

    def split(self, name: str, x: Value, axis: int, sizes: tuple[int, ...]) -> list[Value]:
        shapes = [tuple(size if at == axis else extent for at, extent in enumerate(x.shape or ())) for size in sizes]
        outputs = [(f"{name}{index}", ValueType(shape, x.dtype)) for index, shape in enumerate(shapes)]
        return self.graph.add_op(K.SPLIT, [x], outputs, {"axis": axis, "sizes": sizes}).outputs


def steps(op: Op) -> list[str]:
    """The kinds that a region computes, in order, numbers left out."""
    return [step.kind.value for step in parse(op.attr("steps")).steps if step.kind is not K.FULL]


def regions(graph: Graph) -> list[Op]:
    return [op for op in graph if op.kind is K.FUSED_REGION]


def fused(graph: Graph, item: Any = None) -> tuple[Op, Plan, list[str]]:
    """The one region that fusing makes, the plan, and the kinds that are left."""
    plan, after, kinds = planned(graph, item or FuseJoins())
    (region,) = regions(after)
    return region, plan, kinds


def refused(graph: Graph, item: Any = None) -> str:
    """The one refusal, of a graph of which nothing is fused."""
    plan, after, _ = planned(graph, item or FuseJoins())
    assert not [op for op in after if op.has(Trait.FUSED)]
    (refusal,) = plan.refusals
    return refusal.reason


ACTIVATIONS = [kind for kind in K if kind.has(Trait.ACTIVATION) and kind is not K.PRELU]


# ---- epilogues: what a chain may hold -------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [*ACTIVATIONS, K.PRELU])
def test_every_activation_before_and_behind_the_sum(kind: OpKind) -> None:
    b = Tails(IMAGE)
    slope = [b.weight("slope", C)] if kind is K.PRELU else []
    y = b.op("inner", kind, b.op("scaled", K.MUL, b.conv("conv", b.x), b.number("half", 0.5)), *slope)
    z = b.op("outer", kind, b.op("add", K.ADD, y, b.x), *slope)
    region, _, kinds = fused(b.done(z))
    assert kinds == ["fused_region"]
    assert steps(region) == ["conv", "mul", kind.value, "add", kind.value]


def test_plain_sum_behind_a_conv_stays_with_the_kernels_that_know_it() -> None:
    b = Tails(IMAGE)
    y = b.op("out", K.RELU, b.op("add", K.ADD, b.conv("conv", b.x), b.x))
    assert planned(b.done(y), FuseJoins())[2] == ["fused_conv"]


def scale_of(b: Tails, case: str, y: Value) -> Value:
    if case == "vector":
        return b.shaped("scaled", K.MUL, TOKENS, b.weight("gamma", C), y)
    if case == "number":
        return b.op("scaled", K.MUL, y, b.number("alpha", 0.2))
    if case == "survival":
        return b.op("scaled", K.DIV, y, b.number("rate", 0.8))
    if case == "bias":
        return b.op("scaled", K.ADD, y, b.weight("shift", C))
    if case == "mask":
        return b.op("scaled", K.MUL, y, b.input("mask", 2, 1, 1))
    return b.op("scaled", K.MUL, b.input("gate", *TOKENS), y)


@pytest.mark.parametrize("case", ["vector", "number", "survival", "bias", "mask", "gate"])
def test_branch_that_is_scaled_shifted_or_gated(case: str) -> None:
    b = Tails(TOKENS)
    region, _, kinds = fused(b.done(b.op("add", K.ADD, b.x, scale_of(b, case, b.linear("fc", b.x)))))
    assert kinds == ["fused_region"]
    assert (steps(region)[0], steps(region)[-1], len(steps(region))) == ("linear", "add", 3)


def test_branch_that_its_scale_makes_larger_is_no_epilogue() -> None:
    b = Tails((2, 1, C))
    y = b.shaped("scaled", K.MUL, TOKENS, b.linear("fc", b.x), b.weight("table", 5, C))
    region, _, kinds = fused(b.done(b.op("add", K.ADD, b.input("stream", *TOKENS), y)), FuseJoins(joins="all"))
    assert kinds == ["linear", "fused_region"]
    assert steps(region) == ["mul", "add"]


def test_factors_of_the_sum_itself() -> None:
    b = Tails(TOKENS)
    region, _, _ = fused(b.done(b.op("add", K.ADD, b.linear("fc", b.x), b.x, scales=(1.0, -0.5))))
    assert steps(region) == ["linear", "add"]


def test_three_streams_in_one_sum() -> None:
    b = Tails(TOKENS)
    y = b.op("add", K.ADD, b.linear("a", b.x), b.x, b.linear("b", b.x))
    region, _, kinds = fused(b.done(y))
    assert kinds == ["linear", "fused_region"]
    assert steps(region) == ["linear", "add"]


def moved(b: Tails, case: str) -> Value:
    """[2, 4, 8, 8] out of a contraction and moves."""
    batch, height = 2, 8
    if case == "permute":
        y = b.linear("fc", b.shaped("last", K.PERMUTE, (batch, height, height, C), b.x, perm=(0, 2, 3, 1)))
        return b.shaped("first", K.PERMUTE, (batch, C, height, height), y, perm=(0, 3, 1, 2))
    if case == "view":
        y = b.linear("fc", b.shaped("flat", K.RESHAPE, (batch, 64, C), b.x))
        return b.shaped("image", K.RESHAPE, (batch, C, height, height), y)
    y = b.conv("conv", b.x)
    if case == "roll":
        return b.op("rolled", K.ROLL, y, axes=(2, 3), shifts=(3, 3))
    if case == "flip":
        return b.op("flipped", K.FLIP, y, axes=(3,))
    wide = b.shaped("wide", K.PAD, (batch, C, height + 2, height), y, pads=(0, 0, 1, 0, 0, 0, 1, 0))
    return b.shaped("cut", K.SLICE, (batch, C, height, height), wide, axes=(2,), starts=(1,), stops=(9,), steps=(1,))


@pytest.mark.parametrize("case", ["permute", "view", "roll", "flip", "pad and cut"])
def test_moves_between_contraction_and_sum_are_index_arithmetic(case: str) -> None:
    b = Tails((2, C, 8, 8))
    region, _, kinds = fused(b.done(b.op("out", K.GELU, b.op("add", K.ADD, b.x, moved(b, case)))))
    assert not {"add", "conv", "linear", "gelu"} & set(kinds)
    assert steps(region)[-2:] == ["add", "gelu"]


def test_value_needed_in_two_orders_is_not_computed_twice() -> None:
    b = Tails(IMAGE)
    y = b.conv("conv", b.x)
    both = b.op("both", K.MUL, y, b.op("rolled", K.ROLL, y, axes=(2,), shifts=(1,)))
    region, _, kinds = fused(b.done(b.op("add", K.ADD, b.x, both)))
    assert kinds == ["conv", "fused_region"]
    assert "conv" not in steps(region)


def test_stream_in_half_precision_is_cast_inside() -> None:
    b = Tails(TOKENS)
    half = ValueType(TOKENS, "float16")
    stream = b.graph.add_input("stream", TOKENS, "float16")
    cast = b.graph.add_op(K.CAST, [b.linear("fc", b.x)], [("cast", half)], {"dtype": "float16"}).output
    y = b.op("add", K.ADD, stream, cast)
    region, _, _ = fused(b.done(y), FuseJoins(joins="all"))
    assert steps(region) == ["linear", "cast", "add"]


def test_types_that_the_model_mixes_without_a_cast_are_not_guessed() -> None:
    b = Tails(TOKENS)
    mask = b.graph.add_input("mask", TOKENS, "bool")
    y = b.op("add", K.ADD, b.x, b.op("masked", K.MUL, b.linear("fc", b.x), mask))
    assert "'masked' (mul) mixes types" in refused(b.done(y))


@pytest.mark.parametrize("kind", ["transposed", "depthwise", "matmul"])
def test_every_contraction_takes_the_sum(kind: str) -> None:
    b = Tails(IMAGE)
    if kind == "transposed":
        y = b.op("up", K.CONV_TRANSPOSE, b.x, b.weight("w", C, C, 3, 3), None, pads=(1, 1, 1, 1))
    elif kind == "depthwise":
        y = b.op("deep", K.CONV, b.x, b.weight("w", C, 1, 3, 3), None, pads=(1, 1, 1, 1), groups=C)
    else:
        y = b.op("mixed", K.MATMUL, b.op("scores", K.SOFTMAX, b.x), b.x)
    y = b.op("scaled", K.MUL, y, b.number("alpha", 0.5))
    region, _, _ = fused(b.done(b.op("add", K.ADD, y, b.x)))
    assert steps(region)[1:] == ["mul", "add"]


def test_norm_in_evaluation_behind_an_activation_is_a_scale_and_a_shift() -> None:
    b = Tails(IMAGE)
    y = b.op("add", K.ADD, b.norm("bn", b.op("gelu", K.GELU, b.conv("conv", b.x))), b.x)
    region, _, _ = fused(b.done(y))
    assert steps(region) == ["conv", "gelu", "batch_norm", "add"]


def test_norm_in_training_is_not() -> None:
    b = Tails(IMAGE)
    stats = [b.weight(part, C) for part in ("weight", "bias", "mean", "var")]
    y = b.op("bn", K.BATCH_NORM, b.op("gelu", K.GELU, b.conv("conv", b.x)), *stats, training=True)
    assert "'bn' (batch_norm), which keeps its kernel" in refused(b.done(b.op("add", K.ADD, y, b.x)))


def test_dropout_in_training_is_not() -> None:
    b = Tails(TOKENS)
    y = b.op("dropout", K.DROPOUT, b.linear("fc", b.x), p=0.5)
    assert "'dropout' draws anew" in refused(b.done(b.op("add", K.ADD, y, b.x)))


def test_skip_has_its_own_scale_and_cast() -> None:
    b = Tails(TOKENS)
    skip = b.op("scaled", K.MUL, b.x, b.number("alpha", 2.0))
    region, _, kinds = fused(b.done(b.op("add", K.ADD, skip, b.linear("fc", b.x))))
    assert kinds == ["fused_region"]
    assert sorted(steps(region)) == ["add", "linear", "mul"]


def test_scaled_skip_that_the_branch_reads_too_is_not_computed_twice() -> None:
    b = Tails(TOKENS)
    skip = b.op("scaled", K.MUL, b.x, b.number("alpha", 2.0))
    _, _, kinds = planned(b.done(b.op("add", K.ADD, skip, b.linear("fc", skip))), FuseJoins())
    assert kinds == ["mul", "fused_linear"]


# ---- epilogues: who else reads --------------------------------------------------------------------------------------


def test_branch_that_others_read_too_is_returned_beside_the_sum() -> None:
    b = Tails(IMAGE)
    first, second = b.split("part", b.conv("wide", b.x), 1, (2, 2))
    h = b.op("relu", K.RELU, b.op("conv", K.CONV, first, b.weight("w1", 2, 2, 3, 3), None, pads=(1, 1, 1, 1)))
    s = b.op("add", K.ADD, h, second)
    z = b.op("next", K.CONV, s, b.weight("w2", 2, 2, 3, 3), None, pads=(1, 1, 1, 1))
    y = b.shaped("cat", K.CONCAT, IMAGE, h, z, axis=1)
    region, _, _ = fused(b.done(y), FuseJoins(concat=False))
    assert [value.name for value in region.outputs] == ["add", "relu"]


def test_gate_that_is_computed_from_the_branch_keeps_the_contraction_out() -> None:
    b = Tails(IMAGE)
    h = b.conv("conv", b.x)
    pooled = b.shaped("pooled", K.MEAN, (1, C, 1, 1), h, axes=(2, 3), keepdims=True)
    gate = b.op("gate", K.SIGMOID, b.op("fc", K.CONV, pooled, b.weight("w", C, C, 1, 1), None))
    y = b.op("out", K.RELU, b.op("add", K.ADD, b.op("excited", K.MUL, h, gate), b.x))
    region, _, kinds = fused(b.done(y))
    assert kinds == ["conv", "mean", "conv", "sigmoid", "fused_region"]
    assert steps(region) == ["mul", "add", "relu"]


def test_activation_among_the_readers_of_the_sum_is_computed_with_it() -> None:
    b = Tails(IMAGE)
    s = b.op("add", K.ADD, b.conv("conv", b.x), b.x)
    h = b.conv("next", b.op("relu", K.RELU, b.norm("bn", s)))
    y = b.op("scaled", K.MUL, h, b.number("alpha", 0.5))
    plan, after, _ = planned(b.done(b.op("add2", K.ADD, s, y)), FuseJoins())
    assert not plan.refusals
    first, second = regions(after)
    assert [value.name for value in first.outputs] == ["relu", "add"]
    assert steps(first) == ["conv", "add", "batch_norm", "relu"]
    assert steps(second) == ["conv", "mul", "add"]


def test_sum_as_output_of_the_model_is_fine() -> None:
    b = Tails(TOKENS)
    s = b.op("add", K.ADD, b.op("scaled", K.MUL, b.linear("fc", b.x), b.weight("gamma", C)), b.x)
    region, _, _ = fused(b.done(s, b.op("relu", K.RELU, s)))
    assert [value.name for value in region.outputs] == ["relu", "add"]


def test_what_two_operations_read_is_no_chain_behind_the_sum() -> None:
    b = Tails(TOKENS)
    s = b.op("add", K.ADD, b.op("scaled", K.MUL, b.linear("fc", b.x), b.weight("gamma", C)), b.x)
    region, _, _ = fused(b.done(b.op("relu", K.RELU, s), b.op("tanh", K.TANH, s)))
    assert steps(region) == ["linear", "mul", "add"]


# ---- sums beside sums -----------------------------------------------------------------------------------------------


def test_sum_behind_a_sum_goes_into_the_same_kernel() -> None:
    b = Tails(IMAGE)
    stem = b.op("stem", K.RELU, b.x)
    inner = b.op("inner", K.ADD, stem, b.op("a", K.MUL, b.conv("conv", stem), b.number("alpha", 0.2)))
    outer = b.op("outer", K.ADD, b.op("b", K.MUL, inner, b.number("beta", 0.2)), b.x)
    region, plan, kinds = fused(b.done(outer))
    assert kinds == ["relu", "fused_region"]
    assert steps(region) == ["conv", "mul", "add", "mul", "add"]
    assert not plan.refusals


def test_sum_that_has_a_contraction_of_its_own_takes_that() -> None:
    b = Tails(TOKENS)
    first = b.op("add", K.ADD, b.op("a", K.MUL, b.linear("fc1", b.x), b.weight("g1", C)), b.x)
    scaled = b.op("shrunk", K.MUL, first, b.number("alpha", 0.7))
    second = b.op("add2", K.ADD, scaled, b.op("b", K.MUL, b.linear("fc2", b.x), b.weight("g2", C)))
    plan, after, kinds = planned(b.done(second), FuseJoins(joins="all"))
    assert kinds == ["fused_region", "fused_region"]
    assert [steps(op) for op in regions(after)] == [["linear", "mul", "add", "mul"], ["linear", "mul", "add"]]
    assert not plan.refusals


def part_of_the_channels(overlap: int) -> Graph:
    b = Tails((1, 2, 8, 8))
    h = b.op("conv", K.CONV, b.x, b.weight("w", 6, 2, 3, 3), None, pads=(1, 1, 1, 1))
    h.shape = (1, 6, 8, 8)
    first = b.shaped("first", K.SLICE, (1, 2, 8, 8), h, axes=(1,), starts=(0,), stops=(2,), steps=(1,))
    start = 2 - overlap
    rest = b.shaped("rest", K.SLICE, (1, 6 - start, 8, 8), h, axes=(1,), starts=(start,), stops=(6,), steps=(1,))
    s = b.op("add", K.ADD, first, b.x)
    return b.done(b.shaped("cat", K.CONCAT, (1, 8 - start, 8, 8), s, rest, axis=1))


def test_skip_to_a_part_of_the_channels_is_one_kernel_with_the_rest() -> None:
    region, _, kinds = fused(part_of_the_channels(0))
    assert kinds == ["fused_region"]
    assert steps(region) == ["conv", "slice", "slice", "add", "concat"]


def test_parts_that_overlap_are_not() -> None:
    region, _, kinds = fused(part_of_the_channels(1))
    assert [value.name for value in region.outputs] == ["add", "conv"]
    assert kinds == ["fused_region", "slice", "concat"]


# ---- elementwise regions --------------------------------------------------------------------------------------------


def gated(b: Tails, form: str) -> Value:
    """T·H + (1 − T)·x with H out of something that keeps its kernel."""
    h, t = b.fixed("h", b.x), b.op("t", K.SIGMOID, b.fixed("scores", b.x))
    if form == "difference":
        difference = b.op("difference", K.ADD, h, b.x, scales=(1.0, -1.0))
        return b.op("add", K.ADD, b.x, b.op("product", K.MUL, t, difference))
    if form == "carry":
        carry = b.op("carry", K.SIGMOID, b.fixed("other", b.x))
        return b.op("add", K.ADD, b.op("product", K.MUL, t, h), b.op("rest", K.MUL, carry, b.x))
    carry = b.shaped("carry", K.ADD, TOKENS, b.number("one", 1.0), t, scales=(1.0, -1.0))
    return b.op("add", K.ADD, b.op("product", K.MUL, t, h), b.op("rest", K.MUL, carry, b.x))


@pytest.mark.parametrize("form", ["sum", "difference", "carry"])
def test_gated_sum_is_one_kernel_with_its_sigmoid(form: str) -> None:
    b = Tails(TOKENS)
    region, _, kinds = fused(b.done(gated(b, form)))
    assert set(kinds) == {"recurrent", "fused_region"}
    assert "sigmoid" in steps(region)


def test_gate_that_others_read_stays_outside() -> None:
    b = Tails(TOKENS)
    y = gated(b, "sum")
    region, _, kinds = fused(b.done(y, b.graph.value("t")))
    assert "sigmoid" in kinds
    assert "sigmoid" not in steps(region)


def test_pool_less_the_stream_is_one_kernel() -> None:
    b = Tails(IMAGE)
    h = b.norm("bn", b.x)
    pooled = b.op("pool", K.AVG_POOL, h, kernel=(3, 3), stride=(1, 1), pads=(1, 1, 1, 1), count_include_pad=False)
    mixed = b.op("mixed", K.ADD, pooled, h, scales=(1.0, -1.0))
    y = b.op("add", K.ADD, b.x, b.op("scaled", K.MUL, mixed, b.weight("gamma", C, 1, 1)))
    region, plan, kinds = fused(b.done(y), FuseJoins())
    assert kinds == ["batch_norm", "fused_region"]
    assert steps(region) == ["avg_pool", "add", "mul", "add"]
    assert not plan.refusals


@pytest.mark.parametrize("readers", [1, 2])
def test_recurrent_branch_keeps_its_kernel(readers: int) -> None:
    b = Tails(TOKENS)
    s = b.op("add", K.ADD, b.fixed("lstm", b.x), b.x)
    if readers == 1:
        region, _, _ = fused(b.done(b.op("relu", K.RELU, s)))
        assert steps(region) == ["add", "relu"]
    else:
        reason = refused(b.done(b.linear("fc", s), s))
        assert "the branch ends in a recurrent operation, which keeps its kernel" in reason
        assert "the sum goes to 'fc' and the model's output as it is" in reason


def test_concatenation_before_the_sum_is_read_where_its_parts_are() -> None:
    b = Tails(TOKENS)
    halves = [b.shaped(name, K.RECURRENT, (2, 5, C // 2), b.x, mode="gru") for name in ("left", "right")]
    y = b.op("add", K.ADD, b.x, b.shaped("cat", K.CONCAT, TOKENS, *halves, axis=2))
    region, _, _ = fused(b.done(y))
    assert steps(region) == ["concat", "add"]


# ---- what is refused ------------------------------------------------------------------------------------------------


def test_addition_alone_is_refused_with_what_the_branch_ends_in() -> None:
    b = Tails(IMAGE)
    h = b.op("h", K.INSTANCE_NORM, b.conv("conv", b.x), b.weight("w", C), b.weight("b", C))
    reason = refused(b.done(b.conv("next", b.op("add", K.ADD, b.x, h))), FuseJoins(norm=False))
    assert "the branch ends in 'h' (instance_norm), which keeps its kernel" in reason
    assert "an addition alone is one kernel already, and the sum goes to 'next' as it is" in reason


def test_one_side_quantised_is_told() -> None:
    b = Tails(TOKENS)
    h = b.op("q", K.QUANTIZE, b.linear("fc", b.x), b.number("s", 0.1), None)
    h.dtype = "int8"
    back = b.graph.add_op(K.DEQUANTIZE, [h, b.graph.value("s"), None], [("dq", ValueType(TOKENS, "float32"))]).output
    reason = refused(b.done(b.linear("next", b.op("add", K.ADD, b.x, back))))
    assert "'dq' (dequantize): quantised neighbours keep their kernels" in reason


def test_value_added_to_itself_is_refused() -> None:
    b = Tails(TOKENS)
    y = b.op("h", K.MUL, b.linear("fc", b.x), b.weight("gamma", C))
    plan, after, _ = planned(b.done(b.op("add", K.ADD, y, y)), FuseJoins(joins="all"))
    assert after.op("add").kind is K.ADD
    assert not plan.rewrites
    assert "adds a value to itself" in plan.refusals[0].reason


def test_constant_that_no_stream_starts_at_is_a_bias() -> None:
    b = Tails(TOKENS)
    y = b.op("h", K.MUL, b.linear("fc", b.x), b.weight("gamma", C))
    reason = refused(b.done(b.op("add", K.ADD, y, b.weight("table", *TOKENS))), FuseJoins(joins="all"))
    assert "'table' is a constant: a bias, not a skip" in reason


def test_sum_of_constants_is_left_to_who_computes_it_once() -> None:
    b = Tails(TOKENS)
    both = b.op("add", K.ADD, b.weight("a", C), b.weight("b", C))
    reason = refused(b.done(b.op("out", K.MUL, b.x, both)), FuseJoins(joins="all"))
    assert "nothing that it adds depends on the model's inputs" in reason


@pytest.mark.parametrize("shape", [(2, "N", C), ("N", 5, C)])
def test_extents_that_may_differ_are_refused(shape: tuple[int | str, ...]) -> None:
    b = Tails(TOKENS)
    y = b.op("h", K.MUL, b.linear("fc", b.x), b.weight("gamma", C))
    reason = refused(b.done(b.op("add", K.ADD, y, b.input("other", *shape))), FuseJoins(joins="all"))
    assert "extents that are unknown may differ" in reason


def test_integers_are_no_features() -> None:
    b = Tails(TOKENS)
    a, c = (b.graph.add_input(name, TOKENS, "int64") for name in ("a", "c"))
    reason = refused(b.done(b.op("out", K.NEG, b.op("add", K.ADD, a, c))), FuseJoins(joins="all"))
    assert "int64: positions or sizes" in reason


@pytest.mark.parametrize("make", [lambda: part_of_the_channels(0), lambda: part_of_the_channels(1)])
def test_fusing_again_changes_nothing(make: Any) -> None:
    _, once, kinds = planned(make(), FuseJoins())
    plan, _, again = planned(once, FuseJoins())
    assert not plan.rewrites
    assert again == kinds


# ---- both IRs: the numbers ------------------------------------------------------------------------------------------


class ImageTails(nn.Module):
    """Blocks in a row: layer scale behind a permute, frozen norms, an excited branch, a pool, a part of the channels,
    two sums in one, a transposed convolution; some of it in place."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(4, 4, 3, padding=1) for _ in range(5))
        self.mix, self.fc, self.wide = nn.Linear(4, 4), nn.Linear(4, 4), nn.Conv2d(4, 6, 1)
        self.up = nn.ConvTranspose2d(6, 6, 3, padding=1)
        self.gamma = nn.Parameter(torch.rand(4, 1, 1) + 0.5)
        self.register_buffer("scale", torch.rand(1, 4, 1, 1) + 0.5)
        self.register_buffer("shift", torch.rand(1, 4, 1, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.gamma * self.mix(F.gelu(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        h = self.convs[0](x) * self.scale + self.shift
        x = F.relu_(h.add_(x))
        h = self.convs[1](x)
        x = F.leaky_relu(h * torch.sigmoid(self.fc(h.mean((2, 3))))[:, :, None, None] + x)
        x = x + (F.avg_pool2d(x, 3, 1, 1, count_include_pad=False) - x) * 0.3
        h = self.convs[2](x)
        x = x + 0.2 * (x + 0.2 * self.convs[3](F.silu(h)))
        x = torch.roll(self.convs[4](torch.roll(x, (1, 1), (2, 3))), (-1, -1), (2, 3)) + 2 * x
        h = self.wide(x)
        x = torch.cat([h[:, :4] + x, h[:, 4:]], 1)
        return x - F.hardswish(self.up(x)) / 0.9


class TokenTails(nn.Module):
    """A residual scalar, highways in both spellings, a gate that a matrix product makes."""

    def __init__(self) -> None:
        super().__init__()
        self.work = nn.ModuleList(nn.Linear(8, 8) for _ in range(6))
        self.alpha = nn.Parameter(torch.tensor(0.3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.add(x, self.alpha * torch.tanh(self.work[0](x)), alpha=0.5)
        t = torch.sigmoid(self.work[1](x))
        x = t * F.relu(self.work[2](x)) + (1 - t) * x
        x = torch.lerp(x, F.gelu(self.work[3](x), approximate="tanh"), torch.sigmoid(self.work[4](x)))
        scores = torch.softmax(x @ x.transpose(1, 2), -1)
        return F.softplus((scores @ self.work[5](x)) * 0.5 + x)


TORCH: dict[str, tuple[type[nn.Module], tuple[int, ...]]] = {
    "image": (ImageTails, (2, 4, 6, 6)),
    "tokens": (TokenTails, (2, 5, 8)),
}
PRECISE = {torch.float32: 1e-5, torch.float64: 1e-12}


def made(name: str, dtype: torch.dtype) -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    cls, shape = TORCH[name]
    return cls().eval().to(dtype), torch.randn(shape, dtype=dtype)


@pytest.mark.parametrize("dtype", list(PRECISE))
@pytest.mark.parametrize("ir", ["fx", "onnx"])
@pytest.mark.parametrize("name", list(TORCH))
def test_every_join_fuses_and_the_numbers_stay(name: str, ir: str, dtype: torch.dtype) -> None:
    if (ir, dtype) == ("onnx", torch.float64):
        pytest.skip("ONNX Runtime has no convolution and no softplus in double precision")
    model, x = made(name, dtype)
    graph = rc.capture(model, (x,))
    if ir == "onnx":
        graph = rc.capture(torch.onnx.export(model, (x,), dynamo=True, verbose=False))
    result = run_passes(graph, [FuseJoins()])
    assert result.verification.ok, str(result.verification)
    assert not result.rolled_back
    assert max(check.difference for check in result.verification.checks) <= PRECISE[dtype]
    assert not [refusal for refusal in result.refused if refusal.pass_name == "fuse-joins"]
    assert all(block.fused for block in rc.inspect(result.graph))
    assert not rc.plan(result.graph, ["fuse-joins"]).rewrites


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", list(TORCH))
def test_half_precision_is_no_further_from_the_truth(name: str, dtype: torch.dtype) -> None:
    model, x = made(name, dtype)
    fused_model = run_passes(rc.capture(model, (x,)), [FuseJoins()]).model
    with torch.no_grad():
        truth = made(name, dtype)[0].double()(x.double())
        before, after = ((found.double() - truth).abs().max() for found in (model(x), fused_model(x)))
    assert after <= before


def test_regions_differentiate() -> None:
    model, x = made("tokens", torch.float64)
    result = run_passes(rc.capture(model, (x,)), [FuseJoins()])
    assert regions(result.graph)
    assert torch.autograd.gradcheck(result.model, (x.requires_grad_(),))


@pytest.mark.parametrize("name", list(TORCH))
def test_what_the_regions_compile_to_computes_the_same(name: str) -> None:
    model, x = made(name, torch.float32)
    result = run_passes(rc.capture(model, (x,)), [FuseJoins()])
    program = rc.compile(result.model, (x,))
    with torch.no_grad():
        torch.testing.assert_close(program(x), model(x), atol=2e-5, rtol=1e-5)
