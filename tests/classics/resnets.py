"""Residual networks for images: shortcut options, widths, multi-branch blocks, attention in the branch."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.classics.case import Case, image
from tests.classics.parts import bn_relu_conv, conv, conv_bn, conv_bn_relu

PLAN = ((4, 4, 1), (4, 8, 2), (8, 16, 2))  # inputs, outputs, stride


class BasicBlock(nn.Module):
    """relu(F(x) + s(x)), s one of He's options A (spelled in three ways), B and C."""

    def __init__(self, inputs: int, outputs: int, stride: int, option: str) -> None:
        super().__init__()
        self.first, self.second = conv_bn_relu(inputs, outputs, 3, stride), conv_bn(outputs, outputs)
        self.option, self.stride, self.extra = option, stride, outputs - inputs
        self.changes = bool(self.extra)
        projected = option == "C" or (option == "B" and self.changes)
        self.project = conv_bn(inputs, outputs, 1, stride) if projected else None

    def shortcut(self, x: Tensor) -> Tensor:
        if self.project is not None:
            out: Tensor = self.project(x)
            return out
        if not self.changes:
            return x
        if self.option == "A, F.pad":
            return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.extra // 2, self.extra // 2), "constant", 0)
        if self.option == "A, zeros":
            x = x[:, :, :: self.stride, :: self.stride]
            zeros = torch.zeros(x.shape[0], self.extra, x.shape[2], x.shape[3])
            return torch.cat([x, zeros], dim=1)
        x = F.avg_pool2d(x, 1, self.stride)
        return torch.cat((x, x.mul(0)), 1)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.second(self.first(x)) + self.shortcut(x))


class CifarResNet(nn.Module):
    """He's ResNet for CIFAR with one block a stage, 6n + 2 layers with n = 1."""

    def __init__(self, option: str) -> None:
        super().__init__()
        self.stem = conv_bn_relu(3, 4)
        self.blocks = nn.Sequential(*(BasicBlock(*plan, option) for plan in PLAN))
        self.head = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(self.stem(x))
        out: Tensor = self.head(F.adaptive_avg_pool2d(x, 1).flatten(1))
        return out


class PreActivation(nn.Module):
    """x + F(relu(bn(x))); where the width changes, the projection reads the activated input (He 2016)."""

    def __init__(self, inputs: int, outputs: int, stride: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(inputs)
        self.first = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.rest = bn_relu_conv(outputs, outputs)
        self.dropout = nn.Dropout(dropout)
        self.project = None if inputs == outputs else nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.norm(x))
        skip = x if self.project is None else self.project(out)
        return self.rest(self.dropout(self.first(out))) + skip


class WideResNet(nn.Module):
    """Two pre-activated blocks a stage."""

    def __init__(self, dropout: float = 0.3) -> None:
        super().__init__()
        blocks = []
        for inputs, outputs, stride in PLAN:
            blocks += [PreActivation(inputs, outputs, stride, dropout), PreActivation(outputs, outputs, 1, dropout)]
        self.net = nn.Sequential(conv(3, 4), *blocks, nn.BatchNorm2d(16), nn.ReLU(), nn.AdaptiveAvgPool2d(1))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.net(x)
        return out


class Bottleneck(nn.Module):
    """ResNeXt's block, with a module on the branch's end and one in its middle."""

    def __init__(self, inputs: int, outputs: int, stride: int, middle: nn.Module | None, end: nn.Module | None) -> None:
        super().__init__()
        width = outputs // 2
        self.reduce = conv_bn_relu(inputs, width, 1)
        self.middle = middle or conv_bn_relu(width, width, 3, stride, 2)
        self.expand = conv_bn(width, outputs, 1)
        self.end = end or nn.Identity()
        same = inputs == outputs and stride == 1
        self.project = nn.Identity() if same else conv_bn(inputs, outputs, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = self.end(self.expand(self.middle(self.reduce(x))))
        y += self.project(x)
        return F.relu(y)


def bottlenecks(middle: type[nn.Module] | None = None, end: type[nn.Module] | None = None) -> nn.Module:
    """A stem, one block that changes the width and two that do not. Middles take 8 channels, ends 16."""

    def block(inputs: int, stride: int) -> nn.Module:
        return Bottleneck(inputs, 16, stride, middle(8) if middle else None, end(16) if end else None)  # type: ignore[call-arg]

    return nn.Sequential(conv_bn_relu(3, 8), block(8, 1 if middle else 2), block(16, 1), block(16, 1))


class SE(nn.Module):
    """x·σ(W₂ relu(W₁ mean(x)))"""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(width, 4), nn.Linear(4, width)

    def forward(self, x: Tensor) -> Tensor:
        s = torch.sigmoid(self.up(F.relu(self.down(x.mean((2, 3))))))
        return x * s[:, :, None, None]


class ECA(nn.Module):
    """A 1-D convolution over the channels makes the gate."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv1d(1, 1, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = F.adaptive_avg_pool2d(x, 1)
        y = self.conv(y.squeeze(-1).transpose(-1, -2)).transpose(-1, -2).unsqueeze(-1)
        return x * y.sigmoid().expand_as(x)


class CBAM(nn.Module):
    """Channel attention σ(M(avg) + M(max)), then spatial attention from [mean, max] (Woo 2018): no skips of its own."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Conv2d(width, 4, 1), nn.ReLU(), nn.Conv2d(4, width, 1))
        self.spatial = nn.Conv2d(2, 1, 7, padding=3)

    def forward(self, x: Tensor) -> Tensor:
        x = x * torch.sigmoid(self.mlp(F.adaptive_avg_pool2d(x, 1)) + self.mlp(F.adaptive_max_pool2d(x, 1)))
        both = torch.cat([x.mean(1, keepdim=True), x.amax(1, keepdim=True)], 1)
        return x * torch.sigmoid(self.spatial(both))


class SelectiveKernel(nn.Module):
    """SK-Net: softmax-weighted sum of a 3×3 and a dilated branch (Li 2019): two working branches, no skip."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.a, self.b = conv_bn_relu(width, width), conv_bn_relu(width, width, 5)
        self.squeeze, self.excite = nn.Linear(width, 4), nn.ModuleList(nn.Linear(4, width) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.a(x), self.b(x)
        z = F.relu(self.squeeze((a + b).mean((2, 3))))
        weights = torch.stack([linear(z) for linear in self.excite], 1).softmax(1)[..., None, None]
        return (torch.stack([a, b], 1) * weights).sum(1)


class SplitAttention(nn.Module):
    """ResNeSt: two splits of one grouped convolution, summed with attention weights (Zhang 2020)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = conv_bn_relu(width, 2 * width, 3, 1, 2)
        self.down, self.up = conv_bn_relu(width, 4, 1), nn.Conv2d(4, 2 * width, 1)
        self.width = width

    def forward(self, x: Tensor) -> Tensor:
        splits = torch.split(self.conv(x), self.width, dim=1)
        gap = F.adaptive_avg_pool2d(sum(splits), 1)  # type: ignore[arg-type]
        attention = self.up(self.down(gap)).view(-1, 2, self.width, 1, 1).softmax(1)
        return splits[0] * attention[:, 0] + splits[1] * attention[:, 1]


class PyramidNet(nn.Module):
    """bn, conv, bn, relu, conv, bn; the shortcut pools where the stride is 2 and pads channels always (Han 2017)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn(3, 4)
        plans = ((4, 6, 1), (6, 8, 1), (8, 10, 2))
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.BatchNorm2d(i), conv(i, o, 3, s), nn.BatchNorm2d(o), nn.ReLU(), conv_bn(o, o))
            for i, o, s in plans
        )
        self.strides = [s for _, _, s in plans]

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block, stride in zip(self.blocks, self.strides, strict=True):
            skip = F.avg_pool2d(x, 2) if stride == 2 else x
            y = block(x)
            zeros = torch.zeros(y.shape[0], y.shape[1] - skip.shape[1], *y.shape[2:])
            x = y + torch.cat((skip, zeros), 1)
        return x


class ShakeShake(nn.Module):
    """x + α·F₁(x) + (1 − α)·F₂(x), α random in training and ½ after (Gastaldi 2017)."""

    def __init__(self, blocks: int = 2, width: int = 4) -> None:
        super().__init__()
        self.stem = conv_bn(3, width)
        self.one, self.two = (
            nn.ModuleList(
                nn.Sequential(nn.ReLU(), *conv_bn_relu(width, width), *conv_bn(width, width)) for _ in range(blocks)
            )
            for _ in range(2)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for one, two in zip(self.one, self.two, strict=True):
            if self.training:
                alpha = torch.rand(x.shape[0], 1, 1, 1)
                x = x + (alpha * one(x) + (1 - alpha) * two(x))
            else:
                x = x + (0.5 * one(x) + 0.5 * two(x))
        return x


class Dropped(nn.Module):
    """Stochastic depth with He's blocks: x + b·F(x)/p in training (Huang 2016); ShakeDrop: (b + α − bα)·F(x)."""

    def __init__(self, shake: bool, blocks: int = 3, width: int = 4) -> None:
        super().__init__()
        self.stem = conv_bn_relu(3, width)
        self.blocks = nn.ModuleList(
            nn.Sequential(*conv_bn_relu(width, width), *conv_bn(width, width)) for _ in range(blocks)
        )
        self.shake = shake

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            y = block(x)
            if not self.training:
                y = y * 0.8
            elif self.shake:
                keep = torch.bernoulli(torch.full((x.shape[0], 1, 1, 1), 0.8))
                alpha = torch.rand(x.shape[0], 1, 1, 1) * 2 - 1
                y = (keep + alpha - keep * alpha) * y
            else:
                y = y * (torch.rand(x.shape[0], 1, 1, 1) < 0.8).float()
            x = F.relu(x + y)
        return x


class InceptionResNet(nn.Module):
    """relu(x + 0.17·conv([b₀, b₁, b₂])) (Szegedy 2017)."""

    def __init__(self, blocks: int = 2, width: int = 8) -> None:
        super().__init__()
        self.stem = conv_bn_relu(3, width)
        self.a = nn.ModuleList(conv_bn_relu(width, 4, 1) for _ in range(blocks))
        self.b = nn.ModuleList(nn.Sequential(conv_bn_relu(width, 4, 1), conv_bn_relu(4, 4)) for _ in range(blocks))
        self.up = nn.ModuleList(nn.Conv2d(8, width, 1) for _ in range(blocks))
        self.pool, self.down = nn.MaxPool2d(3, 2), conv_bn_relu(width, 4, 3, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for a, b, up in zip(self.a, self.b, self.up, strict=True):
            x = F.relu(x + up(torch.cat((a(x), b(x)), 1)) * 0.17)
        return torch.cat((self.pool(F.pad(x, (1, 1, 1, 1))), self.down(x)), 1)


class SqueezeNext(nn.Module):
    """Bottleneck by 1×1, 1×1, 3×1, 1×3, 1×1 with a shortcut; FractalNet's join beside it (no skip)."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.stem = conv_bn_relu(3, width)

        def layer(i: int, o: int, kernel: tuple[int, int]) -> nn.Sequential:
            pad = (kernel[0] // 2, kernel[1] // 2)
            return nn.Sequential(nn.Conv2d(i, o, kernel, padding=pad, bias=False), nn.BatchNorm2d(o), nn.ReLU())

        self.blocks = nn.ModuleList(
            nn.Sequential(
                layer(i, 4, (1, 1)), layer(4, 2, (1, 1)), layer(2, 4, (3, 1)), layer(4, 4, (1, 3)), layer(4, o, (1, 1))
            )
            for i, o in ((width, width), (width, 2 * width))
        )
        self.project = conv_bn_relu(width, 2 * width, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = F.relu(self.blocks[0](x) + x)
        return F.relu(self.blocks[1](x) + self.project(x))


class Fractal(nn.Module):
    """f₃(x) = mean(conv(x), f₂(f₂(x))): several working paths, no skip at all (Larsson 2017)."""

    def __init__(self, columns: int = 3, width: int = 4) -> None:
        super().__init__()
        self.stem = conv_bn_relu(3, width)
        self.convs = nn.ModuleList(conv_bn_relu(width, width) for _ in range(2**columns - 1))
        self.columns = columns

    def fractal(self, x: Tensor, column: int, convs: list[nn.Module]) -> Tensor:
        direct: Tensor = convs.pop()(x)
        if column == 1:
            return direct
        deep = self.fractal(self.fractal(x, column - 1, convs), column - 1, convs)
        return (direct + deep) / 2

    def forward(self, x: Tensor) -> Tensor:
        return self.fractal(self.stem(x), self.columns, list(self.convs))


class Ghost(nn.Module):
    """GhostNet: [y, cheap(y)] with y = conv(x), twice, and a shortcut (Han 2020): a dense concat inside the branch."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.stem = conv_bn_relu(3, width)
        self.primary = nn.ModuleList([conv_bn_relu(width, width, 1), conv_bn(2 * width, width // 2, 1)])
        self.cheap = nn.ModuleList([conv_bn_relu(width, width, 3, 1, width), conv_bn(width // 2, width // 2, 3, 1, 4)])

    def forward(self, x: Tensor) -> Tensor:
        x = y = self.stem(x)
        for primary, cheap in zip(self.primary, self.cheap, strict=True):
            first = primary(y)
            y = torch.cat([first, cheap(first)], 1)
        return x + y


CASES: dict[str, Case] = {
    "CIFAR ResNet, option A by F.pad": Case(
        lambda: CifarResNet("A, F.pad"), image(), {"identity": 1, "pad": 2}, "branch", folded="none", traced=True
    ),
    "CIFAR ResNet, option A by zeros": Case(
        lambda: CifarResNet("A, zeros"), image(), {"identity": 1, "pad": 2}, "branch", folded="none", traced=False
    ),
    "CIFAR ResNet, option A by x·0": Case(
        lambda: CifarResNet("A, mul"), image(), {"identity": 1, "pad": 2}, "branch", folded="none"
    ),
    "CIFAR ResNet, option B": Case(
        lambda: CifarResNet("B"), image(), {"identity": 1, "projection": 2}, "branch", folded="none"
    ),
    "CIFAR ResNet, option C": Case(lambda: CifarResNet("C"), image(), {"projection": 3}, "branch", folded="none"),
    # ONNX export folds the batch norm behind a convolution only.
    "Wide ResNet": Case(WideResNet, image(), {"identity": 4, "projection": 2}, "pre"),
    "ResNeXt": Case(bottlenecks, image(), {"identity": 2, "projection": 1}, "branch", folded="none"),
    "SENet": Case(lambda: bottlenecks(end=SE), image(), {"identity": 2, "projection": 1}, "inner", folded="none"),
    "ECA-Net": Case(lambda: bottlenecks(end=ECA), image(), {"identity": 2, "projection": 1}, "inner", folded="none"),
    "CBAM": Case(lambda: bottlenecks(end=CBAM), image(), {"identity": 2, "projection": 1}, "inner", folded="none"),
    "SK-Net": Case(
        lambda: bottlenecks(middle=SelectiveKernel), image(), {"identity": 2, "projection": 1}, "branch", folded="none"
    ),
    "ResNeSt": Case(
        lambda: bottlenecks(middle=SplitAttention),
        image(),
        {"identity": 2, "projection": 1},
        "branch",
        folded="none",
        traced=False,
    ),
    "PyramidNet": Case(PyramidNet, image(), {"pad": 3}, "sandwich", folded="pre", traced=False),
    "Shake-Shake, training": Case(ShakeShake, image(), {"stochastic": 2}, training=True, traced=False),
    "Shake-Shake": Case(ShakeShake, image(), {"parallel": 2}, "branch", folded="none"),
    "stochastic depth, training": Case(
        lambda: Dropped(False), image(), {"stochastic": 3}, "branch", folded="none", training=True, traced=False
    ),
    "stochastic depth": Case(lambda: Dropped(False), image(), {"identity": 3}, "branch", folded="none", scales=3),
    "ShakeDrop, training": Case(
        lambda: Dropped(True), image(), {"stochastic": 3}, "branch", folded="none", training=True, traced=False
    ),
    "Inception-ResNet": Case(InceptionResNet, image(), {"identity": 2}, "inner", folded="none", scales=2),
    "SqueezeNext": Case(SqueezeNext, image(), {"identity": 1, "projection": 1}, "inner", folded="none"),
    "FractalNet": Case(Fractal, image(), {}),
    "GhostNet": Case(Ghost, image(), {"identity": 1, "dense": 2, "nested": 2}),
}
