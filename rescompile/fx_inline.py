"""Exported programs as one flat graph: regions under `no_grad` or disabled `autocast` unwrapped, no input checks."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx
from torch.export import ExportedProgram

_GRAD = "wrap_with_set_grad_enabled"
_AUTOCAST = "wrap_with_autocast"


def unfold(program: ExportedProgram) -> fx.GraphModule:
    """The program as one flat graph, without the checks of its inputs, which no edit would keep up to date."""
    module = program.module()
    graph = module.graph
    drop_guards(module)
    inlined: list[str] = []
    pending = [node for node in graph.nodes if _is_region(node)]
    for node in pending:  # grows: a region may hold regions
        pending.extend(_inline(module, node, inlined))
    kept = {str(node.target) for node in graph.find_nodes(op="get_attr")}
    for name in inlined:
        if "." not in name and not any(target == name or target.startswith(f"{name}.") for target in kept):
            module._modules.pop(name, None)
    return module


def drop_guards(module: fx.GraphModule) -> None:
    """Remove torch.export's checks of the inputs: no edit keeps them up to date, and they cannot be pickled."""
    for node in module.graph.find_nodes(op="call_module", target="_guards_fn"):
        module.graph.erase_node(node)
    module._modules.pop("_guards_fn", None)


def _is_region(node: fx.Node) -> bool:
    name = getattr(node.target, "__name__", "")
    if node.op != "call_function" or name not in (_GRAD, _AUTOCAST):
        return False
    called = node.args[1] if name == _GRAD else node.args[4]
    enabled_autocast = name == _AUTOCAST and bool(node.args[2])
    return isinstance(called, fx.Node) and not enabled_autocast


def _inline(module: fx.GraphModule, node: fx.Node, inlined: list[str]) -> list[fx.Node]:
    """Put the nodes of a region in its place; results of one without gradients are detached. The regions within."""
    grad = getattr(node.target, "__name__", "") == _GRAD
    called: Any = node.args[1] if grad else node.args[4]
    operands = list(node.args[2:] if grad else node.args[5:])
    region = module.get_submodule(str(called.target))
    if not isinstance(region, fx.GraphModule) or any(user.target is not operator.getitem for user in node.users):
        return []
    graph = module.graph
    inner: dict[fx.Node, Any] = {}
    results: Any = ()
    with graph.inserting_before(node):
        for item in region.graph.nodes:
            if item.op == "placeholder":
                inner[item] = operands.pop(0)
            elif item.op == "output":
                results = fx.map_arg(item.args[0], inner.__getitem__)
            else:
                inner[item] = graph.node_copy(item, inner.__getitem__)
                if item.op == "get_attr":
                    inner[item].target = f"{called.target}.{item.target}"
    for user in list(node.users):
        result = results[user.args[1]]
        if grad and not node.args[0]:
            user.target, user.args = torch.ops.aten.detach.default, (result,)
        else:
            user.replace_all_uses_with(result)
            graph.erase_node(user)
    graph.erase_node(node)
    if not called.users:
        graph.erase_node(called)
    inlined.append(str(called.target))
    return [item for item in inner.values() if isinstance(item, fx.Node) and _is_region(item)]
