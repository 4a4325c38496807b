"""The rewritten model as a module that people can keep: it trains, copies, pickles, moves and exports.

What `ExportedProgram.module()` refuses or does wrongly, `RewrittenModule` does: `train()` and `eval()` switch the
arguments that differ between the two forms, `copy.deepcopy` and pickle keep the graph with its metadata, and `to()`
moves the constants and the devices written into the graph.
"""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Self

import torch
from torch import fx, nn
from torch.fx.node import _get_qualified_name

import rescompile.fx_fused  # noqa: F401 (defines the operations that a rewritten graph may call)
from rescompile.errors import RescompileError
from rescompile.fx_modes import Modes, set_counters, switch
from rescompile.fx_tree import copy_children, copy_graph
from rescompile.fx_types import Dims, record_type

# What a GraphModule keeps beside the state of an nn.Module, and makes anew from its graph.
_DERIVED = frozenset(
    {
        "_graph",
        "_code",
        "_lineno_map",
        "_prologue_start",
        "_in_spec",
        "_out_spec",
        "_tracer_cls",
        "_tracer_extras",
        "_replace_hooks",
        "_create_node_hooks",
        "_erase_node_hooks",
        "_deepcopy_hooks",
        "shape_env",
        "train",
        "eval",
        "range_constraints",
        "validate_inputs",
    }
)
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs", "_forward_pre_hooks_with_kwargs")
_HOOKS_ALWAYS = "_forward_hooks_always_called"


@dataclass(frozen=True, slots=True)
class _Ref:
    """A node, in a pickled graph."""

    name: str


@dataclass(slots=True)
class _Node:
    """A node as plain data."""

    op: str
    name: str
    target: str
    args: Any
    kwargs: Any
    custom: dict[str, Any] = field(default_factory=dict)


class RewrittenModule(fx.GraphModule):
    """A graph module with the user's `state_dict` keys that answers `train()` and `eval()`."""

    @classmethod
    def adopt(
        cls,
        source: fx.GraphModule,
        *,
        modes: Modes,
        name: str,
        tensors: Callable[[torch.Tensor], torch.Tensor] = lambda tensor: tensor,
    ) -> Self:
        """A rewritten module with the graph of `source` and its module tree, tensors mapped through `tensors`."""
        graph = copy_graph(source.graph, {})
        module = cls._assemble(copy_children(source, tensors), graph, dict(source.meta), name)
        module.meta["rescompile"] = modes.to_dict()
        return module

    @classmethod
    def _assemble(cls, state: Mapping[str, Any], graph: fx.Graph, meta: dict[str, Any], name: str) -> Self:
        module = cls.__new__(cls)
        nn.Module.__init__(module)
        kept = {key: value for key, value in state.items() if key not in _DERIVED and key not in _HOOKS}
        kept.pop(_HOOKS_ALWAYS, None)
        module.__dict__.update(kept)
        # Lifted constants are plain attributes, which `to()` would leave behind.
        for key in [key for key, value in kept.items() if isinstance(value, torch.Tensor)]:
            tensor = module.__dict__.pop(key)
            module.register_buffer(key, tensor, persistent=False)
        for key, child in module._modules.items():
            if isinstance(child, fx.GraphModule) and not isinstance(child, RewrittenModule):  # a condition's branch
                module._modules[key] = cls.adopt(child, modes=Modes(child.training), name=type(child).__name__)
        module._tracer_cls = None
        module._tracer_extras = {}
        module._replace_hooks = []
        module._create_node_hooks = []
        module._erase_node_hooks = []
        module._deepcopy_hooks = []
        module.shape_env = None
        module.meta = meta
        type(module).__name__ = name
        module.graph = graph
        return module

    @property
    def modes(self) -> Modes:
        """How the training form and the evaluation form of the module differ."""
        return Modes.from_dict(self.meta.get("rescompile", {}))

    def train(self, mode: bool = True) -> Self:
        """Switch to training form (`mode` True) or evaluation form, exactly as the user's module would.

        RescompileError when the module has only one form: its code branches on `self.training`, or a rewrite removed
        operations that training needs.
        """
        modes = self.modes
        if mode != modes.training and modes.refusal is not None:
            wanted, has = ("training", "evaluation") if mode else ("evaluation", "training")
            raise RescompileError(
                f"This module has only its {has} form, not the {wanted} form: {modes.refusal} "
                f"Capture the model in its {wanted} form and rewrite that."
            )
        super().train(mode)
        if mode != modes.training:
            changed = switch(self.graph, mode)
            changed = set_counters(self, modes.counters, mode) or changed
            modes.training = mode
            self.meta["rescompile"] = modes.to_dict()
            if changed:
                self.recompile()
        return self

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Self:
        """As nn.Module does, and the devices that the graph names with it."""
        before = next((tensor.device for tensor in self.parameters()), None)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        after = next((tensor.device for tensor in self.parameters()), None)
        if before is not None and after is not None and before != after:
            changed = False
            for node in self.graph.nodes:
                for position, argument in enumerate(node.args):
                    if isinstance(argument, torch.device):
                        node.update_arg(position, after)
                        changed = True
                if node.kwargs.get("device") is not None:
                    node.update_kwarg("device", after)
                    changed = True
            if changed:
                self.recompile()
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        state = {key: copy.deepcopy(value, memo) for key, value in self._state().items()}
        kind: Any = type(self).__bases__[0]  # fx makes a class for each instance
        twin: Self = kind._assemble(state, copy_graph(self.graph, {}), copy.deepcopy(self.meta), type(self).__name__)
        memo[id(self)] = twin
        return twin

    def __reduce__(self) -> tuple[Any, ...]:
        nodes = [_to_plain(node) for node in self.graph.nodes]
        meta = {key: value for key, value in self.meta.items() if key == "rescompile"}
        return _rebuild, (self._state(), nodes, self.graph._codegen, meta, type(self).__name__)

    def _state(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key not in _DERIVED and key != "meta"}


def _to_plain(node: fx.Node) -> _Node:
    target = node.target if isinstance(node.target, str) else _get_qualified_name(node.target)
    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda argument: _Ref(argument.name))  # type: ignore[arg-type,return-value]
    custom = dict(node.meta.get("custom") or {})
    kind = Dims().of(node)
    if kind.shape is not None or kind.dtype is not None:
        custom["rescompile"] = {**custom.get("rescompile", {}), "type": record_type(kind)}
    return _Node(node.op, node.name, target, _thaw(args), _thaw(kwargs), custom)


def _thaw(value: Any) -> Any:
    """fx's immutable containers as ordinary ones."""
    if isinstance(value, tuple):
        return tuple(_thaw(item) for item in value)
    if isinstance(value, list):
        return [_thaw(item) for item in value]
    return {key: _thaw(item) for key, item in value.items()} if isinstance(value, dict) else value


def _resolve(name: str) -> Any:
    """The callable of a qualified name."""
    parts = name.split(".")
    for length in range(len(parts) - 1, 0, -1):
        try:
            found: Any = importlib.import_module(".".join(parts[:length]))
        except ImportError:
            continue
        for part in parts[length:]:
            found = getattr(found, part)
        return found
    raise RescompileError(f"The pickled module calls '{name}', which is not installed here.")


def _fill(value: Any, nodes: Mapping[str, fx.Node]) -> Any:
    if isinstance(value, _Ref):
        return nodes[value.name]
    if isinstance(value, tuple):
        return tuple(_fill(item, nodes) for item in value)
    if isinstance(value, list):
        return [_fill(item, nodes) for item in value]
    if isinstance(value, dict):
        return {key: _fill(item, nodes) for key, item in value.items()}
    if isinstance(value, slice):
        return slice(*(_fill(item, nodes) for item in (value.start, value.stop, value.step)))
    return value


def _rebuild(
    state: dict[str, Any], plain: list[_Node], codegen: Any, meta: dict[str, Any], name: str
) -> RewrittenModule:
    """A pickled module, back."""
    graph = fx.Graph()
    nodes: dict[str, fx.Node] = {}
    for item in plain:
        target = _resolve(item.target) if item.op == "call_function" else item.target
        node = graph.create_node(item.op, target, _fill(item.args, nodes), _fill(item.kwargs, nodes), item.name)
        if item.custom:
            node.meta["custom"] = item.custom
        nodes[item.name] = node
    graph._codegen = codegen
    return RewrittenModule._assemble(state, graph, meta, name)
