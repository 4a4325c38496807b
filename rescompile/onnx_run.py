"""Executing an ONNX model on the CPU, to see what an edit did to its numbers."""

from __future__ import annotations

import importlib
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

from rescompile.errors import GraphError
from rescompile.onnx_ops import dtype_name
from rescompile.onnx_serial import PROTO_LIMIT, in_memory_proto, save_external, tensor_bytes

Arrays = Mapping[str, np.ndarray[Any, Any]]


@dataclass(slots=True)
class Optimiser:
    """Whether ONNX Runtime's optimiser makes something that loads of a model and of what becomes of it.

    Of a model that was optimised before it may not; the first session tells. Where it did, it has to with all others.
    """

    works: bool | None = None


class Session:
    """A model made ready to run; the model may change afterwards without the session noticing."""

    def __init__(self, model: ir.Model, optimiser: Optimiser) -> None:
        self._types = {
            value.name or "": value for value in model.graph.inputs if value.name not in model.graph.initializers
        }
        self._outputs = [value.name or "" for value in model.graph.outputs]
        self._run = _prepare(model, optimiser)

    def run(self, inputs: Arrays) -> dict[str, np.ndarray[Any, Any]]:
        """Outputs by name. GraphError for a missing, unknown or wrongly typed input, and for what the runtime says."""
        for name in inputs:
            if name not in self._types:
                raise GraphError(f"The model has no input '{name}': it has {', '.join(self._types)}.")
        for name, value in self._types.items():
            if name not in inputs:
                raise GraphError(f"The model's input '{name}' is missing: give an array for {', '.join(self._types)}.")
            _check(name, inputs[name], value)
        return dict(zip(self._outputs, self._run(dict(inputs)), strict=True))


def _check(name: str, array: np.ndarray[Any, Any], value: ir.Value) -> None:
    dtype = dtype_name(value.dtype) if isinstance(value.type, ir.TensorType) else None
    shape = value.shape
    wanted = f"{dtype}{'' if shape is None else list(shape)}"
    if dtype not in (None, "string") and str(array.dtype) != dtype:
        raise GraphError(f"Input '{name}' is {array.dtype}{list(array.shape)} and the model takes {wanted}.")
    if shape is None:
        return
    fits = len(shape) == array.ndim and all(
        not isinstance(extent, int) or extent == given for extent, given in zip(shape, array.shape, strict=True)
    )
    if not fits:
        raise GraphError(f"Input '{name}' is {array.dtype}{list(array.shape)} and the model takes {wanted}.")


def node_runner(node: ir.Node, opsets: Mapping[str, int]) -> Callable[[Arrays], list[np.ndarray[Any, Any]]]:
    """Computes the outputs of one node alone, for its operands by name. GraphError for what the runtime says."""
    prepared: dict[tuple[str, ...], Callable[[Arrays], list[np.ndarray[Any, Any]]]] = {}

    def run(feeds: Arrays) -> list[np.ndarray[Any, Any]]:
        types = tuple(str(array.dtype) for array in feeds.values())
        if types not in prepared:
            prepared[types] = _prepare(_alone(node, feeds, opsets))
        return [np.asarray(array) for array in prepared[types](feeds)]

    return run


def _alone(node: ir.Node, feeds: Arrays, opsets: Mapping[str, int]) -> ir.Model:
    proto = ir.serde.serialize_node(node)
    infos = [
        onnx.helper.make_tensor_value_info(name, onnx.helper.np_dtype_to_tensor_dtype(array.dtype), None)
        for name, array in feeds.items()
    ]
    outputs = [onnx.ValueInfoProto(name=name) for name in proto.output if name]
    imports = [onnx.helper.make_opsetid(domain, version) for domain, version in opsets.items()]
    body = onnx.helper.make_graph([proto], "node", infos, outputs)
    return ir.from_proto(onnx.helper.make_model(body, opset_imports=imports, ir_version=8))


def _prepare(model: ir.Model, optimiser: Optimiser | None = None) -> Callable[[Arrays], list[np.ndarray[Any, Any]]]:
    try:
        onnxruntime: Any = importlib.import_module("onnxruntime")
    except ImportError:
        return _reference(model)
    failures: tuple[type[Exception], ...] = (RuntimeError, ValueError, NotImplementedError, *_own_errors(onnxruntime))
    optimiser = optimiser or Optimiser()
    try:
        try:
            session = _session(onnxruntime, model, optimised=optimiser.works is not False)
            optimiser.works = optimiser.works is not False
        except failures:
            if optimiser.works is not None:
                raise
            session = _session(onnxruntime, model, optimised=False)
            optimiser.works = False
    except failures as error:
        raise GraphError(f"ONNX Runtime cannot load the model: {_first_line(error)}") from error

    def run(inputs: Arrays) -> list[np.ndarray[Any, Any]]:
        try:
            return list(session.run(None, inputs))
        except failures as error:
            raise GraphError(f"ONNX Runtime cannot run the model: {_first_line(error)}") from error

    return run


def _session(onnxruntime: Any, model: ir.Model, *, optimised: bool) -> Any:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    # The level above chooses layouts for the graph as a whole, and rounds a convolution differently beside a new sum.
    level = "ORT_ENABLE_EXTENDED" if optimised else "ORT_DISABLE_ALL"
    options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, level)
    providers = ["CPUExecutionProvider"]
    if tensor_bytes(model) < PROTO_LIMIT:
        return onnxruntime.InferenceSession(in_memory_proto(model).SerializeToString(), options, providers)
    with tempfile.TemporaryDirectory(prefix="rescompile") as folder:
        path = Path(folder) / "model.onnx"
        save_external(model, path, "model.data")
        return onnxruntime.InferenceSession(str(path), options, providers)


def _own_errors(onnxruntime: Any) -> tuple[type[Exception], ...]:
    """ONNX Runtime's exceptions, which have no common base of their own."""
    state = vars(onnxruntime.capi.onnxruntime_pybind11_state)
    return tuple(item for item in state.values() if isinstance(item, type) and issubclass(item, Exception))


def _reference(model: ir.Model) -> Callable[[Arrays], list[np.ndarray[Any, Any]]]:
    """onnx's own evaluator: slow, and without the operators of ONNX Runtime."""
    try:
        evaluator = onnx.reference.ReferenceEvaluator(in_memory_proto(model))
    except (RuntimeError, NotImplementedError) as error:
        raise GraphError(
            f"onnx's reference cannot run the model ({_first_line(error)}): install onnxruntime."
        ) from error

    def run(inputs: Arrays) -> list[np.ndarray[Any, Any]]:
        return [np.asarray(output) for output in evaluator.run(None, dict(inputs))]

    return run


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]
