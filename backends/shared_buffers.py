"""Shared buffers while a program is emitted: what holds each of them now, and where values lie in it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

from rescompile.backends.dense_buffers import Shared, Slot
from rescompile.backends.kernels import Place
from rescompile.backends.layouts import CHANNELS_LAST, NATIVE, Layout, Pair
from rescompile.graph import Value


class SharedBuffers:
    """`held`: the expression that holds a buffer, once something is written into it."""

    def __init__(self, shared: Shared, borders: Mapping[Value, Pair]) -> None:
        self.shared = shared
        self.held: dict[int | None, Any] = {}
        self._filled: set[tuple[int, int]] = set()
        self._borders: dict[int, Pair] = {}
        for value, slot in shared.slots.items():
            have, want = self._borders.get(slot.buffer, (0, 0)), borders.get(value, (0, 0))
            self._borders[slot.buffer] = (max(have[0], want[0]), max(have[1], want[1]))

    def holds(self, value: Value) -> bool:
        """Whether the value lies in a shared buffer that is there already."""
        slot = self.shared.slots.get(value)
        return slot is not None and slot.buffer in self.held

    def number(self, value: Value) -> int | None:
        """The buffer that the value is written into."""
        slot = self.shared.slots.get(value)
        return None if slot is None else slot.buffer

    def whole(self, value: Value) -> bool:
        """Whether the value is all of its buffer."""
        slot = self.shared.slots[value]
        buffer = self.shared.buffers[slot.buffer]
        return slot.extent == buffer.shape[buffer.axis]

    def axis(self, value: Value) -> int:
        """The axis along which its buffer is divided."""
        return self.shared.buffers[self.shared.slots[value].buffer].axis

    def layout_of(self, number: int) -> Layout:
        """How a buffer lies."""
        buffer = self.shared.buffers[number]
        if not buffer.channels_last:
            return NATIVE
        border = self._borders[number] if len(buffer.shape) in (3, 4) else (0, 0)
        return CHANNELS_LAST if border == (0, 0) else Layout(channels_last=True, border=border)

    def layout(self, value: Value) -> Layout:
        """How the value's buffer lies."""
        return self.layout_of(self.shared.slots[value].buffer)

    def place(self, value: Value) -> Place:
        """Where the value lies."""
        slot = self.shared.slots[value]
        return self.place_at(slot.buffer, [int(extent) for extent in value.shape or ()], slot.start)

    def place_at(self, number: int, shape: Sequence[int], start: int) -> Place:
        """Where a part of that shape lies in a buffer."""
        buffer = self.shared.buffers[number]
        if buffer.channels_last:
            border = self.layout_of(number).border
            return Place.channels_last(shape, buffer.dtype, border, buffer.shape[buffer.axis], start)
        strides = tuple(prod(buffer.shape[axis + 1 :]) for axis in range(len(buffer.shape)))
        first = start * strides[buffer.axis]
        return Place(tuple(shape), buffer.dtype, strides, buffer.shape, first, shared=True)

    def missing(self, slot: Slot) -> list[tuple[Value, int]]:
        """What is to be copied into a run of a buffer before it is read; each is told once."""
        found = []
        for value, start in self.shared.copies.get(slot.buffer, ()):
            inside = slot.start <= start < slot.start + slot.extent
            if inside and (slot.buffer, start) not in self._filled:
                self._filled.add((slot.buffer, start))
                found.append((value, start))
        return found
