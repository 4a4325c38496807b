"""Large networks of simple forms, in memory, as a torch.fx module and as an ONNX file, for timing analysis."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from rescompile.graph import Graph, Role, ValueType
from rescompile.kinds import OpKind

WIDTH = 4
TOKENS = 2

# One operation: kind, indices of the operations that it reads, width of its result. Operation 0 is the input.
Layer = tuple[OpKind, tuple[int, ...], int]


class Form:
    """Operations in order; a linear and a norm have weights of their own."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.layers: list[Layer] = [(OpKind.IDENTITY, (), WIDTH)]

    def op(self, kind: OpKind, *operands: int, width: int = 0) -> int:
        """The index of the new operation."""
        self.layers.append((kind, operands, width or self.layers[operands[0]][2]))
        return len(self.layers) - 1

    def linear(self, x: int, width: int = 0) -> int:
        """x·W"""
        return self.op(OpKind.LINEAR, x, width=width)

    def shape(self, index: int) -> tuple[int, int, int]:
        """[N, T, C] of an operation's result."""
        return 1, TOKENS, self.layers[index][2]


def chain(nodes: int) -> Form:
    """x ← relu(x + linear(relu(linear(x))))"""
    form, x = Form("chain"), 0
    while len(form.layers) < nodes:
        y = form.linear(form.op(OpKind.RELU, form.linear(x)))
        x = form.op(OpKind.RELU, form.op(OpKind.ADD, x, y))
    return form


def one_fork(nodes: int) -> Form:
    """y ← x + linear(relu(y)): one fork feeds every join"""
    form, y = Form("one fork"), 0
    while len(form.layers) < nodes:
        y = form.op(OpKind.ADD, 0, form.linear(form.op(OpKind.RELU, y)))
    return form


def nested(nodes: int) -> Form:
    """B(x) = x + linear(B'(linear(x))): every block inside the one before"""
    form, forks = Form("nested"), [0]
    while 3 * len(forks) < nodes:
        forks.append(form.linear(forks[-1]))
    y = form.op(OpKind.RELU, forks.pop())
    for fork in reversed(forks):
        y = form.op(OpKind.ADD, fork, form.linear(y))
    return form


def transformer(nodes: int) -> Form:
    """Pre-norm layers: attention, taken apart, and an MLP"""
    form, x = Form("transformer"), 0
    while len(form.layers) < nodes:
        n = form.op(OpKind.LAYER_NORM, x)
        q, v = form.linear(n, TOKENS), form.linear(n)
        weights = form.op(OpKind.SOFTMAX, q)
        x = form.op(OpKind.ADD, x, form.linear(form.op(OpKind.MATMUL, weights, v, width=WIDTH)))
        n = form.op(OpKind.LAYER_NORM, x)
        y = form.linear(form.op(OpKind.GELU, form.linear(n, 2 * WIDTH)), WIDTH)
        x = form.op(OpKind.ADD, x, y)
    return form


def dense(nodes: int) -> Form:
    """Dense blocks of six layers, each concatenated with all before it, and a transition"""
    form, x = Form("dense"), 0
    while len(form.layers) < nodes:
        features = [x]
        joined = x
        for _ in range(6):
            features.append(form.op(OpKind.RELU, form.linear(joined, 2)))
            joined = form.op(OpKind.CONCAT, *features, width=WIDTH + 2 * (len(features) - 1))
        x = form.linear(joined, WIDTH)
    return form


FORMS: dict[str, Callable[[int], Form]] = {
    "chain": chain,
    "one fork": one_fork,
    "nested": nested,
    "transformer": transformer,
    "dense": dense,
}


# ---- in each format ------------------------------------------------------------------------------------------------


def _weights(form: Form, index: int) -> list[tuple[str, tuple[int, ...]]]:
    """Names and shapes of an operation's parameters; a linear's is [in, out]."""
    kind, operands, width = form.layers[index]
    if kind is OpKind.LINEAR:
        return [(f"w{index}", (form.layers[operands[0]][2], width))]
    return [(f"{label}{index}", (width,)) for label in "gb"] if kind is OpKind.LAYER_NORM else []


def in_memory(form: Form) -> Graph:
    """A plain graph."""
    graph = Graph(form.name)
    values = [graph.add_input("x", form.shape(0), "float32")]
    for index, (kind, operands, _) in enumerate(form.layers[1:], 1):
        inputs = [values[operand] for operand in operands]
        inputs += [
            graph.add_constant(name, shape, "float32", None, Role.PARAMETER) for name, shape in _weights(form, index)
        ]
        attrs: dict[str, object] = {}
        if kind is OpKind.LINEAR:
            attrs = {"transpose_weight": False}
        elif kind is OpKind.CONCAT:
            attrs = {"axis": 2}
        made = graph.add_op(kind, inputs, [(f"v{index}", ValueType(form.shape(index), "float32"))], attrs)
        values.append(made.output)
    graph.set_outputs([values[-1]])
    graph.commit()
    return graph


_ONNX_NAMES = {
    OpKind.LINEAR: "MatMul",
    OpKind.MATMUL: "MatMul",
    OpKind.RELU: "Relu",
    OpKind.GELU: "Gelu",
    OpKind.ADD: "Add",
    OpKind.SOFTMAX: "Softmax",
    OpKind.CONCAT: "Concat",
    OpKind.LAYER_NORM: "LayerNormalization",
}


def write_onnx(form: Form, path: Path) -> None:
    """A file of opset 20 with the shapes of all values, as torch's exporter writes it."""
    import onnx
    from onnx import helper, numpy_helper

    nodes, tensors, infos = [], [], []
    for index in range(len(form.layers)):
        name = f"v{index}" if index else "x"
        infos.append(helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, form.shape(index)))
    for index, (kind, operands, _) in enumerate(form.layers[1:], 1):
        weights = _weights(form, index)
        tensors += [numpy_helper.from_array(np.ones(shape, np.float32), name) for name, shape in weights]
        inputs = [*(f"v{operand}" if operand else "x" for operand in operands), *(name for name, _ in weights)]
        attrs = {"axis": 2} if kind is OpKind.CONCAT else {}
        nodes.append(helper.make_node(_ONNX_NAMES[kind], inputs, [f"v{index}"], name=f"n{index}", **attrs))
    graph = helper.make_graph(nodes, form.name, infos[:1], infos[-1:], tensors, value_info=infos[1:-1])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    path.write_bytes(model.SerializeToString())


def fx_module(form: Form) -> object:
    """A module as torch.export gives it: one node an operation, with its metadata."""
    import torch
    from torch import fx, nn

    aten = torch.ops.aten
    targets = {
        OpKind.LINEAR: aten.matmul.default,
        OpKind.MATMUL: aten.matmul.default,
        OpKind.RELU: aten.relu.default,
        OpKind.GELU: aten.gelu.default,
        OpKind.ADD: aten.add.Tensor,
        OpKind.SOFTMAX: aten.softmax.int,
        OpKind.CONCAT: aten.cat.default,
        OpKind.LAYER_NORM: aten.layer_norm.default,
    }
    root, graph = nn.Module(), fx.Graph()
    values = [graph.placeholder("x")]
    types: dict[tuple[int, ...], object] = {}
    for index, (kind, operands, width) in enumerate(form.layers[1:], 1):
        inputs: list[object] = [values[operand] for operand in operands]
        for name, shape in _weights(form, index):
            root.register_parameter(name, nn.Parameter(torch.empty(shape, device="meta")))
            inputs.append(graph.get_attr(name))
        if kind is OpKind.SOFTMAX:
            inputs.append(-1)
        elif kind is OpKind.CONCAT:
            inputs = [inputs, 2]
        elif kind is OpKind.LAYER_NORM:
            inputs.insert(1, [width])
        values.append(graph.call_function(targets[kind], tuple(inputs)))
    for index, node in enumerate(values):
        shape = form.shape(index)
        node.meta["val"] = types.setdefault(shape, torch.empty(shape, device="meta"))
    graph.output((values[-1],))
    return fx.GraphModule(root, graph)
