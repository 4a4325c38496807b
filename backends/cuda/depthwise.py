"""CUDA kernels of depthwise convolutions with their epilogue, NHWC.

    y = outer(residual + inner(bias + sum over k, l of x[n, i*s - p + k*d, j*s - p + l*d, c]·w[k, l, c]))

Sums and epilogue are in float32. Weights are (taps, C): a thread reads those of its channels as it reads pixels.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import tvm

from rescompile.backends.cuda.rows import Expr, const, local, named, store, unrolled, wide
from rescompile.backends.cuda.scalars import scalar
from rescompile.backends.cuda.windows import (
    SIZES,
    Patch,
    Window,
    WindowTile,
    accumulators,
    window_function,
    window_tiles,
)
from rescompile.backends.kernels import Argument, Epilogue
from rescompile.kinds import OpKind

_LARGEST = 7  # taps along an axis
_ACTIVATIONS: dict[str, tuple[OpKind, dict[str, object]]] = {
    "relu": (OpKind.RELU, {}),
    "relu6": (OpKind.CLIP, {"min": 0.0, "max": 6.0}),
    "gelu": (OpKind.GELU, {"approximate": "none"}),
    "gelu_tanh": (OpKind.GELU, {"approximate": "tanh"}),
    "silu": (OpKind.SILU, {}),
    "sigmoid": (OpKind.SIGMOID, {}),
    "tanh": (OpKind.TANH, {}),
    "hardswish": (OpKind.HARDSWISH, {}),
}


@dataclass(frozen=True)
class Depthwise:
    """One filter for each channel of x (batch, H, W, C). `batch` None: dynamic."""

    batch: int | None
    window: Window
    epilogue: Epilogue = field(default_factory=Epilogue)
    dtype: str = "float32"

    @property
    def flops(self) -> int | None:
        """Two for each multiply-add; None where the batch is dynamic."""
        if self.batch is None:
            return None
        return 2 * self.batch * self.window.out_height * self.window.out_width * self.window.channels * self.window.taps


def refusal(spec: Depthwise, limits: object = None) -> str:
    """Why there is no kernel for the spec; empty when there is."""
    if spec.dtype not in SIZES:
        return f"there are no depthwise kernels in {spec.dtype}"
    if max(spec.window.kernel) > _LARGEST:
        return f"a window of {spec.window.kernel} needs more registers than a thread has"
    return ""


def candidates(spec: Depthwise, limits: object = None) -> list[WindowTile]:
    """Tiles; the first is the one to take where nothing can be timed."""
    return window_tiles(spec.window, spec.batch, spec.dtype, weights=True)


def arguments(spec: Depthwise) -> list[Argument]:
    """x, weight (taps, C), [bias (C)], [residual], y."""
    window, channels = spec.window, spec.window.channels
    return [
        Argument("x", window.image(spec.batch), spec.dtype),
        Argument("weight", (window.taps, channels), spec.dtype),
        *([Argument("bias", (channels,), spec.dtype)] if spec.epilogue.bias else []),
        *([Argument("residual", window.result(spec.batch), spec.dtype)] if spec.epilogue.residual else []),
        Argument("y", window.result(spec.batch), spec.dtype, output=True),
    ]


def prim_func(spec: Depthwise, tile: WindowTile, name: str) -> tvm.tirx.PrimFunc:
    """The kernel, its threads bound."""
    return window_function(name, arguments(spec), spec.window, spec.batch, tile, lambda patch: _emit(spec, patch))


def _emit(spec: Depthwise, patch: Patch) -> None:
    window, count, columns = spec.window, patch.tile.vector, patch.tile.columns
    held = local(len(patch.offsets) * count, spec.dtype)
    filters = local(window.kernel[1] * count, spec.dtype)
    if spec.epilogue.bias:
        patch.read_channels("bias", filters, 0)
        total = accumulators(patch, lambda i: wide(filters[i]))
    else:
        total = accumulators(patch, lambda _: const(0.0))

    def row(tap: Expr) -> None:
        patch.read_row("x", held, spec.dtype, tap, 0.0)
        for column in range(window.kernel[1]):
            patch.read_channels("weight", filters, column, tap * window.kernel[1] + column)
        for column in range(window.kernel[1]):
            for pixel in range(columns):
                slot = patch.slot(pixel, column)

                def add(i: Expr, column: int = column, pixel: int = pixel, slot: int = slot) -> None:
                    product = wide(held[slot * count + i]) * wide(filters[column * count + i])
                    store(total, total[pixel * count + i] + product, pixel * count + i)

                unrolled(count, add)

    patch.rows(row)
    beside = local(columns * count, spec.dtype) if spec.epilogue.residual else None
    if beside is not None:
        for pixel in range(columns):
            patch.read_pixel("residual", beside, pixel)
    staged = local(count, spec.dtype)
    for pixel in range(columns):

        def finish(i: Expr, pixel: int = pixel) -> None:
            at = pixel * count + i
            value = _activated(spec.epilogue.inner, total[at])
            if beside is not None:
                value = value + wide(beside[at])
            store(staged, _activated(spec.epilogue.outer, value).astype(spec.dtype), i)

        unrolled(count, finish)
        patch.write_pixel("y", staged, pixel)


def _activated(name: str, value: Expr) -> Expr:
    if name == "none":
        return value
    kind, attrs = _ACTIVATIONS[name]
    return scalar(kind, attrs, [named(value)[0]])
