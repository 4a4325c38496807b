"""Bookkeeping of native edits: names, `get_attr` nodes, removal, order, and shapes of new nodes."""

from __future__ import annotations

import builtins
import keyword
import operator
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from rescompile.errors import GraphError
from rescompile.fx_tree import device_of, owner_of
from rescompile.fx_types import TORCH_DTYPES, Dims, record_type, static_shape
from rescompile.fx_view import is_check
from rescompile.graph import Op, Shape, Value, ValueType
from rescompile.kinds import OpKind

if TYPE_CHECKING:
    from rescompile.fx_graph import FxGraph

# What makes a tensor out of numbers must be told where.
_SOURCES = (torch.ops.aten.full.default, torch.ops.aten.arange.start_step, torch.ops.aten.scalar_tensor.default)
_NOT_WORD = re.compile(r"\W")


def identifier(name: str) -> str:
    """The name as torch.fx can use it for a node."""
    name = _NOT_WORD.sub("_", name)
    if not name or name[0].isdigit() or keyword.iskeyword(name) or hasattr(builtins, name):
        name = f"_{name}"
    return name


class Nodes:
    """What native edits must know of a graph beside the graph itself."""

    def __init__(self, module: fx.GraphModule, dims: Dims) -> None:
        self.module = module
        self.graph = module.graph
        self.dims = dims
        self.holders: dict[str, fx.Node] = {}
        self.getters: dict[str, fx.Node] = {}
        self.extents: dict[str, fx.Node] = {}
        self.waiting: dict[fx.Node, None] = {}  # erased in the view, but read natively
        self.fake_mode: FakeTensorMode | None = None
        self.device = device_of(module)
        for node in self.graph.nodes:
            self.holders[node.name] = node
            if node.op == "get_attr":
                self.getters.setdefault(str(node.target), node)
            val = node.meta.get("val")
            if self.fake_mode is None and isinstance(val, FakeTensor):
                self.fake_mode = val.fake_mode

    @contextmanager
    def at(self, node: fx.Node) -> Iterator[None]:
        """New nodes go behind `node`, in the order in which they are made."""
        with self.graph.inserting_before(node.next):
            yield

    def header(self) -> fx.Node:
        """The last of the leading placeholders and `get_attr`s."""
        last = self.graph._root
        for node in self.graph.nodes:
            if node.op not in ("placeholder", "get_attr"):
                break
            last = node
        return last

    def rename(self, node: fx.Node, name: str) -> None:
        """Give `node` a name; whoever has it gets another."""
        name = identifier(name)
        if node.name == name:
            return
        holder = self.holders.get(name)
        if holder is not None and not holder._erased:
            self._set_name(holder, self.graph._graph_namespace.create_name(name, None))
        self.holders.pop(node.name, None)
        self._set_name(node, name)

    def _set_name(self, node: fx.Node, name: str) -> None:
        self.graph._graph_namespace._used_names.add(name)
        node.name = name
        self.holders[name] = node

    def call(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> fx.Node:
        """A new `call_function` node at the current place."""
        if target in _SOURCES and self.device.type != "cpu":
            kwargs = {**kwargs, "device": self.device}
        node = self.graph.call_function(target, args, kwargs)
        self.holders[node.name] = node
        self._infer(node)
        return node

    def _infer(self, node: fx.Node) -> None:
        """`meta["val"]` by running the node on fake tensors, where its operands have them."""
        mode = self.fake_mode
        operands = node.all_input_nodes
        if mode is None or any("val" not in operand.meta for operand in operands):
            return
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda operand: operand.meta["val"])
        target: Any = node.target
        try:
            with mode, torch.no_grad():
                node.meta["val"] = target(*args, **kwargs)
        except (RuntimeError, ValueError, TypeError, IndexError) as error:
            reason = str(error).strip().splitlines()[0]
            raise GraphError(f"torch cannot make '{target}' on these operands: {reason}") from error

    def declare(self, node: fx.Node, value: Value) -> None:
        """Type the node by its operands as they are now, and check that this is the value's declared type."""
        for key in ("val", "example_value", "tensor_meta"):
            node.meta.pop(key, None)
        if node.op == "call_function":
            self._infer(node)
        if "val" in node.meta:
            check_type(self.dims.of(node), value)
        custom = dict(node.meta.get("custom") or {})
        custom["rescompile"] = {**custom.get("rescompile", {}), "type": record_type(value.type)}
        node.meta["custom"] = custom

    def getter(self, target: str) -> fx.Node:
        """The node that reads the tensor at a path of the module."""
        node = self.getters.get(target)
        if node is not None and not node._erased:
            return node
        first = next(iter(self.graph.nodes))
        with self.graph.inserting_before(first):
            node = self.graph.create_node("get_attr", target, (), {})
        self.holders[node.name] = node
        self.getters[target] = node
        if self.fake_mode is not None:
            module, leaf = owner_of(self.module, target)
            node.meta["val"] = self.fake_mode.from_tensor(getattr(module, leaf), static_shapes=True)
        return node

    def drop_getter(self, target: str) -> bool:
        """Remove the nodes that read a tensor; False when something still reads them."""
        getters = [n for n in self.graph.find_nodes(op="get_attr", target=target) if not n._erased]
        for node in getters:
            self._erase_checks(node)
        if any(node.users for node in getters):
            return False
        for node in getters:
            self._remove(node)
        self.getters.pop(target, None)
        return True

    def called(self, targets: Sequence[str]) -> bool:
        """Whether a node calls the module that holds one of the tensors."""
        calls = {str(node.target) for node in self.graph.find_nodes(op="call_module")}
        return any(target.startswith(f"{path}.") for target in targets for path in calls)

    def item(self, node: fx.Node, index: int, name: str) -> fx.Node:
        """The node that takes one result of a node with several."""
        with self.graph.inserting_before(node.next):
            item = self.graph.call_function(operator.getitem, (node, index))
        val = node.meta.get("val")
        if val is not None:
            item.meta["val"] = val[index]
        self.holders[item.name] = item
        self.rename(item, name)
        return item

    def extent(self, name: str) -> fx.Node:
        """A node that holds a symbolic extent: read from an input that has it."""
        found = self.extents.get(name)
        if found is not None and not found._erased:
            return found
        for node in self.graph.find_nodes(op="placeholder"):
            shape = self.dims.of(node).shape or ()
            if name in shape:
                with self.at(self.header()):
                    found = self.call(torch.ops.aten.sym_size.int, (node, shape.index(name)), {})
                self.extents[name] = found
                return found
        raise GraphError(f"No input of the model has the dimension '{name}', so no operation can be given it.")

    def erase(self, nodes: Iterable[fx.Node]) -> None:
        """Remove nodes; one that something outside the view still reads goes as soon as that does."""
        for node in sorted((n for n in nodes if not n._erased), reverse=True):
            self._erase_checks(node)
            if node.users:
                self.waiting[node] = None
            else:
                self._remove(node)

    def sweep(self) -> None:
        """Remove the nodes that wait and that nothing reads any more."""
        for node in sorted((n for n in self.waiting if not n._erased), reverse=True):
            self._erase_checks(node)
            if not node.users:
                self._remove(node)
                del self.waiting[node]

    def carry_over(self, old: Sequence[fx.Node], new: Sequence[fx.Node]) -> None:
        """What the view does not hold of an operation: how its statistics move, and how it changes with the mode."""
        from rescompile.fx_modes import carry_over

        carry_over(self.module, old, new)

    def _erase_checks(self, node: fx.Node) -> None:
        for user in list(node.users):
            if is_check(user) or (not user.users and user.op == "call_function" and user.target is operator.getitem):
                self._remove(user)
            elif self.dims.is_scalar(user) and user.users and all(is_check(reader) for reader in user.users):
                self._erase_checks(user)
                self._remove(user)

    def _remove(self, node: fx.Node) -> None:
        self.holders.pop(node.name, None)
        self.graph.erase_node(node)


class NodeTorch:
    """Makes fx nodes for one operation."""

    def __init__(self, graph: FxGraph, nodes: Nodes, op: Op) -> None:
        self.nodes = nodes
        self.op = op
        self.made: list[fx.Node] = []
        self.stamp = {"pass": op.provenance, "module": op.module}

    def __call__(self, target: Any, *args: Any, **kwargs: Any) -> Any:
        node = self.nodes.call(target, args, kwargs)
        node.meta["custom"] = {"rescompile": dict(self.stamp)}
        self.made.append(node)
        return node

    def items(self, node: fx.Node, op: Op) -> list[fx.Node]:
        """A node for each result of `node`."""
        found = []
        for index in range(len(op.outputs)):
            item = self(operator.getitem, node, index)
            found.append(item)
        return found

    def shape(self, value: Any) -> Shape | None:
        """Shape of an operand."""
        return self.nodes.dims.of(value).shape if isinstance(value, fx.Node) else ()

    def dtype(self, value: Any) -> str | None:
        """Dtype of an operand."""
        return self.nodes.dims.of(value).dtype if isinstance(value, fx.Node) else None

    def out_shape(self, index: int = 0) -> list[Any]:
        """Shape of an output; −1 for the one symbolic extent of a reshape, a node for any other."""
        shape = self.op.outputs[index].shape
        if shape is None:
            raise GraphError(f"'{self.op.name}' needs a known output shape.")
        symbolic = [extent for extent in shape if not isinstance(extent, int)]
        if self.op.kind is OpKind.RESHAPE and len(symbolic) == 1:
            return [extent if isinstance(extent, int) else -1 for extent in shape]
        return [extent if isinstance(extent, int) else self.nodes.extent(extent) for extent in shape]

    def out_dtype(self) -> torch.dtype | None:
        """Dtype of the first output."""
        return TORCH_DTYPES.get(self.op.output.dtype or "")

    def check(self, node: fx.Node, value: Value) -> None:
        """That torch agrees with the declared type, which the node then carries."""
        found = self.nodes.dims.of(node)
        declared = value.type
        check_type(found, value)
        node.meta["custom"]["rescompile"]["type"] = record_type(declared if declared.shape is not None else found)


def check_type(found: ValueType, value: Value) -> None:
    """GraphError where torch makes another type than is declared."""
    declared = value.type
    if found.shape is not None and declared.shape is not None and not _agree(found, declared):
        raise GraphError(f"'{value.name}' was declared as {_text(declared)}, but torch makes {_text(found)} of it.")


def _agree(found: ValueType, declared: ValueType) -> bool:
    a, b = static_shape(found.shape), static_shape(declared.shape)
    if a is not None and b is not None and a != b:
        return False
    same_rank = found.shape is None or declared.shape is None or len(found.shape) == len(declared.shape)
    return same_rank and (declared.dtype is None or found.dtype == declared.dtype)


def _text(kind: ValueType) -> str:
    return f"{kind.dtype}[{', '.join(str(extent) for extent in kind.shape or ())}]"


def sort_nodes(graph: fx.Graph) -> None:
    """Stable topological order: a node keeps its place unless one that it reads comes later."""
    seen: set[fx.Node] = set()
    for node in graph.nodes:
        if any(operand not in seen for operand in node.all_input_nodes):
            break
        seen.add(node)
    else:
        return
    done: dict[fx.Node, None] = {}
    for root in graph.nodes:
        stack = [root]
        while stack:
            node = stack[-1]
            pending = next((operand for operand in node.all_input_nodes if operand not in done), None)
            if pending is None:
                done[stack.pop()] = None
            elif len(stack) > len(graph.nodes):
                raise GraphError(f"The graph has a cycle through '{node.name}': undo the edit that made it.")
            else:
                stack.append(pending)
    cursor = graph._root
    for node in done:
        cursor.append(node)
        cursor = node
