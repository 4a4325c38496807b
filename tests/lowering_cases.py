"""Graphs of one operation and what torch says of it: the material of the lowering's tests."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from rescompile.backends.compile import compile_graph
from rescompile.graph import Graph, Role, Shape, Value, ValueType
from rescompile.kinds import OpKind

K = OpKind
F = torch.nn.functional


class Sketch:
    """A graph in memory with numbers in its parameters, and the torch tensors behind its values."""

    def __init__(self, seed: int = 0) -> None:
        self.graph = Graph("sketch")
        self.generator = torch.Generator().manual_seed(seed)
        self.tensors: dict[str, torch.Tensor] = {}
        self._count = 0

    def input(self, *shape: int, dynamic: Shape | None = None, dtype: torch.dtype = torch.float32) -> Value:
        """A graph input with random contents; `dynamic` is its shape as the graph declares it."""
        name = f"x{len(self.graph.inputs)}"
        self.tensors[name] = self.random(shape, dtype)
        return self.graph.add_input(name, dynamic or tuple(shape), str(dtype).removeprefix("torch."))

    def given(self, tensor: torch.Tensor, dynamic: Shape | None = None) -> Value:
        """A graph input with these contents."""
        name = f"x{len(self.graph.inputs)}"
        self.tensors[name] = tensor
        return self.graph.add_input(name, dynamic or tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))

    def param(self, *shape: int, dtype: torch.dtype = torch.float32, scale: float = 0.3) -> Value:
        """A parameter with random contents."""
        return self.constant(self.random(shape, dtype) * scale)

    def constant(self, tensor: torch.Tensor) -> Value:
        """A parameter with these contents."""
        self._count += 1
        name = f"p{self._count}"
        self.tensors[name] = tensor
        data = tensor.float().numpy().astype("bfloat16") if tensor.dtype == torch.bfloat16 else tensor.numpy()
        return self.graph.add_constant(
            name, tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."), data, Role.PARAMETER
        )

    def op(
        self,
        kind: OpKind,
        inputs: Sequence[Value | None],
        shape: Shape | Sequence[Shape],
        out_dtype: str = "float32",
        /,
        **attrs: Any,
    ) -> Value:
        """An operation's first output."""
        self._count += 1
        shapes = [shape] if not shape or isinstance(shape[0], int | str) else list(shape)
        outputs = [(f"{kind.value}_{self._count}_{i}", ValueType(tuple(s), out_dtype)) for i, s in enumerate(shapes)]
        return self.graph.add_op(kind, inputs, outputs, attrs).output

    def of(self, value: Value) -> torch.Tensor:
        """Contents of an input or parameter."""
        return self.tensors[value.name]

    def random(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        if dtype == torch.bool:
            return torch.rand(tuple(shape), generator=self.generator) > 0.3
        if not dtype.is_floating_point:
            return torch.randint(0, 5, tuple(shape), generator=self.generator, dtype=dtype)
        return torch.randn(tuple(shape), generator=self.generator).to(dtype)

    def run(self, *outputs: Value, target: Any = "cpu") -> Any:
        """Compile and run."""
        self.graph.set_outputs(list(outputs))
        self.graph.commit()
        program = compile_graph(self.graph, target, threads=1, tuning=0)
        return program(*(self.tensors[value.name] for value in self.graph.inputs))


def close(
    got: torch.Tensor | np.ndarray[Any, Any], want: torch.Tensor, *, rtol: float = 1e-5, atol: float = 1e-5
) -> None:
    """Same shape, same dtype, same numbers within a tolerance."""
    found = torch.as_tensor(got)
    assert found.shape == want.shape
    assert found.dtype == want.dtype
    torch.testing.assert_close(found, want, rtol=rtol, atol=atol)


Case = Callable[[Sketch], tuple[Value, torch.Tensor]]
