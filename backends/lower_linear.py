"""Matrix products: y = epilogue(x·weightᵀ + bias) with weights known at compile time, and products of two results."""

from __future__ import annotations

from typing import Any

from tvm import relax

from rescompile.backends.emitter import Emitter, Expr
from rescompile.backends.lower_elementwise import activate
from rescompile.backends.lower_reduce import widened
from rescompile.graph import Op
from rescompile.kinds import OpKind

R = relax.op


def linear(e: Emitter, op: Op) -> None:
    """y = outer(residual + inner(x·weightᵀ + bias))"""
    e.bind(op.output, linear_in_relax(e, op))


def linear_in_relax(e: Emitter, op: Op) -> Expr:
    """The same in Relax operations."""
    x, weight = e.get(op.operands[0]), op.operands[1]
    if not op.attr("transpose_weight"):
        matrix = e.get(weight)
    elif e.is_literal(weight):
        matrix = e.weight(f"{weight.name}.transposed", lambda: e.data(weight).swapaxes(-1, -2))
    else:
        matrix = e.emit(R.permute_dims(e.get(weight)))
    out = matmul_of(e, x, e.cast(matrix, e.dtype(x)))
    return e.cast(epilogue(e, op, out, residual_of(e, op)), op.output.dtype or e.dtype(x))


def residual_of(e: Emitter, op: Op) -> Expr | None:
    """The residual operand of a fused kind, as the graph lays it out."""
    residual = op.operand("residual") if "residual?" in op.kind.spec.operands else None
    return None if residual is None else e.get(residual)


def epilogue(e: Emitter, op: Op, out: Expr, residual: Expr | None, bias_shape: list[int] | None = None) -> Expr:
    """y = outer(residual + inner(out + bias))"""
    bias = op.operand("bias")
    if bias is not None:
        term = e.cast(e.get(bias), e.dtype(out))
        out = e.emit(R.add(out, term if bias_shape is None else e.reshape(term, bias_shape)))
    if "inner" not in op.kind.spec.attrs:
        return out
    out = activate(e, op.attr("inner"), out)
    if residual is not None:
        out = e.emit(R.add(out, e.cast(residual, e.dtype(out))))
    return activate(e, op.attr("outer"), out)


def matmul(e: Emitter, op: Op) -> None:
    """y = a·b over the last two dimensions, the others broadcast"""
    a, b = (e.get(value) for value in op.operands)
    dtype = op.output.dtype or e.dtype(a)
    e.bind(op.output, e.cast(matmul_of(e, a, e.cast(b, e.dtype(a))), dtype))


def matmul_of(e: Emitter, a: Expr, b: Expr) -> Expr:
    """a·b, sums held in float32 at least."""
    dtype = e.dtype(a)
    wide = e.dtype(widened(e, a)) if dtype in ("float16", "bfloat16") else dtype
    return e.emit(R.matmul(a, b, out_dtype=wide))


def einsum(e: Emitter, op: Op) -> None:
    """y = the sum of products that the equation says"""
    equation = str(op.attr("equation")).replace(" ", "")
    operands = [e.get(value) for value in op.operands]
    dtype = op.output.dtype or e.dtype(operands[0])
    operands = [widened(e, x) for x in operands]
    e.bind(op.output, e.cast(e.emit(R.einsum(relax.Tuple(operands), equation)), dtype))


PRODUCTS: dict[OpKind, Any] = {
    OpKind.LINEAR: linear,
    OpKind.FUSED_LINEAR: linear,
    OpKind.MATMUL: matmul,
    OpKind.EINSUM: einsum,
}
