"""One tiny module for each way to write a join, a norm or a scale, and what is to be found in it.

A case is a function of its layers `s` and of a stream `x` (tokens [2, 6, 8], or images [2, 8, 6, 6]); `expect` lists
blocks as "kind shortcut norm" or "kind shortcut norm on-type" with a scale. `onnx`, `traced`: where that form differs,
because the exporter destroys information or a trace has no shapes. `refused`: a part of the reason that is listed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDTH = 8
Run = Callable[[Any, Tensor], Tensor]


@dataclass
class Case:
    run: Run
    expect: Sequence[str]
    parts: dict[str, Any] = field(default_factory=dict)
    onnx: Sequence[str] | None = None
    traced: Sequence[str] | None = None
    refused: str = ""
    images: bool = False

    def expected(self, route: str) -> list[str]:
        own = {"onnx": self.onnx, "traced": self.traced}.get(route)
        return list(self.expect if own is None else own)


class Spelling(nn.Module):
    def __init__(self, case: Case) -> None:
        super().__init__()
        self.run = case.run
        self.stem = nn.Conv2d(WIDTH, WIDTH, 1) if case.images else nn.Linear(WIDTH, WIDTH)
        self.f = nn.Conv2d(WIDTH, WIDTH, 3, padding=1) if case.images else mlp()
        for name, part in case.parts.items():
            setattr(self, name, part)

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, torch.relu(self.stem(x)))


class Collection(nn.Module):
    """All cases side by side, each a child of its own name."""

    def __init__(self, cases: dict[str, Case]) -> None:
        super().__init__()
        for name, case in cases.items():
            self.add_module(name, Spelling(case))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(child(x) for child in self.children())


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH))


def par(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.linspace(0.5, 1.5, math.prod(shape)).reshape(shape))


def buffer(*numbers: int) -> nn.Buffer:
    return nn.Buffer(torch.tensor(numbers))


PLAIN = ("add identity none",)


def case(run: Run, *expect: str, **options: Any) -> Case:
    known = {key: options.pop(key) for key in ("onnx", "traced", "refused", "images") if key in options}
    return Case(run, expect, options, **known)


# ---- sums -----------------------------------------------------------------------------------------------------------


def add_in_place(s: Any, x: Tensor) -> Tensor:
    y = s.f(x)
    x.add_(y)
    return x


def augmented(s: Any, x: Tensor) -> Tensor:
    y = s.f(x)
    y += x
    return y


def copied(s: Any, x: Tensor) -> Tensor:
    y = s.f(x)
    y.copy_(y + x)
    return y


def onto_zeros(s: Any, x: Tensor) -> Tensor:
    total = torch.zeros_like(x)
    total += x
    total += s.f(x)
    return total


def attention(s: Any, x: Tensor) -> Tensor:
    return torch.softmax(s.q(x) @ s.k(x).transpose(1, 2), -1)


def two_linears() -> dict[str, nn.Module]:
    return {"q": nn.Linear(WIDTH, WIDTH), "k": nn.Linear(WIDTH, WIDTH)}


SUMS: dict[str, Case] = {
    "plain": case(lambda s, x: x + s.f(x), *PLAIN),
    "commuted": case(lambda s, x: s.f(x) + x, *PLAIN),
    "in_place": case(add_in_place, *PLAIN),
    "augmented": case(augmented, *PLAIN),
    "copied": case(copied, *PLAIN),
    "onto_zeros": case(onto_zeros, *PLAIN),
    "alpha": case(lambda s, x: torch.add(x, s.f(x), alpha=0.5), "add identity none branch-constant"),
    "alpha_on_skip": case(lambda s, x: torch.add(s.f(x), x, alpha=0.5), "add identity none skip-constant"),
    "difference": case(lambda s, x: x - s.f(x), *PLAIN),
    "other_difference": case(lambda s, x: s.f(x) - x, *PLAIN),
    "rsub": case(lambda s, x: torch.rsub(s.f(x), x), *PLAIN),
    "minus_negative": case(lambda s, x: x - (-s.f(x)), *PLAIN),
    "branch_of_negative": case(lambda s, x: x - s.f(-x), *PLAIN),
    "python_sum": case(lambda s, x: sum([x, s.f(x)]), *PLAIN),
    "stack_sum": case(lambda s, x: torch.stack([x, s.f(x)]).sum(0), *PLAIN),
    "stack_sum_last": case(lambda s, x: torch.stack([x, s.f(x)], dim=-1).sum(-1), *PLAIN),
    "stack_sum_of_three": case(lambda s, x: torch.stack([x, s.f(x), s.g(x)]).sum(0), "parallel identity none", g=mlp()),
    "stack_mean": case(lambda s, x: torch.stack([x, s.f(x)]).mean(0), "add identity none branch-constant"),
    # Without shapes nothing tells that the concatenated axis is a new one.
    "cat_sum": case(
        lambda s, x: torch.cat([x.unsqueeze(0), s.f(x).unsqueeze(0)]).sum(0), *PLAIN, traced=["dense view none"]
    ),
    "stack_not_summed": case(lambda s, x: torch.stack([x, s.f(x)]), refused=": "),
    "lerp": case(
        lambda s, x: torch.lerp(x, s.f(x), 0.3),
        "add identity none branch-constant",
        onnx=PLAIN,  # the exporter writes x + w·(f − x)
    ),
    "lerp_by_parameter": case(lambda s, x: torch.lerp(x, s.f(x), s.w), *PLAIN, w=par(WIDTH)),
    "lerp_by_gate": case(
        lambda s, x: torch.lerp(x, s.f(x), torch.sigmoid(s.g(x))), "gated identity none", g=nn.Linear(WIDTH, WIDTH)
    ),
    "addcmul": case(
        lambda s, x: torch.addcmul(x, s.f(x), s.w, value=0.5), "add identity none branch-vector", w=par(WIDTH)
    ),
    "addcdiv": case(lambda s, x: torch.addcdiv(x, s.f(x), s.w), "add identity none branch-vector", w=par(WIDTH)),
    "baddbmm": case(lambda s, x: torch.baddbmm(x, attention(s, x), s.f(x)), *PLAIN, **two_linears()),
    "baddbmm_scaled": case(
        lambda s, x: torch.baddbmm(x, attention(s, x), s.f(x), beta=0.5, alpha=2.0),
        "add identity none branch-constant",
        **two_linears(),
    ),
    "addmm": case(
        lambda s, x: torch.addmm(x.reshape(-1, WIDTH), s.f(x).reshape(-1, WIDTH), s.w), "add view none", w=par(8, 8)
    ),
    "addbmm": case(
        lambda s, x: torch.addbmm(x[0], s.f(x), s.w.expand(2, WIDTH, WIDTH)), "add view none", w=par(1, WIDTH, WIDTH)
    ),
    "einsum_without_sum": case(lambda s, x: x + torch.einsum("btc,c->btc", s.f(x), s.w), *PLAIN, w=par(WIDTH)),
    "three": case(lambda s, x: x + s.f(x) + s.g(x), "parallel identity none", g=mlp()),
    "mean_of_two": case(lambda s, x: (x + s.f(x)) / 2, *PLAIN),
    "bias": case(lambda s, x: s.f(x) + s.b * 2.0, refused="constant", b=par(WIDTH)),
    "table": case(lambda s, x: s.f(x) + s.b, refused="constant table", b=par(6, WIDTH)),
    "twice": case(lambda s, x: x + x, refused="x + x", onnx=[]),
}

# ---- selections and scatters ----------------------------------------------------------------------------------------


def experts(s: Any, x: Tensor) -> Tensor:
    flat = x.reshape(-1, WIDTH)
    weights = torch.softmax(s.r(flat), -1)
    total = torch.zeros_like(flat)
    for index, expert in enumerate((s.f, s.g)):
        total = total.index_add(0, s.i, expert(flat[s.i]) * weights[:, index : index + 1][s.i])
    return total.reshape(x.shape)


ROWS = {"i": buffer(2, 0, 1, 4, 3, 5)}
# Of an index_add along another axis than the first, the exporter transposes both operands.
TURNED = ["add view none"]

SCATTERS: dict[str, Case] = {
    "maximum": case(lambda s, x: torch.maximum(x, s.f(x)), refused="maximum: selects"),
    "max_of_two": case(lambda s, x: torch.max(x, s.f(x)), refused="maximum: selects"),
    "minimum": case(lambda s, x: torch.minimum(x, s.f(x)), refused="minimum: selects"),
    "where": case(lambda s, x: torch.where(x > 0, x, s.f(x)), refused="where: selects"),
    "index_add": case(lambda s, x: x.index_add(1, s.i, s.f(x)), *PLAIN, onnx=TURNED, **ROWS),
    "index_add_in_place": case(lambda s, x: x.index_add_(1, s.i, s.f(x)), *PLAIN, onnx=TURNED, **ROWS),
    "index_add_scaled": case(
        lambda s, x: x.index_add(1, s.i, s.f(x), alpha=0.5),
        "add identity none branch-constant",
        onnx=["add view none branch-constant"],
        **ROWS,
    ),
    # torch.onnx.export turns an addition over the whole range into f(x): the skip is lost.
    "index_add_of_all": case(lambda s, x: x.index_add(0, torch.arange(2), s.f(x)), *PLAIN, onnx=[]),
    "index_add_of_some": case(lambda s, x: x.index_add(1, s.i, s.f(x[:, s.i])), *PLAIN, i=buffer(2, 0, 1)),
    "scatter_add": case(
        lambda s, x: x.scatter_add(1, s.i, s.f(x)), *PLAIN, i=nn.Buffer(torch.arange(96).reshape(2, 6, WIDTH) % 6)
    ),
    "scatter_reduce": case(
        lambda s, x: x.scatter_reduce(1, s.i, s.f(x), "sum"),
        *PLAIN,
        i=nn.Buffer(torch.arange(96).reshape(2, 6, WIDTH) % 6),
    ),
    "scatter_maximum": case(
        lambda s, x: x.scatter_reduce(1, s.i, s.f(x), "amax"),
        refused="does not add",
        i=nn.Buffer(torch.arange(96).reshape(2, 6, WIDTH) % 6),
    ),
    "scatter_overwrites": case(
        lambda s, x: x.scatter(1, s.i, s.f(x)),
        refused="overwrites",
        i=nn.Buffer(torch.arange(96).reshape(2, 6, WIDTH) % 6),
    ),
    "index_put": case(
        lambda s, x: x.index_put((s.i, s.j), s.f(x[s.i, s.j]), accumulate=True),
        *PLAIN,
        i=buffer(0, 1),
        j=buffer(0, 1),
    ),
    "index_put_overwrites": case(
        lambda s, x: x.index_put((s.i, s.j), s.f(x[s.i, s.j])), refused="overwrites", i=buffer(0, 1), j=buffer(0, 1)
    ),
    "experts": case(experts, refused="scatter onto a constant", g=mlp(), r=nn.Linear(WIDTH, 2), i=buffer(2, 0, 1)),
    "experts_and_skip": case(lambda s, x: x + experts(s, x), *PLAIN, g=mlp(), r=nn.Linear(WIDTH, 2), i=buffer(2, 0, 1)),
    "logaddexp": case(lambda s, x: torch.logaddexp(x, s.f(x)), refused=": "),
}

# ---- couplings, solvers ---------------------------------------------------------------------------------------------


def coupled(s: Any, x: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    for f, g in zip(s.fs, s.gs, strict=True):
        a = a + f(b)
        b = b + g(a)
    return torch.cat([a, b], -1)


def halves(count: int) -> nn.ModuleList:
    return nn.ModuleList(nn.Linear(4, 4) for _ in range(count))


def affine_coupling(s: Any, x: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    both = s.g(a)
    return torch.cat([a, b * torch.exp(both[..., :4]) + both[..., 4:]], -1)


def euler(s: Any, x: Tensor) -> Tensor:
    for _ in range(3):
        x = x + 0.1 * s.f(x)
    return x


def runge_kutta(s: Any, x: Tensor) -> Tensor:
    k1 = s.f(x)
    k2 = s.f(x + 0.05 * k1)
    k3 = s.f(x + 0.05 * k2)
    k4 = s.f(x + 0.1 * k3)
    return x + 0.1 / 6 * (k1 + 2 * k2 + 2 * k3 + k4)


def momentum(s: Any, x: Tensor) -> Tensor:
    v = torch.zeros_like(x)
    for _ in range(3):
        v = 0.9 * v + 0.1 * s.f(x)
        x = x + v
    return x


COUPLINGS: dict[str, Case] = {
    "one_coupling": case(coupled, *["add view none"] * 2, fs=halves(1), gs=halves(1)),
    "three_couplings": case(coupled, *["add view none"] * 2, *PLAIN * 4, fs=halves(3), gs=halves(3)),
    "affine_coupling": case(affine_coupling, "dense identity none", g=nn.Linear(4, 8)),
    "euler": case(euler, *["add identity none branch-constant"] * 3),
    # v₂ = 0.9·v₁ + 0.1·F(x₁) is a block of the velocity's stream: x₁ came from v₁.
    "momentum": case(momentum, *PLAIN, *["add identity none branch-constant"] * 2),
    "fractal_mean": case(
        lambda s, x: (s.f(x) + s.g(s.h(x))) / 2, refused="two working branches", g=mlp(), h=nn.Linear(WIDTH, WIDTH)
    ),
}

# ---- states that are refined step by step ---------------------------------------------------------------------------


def refined(s: Any, x: Tensor) -> Tensor:
    """What all steps together added is read again and again, as optical flow reads its displacement."""
    start = x
    for f in (s.f, s.g):
        x = x + f(torch.tanh(x - start))
    return x


def refined_from_a_grid(s: Any, x: Tensor) -> Tensor:
    state = s.w + s.f(x)
    for f in (s.g, s.h):
        state = state + f(x + torch.tanh(state - s.w))  # two sums each
    return state


def gated_unit(s: Any, x: Tensor) -> Tensor:
    """A GRU's step on a state of two rows: the reset gate of [h, c] weighs h, which is concatenated with c."""
    h, c = torch.tanh(s.h(x)), s.c(x)
    both = torch.cat([h, c], 1)
    z, r = torch.sigmoid(s.z(both)), torch.sigmoid(s.r(both))
    q = torch.tanh(s.q(torch.cat([r * h, c], 1)))
    return (1 - z) * h + z * q


def weighed_features(s: Any, x: Tensor) -> Tensor:
    """New features that a gate of the fork weighs are new features."""
    return s.q(torch.cat([torch.sigmoid(s.z(x)) * s.f(x), x], 1))


def convs(**widths: int) -> dict[str, nn.Module]:
    return {name: nn.Conv2d(width, WIDTH, 3, padding=1) for name, width in widths.items()}


def mixed(s: Any, x: Tensor) -> Tensor:
    """Two copies of a stream, each a mix of both, and one branch that reads a mix (hyper-connections)."""
    first = second = x
    for f in (s.f, s.g):
        y = f(0.3 * first + 0.7 * second)
        first, second = 0.9 * first + 0.2 * second + y, 0.1 * first + 0.8 * second + 0.5 * y
    return first + second


def summed_pictures(s: Any, x: Tensor) -> Tensor:
    """A sum runs beside the stream, enlarged as it is (StyleGAN2)."""
    total = s.p(x)
    for layer, view in ((s.f, s.q), (s.g, s.r)):
        x = torch.relu(layer(F.interpolate(x, scale_factor=2.0)))
        total = F.interpolate(total, scale_factor=2.0) + view(x)
    return total


def two_pooled(s: Any, x: Tensor) -> Tensor:
    """A block, enlarged, and another branch from its fork: no sum beside a stream."""
    return F.interpolate(x + s.f(x), scale_factor=2.0) + F.interpolate(torch.relu(s.g(x)), scale_factor=2.0)


REFINED: dict[str, Case] = {
    "mixed": case(mixed, *["add identity none", "add identity none branch-constant"] * 2, refused="a mix", g=mlp()),
    "mix_of_two_streams": case(
        lambda s, x: 0.3 * s.h(x) + 0.7 * x + s.f(x), "parallel identity none branch-constant", h=nn.Linear(WIDTH, WIDTH)
    ),
    "summed_pictures": case(
        summed_pictures,
        *["add projection none"] * 2,
        images=True,
        **{name: nn.Conv2d(WIDTH, WIDTH, 1) for name in "pqr"},
        g=nn.Conv2d(WIDTH, WIDTH, 3, padding=1),
    ),
    "two_pooled": case(
        two_pooled, *PLAIN, refused="two working branches", images=True, g=nn.Conv2d(WIDTH, WIDTH, 3, padding=1)
    ),
    "difference_of_one_stream": case(refined, *PLAIN * 2, refused="cancels", g=mlp()),
    # The first branch starts from x alone, so the first sum is no block.
    "difference_from_a_grid": case(
        refined_from_a_grid, *PLAIN * 4, refused="cancels", g=mlp(), h=mlp(), w=par(6, WIDTH)
    ),
    "difference_of_two_streams": case(
        lambda s, x: s.h(x) - x - s.f(x), "parallel identity none", h=nn.Linear(WIDTH, WIDTH)
    ),
    "gated_unit": case(
        gated_unit,
        "gated identity none",
        refused="a gate",
        images=True,
        **convs(h=WIDTH, c=WIDTH, z=2 * WIDTH, r=2 * WIDTH, q=2 * WIDTH),
    ),
    "weighed_features": case(weighed_features, "dense identity none", images=True, **convs(z=WIDTH, q=2 * WIDTH)),
}

# ---- scales ---------------------------------------------------------------------------------------------------------

VECTOR, SCALAR, NUMBER = (f"add identity none branch-{kind}" for kind in ("vector", "scalar", "constant"))

SCALES: dict[str, Case] = {
    "layer_scale": case(lambda s, x: x + s.w * s.f(x), VECTOR, w=par(WIDTH)),
    "layer_scale_1x1xc": case(lambda s, x: x + s.f(x) * s.w, VECTOR, w=par(1, 1, WIDTH)),
    "layer_scale_cx1x1": case(lambda s, x: x + s.w * s.f(x), VECTOR, w=par(WIDTH, 1, 1), images=True),
    "layer_scale_viewed": case(lambda s, x: x + s.w.view(1, -1, 1, 1) * s.f(x), VECTOR, w=par(WIDTH), images=True),
    "scaled_skip": case(lambda s, x: x * s.w + s.f(x), "add identity none skip-vector", w=par(WIDTH)),
    "rezero_number": case(lambda s, x: x + s.w * s.f(x), SCALAR, w=nn.Parameter(torch.tensor(0.5))),
    "rezero_vector_of_one": case(lambda s, x: x + s.w * s.f(x), SCALAR, w=par(1)),
    "constant": case(lambda s, x: x + 0.2 * s.f(x), NUMBER),
    "divided": case(lambda s, x: x + s.f(x) / 5, NUMBER),
    "both": case(lambda s, x: 0.8 * x + 0.6 * s.f(x), NUMBER),
    "minus_half": case(lambda s, x: x - 0.5 * s.f(x), NUMBER),
    "deep_norm": case(lambda s, x: s.n(1.5 * x + s.f(x)), "add identity post skip-constant", n=nn.LayerNorm(WIDTH)),
    "behind_dropout": case(lambda s, x: x + s.w * s.d(s.f(x)), VECTOR, w=par(WIDTH), d=nn.Dropout(0.1)),
    "softplus": case(lambda s, x: x + F.softplus(s.w) * s.f(x), SCALAR, w=par(1)),
    "sigmoid": case(lambda s, x: x + torch.sigmoid(s.w) * s.f(x), VECTOR, w=par(WIDTH)),
    "exp": case(lambda s, x: x + torch.exp(s.w) * s.f(x), SCALAR, w=par(1)),
    "mixed_by_parameter": case(lambda s, x: s.w * s.f(x) + (1 - s.w) * x, SCALAR, w=par(1)),
    "factor_of_the_input": case(lambda s, x: x + torch.sigmoid(s.g(x)) * s.f(x), *PLAIN, g=nn.Linear(WIDTH, WIDTH)),
}

# ---- norms ----------------------------------------------------------------------------------------------------------


def layer_norm_by_hand(s: Any, x: Tensor) -> Tensor:
    mean = x.mean(-1, keepdim=True)
    return (x - mean) / torch.sqrt((x - mean).pow(2).mean(-1, keepdim=True) + 1e-5) * s.w + s.b


def layer_norm_by_var_mean(s: Any, x: Tensor) -> Tensor:
    var, mean = torch.var_mean(x, -1, unbiased=False, keepdim=True)
    return (x - mean) * torch.rsqrt(var + 1e-5) * s.w + s.b


def layer_norm_by_moments(s: Any, x: Tensor) -> Tensor:
    mean = x.mean(-1, keepdim=True)
    return (x - mean) * torch.rsqrt((x * x).mean(-1, keepdim=True) - mean * mean + 1e-5) * s.w + s.b


def layer_norm_by_std(s: Any, x: Tensor) -> Tensor:
    return s.w * (x - x.mean(-1, keepdim=True)) / (x.std(-1, keepdim=True) + 1e-6) + s.b


def layer_norm_of_channels(s: Any, x: Tensor) -> Tensor:
    mean = x.mean(1, keepdim=True)
    x = (x - mean) / torch.sqrt((x - mean).pow(2).mean(1, keepdim=True) + 1e-6)
    return s.w[:, None, None] * x + s.b[:, None, None]


def rms(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)


def wide_rms(s: Any, x: Tensor) -> Tensor:
    return (rms(x.to(torch.float64)) * (1.0 + s.w.double())).to(x.dtype)


def group_norm_by_hand(s: Any, x: Tensor) -> Tensor:
    rows = x.reshape(x.shape[0], 2, -1)
    var, mean = torch.var_mean(rows, -1, unbiased=False, keepdim=True)
    return ((rows - mean) * torch.rsqrt(var + 1e-5)).reshape(x.shape) * s.w + s.b


def instance_norm_by_hand(s: Any, x: Tensor) -> Tensor:
    var, mean = torch.var_mean(x, (2, 3), unbiased=False, keepdim=True)
    return (x - mean) * torch.rsqrt(var + 1e-5) * s.w + s.b


def response_norm(s: Any, x: Tensor) -> Tensor:
    length = torch.norm(x, p=2, dim=(2, 3), keepdim=True)
    return s.w * (x * (length / (length.mean(1, keepdim=True) + 1e-6))) + s.b + x


def pair(*shape: int) -> dict[str, nn.Parameter]:
    return {"w": par(*shape), "b": par(*shape)}


ROW = (WIDTH,)
# name → the norm, its parts; those of the second table work on images.
TOKEN_NORMS: dict[str, tuple[Run, dict[str, Any]]] = {
    "module": (lambda s, x: s.n(x), {"n": nn.LayerNorm(WIDTH)}),
    "function": (lambda s, x: F.layer_norm(x, ROW, s.w, s.b), pair(WIDTH)),
    "without_affine": (lambda s, x: F.layer_norm(x, ROW), {}),
    "by_hand": (layer_norm_by_hand, pair(WIDTH)),
    "by_var_mean": (layer_norm_by_var_mean, pair(WIDTH)),
    "by_moments": (layer_norm_by_moments, pair(WIDTH)),
    "by_std": (layer_norm_by_std, pair(WIDTH)),
    "rms_module": (lambda s, x: s.n(x), {"n": nn.RMSNorm(WIDTH)}),
    "rms_by_hand": (lambda s, x: s.w * rms(x), {"w": par(WIDTH)}),
    "rms_one_plus": (lambda s, x: rms(x) * (1 + s.w), {"w": par(WIDTH)}),
    "rms_wide": (wide_rms, {"w": par(WIDTH)}),
    "rms_of_a_sum": (
        lambda s, x: x * torch.rsqrt((x * x).sum(-1, keepdim=True) / WIDTH + 1e-6) * s.w,
        {"w": par(WIDTH)},
    ),
    "scale_norm": (
        lambda s, x: s.w * x / torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp(min=1e-5),
        {"w": par(1)},
    ),
}
IMAGE_NORMS: dict[str, tuple[Run, dict[str, Any]]] = {
    "group": (lambda s, x: s.n(x), {"n": nn.GroupNorm(2, WIDTH)}),
    "group_of_all": (lambda s, x: s.n(x), {"n": nn.GroupNorm(1, WIDTH)}),
    "group_without_affine": (lambda s, x: s.n(x), {"n": nn.GroupNorm(2, WIDTH, affine=False)}),
    "group_by_hand": (group_norm_by_hand, pair(WIDTH, 1, 1)),
    "instance": (lambda s, x: s.n(x), {"n": nn.InstanceNorm2d(WIDTH)}),
    "instance_by_hand": (instance_norm_by_hand, pair(WIDTH, 1, 1)),
    "permuted": (lambda s, x: s.n(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2), {"n": nn.LayerNorm(WIDTH)}),
    "of_channels": (layer_norm_of_channels, pair(WIDTH)),
}
# affine without statistics, a squashing function, global response normalisation
NO_NORMS: dict[str, tuple[Run, dict[str, Any], bool]] = {
    "affine": (lambda s, x: x * s.w + s.b, pair(WIDTH), False),
    "dynamic_tanh": (lambda s, x: torch.tanh(s.a * x) * s.w + s.b, {"a": par(1), **pair(WIDTH)}, False),
    "unit_length": (lambda s, x: F.normalize(x, dim=-1), {}, False),
    "response": (response_norm, pair(WIDTH, 1, 1), True),
}
# A trace has no shapes: without them the unbiased variance, and the way back from rows to channels, stay unknown.
UNTRACED = {"by_std": ("none",) * 3, "group_by_hand": ("pre", "branch", "none"), "rms_wide": ("pre", "branch", "none")}


def placed(name: str, norm: Run, parts: dict[str, Any], images: bool, placements: Sequence[str]) -> dict[str, Case]:
    """The norm before the branch, behind it, and behind the sum."""
    runs: tuple[Run, ...] = (
        lambda s, x: x + s.f(norm(s, x)),
        lambda s, x: x + norm(s, s.f(x)),
        lambda s, x: norm(s, x + s.f(x)),
    )
    traced = UNTRACED.get(name, placements)
    return {
        f"{where}_{name}": Case(
            run, [f"add identity {placement}"], parts, traced=[f"add identity {untyped}"], images=images
        )
        for where, run, placement, untyped in zip(("pre", "branch", "post"), runs, placements, traced, strict=True)
    }


NORMS: dict[str, Case] = {}
for _name, (_norm, _parts) in TOKEN_NORMS.items():
    NORMS |= placed(_name, _norm, _parts, False, ("pre", "branch", "post"))
for _name, (_norm, _parts) in IMAGE_NORMS.items():
    NORMS |= placed(_name, _norm, _parts, True, ("pre", "branch", "post"))
for _name, (_norm, _parts, _images) in NO_NORMS.items():
    NORMS |= placed(_name, _norm, _parts, _images, ("none", "none", "none"))

CASES: dict[str, Case] = {**SUMS, **SCATTERS, **COUPLINGS, **REFINED, **SCALES, **NORMS}
