"""Contractions that read the same value, as one contraction whose result is split (horizontal fusion)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, TypeAlias

from rescompile.costs import tensor_size
from rescompile.detection import inspect_graph
from rescompile.graph import Graph, Op, Value
from rescompile.kinds import OpKind as K
from rescompile.kinds import Trait
from rescompile.passes.joins import only_reader
from rescompile.passes.tracing import is_stored
from rescompile.plans import (
    AddParameter,
    Edit,
    FreshNames,
    Insert,
    Plan,
    Preserves,
    Refusal,
    Rewrite,
    fuse_edit,
    gather,
    names,
)

_FUSED = (K.FUSED_CONV, K.FUSED_LINEAR)

# What contractions must have in common: each property with its value.
_Key: TypeAlias = tuple[tuple[str, Any], ...]


@dataclass(frozen=True)
class MergeParallel:
    """W₁·x + b₁, W₂·x + b₂, …  →  split([W₁; W₂; …]·x + [b₁; b₂; …])

    Query, key and value of an attention; gate and up projection of a gated MLP; the first 1×1 convolution of a block
    and that of its shortcut; 1×1 convolutions side by side (TVM's CombineParallelConv2D and CombineParallelDense).
    1. All read one value as what they contract: linears, or convolutions of one group whose kernel, stride, padding
       and dilation are the same. Their numbers of outputs may differ. A missing bias is a bias of zeros.
    2. Weights and biases are stored, of one dtype and layout, and nothing else reads the weights; with `copy` the
       merged weight is a copy of those that something else reads, or an exporter found equal.
    3. The first residual join that each leads to is the same: the parts of what runs blocks later would be held in
       memory all that time.
    4. An activation that alone reads each part, the same for all, goes before the split.
    5. The graph is no training form: optimisers keep state, weight decay and clipping by parameter, and checkpoints
       load by name. (Steps of plain SGD on the merged weight would be those on its parts, but for a bias of zeros.)
    """

    name: ClassVar[str] = "merge-parallel"
    preserves: ClassVar[Preserves] = "values"
    copy: bool = False

    def plan(self, graph: Graph) -> Plan:
        """One rewrite for each group of contractions, one refusal for each that shares its input and stays."""
        return gather(self.name, self.preserves, graph, self._decisions(graph))

    def _decisions(self, graph: Graph) -> Iterator[Rewrite | Refusal]:
        shared = [(value, ops) for value in graph.values if len(ops := _readers(value)) > 1]
        if not shared:
            yield Refusal(graph.name or "model", "no two contractions of the model read the same value")
            return
        fresh, joins = FreshNames(graph), _first_joins(graph)
        for value, ops in sorted(shared, key=lambda item: item[1][0].order):
            if graph.training:
                reason = (
                    f"in training each of the {len(ops)} contractions that read '{value.name}' keeps its parameters"
                )
                yield Refusal(ops[0].name, f"{reason}: optimisers and checkpoints go by them")
                continue
            yield from self._of_one_value(graph, value, ops, joins, fresh)

    def _of_one_value(
        self, graph: Graph, value: Value, ops: list[Op], joins: dict[Op, int], fresh: FreshNames
    ) -> Iterator[Rewrite | Refusal]:
        groups: dict[_Key, list[Op]] = {}
        for op in ops:
            reason = _obstacle(op, self.copy)
            if reason:
                yield Refusal(op.name, reason)
            else:
                groups.setdefault((*_key(op), ("first residual join", joins.get(op))), []).append(op)
        largest = max(groups, key=lambda key: len(groups[key]), default=())
        for key, group in groups.items():
            if len(group) > 1:
                yield _merged(graph, value, group, fresh)
            elif len(groups) > 1:
                other = largest if key != largest else next(found for found in groups if found != key)
                yield Refusal(group[0].name, _difference(group[0], key, groups[other][0], other))


def _readers(value: Value) -> list[Op]:
    """The contractions of a value, in the order in which they run."""
    if len(value.uses) < 2 or value.constant:
        return []
    found = [op for op, index in value.uses if index == 0 and op.kind in (K.LINEAR, K.CONV, *_FUSED)]
    return sorted(found, key=lambda op: op.order)


def _first_joins(graph: Graph) -> dict[Op, int]:
    """The order of the first residual join, not nested, that each operation leads to."""
    ends = {block.join_op for block in inspect_graph(graph).blocks if block.parent is None and not block.path}
    first: dict[Op, int] = {}
    for op in reversed(graph.ops):
        if op in ends:
            first[op] = op.order
            continue
        ahead = [first[user] for value in op.outputs for user in value.users if user in first]
        if ahead:
            first[op] = min(ahead)
    return first


def _obstacle(op: Op, copy: bool) -> str:
    """Why one contraction merges with no other, whatever that is; empty where it may."""
    if op.kind in _FUSED:
        return "an activation or a sum went into it already: merge before fusing"
    weight, bias = op.operand("weight"), op.operand("bias")
    if weight is None or not is_stored(weight) or not is_stored(bias):
        return "its weights are computed in the graph"
    if weight.shape is None or not all(isinstance(extent, int) for extent in weight.shape):
        return f"the shape of '{weight.name}' is not known"
    if op.output.shape is None:
        return f"the shape of '{op.output.name}' is not known"
    if op.kind is K.CONV and op.attr("groups") != 1:
        return f"its {op.attr('groups')} groups each read a part of the channels"
    if bias is not None and bias.shape != (_outputs(op),):
        return f"its bias '{bias.name}' is not one number for each output"
    if any(value is not None and value.dtype != op.output.dtype for value in (op.inputs[0], weight, bias)):
        return "its operands have several dtypes"
    other = next((user for user, index in weight.uses if user is not op or index != 1), None)
    if other is not None and not copy:
        return f"'{other.name}' also reads its weight '{weight.name}', which a copy would untie (copy=true)"
    return ""


def _key(op: Op) -> _Key:
    weight = op.operand("weight")
    assert weight is not None  # _obstacle
    if op.kind is K.LINEAR:
        return ("kind", op.kind.value), ("dtype", weight.dtype), ("layout", bool(op.attr("transpose_weight")))
    settings = ((name, tuple(op.attr(name))) for name in ("stride", "pads", "dilation"))
    return ("kind", op.kind.value), ("dtype", weight.dtype), ("kernel", (weight.shape or ())[2:]), *settings


def _difference(op: Op, key: _Key, other: Op, wanted: _Key) -> str:
    """What keeps a contraction from merging with another."""
    told, against = dict(key), dict(wanted)
    name = next(name for name in told if told[name] != against.get(name))
    own, theirs = told[name], against.get(name)
    if name == "first residual join":
        return f"it leads to another residual join than '{other.name}': its part would be held in memory until then"
    if name == "layout":
        return f"its weight lies transposed to that of '{other.name}'"
    if name == "kind":
        return f"it is a {own} and '{other.name}' a {theirs}"
    text = f"its {name} is {_text(own)} and that of '{other.name}' {_text(theirs)}"
    if name == "kernel":
        return f"{text}: the smaller one with zeros around it would cost more arithmetic than a read of the input"
    return text


def _text(value: Any) -> str:
    return "×".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _outputs(op: Op) -> int:
    """How many features a contraction makes."""
    weight = op.operand("weight")
    return int((weight.shape or ())[_output_axis(op)]) if weight is not None else 0


def _output_axis(op: Op) -> int:
    """Where a contraction's weight has its outputs."""
    return 0 if op.kind is K.CONV or op.attr("transpose_weight") else 1


def _activations(graph: Graph, ops: list[Op]) -> list[Op]:
    """The activations that alone read the contractions, where all are alike; otherwise nothing."""
    readers = [only_reader(graph, op.output) for op in ops]
    found = [op for op in readers if op is not None and op.has(Trait.ACTIVATION) and len(op.operands) == 1]
    alike = len(found) == len(ops) and all((op.kind, op.attrs) == (found[0].kind, found[0].attrs) for op in found)
    return found if alike else []


def _merged(graph: Graph, value: Value, ops: list[Op], fresh: FreshNames) -> Rewrite:
    first = ops[0]
    sizes = tuple(_outputs(op) for op in ops)
    weights, biases = [op.operand("weight") for op in ops], [op.operand("bias") for op in ops]
    head = weights[0]
    assert head is not None  # _obstacle
    weight = fresh(f"{head.name}_merged")
    settings = {"axis": _output_axis(first), "sizes": sizes}
    edits: list[Edit] = [AddParameter(weight, "concatenated", names(weights), settings)]
    bias = None
    given = next((each for each in biases if each is not None), None)
    if given is not None:
        bias = fresh(f"{given.name}_merged")
        edits.append(AddParameter(bias, "concatenated", names(biases), {"axis": 0, "sizes": sizes}))
    out = first.output
    shape = list(out.shape or ())
    axis = 1 if first.kind is K.CONV else len(shape) - 1
    shape[axis] = sum(sizes)
    whole = fresh(f"{out.name}_merged")
    made = ((whole, tuple(shape), out.dtype),)
    edits.append(Insert(first.kind.value, (value.name, weight, bias), made, dict(first.attrs)))
    after = _activations(graph, ops)
    if after:
        active = fresh(f"{after[0].output.name}_merged")
        edits.append(Insert(after[0].kind.value, (whole,), ((active, *made[0][1:]),), dict(after[0].attrs)))
        whole = active
    parts = [op.output for op in after or ops]
    edits.append(fuse_edit([*ops, *after], K.SPLIT, [whole], parts, axis=axis, sizes=sizes))
    count = len(ops)
    equation = "Wᵢ·x + bᵢ  →  split([W₁; W₂; …]·x + [b₁; b₂; …])" if bias else "Wᵢ·x  →  split([W₁; W₂; …]·x)"
    others = ", ".join(f"'{op.module or op.name}'" for op in ops[1:])
    saved = tensor_size(value)[1] * (count - 1)
    cost = f", {saved:,} bytes less" if saved else ""
    zeros = [op for op, each in zip(ops, biases, strict=True) if each is None] if bias else []
    filled = f"; zeros as the bias of {', '.join(repr(op.module or op.name) for op in zeros)}" if zeros else ""
    reason = f"with {others}: '{value.name}' is read once instead of {count} times{cost}, multiplications as before"
    return Rewrite(first.name, equation, reason + filled, tuple(edits))
