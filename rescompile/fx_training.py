"""What training needs of a graph: a torch module of its own, and how far gradients reach in it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from rescompile.errors import RescompileError
from rescompile.fx_gradients import example_arrays
from rescompile.fx_twin import twin
from rescompile.graph import Graph, Role, Value
from rescompile.kinds import OpKind, Trait


def trainable(graph: Graph) -> nn.Module:
    """A module that computes the graph and can be trained, whatever IR it is in; its tensors are its own.

    A torch graph gives the module that its rewrite gives, with `train()` and `eval()`; an ONNX graph one that runs its
    operations in torch, in the form that the file has.
    """
    if graph.ir == "fx":
        module = graph.clone().to_user()
        if isinstance(module, nn.Module):
            return module
    return twin(graph)


def train(
    graph: Graph,
    function: Callable[[Any, Callable[[int, float], None], int], float],
    report: Any,
    steps: int,
    seed: int,
) -> float:
    """What the training function makes of a module of the graph, whatever else was trained before it."""
    module = trainable(graph)
    torch.manual_seed(seed)
    return float(function(module, report, steps))


def first_to_last(graph: Graph, inputs: Any = None, seed: int = 0) -> float | None:
    """Root-mean-square gradient of the first layer's weight over that of the last layer's, in one backward pass.

    The loss is the product of the outputs with a random direction. None where fewer than two layers have weights.
    """
    module = twin(graph)
    weights = [value for value in _weights(graph) if value.dtype is not None and "float" in value.dtype]
    if len(weights) < 2:
        return None
    arrays = example_arrays(graph, inputs, seed)[0]
    outputs, _ = module.run(arrays)
    floats = [output for output in outputs.values() if output.requires_grad]
    if not floats:
        raise RescompileError("No gradient leads back from the model's outputs: explore a model that is not frozen.")
    generator = torch.Generator().manual_seed(seed)
    loss = torch.zeros(())
    for output in floats:
        direction = torch.randn(output.shape, generator=generator, dtype=torch.float32)
        loss = loss + (output.float() * direction.to(output.device)).sum()
    first, last = module.tensor(weights[0]), module.tensor(weights[-1])
    gradients = torch.autograd.grad(loss, (first, last), allow_unused=True)
    sizes = [0.0 if gradient is None else float(gradient.double().square().mean().sqrt()) for gradient in gradients]
    return sizes[0] / sizes[1] if sizes[1] else None


def _weights(graph: Graph) -> list[Value]:
    """The weight of each contraction of the network itself, in order; what shortcuts have brought is left out."""
    found: dict[Value, None] = {}
    for op in graph:
        if op.has(Trait.PARAMETRIC) and not op.has(Trait.NORM) and not op.provenance:
            index = 0 if op.kind is OpKind.EMBEDDING else 1
            weight = op.inputs[index] if len(op.inputs) > index else None
            if weight is not None and weight.role is Role.PARAMETER:
                found[weight] = None
    return list(found)
