"""Why deep post-norm Transformers need warm-up, measured at initialisation on converted graphs.

Xiong et al. 2020, theorem 1 and lemma 2: the gradient of the last layer's feed-forward weights does not depend on the
number of layers L behind a norm, and shrinks as L^(−1/2) before one, where the stream grows by (1/2 to 3/2)·d a layer.
As in the paper: one head, feed-forward as wide as the stream, query and key 0 (attention is the mean), Xavier weights
else, biases 0, and the cross-entropy of one position's scores.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

import rescompile as rc
from rescompile.fx_twin import twin

DEPTHS = (6, 12, 24, 48)
POSITIONS = 8
CLASSES = 64


@dataclass(frozen=True)
class Law:
    """Mean ‖∂L/∂W₂‖ of the last layer by number of layers, of the post-norm stacks and of what they were converted to;
    and E‖x_l‖² / d behind each layer of the deepest converted one, beginning with the input."""

    post: dict[int, float]
    pre: dict[int, float]
    stream: list[float]


def encoder(depth: int, width: int) -> nn.TransformerEncoder:
    """A post-norm stack, [1, n, d] to [1, n, d]."""
    layer = nn.TransformerEncoderLayer(width, 1, width, dropout=0.0, batch_first=True)
    return nn.TransformerEncoder(layer, depth, enable_nested_tensor=False).eval()


def draw(model: nn.Module, generator: torch.Generator) -> None:
    """The paper's initialisation."""
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if name.endswith("in_proj_weight"):
                width = tensor.shape[1]
                tensor.zero_()[2 * width :] = torch.randn(width, width, generator=generator) / math.sqrt(width)
            elif tensor.ndim == 2:
                tensor.copy_(torch.randn(tensor.shape, generator=generator) * math.sqrt(2 / sum(tensor.shape)))
            else:
                tensor.fill_(1.0 if "norm" in name and name.endswith("weight") else 0.0)


def stream_of(width: int, generator: torch.Generator) -> Tensor:
    """Positions with ‖x‖² = d."""
    return functional.layer_norm(torch.randn(1, POSITIONS, width, generator=generator), (width,))


class Converted:
    """What became of an encoder, ready to run with other weights and to show the stream."""

    def __init__(self, original: nn.Module, width: int) -> None:
        graph = rc.rewrite(original, "pre-norm", (torch.zeros(1, POSITIONS, width),)).graph
        self.twin = twin(graph)
        self.input = graph.inputs[0].name
        self.parameters = {value.name: value for value in graph.parameters}
        self.joins = [block.join_op.output for block in rc.inspect(graph).blocks[1::2]]  # two blocks a layer

    def copy(self, original: nn.Module) -> None:
        """Take over all weights; the last norm, which is new, keeps its own."""
        with torch.no_grad():
            for name, tensor in original.named_parameters():
                self.weight(name).copy_(tensor)

    def weight(self, name: str) -> Tensor:
        """By its original name."""
        return self.twin.tensor(self.parameters[name])

    def __call__(self, x: Tensor) -> tuple[Tensor, list[float]]:
        """The output, and E‖x_l‖² / d behind each layer."""
        outputs, found = self.twin.run({self.input: x}, self.joins, _show)
        return next(iter(outputs.values())), [found[join] for join in self.joins]


def _show(_: object, tensor: Tensor) -> float:
    return tensor.detach().square().mean().item()


def gradient_norm(y: Tensor, weight: Tensor, seed: int) -> float:
    """‖∂L/∂W‖, L the cross-entropy of the first position's scores against a random class."""
    generator = torch.Generator().manual_seed(seed)
    width = y.shape[-1]
    scores = y[0, :1] @ torch.randn(width, CLASSES, generator=generator) / math.sqrt(width)
    loss = functional.cross_entropy(scores, torch.randint(CLASSES, (1,), generator=generator))
    return torch.autograd.grad(loss, weight)[0].norm().item()


def measure(depths: Sequence[int] = DEPTHS, draws: int = 16, width: int = 64) -> Law:
    """The law from `draws` draws of weights and inputs for each depth, the same for both placements."""
    post = dict.fromkeys(depths, 0.0)
    pre = dict.fromkeys(depths, 0.0)
    streams: list[list[float]] = []
    for depth in depths:
        original = encoder(depth, width)
        converted = Converted(original, width)
        last = f"layers.{depth - 1}.linear2.weight"
        for seed in range(draws):
            generator = torch.Generator().manual_seed(seed)
            draw(original, generator)
            converted.copy(original)
            x = stream_of(width, generator)
            post[depth] += gradient_norm(original(x), original.get_parameter(last), seed) / draws
            y, squares = converted(x)
            pre[depth] += gradient_norm(y, converted.weight(last), seed) / draws
            if depth == max(depths):
                streams.append([x.square().mean().item(), *squares])
    return Law(post, pre, torch.tensor(streams).mean(0).tolist())


def slope(heights: dict[int, float]) -> float:
    """Of ln height against ln L, by least squares."""
    across = torch.tensor([math.log(depth) for depth in heights])
    up = torch.tensor([math.log(height) for height in heights.values()])
    across = across - across.mean()
    return ((across * up).sum() / across.square().sum()).item()
