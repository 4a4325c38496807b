"""A node being read: its inputs and attributes through defaults, and what is known of the values around it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import numpy as np
import onnx_ir as ir

from rescompile.graph import Attrs, Shape, ValueType
from rescompile.kinds import OpKind
from rescompile.onnx_ops import Reading, Step
from rescompile.onnx_shapes import Facts
from rescompile.values import PartialShape

STATIC_ONLY = "its {} is computed at run time"


class Site:
    """A node being read, with what is known around it."""

    __slots__ = ("constants", "facts", "node", "opset")

    def __init__(self, node: ir.Node, opset: int, facts: Facts, constants: set[ir.Value]) -> None:
        self.node = node
        self.opset = opset
        self.facts = facts
        self.constants = constants  # values that do not depend on the graph's inputs

    def input(self, index: int) -> ir.Value | None:
        """An input, None when absent."""
        return self.node.inputs[index] if index < len(self.node.inputs) else None

    def inputs(self, count: int) -> list[ir.Value | None]:
        """The first `count` inputs, None where absent."""
        return [self.input(index) for index in range(count)]

    def has(self, index: int) -> bool:
        """Whether the input is present."""
        return self.input(index) is not None

    def attr(self, name: str, default: Any = None) -> Any:
        """An attribute, floats in their shortest spelling (ONNX stores 1e-5 as 9.99999974e-06)."""
        attribute = self.node.attributes.get(name)
        if attribute is None:
            return default
        value = attribute.value
        return shortest(value) if isinstance(value, float) else value

    def shape(self, index: int) -> Shape | None:
        """Shape of an input."""
        value = self.input(index)
        return None if value is None else self.facts.type(value).shape

    def rank(self, index: int = 0) -> int | None:
        """Rank of an input."""
        shape = self.shape(index)
        return None if shape is None else len(shape)

    def dtype(self, index: int = 0) -> str | None:
        """Dtype of an input."""
        value = self.input(index)
        return None if value is None else self.facts.type(value).dtype

    def out_shape(self, index: int = 0) -> PartialShape | None:
        """Shape of an output, extents unknown to onnx as None."""
        return self.facts.partial_type(self.node.outputs[index])[0]

    def named(self) -> Shape | None:
        """Shape of the first output, with a name for each extent."""
        return self.facts.type(self.node.outputs[0]).shape

    def array(self, index: int) -> np.ndarray[Any, Any] | None:
        """Contents of a small constant input."""
        return self.facts.array(self.input(index))

    def number(self, index: int) -> float | None:
        """Contents of a constant input of one element."""
        array = self.array(index)
        return float(array.reshape(-1)[0]) if array is not None and array.size == 1 else None

    def integers(self, index: int) -> tuple[int, ...] | None:
        """Contents of an input of known integers."""
        return self.facts.integers(self.input(index))

    def vector(self, index: int) -> PartialShape | None:
        """Contents of an input of integers and extents."""
        return self.facts.vector(self.input(index))

    def constant(self, index: int) -> bool:
        """Whether an input does not depend on the graph's inputs."""
        return self.input(index) in self.constants

    def used(self, index: int) -> bool:
        """Whether anything reads that output."""
        outputs = self.node.outputs
        return index < len(outputs) and (bool(outputs[index].uses()) or outputs[index].is_graph_output())

    def axis(self, default: int | None = None, name: str = "axis") -> int | None:
        """The axis attribute, non-negative where the rank is known."""
        axis: int | None = self.attr(name, default)
        rank = self.rank()
        return axis + rank if axis is not None and axis < 0 and rank is not None else axis

    def one(self, kind: OpKind, inputs: Sequence[Any], **attrs: Any) -> Step:
        """The one operation that the node's first output is."""
        return Step(kind, inputs, attrs, (0,))


class Steps(list[Step]):
    """The operations that one node is read as, in order; the last ones produce the node's outputs."""

    def add(
        self, kind: OpKind, inputs: Sequence[Any], attrs: Attrs | None = None, type: ValueType | None = None
    ) -> Step:
        """One more operation. `type` of its result, where that does not follow from the operands'."""
        self.append(Step(kind, inputs, dict(attrs or {})))
        if type is not None:
            self[-1].type = type
        return self[-1]

    def ending(self, *outputs: int) -> list[Step]:
        """The steps, of which the last one produces these outputs of the node."""
        self[-1].outputs = outputs
        return self


def shortest(value: float) -> float:
    """The shortest decimal that is the same float32."""
    return float(str(np.float32(value)))


Reader: TypeAlias = Callable[[Site], Reading]
