"""A recurrent layer of an ONNX model, as torch computes it, through TVM's importer of exported programs.

TVM's ONNX importer reads no LSTM, GRU or RNN; its torch importer reads torch's, unrolled over the tokens.
"""

from __future__ import annotations

from typing import Any

import torch

from rescompile.backends.fallback import Imported, spelled
from rescompile.backends.fallback_fx import example, imported
from rescompile.errors import RescompileError
from rescompile.fx_twin_recurrent import recurrent
from rescompile.graph import Op


class _Layer(torch.nn.Module):
    def __init__(self, op: Op, taken: list[int]) -> None:
        super().__init__()
        self._attrs, self._taken, self._count = op.attrs, taken, len(op.inputs)
        self._results = len(op.outputs)

    def forward(self, *operands: torch.Tensor) -> tuple[torch.Tensor, ...]:
        inputs: list[Any] = [None] * self._count
        for index, operand in zip(self._taken, operands, strict=True):
            inputs[index] = operand
        return recurrent(None, inputs, self._attrs)[: self._results]


def read(op: Op) -> Imported:
    """Import the layer. RescompileError, with its name, when torch or TVM cannot."""
    operands = {index: value for index, value in enumerate(op.inputs) if value is not None}
    symbolic = next((dim for value in operands.values() for dim in value.shape or () if isinstance(dim, str)), None)
    if symbolic is not None:
        raise RescompileError(f"{spelled(op)} (its extent '{symbolic}' is dynamic, and it is unrolled)")
    taken = list(operands)
    examples = tuple(example(value, {}) for value in operands.values())
    return imported(op, lambda: (_Layer(op, taken), taken, examples, ()))
