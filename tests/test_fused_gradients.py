"""Fused models train: first derivatives of every fused form, and whole curves beside those of the original."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest

from rescompile.errors import RescompileError
from rescompile.kinds import ACTIVATIONS

torch = pytest.importorskip("torch")
nn = torch.nn
F = nn.functional

import rescompile as rc  # noqa: E402
from rescompile import fx_fused  # noqa: E402, F401 (defines the operations)
from rescompile.plans import Plan, Rewrite, region_edit  # noqa: E402
from rescompile.rewriting import apply_plan  # noqa: E402
from tests.residual_models import livened  # noqa: E402

OPS = torch.ops.rescompile


def random(*shape):
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def smooth(form: Callable[..., object], *operands) -> bool:
    """Whether the analytic first derivatives are the numeric ones. A kink under a point would be no error of theirs."""
    return torch.autograd.gradcheck(form, operands, eps=1e-6, atol=1e-6, rtol=1e-4)


# ---- first derivatives of each form ----------------------------------------------------------------------------------


@pytest.mark.parametrize("inner", ACTIVATIONS)
def test_first_derivatives_of_fused_linear(inner: str) -> None:
    torch.manual_seed(0)
    operands = random(2, 2), random(3, 2), random(3), random(2, 3)
    for outer in ACTIVATIONS:
        assert smooth(lambda x, w, b, r: OPS.fused_linear(x, w, b, r, True, inner, outer), *operands), outer  # noqa: B023


def test_first_derivatives_of_fused_linear_without_residual_or_bias() -> None:
    torch.manual_seed(0)
    operands = random(2, 2), random(2, 3)
    assert smooth(lambda x, w: OPS.fused_linear(x, w, None, None, False, "none", "gelu"), *operands)


@pytest.mark.parametrize("side", ["inner", "outer"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_first_derivatives_of_fused_conv(activation: str, side: str) -> None:
    torch.manual_seed(0)
    sides = {"inner": "none", "outer": "none", side: activation}
    operands = random(1, 2, 3, 3), random(2, 2, 3, 3), random(2), random(1, 2, 3, 3)
    form = lambda x, w, b, r: OPS.fused_conv(  # noqa: E731
        x, w, b, r, (1, 1), (1, 1, 1, 1), (1, 1), 1, sides["inner"], sides["outer"]
    )
    assert smooth(form, *operands)


CONVS = {
    "without bias": ((1, 2, 4, 4), (2, 2, 3, 3), False, {"pads": (1, 1, 1, 1)}),
    "strided": ((1, 2, 5, 5), (2, 2, 3, 3), True, {"stride": (2, 2), "pads": (1, 1, 1, 1)}),
    "dilated": ((1, 1, 5, 5), (1, 1, 2, 2), True, {"dilation": (2, 2)}),
    "depthwise": ((1, 3, 4, 4), (3, 1, 3, 3), True, {"groups": 3, "pads": (1, 1, 1, 1)}),
    "grouped": ((1, 4, 3, 3), (4, 2, 1, 1), True, {"groups": 2}),
    "uneven pads": ((1, 1, 4, 4), (1, 1, 2, 2), True, {"pads": (0, 1, 1, 2)}),
    "1d": ((1, 2, 5), (2, 2, 3), True, {"stride": (1,), "pads": (1, 1), "dilation": (1,)}),
    "3d": ((1, 1, 3, 3, 3), (1, 1, 2, 2, 2), True, {"stride": (1,) * 3, "pads": (0,) * 6, "dilation": (1,) * 3}),
}


@pytest.mark.parametrize("case", CONVS)
def test_first_derivatives_of_fused_conv_by_option(case: str) -> None:
    torch.manual_seed(0)
    shape, weight, with_bias, options = CONVS[case]
    o = {"stride": (1, 1), "pads": (0, 0, 0, 0), "dilation": (1, 1), "groups": 1, **options}

    def form(x, w, r, b=None):
        return OPS.fused_conv(x, w, b, r, o["stride"], o["pads"], o["dilation"], o["groups"], "tanh", "silu")

    x, w = random(*shape), random(*weight)
    bias = [random(weight[0])] if with_bias else []
    residual = random(*OPS.fused_conv(x, w, None, None, *o.values(), "none", "none").shape)
    assert smooth(form, x, w, residual, *bias)


@pytest.mark.parametrize("axis", [-1, -2])
@pytest.mark.parametrize(
    ("norm", "affine"),
    [("layer", "weight and bias"), ("layer", "weight"), ("layer", "none"), ("rms", "weight"), ("rms", "none")],
)
def test_first_derivatives_of_add_norm_by_both_outputs(norm: str, affine: str, axis: int) -> None:
    torch.manual_seed(0)
    extents = (2, 3)[2 + axis :]
    x, residual = random(2, 2, 3), random(2, 2, 3)
    weight = random(*extents) if affine != "none" else None
    bias = random(*extents) if affine == "weight and bias" else None
    given = [x, residual, *(tensor for tensor in (weight, bias) if tensor is not None)]

    def form(x, r, w=None, b=None):
        return OPS.add_norm(x, r, w, b, norm, axis, 1e-5)

    assert smooth(form, *given)


class Program(nn.Module):
    """A function of an input, and the parameters that it uses."""

    def __init__(self, function, **parameters):
        super().__init__()
        self.function = function
        for name, shape in parameters.items():
            self.register_parameter(name, nn.Parameter(torch.randn(shape)))

    def forward(self, x):
        return self.function(self, x)


def gated(m, x):
    """T·h + (1 − T)·x"""
    gate = torch.sigmoid(F.linear(x, m.t, m.b))
    return gate * torch.tanh(F.linear(x, m.h)) + (1 - gate) * x


REGIONS = {
    "layer scale": (lambda m, x: x + m.gamma * F.linear(x, m.w), (2, 3, 4), {"gamma": (4,), "w": (4, 4)}),
    "gate": (gated, (3, 4), {"t": (4, 4), "b": (4,), "h": (4, 4)}),
    "both outputs": (
        lambda m, x: (F.rms_norm(s := x + 0.5 * F.gelu(F.linear(x, m.w)), (4,), m.g, 1e-5), s),
        (2, 3, 4),
        {"w": (4, 4), "g": (4,)},
    ),
    "moved skip": (
        lambda m, x: (m.g * F.linear(x.permute(0, 2, 3, 1), m.w)).permute(0, 3, 1, 2).roll(1, 2).flip(3) + x,
        (1, 2, 3, 3),
        {"g": (2,), "w": (2, 2)},
    ),
    "window": (lambda m, x: x.reshape(2, 2, 2, 4) + F.silu(x).reshape(2, 2, 2, 4) * m.g, (2, 4, 4), {"g": (4,)}),
    "concat": (
        lambda m, x: F.softplus(torch.cat([x, F.pad(F.conv2d(x, m.w)[:, :, 1:], (0, 0, 0, 1))], 1)),
        (1, 2, 3, 3),
        {"w": (2, 2, 1, 1)},
    ),
    "group norm": (
        lambda m, x: F.group_norm(x + F.conv_transpose2d(x, m.w, padding=1), 2, m.g, m.b),
        (1, 4, 3, 3),
        {"w": (4, 4, 3, 3), "g": (4,), "b": (4,)},
    ),
    "pool": (lambda m, x: F.elu(F.avg_pool2d(x, 3, 1, 1) - x) * m.g, (1, 2, 4, 4), {"g": (2, 1, 1)}),
    "matmul": (lambda m, x: torch.matmul(x, m.w).mul(0.3).exp() + x, (2, 3, 4), {"w": (4, 4)}),
}


def as_region(model: nn.Module, x: torch.Tensor):
    """The model with all of its operations in one."""
    graph = rc.capture(model.eval(), (x,))
    edit = region_edit(graph, graph.ops, graph.outputs)
    assert not isinstance(edit, str), edit
    return apply_plan(graph, Plan(graph.name, graph.ir, [Rewrite("all", "all  →  one", "as asked", (edit,))]))


@pytest.mark.parametrize("name", REGIONS)
def test_first_derivatives_of_a_fused_region(name: str) -> None:
    torch.manual_seed(0)
    function, shape, parameters = REGIONS[name]
    model = Program(function, **parameters).double()
    x = random(*shape)
    result = as_region(model, x.detach())
    assert [op.kind.value for op in result.graph] == ["fused_region"]
    assert result.verification.ok, str(result.verification)
    region = result.model
    names = [key for key, _ in region.named_parameters()]
    weights = [parameter.detach().clone().requires_grad_() for parameter in region.parameters()]

    def form(x, *values):
        return torch.func.functional_call(region, dict(zip(names, values, strict=True)), (x,))

    assert set(names) == set(parameters)
    assert smooth(form, x, *weights)


def test_batch_norm_in_training_is_in_no_region() -> None:
    model = nn.Sequential(nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2))
    graph = rc.capture(model.train(), torch.randn(2, 2, 3, 3))
    assert "running statistics" in str(region_edit(graph, graph.ops, graph.outputs))
    graph = rc.capture(model.eval(), torch.randn(2, 2, 3, 3))
    assert not isinstance(region_edit(graph, graph.ops, graph.outputs), str)


def test_region_that_holds_a_batch_norm_refuses_to_train() -> None:
    model = livened(nn.Sequential(nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2)))
    region = as_region(model, torch.randn(2, 2, 3, 3)).model
    with pytest.raises(RescompileError, match="took away 'batch_norm', which training needs"):
        region.train()


# ---- whole models ----------------------------------------------------------------------------------------------------


class ResNetBlock(nn.Module):
    """relu(x + N(W·relu(N(W·x)))), with an optional norm: batch statistics keep training from fusing the sum."""

    def __init__(self, norm=True, rate=0.0):
        super().__init__()
        self.branch = nn.Sequential(
            nn.Conv2d(4, 4, 3, padding=1, bias=not norm),
            nn.BatchNorm2d(4) if norm else nn.Identity(),
            nn.ReLU(),
            nn.Conv2d(4, 4, 3, padding=1, bias=not norm),
            nn.BatchNorm2d(4) if norm else nn.Identity(),
            nn.Dropout(rate),
        )

    def forward(self, x):
        return torch.relu(self.branch(x) + x)


class TransformerBlock(nn.Module):
    """x + A(N(x)), then x + F(N(x))."""

    def __init__(self, rate=0.0):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(8), nn.LayerNorm(8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True, dropout=rate)
        self.up, self.down, self.drop = nn.Linear(8, 16), nn.Linear(16, 8), nn.Dropout(rate)

    def forward(self, x):
        h = self.norm1(x)
        x = x + self.drop(self.attention(h, h, h, need_weights=False)[0])
        return x + self.drop(self.down(F.gelu(self.up(self.norm2(x)))))


class ConvNeXtBlock(nn.Module):
    """x + γ·F(N(W·x)), the branch channels last."""

    def __init__(self):
        super().__init__()
        self.depthwise = nn.Conv2d(4, 4, 7, padding=3, groups=4)
        self.norm, self.up, self.down = nn.LayerNorm(4), nn.Linear(4, 16), nn.Linear(16, 4)
        self.gamma = nn.Parameter(torch.full((4,), 0.5))

    def forward(self, x):
        h = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        return x + (self.gamma * self.down(F.gelu(self.up(h)))).permute(0, 3, 1, 2)


class DenseBlock(nn.Module):
    """Twice [x, W·relu(N(x))], then a transition back to the width of x."""

    def __init__(self):
        super().__init__()
        self.norms = nn.ModuleList([nn.BatchNorm2d(4), nn.BatchNorm2d(6)])
        self.convs = nn.ModuleList([nn.Conv2d(width, 2, 3, padding=1) for width in (4, 6)])
        self.transition = nn.Conv2d(8, 4, 1)

    def forward(self, x):
        for norm, conv in zip(self.norms, self.convs, strict=True):
            x = torch.cat([x, conv(torch.relu(norm(x)))], 1)
        return self.transition(x)


class HighwayLayer(nn.Module):
    """T·h + (1 − T)·x"""

    def __init__(self):
        super().__init__()
        self.gate, self.work = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        gate = torch.sigmoid(self.gate(x))
        return gate * torch.relu(self.work(x)) + (1 - gate) * x


IMAGE, TOKENS = (2, 4, 6, 6), (2, 5, 8)
MODELS = {
    "resnet": (lambda: ResNetBlock(), IMAGE),
    "resnet without norms": (lambda: ResNetBlock(norm=False), IMAGE),
    "resnet with dropout": (lambda: ResNetBlock(norm=False, rate=0.2), IMAGE),
    "transformer": (lambda: TransformerBlock(), TOKENS),
    "transformer with dropout": (lambda: TransformerBlock(0.1), TOKENS),
    "convnext": (lambda: ConvNeXtBlock(), IMAGE),
    "dense": (lambda: DenseBlock(), IMAGE),
    "highway": (lambda: HighwayLayer(), TOKENS),
}
JOINS = {"resnet without norms": 2, "transformer": 2, "transformer with dropout": 1}  # fused in training form, at least
TRAINABLE = "fuse{trainable=true}"


def stack(name: str) -> tuple[nn.Module, tuple[int, ...]]:
    torch.manual_seed(0)
    make, shape = MODELS[name]
    return nn.Sequential(make(), *([] if shape == TOKENS else [make()])), shape


def gradients(model: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    x = x.clone().requires_grad_()
    torch.manual_seed(1)
    (model(x) * torch.linspace(-1, 1, x.numel(), dtype=x.dtype).reshape(x.shape)).sum().backward()
    return {"input": x.grad, **{name: parameter.grad for name, parameter in model.named_parameters()}}


def curve(model: nn.Module, shape: tuple[int, ...], steps: int = 20) -> list[float]:
    optimiser = torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.9)
    losses = []
    for step in range(steps):
        torch.manual_seed(step)
        loss = model(torch.randn(*shape)).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    return losses


def same_state(a: nn.Module, b: nn.Module, tolerance: float) -> None:
    assert list(a.state_dict()) == list(b.state_dict())
    for key, tensor in a.state_dict().items():
        torch.testing.assert_close(tensor, b.state_dict()[key], rtol=tolerance, atol=tolerance, msg=key)


# Each model in the form in which something could go wrong: dropouts and batch statistics in training.
@pytest.mark.parametrize(
    ("name", "training"),
    [
        ("resnet", True),
        ("resnet without norms", False),
        ("transformer", False),
        ("transformer with dropout", True),
        ("convnext", False),
        ("dense", True),
    ],
)
def test_gradients_and_one_step_of_the_fused_model_are_those_of_the_original(name: str, training: bool) -> None:
    model, shape = stack(name)
    model = model.double().train(training)
    x = torch.randn(*shape, dtype=torch.float64)
    fused = rc.rewrite(copy.deepcopy(model), [TRAINABLE], x).model
    expected, found = gradients(model, x), gradients(fused, x)
    assert list(found) == list(expected)
    for key, gradient in expected.items():
        torch.testing.assert_close(found[key], gradient, rtol=1e-12, atol=1e-12, msg=key)
    for each in (model, fused):
        torch.optim.SGD(each.parameters(), lr=0.1).step()
    same_state(fused, model, 1e-12)


@pytest.mark.parametrize(
    ("name", "captured_in_training"),
    [
        *((name, True) for name in MODELS),
        ("resnet without norms", False),
        ("transformer with dropout", False),
        ("dense", False),
    ],
)
def test_fused_model_trains_and_evaluates_as_the_original(name: str, captured_in_training: bool) -> None:
    model, shape = stack(name)
    result = rc.rewrite(model.train(captured_in_training), [TRAINABLE], torch.randn(*shape))
    assert result.verification.ok, str(result.verification)
    assert not result.rolled_back
    fused = result.model
    assert fused.training is result.graph.training is captured_in_training
    assert len(result.applied) >= JOINS.get(name, 0)
    model.train()
    fused.train()
    assert curve(fused, shape) == pytest.approx(curve(model, shape), rel=1e-5)
    same_state(fused, model, 1e-5)
    model.eval()
    fused.eval()
    x = torch.randn(*shape)
    torch.testing.assert_close(fused(x), model(x), rtol=1e-5, atol=1e-5)


def test_folding_is_refused_in_training_form_with_its_reason() -> None:
    model, shape = stack("resnet")
    result = rc.rewrite(model.train(), ["fuse"], torch.randn(*shape))
    reasons = [refusal.reason for refusal in result.refused if refusal.pass_name == "fold-batch-norm"]
    assert len(reasons) == 4
    assert all("in training the statistics are the batch's own" in reason for reason in reasons)
    assert not any(rewrite.pass_name == "fold-batch-norm" for rewrite in result.applied)


def test_model_whose_norms_were_folded_refuses_to_train() -> None:
    model, shape = stack("resnet")
    fused = rc.rewrite(livened(model), ["fuse"], torch.randn(*shape)).model
    with pytest.raises(RescompileError, match="took away 'batch_norm' and 3 more, which training needs"):
        fused.train()


def test_join_that_would_take_a_dropout_along_is_refused_where_training_wants_it() -> None:
    model, shape = stack("transformer with dropout")
    x = torch.randn(*shape)
    plan = rc.plan(model.eval(), TRAINABLE, x)
    (refusal,) = plan.refusals
    assert "'dropout_1' does something else in training: trainable=false lets it go into the fusion" in refusal.reason
    with pytest.raises(RescompileError, match=r"took away .dropout.* which training needs"):
        rc.rewrite(model, ["fuse"], x).model.train()


def test_file_that_draws_random_numbers_is_not_verified_and_says_why() -> None:
    ir = pytest.importorskip("onnx_ir")
    onnx = pytest.importorskip("onnx")
    helper = onnx.helper
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["h"]),
        helper.make_node("RandomNormalLike", ["h"], ["r"]),
        helper.make_node("Mul", ["h", "r"], ["d"]),
        helper.make_node("Add", ["x", "d"], ["s"]),
        helper.make_node("LayerNormalization", ["s", "g"], ["y"]),
    ]
    tensors = {"w": torch.eye(8), "g": torch.ones(8)}
    types = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [2, 8]) for name in "xy"]
    constants = [onnx.numpy_helper.from_array(tensor.numpy(), name) for name, tensor in tensors.items()]
    graph = helper.make_graph(nodes, "noisy", types[:1], types[1:], constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    result = rc.rewrite(ir.serde.deserialize_model(model), ["fuse"])
    assert len(result.applied) == 1
    assert str(result.verification) == "not verified: the model draws other random numbers on each call"


def test_training_form_is_verified_with_the_same_random_numbers_and_leaves_torchs_own_alone() -> None:
    model, shape = stack("transformer with dropout")
    graph = rc.capture(model.train(), torch.randn(*shape))
    inputs = {value.name: torch.randn(*shape).numpy() for value in graph.inputs}
    before = torch.random.get_rng_state()
    first, second = graph.run(inputs), graph.clone().run(inputs)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all((first[name] == second[name]).all() for name in first)
