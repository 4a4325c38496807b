"""Detection and segmentation: YOLO's blocks, feature pyramids, pooling pyramids, parallel resolutions."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.classics.case import Case, image
from tests.classics.parts import conv, conv_bn, conv_bn_relu


def cbs(inputs: int, outputs: int, kernel: int = 1, stride: int = 1) -> nn.Sequential:
    """YOLO's Conv: convolution, batch norm, SiLU."""
    pad = kernel // 2
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, stride, pad, bias=False), nn.BatchNorm2d(outputs), nn.SiLU(inplace=True)
    )


class Bottleneck(nn.Module):
    """x + cv2(cv1(x)), or without the sum."""

    def __init__(self, width: int, add: bool = True) -> None:
        super().__init__()
        self.cv1, self.cv2, self.add = cbs(width, width, 3), cbs(width, width, 3), add

    def forward(self, x: Tensor) -> Tensor:
        return x + self.cv2(self.cv1(x)) if self.add else self.cv2(self.cv1(x))


class C3(nn.Module):
    """conv([m(cv1(x)), cv2(x)]): two working branches."""

    def __init__(self, width: int, repeat: int = 2, add: bool = True) -> None:
        super().__init__()
        half = width // 2
        self.cv1, self.cv2, self.cv3 = cbs(width, half), cbs(width, half), cbs(2 * half, width)
        self.m = nn.Sequential(*(Bottleneck(half, add) for _ in range(repeat)))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.cv3(torch.cat((self.m(self.cv1(x)), self.cv2(x)), 1))
        return out


class C2f(nn.Module):
    """conv([a, b, m₁(b), m₂(m₁(b)), ...]) with [a, b] = cv1(x): old features and new ones."""

    def __init__(self, width: int, repeat: int = 2, add: bool = True) -> None:
        super().__init__()
        self.half = width // 2
        self.cv1, self.cv2 = cbs(width, 2 * self.half), cbs((2 + repeat) * self.half, width)
        self.m = nn.ModuleList(Bottleneck(self.half, add) for _ in range(repeat))

    def forward(self, x: Tensor) -> Tensor:
        y = list(self.cv1(x).chunk(2, 1))
        y.extend(m(y[-1]) for m in self.m)
        out: Tensor = self.cv2(torch.cat(y, 1))
        return out


class SPPF(nn.Module):
    """conv([x, p(x), p(p(x)), p(p(p(x)))]) with p a max pool of stride 1: pooled features are new ones."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.cv1, self.cv2 = cbs(width, width // 2), cbs(2 * width, width)
        self.pool = nn.MaxPool2d(5, 1, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.cv1(x)
        y1 = self.pool(x)
        y2 = self.pool(y1)
        out: Tensor = self.cv2(torch.cat((x, y1, y2, self.pool(y2)), 1))
        return out


class Yolo(nn.Module):
    """Backbone of three stages, SPPF, and a PAN: top-down and bottom-up with concatenations."""

    def __init__(self, block: type[nn.Module]) -> None:
        super().__init__()
        self.stem, self.d3, self.d4, self.d5 = cbs(3, 4, 3), cbs(4, 8, 3, 2), cbs(8, 8, 3, 2), cbs(8, 8, 3, 2)
        self.b3, self.b4, self.b5 = (block(8, 1) for _ in range(3))
        self.sppf = SPPF(8)
        self.l4, self.l3 = cbs(8, 8), cbs(8, 8)
        self.r4, self.r3, self.n4, self.n5 = (cbs(16, 8) for _ in range(4))
        self.o4, self.o3, self.p4, self.p5 = (block(8, 1, False) for _ in range(4))
        self.u4, self.u5 = cbs(8, 8, 3, 2), cbs(8, 8, 3, 2)
        self.up = nn.Upsample(scale_factor=2, mode="nearest")

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        c3 = self.b3(self.d3(self.stem(x)))
        c4 = self.b4(self.d4(c3))
        c5 = self.sppf(self.b5(self.d5(c4)))
        l5 = self.l4(c5)
        p4 = self.l3(self.o4(self.r4(torch.cat([self.up(l5), c4], 1))))
        p3 = self.o3(self.r3(torch.cat([self.up(p4), c3], 1)))
        n4 = self.p4(self.n4(torch.cat([self.u4(p3), p4], 1)))
        n5 = self.p5(self.n5(torch.cat([self.u5(n4), l5], 1)))
        return p3, n4, n5


class Fpn(nn.Module):
    """Three levels, lateral 1×1 convs, top-down sums (Lin 2017); then PANet's bottom-up sums."""

    def __init__(self, bottom_up: bool = False, width: int = 8) -> None:
        super().__init__()
        self.c = nn.ModuleList(conv_bn_relu(3 if i == 0 else width, width, 3, 2) for i in range(3))
        self.lateral = nn.ModuleList(conv(width, width, 1) for _ in range(3))
        self.smooth = nn.ModuleList(conv(width, width) for _ in range(3))
        self.down = nn.ModuleList(conv(width, width, 3, 2) for _ in range(2)) if bottom_up else None

    def forward(self, x: Tensor) -> list[Tensor]:
        features = []
        for c in self.c:
            x = c(x)
            features.append(x)
        levels = [lateral(f) for lateral, f in zip(self.lateral, features, strict=True)]
        for i in (1, 0):
            levels[i] = levels[i] + F.interpolate(levels[i + 1], size=levels[i].shape[-2:], mode="nearest")
        levels = [smooth(level) for smooth, level in zip(self.smooth, levels, strict=True)]
        if self.down is not None:
            for i, down in enumerate(self.down):
                levels[i + 1] = levels[i + 1] + down(levels[i])
        return levels


class HighResolution(nn.Module):
    """Two modules of HRNet: residual blocks at each resolution, then every resolution mapped to every other and summed.

    The second module begins a third resolution (Sun 2019).
    """

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.stem = nn.Sequential(conv_bn_relu(3, width), conv_bn_relu(width, width))
        self.begin = nn.ModuleList(conv_bn_relu(width, width, 3, 1 + (i > 0)) for i in range(3))
        self.blocks, self.maps = nn.ModuleList(), nn.ModuleList()
        for levels in (2, 3):
            blocks = (nn.Sequential(*conv_bn_relu(width, width), *conv_bn(width, width)) for _ in range(levels))
            self.blocks.append(nn.ModuleList(blocks))
            maps = (self._map(width, i, j) for i in range(levels) for j in range(levels))
            self.maps.append(nn.ModuleList(maps))

    def _map(self, width: int, to: int, of: int) -> nn.Module:
        if of > to:
            return nn.Sequential(*conv_bn(width, width, 1), nn.Upsample(scale_factor=2 ** (of - to)))
        steps = [conv_bn_relu(width, width, 3, 2) for _ in range(to - of - 1)]
        return nn.Sequential(*steps, *conv_bn(width, width, 3, 2)) if to > of else nn.Identity()

    def forward(self, x: Tensor) -> list[Tensor]:
        x = self.stem(x)
        levels = [self.begin[0](x), self.begin[1](x)]
        for blocks, maps in zip(self.blocks, self.maps, strict=True):
            if len(levels) < len(blocks):
                levels.append(self.begin[2](levels[-1]))
            levels = [F.relu(level + block(level)) for level, block in zip(levels, blocks, strict=True)]
            count = len(levels)
            fused = [[maps[i * count + j](levels[j]) for j in range(count)] for i in range(count)]
            levels = [F.relu(sum(row[1:], start=row[0])) for row in fused]
        return levels


class BiFpn(nn.Module):
    """One BiFPN layer on three levels: normalised weighted sums, of three values in the middle (Tan 2020)."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.c = nn.ModuleList(conv_bn_relu(3 if i == 0 else width, width, 3, 2) for i in range(3))
        self.w = nn.ParameterList([nn.Parameter(torch.ones(n)) for n in (2, 2, 3, 2)])
        self.conv = nn.ModuleList(conv_bn_relu(width, width) for _ in range(4))

    def fuse(self, index: int, *values: Tensor) -> Tensor:
        w = F.relu(self.w[index])
        w = w / (w.sum() + 1e-4)
        total = w[0] * values[0] + w[1] * values[1]
        if len(values) == 3:
            total = total + w[2] * values[2]
        out: Tensor = self.conv[index](F.silu(total))
        return out

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        p3 = self.c[0](x)
        p4 = self.c[1](p3)
        p5 = self.c[2](p4)
        m4 = self.fuse(0, p4, F.interpolate(p5, scale_factor=2.0))
        o3 = self.fuse(1, p3, F.interpolate(m4, scale_factor=2.0))
        o4 = self.fuse(2, p4, m4, F.max_pool2d(o3, 2))
        o5 = self.fuse(3, p5, F.max_pool2d(o4, 2))
        return o3, o4, o5


class PyramidPooling(nn.Module):
    """[x, up(conv(pool₁(x))), ...]: x joined with what went to coarser bins and back (Zhao 2017)."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.stem = conv_bn_relu(3, width)
        self.stages = nn.ModuleList(
            nn.Sequential(nn.AdaptiveAvgPool2d(bins), conv_bn_relu(width, 2, 1)) for bins in (1, 2, 4)
        )
        self.head = nn.Sequential(conv_bn_relu(width + 6, 8), nn.Conv2d(8, 2, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        size = x.shape[2:]
        pooled = [F.interpolate(s(x), size=size, mode="bilinear", align_corners=False) for s in self.stages]
        out: Tensor = self.head(torch.cat([x, *pooled], 1))
        return out


class DeepLab(nn.Module):
    """ASPP (a concat of working branches), then a decoder that joins projected low-level features (Chen 2018, v3+)."""

    def __init__(self, decoder: bool, width: int = 8) -> None:
        super().__init__()
        self.low, self.high = conv_bn_relu(3, width), conv_bn_relu(width, width, 3, 4)
        self.branches = nn.ModuleList(
            nn.Sequential(nn.Conv2d(width, 4, 3, padding=r, dilation=r), nn.BatchNorm2d(4), nn.ReLU()) for r in (1, 2)
        )
        self.point, self.pooled = conv_bn_relu(width, 4, 1), conv_bn_relu(width, 4, 1)
        self.merge, self.reduce = conv_bn_relu(16, 8, 1), conv_bn_relu(width, 2, 1)
        self.head = nn.Sequential(conv_bn_relu(10 if decoder else 8, 8), nn.Conv2d(8, 2, 1))
        self.decoder = decoder

    def forward(self, x: Tensor) -> Tensor:
        low = self.low(x)
        high = self.high(low)
        pooled = F.interpolate(self.pooled(F.adaptive_avg_pool2d(high, 1)), size=high.shape[2:], mode="bilinear")
        y = self.merge(torch.cat([self.point(high), *(b(high) for b in self.branches), pooled], 1))
        y = F.interpolate(y, size=low.shape[2:], mode="bilinear", align_corners=False)
        out: Tensor = self.head(torch.cat([y, self.reduce(low)], 1) if self.decoder else y)
        return out


class FCN8(nn.Module):
    """Scores of three depths, upsampled and summed (Long 2015): projections of earlier stages."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.c = nn.ModuleList(conv_bn_relu(3 if i == 0 else width, width, 3, 2) for i in range(3))
        self.score = nn.ModuleList(nn.Conv2d(width, 2, 1) for _ in range(3))
        self.up = nn.ModuleList(nn.ConvTranspose2d(2, 2, 4, 2, 1, bias=False) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        features = []
        for c in self.c:
            x = c(x)
            features.append(x)
        score = self.up[2](self.score[2](features[2])) + self.score[1](features[1])
        score = self.up[1](score) + self.score[0](features[0])
        out: Tensor = self.up[0](score)
        return out


CASES: dict[str, Case] = {
    # Three backbone bottlenecks; SPPF is dense; the top-down path joins across resolutions, the bottom-up path joins
    # what it came from across resolutions too.
    "YOLOv5 (C3)": Case(lambda: Yolo(C3), image(), {"identity": 3, "dense": 1, "long": 4}, "inner", folded="none"),
    "YOLOv8 (C2f)": Case(lambda: Yolo(C2f), image(), {"identity": 3, "dense": 8, "long": 4}, traced=False),
    "FPN": Case(Fpn, image(), {"long": 2}),
    # The bottom-up sums join two 3×3 convolutions.
    "PANet": Case(lambda: Fpn(True), image(), {"long": 2}),
    # A sum at each resolution of each module; one block in each.
    "HRNet": Case(HighResolution, image(), {"identity": 5, "branches": 5}, "branch", folded="none"),
    # Each of the four weighted sums joins a level's value with a neighbouring level's; the third adds the level's own
    # earlier value to its later one besides.
    "BiFPN": Case(BiFpn, image(), {"long": 4, "identity": 1}),
    "PSPNet": Case(PyramidPooling, image(), {"long": 1}),
    "ASPP": Case(lambda: DeepLab(False), image(), {}),
    "DeepLab v3+": Case(lambda: DeepLab(True), image(), {"long": 1}),
    "FCN-8s": Case(FCN8, image(), {"long": 2}),
}
