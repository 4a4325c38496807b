"""Matrix products: y = epilogue(x·weightᵀ + bias) with weights known at compile time, and products of two results."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from tvm import relax

from rescompile.backends.emitter import DTYPES, Emitter, Expr
from rescompile.backends.kernels import ConvSpec, Epilogue, LinearSpec, pack_bias, pack_weight
from rescompile.backends.lower_elementwise import activate
from rescompile.backends.lower_reduce import product, widened
from rescompile.errors import GraphError
from rescompile.graph import Op, Value
from rescompile.kinds import OpKind

R = relax.op


def linear(e: Emitter, op: Op) -> None:
    """y = outer(residual + inner(x·weightᵀ + bias))"""
    takes = e.kernels is not None and _kernel_takes(e, op)
    e.bind(op.output, linear_by_kernel(e, op) if takes else linear_in_relax(e, op))


def _kernel_takes(e: Emitter, op: Op) -> bool:
    weight, bias, residual = op.operands[1], op.operand("bias"), residual_value(op)
    dtype = op.output.dtype or op.operands[0].dtype
    if weight.rank != 2 or dtype not in DTYPES or any(value.dtype != dtype for value in op.operands):
        return False
    if residual is not None and residual.shape != op.output.shape:
        return False
    return e.is_literal(weight) and (bias is None or (e.is_literal(bias) and bias.rank == 1))


def linear_by_kernel(e: Emitter, op: Op) -> Expr:
    """One kernel over the rows of x: its leading dimensions taken together."""
    x, weight, bias, residual = e.get(op.operands[0]), op.operands[1], op.operand("bias"), residual_of(e, op)
    lead = e.shape(x)[:-1]
    rows = product(lead)
    inside, outside = (int(extent) for extent in weight.shape or ())
    if op.attr("transpose_weight"):
        inside, outside = outside, inside
    fused = op.kind is OpKind.FUSED_LINEAR
    spec = LinearSpec(
        rows if isinstance(rows, int) else None,
        inside,
        outside,
        Epilogue(
            bias=bias is not None,
            residual=residual is not None,
            inner=op.attr("inner") if fused else "none",
            outer=op.attr("outer") if fused else "none",
        ),
        str(op.output.dtype or op.operands[0].dtype),
    )
    turn = (lambda data: data) if op.attr("transpose_weight") else (lambda data: data.T)
    given = {"x": x, **packed(e, spec, weight, bias, turn)}
    if residual is not None:
        given["residual"] = residual
    return e.reshape(e.call(op, spec, given, rows)[0], [*lead, outside])


def packed(
    e: Emitter,
    spec: ConvSpec | LinearSpec,
    weight: Value,
    bias: Value | None,
    view: Callable[[np.ndarray[Any, Any]], np.ndarray[Any, Any]],
    bias_view: Callable[[np.ndarray[Any, Any]], np.ndarray[Any, Any]] = np.asarray,
) -> dict[str, Expr]:
    """Weight and bias of a contraction in its kernel's layout, as parameters of the program."""
    if e.kernels is None:
        raise GraphError("There are no kernels for this target.")
    tile, shapes = e.kernels.tile(spec), e.kernels.shapes(spec)

    def weights() -> np.ndarray[Any, Any]:
        return pack_weight(spec, tile, view(e.data(weight)))

    made = {"weight": e.weight(f"{weight.name}@{e.kernels.packing(spec)}", weights, *shapes["weight"])}
    if bias is not None:
        given = bias
        made["bias"] = e.weight(
            f"{bias.name}@{spec.dtype}{shapes['bias'][0]}",
            lambda: pack_bias(spec, tile, bias_view(e.data(given))),
            *shapes["bias"],
        )
    return made


def residual_value(op: Op) -> Value | None:
    """The residual operand, None for a kind without one."""
    return op.operand("residual") if "residual?" in op.kind.spec.operands else None


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
    residual = residual_value(op)
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
