"""Small ONNX models for tests, and the re-emission that proves readers and writers together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from rescompile.graph import Graph
from rescompile.kinds import OpKind
from rescompile.onnx_files import capture
from rescompile.onnx_graph import OnnxGraph
from rescompile.onnx_serial import in_memory_proto

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Const:
    """An operand that is an initializer."""

    data: Array

    @staticmethod
    def of(*items: float, dtype: str = "int64") -> Const:
        return Const(np.asarray(items, dtype=dtype))

    @staticmethod
    def scalar(item: float, dtype: str = "float32") -> Const:
        return Const(np.asarray(item, dtype=dtype))

    @staticmethod
    def random(*shape: int, seed: int = 7, low: float = -1.0, high: float = 1.0) -> Const:
        return Const(np.random.default_rng(seed).uniform(low, high, shape).astype(np.float32))


@dataclass(frozen=True)
class Fed:
    """An operand that is a graph input, with its data."""

    data: Array


def fed(*shape: int, dtype: str = "float32", low: float = -2.0, high: float = 2.0, seed: int = 1) -> Fed:
    rng = np.random.default_rng(seed + len(shape))
    if dtype == "bool":
        return Fed(rng.integers(0, 2, shape).astype(bool))
    if dtype.startswith("int"):
        return Fed(rng.integers(int(low), int(high), shape).astype(dtype))
    return Fed(rng.uniform(low, high, shape).astype(dtype))


def model_of(
    nodes: Sequence[onnx.NodeProto],
    inputs: dict[str, Sequence[int | str]],
    outputs: Sequence[str],
    constants: dict[str, Array] | None = None,
    opset: int = 18,
    ir_version: int = 8,
    domains: Sequence[str] = (),
) -> onnx.ModelProto:
    """A float32 model; outputs keep their inferred types."""
    infos = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, list(shape)) for name, shape in inputs.items()]
    tensors = [numpy_helper.from_array(array, name) for name, array in (constants or {}).items()]
    outs = [onnx.ValueInfoProto(name=name) for name in outputs]
    body = helper.make_graph(list(nodes), "test", infos, outs, tensors)
    imports = [helper.make_opsetid("", opset), *(helper.make_opsetid(domain, 1) for domain in domains)]
    proto = helper.make_model(body, opset_imports=imports, ir_version=ir_version)
    return typed_outputs(proto)


def typed_outputs(proto: onnx.ModelProto) -> onnx.ModelProto:
    """Give outputs without a type the inferred one, as the format demands."""
    inferred = onnx.shape_inference.infer_shapes(proto)
    types = {info.name: info.type for info in (*inferred.graph.output, *inferred.graph.value_info)}
    for output in proto.graph.output:
        if not output.type.HasField("tensor_type"):
            output.type.CopyFrom(types.get(output.name, onnx.TypeProto()))
        if not output.type.tensor_type.elem_type:
            output.type.tensor_type.elem_type = onnx.TensorProto.FLOAT
    return proto


def single(
    op_type: str,
    operands: Sequence[Const | Fed | None],
    opset: int,
    *,
    outputs: int = 1,
    domain: str = "",
    out_type: int = 0,
    **attrs: Any,
) -> tuple[onnx.ModelProto, dict[str, Array]]:
    """A model of one node, and its inputs."""
    infos, tensors, names = [], [], []
    feeds: dict[str, Array] = {}
    for index, operand in enumerate(operands):
        name = f"i{index}" if operand is not None else ""
        names.append(name)
        if isinstance(operand, Fed):
            kind = helper.np_dtype_to_tensor_dtype(operand.data.dtype)
            infos.append(helper.make_tensor_value_info(name, kind, operand.data.shape))
            feeds[name] = operand.data
        elif operand is not None:
            tensors.append(numpy_helper.from_array(operand.data, name))
    results = [f"o{index}" for index in range(outputs)]
    node = helper.make_node(op_type, names, results, name="node", domain=domain, **attrs)
    outs = [onnx.ValueInfoProto(name=name) for name in results]
    if out_type:
        for out in outs:
            out.type.tensor_type.elem_type = out_type
    imports = [helper.make_opsetid("", opset)] + ([helper.make_opsetid(domain, 1)] if domain else [])
    body = helper.make_graph([node], "single", infos, outs, tensors)
    # The oldest IR version that has what the opset has, so that old runtimes' rules are tested too.
    ir_version = 3 if opset < 9 else 4 if opset < 11 else 7 if opset < 15 else 8 if opset < 21 else 10
    if ir_version == 3:
        kinds = helper.np_dtype_to_tensor_dtype
        body.input.extend(
            helper.make_tensor_value_info(tensor.name, kinds(numpy_helper.to_array(tensor).dtype), list(tensor.dims))
            for tensor in tensors
        )
    proto = typed_outputs(helper.make_model(body, opset_imports=imports, ir_version=ir_version))
    for output in proto.graph.output:
        if not output.type.tensor_type.HasField("shape"):
            # onnx infers nothing for group norm: a shape of unknown extents satisfies the checker
            rank = next(operand.data.ndim for operand in operands if operand is not None)
            output.type.tensor_type.shape.dim.extend(onnx.TensorShapeProto.Dimension() for _ in range(rank))
    return proto, feeds


def kinds(graph: Graph) -> list[OpKind]:
    """Kinds of the operations, in order."""
    return [op.kind for op in graph]


def rewritten(graph: OnnxGraph) -> OnnxGraph:
    """A copy in which every operation that has a kind was written anew."""
    copy = graph.clone()
    for op in copy.ops:
        if op.kind is not OpKind.OPAQUE:
            copy.fuse([op], op.kind, op.inputs, op.outputs, op.attrs)
    copy.commit()
    return copy


def check(graph: OnnxGraph) -> None:
    """onnx's own checker, on the whole model."""
    onnx.checker.check_model(in_memory_proto(graph.model))


def same(a: dict[str, Array], b: dict[str, Array], rtol: float = 1e-5, atol: float = 1e-6) -> None:
    """Same outputs, names and types included."""
    assert list(a) == list(b)
    for name, expected in a.items():
        assert expected.dtype == b[name].dtype, name
        np.testing.assert_allclose(b[name], expected, rtol=rtol, atol=atol, err_msg=name)


def graph_of(proto: onnx.ModelProto) -> OnnxGraph:
    """The graph of a model."""
    return capture(proto)
