"""Generative models, players and heads."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.classics.case import Case, floats, image
from tests.classics.parts import conv, conv_bn, conv_bn_relu


class ResBlock(nn.Module):
    """Latent diffusion: GroupNorm, SiLU, conv, + time embedding, GroupNorm, SiLU, conv, + skip."""

    def __init__(self, inputs: int, outputs: int, time: int = 8) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.GroupNorm(2, inputs), nn.SiLU(), conv(inputs, outputs))
        self.time = nn.Sequential(nn.SiLU(), nn.Linear(time, outputs))
        self.second = nn.Sequential(nn.GroupNorm(2, outputs), nn.SiLU(), nn.Dropout(0.0), conv(outputs, outputs))
        self.skip = nn.Identity() if inputs == outputs else conv(inputs, outputs, 1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        h = self.first(x) + self.time(t)[:, :, None, None]
        out: Tensor = self.skip(x) + self.second(h)
        return out


class SpatialAttention(nn.Module):
    """x + proj(attention(GroupNorm(x))) over the pixels."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.n, self.qkv, self.o = nn.GroupNorm(2, width), conv(width, 3 * width, 1), conv(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        q, k, v = self.qkv(self.n(x)).reshape(b, 3 * c, h * w).chunk(3, 1)
        y = v @ (q.transpose(1, 2) @ k * c**-0.5).softmax(-1).transpose(1, 2)
        return x + self.o(y.reshape(b, c, h, w))


class Diffusion(nn.Module):
    """A diffusion U-Net of two levels: every encoder value is concatenated in the decoder (Ho 2020, Rombach 2022)."""

    frequencies: Tensor

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.register_buffer("frequencies", torch.exp(-torch.arange(4) / 2.0))
        self.embed = nn.Sequential(nn.Linear(8, 8), nn.SiLU(), nn.Linear(8, 8))
        self.stem, self.down = conv(3, width), conv(width, width, 3, 2)
        self.e1, self.e2 = ResBlock(width, width), ResBlock(width, 2 * width)
        self.m1, self.attention, self.m2 = (
            ResBlock(2 * width, 2 * width),
            SpatialAttention(2 * width),
            ResBlock(2 * width, 2 * width),
        )
        self.d2, self.d2b = ResBlock(4 * width, 2 * width), ResBlock(3 * width, width)
        self.up = conv(width, width)
        self.d1, self.d1b = ResBlock(2 * width, width), ResBlock(2 * width, width)
        self.head = nn.Sequential(nn.GroupNorm(2, width), nn.SiLU(), conv(width, 3))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        angle = t[:, None] * self.frequencies
        emb = self.embed(torch.cat([angle.sin(), angle.cos()], -1))
        h1 = self.stem(x)
        h2 = self.e1(h1, emb)
        h3 = self.down(h2)
        h4 = self.e2(h3, emb)
        h = self.m2(self.attention(self.m1(h4, emb)), emb)
        h = self.d2(torch.cat([h, h4], 1), emb)
        h = self.d2b(torch.cat([h, h3], 1), emb)
        h = self.up(F.interpolate(h, scale_factor=2.0, mode="nearest"))
        h = self.d1(torch.cat([h, h2], 1), emb)
        h = self.d1b(torch.cat([h, h1], 1), emb)
        out: Tensor = self.head(h)
        return out


class BigGAN(nn.Module):
    """Up-blocks: both ways upsample, the skip by a 1×1; class-conditional batch norm (Brock 2019)."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 16 * width)
        plan = ((width, width), (width, 4))
        self.bn1 = nn.ModuleList(nn.BatchNorm2d(i, affine=False) for i, _ in plan)
        self.bn2 = nn.ModuleList(nn.BatchNorm2d(o, affine=False) for _, o in plan)
        self.g1 = nn.ModuleList(nn.Linear(6, 2 * i) for i, _ in plan)
        self.g2 = nn.ModuleList(nn.Linear(6, 2 * o) for _, o in plan)
        self.c1 = nn.ModuleList(conv(i, o) for i, o in plan)
        self.c2 = nn.ModuleList(conv(o, o) for _, o in plan)
        self.skip = nn.ModuleList(conv(i, o, 1) for i, o in plan)
        self.last = conv(4, 3)

    @staticmethod
    def modulate(x: Tensor, gains: Tensor) -> Tensor:
        gain, bias = gains[:, :, None, None].chunk(2, 1)
        return x * (1 + gain) + bias

    def forward(self, z: Tensor) -> Tensor:
        x = self.linear(z).view(z.shape[0], -1, 4, 4)
        for bn1, bn2, g1, g2, c1, c2, skip in zip(
            self.bn1, self.bn2, self.g1, self.g2, self.c1, self.c2, self.skip, strict=True
        ):
            h = F.relu(self.modulate(bn1(x), g1(z)))
            h = c1(F.interpolate(h, scale_factor=2))
            h = c2(F.relu(self.modulate(bn2(h), g2(z))))
            x = h + skip(F.interpolate(x, scale_factor=2))
        return torch.tanh(self.last(F.relu(x)))


class Critic(nn.Module):
    """Down-blocks: relu, conv, relu, conv, pool, + pool(conv₁(x)); the first block pools before its 1×1."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.a = nn.ModuleList([conv(3, width), conv(width, width), conv(width, width)])
        self.b = nn.ModuleList(conv(width, width) for _ in range(3))
        self.skip = nn.ModuleList([conv(3, width, 1), conv(width, width, 1)])
        self.head = nn.Linear(width, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.avg_pool2d(self.b[0](F.relu(self.a[0](x))), 2) + self.skip[0](F.avg_pool2d(x, 2))
        x = F.avg_pool2d(self.b[1](F.relu(self.a[1](F.relu(x)))), 2) + F.avg_pool2d(self.skip[1](x), 2)
        x = x + self.b[2](F.relu(self.a[2](F.relu(x))))
        out: Tensor = self.head(F.relu(x).sum((2, 3)))
        return out


class StyleSkips(nn.Module):
    """StyleGAN2's output skips: rgb ← up(rgb) + to_rgb(x): the picture, summed over resolutions (Karras 2020)."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.start = nn.Parameter(torch.randn(1, width, 4, 4))
        self.style = nn.ModuleList(nn.Linear(6, width) for _ in range(3))
        self.convs = nn.ModuleList(conv(width, width) for _ in range(3))
        self.rgb = nn.ModuleList(conv(width, 3, 1) for _ in range(3))

    def forward(self, w: Tensor) -> Tensor:
        x = self.start.expand(w.shape[0], -1, -1, -1)
        picture: Tensor | None = None
        for index, (style, layer, rgb) in enumerate(zip(self.style, self.convs, self.rgb, strict=True)):
            if index:
                x = F.interpolate(x, scale_factor=2, mode="bilinear")
            x = F.leaky_relu(layer(x * style(w)[:, :, None, None]), 0.2)
            new = rgb(x)
            picture = new if picture is None else F.interpolate(picture, scale_factor=2, mode="bilinear") + new
        assert picture is not None
        return picture


class PixelCNN(nn.Module):
    """Gated PixelCNN: x + conv₁(tanh(a)·σ(b)), with the vertical stack added in (van den Oord 2016)."""

    def __init__(self, layers: int = 2, width: int = 4) -> None:
        super().__init__()
        self.stem = conv(3, width)
        self.v = nn.ModuleList(nn.Conv2d(width, 2 * width, (2, 3), padding=(1, 1)) for _ in range(layers))
        self.h = nn.ModuleList(nn.Conv2d(width, 2 * width, (1, 2), padding=(0, 1)) for _ in range(layers))
        self.link = nn.ModuleList(conv(2 * width, 2 * width, 1) for _ in range(layers))
        self.out = nn.ModuleList(conv(width, width, 1) for _ in range(layers))

    @staticmethod
    def gate(x: Tensor) -> Tensor:
        a, b = x.chunk(2, 1)
        return torch.tanh(a) * torch.sigmoid(b)

    def forward(self, x: Tensor) -> Tensor:
        v = h = self.stem(x)
        for vertical, horizontal, link, out in zip(self.v, self.h, self.link, self.out, strict=True):
            new = vertical(v)[:, :, :-1, :]
            h = h + out(self.gate(horizontal(h)[:, :, :, :-1] + link(new)))
            v = self.gate(new)
        return h


class Quantised(nn.Module):
    """VQ-VAE: residual blocks; z + (q − z).detach() passes gradients only (van den Oord 2017)."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.encoder, self.decoder = conv(3, width, 3, 2), nn.ConvTranspose2d(width, 3, 4, 2, 1)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.ReLU(), conv(width, width), nn.ReLU(), conv(width, width, 1)) for _ in range(2)
        )
        self.codes = nn.Embedding(7, width)

    def forward(self, x: Tensor) -> Tensor:
        z = self.encoder(x)
        z = z + self.blocks[0](z)
        flat = z.permute(0, 2, 3, 1).reshape(-1, z.shape[1])
        distance = flat.pow(2).sum(1, keepdim=True) - 2 * flat @ self.codes.weight.t() + self.codes.weight.pow(2).sum(1)
        n, _, h, w = z.shape
        q = self.codes(distance.argmin(1)).view(n, h, w, -1).permute(0, 3, 1, 2)
        q = z + (q - z).detach()
        q = q + self.blocks[1](q)
        out: Tensor = self.decoder(q)
        return out


class Variational(nn.Module):
    """μ + σ·ε is no skip: mean and deviation are two linears of one value."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(width, 6), nn.ReLU())
        self.mean, self.log = nn.Linear(6, 3), nn.Linear(6, 3)
        self.decoder = nn.Sequential(nn.Linear(3, 6), nn.ReLU(), nn.Linear(6, width))

    def forward(self, x: Tensor) -> Tensor:
        h = self.encoder(x)
        mean, log = self.mean(h), self.log(h)
        out: Tensor = self.decoder(mean + torch.randn_like(mean) * torch.exp(0.5 * log))
        return out


class AlphaZero(nn.Module):
    """A tower of residual blocks, a policy head and a value head (Silver 2017)."""

    def __init__(self, blocks: int = 3, width: int = 6) -> None:
        super().__init__()
        self.stem = conv_bn_relu(3, width)
        self.tower = nn.ModuleList(
            nn.Sequential(*conv_bn_relu(width, width), *conv_bn(width, width)) for _ in range(blocks)
        )
        self.policy = nn.Sequential(*conv_bn_relu(width, 2, 1), nn.Flatten(), nn.Linear(32, 17))
        self.value = nn.Sequential(
            *conv_bn_relu(width, 1, 1), nn.Flatten(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 1), nn.Tanh()
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.stem(x)
        for block in self.tower:
            x = torch.relu(torch.add(block(x), x))
        return self.policy(x), self.value(x)


class Impala(nn.Module):
    """conv, max pool, two blocks relu-conv-relu-conv, a stage (Espeholt 2018); a dueling head V + (A − mean A)."""

    def __init__(self) -> None:
        super().__init__()
        plan = ((3, 4), (4, 8))
        self.convs = nn.ModuleList(conv(i, o) for i, o in plan)
        self.blocks = nn.ModuleList(
            nn.ModuleList(nn.Sequential(nn.ReLU(), conv(o, o), nn.ReLU(), conv(o, o)) for _ in range(2))
            for _, o in plan
        )
        self.hidden, self.v, self.a = nn.Linear(128, 8), nn.Linear(8, 1), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        for layer, blocks in zip(self.convs, self.blocks, strict=True):
            x = F.max_pool2d(layer(x), 3, 2, 1)
            for block in blocks:  # type: ignore[attr-defined]
                x = block(x) + x
        h = F.relu(self.hidden(F.relu(x).flatten(1)))
        advantage = self.a(h)
        out: Tensor = self.v(h) + (advantage - advantage.mean(1, keepdim=True))
        return out


class Siamese(nn.Module):
    """Two images through one residual encoder; |a − b| and [a, b] compare them: no joins of one stream."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.stem, self.body = (
            conv_bn_relu(3, width),
            nn.Sequential(*conv_bn_relu(width, width), *conv_bn(width, width)),
        )
        self.head = nn.Sequential(nn.Linear(3 * width, 8), nn.ReLU(), nn.Linear(8, 1))

    def encode(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return F.relu(self.body(x) + x).mean((2, 3))

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        a, b = self.encode(left), self.encode(right)
        out: Tensor = self.head(torch.cat([torch.abs(a - b), a, b], -1))
        return out


class Experts(nn.Module):
    """Multi-gate mixture of experts with two task heads: Σ g·E(x) has no skip; the shared bottom has one."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.bottom = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width))
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(width, width), nn.ReLU()) for _ in range(3))
        self.gates = nn.ModuleList(nn.Linear(width, 3) for _ in range(2))
        self.heads = nn.ModuleList(nn.Linear(width, 1) for _ in range(2))

    def forward(self, x: Tensor) -> list[Tensor]:
        x = x + self.bottom(x)
        made = torch.stack([expert(x) for expert in self.experts], 1)
        out = []
        for gate, head in zip(self.gates, self.heads, strict=True):
            out.append(head((gate(x).softmax(-1)[..., None] * made).sum(1)))
        return out


CASES: dict[str, Case] = {
    # Two concatenations join a value across the change of resolution, two at the lower one without.
    "latent diffusion U-Net": Case(
        Diffusion,
        lambda: (torch.randn(1, 3, 8, 8), torch.rand(1)),
        {"identity": 4, "projection": 5, "dense": 2, "long": 2},
        "pre",
    ),
    # Both ways change the resolution alike: nothing is joined across it.
    "BigGAN generator": Case(BigGAN, floats((1, 6)), {"projection": 2}),
    "BigGAN discriminator": Case(Critic, image(), {"projection": 2, "identity": 1}, "none"),
    "PixelCNN": Case(PixelCNN, image(), {"identity": 2}, "none"),
    "VQ-VAE": Case(Quantised, image(), {"identity": 2}, "none"),
    "VAE": Case(Variational, floats((2, 8)), {}),
    "AlphaZero": Case(AlphaZero, image(3, 4), {"identity": 3}, "branch", folded="none"),
    "IMPALA, dueling": Case(Impala, image(), {"identity": 4}, "none"),
    "siamese": Case(Siamese, lambda: (torch.randn(1, 3, 8, 8), torch.randn(1, 3, 8, 8)), {"identity": 2}, "branch"),
    "mixture of experts, two heads": Case(Experts, floats((2, 8)), {"identity": 1}),
    # The summed picture runs past each stage: a 1×1 projection of the stage's input, enlarged as the stage enlarges.
    "StyleGAN2 output skips": Case(StyleSkips, floats((1, 6)), {"projection": 2}),
}
