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
from rescompile.graph import Graph

DEPTHS = (6, 12, 24, 48)
POSITIONS = 8
CLASSES = 64
STREAMS = 4  # draws of weights that E‖x_l‖² is the mean of


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


def last_gradient(model: nn.Module, depth: int, x: Tensor, generator: torch.Generator) -> float:
    """‖∂L/∂W₂‖ of the last layer, L the cross-entropy of the first position's scores against a random class."""
    width = x.shape[-1]
    scores = model(x)[0, :1] @ torch.randn(width, CLASSES, generator=generator) / math.sqrt(width)
    loss = functional.cross_entropy(scores, torch.randint(CLASSES, (1,), generator=generator))
    weight = dict(model.named_parameters())[f"layers.{depth - 1}.linear2.weight"]
    return torch.autograd.grad(loss, weight)[0].norm().item()


def measure(depths: Sequence[int] = DEPTHS, draws: int = 16, width: int = 64) -> Law:
    """The law from `draws` draws of weights and inputs for each depth, the same for both placements."""
    post: dict[int, float] = {}
    pre: dict[int, float] = {}
    streams = []
    for depth in depths:
        original = encoder(depth, width)
        result = rc.rewrite(original, "pre-norm", (torch.zeros(1, POSITIONS, width),))
        converted: nn.Module = result.model
        sums = [0.0, 0.0]
        for seed in range(draws):
            generator = torch.Generator().manual_seed(seed)
            draw(original, generator)
            converted.load_state_dict(original.state_dict(), strict=False)  # the last norm is new
            x = stream_of(width, generator)
            for index, model in enumerate((original, converted)):
                sums[index] += last_gradient(model, depth, x, torch.Generator().manual_seed(seed)) / draws
            if depth == max(depths) and seed < STREAMS:
                streams.append(squares(result.graph, original, x))
        post[depth], pre[depth] = sums
    return Law(post, pre, torch.tensor(streams).mean(0).tolist())


def squares(graph: Graph, original: nn.Module, x: Tensor) -> list[float]:
    """E‖x_l‖² / d of the input and behind each layer, which is two blocks, with the weights of `original`."""
    for value in graph.parameters:
        if value.name in original.state_dict():
            graph.set_data(value, original.state_dict()[value.name].numpy().copy())
    blocks = rc.gradient_flow(graph, inputs=(x,)).blocks
    return [x.square().mean().item(), *(block.join.mean_square for block in blocks[1::2] if block.join is not None)]


def slope(heights: dict[int, float]) -> float:
    """Of ln height against ln L, by least squares."""
    across = torch.tensor([math.log(depth) for depth in heights])
    up = torch.tensor([math.log(height) for height in heights.values()])
    across = across - across.mean()
    return ((across * up).sum() / across.square().sum()).item()
