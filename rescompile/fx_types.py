"""Shapes and dtypes of torch values, in neutral words: extents as numbers or symbol names, dtypes by name."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from rescompile.graph import Dim, Shape, ValueType

UNKNOWN = ValueType(None, None)
_SCALAR = ValueType((), "int64")
_BOOL = ValueType((), "bool")
_FLOAT = ValueType((), "float32")
_SYMBOL = re.compile(r"[A-Za-z_]\w*")

_NAMES = (
    "float64",
    "float32",
    "float16",
    "bfloat16",
    "int64",
    "int32",
    "int16",
    "int8",
    "uint8",
    "uint16",
    "uint32",
    "uint64",
    "bool",
    "complex64",
    "complex128",
    "float8_e4m3fn",
    "float8_e5m2",
)
DTYPES: dict[torch.dtype, str] = {getattr(torch, name): name for name in _NAMES}
TORCH_DTYPES: dict[str, torch.dtype] = {name: dtype for dtype, name in DTYPES.items()}


class Dims:
    """Types of nodes, and the names of symbolic extents. `names`: torch's symbol -> the user's name for it."""

    def __init__(self, names: Mapping[str, str] | None = None) -> None:
        self.names = dict(names or {})
        self.symbols: dict[str, Any] = {}  # extent's name -> a SymInt that holds it

    def extent(self, dim: Any) -> Dim:
        """A number, or the name of a symbolic extent ("N", "2*N", "s0")."""
        if isinstance(dim, int):
            return dim
        name = _SYMBOL.sub(lambda match: self.names.get(match[0], match[0]), str(dim.node.expr).replace(" ", ""))
        self.symbols.setdefault(name, dim)
        return name

    def of_value(self, val: Any) -> ValueType:
        """Type of a tensor or of a scalar."""
        if isinstance(val, torch.Tensor):
            shape = tuple(val.shape)
            for dim in shape:
                if type(dim) is not int:
                    shape = tuple(self.extent(dim) for dim in shape)  # type: ignore[misc]
                    break
            return ValueType(shape, DTYPES.get(val.dtype))
        if isinstance(val, bool | torch.SymBool):
            return _BOOL
        if isinstance(val, int | torch.SymInt):
            return _SCALAR
        if isinstance(val, float | torch.SymFloat):
            return _FLOAT
        if hasattr(val, "shape") and hasattr(val, "dtype"):  # ShapeProp's TensorMetadata
            return ValueType(tuple(self.extent(dim) for dim in val.shape), DTYPES.get(val.dtype))
        return UNKNOWN

    def of(self, node: fx.Node) -> ValueType:
        """Type of a node's result, as far as its metadata tell."""
        meta = node.meta
        val = meta.get("val")
        if val is None:
            val = meta.get("example_value", meta.get("tensor_meta"))
        if val is not None:
            return self.of_value(val)
        declared = (meta.get("custom") or {}).get("rescompile", {}).get("type")
        return declared_type(declared) if declared is not None else UNKNOWN

    def is_scalar(self, node: fx.Node) -> bool:
        """Whether a node is known to hold a number and not a tensor."""
        return isinstance(node.meta.get("val"), bool | int | float | torch.SymInt | torch.SymBool | torch.SymFloat)


def declared_type(recorded: Any) -> ValueType:
    """The type that `record_type` wrote down."""
    shape, dtype = recorded
    return ValueType(None if shape is None else tuple(shape), dtype)


def record_type(kind: ValueType) -> list[Any]:
    """A type as plain JSON."""
    return [None if kind.shape is None else list(kind.shape), kind.dtype]


def static_shape(shape: Shape | None) -> tuple[int, ...] | None:
    """The shape when every extent is a number."""
    if shape is None or not all(isinstance(extent, int) for extent in shape):
        return None
    return tuple(int(extent) for extent in shape)
