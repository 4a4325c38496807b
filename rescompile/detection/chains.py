"""Chains of values with one way back each, and how to pass a chain of n in O(log n).

A stack of blocks, each contracted to an identity, is such a chain. Each link has a pointer further back besides the one
to its parent (Myers 1983, "An applicative random-access stack"); the pointers depend on depth alone, so two chains can
be followed in step to where they meet.
"""

from __future__ import annotations

from collections.abc import Mapping

from rescompile.graph import Value


def order(value: Value) -> int:
    """Position of the operation that produces the value; −1 for inputs, parameters and literals."""
    return -1 if value.producer is None else value.producer.order


def age(operand: tuple[int, Value]) -> int:
    """The order of an operand, given with its place."""
    producer = operand[1].producer
    return -1 if producer is None else producer.order


class Chains:
    """A forest over values: links go back, and orders fall along them.

    `sources`: the ways back from each value; a value with one is a link. Links get their pointers when a search first
    comes to them, and then keep them: what lies behind a value must not change any more.
    """

    def __init__(self, sources: Mapping[Value, tuple[Value, ...]]) -> None:
        self._sources = sources
        self._parent: dict[Value, Value] = {}
        self._depth: dict[Value, int] = {}  # links to the chain's end, where there are any
        self._jump: dict[Value, Value] = {}

    def _reach(self, value: Value) -> None:
        """Link the value, and all behind it that is not linked yet."""
        ahead: list[tuple[Value, Value]] = []
        while value not in self._parent:
            sources = self._sources.get(value, ())
            if len(sources) != 1:
                break
            ahead.append((value, sources[0]))
            value = sources[0]
        for link, parent in reversed(ahead):
            self._link(link, parent)

    def _link(self, value: Value, parent: Value) -> None:
        depth, jump = self._depth, self._jump
        level = depth.get(parent, 0)
        self._parent[value] = jump[value] = parent
        depth[value] = level + 1
        if level:
            far = jump[parent]
            middle = depth.get(far, 0)
            if middle and level - middle == middle - depth.get(jump[far], 0):
                jump[value] = jump[far]

    def end(self, value: Value) -> Value:
        """Where the value's chain begins: a leaf, or a value with several ways back."""
        self._reach(value)
        jump = self._jump
        while (far := jump.get(value)) is not None:
            value = far
        return value

    def climb(self, value: Value, bound: int) -> Value:
        """The first value behind this one whose order is at most `bound`, or the chain's end."""
        self._reach(value)
        parent, jump = self._parent, self._jump
        while value in parent:
            far = jump[value]
            if order(far) > bound:
                value = far
                continue
            value = parent[value]
            if order(value) <= bound:
                break
        return value

    def common(self, left: Value, right: Value) -> Value | None:
        """The nearest value that both chains hold; None when they end apart."""
        self._reach(left)
        self._reach(right)
        depth, jump, parent = self._depth, self._jump, self._parent
        while (gap := depth.get(left, 0) - depth.get(right, 0)) != 0:
            if gap < 0:
                left, right = right, left
            far = jump[left]
            left = far if depth.get(far, 0) >= depth.get(right, 0) else parent[left]
        while left is not right:
            if left not in parent:
                return None
            apart = jump[left] is not jump[right]
            left, right = (jump[left], jump[right]) if apart else (parent[left], parent[right])
        return left
