"""Which operation and which parameter of one graph stands for which of another: by names, then by structure.

The surest names are those of modules: operations whose weights belong to one module are twins, whatever IR they are in
and however a pass renamed the weights. An operation's own name decides where both graphs are of one IR and names are no
mere numbering (a torch program that was saved and loaded counts anew). What names leave open is matched outwards from
there: readers of matched values, producers of matched operands. Last come equal operations in order. Linear in the
number of operations.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable, Container, Hashable
from itertools import takewhile

from rescompile.graph import Graph, Op, Role, Value
from rescompile.kinds import OpKind, Trait

LINEARS = (OpKind.LINEAR, OpKind.FUSED_LINEAR)


class Matching:
    """Pairs of operations, and of values that no operation makes, of two graphs."""

    def __init__(self, before: Graph, after: Graph) -> None:
        self.before = before
        self.after = after
        self.same_ir = before.ir == after.ir
        self.named = self.same_ir  # whether a name means the same in both graphs
        self.ops: dict[Op, Op] = {}
        self.sources: dict[Value, Value] = {}  # inputs, parameters, literals
        self._taken: set[Op] = set()
        self._taken_sources: set[Value] = set()
        self._ahead: deque[tuple[Value, Value]] = deque()  # twin values, whose readers may be twins
        self._behind: list[tuple[Value, Value]] = []  # operands of twins, whose producers may be twins
        self._match()

    def counterpart(self, value: Value | None) -> Value | None:
        """The value of the second graph that stands for `value`, None when there is none."""
        if value is None:
            return None
        producer = value.producer
        if producer is None:
            return self.sources.get(value)
        twin = self.ops.get(producer)
        index = producer.outputs.index(value)
        return twin.outputs[index] if twin is not None and index < len(twin.outputs) else None

    @property
    def removed(self) -> list[Op]:
        """Operations of the first graph without a twin."""
        return [op for op in self.before if op not in self.ops]

    @property
    def added(self) -> list[Op]:
        """Operations of the second graph without a twin."""
        return [op for op in self.after if op not in self._taken]

    def parameters_removed(self) -> list[Value]:
        """Parameters of the first graph without a twin."""
        return [value for value in self.before.parameters if value not in self.sources]

    def parameters_added(self) -> list[Value]:
        """Parameters of the second graph without a twin."""
        return [value for value in self.after.parameters if value not in self._taken_sources]

    # ---- inside ------------------------------------------------------------------------------------------------

    def _match(self) -> None:
        self._match_inputs()
        parameters = {value.name: value for value in self.after.parameters}
        for value in self.before.parameters:
            if value.name in parameters:
                self._pair_sources(value, parameters[value.name])
        self._match_homes()
        named = self._named()
        for op, twin in named:
            if twin.kind is op.kind:
                self._pair(op, twin)
        self._behind.extend(zip(self.before.outputs, self.after.outputs, strict=False))
        self._spread()
        for op, twin in named:
            self._pair(op, twin)
        self._spread()
        for key in (_place, _signature):
            self._match_equal(key)
            self._spread()

    def _match_homes(self) -> None:
        """Operations whose weights belong to one module, where the module has one such operation in each graph."""
        homes = _by_home(self.after)
        for home, ops in _by_home(self.before).items():
            twins = homes.get(home, [])
            if len(ops) == len(twins) == 1:
                self._pair(ops[0], twins[0])

    def _named(self) -> list[tuple[Op, Op]]:
        """Operations of one name; none where names contradict the modules, and so only count."""
        if not self.same_ir:
            return []
        known = {op.name: op for op in self.after}
        pairs = [(op, known[op.name]) for op in self.before if op.name in known]
        homes = [(_home(op), _home(twin)) for op, twin in pairs]
        self.named = not any(ours and theirs and ours != theirs for ours, theirs in homes)
        return pairs if self.named else []

    def _match_inputs(self) -> None:
        by_name = {value.name: value for value in self.after.inputs}
        if all(value.name in by_name for value in self.before.inputs):
            for value in self.before.inputs:
                self._pair_sources(value, by_name[value.name])
        else:
            for value, twin in zip(self.before.inputs, self.after.inputs, strict=False):
                self._pair_sources(value, twin)

    def _pair(self, op: Op, twin: Op) -> None:
        if op in self.ops or twin in self._taken:
            return
        self.ops[op] = twin
        self._taken.add(twin)
        self._ahead.extend(zip(op.outputs, twin.outputs, strict=False))
        names = zip(op.kind.spec.operands, twin.kind.spec.operands, strict=False)
        shared = len(list(takewhile(lambda pair: pair[0] == pair[1], names)))
        if op.kind is twin.kind:
            shared = max(len(op.inputs), len(twin.inputs))
        operands = zip(op.inputs[:shared], twin.inputs[:shared], strict=False)
        self._behind.extend((ours, theirs) for ours, theirs in operands if ours is not None and theirs is not None)

    def _pair_sources(self, value: Value, twin: Value) -> None:
        if value not in self.sources and twin not in self._taken_sources:
            self.sources[value] = twin
            self._taken_sources.add(twin)
            if value.role is Role.INPUT:
                self._ahead.append((value, twin))

    def _spread(self) -> None:
        while self._behind or self._ahead:
            if self._behind:
                self._match_producers(*self._behind.pop())
            else:
                self._match_readers(*self._ahead.popleft())

    def _match_producers(self, ours: Value, theirs: Value) -> None:
        """Two values in the same place: their producers are twins if they are of one kind."""
        op, twin = ours.producer, theirs.producer
        if op is not None and twin is not None:
            if op.kind is twin.kind:
                self._pair(op, twin)
        elif op is None and twin is None and ours.role is theirs.role and ours.role is not Role.INPUT:
            self._pair_sources(ours, theirs)

    def _match_readers(self, ours: Value, theirs: Value) -> None:
        """Readers of twin values are twins where kind and place leave no choice but their order."""
        left = _readers(ours, self.ops)
        right = _readers(theirs, self._taken)
        for place, ops in left.items():
            twins = right.get(place, [])
            if len(ops) == len(twins):
                for op, twin in zip(ops, twins, strict=True):
                    self._pair(op, twin)

    def _match_equal(self, key: Callable[[Op], Hashable]) -> None:
        waiting: dict[Hashable, deque[Op]] = defaultdict(deque)
        for twin in self.after:
            if twin not in self._taken:
                waiting[key(twin)].append(twin)
        for op in self.before:
            if op not in self.ops:
                twins = waiting.get(key(op))
                if twins:
                    self._pair(op, twins.popleft())


def _home(op: Op) -> str:
    """Path of the module that the operation's weight belongs to; empty where it has none."""
    if not op.has(Trait.PARAMETRIC):
        return ""
    weight = next((value for value in op.operands if value.role is Role.PARAMETER), None)
    return "" if weight is None else weight.name.rpartition(".")[0]


def _by_home(graph: Graph) -> dict[str, list[Op]]:
    found: dict[str, list[Op]] = defaultdict(list)
    for op in graph:
        home = _home(op)
        if home:
            found[home].append(op)
    return found


def _readers(value: Value, taken: Container[Op]) -> dict[tuple[OpKind, int], list[Op]]:
    found: dict[tuple[OpKind, int], list[Op]] = defaultdict(list)
    for op, index in value.uses:
        if op not in taken:
            found[op.kind, index].append(op)
    for ops in found.values():
        ops.sort(key=lambda op: op.order)
    return found


def _signature(op: Op) -> Hashable:
    attrs = tuple(sorted((name, repr(value)) for name, value in op.attrs.items()))
    return op.kind, attrs, tuple(value.type for value in op.outputs)


def _place(op: Op) -> Hashable:
    return op.module, _signature(op)
