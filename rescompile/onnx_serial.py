"""Serialising an onnx_ir model without changing it, whatever its size."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import onnx
import onnx_ir as ir

# Protocol buffers end at 2 GiB; the rest is for nodes and names.
PROTO_LIMIT = 2**31 - 2**27


def tensor_bytes(model: ir.Model) -> int:
    """Size of all initializers."""
    tensors = (value.const_value for value in model.graph.initializers.values())
    return sum(tensor.nbytes for tensor in tensors if tensor is not None)


def has_external(model: ir.Model) -> bool:
    """Whether the model's tensors lie in files of their own."""
    return any(isinstance(value.const_value, ir.ExternalTensor) for value in model.graph.initializers.values())


def in_memory_proto(model: ir.Model) -> onnx.ModelProto:
    """The model as one protocol buffer, external tensors included."""
    with _internal_tensors(model):
        return ir.to_proto(model)


@contextmanager
def _internal_tensors(model: ir.Model) -> Iterator[None]:
    moved = [value for value in model.graph.initializers.values() if isinstance(value.const_value, ir.ExternalTensor)]
    kept = [value.const_value for value in moved]
    try:
        for value, tensor in zip(moved, kept, strict=True):
            if tensor is not None:
                value.const_value = ir.Tensor(tensor.numpy(), dtype=tensor.dtype, name=value.name)
        yield
    finally:
        for value, tensor in zip(moved, kept, strict=True):
            value.const_value = tensor


def save_external(model: ir.Model, path: Path, data: str) -> None:
    """Write the model, and its tensors to the file `data` beside it."""
    ir.save(model, path, external_data=data)
