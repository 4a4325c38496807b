"""Where transformers put their norms, scales and skips."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.classics.case import Case, floats
from tests.classics.parts import SelfAttention, conv, mlp

N, T, D = 2, 6, 8


class Layer(nn.Module):
    """Attention and feed-forward around a rule for the skip."""

    def __init__(self, width: int = D) -> None:
        super().__init__()
        self.f = nn.ModuleList([SelfAttention(width), mlp(width)])
        self.n = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.m = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.alpha = nn.ParameterList([nn.Parameter(torch.zeros(1)) for _ in range(2)])
        self.omega = nn.ParameterList([nn.Parameter(torch.ones(width)) for _ in range(2)])

    def forward(self, x: Tensor) -> Tensor:
        for i in range(2):
            x = self.step(i, x)
        return x

    def step(self, i: int, x: Tensor) -> Tensor:
        raise NotImplementedError


class Post(Layer):
    def step(self, i: int, x: Tensor) -> Tensor:
        out: Tensor = self.n[i](x + self.f[i](x))
        return out


class Pre(Layer):
    def step(self, i: int, x: Tensor) -> Tensor:
        return x + self.f[i](self.n[i](x))


class Sandwich(Layer):
    """CogView: x + N'(F(N(x)))."""

    def step(self, i: int, x: Tensor) -> Tensor:
        return x + self.m[i](self.f[i](self.n[i](x)))


class Branch(Layer):
    def step(self, i: int, x: Tensor) -> Tensor:
        return x + self.n[i](self.f[i](x))


class DeepNorm(Layer):
    """N(αx + F(x)), α = (2·layers)^¼."""

    def step(self, i: int, x: Tensor) -> Tensor:
        out: Tensor = self.n[i](x * 1.4142 + self.f[i](x))
        return out


class ReZero(Layer):
    def step(self, i: int, x: Tensor) -> Tensor:
        return x + self.alpha[i] * self.f[i](x)


class LayerScale(Layer):
    def step(self, i: int, x: Tensor) -> Tensor:
        return x + self.omega[i] * self.f[i](self.n[i](x))


class Admin(Layer):
    """N(x·ω + F(x)) (Liu 2020)."""

    def step(self, i: int, x: Tensor) -> Tensor:
        out: Tensor = self.n[i](x * self.omega[i] + self.f[i](x))
        return out


class BT(Layer):
    """B2T: post-norm, and the layer's input once more before the last norm (Takase 2022)."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.n[0](x + self.f[0](x))
        out: Tensor = self.n[1](y + self.f[1](y) + x)
        return out


class ResiDual(Layer):
    """Two streams: a post-norm one, and one that sums the branches (Xie 2023)."""

    def forward(self, x: Tensor) -> Tensor:
        dual = x
        for i in range(2):
            y = self.f[i](x)
            dual = dual + y
            x = self.n[i](x + y)
        return x + self.m[0](dual)


class NormFormer(nn.Module):
    """Pre-norm, and norms after the attention, and inside the feed-forward; scaled heads (Shleifer 2021)."""

    def __init__(self, width: int = D) -> None:
        super().__init__()
        self.attention, self.up, self.down = SelfAttention(width), nn.Linear(width, 16), nn.Linear(16, width)
        self.n1, self.n2, self.n3, self.n4 = (nn.LayerNorm(w) for w in (width, width, width, 16))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.n2(self.attention(self.n1(x)))
        return x + self.down(self.n4(F.gelu(self.up(self.n3(x)))))


class Macaron(nn.Module):
    """½F, attention, ½F (Lu 2019), post-norm."""

    def __init__(self, width: int = D) -> None:
        super().__init__()
        self.first, self.attention, self.second = mlp(width), SelfAttention(width), mlp(width)
        self.n = nn.ModuleList(nn.LayerNorm(width) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.n[0](torch.add(x, self.first(x), alpha=0.5))
        x = self.n[1](x + self.attention(x))
        out: Tensor = self.n[2](x + self.second(x) / 2)
        return out


class Parallel(Layer):
    """x + A(n(x)) + F(n(x)), in three spellings, with one norm or two."""

    def __init__(self, spelling: str) -> None:
        super().__init__()
        self.spelling = spelling

    def forward(self, x: Tensor) -> Tensor:
        n = self.n[0](x)
        if self.spelling == "PaLM":
            return x + self.f[0](n) + self.f[1](n)
        if self.spelling == "GPT-J":
            return self.f[0](n) + self.f[1](n) + x
        return x + self.f[0](n) + self.f[1](self.n[1](x))


class Universal(nn.Module):
    """One layer four times, with a step signal added each time (Dehghani 2019)."""

    signal: Tensor

    def __init__(self, steps: int = 4) -> None:
        super().__init__()
        self.layer, self.steps = Post(), steps
        self.register_buffer("signal", torch.randn(steps, T, D))

    def forward(self, x: Tensor) -> Tensor:
        for step in range(self.steps):
            x = self.layer(x + self.signal[step])
        return x


class Evolved(nn.Module):
    """Evolved transformer encoder: GLU, a linear beside a conv, a wide conv; then a layer (So 2019)."""

    def __init__(self, width: int = D) -> None:
        super().__init__()
        self.n = nn.ModuleList(nn.LayerNorm(w) for w in (width, width, 16, width))
        self.glu, self.left, self.attention = nn.Linear(width, 2 * width), nn.Linear(width, 16), SelfAttention(width)
        self.right, self.sep = nn.Conv1d(width, 8, 3, padding=1), nn.Conv1d(16, width, 9, padding=4)
        self.feed = mlp(width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + F.glu(self.glu(self.n[0](x)), -1)
        y = self.n[1](x)
        left = F.relu(self.left(y))
        right = F.pad(F.relu(self.right(y.transpose(1, 2))).transpose(1, 2), (0, 8))
        x = x + self.sep(self.n[2](left + right).transpose(1, 2)).transpose(1, 2)
        x = x + self.attention(x)
        return x + self.feed(self.n[3](x))


class Recall(nn.Module):
    """Transformer-XL: keys and values from [memory, x]; content and position biases added to queries (Dai 2019)."""

    def __init__(self, width: int = D) -> None:
        super().__init__()
        self.q, self.kv, self.r, self.o = (nn.Linear(width, w) for w in (width, 2 * width, width, width))
        self.u, self.v = nn.Parameter(torch.zeros(width)), nn.Parameter(torch.zeros(width))
        self.table = nn.Parameter(torch.randn(2 * T, width))
        self.n, self.feed, self.m = nn.LayerNorm(width), mlp(width), nn.LayerNorm(width)

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        q = self.q(x)
        k, v = self.kv(torch.cat([memory, x], 1)).chunk(2, -1)
        content = (q + self.u) @ k.transpose(1, 2)
        position = (q + self.v) @ self.r(self.table).t()
        scores = ((content + position) / math.sqrt(D)).softmax(-1)
        x = self.n(x + self.o(scores @ v))
        out: Tensor = self.m(x + self.feed(x))
        return out


class Gated(nn.Module):
    """GTrXL: pre-norm, and a GRU-like gate in the place of the sum (Parisotto 2020)."""

    def __init__(self, width: int = D) -> None:
        super().__init__()
        self.f = nn.ModuleList([SelfAttention(width), mlp(width)])
        self.n = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.w = nn.ModuleList(nn.Linear(width, 3 * width) for _ in range(2))
        self.u = nn.ModuleList(nn.Linear(width, 2 * width) for _ in range(2))
        self.h = nn.ModuleList(nn.Linear(width, width) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for f, n, w, u, h in zip(self.f, self.n, self.w, self.u, self.h, strict=True):
            y = F.relu(f(n(x)))
            wr, wz, wg = w(y).chunk(3, -1)
            ur, uz = u(x).chunk(2, -1)
            r, z = torch.sigmoid(wr + ur), torch.sigmoid(wz + uz - 2.0)
            x = (1 - z) * x + z * torch.tanh(wg + h(r * x))
        return x


class DenseFormer(nn.Module):
    """After each layer a weighted average of all values so far, weights trained (Pagliardini 2024)."""

    def __init__(self, layers: int = 3) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Pre() for _ in range(layers))
        self.weights = nn.ParameterList([nn.Parameter(torch.rand(i + 2)) for i in range(layers)])

    def forward(self, x: Tensor) -> Tensor:
        values = [x]
        for layer, weights in zip(self.layers, self.weights, strict=True):
            values.append(layer(x))
            x = sum(weights[i] * value for i, value in enumerate(values))  # type: ignore[assignment]
        return x


class HyperConnections(nn.Module):
    """n = 2 streams: h = A·H, H ← B ⊗ F(h) + C·H, static weights (Zhu 2025)."""

    def __init__(self, layers: int = 2, width: int = D) -> None:
        super().__init__()
        self.f = nn.ModuleList(nn.Sequential(nn.LayerNorm(width), mlp(width)) for _ in range(layers))
        self.a = nn.ParameterList([nn.Parameter(torch.rand(2)) for _ in range(layers)])
        self.b = nn.ParameterList([nn.Parameter(torch.rand(2)) for _ in range(layers)])
        self.c = nn.ParameterList([nn.Parameter(torch.rand(2, 2)) for _ in range(layers)])

    def forward(self, x: Tensor) -> Tensor:
        h1, h2 = x, x
        for f, a, b, c in zip(self.f, self.a, self.b, self.c, strict=True):
            y = f(a[0] * h1 + a[1] * h2)
            h1, h2 = c[0, 0] * h1 + c[0, 1] * h2 + b[0] * y, c[1, 0] * h1 + c[1, 1] * h2 + b[1] * y
        return h1 + h2


class ValueResidual(nn.Module):
    """ResFormer: every attention mixes the first layer's values into its own (Zhou 2024)."""

    def __init__(self, layers: int = 3, width: int = D) -> None:
        super().__init__()
        self.qkv = nn.ModuleList(nn.Linear(width, 3 * width) for _ in range(layers))
        self.o = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))
        self.n = nn.ModuleList(nn.LayerNorm(width) for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        first: Tensor | None = None
        for qkv, o, n in zip(self.qkv, self.o, self.n, strict=True):
            q, k, v = qkv(n(x)).chunk(3, -1)
            if first is None:
                first = v
            else:
                v = 0.5 * v + 0.5 * first
            x = x + o((q @ k.transpose(1, 2)).softmax(-1) @ v)
        return x


class DiT(nn.Module):
    """adaLN-Zero: x + g(c)·F(N(x)·(1 + s(c)) + b(c)) (Peebles 2023)."""

    def __init__(self, blocks: int = 2, width: int = D) -> None:
        super().__init__()
        self.modulation = nn.ModuleList(nn.Linear(width, 6 * width) for _ in range(blocks))
        self.attention, self.feed = (
            nn.ModuleList(SelfAttention(width) for _ in range(blocks)),
            nn.ModuleList(mlp(width) for _ in range(blocks)),
        )
        self.n = nn.LayerNorm(width, elementwise_affine=False)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        for modulation, attention, feed in zip(self.modulation, self.attention, self.feed, strict=True):
            shift1, scale1, gate1, shift2, scale2, gate2 = modulation(F.silu(c)).unsqueeze(1).chunk(6, -1)
            x = x + gate1 * attention(self.n(x) * (1 + scale1) + shift1)
            x = x + gate2 * feed(self.n(x) * (1 + scale2) + shift2)
        return x


class MMDiT(nn.Module):
    """Two streams of their own weights that share one attention (Esser 2024)."""

    def __init__(self, blocks: int = 2, width: int = D) -> None:
        super().__init__()
        self.qkv = nn.ModuleList(nn.ModuleList(nn.Linear(width, 3 * width) for _ in range(2)) for _ in range(blocks))
        self.o = nn.ModuleList(nn.ModuleList(nn.Linear(width, width) for _ in range(2)) for _ in range(blocks))
        self.feed = nn.ModuleList(nn.ModuleList(mlp(width) for _ in range(2)) for _ in range(blocks))
        self.n = nn.LayerNorm(width)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        for qkv, o, feed in zip(self.qkv, self.o, self.feed, strict=True):
            both = torch.cat([qkv[0](self.n(x)), qkv[1](self.n(c))], 1)  # type: ignore[index]
            q, k, v = both.chunk(3, -1)
            y = (q @ k.transpose(1, 2)).softmax(-1) @ v
            x = x + o[0](y[:, : x.shape[1]])  # type: ignore[index]
            c = c + o[1](y[:, x.shape[1] :])  # type: ignore[index]
            x, c = x + feed[0](self.n(x)), c + feed[1](self.n(c))  # type: ignore[index]
        return torch.cat([x, c], 1)


class Perceiver(nn.Module):
    """Latents read the inputs, process themselves, and are read by output queries (Jaegle 2021)."""

    def __init__(self, width: int = D) -> None:
        super().__init__()
        self.latents, self.queries = nn.Parameter(torch.randn(1, 3, width)), nn.Parameter(torch.randn(1, 2, width))
        self.cross, self.inner, self.decode = SelfAttention(width), SelfAttention(width), SelfAttention(width)
        self.feeds = nn.ModuleList(mlp(width) for _ in range(3))
        self.n = nn.ModuleList(nn.LayerNorm(width) for _ in range(8))

    def forward(self, x: Tensor) -> Tensor:
        z = self.latents.expand(x.shape[0], -1, -1)
        z = z + self.cross(self.n[0](z), self.n[1](x))
        z = z + self.feeds[0](self.n[2](z))
        z = z + self.inner(self.n[3](z))
        z = z + self.feeds[1](self.n[4](z))
        q = self.queries.expand(x.shape[0], -1, -1)
        q = q + self.decode(self.n[5](q), self.n[6](z))
        return q + self.feeds[2](self.n[7](q))


class SetTransformer(nn.Module):
    """ISAB and PMA: inducing points and seeds are streams of their own (Lee 2019)."""

    def __init__(self, width: int = D) -> None:
        super().__init__()
        self.points, self.seed = nn.Parameter(torch.randn(1, 3, width)), nn.Parameter(torch.randn(1, 1, width))
        self.a = nn.ModuleList(SelfAttention(width) for _ in range(3))
        self.f = nn.ModuleList(nn.Linear(width, width) for _ in range(3))

    def mab(self, i: int, x: Tensor, y: Tensor) -> Tensor:
        h = x + self.a[i](x, y)
        return h + F.relu(self.f[i](h))

    def forward(self, x: Tensor) -> Tensor:
        induced = self.mab(0, self.points.repeat(x.shape[0], 1, 1), x)
        x = self.mab(1, x, induced)
        return self.mab(2, self.seed.repeat(x.shape[0], 1, 1), x)


class ClassConditional(nn.Module):
    """Position and type embeddings, a class token, then two layers: three sums that are none."""

    def __init__(self, width: int = D) -> None:
        super().__init__()
        self.word, self.kind, self.position = (nn.Embedding(11, width) for _ in range(3))
        self.token = nn.Parameter(torch.zeros(1, 1, width))
        self.layers = nn.Sequential(Pre(), Pre())
        self.conv = conv(1, 1)

    def forward(self, words: Tensor, kinds: Tensor) -> Tensor:
        x = self.word(words) + self.kind(kinds) + self.position(torch.arange(words.shape[1]))
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1)
        out: Tensor = self.layers(x)[:, 0]
        return out


def two(layer: type[Layer]) -> nn.Module:
    """Two layers of a kind."""
    return nn.Sequential(layer(), layer())


X = floats((N, T, D))

CASES: dict[str, Case] = {
    "post-norm": Case(lambda: two(Post), X, {"identity": 4}, "post", scales=0),
    "pre-norm": Case(lambda: two(Pre), X, {"identity": 4}, "pre", scales=0),
    "CogView's sandwich": Case(lambda: two(Sandwich), X, {"identity": 4}, "sandwich"),
    "norm on the branch": Case(lambda: two(Branch), X, {"identity": 4}, "branch"),
    "DeepNorm": Case(lambda: two(DeepNorm), X, {"identity": 4}, "post", scales=4),
    "ReZero": Case(lambda: two(ReZero), X, {"identity": 4}, "none", scales=4),
    "LayerScale": Case(lambda: two(LayerScale), X, {"identity": 4}, "pre", scales=4),
    "Admin": Case(lambda: two(Admin), X, {"identity": 4}, "post", scales=4),
    # The second sum of a layer joins the normed stream, its branch, and the layer's input: the latter's branch holds
    # the norm of the first sum.
    "B2T": Case(lambda: two(BT), X, {"identity": 6, "nested": 4}),
    "NormFormer": Case(lambda: nn.Sequential(NormFormer(), NormFormer()), X, {"identity": 4}),
    "Macaron": Case(lambda: nn.Sequential(Macaron(), Macaron()), X, {"identity": 6}, "post", scales=4),
    "parallel, PaLM": Case(lambda: Parallel("PaLM"), X, {"parallel": 1}, "pre"),
    "parallel, GPT-J": Case(lambda: Parallel("GPT-J"), X, {"parallel": 1}, "pre"),
    "parallel, two norms": Case(lambda: Parallel("two norms"), X, {"parallel": 1}, "pre"),
    "universal transformer": Case(Universal, X, {"identity": 8}, "post"),
    # The wide linear beside the convolution is a projection by its operations.
    "evolved transformer": Case(Evolved, X, {"identity": 4, "projection": 1}, "pre"),
    "Transformer-XL": Case(Recall, floats((N, T, D), (N, T, D)), {"identity": 2}, "post"),
    "GTrXL": Case(Gated, X, {"gated": 2}),
    # Each later attention adds the first one's values, as they are, to its own.
    "ResFormer": Case(ValueResidual, X, {"identity": 5}, "pre"),
    "DiT": Case(DiT, floats((N, T, D), (N, D)), {"identity": 4}, "pre", scales=0),
    "MMDiT": Case(MMDiT, floats((N, T, D), (N, 3, D)), {"identity": 8}, "pre"),
    "Perceiver IO": Case(Perceiver, X, {"identity": 6}, "pre"),
    # An exporter computes the queries that are made of learned points alone, so that no branch starts from these.
    "set transformer": Case(SetTransformer, X, {"identity": 6}, "none", onnx={"identity": 4}),
    "embeddings that are summed": Case(
        ClassConditional, lambda: (torch.randint(0, 11, (N, T)), torch.randint(0, 2, (N, T))), {"identity": 4}, "pre"
    ),
    # The second stream is x + F₁ + F₂, one sum of two branches; the streams merge as two norms of one fork.
    # At its beginning both streams are one, x + F₁ twice: an exporter makes one sum of these.
    "ResiDual": Case(lambda: two(ResiDual), X, {"identity": 4, "parallel": 2}, onnx={"identity": 6}),
    # The first average holds one layer's branch, the second and the third several.
    "DenseFormer": Case(DenseFormer, X, {"identity": 7, "parallel": 2}, "pre"),
    "hyper-connections": Case(HyperConnections, X, {"identity": 4}),
}
