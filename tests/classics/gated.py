"""Highway networks in their variants, and other mixes."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tests.classics.case import Case, floats, image, tokens
from tests.classics.parts import conv, conv_bn_relu


class Highway(nn.Module):
    """T·H + C·x with C = 1 − T (Srivastava 2015), or with a carry gate of its own."""

    def __init__(self, layers: int = 4, width: int = 8, separate: bool = False, sub: bool = False) -> None:
        super().__init__()
        self.h = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))
        self.t = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))
        self.c = nn.ModuleList(nn.Linear(width, width) for _ in range(layers)) if separate else None
        self.sub = sub
        for gate in self.t:
            nn.init.constant_(gate.bias, -2.0)

    def forward(self, x: Tensor) -> Tensor:
        for index, (h, t) in enumerate(zip(self.h, self.t, strict=True)):
            gate = t(x).sigmoid()
            if self.c is not None:
                carry = torch.sigmoid(self.c[index](x))
            else:
                carry = torch.sub(1.0, gate) if self.sub else 1.0 - gate
            x = torch.relu(h(x)) * gate + x * carry
        return x


class ConvHighway(nn.Module):
    """Highway on images: conv gates, block states with batch norm."""

    def __init__(self, layers: int = 3, width: int = 4) -> None:
        super().__init__()
        self.stem = conv(3, width)
        self.h = nn.ModuleList(conv_bn_relu(width, width) for _ in range(layers))
        self.t = nn.ModuleList(conv(width, width) for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for h, t in zip(self.h, self.t, strict=True):
            gate = torch.sigmoid(t(x))
            x = gate * h(x) + (1 - gate) * x
        return x


class FusedGate(nn.Module):
    """One linear makes H and T (character-aware models, ELMo): x = T·x + (1 − T)·relu(H)."""

    def __init__(self, layers: int = 2, width: int = 8) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, 2 * width) for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            h, gate = layer(x).chunk(2, dim=-1)
            gate = torch.sigmoid(gate)
            x = gate * x + (1 - gate) * torch.relu(h)
        return x


class CBHG(nn.Module):
    """Tacotron's CBHG: a bank of convs, projections with a residual, a highway stack, a bidirectional GRU."""

    def __init__(self, width: int = 8, bank: int = 3, highways: int = 2) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, width)
        self.bank = nn.ModuleList(nn.Conv1d(width, width, k, padding="same") for k in range(1, bank + 1))
        self.first = nn.Conv1d(bank * width, width, 3, padding=1)
        self.second = nn.Conv1d(width, width, 3, padding=1)
        self.norm = nn.BatchNorm1d(width)
        self.highway = Highway(highways, width)
        self.gru = nn.GRU(width, width, bidirectional=True, batch_first=True)

    def forward(self, indices: Tensor) -> Tensor:
        x = self.embed(indices).transpose(1, 2)
        banks = torch.cat([torch.relu(c(x)) for c in self.bank], 1)
        pooled = nn.functional.max_pool1d(banks, 2, 1, padding=1)[:, :, :-1]
        y = self.norm(self.second(torch.relu(self.first(pooled)))) + x
        out: Tensor = self.gru(self.highway(y.transpose(1, 2)))[0]
        return out


class RecurrentHighway(nn.Module):
    """Recurrent highway network: L highway micro-layers a time step, weights shared over time (Zilly 2017)."""

    def __init__(self, width: int = 6, depth: int = 2) -> None:
        super().__init__()
        self.wh, self.wt = nn.Linear(width, width), nn.Linear(width, width)
        self.rh = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        self.rt = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        s = torch.zeros_like(x[:, 0])
        for step in range(3):
            for index, (rh, rt) in enumerate(zip(self.rh, self.rt, strict=True)):
                h, t = rh(s), rt(s)
                if index == 0:
                    h, t = h + self.wh(x[:, step]), t + self.wt(x[:, step])
                t = torch.sigmoid(t)
                s = torch.tanh(h) * t + s * (1 - t)
        return s


class MinimalGated(nn.Module):
    """A minimal gated unit, unrolled: h = (1 − f)·h + f·tanh(W[f·h, x])."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.f, self.h = nn.Linear(2 * width, width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        h = x[:, 0].tanh()
        for step in range(1, 4):
            f = torch.sigmoid(self.f(torch.cat([h, x[:, step]], -1)))
            new = torch.tanh(self.h(torch.cat([f * h, x[:, step]], -1)))
            h = (1 - f) * h + f * new
        return h


class Simple(nn.Module):
    """SRU: c = f·c + (1 − f)·Wx, h = r·c + (1 − r)·x (Lei 2018): the scan is none, the output highway is gated."""

    def __init__(self, width: int = 6, layers: int = 2) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, 3 * width) for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            w, f, r = layer(x).chunk(3, -1)
            f, r = f.sigmoid(), r.sigmoid()
            c = torch.zeros_like(x[:, 0])
            states = []
            for step in range(3):
                c = f[:, step] * c + (1 - f[:, step]) * w[:, step]
                states.append(c)
            cell = torch.stack(states, 1)
            x = r * cell + (1 - r) * x
        return x


class QuasiRecurrent(nn.Module):
    """QRNN with fo-pooling (Bradbury 2017): convs and a scan, no skip."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.conv = nn.Conv1d(width, 3 * width, 2)

    def forward(self, x: Tensor) -> Tensor:
        z, f, o = self.conv(nn.functional.pad(x, (1, 0))).chunk(3, 1)
        z, f, o = z.tanh(), f.sigmoid(), o.sigmoid()
        c = z[..., 0] * (1 - f[..., 0])
        out = [c]
        for step in range(1, 3):
            c = f[..., step] * c + (1 - f[..., step]) * z[..., step]
            out.append(c)
        return torch.stack(out, -1) * o


CASES: dict[str, Case] = {
    "highway, coupled": Case(Highway, floats((2, 8)), {"gated": 4}),
    "highway, torch.sub": Case(lambda: Highway(sub=True), floats((2, 8)), {"gated": 4}),
    "highway, carry gate of its own": Case(lambda: Highway(separate=True), floats((2, 8)), {"gated": 4}),
    "highway, conv": Case(ConvHighway, image(), {"gated": 3}),
    "highway, H and T of one linear": Case(FusedGate, floats((2, 8)), {"gated": 2}),
    "CBHG": Case(CBHG, tokens(), {"identity": 1, "gated": 2}),
    # The steps of a recurrence are no blocks.
    "recurrent highway network, unrolled": Case(RecurrentHighway, floats((2, 3, 6)), {}, traced=False),
    "minimal gated unit, unrolled": Case(MinimalGated, floats((2, 4, 6)), {}),
    "SRU": Case(Simple, floats((2, 3, 6)), {"gated": 2}),
    "QRNN": Case(QuasiRecurrent, floats((2, 6, 3)), {}),
}
