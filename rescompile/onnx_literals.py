"""Values that a model computes from literals alone: they are presented as constants and computed when asked for.

Exporters spell a zero bias as Expand(CastLike(0), Shape(weight)), and a causal mask as Trilu(ConstantOfShape(...)).
Nothing that comes from a weight is a literal: weights stay visible, whatever is done to them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnx_ir as ir

from rescompile.errors import GraphError
from rescompile.graph import ValueType
from rescompile.onnx_ops import literal
from rescompile.values import numpy_dtype

if TYPE_CHECKING:
    from rescompile.onnx_shapes import Facts

_DRAWN = ("RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Bernoulli", "Multinomial")


def is_literal(node: ir.Node, facts: Facts) -> bool:
    """Whether the node's outputs follow from literals alone."""
    if node.domain != "":
        return False
    if node.op_type == "Constant":
        return True
    if node.op_type == "ConstantOfShape":
        return facts.integers(node.inputs[0]) is not None
    if node.op_type == "Shape":
        shape = facts.type(node.inputs[0]).shape if node.inputs[0] is not None else None
        return shape is not None and all(isinstance(extent, int) for extent in shape)
    inputs = [value for value in node.inputs if value is not None]
    if node.op_type == "CastLike":
        inputs = inputs[:1]
    if not inputs or not all(value in facts.literals for value in inputs):
        return False
    nested = any(a.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS) for a in node.attributes.values())
    return node.op_type not in _DRAWN and not nested


def evaluate(value: ir.Value, type_of: Callable[[ir.Value], ValueType | None]) -> np.ndarray[Any, Any]:
    """Contents of a literal. `type_of`: what is known of the values that Shape and CastLike nodes ask about.

    GraphError when a node on the way has no reference implementation.
    """
    known: dict[ir.Value, np.ndarray[Any, Any]] = {}
    pending = [value]
    while pending:
        current = pending[-1]
        node = current.producer()
        tensor = literal(current)
        if current in known:
            pending.pop()
        elif tensor is not None:
            known[current] = tensor.numpy()
        elif node is None:
            raise GraphError(f"'{current.name}' has no data in the model.")
        elif node.op_type == "Shape":
            known[current] = _shape(node, type_of)
        else:
            operands = node.inputs[:1] if node.op_type == "CastLike" else node.inputs
            missing = [operand for operand in operands if operand is not None and operand not in known]
            if missing:
                pending += missing
            elif node.op_type == "CastLike":
                known[current] = known[operands[0]].astype(_like(node, type_of))  # type: ignore[index]
            else:
                known.update(zip(node.outputs, _compute(node, known), strict=True))
    return known[value]


def _like(node: ir.Node, type_of: Callable[[ir.Value], ValueType | None]) -> np.dtype[Any]:
    output, example = node.outputs[0], node.inputs[1]
    if output.dtype is not None:
        return output.dtype.numpy()
    kind = type_of(example) if example is not None else None
    if kind is None or kind.dtype is None:
        raise GraphError(f"The type that '{node.name}' casts to is unknown.")
    return numpy_dtype(kind.dtype)


def _shape(node: ir.Node, type_of: Callable[[ir.Value], ValueType | None]) -> np.ndarray[Any, Any]:
    kind = type_of(node.inputs[0]) if node.inputs[0] is not None else None
    if kind is None or kind.shape is None:
        raise GraphError(f"The shape that '{node.name}' asks for is unknown.")
    start, end = node.attributes.get("start"), node.attributes.get("end")
    return np.asarray(kind.shape[slice(start.value if start else 0, end.value if end else None)], dtype=np.int64)


def _compute(node: ir.Node, known: Mapping[ir.Value, np.ndarray[Any, Any]]) -> list[np.ndarray[Any, Any]]:
    graph = node.graph
    opset = graph.opset_imports.get("", 1) if graph is not None else 1
    proto = ir.serde.serialize_node(node)
    feeds = {item.name or "": known[item] for item in node.inputs if item is not None}
    infos = [
        onnx.helper.make_tensor_value_info(name, onnx.helper.np_dtype_to_tensor_dtype(array.dtype), array.shape)
        for name, array in feeds.items()
    ]
    outputs = [onnx.ValueInfoProto(name=name) for name in proto.output]
    body = onnx.helper.make_graph([proto], "literal", infos, outputs)
    model = onnx.helper.make_model(body, opset_imports=[onnx.helper.make_opsetid("", opset)])
    from onnx.reference import ReferenceEvaluator

    try:
        return [np.asarray(array) for array in ReferenceEvaluator(model).run(None, feeds)]
    except (RuntimeError, NotImplementedError, ValueError, TypeError) as error:
        raise GraphError(f"The constant that '{node.name}' ({node.op_type}) makes cannot be computed.") from error
