"""From kinds to ONNX nodes, at the model's own opset: the table of writers.

A writer makes the nodes of one logical operation and returns its outputs. Where an operator is younger than the model's
opset the writer spells it in older ones; where that is impossible GraphError says which opset it takes.
"""

from __future__ import annotations

import math

import onnx_ir as ir

from rescompile.errors import GraphError
from rescompile.kinds import OpKind as K
from rescompile.kinds import Trait
from rescompile.onnx_build import Builder, Request, Writer
from rescompile.onnx_emit_math import MATH_WRITERS
from rescompile.onnx_emit_moves import MOVES_WRITERS
from rescompile.onnx_emit_nn import NN_WRITERS
from rescompile.onnx_ops import PLAIN

_PLAIN: dict[K, tuple[int, str]] = {
    row.kind: (row.since, row.op_type) for row in PLAIN if row.kind not in (K.ADD, K.SHAPE)
}
WRITERS: dict[K, Writer] = {**MATH_WRITERS, **MOVES_WRITERS, **NN_WRITERS}

# The opset from which a kind can be written, where that is not the first.
_SINCE: dict[K, int] = {
    K.EXPAND: 8,
    K.ERF: 9,
    K.SIGN: 9,
    K.IS_NAN: 9,
    K.WHERE: 9,
    K.FULL: 9,
    K.FLIP: 10,
    K.ROUND: 11,
    K.CUMSUM: 11,
    K.EINSUM: 12,
    K.DROPOUT: 12,
    K.FFT: 17,
}


def obstacle(kind: K, opset: int) -> str:
    """Why a model of that opset cannot hold an operation of this kind; empty when it can."""
    if kind not in WRITERS and kind not in _PLAIN and not kind.has(Trait.FUSED):
        return f"{kind.value} has no spelling in ONNX"
    since = _SINCE.get(kind, 1)
    if opset < since:
        return f"{kind.value} needs opset {since} and the model has {opset}: convert it with onnx.version_converter"
    return ""


def write(b: Builder, r: Request) -> list[ir.Value]:
    """The operation's outputs, computed by new nodes of `b`."""
    reason = obstacle(r.kind, b.opset)
    if reason:
        raise GraphError(f"The operation cannot be written into the model: {reason}.")
    if r.kind.has(Trait.FUSED) and b.call is not None:
        return b.call(b, r)
    since, op_type = _PLAIN.get(r.kind, (math.inf, ""))
    if b.opset >= since:
        return [b.node(op_type, list(r.args))]
    result = WRITERS[r.kind](b, r)
    return result if isinstance(result, list) else [result]
