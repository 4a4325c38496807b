"""onnx's shape inference, over a skeleton of the model that holds no weights.

A model over 2 GB cannot be serialised, and its weights say nothing about shapes: large tensors become typed inputs.
"""

from __future__ import annotations

import onnx
import onnx_ir as ir

from rescompile.onnx_ops import SMALL, can_be_written_out, constant_tensor, dtype_name
from rescompile.onnx_quantised import float_attributes, float_inputs, quantised
from rescompile.values import PartialShape

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
        for value in node.outputs:
            if value.shape is not None and value.type is not None and value.name:
                ir.serde.serialize_value_into(graph.value_info.add(), value)
    for value in model.graph.outputs:
        ir.serde.serialize_value_into(graph.output.add(), value)
    for function in model.functions.values():
        if not can_be_written_out(model.functions, function):
            continue  # onnx would write it out
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
    row = quantised(node) if domain else None
    if row is not None:
        op_type, domain, inputs = row.op_type, "", float_inputs(node, row)
    for names in outputs:
        proto = graph.node.add(op_type=op_type, domain=domain, overload=node.overload)
        proto.input.extend("" if value is None else value.name or "" for value in inputs)
        proto.output.extend(names)
        for name, attribute in (
            node.attributes.items() if row is None else ((a.name, a) for a in float_attributes(node))
        ):
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
