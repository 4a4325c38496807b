"""Sequence models without softmax attention: MLPs, Fourier transforms, state spaces, linear recurrences."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.classics.case import Case, floats
from tests.classics.parts import mlp

N, T, D = 2, 6, 8


class Mixer(nn.Module):
    """x + MLP over tokens, x + MLP over channels (Tolstikhin 2021)."""

    def __init__(self, blocks: int = 2) -> None:
        super().__init__()
        self.n1, self.n2 = (nn.ModuleList(nn.LayerNorm(D) for _ in range(blocks)) for _ in range(2))
        self.token = nn.ModuleList(mlp(T) for _ in range(blocks))
        self.channel = nn.ModuleList(mlp(D) for _ in range(blocks))

    def forward(self, x: Tensor) -> Tensor:
        for n1, n2, token, channel in zip(self.n1, self.n2, self.token, self.channel, strict=True):
            x = x + token(n1(x).transpose(1, 2)).transpose(1, 2)
            x = x + channel(n2(x))
        return x


class Affine(nn.Module):
    """α·x + β in the place of a norm (ResMLP)."""

    def __init__(self) -> None:
        super().__init__()
        self.alpha, self.beta = nn.Parameter(torch.ones(D)), nn.Parameter(torch.zeros(D))

    def forward(self, x: Tensor) -> Tensor:
        return self.alpha * x + self.beta


class ResMLP(nn.Module):
    """x + γ·(W A(x)ᵀ)ᵀ, x + γ·MLP(A(x)) (Touvron 2021)."""

    def __init__(self, blocks: int = 2) -> None:
        super().__init__()
        self.a = nn.ModuleList(Affine() for _ in range(2 * blocks))
        self.token = nn.ModuleList(nn.Linear(T, T) for _ in range(blocks))
        self.channel = nn.ModuleList(mlp(D) for _ in range(blocks))
        self.gamma = nn.ParameterList([nn.Parameter(1e-4 * torch.ones(D)) for _ in range(2 * blocks)])

    def forward(self, x: Tensor) -> Tensor:
        for i, (token, channel) in enumerate(zip(self.token, self.channel, strict=True)):
            x = x + self.gamma[2 * i] * token(self.a[2 * i](x).transpose(1, 2)).transpose(1, 2)
            x = x + self.gamma[2 * i + 1] * channel(self.a[2 * i + 1](x))
        return x


class GatedMLP(nn.Module):
    """gMLP: u·(W v + b) with [u, v] = gelu(U N(x)) (Liu 2021): the gate is a product, no join."""

    def __init__(self, blocks: int = 2) -> None:
        super().__init__()
        self.n, self.m = nn.ModuleList(nn.LayerNorm(D) for _ in range(blocks)), nn.ModuleList()
        self.up, self.down = nn.ModuleList(), nn.ModuleList()
        self.spatial = nn.ModuleList(nn.Conv1d(T, T, 1) for _ in range(blocks))
        for _ in range(blocks):
            self.m.append(nn.LayerNorm(D))
            self.up.append(nn.Linear(D, 2 * D))
            self.down.append(nn.Linear(D, D))

    def forward(self, x: Tensor) -> Tensor:
        for n, m, up, down, spatial in zip(self.n, self.m, self.up, self.down, self.spatial, strict=True):
            residual = x
            u, v = F.gelu(up(n(x))).chunk(2, -1)
            x = down(u * spatial(m(v))) + residual
        return x


class FNet(nn.Module):
    """N(x + Re FFT₂(x)), N(x + MLP(x)) (Lee-Thorp 2021)."""

    def __init__(self, blocks: int = 2) -> None:
        super().__init__()
        self.n, self.m = nn.ModuleList(nn.LayerNorm(D) for _ in range(blocks)), nn.ModuleList()
        self.m.extend(nn.LayerNorm(D) for _ in range(blocks))
        self.f = nn.ModuleList(mlp(D) for _ in range(blocks))

    def forward(self, x: Tensor) -> Tensor:
        for n, m, f in zip(self.n, self.m, self.f, strict=True):
            x = n(x + torch.fft.fft2(x).real)
            x = m(x + f(x))
        return x


class GlobalFilter(nn.Module):
    """x + irfft(K·rfft(N(x))) then an MLP, under one skip (Rao 2021)."""

    def __init__(self) -> None:
        super().__init__()
        self.n, self.m, self.f = nn.LayerNorm(D), nn.LayerNorm(D), mlp(D)
        self.k = nn.Parameter(torch.randn(T // 2 + 1, D, 2))

    def forward(self, x: Tensor) -> Tensor:
        spectrum = torch.fft.rfft(self.n(x), dim=1) * torch.view_as_complex(self.k)
        return x + self.f(self.m(torch.fft.irfft(spectrum, n=T, dim=1)))


class LinearAttention(nn.Module):
    """Performer (relu features), or Linformer (keys and values projected along time)."""

    def __init__(self, linformer: bool, blocks: int = 2) -> None:
        super().__init__()
        self.qkv, self.o = nn.ModuleList(nn.Linear(D, 3 * D) for _ in range(blocks)), nn.ModuleList()
        self.o.extend(nn.Linear(D, D) for _ in range(blocks))
        self.n = nn.ModuleList(nn.LayerNorm(D) for _ in range(2 * blocks))
        self.f = nn.ModuleList(mlp(D) for _ in range(blocks))
        self.e, self.linformer = nn.Linear(T, 3, bias=False), linformer

    def forward(self, x: Tensor) -> Tensor:
        for i, (qkv, o, f) in enumerate(zip(self.qkv, self.o, self.f, strict=True)):
            q, k, v = qkv(self.n[2 * i](x)).chunk(3, -1)
            if self.linformer:
                k, v = (self.e(z.transpose(1, 2)).transpose(1, 2) for z in (k, v))
                y = (q @ k.transpose(1, 2)).softmax(-1) @ v
            else:
                q, k = F.relu(q) + 1e-3, F.relu(k) + 1e-3
                y = (q @ (k.transpose(1, 2) @ v)) / (q @ k.sum(1, keepdim=True).transpose(1, 2))
            x = x + o(y)
            x = x + f(self.n[2 * i + 1](x))
        return x


class S4D(nn.Module):
    """x + GLU(W gelu(k ∗ u + D·u)), u = N(x): the convolution by FFT; D·u is a nested skip (Gu 2022)."""

    def __init__(self, blocks: int = 2) -> None:
        super().__init__()
        self.n = nn.ModuleList(nn.LayerNorm(D) for _ in range(blocks))
        self.k = nn.ParameterList([nn.Parameter(torch.randn(D, T)) for _ in range(blocks)])
        self.d = nn.ParameterList([nn.Parameter(torch.randn(D)) for _ in range(blocks)])
        self.out = nn.ModuleList(nn.Conv1d(D, 2 * D, 1) for _ in range(blocks))

    def forward(self, x: Tensor) -> Tensor:
        for n, k, d, out in zip(self.n, self.k, self.d, self.out, strict=True):
            u = n(x).transpose(1, 2)
            y = torch.fft.irfft(torch.fft.rfft(u, n=2 * T) * torch.fft.rfft(k, n=2 * T), n=2 * T)[..., :T]
            y = y + u * d.unsqueeze(-1)
            x = x + F.glu(out(F.gelu(y)), dim=1).transpose(1, 2)
        return x


class RetNet(nn.Module):
    """x + retention(N(x)), x + F(N(x)); decay mask, group norm, swish gate (Sun 2023)."""

    decay: Tensor

    def __init__(self, blocks: int = 2) -> None:
        super().__init__()
        self.n = nn.ModuleList(nn.LayerNorm(D) for _ in range(2 * blocks))
        self.qkvg = nn.ModuleList(nn.Linear(D, 4 * D) for _ in range(blocks))
        self.o, self.f = nn.ModuleList(nn.Linear(D, D) for _ in range(blocks)), nn.ModuleList()
        self.f.extend(mlp(D) for _ in range(blocks))
        self.group = nn.ModuleList(nn.GroupNorm(2, D) for _ in range(blocks))
        steps = torch.arange(T)
        self.register_buffer("decay", torch.tril(0.9 ** (steps[:, None] - steps[None, :]).float()))

    def forward(self, x: Tensor) -> Tensor:
        for i, (qkvg, o, f, group) in enumerate(zip(self.qkvg, self.o, self.f, self.group, strict=True)):
            q, k, v, g = qkvg(self.n[2 * i](x)).chunk(4, -1)
            y = ((q @ k.transpose(1, 2)) * self.decay) @ v
            y = group(y.reshape(-1, D)).view(x.shape)
            x = x + o(F.silu(g) * y)
            x = x + f(self.n[2 * i + 1](x))
        return x


class RWKV(nn.Module):
    """Time mixing with m·x + (1 − m)·shift(x): no block; the scan is none; x + T(N(x)), x + C(N(x)) (Peng 2023)."""

    def __init__(self, blocks: int = 2) -> None:
        super().__init__()
        self.n = nn.ModuleList(nn.LayerNorm(D) for _ in range(2 * blocks))
        self.mix = nn.ParameterList([nn.Parameter(torch.rand(1, 1, D)) for _ in range(5 * blocks)])
        self.w = nn.ModuleList(nn.Linear(D, D, bias=False) for _ in range(7 * blocks))
        self.decay = nn.ParameterList([nn.Parameter(torch.rand(D)) for _ in range(blocks)])
        self.blocks = blocks

    def shifted(self, x: Tensor, index: int) -> Tensor:
        before = F.pad(x, (0, 0, 1, -1))
        return x * self.mix[index] + before * (1 - self.mix[index])

    def time(self, x: Tensor, b: int) -> Tensor:
        r, k, v = (self.w[7 * b + j](self.shifted(x, 5 * b + j)) for j in range(3))
        weight, numerator, denominator = torch.exp(k), torch.zeros(N, D), torch.zeros(N, D)
        decay, out = torch.exp(-torch.exp(self.decay[b])), []
        for step in range(T):
            numerator = decay * numerator + weight[:, step] * v[:, step]
            denominator = decay * denominator + weight[:, step]
            out.append(numerator / denominator)
        y: Tensor = self.w[7 * b + 3](torch.sigmoid(r) * torch.stack(out, 1))
        return y

    def channel(self, x: Tensor, b: int) -> Tensor:
        k, r = (self.w[7 * b + 4 + j](self.shifted(x, 5 * b + 3 + j)) for j in range(2))
        y: Tensor = torch.sigmoid(r) * self.w[7 * b + 6](torch.relu(k) ** 2)
        return y

    def forward(self, x: Tensor) -> Tensor:
        for b in range(self.blocks):
            x = x + self.time(self.n[2 * b](x), b)
            x = x + self.channel(self.n[2 * b + 1](x), b)
        return x


class Hyena(nn.Module):
    """x + out(q·(h ∗ (k·v) + B·k·v)), short convs before; the bias term B·u is a nested skip (Poli 2023)."""

    def __init__(self, blocks: int = 1) -> None:
        super().__init__()
        self.n, self.inner, self.out = nn.LayerNorm(D), nn.Linear(D, 3 * D), nn.Linear(D, D)
        self.short = nn.Conv1d(3 * D, 3 * D, 3, padding=2, groups=3 * D)
        self.h, self.b = nn.Parameter(torch.randn(D, T)), nn.Parameter(torch.randn(D, 1))

    def forward(self, x: Tensor) -> Tensor:
        z = self.short(self.inner(self.n(x)).transpose(1, 2))[..., :T]
        q, k, v = z.chunk(3, 1)
        u = k * v
        y = torch.fft.irfft(torch.fft.rfft(u, n=2 * T) * torch.fft.rfft(self.h, n=2 * T), n=2 * T)[..., :T]
        return x + self.out((q * (y + u * self.b)).transpose(1, 2))


class Mamba2(nn.Module):
    """x + out(N(y·silu(z))), y = scan + D·x'; the scan h = a·h + B·x is none (Dao 2024)."""

    def __init__(self, blocks: int = 2, state: int = 3) -> None:
        super().__init__()
        self.n = nn.ModuleList(nn.RMSNorm(D) for _ in range(blocks))
        self.m = nn.ModuleList(nn.RMSNorm(D) for _ in range(blocks))
        self.inner = nn.ModuleList(nn.Linear(D, 2 * D + 2 * state + 1) for _ in range(blocks))
        self.conv = nn.ModuleList(nn.Conv1d(D, D, 3, padding=2, groups=D) for _ in range(blocks))
        self.a = nn.ParameterList([nn.Parameter(torch.zeros(1)) for _ in range(blocks)])
        self.d = nn.ParameterList([nn.Parameter(torch.ones(D)) for _ in range(blocks)])
        self.out, self.state = nn.ModuleList(nn.Linear(D, D) for _ in range(blocks)), state

    def forward(self, x: Tensor) -> Tensor:
        for n, m, inner, conv, a, d, out in zip(
            self.n, self.m, self.inner, self.conv, self.a, self.d, self.out, strict=True
        ):
            z, u, b, c, dt = torch.split(inner(n(x)), [D, D, self.state, self.state, 1], dim=-1)
            u = F.silu(conv(u.transpose(1, 2))[..., :T].transpose(1, 2))
            dt = F.softplus(dt)
            decay = torch.exp(-torch.exp(a) * dt)
            h, ys = torch.zeros(N, D, self.state), []
            for step in range(3):
                now = dt[:, step, :, None] * u[:, step, :, None] * b[:, step, None, :]
                h = decay[:, step, :, None] * h + now
                ys.append((h @ c[:, step, :, None]).squeeze(-1))
            y = torch.stack(ys + ys, 1) + d * u
            x = x + out(m(y * F.silu(z)))
        return x


class LightConv(nn.Module):
    """Dynamic and lightweight convolutions: x + W₂(softmax kernel ∗ GLU(W₁ x)), post-norm (Wu 2019)."""

    def __init__(self) -> None:
        super().__init__()
        self.w1, self.w2, self.f = nn.Linear(D, 2 * D), nn.Linear(D, D), mlp(D)
        self.kernel = nn.Parameter(torch.randn(D, 1, 3))
        self.n, self.m = nn.LayerNorm(D), nn.LayerNorm(D)

    def forward(self, x: Tensor) -> Tensor:
        u = F.glu(self.w1(x), -1).transpose(1, 2)
        y = F.conv1d(u, self.kernel.softmax(-1), padding=1, groups=D).transpose(1, 2)
        x = self.n(x + self.w2(y))
        out: Tensor = self.m(x + self.f(x))
        return out


X = floats((N, T, D))

CASES: dict[str, Case] = {
    "MLP-Mixer": Case(Mixer, X, {"identity": 4}, "pre"),
    "ResMLP": Case(ResMLP, X, {"identity": 4}, scales=4),
    "gMLP": Case(GatedMLP, X, {"identity": 2}, "pre"),
    "FNet": Case(FNet, X, {"identity": 4}, "post"),
    "global filter network": Case(GlobalFilter, X, {"identity": 1}, "pre"),
    "Performer": Case(lambda: LinearAttention(False), X, {"identity": 4}, "pre"),
    "Linformer": Case(lambda: LinearAttention(True), X, {"identity": 4}, "pre"),
    "S4D": Case(S4D, X, {"identity": 4, "nested": 2}),
    "RetNet": Case(RetNet, X, {"identity": 4}, "pre"),
    "RWKV": Case(RWKV, X, {"identity": 4}, "pre"),
    "Hyena": Case(Hyena, X, {"identity": 2, "nested": 1}),
    "Mamba-2": Case(Mamba2, X, {"identity": 4, "nested": 2}),
    "lightweight convolution": Case(LightConv, X, {"identity": 2}, "post"),
}
