"""Programs as graphs: in memory, of a torch.fx module, of an ONNX model. Every term keeps its name."""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import onnx
import torch
from onnx import helper, numpy_helper
from torch import fx, nn

from rescompile.fx_graph import FxGraph
from rescompile.graph import Graph, Role, Value, ValueType
from rescompile.kinds import Trait
from rescompile.onnx_files import capture
from rescompile.onnx_graph import OnnxGraph
from tests.residual_program import INPUT, NUMBER, PARAM, K, Program, Term

aten = torch.ops.aten


# ---- in memory -----------------------------------------------------------------------------------------------------


def in_memory(program: Program) -> Graph:
    """A plain graph."""
    graph = Graph("program")
    values: list[Value] = []
    for term in program.terms:
        if term.kind == INPUT:
            value = graph.add_input(term.name, term.shape, term.dtype)
        elif term.kind == PARAM:
            data = np.ones(term.shape, dtype=np.float32)
            value = graph.add_constant(term.name, term.shape, term.dtype, data, Role.PARAMETER)
        elif term.kind == NUMBER:
            data = np.asarray(term.attrs["value"], dtype=term.dtype)
            value = graph.add_constant(term.name, (), term.dtype, data, Role.CONSTANT)
        else:
            known = ValueType(term.shape, term.dtype) if term.known else ValueType(None, None)
            outputs = [(term.name, known)]
            value = graph.add_op(K(term.kind), [values[x] for x in term.operands], outputs, dict(term.attrs)).output
        values.append(value)
    graph.set_outputs([values[index] for index in program.outputs])
    graph.commit()
    return graph


# ---- torch.fx ------------------------------------------------------------------------------------------------------


def in_fx(program: Program) -> FxGraph:
    """The graph of a module that is written node by node, as an exporter or a tracer would."""
    root, graph = nn.Module(), fx.Graph()
    reads = Counter(operand for term in program.terms for operand in term.operands)
    values: list[Any] = []
    for term in program.terms:
        if term.kind == INPUT:
            value = graph.create_node("placeholder", term.name, name=term.name)
        elif term.kind == PARAM:
            root.register_parameter(term.name, nn.Parameter(torch.ones(term.shape)))
            value = graph.create_node("get_attr", term.name, name=term.name)
        elif term.kind == NUMBER:
            values.append(term.attrs["value"])
            continue
        else:
            if term.operands and reads[term.operands[0]] == 1 and _is_own(program.terms[term.operands[0]]):
                term = replace(term, attrs={**term.attrs, "in_place": True})
            value = _FX[K(term.kind)](graph, term, [values[x] for x in term.operands])
        if term.known:
            value.meta["val"] = torch.empty(term.shape, dtype=getattr(torch, term.dtype), device="meta")
        values.append(value)
    graph.output(tuple(values[index] for index in program.outputs))
    return FxGraph.read(fx.GraphModule(root, graph))


def _is_own(term: Term) -> bool:
    """Whether the term's tensor is no leaf's, and no view of another's, so that its one reader may write to it."""
    return isinstance(term.kind, K) and not term.kind.has(Trait.FREE)


FxRule = Callable[[fx.Graph, Term, list[Any]], fx.Node]


def _fx(graph: fx.Graph, term: Term, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
    op = "call_method" if isinstance(target, str) else "call_function"
    return graph.create_node(op, target, args, kwargs, name=term.name)


def _inner(graph: fx.Graph, term: Term, target: Any, shape: Sequence[int], *args: Any) -> fx.Node:
    """A node besides the term's own."""
    node = graph.create_node("call_function", target, args, name=f"{term.name}_inner")
    node.meta["val"] = torch.empty(tuple(shape), device="meta")
    return node


def _fx_plain(*spellings: Any) -> FxRule:
    def rule(graph: fx.Graph, term: Term, args: list[Any]) -> fx.Node:
        target = spellings[term.spelling % len(spellings)]
        if isinstance(target, str) and not isinstance(args[0], fx.Node):
            target = spellings[0]
        return _fx(graph, term, target, *args)

    return rule


def _fx_add(graph: fx.Graph, term: Term, args: list[Any]) -> fx.Node:
    if len(args) > 2:
        stacked = _inner(graph, term, aten.stack.default, (len(args), *term.shape), list(args))
        return _fx(graph, term, aten.sum.dim_IntList, stacked, [0])
    a, b = args
    first, second = term.attrs.get("scales", (1.0, 1.0))
    if (first, second) == (1.0, 1.0):
        written = [operator.iadd, aten.add_.Tensor] if term.attrs.get("in_place") else []
        rule = _fx_plain(aten.add.Tensor, operator.add, torch.add, "add", *written)
        return rule(graph, term, args if isinstance(a, fx.Node) else [b, a])
    if second == 1.0:
        a, b, first, second = b, a, second, first
    if second == -1.0:
        if not isinstance(a, fx.Node):
            return _fx(graph, term, *((aten.rsub.Scalar, b, a), (operator.sub, a, b))[term.spelling % 2])
        return _fx_plain(aten.sub.Tensor, operator.sub, torch.sub, "sub")(graph, term, [a, b])
    return _fx(graph, term, (aten.add.Tensor, torch.add)[term.spelling % 2], a, b, alpha=second)


def _fx_mul(graph: fx.Graph, term: Term, args: list[Any]) -> fx.Node:
    if not isinstance(args[0], fx.Node):
        args = args[::-1]
    return _fx_plain(aten.mul.Tensor, operator.mul, torch.mul, "mul")(graph, term, args)


def _fx_relu(graph: fx.Graph, term: Term, args: list[Any]) -> fx.Node:
    written = [aten.relu_.default, torch.relu_] if term.attrs.get("in_place") else []
    return _fx_plain(aten.relu.default, torch.relu, nn.functional.relu, "relu", *written)(graph, term, args)


def _fx_conv(graph: fx.Graph, term: Term, args: list[Any]) -> fx.Node:
    attrs = term.attrs
    rest = (None, list(attrs["stride"]), list(attrs["pads"][:2]), [1, 1], attrs["groups"])
    return _fx(graph, term, (aten.conv2d.default, torch.conv2d)[term.spelling % 2], *args, *rest)


def _fx_norm(graph: fx.Graph, term: Term, args: list[Any]) -> fx.Node:
    if term.kind is K.BATCH_NORM:
        return _fx(graph, term, aten.batch_norm.default, *args, False, 0.1, 1e-5, True)
    if term.kind is K.RMS_NORM:
        return _fx(graph, term, aten.rms_norm.default, args[0], [term.shape[-1]], args[1], 1e-6)
    return _fx(graph, term, aten.layer_norm.default, args[0], [term.shape[-1]], *args[1:])


def _fx_pad(graph: fx.Graph, term: Term, args: list[Any]) -> fx.Node:
    pads = term.attrs["pads"]
    flat = [n for axis in reversed(range(4)) for n in (pads[axis], pads[4 + axis])]
    return _fx(graph, term, aten.constant_pad_nd.default, *args, flat)


def _fx_lstm(graph: fx.Graph, term: Term, args: list[Any]) -> fx.Node:
    x, *weights = args
    state = _inner(graph, term, aten.zeros.default, (1, term.shape[1], term.shape[2]), [1, *term.shape[1:]])
    call = graph.create_node(
        "call_function", aten.lstm.input, (x, [state, state], weights, False, 1, 0.0, False, False, False)
    )
    kinds = (term.shape, (1, *term.shape[1:]), (1, *term.shape[1:]))
    call.meta["val"] = tuple(torch.empty(shape, device="meta") for shape in kinds)
    return _fx(graph, term, operator.getitem, call, 0)


_FX: dict[K, FxRule] = {
    K.ADD: _fx_add,
    K.MUL: _fx_mul,
    K.DIV: _fx_plain(aten.div.Tensor, operator.truediv, torch.div),
    K.MAXIMUM: _fx_plain(aten.maximum.default, torch.maximum, torch.max),
    K.MINIMUM: _fx_plain(aten.minimum.default, torch.minimum, torch.min),
    K.WHERE: _fx_plain(aten.where.self, torch.where),
    K.GREATER: _fx_plain(aten.gt.Scalar, operator.gt, torch.gt),
    K.POW: _fx_plain(aten.pow.Tensor_Scalar, operator.pow, torch.pow),
    K.LINEAR: _fx_plain(aten.linear.default, nn.functional.linear),
    K.MATMUL: _fx_plain(aten.matmul.default, torch.matmul, operator.matmul),
    K.SOFTMAX: lambda g, t, a: _fx(g, t, aten.softmax.int, *a, -1),
    K.CONV: _fx_conv,
    K.BATCH_NORM: _fx_norm,
    K.LAYER_NORM: _fx_norm,
    K.RMS_NORM: _fx_norm,
    K.RELU: _fx_relu,
    K.SIGMOID: _fx_plain(aten.sigmoid.default, torch.sigmoid, "sigmoid"),
    K.TANH: _fx_plain(aten.tanh.default, torch.tanh, "tanh"),
    K.GELU: _fx_plain(aten.gelu.default, nn.functional.gelu),
    K.IDENTITY: _fx_plain(aten.clone.default, aten.alias.default, torch.clone),
    K.CAST: lambda g, t, a: _fx(g, t, aten.to.dtype, *a, getattr(torch, t.dtype)),
    K.MAX_POOL: lambda g, t, a: _fx(g, t, aten.max_pool2d.default, *a, [2, 2], [2, 2]),
    K.AVG_POOL: lambda g, t, a: _fx(g, t, aten.avg_pool2d.default, *a, [2, 2], [2, 2]),
    K.INTERPOLATE: lambda g, t, a: _fx(g, t, aten.upsample_nearest2d.vec, *a, None, [2.0, 2.0]),
    K.MEAN: lambda g, t, a: _fx(g, t, aten.mean.dim, *a, list(t.attrs["axes"]), t.attrs["keepdims"]),
    K.CONCAT: lambda g, t, a: _fx(g, t, (aten.cat.default, torch.cat)[t.spelling % 2], list(a), t.attrs["axis"]),
    K.SLICE: lambda g, t, a: _fx(
        g, t, aten.slice.Tensor, *a, *(t.attrs[key][0] for key in ("axes", "starts", "stops", "steps"))
    ),
    K.RESHAPE: lambda g, t, a: _fx(g, t, (aten.view.default, aten.reshape.default)[t.spelling % 2], *a, list(t.shape)),
    K.PERMUTE: lambda g, t, a: _fx(g, t, aten.permute.default, *a, list(t.attrs["perm"])),
    K.PAD: _fx_pad,
    K.ROLL: lambda g, t, a: _fx(g, t, aten.roll.default, *a, list(t.attrs["shifts"]), list(t.attrs["axes"])),
    K.EMBEDDING: lambda g, t, a: _fx(g, t, aten.embedding.default, *a),
    K.RANDOM: lambda g, t, a: _fx(g, t, aten.rand.default, list(t.shape)),
    K.RECURRENT: _fx_lstm,
}


# ---- ONNX ----------------------------------------------------------------------------------------------------------


class _Onnx:
    """An ONNX graph under construction."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.tensors: list[onnx.TensorProto] = []

    def node(self, op_type: str, inputs: Sequence[str], output: str, **attrs: Any) -> str:
        self.nodes.append(helper.make_node(op_type, list(inputs), [output], name=output, **attrs))
        return output

    def constant(self, name: str, data: Any, dtype: str = "int64") -> str:
        """A Constant node, as exporters write literals."""
        tensor = numpy_helper.from_array(np.asarray(data, dtype=dtype), name)
        return self.node("Constant", [], name, value=tensor)


def in_onnx(program: Program) -> OnnxGraph:
    """The graph of a model of opset 20."""
    made = _Onnx()
    inputs, infos = [], []
    for term in program.terms:
        info = helper.make_tensor_value_info(
            term.name, helper.np_dtype_to_tensor_dtype(np.dtype(term.dtype)), term.shape
        )
        operands = [program.terms[x].name for x in term.operands]
        if term.kind == INPUT:
            inputs.append(info)
        elif term.kind == PARAM:
            made.tensors.append(numpy_helper.from_array(np.ones(term.shape, dtype=np.float32), term.name))
        elif term.kind == NUMBER:
            made.constant(term.name, term.attrs["value"], _dtype_of_number(program, term))
        else:
            _ONNX[K(term.kind)](made, term, operands)
            if term.known:
                infos.append(info)
    named = {info.name: info for info in (*inputs, *infos)}
    outputs = [named[program.name(index)] for index in program.outputs]
    leaving = {info.name for info in outputs}
    body = helper.make_graph(
        made.nodes, "program", inputs, outputs, made.tensors, value_info=[i for i in infos if i.name not in leaving]
    )
    return capture(helper.make_model(body, opset_imports=[helper.make_opsetid("", 20)], ir_version=9))


def _dtype_of_number(program: Program, number: Term) -> str:
    """ONNX has no mixed arithmetic: a number has the dtype of what it meets."""
    for term in program.terms:
        operands = [program.terms[x] for x in term.operands]
        if any(operand is number for operand in operands):
            met = [operand.dtype for operand in operands if operand is not number]
            return met[-1] if met else term.dtype
    return number.dtype


OnnxRule = Callable[[_Onnx, Term, list[str]], Any]


def _onnx_plain(op_type: str, **attrs: Any) -> OnnxRule:
    return lambda made, term, operands: made.node(op_type, operands, term.name, **attrs)


def _onnx_add(made: _Onnx, term: Term, operands: list[str]) -> None:
    scales = term.attrs.get("scales", (1.0,) * len(operands))
    if scales == (1.0, -1.0):
        made.node("Sub", operands, term.name)
        return
    if scales == (-1.0, 1.0):
        made.node("Sub", operands[::-1], term.name)
        return
    scaled = []
    for index, (operand, scale) in enumerate(zip(operands, scales, strict=True)):
        if scale == 1.0:
            scaled.append(operand)
            continue
        factor = made.constant(f"{term.name}_factor{index}", scale, "float32")
        scaled.append(made.node("Mul", [operand, factor], f"{term.name}_scaled{index}"))
    spelt_as_sum = len(operands) > 2 or (term.spelling % 3 == 0 and term.dtype == "float32")
    made.node("Sum" if spelt_as_sum else "Add", scaled, term.name)


def _onnx_linear(made: _Onnx, term: Term, operands: list[str]) -> None:
    turned = made.node("Transpose", [operands[1]], f"{term.name}_t", perm=[1, 0])
    product = made.node("MatMul", [operands[0], turned], f"{term.name}_product")
    made.node("Add", [product, operands[2]][:: 1 if term.spelling % 2 else -1], term.name)


def _onnx_slice(made: _Onnx, term: Term, operands: list[str]) -> None:
    bounds = [
        made.constant(f"{term.name}_{key}", list(term.attrs[key])) for key in ("starts", "stops", "axes", "steps")
    ]
    made.node("Slice", [*operands, *bounds], term.name)


def _onnx_conv(made: _Onnx, term: Term, operands: list[str]) -> None:
    attrs = term.attrs
    made.node("Conv", operands, term.name, strides=attrs["stride"], pads=attrs["pads"], group=attrs["groups"])


def _onnx_roll(made: _Onnx, term: Term, operands: list[str]) -> None:
    (axis,), (shift,) = term.attrs["axes"], term.attrs["shifts"]
    size = term.shape[axis]
    parts = []
    for index, (start, stop) in enumerate(((size - shift, size), (0, size - shift))):
        bounds = [made.constant(f"{term.name}_{index}_{place}", [n]) for place, n in enumerate((start, stop, axis))]
        parts.append(made.node("Slice", [*operands, *bounds], f"{term.name}_part{index}"))
    made.node("Concat", parts, term.name, axis=axis)


def _onnx_lstm(made: _Onnx, term: Term, operands: list[str]) -> None:
    x, wih, whh = operands[:3]
    axes = made.constant(f"{term.name}_axes", [0])
    w, r = (made.node("Unsqueeze", [weight, axes], f"{weight}_of_{term.name}") for weight in (wih, whh))
    y = made.node("LSTM", [x, w, r], f"{term.name}_all", hidden_size=term.shape[-1])
    made.node("Squeeze", [y, made.constant(f"{term.name}_direction", [1])], term.name)


def _onnx_token_norm(made: _Onnx, term: Term, operands: list[str]) -> None:
    """One operator where there is one; half of the layer norms, and the RMS norms, are taken apart."""
    if term.kind is K.LAYER_NORM and term.spelling % 2:
        made.node("LayerNormalization", operands, term.name, axis=-1)
        return
    stem, x = term.name, operands[0]
    axes = made.constant(f"{stem}_axes", [-1])
    if term.kind is K.LAYER_NORM:
        x = made.node("Sub", [x, made.node("ReduceMean", [x, axes], f"{stem}_mean")], f"{stem}_centred")
    squared = made.node("Pow", [x, made.constant(f"{stem}_two", 2.0, "float32")], f"{stem}_squared")
    variance = made.node("ReduceMean", [squared, axes], f"{stem}_variance")
    shifted = made.node("Add", [variance, made.constant(f"{stem}_eps", 1e-5, "float32")], f"{stem}_shifted")
    y = made.node("Div", [x, made.node("Sqrt", [shifted], f"{stem}_deviation")], f"{stem}_normalised")
    names = [stem, f"{stem}_weighted"][: len(operands) - 1][::-1]
    y = made.node("Mul", [y, operands[1]], names[0])
    if len(operands) > 2:
        made.node("Add", [y, operands[2]], names[1])


def _onnx_mean(made: _Onnx, term: Term, operands: list[str]) -> None:
    axes = made.constant(f"{term.name}_axes", list(term.attrs["axes"]))
    made.node("ReduceMean", [*operands, axes], term.name, keepdims=int(term.attrs["keepdims"]))


def _onnx_resize(made: _Onnx, term: Term, operands: list[str]) -> None:
    scales = made.constant(f"{term.name}_scales", [1, 1, 2, 2], "float32")
    made.node(
        "Resize", [*operands, "", scales], term.name, coordinate_transformation_mode="asymmetric", nearest_mode="floor"
    )


_ONNX: dict[K, OnnxRule] = {
    K.ADD: _onnx_add,
    K.MUL: _onnx_plain("Mul"),
    K.DIV: _onnx_plain("Div"),
    K.MAXIMUM: _onnx_plain("Max"),
    K.MINIMUM: _onnx_plain("Min"),
    K.WHERE: _onnx_plain("Where"),
    K.GREATER: _onnx_plain("Greater"),
    K.POW: _onnx_plain("Pow"),
    K.LINEAR: _onnx_linear,
    K.MATMUL: _onnx_plain("MatMul"),
    K.SOFTMAX: _onnx_plain("Softmax", axis=-1),
    K.CONV: _onnx_conv,
    K.BATCH_NORM: _onnx_plain("BatchNormalization"),
    K.LAYER_NORM: _onnx_token_norm,
    K.RMS_NORM: _onnx_token_norm,
    K.RELU: _onnx_plain("Relu"),
    K.SIGMOID: _onnx_plain("Sigmoid"),
    K.TANH: _onnx_plain("Tanh"),
    K.GELU: lambda made, term, operands: made.node("Gelu", operands, term.name),
    K.IDENTITY: _onnx_plain("Identity"),
    K.CAST: lambda made, term, operands: made.node(
        "Cast", operands, term.name, to=helper.np_dtype_to_tensor_dtype(np.dtype(term.dtype))
    ),
    K.MAX_POOL: _onnx_plain("MaxPool", kernel_shape=[2, 2], strides=[2, 2]),
    K.AVG_POOL: _onnx_plain("AveragePool", kernel_shape=[2, 2], strides=[2, 2]),
    K.INTERPOLATE: _onnx_resize,
    K.MEAN: _onnx_mean,
    K.CONCAT: lambda made, term, operands: made.node("Concat", operands, term.name, axis=term.attrs["axis"]),
    K.SLICE: _onnx_slice,
    K.RESHAPE: lambda made, term, operands: made.node(
        "Reshape", [*operands, made.constant(f"{term.name}_shape", list(term.shape))], term.name
    ),
    K.PERMUTE: lambda made, term, operands: made.node("Transpose", operands, term.name, perm=term.attrs["perm"]),
    K.PAD: lambda made, term, operands: made.node(
        "Pad", [*operands, made.constant(f"{term.name}_pads", list(term.attrs["pads"]))], term.name
    ),
    K.ROLL: _onnx_roll,
    K.EMBEDDING: _onnx_plain("Gather"),
    K.RANDOM: lambda made, term, operands: made.node("RandomUniform", [], term.name, shape=term.shape),
    K.RECURRENT: _onnx_lstm,
}

REALISERS: dict[str, Callable[[Program], Graph]] = {"memory": in_memory, "fx": in_fx, "onnx": in_onnx}
