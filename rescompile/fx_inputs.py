"""Example inputs for a torch module, out of specs of the command line."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from rescompile.specs import InputSpec


def example_tensors(specs: Sequence[InputSpec]) -> tuple[torch.Tensor, ...]:
    """One tensor of random contents for each spec."""
    return tuple(_tensor(spec, seed) for seed, spec in enumerate(specs))


def _tensor(spec: InputSpec, seed: int) -> torch.Tensor:
    array = spec.example(seed)
    if spec.dtype == "bfloat16":
        # numpy knows bfloat16 only as a foreign dtype, which torch does not read: pass the bits.
        return torch.from_numpy(array.view("int16")).view(torch.bfloat16)
    return torch.from_numpy(array)
