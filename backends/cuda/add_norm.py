"""Residual add + LayerNorm or RMSNorm with both outputs, and the norms alone, for a `NormSpec`: a region as any other.

s = x + residual;  y = (s − mean(s)) / sqrt(var(s) + eps) · weight + bias      (layer)
s = x + residual;  y = s / sqrt(mean(s²) + eps) · weight                       (rms)
"""

from __future__ import annotations

from typing import Any

from rescompile.backends.cuda import region_kernel, region_tile
from rescompile.backends.cuda.region_spec import norm_spec
from rescompile.backends.cuda.region_tile import RegionTile
from rescompile.backends.cuda.targets import Architecture
from rescompile.backends.kernels import Argument, NormSpec


def refusal(spec: NormSpec, limits: Architecture) -> str:
    """Why there is no kernel, one clause; empty when there is one."""
    return region_kernel.refusal(norm_spec(spec), limits)


def candidates(spec: NormSpec, limits: Architecture) -> list[RegionTile]:
    """Tiles, the first being the one to take where nothing can be timed."""
    return region_tile.candidates(norm_spec(spec), limits)


def arguments(spec: NormSpec) -> list[Argument]:
    """x (rows, width), [residual (rows, width)], [weight (width)], [bias (width)], y, [sum]."""
    given = ["x", *(name for name in ("residual", "weight", "bias") if getattr(spec, name))]
    matrix = (spec.rows, spec.width)
    made = ["y", *(["sum"] if spec.sum_output else [])]
    return [
        *(Argument(name, matrix if name in ("x", "residual") else (spec.width,), spec.dtype) for name in given),
        *(Argument(name, matrix, spec.dtype, output=True) for name in made),
    ]


def prim_func(spec: NormSpec, tile: RegionTile, name: str) -> Any:
    """The kernel, its threads bound."""
    return region_kernel.prim_func(norm_spec(spec), tile, name)
