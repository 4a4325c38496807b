"""Programs for GPUs that are not NVIDIA's: compiled, kept, and honest about what they need to run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from rescompile import api
from rescompile.errors import RescompileError

pytest.importorskip("tvm")

from rescompile.backends import targets
from rescompile.backends.cuda import depthwise, mma, wgmma
from rescompile.backends.cuda.contraction import ContractionSpec, EpilogueProgram
from rescompile.backends.cuda.scalars import portable, widest_lanes
from rescompile.backends.cuda.windows import Window, widest
from rescompile.backends.gpu_limits import GPU_LIMITS, gpu_target, refusal


class Residual(nn.Module):
    """Two small convolutional blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8)
        self.branch, self.depthwise = nn.Conv2d(8, 8, 3, 1, 1), nn.Conv2d(8, 8, 3, 1, 1, groups=8)
        self.pool, self.head = nn.MaxPool2d(3, 2, 1), nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.pool(torch.relu(self.norm(self.stem(x))))
        x = torch.relu(x + self.branch(x))
        x = x + self.depthwise(x)
        return self.head(x.mean((2, 3)))


class Attention(nn.Module):
    """A small transformer layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.LayerNorm(16), nn.LayerNorm(16)
        self.qkv, self.out, self.up, self.down = (nn.Linear(16, n) for n in (48, 16, 32, 16))
        self.down = nn.Linear(32, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (part.unflatten(-1, (2, 8)).transpose(1, 2) for part in self.qkv(self.first(x)).chunk(3, -1))
        mixed = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + self.out(mixed)
        return x + self.down(nn.functional.gelu(self.up(self.second(x))))


MODELS: dict[str, tuple[type[nn.Module], tuple[int, ...]]] = {
    "residual": (Residual, (1, 3, 16, 16)),
    "attention": (Attention, (1, 12, 16)),
}
SIGNS = {"opencl": "__kernel void", "metal": "kernel void", "webgpu": "@compute", "rocm:gfx90a": "amdgpu_kernel"}


def _program(model: str, target: str) -> Any:
    kind, shape = MODELS[model]
    return api.compile(kind().eval(), (torch.randn(shape),), target=target)


@pytest.mark.parametrize(
    ("model", "target"),
    [("residual", "opencl"), ("attention", "opencl"), ("residual", "metal"), ("attention", "rocm:gfx90a"),
     ("attention", "webgpu")],
)  # fmt: skip
def test_models_are_compiled_and_kept(model: str, target: str, tmp_path: Path) -> None:
    program = _program(model, target)
    (name,), (source,) = zip(*program.manifest.sources.items(), strict=True)
    assert name.endswith(GPU_LIMITS[target].suffix)
    assert SIGNS[target] in source
    assert "shfl" not in source
    own = {region["kernel"] for region in program.explain()} - {"generated"}
    assert own
    assert program.manifest.device == target.partition(":")[0]
    kept = api.load_program(program.save(tmp_path / "program.zip"))
    with pytest.raises(RescompileError, match="which this process cannot run: it runs with") as said:
        kept(torch.randn(MODELS[model][1]))
    assert ("are not linked" in str(said.value)) == (
        target.startswith("rocm") and "not linked" in program.manifest.note
    )


def test_families_for_tensor_cores_refuse_other_gpus() -> None:
    spec = ContractionSpec(64, 64, 64, EpilogueProgram.plain("float16"))
    assert "sm_90" in wgmma.refusal(spec, GPU_LIMITS["opencl"])
    assert mma.refusal(spec, GPU_LIMITS["metal"])


def test_accesses_are_as_wide_as_the_language_has_vectors() -> None:
    assert widest(64, "float16") == 8
    with portable(lanes=4):
        assert widest_lanes() == 4
        assert widest(64, "float16") == 4
        tile = depthwise.candidates(depthwise.Depthwise(1, Window(9, 9, 64, (3, 3)), dtype="float16"))[0]
        assert tile.vector == 4
    assert widest_lanes() == 8


@pytest.mark.parametrize("name", GPU_LIMITS)
def test_targets_carry_their_limits(name: str) -> None:
    found = targets.resolve(name)
    assert found.gpu is GPU_LIMITS[name]
    assert found.arch is None
    assert int(gpu_target(name).attrs["max_num_threads"]) == GPU_LIMITS[name].threads
    assert refusal(name, {"float32"}) == ""


def test_doubles_are_refused_where_the_language_has_none() -> None:
    assert "64 bits" in refusal("metal", {"float32", "float64"})
    assert refusal("opencl", {"float64"}) == ""


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("opncl", "did you mean 'opencl'"),
        ("rocm:gfx90", "did you mean 'rocm:gfx90a'"),
        ("rocm", "use opencl, rocm:gfx90a"),
        ("vulkan", "generates no code for"),
    ],
)
def test_other_names_are_answered_with_the_nearest(name: str, said: str) -> None:
    with pytest.raises(RescompileError, match=said):
        targets.resolve(name)


def test_no_gpu_is_predicted_for_another_target() -> None:
    from rescompile.cli_run import predicted_gpu

    assert predicted_gpu([targets.resolve("opencl")], None) is None
    amd = predicted_gpu([targets.resolve("rocm:gfx942")], None)
    assert amd is not None
    assert amd.name == "MI300X"
    with pytest.raises(RescompileError, match="leave --gpu out"):
        predicted_gpu([targets.resolve("cpu")], "H200")
