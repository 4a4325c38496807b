"""A second opinion on the GPU schedules: their OpenCL form on PoCL, against torch. float32, sums without shuffles."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from rescompile.backends.kernels import Epilogue, NormSpec
from rescompile.fused_region import Region, Step
from rescompile.kinds import OpKind as K
from tests import pocl

tvm = pytest.importorskip("tvm")

from tvm import relax  # noqa: E402

from rescompile.backends.cuda import depthwise, pool, region_kernel, softmax  # noqa: E402
from rescompile.backends.cuda.depthwise import Depthwise  # noqa: E402
from rescompile.backends.cuda.pool import GlobalMean, GlobalMeans, Pool  # noqa: E402
from rescompile.backends.cuda.region_spec import RegionSpec, norm_spec, tensors  # noqa: E402
from rescompile.backends.cuda.scalars import portable  # noqa: E402
from rescompile.backends.cuda.schedule import schedule  # noqa: E402
from rescompile.backends.cuda.softmax import RowSoftmax  # noqa: E402
from rescompile.backends.cuda.windows import Window  # noqa: E402
from rescompile.backends.gpu_limits import GPU_LIMITS, gpu_target  # noqa: E402
from tests.simulated_gpu import dims  # noqa: E402

ROWS = 5
LIMITS = GPU_LIMITS["opencl"]
NORMS = {
    "layer_768": NormSpec(None, 768, "layer", residual=True, sum_output=True),
    "layer_3000": NormSpec(ROWS, 3000, "layer", residual=True, sum_output=True),
    "layer_77": NormSpec(None, 77, "layer"),
    "rms_1024": NormSpec(None, 1024, "rms", residual=True, sum_output=True, bias=False),
}
WINDOWS: dict[str, tuple[Any, Any]] = {
    "max_pool": (pool, Pool("max", None, Window(12, 12, 24, (3, 3), (2, 2), (1, 1, 1, 1)))),
    "avg_pool": (pool, Pool("avg", 2, Window(10, 11, 8, (3, 3), (2, 2), (1, 1, 1, 1)), count_include_pad=False)),
    "mean": (GlobalMeans, GlobalMean(None, 49, 72)),
    "depthwise": (
        depthwise,
        Depthwise(None, Window(9, 11, 16, (3, 3), pads=(1,) * 4), Epilogue(True, True, "gelu", "relu")),
    ),
}


def _gate() -> RegionSpec:
    """y = silu(a)·b + c"""
    region = Region(3, (Step(K.SILU, (0,)), Step(K.MUL, (3, 1)), Step(K.ADD, (4, 2))), (5,))
    matrix = ("n", 333)
    return RegionSpec(region.text(), tensors([matrix] * 3, "float32"), tensors([matrix], "float32"))


def _product() -> Any:
    """y = x·w, a schedule by rule."""
    builder = relax.BlockBuilder()
    x, w = (relax.Var(name, relax.TensorType(shape, "float32")) for name, shape in (("x", (40, 96)), ("w", (96, 72))))
    with builder.function("main", [x, w]):
        builder.emit_func_output(builder.emit(relax.op.matmul(x, w)))
    scheduled = schedule(relax.transform.LegalizeOps()(builder.get()), gpu_target("opencl"))
    return next(function for _, function in scheduled.functions_items() if isinstance(function, tvm.tirx.PrimFunc))


def _functions() -> dict[str, Any]:
    made: dict[str, Any] = {}
    with portable():
        for name, spec in {**{name: norm_spec(spec) for name, spec in NORMS.items()}, "gate": _gate()}.items():
            assert region_kernel.refusal(spec, LIMITS) == ""
            made[name] = region_kernel.prim_func(spec, region_kernel.candidates(spec, LIMITS)[0], name)
        for name, (family, window) in WINDOWS.items():
            made[name] = family.prim_func(window, family.candidates(window, LIMITS)[0], name)
        made["softmax"] = softmax.prim_func(RowSoftmax(None, 197), "softmax")
    return {**made, "product": _product().with_attr("global_symbol", "product")}


class OnPocl:
    """All of the kernels, compiled at once."""

    def __init__(self) -> None:
        pocl.device()
        self.functions = _functions()
        compiled = tvm.compile(tvm.IRModule(self.functions), target=gpu_target("opencl"))
        self.kernels = pocl.Kernels(str(compiled.mod.imports[0].inspect_source()))

    def run(self, name: str, buffers: dict[str, torch.Tensor | np.ndarray[Any, Any]], **extents: int) -> dict[str, Any]:
        """Launch a kernel; the buffers, written."""
        arrays = {part: np.array(np.asarray(value), dtype=np.float32, order="C") for part, value in buffers.items()}
        self.kernels.run(f"{name}_kernel", arrays, extents, dims(self.functions[name], extents))
        return {part: torch.from_numpy(array) for part, array in arrays.items()}


@pytest.fixture(scope="module")
def on_pocl() -> OnPocl:
    return OnPocl()


def _random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def _close(got: torch.Tensor, want: torch.Tensor) -> None:
    torch.testing.assert_close(got.double(), want.double(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", NORMS)
def test_norms(name: str, on_pocl: OnPocl) -> None:
    spec = NORMS[name]
    x, residual = _random(ROWS, spec.width) + 3, _random(ROWS, spec.width + 1)[:, 1:]
    weight, bias = _random(spec.width), _random(spec.width) + 1
    given = [x, *([residual] if spec.residual else []), weight, *([bias] if spec.bias else [])]
    buffers = {f"x{place}": value for place, value in enumerate(given)}
    buffers |= {f"y{place}": torch.full_like(x, torch.nan) for place in range(1 + spec.sum_output)}
    got = on_pocl.run(name, buffers, **({"rows": ROWS} if spec.rows is None else {}))
    total = x + residual if spec.residual else x
    if spec.kind == "layer":
        _close(got["y0"], F.layer_norm(total.double(), (spec.width,), weight.double(), bias.double(), spec.eps))
    else:
        _close(got["y0"], F.rms_norm(total.double(), (spec.width,), weight.double(), spec.eps))
    if spec.sum_output:
        assert torch.equal(got["y1"], total)


def test_softmax(on_pocl: OnPocl) -> None:
    x = _random(ROWS, 197)
    got = on_pocl.run("softmax", {"x": x, "y": torch.full_like(x, torch.nan)}, rows=ROWS)
    _close(got["y"], x.double().softmax(-1))


def test_elements(on_pocl: OnPocl) -> None:
    a, b, c = _random(7, 333), _random(7, 334)[:, 1:], _random(8, 333)[1:]
    got = on_pocl.run("gate", {"x0": a, "x1": b, "x2": c, "y0": torch.full_like(a, torch.nan)}, n=7)
    _close(got["y0"], F.silu(a.double()) * b + c)


def test_pools(on_pocl: OnPocl) -> None:
    x = _random(2, 12, 12, 24)
    got = on_pocl.run("max_pool", {"x": x, "y": torch.full((2, 6, 6, 24), torch.nan)}, images=2)
    assert torch.equal(got["y"], F.max_pool2d(x.permute(0, 3, 1, 2), 3, 2, 1).permute(0, 2, 3, 1))
    x = _random(2, 10, 11, 8)
    want = F.avg_pool2d(x.permute(0, 3, 1, 2), 3, 2, 1, count_include_pad=False).permute(0, 2, 3, 1)
    _close(on_pocl.run("avg_pool", {"x": x, "y": torch.full(want.shape, torch.nan)})["y"], want)
    x = _random(2, 49, 72)
    _close(on_pocl.run("mean", {"x": x, "y": torch.full((2, 72), torch.nan)}, images=2)["y"], x.double().mean(1))


def test_depthwise_convolution(on_pocl: OnPocl) -> None:
    x, weight, bias, residual = _random(2, 9, 11, 16), _random(16, 1, 3, 3), _random(16), _random(2, 9, 11, 17)[..., 1:]
    buffers = {"x": x, "weight": weight.reshape(16, 9).T, "bias": bias, "residual": residual}
    got = on_pocl.run("depthwise", {**buffers, "y": torch.full(x.shape, torch.nan)}, images=2)
    out = F.conv2d(x.permute(0, 3, 1, 2), weight, bias, padding=1, groups=16).permute(0, 2, 3, 1)
    _close(got["y"], torch.relu(residual + F.gelu(out)))


def test_product(on_pocl: OnPocl) -> None:
    x, w = _random(40, 96), _random(96, 72)
    output = next(name for name in on_pocl.kernels.parameters["product_kernel"] if name not in ("x", "w"))
    got = on_pocl.run("product", {"x": x, "w": w, output: torch.full((40, 72), torch.nan)})
    _close(got[output], x.double() @ w.double())


def test_no_shuffle_is_left(on_pocl: OnPocl) -> None:
    assert "shuffle" not in on_pocl.kernels.source
    assert "shfl" not in on_pocl.kernels.source
    assert "vload4" in on_pocl.kernels.source
