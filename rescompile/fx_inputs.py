"""Example inputs for a torch module, out of specs of the command line."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from rescompile.specs import InputSpec


def example_tensors(specs: Sequence[InputSpec]) -> tuple[torch.Tensor, ...]:
    """One tensor of random contents for each spec."""
    return tuple(_tensor(spec, seed) for seed, spec in enumerate(specs))


def dynamic_shapes(specs: Sequence[InputSpec]) -> tuple[dict[int, Any], ...] | None:
    """What torch.export calls dynamic shapes: one symbolic extent for each name, None where every extent is fixed."""
    names = {extent for spec in specs for extent in spec.shape if isinstance(extent, str)}
    if not names:
        return None
    dims = {name: torch.export.Dim(name) for name in names}
    return tuple(
        {axis: dims[extent] for axis, extent in enumerate(spec.shape) if isinstance(extent, str)} for spec in specs
    )


def _tensor(spec: InputSpec, seed: int) -> torch.Tensor:
    array = spec.example(seed)
    if spec.dtype == "bfloat16":
        # numpy knows bfloat16 only as a foreign dtype, which torch does not read: pass the bits.
        return torch.from_numpy(array.view("int16")).view(torch.bfloat16)
    return torch.from_numpy(array)
