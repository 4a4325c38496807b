"""Affine maps as a plan knows them: their shape, and the program that computes their numbers when the plan is applied.

A map reads tap j of its kernel at position stride·p − pads + dilation·j of what it reads, along each spatial dimension;
beyond the border there are zeros.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from rescompile.graph import Dim, Value


@dataclass(frozen=True, slots=True)
class Map:
    """One map of a program. `step`: its index; `shifted`: whether it may have a bias; `works`: whether a contraction
    with weights is in it."""

    step: int
    inputs: int
    outputs: int
    groups: int
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    begin: tuple[int, ...]
    end: tuple[int, ...]
    dilation: tuple[int, ...]
    shifted: bool = False
    works: bool = False

    @property
    def pointwise(self) -> bool:
        """Whether it reads one position, a border apart."""
        return all(extent == 1 for extent in self.kernel)

    @property
    def bordered(self) -> bool:
        """Whether it reads zeros beyond the border."""
        return any(self.begin) or any(self.end)

    @property
    def strided(self) -> bool:
        """Whether it leaves positions out."""
        return any(step != 1 for step in self.stride)

    @property
    def margins(self) -> tuple[int, ...]:
        """t of each dimension: an extent S becomes ⌊(S + t)/stride⌋ + 1."""
        axes = zip(self.begin, self.end, self.kernel, self.dilation, strict=True)
        return tuple(begin + end - (size - 1) * apart - 1 for begin, end, size, apart in axes)

    def weights(self) -> int:
        """How many elements its weight has."""
        return self.outputs * (self.inputs // self.groups) * math.prod(self.kernel)


class Program:
    """Steps of `rescompile.affine` under construction, and the operands that they read."""

    def __init__(self, spatial: int) -> None:
        self.spatial = spatial
        self.steps: list[dict[str, Any]] = []
        self.operands: list[Value] = []

    def add(self, do: str, of: Sequence[Map] = (), data: Sequence[Value | None] = (), **settings: Any) -> int:
        """A step; its index."""
        for value in data:
            if value is not None and value not in self.operands:
                self.operands.append(value)
        reads = [None if value is None else self.operands.index(value) for value in data]
        self.steps.append({"do": do, "of": [map_.step for map_ in of], "with": reads, **settings})
        return len(self.steps) - 1

    def input(self, channels: int) -> Map:
        """y = x"""
        ones, zeros = (1,) * self.spatial, (0,) * self.spatial
        step = self.add("input", channels=channels, spatial=self.spatial)
        return Map(step, channels, channels, channels, ones, ones, zeros, zeros, ones)

    def upto(self, last: Map) -> list[dict[str, Any]]:
        """The program whose result is `last`."""
        return self.steps[: last.step + 1]

    def adds_input(self) -> bool:
        """Whether a sum has x itself as a term."""

        def plain(index: int) -> bool:
            step = self.steps[index]
            return step["do"] == "input" or (step["do"] == "place" and plain(step["of"][0]))

        return any(step["do"] == "sum" and any(plain(index) for index in step["of"]) for step in self.steps)

    def placed(self, map_: Map, like: Map) -> Map:
        """The same map with the kernel, border and dilation of `like`, which reads all positions that it reads."""
        if (map_.kernel, map_.begin, map_.dilation) == (like.kernel, like.begin, like.dilation):
            return replace(map_, end=like.end)
        offset = [(more - own) // apart for more, own, apart in zip(like.begin, map_.begin, like.dilation, strict=True)]
        spread = [own // apart for own, apart in zip(map_.dilation, like.dilation, strict=True)]
        spread = [1 if size == 1 else step for size, step in zip(map_.kernel, spread, strict=True)]
        step = self.add("place", [map_], kernel=list(like.kernel), offset=offset, dilation=spread)
        return replace(map_, step=step, kernel=like.kernel, begin=like.begin, end=like.end, dilation=like.dilation)

    def sum(self, maps: Sequence[Map], factors: Sequence[float], extents: Sequence[Dim | None]) -> Map | str:
        """Σ factorᵢ·mapᵢ, of one input with those extents; text where no one map is it."""
        frame = common_frame(maps, extents)
        if isinstance(frame, str):
            return frame
        placed = [self.placed(map_, frame) for map_ in maps]
        groups = math.gcd(*(map_.groups for map_ in maps))
        shifted, works = any(map_.shifted for map_ in maps), any(map_.works for map_ in maps)
        step = self.add("sum", placed, factors=list(factors))
        return replace(frame, step=step, groups=groups, shifted=shifted, works=works)


def common_frame(maps: Sequence[Map], extents: Sequence[Dim | None]) -> Map | str:
    """A kernel with border and dilation that holds the taps of all `maps`; text where there is none."""
    strides = sorted({map_.stride for map_ in maps})
    if len(strides) > 1:
        return f"the strides differ: {list(strides[0])} and {list(strides[1])}"
    kernel, begin, end, dilation = [], [], [], []
    for axis, extent in enumerate(extents):
        stride = maps[0].stride[axis]
        margins = {map_.margins[axis] for map_ in maps}
        margin = max(margins)
        if len(margins) > 1:
            if not isinstance(extent, int):
                return "the positions that they make out of an extent that is not known may differ"
            if len({(extent + own) // stride for own in margins}) > 1:
                return "they make different numbers of positions"
        first = min(-map_.begin[axis] for map_ in maps)
        last = max((map_.kernel[axis] - 1) * map_.dilation[axis] - map_.begin[axis] for map_ in maps)
        gaps = [map_.dilation[axis] for map_ in maps if map_.kernel[axis] > 1]
        apart = math.gcd(*gaps, *(-map_.begin[axis] - first for map_ in maps)) or 1
        kernel.append((last - first) // apart + 1)
        begin.append(-first)
        end.append(margin + last + 1)
        dilation.append(apart)
    frame = [tuple(values) for values in (kernel, begin, end, dilation)]
    return replace(maps[0], kernel=frame[0], begin=frame[1], end=frame[2], dilation=frame[3])


def composed(first: Map, second: Map) -> Map | str:
    """second(first(x)), but for its step; text where no one kernel is it."""
    groups = math.gcd(first.groups, second.groups)
    shape: dict[str, Any] = {"outputs": second.outputs, "groups": groups, "works": first.works or second.works}
    shape["shifted"] = first.shifted or second.shifted
    if second.pointwise and not second.bordered:
        stride = tuple(a * b for a, b in zip(first.stride, second.stride, strict=True))
        return replace(first, stride=stride, **shape)
    if first.pointwise and not first.strided:
        if first.shifted and second.bordered:
            return "a shift before a convolution with a border of zeros, which it does not reach"
        begin = tuple(a + b for a, b in zip(first.begin, second.begin, strict=True))
        end = tuple(a + b for a, b in zip(first.end, second.end, strict=True))
        shape |= {"kernel": second.kernel, "stride": second.stride, "dilation": second.dilation}
        return replace(first, begin=begin, end=end, **shape)
    return "two kernels of more than one element in a row"
