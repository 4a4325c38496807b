"""What the view of an fx graph notes of the native nodes, and what it leaves out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn

from rescompile.fx_ops import Call
from rescompile.graph import Value

# Checks: they compute nothing that the model's outputs depend on.
_CHECKS = frozenset(
    {
        "_assert_tensor_metadata",
        "_assert_scalar",
        "_assert_async",
        "_functional_assert_async",
        "_functional_assert_scalar",
        "sym_constrain_range",
        "sym_constrain_range_for_size",
        "_assert",
        "_check",
    }
)


@dataclass(frozen=True, slots=True)
class Item:
    """One result of a node that has several, while no `getitem` node reads it."""

    node: fx.Node
    index: int


@dataclass(slots=True)
class Deferred:
    """A node that is read into an operation only when something other than its one expected reader asks for it."""

    node: fx.Node
    call: Call
    preview: Value


@dataclass(slots=True)
class Native:
    """What the reader learnt of the native graph beside the view."""

    # In-place nodes whose effect the view already shows as a function, with the nodes that are the same tensor.
    in_place: list[tuple[fx.Node, tuple[fx.Node, ...]]] = field(default_factory=list)
    duplicates: list[tuple[fx.Node, fx.Node]] = field(default_factory=list)  # a second getitem, and the first
    hidden: set[fx.Node] = field(default_factory=set)
    targets: dict[str, Value] = field(default_factory=dict)  # attribute path -> value, tied paths to the same
    training_nodes: int = 0
    # Values that are a node's tensor after something wrote to it: natively the node itself.
    versions: dict[fx.Node, list[Value]] = field(default_factory=dict)


def is_check(node: fx.Node) -> bool:
    """Whether a node only checks what it reads."""
    if node.op == "call_module":
        return node.target == "_guards_fn"
    name = getattr(node.target, "_opname", None) or getattr(node.target, "__name__", "")
    return node.op == "call_function" and name in _CHECKS


def module_path(node: fx.Node) -> str:
    """Dotted path of the innermost module whose forward made the node, "" when unknown."""
    ours = (node.meta.get("custom") or {}).get("rescompile")
    if ours and "module" in ours:
        return str(ours["module"])
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return ""
    path = next(reversed(stack.values()))
    path = path[0] if isinstance(path, tuple | list) else path
    return "" if path.startswith("_empty_nn_module_stack") else path.removeprefix("L['self'].")


def made_by(node: fx.Node) -> str:
    """Name of the pass that made the node, "" for nodes of the user's own."""
    ours = (node.meta.get("custom") or {}).get("rescompile")
    return str(ours["pass"]) if ours and "pass" in ours else ""


def target_name(node: fx.Node, modules: Mapping[str, nn.Module]) -> str:
    """What an opaque node calls, for people: "aten.sort.default", "torch.nn.MultiheadAttention", ".numpy"."""
    if node.op == "call_module":
        kind = type(modules[str(node.target)])
        return f"{kind.__module__}.{kind.__qualname__}"
    if node.op == "call_method":
        return f".{node.target}"
    target: Any = node.target
    if isinstance(target, torch._ops.OpOverload):
        return str(target)
    return f"{getattr(target, '__module__', None) or ''}.{getattr(target, '__name__', target)}".lstrip(".")


# Operators that move elements, by a schema that does not tell.
_MOVES = {f"aten::{name}" for name in ("index", "gather", "take", "repeat", "repeat_interleave", "tril", "triu")}


def works(node: fx.Node) -> bool:
    """Whether the operator that a node calls may do more than to move elements, or reduce, or compute each alone."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload):
        return True
    idle = torch.Tag.pointwise in target.tags or torch.Tag.reduction in target.tags
    return not (idle or target.is_view or target._schema.name in _MOVES)


def tensor_at(module: nn.Module, path: str) -> Any:
    """What is at a dotted path of the module, None when nothing is."""
    found: Any = module
    for part in path.split("."):
        found = getattr(found, part, None)
        if found is None:
            return None
    return found
