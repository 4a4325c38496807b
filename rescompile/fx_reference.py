"""What a graph computes, in arithmetic exact enough to judge others by: its own operations, every float in 64 bits."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from rescompile.costs import tensor_size
from rescompile.errors import GraphError
from rescompile.fx_graph import FxGraph
from rescompile.fx_run import run_nodes
from rescompile.fx_tree import copy_module, device_of, to_torch
from rescompile.fx_twin import Call, GraphTwin
from rescompile.graph import Graph
from rescompile.kinds import Trait

Arrays: TypeAlias = Mapping[str, np.ndarray[Any, Any]]
Run: TypeAlias = Callable[[Arrays], list[torch.Tensor]]

_NARROW = (torch.float32, torch.float16, torch.bfloat16)
# They compute nothing: what is handed over keeps its type until something is done with it.
_COPIES = {
    getattr(torch.ops.aten, name).default
    for name in ("alias", "clone", "contiguous", "detach", "lift_fresh", "lift_fresh_copy", "_to_copy")
}
_LARGEST = 1 << 32  # bytes of constants that a twin is made of


class Reference:
    """Runs a graph in float64 throughout.

    Casts to a narrower float are none here, so that norms and softmaxes which compute in float32 do not round either.
    """

    def __init__(self, graph: Graph) -> None:
        self._graph = graph
        self._run: Run | None = None
        size = sum(tensor_size(value)[1] for value in graph.values if value.producer is None)
        # Random numbers of another type are other numbers.
        self._runs = size <= _LARGEST and not any(op.has(Trait.RANDOM) for op in graph)

    def outputs(self, inputs: Arrays) -> list[np.ndarray[Any, Any]] | None:
        """The outputs in order; None where torch has no such operation, or the graph draws random numbers."""
        if not self._runs:
            return None
        try:
            with torch.no_grad():
                self._run = self._run or (_of_fx(self._graph) if isinstance(self._graph, FxGraph) else _of(self._graph))
                return [tensor.numpy() for tensor in self._run(inputs)]
        except (GraphError, RuntimeError):
            self._runs = False
            return None


def _of_fx(graph: FxGraph) -> Run:
    module = copy_module(graph.module, {}, _wide)

    def run(inputs: Arrays) -> list[torch.Tensor]:
        arguments = graph.arguments({name: _wide(to_torch(array)) for name, array in inputs.items()})
        with _Widened():  # type: ignore[no-untyped-call]
            return graph.results(run_nodes(module, arguments))

    return run


def _of(graph: Graph) -> Run:
    twin = _WideTwin(graph).double()

    def run(inputs: Arrays) -> list[torch.Tensor]:
        with _Widened():  # type: ignore[no-untyped-call]
            return list(twin.run(inputs)[0].values())

    return run


class _WideCall(Call):
    def __call__(self, target: Any, *args: Any, **kwargs: Any) -> Any:
        return super().__call__(target, *tree_map(_wide, args), **tree_map(_wide, kwargs))


class _WideTwin(GraphTwin):
    def caller(self) -> Call:
        return _WideCall(device_of(self))


class _Widened(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Calls every operator on float64 where the caller says a narrower float, as operand or as the result's type."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _COPIES and "dtype" not in (kwargs or {}):
            return func(*args, **(kwargs or {}))
        return func(*tree_map(_wide, args), **tree_map(_wide, kwargs or {}))


def _wide(item: Any) -> Any:
    if isinstance(item, torch.Tensor):
        return item.double() if item.dtype in _NARROW else item
    return torch.float64 if isinstance(item, torch.dtype) and item in _NARROW else item
