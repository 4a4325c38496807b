"""Convolutions, of one to three spatial dimensions, with their epilogue."""

from __future__ import annotations

from typing import Any

from tvm import relax

from rescompile.backends.emitter import DTYPES, Emitter
from rescompile.backends.kernels import ConvSpec, Epilogue
from rescompile.backends.layouts import Layout, pair, spatial_pads
from rescompile.backends.lower_linear import epilogue, packed, residual_of, residual_value
from rescompile.backends.lower_region import region_border
from rescompile.errors import GraphError
from rescompile.graph import Op, Value
from rescompile.kinds import OpKind

R = relax.op

_NARROW = ("float16", "bfloat16")


def conv(e: Emitter, op: Op) -> None:
    """y = outer(residual + inner(conv(x) + bias))"""
    if e.kernels is not None and _kernel_takes(e, op):
        conv_by_kernel(e, op)
    else:
        conv_in_relax(e, op)


def _kernel_takes(e: Emitter, op: Op) -> bool:
    x, weight = op.operands[:2]
    shape, dtype = x.shape, op.output.dtype or x.dtype
    if shape is None or len(shape) not in (3, 4) or not all(isinstance(extent, int) for extent in shape):
        return False
    literal = e.is_literal(weight) and ((bias := op.operand("bias")) is None or e.is_literal(bias))
    same = all(value.dtype == dtype for value in op.operands)
    residual = residual_value(op)
    return literal and same and dtype in DTYPES and (residual is None or residual.shape == op.output.shape)


def conv_by_kernel(e: Emitter, op: Op) -> None:
    """One kernel, channels last; the border that the output's readers want is written by it."""
    x, weight, bias, residual = op.operands[0], op.operands[1], op.operand("bias"), residual_value(op)
    shape = [int(extent) for extent in x.shape or ()]
    flat = len(shape) == 3
    read = e.widest(x)
    beside = None if residual is None else e.widest(residual)
    write = Layout(channels_last=True, border=e.borders.get(op.output, (0, 0)))
    fused = op.kind is OpKind.FUSED_CONV
    kernel = [int(extent) for extent in (weight.shape or ())[2:]]
    spec = ConvSpec(
        shape[0],
        *((1, shape[2]) if flat else (shape[2], shape[3])),
        shape[1],
        int((weight.shape or ())[0]),
        pair(kernel, flat),
        pair(op.attr("stride"), flat),
        spatial_pads(op),
        pair(op.attr("dilation"), flat),
        int(op.attr("groups")),
        in_border=read.border,
        out_border=write.border,
        residual_border=(0, 0) if beside is None else beside.border,
        epilogue=Epilogue(
            bias=bias is not None,
            residual=residual is not None,
            inner=op.attr("inner") if fused else "none",
            outer=op.attr("outer") if fused else "none",
        ),
        dtype=str(op.output.dtype or x.dtype),
    )
    given = {"x": e.get(x, read), **packed(e, spec, weight, bias, lambda data: data[:, :, None] if flat else data)}
    if residual is not None and beside is not None:
        given["residual"] = e.get(residual, beside)
    out = e.call(op, spec, given)[0]
    if flat:
        extents = e.shape(out)
        out = e.reshape(out, [extents[0], extents[2], extents[3]])
    e.bind(op.output, out, write)


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


def padded_input(op: Op) -> tuple[Value, tuple[int, int, int, int]] | None:
    """What a convolution of at most two dimensions reads, and its padding; None for any other operation."""
    if op.kind is OpKind.FUSED_REGION:
        return region_border(op)
    if op.kind not in (OpKind.CONV, OpKind.FUSED_CONV) or len(op.attr("pads")) > 4 or op.inputs[0] is None:
        return None
    return op.inputs[0], spatial_pads(op)


CONVOLUTIONS: dict[OpKind, Any] = {
    OpKind.CONV: conv,
    OpKind.FUSED_CONV: conv,
    OpKind.CONV_TRANSPOSE: conv_transpose,
}
