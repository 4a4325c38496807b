"""What a graph computes in exact-enough arithmetic: the same operations, every float of them in 64 bits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from rescompile.errors import GraphError
from rescompile.fx_graph import FxGraph
from rescompile.fx_twin import twin
from rescompile.graph import Graph
from rescompile.kinds import Trait

_NARROW = (torch.float32, torch.float16, torch.bfloat16)

_COPIES = {
    getattr(torch.ops.aten, name).default
    for name in ("alias", "clone", "contiguous", "detach", "lift_fresh", "lift_fresh_copy", "_to_copy")
}


class _Widened(TorchDispatchMode):
    """Calls every operator on float64 where the caller says a narrower float, as operand or as the result's type."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _COPIES and "dtype" not in (kwargs or {}):
            return func(*args, **(kwargs or {}))
        return func(*tree_map(_wide, args), **tree_map(_wide, kwargs or {}))


def _wide(item: Any) -> Any:
    if isinstance(item, torch.Tensor):
        return item.double() if item.dtype in _NARROW else item
    return torch.float64 if isinstance(item, torch.dtype) and item in _NARROW else item


def reference_outputs(
    graph: Graph, inputs: Mapping[str, np.ndarray[Any, Any]]
) -> dict[str, np.ndarray[Any, Any]] | None:
    """The outputs by name, computed in float64 throughout; None where torch has no such operation, or it draws.

    Casts to a narrower float are none here, so that norms and softmaxes which compute in float32 do not round either.
    """
    if any(op.has(Trait.RANDOM) for op in graph):
        return None
    try:
        with torch.no_grad():
            module = None if isinstance(graph, FxGraph) else twin(graph)
            with _Widened():
                if module is None:
                    return {name: np.asarray(array) for name, array in graph.run(inputs).items()}
                return {name: tensor.numpy() for name, tensor in module.run(inputs)[0].items()}
    except (GraphError, RuntimeError):
        return None
