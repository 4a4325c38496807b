"""Scaled dot-product attention."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tvm import relax

from rescompile.backends.emitter import DTYPES, Emitter, Expr
from rescompile.backends.kernels import AttentionSpec
from rescompile.backends.layouts import NATIVE, SWAPPED
from rescompile.backends.lower_linear import matmul_of
from rescompile.backends.lower_reduce import widened
from rescompile.graph import Op
from rescompile.kinds import OpKind

R = relax.op

# Stands for minus infinity, so that a row in which everything is masked has no NaN (as torch's kernels have none).
MASKED = -1e30


def attention(e: Emitter, op: Op) -> None:
    """y = softmax(scale·q·kᵀ + mask)·v"""
    if e.kernels is None or not attention_by_kernel(e, op):
        e.bind(op.output, attention_in_relax(e, op))


def attention_by_kernel(e: Emitter, op: Op) -> bool:
    """One kernel for all heads, reading q, k, v and writing y wherever the heads lie; whether there is one for it."""
    q, k, v = op.operands[:3]
    shapes = [value.shape for value in (q, k, v)]
    dtype = str(op.output.dtype or q.dtype)
    if dtype not in DTYPES or any(value.dtype != dtype for value in (q, k, v)):
        return False
    if any(shape is None or not all(isinstance(extent, int) for extent in shape) for shape in shapes):
        return False
    rank = len(shapes[0] or ())
    if rank not in (3, 4) or any(len(shape or ()) != rank for shape in shapes):
        return False
    full = [[int(extent) for extent in shape or ()] for shape in shapes]
    if rank == 3:
        full = [[shape[0], 1, *shape[1:]] for shape in full]
    if full[1][:3] != full[2][:3] or full[0][3] != full[2][3] or full[0][1] % full[1][1]:
        return False
    extents = (full[0][0], full[0][1], full[0][2], full[1][2])
    given, kind, mask_shape = _mask(e, op, dtype, extents)
    if given is None and kind != "none":
        return False
    packed = op.attrs.get("packed")
    swapped = rank == 4 and all(e.has(value, SWAPPED) for value in (q, k, v))
    spec = AttentionSpec(
        *extents,
        full[0][3],
        float(op.attr("scale")),
        full[1][1],
        bool(op.attr("causal")),
        kind,
        mask_shape,
        "qkv" if packed is not None else "bshd" if swapped else "bhsd",
        "bshd" if rank == 4 else "bhsd",
        dtype,
    )
    if packed is not None:
        buffers = {"qkv": e.get(packed)}
    else:
        layout = SWAPPED if swapped else NATIVE
        buffers = {"q": e.get(q, layout), "k": e.get(k, layout), "v": e.get(v, layout)}
    if given is not None:
        buffers["mask"] = given
    outs = e.call(op, spec, buffers)
    if not outs:
        return False
    out = outs[0]
    if rank == 4:
        e.bind(op.output, e.reshape(out, [extents[0], extents[2], extents[1], full[0][3]]), SWAPPED)
    else:
        e.bind(op.output, e.reshape(out, list(shapes[0] or ())))
    return True


def _mask(
    e: Emitter, op: Op, dtype: str, extents: tuple[int, int, int, int]
) -> tuple[Expr | None, str, tuple[int, int, int, int]]:
    """The mask's buffer, its kind, and its four extents, each 1 or the full one; no buffer where it does not fit."""
    value = op.operand("mask")
    if value is None:
        return None, "none", (1, 1, 1, 1)
    given = e.get(value)
    shape = e.shape(given)
    if e.dtype(given) != "bool":
        given = e.cast(given, dtype)
    kind = "keep" if e.dtype(given) == "bool" else "additive"
    if len(shape) == 3 and len(op.output.shape or ()) == 3:
        shape = [shape[0], 1, *shape[1:]]
    shape = [1] * (4 - len(shape)) + shape
    if len(shape) != 4 or any(have not in (1, full) for have, full in zip(shape, extents, strict=True)):
        return None, kind, (1, 1, 1, 1)
    return given, kind, (shape[0], shape[1], shape[2], shape[3])


def softmax_in_relax(e: Emitter, op: Op, scores: Expr, dtype: str) -> Expr:
    """Softmax over the last dimension; with a mask, a row in which everything is masked gives zeros."""
    masked = op.operand("mask") is not None
    low = e.scalar(MASKED, e.dtype(scores))
    top = e.emit(R.max(scores, -1, True))
    weights = e.emit(R.exp(e.emit(R.subtract(scores, top))))
    if masked:
        weights = e.emit(R.where(e.emit(R.less_equal(scores, low)), e.scalar(0, e.dtype(scores)), weights))
    total = e.emit(R.sum(weights, -1, True))
    if masked:
        total = e.emit(R.maximum(total, e.scalar(1e-30, e.dtype(scores))))
    return e.cast(e.emit(R.divide(weights, total)), dtype)


def attention_in_relax(
    e: Emitter, op: Op, normalise: Callable[[Emitter, Op, Expr, str], Expr] = softmax_in_relax
) -> Expr:
    """The same in Relax operations; key heads are repeated where there are fewer than query heads."""
    q, k, v = (e.get(value) for value in op.operands[:3])
    dtype = e.dtype(q)
    rank = len(e.shape(q))
    heads = e.shape(q)[-3] if rank >= 3 else 1
    k, v = _repeated(e, k, heads), _repeated(e, v, heads)
    axes = [*range(rank - 2), rank - 1, rank - 2]
    scores = widened(e, matmul_of(e, q, e.emit(R.permute_dims(k, axes))))
    scores = e.emit(R.multiply(scores, e.scalar(op.attr("scale"), e.dtype(scores))))
    low = e.scalar(MASKED, e.dtype(scores))
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
    weights = normalise(e, op, scores, dtype)
    return e.cast(matmul_of(e, weights, v), dtype)


def _repeated(e: Emitter, x: Expr, heads: Any) -> Expr:
    shape = e.shape(x)
    if len(shape) < 3 or shape[-3] == heads or not isinstance(heads, int) or shape[-3] == 1:
        return x
    return e.emit(R.repeat(x, heads // shape[-3], len(shape) - 3))


ATTENTIONS: dict[OpKind, Any] = {OpKind.ATTENTION: attention}
