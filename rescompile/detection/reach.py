"""Where the paths of a join come from: nearest common ancestors, in near-linear time.

The ways back from every value are read off the operations once. Joins are judged in topological order. Once one is
known to be the end of a block, the block is *contracted*: from its join the search jumps to its fork, as if the block
were one identity. What enters the branch from outside (a mask, an encoder's memory, a rotary table) is no way back
through a contracted block: the stream runs along the skip. That is why a positional embedding which every attention
adds to its queries is not taken for a stream, although everything after the first attention depends on it.

Values with one way back form long chains, which a search passes in logarithmic time (see `chains`).
"""

from __future__ import annotations

from collections.abc import Sequence
from heapq import heappop, heappush

from rescompile.detection.chains import Chains, order
from rescompile.graph import Graph, Op, Role, Value
from rescompile.kinds import OpKind, Trait

# Kinds of which one operand only carries a stream, the others weights.
_STREAM_OPERAND: dict[OpKind, int] = {
    kind: 0 for kind in OpKind if kind.has(Trait.PARAMETRIC) and kind is not OpKind.RECURRENT
}
_STREAM_OPERAND[OpKind.EMBEDDING] = 1


_SCALING = (OpKind.MUL, OpKind.DIV)  # a smaller constant next to a stream is a factor on it
_RESULT, _INPUT = Role.RESULT, Role.INPUT  # looking a member of an enumeration up costs as much as the test


def _position(op: Op) -> int:
    return op.order


class Reach:
    """The ways back from every value, with the blocks found so far contracted.

    `near`: steps back that a search takes one by one before it looks for short cuts.
    """

    def __init__(self, graph: Graph, near: int = 24) -> None:
        self.graph = graph
        self._steps = near
        self.streams = _constant_streams(graph)
        self.forks: dict[Value, Value] = {}  # what each contracted join jumps to
        self._sources: dict[Value, tuple[Value, ...]] = {}
        for op in graph:
            sources = self.operands(op)
            for value in op.outputs:
                self._sources[value] = sources
        self._chains = Chains(self._sources)

    def contract(self, join: Value, fork: Value) -> None:
        """Let `join` lead back to `fork` only. No search may have started at `join` before."""
        self.forks[join] = fork
        self._sources[join] = (fork,)

    def pass_through(self, total: Value, source: Value) -> None:
        """Let a value that is no join of a block lead back to `source` only. No search may have started there yet."""
        self._sources[total] = (source,)

    def operands(self, op: Op) -> tuple[Value, ...]:
        """What the operation reads of streams: weights, literals and other constants that start none are left out."""
        only = _STREAM_OPERAND.get(op.kind)
        inputs, streams = op.inputs, self.streams
        if only is not None or len(inputs) == 1:
            value = inputs[only or 0] if len(inputs) > (only or 0) else None
            moves = value is not None and (value.role is _RESULT or value.role is _INPUT or value in streams)
            return (value,) if moves and value is not None else ()
        found: dict[Value, None] = {}
        for value in inputs:
            if value is not None and (value.role is _RESULT or value.role is _INPUT or value in streams):
                found[value] = None
        if len(found) > 1 and op.kind in _SCALING:
            shape = op.outputs[0].shape
            moving = [value for value in found if not value.constant or value.shape == shape]
            if moving and any(not value.constant for value in moving):
                return tuple(moving)
        return tuple(found)

    def sources(self, value: Value) -> tuple[Value, ...]:
        """The values that lead to `value` in one step."""
        return self._sources.get(value, ())

    def meet(self, left: Value, right: Sequence[Value]) -> Value | None:
        """The nearest value that both `left` and one of `right` come from; None when there is none."""
        if len(right) == 1:
            left, other, met = self._near(left, right[0])
            if met:
                return left if left is other else None
            right = (other,)
        return self._far(left, right)

    def _near(self, left: Value, right: Value) -> tuple[Value, Value, bool]:
        """Both followed back, the younger one at a time, as long as each has one way: whether that settled it."""
        sources = self._sources
        young, old = left, right
        newest, oldest = order(young), order(old)
        for _ in range(self._steps):
            if young is old:
                return young, old, True
            if newest < oldest:
                young, old, newest, oldest = old, young, oldest, newest
            before = sources.get(young, ())
            if len(before) != 1:
                return young, old, not before
            young = before[0]
            op = young.producer
            newest = -1 if op is None else op.order
        return young, old, False

    def _far(self, left: Value, right: Sequence[Value]) -> Value | None:
        """The search among many ways."""
        colours: dict[Value, int] = {left: 1}
        for value in right:
            colours[value] = colours.get(value, 0) | 2
        heap = [(-order(value), index, value) for index, value in enumerate(colours)]
        heap.sort()
        waiting = [0, 0]  # values still in the heap, by colour
        for colour in colours.values():
            waiting[0] += colour & 1
            waiting[1] += colour >> 1
        count = len(heap)
        near = count + self._steps
        chains = self._chains
        while waiting[0] and waiting[1]:
            _, _, value = heappop(heap)
            colour = colours[value]
            if colour == 3:
                return value
            waiting[colour - 1] -= 1
            bound, _, other = heap[0]
            bound = -bound
            if count > near and len(heap) == 1 and colours[other] == 3 - colour:
                # One way each is left: either they meet on their chains, or neither need be looked at link by link.
                met = chains.common(value, other)
                if met is not None:
                    return met
                bound = max(order(chains.end(value)), order(chains.end(other)))
                if order(other) > bound:
                    other = chains.climb(other, bound)
                    colours[other] = 3 - colour
                    heap[0] = (-order(other), count, other)
                    count += 1
            sources = self._sources.get(value, ())
            if count > near and len(sources) == 1:
                sources = (chains.climb(value, bound),)
            for source in sources:
                known = colours.get(source)
                if known is None:
                    colours[source] = colour
                    heappush(heap, (-order(source), count, source))
                    count += 1
                    waiting[colour - 1] += 1
                elif known | colour != known:
                    colours[source] = 3
                    waiting[colour - 1] += 1
        return None

    def between(self, fork: Value, tops: Sequence[Value]) -> tuple[list[Op], list[Value]]:
        """The operations on the ways from `fork` to `tops`, in topological order, and what else they read."""
        if len(tops) == 1:
            line = self._line(fork, tops[0])
            if line is not None:
                return line, []
        bound = order(fork)
        seen: set[Value] = set()
        ops: set[Op] = set()
        stack = list(tops)
        while stack:
            value = stack.pop()
            op = value.producer
            if value in seen or op is None or op.order <= bound:
                continue
            seen.add(value)
            ops.add(op)
            stack.extend(self._sources[value])
        from_fork = {fork}
        region: list[Op] = []
        outside: dict[Value, None] = {}
        for op in sorted(ops, key=_position):
            sources = self._sources[op.outputs[0]]
            if from_fork.isdisjoint(sources):
                continue
            region.append(op)
            from_fork.update(op.outputs)
            if len(sources) > 1:
                outside.update((value, None) for value in sources if value not in from_fork)
        return region, list(outside)

    def _line(self, fork: Value, top: Value) -> list[Op] | None:
        """The operations between, where each reads the one before and nothing else; None where there are others."""
        bound = order(fork)
        line: list[Op] = []
        while top is not fork:
            op = top.producer
            if op is None or op.order <= bound:
                return None
            sources = self._sources[top]
            if len(sources) != 1:
                return None
            line.append(op)
            top = sources[0]
        line.reverse()
        return line

    def comes_from(self, fork: Value, top: Value) -> bool:
        """Whether there is a way from `fork` to `top`."""
        return self.meet(top, (fork,)) is fork


def _constant_streams(graph: Graph) -> set[Value]:
    """Constant leaves that a stream may start from: read in several places, by a join among them.

    A class token, a decoder's queries; not a weight that two layers share.
    """
    return {
        value
        for value in graph.values
        if len(value.uses) > 1
        and value.role in (Role.PARAMETER, Role.CONSTANT)
        and any(op.kind is OpKind.ADD for op, _ in value.uses)
        and value.rank != 0
    }
