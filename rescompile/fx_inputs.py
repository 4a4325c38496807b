"""Example inputs for a torch module, out of specs of the command line."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from rescompile.errors import RescompileError
from rescompile.specs import InputSpec


def example_tensors(specs: Sequence[InputSpec]) -> tuple[torch.Tensor, ...]:
    """One tensor of random contents for each spec."""
    return tuple(_tensor(spec, seed) for seed, spec in enumerate(specs))


def check_runs(model: torch.nn.Module, inputs: Sequence[torch.Tensor], name: str) -> None:
    """RescompileError where the model's forward fails on the inputs: a wrong count, rank or dtype.

    Asked of the model in evaluation mode, because a run in training mode would change its running statistics.
    """
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        with torch.no_grad():
            model(*inputs)
    except Exception as error:
        given = ", ".join(f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}" for tensor in inputs)
        reason = " ".join(str(error).split())
        raise RescompileError(f"'{name}' does not run on the given --input ({given}): {reason}.") from error
    finally:
        for module, training in modes:
            module.training = training


def _tensor(spec: InputSpec, seed: int) -> torch.Tensor:
    array = spec.example(seed)
    if spec.dtype == "bfloat16":
        # numpy knows bfloat16 only as a foreign dtype, which torch does not read: pass the bits.
        return torch.from_numpy(array.view("int16")).view(torch.bfloat16)
    return torch.from_numpy(array)
