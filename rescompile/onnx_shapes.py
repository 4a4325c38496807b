"""What is known of an ONNX model's values before it runs: types, small constants, shape arithmetic.

Types come from the file's value_info; where that is missing, from onnx's shape inference over a skeleton of the model
that holds no weights (a model over 2 GB cannot be serialised, and its weights say nothing about shapes). Extents that
onnx gives up on are carried on symbolically by kind.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

from rescompile.graph import Dim, Shape, ValueType
from rescompile.kinds import OpKind, Trait
from rescompile.onnx_ops import dtype_name, is_static

SMALL = 1024  # elements: constants up to this size may hold shapes, axes, scales
UNKNOWN = ValueType(None, None)

PartialShape = tuple[Dim | None, ...]  # None: an extent that nobody has named yet


def declared_type(value: ir.Value) -> tuple[PartialShape | None, str | None]:
    """Shape and dtype as the model declares them; None for each unknown extent."""
    dtype = dtype_name(value.dtype) if isinstance(value.type, ir.TensorType) else None
    shape = value.shape
    if shape is None:
        return None, dtype
    return tuple(extent if isinstance(extent, int) else extent.value for extent in shape.dims), dtype


def literal(value: ir.Value) -> ir.TensorProtocol | None:
    """The tensor of an initializer or of a Constant node, not yet read; None for anything else."""
    if value.const_value is not None:
        return value.const_value
    node = value.producer()
    if node is None or node.op_type != "Constant" or node.domain != "":
        return None
    return constant_tensor(node)


def constant_tensor(node: ir.Node) -> ir.TensorProtocol | None:
    """The tensor that a Constant node holds, whichever of its attributes spells it."""
    for name, attribute in node.attributes.items():
        if name == "value":
            return attribute.as_tensor()
        if name in ("value_float", "value_floats"):
            return ir.tensor(np.asarray(attribute.value, dtype=np.float32))
        if name in ("value_int", "value_ints"):
            return ir.tensor(np.asarray(attribute.value, dtype=np.int64))
    return None


class Facts:
    """Types, small constants and shape arithmetic of a graph's values, gathered in topological order."""

    def __init__(self, model: ir.Model) -> None:
        self.types: dict[ir.Value, ValueType] = {}
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
            tensor = literal(value)
            small = tensor is not None and tensor.size <= SMALL and tensor.dtype is not ir.DataType.STRING
            self._arrays[value] = tensor.numpy() if small and tensor is not None else None
        return self._arrays[value]

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
    return tuple(f"{stem}.{axis}" if extent is None else extent for axis, extent in enumerate(shape))


# ---- shape arithmetic ------------------------------------------------------------------------------------------------


def _shape(facts: Facts, node: ir.Node) -> PartialShape | None:
    source = node.inputs[0]
    shape = facts.type(source).shape if source is not None else None
    if shape is None:
        return None
    start, end = node.attributes.get("start"), node.attributes.get("end")
    return shape[slice(start.value if start else 0, end.value if end else None)]


def _product(extents: Sequence[Dim | None]) -> Dim | None:
    product = 1
    names = [extent for extent in extents if not isinstance(extent, int)]
    for extent in extents:
        product *= extent if isinstance(extent, int) else 1
    if not names:
        return product
    return names[0] if len(names) == 1 and product == 1 else None


def _size(facts: Facts, node: ir.Node) -> PartialShape | None:
    source = node.inputs[0]
    shape = facts.type(source).shape if source is not None else None
    return None if shape is None else (_product(shape),)


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
    return _product((a, b))


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
    return None if vector is None else (_product(vector),)


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


# ---- symbolic extents that onnx's inference loses --------------------------------------------------------------------


def complete(
    kind: OpKind, attrs: dict[str, Any], inputs: Sequence[Shape | None], shape: PartialShape | None
) -> PartialShape | None:
    """Fill in the extents of an operation's output that follow from its operands' by kind."""
    if shape is not None and None not in shape:
        return shape
    first = inputs[0] if inputs else None
    if kind.has(Trait.SHAPE_PRESERVING):
        return merge(shape, first)
    if kind.has(Trait.ELEMENTWISE):
        return merge(shape, broadcast(inputs))
    if shape is not None and first is not None and len(first) == len(shape):
        if kind in (OpKind.CONV, OpKind.FUSED_CONV) and len(inputs) > 1 and inputs[1] is not None:
            return merge(shape, _windowed(first, inputs[1][2:], attrs))
        if kind in (OpKind.MAX_POOL, OpKind.AVG_POOL) and not attrs.get("ceil_mode"):
            return merge(shape, _windowed(first, attrs["kernel"], attrs))
        if kind is OpKind.CONCAT:
            axis = attrs["axis"]
            return merge(shape, tuple(None if i == axis else extent for i, extent in enumerate(first)))
    return shape


def merge(shape: PartialShape | None, other: PartialShape | None) -> PartialShape | None:
    """The first shape, with what the second knows beyond it."""
    if shape is None or other is None or len(shape) != len(other):
        return other if shape is None else shape
    return tuple(b if a is None else a for a, b in zip(shape, other, strict=True))


def broadcast(shapes: Sequence[PartialShape | None]) -> PartialShape | None:
    """Extents of an elementwise result; None for one that the operands leave open."""
    known = [shape for shape in shapes if shape is not None]
    if not known or len(known) < len(shapes):
        return None
    rank = max(len(shape) for shape in known)
    result: list[Dim | None] = []
    for axis in range(-rank, 0):
        extents = {shape[axis] for shape in known if len(shape) >= -axis} - {1}
        result.append(extents.pop() if len(extents) == 1 else None if extents else 1)
    return tuple(result)


def reshaped(shape: Shape, target: PartialShape, *, zeros: bool) -> PartialShape:
    """Reshape's target with 0 (keep) and −1 (the rest) resolved."""
    extents = [
        shape[axis] if extent == 0 and not zeros and axis < len(shape) else extent for axis, extent in enumerate(target)
    ]
    if -1 not in extents:
        return tuple(extents)
    rest = list(shape)
    for extent in extents:
        if isinstance(extent, str) and extent in rest:
            rest.remove(extent)
        elif not isinstance(extent, int):
            return tuple(None if extent == -1 else extent for extent in extents)
    known = _product([extent for extent in extents if isinstance(extent, int) and extent != -1])
    total = _product([extent for extent in rest if isinstance(extent, int)])
    names: list[Dim | None] = [extent for extent in rest if isinstance(extent, str)]
    factor = total // known if isinstance(total, int) and isinstance(known, int) and known else 0
    missing = _product([*names, factor]) if factor else None
    return tuple(missing if extent == -1 else extent for extent in extents)


def _windowed(x: Shape, kernel: Sequence[Dim], attrs: dict[str, Any]) -> PartialShape:
    """out = (in + pads − dilation·(kernel − 1) − 1) // stride + 1, written the same way wherever it is the same."""
    spatial = len(x) - 2
    stride, pads = attrs["stride"], attrs["pads"]
    dilation = attrs.get("dilation") or (1,) * spatial
    result: list[Dim | None] = [x[0], None]
    for axis in range(spatial):
        extent, size = x[axis + 2], kernel[axis]
        if not isinstance(size, int):
            result.append(None)
            continue
        margin = pads[axis] + pads[axis + spatial] - dilation[axis] * (size - 1) - 1
        if isinstance(extent, int):
            result.append((extent + margin) // stride[axis] + 1)
        elif stride[axis] == 1:
            result.append(extent if margin == -1 else f"({extent}{margin + 1:+d})")
        else:
            result.append(f"(({extent}{margin:+d})//{stride[axis]}+1)")
    return tuple(result)


# ---- onnx's own inference, over a skeleton ---------------------------------------------------------------------------

# Operators outside the standard that have, for inference, the meaning of a standard one on their first inputs, and the
# outputs that have the type of the first.
_STAND_INS: dict[str, tuple[str, int, tuple[int, ...]]] = {
    "SkipLayerNormalization": ("Identity", 1, (0, 3)),
    "SkipSimplifiedLayerNormalization": ("Identity", 1, (0, 3)),
    "SimplifiedLayerNormalization": ("Identity", 1, (0,)),
    "EmbedLayerNormalization": ("", 0, ()),
    "BiasGelu": ("Add", 2, (0,)),
    "FastGelu": ("Identity", 1, (0,)),
    "QuickGelu": ("Identity", 1, (0,)),
    "Gelu": ("Identity", 1, (0,)),
    "FusedConv": ("Conv", 3, (0,)),
    "FusedMatMul": ("MatMul", 2, (0,)),
}


def infer(model: ir.Model) -> dict[str, tuple[PartialShape | None, str | None]]:
    """Types of every value of the main graph that onnx can infer, by name. The model stays as it is."""
    skeleton = onnx.ModelProto(ir_version=max(model.ir_version, 8))
    for domain, version in model.opset_imports.items():
        skeleton.opset_import.add(domain=domain, version=version)
    graph = skeleton.graph
    graph.name = "skeleton"
    for value in model.graph.inputs:
        ir.serde.serialize_value_into(graph.input.add(), value)
    listed = set(model.graph.inputs)
    for value in model.graph.initializers.values():
        if value.const_value is not None:
            _constant(graph, value, value.const_value, listed=value in listed)
    for node in model.graph:
        _node(graph, node)
    for value in model.graph.outputs:
        ir.serde.serialize_value_into(graph.output.add(), value)
    for function in model.functions.values():
        ir.serde.serialize_function_into(skeleton.functions.add(), function)
    try:
        inferred = onnx.shape_inference.infer_shapes(skeleton, check_type=False, strict_mode=False, data_prop=True)
    except (onnx.shape_inference.InferenceError, ValueError, RuntimeError):
        return {}
    types = {}
    for info in (*inferred.graph.value_info, *inferred.graph.output):
        if info.type.HasField("tensor_type"):
            types[info.name] = _read_type(info.type.tensor_type)
    return types


def _constant(graph: onnx.GraphProto, value: ir.Value, tensor: ir.TensorProtocol, *, listed: bool) -> None:
    """Small integers and scales are data that shapes follow from; all others only have a type."""
    if tensor.size <= SMALL and not isinstance(tensor, ir.ExternalTensor):
        proto = graph.initializer.add()
        ir.serde.serialize_tensor_into(proto, tensor)
        proto.name = value.name or ""
    elif not listed:
        info = graph.input.add(name=value.name or "")
        info.type.tensor_type.elem_type = tensor.dtype.value
        info.type.tensor_type.shape.SetInParent()
        for extent in tensor.shape.numpy():
            info.type.tensor_type.shape.dim.add(dim_value=int(extent))


def _node(graph: onnx.GraphProto, node: ir.Node) -> None:
    if node.op_type == "Constant" and node.domain == "":
        tensor = constant_tensor(node)
        if tensor is not None and tensor.size > SMALL:
            _constant(graph, node.outputs[0], tensor, listed=False)
            return
    op_type, domain, inputs = node.op_type, node.domain, list(node.inputs)
    outputs = [[value.name or "" for value in node.outputs]]
    if op_type in _STAND_INS and (domain == "com.microsoft" or op_type == "SimplifiedLayerNormalization"):
        op_type, count, same = _STAND_INS[op_type]
        domain, inputs = "", inputs[:count]
        outputs = [[node.outputs[i].name or ""] for i in same if i < len(node.outputs) and node.outputs[i].name]
    for names in outputs:
        proto = graph.node.add(op_type=op_type, domain=domain, overload=node.overload)
        proto.input.extend("" if value is None else value.name or "" for value in inputs)
        proto.output.extend(names)
        for name, attribute in node.attributes.items():
            if name not in ("activation", "activation_params") or domain:
                ir.serde.serialize_attribute_into(proto.attribute.add(), attribute)


def _read_type(tensor: onnx.TypeProto.Tensor) -> tuple[PartialShape | None, str | None]:
    dtype = dtype_name(ir.DataType(tensor.elem_type)) if tensor.elem_type else None
    if not tensor.HasField("shape"):
        return None, dtype
    shape = []
    for extent in tensor.shape.dim:
        known = extent.WhichOneof("value")
        named = extent.dim_param if known == "dim_param" and not extent.dim_param.startswith("unk__") else None
        shape.append(extent.dim_value if known == "dim_value" else named)
    return tuple(shape), dtype


__all__ = ["SMALL", "Facts", "complete", "constant_tensor", "declared_type", "infer", "is_static", "literal"]
