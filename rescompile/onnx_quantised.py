"""ONNX's operators on quantised tensors, as what they stand for: y = Q(f(D(x₁), …, D(xₙ))).

D dequantises each operand by the scale and the zero point that follow it among the inputs, f is the float operator that
the QLinear operator is named after, Q quantises the result. A bias is of whole numbers in the scale of x·w. (ONNX
QLinearConv-10, QLinearMatMul-10; the others are ONNX Runtime's, domain com.microsoft.)
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import onnx_ir as ir


@dataclass(frozen=True, slots=True)
class Quantised:
    """An operator: the float one, where its quantised operands are, and where the scale of its result is.

    `plain`: an operand that is not quantised. `bias`: one in the scale of the two operands' product.
    """

    op_type: str
    operands: tuple[int, ...]
    result: int
    plain: int | None = None
    bias: int | None = None


QUANTISED: dict[str, Quantised] = {
    "QLinearConv": Quantised("Conv", (0, 3), 6, bias=8),
    "QLinearMatMul": Quantised("MatMul", (0, 3), 6),
    "QGemm": Quantised("Gemm", (0, 3), 7, bias=6),
    "QLinearAdd": Quantised("Add", (0, 3), 6),
    "QLinearMul": Quantised("Mul", (0, 3), 6),
    "QLinearWhere": Quantised("Where", (1, 4), 7, plain=0),
    "QLinearSigmoid": Quantised("Sigmoid", (0,), 3),
    "QLinearLeakyRelu": Quantised("LeakyRelu", (0,), 3),
    "QLinearSoftmax": Quantised("Softmax", (0,), 3),
    "QLinearAveragePool": Quantised("AveragePool", (0,), 3),
    "QLinearGlobalAveragePool": Quantised("GlobalAveragePool", (0,), 3),
}
_OWN = ("channels_last", "opset")  # attributes that the float operators do not have


def quantised(node: ir.Node) -> Quantised | None:
    """What a node stands for; None for any that is none of the family, or whose channels are the last axis."""
    last = node.attributes.get("channels_last")
    if node.domain not in ("", "com.microsoft") or (last is not None and last.value):
        return None
    if node.op_type == "QLinearConcat":
        return Quantised("Concat", tuple(range(2, len(node.inputs), 3)), 0)
    return QUANTISED.get(node.op_type)


def float_inputs(node: ir.Node, row: Quantised) -> list[ir.Value | None]:
    """The node's inputs that the float operator reads."""
    places = [*([] if row.plain is None else [row.plain]), *row.operands, *([] if row.bias is None else [row.bias])]
    return [node.inputs[place] for place in places if place < len(node.inputs)]


def float_attributes(node: ir.Node) -> Iterator[ir.Attr]:
    """The node's attributes that the float operator has too."""
    return (attribute for name, attribute in node.attributes.items() if name not in _OWN)


def written_out(node: ir.Node, row: Quantised) -> ir.Function:
    """The function that the node is a call of: its inputs in their order, and its one output."""
    inputs = [ir.Value(name=f"input_{at}") for at in range(len(node.inputs))]
    given = [None if value is None else own for value, own in zip(node.inputs, inputs, strict=True)]
    given += [None] * 3  # optional ones at the end
    nodes: list[ir.Node] = []

    def made(op_type: str, operands: list[ir.Value | None], *attributes: ir.Attr) -> ir.Value:
        output = ir.Value(name=f"{op_type}_{len(nodes)}")
        nodes.append(ir.Node("", op_type, operands, attributes, outputs=[output], name=output.name))
        return output

    operands: list[ir.Value | None] = [] if row.plain is None else [given[row.plain]]
    for place in row.operands:
        # The scales of a weight are one for each output channel, its first axis.
        axis = [ir.AttrInt64("axis", 0)] if row.op_type == "Conv" and place else []
        operands.append(made("DequantizeLinear", given[place : place + 3], *axis))
    if row.bias is not None and given[row.bias] is not None:
        scale = made("Mul", [given[place + 1] for place in row.operands])
        operands.append(made("DequantizeLinear", [given[row.bias], scale], ir.AttrInt64("axis", 0)))
    result = made(row.op_type, operands, *float_attributes(node))
    if given[row.result] is not None:
        result = made("QuantizeLinear", [result, *given[row.result : row.result + 2]])
    graph = ir.Graph(inputs, [result], nodes=nodes, name=node.op_type)
    return ir.Function("", node.op_type, graph=graph, attributes=[])
