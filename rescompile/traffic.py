"""How far a graph's memory traffic is from the least that there could be.

```
traffic        T  = Σ over operations (operands read once + outputs written once)          as `rescompile.costs` counts
byte bound     B₁ = Σ over inputs, parameters, literals (what is read of them, once) + Σ over outputs (written once)
kernel bound   B₂ = C + Σ over anchors (computed operands read once + outputs written once) + Σ over joins j r(j)
```

B₁ is what every schedule moves, were the whole model one kernel with memory enough inside. B₂ is what every schedule
moves that gives each *anchor* a kernel of its own: a contraction, a norm, a reduction, a pool, whatever else works
across positions or is not known. Everything else rides in the kernel before or behind it and keeps what it makes to
itself: elementwise operations, a batch norm in evaluation, moves of elements, and a concat, which its operands are
written into. C: parameters and literals, each once. A value that crosses from one kernel to another counts with the
smallest of the values on its way (a slice, a narrow cast). A riding operation that brings k streams together, for the
first time, reads all but the largest of them, r(j), but for what the kernel that it rides in reads anyway. So a
residual stage costs, in tensors of the stream: one write and one read by each reader of the sum, and one read for the
skip.

A fused operation counts as what it is made of where that is less, and B₁ ≤ B₂ ≤ T always.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rescompile.costs import VIEWS, graph_costs, symbol_extents, tensor_size
from rescompile.detection.view import written_out
from rescompile.graph import Graph, Op, Role, Value
from rescompile.kinds import OpKind, Trait

_K = OpKind
_LOOKUPS = (_K.EMBEDDING, _K.GATHER)  # read of their first operand what they return
_HOSTS = 8
_RIDES = Trait.ELEMENTWISE, Trait.FREE, Trait.SOURCE


@dataclass(frozen=True, slots=True)
class Traffic:
    """Bytes that a graph moves on one call, and the least that it could: see the module."""

    bytes: int
    bound: int
    kernel_bound: int
    symbols: tuple[tuple[str, int], ...] = ()  # what each symbolic extent counted as

    @property
    def percent(self) -> float:
        """100·B₁/T: 100 for a model that is one kernel."""
        return 100.0 * self.bound / self.bytes if self.bytes else 100.0

    @property
    def kernel_percent(self) -> float:
        """100·B₂/T: 100 where every value that crosses kernels is all that is moved."""
        return 100.0 * self.kernel_bound / self.bytes if self.bytes else 100.0

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "bytes": self.bytes,
            "bound": self.bound,
            "kernel_bound": self.kernel_bound,
            "percent_of_bound": round(self.percent, 3),
            "percent_of_kernel_bound": round(self.kernel_percent, 3),
            "symbols": dict(self.symbols),
        }


def graph_traffic(graph: Graph, extents: Mapping[str, int] | None = None) -> Traffic:
    """T, B₁ and B₂ of a graph. `extents`: what symbolic extents count as (1 otherwise)."""
    extents = extents or {}
    moved = graph_costs(graph, extents).bytes
    bounds = [_Bounds(graph, extents)]
    view = written_out(graph)
    if view is not None:
        bounds.append(_Bounds(view, extents))
    model = min(moved, *(each.model() for each in bounds))
    kernels = min(moved, *(each.kernels() for each in bounds))
    return Traffic(moved, model, max(model, kernels), symbol_extents(graph, extents))


def traffic_lines(before: Traffic, after: Traffic) -> list[str]:
    """Both sides' percentages of the two bounds, as text; the bytes themselves are among the costs."""
    return [
        f"  {before.percent:.1f} % → {after.percent:.1f} % of the byte bound "
        f"({after.bound:,}: inputs, parameters and outputs once)",
        f"  {before.kernel_percent:.1f} % → {after.kernel_percent:.1f} % of the kernel bound "
        f"({after.kernel_bound:,}: and what crosses from kernel to kernel)",
    ]


class _Bounds:
    """Both bounds of one graph."""

    def __init__(self, graph: Graph, extents: Mapping[str, int]) -> None:
        self._graph = graph
        self._extents = extents
        self._sizes: dict[Value, int] = {}
        self._roots: dict[Value, Value] = {}
        self._live = [op for op in graph if not all(value.constant for value in op.outputs)]

    def model(self) -> int:
        """B₁."""
        return self._read_once(constants=True, inputs=True) + self._once(
            [value for value in self._graph.outputs if not _is_source(self._root(value))]
        )

    def kernels(self) -> int:
        """B₂, before it is compared with B₁ and T."""
        streams = _Streams()
        least: dict[Value, int] = {value: self._size(value) for value in self._graph.inputs}
        hosts: dict[Value, tuple[Op, ...]] = {}  # the latest anchors whose kernels a value may be made in
        total = self._read_once(constants=True, inputs=False)
        wanted = self._wanted()
        for op in self._live:
            computed = list(dict.fromkeys(value for value in op.operands if not value.constant))
            if op.has(Trait.SOURCE):
                computed = []
            reads = {value: self._part(op, value, least.get(value, 0)) for value in computed}
            if not _rides(op):
                total += self._once(reads, reads) + sum(wanted.get(value, 0) for value in op.outputs)
                for value in op.outputs:
                    streams.join(op.outputs[0], value)
                    least[value] = self._size(value)
                    hosts[value] = (op,)
                continue
            sizes = streams.largest(reads)
            near = sorted({host for value in computed for host in hosts.get(value, ())}, key=lambda host: -host.order)
            if op.kind is not _K.CONCAT and len(sizes) > 1:
                read = {streams.of(value) for host in near for value in host.operands if not value.constant}
                rest = [size for stream, size in sizes.items() if stream not in read]
                total += sum(rest) - max(rest, default=0)
            combined = sum(reads.values()) if op.kind is _K.CONCAT else max(reads.values(), default=0)
            for value in op.outputs:
                hosts[value] = tuple(near[:_HOSTS])
                least[value] = min(self._size(value), combined)
                for operand in computed:
                    streams.join(value, operand)
        return total

    # ---- what is read and written at least ---------------------------------------------------------------------

    def _read_once(self, *, constants: bool, inputs: bool) -> int:
        """What operations read of the sources, each part of each once."""
        read: dict[Value, int] = {}
        for op in self._live:
            if op.kind in VIEWS or op.has(Trait.SOURCE):
                continue
            for value in op.operands:
                root = self._root(value)
                if _is_source(root) and (inputs if root.role is Role.INPUT else constants):
                    read[value] = max(read.get(value, 0), self._part(op, value, self._size(value)))
        return self._once(list(read), read)

    def _once(self, values: Any, sizes: Mapping[Value, int] | None = None) -> int:
        """Bytes of the values, of the views of one value together no more than that has."""
        found: dict[Value, int] = {}
        for value in dict.fromkeys(values):
            root = self._root(value)
            found[root] = found.get(root, 0) + (self._size(value) if sizes is None else sizes[value])
        return sum(min(size, self._size(root)) for root, size in found.items())

    def _wanted(self) -> dict[Value, int]:
        """Of each computed value, the least that has to be kept of it for those who read what becomes of it."""
        wanted = {value: self._size(value) for value in self._graph.outputs}
        for op in reversed(self._live):
            rides = _rides(op)
            passed = sum(wanted.get(value, 0) for value in op.outputs)
            for value in op.operands:
                if value.constant or op.has(Trait.SOURCE):
                    continue
                part = min(self._size(value), passed) if rides else self._part(op, value, self._size(value))
                wanted[value] = max(wanted.get(value, 0), part)
        return wanted

    def _part(self, op: Op, value: Value, size: int) -> int:
        """What of an operand of that size the operation reads."""
        if op.kind in _LOOKUPS and value is op.inputs[0]:
            return min(size, self._size(op.outputs[0]))
        return size

    def _size(self, value: Value) -> int:
        size = self._sizes.get(value)
        if size is None:
            size = self._sizes[value] = tensor_size(value, self._extents)[1]
        return size

    def _root(self, value: Value) -> Value:
        """What the value is a view of."""
        chain = []
        root = value
        while root not in self._roots:
            chain.append(root)
            op = root.producer
            if op is None or op.kind not in VIEWS or op.has(Trait.SOURCE) or op.inputs[0] is None:
                self._roots[root] = root
                break
            root = op.inputs[0]
        root = self._roots[root]
        self._roots.update(dict.fromkeys(chain, root))
        return root


class _Streams:
    """Which values come from the same kernels, by way of riding operations."""

    def __init__(self) -> None:
        self._parent: dict[Value, Value] = {}

    def join(self, one: Value, other: Value) -> None:
        """Let two values be of one stream."""
        self._parent[self.of(one)] = self.of(other)

    def largest(self, sizes: Mapping[Value, int]) -> dict[Value, int]:
        """The largest size in each of the streams."""
        found: dict[Value, int] = {}
        for value, size in sizes.items():
            stream = self.of(value)
            found[stream] = max(found.get(stream, 0), size)
        return found

    def of(self, value: Value) -> Value:
        """The value that stands for the stream."""
        while (parent := self._parent.get(value, value)) is not value:
            self._parent[value] = value = self._parent.get(parent, parent)
        return value


def _rides(op: Op) -> bool:
    """Whether an operation needs no kernel of its own."""
    if op.kind is _K.BATCH_NORM:
        return not op.attr("training")
    return op.kind in (_K.CONCAT, _K.GATHER) or any(op.has(trait) for trait in _RIDES)


def _is_source(value: Value) -> bool:
    return value.constant or value.role is Role.INPUT
