"""Graphs that torch operations hold: the branches of `cond`, the bodies of loops, what a wrapper runs.

The argument of such an operation is a `get_attr` of a GraphModule, or a `call_module` calls one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import fx, nn

from rescompile.fx_ops import Attr
from rescompile.fx_tree import copy_module, owner_of
from rescompile.fx_view import tensor_at
from rescompile.graph import Body, Op, Value

if TYPE_CHECKING:
    from rescompile.fx_graph import FxGraph

# Operations that run their one graph exactly once. What follows the graph are its operands.
_CALLS = frozenset(
    {
        "wrap_with_autocast",
        "wrap_with_set_grad_enabled",
        "tag_activation_checkpoint",
        "wrap_activation_checkpoint",
        "wrap",
        "invoke_subgraph",
        "hints_wrapper",
        "strict_mode",
    }
)
# Operations that run their graphs any number of times, and the argument that is the same on every run: the last
# placeholders are its. What a loop carries, and the slices that it scans, are not the same.
_INVARIANT = {"cond": 3, "while_loop": 3, "scan": 3, "associative_scan": 2, "map_impl": 2}


def holds_graphs(node: fx.Node, module: fx.GraphModule) -> bool:
    """Whether a node runs graphs of its own."""
    if node.op == "call_module":
        return isinstance(_module_at(module, str(node.target)), fx.GraphModule)
    return any(argument.op == "get_attr" and _called(module, argument) for argument in node.all_input_nodes)


def read_bodies(graph: FxGraph, op: Op) -> tuple[Body, ...]:
    """The graphs that the operation's node runs, each a copy that shares tensors."""
    node = next((native for native in op.native if native.op in ("call_function", "call_module")), None)
    if node is None or not holds_graphs(node, graph.module):
        return ()
    if node.op == "call_module":
        return (_read(graph, op, node, str(node.target), _flat((node.args, node.kwargs)), True),)
    name = getattr(node.target, "__name__", "")
    arguments = list(node.args)
    paths = [argument for argument in node.all_input_nodes if argument.op == "get_attr"]
    paths = [argument for argument in paths if _called(graph.module, argument)]
    call = name in _CALLS and len(paths) == 1 and paths[0] in arguments
    if call:
        operands = _flat(arguments[arguments.index(paths[0]) + 1 :])
        operands = [operand for operand in operands if not isinstance(operand, str)]
    else:
        place = _INVARIANT.get(name, len(arguments))
        operands = _flat(arguments[place : place + 1])
    return tuple(_read(graph, op, node, str(path.target), operands, call) for path in paths)


def _read(graph: FxGraph, op: Op, node: fx.Node, path: str, operands: Sequence[Any], call: bool) -> Body:
    from rescompile.fx_graph import FxGraph as Read

    source = _module_at(graph.module, path)
    module = copy_module(source, {})
    outer = _values(graph, op, node)
    places = list(module.graph.find_nodes(op="placeholder"))
    call = call and len(operands) == len(places) and all(operand in outer for operand in operands)
    given: dict[str, Value] = {}
    shared: dict[str, Value] = {}
    for place, operand in zip(places[::-1], list(operands)[::-1], strict=False):
        value = outer.get(operand) if isinstance(operand, fx.Node) else None
        if value is None:
            continue
        given[place.name] = value
        if isinstance(value.native, Attr) and (target := _bind(graph, module, place, value.native.target)):
            shared[target] = value
    body = Read.read(module, name=path, dims=graph.dims)
    bound = {value: given[value.name] for value in body.inputs if value.name in given}
    for target, value in body.native.targets.items():
        found = shared.get(target) or graph.native.targets.get(f"{path}.{target}")
        if found is not None:
            bound[value] = found
    return Body(path, body, bound, call)


def _bind(graph: FxGraph, module: fx.GraphModule, place: fx.Node, path: str) -> str:
    """Let a tensor of the outer module be one of the body, under the same name, in the place of a placeholder."""
    tensor = tensor_at(graph.module, path)
    if tensor is None or tensor_at(module, path) is not None:
        return ""
    owner, leaf = owner_of(module, path, create=True)
    if isinstance(tensor, nn.Parameter):
        owner.register_parameter(leaf, tensor)
    else:
        owner.register_buffer(leaf, tensor)
    with module.graph.inserting_before(place):
        getter = module.graph.get_attr(path)
    getter.meta = dict(place.meta)
    place.replace_all_uses_with(getter)
    module.graph.erase_node(place)
    return path


def _values(graph: FxGraph, op: Op, node: fx.Node) -> dict[Any, Value]:
    """The outer values of a node's arguments, where each is one value."""
    found: dict[Any, Value] = {}
    read = {value.native: value for value in op.inputs if value is not None and isinstance(value.native, fx.Node)}
    for argument in node.all_input_nodes:
        value = graph.native.targets.get(str(argument.target)) if argument.op == "get_attr" else read.get(argument)
        if value is not None:
            found[argument] = value
    return found


def _called(module: fx.GraphModule, argument: fx.Node) -> bool:
    return isinstance(_module_at(module, str(argument.target)), fx.GraphModule)


def _module_at(module: nn.Module, path: str) -> Any:
    found: Any = module
    for part in path.split("."):
        found = getattr(found, part, None)
    return found


def _flat(arguments: Any) -> list[Any]:
    found: list[Any] = []
    torch.fx.node.map_aggregate(arguments, found.append)
    return found
