"""Weights anew: a graph's twin at a fresh initialisation, the same for every graph that has the same parameters."""

from __future__ import annotations

import math
import zlib
from collections.abc import Collection

import torch

from rescompile.fx_twin import Twin
from rescompile.graph import Graph, Op, Role, Value
from rescompile.kinds import OpKind, Trait

_EITHER = (OpKind.MATMUL, OpKind.EINSUM)


def initialise(module: Twin, graph: Graph, names: Collection[str], seed: int) -> int:
    """W ~ N(0, 2 / (fan_in + fan_out)) for the weights of contractions, biases 0, gains of norms 1; how many weights.

    Xavier's normal initialisation (Glorot and Bengio 2010), as in Xiong et al. 2020. Only parameters called `names` get
    one, each drawn by `seed` and its own name; what is in none of these roles (an embedding, a layer's scale) stays.
    """
    drawn = set()
    with torch.no_grad():
        for op in graph:
            for index, operand in enumerate(op.inputs):
                parameter = None if operand is None else _origin(operand)
                if operand is None or parameter is None or parameter.name not in names:
                    continue
                tensor = module.tensor(parameter)
                role = _role(op, index)
                deviation = _deviation(op, operand)
                if not tensor.is_floating_point():
                    continue
                if role == "weight" and deviation is not None:
                    generator = torch.Generator().manual_seed(zlib.crc32(parameter.name.encode()) ^ seed)
                    tensor.copy_(torch.randn(tensor.shape, generator=generator) * deviation)
                    drawn.add(parameter)
                elif role in ("gain", "bias"):
                    tensor.fill_(1.0 if role == "gain" else 0.0)
    return len(drawn)


def _role(op: Op, index: int) -> str | None:
    """What a parameter is to an operation that reads it."""
    if op.kind in _EITHER:
        return "weight"
    names = [name.rstrip("?") for name in op.kind.spec.operands]
    name = names[index] if index < len(names) else ""
    if op.has(Trait.NORM):
        return {"weight": "gain", "bias": "bias"}.get(name)
    if op.has(Trait.PARAMETRIC | Trait.LINEAR_IN_INPUT):
        return name if name in ("weight", "bias") else None
    return None


def _deviation(op: Op, weight: Value) -> float | None:
    """Of a weight as the operation reads it: two axes of features, in either order, and those of a kernel."""
    extents = [extent for extent in weight.shape or () if isinstance(extent, int)]
    if len(extents) < 2:
        return None
    features, kernel = (extents[-2:], []) if op.kind in _EITHER else (extents[:2], extents[2:])
    return math.sqrt(2.0 / (sum(features) * math.prod(kernel)))


def _origin(value: Value) -> Value | None:
    """The parameter behind casts, transpositions and reshapes."""
    while value.role is Role.RESULT and value.constant:
        op = value.producer
        if op is None or not op.has(Trait.FREE) or op.inputs[0] is None:
            return None
        value = op.inputs[0]
    return value if value.role is Role.PARAMETER else None
