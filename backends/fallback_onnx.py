"""One operation of an ONNX model, as a model of its own, through TVM's ONNX importer."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import onnx
import onnx_ir
from onnx import helper, numpy_helper
from tvm import tirx
from tvm.relax.frontend.onnx import from_onnx

from rescompile.backends.fallback import NARROW, Imported, spelled
from rescompile.errors import RescompileError
from rescompile.graph import Graph, Op, Role, Value

# A constant operand of at most this size is written into the model: some converters need its numbers.
_LITERAL_ELEMENTS = 1 << 16


def read(graph: Graph, op: Op) -> Imported:
    """Import the operation. RescompileError, with its name, when TVM cannot."""
    try:
        model, taken, shapes = _model(graph, op)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return Imported(from_onnx(model, shape_dict=shapes, keep_params_in_input=False), taken)
    except RescompileError:
        raise
    except Exception as error:
        lines = str(error).strip().splitlines() or [""]
        raise RescompileError(f"{spelled(op)} ({type(error).__name__}: {lines[0][:120]})") from error


def _model(graph: Graph, op: Op) -> tuple[onnx.ModelProto, list[int], dict[str, Any]]:
    """The operation's nodes as a model, the operands that it takes, and their shapes."""
    inputs: list[Any] = []
    initializers: list[onnx.TensorProto] = []
    taken: list[int] = []
    shapes: dict[str, Any] = {}
    symbols: dict[str, Any] = {}
    inside = {id(output) for node in op.native for output in node.outputs}
    known = {id(value.native): (index, value) for index, value in enumerate(op.inputs) if value is not None}
    for native in dict.fromkeys(x for node in op.native for x in node.inputs if x is not None and id(x) not in inside):
        index, value = known.get(id(native), (None, None))
        data = _literal(graph, native, value)
        if data is not None and data.size <= _LITERAL_ELEMENTS:
            initializers.append(numpy_helper.from_array(data, native.name))
        elif index is None or value is None:
            raise RescompileError(f"{spelled(op)} (its input '{native.name}' is not known to the graph)")
        else:
            taken.append(index)
            kind = _element_type(value)
            inputs.append(helper.make_tensor_value_info(native.name, kind, list(value.shape or ())))
            shapes[native.name] = [
                symbols.setdefault(dim, tirx.Var(dim if dim.isidentifier() else f"d{len(symbols)}", "int64"))
                if isinstance(dim, str)
                else dim
                for dim in value.shape or ()
            ]
    outputs = [helper.make_empty_tensor_value_info(value.native.name) for value in op.outputs]
    nodes = [onnx_ir.to_proto(node) for node in op.native]
    body = helper.make_graph(nodes, "one", inputs, outputs, initializers)
    versions = getattr(getattr(graph, "model", None), "opset_imports", {"": 18})
    imports = [helper.make_opsetid(domain, version) for domain, version in versions.items()]
    return helper.make_model(body, opset_imports=imports, ir_version=10), taken, shapes


def _literal(graph: Graph, native: Any, value: Value | None) -> np.ndarray[Any, Any] | None:
    """Contents of a constant operand."""
    if value is not None and value.role in (Role.PARAMETER, Role.CONSTANT):
        data = graph.data(value)
        return data.astype(np.float32) if value.dtype in NARROW else data
    constant = getattr(native, "const_value", None)
    return None if constant is None else np.asarray(constant.numpy())


def _element_type(value: Value) -> int:
    if value.shape is None or value.dtype is None:
        raise RescompileError(f"an operation on '{value.name}', whose shape is unknown")
    dtype = "float32" if value.dtype in NARROW else value.dtype
    return int(helper.np_dtype_to_tensor_dtype(np.dtype(dtype)))
