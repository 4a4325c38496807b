"""Convolutions, of one to three spatial dimensions, with their epilogue."""

from __future__ import annotations

from typing import Any

from tvm import relax

from rescompile.backends.emitter import Emitter
from rescompile.backends.lower_linear import epilogue, residual_of
from rescompile.errors import GraphError
from rescompile.graph import Op
from rescompile.kinds import OpKind

R = relax.op

_NARROW = ("float16", "bfloat16")


def conv(e: Emitter, op: Op) -> None:
    """y = outer(residual + inner(conv(x) + bias))"""
    conv_in_relax(e, op)


def conv_in_relax(e: Emitter, op: Op) -> None:
    """The same in Relax operations, channels first."""
    x, weight = e.get(op.operands[0]), e.get(op.operands[1])
    rank = len(e.shape(x)) - 2
    dtype = e.dtype(x)
    function = {1: R.nn.conv1d, 2: R.nn.conv2d, 3: R.nn.conv3d}.get(rank)
    if function is None:
        raise GraphError(f"'{op.name}' is a convolution of {rank} spatial dimensions: up to 3 can be compiled.")
    out = e.emit(
        function(
            x,
            e.cast(weight, dtype),
            strides=tuple(op.attr("stride"))[:rank],
            padding=tuple(op.attr("pads"))[: 2 * rank],
            dilation=tuple(op.attr("dilation"))[:rank],
            groups=int(op.attr("groups")),
            out_dtype="float32" if dtype in _NARROW else dtype,
        )
    )
    out = epilogue(e, op, out, residual_of(e, op), [1, -1] + [1] * rank)
    e.bind(op.output, e.cast(out, op.output.dtype or dtype))


def conv_transpose(e: Emitter, op: Op) -> None:
    """The gradient of a convolution with respect to its input, applied to x"""
    x, weight = e.get(op.operands[0]), e.get(op.operands[1])
    rank = len(e.shape(x)) - 2
    dtype = e.dtype(x)
    function = {1: R.nn.conv1d_transpose, 2: R.nn.conv2d_transpose, 3: R.nn.conv3d_transpose}.get(rank)
    if function is None:
        raise GraphError(f"'{op.name}' is a convolution of {rank} spatial dimensions: up to 3 can be compiled.")
    out = e.emit(
        function(
            x,
            e.cast(weight, dtype),
            strides=tuple(op.attr("stride"))[:rank],
            padding=tuple(op.attr("pads"))[: 2 * rank],
            output_padding=tuple(op.attr("output_padding"))[:rank],
            dilation=tuple(op.attr("dilation"))[:rank],
            groups=int(op.attr("groups")),
            out_dtype="float32" if dtype in _NARROW else dtype,
        )
    )
    out = epilogue(e, op, out, None, [1, -1] + [1] * rank)
    e.bind(op.output, e.cast(out, op.output.dtype or dtype))


CONVOLUTIONS: dict[OpKind, Any] = {
    OpKind.CONV: conv,
    OpKind.FUSED_CONV: conv,
    OpKind.CONV_TRANSPOSE: conv_transpose,
}
