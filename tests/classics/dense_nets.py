"""Networks that concatenate what they made to what they had."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.classics.case import Case, floats, image
from tests.classics.parts import bn_relu_conv, conv, conv_bn, conv_bn_relu


class DenseBlock(nn.Module):
    """[x, F₁(x)], [x, F₁, F₂([x, F₁])], ...; the list of features is concatenated once a layer."""

    def __init__(self, inputs: int, growth: int, layers: int, bottleneck: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList()
        for index in range(layers):
            width = inputs + index * growth
            middle = 2 * growth if bottleneck else growth
            first = bn_relu_conv(width, middle, 1 if bottleneck else 3)
            self.layers.append(nn.Sequential(first, bn_relu_conv(middle, growth)) if bottleneck else first)

    def forward(self, x: Tensor) -> Tensor:
        features = [x]
        for layer in self.layers:
            features.append(layer(torch.cat(features, 1)))
        return torch.cat(features, 1)


class DenseNet(nn.Module):
    """Two dense blocks of three layers with a halving transition."""

    def __init__(self, bottleneck: bool) -> None:
        super().__init__()
        self.net = nn.Sequential(
            conv(3, 4),
            DenseBlock(4, 4, 3, bottleneck),
            bn_relu_conv(16, 8, 1),
            nn.AvgPool2d(2),
            DenseBlock(8, 4, 3, bottleneck),
            nn.BatchNorm2d(20),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(20, 10),
        )

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.net(x)
        return out


class CondenseNet(nn.Module):
    """Dense layers with grouped 1×1 convs and a channel shuffle; x pooled stays connected across resolutions."""

    def __init__(self, growth: int = 4) -> None:
        super().__init__()
        self.stem = conv(3, 8)
        self.reduce = nn.ModuleList(nn.Conv2d(8 + growth * i, 8, 1, groups=2) for i in range(4))
        self.grow = nn.ModuleList(nn.Conv2d(8, growth, 3, padding=1, groups=2) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for index, (reduce, grow) in enumerate(zip(self.reduce, self.grow, strict=True)):
            y = F.relu(reduce(x))
            n, c, h, w = y.shape
            y = y.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)
            x = torch.cat([x, grow(y)], 1)
            if index == 1:
                x = F.avg_pool2d(x, 2)
        return x


class PeleeNet(nn.Module):
    """A stem that joins a conv and a pool way (no skip), then two-way dense layers [x, F₁(x), F₂(x)] (Wang 2018)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem1, self.stem2a = conv_bn_relu(3, 8, 3, 2), conv_bn_relu(8, 4, 1)
        self.stem2b, self.stem3 = conv_bn_relu(4, 8, 3, 2), conv_bn_relu(16, 8, 1)
        self.one = nn.ModuleList(nn.Sequential(conv_bn_relu(8 + 4 * i, 4, 1), conv_bn_relu(4, 2)) for i in range(3))
        self.two = nn.ModuleList(
            nn.Sequential(conv_bn_relu(8 + 4 * i, 4, 1), conv_bn_relu(4, 2), conv_bn_relu(2, 2)) for i in range(3)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem1(x)
        x = self.stem3(torch.cat([self.stem2b(self.stem2a(x)), F.max_pool2d(x, 2)], 1))
        for one, two in zip(self.one, self.two, strict=True):
            x = torch.cat([x, one(x), two(x)], 1)
        return x


class DualPath(nn.Module):
    """A residual and a dense path at once: each unit adds to one part and appends to the other (Chen 2017)."""

    def __init__(self, units: int = 3, width: int = 8, growth: int = 4) -> None:
        super().__init__()
        self.stem = conv_bn_relu(3, 8)
        self.project = conv_bn(8, width + growth, 1)
        self.units = nn.ModuleList(
            nn.Sequential(conv_bn_relu(8 if i == 0 else width + growth * (i + 1), 8, 1), conv_bn(8, width + growth))
            for i in range(units)
        )
        self.width = width

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        s = self.project(x)
        residual, dense = s[:, : self.width], s[:, self.width :]
        for index, unit in enumerate(self.units):
            out = unit(x if index == 0 else torch.cat([residual, dense], 1))
            residual = residual + out[:, : self.width]
            dense = torch.cat([dense, out[:, self.width :]], 1)
        return torch.cat([residual, dense], 1)


class CSP(nn.Module):
    """CSPDenseNet: half of the channels pass by, the others go through a dense block and a transition (Wang 2020)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn_relu(3, 8)
        self.block, self.transition = DenseBlock(4, 4, 2, True), conv_bn_relu(12, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.stem(x).chunk(2, 1)
        return torch.cat([first, self.transition(self.block(second))], 1)


class Field(nn.Module):
    """NeRF's MLP: the encoded position is concatenated again halfway; the view direction later (Mildenhall 2020)."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Linear(12, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU())
        self.second = nn.Sequential(nn.Linear(width + 12, width), nn.ReLU())
        self.density, self.feature = nn.Linear(width, 1), nn.Linear(width, width)
        self.colour = nn.Sequential(nn.Linear(width + 3, 8), nn.ReLU(), nn.Linear(8, 3))

    def forward(self, position: Tensor, direction: Tensor) -> Tensor:
        bands = [position * 2.0**k for k in range(2)]
        encoded = torch.cat([f(band) for band in bands for f in (torch.sin, torch.cos)], -1)
        h = self.second(torch.cat([encoded, self.first(encoded)], -1))
        rgb = self.colour(torch.cat([self.feature(h), direction], -1))
        return torch.cat([torch.sigmoid(rgb), F.relu(self.density(h))], -1)


class DeepFM(nn.Module):
    """Deep & wide over embedded fields: ½((Σv)² − Σv²) + linear + MLP, all of one fork: no skip (Guo 2017)."""

    def __init__(self, fields: int = 4, width: int = 4) -> None:
        super().__init__()
        self.embed, self.first = nn.Embedding(11, width), nn.Embedding(11, 1)
        self.deep = nn.Sequential(nn.Linear(fields * width, 8), nn.ReLU(), nn.Linear(8, 1))

    def forward(self, indices: Tensor) -> Tensor:
        v = self.embed(indices)
        pairs = 0.5 * (v.sum(1).pow(2) - v.pow(2).sum(1)).sum(1, keepdim=True)
        out: Tensor = self.first(indices).sum(1) + pairs + self.deep(v.flatten(1))
        return torch.sigmoid(out)


CASES: dict[str, Case] = {
    "DenseNet, basic": Case(lambda: DenseNet(False), image(), {"dense": 6}),
    "DenseNet-BC": Case(lambda: DenseNet(True), image(), {"dense": 6}),
    "CondenseNet": Case(CondenseNet, image(), {"dense": 4}),
    "PeleeNet": Case(PeleeNet, image(), {"dense": 3}),
    # The first unit's dense part is new on both sides, and its residual part is a projection.
    "dual path network": Case(DualPath, image(), {"projection": 1, "identity": 2, "dense": 2}),
    "CSPDenseNet": Case(CSP, image(), {"dense": 3, "nested": 2}),
    "NeRF": Case(Field, floats((5, 3), (5, 3)), {"dense": 1}),
    "DeepFM": Case(DeepFM, lambda: (torch.randint(0, 11, (2, 4)),), {}),
}
