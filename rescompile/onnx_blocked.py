"""ONNX Runtime's operators on tensors whose channels are blocked for one processor (domain com.microsoft.nchwc).

Its optimisation level "all" writes them. Their weights hold the standard operators' numbers in another order, and have
channels filled up to whole blocks, so they are never read as kinds: no other runtime, and no other processor, computes
them. `inspect` sees what they stand for: a convolution, the sum with another tensor, an activation.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

DOMAIN = "com.microsoft.nchwc"
REASON = (
    "its channels are laid out for one processor: to rewrite or compile the model, start from the one before ONNX "
    "Runtime's optimisation, or optimise at level 'extended'"
)
_POOLS = ("MaxPool", "AveragePool", "GlobalAveragePool", "GlobalMaxPool")
_OWN = ("activation", "activation_params")


def is_blocked(node: ir.Node) -> bool:
    """Whether the node is of that domain."""
    return node.domain == DOMAIN


def stand_in(node: ir.Node) -> tuple[str, int]:
    """The standard operator that has the types of the node, and how many of its inputs that reads; "" for none."""
    if node.op_type == "Conv":
        return "Conv", 3
    return (node.op_type, 1) if node.op_type in _POOLS else ("", 0)


def written_out(node: ir.Node) -> ir.Function | None:
    """The function that the node is a call of, apart from the order of its numbers; None for what is not known."""
    if node.op_type == "Conv":
        return _conv(node)
    body = _Body(node)
    x = body.inputs[0]
    if node.op_type in _POOLS:
        return body.function(body.add(node.op_type, [x], *node.attributes.values()))
    if node.op_type == "ReorderInput":
        return body.function(body.add("Identity", [x]))
    if node.op_type == "ReorderOutput" and not node.attributes.get_int("channels_last", 0):
        bounds = [body.const([number]) for number in (0, node.attributes.get_int("channels", 0), 1)]
        return body.function(body.add("Slice", [x, *bounds]))
    return None


def _conv(node: ir.Node) -> ir.Function | None:
    """activation(conv(x, w, b) + sum)"""
    body = _Body(node)
    given = [*body.inputs, None, None][:4]
    plain = [attribute for name, attribute in node.attributes.items() if name not in _OWN]
    result = body.add("Conv", given[:3], *plain)
    if given[3] is not None:
        result = body.add("Add", [result, given[3]])
    name = node.attributes.get_string("activation", "")
    numbers = list(node.attributes.get_floats("activation_params", ()))
    if name == "Clip":
        result = body.add("Clip", [result, *(body.const(number, np.float32) for number in numbers)])
    elif name:
        settings = (ir.AttrFloat32(key, number) for key, number in zip(("alpha", "beta"), numbers, strict=False))
        result = body.add(name, [result], *settings)
    return body.function(result)


class _Body:
    """The nodes of a function with the inputs of a node."""

    def __init__(self, node: ir.Node) -> None:
        self._name = node.op_type
        self._parameters = [ir.Value(name=f"input_{at}") for at in range(len(node.inputs))]
        self._nodes: list[ir.Node] = []
        self.inputs = [None if value is None else own for value, own in zip(node.inputs, self._parameters, strict=True)]

    def add(self, op_type: str, operands: list[ir.Value | None], *attributes: ir.Attr) -> ir.Value:
        output = ir.Value(name=f"{op_type}_{len(self._nodes)}")
        self._nodes.append(ir.Node("", op_type, operands, attributes, outputs=[output], name=output.name))
        return output

    def const(self, data: object, dtype: type = np.int64) -> ir.Value:
        return self.add("Constant", [], ir.AttrTensor("value", ir.tensor(np.asarray(data, dtype))))

    def function(self, result: ir.Value) -> ir.Function:
        graph = ir.Graph(self._parameters, [result], nodes=self._nodes, name=self._name)
        return ir.Function("", self._name, graph=graph, attributes=[])
