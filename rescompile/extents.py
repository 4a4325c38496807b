"""Symbolic extents as numbers: `N`, and expressions such as `2*N + 1`, by what the symbols stand for."""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Mapping

from rescompile.graph import Dim

_OPERATORS: dict[type, Callable[[int, int], int]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
    ast.Div: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: lambda base, exponent: base**exponent if abs(base) < 1 << 32 and 0 <= exponent <= 4 else 1,
}
_LONGEST = 256  # characters of an extent's expression; a file may hold any text


def extent_of(dim: Dim, known: Mapping[str, int], default: int | None = None) -> int | None:
    """The extent as a number; None when it is none. `default`: what a symbol that is not `known` counts as."""
    if isinstance(dim, int):
        return dim
    if dim in known:
        return known[dim]
    if len(dim) > _LONGEST:
        return None
    try:
        return max(0, _evaluate(ast.parse(dim, mode="eval").body, known, default))
    except (SyntaxError, ValueError, ZeroDivisionError):
        return None


def _evaluate(node: ast.expr, known: Mapping[str, int], default: int | None) -> int:
    if isinstance(node, ast.Constant) and isinstance(node.value, int):
        return node.value
    if isinstance(node, ast.Name):
        value = known.get(node.id, default)
        if value is not None:
            return value
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        left, right = (_evaluate(side, known, default) for side in (node.left, node.right))
        return _OPERATORS[type(node.op)](left, right)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -_evaluate(node.operand, known, default)
    raise ValueError(ast.unparse(node))
