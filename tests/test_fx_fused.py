"""The fused kinds as torch operations: what they compute, differentiate, and survive."""

from __future__ import annotations

import copy

import pytest

from rescompile.kinds import ACTIVATIONS
from rescompile.kinds import OpKind as K

torch = pytest.importorskip("torch")
F = torch.nn.functional

from rescompile import fx_fused  # noqa: E402, F401 (defines the operations)
from rescompile.fx_capture import capture  # noqa: E402

OPS = torch.ops.rescompile
TORCH = {
    "none": lambda x: x,
    "relu": F.relu,
    "relu6": F.relu6,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "hardswish": F.hardswish,
}


def random(*shape):
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def conv(x, weight, bias, residual, inner="none", outer="relu", stride=(1, 1), pads=(1, 1, 1, 1), groups=1):
    return OPS.fused_conv(x, weight, bias, residual, stride, pads, (1,) * len(stride), groups, inner, outer)


def test_all_activations_are_known_to_these_tests():
    assert set(TORCH) == set(ACTIVATIONS)


@pytest.mark.parametrize("inner", TORCH)
@pytest.mark.parametrize("outer", TORCH)
def test_fused_linear_is_outer_of_residual_plus_inner_of_linear(inner, outer):
    torch.manual_seed(0)
    x, weight, bias, residual = random(3, 4), random(5, 4), random(5), random(3, 5)
    wanted = TORCH[outer](TORCH[inner](F.linear(x, weight, bias)) + residual)
    torch.testing.assert_close(OPS.fused_linear(x, weight, bias, residual, True, inner, outer), wanted)
    torch.testing.assert_close(OPS.fused_linear(x, weight.T, bias, residual, False, inner, outer), wanted)


def test_relu_before_and_after_the_sum_are_different_things():
    torch.manual_seed(0)
    x, weight, residual = random(1, 2, 4, 4), random(2, 2, 3, 3), random(1, 2, 4, 4)
    before = conv(x, weight, None, residual, inner="relu", outer="none")
    after = conv(x, weight, None, residual, inner="none", outer="relu")
    torch.testing.assert_close(before, F.relu(F.conv2d(x, weight, padding=1)) + residual)
    torch.testing.assert_close(after, F.relu(F.conv2d(x, weight, padding=1) + residual))
    assert not torch.allclose(before, after, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_fused_conv_takes_one_two_and_three_dimensions(dims):
    torch.manual_seed(0)
    x, weight, bias = random(1, 2, *[5] * dims), random(4, 1, *[3] * dims), random(4)
    function = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[dims]
    found = conv(x, weight, bias, None, stride=(2,) * dims, pads=(1,) * (2 * dims), groups=2)
    torch.testing.assert_close(found, F.relu(function(x, weight, bias, stride=2, padding=1, groups=2)))


def test_fused_conv_takes_pads_that_differ_at_the_ends():
    torch.manual_seed(0)
    x, weight = random(1, 1, 4, 4), random(1, 1, 2, 2)
    wanted = F.relu(F.conv2d(F.pad(x, (1, 2, 0, 1)), weight))
    torch.testing.assert_close(conv(x, weight, None, None, pads=(0, 1, 1, 2)), wanted)


@pytest.mark.parametrize("norm", ["layer", "rms"])
def test_add_norm_gives_the_norm_and_the_sum(norm):
    torch.manual_seed(0)
    x, residual, weight, bias = random(2, 3, 4), random(2, 3, 4), random(4), random(4)
    normed, total = OPS.add_norm(x, residual, weight, bias if norm == "layer" else None, norm, -1, 1e-5)
    torch.testing.assert_close(total, x + residual)
    if norm == "layer":
        torch.testing.assert_close(normed, F.layer_norm(x + residual, (4,), weight, bias, 1e-5))
    else:
        torch.testing.assert_close(normed, F.rms_norm(x + residual, (4,), weight, 1e-5))


def test_add_norm_without_weight_takes_the_shape_from_the_operand():
    torch.manual_seed(0)
    x, residual = random(2, 3, 4), random(2, 3, 4)
    normed, _ = OPS.add_norm(x, residual, None, None, "layer", -2, 1e-5)
    torch.testing.assert_close(normed, F.layer_norm(x + residual, (3, 4)))


def test_first_and_second_derivatives_of_fused_conv_are_right():
    torch.manual_seed(0)
    operands = (random(1, 1, 3, 3), random(1, 1, 3, 3), random(1), random(1, 1, 3, 3))
    function = lambda x, w, b, r: conv(x, w, b, r, inner="tanh", outer="silu")  # noqa: E731
    assert torch.autograd.gradcheck(function, operands)
    assert torch.autograd.gradgradcheck(function, operands)


def test_first_and_second_derivatives_of_fused_linear_are_right():
    torch.manual_seed(0)
    operands = (random(2, 3), random(4, 3), random(4), random(2, 4))
    function = lambda x, w, b, r: OPS.fused_linear(x, w, b, r, True, "gelu", "tanh")  # noqa: E731
    assert torch.autograd.gradcheck(function, operands)
    assert torch.autograd.gradgradcheck(function, operands)


def test_first_and_second_derivatives_of_add_norm_are_right():
    torch.manual_seed(0)
    operands = (random(2, 4), random(2, 4), random(4), random(4))
    function = lambda x, r, w, b: OPS.add_norm(x, r, w, b, "layer", -1, 1e-5)  # noqa: E731
    assert torch.autograd.gradcheck(function, operands)
    assert torch.autograd.gradgradcheck(function, operands)


def fused_module():
    """relu(conv(x) + x) as one operation, and the module and input that it was made of."""
    torch.manual_seed(0)

    class Block(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = torch.nn.Conv2d(3, 3, 3, padding=1)

        def forward(self, x):
            return torch.relu(self.conv(x) + x)

    model, x = Block().eval(), torch.randn(2, 3, 5, 5)
    graph = capture(model, x)
    conv_, add, relu = graph.ops
    attrs = {**conv_.attrs, "outer": "relu"}
    graph.fuse([conv_, add, relu], K.FUSED_CONV, [*conv_.inputs, graph.inputs[0]], [relu.output], attrs)
    graph.commit()
    return graph, model, x


def calls(module):
    return [str(node.target) for node in module.graph.nodes if node.op == "call_function"]


def test_a_fused_operation_is_one_node_through_export_and_a_file(tmp_path):
    graph, model, x = fused_module()
    program = torch.export.export(graph.to_user(), (x,), strict=False)
    assert calls(program) == ["rescompile.fused_conv.default"]
    torch.export.save(program, tmp_path / "m.pt2")
    loaded = torch.export.load(tmp_path / "m.pt2")
    assert calls(loaded) == ["rescompile.fused_conv.default"]
    torch.testing.assert_close(loaded.module()(x), model(x), rtol=1e-5, atol=1e-5)


def test_a_fused_operation_survives_a_deep_copy():
    graph, model, x = fused_module()
    twin = copy.deepcopy(graph.to_user())
    torch.testing.assert_close(twin(x), model(x), rtol=1e-5, atol=1e-5)


def test_a_fused_operation_decomposes_into_its_parts():
    graph, model, x = fused_module()
    program = torch.export.export(graph.to_user(), (x,), strict=False).run_decompositions()
    assert not any("rescompile" in name for name in calls(program))
    torch.testing.assert_close(program.module()(x), model(x), rtol=1e-5, atol=1e-5)


def test_a_fused_operation_exports_to_onnx():
    pytest.importorskip("onnxscript")
    graph, _, x = fused_module()
    program = torch.onnx.export(graph.to_user(), (x,), dynamo=True, verbose=False)
    assert {node.op_type for node in program.model.graph} == {"Conv", "Add", "Relu"}


def test_a_fused_operation_is_traced_by_the_compiler():
    graph, model, x = fused_module()
    compiled = torch.compile(graph.to_user(), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), model(x), rtol=1e-5, atol=1e-5)


def test_a_fused_module_learns_as_the_original_does():
    graph, model, x = fused_module()
    module = graph.to_user()
    module(x).square().sum().backward()
    model(x).square().sum().backward()
    torch.testing.assert_close(module.conv.weight.grad, model.conv.weight.grad, rtol=1e-4, atol=1e-4)
