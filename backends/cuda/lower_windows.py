"""Pools and depthwise convolutions, channels last, by our CUDA kernels where the extents but the batch are known."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import numpy as np

from rescompile.backends import lower_pool
from rescompile.backends.cuda import depthwise as depthwise_family
from rescompile.backends.cuda import pool as pool_family
from rescompile.backends.cuda.depthwise import Depthwise
from rescompile.backends.cuda.pool import GlobalMean, GlobalMeans, Pool
from rescompile.backends.cuda.windows import Window
from rescompile.backends.emitter import Emitter, Expr
from rescompile.backends.kernels import Epilogue
from rescompile.backends.layouts import CHANNELS_LAST, pair, spatial_pads
from rescompile.backends.lower_linear import residual_value
from rescompile.backends.lower_reduce import REDUCTIONS
from rescompile.backends.symbols import Extent
from rescompile.errors import RescompileError
from rescompile.graph import Op, Value
from rescompile.kinds import OpKind

if TYPE_CHECKING:
    from rescompile.backends.cuda.rules import CudaEmitter


def pool(e: Emitter, op: Op) -> None:
    """y = the largest element, or the mean, of each window of x"""
    if not (e.lies_channels_last(op.operands[0]) and _windowed(e, op, _pool_window(e, op))):
        lower_pool.pool(e, op)


def adaptive_avg_pool(e: Emitter, op: Op) -> None:
    """y = means of windows that divide x into `output_size` parts"""
    value = op.operands[0]
    if e.lies_channels_last(value):
        if all(extent == 1 for extent in op.attr("output_size")) and _global_mean(e, op, keep=True):
            return
        if _windowed(e, op, _dividing_window(e, op)):
            return
    lower_pool.adaptive_avg_pool(e, op)


def mean(e: Emitter, op: Op) -> None:
    """y = mean of x over `axes`"""
    value = op.operands[0]
    rank = value.rank or 0
    spatial = rank >= 3 and sorted(axis % rank for axis in op.attr("axes")) == list(range(2, rank))
    same = op.output.dtype in (None, value.dtype)
    if spatial and same and e.lies_channels_last(value) and _global_mean(e, op, keep=bool(op.attr("keepdims"))):
        return
    REDUCTIONS[OpKind.MEAN](e, op)


def depthwise(e: Emitter, op: Op) -> bool:
    """y = outer(residual + inner(conv(x) + bias)) where each channel has a filter; whether there is a kernel for it"""
    value, weight, bias, residual = op.operands[0], op.operands[1], op.operand("bias"), residual_value(op)
    shape = weight.shape or ()
    if len(shape) not in (3, 4) or shape[1] != 1 or shape[0] != op.attr("groups") or not e.is_literal(weight):
        return False
    given = [other for other in (value, weight, bias, residual) if other is not None]
    if len({other.dtype for other in given} | {op.output.dtype or value.dtype}) > 1:
        return False
    if (bias is not None and not e.is_literal(bias)) or (residual is not None and residual.shape != op.output.shape):
        return False
    x = e.get(value, CHANNELS_LAST)
    window = _window(e.shape(x), [int(extent) for extent in shape[2:]], op)
    if window is None:
        return False
    fused = op.kind is OpKind.FUSED_CONV
    epilogue = Epilogue(
        bias=bias is not None,
        residual=residual is not None,
        inner=op.attr("inner") if fused else "none",
        outer=op.attr("outer") if fused else "none",
    )
    spec = Depthwise(_static(e.shape(x)[0]), window, epilogue, e.dtype(x))
    if depthwise_family.refusal(spec):
        return False
    operands = {"x": x, "weight": _filters(e, weight, window)}
    if bias is not None:
        operands["bias"] = e.get(bias)
    if residual is not None:
        operands["residual"] = e.get(residual, CHANNELS_LAST)
    out = cast("CudaEmitter", e).call_kernel(op, spec, depthwise_family, "depthwise", operands, e.shape(x)[0])[0]
    _bind(e, op, out, flat=len(e.shape(x)) == 3)
    return True


def _filters(e: Emitter, weight: Value, window: Window) -> Expr:
    shape = (window.taps, window.channels)
    return e.weight(
        f"{weight.name}.taps",
        lambda: np.ascontiguousarray(e.data(weight).reshape(window.channels, window.taps).T),
        shape,
        weight.dtype,
    )


def _windowed(e: Emitter, op: Op, window: Window | None) -> bool:
    if window is None:
        return False
    x = e.get(op.operands[0], CHANNELS_LAST)
    batch = e.shape(x)[0]
    kind = "max" if op.kind is OpKind.MAX_POOL else "avg"
    counts = op.kind is not OpKind.AVG_POOL or bool(op.attr("count_include_pad"))
    spec = Pool(kind, _static(batch), window, counts, e.dtype(x))
    if pool_family.refusal(spec):
        return False
    out = cast("CudaEmitter", e).call_kernel(op, spec, pool_family, f"{kind}_pool", {"x": x}, batch)[0]
    _bind(e, op, out, flat=len(e.shape(x)) == 3)
    return True


def _pool_window(e: Emitter, op: Op) -> Window | None:
    return _window(e.shape(e.get(op.operands[0], CHANNELS_LAST)), [int(extent) for extent in op.attr("kernel")], op)


def _dividing_window(e: Emitter, op: Op) -> Window | None:
    """The windows of an adaptive pool where all are of one size."""
    shape, size = e.shape(e.get(op.operands[0], CHANNELS_LAST)), [int(extent) for extent in op.attr("output_size")]
    spatial = [_static(extent) for extent in shape[1:-1]]
    if len(spatial) not in (1, 2) or len(size) != len(spatial) or not isinstance(shape[-1], int):
        return None
    if any(extent is None or extent % parts for extent, parts in zip(spatial, size, strict=True)):
        return None
    kernel = pair([(extent or 0) // parts for extent, parts in zip(spatial, size, strict=True)], len(spatial) == 1)
    height, width = ([1, *spatial])[-2:]
    return Window(int(height or 0), int(width or 0), shape[-1], kernel, kernel)


def _window(shape: list[Extent], kernel: list[int], op: Op) -> Window | None:
    """The geometry of a pool or convolution over [N, *spatial, C]; None where there is none."""
    extents = [_static(extent) for extent in shape[1:]]
    if len(extents) not in (2, 3) or None in extents:
        return None
    flat = len(extents) == 2
    height, width, channels = [1, *(int(extent or 0) for extent in extents)][-3:]
    window = pair(kernel, flat)
    dilates = "dilation" in op.kind.spec.attrs
    try:
        return Window(
            height,
            width,
            channels,
            window,
            pair(op.attr("stride"), flat) if op.attr("stride") else window,
            spatial_pads(op),
            pair(op.attr("dilation") or (1, 1), flat) if dilates else (1, 1),
            bool(op.attr("ceil_mode")) if "ceil_mode" in op.kind.spec.attrs else False,
        )
    except RescompileError:
        return None


def _global_mean(e: Emitter, op: Op, *, keep: bool) -> bool:
    x = e.get(op.operands[0], CHANNELS_LAST)
    shape = e.shape(x)
    positions = 1
    for extent in shape[1:]:
        if not isinstance(extent, int):
            return False
        positions *= extent
    spec = GlobalMean(_static(shape[0]), positions // int(shape[-1]), int(shape[-1]), e.dtype(x))
    if GlobalMeans.refusal(spec):
        return False
    rows = e.reshape(x, [shape[0], spec.positions, spec.channels])
    out = cast("CudaEmitter", e).call_kernel(op, spec, GlobalMeans, "global_mean", {"x": rows}, shape[0])[0]
    if keep:
        e.bind(op.output, e.reshape(out, [shape[0], *[1] * (len(shape) - 2), shape[-1]]), CHANNELS_LAST)
    else:
        e.bind(op.output, out)
    return True


def _bind(e: Emitter, op: Op, out: Expr, *, flat: bool) -> None:
    shape = e.shape(out)
    e.bind(op.output, e.reshape(out, [shape[0], *shape[2:]]) if flat else out, CHANNELS_LAST)


def _static(extent: Extent | None) -> int | None:
    return extent if isinstance(extent, int) else None


WINDOWS = {
    OpKind.MAX_POOL: pool,
    OpKind.AVG_POOL: pool,
    OpKind.ADAPTIVE_AVG_POOL: adaptive_avg_pool,
    OpKind.MEAN: mean,
}
