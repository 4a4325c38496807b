"""Extents of a graph as TVM expressions: names become variables, arithmetic in names is read, never evaluated."""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from tvm import tirx

from rescompile.graph import Dim

Extent = Any  # an int or a tirx.PrimExpr of type int64

_OPERATIONS: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: lambda a, b: a // b if isinstance(a, int) and isinstance(b, int) else tirx.floordiv(a, b),
}


class Symbols:
    """The symbolic extents of one function."""

    def __init__(self, known: Mapping[str, int] | None = None) -> None:
        self._variables: dict[str, Any] = dict(known or {})

    def declare(self, dim: Dim) -> Extent:
        """The extent of an input: each new name is a variable that the input's shape binds at run time."""
        if isinstance(dim, int):
            return dim
        if dim not in self._variables:
            identifier = dim if dim.isidentifier() else f"extent_{len(self._variables)}"
            self._variables[dim] = tirx.Var(identifier, "int64")
        return self._variables[dim]

    def resolve(self, dim: Dim) -> Extent | None:
        """The extent in terms of declared variables, None when it cannot be said in them."""
        if isinstance(dim, int):
            return dim
        if dim in self._variables:
            return self._variables[dim]
        try:
            return self._read(ast.parse(dim, mode="eval").body)
        except (SyntaxError, KeyError):
            return None

    def shape(self, shape: Iterable[Dim]) -> list[Extent | None]:
        """Each extent resolved."""
        return [self.resolve(dim) for dim in shape]

    def _read(self, node: ast.expr) -> Extent:
        if isinstance(node, ast.Constant) and isinstance(node.value, int):
            return node.value
        if isinstance(node, ast.Name):
            return self._variables[node.id]
        if isinstance(node, ast.BinOp):
            return _OPERATIONS[type(node.op)](self._read(node.left), self._read(node.right))
        raise KeyError(type(node).__name__)


def static(extent: Extent) -> int | None:
    """The number that an extent is, None when it is known only at run time."""
    if isinstance(extent, int):
        return extent
    return int(extent.value) if isinstance(extent, tirx.IntImm) else None
