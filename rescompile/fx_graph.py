"""`FxGraph`: the graph protocol over a `torch.fx.GraphModule`.

An `FxGraph` owns its module's graph and module tree; tensors may be shared with the user's object. What a value is
natively: an fx node; `Attr`, a tensor of the module tree, read through a `get_attr` node that is made on demand;
`Item`, a result of a node with several that nothing reads yet; a Python number.
"""

from __future__ import annotations

import gc
import operator
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Self

import numpy as np
import torch
from torch import fx, nn
from torch.export import ExportedProgram

from rescompile.composites import recognise
from rescompile.errors import GraphError
from rescompile.fx_bodies import read_bodies
from rescompile.fx_emit import EMITTERS, emit
from rescompile.fx_functional import make_functional
from rescompile.fx_modes import new_norm
from rescompile.fx_native import Nodes, NodeTorch, sort_nodes
from rescompile.fx_ops import Attr
from rescompile.fx_read import Reader
from rescompile.fx_result import Origin, save, to_user
from rescompile.fx_run import run_apart, run_nodes
from rescompile.fx_tree import (
    add_tensor,
    copy_module,
    device_of,
    owner_of,
    remove_tensor,
    replace_tensor,
    to_numpy,
    to_torch,
)
from rescompile.fx_types import Dims
from rescompile.fx_view import Item, Native
from rescompile.graph import Body, Graph, Op, Value
from rescompile.kinds import OpKind, Trait


class FxGraph(Graph):
    """A view of, and the edits on, one `GraphModule`."""

    ir = "fx"

    def __init__(self, name: str = "") -> None:
        super().__init__(name)
        self.module: fx.GraphModule
        self.dims = Dims()
        self.native = Native()
        self.output_names: tuple[str, ...] = ()
        self.origin: Origin | None = None
        self.forgone: set[str] = set()  # nodes of the captured graph that neither form has any more
        self._nodes: Nodes | None = None  # bookkeeping of native edits, made by the first one

    @classmethod
    def read(cls, module: fx.GraphModule, *, name: str = "", dims: Dims | None = None) -> Self:
        """A graph that owns `module`: its edits change it in place."""
        graph = cls(name)
        graph.module = module
        graph.dims = dims if dims is not None else Dims()
        with _without_collections():
            graph.native = Reader(graph, module, graph.dims).read()
            recognise(graph)
            graph.sort()
        graph.output_names = _unique(value.name for value in graph.outputs)
        return graph

    @property
    def training(self) -> bool:
        """Whether the graph holds operations in their training form."""
        return self.native.training_nodes > 0 or self.module.training

    def cannot_emit(self, kind: OpKind) -> str:
        """Why torch nodes cannot be made for a kind; empty when they can."""
        return "" if kind in EMITTERS else f"torch has no one operation for '{kind.value}'"

    # ---- the protocol ------------------------------------------------------------------------------------------

    def native_data(self, value: Value) -> np.ndarray[Any, Any]:
        """Contents of a parameter or literal."""
        native = value.native
        if isinstance(native, Attr):
            module, leaf = owner_of(self.module, native.target)
            return to_numpy(getattr(module, leaf))
        return np.asarray(native, dtype=value.dtype if value.dtype != "bfloat16" else "float32")

    def native_bodies(self, op: Op) -> tuple[Body, ...]:
        """The graphs that the operation's node runs."""
        return read_bodies(self, op)

    def insert(self, *arguments: Any, **options: Any) -> Op:
        """A new operation, native node included; a batch norm among them follows `train()` and `eval()`."""
        op = super().insert(*arguments, **options)
        for node in op.native:
            new_norm(node, self.training)
        return op

    def native_emit(self, op: Op) -> None:
        """Nodes for `op`, before the node that it replaces or else behind its last operand."""
        nodes = self._edit()
        arguments = [None if value is None else self._argument(value) for value in op.inputs]
        torch_ = NodeTorch(self, nodes, op)
        with nodes.at(self._place(op)):
            result = emit(torch_, op.kind, arguments, op.attrs)
            if not isinstance(result, fx.Node) or result in arguments:
                result = torch_(torch.ops.aten.alias.default, result)
            results = [result] if len(op.outputs) == 1 and op.kind.spec.outputs == 1 else torch_.items(result, op)
        for value, node in zip(op.outputs, results, strict=True):
            torch_.check(node, value)
            nodes.rename(node, value.name)
            value.native = node
        op.native = tuple(torch_.made)

    def native_redirect(self, old: Any, value: Value) -> None:
        """Let readers of `old` read the value's node."""
        new = self._argument(value)
        if isinstance(old, fx.Node) and old is not new:
            old.replace_all_uses_with(new)
            _loosen_views(new)
            versions = self.native.versions.pop(old, [])
            for version in versions:
                version.native = new
            if versions:
                self.native.versions[new] = versions

    def native_set_operand(self, op: Op, index: int, value: Value) -> None:
        """Change arguments in place where they are nothing but the operand; else make the operation's nodes anew."""
        self._edit()
        old = op.inputs[index]
        slots = self._slots(op, old)
        if slots and not isinstance(value.native, int | float):
            new = self._argument(value)
            for node, argument in slots:
                node.replace_input_with(argument, new)
            _loosen_views(new)
            return
        self._emit_anew(op, index, value)

    def native_ask_shape(self, old: Value, new: Value) -> None:
        """Sizes, and the tensors that `expand_as` and its like take for a shape only."""
        if isinstance(old.native, fx.Node) and isinstance(new.native, fx.Node):
            old.native.replace_all_uses_with(new.native, delete_user_cb=lambda user: user.op != "output")

    def native_replace_output(self, old: Value, new: Value) -> None:
        """Let the graph return `new` where it returned `old`."""
        self._edit()
        self.module.graph.output_node().replace_input_with(self._argument(old), self._argument(new))

    def native_add_parameter(self, value: Value, data: np.ndarray[Any, Any], trainable: bool) -> None:
        """Register the tensor in the module tree."""
        self._edit()
        add_tensor(self.module, value.name, data, trainable=trainable)
        value.native = Attr(value.name)
        self.native.targets[value.name] = value

    def native_add_literal(self, value: Value, number: float) -> None:
        """Numbers stand in nodes as they are."""
        value.native = number

    def native_set_data(self, value: Value, data: np.ndarray[Any, Any]) -> None:
        """Another tensor under all the names that the old one had."""
        self._edit()
        for target in [target for target, tied in self.native.targets.items() if tied is value]:
            replace_tensor(self.module, target, data)

    def native_drop(self, value: Value) -> None:
        """Remove the tensor, under all its names, unless something outside the view reads it."""
        if not isinstance(value.native, Attr):
            return
        nodes = self._edit()
        nodes.sweep()
        targets = [target for target, tied in self.native.targets.items() if tied is value]
        if not all(nodes.drop_getter(target) for target in targets) or nodes.called(targets):
            return
        for target in targets:
            remove_tensor(self.module, target)
            del self.native.targets[target]
            self._drop_counter(target)

    def native_set_shape(self, value: Value) -> None:
        """Infer the node's type anew, or write down the declared one where it cannot be."""
        if isinstance(value.native, fx.Node):
            self._edit().declare(value.native, value)

    def native_forgo(self, op: Op) -> None:
        """Remember the nodes by name: the other form has the same names."""
        self.forgone.update(node.name for node in op.native)

    def native_erase_nodes(self, nodes: tuple[Any, ...]) -> None:
        """Remove nodes, with the checks that read them."""
        self._edit().erase(nodes)

    def native_commit(self) -> None:
        """Sort, check and compile the native graph."""
        if self._nodes is not None:
            self._nodes.sweep()
            sort_nodes(self.module.graph)
        try:
            self.module.graph.lint()
            self.module.recompile()
        except (RuntimeError, ValueError, AssertionError, SyntaxError) as error:
            raise GraphError(f"torch.fx rejects the edited graph: {error}") from error

    def clone(self) -> Self:
        """A copy with a graph and a module tree of its own; tensors are shared."""
        memo: dict[fx.Node, fx.Node] = {}
        copy = super().clone()
        copy.module = copy_module(self.module, memo)
        copy.dims = self.dims
        copy.output_names = self.output_names
        copy.origin = self.origin
        copy.forgone = set(self.forgone)
        copy.native = _map_native(self.native, memo, copy)
        for value in copy._values.values():
            value.native = _map(value.native, memo)
        groups: dict[int, list[Op]] = {}
        for op, twin in zip(self, copy, strict=True):
            twin.native = tuple(_map(node, memo) for node in op.native)
            if op.group is not None:
                twin.group = groups.setdefault(id(op.group), [])
                twin.group.append(twin)
        copy._orphans = {copy.value(value.name): None for value in self._orphans}
        copy._dirty = self._dirty
        return copy

    def to_user(self) -> nn.Module | ExportedProgram:
        """The committed graph as the kind of object that it was captured from, with tensors of its own."""
        return to_user(self)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the committed graph as a `.pt2` file, whole or not at all."""
        save(self, path)

    def run(self, inputs: Mapping[str, np.ndarray[Any, Any]]) -> dict[str, np.ndarray[Any, Any]]:
        """Execute the module on named inputs; outputs under the names that the graph's outputs had when it was read.

        A node draws the same random numbers on each call, and in each copy where it has its name.
        """
        device = device_of(self.module)
        arguments = self.arguments({name: to_torch(array).to(device) for name, array in inputs.items()})
        with torch.no_grad():
            if self.training or any(op.has(Trait.RANDOM) for op in self):
                result = run_apart(self.module, arguments)
            else:
                result = run_nodes(self.module, arguments)
        return dict(zip(self.output_names, map(to_numpy, self.results(result)), strict=True))

    def arguments(self, inputs: Mapping[str, torch.Tensor]) -> list[Any]:
        """What the module's graph takes, in order, for named inputs. GraphError for a missing or unknown one."""
        placeholders = [node for node in self.module.graph.nodes if node.op == "placeholder"]
        # fx renames an argument that is called like a builtin ("input"): both names are understood.
        inputs = {**{n.name: inputs[str(n.target)] for n in placeholders if str(n.target) in inputs}, **inputs}
        known = {name for n in placeholders for name in (n.name, str(n.target))}
        unknown = sorted(set(inputs) - known)
        if unknown:
            own = ", ".join(n.name for n in placeholders)
            raise GraphError(f"The model has no input '{unknown[0]}': its inputs are {own}.")
        missing = [n.name for n in placeholders if n.name not in inputs and not n.args and n.users]
        if missing:
            raise GraphError(f"The model's input '{missing[0]}' is missing.")
        return [inputs[n.name] if n.name in inputs else (n.args[0] if n.args else None) for n in placeholders]

    def results(self, result: Any) -> list[torch.Tensor]:
        """The tensors of what the module's graph returned, in the order of the graph's outputs."""
        return [torch.as_tensor(t) for t in _pick(self.module.graph.output_node().args[0], result)]

    def reads(self, node: fx.Node, attr: Attr) -> bool:
        """Whether a node reads that tensor of the module tree, by whichever of its names."""
        targets = self.native.targets
        return node.op == "get_attr" and targets.get(str(node.target)) is targets.get(attr.target)

    def functionalise(self) -> None:
        """Let every native operation in place compute a new tensor, as the view shows it."""
        self._edit()
        self._dirty = True
        self.commit()

    # ---- inside ------------------------------------------------------------------------------------------------

    def _edit(self) -> Nodes:
        if self._nodes is None:
            make_functional(self.module, self.native.in_place, self.native.duplicates)
            self.native.in_place.clear()
            self.native.duplicates.clear()
            self._nodes = Nodes(self.module, self.dims)
        return self._nodes

    def _argument(self, value: Value) -> Any:
        """The fx argument for a value, its node made where there is none yet."""
        nodes = self._edit()
        if value.native is None and value.producer is not None:
            self.materialise(value.producer)
        native = value.native
        if isinstance(native, Attr):
            return nodes.getter(native.target)
        if isinstance(native, Item):
            value.native = nodes.item(native.node, native.index, value.name)
            return value.native
        if native is None:
            raise GraphError(f"'{value.name}' has no native value: nothing makes it.")
        return native

    def _place(self, op: Op) -> fx.Node:
        """The node behind which new nodes for `op` go."""
        old = [value.native for value in op.outputs if isinstance(value.native, fx.Node)]
        old = [node for node in old if not node._erased]
        if old:
            return max(old).prev
        behind = [
            node
            for value in op.operands
            for node in (value.native, *(value.producer.native if value.producer is not None else ()))
            if isinstance(node, fx.Node) and not node._erased and node.op != "get_attr"
        ]
        return max(behind) if behind else self._edit().header()

    def _slots(self, op: Op, old: Value | None) -> list[tuple[fx.Node, fx.Node]]:
        """Nodes and arguments of an operand: one place in one call, or all reads of a value that a region makes."""
        main = [node for node in op.native if node.op == "call_module" or node.target is not operator.getitem]
        if old is None or sum(value is old for value in op.inputs) != 1:
            return []
        if len(main) != 1:
            return self._reads_of(op, old)
        node = main[0]
        if isinstance(old.native, Attr):
            found = [n for n in node.all_input_nodes if n.op == "get_attr" and self._reads(n, old)]
        else:
            found = [n for n in node.all_input_nodes if n is old.native]
        if len(found) != 1 or _count(node, found[0]) != 1:
            return []
        return [(node, found[0])]

    def _reads_of(self, op: Op, old: Value) -> list[tuple[fx.Node, fx.Node]]:
        """Where the nodes of a region read a value; nowhere where they read what is no operand of the region."""
        known = {*op.native, *(value.native for value in op.operands if isinstance(value.native, fx.Node))}
        for node in op.native:
            if _mutates(node) or any(read not in known and read.op != "get_attr" for read in node.all_input_nodes):
                return []
        return [(node, old.native) for node in op.native if old.native in node.all_input_nodes]

    def _reads(self, getter: fx.Node, value: Value) -> bool:
        return self.native.targets.get(str(getter.target)) is value

    def _emit_anew(self, op: Op, index: int, value: Value) -> None:
        nodes = self._edit()
        natives, olds, saved = op.native, [out.native for out in op.outputs], op.inputs[index]
        op.inputs[index] = value
        try:
            self.native_emit(op)
        finally:
            op.inputs[index] = saved
        nodes.carry_over(natives, op.native)
        for old, out in zip(olds, op.outputs, strict=True):
            self.native_redirect(old, out)
        self.native_erase_nodes(natives)

    def _drop_counter(self, target: str) -> None:
        """The batch counter of a norm goes with its statistics."""
        prefix, _, leaf = target.rpartition(".")
        key = f"{prefix}.num_batches_tracked" if prefix else "num_batches_tracked"
        counter = self.native.targets.get(key)
        if leaf == "running_var" and counter is not None and not counter.uses and self._edit().drop_getter(key):
            remove_tensor(self.module, key)
            del self.native.targets[key]
            self._values.pop(counter.name, None)
            self._orphans.pop(counter, None)


@contextmanager
def _without_collections() -> Iterator[None]:
    """Reading makes only objects that stay: each pass of the garbage collector over them would be for nothing."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _unique(names: Iterable[str]) -> tuple[str, ...]:
    seen: dict[str, int] = {}
    result = []
    for name in names:
        count = seen[name] = seen.get(name, -1) + 1
        result.append(name if count == 0 else f"{name}_{count}")
    return tuple(result)


def _mutates(node: fx.Node) -> bool:
    """Whether a call may change what it reads."""
    if isinstance(node.target, torch._ops.OpOverload):
        return node.target._schema.is_mutable
    name = str(getattr(node.target, "__name__", node.target))
    return name.endswith("_") and not name.endswith("__")


def _count(node: fx.Node, argument: fx.Node) -> int:
    count = 0

    def visit(found: fx.Node) -> fx.Node:
        nonlocal count
        count += found is argument
        return found

    fx.map_arg((node.args, node.kwargs), visit)
    return count


def _loosen_views(node: Any) -> None:
    """`view` demands a memory layout that another operand need not have; `reshape` takes any."""
    for user in node.users if isinstance(node, fx.Node) else ():
        if user.target is torch.ops.aten.view.default:
            user.target = torch.ops.aten.reshape.default
        elif user.op == "call_method" and user.target == "view" and not isinstance(user.args[1], torch.dtype):
            user.target = "reshape"


def _pick(arguments: Any, result: Any) -> list[Any]:
    """The tensors of a result, in the order in which the graph lists its outputs."""
    if isinstance(arguments, fx.Node):
        return list(result) if isinstance(result, list | tuple) else [result]
    if isinstance(arguments, list | tuple):
        return [t for argument, part in zip(arguments, result, strict=True) for t in _pick(argument, part)]
    if isinstance(arguments, Mapping):
        return [t for key, argument in arguments.items() for t in _pick(argument, result[key])]
    return []


def _map(native: Any, memo: Mapping[fx.Node, fx.Node]) -> Any:
    if isinstance(native, fx.Node):
        return memo[native]
    return Item(memo[native.node], native.index) if isinstance(native, Item) else native


def _map_native(native: Native, memo: Mapping[fx.Node, fx.Node], graph: Graph) -> Native:
    return Native(
        in_place=[(memo[node], tuple(memo[member] for member in family)) for node, family in native.in_place],
        duplicates=[(memo[second], memo[first]) for second, first in native.duplicates],
        hidden={memo[node] for node in native.hidden if node in memo},
        targets={target: graph.value(value.name) for target, value in native.targets.items()},
        training_nodes=native.training_nodes,
        versions={memo[node]: [graph.value(v.name) for v in values] for node, values in native.versions.items()},
    )
