"""Every torch spelling that rescompile knows: read into the same kinds, and written back to the same numbers."""

from __future__ import annotations

import operator

import numpy as np
import pytest

from rescompile.errors import GraphError
from rescompile.kinds import OpKind as K

torch = pytest.importorskip("torch")
nn = torch.nn
F = torch.nn.functional

from rescompile.fx_capture import capture  # noqa: E402
from rescompile.fx_emit import EMITTERS  # noqa: E402

X, Y, IMAGE = (2, 4, 6), (2, 4, 6), (2, 4, 8, 8)


class Call(nn.Module):
    """A function as a module."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *inputs):
        return self.function(*inputs)


class CallTwo(Call):
    def forward(self, x, y):
        return self.function(x, y)


class CallOne(Call):
    def forward(self, x):
        return self.function(x)


def kinds_of(graph):
    return [op.kind for op in graph if op.kind is not K.IDENTITY]


def wrap(function, shapes):
    if isinstance(function, nn.Module):
        return function.eval()
    return (CallOne if len(shapes) == 1 else CallTwo)(function).eval()


def tensors(shapes):
    torch.manual_seed(3)
    return tuple(torch.rand(shape) * 0.8 + 0.1 for shape in shapes)


def check(graph, model, inputs, tolerance=1e-5):
    """The graph computes what the model does: as it is, and with every operation written anew."""
    with torch.no_grad():
        result = model(*(x.clone() for x in inputs))
    results = [t.numpy() for t in (result if isinstance(result, tuple | list) else (result,))]
    named = {value.name: x.numpy() for value, x in zip(graph.inputs, inputs, strict=True)}
    for found, wanted in zip(graph.run(named).values(), results, strict=True):
        np.testing.assert_allclose(found, wanted, rtol=tolerance, atol=tolerance)
    anew = graph.clone()
    for op in anew.ops:
        if anew.cannot_emit(op.kind) or op.output.shape is None:
            continue
        anew.fuse([op], op.kind, op.inputs, op.outputs, dict(op.attrs))
    anew.commit()
    for found, wanted in zip(anew.run(named).values(), results, strict=True):
        np.testing.assert_allclose(found, wanted, rtol=tolerance, atol=tolerance)


def in_place_add(x, y):
    z = x * 1.5
    z += y
    return z


def weight_norm_conv(x):
    return F.conv2d(x, torch.ones(4, 2, 3, 3), torch.ones(4), stride=2, padding=1, groups=2)


# What is called, shapes of its inputs, the kinds it is.
SPELLINGS = {
    "add": (lambda x, y: x + y, (X, Y), [K.ADD]),
    "torch.add alpha": (lambda x, y: torch.add(x, y, alpha=2), (X, Y), [K.ADD]),
    "method add": (lambda x, y: x.add(y, alpha=0.5), (X, Y), [K.ADD]),
    "operator.iadd": (lambda x, y: operator.iadd(x * 1.5, y), (X, Y), [K.MUL, K.ADD]),
    "in place": (in_place_add, (X, Y), [K.MUL, K.ADD]),
    "sub": (lambda x, y: torch.sub(x, y, alpha=3), (X, Y), [K.ADD]),
    "rsub": (lambda x: torch.rsub(x, 1.0), (X,), [K.ADD]),
    "1 - x": (lambda x: 1 - x, (X,), [K.ADD]),
    "addcmul": (lambda x, y: torch.addcmul(x, x, y, value=0.5), (X, Y), [K.MUL, K.ADD]),
    "addcdiv": (lambda x, y: x.addcdiv(x, y), (X, Y), [K.DIV, K.ADD]),
    "lerp number": (lambda x, y: torch.lerp(x, y, 0.25), (X, Y), [K.ADD]),
    "lerp tensor": (lambda x, y: torch.lerp(x, y, x.sigmoid()), (X, Y), [K.SIGMOID, K.ADD, K.MUL, K.ADD]),
    "sum of list": (lambda x, y: sum([x, y]), (X, Y), [K.ADD]),
    "stack and sum": (lambda x, y: torch.stack([x, y]).sum(0), (X, Y), [K.ADD]),
    "stack and mean": (lambda x, y: torch.stack([x, y], -1).mean(-1), (X, Y), [K.ADD]),
    "mul number": (lambda x: x * 2, (X,), [K.MUL]),
    "div": (lambda x, y: x / y, (X, Y), [K.DIV]),
    "floor div": (lambda x, y: torch.div(x, y, rounding_mode="floor"), (X, Y), [K.DIV, K.FLOOR]),
    "pow": (lambda x: x**2, (X,), [K.POW]),
    "scalar pow": (lambda x: 2.0**x, (X,), [K.POW]),
    "square": (lambda x: x.square(), (X,), [K.MUL]),
    "maximum": (torch.maximum, (X, Y), [K.MAXIMUM]),
    "max of two": (torch.max, (X, Y), [K.MAXIMUM]),
    "minimum": (torch.minimum, (X, Y), [K.MINIMUM]),
    "remainder": (lambda x: x % 0.3, (X,), [K.MOD]),
    "where": (lambda x, y: torch.where(x > y, x, y), (X, Y), [K.GREATER, K.WHERE]),
    "where numbers": (lambda x: torch.where(x >= 0.5, 1.0, x), (X,), [K.GREATER_EQUAL, K.WHERE]),
    "masked_fill": (lambda x: x.masked_fill(x < 0.5, -1.0), (X,), [K.LESS, K.WHERE]),
    "logic": (lambda x: ((x < 0.7) & (x != 0.5) | ~(x <= 0.2)).float(), (X,), None),
    "neg": (lambda x: -x, (X,), [K.NEG]),
    "abs": (abs, (X,), [K.ABS]),
    "exp log": (lambda x: torch.log(x.exp()), (X,), [K.EXP, K.LOG]),
    "roots": (
        lambda x: x.sqrt() + x.rsqrt() + torch.reciprocal(x),
        (X,),
        [K.SQRT, K.RSQRT, K.ADD, K.RECIPROCAL, K.ADD],
    ),
    "trigonometry": (lambda x: x.sin() * torch.cos(x), (X,), [K.SIN, K.COS, K.MUL]),
    "erf": (lambda x: torch.special.erf(x), (X,), [K.ERF]),
    "rounding": (lambda x: x.floor() + x.ceil() + x.round() + x.sign(), (X,), None),
    "isnan": (lambda x: torch.isnan(x).float(), (X,), [K.IS_NAN, K.CAST]),
    "F.relu": (F.relu, (X,), [K.RELU]),
    "relu method": (lambda x: x.relu(), (X,), [K.RELU]),
    "relu in place": (lambda x: F.relu(x - 0.5, inplace=True), (X,), [K.ADD, K.RELU]),
    "torch.relu_": (lambda x: torch.relu_(x - 0.5), (X,), [K.ADD, K.RELU]),
    "relu_ method": (lambda x: (x - 0.5).relu_(), (X,), [K.ADD, K.RELU]),
    "nn.ReLU": (nn.ReLU(), (X,), [K.RELU]),
    "relu6": (F.relu6, (X,), [K.CLIP]),
    "clamp": (lambda x: x.clamp(0.2, 0.6), (X,), [K.CLIP]),
    "clamp_min": (lambda x: x.clamp_min(0.3), (X,), [K.CLIP]),
    "hardtanh": (nn.Hardtanh(-0.5, 0.5), (X,), [K.CLIP]),
    "leaky_relu": (lambda x: F.leaky_relu(x - 0.5, 0.2), (X,), [K.ADD, K.LEAKY_RELU]),
    "prelu": (nn.PReLU(4), (X,), [K.PRELU]),
    "elu": (lambda x: F.elu(x - 0.5, alpha=0.7), (X,), [K.ADD, K.ELU]),
    "gelu": (F.gelu, (X,), [K.GELU]),
    "gelu tanh": (nn.GELU(approximate="tanh"), (X,), [K.GELU]),
    "silu": (F.silu, (X,), [K.SILU]),
    "sigmoid": (torch.sigmoid, (X,), [K.SIGMOID]),
    "tanh": (lambda x: x.tanh(), (X,), [K.TANH]),
    "hardsigmoid": (F.hardsigmoid, (X,), [K.HARDSIGMOID]),
    "hardswish": (nn.Hardswish(), (X,), [K.HARDSWISH]),
    "softplus": (F.softplus, (X,), [K.SOFTPLUS]),
    "mish": (F.mish, (X,), [K.MISH]),
    "glu": (lambda x: F.glu(x, -1), (X,), [K.SPLIT, K.SIGMOID, K.MUL]),
    "dropout off": (nn.Dropout(0.5), (X,), []),
    "identity": (nn.Identity(), (X,), []),
    "contiguous, clone, detach": (lambda x: x.contiguous().clone().detach(), (X,), []),
    "conv1d": (nn.Conv1d(4, 5, 3, padding="same", dilation=2), (X,), [K.CONV]),
    "conv2d": (nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2), (IMAGE,), [K.CONV]),
    "conv2d even kernel, same": (nn.Conv2d(4, 6, 2, padding="same"), (IMAGE,), [K.CONV]),
    "conv3d": (nn.Conv3d(2, 3, 3, padding=(1, 0, 1)), ((1, 2, 4, 4, 4),), [K.CONV]),
    "conv_transpose2d": (
        nn.ConvTranspose2d(4, 3, 3, stride=2, padding=1, output_padding=1),
        (IMAGE,),
        [K.CONV_TRANSPOSE],
    ),
    "linear": (nn.Linear(6, 5), (X,), [K.LINEAR]),
    "linear without bias": (nn.Linear(6, 5, bias=False), (X,), [K.LINEAR]),
    "matmul": (lambda x, y: x @ y.transpose(1, 2), (X, Y), [K.PERMUTE, K.MATMUL]),
    "bmm": (lambda x, y: torch.bmm(x, y.mT), (X, Y), [K.PERMUTE, K.MATMUL]),
    "baddbmm": (lambda x, y: torch.baddbmm(x @ y.mT, x, y.mT, beta=0.5), (X, Y), None),
    "addmm of two paths": (lambda x, y: torch.addmm(x, x, y, alpha=2), ((4, 4), (4, 4)), [K.MATMUL, K.ADD]),
    "einsum": (lambda x, y: torch.einsum("bij,bkj->bik", x, y), (X, Y), [K.EINSUM]),
    "batch_norm": (nn.BatchNorm2d(4), (IMAGE,), [K.BATCH_NORM]),
    "layer_norm": (nn.LayerNorm(6), (X,), [K.LAYER_NORM]),
    "layer_norm over two": (lambda x: F.layer_norm(x, (4, 6)), (X,), [K.LAYER_NORM]),
    "rms_norm": (nn.RMSNorm(6, eps=1e-6), (X,), [K.RMS_NORM]),
    "group_norm": (nn.GroupNorm(2, 4), (IMAGE,), [K.GROUP_NORM]),
    "instance_norm": (nn.InstanceNorm2d(4, affine=True), (IMAGE,), [K.INSTANCE_NORM]),
    "softmax": (lambda x: x.softmax(-1), (X,), [K.SOFTMAX]),
    "log_softmax": (nn.LogSoftmax(dim=1), (X,), [K.SOFTMAX]),
    "max_pool2d": (nn.MaxPool2d(3, 2, 1), (IMAGE,), [K.MAX_POOL]),
    "F.max_pool2d": (lambda x: F.max_pool2d(x, 2), (IMAGE,), [K.MAX_POOL]),
    "avg_pool2d": (nn.AvgPool2d(2, count_include_pad=False), (IMAGE,), [K.AVG_POOL]),
    "adaptive_avg_pool2d": (nn.AdaptiveAvgPool2d((1, 1)), (IMAGE,), [K.ADAPTIVE_AVG_POOL]),
    "interpolate": (lambda x: F.interpolate(x, scale_factor=2.0), (IMAGE,), [K.INTERPOLATE]),
    "bilinear": (lambda x: F.interpolate(x, size=(5, 7), mode="bilinear"), (IMAGE,), [K.INTERPOLATE]),
    "sdpa": (lambda x, y: F.scaled_dot_product_attention(x, y, y), (X, Y), [K.ATTENTION]),
    "causal sdpa": (lambda x: F.scaled_dot_product_attention(x, x, x, is_causal=True), (X,), [K.ATTENTION]),
    "mean": (lambda x: x.mean((1, 2)), (X,), [K.MEAN]),
    "mean of all": (torch.mean, (X,), [K.MEAN]),
    "sum": (lambda x: x.sum(-1, keepdim=True), (X,), [K.SUM]),
    "amax": (lambda x: torch.amax(x, 1), (X,), [K.AMAX]),
    "max with indices": (lambda x: x.max(1)[0], (X,), [K.AMAX, K.ARGMAX]),
    "prod": (lambda x: x.prod(1), (X,), [K.PROD]),
    "var": (lambda x: x.var(-1), (X,), [K.MEAN, K.ADD, K.MUL, K.MEAN, K.MUL]),
    "std": (lambda x: x.std(-1, correction=0), (X,), [K.MEAN, K.ADD, K.MUL, K.MEAN, K.SQRT]),
    "normalize": (lambda x: F.normalize(x, dim=1), (X,), None),
    "vector norm": (lambda x: torch.linalg.vector_norm(x, dim=1), (X,), [K.MUL, K.SUM, K.SQRT]),
    "cumsum": (lambda x: x.cumsum(1), (X,), [K.CUMSUM]),
    "topk": (lambda x: x.topk(2, 1)[0], (X,), [K.TOPK]),
    "view": (lambda x: x.view(2, -1), (X,), [K.RESHAPE]),
    "reshape": (lambda x: x.reshape((8, 6)), (X,), [K.RESHAPE]),
    "flatten": (lambda x: torch.flatten(x, 1), (X,), [K.RESHAPE]),
    "unflatten": (lambda x: x.unflatten(2, (2, 3)), (X,), [K.RESHAPE]),
    "squeeze": (lambda x: x.unsqueeze(1).squeeze(1), (X,), [K.RESHAPE, K.RESHAPE]),
    "permute": (lambda x: x.permute(0, 2, 1), (X,), [K.PERMUTE]),
    "transpose": (lambda x: torch.transpose(x, 0, -1), (X,), [K.PERMUTE]),
    "swapaxes": (lambda x: torch.swapaxes(x, 0, -1), (X,), [K.PERMUTE]),
    "mT": (lambda x: x.mT, (X,), [K.PERMUTE]),
    "expand": (lambda x: x[:, :1].expand(-1, 4, -1), (X,), [K.SLICE, K.EXPAND]),
    "repeat": (lambda x: x.repeat(1, 2, 1), (X,), [K.TILE]),
    "slice": (lambda x: x[:, 1:3], (X,), [K.SLICE]),
    "strided slice": (lambda x: x[..., ::2], (X,), [K.SLICE]),
    "select": (lambda x: x[:, -1], (X,), [K.SLICE, K.RESHAPE]),
    "new axis": (lambda x: x[:, None], (X,), [K.RESHAPE]),
    "narrow": (lambda x: x.narrow(1, 1, 2), (X,), [K.SLICE]),
    "index_select": (lambda x: x.index_select(1, torch.tensor([2, 0])), (X,), [K.GATHER]),
    "split": (lambda x: torch.cat(x.split([1, 3], 1)[::-1], 1), (X,), [K.SPLIT, K.CONCAT]),
    "chunk": (lambda x: x.chunk(2, -1)[1], (X,), [K.SPLIT]),
    "unbind": (lambda x: x.unbind(1)[2], (X,), [K.SPLIT, *[K.RESHAPE] * 4]),
    "meshgrid": (
        lambda x, y: torch.add(*torch.meshgrid(x, y, indexing="xy")),
        ((3,), (4,)),
        [K.RESHAPE, K.EXPAND] * 2 + [K.ADD],
    ),
    "cat": (lambda x, y: torch.cat((x, y), -1), (X, Y), [K.CONCAT]),
    "stack": (lambda x, y: torch.stack((x, y), 1), (X, Y), [K.RESHAPE, K.RESHAPE, K.CONCAT]),
    "pad": (lambda x: F.pad(x, (1, 0, 2, 1), value=0.5), (X,), [K.PAD]),
    "reflect pad": (lambda x: F.pad(x, (1, 2), mode="reflect"), (X,), [K.PAD]),
    "roll": (lambda x: torch.roll(x, (1, -2), (1, 2)), (X,), [K.ROLL]),
    "flip": (lambda x: x.flip(1), (X,), [K.FLIP]),
    "pixel_shuffle": (nn.PixelShuffle(2), (IMAGE,), [K.RESHAPE, K.PERMUTE, K.RESHAPE]),
    "pixel_unshuffle": (nn.PixelUnshuffle(2), (IMAGE,), [K.RESHAPE, K.PERMUTE, K.RESHAPE]),
    "to dtype": (lambda x: x.to(torch.float64).float(), (X,), [K.CAST, K.CAST]),
    "double": (lambda x: x.double(), (X,), [K.CAST]),
    "scatter of a slice": (lambda x, y: torch.slice_scatter(x, y[:, :1], 1, 2, 3), (X, Y), [K.SLICE, K.SCATTER]),
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_an_exported_spelling_is_read_and_written_back(name):
    function, shapes, kinds = SPELLINGS[name]
    model, inputs = wrap(function, shapes), tensors(shapes)
    graph = capture(model, inputs)
    found = kinds_of(graph)
    assert K.OPAQUE not in found
    assert kinds is None or sorted(k.value for k in found) == sorted(k.value for k in kinds)
    check(graph, model, inputs)


# Python runs these while it traces, so that the traced graph is another one.
UNTRACED = {"split", "meshgrid", "index_select", "logic"}


@pytest.mark.parametrize("name", [name for name in SPELLINGS if name not in UNTRACED])
def test_a_traced_spelling_is_read_and_written_back(name):
    function, shapes, kinds = SPELLINGS[name]
    model, inputs = wrap(function, shapes), tensors(shapes)
    if isinstance(function, nn.Module):
        model = nn.Sequential(function).eval()
    graph = capture(torch.fx.symbolic_trace(model), inputs)
    found = kinds_of(graph)
    assert K.OPAQUE not in found
    assert kinds is None or sorted(k.value for k in found) == sorted(k.value for k in kinds)
    check(graph, model, inputs)


@pytest.mark.parametrize("name", [name for name in SPELLINGS if name not in UNTRACED])
def test_a_traced_spelling_without_shapes_is_read(name):
    function, shapes, _ = SPELLINGS[name]
    model = nn.Sequential(function) if isinstance(function, nn.Module) else wrap(function, shapes)
    graph = capture(torch.fx.symbolic_trace(model.eval()))
    inputs = {value.name: x.numpy() for value, x in zip(graph.inputs, tensors(shapes), strict=True)}
    with torch.no_grad():
        result = model(*tensors(shapes))
    results = result if isinstance(result, tuple | list) else (result,)
    for found, wanted in zip(graph.run(inputs).values(), results, strict=True):
        np.testing.assert_allclose(found, wanted.numpy(), rtol=1e-5, atol=1e-5)


DECOMPOSED = {
    "linear": [K.LINEAR],
    "conv2d": [K.CONV],
    "batch_norm": [K.BATCH_NORM],
    "layer_norm": [K.LAYER_NORM],
    "group_norm": [K.GROUP_NORM],
    "softmax": [K.SOFTMAX],
    "F.max_pool2d": [K.MAX_POOL],
    "adaptive_avg_pool2d": [K.MEAN],
    "silu": [K.SILU],
    "add": [K.ADD],
    "view": [K.RESHAPE],
}


@pytest.mark.parametrize("name", DECOMPOSED)
def test_a_decomposed_spelling_is_read_as_the_same_kind(name):
    function, shapes, _ = SPELLINGS[name]
    model, inputs = wrap(function, shapes), tensors(shapes)
    program = torch.export.export(model, inputs, strict=False).run_decompositions()
    graph = capture(program)
    assert [kind for kind in kinds_of(graph) if kind is not K.RESHAPE or name == "view"] == DECOMPOSED[name]
    check(graph, model, inputs)


def attrs_of(function, shapes, kind):
    graph = capture(wrap(function, shapes), tensors(shapes))
    return next(op for op in graph if op.kind is kind)


def test_pads_are_given_for_both_ends():
    assert attrs_of(nn.Conv2d(4, 6, 2, padding="same"), (IMAGE,), K.CONV).attr("pads") == (0, 0, 1, 1)
    assert attrs_of(nn.Conv1d(4, 5, 3, padding=2), (X,), K.CONV).attr("pads") == (2, 2)


def test_pads_of_a_pad_cover_every_dimension():
    op = attrs_of(lambda x: F.pad(x, (1, 0, 2, 1)), (X,), K.PAD)
    assert op.attr("pads") == (0, 2, 1, 0, 1, 0)


def test_axes_are_counted_from_the_front():
    assert attrs_of(lambda x: x.softmax(-1), (X,), K.SOFTMAX).attr("axis") == 2
    assert attrs_of(lambda x: x.mean((-1, -2)), (X,), K.MEAN).attr("axes") == (2, 1)
    assert attrs_of(nn.LayerNorm(6), (X,), K.LAYER_NORM).attr("axis") == 2


def test_a_stride_that_is_left_out_is_the_kernel():
    assert attrs_of(lambda x: F.max_pool2d(x, 2), (IMAGE,), K.MAX_POOL).attr("stride") == (2, 2)


def test_the_scale_of_attention_is_a_number():
    op = attrs_of(lambda x: F.scaled_dot_product_attention(x, x, x), (X,), K.ATTENTION)
    assert op.attr("scale") == pytest.approx(6**-0.5)


@pytest.mark.parametrize(
    ("function", "scales"),
    [
        (lambda x, y: torch.add(x, y, alpha=2), (1.0, 2.0)),
        (lambda x, y: x - y, (1.0, -1.0)),
        (lambda x, y: torch.rsub(x, y, alpha=3), (1.0, -3.0)),
        (lambda x, y: torch.lerp(x, y, 0.25), (0.75, 0.25)),
        (lambda x, y: torch.stack([x, y]).mean(0), (0.5, 0.5)),
        (lambda x, y: x + y, (1.0, 1.0)),
    ],
)
def test_every_weighted_sum_says_its_scales(function, scales):
    assert attrs_of(function, (X, Y), K.ADD).scales == scales


def test_the_rate_of_a_dropout_that_evaluation_switches_off_is_kept():
    op = attrs_of(nn.Dropout(0.3), (X,), K.IDENTITY)
    assert op.attr("dropout") == pytest.approx(0.3)


def test_a_dropout_in_training_is_one():
    graph = capture(nn.Dropout(0.3).train(), tensors((X,)))
    assert kinds_of(graph) == [K.DROPOUT]
    assert graph.training


def test_an_unknown_operation_works_unless_torch_says_that_it_is_elementwise_a_reduction_or_a_view():
    def forward(x):
        return torch.logsumexp(torch.sort(torch.expm1(x), 1)[0].diagonal(), 0)

    graph = capture(wrap(forward, (X,)), tensors((X,)))
    assert [op.attr("works") for op in graph if op.kind is K.OPAQUE] == [False, True, False, False]


def test_a_dropout_of_rate_zero_is_none_in_training():
    assert kinds_of(capture(nn.Dropout(0.0).train(), tensors((X,)))) == []


def test_an_unknown_operation_is_opaque_and_survives():
    graph = capture(wrap(lambda x: torch.sort(x, 1)[0] + 1, (X,)), tensors((X,)))
    op = next(op for op in graph if op.kind is K.OPAQUE)
    assert op.attrs["target"] == "aten.sort.default"
    assert op.operands == [graph.inputs[0]]
    check(graph, wrap(lambda x: torch.sort(x, 1)[0] + 1, (X,)), tensors((X,)))


def test_multi_head_attention_that_tracing_does_not_enter_is_opaque():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(6, 2, batch_first=True)

        def forward(self, x):
            return self.attention(x, x, x, need_weights=False)[0] + x

    model = Attention().eval()
    traced = capture(torch.fx.symbolic_trace(model), tensors((X,)))
    assert kinds_of(traced) == [K.OPAQUE, K.ADD]
    exported = capture(model, tensors((X,)))
    assert K.ATTENTION in kinds_of(exported)
    assert K.OPAQUE not in kinds_of(exported)
    check(exported, model, tensors((X,)))


def test_a_module_with_a_hook_is_opaque():
    conv = nn.Conv1d(4, 4, 1)
    conv.register_forward_hook(lambda module, inputs, output: output * 2)
    assert kinds_of(capture(torch.fx.symbolic_trace(nn.Sequential(conv)))) == [K.OPAQUE]


def test_recurrent_modules_are_recurrent():
    model = nn.LSTM(6, 5, batch_first=True).eval()
    graph = capture(model, tensors((X,)))
    assert K.RECURRENT in kinds_of(graph)
    assert K.OPAQUE not in kinds_of(graph)


def test_checks_are_left_out_of_the_view_and_go_with_what_they_check():
    class Checked(nn.Module):
        def forward(self, x):
            torch._check(x.shape[0] > 1)
            y = x.to(torch.float64).sin()
            return y + 1

    graph = capture(Checked(), torch.rand(4, 3), dynamic={"x": {0: "N"}})
    assert [kind for kind in kinds_of(graph) if kind is not K.SHAPE] == [K.CAST, K.SIN, K.ADD]
    cast = next(op for op in graph if op.kind is K.CAST)
    sin = next(op for op in graph if op.kind is K.SIN)
    add = next(op for op in graph if op.kind is K.ADD)
    graph.fuse([cast, sin, add], K.CAST, [graph.inputs[0]], [add.output], {"dtype": "float64"})
    graph.commit()
    result = graph.run({"x": np.ones((3, 3), np.float32)})
    assert next(iter(result.values())).dtype == np.float64


def test_symbolic_extents_keep_the_names_that_they_were_given():
    graph = capture(wrap(lambda x: x.reshape(x.shape[0] * 4, 6), (X,)), tensors((X,)), dynamic=[{0: "N"}])
    assert graph.inputs[0].shape == ("N", 4, 6)
    assert graph.outputs[0].shape in {("4*N", 6), ("N*4", 6)}


@pytest.mark.parametrize("kind", sorted({kind.value for kind in K} - {kind.value for kind in EMITTERS}))
def test_a_kind_without_a_torch_form_says_so(kind):
    graph = capture(wrap(F.relu, (X,)), tensors((X,)))
    assert graph.cannot_emit(K(kind))
    with pytest.raises(GraphError, match=kind):
        graph.insert(K(kind), [graph.inputs[0]], [("new", graph.inputs[0].type)])
