"""Serialising an onnx_ir model without changing it, whatever its size, whole or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import onnx
import onnx_ir as ir

from rescompile.errors import RescompileError
from rescompile.garbage import uncollected

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


def save(model: ir.Model, path: str | os.PathLike[str]) -> None:
    """Write the model; tensors go to `<name>.data` beside it when they were external or are too large for one file.

    Both are prepared in a temporary folder beside the target and then moved into place. RescompileError when the place
    cannot be written; then nothing is.
    """
    path = Path(path)
    external = has_external(model) or tensor_bytes(model) >= PROTO_LIMIT
    data = f"{path.name}.data"
    if path.is_dir():
        raise RescompileError(f"'{path}' cannot be written: it is a folder.")
    try:
        folder = tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent)
    except OSError as error:
        raise RescompileError(f"'{path}' cannot be written: {error.strerror}.") from error
    try:
        ready = Path(folder) / path.name
        with uncollected():
            if external:
                save_external(model, ready, data)
            else:
                ir.save(model, ready, format="protobuf")
        if external and (Path(folder) / data).exists():
            os.replace(Path(folder) / data, path.parent / data)
        os.replace(ready, path)
    except OSError as error:
        raise RescompileError(f"'{path}' cannot be written: {error.strerror}.") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)
