"""Reductions, softmax and running sums."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from tvm import relax

from rescompile.backends.emitter import DTYPES, Emitter, Expr
from rescompile.backends.kernels import GlobalMeanSpec, SoftmaxSpec
from rescompile.backends.layouts import CHANNELS_LAST, NATIVE, to_channels_last
from rescompile.backends.symbols import Extent
from rescompile.graph import Op, Value
from rescompile.kinds import OpKind

R = relax.op

_NARROW = ("float16", "bfloat16")


def widened(e: Emitter, x: Expr) -> Expr:
    """x in the type that sums of it are held in: float32 for the 16-bit types."""
    return e.cast(x, "float32") if e.dtype(x) in _NARROW else x


def reduction(e: Emitter, op: Op) -> None:
    """y = mean, sum, max, min or product of x over `axes` (all of them where none are given)"""
    value: Value = op.operands[0]
    rank = value.rank if value.rank is not None else len(e.shape(e.get(value)))
    axes = [axis % rank for axis in op.attr("axes")] or list(range(rank))
    keep = bool(op.attr("keepdims"))
    spatial = rank >= 3 and axes == list(range(2, rank))
    last = e.lies_channels_last(value) and spatial
    x = e.get(value, CHANNELS_LAST if last else NATIVE)
    if op.output.dtype is not None and "float" in op.output.dtype and "float" not in e.dtype(x):
        x = e.cast(x, op.output.dtype)
    if e.dtype(x) == "bool":
        x = e.cast(x, "int64" if op.output.dtype == "bool" else op.output.dtype)
    if last and op.kind is OpKind.MEAN and global_mean(e, op, keep):
        return
    over = [to_channels_last(rank).index(axis) for axis in axes] if last else axes
    out = e.emit(_REDUCTIONS[op.kind](widened(e, x), over, keep))
    out = e.cast(out, op.output.dtype or e.dtype(x))
    e.bind(op.output, out, CHANNELS_LAST if last and keep else NATIVE)


def global_mean(e: Emitter, op: Op, keep: bool) -> bool:
    """y = mean of x over all positions, by a kernel where there is one for it; whether there was."""
    value = op.operands[0]
    layout = e.widest(value)
    x = e.get(value, layout)
    shape = e.shape(x)
    if e.kernels is None or e.dtype(x) not in DTYPES or not all(isinstance(extent, int) for extent in shape):
        return False
    if len(shape) not in (3, 4):
        return False
    height = 1 if len(shape) == 3 else shape[1] - 2 * layout.border[0]
    spec = GlobalMeanSpec(shape[0], height, shape[-2] - 2 * layout.border[1], shape[-1], layout.border, e.dtype(x))
    out = e.call(op, spec, {"x": x})[0]
    if keep:
        e.bind(op.output, e.reshape(out, [shape[0], *[1] * (len(shape) - 2), shape[-1]]), CHANNELS_LAST)
    else:
        e.bind(op.output, e.reshape(out, [shape[0], shape[-1]]))
    return True


def product(extents: Sequence[Extent]) -> Extent:
    """The number of elements of a shape."""
    total: Extent = 1
    for extent in extents:
        total = total * extent
    return total


def argmax(e: Emitter, op: Op) -> None:
    """y = position of the largest element of x along an axis, the first where several are"""
    x = e.get(op.operands[0])
    axes = tuple(op.attr("axes"))
    keep = bool(op.attr("keepdims"))
    if axes:
        out = e.emit(R.argmax(x, axes[0], keep))
    else:
        rank = len(e.shape(x))
        out = e.emit(R.argmax(e.emit(R.flatten(x)) if rank != 1 else x, 0, False))
        if keep:
            out = e.reshape(out, [1] * rank)
    e.bind(op.output, e.cast(out, op.output.dtype or "int64"))


def cumsum(e: Emitter, op: Op) -> None:
    """y[i] = x[0] + ... + x[i] along `axis`"""
    x = e.get(op.operands[0])
    dtype = op.output.dtype or e.dtype(x)
    e.bind(op.output, e.emit(R.cumsum(e.cast(x, dtype), op.attr("axis"), dtype)))


def softmax(e: Emitter, op: Op) -> None:
    """y = exp(x − max) / sum of exp(x − max) along `axis`; its logarithm with `log`"""
    value = op.operands[0]
    x = e.get(value)
    dtype = op.output.dtype or e.dtype(x)
    function = R.nn.log_softmax if op.attr("log") else R.nn.softmax
    if e.dtype(x) in _NARROW or "float" not in e.dtype(x):
        x = e.cast(x, "float32" if dtype in _NARROW else dtype)
    shape = e.shape(x)
    axis = op.attr("axis") % len(shape)
    width = shape[axis]
    if e.kernels is not None and axis == len(shape) - 1 and isinstance(width, int) and e.dtype(x) in DTYPES:
        rows = product(shape[:-1])
        spec = SoftmaxSpec(rows if isinstance(rows, int) else None, width, bool(op.attr("log")), e.dtype(x))
        out = e.reshape(e.call(op, spec, {"x": x}, rows)[0], shape)
    else:
        out = e.emit(function(x, axis))
    e.bind(op.output, e.cast(out, dtype))


_REDUCTIONS: dict[OpKind, Callable[[Expr, list[int], bool], Expr]] = {
    OpKind.MEAN: R.mean,
    OpKind.SUM: R.sum,
    OpKind.AMAX: R.max,
    OpKind.AMIN: R.min,
    OpKind.PROD: R.prod,
}

REDUCTIONS = {
    **dict.fromkeys(_REDUCTIONS, reduction),
    OpKind.ARGMAX: argmax,
    OpKind.CUMSUM: cumsum,
    OpKind.SOFTMAX: softmax,
}
