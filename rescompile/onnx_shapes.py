"""What is known of an ONNX model's values before it runs: types, small constants, shape arithmetic.

Types come from the file's value_info, and from `onnx_infer` where that is missing. Shape arithmetic (Shape, Gather,
Concat feeding a Reshape) is followed symbolically, so that a target shape is known although nodes compute it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, cast

import numpy as np
import onnx_ir as ir

from rescompile.errors import GraphError
from rescompile.graph import Dim, Shape, ValueType
from rescompile.onnx_infer import infer
from rescompile.onnx_literals import evaluate
from rescompile.onnx_ops import SMALL, dtype_name, is_static, literal
from rescompile.result_types import product
from rescompile.values import PartialShape

UNKNOWN = ValueType(None, None)


def declared_type(value: ir.Value) -> tuple[PartialShape | None, str | None]:
    """Shape and dtype as the model declares them; None for each unknown extent."""
    dtype = dtype_name(value.dtype) if isinstance(value.type, ir.TensorType) else None
    shape = value.shape
    if shape is None:
        return None, dtype
    dims = shape.dims
    for extent in dims:
        if not isinstance(extent, int):
            return tuple(extent if isinstance(extent, int) else extent.value for extent in dims), dtype
    return cast("PartialShape", dims), dtype


class Facts:
    """Types, small constants and shape arithmetic of a graph's values, gathered in topological order."""

    def __init__(self, model: ir.Model) -> None:
        self.types: dict[ir.Value, ValueType] = {}
        self.literals: set[ir.Value] = set()  # values that follow from literals alone
        self.vectors: dict[ir.Value, PartialShape] = {}  # integer vectors known from constants and shapes
        self._model = model
        self._inferred: dict[str, tuple[PartialShape | None, str | None]] | None = None
        self._arrays: dict[ir.Value, np.ndarray[Any, Any] | None] = {}

    def type(self, value: ir.Value) -> ValueType:
        """Shape (every extent an int or a name) and dtype."""
        known = self.types.get(value)
        if known is None:
            shape, dtype = self.partial_type(value)
            known = self.types[value] = ValueType(name_extents(shape, value.name or "value"), dtype)
        return known

    def partial_type(self, value: ir.Value) -> tuple[PartialShape | None, str | None]:
        """Declared shape and dtype, completed by inference where they are missing."""
        shape, dtype = declared_type(value)
        if shape is not None and dtype is not None:
            return shape, dtype
        tensor = literal(value)
        if tensor is not None:
            return tuple(int(extent) for extent in tensor.shape.numpy()), dtype_name(tensor.dtype)
        if isinstance(value.type, (ir.SequenceType, ir.OptionalType)) or value.name is None:
            return None, None
        if self._inferred is None:
            self._inferred = infer(self._model)
        inferred_shape, inferred_dtype = self._inferred.get(value.name, (None, None))
        return (inferred_shape if shape is None else shape), (inferred_dtype if dtype is None else dtype)

    def array(self, value: ir.Value | None) -> np.ndarray[Any, Any] | None:
        """Contents of a small constant, None for anything else."""
        if value is None:
            return None
        if value not in self._arrays:
            self._arrays[value] = self._small_array(value)
        return self._arrays[value]

    def _small_array(self, value: ir.Value) -> np.ndarray[Any, Any] | None:
        tensor = literal(value)
        if tensor is not None:
            return tensor.numpy() if tensor.size <= SMALL and tensor.dtype is not ir.DataType.STRING else None
        if value not in self.literals:
            return None
        shape = self.type(value).shape
        if shape is None or not is_static(shape) or math.prod(int(extent) for extent in shape) > SMALL:
            return None
        try:
            return evaluate(value, self.type)
        except GraphError:
            return None

    def vector(self, value: ir.Value | None) -> PartialShape | None:
        """The integers that a value is known to hold (extents by name), None where it is not shape arithmetic."""
        if value is None:
            return None
        known = self.vectors.get(value)
        if known is not None:
            return known
        array = self.array(value)
        if array is None or array.ndim > 1 or array.dtype.kind not in "iub":
            return None
        self.vectors[value] = vector = tuple(int(item) for item in array.reshape(-1))
        return vector

    def integers(self, value: ir.Value | None) -> tuple[int, ...] | None:
        """As `vector`, None as well when an extent is symbolic."""
        vector = self.vector(value)
        if vector is None or not all(isinstance(item, int) for item in vector):
            return None
        return tuple(item for item in vector if isinstance(item, int))

    def follow(self, node: ir.Node) -> None:
        """Note what the node's output holds when it is shape arithmetic."""
        rule = _ARITHMETIC.get(node.op_type)
        if rule is None or node.domain != "":
            return
        result = rule(self, node)
        if result is not None:
            self.vectors[node.outputs[0]] = result


def name_extents(shape: PartialShape | None, stem: str) -> Shape | None:
    """The shape with a name of its own for each extent that nobody knows."""
    if shape is None:
        return None
    if None not in shape:
        return cast("Shape", shape)
    return tuple(f"{stem}.{axis}" if extent is None else extent for axis, extent in enumerate(shape))


# ---- shape arithmetic ------------------------------------------------------------------------------------------------


def _shape(facts: Facts, node: ir.Node) -> PartialShape | None:
    source = node.inputs[0]
    shape = facts.type(source).shape if source is not None else None
    if shape is None:
        return None
    start, end = node.attributes.get("start"), node.attributes.get("end")
    return shape[slice(start.value if start else 0, end.value if end else None)]


def _size(facts: Facts, node: ir.Node) -> PartialShape | None:
    source = node.inputs[0]
    shape = facts.type(source).shape if source is not None else None
    return None if shape is None else (product(shape),)


def _gather(facts: Facts, node: ir.Node) -> PartialShape | None:
    data, indices = facts.vectors.get(node.inputs[0]) if node.inputs[0] else None, facts.array(node.inputs[1])
    if data is None:
        data = facts.vector(node.inputs[0])
    if data is None or indices is None or indices.ndim > 1:
        return None
    picked = [int(index) for index in indices.reshape(-1)]
    if any(not -len(data) <= index < len(data) for index in picked):
        return None
    return tuple(data[index] for index in picked)


def _concat(facts: Facts, node: ir.Node) -> PartialShape | None:
    parts = [facts.vector(value) for value in node.inputs]
    if any(part is None for part in parts) or sum(len(part or ()) for part in parts) > SMALL:
        return None
    return tuple(extent for part in parts if part is not None for extent in part)


def _same(facts: Facts, node: ir.Node) -> PartialShape | None:
    kind = facts.type(node.outputs[0]) if node.op_type == "Cast" else UNKNOWN
    if kind.dtype is not None and kind.dtype.startswith(("float", "bfloat")):
        return None
    return facts.vector(node.inputs[0])


def _slice(facts: Facts, node: ir.Node) -> PartialShape | None:
    data = facts.vector(node.inputs[0])
    if data is None:
        return None
    if "starts" in node.attributes:
        bounds = [node.attributes[name].value for name in ("starts", "ends")]
    else:
        bounds = [facts.integers(value) for value in node.inputs[1:3]]
    steps: Sequence[int] | None = (1,)
    if len(node.inputs) > 4 and node.inputs[4] is not None:
        steps = facts.integers(node.inputs[4])
    if any(bound is None or len(bound) != 1 for bound in (*bounds, steps)):
        return None
    return data[slice(bounds[0][0], bounds[1][0], steps[0] if steps else 1)]


def _elementwise(rule: Callable[..., Dim | None]) -> Callable[[Facts, ir.Node], PartialShape | None]:
    def apply(facts: Facts, node: ir.Node) -> PartialShape | None:
        operands = [facts.vector(value) for value in node.inputs]
        if any(operand is None for operand in operands):
            return None
        columns = [operand for operand in operands if operand is not None]
        width = max(len(column) for column in columns)
        if any(len(column) not in (1, width) for column in columns):
            return None
        return tuple(rule(*(column[i if len(column) > 1 else 0] for column in columns)) for i in range(width))

    return apply


def _fold(compute: Callable[[int, int], int], neutral: int | None) -> Callable[[Dim | None, Dim | None], Dim | None]:
    def rule(a: Dim | None, b: Dim | None) -> Dim | None:
        if isinstance(a, int) and isinstance(b, int):
            return compute(a, b)
        return a if neutral is not None and b == neutral else None

    return rule


def _multiply(a: Dim | None, b: Dim | None) -> Dim | None:
    return product((a, b))


def _divide(a: int, b: int) -> int:
    return int(a / b) if b else 0


def _equal(a: Dim | None, b: Dim | None) -> Dim | None:
    if isinstance(a, int) and isinstance(b, int):
        return int(a == b)
    extents = [extent for extent in (a, b) if isinstance(extent, int)]
    return 0 if extents and extents[0] < 0 and None not in (a, b) else None  # an extent is never negative


def _where(condition: Dim | None, a: Dim | None, b: Dim | None) -> Dim | None:
    return (a if condition else b) if isinstance(condition, int) else None


def _filled(facts: Facts, node: ir.Node) -> PartialShape | None:
    length = facts.integers(node.inputs[0])
    if length is None or len(length) > 1 or (length and length[0] > SMALL):
        return None
    value = node.attributes.get("value")
    array = np.zeros(1, np.float32) if value is None else value.as_tensor().numpy()
    return (int(array.reshape(-1)[0]),) * (length[0] if length else 1) if array.dtype.kind in "iu" else None


def _expand(facts: Facts, node: ir.Node) -> PartialShape | None:
    vector, target = facts.vector(node.inputs[0]), facts.integers(node.inputs[1])
    if vector is None or target is None or len(target) != 1 or len(vector) not in (1, target[0]):
        return vector if target == (1,) else None
    return vector * target[0] if len(vector) == 1 else vector


def _reduce_prod(facts: Facts, node: ir.Node) -> PartialShape | None:
    vector = facts.vector(node.inputs[0])
    return None if vector is None else (product(vector),)


_ARITHMETIC: dict[str, Callable[[Facts, ir.Node], PartialShape | None]] = {
    "Shape": _shape,
    "Size": _size,
    "Gather": _gather,
    "Concat": _concat,
    "Unsqueeze": _same,
    "Squeeze": _same,
    "Reshape": _same,
    "Identity": _same,
    "Cast": _same,
    "Slice": _slice,
    "Add": _elementwise(_fold(lambda a, b: a + b, 0)),
    "Sub": _elementwise(_fold(lambda a, b: a - b, 0)),
    "Mul": _elementwise(_multiply),
    "Div": _elementwise(_fold(_divide, 1)),
    "Max": _elementwise(_fold(max, None)),
    "Min": _elementwise(_fold(min, None)),
    "Equal": _elementwise(_equal),
    "Where": _elementwise(_where),
    "ConstantOfShape": _filled,
    "Expand": _expand,
    "ReduceProd": _reduce_prod,
}
