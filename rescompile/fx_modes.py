"""Training and evaluation form of one graph: which arguments of which nodes differ, and switching between them.

torch.export bakes the mode into literals (`aten.batch_norm`'s `training`, `aten.dropout`'s `train`, attention's
`dropout_p`) and leaves the counting of batches to the training form. A node's differences are kept in
`node.meta["custom"]["rescompile"]["modes"]` as a list of `[argument, in evaluation, in training]`, so they survive
copies, export and files.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Self

import torch
from torch import fx, nn

from rescompile.fx_ops import spell
from rescompile.fx_view import is_check

_BATCH_NORM = torch.ops.aten.batch_norm.default
_DROPOUT = torch.ops.aten.dropout.default
_COUNT = torch.ops.aten.add_.Tensor
_SOURCES = ("placeholder", "get_attr")
_CONTIGUOUS = torch.ops.aten.contiguous.default


@dataclass(slots=True)
class Modes:
    """How a module's two forms differ. `training`: the form that it is in; `refusal`: why it has only that one;
    `counters`: paths of the batch counters that training advances; `nodes`: recorded differences by node name."""

    training: bool = False
    refusal: str | None = None
    counters: list[str] = field(default_factory=list)
    nodes: dict[str, list[list[Any]]] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Self:
        """The reverse of `to_dict`."""
        return cls(**content)


def modes_of(node: fx.Node) -> list[list[Any]]:
    """The arguments of a node that differ between the modes: `[name, in evaluation, in training]`."""
    found = (node.meta.get("custom") or {}).get("rescompile", {}).get("modes")
    return list(found) if found else []


def depends_on_mode(node: fx.Node) -> bool:
    """Whether an exported node does something else in training, and does not say what."""
    name = getattr(node.target, "_opname", "")
    if modes_of(node) or name not in ("batch_norm", "dropout", "scaled_dot_product_attention"):
        return False
    return name != "dropout" or arguments_of(node)["p"] > 0


def in_training_form(graph: fx.Graph) -> bool:
    """Whether a graph holds norms or dropouts of the training form."""
    return any(
        bool(arguments_of(node).get("training", arguments_of(node).get("train")))
        for node in graph.nodes
        if getattr(node.target, "_opname", "") in ("batch_norm", "dropout")
    )


def record(node: fx.Node, key: str, content: Any) -> None:
    """Write to the node's metadata; nodes of a copied graph share the old ones."""
    custom = dict(node.meta.get("custom") or {})
    custom["rescompile"] = {**custom.get("rescompile", {}), key: content}
    node.meta["custom"] = custom


def switch(graph: fx.Graph, training: bool) -> bool:
    """Set all recorded arguments to those of a mode; True when one changed."""
    changed = False
    for node in graph.nodes:
        for place, evaluating, learning in modes_of(node):
            wanted = learning if training else evaluating
            if arguments_of(node).get(place) != wanted:
                _set_argument(node, place, wanted)
                changed = True
    return changed


def arguments_of(node: fx.Node) -> dict[str, Any]:
    """All arguments by name, defaults included; by position where the target has no schema."""
    target = node.target
    named = {str(position): value for position, value in enumerate(node.args)}
    if isinstance(target, torch._ops.OpOverload):
        schema = target._schema.arguments
        named = {a.name: a.default_value for a in schema if a.has_default_value()}
        named.update(zip((a.name for a in schema), node.args, strict=False))
    return {**named, **node.kwargs}


def _set_argument(node: fx.Node, place: str, value: Any) -> None:
    position = int(place) if place.isdigit() else None
    if isinstance(node.target, torch._ops.OpOverload):
        names = [a.name for a in node.target._schema.arguments]
        position = names.index(place) if place in names else None
    if position is not None and position < len(node.args):
        node.update_arg(position, value)
    else:
        node.update_kwarg(place, value)


def new_norm(node: fx.Node, training: bool) -> None:
    """Let a batch norm that no capture has seen follow the mode, where it keeps running statistics."""
    if node.target is _BATCH_NORM and node.args[3] is not None:
        record(node, "modes", [["training", False, True]])
        node.update_arg(5, training)


def carry_over(module: nn.Module, old: Sequence[fx.Node], new: Sequence[fx.Node]) -> None:
    """What kinds do not say, from the nodes of an operation to those that it is made anew of."""
    source = next((node for node in old if node.op in ("call_module", "call_function", "call_method")), None)
    if source is None:
        return
    call = spell(source, dict(module.named_modules()) if source.op == "call_module" else {})
    for node in new:
        if node.target is _BATCH_NORM:
            momentum = 0.1 if call is None else call.args.get("momentum", 0.1)
            node.update_arg(6, 0.0 if momentum is None else momentum)
            if source.op == "call_module":
                owner = module.get_submodule(str(source.target))
                record(node, "modes", [["training", getattr(owner, "running_mean", None) is None, True]])
        elif node.target is _DROPOUT and source.op == "call_module":
            record(node, "modes", [["train", False, True]])
        modes = modes_of(source)
        if modes and node.target is source.target:
            record(node, "modes", modes)


def _is_counter(node: fx.Node) -> bool:
    if node.target is not _COUNT or node.users or not isinstance(node.args[0], fx.Node):
        return False
    return node.args[0].op == "get_attr" and node.all_input_nodes == [node.args[0]]


def counters_of(graph: fx.Graph) -> list[str]:
    """Paths of the integer tensors that the graph advances by a number on each call."""
    return [str(node.args[0].target) for node in graph.nodes if _is_counter(node)]


def set_counters(module: fx.GraphModule, paths: Iterable[str], training: bool) -> bool:
    """Let the module's graph advance its batch counters, or leave them; True when the graph changed."""
    graph, wanted = module.graph, set(paths)
    present = {str(node.args[0].target): node for node in graph.nodes if _is_counter(node)}
    if not training:
        for path, node in present.items():
            if path in wanted:
                graph.erase_node(node)
        return bool(wanted & set(present))
    known = {name for name, _ in module.named_buffers()}
    missing = [path for path in wanted if path not in present and path in known]
    getters = {str(node.target): node for node in graph.find_nodes(op="get_attr")}
    first = next((node for node in graph.nodes if node.op not in ("placeholder", "get_attr")), graph.output_node())
    with graph.inserting_before(first):
        for path in sorted(missing):
            getter = getters.get(path) or graph.create_node("get_attr", path, (), {})
            graph.call_function(_COUNT, (getter, 1))
    return bool(missing)


def align(own: fx.Graph, other: fx.Graph, *, training: bool) -> Modes:
    """The differences between two captures of one model, `own` in the form that `training` says, `other` in the other.

    Equal but for literals: they are recorded, and the module can be both. Otherwise it has one form, and the refusal
    names the first line of the model that runs in one form only.
    """
    counters = counters_of(own if training else other)
    modes = Modes(training, counters=counters)
    twins: dict[fx.Node, fx.Node] = {}
    ours, theirs = _calls(own), _calls(other)
    sources = {(node.op, node.target): node for node in own.nodes if node.op in _SOURCES}
    for node in other.nodes:
        if node.op in _SOURCES and (node.op, node.target) in sources:
            twins[node] = sources[node.op, node.target]
    for node, twin in zip(ours, theirs, strict=False):
        differences = _compare(node, twin, twins)
        if differences is None:
            modes.refusal = _branch(node if not training else twin, twin if not training else node)
            return modes
        twins[twin] = node
        if differences and not _drops_nothing(node):
            modes.nodes[node.name] = [[p, b, a] if training else [p, a, b] for p, a, b in differences]
    if len(ours) != len(theirs):
        longer = max(ours, theirs, key=len)
        modes.refusal = _branch(longer[min(len(ours), len(theirs))], None)
    return modes


def _calls(graph: fx.Graph) -> list[fx.Node]:
    return [n for n in graph.nodes if n.op not in _SOURCES and not (is_check(n) or _is_counter(n) or _is_layout(n))]


def _is_layout(node: fx.Node) -> bool:
    """Whether a node only asks for a memory layout; torch leaves it out where the layout happens to be right.

    `view` fails without it, so the forms are not taken for equal then.
    """
    return node.target is _CONTIGUOUS and all(user.target is not torch.ops.aten.view.default for user in node.users)


def _behind_layout(node: fx.Node) -> fx.Node:
    while _is_layout(node) and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    return node


def _compare(node: fx.Node, twin: fx.Node, twins: Mapping[fx.Node, fx.Node]) -> list[tuple[Any, Any, Any]] | None:
    """The literals that differ, None when more than that does."""
    if node.op != twin.op or node.target != twin.target:
        return None
    ours, theirs = arguments_of(node), arguments_of(twin)
    if set(ours) != set(theirs):
        return None
    differences = []
    for place, a in ours.items():
        a = fx.map_arg(a, _behind_layout)
        b = fx.map_arg(theirs[place], lambda argument: twins.get(_behind_layout(argument), argument))
        if b == a:
            continue
        if not isinstance(a, bool | int | float) or not isinstance(b, bool | int | float):
            return None
        differences.append((place, a, b))
    return differences


def _drops_nothing(node: fx.Node) -> bool:
    """Whether a node is a dropout of rate 0, the same in both forms."""
    return node.target is _DROPOUT and arguments_of(node)["p"] == 0


def _branch(evaluating: fx.Node | None, learning: fx.Node | None) -> str:
    node = learning if learning is not None else evaluating
    line = source_line(node) if node is not None else ""
    return f"the model computes something else in training{f' ({line})' if line else ''}."


def source_line(node: fx.Node) -> str:
    """Where in the user's code a node comes from: `model.py:12: x = x + noise`, "" when unknown."""
    lines = [line.strip() for line in (node.meta.get("stack_trace") or "").splitlines() if line.strip()]
    places = [i for i, line in enumerate(lines) if line.startswith("File ")]
    if not places:
        return ""
    parts = lines[places[-1]].split(", ")
    code = lines[places[-1] + 1] if places[-1] + 1 < len(lines) else ""
    path = parts[0].removeprefix("File ").strip('"')
    return f"{path}:{parts[1].removeprefix('line ')}: {code}"
