"""Tables, time series and graphs."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.classics.case import Case, floats
from tests.classics.parts import SelfAttention, mlp


class GLUBlock(nn.Module):
    """fc, batch norm, GLU."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.fc, self.bn = nn.Linear(inputs, 2 * outputs, bias=False), nn.BatchNorm1d(2 * outputs)

    def forward(self, x: Tensor) -> Tensor:
        return F.glu(self.bn(self.fc(x)), -1)


class TabNet(nn.Module):
    """Feature transformer (first layer plain, then (x + GLU(x))·√½) and attentive masks over two steps (Arik 2021)."""

    def __init__(self, features: int = 8, width: int = 8, steps: int = 2) -> None:
        super().__init__()
        self.bn = nn.BatchNorm1d(features)
        self.first, self.shared = GLUBlock(features, width), GLUBlock(width, width)
        self.own = nn.ModuleList(GLUBlock(width, width) for _ in range(steps))
        self.attend = nn.ModuleList(nn.Linear(width // 2, features) for _ in range(steps))
        self.head = nn.Linear(width // 2, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn(x)
        total: Tensor | float = 0.0
        attention = x[:, :4]
        for own, attend in zip(self.own, self.attend, strict=True):
            masked = attend(attention).softmax(-1) * x
            h = self.first(masked)
            h = (h + self.shared(h)) * 0.7071
            h = (h + own(h)) * 0.7071
            decision, attention = h.chunk(2, -1)
            total = total + F.relu(decision)
        out: Tensor = self.head(total)
        return out


class FeatureTokenizer(nn.Module):
    """FT-Transformer: x·W + b a feature, a class token, pre-norm layers (Gorishniy 2021)."""

    def __init__(self, features: int = 5, width: int = 8, layers: int = 2) -> None:
        super().__init__()
        self.w, self.b = nn.Parameter(torch.randn(features, width)), nn.Parameter(torch.zeros(features, width))
        self.token = nn.Parameter(torch.zeros(1, 1, width))
        self.attention = nn.ModuleList(SelfAttention(width) for _ in range(layers))
        self.feed = nn.ModuleList(mlp(width) for _ in range(layers))
        self.n = nn.ModuleList(nn.LayerNorm(width) for _ in range(2 * layers))

    def forward(self, x: Tensor) -> Tensor:
        x = x[:, :, None] * self.w + self.b
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1)
        for i, (attention, feed) in enumerate(zip(self.attention, self.feed, strict=True)):
            x = x + attention(x if i == 0 else self.n[2 * i](x))
            x = x + feed(self.n[2 * i + 1](x))
        return x[:, 0]


class Cross(nn.Module):
    """x₀·(xᵀw) + b + x (Wang 2017), or x₀·(W x + b) + x (v2), beside a deep MLP."""

    def __init__(self, matrix: bool, layers: int = 3, width: int = 8) -> None:
        super().__init__()
        self.w = nn.ModuleList(nn.Linear(width, width if matrix else 1, bias=matrix) for _ in range(layers))
        self.b = nn.ParameterList([nn.Parameter(torch.zeros(width)) for _ in range(layers)])
        self.deep, self.head = mlp(width), nn.Linear(2 * width, 1)
        self.matrix = matrix

    def forward(self, first: Tensor) -> Tensor:
        x = first
        for w, b in zip(self.w, self.b, strict=True):
            x = first * w(x) + x if self.matrix else first * w(x) + b + x
        out: Tensor = self.head(torch.cat([x, self.deep(first)], -1))
        return out


class NBeats(nn.Module):
    """Doubly residual: x ← x − backcast(x); the forecast is the sum of all blocks' (Oreshkin 2020)."""

    def __init__(self, blocks: int = 3, width: int = 8, horizon: int = 3) -> None:
        super().__init__()
        self.body = nn.ModuleList(
            nn.Sequential(nn.Linear(width, 12), nn.ReLU(), nn.Linear(12, 12), nn.ReLU()) for _ in range(blocks)
        )
        self.back = nn.ModuleList(nn.Linear(12, width) for _ in range(blocks))
        self.fore = nn.ModuleList(nn.Linear(12, horizon) for _ in range(blocks))

    def forward(self, x: Tensor) -> Tensor:
        forecast = torch.zeros(())
        for body, back, fore in zip(self.body, self.back, self.fore, strict=True):
            theta = body(x)
            x = x - back(theta)
            forecast = forecast + fore(theta)
        return forecast


class TiDE(nn.Module):
    """N(linear(x) + MLP(x)) blocks, and a global linear residual past all of them (Das 2023)."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.plan = ((width, 6), (6, 6), (6, 4))
        self.f = nn.ModuleList(nn.Sequential(nn.Linear(i, 8), nn.ReLU(), nn.Linear(8, o)) for i, o in self.plan)
        self.s = nn.ModuleList(nn.Linear(i, o) for i, o in self.plan)
        self.n, self.last = nn.ModuleList(nn.LayerNorm(o) for _, o in self.plan), nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for f, s, n in zip(self.f, self.s, self.n, strict=True):
            y = n(s(y) + f(y))
        out: Tensor = y + self.last(x)
        return out


class DenseGraph(nn.Module):
    """Message passing by a dense adjacency: GCN with skips, GIN ((1 + ε)x + Σ neighbours), GAT, GraphSAGE."""

    def __init__(self, kind: str, layers: int = 3, width: int = 6) -> None:
        super().__init__()
        self.kind = kind
        self.w = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))
        self.u = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))
        self.a = nn.ModuleList(nn.Linear(width, 2) for _ in range(layers))
        self.f = nn.ModuleList(mlp(width) for _ in range(layers))
        self.eps = nn.Parameter(torch.full((layers,), 0.1))

    def forward(self, x: Tensor, adjacency: Tensor) -> Tensor:
        first = x
        for i, (w, u, a, f) in enumerate(zip(self.w, self.u, self.a, self.f, strict=True)):
            if self.kind == "GCN":
                x = x + torch.relu(adjacency @ w(x))
            elif self.kind == "GCNII":
                mixed = 0.9 * (adjacency @ x) + 0.1 * first
                x = torch.relu(0.5 * mixed + 0.5 * w(mixed))
            elif self.kind == "GIN":
                x = f((1 + self.eps[i]) * x + adjacency @ x)
            elif self.kind == "SAGE":
                x = torch.relu(w(x) + u(adjacency @ x))
            else:
                h = w(x)
                left, right = a(h).chunk(2, -1)
                scores = F.leaky_relu(left + right.transpose(-2, -1), 0.2)
                scores = scores.masked_fill(adjacency == 0, float("-inf"))
                x = F.elu(scores.softmax(-1) @ h) + x
        return x


class EdgeGraph(nn.Module):
    """Message passing by edge lists: gather both ends, an MLP an edge, index_add or scatter_add, then an update."""

    def __init__(self, scatter: bool, layers: int = 2, width: int = 6) -> None:
        super().__init__()
        self.message = nn.ModuleList(nn.Sequential(nn.Linear(2 * width, width), nn.SiLU()) for _ in range(layers))
        self.update = nn.ModuleList(
            nn.Sequential(nn.Linear(2 * width, width), nn.SiLU(), nn.Linear(width, width)) for _ in range(layers)
        )
        self.scatter = scatter

    def forward(self, x: Tensor, source: Tensor, target: Tensor) -> Tensor:
        for message, update in zip(self.message, self.update, strict=True):
            m = message(torch.cat([x[source], x[target]], -1))
            zeros = torch.zeros_like(x)
            if self.scatter:
                summed = zeros.scatter_add(0, target[:, None].expand_as(m), m)
            else:
                summed = zeros.index_add(0, target, m)
            x = x + update(torch.cat([x, summed], -1))
        return x


class Equivariant(nn.Module):
    """EGNN on all pairs: h ← h + φ(h, Σm), x ← x + mean((xᵢ − xⱼ)·ψ(m)) (Satorras 2021)."""

    def __init__(self, layers: int = 2, width: int = 6) -> None:
        super().__init__()
        self.e = nn.ModuleList(nn.Sequential(nn.Linear(2 * width + 1, width), nn.SiLU()) for _ in range(layers))
        self.h = nn.ModuleList(
            nn.Sequential(nn.Linear(2 * width, width), nn.SiLU(), nn.Linear(width, width)) for _ in range(layers)
        )
        self.x = nn.ModuleList(nn.Linear(width, 1, bias=False) for _ in range(layers))

    def forward(self, h: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        n = h.shape[0]
        for e, node, coordinate in zip(self.e, self.h, self.x, strict=True):
            difference = x[:, None] - x[None]
            distance = difference.pow(2).sum(-1, keepdim=True)
            pairs = [h[:, None].expand(-1, n, -1), h[None].expand(n, -1, -1), distance]
            m = e(torch.cat(pairs, -1))
            x = x + (difference * coordinate(m)).mean(1)
            h = h + node(torch.cat([h, m.sum(1)], -1))
        return h, x


class PointFeatures(nn.Module):
    """PointNet++'s propagation: interpolated coarse features by distance, joined with the skipped fine ones."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.fine = nn.Sequential(nn.Conv1d(3, width, 1), nn.BatchNorm1d(width), nn.ReLU())
        self.coarse = nn.Sequential(nn.Conv1d(width, width, 1), nn.BatchNorm1d(width), nn.ReLU())
        self.up = nn.Sequential(nn.Conv1d(2 * width, width, 1), nn.BatchNorm1d(width), nn.ReLU())

    def forward(self, points: Tensor) -> Tensor:
        fine = self.fine(points)
        centres = points[:, :, ::4]
        grouped = fine.unflatten(2, (-1, 4)).amax(-1)
        coarse = self.coarse(grouped)
        distance = (points.unsqueeze(3) - centres.unsqueeze(2)).square().sum(1)
        weight = 1.0 / (distance + 1e-8)
        weight = weight / weight.sum(-1, keepdim=True)
        spread = coarse @ weight.transpose(1, 2)
        out: Tensor = self.up(torch.cat([fine, spread], 1))
        return out


def edges(count: int = 9, nodes: int = 5) -> tuple[Tensor, Tensor, Tensor]:
    """Node features and an edge list."""
    return torch.randn(nodes, 6), torch.randint(0, nodes, (count,)), torch.randint(0, nodes, (count,))


GRAPH = floats((5, 6), (5, 5))

CASES: dict[str, Case] = {
    "TabNet": Case(TabNet, floats((4, 8)), {"identity": 4}),
    "FT-Transformer": Case(FeatureTokenizer, floats((2, 5)), {"identity": 4}, "pre"),
    "deep & cross": Case(lambda: Cross(False), floats((4, 8)), {"identity": 3}),
    "deep & cross v2": Case(lambda: Cross(True), floats((4, 8)), {"identity": 3}),
    # Nothing reads what the last block leaves, so an exporter drops its difference.
    "N-BEATS": Case(NBeats, floats((4, 8)), {"identity": 3}, onnx={"identity": 2}),
    "TiDE": Case(TiDE, floats((4, 8)), {"projection": 4}, "post"),
    "GCN with skips": Case(lambda: DenseGraph("GCN"), GRAPH, {"identity": 3}),
    "GIN": Case(lambda: DenseGraph("GIN"), GRAPH, {"identity": 3}, scales=3),
    # 0.9·Ax + 0.1·x₀: of the first layer, x₀ is x; every later one joins the first features again. Each layer's
    # ½m + ½Wm is a sum of its own.
    "GCNII": Case(lambda: DenseGraph("GCNII"), GRAPH, {"identity": 6}),
    # W x + U A x: the node's own part is a linear projection.
    "GraphSAGE": Case(lambda: DenseGraph("SAGE"), GRAPH, {"projection": 3}),
    "GAT with skips": Case(lambda: DenseGraph("GAT"), GRAPH, {"identity": 3}),
    "message passing, index_add": Case(lambda: EdgeGraph(False), edges, {"identity": 2, "dense": 2}),
    "message passing, scatter_add": Case(lambda: EdgeGraph(True), edges, {"identity": 2, "dense": 2}),
    "EGNN": Case(Equivariant, floats((4, 6), (4, 3)), {"identity": 4, "dense": 2}),
    "PointNet++ propagation": Case(PointFeatures, floats((1, 3, 8)), {"dense": 1}),
}
