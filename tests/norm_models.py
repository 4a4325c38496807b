"""Stacks of blocks with their norms in every placement, written by hand, with the same parameter names throughout."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

NORMS: dict[str, Callable[[int], nn.Module]] = {
    "layer": nn.LayerNorm,
    "rms": nn.RMSNorm,
    "group": lambda width: nn.GroupNorm(2, width),
}


class FeedForward(nn.Module):
    """A branch: two linears, or two convolutions where `image`."""

    def __init__(self, width: int, image: bool) -> None:
        super().__init__()
        layer = (lambda a, b: nn.Conv2d(a, b, 1)) if image else nn.Linear
        self.up, self.down = layer(width, 2 * width), layer(2 * width, width)
        self.dropout = nn.Dropout(0.3)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.down(torch.nn.functional.gelu(self.up(x))))


class Block(nn.Module):
    """One residual block. `tail` is the second norm of a sandwich, `scale` a LayerScale vector next to the sum."""

    def __init__(self, width: int, norm: str, placement: str, layer_scale: bool) -> None:
        super().__init__()
        self.placement = placement
        self.ff = FeedForward(width, norm == "group")
        self.norm = NORMS[norm](width)
        if placement == "sandwich":
            self.norm_tail = NORMS[norm](width)
        if layer_scale:
            vector = torch.linspace(0.5, 1.5, width)
            self.scale = nn.Parameter(vector[:, None, None] if norm == "group" else vector)
        self.layer_scale, self.alpha = layer_scale, 1.0

    def forward(self, x: Tensor) -> Tensor:
        y = self.ff(self.norm(x) if self.placement in ("pre", "sandwich") else x)
        if self.placement == "branch":
            y = self.norm(y)
        if self.placement == "sandwich":
            y = self.norm_tail(y)
        if self.layer_scale:
            y = y * self.scale
        if self.placement == "deepnorm":
            x = x * self.alpha
        s = x + y
        return self.norm(s) if self.placement in ("post", "deepnorm") else s


class Stack(nn.Module):
    """Blocks in a row behind an embedding with its own norm; `final` where the stack ends in one."""

    def __init__(
        self,
        placement: str,
        norm: str = "layer",
        depth: int = 3,
        width: int = 8,
        final: bool = False,
        layer_scale: bool = False,
        embedded: bool = True,
    ) -> None:
        super().__init__()
        self.embedding_norm = NORMS[norm](width) if embedded else nn.Identity()
        self.layers = nn.ModuleList(Block(width, norm, placement, layer_scale) for _ in range(depth))
        self.final_norm = NORMS[norm](width) if final else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = self.embedding_norm(x)
        for layer in self.layers:
            x = layer(x)
        y: Tensor = self.final_norm(x)
        return y


def livened(model: nn.Module, seed: int = 0) -> nn.Module:
    """Parameters that differ from each other, from 0 and from 1, in evaluation."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        gain = parameter.dim() == 1 and name.endswith("weight")
        nn.init.normal_(parameter, float(gain), 0.2 if parameter.dim() > 1 else 0.1, generator=generator)
    return model.eval()


def twin(model: nn.Module, other: nn.Module, rename: Callable[[str], str] = lambda key: key) -> nn.Module:
    """`other` with the weights of `model`, its norms that `model` lacks with gain one and shift zero."""
    for name, parameter in other.named_parameters():
        if parameter.dim() == 1:
            nn.init.constant_(parameter, float(name.endswith("weight")))
    own = {rename(key): tensor for key, tensor in model.state_dict().items()}
    missing, unexpected = other.load_state_dict(own, strict=False)
    assert not unexpected, unexpected
    assert all(other.get_parameter(key).dim() == 1 for key in missing), missing
    return other.eval()


class SpelledRMSNorm(nn.Module):
    """RMSNorm in its parts, computed in float32 (Llama)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.float32)
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
        return self.weight * wide.to(x.dtype)


class SpelledLayerNorm(nn.Module):
    """LayerNorm in its parts."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean(-1, keepdim=True)
        variance = (x - mean).pow(2).mean(-1, keepdim=True)
        return self.weight * (x - mean) / torch.sqrt(variance + 1e-6) + self.bias


NORMS["spelled rms"], NORMS["spelled layer"] = SpelledRMSNorm, SpelledLayerNorm
