"""Sequences of sound and text by convolution and recurrence."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.classics.case import Case, floats, tokens
from tests.classics.parts import SelfAttention


class WaveNet(nn.Module):
    """z = tanh(W x)·σ(V x); x ← x + conv₁(z); the output is the sum of all conv₁'(z) (van den Oord 2016)."""

    def __init__(self, layers: int = 4, width: int = 8) -> None:
        super().__init__()
        self.stem = nn.Conv1d(4, width, 1)
        self.w = nn.ModuleList(nn.Conv1d(width, width, 2, dilation=2**i) for i in range(layers))
        self.v = nn.ModuleList(nn.Conv1d(width, width, 2, dilation=2**i) for i in range(layers))
        self.residual = nn.ModuleList(nn.Conv1d(width, width, 1) for _ in range(layers))
        self.skip = nn.ModuleList(nn.Conv1d(width, width, 1) for _ in range(layers))
        self.head = nn.Sequential(nn.ReLU(), nn.Conv1d(width, 4, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        total = torch.zeros(1)
        for i, (w, v, residual, skip) in enumerate(zip(self.w, self.v, self.residual, self.skip, strict=True)):
            padded = F.pad(x, (2**i, 0))
            z = torch.tanh(w(padded)) * torch.sigmoid(v(padded))
            s = skip(z)
            total = s if i == 0 else total + s
            x = x + residual(z)
        out: Tensor = self.head(total)
        return out


class TCN(nn.Module):
    """relu(F(x) + s(x)) with causal dilated convs and a 1×1 where widths differ (Bai 2018)."""

    def __init__(self) -> None:
        super().__init__()
        plan = ((4, 8, 1), (8, 8, 2), (8, 8, 4))
        self.a = nn.ModuleList(nn.Conv1d(i, o, 3, padding=2 * d, dilation=d) for i, o, d in plan)
        self.b = nn.ModuleList(nn.Conv1d(o, o, 3, padding=2 * d, dilation=d) for _, o, d in plan)
        self.project = nn.Conv1d(4, 8, 1)
        self.chomp = [2 * d for _, _, d in plan]

    def forward(self, x: Tensor) -> Tensor:
        for index, (a, b, chomp) in enumerate(zip(self.a, self.b, self.chomp, strict=True)):
            y = F.relu(a(x)[:, :, :-chomp])
            y = F.relu(b(y)[:, :, :-chomp])
            x = F.relu(y + (self.project(x) if index == 0 else x))
        return x


class ByteNet(nn.Module):
    """norm, relu, 1×1, norm, relu, masked dilated conv, norm, relu, 1×1, + (Kalchbrenner 2016)."""

    def __init__(self, blocks: int = 2, width: int = 8) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, width)
        half = width // 2

        def unit(i: int, o: int, kernel: int, dilation: int = 1) -> list[nn.Module]:
            pad = dilation * (kernel - 1) // 2
            return [nn.GroupNorm(1, i), nn.ReLU(), nn.Conv1d(i, o, kernel, padding=pad, dilation=dilation)]

        self.blocks = nn.ModuleList(
            nn.Sequential(*unit(width, half, 1), *unit(half, half, 3, 2**i), *unit(half, width, 1))
            for i in range(blocks)
        )

    def forward(self, indices: Tensor) -> Tensor:
        x = self.embed(indices).transpose(1, 2)
        for block in self.blocks:
            x = x + block(x)
        return x


class ConvTasNet(nn.Module):
    """1×1, PReLU, norm, depthwise, PReLU, norm, then a residual and a skip 1×1; masks multiply the encoding."""

    def __init__(self, blocks: int = 3, width: int = 8) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.Conv1d(1, width, 4, 2), nn.ConvTranspose1d(width, 1, 4, 2)
        self.norm, self.bottleneck = nn.GroupNorm(1, width), nn.Conv1d(width, width, 1)
        self.body = nn.ModuleList(
            nn.Sequential(
                nn.Conv1d(width, 12, 1),
                nn.PReLU(),
                nn.GroupNorm(1, 12),
                nn.Conv1d(12, 12, 3, padding=2**i, dilation=2**i, groups=12),
                nn.PReLU(),
                nn.GroupNorm(1, 12),
            )
            for i in range(blocks)
        )
        self.residual = nn.ModuleList(nn.Conv1d(12, width, 1) for _ in range(blocks))
        self.skip = nn.ModuleList(nn.Conv1d(12, width, 1) for _ in range(blocks))
        self.mask = nn.Sequential(nn.PReLU(), nn.Conv1d(width, width, 1), nn.Sigmoid())

    def forward(self, x: Tensor) -> Tensor:
        encoded = F.relu(self.encoder(x))
        y = self.bottleneck(self.norm(encoded))
        total: Tensor | float = 0.0
        for body, residual, skip in zip(self.body, self.residual, self.skip, strict=True):
            z = body(y)
            y = y + residual(z)
            total = total + skip(z)
        out: Tensor = self.decoder(encoded * self.mask(total))
        return out


class QuartzNet(nn.Module):
    """R repeats of a separable conv and batch norm; relu(last + bn(conv₁(x))) (Kriman 2020)."""

    def __init__(self, blocks: int = 2, repeat: int = 2, width: int = 8) -> None:
        super().__init__()

        def unit() -> list[nn.Module]:
            depthwise = nn.Conv1d(width, width, 5, padding=2, groups=width, bias=False)
            return [depthwise, nn.Conv1d(width, width, 1, bias=False), nn.BatchNorm1d(width)]

        def body() -> nn.Sequential:
            layers: list[nn.Module] = []
            for _ in range(repeat - 1):
                layers += [*unit(), nn.ReLU()]
            return nn.Sequential(*layers, *unit())

        self.stem = nn.Sequential(*unit(), nn.ReLU())
        self.blocks = nn.ModuleList(body() for _ in range(blocks))
        self.skip = nn.ModuleList(
            nn.Sequential(nn.Conv1d(width, width, 1, bias=False), nn.BatchNorm1d(width)) for _ in range(blocks)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block, skip in zip(self.blocks, self.skip, strict=True):
            x = torch.relu(block(x) + skip(x))
        return x


class ConvModule(nn.Module):
    """Norm, pointwise, GLU, depthwise, batch norm, swish, pointwise (Conformer)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.bn = nn.LayerNorm(width), nn.BatchNorm1d(width)
        self.up, self.down = nn.Conv1d(width, 2 * width, 1), nn.Conv1d(width, width, 1)
        self.depth = nn.Conv1d(width, width, 3, padding=1, groups=width)

    def forward(self, x: Tensor) -> Tensor:
        y = F.glu(self.up(self.norm(x).transpose(1, 2)), dim=1)
        out: Tensor = self.down(F.silu(self.bn(self.depth(y)))).transpose(1, 2)
        return out


class Conformer(nn.Module):
    """½F, attention, convolution, ½F, each with its skip, then a norm (Gulati 2020)."""

    def __init__(self, blocks: int = 2, width: int = 8) -> None:
        super().__init__()

        def feed() -> nn.Sequential:
            return nn.Sequential(
                nn.LayerNorm(width), nn.Linear(width, 16), nn.SiLU(), nn.Dropout(0.1), nn.Linear(16, width)
            )

        self.f1, self.f2 = nn.ModuleList(feed() for _ in range(blocks)), nn.ModuleList(feed() for _ in range(blocks))
        self.norm = nn.ModuleList(nn.LayerNorm(width) for _ in range(blocks))
        self.attention = nn.ModuleList(SelfAttention(width) for _ in range(blocks))
        self.conv = nn.ModuleList(ConvModule(width) for _ in range(blocks))
        self.final = nn.ModuleList(nn.LayerNorm(width) for _ in range(blocks))

    def forward(self, x: Tensor) -> Tensor:
        for i in range(len(self.f1)):
            x = x + 0.5 * self.f1[i](x)
            x = x + self.attention[i](self.norm[i](x))
            x = x + self.conv[i](x)
            x = x + 0.5 * self.f2[i](x)
            x = self.final[i](x)
        return x


class Squeezeformer(nn.Module):
    """Post-norm blocks; in the middle time is halved and later doubled again, with a skip across (Kim 2022)."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.attention = nn.ModuleList(SelfAttention(width) for _ in range(3))
        self.feed = nn.ModuleList(
            nn.Sequential(nn.Linear(width, 16), nn.SiLU(), nn.Linear(16, width)) for _ in range(3)
        )
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(6))
        self.reduce = nn.Conv1d(width, width, 3, 2, 1)
        self.recover = nn.Linear(width, width)

    def block(self, i: int, x: Tensor) -> Tensor:
        x = self.norms[2 * i](x + self.attention[i](x))
        out: Tensor = self.norms[2 * i + 1](x + self.feed[i](x))
        return out

    def forward(self, x: Tensor) -> Tensor:
        x = kept = self.block(0, x)
        x = self.block(1, self.reduce(x.transpose(1, 2)).transpose(1, 2))
        x = self.recover(F.interpolate(x.transpose(1, 2), scale_factor=2.0).transpose(1, 2)) + kept
        return self.block(2, x)


class GNMT(nn.Module):
    """Stacked LSTMs, the first bidirectional, skips from the third layer on (Wu 2016)."""

    def __init__(self, layers: int = 5, width: int = 6) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, width)
        self.first = nn.LSTM(width, width // 2, bidirectional=True, batch_first=True)
        self.rest = nn.ModuleList(nn.LSTM(width, width, batch_first=True) for _ in range(layers - 1))

    def forward(self, indices: Tensor) -> Tensor:
        x = self.first(self.embed(indices))[0]
        for index, layer in enumerate(self.rest):
            y = F.dropout(layer(x)[0], 0.1, self.training)
            x = y if index == 0 else y + x
        return x


class Cells(nn.Module):
    """Two layers of GRU cells, unrolled over three steps, the second with a skip around it."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.w = nn.ModuleList(nn.Linear(width, 3 * width) for _ in range(2))
        self.u = nn.ModuleList(nn.Linear(width, 3 * width) for _ in range(2))

    def cell(self, index: int, x: Tensor, h: Tensor) -> Tensor:
        a, b = self.w[index](x).chunk(3, -1), self.u[index](h).chunk(3, -1)
        z, r = torch.sigmoid(a[0] + b[0]), torch.sigmoid(a[1] + b[1])
        return (1 - z) * torch.tanh(a[2] + r * b[2]) + z * h

    def forward(self, x: Tensor) -> Tensor:
        first = second = torch.tanh(x.mean(1))
        out = []
        for step in range(3):
            first = self.cell(0, x[:, step], first)
            second = self.cell(1, first, second)
            out.append(second + first)
        return torch.stack(out, 1)


class LSTMCells(nn.Module):
    """One LSTM, unrolled by hand over four steps with cat([x, h]), in a residual over the sequence."""

    def __init__(self, width: int = 6, joined: bool = True) -> None:
        super().__init__()
        self.joined = joined
        self.gates = nn.Linear(2 * width if joined else width, 4 * width)
        self.recur = nn.Linear(width, 4 * width)

    def forward(self, x: Tensor) -> Tensor:
        h = c = torch.zeros_like(x[:, 0])
        out = []
        for step in range(4):
            now = x[:, step]
            gates = self.gates(torch.cat([now, h], -1)) if self.joined else self.gates(now) + self.recur(h)
            i, f, g, o = gates.chunk(4, -1)
            c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
            h = torch.sigmoid(o) * torch.tanh(c)
            out.append(h)
        return x + torch.stack(out, 1)


CASES: dict[str, Case] = {
    # Nothing reads the last sum; the ONNX exporter leaves it out.
    "WaveNet": Case(WaveNet, floats((1, 4, 16)), {"identity": 4}, "none", onnx={"identity": 3}),
    "TCN": Case(TCN, floats((1, 4, 12)), {"identity": 2, "projection": 1}, "none"),
    "ByteNet": Case(ByteNet, tokens(), {"identity": 2}, "pre"),
    # Nothing reads what the last block adds: an export to ONNX leaves it out.
    "Conv-TasNet": Case(ConvTasNet, floats((1, 1, 20)), {"identity": 3}, "inner", onnx={"identity": 2}),
    "QuartzNet": Case(QuartzNet, floats((1, 8, 12)), {"projection": 2}, "branch", folded="none"),
    "Conformer": Case(Conformer, floats((2, 6, 8)), {"identity": 8}, "pre", scales=4),
    "Squeezeformer": Case(Squeezeformer, floats((1, 6, 8)), {"identity": 6, "long": 1}, "post"),
    "GNMT": Case(GNMT, tokens(), {"recurrent": 3}),
    # Of the cells' own sums and mixes none is a block; the three sums around the second layer's steps are.
    "GRU cells with a skip, unrolled": Case(Cells, floats((2, 3, 6)), {"recurrent": 3}),
    "LSTM cells on [x, h], unrolled": Case(LSTMCells, floats((2, 4, 6)), {"recurrent": 1}),
    "LSTM cells on Wx + Uh, unrolled": Case(lambda: LSTMCells(joined=False), floats((2, 4, 6)), {"recurrent": 1}),
}
