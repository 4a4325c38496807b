"""Scaled dot-product attention."""

from __future__ import annotations

from typing import Any

from tvm import relax

from rescompile.backends.emitter import Emitter, Expr
from rescompile.backends.lower_linear import matmul_of
from rescompile.backends.lower_reduce import widened
from rescompile.graph import Op
from rescompile.kinds import OpKind

R = relax.op

# Stands for minus infinity, so that a row in which everything is masked has no NaN (as torch's kernels have none).
_MASKED = -1e30


def attention(e: Emitter, op: Op) -> None:
    """y = softmax(scale·q·kᵀ + mask)·v"""
    e.bind(op.output, attention_in_relax(e, op))


def attention_in_relax(e: Emitter, op: Op) -> Expr:
    """The same in Relax operations; key heads are repeated where there are fewer than query heads."""
    q, k, v = (e.get(value) for value in op.operands[:3])
    dtype = e.dtype(q)
    rank = len(e.shape(q))
    heads = e.shape(q)[-3] if rank >= 3 else 1
    k, v = _repeated(e, k, heads), _repeated(e, v, heads)
    axes = [*range(rank - 2), rank - 1, rank - 2]
    scores = widened(e, matmul_of(e, q, e.emit(R.permute_dims(k, axes))))
    scores = e.emit(R.multiply(scores, e.scalar(op.attr("scale"), e.dtype(scores))))
    low = e.scalar(_MASKED, e.dtype(scores))
    mask = op.operand("mask")
    if mask is not None:
        given = e.get(mask)
        if e.dtype(given) == "bool":
            scores = e.emit(R.where(given, scores, low))
        else:
            scores = e.emit(R.maximum(e.emit(R.add(scores, e.cast(given, e.dtype(scores)))), low))
    if op.attr("causal"):
        rows, columns = e.shape(scores)[-2:]
        across = e.reshape(e.emit(R.arange(0, columns, 1, "int64")), [1, columns])
        down = e.reshape(e.emit(R.arange(0, rows, 1, "int64")), [rows, 1])
        scores = e.emit(R.where(e.emit(R.less_equal(across, down)), scores, low))
    top = e.emit(R.max(scores, -1, True))
    weights = e.emit(R.exp(e.emit(R.subtract(scores, top))))
    if mask is not None:
        weights = e.emit(R.where(e.emit(R.less_equal(scores, low)), e.scalar(0, e.dtype(scores)), weights))
    total = e.emit(R.sum(weights, -1, True))
    if mask is not None:
        total = e.emit(R.maximum(total, e.scalar(1e-30, e.dtype(scores))))
    weights = e.cast(e.emit(R.divide(weights, total)), dtype)
    return e.cast(matmul_of(e, weights, v), dtype)


def _repeated(e: Emitter, x: Expr, heads: Any) -> Expr:
    shape = e.shape(x)
    if len(shape) < 3 or shape[-3] == heads or not isinstance(heads, int) or shape[-3] == 1:
        return x
    return e.emit(R.repeat(x, heads // shape[-3], len(shape) - 3))


ATTENTIONS: dict[OpKind, Any] = {OpKind.ATTENTION: attention}
