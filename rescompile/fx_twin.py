"""A graph as a torch module that runs, differentiates, and shows any value on the way: the graph's twin.

`twin(graph)` serves every IR. An `FxGraph` runs by its own nodes. Any other graph is emitted, operation by operation,
with the torch table by which the FX adapter writes operations; what a kind means is said there once. The twin owns its
tensors: training it, or taking gradients, leaves the graph as it is.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor, fx, nn

from rescompile.costs import trained_parameters
from rescompile.errors import GraphError, nearest
from rescompile.extents import extent_of
from rescompile.fx_graph import FxGraph
from rescompile.fx_ops import Attr
from rescompile.fx_torch import Emitter
from rescompile.fx_tree import copy_children, copy_graph, device_of, owner_of, to_torch
from rescompile.fx_twin_rules import rule_of
from rescompile.fx_types import TORCH_DTYPES
from rescompile.fx_view import Item, tensor_at
from rescompile.graph import Graph, Op, Role, Shape, Value

Data: TypeAlias = Tensor | np.ndarray[Any, Any]
See: TypeAlias = Callable[[Value, Tensor], Any]

_SOURCES = (torch.ops.aten.full.default, torch.ops.aten.arange.start_step, torch.ops.aten.scalar_tensor.default)
_SHOWS = "_rescompile_shows"
_FAILURES = (RuntimeError, ValueError, TypeError, IndexError)


def twin(graph: Graph) -> Twin:
    """The graph as a torch module, with tensors of its own.

    GraphError names the first operation that torch cannot compute.
    """
    return FxTwin(graph) if isinstance(graph, FxGraph) else GraphTwin(graph)


class Twin(nn.Module):
    """What both kinds of twin answer. `graph` is the graph that the module stands for."""

    def __init__(self, graph: Graph) -> None:
        super().__init__()
        self.__dict__["graph"] = graph  # no submodule, and no part of the state

    def forward(self, *inputs: Data) -> tuple[Tensor, ...]:
        """The outputs, for inputs in the graph's order."""
        names = [value.name for value in self.__dict__["graph"].inputs]
        return tuple(self.run(dict(zip(names, inputs, strict=True)))[0].values())

    def run(
        self, inputs: Mapping[str, Data], watch: Iterable[Value] = (), see: See = lambda _, tensor: tensor
    ) -> tuple[dict[str, Tensor], dict[Value, Any]]:
        """Outputs by name, and what `see(value, tensor)` gave for each watched value, by default the tensor.

        The tensor shown is the one that the graph goes on with, and no other value has the same: hooks and
        `torch.autograd.grad` at it see the gradient of this value. While gradients are recorded a watched float value
        always asks for one, also where nothing before it does.
        """
        raise NotImplementedError

    def tensor(self, value: Value) -> Tensor:
        """The twin's tensor for a parameter of the graph."""
        raise NotImplementedError


class _Watch:
    """Shows watched values as they are made, and keeps what is to be kept of them."""

    def __init__(self, values: Iterable[Value], see: See) -> None:
        self.values = dict.fromkeys(values)
        self.see = see
        self.found: dict[Value, Any] = {}

    def show(self, value: Value, tensor: Any, operands: Iterable[Any] = ()) -> Any:
        """The tensor that the graph goes on with."""
        if not isinstance(tensor, Tensor):
            return tensor
        if any(tensor is operand for operand in operands):
            tensor = torch.ops.aten.alias.default(tensor)
        if torch.is_grad_enabled() and tensor.is_floating_point() and not tensor.requires_grad:
            tensor = tensor.detach().requires_grad_()
        self.found[value] = self.see(value, tensor)
        return tensor


# ---- by a module's own nodes -----------------------------------------------------------------------------------------


class FxTwin(Twin):
    """Runs the graph's own module, a copy of it, node by node."""

    def __init__(self, graph: FxGraph) -> None:
        super().__init__(graph)
        copy = graph.clone()
        copy.functionalise()
        copy.module.__dict__.update(copy_children(copy.module, _own))
        self.__dict__["_copy"] = copy
        self.module = copy.module
        self._ready: tuple[list[Value], Callable[..., Any], _Shows] | None = None

    def run(
        self, inputs: Mapping[str, Data], watch: Iterable[Value] = (), see: See = lambda _, tensor: tensor
    ) -> tuple[dict[str, Tensor], dict[Value, Any]]:
        copy: FxGraph = self.__dict__["_copy"]
        watched = _Watch(watch, see)
        forward, shows = self._compiled(copy, list(watched.values))
        shows.watch = watched
        device = device_of(copy.module)
        arguments = copy.arguments({name: _as_tensor(data).to(device) for name, data in inputs.items()})
        try:
            result = forward(copy.module, *arguments)
        except _FAILURES as error:
            raise GraphError(f"The model cannot be run on these inputs: {_first_line(error)}.") from error
        return dict(zip(copy.output_names, copy.results(result), strict=True)), watched.found

    def tensor(self, value: Value) -> Tensor:
        copy: FxGraph = self.__dict__["_copy"]
        native = copy.value(value.name).native
        tensor = tensor_at(copy.module, native.target) if isinstance(native, Attr) else None
        if not isinstance(tensor, Tensor):
            raise GraphError(f"'{value.name}' is no tensor of the model's state.")
        return tensor

    def _compiled(self, copy: FxGraph, watched: list[Value]) -> tuple[Callable[..., Any], _Shows]:
        """The module's code with a call behind every watched node, which shows its result; kept for the next run."""
        if self._ready is not None and self._ready[0] == watched:
            return self._ready[1:]
        natives = {value: self._native(copy, copy.value(value.name)) for value in watched}
        memo: dict[fx.Node, fx.Node] = {}
        graph = copy_graph(copy.module.graph, memo)
        graph.set_codegen(fx.graph.CodeGen())
        shows = _Shows()
        for value, native in natives.items():
            node = next((n for n in memo if copy.reads(n, native)), None) if isinstance(native, Attr) else native
            if isinstance(node, Item):
                with graph.inserting_after(memo[node.node]):
                    item = graph.call_function(operator.getitem, (memo[node.node], node.index))
                    shows.put(graph, item, value)
            elif isinstance(node, fx.Node):
                shows.put(graph, memo[node], value)
        copy.module.__dict__[_SHOWS] = shows  # found by the code, and no part of the module's state
        forward: Any = type(fx.GraphModule(copy.module, graph)).forward
        self._ready = watched, forward, shows
        return forward, shows

    def _native(self, copy: FxGraph, value: Value) -> Any:
        """What the value is natively; an operation inside a larger native one gets nodes of its own first."""
        if value.native is None and value.producer is not None:
            copy.materialise(value.producer)
            copy.commit()
        return value.native


class _Shows(nn.Module):
    """The calls behind watched nodes."""

    def __init__(self) -> None:
        super().__init__()
        self.values: list[Value] = []
        self.watch: _Watch

    def put(self, graph: fx.Graph, node: fx.Node, value: Value) -> None:
        """A call behind `node` that its readers read instead."""
        operands = [operand for operand in node.all_input_nodes if operand.op != "get_attr"]
        with graph.inserting_after(node):
            call = graph.call_module(_SHOWS, (len(self.values), node, *operands))
        node.replace_all_uses_with(call, delete_user_cb=lambda user: user is not call)
        self.values.append(value)

    def forward(self, index: int, tensor: Any, *operands: Any) -> Any:
        return self.watch.show(self.values[index], tensor, operands)


def _own(tensor: Tensor) -> Tensor:
    copy = tensor.detach().clone()
    return nn.Parameter(copy, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else copy


# ---- by the table of kinds -------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Step:
    """One operation made ready: where its operands lie, where its results go, and what nothing reads after it."""

    op: Op
    rule: Emitter
    attrs: dict[str, Any]
    reads: tuple[int | None, ...]
    writes: tuple[int, ...]
    dtypes: tuple[torch.dtype | None, ...]
    symbolic: bool
    last: tuple[int, ...]


class GraphTwin(Twin):
    """Computes each operation by the torch form of its kind. Parameters are named as in the graph where torch allows.

    `names`: the key in the state of each parameter of the graph.
    """

    def caller(self) -> Call:
        """What the rules call torch through, in one run."""
        return Call(device_of(self))

    def __init__(self, graph: Graph) -> None:
        super().__init__(graph)
        self.names: dict[str, str] = {}
        self._slots = {value: slot for slot, value in enumerate(graph.values)}
        self._held: list[tuple[int, Value, nn.Module, str]] = []  # slot, value, and where its tensor lies
        self._literals = nn.Module()
        trained = set(trained_parameters(graph))
        for value in graph.values:
            if value.role in (Role.PARAMETER, Role.CONSTANT) and (value.uses or graph.is_output(value)):
                self._hold(value, value in trained and value.role is Role.PARAMETER)
        self._steps = self._prepare(graph)

    def _hold(self, value: Value, trainable: bool) -> None:
        tensor = to_torch(self.__dict__["graph"].data(value))
        if value.role is Role.CONSTANT:
            leaf = str(len(self._held))
            self._literals.register_buffer(leaf, tensor, persistent=False)
            self._held.append((self._slots[value], value, self._literals, leaf))
            return
        module, leaf = self._place(value.name)
        if trainable:
            module.register_parameter(leaf, nn.Parameter(tensor))
        else:
            module.register_buffer(leaf, tensor)
        self._held.append((self._slots[value], value, module, leaf))

    def _place(self, name: str) -> tuple[nn.Module, str]:
        """Module and leaf for a parameter: at its dotted path, or under a name without dots where that is taken."""
        path = name
        if all(name.split(".")):
            try:
                module, leaf = owner_of(self, name, create=True)
                if not hasattr(module, leaf):
                    self.names[name] = path
                    return module, leaf
            except GraphError:
                pass  # a prefix of the path is a tensor
        leaf = name.replace(".", "_")
        while hasattr(self, leaf):
            leaf += "_"
        self.names[name] = leaf
        return self, leaf

    def _prepare(self, graph: Graph) -> list[_Step]:
        readers: dict[Value, Op] = {}
        for op in graph:
            readers.update(dict.fromkeys(op.operands, op))
        kept = set(graph.outputs)
        dying: dict[Op, list[int]] = {}
        for value, op in readers.items():
            if value not in kept:
                dying.setdefault(op, []).append(self._slots[value])
        steps = []
        for op in graph:
            unread = [self._slots[out] for out in op.outputs if not out.uses and out not in kept]
            steps.append(
                _Step(
                    op,
                    rule_of(graph, op),
                    {**op.kind.spec.attrs, **op.attrs},
                    tuple(None if value is None else self._slots[value] for value in op.inputs),
                    tuple(self._slots[out] for out in op.outputs),
                    tuple(TORCH_DTYPES.get(out.dtype or "") for out in op.outputs),
                    any(isinstance(extent, str) for out in op.outputs for extent in out.shape or ()),
                    (*dying.get(op, ()), *unread),
                )
            )
        return steps

    def run(
        self, inputs: Mapping[str, Data], watch: Iterable[Value] = (), see: See = lambda _, tensor: tensor
    ) -> tuple[dict[str, Tensor], dict[Value, Any]]:
        graph: Graph = self.__dict__["graph"]
        watched = _Watch(watch, see)
        call = self.caller()
        slots: list[Any] = [None] * len(self._slots)
        for value, tensor in _bind(graph, inputs, call.device):
            slots[self._slots[value]] = watched.show(value, tensor) if value in watched.values else tensor
            call.learn(value.shape, tensor)
        for slot, value, module, leaf in self._held:
            tensor = getattr(module, leaf)
            slots[slot] = watched.show(value, tensor) if value in watched.values else tensor
        for step in self._steps:
            call.step = step
            operands = [None if slot is None else slots[slot] for slot in step.reads]
            try:
                result = step.rule(call, operands, step.attrs)
            except _FAILURES as error:
                op = step.op
                raise GraphError(
                    f"'{op.name}' ({op.kind.value}) cannot be computed in torch: {_first_line(error)}."
                ) from error
            results: Sequence[Tensor] = (result,) if isinstance(result, Tensor) else result
            for slot, value, dtype, tensor in zip(step.writes, step.op.outputs, step.dtypes, results, strict=False):
                if dtype is not None and tensor.dtype is not dtype:
                    tensor = tensor.to(dtype)
                if value in watched.values:
                    tensor = watched.show(value, tensor, operands)
                slots[slot] = tensor
                if step.symbolic:
                    call.learn(value.shape, tensor)
            for slot in step.last:
                slots[slot] = None
        outputs = getattr(graph, "output_names", None) or [value.name for value in graph.outputs]
        return dict(zip(outputs, (slots[self._slots[value]] for value in graph.outputs), strict=True)), watched.found

    def tensor(self, value: Value) -> Tensor:
        key = self.names.get(value.name)
        tensor = None if key is None else tensor_at(self, key)
        if not isinstance(tensor, Tensor):
            raise GraphError(f"'{value.name}' is no parameter that the graph reads.")
        return tensor


class Call:
    """Calls torch for one operation after the other, with the extents that the symbols turned out to have."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.step: _Step
        self.extents: dict[str, int] = {}

    def __call__(self, target: Any, *args: Any, **kwargs: Any) -> Any:
        if target in _SOURCES:
            kwargs = {**kwargs, "device": self.device}
        return target(*args, **kwargs)

    def learn(self, shape: Shape | None, tensor: Tensor) -> None:
        """Take down what the symbols of a shape stand for."""
        if shape is not None and len(shape) == tensor.ndim:
            for dim, extent in zip(shape, tensor.shape, strict=True):
                if isinstance(dim, str):
                    self.extents.setdefault(dim, extent)

    def shape(self, value: Any) -> Shape | None:
        return tuple(value.shape)

    def dtype(self, value: Any) -> str | None:
        return str(value.dtype)[6:]

    def out_shape(self, index: int = 0) -> Sequence[Any]:
        shape = self.step.op.outputs[index].shape
        extents = [extent_of(dim, self.extents) for dim in shape or ()]
        if shape is None or extents.count(None) > 1:
            raise GraphError(f"'{self.step.op.name}' cannot be computed in torch: its result's shape is not known.")
        return [-1 if extent is None else extent for extent in extents]

    def out_dtype(self) -> torch.dtype | None:
        return self.step.dtypes[0]


def _bind(graph: Graph, inputs: Mapping[str, Data], device: torch.device) -> list[tuple[Value, Tensor]]:
    names = [value.name for value in graph.inputs]
    for name in inputs:
        if name not in names:
            raise GraphError(f"The model has no input '{name}'{nearest(name, names)}: it takes {', '.join(names)}.")
    bound = []
    for value in graph.inputs:
        if value.name not in inputs:
            if not value.uses and not graph.is_output(value):
                continue
            raise GraphError(f"The model's input '{value.name}' is missing: it takes {', '.join(names)}.")
        tensor = _as_tensor(inputs[value.name]).to(device)
        given = str(tensor.dtype)[6:]
        shape = tuple(tensor.shape)
        fits = value.shape is None or (
            len(value.shape) == len(shape)
            and all(isinstance(dim, str) or dim == extent for dim, extent in zip(value.shape, shape, strict=True))
        )
        if not fits or value.dtype not in (None, given):
            wanted = f"{value.dtype or ''}{'' if value.shape is None else list(value.shape)}"
            raise GraphError(f"Input '{value.name}' is {given}{list(shape)} and the model takes {wanted}.")
        bound.append((value, tensor))
    return bound


def _as_tensor(data: Data) -> Tensor:
    return data if isinstance(data, Tensor) else to_torch(np.asarray(data))


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__).rstrip(".")
