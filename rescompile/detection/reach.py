"""Where the paths of a join come from: nearest common ancestors, in near-linear time.

Joins are judged in topological order. Once one is known to be the end of a block, the block is *contracted*: from its
join the search jumps to its fork, as if the block were one identity. What enters the branch from outside (a mask, an
encoder's memory, a rotary table) is no way back through a contracted block: the stream runs along the skip. That is why
a positional embedding which every attention adds to its queries is not taken for a stream, although everything after
the first attention depends on it.

Values with one way back form long chains (a stack of blocks is one); a skip pointer on each lets a search that fails
pass a chain of n in O(log n) (Myers 1983, as in ancestor queries on trees).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from heapq import heappop, heappush

from rescompile.graph import Graph, Op, Role, Value
from rescompile.kinds import OpKind, Trait

# Kinds of which one operand only carries a stream, the others weights.
_STREAM_OPERAND: dict[OpKind, int] = {
    kind: 0 for kind in OpKind if kind.has(Trait.PARAMETRIC) and kind is not OpKind.RECURRENT
}
_STREAM_OPERAND[OpKind.EMBEDDING] = 1

_LEAF = -1  # the order of values that no operation produces


def order(value: Value) -> int:
    """Position of the operation that produces the value; −1 for inputs, parameters and literals."""
    return _LEAF if value.producer is None else value.producer.order


def _position(op: Op) -> int:
    return op.order


class Reach:
    """The ways back from every value judged so far, with the blocks found so far contracted."""

    def __init__(self, graph: Graph) -> None:
        self.streams = _constant_streams(graph)
        self.forks: dict[Value, Value] = {}  # what each contracted join jumps to
        self._sources: dict[Value, tuple[Value, ...]] = {}
        self._depth: dict[Value, int] = {}
        self._jump: dict[Value, Value] = {}

    def extend(self, op: Op) -> None:
        """Make known the ways back from an operation's outputs; its operands' must be known already."""
        sources = self.operands(op)
        for value in op.outputs:
            self._sources[value] = sources
            if len(sources) == 1:
                self._link(value, sources[0])

    def contract(self, join: Value, fork: Value) -> None:
        """Let `join` lead back to `fork` only."""
        self.forks[join] = fork
        self._sources[join] = (fork,)
        self._link(join, fork)

    def operands(self, op: Op) -> tuple[Value, ...]:
        """What the operation reads of streams: weights, literals and other constants that start none are left out."""
        only = _STREAM_OPERAND.get(op.kind)
        found: dict[Value, None] = {}
        for value in op.inputs if only is None else op.inputs[only : only + 1]:
            if value is None:
                continue
            if value.role is Role.RESULT or value.role is Role.INPUT or value in self.streams:
                found[value] = None
        return tuple(found)

    def sources(self, value: Value) -> tuple[Value, ...]:
        """The values that lead to `value` in one step."""
        return self._sources.get(value, ())

    def meet(self, left: Value, right: Iterable[Value]) -> Value | None:
        """The nearest value that both `left` and one of `right` come from; None when there is none."""
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
        while waiting[0] and waiting[1]:
            _, _, value = heappop(heap)
            colour = colours[value]
            if colour == 3:
                return value
            waiting[colour - 1] -= 1
            sources = self._sources.get(value, ())
            if len(heap) == 1 and colours[heap[0][2]] == 3 - colour:
                # One way each: where both are chains, meet without looking at every link of them.
                other = heap[0][2]
                met = self._common(value, other)
                if met is not None:
                    return met
                # They part where one of the chains ends; the other goes no further back than that.
                bound = max(order(self._end(value)), order(self._end(other)))
                if order(other) > bound:
                    heap.clear()
                    other = self._climb(other, bound)
                    colours[other] = 3 - colour
                    heappush(heap, (-order(other), count, other))
                    count += 1
                if order(value) > bound:
                    sources = (self._climb(value, bound),)
            elif len(sources) == 1:
                sources = (self._climb(value, -heap[0][0]),)
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

    def comes_from(self, fork: Value, top: Value) -> bool:
        """Whether there is a way from `fork` to `top`."""
        return self.meet(top, (fork,)) is fork

    def _link(self, value: Value, parent: Value) -> None:
        depth, jump = self._depth, self._jump
        level = depth.get(parent, 0)
        depth[value] = level + 1
        jump[value] = parent
        if level:
            first = jump[parent]
            middle = depth.get(first, 0)
            if middle and level - middle == middle - depth.get(jump[first], 0):
                jump[value] = jump[first]

    def _end(self, value: Value) -> Value:
        """Where the chain that the value is on begins: a leaf, or a value that several lead to."""
        jumps = self._jump
        while (far := jumps.get(value)) is not None:
            value = far
        return value

    def _common(self, left: Value, right: Value) -> Value | None:
        """The nearest value on the chains of both, None when they are on different ones."""
        depth, jumps, sources = self._depth, self._jump, self._sources
        while (gap := depth.get(left, 0) - depth.get(right, 0)) != 0:
            if gap < 0:
                left, right = right, left
            far = jumps[left]
            left = far if depth.get(far, 0) >= depth.get(right, 0) else sources[left][0]
        while left is not right:
            if depth.get(left, 0) == 0:
                return None
            apart = jumps[left] is not jumps[right]
            left, right = (jumps[left], jumps[right]) if apart else (sources[left][0], sources[right][0])
        return left

    def _climb(self, value: Value, bound: int) -> Value:
        """The first value up the chain whose order is at most `bound`, or the chain's end."""
        sources, jumps = self._sources, self._jump
        while True:
            up = sources.get(value, ())
            if len(up) != 1:
                return value
            far = jumps[value]
            if order(far) > bound:
                value = far
                continue
            value = up[0]
            if order(value) <= bound:
                return value


def _constant_streams(graph: Graph) -> set[Value]:
    """Constant leaves that a stream may start from: read in several places, by a join among them.

    A class token, a decoder's queries; not a weight that two layers share.
    """
    return {
        value
        for value in graph.values
        if value.role in (Role.PARAMETER, Role.CONSTANT)
        and len(value.uses) > 1
        and any(op.kind is OpKind.ADD for op, _ in value.uses)
        and value.rank != 0
    }
