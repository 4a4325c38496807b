"""Image restoration: global skips, residuals in residuals, residual dense blocks."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.classics.case import Case, image
from tests.classics.parts import conv, conv_bn_relu


class SRResNet(nn.Module):
    """conv, [conv, bn, prelu, conv, bn, +] × n, conv, bn, + global, pixel shuffle (Ledig 2017)."""

    def __init__(self, blocks: int = 3, width: int = 8) -> None:
        super().__init__()
        self.head = nn.Sequential(nn.Conv2d(3, width, 9, padding=4), nn.PReLU())
        self.blocks = nn.ModuleList(
            nn.Sequential(
                conv(width, width), nn.BatchNorm2d(width), nn.PReLU(), conv(width, width), nn.BatchNorm2d(width)
            )
            for _ in range(blocks)
        )
        self.tail = nn.Sequential(conv(width, width), nn.BatchNorm2d(width))
        self.up = nn.Sequential(conv(width, 4 * width), nn.PixelShuffle(2), nn.PReLU(), conv(width, 3))

    def forward(self, x: Tensor) -> Tensor:
        first = self.head(x)
        y = first
        for block in self.blocks:
            y = y + block(y)
        out: Tensor = self.up(first + self.tail(y))
        return out


class DnCNN(nn.Module):
    """x − F(x): the network predicts the noise (Zhang 2017)."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(conv(3, 8), nn.ReLU(), *conv_bn_relu(8, 8), *conv_bn_relu(8, 8), conv(8, 3))

    def forward(self, x: Tensor) -> Tensor:
        return x - self.net(x)


class VDSR(nn.Module):
    """up(x) + F(up(x)): the skip starts from the interpolated image (Kim 2016)."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(conv(3, 8), nn.ReLU(), conv(8, 8), nn.ReLU(), conv(8, 3))

    def forward(self, x: Tensor) -> Tensor:
        x = F.interpolate(x, scale_factor=2.0, mode="bicubic", align_corners=False)
        return torch.add(self.net(x), x)


class Upscaler(nn.Module):
    """bicubic(x) + shuffle(F(x)): both ways change the resolution (FSRCNN with a global skip, RTSR)."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(conv(3, 8), nn.ReLU(), conv(8, 12), nn.PixelShuffle(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x) + F.interpolate(x, scale_factor=2.0, mode="bilinear", align_corners=False)


class DRRN(nn.Module):
    """A recursive block with shared weights: y ← x₁ + F(y), each sum with the first value (Tai 2017)."""

    def __init__(self, width: int = 8, unit: int = 3) -> None:
        super().__init__()
        self.head, self.tail = conv(3, width), conv(width, 3)
        self.body = nn.Sequential(nn.ReLU(), conv(width, width), nn.ReLU(), conv(width, width))
        self.unit = unit

    def forward(self, x: Tensor) -> Tensor:
        first = y = self.head(x)
        for _ in range(self.unit):
            y = first + self.body(y)
        return x + self.tail(y)


class ResidualDense(nn.Module):
    """RDN: dense layers, local fusion, local skip; all blocks concatenated; global skip (Zhang 2018)."""

    def __init__(self, blocks: int = 2, layers: int = 3, width: int = 8, growth: int = 4) -> None:
        super().__init__()
        self.first, self.second = conv(3, width), conv(width, width)
        self.layers = nn.ModuleList(
            nn.ModuleList(nn.Sequential(conv(width + i * growth, growth), nn.ReLU()) for i in range(layers))
            for _ in range(blocks)
        )
        self.local = nn.ModuleList(conv(width + layers * growth, width, 1) for _ in range(blocks))
        self.fuse = nn.Sequential(conv(blocks * width, width, 1), conv(width, width))

    def forward(self, x: Tensor) -> Tensor:
        shallow = self.first(x)
        x = self.second(shallow)
        outputs = []
        for layers, local in zip(self.layers, self.local, strict=True):
            grown = x
            for layer in layers:  # type: ignore[attr-defined]
                grown = torch.cat([grown, layer(grown)], 1)
            x = x + local(grown)
            outputs.append(x)
        return self.fuse(torch.cat(outputs, 1)) + shallow


class Dense5(nn.Module):
    """ESRGAN's residual dense block: five convs on everything before, 0.2 on the branch."""

    def __init__(self, width: int, growth: int) -> None:
        super().__init__()
        self.convs = nn.ModuleList(conv(width + i * growth, width if i == 4 else growth) for i in range(5))

    def forward(self, x: Tensor) -> Tensor:
        x1 = F.leaky_relu(self.convs[0](x), 0.2)
        x2 = F.leaky_relu(self.convs[1](torch.cat((x, x1), 1)), 0.2)
        x3 = F.leaky_relu(self.convs[2](torch.cat((x, x1, x2), 1)), 0.2)
        x4 = F.leaky_relu(self.convs[3](torch.cat((x, x1, x2, x3), 1)), 0.2)
        x5 = self.convs[4](torch.cat((x, x1, x2, x3, x4), 1))
        return x5 * 0.2 + x


class RRDB(nn.Module):
    """Three residual dense blocks under one scaled skip (Wang 2018)."""

    def __init__(self, width: int, growth: int) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(Dense5(width, growth) for _ in range(3)))

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(x) * 0.2 + x


class ESRGAN(nn.Module):
    """RRDB-Net with one RRDB."""

    def __init__(self, width: int = 8, growth: int = 4) -> None:
        super().__init__()
        self.first, self.trunk, self.last = conv(3, width), RRDB(width, growth), conv(width, 3)
        self.after, self.up = conv(width, width), conv(width, width)

    def forward(self, x: Tensor) -> Tensor:
        first = self.first(x)
        first = first + self.after(self.trunk(first))
        out: Tensor = self.last(F.leaky_relu(self.up(F.interpolate(first, scale_factor=2, mode="nearest")), 0.2))
        return out


class ChannelAttention(nn.Module):
    """x·σ(conv(relu(conv(pool(x)))))"""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gate = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Conv2d(width, 2, 1), nn.ReLU(True), nn.Conv2d(2, width, 1), nn.Sigmoid()
        )

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gate(x)


class RCAB(nn.Module):
    """conv, relu, conv, channel attention, +."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(conv(width, width), nn.ReLU(True), conv(width, width), ChannelAttention(width))

    def forward(self, x: Tensor) -> Tensor:
        res = self.body(x)
        res += x
        return res


class Group(nn.Module):
    """RCABs and a conv under a skip; with groups as blocks, RCAN itself."""

    def __init__(self, blocks: list[nn.Module], width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(*blocks, conv(width, width))

    def forward(self, x: Tensor) -> Tensor:
        res = self.body(x)
        res += x
        return res


def rcan(groups: int = 2, blocks: int = 2, width: int = 8) -> nn.Module:
    """Residual in residual with channel attention (Zhang 2018)."""
    inner: list[nn.Module] = [Group([RCAB(width) for _ in range(blocks)], width) for _ in range(groups)]
    return nn.Sequential(conv(3, width), Group(inner, width), conv(width, 4 * width), nn.PixelShuffle(2))


class NAFBlock(nn.Module):
    """Two branches with simple gates x₁·x₂ and trained scales β, γ (Chen 2022)."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(1, width), nn.GroupNorm(1, width)
        self.a = nn.Sequential(conv(width, 2 * width, 1), conv(2 * width, 2 * width, 3, 1, 2 * width))
        self.sca, self.b = conv(width, width, 1), conv(width, width, 1)
        self.c, self.d = conv(width, 2 * width, 1), conv(width, width, 1)
        self.beta = nn.Parameter(torch.zeros(1, width, 1, 1))
        self.gamma = nn.Parameter(torch.zeros(1, width, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        y1, y2 = self.a(self.norm1(x)).chunk(2, 1)
        y = y1 * y2
        y = self.b(y * self.sca(F.adaptive_avg_pool2d(y, 1)))
        x = x + y * self.beta
        y1, y2 = self.c(self.norm2(x)).chunk(2, 1)
        return x + self.d(y1 * y2) * self.gamma


CASES: dict[str, Case] = {
    "SRResNet": Case(SRResNet, image(), {"identity": 4, "nested": 3}, "branch", folded="none"),
    "DnCNN": Case(DnCNN, image(), {"identity": 1}, "inner", folded="none"),
    "VDSR": Case(VDSR, image(), {"identity": 1}, "none"),
    # The shortcut leaves the fork's resolution as the branch does: no join across resolutions.
    "global skip over an upscaler": Case(Upscaler, image(), {"pool": 1}),
    # Each sum starts from the first value; what came before lies in its branch.
    "DRRN": Case(DRRN, image(), {"identity": 4, "nested": 3}, "none"),
    # Three concatenations in each of two blocks, and that of the first block's output with the second's.
    "RDN": Case(ResidualDense, image(), {"identity": 3, "dense": 7, "nested": 9}, "none"),
    "ESRGAN": Case(ESRGAN, image(), {"identity": 5, "dense": 12, "nested": 16}, "none", scales=4),
    "RCAN": Case(rcan, image(), {"identity": 7, "nested": 6}, "none"),
    "NAFNet": Case(NAFBlock, image(8), {"identity": 2}, "pre", scales=2),
}
