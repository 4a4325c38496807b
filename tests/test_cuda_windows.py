"""The CUDA kernels of pools and depthwise convolutions: their generated source on the CPU against torch."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from rescompile.backends.kernels import Epilogue
from rescompile.errors import RescompileError
from rescompile.kinds import OpKind as K
from tests import simulated_gpu
from tests.lowering_cases import Sketch

tvm = pytest.importorskip("tvm")

from rescompile.backends.compile import compile_graph  # noqa: E402
from rescompile.backends.cuda import compile as cuda_compile  # noqa: E402
from rescompile.backends.cuda import depthwise, pool  # noqa: E402
from rescompile.backends.cuda.cubin import Cubin  # noqa: E402
from rescompile.backends.cuda.depthwise import Depthwise  # noqa: E402
from rescompile.backends.cuda.executable import cuda_source  # noqa: E402
from rescompile.backends.cuda.pool import GlobalMean, GlobalMeans, Pool  # noqa: E402
from rescompile.backends.cuda.targets import cuda_target  # noqa: E402
from rescompile.backends.cuda.windows import Window, WindowTile, window_tiles  # noqa: E402

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
# Against float64: sums in float32, one rounding of the result.
TOLERANCE = {"float32": 3e-6, "float16": 1e-3, "bfloat16": 8e-3}
IMAGES = 2

THREE = Window(9, 11, 16, (3, 3), pads=(1, 1, 1, 1))
STEM = Window(12, 12, 24, (3, 3), (2, 2), (1, 1, 1, 1))
POOLS = {
    "max": Pool("max", IMAGES, STEM, dtype="float16"),
    "max_dynamic": Pool("max", None, STEM),
    "max_dilated": Pool("max", IMAGES, Window(9, 10, 8, (3, 3), (1, 1), (1, 1, 1, 1), (2, 2)), dtype="bfloat16"),
    "max_ceil": Pool("max", IMAGES, Window(10, 10, 20, (3, 3), (2, 2), ceil=True), dtype="float16"),
    "max_odd_channels": Pool("max", IMAGES, replace(STEM, channels=7)),
    "max_one_row": Pool("max", None, Window(1, 21, 8, (1, 3), (1, 2), (0, 1, 0, 1))),
    "avg": Pool("avg", IMAGES, Window(8, 8, 40, (2, 2), (2, 2)), dtype="bfloat16"),
    "avg_padding_counts": Pool("avg", None, STEM, dtype="float16"),
    "avg_padding_does_not": Pool("avg", IMAGES, STEM, count_include_pad=False),
    "avg_ceil": Pool("avg", IMAGES, Window(10, 11, 16, (3, 3), (2, 2), (1, 1, 1, 1), ceil=True)),
    "avg_large": Pool("avg", IMAGES, Window(9, 9, 8, (7, 5), (2, 2), (3, 2, 3, 2)), count_include_pad=False),
}
MEANS = {
    "mean": GlobalMean(IMAGES, 49, 72, "float16"),
    "mean_dynamic": GlobalMean(None, 50, 256, "bfloat16"),
    "mean_odd_channels": GlobalMean(IMAGES, 64, 5),
    "mean_of_one": GlobalMean(IMAGES, 1, 32),
    "mean_of_many": GlobalMean(None, 1500, 20),
}
PLAIN = Depthwise(IMAGES, THREE)
CONVOLUTIONS = {
    "plain": PLAIN,
    "half": replace(PLAIN, window=replace(THREE, channels=40), dtype="float16", epilogue=Epilogue(True, inner="relu6")),
    "dynamic": replace(PLAIN, batch=None, dtype="bfloat16", epilogue=Epilogue(True, True, "none", "relu")),
    "stride": replace(PLAIN, window=STEM, dtype="float16", epilogue=Epilogue(False, True, "hardswish")),
    "dilated": replace(PLAIN, window=Window(11, 11, 12, (3, 3), (1, 1), (2, 2, 2, 2), (2, 2))),
    "five": replace(PLAIN, window=Window(14, 14, 8, (5, 5), (2, 2), (2,) * 4), epilogue=Epilogue(True, inner="silu")),
    "seven": replace(PLAIN, window=Window(7, 7, 24, (7, 7), pads=(3,) * 4), epilogue=Epilogue(True), dtype="float16"),
    "seven_dynamic": replace(PLAIN, batch=None, window=Window(15, 14, 8, (7, 7), pads=(3, 3, 3, 3))),
    "no_padding": replace(PLAIN, window=replace(THREE, pads=(0,) * 4), epilogue=Epilogue(True, True, "gelu", "tanh")),
    "uneven": replace(PLAIN, window=Window(8, 9, 6, (3, 3), (2, 2), (0, 1, 1, 0)), dtype="bfloat16"),
    "one_row": replace(PLAIN, window=Window(1, 20, 16, (1, 4), pads=(0, 3, 0, 0)), epilogue=Epilogue(inner="sigmoid")),
}  # fmt: skip


def _functions() -> dict[str, Any]:
    made = {name: pool.prim_func(spec, pool.candidates(spec)[0], name) for name, spec in POOLS.items()}
    means = {name: GlobalMeans.prim_func(spec, GlobalMeans.candidates(spec)[0], name) for name, spec in MEANS.items()}
    return {
        **made,
        **means,
        **{name: depthwise.prim_func(spec, depthwise.candidates(spec)[0], name) for name, spec in CONVOLUTIONS.items()},
    }


class Simulated:
    """All of the kernels, and how each is launched."""

    def __init__(self) -> None:
        self.functions = _functions()
        self.source = cuda_source(tvm.compile(tvm.IRModule(self.functions), target=cuda_target("sm_90")).mod)
        self.library = simulated_gpu.simulated_cubin(self.source)

    def run(self, name: str, buffers: dict[str, torch.Tensor]) -> torch.Tensor:
        """The output of the kernel; NaN where it writes nothing."""
        names = simulated_gpu.parameters(self.source, f"{name}_kernel")
        arrays = [buffers[part].contiguous().view(torch.uint8).numpy() for part in names if part in buffers]
        dynamic = [IMAGES] if "images" in names else []
        dims = simulated_gpu.dims(self.functions[name], {"images": IMAGES})
        simulated_gpu.launch(self.library, f"{name}_kernel", arrays, dynamic, dims)
        return buffers["y"]


@pytest.fixture(scope="module")
def simulated() -> Simulated:
    if simulated_gpu.COMPILER is None:
        pytest.skip("no g++ here")
    return Simulated()


def _random(*shape: int, dtype: str) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).to(DTYPES[dtype])


def _padded(x: torch.Tensor, window: Window, value: float) -> torch.Tensor:
    top, left, bottom, right = window.pads
    return F.pad(x.double().permute(0, 3, 1, 2), (left, right, top, bottom), value=value)


def _pooled(spec: Pool, x: torch.Tensor) -> torch.Tensor:
    window, first = spec.window, x.double().permute(0, 3, 1, 2)
    if spec.kind == "max":
        padded = _padded(x, window, -torch.inf)
        return F.max_pool2d(padded, window.kernel, window.stride, 0, window.dilation, window.ceil).permute(0, 2, 3, 1)
    options = {"ceil_mode": window.ceil, "count_include_pad": spec.count_include_pad}
    return F.avg_pool2d(first, window.kernel, window.stride, window.pads[:2], **options).permute(0, 2, 3, 1)


@pytest.mark.parametrize("name", POOLS)
def test_pools_agree_with_torch(name: str, simulated: Simulated) -> None:
    spec = POOLS[name]
    x = _random(IMAGES, *spec.window.image(None)[1:], dtype=spec.dtype) - 1.0
    want = _pooled(spec, x)
    assert want.shape[1:] == spec.window.result(None)[1:]
    got = simulated.run(name, {"x": x, "y": torch.full(want.shape, torch.nan, dtype=x.dtype)})
    if spec.kind == "max":
        assert torch.equal(got.double(), want)
    else:
        torch.testing.assert_close(got.double(), want, rtol=TOLERANCE[spec.dtype], atol=TOLERANCE[spec.dtype])


def test_a_maximum_keeps_not_a_number_and_infinities(simulated: Simulated) -> None:
    spec = POOLS["max"]
    x = _random(IMAGES, *spec.window.image(None)[1:], dtype=spec.dtype)
    x[0, 3, 3, :4], x[1, :, :, 5], x[0, 7, 0, 2] = torch.nan, -torch.inf, torch.inf
    want = _pooled(spec, x)
    got = simulated.run("max", {"x": x, "y": torch.zeros(want.shape, dtype=x.dtype)})
    assert torch.equal(got.double().nan_to_num(7e9), want.nan_to_num(7e9))


@pytest.mark.parametrize("name", MEANS)
def test_means_over_all_positions_agree_with_torch(name: str, simulated: Simulated) -> None:
    spec = MEANS[name]
    x = _random(IMAGES, spec.positions, spec.channels, dtype=spec.dtype) + 2
    got = simulated.run(name, {"x": x, "y": torch.full((IMAGES, spec.channels), torch.nan, dtype=x.dtype)})
    want = x.double().mean(1)
    torch.testing.assert_close(got.double(), want, rtol=2 * TOLERANCE[spec.dtype], atol=TOLERANCE[spec.dtype])


_FUNCTIONS = {
    "none": lambda x: x,
    "relu": torch.relu,
    "relu6": F.relu6,
    "gelu": F.gelu,
    "silu": F.silu,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "hardswish": F.hardswish,
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_depthwise_convolutions_agree_with_torch(name: str, simulated: Simulated) -> None:
    spec = CONVOLUTIONS[name]
    window, epilogue, channels = spec.window, spec.epilogue, spec.window.channels
    x = _random(IMAGES, *window.image(None)[1:], dtype=spec.dtype)
    weight = _random(channels, 1, *window.kernel, dtype=spec.dtype)
    bias, residual = _random(channels, dtype=spec.dtype), _random(IMAGES, *window.result(None)[1:], dtype=spec.dtype)
    want = F.conv2d(
        _padded(x, window, 0), weight.double(), bias.double() if epilogue.bias else None, window.stride, 0,
        window.dilation, channels,
    ).permute(0, 2, 3, 1)  # fmt: skip
    want = _FUNCTIONS[epilogue.inner](want) + (residual.double() if epilogue.residual else 0)
    want = _FUNCTIONS[epilogue.outer](want)
    packed = weight.reshape(channels, window.taps).T
    buffers = {"x": x, "weight": packed, "bias": bias, "residual": residual}
    got = simulated.run(name, {**buffers, "y": torch.full(want.shape, torch.nan, dtype=x.dtype)})
    torch.testing.assert_close(got.double(), want, rtol=4 * TOLERANCE[spec.dtype], atol=4 * TOLERANCE[spec.dtype])


def test_other_types_and_larger_windows_have_no_kernel() -> None:
    assert depthwise.refusal(PLAIN) == pool.refusal(POOLS["max"]) == GlobalMeans.refusal(MEANS["mean"]) == ""
    assert "float64" in depthwise.refusal(replace(PLAIN, dtype="float64"))
    assert "registers" in depthwise.refusal(replace(PLAIN, window=Window(30, 30, 8, (9, 9))))
    assert "float64" in pool.refusal(replace(POOLS["max"], dtype="float64"))


def test_a_window_without_an_output_is_one_sentence() -> None:
    with pytest.raises(RescompileError, match="has no output"):
        Window(2, 2, 8, (3, 3))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "window", [THREE, STEM, Window(7, 7, 512, (7, 7), pads=(3, 3, 3, 3)), Window(56, 56, 96, (7, 7))]
)
def test_tiles_keep_within_a_block_and_its_registers(window: Window, dtype: str) -> None:
    for tile in window_tiles(window, 32, dtype, weights=True):
        assert tile.lanes * tile.across * tile.down <= 128
        assert tile.columns * tile.vector <= 64
        assert window.channels % tile.vector == 0


def test_a_large_image_is_read_by_128_bits_and_several_pixels() -> None:
    tile = window_tiles(Window(56, 56, 96, (3, 3), pads=(1, 1, 1, 1)), 32, "float16", weights=True)[0]
    assert tile.vector == 8
    assert tile.columns >= 4
    assert isinstance(tile, WindowTile)


# ---- in a program ------------------------------------------------------------------------------------------------


def _network(batch: int | str) -> tuple[Sketch, tuple[torch.Tensor, ...]]:
    """A depthwise convolution with a residual and every kind of pool, channels last behind a convolution."""
    sketch = Sketch()
    x = sketch.input(2, 8, 9, 9, dynamic=(batch, 8, 9, 9))
    weights = [sketch.param(16, 8, 1, 1), sketch.param(16, 1, 3, 3), sketch.param(16)]
    first = sketch.op(K.CONV, [x, weights[0], None], (batch, 16, 9, 9))
    same = {"pads": (1, 1, 1, 1), "groups": 16}
    second = sketch.op(K.FUSED_CONV, [first, *weights[1:], first], (batch, 16, 9, 9), inner="relu", **same)
    window = {"kernel": (3, 3), "stride": (2, 2), "pads": (1, 1, 1, 1)}
    third = sketch.op(K.MAX_POOL, [second], (batch, 16, 5, 5), dilation=(1, 1), **window)
    fourth = sketch.op(K.AVG_POOL, [second], (batch, 16, 6, 6), kernel=(4, 4), stride=(1, 1))
    halves = sketch.op(K.ADAPTIVE_AVG_POOL, [fourth], (batch, 16, 2, 2), output_size=(2, 2))
    one = sketch.op(K.ADAPTIVE_AVG_POOL, [second], (batch, 16, 1, 1), output_size=(1, 1))
    mean = sketch.op(K.MEAN, [third], (batch, 16), axes=(2, 3), keepdims=False)
    sketch.graph.set_outputs([third, halves, one, mean])
    given = sketch.of(x)
    a = F.conv2d(given, sketch.of(weights[0]))
    b = a + torch.relu(F.conv2d(a, sketch.of(weights[1]), sketch.of(weights[2]), padding=1, groups=16))
    pooled = F.max_pool2d(b, 3, 2, 1)
    return sketch, (
        pooled,
        F.adaptive_avg_pool2d(F.avg_pool2d(b, 4, 1), 2),
        b.mean((2, 3), keepdim=True),
        pooled.mean((2, 3)),
    )


def test_programs_pool_by_these_kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if simulated_gpu.COMPILER is None:
        pytest.skip("no g++ here")
    monkeypatch.setattr(
        cuda_compile, "to_cubin", lambda source, _: Cubin(simulated_gpu.simulated_cubin(source), (), "g++")
    )
    sketch, wanted = _network("n")
    program = compile_graph(sketch.graph, "cuda:sm_90")
    kernels = {region["kernel"] for region in program.explain()}
    assert kernels >= {"depthwise", "max_pool", "avg_pool", "global_mean"}
    program.save(tmp_path / "windows.zip")
    outputs = simulated_gpu.run_programs(tmp_path, {"windows": {"x0": sketch.tensors["x0"].numpy()}})["windows"]
    for got, want in zip(outputs, wanted, strict=True):
        torch.testing.assert_close(torch.from_numpy(got), want, rtol=1e-5, atol=1e-5)
