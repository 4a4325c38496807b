"""Pools and resizing."""

from __future__ import annotations

from typing import Any

from tvm import relax

from rescompile.backends.emitter import DTYPES, Emitter
from rescompile.backends.kernels import PoolSpec
from rescompile.backends.layouts import CHANNELS_LAST, NATIVE, Layout, pair, spatial_pads
from rescompile.backends.lower_reduce import global_mean, widened
from rescompile.errors import GraphError
from rescompile.graph import Op
from rescompile.kinds import OpKind

R = relax.op

_FIRST = {1: "NCW", 2: "NCHW", 3: "NCDHW"}
_LAST = {1: "NWC", 2: "NHWC", 3: "NDHWC"}
_POOLS: dict[tuple[OpKind, int], Any] = {
    (OpKind.MAX_POOL, 1): R.nn.max_pool1d,
    (OpKind.MAX_POOL, 2): R.nn.max_pool2d,
    (OpKind.MAX_POOL, 3): R.nn.max_pool3d,
    (OpKind.AVG_POOL, 1): R.nn.avg_pool1d,
    (OpKind.AVG_POOL, 2): R.nn.avg_pool2d,
    (OpKind.AVG_POOL, 3): R.nn.avg_pool3d,
    (OpKind.ADAPTIVE_AVG_POOL, 1): R.nn.adaptive_avg_pool1d,
    (OpKind.ADAPTIVE_AVG_POOL, 2): R.nn.adaptive_avg_pool2d,
    (OpKind.ADAPTIVE_AVG_POOL, 3): R.nn.adaptive_avg_pool3d,
}


def pool(e: Emitter, op: Op) -> None:
    """y = the largest element, or the mean, of each window of x"""
    value = op.operands[0]
    last = e.lies_channels_last(value)
    if last and pool_by_kernel(e, op):
        return
    x = e.get(value, CHANNELS_LAST if last else NATIVE)
    rank = len(e.shape(x)) - 2
    function = _POOLS.get((op.kind, rank))
    if function is None:
        raise GraphError(f"'{op.name}' pools over {rank} spatial dimensions: up to 3 can be compiled.")
    options: dict[str, Any] = {"layout": (_LAST if last else _FIRST)[rank]}
    options["pool_size"] = tuple(op.attr("kernel"))
    options["strides"] = tuple(op.attr("stride")) or options["pool_size"]
    options["padding"] = tuple(op.attr("pads")) or (0,) * (2 * rank)
    options["ceil_mode"] = bool(op.attr("ceil_mode"))
    if op.kind is OpKind.MAX_POOL:
        options["dilation"] = tuple(op.attr("dilation")) or (1,) * rank
        out = e.emit(function(x, **options))
    else:
        options["count_include_pad"] = bool(op.attr("count_include_pad"))
        out = e.cast(e.emit(function(widened(e, x), **options)), e.dtype(x))
    e.bind(op.output, out, CHANNELS_LAST if last else NATIVE)


def pool_by_kernel(e: Emitter, op: Op) -> bool:
    """One kernel, channels last, writing the border that its readers want; whether there is one for it."""
    value = op.operands[0]
    layout = e.widest(value)
    x = e.get(value, layout)
    shape = e.shape(x)
    flat = len(shape) == 3
    if e.kernels is None or e.dtype(x) not in DTYPES or len(shape) not in (3, 4):
        return False
    if not all(isinstance(extent, int) for extent in shape):
        return False
    border = e.borders.get(op.output, (0, 0))
    kernel = pair(op.attr("kernel"), flat)
    spec = PoolSpec(
        "max" if op.kind is OpKind.MAX_POOL else "avg",
        shape[0],
        1 if flat else shape[1] - 2 * layout.border[0],
        shape[-2] - 2 * layout.border[1],
        shape[-1],
        kernel,
        pair(op.attr("stride"), flat) if op.attr("stride") else kernel,
        spatial_pads(op),
        pair(op.attr("dilation") or (1, 1), flat) if op.kind is OpKind.MAX_POOL else (1, 1),
        bool(op.attr("ceil_mode")),
        op.kind is OpKind.AVG_POOL and bool(op.attr("count_include_pad")),
        layout.border,
        border,
        e.dtype(x),
    )
    out = e.call(op, spec, {"x": x})[0]
    if flat:
        extents = e.shape(out)
        out = e.reshape(out, [extents[0], extents[2], extents[3]])
    e.bind(op.output, out, Layout(channels_last=True, border=border))
    return True


def adaptive_avg_pool(e: Emitter, op: Op) -> None:
    """y = means of windows that divide x into `output_size` parts"""
    value = op.operands[0]
    last = e.lies_channels_last(value)
    if last and all(extent == 1 for extent in op.attr("output_size")) and global_mean(e, op, keep=True):
        return
    x = e.get(value, CHANNELS_LAST if last else NATIVE)
    shape = e.shape(x)
    rank = len(shape) - 2
    over = list(range(1, rank + 1)) if last else list(range(2, rank + 2))
    size = tuple(op.attr("output_size"))
    if all(extent == 1 for extent in size):
        out = e.emit(R.mean(widened(e, x), over, True))
    else:
        layout = (_LAST if last else _FIRST)[rank]
        out = e.emit(_POOLS[op.kind, rank](widened(e, x), output_size=size, layout=layout))
    e.bind(op.output, e.cast(out, e.dtype(x)), CHANNELS_LAST if last else NATIVE)


def interpolate(e: Emitter, op: Op) -> None:
    """y = x resampled to the output's spatial extents (torch's coordinates)"""
    value = op.operands[0]
    last = e.lies_channels_last(value)
    x = e.get(value, CHANNELS_LAST if last else NATIVE)
    want = e.target_shape(op)[2:]
    mode = str(op.attr("mode"))
    if len(want) != 2 or mode not in ("nearest", "bilinear", "bicubic"):
        raise GraphError(f"'{op.name}' resamples {len(want)} dimensions in mode '{mode}': it cannot be compiled.")
    coordinates = "align_corners" if op.attr("align_corners") else "half_pixel"
    out = e.emit(
        R.image.resize2d(
            x,
            tuple(want),
            layout="NHWC" if last else "NCHW",
            method={"nearest": "nearest_neighbor", "bilinear": "linear", "bicubic": "cubic"}[mode],
            coordinate_transformation_mode="asymmetric" if mode == "nearest" else coordinates,
            rounding_method="floor" if mode == "nearest" else "round",
        )
    )
    e.bind(op.output, out, CHANNELS_LAST if last else NATIVE)


POOLS: dict[OpKind, Any] = {
    OpKind.MAX_POOL: pool,
    OpKind.AVG_POOL: pool,
    OpKind.ADAPTIVE_AVG_POOL: adaptive_avg_pool,
    OpKind.INTERPOLATE: interpolate,
}
