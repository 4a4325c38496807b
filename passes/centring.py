"""Streams whose mean over the features can be kept at zero, and what writes into them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from rescompile.graph import Graph, Op, Role, Value
from rescompile.kinds import OpKind as K
from rescompile.passes.features import carried, carriers, moved, normed_axis, uniform
from rescompile.passes.tracing import is_stored

_WRITERS = {K.LINEAR, K.CONV, K.EMBEDDING}


@dataclass(frozen=True, slots=True)
class Centred:
    """A stored tensor whose mean along `axis` is to be taken off, after a factor for each feature. `uses`: its readers
    that are to read the result."""

    value: Value
    axis: int
    factor: Value | None
    uses: tuple[tuple[Op, int], ...]

    @property
    def key(self) -> tuple[Value, int, Value | None]:
        """Equal where the new contents are."""
        return self.value, self.axis, self.factor


@dataclass(slots=True)
class Stream:
    """Norms that read a stream, and what centres it. `edges`: reader and operand of what is centred at run time."""

    norms: list[Op] = field(default_factory=list)
    tensors: list[Centred] = field(default_factory=list)
    factors: list[Op] = field(default_factory=list)
    edges: dict[Value, list[tuple[Op, int]]] = field(default_factory=dict)
    axes: dict[Value, int] = field(default_factory=dict)
    reasons: list[str] = field(default_factory=list)


class Streams:
    """All streams that layer norms of a graph read.

    A value is raw where something reads it that its mean changes: it stays, and where a centred one is needed, the mean
    is taken off at run time.
    """

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.norms = {op: op.inputs[0] for op in graph if op.kind is K.LAYER_NORM and op.inputs[0] is not None}
        self._axes: dict[Value, int] = {}
        self._raw: dict[Value, str] = {}
        self._trace()
        self._mark()
        self._forced: dict[Value, str] = {}
        self._alive: dict[Value, None] = {}
        self._apart: dict[Value, str] = {}  # centred at run time, and why
        self._parts: dict[Value, list[Centred]] = {}
        self._settle()

    # ---- what carries features to a norm, and what must stay as it is ------------------------------------------

    def _trace(self) -> None:
        pending: list[tuple[Value, int]] = []
        for norm in list(self.norms):
            axis, x = normed_axis(norm), norm.inputs[0]
            if isinstance(axis, str) or x is None:
                del self.norms[norm]
            else:
                pending.append((x, axis))
        while pending:
            value, axis = pending.pop()
            if value in self._axes:
                if self._axes[value] != axis:
                    self._raw[value] = f"norms read '{value.name}' along different axes"
                continue
            self._axes[value] = axis
            for index, own in carriers(value, axis) or ():
                operand = value.producer.inputs[index] if value.producer is not None else None
                if operand is not None:
                    pending.append((operand, own))

    def _mark(self) -> None:
        """Readers come after what they read: one way back through the operations."""
        for value in self._axes:
            if self.graph.is_output(value):
                self._raw.setdefault(value, f"'{value.name}', whose mean would go, is an output of the graph")
        for op in sorted({op for value in self._axes for op in value.users}, key=lambda op: -op.order):
            for index, operand in enumerate(op.inputs):
                if operand is not None and operand in self._axes and operand not in self._raw:
                    reason = self._bound(op, index, operand)
                    if reason:
                        self._raw[operand] = reason

    def _bound(self, op: Op, index: int, value: Value) -> str:
        """Why the operation needs the operand with its mean; empty where it does not."""
        axis = self._axes[value]
        if op.kind is K.SHAPE or (op in self.norms and index == 0 and axis == normed_axis(op)):
            return ""
        for output in op.outputs:
            if not output.uses and not self.graph.is_output(output):
                continue
            if self._axes.get(output, -1) != carried(op, index, axis, output) or not carriers(
                output, self._axes[output]
            ):
                return f"'{op.name}' ({op.kind.value}) reads '{value.name}' with its mean"
            if output in self._raw:
                return self._raw[output]
        return ""

    # ---- how each value comes to be centred ----------------------------------------------------------------------

    def _settle(self) -> None:
        """Weights that something else reads too are left alone, which may leave others so too: until it holds."""
        while True:
            self._decide()
            shared = self._shared()
            if not shared:
                return
            self._forced |= shared

    def _decide(self) -> None:
        self._apart.clear()
        self._parts.clear()
        costs: dict[Value, int] = {}
        for value in sorted(self._axes, key=lambda value: value.producer.order if value.producer else -1):
            costs[value] = self._cost(value, costs)
        self._alive = {}
        pending = list(dict.fromkeys(x for x in self.norms.values() if x is not None))
        while pending:
            value = pending.pop()
            if value not in self._alive:
                self._alive[value] = None
                if value not in self._apart and value not in self._parts:
                    pending += self._terms(value)

    def _terms(self, value: Value) -> list[Value]:
        op = value.producer
        found = carriers(value, self._axes[value]) if op is not None else None
        operands = [op.inputs[index] for index, _ in found] if op is not None and found else []
        return list(dict.fromkeys(operand for operand in operands if operand is not None))

    def _cost(self, value: Value, costs: dict[Value, int]) -> int:
        """How many times a mean has to be taken off at run time for it."""
        reason = self._raw.get(value) or self._forced.get(value)
        terms = self._terms(value)
        if not reason and not terms:
            parts = self._writer(value)
            if parts is not None:
                self._parts[value] = parts
                return 0
            reason = f"'{value.name}' has a mean that no weight holds" if value.producer else f"'{value.name}' is given"
        total = sum(costs[term] for term in terms)
        if not reason and (not total or not all(self._lone(term) for term in terms)):
            return total
        self._apart[value] = reason or next(self._apart[term] for term in self._sources(terms))
        return 1

    def _sources(self, terms: list[Value]) -> Iterator[Value]:
        for term in terms:
            if term in self._apart:
                yield term
            else:
                yield from self._sources(self._terms(term))

    def _lone(self, value: Value) -> bool:
        """Whether it, and all that is carried to it, is read here only, so that its mean may as well go later."""
        if is_stored(value):
            return True
        if len(value.uses) != 1 or self.graph.is_output(value):
            return False
        return value in self._apart or value in self._parts or all(self._lone(term) for term in self._terms(value))

    # ---- weights that write ----------------------------------------------------------------------------------------

    def _writer(self, value: Value) -> list[Centred] | None:
        """The tensors to centre so that the value is; empty where it is already, None where there are no such."""
        axis, op = self._axes[value], value.producer
        if op is None:
            return [Centred(value, axis, None, tuple(value.uses))] if value.role is not Role.INPUT else None
        if op.kind is K.MUL:
            return self._scaled(op, axis)
        if op.kind in (K.LAYER_NORM, K.RMS_NORM):
            if op.kind is K.RMS_NORM or normed_axis(op) != axis:
                return None
            gain, bias = uniform(self.graph, op.operand("weight"), 1.0), uniform(self.graph, op.operand("bias"), 0.0)
            return [] if gain is not None and bias == 0 else None
        return _tensors(op, axis, None)

    def _scaled(self, op: Op, axis: int) -> list[Centred] | None:
        """γ ⊙ (W·x + b): the factor for each feature goes into the weights."""
        for x, factor in (op.operands, op.operands[::-1]):
            shape = factor.shape or ()
            if not is_stored(factor) or x.producer is None or x.type != op.output.type or not shape:
                continue
            along = axis - (len(op.output.shape or ()) - len(shape))
            if any(extent != 1 for place, extent in enumerate(shape) if place != along):
                continue
            value, own = x, axis
            while len(value.uses) == 1 and not self.graph.is_output(value) and value.producer is not None:
                work = value.producer
                if work.kind in _WRITERS:
                    return _tensors(work, own, factor)
                inner = work.inputs[0] if work.kind in (K.IDENTITY, K.RESHAPE, K.PERMUTE) else None
                places = range(inner.rank or 0) if inner is not None else ()
                place = next((place for place in places if moved(work, 0, place, value) == own), None)
                if inner is None or place is None:
                    break
                value, own = inner, place
        return None

    def _shared(self) -> dict[Value, str]:
        """Values whose weights cannot be centred in place, because other operations read these as they are."""
        wanted: dict[Value, set[tuple[Op, int]]] = {}
        keys: dict[Value, set[tuple[Value, int, Value | None]]] = {}
        for value in self._alive:
            for part in self._parts.get(value, ()):
                wanted.setdefault(part.value, set()).update(part.uses)
                keys.setdefault(part.value, set()).add(part.key)
        found: dict[Value, str] = {}
        for value in self._alive:
            for part in self._parts.get(value, ()):
                held = part.value
                if self.free(part):
                    continue
                others = [op.name for op, index in held.uses if (op, index) not in wanted[held]]
                if others or len(keys[held]) > 1:
                    other = f"'{others[0]}'" if others else "another writer"
                    found[value] = f"{other} reads the weights of '{part.uses[0][0].name}' as they are"
        return found

    def free(self, part: Centred) -> bool:
        """Whether a copy of the tensor costs next to nothing, or none is needed."""
        return sum(extent != 1 for extent in part.value.shape or ()) <= 1 or self.silent(part)

    def silent(self, part: Centred) -> bool:
        """Whether the tensor is zero, and so has no mean."""
        return not self.graph.data(part.value).any()

    # ---- streams -----------------------------------------------------------------------------------------------------

    def __iter__(self) -> Iterator[Stream]:
        """Streams in the order of their first norms. Those that share a value or a weight are one."""
        roots: dict[object, object] = {}

        def root(item: object) -> object:
            while roots.setdefault(item, item) is not item:
                roots[item] = roots[roots[item]]
                item = roots[item]
            return item

        for norm, x in self.norms.items():
            roots[root(norm)] = root(x)
        for value in self._alive:
            inner = value not in self._apart and value not in self._parts
            near: list[object] = list(self._terms(value)) if inner else []
            near += [part.value for part in self._parts.get(value, ()) if not inner and not self.free(part)]
            for item in near:
                roots[root(item)] = root(value)
        streams: dict[object, Stream] = {}
        for norm, x in sorted(self.norms.items(), key=lambda item: item[0].order):
            stream = streams.setdefault(root(x), Stream())
            stream.norms.append(norm)
            if x in self._apart:
                stream.edges.setdefault(x, []).append((norm, 0))
        for value in self._alive:
            stream = streams[root(value)]
            if value in self._apart:
                stream.axes[value] = self._axes[value]
                stream.edges.setdefault(value, [])
                stream.reasons.append(self._apart[value])
            elif value in self._parts:
                stream.tensors += self._parts[value]
                if value.producer is not None and value.producer.kind is K.MUL:
                    stream.factors.append(value.producer)
            else:
                for op, index, term in self._reads(value):
                    if term in self._apart:
                        stream.edges.setdefault(term, []).append((op, index))
        yield from streams.values()

    def _reads(self, value: Value) -> Iterator[tuple[Op, int, Value]]:
        op = value.producer
        for index, _ in carriers(value, self._axes[value]) or () if op is not None else ():
            term = op.inputs[index] if op is not None else None
            if op is not None and term is not None:
                yield op, index, term


def _tensors(op: Op, axis: int, factor: Value | None) -> list[Centred] | None:
    """Weight and bias of an operation that writes features along `axis` of its output; None where they cannot be
    centred."""
    weight, rank = op.operand("weight") if op.kind in _WRITERS else None, op.output.rank
    if weight is None or rank is None or not is_stored(weight):
        return None
    if op.kind is K.EMBEDDING:
        return [Centred(weight, 1, factor, ((op, 0),))] if axis == rank - 1 and weight.rank == 2 else None
    bias, out = op.operand("bias"), 0
    if not is_stored(bias) or axis != (1 if op.kind is K.CONV else rank - 1):
        return None
    if op.kind is K.CONV and op.attr("groups") != 1:
        return None
    if op.kind is K.LINEAR and not op.attr("transpose_weight"):
        out = 1
    found = [Centred(weight, out, factor, ((op, 1),))]
    if bias is not None:
        found.append(Centred(bias, (bias.rank or 1) - 1, factor, ((op, 2),)))
    return found
