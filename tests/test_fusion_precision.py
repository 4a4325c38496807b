"""Fused models are as exact as they were: equal in float64, no further from it in 16 bits, and the table says so."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.fusion_precision import NARROW, Narrow, Row, measure, summary, table
from benchmarks.ground_truth import Case


class Convolutions(nn.Module):
    """relu(x + γ·BN(W·relu(BN(W·x)))), twice, with the constants of a norm-free network behind."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(8, 8, 3, padding=1, bias=False) for _ in range(6))
        self.norms = nn.ModuleList(nn.BatchNorm2d(8) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        for index in (0, 2):
            y = F.relu(self.norms[index](self.convs[index](x)))
            x = F.relu(x + 0.9 * self.norms[index + 1](self.convs[index + 1](y)))
        return x * 0.7 + 0.2 * self.convs[5](F.relu(self.convs[4](x * 1.78)))


class Tokens(nn.Module):
    """x + W·gelu(W·LN(x)), then LN(x + γ⊙W·x), and the same with RMS norms that compute in float32."""

    def __init__(self) -> None:
        super().__init__()
        self.linears = nn.ModuleList(nn.Linear(16, 16) for _ in range(4))
        self.norms = nn.ModuleList(nn.LayerNorm(16) for _ in range(2))
        self.gain, self.scale = nn.Parameter(torch.rand(16) + 0.5), nn.Parameter(torch.rand(16))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.linears[1](F.gelu(self.linears[0](self.norms[0](x))))
        x = self.norms[1](x + self.scale * self.linears[2](x))
        y = x + self.linears[3](x)
        wide = y.to(torch.float32)
        return self.gain * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype) + y


CASES = {"convolutions": (Convolutions, (2, 8, 6, 6)), "tokens": (Tokens, (2, 5, 16))}


@pytest.mark.parametrize("name", CASES)
def test_a_fused_model_is_as_exact_as_it_was(name: str) -> None:
    torch.manual_seed(0)
    make, shape = CASES[name]
    row = measure(Case(name, make().eval(), (torch.randn(*shape),)), seeds=4)
    assert not row.failures
    assert row.float64 is not None
    assert row.float64 <= 1e-12
    assert list(row.narrow) == list(NARROW)
    for found in row.narrow.values():
        assert found.ok, (found.ratio, found.error)
        assert all(0 < distance < 0.05 for distance in (*found.original, *found.fused))
    assert "1 of 1 models equal" in summary([row])[0]
    assert "2 of 2 no further" in summary([row])[0]


def test_a_model_that_got_worse_is_told_and_luck_is_not() -> None:
    worse, luck = Narrow([1.0, 1.1, 0.9], [1.2, 1.32, 1.08]), Narrow([1.0, 1.1, 0.9], [1.3, 0.9, 1.0])
    assert worse.ratio == pytest.approx(1.2)
    assert worse.error == pytest.approx(0.0, abs=1e-12)
    assert not worse.ok
    assert luck.ratio > 1.0
    assert luck.ok
    assert Narrow([0.0], [0.0]).ratio == 1.0
    assert Narrow([0.0], [1.0]).ratio == math.inf
    rows = [Row("a", 0.0, {"float16": worse}), Row("b", 1e-7, {"float16": luck}, {"bfloat16": "none"})]
    text = "\n".join(summary(rows))
    assert "1 of 2 models equal" in text
    assert "1 of 2 no further" in text
    assert "a: 1.200 ± 0.000 times as far in float16" in text
    assert "b: 1.0e-07 in float64" in text
    assert "b: bfloat16 not measured: none" in text
    assert "| a | 0e+00 |" in table(rows)
