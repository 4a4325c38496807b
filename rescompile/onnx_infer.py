"""onnx's shape inference, over a skeleton of the model that holds no weights.

A model over 2 GB cannot be serialised, and its weights say nothing about shapes: large tensors become typed inputs.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx
import onnx_ir as ir

from rescompile.onnx_blocked import is_blocked, stand_in
from rescompile.onnx_ops import SMALL, can_be_written_out, constant_tensor, dtype_name, is_runtimes_own
from rescompile.onnx_quantised import float_attributes, float_inputs, quantised
from rescompile.values import PartialShape


@dataclass(frozen=True, slots=True)
class _StandIn:
    """For inference an operator is this standard one on some of its inputs; "" for nothing. `outputs` are alike."""

    op_type: str = "Identity"
    inputs: tuple[int, ...] = (0,)
    outputs: tuple[int, ...] = (0,)


_SAME = _StandIn()
_NOTHING = _StandIn("", outputs=())
_CONV = _StandIn("Conv", (0, 1, 2))
_STAND_INS: dict[str, _StandIn] = {
    "SkipLayerNormalization": _StandIn(outputs=(0, 3)),
    "SkipSimplifiedLayerNormalization": _StandIn(outputs=(0, 3)),
    "SkipGroupNorm": _StandIn(outputs=(0, 1)),
    "EmbedLayerNormalization": _StandIn("Gather", (2, 0), (0, 2)),
    "BiasGelu": _StandIn("Add", (0, 1)),
    "FusedConv": _CONV,
    "FusedGemm": _StandIn("Gemm", (0, 1, 2)),
    "GemmFastGelu": _StandIn("MatMul", (0, 1)),
    **dict.fromkeys(("Attention", "MultiHeadAttention", "NhwcConv", "NhwcFusedConv"), _NOTHING),
    **dict.fromkeys(("LayerNormalization", "SimplifiedLayerNormalization", "GroupNorm"), _SAME),
    **dict.fromkeys(("FastGelu", "QuickGelu", "Gelu"), _SAME),
    **dict.fromkeys(("BiasAdd", "BiasDropout", "BiasSoftmax"), _SAME),
}
_PRODUCTS = ("FusedMatMul", "TransposeMatMul")


def _stand_in(node: ir.Node, opset: int) -> tuple[_StandIn, dict[str, str]] | None:
    """The stand-in of an operator outside the standard, with an attribute of its own; None for any other."""
    name = node.op_type
    if is_blocked(node):
        op_type, count = stand_in(node)
        return _StandIn(op_type, tuple(range(count)), (0,) if op_type else ()), {}
    if not is_runtimes_own(node, opset):
        return None
    if name in _PRODUCTS:
        flags = {flag: bool(node.attributes.get_int(flag, 0)) for flag in ("transA", "transB")}
        if any(node.attributes.get_int(flag, 0) for flag in ("transBatchA", "transBatchB")):
            return _NOTHING, {}
        sides = ("ji" if flags["transA"] else "ij", "kj" if flags["transB"] else "jk")
        equation = f"...{sides[0]},...{sides[1]}->...ik"
        return _StandIn("Einsum" if any(flags.values()) else "MatMul", (0, 1)), {"equation": equation}
    row = _STAND_INS.get(name)
    return None if row is None else (row, {})


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
        _node(graph, node, model.opset_imports.get("", 1))
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


def _node(graph: onnx.GraphProto, node: ir.Node, opset: int) -> None:
    if node.op_type == "Constant" and node.domain == "":
        tensor = constant_tensor(node)
        if tensor is not None and tensor.size > SMALL:
            _constant(graph, node.outputs[0], tensor, listed=False)
            return
    op_type, domain, inputs = node.op_type, node.domain, list(node.inputs)
    outputs = [[value.name or "" for value in node.outputs]]
    attributes = list(node.attributes.values())
    alike, row = _stand_in(node, opset), quantised(node) if domain else None
    if alike is not None:
        standard, own = alike
        op_type, domain = standard.op_type, ""
        inputs = [inputs[at] if at < len(inputs) else None for at in standard.inputs]
        outputs = [[node.outputs[at].name or ""] for at in standard.outputs if at < len(node.outputs)]
        outputs = [names for names in outputs if names[0]]
        known = onnx.defs.get_schema(op_type).attributes if op_type else {}
        attributes = [attribute for attribute in attributes if attribute.name in known]
        attributes += [ir.AttrString(name, text) for name, text in own.items() if name in known]
    elif row is not None:
        op_type, domain, inputs = row.op_type, "", float_inputs(node, row)
        attributes = list(float_attributes(node))
    for names in outputs:
        proto = graph.node.add(op_type=op_type, domain=domain, overload=node.overload)
        proto.input.extend("" if value is None else value.name or "" for value in inputs)
        proto.output.extend(names)
        for attribute in attributes:
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
