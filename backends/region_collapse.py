"""Fewer and longer loops: neighbouring axes of a region that every value runs through alike are one axis."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, TypeVar

from rescompile.backends.kernels import Place, Program, RegionSpec, RowsSpec
from rescompile.backends.kernels.row_region import GROUPED, ROW_NORMS
from rescompile.fused_region import Region, Step
from rescompile.kinds import OpKind

K = OpKind
_FIXED = frozenset((K.RESHAPE, K.PERMUTE, K.SLICE, K.ROLL, K.FLIP, K.PAD, K.CONCAT, K.BATCH_NORM))
S = TypeVar("S", RegionSpec, RowsSpec)


def collapsed(spec: S, program: Program, channels_last: bool) -> S:
    """The spec over as few axes as its places allow; itself where a step counts axes."""
    region = program.region
    if any(step.kind in _FIXED for step in region.steps) or any(
        any(place.border) or place.shared for place in program.results
    ):
        return spec
    rank = len(program.shape(spec.anchor))
    cuts = _cuts(spec, rank)
    numbers = range(region.operands + len(region.steps))
    if any(len(program.shape(number)) > rank for number in numbers):
        return spec
    whole = program.shape(spec.anchor)
    if any(program.shape(made) != whole for made in region.outputs):
        return spec
    channelwise = {v for step in region.steps if step.kind in GROUPED for v in step.inputs[1:]}
    if any(v in channelwise for step in region.steps for v in step.inputs[:1]):
        return spec
    read = [(n, place) for n, place in enumerate(program.operands) if n not in channelwise]
    places: dict[int, Any] = {n: _padded(place, rank) for n, place in read if place is not None}
    results: list[Any] = [_padded(place, rank) for place in program.results]
    kept: list[int] = [0]
    for axis in range(1, rank):
        join = axis not in cuts and all(_joins(p, axis, whole) for p in [*places.values(), *results])
        if not join:
            kept.append(axis)
    if len(kept) == rank:
        return spec
    groups = [list(range(first, last)) for first, last in zip(kept, [*kept[1:], rank], strict=True)]
    steps = []
    for step in region.steps:
        attrs: dict[str, Any] = dict(step.attrs)
        if step.kind in ROW_NORMS - GROUPED:
            attrs["axis"] = next(i for i, group in enumerate(groups) if group[0] == int(attrs.get("axis", -1)) % rank)
        steps.append(Step(step.kind, step.inputs, attrs))
    made = Program(
        Region(region.operands, tuple(steps), region.outputs).text(),
        tuple(_grouped(places[n], groups) if n in places else place for n, place in enumerate(program.operands)),
        tuple(_grouped(place, groups) for place in results),
        tuple((_shape(shape, groups, rank), dtype) for shape, dtype in program.types),
    )
    last = channels_last and len(groups) > 2
    return replace(spec, program=made, channels_last=last)


def _cuts(spec: RegionSpec | RowsSpec, rank: int) -> set[int]:
    """Axes that begin something of their own."""
    if isinstance(spec, RegionSpec):
        return set()
    return {1, 2} if spec.grouped else {spec.axis}


def _padded(place: Place, rank: int) -> Place:
    missing = rank - len(place.shape)
    return replace(place, shape=(1,) * missing + place.shape, strides=(0,) * missing + place.strides)


def _joins(place: Place, axis: int, whole: Sequence[int | None]) -> bool:
    """Whether the axis continues the one before it."""
    one, two = place.shape[axis - 1], place.shape[axis]
    if whole[axis - 1] == 1 or whole[axis] == 1:
        return True
    if one == 1 and two == 1:
        return True
    full = one == whole[axis - 1] and two == whole[axis]
    return full and place.strides[axis - 1] == place.strides[axis] * int(two or 0)


def _grouped(place: Place, groups: Sequence[Sequence[int]]) -> Place:
    shape = _shape(place.shape, groups, len(place.shape))
    strides = []
    for group in groups:
        steps = [place.strides[axis] for axis in group if place.shape[axis] != 1]
        strides.append(steps[-1] if steps else 0)
    return replace(place, shape=shape, strides=tuple(strides))


def _shape(shape: Sequence[int | None], groups: Sequence[Sequence[int]], rank: int) -> tuple[int, ...]:
    padded = (1,) * (rank - len(shape)) + tuple(int(extent or 0) for extent in shape)
    result = []
    for group in groups:
        total = 1
        for axis in group:
            total *= padded[axis]
        result.append(total)
    return tuple(result)
