"""Making ONNX nodes: constants of the right type, dynamic shapes, and attributes that a function body refers to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import onnx_ir as ir

from rescompile.errors import GraphError
from rescompile.graph import Attrs, Shape, ValueType
from rescompile.kinds import OpKind
from rescompile.onnx_ops import Arg
from rescompile.values import numpy_dtype

HALF = ("float16", "bfloat16")
FLOATS = (*HALF, "float32", "float64", None)  # None: unknown, and then most likely one of these


@dataclass(frozen=True, slots=True)
class Ref:
    """An attribute of the function being written, with the value that this call gives it."""

    name: str
    value: Any


@dataclass(frozen=True, slots=True)
class Request:
    """One logical operation to be written."""

    kind: OpKind
    args: Sequence[Arg | None]
    attrs: Attrs
    outputs: Sequence[ValueType]

    def attr(self, name: str) -> Any:
        """An attribute, by the kind's default where it is not set. Attributes beyond the kind's are None when unset."""
        return self.attrs[name] if name in self.attrs else self.kind.spec.attrs.get(name)

    def arg(self, index: int) -> Arg:
        """An operand that must be there."""
        arg = self.args[index] if index < len(self.args) else None
        if arg is None:
            raise GraphError(
                f"{self.kind.value} has no operand {self.kind.spec.operands[index]}: ONNX cannot leave it out."
            )
        return arg

    def maybe(self, index: int) -> Arg | None:
        """An operand, None when absent."""
        return self.args[index] if index < len(self.args) else None

    @property
    def out(self) -> ValueType:
        """Type of the first output."""
        return self.outputs[0] if self.outputs else ValueType(None, None)


def target_of(r: Request) -> Shape:
    """The shape of the output; GraphError where it is unknown."""
    if r.out.shape is None:
        raise GraphError(f"The shape of a {r.kind.value}'s output is unknown, so its target cannot be written.")
    return r.out.shape


class Builder:
    """Collects the nodes that stand for one operation, at one opset."""

    def __init__(
        self,
        opset: int,
        symbol: Callable[[str], tuple[ir.Value, int] | None] = lambda _: None,
        call: Callable[[Builder, Request], list[ir.Value]] | None = None,
    ) -> None:
        self.opset = opset
        self.nodes: list[ir.Node] = []
        self.baked: dict[str, Any] = {}  # attributes whose value a function body had to spell out
        self.optional: list[ir.Value] = []  # outputs that a node goes without where nobody reads them
        self.typed = False  # whether the nodes hold constants of the operands' element type
        self._symbol = symbol
        self.call = call  # writes a fused kind as a call of a function

    def node(
        self, op_type: str, inputs: Sequence[ir.Value | Arg | None], outputs: int = 1, domain: str = "", **attrs: Any
    ) -> ir.Value:
        """A node; its first output. Attributes that are None are left to their defaults."""
        return self.many(op_type, inputs, outputs, domain, **attrs)[0]

    def many(
        self, op_type: str, inputs: Sequence[ir.Value | Arg | None], outputs: int, domain: str = "", **attrs: Any
    ) -> list[ir.Value]:
        """A node; all its outputs."""
        values = [item.value if isinstance(item, Arg) else item for item in inputs]
        while values and values[-1] is None:
            values.pop()
        attributes = [_attribute(name, value) for name, value in attrs.items() if value is not None]
        node = ir.Node(domain, op_type, values, attributes, num_outputs=outputs)
        self.nodes.append(node)
        return list(node.outputs)

    def const(self, array: np.ndarray[Any, Any] | Sequence[int]) -> ir.Value:
        """A Constant node; a list of integers is an int64 vector."""
        data = array if isinstance(array, np.ndarray) else np.asarray(array, dtype=np.int64)
        return self.node("Constant", [], value=ir.tensor(data))

    def like(self, value: float, arg: Arg | str | None) -> ir.Value:
        """A scalar of the operand's element type."""
        dtype = arg.dtype if isinstance(arg, Arg) else arg
        self.typed = True
        return self.const(np.asarray(value, dtype=numpy_dtype(dtype or "float32")))

    def filled(self, value: float, shape: Sequence[int], dtype: str | None) -> ir.Value:
        """A tensor of one value."""
        self.typed = True
        return self.const(np.full(tuple(shape), value, dtype=numpy_dtype(dtype or "float32")))

    def bake(self, value: Any) -> Any:
        """The number behind an attribute that ONNX cannot refer to here."""
        if isinstance(value, Ref):
            self.baked[value.name] = value.value
            return value.value
        return value

    def since(self, opset: int, what: str) -> None:
        """GraphError when the model's opset is older than what an operation needs."""
        if self.opset < opset:
            raise GraphError(
                f"{what} needs opset {opset} and the model has {self.opset}: "
                "convert the model with onnx.version_converter first."
            )

    def axes(
        self, op_type: str, x: ir.Value | Arg, axes: Sequence[int], since: int, keepdims: bool | None = None
    ) -> ir.Value:
        """An operator whose axes are an attribute before opset `since` and an input from it on."""
        keep = None if keepdims is None else int(keepdims)
        if self.opset < since:
            return self.node(op_type, [x], axes=tuple(axes), keepdims=keep)
        return self.node(op_type, [x, self.const(list(axes))], keepdims=keep)

    def extent(self, name: str, sources: Sequence[Arg | None]) -> ir.Value:
        """A symbolic extent as an int64 vector of one, read off an operand or a graph input that has it."""
        found = next(
            (
                (arg.value, arg.shape.index(name))
                for arg in sources
                if arg is not None and arg.shape is not None and name in arg.shape
            ),
            None,
        ) or self._symbol(name)
        if found is None:
            raise GraphError(
                f"The extent '{name}' is not one of an operand's or a graph input's, so it cannot be written: "
                "give the model static shapes, or name its inputs' dimensions."
            )
        value, axis = found
        return self.node("Gather", [self.node("Shape", [value]), self.const([axis])], axis=0)

    def shape(self, shape: Shape, sources: Sequence[Arg | None]) -> ir.Value:
        """A shape as an int64 vector."""
        if all(isinstance(extent, int) for extent in shape):
            return self.const([int(extent) for extent in shape])
        parts = [self.const([extent]) if isinstance(extent, int) else self.extent(extent, sources) for extent in shape]
        return parts[0] if len(parts) == 1 else self.node("Concat", parts, axis=0)


def _attribute(name: str, value: Any) -> ir.Attr:
    if isinstance(value, Ref):
        return ir.RefAttr(name, value.name, _plain_attribute(name, value.value).type)
    return _plain_attribute(name, value)


def _plain_attribute(name: str, value: Any) -> ir.Attr:
    if isinstance(value, bool):
        return ir.AttrInt64(name, int(value))
    if isinstance(value, int):
        return ir.AttrInt64(name, value)
    if isinstance(value, float):
        return ir.AttrFloat32(name, value)
    if isinstance(value, str):
        return ir.AttrString(name, value)
    if isinstance(value, (tuple, list)):
        if any(isinstance(item, str) for item in value):
            return ir.AttrStrings(name, value)
        if any(isinstance(item, float) for item in value):
            return ir.AttrFloat32s(name, value)
        return ir.AttrInt64s(name, value)
    return ir.AttrTensor(name, value)


Writer: TypeAlias = Callable[[Builder, Request], "ir.Value | list[ir.Value]"]
