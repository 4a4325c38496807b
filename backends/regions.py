"""Group operations of a working graph into what one kernel computes.

What the fuse pass has joined arrives as one operation already. Here the same epilogues are recognised in graphs that
no pass has touched, where every value in between is read once, so that nothing is computed twice or lost:

    act(conv(x)), act(x·Wᵀ + b)     →  one operation with an activation
    conv(x) + r, x·Wᵀ + r           →  one operation with a residual
    (x·Wᵀ) + literal vector         →  one operation with a bias
    norm_batch(conv(x))             →  one operation with other weights (in evaluation, statistics known)
"""

from __future__ import annotations

from typing import Any

import numpy as np

from rescompile.backends.working import WorkingGraph
from rescompile.graph import Attrs, Op, Role, Value
from rescompile.kinds import OpKind, Trait, activation_name

_FUSED = {
    OpKind.CONV: OpKind.FUSED_CONV,
    OpKind.FUSED_CONV: OpKind.FUSED_CONV,
    OpKind.LINEAR: OpKind.FUSED_LINEAR,
    OpKind.FUSED_LINEAR: OpKind.FUSED_LINEAR,
}


def group_epilogues(graph: WorkingGraph) -> None:
    """Grow each convolution and linear by the operations after it, as far as its epilogue reaches."""
    drop_identities(graph)
    for name in [op.name for op in graph if op.kind in _FUSED]:
        op: Op | None = graph.op(name)
        while op is not None:
            op = _grown(graph, op)
    graph.commit()


def drop_identities(graph: WorkingGraph) -> None:
    """Let readers of y = x read x."""
    for op in graph.ops:
        value = op.inputs[0] if op.inputs else None
        if op.kind is OpKind.IDENTITY and value is not None and value.dtype == op.output.dtype:
            graph.replace_uses(op.output, value)
    graph.settle()


def _grown(graph: WorkingGraph, op: Op) -> Op | None:
    """The operation that replaces `op` and its reader, None when the epilogue reaches no further."""
    value = op.output
    if graph.is_output(value) or len(value.uses) != 1:
        return None
    reader = value.users[0]
    if reader.output.dtype != value.dtype or op.operands[0].dtype != value.dtype:
        return None
    attrs: Attrs = {**_FUSED[op.kind].spec.attrs, **op.attrs}
    inputs: list[Value | None] = [*op.inputs, *[None] * (4 - len(op.inputs))]
    if reader.has(Trait.ACTIVATION) and len(reader.operands) == 1:
        name = activation_name(reader.kind, {**reader.kind.spec.attrs, **reader.attrs})
        if name is None or attrs["outer"] != "none":
            return None
        free = inputs[3] is None and attrs["inner"] == "none"
        attrs["inner" if free else "outer"] = name
    elif reader.kind is OpKind.ADD and _is_plain_sum(reader):
        if inputs[3] is not None or attrs["outer"] != "none":
            return None
        other = next(operand for operand in reader.operands if operand is not value)
        if other.shape == value.shape == reader.output.shape and other.dtype == value.dtype:
            inputs[3] = other
        elif _is_bias(other, value, op) and inputs[2] is None and attrs["inner"] == "none":
            inputs[2] = other
        else:
            return None
    elif reader.kind is OpKind.BATCH_NORM and op.kind is OpKind.CONV and reader.operands[0] is value:
        folded = _folded(graph, op, reader)
        if folded is None:
            return None
        return graph.fuse([op, reader], OpKind.CONV, folded, [reader.output], dict(op.attrs), name=op.name)
    else:
        return None
    return graph.fuse([op, reader], _FUSED[op.kind], inputs, [reader.output], attrs, name=op.name)


def _is_plain_sum(op: Op) -> bool:
    scales = op.attr("scales")
    return len(op.operands) == 2 and op.operands[0] is not op.operands[1] and all(scale == 1 for scale in scales)


def _is_bias(other: Value, value: Value, op: Op) -> bool:
    if other.role not in (Role.PARAMETER, Role.CONSTANT) or other.dtype != value.dtype or not value.shape:
        return False
    return op.kind in (OpKind.LINEAR, OpKind.FUSED_LINEAR) and other.shape == value.shape[-1:]


def _folded(graph: WorkingGraph, conv: Op, norm: Op) -> list[Value | None] | None:
    """Operands of the convolution that computes both, None where the numbers are not all known."""
    operands = {name: norm.operand(name) for name in ("weight", "bias", "mean", "var")}
    weight, bias = conv.operand("weight"), conv.operand("bias")
    known = [value for value in (*operands.values(), weight, bias) if value is not None]
    if any(value.role not in (Role.PARAMETER, Role.CONSTANT) for value in known) or norm.attr("training"):
        return None
    if weight is None or operands["mean"] is None or operands["var"] is None:
        return None

    def data(value: Value | None, default: float) -> np.ndarray[Any, Any]:
        return np.asarray(default) if value is None else graph.data(value).astype(np.float64)

    scale = data(operands["weight"], 1.0) / np.sqrt(data(operands["var"], 1.0) + norm.attr("eps"))
    shift = data(operands["bias"], 0.0) + (data(bias, 0.0) - data(operands["mean"], 0.0)) * scale
    old = graph.data(weight)
    filters = old.astype(np.float64) * scale.reshape(-1, *[1] * (old.ndim - 1))
    made = graph.literal(f"{weight.name}.folded", filters.astype(old.dtype))
    offset = graph.literal(f"{norm.name}.folded", np.broadcast_to(shift, scale.shape).astype(old.dtype))
    for literal in (made, offset):
        literal.dtype = weight.dtype
    return [conv.inputs[0], made, offset]
