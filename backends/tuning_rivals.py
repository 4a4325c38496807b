"""The plain form of what a kernel computes: loops without a schedule over the kernel's own buffers.

MetaSchedule finds schedules for it, and a scheduled one can stand in the kernel's place, weights packed as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import tvm
from tvm import s_tir, te, tirx, topi

from rescompile.backends.kernels import Argument, ConvSpec, Epilogue, LinearSpec, Spec, Tile, arguments

_DTYPES = ("float32", "float64")


def rival(spec: Spec, tile: Tile) -> tvm.tirx.PrimFunc | str:
    """The plain form of a kernel, its parameters in the order of `arguments`; or why it has none."""
    if not isinstance(spec, ConvSpec | LinearSpec):
        return "only convolutions and linears have a plain form"
    return _why_not(spec, tile) or _plain(spec, tile)


def _why_not(spec: ConvSpec | LinearSpec, tile: Tile) -> str | None:
    if spec.dtype not in _DTYPES:
        return f"sums of {spec.dtype} are held in another type"
    channels = spec.out_channels if isinstance(spec, ConvSpec) else spec.out_features
    if channels % tile.lanes:
        return f"{channels} output channels are not a multiple of the {tile.lanes} lanes that weights are packed in"
    if isinstance(spec, ConvSpec):
        return None if spec.groups == 1 else "grouped weights are packed for the kernel alone"
    return None if spec.rows is not None else "its row count is known at run time only"


def _plain(spec: ConvSpec | LinearSpec, tile: Tile) -> tvm.tirx.PrimFunc:
    buffers = {buffer.name: _placeholder(buffer) for buffer in arguments(spec, tile)}
    if isinstance(spec, ConvSpec):
        sums, border = _conv_sums(spec, buffers), spec.out_border
        residual_border = spec.residual_border
    else:
        sums, border, residual_border = _linear_sums(spec, buffers), (0, 0), (0, 0)
    result = _epilogue(spec.epilogue, sums, buffers, tile.lanes, residual_border)
    result = _with_border(result, border)
    given = [buffers[argument.name] for argument in arguments(spec, tile) if not argument.output]
    schedule = s_tir.Schedule(te.create_prim_func([*given, result]))
    lanes = tile.lanes
    # In memory the blocks of lanes lie side by side: the last two axes are one.
    schedule.transform_layout(
        "y", ("write", 0), lambda *index: (*index[:-2], index[-2] * lanes + index[-1]), assume_injective_transform=True
    )
    return schedule.mod["main"]


def _placeholder(buffer: Argument) -> Any:
    return te.placeholder(tuple(extent or 1 for extent in buffer.shape), dtype=buffer.dtype, name=buffer.name)


def _linear_sums(spec: LinearSpec, buffers: dict[str, Any]) -> Any:
    x, weight = buffers["x"], buffers["weight"]
    blocks, depth, lanes = (int(extent) for extent in weight.shape)
    k = te.reduce_axis((0, depth), name="k")
    return te.compute(
        (int(x.shape[0]), blocks, lanes),
        lambda row, block, lane: te.sum(x[row, k] * weight[block, k, lane], axis=[k]),
        name="sums",
    )


def _conv_sums(spec: ConvSpec, buffers: dict[str, Any]) -> Any:
    x, weight = _with_padding(spec, buffers["x"]), buffers["weight"]
    blocks, height, width, depth, lanes = (int(extent) for extent in weight.shape)
    kh = te.reduce_axis((0, height), name="kh")
    kw = te.reduce_axis((0, width), name="kw")
    k = te.reduce_axis((0, depth), name="k")
    # Row 0 of what is read lies this far above row 0 of the image, which the first window starts `pads` above.
    top, left = (max(border, pad) - pad for border, pad in zip(spec.in_border, spec.pads[:2], strict=True))

    def at(n: Any, y: Any, x_: Any, block: Any, lane: Any) -> Any:
        row = y * spec.stride[0] + kh * spec.dilation[0] + top
        column = x_ * spec.stride[1] + kw * spec.dilation[1] + left
        return te.sum(x[n, row, column, k] * weight[block, kh, kw, k, lane], axis=[kh, kw, k])

    return te.compute((spec.batch, spec.out_height, spec.out_width, blocks, lanes), at, name="sums")


def _with_padding(spec: ConvSpec, x: Any) -> Any:
    """x with a border that no window leaves."""
    sizes, outs = (spec.height, spec.width), (spec.out_height, spec.out_width)
    before, after = [], []
    for axis in (0, 1):
        border, pad = spec.in_border[axis], spec.pads[axis]
        last = (outs[axis] - 1) * spec.stride[axis] + (spec.kernel[axis] - 1) * spec.dilation[axis] - pad
        before.append(max(0, pad - border))
        after.append(max(0, last + 1 - sizes[axis] - border))
    if not any((*before, *after)):
        return x
    return topi.nn.pad(x, [0, *before, 0], [0, *after, 0], name="padded")


def _epilogue(epilogue: Epilogue, sums: Any, buffers: dict[str, Any], lanes: int, border: Sequence[int]) -> Any:
    """y = outer(residual + inner(sums + bias)), the last two axes block and lane"""
    result = sums
    if epilogue.bias:
        bias, added = buffers["bias"], result
        result = te.compute(
            added.shape, lambda *index: added(*index) + bias[index[-2] * lanes + index[-1]], name="with_bias"
        )
    result = _ACTIVATIONS[epilogue.inner](result)
    if epilogue.residual:
        residual, branch = buffers["residual"], result

        def joined(*index: Any) -> Any:
            channel = index[-2] * lanes + index[-1]
            rows = index[:-2]
            if any(border):
                rows = (rows[0], rows[1] + border[0], rows[2] + border[1])
            return branch(*index) + residual(*rows, channel)

        result = te.compute(branch.shape, joined, name="with_residual")
    return _ACTIVATIONS[epilogue.outer](result)


def _with_border(result: Any, border: Sequence[int]) -> Any:
    """The result inside a frame of zeros, under the name of the output."""
    if not any(border):
        return te.compute(result.shape, lambda *index: result(*index), name="y")
    n, height, width, *channels = (int(extent) for extent in result.shape)
    above, left = border

    def at(image: Any, row: Any, column: Any, *rest: Any) -> Any:
        inside = tirx.all(row >= above, row < height + above, column >= left, column < width + left)
        value = result(image, row - above, column - left, *rest)
        return tirx.if_then_else(inside, value, tirx.const(0, result.dtype))

    return te.compute((n, height + 2 * above, width + 2 * left, *channels), at, name="y")


def _map(x: Any, formula: Callable[[Any], Any]) -> Any:
    return te.compute(x.shape, lambda *index: formula(x(*index)), name="activated")


def _const(value: float, like: Any) -> Any:
    return tirx.const(value, str(like.dtype))


def _exp(x: Any) -> Any:
    return topi.fast_exp(x) if str(x.dtype) == "float32" else topi.exp(x)


def _tanh(x: Any) -> Any:
    return topi.fast_tanh(x) if str(x.dtype) == "float32" else topi.tanh(x)


def _erf(x: Any) -> Any:
    return topi.fast_erf(x) if str(x.dtype) == "float32" else topi.erf(x)


def _times(x: Any, factor: Any, formula: Callable[[Any, Any], Any]) -> Any:
    return te.compute(x.shape, lambda *index: formula(x(*index), factor(*index)), name="activated")


def _relu6(x: Any) -> Any:
    return _map(x, lambda v: tirx.min(tirx.max(v, _const(0, x)), _const(6, x)))


def _gelu(x: Any) -> Any:
    erf = _erf(_map(x, lambda v: v * _const(0.5**0.5, x)))
    return _times(x, erf, lambda v, e: v * _const(0.5, x) * (_const(1, x) + e))


def _gelu_tanh(x: Any) -> Any:
    scale, cubic = _const((2 / 3.141592653589793) ** 0.5, x), _const(0.044715, x)
    tanh = _tanh(_map(x, lambda v: scale * v * (_const(1, x) + cubic * v * v)))
    return _times(x, tanh, lambda v, t: v * _const(0.5, x) * (_const(1, x) + t))


def _sigmoid(x: Any) -> Any:
    power = _exp(_map(x, lambda v: -v))
    return _map(power, lambda p: _const(1, x) / (_const(1, x) + p))


def _silu(x: Any) -> Any:
    return _times(x, _sigmoid(x), lambda v, s: v * s)


def _hardswish(x: Any) -> Any:
    gate = _relu6(_map(x, lambda v: v + _const(3, x)))
    return _times(x, gate, lambda v, g: v * g * _const(1 / 6, x))


_ACTIVATIONS: dict[str, Callable[[Any], Any]] = {
    "none": lambda x: x,
    "relu": lambda x: _map(x, lambda v: tirx.max(v, _const(0, x))),
    "relu6": _relu6,
    "gelu": _gelu,
    "gelu_tanh": _gelu_tanh,
    "silu": _silu,
    "sigmoid": _sigmoid,
    "tanh": _tanh,
    "hardswish": _hardswish,
}
