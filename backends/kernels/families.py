"""One table from spec to the module that makes its kernels."""

from __future__ import annotations

from typing import Any

import numpy as np
import tvm

from rescompile.backends.kernels import (
    attention,
    conv,
    elementwise,
    layout,
    linear,
    norm,
    pool,
    product,
    row_region,
    softmax,
)
from rescompile.backends.kernels.blocks import as_dtype
from rescompile.backends.kernels.elementwise import RegionSpec
from rescompile.backends.kernels.machine import Machine
from rescompile.backends.kernels.product import ProductSpec
from rescompile.backends.kernels.row_region import RowsSpec
from rescompile.backends.kernels.specs import (
    Argument,
    AttentionSpec,
    ConvSpec,
    GlobalMeanSpec,
    LayoutSpec,
    LinearSpec,
    NormSpec,
    PoolSpec,
    SoftmaxSpec,
)
from rescompile.backends.kernels.tiles import Tile
from rescompile.errors import RescompileError

Spec = (
    ConvSpec
    | LinearSpec
    | AttentionSpec
    | NormSpec
    | SoftmaxSpec
    | PoolSpec
    | GlobalMeanSpec
    | LayoutSpec
    | RegionSpec
    | ProductSpec
    | RowsSpec
)

_FAMILIES: dict[type, Any] = {
    ConvSpec: conv,
    LinearSpec: linear,
    AttentionSpec: attention,
    NormSpec: norm,
    SoftmaxSpec: softmax,
    PoolSpec: pool,
    GlobalMeanSpec: pool.GlobalMean,
    LayoutSpec: layout,
    RegionSpec: elementwise,
    ProductSpec: product,
    RowsSpec: row_region,
}


def _family(spec: Spec) -> Any:
    try:
        return _FAMILIES[type(spec)]
    except KeyError:
        raise RescompileError(f"No kernel family for {type(spec).__name__}; use one of the spec classes.") from None


def candidates(spec: Spec, machine: Machine) -> list[Tile]:
    """Tiles worth timing on `machine`, at least one, the best guess first."""
    tiles: list[Tile] = _family(spec).candidates(spec, machine)
    return tiles


def prim_func(spec: Spec, tile: Tile, name: str = "main", dynamic_tasks: bool = False) -> tvm.tirx.PrimFunc:
    """The finished kernel, its parameters in the order of `arguments`, its global symbol `name`.

    With `dynamic_tasks` (contractions only) the tile's task counts are two more int32 arguments, so that many
    splits can be timed with one build.
    """
    if dynamic_tasks:
        return _family(spec).build(spec, tile, name, dynamic_tasks=True)
    return _family(spec).build(spec, tile, name)


def arguments(spec: Spec, tile: Tile) -> list[Argument]:
    """The kernel's buffers in order: inputs, then outputs."""
    found: list[Argument] = _family(spec).arguments(spec, tile)
    return found


def pack_weight(spec: ConvSpec | LinearSpec, tile: Tile, weight: np.ndarray) -> np.ndarray:
    """The kernel's weight from torch's layout ([oc, ic/groups, kh, kw] or [out, in])."""
    packed: np.ndarray = _family(spec).pack_weight(spec, tile, weight)
    return packed


def pack_bias(spec: ConvSpec | LinearSpec, tile: Tile, bias: np.ndarray) -> np.ndarray:
    """The kernel's bias: as it is, in the spec's element type."""
    return as_dtype(bias, spec.dtype)
