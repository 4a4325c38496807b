"""What changed between two graphs: operations, parameters, inputs and outputs, and what they cost.

Operations and parameters are matched by `rescompile.matching`; the graphs may be of different IRs.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from rescompile.costs import Costs, cost_lines, graph_costs
from rescompile.graph import Graph, Op, Role, Value
from rescompile.matching import LINEARS, Matching
from rescompile.printing import print_type

_FLOAT_TOLERANCE = 1e-6  # an attribute kept as float32 and one kept as float64 are the same attribute


@dataclass(frozen=True, slots=True)
class Change:
    """One operation, parameter, input or output that is in both graphs, and how it differs."""

    before: str
    after: str
    what: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """The same as plain data."""
        return {"before": self.before, "after": self.after, "what": list(self.what)}

    def __str__(self) -> str:
        name = self.before if self.before == self.after else f"{self.before} → {self.after}"
        return f"{name}: {'; '.join(self.what)}"


@dataclass(frozen=True, slots=True)
class Entry:
    """One operation or parameter that is in one graph only."""

    name: str
    what: str  # an operation's kind, a parameter's type

    def to_dict(self) -> dict[str, Any]:
        """The same as plain data."""
        return {"name": self.name, "what": self.what}


@dataclass(frozen=True, slots=True)
class Section:
    """Things of one sort: in the second graph only, in the first only, in both but different; how many are the same."""

    added: tuple[Entry, ...]
    removed: tuple[Entry, ...]
    changed: tuple[Change, ...]
    same: int

    def __bool__(self) -> bool:
        return bool(self.added or self.removed or self.changed)

    def to_dict(self) -> dict[str, Any]:
        """The same as plain data."""
        return {
            "added": [entry.to_dict() for entry in self.added],
            "removed": [entry.to_dict() for entry in self.removed],
            "changed": [change.to_dict() for change in self.changed],
            "same": self.same,
        }

    def lines(self, title: str) -> list[str]:
        """The section as text, one line for each difference."""
        counts = [f"{len(self.added)} added", f"{len(self.removed)} removed", f"{len(self.changed)} changed"]
        lines = [f"{title}: {', '.join(counts)}, {self.same} the same"]
        lines += [f"  - {entry.name}: {entry.what}" for entry in self.removed]
        lines += [f"  + {entry.name}: {entry.what}" for entry in self.added]
        return lines + [f"  ~ {change}" for change in self.changed]


@dataclass(frozen=True, slots=True)
class GraphDiff:
    """The differences between two graphs; falsy when there are none. Prints as text."""

    names: tuple[str, str]
    irs: tuple[str, str]
    interface: Section  # inputs and outputs
    ops: Section
    parameters: Section
    kinds: tuple[tuple[str, int, int], ...]  # kind, count before, count after, where they differ
    costs: tuple[Costs, Costs]

    def __bool__(self) -> bool:
        return bool(self.interface or self.ops or self.parameters)

    def to_dict(self) -> dict[str, Any]:
        """The same as plain data, stable for scripts."""
        return {
            "schema": 1,
            "before": {"model": self.names[0], "ir": self.irs[0], "costs": self.costs[0].to_dict()},
            "after": {"model": self.names[1], "ir": self.irs[1], "costs": self.costs[1].to_dict()},
            "identical": not self,
            "interface": self.interface.to_dict(),
            "ops": self.ops.to_dict(),
            "parameters": self.parameters.to_dict(),
            "kinds": {kind: {"before": old, "after": new} for kind, old, new in self.kinds},
        }

    def __str__(self) -> str:
        lines = [f"before: {self.names[0]} ({self.irs[0]})", f"after:  {self.names[1]} ({self.irs[1]})"]
        if not self:
            return "\n".join([*lines, "No difference."])
        lines += self.interface.lines("inputs and outputs")
        lines += self.ops.lines("operations")
        lines += self.parameters.lines("parameters")
        if self.kinds:
            lines.append("kinds")
            lines += [f"  {kind:<14} {old:>6} → {new}" for kind, old, new in self.kinds]
        return "\n".join([*lines, *cost_lines(*self.costs)])


def diff_graphs(before: Graph, after: Graph, names: tuple[str, str] = ("A", "B"), *, data: bool = True) -> GraphDiff:
    """What changed from `before` to `after`. With `data`, the contents of parameters are compared too."""
    matching = Matching(before, after)
    return GraphDiff(
        names=names,
        irs=(before.ir, after.ir),
        interface=_interface(matching),
        ops=_ops(matching),
        parameters=_parameters(matching, data),
        kinds=_kinds(before, after),
        costs=(graph_costs(before), graph_costs(after)),
    )


def _interface(matching: Matching) -> Section:
    added: list[Entry] = []
    removed: list[Entry] = []
    changed: list[Change] = []
    same = 0
    twins = [matching.counterpart(value) for value in matching.before.inputs]
    pairs: list[tuple[str, Value | None, Value | None, bool]] = [
        ("input", value, twin, True) for value, twin in zip(matching.before.inputs, twins, strict=True)
    ]
    pairs += [("input", None, value, True) for value in matching.after.inputs if value not in twins]
    olds, news = matching.before.outputs, matching.after.outputs
    for index in range(max(len(olds), len(news))):
        old = olds[index] if index < len(olds) else None
        new = news[index] if index < len(news) else None
        pairs.append(("output", old, new, matching.counterpart(old) is new))
    for sort, ours, theirs, corresponds in pairs:
        if ours is None or theirs is None:
            present, into = (theirs, added) if ours is None else (ours, removed)
            if present is not None:
                into.append(Entry(present.name, f"{sort} {_typed(present)}"))
            continue
        what = [] if ours.type == theirs.type else [f"{_typed(ours)} → {_typed(theirs)}"]
        if matching.same_ir and sort == "input" and ours.name != theirs.name:
            what.append("renamed")
        if not corresponds:
            what.append("computed by another operation")
        if what:
            changed.append(Change(f"{sort} {ours.name}", f"{sort} {theirs.name}", tuple(what)))
        else:
            same += 1
    return Section(tuple(added), tuple(removed), tuple(changed), same)


def _ops(matching: Matching) -> Section:
    changed = []
    for op, twin in matching.ops.items():
        what = _op_changes(matching, op, twin)
        if what:
            changed.append(Change(op.name, twin.name, what))
    return Section(
        added=tuple(Entry(op.name, _described(op)) for op in matching.added),
        removed=tuple(Entry(op.name, _described(op)) for op in matching.removed),
        changed=tuple(sorted(changed, key=lambda change: matching.before.op(change.before).order)),
        same=len(matching.ops) - len(changed),
    )


def _op_changes(matching: Matching, op: Op, twin: Op) -> tuple[str, ...]:
    if op.kind is not twin.kind:
        # Operands and attributes of different kinds cannot be compared one by one.
        return (f"{op.kind.value} → {_described(twin)}",)
    changes = []
    names = dict.fromkeys([*op.kind.spec.attrs, *op.attrs, *twin.attrs])
    for name in names:
        if name == "transpose_weight" and _is_parameter(op.operand("weight")) and _is_parameter(twin.operand("weight")):
            continue  # only how the weight is stored
        old, new = (side.attrs.get(name, side.kind.spec.attrs.get(name)) for side in (op, twin))
        if not _equal(old, new):
            changes.append(f"{name} {old} → {new}")
    count = max(len(op.inputs), len(twin.inputs))
    for index in range(count):
        old_value = op.inputs[index] if index < len(op.inputs) else None
        new_value = twin.inputs[index] if index < len(twin.inputs) else None
        if not _corresponds(matching, old_value, new_value):
            changes.append(
                f"{_operand_name(op, index)} {_named(matching.before, old_value)} → {_named(matching.after, new_value)}"
            )
    old_types = [value.type for value in op.outputs]
    new_types = [value.type for value in twin.outputs]
    if old_types != new_types:
        changes.append(f"{_all_typed(op.outputs)} → {_all_typed(twin.outputs)}")
    return tuple(changes)


def _corresponds(matching: Matching, old: Value | None, new: Value | None) -> bool:
    if old is None or new is None:
        return old is new
    if old.role is Role.CONSTANT and new.role is Role.CONSTANT:
        first, second = matching.before.data(old), matching.after.data(new)
        return bool(np.array_equal(first.reshape(-1), second.reshape(-1)))
    # Where names mean something, a value that kept its own is the same one, whatever computes it now: that is told of
    # its producer.
    return matching.counterpart(old) is new or (matching.named and old.name == new.name)


def _parameters(matching: Matching, data: bool) -> Section:
    changed = []
    count = 0
    flipped = _stored_transposed(matching)
    for value in matching.before.parameters:
        twin = matching.sources.get(value)
        if twin is None:
            continue
        count += 1
        what = []
        shape = twin.shape[::-1] if value in flipped and twin.shape is not None else twin.shape
        if value.shape != shape or value.dtype != twin.dtype:
            what.append(f"{_typed(value)} → {_typed(twin)}")
        elif data:
            what += _content_changes(matching, value, twin, value in flipped)
        if value.name != twin.name and matching.same_ir:
            what.append("renamed")
        if what:
            changed.append(Change(value.name, twin.name, tuple(what)))
    return Section(
        added=tuple(Entry(value.name, _typed(value)) for value in matching.parameters_added()),
        removed=tuple(Entry(value.name, _typed(value)) for value in matching.parameters_removed()),
        changed=tuple(changed),
        same=count - len(changed),
    )


def _stored_transposed(matching: Matching) -> set[Value]:
    """Weights of linears that the second graph stores the other way round."""
    found = set()
    for op, twin in matching.ops.items():
        if op.kind in LINEARS and twin.kind is op.kind:
            weight = op.operand("weight")
            if weight is not None and op.attr("transpose_weight") != twin.attr("transpose_weight"):
                found.add(weight)
    return found


def _content_changes(matching: Matching, value: Value, twin: Value, flipped: bool) -> list[str]:
    if value.native is not None and value.native is twin.native:
        return []
    old, new = matching.before.data(value), matching.after.data(twin)
    new = new.T if flipped else new
    if old.tobytes() == new.tobytes():
        return []
    if old.dtype.kind not in "fiub" and "float" not in str(old.dtype):
        return ["contents"]
    gap = np.abs(old.astype(np.float64) - new.astype(np.float64))
    return [f"contents, by up to {float(gap.max()):.3g}"]


def _kinds(before: Graph, after: Graph) -> tuple[tuple[str, int, int], ...]:
    old, new = (Counter(op.kind.value for op in graph) for graph in (before, after))
    return tuple((kind, old[kind], new[kind]) for kind in sorted({*old, *new}) if old[kind] != new[kind])


def _equal(old: Any, new: Any) -> bool:
    if isinstance(old, tuple | list) and isinstance(new, tuple | list):
        return len(old) == len(new) and all(_equal(x, y) for x, y in zip(old, new, strict=True))
    if isinstance(old, float) and isinstance(new, int | float):
        return old == new or math.isclose(old, new, rel_tol=_FLOAT_TOLERANCE)
    return bool(old == new)


def _is_parameter(value: Value | None) -> bool:
    return value is not None and value.role is Role.PARAMETER


def _operand_name(op: Op, index: int) -> str:
    names = op.kind.spec.operands
    name = names[min(index, len(names) - 1)] if names else f"operand {index}"
    return f"operand {index}" if name.startswith("*") else name.rstrip("?")


def _described(op: Op) -> str:
    return f"{op.kind.value} ({op.provenance})" if op.provenance else op.kind.value


def _named(graph: Graph, value: Value | None) -> str:
    if value is None:
        return "none"
    number = graph.scalar(value) if value.role is Role.CONSTANT else None
    return value.name if number is None else f"{number:.7g}"


def _typed(value: Value) -> str:
    return print_type(value.shape, value.dtype)


def _all_typed(values: Iterable[Value]) -> str:
    return ", ".join(_typed(value) for value in values)
