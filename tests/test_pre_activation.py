"""`pre-activation` and `post-activation` against networks written by hand in both forms, in both IRs."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import torch.fx
from torch import nn
from torch.nn import functional as F

import rescompile as rc
from rescompile.errors import RescompileError
from rescompile.graph import Graph
from rescompile.passes.pre_activation import PreActivation
from rescompile.plans import Erase, Plan, ReplaceUses, Rewrite, SetShape
from rescompile.printing import print_graph
from rescompile.rewriting import Result
from tests.activation_models import NORMS, Design, Network, both
from tests.test_insert_shortcuts import first_output

IRS = ("fx", "onnx")
ONNX_TOLERANCE = 1e-6


def image(size: int = 16, channels: int = 3) -> tuple[torch.Tensor]:
    return (torch.randn(2, channels, size, size, generator=torch.Generator().manual_seed(0)),)


def captured(model: nn.Module, inputs: tuple[torch.Tensor, ...], ir: str) -> Graph:
    """The graph with its batch norms, which the exporter's optimiser would fold into the convolutions."""
    model.eval()
    if ir == "fx":
        return rc.capture(model, inputs)
    folds = any(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    return rc.capture(torch.onnx.export(model, inputs, dynamo=True, verbose=False, optimize=not folds))


def converted(model: nn.Module, ir: str = "fx", spec: str = "pre-activation", size: int = 16) -> Result:
    result = rc.rewrite(captured(model, image(size), ir), spec)
    assert result.verification.ok
    return result


def reasons(result: Result) -> list[str]:
    return [refusal.reason for refusal in result.refused]


def difference(graph: Graph, target: nn.Module, inputs: tuple[torch.Tensor, ...]) -> float:
    with torch.no_grad():
        wanted = target(*inputs).numpy()
    return float(np.abs(first_output(graph, inputs) - wanted).max() / np.abs(wanted).max())


# ---- the hand-written twins ---------------------------------------------------------------------------------------

HE_2016 = {
    "cifar-20": Design(depths=(3, 3, 3), widths=(8, 12, 16), shortcut="A"),
    "cifar-56": Design(depths=(9, 9, 9), widths=(8, 12, 16), shortcut="A"),
    "cifar-110": Design(depths=(18, 18, 18), widths=(8, 9, 10), shortcut="A"),
    "projections": Design(depths=(3, 3, 3), widths=(8, 12, 16)),
    "bottleneck": Design(depths=(2, 2, 2), widths=(16, 24, 32), bottleneck=True),
    "bottleneck, padded": Design(depths=(2, 2, 2), widths=(16, 24, 32), bottleneck=True, shortcut="A"),
    "shared first activation": Design(first="shared"),
    "shared, bottleneck": Design(widths=(16, 24), bottleneck=True, first="shared"),
}
OTHERS = {
    "stem with a pool": Design(pool=True),
    "stem with a pool, projected": Design(widths=(16, 24), bottleneck=True, pool=True),
    "stem with a pool, shared": Design(pool=True, first="shared"),
    "group norm": Design(norm="group"),
    "no norm": Design(norm="none"),
    "no norm, pooled stem": Design(norm="none", pool=True),
    "squeeze and excite": Design(gate=True),
    "stochastic depth": Design(drop_path=0.2),
    "silu": Design(act=nn.SiLU),
    "leaky": Design(act=partial(nn.LeakyReLU, 0.1)),
    "prelu": Design(act=nn.PReLU),
    "wide, with dropout": Design(widths=(16, 32), dropout=0.3),
    "resnext": Design(widths=(16, 32), bottleneck=True, groups=4),
    "resnet-d": Design(shortcut="D"),
}
DESIGNS = HE_2016 | OTHERS
IN_ONNX = ("cifar-20", "projections", "stem with a pool", "group norm", "no norm", "squeeze and excite")
SHALLOW = [name for name in DESIGNS if sum(DESIGNS[name].depths) < 20]


@pytest.mark.parametrize("name", DESIGNS)
def test_converted_network_is_the_hand_written_one_to_the_bit(name: str) -> None:
    design = DESIGNS[name]
    post, pre = both(design)
    result = converted(post, "fx", f"pre-activation{{first={design.first}}}")
    assert difference(result.graph, pre, image()) == 0.0
    assert difference(result.original, pre, image()) > 1e-3
    same = [refused for refused in reasons(result) if "the same in both forms" in refused]
    assert len(result.applied) + len(same) == sum(design.depths)
    assert reasons(result) == same
    before, after = rc.inspect(result.original), rc.inspect(result.graph)
    assert [block.shortcut for block in after] == [block.shortcut for block in before]
    wanted = ["none" if design.norm == "none" else "pre"] * len(before)
    if design.first == "shared" and not design.bottleneck:
        wanted[0] = "inner"  # He et al. 2016: the first block takes what the stem has activated
    assert [block.norm for block in after] == wanted


@pytest.mark.parametrize("name", IN_ONNX)
def test_the_same_from_an_onnx_model(name: str) -> None:
    design = DESIGNS[name]
    post, pre = both(design)
    result = converted(post, "onnx", f"pre-activation{{first={design.first}}}")
    assert difference(result.graph, pre, image()) < ONNX_TOLERANCE
    assert len(result.applied) >= sum(design.depths) - 1


@pytest.mark.parametrize(
    ("name", "ir"), [*((name, "fx") for name in SHALLOW), ("projections", "onnx"), ("stem with a pool", "onnx")]
)
def test_twice_is_once_and_the_inverse_gives_the_original_back(name: str, ir: str) -> None:
    spec = f"pre-activation{{first={DESIGNS[name].first},projection_norm=keep}}"
    result = converted(both(DESIGNS[name])[0], ir, spec)
    again = rc.rewrite(result.graph, spec)
    assert not again.applied
    assert print_graph(again.graph) == print_graph(result.graph)
    back = rc.rewrite(result.graph, "post-activation")
    assert not rc.diff(result.original, back.graph)
    assert not rc.rewrite(back.graph, "post-activation").applied


@pytest.mark.parametrize("ir", IRS)
def test_inverse_prints_as_the_original(ir: str) -> None:
    post = both(Design(widths=(8,), depths=(3,), pool=True))[0]
    result = converted(post, ir)
    back = rc.rewrite(result.graph, "post-activation").graph
    assert print_graph(back, comments=False) == print_graph(result.original, comments=False)
    assert print_graph(result.graph, comments=False) != print_graph(result.original, comments=False)


@pytest.mark.parametrize("norm", ["new", "none"])
@pytest.mark.parametrize("name", ["projections", "bottleneck", "stem with a pool, projected", "group norm", "resnet-d"])
def test_a_pre_activation_network_becomes_the_post_activation_one(name: str, norm: str) -> None:
    post, pre = both(DESIGNS[name])
    for block in post.blocks:
        if block.projected:
            fresh = NORMS[DESIGNS[name].norm](block.down.out_channels).eval()
            block.down_norm = fresh if norm == "new" else nn.Identity()
    result = converted(pre, "fx", f"post-activation{{projection_norm={norm}}}")
    assert difference(result.graph, post, image()) == 0.0
    assert not result.refused


# ---- public siblings ----------------------------------------------------------------------------------------------


def timm_pair(**options: Any) -> tuple[nn.Module, nn.Module]:
    """timm's ResNetV2 without and with `preact`, of the same weights."""
    resnetv2 = pytest.importorskip("timm.models.resnetv2")
    torch.manual_seed(0)
    post, pre = (
        resnetv2.ResNetV2([2, 1, 2], channels=(32, 48, 64), num_classes=7, stem_chs=16, preact=preact, **options).eval()
        for preact in (False, True)
    )
    for module in post.modules():
        if isinstance(module, nn.BatchNorm2d | nn.GroupNorm):
            nn.init.uniform_(module.weight, -0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.2)
    state, given = {}, post.state_dict()
    moves = {}
    held = "stem.norm3" if "stem.norm3.weight" in given else "stem.norm"
    for stage, part in enumerate(post.stages):
        for index in range(len(part.blocks)):
            block = f"stages.{stage}.blocks.{index}"
            moves |= {held: f"{block}.norm1", f"{block}.norm1": f"{block}.norm2", f"{block}.norm2": f"{block}.norm3"}
            held = f"{block}.norm3"
    moves[held] = "norm"
    for key, tensor in given.items():
        owner, _, leaf = key.rpartition(".")
        if not owner.endswith("downsample.norm"):
            state[f"{moves.get(owner, owner)}.{leaf}"] = tensor
    pre.load_state_dict(state)
    return post, pre


def timm_options() -> dict[str, dict[str, Any]]:
    layers = pytest.importorskip("timm.layers")
    batch = {"norm_layer": layers.BatchNormAct2d, "conv_layer": layers.create_conv2d}
    return {
        "batch norm": batch,
        "deep stem, zeros around its pool": {**batch, "stem_type": "deep_fixed", "avg_down": True},
        "group norm, standardised weights": {"norm_layer": partial(layers.GroupNormAct, num_groups=4)},
        "silu": {**batch, "act_layer": nn.SiLU},
    }


@pytest.mark.parametrize(
    "name", ["batch norm", "deep stem, zeros around its pool", "group norm, standardised weights", "silu"]
)
def test_timm_v1_becomes_timm_v2(name: str) -> None:
    post, pre = timm_pair(**timm_options()[name])
    result = converted(post, "fx", size=64)
    assert not result.refused
    assert difference(result.graph, pre, image(64)) == 0.0
    assert {block.norm for block in rc.inspect(result.graph)} == {"pre"}
    assert not converted(pre, "fx", size=64).applied


def test_timm_v1_becomes_timm_v2_in_an_onnx_model() -> None:
    post, pre = timm_pair(**timm_options()["batch norm"])
    result = converted(post, "onnx", size=64)
    assert not result.refused
    assert difference(result.graph, pre, image(64)) < ONNX_TOLERANCE


# ---- the stem, projections, training ------------------------------------------------------------------------------


def test_first_block_shares_the_stem_s_activation_where_something_else_reads_the_pool() -> None:
    post, pre = both(Design(pool=True, first="shared"))

    class Tapped(nn.Module):
        def __init__(self, network: Network) -> None:
            super().__init__()
            self.network = network

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            net = self.network
            x = pooled = net.pool(net.act(net.norm(net.conv(x))))
            for block in net.blocks:
                x = block(x)
            return net.head(net.last_act(net.last_norm(x)).mean((2, 3))), pooled

    result = rc.rewrite(rc.capture(Tapped(post).eval(), image()), "pre-activation")
    assert not result.refused
    assert difference(result.graph, pre, image()) == 0.0


def test_projection_keeps_its_norm_on_request() -> None:
    post, pre = both(Design())
    pre.blocks[2].down_norm = post.blocks[2].down_norm
    result = converted(post, "fx", "pre-activation{projection_norm=keep}")
    assert difference(result.graph, pre, image()) == 0.0
    assert set(result.model.state_dict()) == set(post.state_dict())


def test_original_keys_stay_but_for_a_projection_s_norm() -> None:
    post, _ = both(Design(pool=True))
    result = converted(post)
    kept = {key for key in post.state_dict() if "down_norm" not in key}
    assert set(result.model.state_dict()) == kept
    assert all(heirs == [key] for key, heirs in result.key_map.items() if "down_norm" not in key)
    assert all(heirs == [] for key, heirs in result.key_map.items() if "down_norm" in key)
    assert any("loses its norm" in rewrite.reason for rewrite in result.applied)


@pytest.mark.parametrize("traced", [False, True])
def test_result_trains_as_the_hand_written_network_does(traced: bool) -> None:
    post, pre = both(Design(pool=True))
    graph = rc.capture(torch.fx.symbolic_trace(post) if traced else post, image())
    model = rc.rewrite(graph, "pre-activation").model
    target = torch.tensor([1, 3])
    losses: dict[str, list[float]] = {"converted": [], "written": []}
    for name, network in (("converted", model), ("written", pre)):
        network.train()
        optimiser = torch.optim.SGD(network.parameters(), lr=0.05)
        for _ in range(4):
            optimiser.zero_grad()
            loss = F.cross_entropy(network(*image()), target)
            loss.backward()
            optimiser.step()
            losses[name].append(loss.item())
        network.eval()
    assert losses["converted"][-1] < losses["converted"][0]
    np.testing.assert_allclose(losses["converted"], losses["written"], rtol=1e-5)
    np.testing.assert_allclose(model(*image()).detach(), pre(*image()).detach(), rtol=1e-4, atol=1e-5)


def test_training_form_with_stochastic_depth_is_converted_and_switches() -> None:
    post, pre = both(Design(drop_path=0.2, dropout=0.3, gate=True))
    result = rc.rewrite(rc.capture(post.train(), image()), "pre-activation")
    assert not result.refused
    assert {block.kind for block in rc.inspect(result.graph)} == {"stochastic"}
    result.model(*image()).sum().backward()
    post.eval()
    evaluated = rc.rewrite(rc.capture(post, image()), "pre-activation")
    assert difference(evaluated.graph, pre, image()) == 0.0


def test_any_batch_size_stays_possible() -> None:
    post, pre = both(Design(pool=True, gate=True))
    graph = rc.capture(post, image(), dynamic=({0: torch.export.Dim("N")},))
    model = rc.rewrite(graph, "pre-activation").model
    x = torch.randn(5, 3, 16, 16)
    assert torch.equal(model(x), pre(x))


class Expanded(nn.Module):
    """A gate that takes the shape of what it is for from that (`expand_as`), where the norm was."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mix = nn.Conv1d(1, 1, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.mix(x.mean((2, 3)).view(x.shape[0], 1, -1)).sigmoid().view(x.shape[0], -1, 1, 1)
        return x * y.expand_as(x)


@pytest.mark.parametrize("dynamic", [False, True])
def test_norm_goes_behind_a_gate_that_asks_for_its_shape(dynamic: bool) -> None:
    post, pre = both(Design())
    for mine, theirs in zip(post.blocks, pre.blocks, strict=True):
        mine.gate = theirs.gate = Expanded(8)
    shapes = ({0: torch.export.Dim("N")},) if dynamic else None
    result = rc.rewrite(rc.capture(post, image(), dynamic=shapes), "pre-activation")
    assert not result.refused
    assert difference(result.graph, pre, image()) == 0.0


def test_exporter_that_folded_the_norms_leaves_the_activation_to_move() -> None:
    post, _ = both(Design(depths=(2,), widths=(8,)))
    graph = rc.capture(torch.onnx.export(post, image(), dynamo=True, verbose=False))
    assert "batch_norm" not in {op.kind.value for op in graph}
    result = rc.rewrite(graph, "pre-activation")
    assert len(result.applied) == 2
    assert all("ends in no norm" in rewrite.reason for rewrite in result.applied)
    assert all("N(" not in rewrite.equation for rewrite in result.applied)


# ---- part of a network --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chosen", [{0}, {1}, {2}, {3}, {0, 1}, {1, 2}, {1, 3}, {0, 3}, {0, 1, 2}])
def test_each_block_is_converted_for_itself(chosen: set[int]) -> None:
    post, _ = both(Design())
    graph = rc.capture(post, image())
    report = rc.inspect(graph)
    names = tuple(report.blocks[index].join for index in sorted(chosen))
    result = rc.rewrite(graph, PreActivation(blocks=names))
    numbers = [str(index) for index in sorted(chosen)]
    spec = (
        f"pre-activation{{blocks=[{','.join(numbers)}]}}"
        if len(numbers) > 1
        else f"pre-activation{{blocks={names[0]}}}"
    )
    assert rc.plan(graph, spec).rewrites == result.plan.rewrites
    assert len(result.applied) == len(chosen)
    with torch.no_grad():
        wanted = partly(post, chosen, image()[0])
    assert np.array_equal(first_output(result.graph, image()), wanted.numpy())
    back = rc.rewrite(rc.rewrite(graph, PreActivation(projection_norm="keep", blocks=names)).graph, "post-activation")
    assert not rc.diff(graph, back.graph)


def partly(post: Network, chosen: set[int], x: torch.Tensor) -> torch.Tensor:
    """Of each block what it activates, y, and what that is the activation of."""
    bare = post.conv(x)
    y = post.act(post.norm(bare))
    for index, block in enumerate(post.blocks):
        inner = block.convs[1](block.act(block.norms[0](block.convs[0](y))))
        if index not in chosen:
            bare = block.norms[1](inner) + block.skip(y)
            y = block.act(bare)
            continue
        bare = inner + (block.down(y) if block.projected else bare)
        y = block.act(block.norms[1](bare))
    return post.head(y.mean((2, 3)))


def test_plan_that_lost_a_rewrite_is_still_right() -> None:
    post, _ = both(Design())
    graph = rc.capture(post, image())
    plan = Plan.from_json(rc.plan(graph, "pre-activation").to_json())
    del plan.rewrites[1]
    result = rc.apply(graph, plan)
    with torch.no_grad():
        wanted = partly(post, {0, 2, 3}, image()[0])
    assert np.array_equal(first_output(result.graph, image()), wanted.numpy())


# ---- what is refused, beside what is not ---------------------------------------------------------------------------


class Cell(nn.Module):
    """One residual block behind a stem, put together as `form` says."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.form = form
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 1, 1), nn.BatchNorm2d(8), nn.ReLU())
        self.a, self.b = nn.Conv2d(8, 8, 3, 1, 1), nn.Conv2d(8, 8, 3, 1, 1)
        self.n, self.m, self.o = nn.BatchNorm2d(8), nn.BatchNorm2d(8), nn.BatchNorm2d(8)
        self.narrow = nn.Conv2d(8, 4, 3, 1, 1)
        self.head = nn.Conv2d(8, 4, 1)

    def forward(self, x: torch.Tensor) -> Any:
        x = self.stem(x)
        return CELLS[self.form](self, x, self.b(F.relu(self.n(self.a(x)))))


def twice(value: torch.Tensor, first: Any, second: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return first(value), second(value)


# What is made of the block's input x and of what its last convolution makes, t.
CELLS: dict[str, Any] = {
    "plain": lambda net, x, t: net.head(F.relu(x + net.m(t))),
    "the activated value is read elsewhere": lambda net, x, t: twice(F.relu(x + net.m(t)), net.head, torch.neg),
    "the sum is read elsewhere": lambda net, x, t: twice(x + net.m(t), lambda y: net.head(F.relu(y)), net.head),
    "the sum is returned": lambda net, x, t: twice(x + net.m(t), lambda y: net.head(F.relu(y)), lambda y: y),
    "the norm is read elsewhere": lambda net, x, t: twice(net.m(t), lambda y: net.head(F.relu(x + y)), net.head),
    "linear bottleneck": lambda net, x, t: net.head(x + net.m(t)),
    "activation before the join": lambda net, x, t: net.head(F.relu(x + F.relu(net.m(t)))),
    "branches joined by channel": lambda net, x, t: net.head(
        F.relu(x + torch.cat([net.narrow(t.sigmoid()), net.narrow(t.tanh())], 1))
    ),
    "three terms": lambda net, x, t: net.head(F.relu(x + net.m(t) + net.o(net.a(x)))),
    "norms on both sides": lambda net, x, t: net.head(F.relu(net.o(x + net.m(t)))),
    "norm behind the sum": lambda net, x, t: net.head(F.relu(net.o(x + t))),
    "activation of a norm that is read twice": lambda net, x, t: twice(
        net.o(x + t), lambda y: net.head(F.relu(y)), net.head
    ),
    "concatenated": lambda net, x, t: net.head(F.relu(torch.cat([x, net.m(t)], 1))[:, 4:12]),
}


def cell(form: str, ir: str) -> Result:
    torch.manual_seed(0)
    model = Cell(form).eval()
    return rc.rewrite(captured(model, image(), ir), "pre-activation")


REFUSED = {
    "the sum is read elsewhere": "the sum is read elsewhere too: by ",
    "the sum is returned": "is an output of the graph",
    "the norm is read elsewhere": "which ends the branch, is read elsewhere too: by ",
    "linear bottleneck": "no activation follows the join, but ",
    "activation before the join": "the branch ends in the activation ",
    "branches joined by channel": "(concat), not in a contraction and its norm",
    "norms on both sides": "a norm stands on either side of the join",
    "activation of a norm that is read twice": "no activation alone follows the join and its norm",
    "concatenated": "a block of kind 'dense' whose paths a concat brings together has no such form",
}


@pytest.mark.parametrize(
    ("form", "ir"),
    [*((form, "fx") for form in REFUSED), ("the sum is returned", "onnx"), ("linear bottleneck", "onnx")],
)
def test_block_is_left_alone_and_the_reason_is_given(form: str, ir: str) -> None:
    result = cell(form, ir)
    assert not result.applied
    (reason,) = reasons(result)
    assert REFUSED[form] in reason


@pytest.mark.parametrize("ir", IRS)
@pytest.mark.parametrize("form", ["plain", "the activated value is read elsewhere", "norm behind the sum"])
def test_block_that_differs_in_nothing_that_matters_is_converted(form: str, ir: str) -> None:
    result = cell(form, ir)
    assert not result.refused
    assert [block.norm for block in rc.inspect(result.graph)] == ["pre"]


def test_sum_of_three_terms_is_left_alone() -> None:
    result = cell("three terms", "fx")
    assert not result.applied
    assert result.refused


def test_projection_without_norms_reads_the_same_in_both_forms() -> None:
    post, _ = both(Design(norm="none", depths=(1, 1)))
    result = converted(post)
    assert len(result.applied) == 1
    assert "the same in both forms" in reasons(result)[0]


@pytest.mark.parametrize(("spec", "pre"), [("pre-activation", True), ("post-activation", False)])
def test_network_that_has_the_form_is_left_alone(spec: str, pre: bool) -> None:
    result = converted(both(Design(pool=True))[pre], "fx", spec)
    assert not result.applied
    assert set(reasons(result)) == {f"it has the {spec} form already"}


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("spec", ["pre-activation", "post-activation"])
def test_transformer_is_left_alone(spec: str, first: bool) -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=first)
    result = rc.rewrite(rc.capture(layer.train(), (torch.randn(2, 4, 8),)), spec)
    assert not result.applied
    assert len(result.refused) == 2


def test_network_without_blocks_says_so() -> None:
    result = rc.rewrite(rc.capture(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()).eval(), image()), "pre-activation")
    assert reasons(result) == ["the model has no residual block"]


def test_one_refused_block_keeps_none_of_the_others() -> None:
    post, _ = both(Design())

    class Tapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = post

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            x = post.act(post.norm(post.conv(x)))
            totals = []
            for block in post.blocks:
                inner = block.norms[1](block.convs[1](block.act(block.norms[0](block.convs[0](x)))))
                totals.append(inner + block.skip(x))
                x = block.act(totals[-1])
            return post.head(x.mean((2, 3))), totals[1].mean()

    result = rc.rewrite(rc.capture(Tapped().eval(), image()), "pre-activation")
    assert len(result.applied) == 3
    (reason,) = reasons(result)
    assert "the sum is read elsewhere too" in reason
    with torch.no_grad():
        wanted = partly(post, {0, 2, 3}, image()[0])
    assert np.array_equal(first_output(result.graph, image()), wanted.numpy())


# ---- the edits that these passes brought --------------------------------------------------------------------------


def test_shape_that_an_operation_does_not_make_is_refused() -> None:
    graph = rc.capture(both(Design())[0], image())
    for value, message in (("relu", "was declared as"), ("conv.weight", "keeps its shape")):
        plan = Plan(rewrites=[Rewrite("here", "", "", (SetShape(value, (2, 8, 3, 3)),))])
        with pytest.raises(RescompileError, match=message):
            rc.apply(graph, plan)


@pytest.mark.parametrize("for_good", [True, False])
def test_norm_that_is_erased_for_good_is_not_missed_in_training(for_good: bool) -> None:
    graph = rc.capture(nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8)).eval(), image())
    norm = graph.outputs[0]
    edits = (ReplaceUses(norm.name, norm.producer.operands[0].name), Erase(norm.producer.name, for_good))
    model = rc.apply(graph, Plan(rewrites=[Rewrite("here", "", "", edits, "interface")])).model
    if for_good:
        assert model.train().training
    else:
        with pytest.raises(RescompileError, match="took away"):
            model.train()
