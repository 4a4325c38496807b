"""Reversible and continuous-depth networks: two streams, couplings, solver steps."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tests.classics.case import Case, floats, image
from tests.classics.parts import bn_relu_conv, conv, mlp


class RevNet(nn.Module):
    """y₁ = x₁ + F(x₂), y₂ = x₂ + G(y₁) (Gomez 2017)."""

    def __init__(self, blocks: int = 3, width: int = 8) -> None:
        super().__init__()
        self.stem = conv(3, width)
        self.f = nn.ModuleList(bn_relu_conv(width // 2, width // 2) for _ in range(blocks))
        self.g = nn.ModuleList(bn_relu_conv(width // 2, width // 2) for _ in range(blocks))

    def forward(self, x: Tensor) -> Tensor:
        x1, x2 = torch.chunk(self.stem(x), 2, dim=1)
        for f, g in zip(self.f, self.g, strict=True):
            x1 = x1 + f(x2)
            x2 = x2 + g(x1)
        return torch.cat([x1, x2], 1)


class Reformer(nn.Module):
    """Reversible transformer: both streams start as the same embedding, their mean leaves (Kitaev 2020)."""

    def __init__(self, blocks: int = 3, width: int = 8) -> None:
        super().__init__()
        self.f = nn.ModuleList(nn.Sequential(nn.LayerNorm(width), mlp(width)) for _ in range(blocks))
        self.g = nn.ModuleList(nn.Sequential(nn.LayerNorm(width), mlp(width)) for _ in range(blocks))
        self.embed = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        x1 = x2 = self.embed(x)
        for f, g in zip(self.f, self.g, strict=True):
            x1 = x1 + f(x2)
            x2 = x2 + g(x1)
        return (x1 + x2) / 2


class IResNet(nn.Module):
    """x + g(x), invertible for Lipschitz g; squeezes between stages (Behrmann 2019)."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.ModuleList(nn.Sequential(nn.ELU(), conv(4, 8), nn.ELU(), conv(8, 4)) for _ in range(2))
        self.b = nn.ModuleList(nn.Sequential(nn.ELU(), conv(16, 8), nn.ELU(), conv(8, 16)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for g in self.a:
            x = x + g(x)
        x = nn.functional.pixel_unshuffle(x, 2)
        for g in self.b:
            x = g(x) + x
        return x


class NICE(nn.Module):
    """Additive couplings: y = [x₁, x₂ + m(x₁)] (Dinh 2015)."""

    def __init__(self, layers: int = 3, width: int = 8) -> None:
        super().__init__()
        self.nets = nn.ModuleList(mlp(width // 2) for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        for net in self.nets:
            a, b = x.chunk(2, -1)
            x = torch.cat([a, b + net(a)], -1).flip(-1)
        return x


class Affine(nn.Module):
    """y = [x₁, x₂·exp(s(x₁)) + t(x₁)] (RealNVP, Glow: with an invertible 1×1 conv between)."""

    def __init__(self, layers: int = 3, width: int = 4) -> None:
        super().__init__()
        self.mix = nn.ModuleList(nn.Conv2d(width, width, 1, bias=False) for _ in range(layers))
        self.nets = nn.ModuleList(nn.Sequential(conv(width // 2, 8), nn.ReLU(), conv(8, width)) for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        for mix, net in zip(self.mix, self.nets, strict=True):
            a, b = mix(x).chunk(2, 1)
            s, t = net(a).chunk(2, 1)
            x = torch.cat([a, b * torch.exp(torch.tanh(s)) + t], 1)
        return x


class MaskedAffine(nn.Module):
    """y = m·x + (1 − m)·(x·exp(s(m·x)) + t(m·x)) (RealNVP with a checkerboard)."""

    mask: Tensor

    def __init__(self, layers: int = 2, width: int = 6) -> None:
        super().__init__()
        self.register_buffer("mask", torch.arange(width) % 2.0)
        self.s = nn.ModuleList(mlp(width) for _ in range(layers))
        self.t = nn.ModuleList(mlp(width) for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        for s, t in zip(self.s, self.t, strict=True):
            kept = self.mask * x
            x = kept + (1 - self.mask) * (x * torch.exp(torch.tanh(s(kept))) + t(kept))
        return x


class Euler(nn.Module):
    """Fixed-step Euler solver of dx/dt = f(x, t), one f for all steps (Chen 2018)."""

    def __init__(self, steps: int = 4, width: int = 6) -> None:
        super().__init__()
        self.f = nn.Sequential(nn.Linear(width + 1, width), nn.Tanh(), nn.Linear(width, width))
        self.steps = steps

    def forward(self, x: Tensor) -> Tensor:
        h = 1.0 / self.steps
        for step in range(self.steps):
            time = torch.full_like(x[:, :1], step * h)
            x = x + h * self.f(torch.cat([x, time], -1))
        return x


class Midpoint(nn.Module):
    """x + h·f(x + h/2·f(x)), two steps."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.f = nn.Sequential(nn.Linear(width, width), nn.Tanh())

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(2):
            x = x + 0.5 * self.f(x + 0.25 * self.f(x))
        return x


class Equilibrium(nn.Module):
    """Three unrolled steps of z = tanh(Wz + Ux): the injected input is no skip of z (deep equilibrium models)."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.w, self.u = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        injected = self.u(x)
        z = torch.tanh(injected)
        for _ in range(3):
            z = torch.tanh(self.w(z) + injected)
        return z


CASES: dict[str, Case] = {
    # The first two sums start from the stem, with its halves as shortcuts, beside each other; every later one from its
    # own stream.
    "RevNet": Case(RevNet, image(), {"view": 2, "identity": 4}, "pre"),
    "Reformer": Case(Reformer, floats((2, 5, 8)), {"identity": 6, "nested": 1}, "pre"),
    "i-ResNet": Case(IResNet, image(4, 8), {"identity": 4}, "none"),
    # [x₁, F(x)] with F(x) = x₂ + m(x₁): dense, and the sum in it has the other half as its shortcut.
    "NICE": Case(NICE, floats((2, 8)), {"dense": 3, "view": 3, "nested": 3}),
    "Glow": Case(Affine, image(4, 8), {"dense": 3}),
    "RealNVP, masked": Case(MaskedAffine, floats((2, 6)), {"identity": 2}, scales=2),
    "ODE net, Euler": Case(Euler, floats((2, 6)), {"identity": 4}, scales=4),
    "ODE net, midpoint": Case(Midpoint, floats((2, 6)), {"identity": 4, "nested": 2}, scales=4),
    "deep equilibrium, unrolled": Case(Equilibrium, floats((2, 6)), {"identity": 3}),
}
