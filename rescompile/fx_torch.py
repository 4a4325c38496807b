"""What the rules that write operations back call torch through.

A rule calls ATen operations through a `Torch`: with fx nodes it makes nodes, with tensors it computes. So the same
lines emit native nodes for inserted operations and are the reference implementation of the fused ones.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch

from rescompile.errors import GraphError
from rescompile.graph import Attrs, Shape

aten = torch.ops.aten


class Torch(Protocol):
    """Calls torch, and tells what is known of values."""

    def __call__(self, target: Any, *args: Any, **kwargs: Any) -> Any:
        """The result of a call: a node, or a tensor."""
        ...

    def shape(self, value: Any) -> Shape | None:
        """Shape of an operand."""
        ...

    def dtype(self, value: Any) -> str | None:
        """Dtype of an operand."""
        ...

    def out_shape(self, index: int = 0) -> Sequence[Any]:
        """Shape that the operation's output shall have, as arguments for torch."""
        ...

    def out_dtype(self) -> torch.dtype | None:
        """Dtype that the operation's output shall have."""
        ...


Emitter = Callable[[Torch, list[Any], Attrs], Any]


class Eager:
    """Computes: the arguments are tensors."""

    def __call__(self, target: Any, *args: Any, **kwargs: Any) -> Any:
        return target(*args, **kwargs)

    def shape(self, value: Any) -> Shape | None:
        return tuple(value.shape)

    def dtype(self, value: Any) -> str | None:
        return str(value.dtype)[6:]

    def out_shape(self, index: int = 0) -> Sequence[Any]:
        raise GraphError("An operation whose result's shape is not a function of its operands cannot be computed here.")

    def out_dtype(self) -> torch.dtype | None:
        return None
