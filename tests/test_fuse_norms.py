"""Joins with norms: which become one region, that the twins do not, and that the numbers stay, in both IRs."""

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
from rescompile.graph import Graph, Op, Value
from rescompile.kinds import OpKind
from rescompile.passes.fuse_joins import FuseJoins
from rescompile.passes.norm_region import norm_region
from rescompile.passes.norm_rows import carried, origins, row_of
from rescompile.plans import Plan, Refusal, Rewrite
from rescompile.rewriting import make_plan, run_passes
from tests.graphs import Builder

K = OpKind
C = 8
TOKENS = (2, 5, C)
IMAGE = (2, C, 6, 6)


def norm(b: Builder, x: Value, kind: OpKind = K.LAYER_NORM, **attrs: Any) -> Value:
    if kind in (K.LAYER_NORM, K.RMS_NORM):
        attrs.setdefault("axis", len(x.shape or ()) - 1)
    count = {K.RMS_NORM: 1, K.BATCH_NORM: 4}.get(kind, 2)
    width = int((x.shape or ())[1 if kind in (K.BATCH_NORM, K.GROUP_NORM, K.INSTANCE_NORM) else -1])
    return b.op(kind, x, *(b.param(width) for _ in range(count)), shape=x.shape, **attrs)


def work(b: Builder, x: Value) -> Value:
    """A branch that a kernel over rows does not hold."""
    return b.linear(b.relu(b.linear(x, 2 * C)), C)


def convs(b: Builder, x: Value) -> Value:
    return b.conv(b.relu(b.conv(x, C)), C)


def decided(graph: Graph, join: str = "join", skip: Value | None = None) -> Rewrite | Refusal:
    return norm_region(graph, graph.op(join), skip)


def regions(graph: Graph) -> list[str]:
    return [op.attr("label") for op in graph if op.kind is K.FUSED_REGION]


# What is beside the sum (a graph, given a builder and its input), and what the region then holds, in the graph's order.
Make = Callable[[Builder, Value], tuple[Value, ...]]
HELD: dict[str, tuple[tuple[int, ...], Make, str, int]] = {}


def held(title: str, label: str, outputs: int = 1, shape: tuple[int, ...] = TOKENS) -> Callable[[Make], Make]:
    def put(make: Make) -> Make:
        HELD[title] = (shape, make, label, outputs)
        return make

    return put


@held("LayerScale and a norm", "mul_add_layer_norm", 2)
def _(b: Builder, x: Value) -> tuple[Value, ...]:
    s = b.add(x, b.mul(work(b, x), b.param(C)), name="join")
    return norm(b, s), s


@held("a number on the branch, the sum unread", "mul_add_layer_norm")
def _(b: Builder, x: Value) -> tuple[Value, ...]:
    return (norm(b, b.add(b.mul(work(b, x), 0.5), x, name="join")),)


@held("alpha", "add_rms_norm")
def _(b: Builder, x: Value) -> tuple[Value, ...]:
    return (norm(b, b.add(x, work(b, x), scales=(1.0, 0.5), name="join"), K.RMS_NORM),)


@held("a bias apart, and a dropout that is off", "add_add_layer_norm", 2)
def _(b: Builder, x: Value) -> tuple[Value, ...]:
    f = b.op(K.IDENTITY, b.add(work(b, x), b.param(C)), shape=TOKENS, dropout=0.1)
    s = b.add(x, f, name="join")
    return norm(b, s), s


@held("three operands", "add_layer_norm", 2)
def _(b: Builder, x: Value) -> tuple[Value, ...]:
    s = b.add(x, work(b, x), work(b, x), name="join")
    return norm(b, s), s


@held("two branches summed first", "add_add_layer_norm")
def _(b: Builder, x: Value) -> tuple[Value, ...]:
    return (norm(b, b.add(b.add(work(b, x), work(b, x), name="branches"), x, name="join")),)


@held("norm, add, norm", "rms_norm_add_rms_norm", 2)
def _(b: Builder, x: Value) -> tuple[Value, ...]:
    s = b.add(x, norm(b, work(b, x), K.RMS_NORM), name="join")
    return norm(b, s, K.RMS_NORM), s


@held("norm, add", "layer_norm_add")
def _(b: Builder, x: Value) -> tuple[Value, ...]:
    return (b.linear(b.add(norm(b, work(b, x)), x, name="join"), C),)


@held("an activation behind the norm", "add_layer_norm_gelu")
def _(b: Builder, x: Value) -> tuple[Value, ...]:
    return (b.linear(b.op(K.GELU, norm(b, b.add(x, work(b, x), name="join"))), C),)


@held("an activation that is the stream", "add_relu_layer_norm", 2)
def _(b: Builder, x: Value) -> tuple[Value, ...]:
    t = b.relu(b.add(x, work(b, x), name="join"))
    return norm(b, t), t


@held("statistics in another type", "add_cast_layer_norm_cast", 2)
def _(b: Builder, x: Value) -> tuple[Value, ...]:
    s = b.add(x, work(b, x), name="join")
    wide = b.op(K.CAST, s, shape=TOKENS, dtype="float64")
    return b.op(K.CAST, norm(b, wide), shape=TOKENS, dtype="float32"), s


@held("the gain apart, of rank 3", "add_layer_norm_mul_add", 2)
def _(b: Builder, x: Value) -> tuple[Value, ...]:
    s = b.add(x, work(b, x), name="join")
    return b.add(b.mul(norm(b, s), b.param(1, 1, C)), b.param(1, 1, C)), s


@held("group norm at the branch's end, activated", "group_norm_add_relu", shape=IMAGE)
def _(b: Builder, x: Value) -> tuple[Value, ...]:
    return (b.relu(b.add(norm(b, convs(b, x), K.GROUP_NORM, groups=2), x, name="join")),)


@held("group norm of the sum", "add_group_norm_relu", 2, IMAGE)
def _(b: Builder, x: Value) -> tuple[Value, ...]:
    s = b.add(convs(b, x), x, name="join")
    return b.relu(norm(b, s, K.GROUP_NORM, groups=2)), s


@held("instance norm", "instance_norm_add", shape=IMAGE)
def _(b: Builder, x: Value) -> tuple[Value, ...]:
    return (b.add(norm(b, convs(b, x), K.INSTANCE_NORM), x, name="join"),)


@held("batch norm of the sum: the contraction's epilogue", "conv_add_batch_norm_relu", 2, IMAGE)
def _(b: Builder, x: Value) -> tuple[Value, ...]:
    s = b.add(convs(b, x), x, name="join")
    return b.relu(norm(b, s, K.BATCH_NORM)), s


@held("batch norm behind an activation", "conv_gelu_batch_norm_add", shape=IMAGE)
def _(b: Builder, x: Value) -> tuple[Value, ...]:
    return (b.add(norm(b, b.op(K.GELU, b.conv(x, C)), K.BATCH_NORM), x, name="join"),)


@held("channels first", "add_permute_layer_norm_permute", shape=IMAGE)
def _(b: Builder, x: Value) -> tuple[Value, ...]:
    turned = b.permute(b.add(x, convs(b, x), name="join"), 0, 2, 3, 1)
    return (b.conv(b.permute(norm(b, turned), 0, 3, 1, 2), C),)


@held("rows merged by a view", "add_reshape_layer_norm", 2)
def _(b: Builder, x: Value) -> tuple[Value, ...]:
    s = b.add(x, work(b, x), name="join")
    return norm(b, b.reshape(s, 10, C)), s


@held("a permutation of the branch", "permute_add_layer_norm")
def _(b: Builder, x: Value) -> tuple[Value, ...]:
    return (norm(b, b.add(x, b.permute(work(b, b.permute(x, 1, 0, 2)), 1, 0, 2), name="join")),)


@pytest.mark.parametrize("title", HELD)
def test_a_join_and_what_is_beside_it_become_one_region(title: str) -> None:
    shape, make, label, outputs = HELD[title]
    b = Builder()
    x = b.input(*shape)
    results = make(b, x)
    graph = b.output(*results)
    plan = Plan(rewrites=[rewrite] if (rewrite := decided(graph)) else [])
    assert isinstance(rewrite, Rewrite), str(rewrite)
    plan.apply(graph)
    assert regions(graph) == [label]
    (region,) = (op for op in graph if op.kind is K.FUSED_REGION)
    assert len(region.outputs) == outputs
    assert len(parse(region.attr("steps")).outputs) == outputs


def refused_for(make: Make, shape: tuple[Any, ...] = TOKENS) -> str:
    b = Builder()
    x = b.input(*shape)
    graph = b.output(*make(b, x))
    decision = decided(graph)
    assert isinstance(decision, Refusal), str(decision)
    return decision.reason


def test_a_plain_sum_and_its_norm_are_left_to_add_norm() -> None:
    def make(b: Builder, x: Value) -> tuple[Value, ...]:
        s = b.add(x, work(b, x), name="join")
        return norm(b, s), s

    assert "nothing else to fuse" in refused_for(make)
    b = Builder()
    graph = b.output(*make(b, b.input(*TOKENS)))
    _, after = make_plan(graph, [FuseJoins(joins="all")])
    assert [op.kind for op in after][-1] is K.ADD_NORM


def test_a_view_or_a_dropout_alone_does_not_make_a_region() -> None:
    def make(b: Builder, x: Value) -> tuple[Value, ...]:
        f = b.op(K.IDENTITY, b.reshape(work(b, b.reshape(x, 10, C)), *TOKENS), shape=TOKENS, dropout=0.1)
        return (norm(b, b.add(x, f, name="join")),)

    assert "nothing else to fuse" in refused_for(make)


def test_without_a_norm_there_is_no_region() -> None:
    assert "no norm reads the sum" in refused_for(lambda b, x: (b.relu(b.add(x, work(b, x), name="join")),))


def test_a_branchs_norm_that_others_read_stays() -> None:
    def make(b: Builder, x: Value) -> tuple[Value, ...]:
        n = norm(b, work(b, x))
        return b.add(x, n, name="join"), n

    assert "no norm reads the sum" in refused_for(make)


def test_a_scale_of_a_branch_that_others_read_stays() -> None:
    b = Builder()
    x = b.input(*TOKENS)
    f = b.mul(work(b, x), b.param(C))
    graph = b.output(norm(b, b.add(x, f, name="join")), f)
    assert "nothing else to fuse" in str(decided(graph))


def test_a_norm_in_training_is_refused() -> None:
    def make(b: Builder, x: Value) -> tuple[Value, ...]:
        s = b.add(convs(b, x), x, name="join")
        return norm(b, s, K.BATCH_NORM, training=True), s

    assert "statistics of the batch" in refused_for(make, IMAGE)


def test_a_norm_without_running_statistics_is_refused() -> None:
    def make(b: Builder, x: Value) -> tuple[Value, ...]:
        s = b.add(convs(b, x), x, name="join")
        return (b.op(K.BATCH_NORM, s, b.param(C), b.param(C), None, None, shape=IMAGE),)

    assert "no running statistics" in refused_for(make, IMAGE)


def test_a_gain_that_the_input_decides_is_refused() -> None:
    def make(b: Builder, x: Value) -> tuple[Value, ...]:
        s = b.add(x, b.mul(work(b, x), 0.5), name="join")
        gain = b.mean(x, 0, 1, keepdims=False)
        return (b.op(K.LAYER_NORM, s, gain, b.param(C), shape=TOKENS, axis=2),)

    assert "computed from the graph's inputs" in refused_for(make)


def test_statistics_that_are_read_elsewhere_are_not_lost() -> None:
    def make(b: Builder, x: Value) -> tuple[Value, ...]:
        s = b.add(x, b.mul(work(b, x), 0.5), name="join")
        op = b.ops(K.LAYER_NORM, s, b.param(C), b.param(C), shapes=[TOKENS, (2, 5, 1)], axis=2)
        return tuple(op.outputs)

    assert "statistics" in refused_for(make)


def test_a_gain_that_is_computed_of_constants_stays_an_operand() -> None:
    b = Builder()
    x = b.input(*TOKENS)
    s = b.add(x, b.mul(work(b, x), 0.5), name="join")
    n = b.op(K.LAYER_NORM, s, b.add(b.param(C), 1.0, name="gain"), b.param(C), shape=TOKENS, axis=2)
    graph = b.output(n)
    Plan(rewrites=[r] if (r := decided(graph)) else []).apply(graph)
    (region,) = (op for op in graph if op.kind is K.FUSED_REGION)
    assert graph.value("gain") in region.inputs


BROKEN: dict[str, tuple[str, Callable[[Builder, Value], Value]]] = {
    "a skip of an unknown extent": (
        "different or unknown shapes",
        lambda b, x: b.op(K.ADD, b.input("N", 5, C), work(b, x), shape=TOKENS, name="join"),
    ),
    "a constant": ("a constant: a bias", lambda b, x: b.add(work(b, x), b.param(*TOKENS), name="join")),
    "x + x": ("adds a value to itself", lambda b, x: b.add(x, x, name="join")),
    "two types": (
        "dtypes",
        lambda b, x: b.add(x, b.op(K.CAST, work(b, x), shape=TOKENS, dtype="float16"), name="join"),
    ),
}


@pytest.mark.parametrize("title", BROKEN)
def test_sums_that_no_kernel_takes_are_refused_with_their_reason(title: str) -> None:
    reason, make = BROKEN[title]
    assert reason in refused_for(lambda b, x: (norm(b, b.mul(make(b, x), 2.0)),))


def test_symbolic_extents_are_equal_by_name_only() -> None:
    for other, fused in (("N", True), ("M", False)):
        b = Builder()
        x, y = b.input("N", 5, C), b.input(other, 5, C)
        s = b.op(K.ADD, x, b.mul(work(b, y), 0.5), shape=("N", 5, C), name="join")
        assert bool(decided(b.output(norm(b, s), s))) is fused


def test_norms_over_different_rows_are_no_one_kernel() -> None:
    b = Builder()
    x = b.input(*IMAGE)
    s = b.add(norm(b, convs(b, x), K.GROUP_NORM, groups=2), x, name="join")
    graph = b.output(b.relu(norm(b, s, K.GROUP_NORM, groups=4)), s)
    Plan(rewrites=[r] if (r := decided(graph)) else []).apply(graph)
    assert regions(graph) == ["add_group_norm_relu"]


def test_a_norm_over_an_axis_that_a_view_splits_is_refused() -> None:
    def make(b: Builder, x: Value) -> tuple[Value, ...]:
        s = b.add(x, work(b, x), name="join")
        return norm(b, b.reshape(s, 2, 5, 2, C // 2)), s

    assert "a view has split or moved" in refused_for(make)


def test_a_norm_that_ends_the_next_branch_is_left_to_it() -> None:
    b = Builder()
    x = b.input(*IMAGE)
    t = b.relu(b.add(convs(b, x), x, name="join"))
    u = b.add(norm(b, t, K.BATCH_NORM), convs(b, t), name="next")
    graph = b.output(u)
    assert isinstance(decided(graph), Refusal)
    assert isinstance(decided(graph, "next"), Rewrite)


def test_the_first_norm_goes_in_and_the_second_reads_the_sum() -> None:
    b = Builder()
    x = b.input(*TOKENS)
    s = b.add(x, b.mul(work(b, x), 0.5), name="join")
    first, second = norm(b, s), norm(b, s)
    graph = b.output(first, second, s)
    Plan(rewrites=[r] if (r := decided(graph)) else []).apply(graph)
    assert regions(graph) == ["mul_add_layer_norm"]
    assert second.producer is not None
    assert second.producer.inputs[0] is s


def test_a_projection_shortcut_stays_and_the_branch_takes_the_norm() -> None:
    b = Builder()
    x = b.input(*IMAGE)
    branch, skip = convs(b, x), b.conv(x, C, 1)
    graph = b.output(b.relu(norm(b, b.add(branch, skip, name="join"), K.BATCH_NORM)))
    rewrite = decided(graph, skip=skip)
    assert isinstance(rewrite, Rewrite)
    rewrite.apply(graph)
    assert skip.producer is not None
    assert skip.producer.kind is K.CONV


# ---- what a norm reduces over --------------------------------------------------------------------------------------


def view(kind: OpKind, before: tuple[int, ...], after: tuple[int, ...], **attrs: Any) -> Op:
    b = Builder()
    producer = b.op(kind, b.input(*before), shape=after, **attrs).producer
    assert producer is not None
    return producer


@pytest.mark.parametrize(
    ("before", "after", "axes"),
    [
        ((2, 5, 8), (10, 8), (None, 2)),
        ((2, 5, 8), (2, 40), (0, None)),
        ((2, 5, 8), (2, 5, 2, 4), (0, 1, None, None)),
        ((2, 8, 6, 6), (2, 8, 36), (0, 1, None)),
        ((4, 4), (4, 4), (0, 1)),
        ((4, 4), (4, 2, 2, 4), (0, None, None, 1)),
        ((4, 4, 4), (4, 4), None),
    ],
)
def test_axes_go_through_a_view_where_it_leaves_them_alone(
    before: tuple[int, ...], after: tuple[int, ...], axes: tuple[int | None, ...] | None
) -> None:
    if axes is not None:
        assert carried(view(K.RESHAPE, before, after), tuple(range(len(before)))) == axes


def test_axes_go_through_a_permutation_and_back() -> None:
    op = view(K.PERMUTE, (2, 8, 6, 7), (2, 6, 7, 8), perm=(0, 2, 3, 1))
    assert carried(op, (0, 1, 2, 3)) == (0, 2, 3, 1)
    assert origins(op, (0, 2, 3, 1)) == [(op.inputs[0], (0, 1, 2, 3))]


def test_rows_are_the_sums_axes() -> None:
    op = view(K.GROUP_NORM, IMAGE, IMAGE, groups=4)
    assert row_of(op, (0, 1, 2, 3)) == (frozenset((1, 2, 3)), 4)
    op = view(K.LAYER_NORM, (2, 6, 6, 8), (2, 6, 6, 8), axis=3)
    assert row_of(op, (0, 2, 3, 1)) == (frozenset((1,)), 1)
    assert row_of(op, (0, 2, 3, None)) is None


# ---- numbers, through both IRs -------------------------------------------------------------------------------------


class LayerScale(nn.Module):
    label = ["mul_add_layer_norm"]

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.out = nn.Linear(C, C), nn.Linear(C, C), nn.Linear(C, C)
        self.gain, self.norm = nn.Parameter(torch.rand(C)), nn.LayerNorm(C)

    def forward(self, x: Tensor) -> Tensor:
        s = x + self.gain * self.down(torch.relu(self.up(x)))
        return s + torch.relu(self.out(self.norm(s)))


class Parallel(nn.Module):
    """GPT-NeoX, Phi: both branches read one norm, and the next norm reads the sum of three."""

    label: list[str] = []  # which of the two sums comes first decides

    def __init__(self) -> None:
        super().__init__()
        self.before, self.norm = nn.LayerNorm(C), nn.LayerNorm(C)
        self.first, self.second = nn.Linear(C, C), nn.Linear(C, C)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.before(x)
        mixed = torch.softmax(h @ h.transpose(1, 2), -1) @ self.first(h)
        s = mixed + F.dropout(self.second(h), 0.1, self.training) + x
        return self.norm(s), s


class Sandwich(nn.Module):
    """Gemma 2: x + N(F(N(x))), the next norm behind the sum."""

    label = ["rms_norm_add_rms_norm", "relu_rms_norm_add"]

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(C, C), nn.Linear(C, C)
        self.norms = nn.ModuleList(nn.RMSNorm(C) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        s = x + self.norms[0](self.first(x))
        return s + self.norms[2](torch.relu(self.second(self.norms[1](s))))


class Wide(nn.Module):
    """Statistics in float32 whatever the stream's type is."""

    label = ["mul_add_cast_layer_norm_cast"]

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(C, C), nn.Linear(C, C)
        self.weight, self.bias = nn.Parameter(torch.rand(C)), nn.Parameter(torch.rand(C))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        s = x + 0.5 * self.down(torch.relu(self.up(x)))
        return F.layer_norm(s.float(), (C,), self.weight.float(), self.bias.float()).type_as(s), s


class Apart(nn.Module):
    """A norm without weights, whose literal of ones has the shape of the sum in a plain export."""

    label = ["add_layer_norm_mul_add_gelu"]

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(C, C), nn.Linear(C, C)
        self.gain, self.shift = nn.Parameter(torch.rand(1, 1, C)), nn.Parameter(torch.rand(1, 1, C))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        s = x + self.down(torch.relu(self.up(x)))
        return F.gelu(F.layer_norm(s, (C,)) * self.gain + self.shift), s


class Grouped(nn.Module):
    label = ["group_norm_add_relu", "relu_add_group_norm_relu", "instance_norm_add"]

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(C, C, 3, padding=1) for _ in range(3))
        self.norms = nn.ModuleList(nn.GroupNorm(2, C) for _ in range(2))
        self.instance = nn.InstanceNorm2d(C, affine=True)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = torch.relu(x + self.norms[0](self.convs[0](x)))
        s = x + torch.relu(self.convs[1](x))
        y = torch.relu(self.norms[1](s))
        return y + self.instance(self.convs[2](y)), s


class Batched(nn.Module):
    """ResNet v2: batch norm and activation of the sum, which the next sum reads too; ConvMixer."""

    label = ["conv_add_batch_norm_relu", "conv_gelu_batch_norm_add"]

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(C, C, 3, padding=1) for _ in range(3))
        self.norms = nn.ModuleList(nn.BatchNorm2d(C) for _ in range(2))
        for norm in self.norms:
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.5, 2)

    def forward(self, x: Tensor) -> Tensor:
        s = x + self.convs[1](torch.relu(self.convs[0](x)))
        y = torch.relu(self.norms[0](s))
        return s + self.norms[1](F.gelu(self.convs[2](y)))


class ChannelsFirst(nn.Module):
    """ConvNeXt before a downsampling: layer norm over the channels of an image."""

    label = ["mul_add_permute_layer_norm_permute"]

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Conv2d(C, C, 3, padding=1), nn.Conv2d(C, C, 1)
        self.norm, self.gain = nn.LayerNorm(C), nn.Parameter(torch.rand(C, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        s = x + self.gain * self.down(torch.relu(self.up(x)))
        return self.norm(s.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Several(nn.Module):
    """Parts side by side, so that one export serves them all."""

    def __init__(self, parts: list[nn.Module]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        found: list[Tensor] = []
        for part in self.parts:
            made = part(x)
            found += made if isinstance(made, tuple) else [made]
        return tuple(found)


FAMILIES: dict[str, tuple[list[type[nn.Module]], tuple[int, ...]]] = {
    "rows": ([LayerScale, Parallel, Sandwich], TOKENS),
    "tokens": ([LayerScale, Parallel, Sandwich, Wide, Apart], TOKENS),
    "images": ([Grouped, Batched, ChannelsFirst], IMAGE),
}
# Numbers that find out an order of operations: nothing, large, tiny, nearly constant rows, one outlier.
ADVERSARIAL: dict[str, Callable[[Tensor], Tensor]] = {
    "random": lambda x: x,
    "zero": lambda x: x * 0,
    "large": lambda x: x * 100,
    "small": lambda x: x * 1e-3,
    "near a constant": lambda x: 1 + x * 1e-3,
    "outlier": lambda x: torch.where(x == x.max(), 300.0, x),
}
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}


def family(name: str, dtype: torch.dtype) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    parts, shape = FAMILIES[name]
    return Several([part() for part in parts]).to(dtype).eval(), torch.randn(shape).to(dtype)


def captured(model: nn.Module, x: Tensor, ir: str) -> Graph:
    if ir == "fx":
        return rc.capture(model, (x,))
    return rc.capture(torch.onnx.export(model, (x,), dynamo=True, verbose=False, optimize=False))


def outputs(graph: Graph, x: Tensor) -> list[np.ndarray[Any, Any]]:
    return [np.asarray(y).astype(np.float64) for y in graph.run({"x": x.float().numpy().astype(numpy(x))}).values()]


def numpy(x: Tensor) -> Any:
    import ml_dtypes

    return ml_dtypes.bfloat16 if x.dtype is torch.bfloat16 else x.numpy().dtype


@pytest.mark.parametrize(
    ("name", "dtype", "ir"),
    [
        *((name, torch.float32, ir) for name in ("tokens", "images") for ir in ("fx", "onnx")),
        *((name, torch.float64, "fx") for name in ("tokens", "images")),
        ("rows", torch.float64, "onnx"),  # ONNX Runtime has neither Conv nor Erf in 64 bits
    ],
    ids=str,
)
def test_families_fuse_exactly(name: str, dtype: torch.dtype, ir: str) -> None:
    model, x = family(name, dtype)
    graph = captured(model, x, ir)
    result = run_passes(graph, [FuseJoins()])
    assert result.verification.ok
    assert not result.rolled_back
    assert not any(op.kind is K.ADD for op in result.graph)
    if dtype is torch.float32:
        wanted = [label for part in FAMILIES[name][0] for label in vars(part)["label"]]
        wanted = [label.replace("_cast", "") for label in wanted if "_cast" not in label]
        assert set(wanted) <= set(regions(result.graph))
    assert not run_passes(result.graph, [FuseJoins()], check=False).applied, "fusing twice is fusing once"
    for title, make in ADVERSARIAL.items():
        for found, wanted_ in zip(outputs(result.graph, make(x)), outputs(graph, make(x)), strict=True):
            scale = max(float(np.abs(wanted_).max()), 1e-30)
            assert np.abs(found - wanted_).max() <= TOLERANCE[dtype] * scale, title


@pytest.mark.parametrize(
    ("dtype", "ir"), [(torch.float16, "fx"), (torch.bfloat16, "fx"), (torch.float16, "onnx")], ids=str
)
def test_16_bits_are_no_further_from_64_than_before(dtype: torch.dtype, ir: str) -> None:
    model, x = family("tokens", dtype)
    exact, _ = family("tokens", torch.float64)
    exact.load_state_dict(model.state_dict())
    graph = captured(model, x, ir)
    result = run_passes(graph, [FuseJoins()])
    assert result.verification.ok
    assert not result.rolled_back
    assert "mul_add_cast_layer_norm_cast" in regions(result.graph), "the casts are in the region"
    assert sum(op.kind is K.CAST for op in result.graph) < sum(op.kind is K.CAST for op in graph)
    for title, make in ADVERSARIAL.items():
        with torch.no_grad():
            reference = [y.numpy() for y in exact(make(x).double())]
        errors = [
            [np.abs(y - r).max() for y, r in zip(outputs(g, make(x)), reference, strict=True)]
            for g in (graph, result.graph)
        ]
        for index, (before, after) in enumerate(zip(*errors, strict=True)):
            assert after <= before * (1 if ir == "fx" else 1.5) + 1e-7, (title, index)


def test_compiled_regions_compute_the_same() -> None:
    pytest.importorskip("tvm")
    torch.manual_seed(0)
    model, x = Several([LayerScale(), Sandwich()]).eval(), torch.randn(TOKENS)
    program = rc.compile(run_passes(captured(model, x, "fx"), [FuseJoins()], check=False).model, (x,))
    with torch.no_grad():
        for found, wanted in zip(program(x), model(x), strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
