"""Encoders and decoders with skips between them."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.classics.case import Case, floats, image
from tests.classics.parts import conv, conv_bn, conv_bn_relu


def double(inputs: int, outputs: int) -> nn.Sequential:
    """Two convolutions, as everywhere in a U-Net."""
    return nn.Sequential(*conv_bn_relu(inputs, outputs), *conv_bn_relu(outputs, outputs))


class Residual(nn.Module):
    """relu(F(x) + conv₁ₓ₁(x)) (ResUNet)."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.body = nn.Sequential(*conv_bn_relu(inputs, outputs), *conv_bn(outputs, outputs))
        self.skip = nn.Identity() if inputs == outputs else conv_bn(inputs, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.body(x) + self.skip(x))


class Gate(nn.Module):
    """Attention gate on a skip: x·σ(ψ(relu(W x + U g))) (Oktay 2018): its own sum joins two working branches."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.g, self.x, self.psi = conv_bn(width, 4, 1), conv_bn(width, 4, 1), conv_bn(4, 1, 1)

    def forward(self, gating: Tensor, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.psi(F.relu(self.g(gating) + self.x(x))))


class UNet(nn.Module):
    """Three levels; `up`: transpose, bilinear or crop (valid convolutions); `join`: concat or add."""

    def __init__(
        self, up: str = "transpose", join: str = "concat", gated: bool = False, residual: bool = False
    ) -> None:
        super().__init__()
        block = Residual if residual else double
        widths = (4, 8, 16)
        self.down = nn.ModuleList(block(i, o) for i, o in zip((3, *widths), widths, strict=False))
        ups: list[nn.Module] = []
        for width in (16, 8):
            if up == "bilinear":
                wide: nn.Module = nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True)
                ups.append(nn.Sequential(wide, conv(width, width // 2, 1)))
            else:
                wide = nn.ConvTranspose2d(width, width // 2, 2, 2)
                ups.append(nn.Sequential(wide, nn.Conv2d(width // 2, width // 2, 3)) if up == "crop" else wide)
        self.ups = nn.ModuleList(ups)
        self.gates = nn.ModuleList(Gate(width) for width in (8, 4)) if gated else None
        self.up = nn.ModuleList(block(width if join == "concat" else width // 2, width // 2) for width in (16, 8))
        self.head = nn.Conv2d(4, 2, 1)
        self.join, self.crop = join, up == "crop"

    def forward(self, x: Tensor) -> Tensor:
        skips = []
        for index, down in enumerate(self.down):
            x = down(x)
            if index < 2:
                skips.append(x)
                x = F.max_pool2d(x, 2)
        for index, (wide, up) in enumerate(zip(self.ups, self.up, strict=True)):
            x, skip = wide(x), skips.pop()
            if self.crop:
                edge, size = (skip.shape[2] - x.shape[2]) // 2, x.shape[2]
                skip = skip[:, :, edge : edge + size, edge : edge + size]
            if self.gates is not None:
                skip = self.gates[index](x, skip)
            x = up(torch.cat([skip, x], 1) if self.join == "concat" else skip + x)
        out: Tensor = self.head(x)
        return out


class Nested(nn.Module):
    """U-Net++: X[i][j] from all X[i][<j] and the upsampled X[i+1][j−1] (Zhou 2018), depth 2."""

    def __init__(self) -> None:
        super().__init__()
        widths = (4, 8, 16)
        self.down = nn.ModuleList(double(i, o) for i, o in zip((3, *widths), widths, strict=False))
        self.x01, self.x11, self.x02 = double(4 + 8, 4), double(8 + 16, 8), double(4 + 4 + 8, 4)
        self.up = nn.Upsample(scale_factor=2, mode="nearest")

    def forward(self, x: Tensor) -> Tensor:
        x00 = self.down[0](x)
        x10 = self.down[1](F.max_pool2d(x00, 2))
        x01 = self.x01(torch.cat([x00, self.up(x10)], 1))
        x20 = self.down[2](F.max_pool2d(x10, 2))
        x11 = self.x11(torch.cat([x10, self.up(x20)], 1))
        out: Tensor = self.x02(torch.cat([x00, x01, self.up(x11)], 1))
        return out


class VNet(nn.Module):
    """3-D: residual stages, strided down-convolutions, concatenated skips (Milletari 2016)."""

    def __init__(self) -> None:
        super().__init__()

        def body(width: int) -> nn.Sequential:
            return nn.Sequential(nn.Conv3d(width, width, 3, padding=1), nn.BatchNorm3d(width), nn.PReLU())

        self.stem, self.a, self.b, self.c = nn.Conv3d(1, 4, 3, padding=1), body(4), body(8), body(8)
        self.down, self.up = nn.Conv3d(4, 8, 2, 2), nn.ConvTranspose3d(8, 4, 2, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.a(x)
        y = self.down(x)
        y = y + self.b(y)
        y = torch.cat([self.up(y), x], 1)
        return y + self.c(y)


class LinkNet(nn.Module):
    """Residual encoder, the decoder adds the encoder's values (Chaurasia 2017)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn_relu(3, 4)
        self.e1, self.e2 = Residual(4, 4), Residual(8, 8)
        self.down1, self.down2 = conv_bn_relu(4, 8, 3, 2), conv_bn_relu(8, 8, 3, 2)
        self.d2 = nn.Sequential(conv_bn_relu(8, 4, 1), nn.ConvTranspose2d(4, 4, 2, 2), conv_bn_relu(4, 8, 1))
        self.d1 = nn.Sequential(conv_bn_relu(8, 4, 1), nn.ConvTranspose2d(4, 4, 2, 2), conv_bn_relu(4, 4, 1))

    def forward(self, x: Tensor) -> Tensor:
        e1 = self.e1(self.stem(x))
        e2 = self.e2(self.down1(e1))
        d2 = self.d2(self.down2(e2)) + e2
        out: Tensor = self.d1(d2) + e1
        return out


class SegNet(nn.Module):
    """The decoder unpools at the encoder's maxima (Badrinarayanan 2017): indices are no features, so no skip."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = conv_bn_relu(3, 4), conv_bn_relu(4, 8)
        self.c, self.d = conv_bn_relu(8, 4), conv_bn_relu(4, 2)
        self.pool, self.unpool = nn.MaxPool2d(2, return_indices=True), nn.MaxUnpool2d(2)

    def forward(self, x: Tensor) -> Tensor:
        x, first = self.pool(self.a(x))
        x, second = self.pool(self.b(x))
        x = self.c(self.unpool(x, second))
        out: Tensor = self.d(self.unpool(x, first))
        return out


class Hourglass(nn.Module):
    """up(low(pool(x))) + up1(x), recursively (Newell 2016); the skip works through a residual block."""

    def __init__(self, depth: int, width: int = 4, plain: bool = False) -> None:
        super().__init__()
        self.up1 = nn.Identity() if plain else Residual(width, width)
        self.low1, self.low3 = Residual(width, width), Residual(width, width)
        self.low2: nn.Module = Hourglass(depth - 1, width, plain) if depth > 1 else Residual(width, width)

    def forward(self, x: Tensor) -> Tensor:
        low = self.low3(self.low2(self.low1(F.max_pool2d(x, 2))))
        out: Tensor = self.up1(x) + F.interpolate(low, scale_factor=2)
        return out


class Stacked(nn.Module):
    """Two hourglasses: x ← x + merge(features) + merge(prediction) between them."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.stem = conv_bn_relu(3, width)
        self.glass = nn.ModuleList(Hourglass(1, width) for _ in range(2))
        self.feature = nn.ModuleList(conv_bn_relu(width, width, 1) for _ in range(2))
        self.predict = nn.ModuleList(conv(width, 2, 1) for _ in range(2))
        self.back, self.merge = conv(2, width, 1), conv(width, width, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.stem(x)
        first = self.feature[0](self.glass[0](x))
        one = self.predict[0](first)
        x = x + self.merge(first) + self.back(one)
        return one, self.predict[1](self.feature[1](self.glass[1](x)))


class Wave(nn.Module):
    """Demucs-like: strided 1-D encoder with GLUs, an LSTM, a decoder that adds the encoder's values (Défossez 2019)."""

    def __init__(self) -> None:
        super().__init__()
        self.e1, self.e2 = nn.Conv1d(2, 4, 8, 4, 2), nn.Conv1d(4, 8, 8, 4, 2)
        self.g1, self.g2 = nn.Conv1d(4, 8, 1), nn.Conv1d(8, 16, 1)
        self.lstm = nn.LSTM(8, 8, bidirectional=True)
        self.linear = nn.Linear(16, 8)
        self.p2, self.p1 = nn.Conv1d(8, 16, 3, padding=1), nn.Conv1d(4, 8, 3, padding=1)
        self.d2, self.d1 = nn.ConvTranspose1d(8, 4, 8, 4, 2), nn.ConvTranspose1d(4, 2, 8, 4, 2)

    def forward(self, x: Tensor) -> Tensor:
        s1 = F.glu(self.g1(F.relu(self.e1(x))), 1)
        s2 = F.glu(self.g2(F.relu(self.e2(s1))), 1)
        y = self.linear(self.lstm(s2.permute(2, 0, 1))[0]).permute(1, 2, 0)
        y = y + s2
        y = F.relu(self.d2(F.glu(self.p2(y), 1)))
        y = y + s1
        out: Tensor = self.d1(F.glu(self.p1(y), 1))
        return out


class UViT(nn.Module):
    """Transformer whose second half concatenates the first half's values, linear(cat(x, skip)) (Bao 2023)."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()

        def layer() -> nn.Module:
            return nn.TransformerEncoderLayer(width, 2, 16, batch_first=True, norm_first=True)

        self.inputs = nn.ModuleList(layer() for _ in range(2))
        self.middle = layer()
        self.outputs = nn.ModuleList(layer() for _ in range(2))
        self.skips = nn.ModuleList(nn.Linear(2 * width, width) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        kept = []
        for layer in self.inputs:
            x = layer(x)
            kept.append(x)
        x = self.middle(x)
        for layer, skip in zip(self.outputs, self.skips, strict=True):
            x = layer(skip(torch.cat([x, kept.pop()], -1)))
        return x


CASES: dict[str, Case] = {
    "U-Net, transpose convs": Case(UNet, image(), {"long": 2, "nested": 1}),
    "U-Net, bilinear": Case(lambda: UNet("bilinear"), image(), {"long": 2, "nested": 1}),
    "U-Net, cropped skips": Case(lambda: UNet("crop"), image(), {"long": 2, "nested": 1}, traced=False),
    "U-Net, added skips": Case(lambda: UNet(join="add"), image(), {"long": 2, "nested": 1}),
    # The gate's own sum, of what it gates and the decoder's value, makes no stream.
    "Attention U-Net": Case(lambda: UNet(gated=True), image(), {"long": 2, "nested": 1}),
    "ResUNet": Case(lambda: UNet(residual=True), image(), {"long": 2, "projection": 5}),
    "U-Net++": Case(Nested, image(), {"long": 3}),
    "V-Net": Case(VNet, floats((1, 1, 4, 4, 4)), {"long": 1, "identity": 3}, "inner", folded="none"),
    "LinkNet": Case(LinkNet, image(), {"long": 2, "identity": 2}, "branch", folded="none"),
    "SegNet": Case(SegNet, image(), {}),
    "hourglass, plain skips": Case(
        lambda: Hourglass(2, plain=True), image(4), {"long": 2, "identity": 5}, "branch", folded="none"
    ),
    # The skips are residual blocks themselves: the stream that runs through them is what is joined.
    "hourglass": Case(lambda: Hourglass(2), image(4), {"long": 2, "identity": 7}, "branch", folded="none"),
    "stacked hourglasses": Case(Stacked, image(), {"long": 2, "parallel": 1, "identity": 8}, "branch", folded="none"),
    "Demucs": Case(Wave, floats((1, 2, 64)), {"long": 1, "recurrent": 1}),
    # No change of resolution: the concatenations append new features to old ones.
    # A trace holds each encoder layer of torch.nn as one operation, whose skips it does not show.
    "U-ViT": Case(UViT, floats((2, 5, 8)), {"identity": 10, "dense": 2}, "pre", traced=False),
}
