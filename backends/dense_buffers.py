"""Concatenations that are written in place: which values of a graph share one buffer, and where in it each lies.

In a dense block every concatenation is a prefix of the last one:

    [x, h₁], [x, h₁, h₂], …, [x, h₁, …, hₙ]   ⊂   one buffer [x | h₁ | h₂ | … | hₙ] along the axis

Each layer writes its slice, each reader reads a run of slices, and no concatenation copies. The analysis knows nothing
of kernels: a backend says which operations can write a slice and which can read one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import prod

import numpy as np

from rescompile.graph import Graph, Op, Role, Value
from rescompile.kinds import OpKind
from rescompile.values import numpy_dtype

Why = Callable[[Op, Value], str]


@dataclass(frozen=True)
class Slot:
    """Elements `start` to `start` + extent, along the axis, of buffer number `buffer`."""

    buffer: int
    start: int
    extent: int


@dataclass(frozen=True)
class Buffer:
    """One shared buffer: its extents as the graph counts them, and the axis along which its parts lie."""

    shape: tuple[int, ...]
    dtype: str
    axis: int
    channels_last: bool


@dataclass(frozen=True)
class Join:
    """A concatenation whose output lies in a buffer.

    copied: the operands that are copied into their slice, each with the reason. saved: bytes that are not moved.
    """

    op: Op
    slot: Slot
    copied: dict[Value, str]
    saved: int


@dataclass
class Shared:
    """What lies in shared buffers.

    Attributes:
        slots: where values lie. joins: the concatenations that are written in place, by name.
        copies: for each buffer what is copied into it, and to where: whichever concatenation comes first does it.
        refused: why each other concatenation is not.
    """

    buffers: list[Buffer] = field(default_factory=list)
    slots: dict[Value, Slot] = field(default_factory=dict)
    joins: dict[str, Join] = field(default_factory=dict)
    copies: dict[int, list[tuple[Value, int]]] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)


def share(graph: Graph, writes: Why, reads: Why, channels_last: Callable[[Value], bool]) -> Shared:
    """Place the operands and outputs of concatenations.

    writes: why an operation cannot write a value into a slice; reads: why one cannot read it there; both empty where
    it can. channels_last: whether a value lies so.
    """
    found = Shared()
    joins = [op for op in graph if op.kind is OpKind.CONCAT]
    parts = {op: _flat(op) for op in joins}
    for op in sorted(joins, key=lambda op: -_bytes(op.output)):
        reason = _unfit(op) or _place(graph, found, op, parts, writes, reads, channels_last(op.output))
        if reason:
            found.refused[op.name] = reason
    return found


def _flat(op: Op) -> list[Value]:
    """The operands, concatenations along the same axis among them taken apart."""
    result: list[Value] = []
    for value in op.operands:
        inner = value.producer
        same = inner is not None and inner.kind is OpKind.CONCAT and _axis(inner) == _axis(op)
        result += _flat(inner) if same and inner is not None else [value]
    return result


def _axis(op: Op) -> int:
    return int(op.attr("axis")) % max(1, op.output.rank or 1)


def _unfit(op: Op) -> str:
    values = [*op.operands, op.output]
    if any(value.shape is None or any(isinstance(extent, str) for extent in value.shape) for value in values):
        return "an extent is dynamic"
    if len({value.dtype for value in values}) > 1:
        return "its operands have different types"
    if len(op.operands) < 2:
        return "it joins nothing"
    return ""


def _place(
    graph: Graph,
    found: Shared,
    op: Op,
    parts: dict[Op, list[Value]],
    writes: Why,
    reads: Why,
    channels_last: bool,
) -> str:
    """Give the concatenation a buffer or a run of one; why it gets none."""
    leaves, axis = parts[op], _axis(op)
    if op.output in found.slots:
        return _join(found, op, found.slots[op.output], {}, reads)
    placed = [found.slots.get(leaf) for leaf in leaves]
    held = [slot for slot in placed if slot is not None]
    if held:
        first = held[0]
        start = first.start
        run = len(held) == len(leaves) and found.buffers[first.buffer].axis == axis
        for slot in held:
            run = run and slot.buffer == first.buffer and slot.start == start
            start += slot.extent
        if not run:
            taken = next(leaf for leaf in leaves if leaf in found.slots)
            return f"'{taken.name}' lies in another concatenation's buffer, at another place"
        extent = start - first.start
        return _join(found, op, Slot(first.buffer, first.start, extent), {}, reads)
    inside = {other for other in parts if _axis(other) == axis and _run_at(parts[other], leaves) is not None}
    copied = {leaf: why for leaf in leaves if (why := _unwritten(graph, leaf, leaves, inside, writes, reads))}
    if all(leaf in copied for leaf in leaves):
        return next(iter(copied.values()))
    number, start = len(found.buffers), 0
    found.buffers.append(Buffer(_extents(op.output), str(op.output.dtype), axis, channels_last and axis == 1))
    starts = []
    for leaf in leaves:
        extent = _extents(leaf)[axis]
        starts.append(start)
        if leaf in copied:
            found.copies.setdefault(number, []).append((leaf, start))
        else:
            found.slots[leaf] = Slot(number, start, extent)
        start += extent
    reason = _join(found, op, Slot(number, 0, start), copied, reads)
    for other in inside:
        if other is not op and other.output not in found.slots:
            at = _run_at(parts[other], leaves)
            if at is not None:
                found.slots[other.output] = Slot(number, starts[at], _extents(other.output)[axis])
    return reason


def _join(found: Shared, op: Op, slot: Slot, copied: dict[Value, str], reads: Why) -> str:
    found.slots[op.output] = slot
    whole = slot.extent == found.buffers[slot.buffer].shape[found.buffers[slot.buffer].axis]
    taken_out = not whole and any(reads(user, op.output) for user in op.output.users if user.kind is not OpKind.CONCAT)
    moved = sum(_bytes(leaf) for leaf in copied) + (_bytes(op.output) if taken_out else 0)
    found.joins[op.name] = Join(op, slot, copied, 2 * (_bytes(op.output) - moved))
    return ""


def _unwritten(graph: Graph, leaf: Value, leaves: Sequence[Value], inside: set[Op], writes: Why, reads: Why) -> str:
    """Why the value is not written into its slice by what makes it; empty when it is."""
    if leaf.role is not Role.RESULT or leaf.producer is None:
        return f"'{leaf.name}' is an input of the graph" if leaf.role is Role.INPUT else f"'{leaf.name}' is a constant"
    if graph.is_output(leaf):
        return f"'{leaf.name}' is an output of the graph"
    if leaves.count(leaf) > 1:
        return f"'{leaf.name}' is in it twice"
    reason = writes(leaf.producer, leaf)
    if reason:
        return f"'{leaf.name}' cannot be written with gaps: {reason}"
    for user in leaf.users:
        if user in inside:
            continue
        reason = "it is in another concatenation" if user.kind is OpKind.CONCAT else reads(user, leaf)
        if reason:
            return f"'{user.name}' cannot read '{leaf.name}' with gaps: {reason}"
    return ""


def _run_at(inner: Sequence[Value], outer: Sequence[Value]) -> int | None:
    """Where the values stand in a row among others."""
    for start in range(len(outer) - len(inner) + 1):
        if all(a is b for a, b in zip(inner, outer[start:], strict=False)):
            return start
    return None


def _extents(value: Value) -> tuple[int, ...]:
    return tuple(int(extent) for extent in value.shape or ())


def _bytes(value: Value) -> int:
    extents = [extent if isinstance(extent, int) else 1 for extent in value.shape or ()]
    return prod(extents) * np.dtype(numpy_dtype(value.dtype or "float32")).itemsize
