"""Convolutions and pools, channels last inside: numbers, borders, and what is grouped into one kernel."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from rescompile.backends.compile import compile_graph
from rescompile.graph import Value
from rescompile.kinds import OpKind
from tests.lowering_cases import F, Sketch, close

pytest.importorskip("tvm")
K = OpKind

CONVOLUTIONS: dict[str, tuple[tuple[int, ...], tuple[int, ...], dict[str, Any]]] = {
    "3x3": ((1, 8, 9, 11), (12, 8, 3, 3), {"pads": (1, 1, 1, 1)}),
    "stem": ((2, 3, 17, 17), (16, 3, 7, 7), {"stride": (2, 2), "pads": (3, 3, 3, 3)}),
    "1x1_stride": ((1, 16, 8, 8), (24, 16, 1, 1), {"stride": (2, 2)}),
    "uneven_pads": ((1, 4, 8, 8), (6, 4, 3, 3), {"pads": (0, 1, 1, 0)}),
    "dilated": ((1, 4, 12, 12), (6, 4, 3, 3), {"pads": (2, 2, 2, 2), "dilation": (2, 2)}),
    "grouped": ((1, 12, 7, 7), (18, 4, 3, 3), {"pads": (1, 1, 1, 1), "groups": 3}),
    "depthwise": ((1, 16, 9, 9), (16, 1, 5, 5), {"pads": (2, 2, 2, 2), "groups": 16}),
    "one_dimension": ((2, 6, 20), (10, 6, 5), {"stride": (2,), "pads": (2, 2), "dilation": (1,)}),
    "volume": ((1, 3, 5, 6, 7), (4, 3, 3, 3, 3), {"stride": (1,) * 3, "pads": (1,) * 6, "dilation": (1,) * 3}),
}  # fmt: skip


def _reference(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor | None, attrs: dict[str, Any]) -> torch.Tensor:
    rank = x.dim() - 2
    pads = attrs.get("pads", (0,) * (2 * rank))
    sides = [side for axis in reversed(range(rank)) for side in (pads[axis], pads[rank + axis])]
    function = (F.conv1d, F.conv2d, F.conv3d)[rank - 1]
    stride, dilation = attrs.get("stride", (1,) * rank), attrs.get("dilation", (1,) * rank)
    return function(F.pad(x, sides), w, b, stride, 0, dilation, attrs.get("groups", 1))


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolutions_agree_with_torch(name: str) -> None:
    shape, weights, attrs = CONVOLUTIONS[name]
    sketch = Sketch()
    x, w, b = sketch.input(*shape), sketch.param(*weights), sketch.param(weights[0])
    want = _reference(sketch.of(x), sketch.of(w), sketch.of(b), attrs)
    close(sketch.run(sketch.op(K.CONV, [x, w, b], tuple(want.shape), **attrs)), want)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_convolutions_in_other_dtypes(dtype: torch.dtype) -> None:
    sketch = Sketch()
    x, w = sketch.input(1, 8, 7, 7, dtype=dtype), sketch.param(8, 8, 3, 3, dtype=dtype)
    name = str(dtype).removeprefix("torch.")
    y = sketch.op(K.FUSED_CONV, [x, w, None, x], (1, 8, 7, 7), name, pads=(1, 1, 1, 1), outer="relu")
    exact = F.conv2d(sketch.of(x).double(), sketch.of(w).double(), padding=1) + sketch.of(x).double()
    tolerance = {torch.float64: 1e-12, torch.float16: 4e-3, torch.bfloat16: 4e-2}[dtype]
    close(sketch.run(y), torch.relu(exact).to(dtype), rtol=tolerance, atol=tolerance)


def test_transposed_convolution() -> None:
    sketch = Sketch()
    x, w, b = sketch.input(1, 6, 5, 5), sketch.param(6, 4, 3, 3), sketch.param(4)
    attrs = {"stride": (2, 2), "pads": (1, 1, 1, 1), "dilation": (1, 1), "output_padding": (1, 1), "groups": 1}
    y = sketch.op(K.CONV_TRANSPOSE, [x, w, b], (1, 4, 10, 10), **attrs)
    close(sketch.run(y), F.conv_transpose2d(sketch.of(x), sketch.of(w), sketch.of(b), 2, 1, 1))


def test_pools_channels_last_and_first() -> None:
    sketch = Sketch()
    x, w = sketch.input(1, 8, 13, 13), sketch.param(8, 8, 1, 1)
    inner = sketch.op(K.CONV, [x, w, None], (1, 8, 13, 13))
    window = {"kernel": (3, 3), "stride": (2, 2), "pads": (1, 1, 1, 1)}
    outputs, wanted = [], []
    for source, tensor in ((x, sketch.of(x)), (inner, F.conv2d(sketch.of(x), sketch.of(w)))):
        outputs.append(sketch.op(K.MAX_POOL, [source], (1, 8, 7, 7), dilation=(1, 1), **window))
        wanted.append(F.max_pool2d(tensor, 3, 2, 1))
        outputs.append(sketch.op(K.AVG_POOL, [source], (1, 8, 7, 7), **window))
        wanted.append(F.avg_pool2d(tensor, 3, 2, 1))
        outputs.append(sketch.op(K.AVG_POOL, [source], (1, 8, 7, 7), count_include_pad=False, **window))
        wanted.append(F.avg_pool2d(tensor, 3, 2, 1, count_include_pad=False))
        outputs.append(sketch.op(K.ADAPTIVE_AVG_POOL, [source], (1, 8, 1, 1), output_size=(1, 1)))
        wanted.append(F.adaptive_avg_pool2d(tensor, 1))
        outputs.append(sketch.op(K.ADAPTIVE_AVG_POOL, [source], (1, 8, 3, 3), output_size=(3, 3)))
        wanted.append(F.adaptive_avg_pool2d(tensor, 3))
        outputs.append(sketch.op(K.MEAN, [source], (1, 8), axes=(2, 3)))
        wanted.append(tensor.mean((2, 3)))
    for got, want in zip(sketch.run(*outputs), wanted, strict=True):
        close(got, want)


@pytest.mark.parametrize("mode", ["nearest", "bilinear"])
def test_interpolation_follows_torchs_coordinates(mode: str) -> None:
    sketch = Sketch()
    x = sketch.input(1, 4, 6, 6)
    y = sketch.op(K.INTERPOLATE, [x], (1, 4, 11, 13), mode=mode)
    close(sketch.run(y), F.interpolate(sketch.of(x), (11, 13), mode=mode))


def _residual_block(sketch: Sketch, x: Value, channels: int, size: int) -> tuple[Value, torch.Tensor]:
    """relu(conv(relu(conv(x))) + x), as an exporter leaves it."""
    shape = (1, channels, size, size)
    w1, w2 = sketch.param(channels, channels, 3, 3), sketch.param(channels, channels, 3, 3)
    a = sketch.op(K.CONV, [x, w1, None], shape, pads=(1, 1, 1, 1))
    b = sketch.op(K.RELU, [a], shape)
    c = sketch.op(K.CONV, [b, w2, None], shape, pads=(1, 1, 1, 1))
    y = sketch.op(K.RELU, [sketch.op(K.ADD, [c, x], shape)], shape)
    of = sketch.of
    inner = F.conv2d(torch.relu(F.conv2d(of(x), of(w1), padding=1)), of(w2), padding=1)
    return y, torch.relu(inner + of(x))


def test_a_residual_block_is_two_convolutions_and_nothing_else() -> None:
    sketch = Sketch()
    y, want = _residual_block(sketch, sketch.input(1, 16, 20, 20), 16, 20)
    close(sketch.run(y), want, rtol=1e-4, atol=1e-4)
    program = compile_graph(sketch.graph, tuning=0, threads=1)
    found = [(region["kernel"], region["calls"]) for region in program.explain()]
    assert sum(calls for kernel, calls in found if kernel == "conv") == 2
    assert sum(calls for kernel, calls in found if kernel == "layout") <= 2  # at the edges only
    assert not [kernel for kernel, _ in found if kernel == "generated"]


def test_a_value_that_is_read_twice_is_not_hidden_inside_an_epilogue() -> None:
    sketch = Sketch()
    x, w = sketch.input(1, 8, 6, 6), sketch.param(8, 8, 1, 1)
    a = sketch.op(K.CONV, [x, w, None], (1, 8, 6, 6))
    got = sketch.run(sketch.op(K.RELU, [a], (1, 8, 6, 6)), sketch.op(K.NEG, [a], (1, 8, 6, 6)))
    want = F.conv2d(sketch.of(x), sketch.of(w))
    close(got[0], torch.relu(want))
    close(got[1], -want)


def test_relu_before_the_add_stays_before_it() -> None:
    sketch = Sketch()
    x, w = sketch.input(1, 8, 6, 6), sketch.param(8, 8, 1, 1)
    a = sketch.op(K.RELU, [sketch.op(K.CONV, [x, w, None], (1, 8, 6, 6))], (1, 8, 6, 6))
    close(
        sketch.run(sketch.op(K.ADD, [a, x], (1, 8, 6, 6))),
        torch.relu(F.conv2d(sketch.of(x), sketch.of(w))) + sketch.of(x),
    )


def test_a_difference_is_not_taken_for_a_residual_sum() -> None:
    sketch = Sketch()
    x, w = sketch.input(1, 8, 6, 6), sketch.param(8, 8, 1, 1)
    a = sketch.op(K.CONV, [x, w, None], (1, 8, 6, 6))
    y = sketch.op(K.ADD, [a, x], (1, 8, 6, 6), scales=(1.0, -1.0))
    close(sketch.run(y), F.conv2d(sketch.of(x), sketch.of(w)) - sketch.of(x))


def test_borders_hold_zeros_also_where_the_activation_of_zero_is_not_zero() -> None:
    sketch = Sketch()
    x, w = sketch.input(1, 8, 6, 6), sketch.param(8, 8, 3, 3)
    one = sketch.op(K.CONV, [x, w, None], (1, 8, 6, 6), pads=(1, 1, 1, 1))
    gate = sketch.op(K.SIGMOID, [sketch.op(K.NEG, [one], (1, 8, 6, 6))], (1, 8, 6, 6))
    y = sketch.op(K.CONV, [gate, w, None], (1, 8, 6, 6), pads=(1, 1, 1, 1))
    of = sketch.of
    inner = torch.sigmoid(-F.conv2d(of(x), of(w), padding=1))
    got = sketch.run(y, sketch.op(K.ADD, [gate, one], (1, 8, 6, 6)))
    close(got[0], F.conv2d(inner, of(w), padding=1))
    close(got[1], inner + F.conv2d(of(x), of(w), padding=1))


def test_concatenation_and_squeeze_and_excite_stay_channels_last() -> None:
    sketch = Sketch()
    x, w = sketch.input(1, 8, 6, 6), sketch.param(8, 8, 3, 3)
    a = sketch.op(K.CONV, [x, w, None], (1, 8, 6, 6), pads=(1, 1, 1, 1))
    pooled = sketch.op(K.ADAPTIVE_AVG_POOL, [a], (1, 8, 1, 1), output_size=(1, 1))
    w1 = sketch.param(8, 8, 1, 1)
    gate = sketch.op(K.HARDSIGMOID, [sketch.op(K.CONV, [pooled, w1, None], (1, 8, 1, 1))], (1, 8, 1, 1))
    scaled = sketch.op(K.MUL, [a, gate], (1, 8, 6, 6))
    both = sketch.op(K.CONCAT, [scaled, a], (1, 16, 6, 6), axis=1)
    part = sketch.op(K.SLICE, [both], (1, 4, 6, 6), axes=(1,), starts=(6,), stops=(10,), steps=(1,))
    of = sketch.of
    inner = F.conv2d(of(x), of(w), padding=1)
    excited = inner * F.hardsigmoid(F.conv2d(inner.mean((2, 3), keepdim=True), of(w1)))
    close(sketch.run(part), torch.cat([excited, inner], 1)[:, 6:10].contiguous())


def test_patches_become_tokens_without_a_copy() -> None:
    sketch = Sketch()
    x, w = sketch.input(1, 3, 48, 48), sketch.param(32, 3, 4, 4)
    patches = sketch.op(K.CONV, [x, w, None], (1, 32, 12, 12), stride=(4, 4))
    flat = sketch.op(K.RESHAPE, [patches], (1, 32, 144))
    tokens = sketch.op(K.PERMUTE, [flat], (1, 144, 32), perm=(0, 2, 1))
    close(sketch.run(tokens), F.conv2d(sketch.of(x), sketch.of(w), stride=4).flatten(2).transpose(1, 2).contiguous())
    kinds = [region["kernel"] for region in compile_graph(sketch.graph, tuning=0, threads=1).explain()]
    assert "generated" not in kinds


def test_an_unfolded_batch_norm_after_a_convolution_becomes_its_weights() -> None:
    sketch = Sketch()
    x, w, scale, shift, mean = (
        sketch.input(1, 8, 24, 24),
        sketch.param(8, 8, 1, 1),
        *(sketch.param(8) for _ in range(3)),
    )
    var = sketch.constant(torch.rand(8) + 0.5)
    a = sketch.op(K.CONV, [x, w, None], (1, 8, 24, 24))
    y = sketch.op(K.BATCH_NORM, [a, scale, shift, mean, var], (1, 8, 24, 24))
    of = sketch.of
    want = F.batch_norm(F.conv2d(of(x), of(w)), of(mean), of(var), of(scale), of(shift))
    close(sketch.run(y), want)
    kinds = [region["kernel"] for region in compile_graph(sketch.graph, tuning=0, threads=1).explain()]
    assert "generated" not in kinds


def test_dynamic_batch_of_images() -> None:
    sketch = Sketch()
    x, w, b = sketch.input(3, 4, 8, 8, dynamic=("N", 4, 8, 8)), sketch.param(6, 4, 3, 3), sketch.param(6)
    y = sketch.op(K.CONV, [x, w, b], ("N", 6, 8, 8), pads=(1, 1, 1, 1))
    z = sketch.op(K.MEAN, [sketch.op(K.RELU, [y], ("N", 6, 8, 8))], ("N", 6), axes=(2, 3))
    sketch.graph.set_outputs([z])
    sketch.graph.commit()
    program = compile_graph(sketch.graph, tuning=0, threads=1)
    for batch in (1, 2, 7):
        data = torch.randn(batch, 4, 8, 8)
        close(program(data), torch.relu(F.conv2d(data, sketch.of(w), sketch.of(b), padding=1)).mean((2, 3)))
