"""Residual networks of many kinds, fused and compiled for a GPU: whole programs on the simulated one against eager."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import rescompile as rc
from tests import simulated_gpu

pytest.importorskip("tvm")

from rescompile.backends.cuda import compile as compile_module
from rescompile.backends.cuda.cubin import Cubin

WIDTH = 32


class ImageNets(nn.Module):
    """One block each of ConvNeXt, a dense net, a squeeze-and-excite net, and one with group norm."""

    def __init__(self) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(16, 16, 7, padding=3, groups=16)
        self.norm = nn.LayerNorm(16)
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)
        self.scale = nn.Parameter(torch.full((16,), 0.5))
        self.dense, self.after = nn.Conv2d(16, 8, 3, padding=1), nn.BatchNorm2d(24)
        self.squeeze, self.excite = nn.Conv2d(24, 4, 1), nn.Conv2d(4, 24, 1)
        self.conv, self.groups = nn.Conv2d(24, 24, 3, padding=1), nn.GroupNorm(3, 24)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        x = x + (self.scale * self.down(F.gelu(self.up(y)))).permute(0, 3, 1, 2)
        x = F.relu(self.after(torch.cat([x, self.dense(x)], 1)))
        gate = torch.sigmoid(self.excite(F.relu(self.squeeze(x.mean((2, 3), keepdim=True)))))
        x = F.relu(self.conv(x) * gate + x)
        return F.silu(self.groups(self.conv(x) + x))


class TokenNets(nn.Module):
    """One block each of Swin (shifted windows), a pre-norm and a post-norm transformer, Llama, and a highway net."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.rms, self.last = nn.RMSNorm(WIDTH), nn.RMSNorm(WIDTH)
        self.mix, self.gate, self.up, self.down = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        windows = torch.roll(self.first(x).view(-1, 8, 8, WIDTH), (-2, -2), (1, 2))
        windows = windows.view(-1, 2, 4, 2, 4, WIDTH).permute(0, 1, 3, 2, 4, 5).reshape(-1, 16, WIDTH)
        turned = self.mix(windows).view(-1, 2, 2, 4, 4, WIDTH).permute(0, 1, 3, 2, 4, 5).reshape(-1, 8, 8, WIDTH)
        x = x + torch.roll(turned, (2, 2), (1, 2)).reshape(-1, 64, WIDTH)
        x = self.second(x + self.mix(F.gelu(self.up(x))))
        s = x + self.rms(self.down(x))
        x = s + self.down(F.silu(self.gate(self.last(s))) * self.up(s))
        gate = torch.sigmoid(self.gate(x))
        return gate * torch.tanh(self.up(x)) + (1 - gate) * x, s


NETS = {"images": (ImageNets, (2, 16, 8, 8)), "tokens": (TokenNets, (2, 64, WIDTH))}


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[rc.Program, list[Tensor], list[Tensor]]]:
    """Of each net the program, its outputs on the simulated GPU, and eager's."""
    if simulated_gpu.COMPILER is None:
        pytest.skip("no g++ here")
    folder: Path = tmp_path_factory.mktemp("models")
    made, given, wanted = {}, {}, {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            compile_module,
            "to_cubin",
            lambda source, arch: Cubin(simulated_gpu.simulated_cubin(source, optimise="-O0"), (), "simulated"),
        )
        patch.setattr(compile_module, "to_ptx", lambda *_: None)
        for name, (net, shape) in NETS.items():
            torch.manual_seed(1)
            model, x = net().eval(), torch.randn(shape)
            made[name] = rc.compile(model, (x,), target="cuda:sm_90")
            made[name].save(folder / f"{name}.zip")
            given[name] = {"x": x.numpy()}
            with torch.no_grad():
                out = model(x)
            wanted[name] = list(out) if isinstance(out, tuple) else [out]
    got = simulated_gpu.run_programs(folder, given)
    return {name: (made[name], [torch.from_numpy(y) for y in got[name]], wanted[name]) for name in NETS}


@pytest.mark.parametrize("name", NETS)
def test_program_computes_what_the_model_does(name: str, programs: dict[str, tuple[rc.Program, list, list]]) -> None:
    _, got, wanted = programs[name]
    for have, want in zip(got, wanted, strict=True):
        torch.testing.assert_close(have, want, rtol=1e-4, atol=1e-5)


def test_residual_regions_are_calls_of_our_kernels(programs: dict[str, tuple[rc.Program, list, list]]) -> None:
    kinds = {
        name: {region["kernel"] for region in program.manifest.regions} for name, (program, _, _) in programs.items()
    }
    assert {"norm", "concat", "elementwise"} <= kinds["images"]
    assert {"norm", "elementwise"} <= kinds["tokens"]
    for program, _, _ in programs.values():
        # In float32 a plain epilogue of a product is TVM's; nothing that memory bounds is.
        assert "written out" not in program.manifest.note or "its product has no kernel" in program.manifest.note
