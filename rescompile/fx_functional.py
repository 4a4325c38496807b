"""Operations in place as functions: natively, so that edits may move readers freely.

The plain case (`relu_` on a tensor that has no other view) is left as it is until the first edit: the view shows it as
a function anyway. A write through a view (`x[:, 1:3].zero_()`) is rewritten while reading, by scattering the written
part back into the whole.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx

from rescompile.fx_ops import python_argument

aten = torch.ops.aten
_OPERATORS: dict[Any, Any] = {
    operator.iadd: operator.add,
    operator.isub: operator.sub,
    operator.imul: operator.mul,
    operator.itruediv: operator.truediv,
}
_RESHAPES = (aten.view.default, aten.reshape.default, aten.unsqueeze.default, aten.squeeze.dim, aten.squeeze.dims)
_SAME = (aten.alias.default, aten.detach.default, aten.contiguous.default)


def out_of_place(module: fx.GraphModule, node: fx.Node) -> bool:
    """Let a node that changes its first argument compute a new tensor instead; False when torch has no such form."""
    target: Any = node.target
    if node.op == "call_module":
        called: Any = module.get_submodule(str(target))
        if getattr(called, "inplace", False):
            called.inplace = False
        return True
    if isinstance(target, torch._ops.OpOverload):
        namespace, _, name = target._schema.name.partition("::")
        packet = getattr(getattr(torch.ops, namespace), name.removesuffix("_"), None)
        if packet is None or target._overloadname not in packet.overloads():
            return False
        node.target = getattr(packet, target._overloadname)
    elif target in _OPERATORS:
        node.target = _OPERATORS[target]
    elif node.op == "call_method" and target.endswith("_"):
        node.target = target.removesuffix("_")
    elif "inplace" in node.kwargs:
        node.update_kwarg("inplace", False)
    else:
        place = python_argument(target, "inplace")
        if place is not None and place < len(node.args):
            node.update_arg(place, False)
        elif getattr(target, "__name__", "").endswith("_"):
            node.target = getattr(torch, target.__name__.removesuffix("_"), target)
    return True


def make_functional(
    module: fx.GraphModule,
    in_place: Sequence[tuple[fx.Node, Sequence[fx.Node]]],
    duplicates: Sequence[tuple[fx.Node, fx.Node]],
) -> None:
    """Replace operations in place by functions whose result the later readers read; merge equal `getitem`s.

    `in_place`: each operation with the nodes that are the tensor it changes.
    """
    for node, family in in_place:
        for member in family:
            for user in list(member.users):
                if user is not node and user > node:
                    user.replace_input_with(member, node)
        out_of_place(module, node)
    for second, first in duplicates:
        second.replace_all_uses_with(first)
        if not second.users:
            module.graph.erase_node(second)


def scatter_back(step: fx.Node, whole: fx.Node, part: fx.Node) -> fx.Node | None:
    """The tensor `whole` of which `step` is a view, with `part` in that view's place; None for other views.

    New nodes go to the graph's current place.
    """
    graph, target, args = step.graph, step.target, step.args
    made: fx.Node
    if target in _SAME:
        return part
    if target is aten.slice.Tensor:
        made = graph.call_function(aten.slice_scatter.default, (whole, part, *args[1:]))
    elif target is aten.select.int:
        made = graph.call_function(aten.select_scatter.default, (whole, part, *args[1:]))
    elif target is aten.transpose.int:
        made = graph.call_function(aten.transpose.int, (part, *args[1:]))
    elif target is aten.permute.default:
        perm: Any = args[1]
        made = graph.call_function(aten.permute.default, (part, [perm.index(axis) for axis in range(len(perm))]))
    elif target in _RESHAPES:
        val = whole.meta.get("val")
        if val is None or not all(isinstance(extent, int) for extent in val.shape):
            return None
        made = graph.call_function(aten.reshape.default, (part, list(val.shape)))
    else:
        return None
    made.meta = {key: value for key, value in whole.meta.items() if key in ("val", "nn_module_stack", "stack_trace")}
    return made


def replay(path: Sequence[fx.Node], versions: Mapping[fx.Node, fx.Node]) -> fx.Node:
    """The last of a chain of views, taken anew of the new version of the tensor that the chain starts from."""
    current = dict(versions)
    made = path[0]
    for step in path:
        made = step.graph.node_copy(step, lambda argument: current.get(argument, argument))
        current[step] = made
    return made
