"""Whole models on the simulated GPU: each product is one tensor-core kernel with what follows it, and numbers agree."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import rescompile
from tests import simulated_gpu

pytest.importorskip("tvm")

from rescompile.backends.cuda import compile as compiling
from rescompile.backends.cuda.cubin import Cubin
from rescompile.backends.program import Program


class Images(nn.Module):
    """A stem, a residual block with a projection, channel gates, a block in ConvNeXt's manner, a classifier."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, width, 7, 2, 3, bias=False), nn.BatchNorm2d(width), nn.ReLU())
        self.first, self.second = nn.Conv2d(width, 2 * width, 3, 2, 1), nn.Conv2d(2 * width, 2 * width, 3, 1, 1)
        self.skip = nn.Conv2d(width, 2 * width, 1, 2)
        self.gate, self.scale = nn.Conv2d(2 * width, 2 * width, 1), nn.Parameter(torch.rand(2 * width, 1, 1))
        self.wide, self.narrow = nn.Conv2d(2 * width, 4 * width, 1), nn.Conv2d(4 * width, 2 * width, 1)
        self.head = nn.Linear(2 * width, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        x = F.relu(self.second(F.relu(self.first(x))) + self.skip(x))
        x = x * torch.sigmoid(self.gate(x.mean((2, 3), keepdim=True)))
        x = x + self.scale * self.narrow(F.gelu(self.wide(x)))
        return self.head(x.mean((2, 3)))


class Layers(nn.Module):
    """A layer in BERT's manner and one in Llama's: attention without and with a causal mask, a gated unit."""

    def __init__(self, width: int = 32, heads: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.ModuleList(nn.Linear(width, 3 * width) for _ in range(2))
        self.out = nn.ModuleList(nn.Linear(width, width) for _ in range(2))
        self.norms = nn.ModuleList([nn.LayerNorm(width), nn.LayerNorm(width), nn.RMSNorm(width), nn.RMSNorm(width)])
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.gate, self.value = (nn.Linear(width, 2 * width, bias=False) for _ in range(2))
        self.last = nn.Linear(2 * width, width, bias=False)

    def attend(self, x: torch.Tensor, index: int, *, causal: bool) -> torch.Tensor:
        batch, length, width = x.shape
        q, k, v = (part.view(batch, length, self.heads, -1).transpose(1, 2) for part in self.qkv[index](x).chunk(3, -1))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
        return self.out[index](y.transpose(1, 2).reshape(batch, length, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norms[0](x + self.attend(x, 0, causal=False))
        x = self.norms[1](x + self.down(F.gelu(self.up(x))))
        x = x + self.attend(self.norms[2](x), 1, causal=True)
        y = self.norms[3](x)
        return x + self.last(F.silu(self.gate(y)) * self.value(y))


class Products(nn.Module):
    """Products of two results, one operand turned, and a scale."""

    def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return torch.clamp(a @ b.transpose(-1, -2) * 0.5, -1, 1) @ b


MODELS = {
    "images": (Images().half(), (torch.randn(1, 3, 30, 30).half(),), "cuda:sm_90"),
    "layers": (Layers().bfloat16(), (torch.randn(2, 18, 32).bfloat16(),), "cuda:sm_90"),
    "products": (Products().half(), (torch.randn(2, 3, 24, 16).half(), torch.randn(2, 3, 40, 16).half()), "cuda:sm_90"),
    "tf32": (nn.Sequential(nn.Linear(24, 40), nn.ReLU(), nn.Linear(40, 8)), (torch.randn(5, 24),), "cuda:sm_90,tf32"),
}
TOLERANCE = {"images": 5e-3, "layers": 3e-2, "products": 5e-3, "tf32": 5e-3}


@pytest.fixture(scope="module")
def programs() -> dict[str, Program]:
    if simulated_gpu.COMPILER is None:
        pytest.skip("no g++ here")
    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiling, "to_cubin", lambda source, arch: Cubin(_simulated(source), (), "g++"))
        return {
            name: rescompile.compile(model.eval(), inputs, target=target)
            for name, (model, inputs, target) in MODELS.items()
        }


def _simulated(source: str) -> bytes:
    return simulated_gpu.simulated_cubin(source, optimise="-O0")


def _kernels(program: Program) -> Counter[str]:
    found: Counter[str] = Counter()
    for region in program.manifest.regions:
        found[str(region["kernel"])] += int(str(region["calls"]))
    return found


def _numpy(tensor: torch.Tensor) -> np.ndarray:
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.uint16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


def test_models_compute_what_torch_computes(programs: dict[str, Program], tmp_path: Path) -> None:
    given = {}
    for name, program in programs.items():
        program.save(tmp_path / f"{name}.zip")
        given[name] = {f"x{i}": _numpy(value) for i, value in enumerate(MODELS[name][1])}
    results = simulated_gpu.run_programs(tmp_path, given)
    for name, (model, inputs, _) in MODELS.items():
        want = model.double()(*(value.double() for value in inputs)).detach()
        got = torch.from_numpy(results[name][0].astype(np.float64))
        assert (got - want).abs().max() < TOLERANCE[name] * want.abs().max(), name


def test_each_product_is_one_kernel_with_what_follows_it(programs: dict[str, Program]) -> None:
    images, layers = _kernels(programs["images"]), _kernels(programs["layers"])
    assert images["conv"] + images["linear"] == 8
    # The layout of the image, and what gates read.
    assert images["generated"] <= 2, images
    assert layers["linear"] == 9
    assert layers["attention"] == 2
    assert layers["generated"] == 0, layers
    assert _kernels(programs["products"]) == {"matmul": 2}
    assert _kernels(programs["tf32"]) == {"linear": 2}


def test_float32_stays_exact_where_tf32_is_not_asked_for() -> None:
    program = rescompile.compile(nn.Linear(24, 40), (torch.randn(5, 24),), target="cuda:sm_80")
    assert _kernels(program)["linear"] == 0
