"""Readers of what moves elements: views, slices, joins, look-ups."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import onnx_ir as ir

from rescompile.graph import Shape, ValueType
from rescompile.kinds import OpKind as K
from rescompile.onnx_ops import (
    INT64_MAX,
    PAD_MODES,
    Reading,
    Step,
    is_static,
)
from rescompile.onnx_shapes import name_extents
from rescompile.onnx_site import STATIC_ONLY, Reader, Site, shortest
from rescompile.result_types import broadcast, product, reshaped, sliced
from rescompile.values import PartialShape


def _reshape(s: Site) -> Reading:
    """Reshape, Flatten, Squeeze, Unsqueeze: the target is the output's shape."""
    if s.has(1) and s.vector(1) is None:
        return STATIC_ONLY.format("target")
    step = s.one(K.RESHAPE, s.inputs(1))
    shape = s.shape(0)
    if shape is not None:
        step.extents = _reshaped(s, shape)
    return step


def _reshaped(s: Site, shape: Shape) -> PartialShape | None:
    target, op_type = s.vector(1), s.node.op_type
    if op_type == "Reshape":
        return None if target is None else reshaped(shape, target, zeros=bool(s.attr("allowzero", 0)))
    if op_type == "Flatten":
        axis = s.attr("axis", 1)
        return tuple(product(part) for part in (shape[:axis], shape[axis:]))
    axes = s.integers(1) if s.opset >= 13 else s.attr("axes")
    if axes is None:
        return None
    if op_type == "Squeeze":
        gone = {axis % len(shape) for axis in axes}
        return tuple(extent for axis, extent in enumerate(shape) if axis not in gone)
    rank = len(shape) + len(axes)
    added = {axis % rank for axis in axes}
    rest = iter(shape)
    return tuple(1 if axis in added else next(rest) for axis in range(rank))


def _expand(s: Site) -> Reading:
    target, shape = s.vector(1), s.shape(0)
    if target is None:
        return STATIC_ONLY.format("target")
    wide = None if shape is None else broadcast((shape, target))
    step = s.one(K.IDENTITY if wide is not None and wide == shape else K.EXPAND, s.inputs(1))
    step.extents = wide
    return step


def _transpose(s: Site) -> Reading:
    perm = s.attr("perm")
    rank = s.rank()
    if perm is None and rank is None:
        return "its rank is unknown"
    return s.one(K.PERMUTE, s.inputs(1), perm=tuple(perm) if perm is not None else tuple(reversed(range(rank or 0))))


def _slice(s: Site) -> Reading:
    """Slice 1 has attributes, Slice 10 inputs."""
    shape = s.shape(0)
    starts: PartialShape | None
    stops: PartialShape | None
    axes: Sequence[int] | None
    steps: Sequence[int] | None
    if s.opset < 10:
        if s.attr("starts") is None or s.attr("ends") is None:
            return f"it has no starts and ends among its attributes, as opset {s.opset} has them"
        starts, stops, axes, steps = tuple(s.attr("starts")), tuple(s.attr("ends")), s.attr("axes"), None
    else:
        starts, stops = s.vector(1), s.vector(2)
        axes, steps = s.integers(3), s.integers(4)
        if starts is None or stops is None or (s.has(3) and axes is None) or (s.has(4) and steps is None):
            return STATIC_ONLY.format("range")
    if shape is None:
        return "its rank is unknown"
    axes = tuple(range(len(starts))) if axes is None else tuple(axis % len(shape) for axis in axes)
    steps = (1,) * len(axes) if steps is None else tuple(steps)
    flipped = all(
        step == -1
        and isinstance(stop, int)
        and isinstance(shape[axis], (int, str))
        and _flips(start, stop, shape[axis])
        for axis, step, start, stop in zip(axes, steps, starts, stops, strict=True)
    )
    if flipped:
        return s.one(K.FLIP, s.inputs(1), axes=tuple(axes))
    ranges = [_bounds(*item, shape) for item in zip(starts, stops, steps, axes, strict=True)]
    if any(bound is None for pair in ranges for bound in pair):
        return "the sign of its range is unknown"
    return s.one(
        K.SLICE,
        s.inputs(1),
        axes=axes,
        starts=tuple(start for start, _ in ranges),
        stops=tuple(stop for _, stop in ranges),
        steps=steps,
    )


def _flips(start: Any, stop: int, extent: Any) -> bool:
    last = start == -1 or (isinstance(extent, int) and isinstance(start, int) and start >= extent - 1)
    return last and (stop < -INT64_MAX // 2 or (isinstance(extent, int) and stop < -extent))


def _bounds(start: Any, stop: Any, step: int, axis: int, shape: Shape) -> tuple[Any, Any]:
    """Non-negative, clamped to the extent where that is known; a symbolic bound stays a name."""
    extent = shape[axis]
    if step < 0:
        return start, stop
    if isinstance(extent, int):
        bounds = [value if isinstance(value, int) else None for value in (start, stop)]
        clamped = [None if value is None else min(max(value + extent * (value < 0), 0), extent) for value in bounds]
        return (start if clamped[0] is None else clamped[0]), (stop if clamped[1] is None else clamped[1])
    if isinstance(stop, int) and stop > INT64_MAX // 2:
        stop = extent
    return start, stop


def _split(s: Site) -> Reading:
    """Split 2 and 11 take sizes as an attribute, 13 as an input, 18 num_outputs too."""
    shape, axis, count = s.shape(0), s.axis(0), len(s.node.outputs)
    sizes: Sequence[int] | None = s.attr("split") if s.opset < 13 else s.integers(1)
    if axis is None or axis < 0:
        return "its rank is unknown"
    if sizes is None:
        if s.opset >= 13 and s.has(1):
            return STATIC_ONLY.format("split")
        extent = shape[axis] if shape is not None else None
        if not isinstance(extent, int):
            return "it splits an extent that is unknown"
        part = -(-extent // count)
        sizes = [part] * (count - 1) + [extent - part * (count - 1)]
    return Step(K.SPLIT, s.inputs(1), {"axis": axis, "sizes": tuple(sizes)}, tuple(range(count)))


def _pad(s: Site) -> Reading:
    """Pad 2 has attributes, Pad 11 inputs, Pad 18 axes."""
    mode = PAD_MODES[s.attr("mode", "constant")]
    value: float | None = 0.0
    if s.opset < 11:
        pads, value = s.attr("pads"), s.attr("value", 0.0)
    else:
        pads = s.integers(1)
        if s.has(2):
            value = s.number(2)
    rank = s.rank()
    if pads is None or value is None:
        return STATIC_ONLY.format("padding")
    if s.has(3):
        axes = s.integers(3)
        if axes is None or rank is None:
            return STATIC_ONLY.format("padding")
        full = [0] * (2 * rank)
        for i, axis in enumerate(axes):
            full[axis % rank], full[axis % rank + rank] = pads[i], pads[i + len(axes)]
        pads = full
    return s.one(K.PAD, s.inputs(1), pads=tuple(pads), mode=mode, value=shortest(value))


def _tile(s: Site) -> Reading:
    repeats = s.integers(1)
    return STATIC_ONLY.format("repeats") if repeats is None else s.one(K.TILE, s.inputs(1), repeats=repeats)


def _concat(s: Site) -> Reading:
    axis = s.axis()
    return "its rank is unknown" if axis is None or axis < 0 else s.one(K.CONCAT, list(s.node.inputs), axis=axis)


def _blocks(s: Site, *, to_space: bool) -> Reading:
    """DepthToSpace (DCR, CRD) and SpaceToDepth: reshape, permute, reshape."""
    shape, size, dtype = s.shape(0), s.attr("blocksize"), s.dtype()
    if shape is None or len(shape) != 4 or not is_static(shape[1:]):
        return "its extents are unknown"
    n, c, h, w = shape[0], *(int(extent) for extent in shape[1:])
    if to_space:
        depth = c // size**2
        crd = s.attr("mode", "DCR") == "CRD"
        split: Shape = (n, depth, size, size, h, w) if crd else (n, size, size, depth, h, w)
        perm = (0, 1, 4, 2, 5, 3) if crd else (0, 3, 4, 1, 5, 2)
    else:
        split, perm = (n, c, h // size, size, w // size, size), (0, 3, 5, 1, 2, 4)
    inner = Step(K.RESHAPE, s.inputs(1), type=ValueType(split, dtype))
    moved = Step(K.PERMUTE, [inner], {"perm": perm}, type=ValueType(tuple(split[i] for i in perm), dtype))
    return [inner, moved, s.one(K.RESHAPE, [moved])]


def _gather(s: Site) -> Reading:
    """Rows of a weight matrix are an embedding; one constant index is a slice."""
    axis, index = s.axis(0), s.array(1)
    shape = s.shape(0)
    if axis is None or axis < 0:
        return "its rank is unknown"
    if index is not None and index.size == 1 and index.ndim < 2 and shape is not None and not s.constant(0):
        start = int(index.reshape(-1)[0])
        extent = shape[axis]
        if start >= 0 or isinstance(extent, int):
            start += extent if start < 0 and isinstance(extent, int) else 0
            attrs = {"axes": (axis,), "starts": (start,), "stops": (start + 1,), "steps": (1,)}
            if index.ndim == 1:
                return Step(K.SLICE, s.inputs(1), attrs, (0,))
            kept = tuple(1 if i == axis else extent for i, extent in enumerate(shape))
            inner = Step(K.SLICE, s.inputs(1), attrs, type=ValueType(kept, s.dtype()))
            return [inner, s.one(K.RESHAPE, [inner])]
    if axis == 0 and s.constant(0) and s.rank() == 2 and not s.constant(1) and index is None:
        return s.one(K.EMBEDDING, s.inputs(2))
    return s.one(K.GATHER, s.inputs(2), axis=axis)


def _gather_nd(s: Site) -> Reading:
    """Indices of one coordinate pick rows."""
    shape = s.shape(1)
    if s.attr("batch_dims", 0) or shape is None or shape[-1] != 1:
        return "its indices have several coordinates"
    rows = Step(K.RESHAPE, [s.input(1)], type=ValueType(shape[:-1], s.dtype(1)))
    return [rows, s.one(K.GATHER, [s.input(0), rows], axis=0)]


def sequence_parts(split: Site) -> tuple[int, tuple[int, ...]] | None:
    """Axis and sizes of the parts of a SplitToSequence, None when they are not known."""
    shape, axis, sizes = split.shape(0), split.axis(0), split.integers(1)
    extent = shape[axis] if shape is not None and axis is not None and axis >= 0 else None
    if axis is None or not isinstance(extent, int) or (split.has(1) and sizes is None):
        return None
    if sizes is None or (len(sizes) == 1 and split.rank(1) == 0):
        size = 1 if sizes is None else sizes[0]
        sizes = (*[size] * (extent // size), *([extent % size] if extent % size else []))
    return axis, sizes


def read_split(split: Site) -> tuple[Step, list[ir.Node]] | None:
    """A SplitToSequence of which every part is taken once, as one split; and the nodes that take the parts."""
    parts = sequence_parts(split)
    if parts is None or not (split.has(1) or split.attr("keepdims", 1)):
        return None
    axis, sizes = parts
    taken: dict[int, ir.Node] = {}
    for reader, _ in split.node.outputs[0].uses():
        index = split.facts.array(reader.inputs[1]) if reader.op_type == "SequenceAt" else None
        if index is None:
            return None
        taken[int(index) % len(sizes)] = reader
    if len(taken) < len(sizes) or len(split.node.outputs[0].uses()) > len(sizes):
        return None
    step = Step(K.SPLIT, split.inputs(1), {"axis": axis, "sizes": sizes}, tuple(range(len(sizes))))
    return step, [taken[index] for index in range(len(sizes))]


def _sequence_at(s: Site) -> Reading:
    """One part of a SplitToSequence is a slice."""
    sequence, index = s.input(0), s.number(1)
    split = sequence.producer() if sequence is not None else None
    if split is None or split.op_type != "SplitToSequence" or index is None or split.inputs[0] is None:
        return "its sequence is not a split"
    source = Site(split, s.opset, s.facts, s.constants)
    shape, parts = source.shape(0), sequence_parts(source)
    if parts is None:
        return STATIC_ONLY.format("split")
    axis, sizes = parts
    start = sum(sizes[: int(index) % len(sizes)])
    attrs = {"axes": (axis,), "starts": (start,), "stops": (start + sizes[int(index) % len(sizes)],), "steps": (1,)}
    if source.has(1) or source.attr("keepdims", 1):
        return Step(K.SLICE, [split.inputs[0]], attrs, (0,))
    kept = ValueType(name_extents(sliced(shape or (), attrs), "part"), source.dtype())
    inner = Step(K.SLICE, [split.inputs[0]], attrs, type=kept)
    return [inner, s.one(K.RESHAPE, [inner])]


def _scatter(s: Site) -> Reading:
    extras = {name: attribute.value for name, attribute in s.node.attributes.items()}
    return s.one(K.SCATTER, list(s.node.inputs), op=s.node.op_type, **extras)


MOVES_READERS: dict[str, Reader] = {
    "Reshape": _reshape,
    "Flatten": _reshape,
    "Squeeze": _reshape,
    "Unsqueeze": _reshape,
    "Expand": _expand,
    "Transpose": _transpose,
    "Slice": _slice,
    "Split": _split,
    "Pad": _pad,
    "Tile": _tile,
    "Concat": _concat,
    "DepthToSpace": lambda s: _blocks(s, to_space=True),
    "SpaceToDepth": lambda s: _blocks(s, to_space=False),
    "Gather": _gather,
    "GatherND": _gather_nd,
    "SequenceAt": _sequence_at,
    "ScatterElements": _scatter,
    "ScatterND": _scatter,
    "Scatter": _scatter,
}
