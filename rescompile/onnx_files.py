"""ONNX files and objects in and out: `load`, `capture`, `save`.

Nothing is promised before every operator is known to exist and every external tensor to lie where it may.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
from google.protobuf.message import DecodeError

from rescompile.errors import RescompileError
from rescompile.garbage import uncollected
from rescompile.onnx_graph import OnnxGraph
from rescompile.onnx_ops import FUNCTION_DOMAIN, OLDEST_OPSET, expanded_size, is_runtimes_own, nodes_within
from rescompile.onnx_wiring import copied, put_in_order


@uncollected()
def load(path: str | os.PathLike[str]) -> OnnxGraph:
    """Read an ONNX file. Tensors stay on disk, memory-mapped, until they are asked for.

    RescompileError when the file is missing, empty, not a model, cut short, of an unknown opset, or its external data
    is missing or outside its folder.
    """
    path = Path(path)
    if not path.is_file():
        raise RescompileError(f"There is no file '{path}': give the path of an ONNX model.")
    if path.stat().st_size == 0:
        raise RescompileError(f"'{path}' is empty: export the model again.")
    try:
        proto = onnx.load(str(path), format="protobuf", load_external_data=False)
    except (DecodeError, UnicodeDecodeError, ValueError) as error:
        raise RescompileError(
            f"'{path}' is not an ONNX model, or it is cut short: {str(error).split(':')[0].strip()}."
        ) from error
    except OSError as error:
        raise RescompileError(f"'{path}' cannot be read: {error.strerror}.") from error
    _check_proto(proto, str(path))
    model = _deserialise(proto, str(path))
    ir.external_data.set_base_dir(model.graph, path.parent.resolve())
    _check_external(model, path)
    _check_operators(model, str(path))
    put_in_order(model, str(path))
    graph = OnnxGraph.read(model)
    graph.source = "file"
    return graph


@uncollected()
def capture(model: Any) -> OnnxGraph:
    """The graph of an `onnx.ModelProto`, an `onnx_ir.Model` or an ONNXProgram of torch.onnx.export; the object itself
    stays as it is, and `to_user` gives back one of its kind."""
    if isinstance(model, onnx.ModelProto):
        _check_proto(model, "The model")
        native, source = _deserialise(model, "The model"), "proto"
    elif isinstance(model, ir.Model):
        native, source = copied(model, "The model"), "ir"
    elif isinstance(getattr(model, "model", None), ir.Model):
        native, source = copied(model.model, "The model"), "program"
    else:
        raise RescompileError(
            f"{type(model).__name__} is not an ONNX model: give a path, an onnx.ModelProto, an onnx_ir.Model or what "
            "torch.onnx.export returns."
        )
    _check_operators(native, "The model")
    put_in_order(native, "The model")
    graph = OnnxGraph.read(native)
    graph.source = source
    graph.origin = model if source == "program" else None
    return graph


def save(graph: OnnxGraph, path: str | os.PathLike[str]) -> None:
    """Write the graph's model: see `OnnxGraph.save`."""
    graph.save(str(path))


# ---- checks ----------------------------------------------------------------------------------------------------------


def _check_proto(proto: onnx.ModelProto, where: str) -> None:
    if not proto.HasField("graph") or not proto.opset_import or not proto.ir_version:
        raise RescompileError(f"{where} is not an ONNX model: it has no graph or no opset.")
    _check_sparse(proto, where)
    newest = onnx.defs.onnx_opset_version()
    for entry in proto.opset_import:
        if entry.domain in ("", "ai.onnx") and not OLDEST_OPSET <= entry.version <= newest:
            advice = "upgrade onnx" if entry.version > newest else "convert it with onnx.version_converter"
            raise RescompileError(
                f"{where} uses opset {entry.version}, and opsets {OLDEST_OPSET} to {newest} are known: {advice}."
            )


def _check_sparse(proto: onnx.ModelProto, where: str) -> None:
    names = [tensor.values.name for tensor in proto.graph.sparse_initializer]
    names += [
        node.output[0]
        for node in proto.graph.node
        if any(attribute.type == onnx.AttributeProto.SPARSE_TENSOR for attribute in node.attribute)
    ]
    if names:
        raise RescompileError(
            f"{where} keeps '{names[0]}' as a sparse tensor, which is not supported: store it as a dense one."
        )


def _deserialise(proto: onnx.ModelProto, where: str) -> ir.Model:
    try:
        return ir.from_proto(proto)
    except (ValueError, TypeError, KeyError, AttributeError, RuntimeError, NotImplementedError) as error:
        cause = error.__cause__ or error
        raise RescompileError(f"{where} is not a well-formed ONNX model: {str(cause).splitlines()[0]}") from error


def _check_external(model: ir.Model, path: Path) -> None:
    """Every external tensor's file must lie inside the model's folder, links followed, and be long enough."""
    folder = path.parent.resolve()
    sizes: dict[str, int] = {}
    for tensor in _tensors(model):
        if not isinstance(tensor, ir.ExternalTensor):
            continue
        location = str(tensor.location)
        if location not in sizes:
            if os.path.isabs(location) or not (folder / location).resolve().is_relative_to(folder):
                raise RescompileError(
                    f"'{path}' keeps the tensor '{tensor.name}' in '{location}', outside its folder: move the data "
                    "beside the model."
                )
            target = folder / location
            if not target.is_file():
                raise RescompileError(
                    f"'{path}' keeps the tensor '{tensor.name}' in '{location}', which is not there: put the file "
                    "beside the model."
                )
            status = target.stat()
            if status.st_nlink > 1:
                raise RescompileError(
                    f"'{location}', the external data of '{path}', has several hard links, so it may lie anywhere: "
                    "copy the file."
                )
            sizes[location] = status.st_size
        end = (tensor.offset or 0) + (tensor.length if tensor.length is not None else tensor.nbytes)
        if end > sizes[location] or (tensor.length is not None and tensor.length < tensor.nbytes):
            raise RescompileError(
                f"'{location}', the external data of '{path}', is cut short: the tensor '{tensor.name}' ends at byte "
                f"{end} of {sizes[location]}."
            )


def _tensors(model: ir.Model) -> list[ir.TensorProtocol]:
    found: list[ir.TensorProtocol] = []
    for graph in model.graphs():
        found += [value.const_value for value in graph.initializers.values() if value.const_value is not None]
        for node in graph:
            for attribute in node.attributes.values():
                if attribute.type is ir.AttributeType.TENSOR and not attribute.is_ref():
                    found.append(attribute.as_tensor())
    return found


def _check_operators(model: ir.Model, where: str) -> None:
    """Standard operators must exist in the model's opset; those of other domains may be anything, if imported."""
    for function in model.functions.values():
        if expanded_size(model.functions, function) < 0:
            raise RescompileError(
                f"{where}'s function {function.domain}::{function.name} calls itself, which ONNX does not allow: "
                "export the model again."
            )
    opset = model.opset_imports.get("", 0)
    known: set[tuple[str, str]] = set()
    for node in nodes_within(model.graph):
        key = (node.domain, node.op_type)
        if key in known:
            continue
        known.add(key)
        if node.op_identifier() in model.functions:
            continue
        if node.domain == FUNCTION_DOMAIN:
            raise RescompileError(f"{where} calls {node.domain}::{node.op_type} and does not contain that function.")
        if node.domain == "":
            if not onnx.defs.has(node.op_type, opset, "") and not is_runtimes_own(node, opset):
                raise RescompileError(
                    f"{where} has the operator {node.op_type} (node '{node.name}'), which opset {opset} does not have: "
                    "correct its opset import, or export it again."
                )
        elif node.domain not in model.opset_imports:
            raise RescompileError(
                f"{where} uses {node.domain}::{node.op_type} (node '{node.name}') and does not import that domain: "
                "export it again."
            )
