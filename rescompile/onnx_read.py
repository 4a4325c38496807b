"""From ONNX nodes to kinds: one reader for each operator that is more than its inputs.

A reader answers with the logical operations that the node is, or with the reason why it has no kind; defaults and
opset changes are resolved here, so that nobody else has to know them. Operator versions are named where they matter.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from rescompile.graph import Shape, ValueType
from rescompile.kinds import OpKind as K
from rescompile.onnx_extents import broadcast, reshaped, sliced
from rescompile.onnx_ops import (
    INT64_MAX,
    PAD_MODES,
    PLAIN,
    REDUCTIONS,
    PartialShape,
    Reading,
    Step,
    dtype_name,
    is_static,
)
from rescompile.onnx_shapes import Facts, name_extents

STATIC_ONLY = "its {} is computed at run time"


class Site:
    """A node being read, with what is known around it."""

    __slots__ = ("constants", "facts", "node", "opset")

    def __init__(self, node: ir.Node, opset: int, facts: Facts, constants: set[ir.Value]) -> None:
        self.node = node
        self.opset = opset
        self.facts = facts
        self.constants = constants  # values that do not depend on the graph's inputs

    def input(self, index: int) -> ir.Value | None:
        """An input, None when absent."""
        return self.node.inputs[index] if index < len(self.node.inputs) else None

    def inputs(self, count: int) -> list[ir.Value | None]:
        """The first `count` inputs, None where absent."""
        return [self.input(index) for index in range(count)]

    def has(self, index: int) -> bool:
        """Whether the input is present."""
        return self.input(index) is not None

    def attr(self, name: str, default: Any = None) -> Any:
        """An attribute, floats in their shortest spelling (ONNX stores 1e-5 as 9.99999974e-06)."""
        attribute = self.node.attributes.get(name)
        if attribute is None:
            return default
        value = attribute.value
        return shortest(value) if isinstance(value, float) else value

    def shape(self, index: int) -> Shape | None:
        """Shape of an input."""
        value = self.input(index)
        return None if value is None else self.facts.type(value).shape

    def rank(self, index: int = 0) -> int | None:
        """Rank of an input."""
        shape = self.shape(index)
        return None if shape is None else len(shape)

    def dtype(self, index: int = 0) -> str | None:
        """Dtype of an input."""
        value = self.input(index)
        return None if value is None else self.facts.type(value).dtype

    def out_shape(self, index: int = 0) -> PartialShape | None:
        """Shape of an output, extents unknown to onnx as None."""
        return self.facts.partial_type(self.node.outputs[index])[0]

    def array(self, index: int) -> np.ndarray[Any, Any] | None:
        """Contents of a small constant input."""
        return self.facts.array(self.input(index))

    def number(self, index: int) -> float | None:
        """Contents of a constant input of one element."""
        array = self.array(index)
        return float(array.reshape(-1)[0]) if array is not None and array.size == 1 else None

    def integers(self, index: int) -> tuple[int, ...] | None:
        """Contents of an input of known integers."""
        return self.facts.integers(self.input(index))

    def vector(self, index: int) -> PartialShape | None:
        """Contents of an input of integers and extents."""
        return self.facts.vector(self.input(index))

    def constant(self, index: int) -> bool:
        """Whether an input does not depend on the graph's inputs."""
        return self.input(index) in self.constants

    def used(self, index: int) -> bool:
        """Whether anything reads that output."""
        outputs = self.node.outputs
        return index < len(outputs) and (bool(outputs[index].uses()) or outputs[index].is_graph_output())

    def axis(self, default: int | None = None, name: str = "axis") -> int | None:
        """The axis attribute, non-negative where the rank is known."""
        axis = self.attr(name, default)
        rank = self.rank()
        return axis + rank if axis is not None and axis < 0 and rank is not None else axis

    def one(self, kind: K, inputs: Sequence[Any], **attrs: Any) -> Step:
        """The one operation that the node's first output is."""
        return Step(kind, inputs, attrs, (0,))


def shortest(value: float) -> float:
    """The shortest decimal that is the same float32."""
    return float(str(np.float32(value)))


Reader = Callable[[Site], Reading]


def _plain(kind: K) -> Reader:
    return lambda s: s.one(kind, list(s.node.inputs))


# ---- arithmetic ------------------------------------------------------------------------------------------------------


def _sum(s: Site) -> Reading:
    if len(s.node.inputs) == 1:
        return s.one(K.IDENTITY, s.node.inputs)
    return s.one(K.ADD, list(s.node.inputs))


def _sub(s: Site) -> Reading:
    return s.one(K.ADD, s.inputs(2), scales=(1.0, -1.0))


def _mean(s: Site) -> Reading:
    count = len(s.node.inputs)
    return s.one(K.ADD, list(s.node.inputs), scales=(1.0 / count,) * count)


def _div(s: Site) -> Reading:
    dtype = s.dtype(0) or s.dtype(1)
    if dtype is not None and dtype.startswith(("int", "uint")):
        return "integer division rounds"
    return s.one(K.DIV, s.inputs(2))


def _mod(s: Site) -> Reading:
    return "fmod takes the sign of the dividend" if s.attr("fmod", 0) else s.one(K.MOD, s.inputs(2))


def _extremum(kind: K) -> Reader:
    def read(s: Site) -> Reading:
        values = list(s.node.inputs)
        if len(values) == 1:
            return s.one(K.IDENTITY, values)
        if len(values) == 2:
            return s.one(kind, values)
        steps = [Step(kind, values[:2], type=ValueType(None, s.dtype()))]
        for value in values[2:]:
            steps.append(Step(kind, [steps[-1], value], type=ValueType(None, s.dtype())))
        steps[-1].outputs = (0,)
        return steps

    return read


def _cast(s: Site) -> Reading:
    dtype = s.facts.type(s.node.outputs[0]).dtype
    if dtype is None and s.attr("to") is not None:
        dtype = dtype_name(ir.DataType(s.attr("to")))
    if dtype is None and s.has(1):
        dtype = s.dtype(1)
    if dtype in (None, "string"):
        return "it casts to strings"
    return s.one(K.IDENTITY, s.inputs(1)) if dtype == s.dtype() else s.one(K.CAST, s.inputs(1), dtype=dtype)


# ---- views -----------------------------------------------------------------------------------------------------------


def _reshape(s: Site) -> Reading:
    """Reshape, Flatten, Squeeze, Unsqueeze: the target is the output's shape."""
    if s.has(1) and s.vector(1) is None:
        return STATIC_ONLY.format("target")
    step = s.one(K.RESHAPE, s.inputs(1))
    shape, target = s.shape(0), s.vector(1)
    if s.node.op_type == "Reshape" and shape is not None and target is not None:
        step.type = ValueType(reshaped(shape, target, zeros=bool(s.attr("allowzero", 0))), s.dtype())
    return step


def _expand(s: Site) -> Reading:
    target, shape = s.vector(1), s.shape(0)
    if target is None:
        return STATIC_ONLY.format("target")
    wide = None if shape is None else broadcast((shape, target))
    step = s.one(K.IDENTITY if wide is not None and wide == shape else K.EXPAND, s.inputs(1))
    step.type = ValueType(wide, s.dtype())
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


def _sequence_at(s: Site) -> Reading:
    """One part of a SplitToSequence is a slice."""
    sequence, index = s.input(0), s.number(1)
    split = sequence.producer() if sequence is not None else None
    if split is None or split.op_type != "SplitToSequence" or index is None or split.inputs[0] is None:
        return "its sequence is not a split"
    source = Site(split, s.opset, s.facts, s.constants)
    shape, axis, sizes = source.shape(0), source.axis(0), source.integers(1)
    extent = shape[axis] if shape is not None and axis is not None and axis >= 0 else None
    if axis is None or not isinstance(extent, int) or (source.has(1) and sizes is None):
        return STATIC_ONLY.format("split")
    if sizes is None or (len(sizes) == 1 and source.rank(1) == 0):
        size = 1 if sizes is None else sizes[0]
        sizes = (*[size] * (extent // size), *([extent % size] if extent % size else []))
    start = sum(sizes[: int(index) % len(sizes)])
    attrs = {"axes": (axis,), "starts": (start,), "stops": (start + sizes[int(index) % len(sizes)],), "steps": (1,)}
    if sizes is not None and (source.has(1) or source.attr("keepdims", 1)):
        return Step(K.SLICE, [split.inputs[0]], attrs, (0,))
    kept = ValueType(name_extents(sliced(shape or (), attrs), "part"), source.dtype())
    inner = Step(K.SLICE, [split.inputs[0]], attrs, type=kept)
    return [inner, s.one(K.RESHAPE, [inner])]


def _scatter(s: Site) -> Reading:
    extras = {name: attribute.value for name, attribute in s.node.attributes.items()}
    accumulate = s.attr("reduction", "none") == "add"
    return s.one(K.SCATTER, list(s.node.inputs), op=s.node.op_type, accumulate=accumulate, **extras)


# ---- convolutions and pools ------------------------------------------------------------------------------------------


def _window(s: Site, kernel: Sequence[int]) -> dict[str, Any] | str:
    """stride, pads and dilation over the spatial dimensions, auto_pad resolved."""
    spatial = len(kernel)
    stride = tuple(s.attr("strides") or (1,) * spatial)
    dilation = tuple(s.attr("dilations") or (1,) * spatial)
    auto = s.attr("auto_pad", "NOTSET")
    pads = tuple(s.attr("pads") or (0,) * (2 * spatial))
    if auto == "VALID":
        pads = (0,) * (2 * spatial)
    elif auto in ("SAME_UPPER", "SAME_LOWER"):
        shape = s.shape(0)
        totals = []
        for axis in range(spatial):
            span = dilation[axis] * (kernel[axis] - 1) + 1
            extent = shape[axis + 2] if shape is not None else None
            if stride[axis] == 1:
                totals.append(span - 1)
            elif isinstance(extent, int):
                totals.append(max((-(-extent // stride[axis]) - 1) * stride[axis] + span - extent, 0))
            else:
                return f"auto_pad={auto} needs an extent that is unknown"
        pads = _share(totals, more_at_end=auto == "SAME_UPPER")
    return {"stride": stride, "pads": pads, "dilation": dilation}


def _share(totals: Sequence[int], *, more_at_end: bool) -> tuple[int, ...]:
    small, large = [total // 2 for total in totals], [total - total // 2 for total in totals]
    return tuple(small + large) if more_at_end else tuple(large + small)


def _kernel(s: Site) -> tuple[int, ...] | None:
    kernel = s.attr("kernel_shape")
    if kernel is not None:
        return tuple(kernel)
    weight = s.shape(1)
    if weight is None or not is_static(weight[2:]):
        return None
    return tuple(int(extent) for extent in weight[2:])


def conv_attrs(s: Site) -> dict[str, Any] | str:
    """Attributes of a convolution."""
    kernel = _kernel(s)
    if kernel is None:
        return "its kernel's extents are unknown"
    window = _window(s, kernel)
    return window if isinstance(window, str) else {**window, "groups": s.attr("group", 1)}


def _conv(s: Site) -> Reading:
    attrs = conv_attrs(s)
    return attrs if isinstance(attrs, str) else s.one(K.CONV, s.inputs(3), **attrs)


def _conv_transpose(s: Site) -> Reading:
    kernel = _kernel(s)
    if kernel is None:
        return "its kernel's extents are unknown"
    spatial = len(kernel)
    stride = tuple(s.attr("strides") or (1,) * spatial)
    dilation = tuple(s.attr("dilations") or (1,) * spatial)
    extra = tuple(s.attr("output_padding") or (0,) * spatial)
    auto, wanted = s.attr("auto_pad", "NOTSET"), s.attr("output_shape")
    pads = tuple(s.attr("pads") or (0,) * (2 * spatial))
    spans = [extra[i] + dilation[i] * (kernel[i] - 1) + 1 for i in range(spatial)]
    if wanted is not None:
        shape = s.shape(0)
        if shape is None or not is_static(shape[2:]):
            return "output_shape needs extents that are unknown"
        given = [int(extent) for extent in shape[2:]]
        totals = [stride[i] * (given[i] - 1) + spans[i] - wanted[-spatial:][i] for i in range(spatial)]
    elif auto in ("SAME_UPPER", "SAME_LOWER"):
        totals = [spans[i] - stride[i] for i in range(spatial)]
    else:
        totals = None
        pads = (0,) * (2 * spatial) if auto == "VALID" else pads
    if totals is not None:
        if min(totals) < 0:
            return "its output is larger than its windows reach"
        pads = _share(totals, more_at_end=auto == "SAME_UPPER")
    return s.one(
        K.CONV_TRANSPOSE,
        s.inputs(3),
        stride=stride,
        pads=pads,
        dilation=dilation,
        groups=s.attr("group", 1),
        output_padding=extra,
    )


def _pool(s: Site, *, average: bool) -> Reading:
    kernel = tuple(s.attr("kernel_shape"))
    window = _window(s, kernel)
    if isinstance(window, str):
        return window
    ceil_mode = bool(s.attr("ceil_mode", 0))
    if not average:
        if s.used(1):
            return "its indices are used"
        return s.one(K.MAX_POOL, s.inputs(1), kernel=kernel, ceil_mode=ceil_mode, **window)
    if any(step != 1 for step in window.pop("dilation")):
        return "its window is dilated"
    include = bool(s.attr("count_include_pad", 0))
    return s.one(K.AVG_POOL, s.inputs(1), kernel=kernel, ceil_mode=ceil_mode, count_include_pad=include, **window)


def _global_pool(s: Site) -> Reading:
    rank = s.rank()
    if rank is None:
        return "its rank is unknown"
    if s.node.op_type == "GlobalMaxPool":
        return s.one(K.AMAX, s.inputs(1), axes=tuple(range(2, rank)), keepdims=True)
    return s.one(K.ADAPTIVE_AVG_POOL, s.inputs(1), output_size=(1,) * (rank - 2))


def _resize(s: Site) -> Reading:
    """Upsample 7 and 9, Resize 10 (asymmetric, floor), Resize 11 and later."""
    shape, out = s.shape(0), s.out_shape()
    if shape is None:
        return "its rank is unknown"
    mode = s.attr("mode", "nearest")
    modern = s.node.op_type == "Resize" and s.opset >= 11
    slot = 1 if s.opset < 11 else 2
    where = s.attr("coordinate_transformation_mode", "half_pixel") if modern else "asymmetric"
    rounding = s.attr("nearest_mode", "round_prefer_floor") if modern else "floor"
    sized = modern and s.has(3)
    if s.attr("antialias", 0) or s.attr("exclude_outside", 0) or s.attr("axes") is not None:
        return "antialias, exclude_outside and axes have no counterpart"
    if sized and s.attr("keep_aspect_ratio_policy", "stretch") != "stretch":
        return "keep_aspect_ratio_policy has no counterpart"
    scales: Sequence[float] | None = None
    if not sized:
        array = s.array(slot)
        scales = s.attr("scales") if s.opset < 9 else None if array is None else [float(scale) for scale in array]
    elif s.vector(3) is None:
        return STATIC_ONLY.format("size")
    if scales is None and out is not None and is_static(shape[2:]) and is_static(out[2:]):  # type: ignore[arg-type]
        scales = [1.0, 1.0, *(int(b) / int(a) for a, b in zip(shape[2:], out[2:], strict=True))]  # type: ignore[arg-type]
    if scales is None and not sized:
        return STATIC_ONLY.format("scale")
    if scales is not None:
        if any(scale != 1 for scale in scales[:2]):
            return "it resizes batch or channels"
        exact = all(isinstance(extent, int) for extent in shape[2:]) and all(
            (int(extent) * scale).is_integer() for extent, scale in zip(shape[2:], scales[2:], strict=True)
        )
        if not sized and not exact and not all(float(scale).is_integer() for scale in scales):
            return "its output is not the input's extent times the scale"
    if not _samples_as_torch(mode, where, rounding, scales, s.attr("cubic_coeff_a", -0.75)):
        return f"{mode} with {where} and {rounding} has no counterpart"
    return s.one(K.INTERPOLATE, s.inputs(1), mode=mode, align_corners=where == "align_corners")


def _samples_as_torch(mode: str, where: str, rounding: str, scales: Sequence[float] | None, coefficient: float) -> bool:
    """Whether the samples are taken where torch's interpolate takes them in this mode."""
    if mode == "nearest":
        if where == "asymmetric" and rounding == "floor":
            return True
        whole = scales is not None and all(float(scale).is_integer() for scale in scales)
        # A whole factor puts every sample between the same two ties, so the half-pixel roundings agree with floor.
        half = where == "half_pixel" and rounding in ("round_prefer_floor", "round_prefer_ceil")
        return whole and half
    if where not in ("half_pixel", "pytorch_half_pixel", "align_corners"):
        return False
    return mode == "linear" or (mode == "cubic" and coefficient == -0.75)


# ---- contractions ----------------------------------------------------------------------------------------------------


def _matmul(s: Site) -> Reading:
    if s.constant(1) and s.rank(1) == 2 and s.rank(0) not in (None, 0, 1):
        return s.one(K.LINEAR, [*s.inputs(2), None], transpose_weight=False)
    return s.one(K.MATMUL, s.inputs(2))


def _gemm(s: Site) -> Reading:
    """alpha·A'·B' + beta·C: a linear where alpha and beta are 1 and A is not transposed, else what it says."""
    a, b, c = s.inputs(3)
    alpha, beta = s.attr("alpha", 1.0), s.attr("beta", 1.0)
    transposed = bool(s.attr("transB", 0))
    shape_a, shape_b, dtype = s.shape(0), s.shape(1), s.dtype()
    if c is not None and beta == 0:
        c = None
    simple = not s.attr("transA", 0) and s.constant(1)
    folded = c is None or (beta == 1 and alpha == 1 and s.constant(2) and _is_bias(s.shape(2), shape_b, transposed))
    if simple and alpha == 1 and folded:
        return s.one(K.LINEAR, [a, b, c], transpose_weight=transposed)
    steps: list[Step] = []

    def turned(value: ir.Value | None, shape: Shape | None, turn: bool) -> ir.Value | Step | None:
        if not turn:
            return value
        flipped = None if shape is None else tuple(reversed(shape))
        steps.append(Step(K.PERMUTE, [value], {"perm": (1, 0)}, type=ValueType(flipped, dtype)))
        return steps[-1]

    left = turned(a, shape_a, bool(s.attr("transA", 0)))
    out = ValueType(_named(s), dtype)
    if s.constant(1):
        steps.append(Step(K.LINEAR, [left, b, None], {"transpose_weight": transposed}, type=out))
    else:
        steps.append(Step(K.MATMUL, [left, turned(b, shape_b, transposed)], type=out))
    product = steps[-1]
    if c is not None:
        scales = () if alpha == beta == 1 else (alpha, beta)
        steps.append(Step(K.ADD, [product, c], {"scales": scales} if scales else {}))
    elif alpha != 1:
        steps.append(Step(K.ADD, [product], {"scales": (alpha,)}))
    steps[-1].outputs = (0,)
    return steps


def _named(s: Site) -> Shape | None:
    return s.facts.type(s.node.outputs[0]).shape


def _is_bias(bias: Shape | None, weight: Shape | None, transposed: bool) -> bool:
    return bias is not None and weight is not None and bias == (weight[0 if transposed else 1],)


def _einsum(s: Site) -> Reading:
    return s.one(K.EINSUM, list(s.node.inputs), equation=str(s.attr("equation")).replace(" ", ""))


def _attention(s: Site) -> Reading:
    """Attention 23 with heads as a dimension, without a cache."""
    shape = s.shape(0)
    if shape is None or len(shape) != 4 or not isinstance(shape[3], int):
        return "its heads are not a dimension of their own"
    if any(s.has(index) for index in (4, 5, 6)) or any(s.used(index) for index in (1, 2, 3)):
        return "it keeps a cache or returns its scores"
    if s.attr("softcap", 0.0) or s.attr("qk_matmul_output_mode", 0):
        return "it caps its scores"
    scale = s.attr("scale", float(shape[3]) ** -0.5)
    return s.one(K.ATTENTION, s.inputs(4), scale=scale, causal=bool(s.attr("is_causal", 0)))


_RECURRENT_DEFAULTS = {"LSTM": ("Sigmoid", "Tanh", "Tanh"), "GRU": ("Sigmoid", "Tanh")}


def _recurrent(s: Site) -> Reading:
    name = s.node.op_type
    extras = {key: attribute.value for key, attribute in s.node.attributes.items() if key != "activations"}
    activations = tuple(s.attr("activations") or ())
    if name == "RNN":
        distinct = set(activations) or {"Tanh"}
        mode = {"Tanh": "rnn_tanh", "Relu": "rnn_relu"}.get(distinct.pop()) if len(distinct) == 1 else None
    else:
        expected = _RECURRENT_DEFAULTS[name]
        mode = name.lower() if activations in ((), expected, expected * 2) else None
    if mode is None:
        return "its activations are not the usual ones"
    attrs = {"mode": mode, **extras}
    return Step(K.RECURRENT, list(s.node.inputs), attrs, tuple(range(len(s.node.outputs))))


def _dft(s: Site) -> Reading:
    extras = {name: attribute.value for name, attribute in s.node.attributes.items()}
    return "its length is given" if len(s.node.inputs) > 1 else s.one(K.FFT, s.inputs(1), **extras)


# ---- norms -----------------------------------------------------------------------------------------------------------


def _batch_norm(s: Site) -> Reading:
    """BatchNormalization 7 and 9 train when they have more outputs, 14 and later when training_mode says so."""
    if s.attr("training_mode", 0) or any(s.used(index) for index in range(1, len(s.node.outputs))):
        return "it is in training"
    if s.attr("spatial", 1) == 0:
        return "its statistics are not by channel"
    return s.one(K.BATCH_NORM, s.inputs(5), eps=s.attr("epsilon", 1e-5), training=False)


def _layer_norm(s: Site) -> Reading:
    axis, rank, weight = s.axis(-1), s.rank(), s.rank(1)
    if s.used(1) or s.used(2):
        return "its statistics are used"
    if axis is None or (rank is not None and weight is not None and weight != rank - axis):
        return "its scale is broadcast"
    return s.one(K.LAYER_NORM, s.inputs(3), axis=axis, eps=s.attr("epsilon", 1e-5))


def _rms_norm(s: Site) -> Reading:
    axis, rank, weight = s.axis(-1), s.rank(), s.rank(1)
    if s.used(1):
        return "its statistics are used"
    if axis is None or (rank is not None and weight is not None and weight != rank - axis):
        return "its scale is broadcast"
    return s.one(K.RMS_NORM, s.inputs(2), axis=axis, eps=s.attr("epsilon", 1e-5))


def _group_norm(s: Site) -> Reading:
    """GroupNormalization 18 has a scale for each group, 21 for each channel."""
    groups, shape = s.attr("num_groups"), s.shape(0)
    weight: Any
    weight, bias = s.inputs(3)[1:]
    if s.opset < 21 and (shape is None or shape[1] != groups):
        scale, shift = s.array(1), s.array(2)
        channels = shape[1] if shape is not None else None
        if scale is None or shift is None or not isinstance(channels, int):
            return "its scale for each group is not a constant"
        weight, bias = (np.repeat(array, channels // groups) for array in (scale, shift))  # type: ignore[assignment]
    return s.one(K.GROUP_NORM, [s.input(0), weight, bias], groups=groups, eps=s.attr("epsilon", 1e-5))


def _instance_norm(s: Site) -> Reading:
    return s.one(K.INSTANCE_NORM, s.inputs(3), eps=s.attr("epsilon", 1e-5))


def _lrn(s: Site) -> Reading:
    return s.one(
        K.LOCAL_RESPONSE_NORM,
        s.inputs(1),
        size=s.attr("size"),
        alpha=s.attr("alpha", 1e-4),
        beta=s.attr("beta", 0.75),
        bias=s.attr("bias", 1.0),
    )


# ---- activations -----------------------------------------------------------------------------------------------------


def _clip(s: Site) -> Reading:
    """Clip 6 has attributes, Clip 11 inputs."""
    if s.opset < 11:
        low, high = s.attr("min"), s.attr("max")
    else:
        low, high = s.number(1), s.number(2)
        if (s.has(1) and low is None) or (s.has(2) and high is None):
            return STATIC_ONLY.format("range")
    limits = [None if bound is None else shortest(bound) for bound in (low, high)]
    low, high = (None if bound is None or abs(bound) > 3.4e38 else bound for bound in limits)
    if low is None and high is None:
        return s.one(K.IDENTITY, s.inputs(1))
    return s.one(K.CLIP, s.inputs(1), min=low, max=high)


def _prelu(s: Site) -> Reading:
    """A slope for each channel, spelled [C, 1, ...], or one for all."""
    slope, rank = s.shape(1), s.rank()
    if slope is None or rank is None or not is_static(slope):
        return "its slope's shape is unknown"
    extents = [(index - len(slope), extent) for index, extent in enumerate(slope) if extent != 1]
    if extents and (len(extents) > 1 or extents[0][0] != 1 - rank):
        return "its slope varies over more than the channels"
    return s.one(K.PRELU, s.inputs(2))


def _dropout(s: Site) -> Reading:
    """Dropout 7 and 10 do nothing, 12 and later drop when training_mode is true."""
    if s.used(1):
        return "its mask is used"
    ratio = s.number(1) if s.has(1) else s.attr("ratio", 0.5)
    if s.opset < 12 or not s.has(2) or s.number(2) == 0 or ratio == 0:
        return s.one(K.IDENTITY, s.inputs(1))
    if s.number(2) is None or ratio is None:
        return STATIC_ONLY.format("mode")
    return s.one(K.DROPOUT, s.inputs(1), p=shortest(ratio))


def _swish(s: Site) -> Reading:
    return "its alpha is not 1" if s.attr("alpha", 1.0) != 1 else s.one(K.SILU, s.inputs(1))


def _attrs(kind: K, **names: tuple[str, Any]) -> Reader:
    """A one-operand operator whose attributes only change their names."""
    return lambda s: s.one(kind, s.inputs(1), **{ours: s.attr(*theirs) for ours, theirs in names.items()})


def _softmax(s: Site) -> Reading:
    """Softmax 13 works along one axis; before, over everything from `axis` (1 by default) on."""
    log = s.node.op_type == "LogSoftmax"
    shape, dtype = s.shape(0), s.dtype()
    axis = s.axis(-1 if s.opset >= 13 else 1)
    if shape is None or axis is None:
        return "its rank is unknown"
    tail = shape[axis + 1 :]
    if s.opset >= 13 or all(extent == 1 for extent in tail):
        return s.one(K.SOFTMAX, s.inputs(1), axis=axis, log=log)
    if not is_static(shape):
        return "it flattens extents that are unknown"
    sizes = [int(extent) for extent in shape]
    flat = (int(np.prod(sizes[:axis])), int(np.prod(sizes[axis:])))
    inner = Step(K.RESHAPE, s.inputs(1), type=ValueType(flat, dtype))
    scored = Step(K.SOFTMAX, [inner], {"axis": 1, "log": log}, type=ValueType(flat, dtype))
    return [inner, scored, s.one(K.RESHAPE, [scored])]


# ---- reductions ------------------------------------------------------------------------------------------------------


def _axes(s: Site, since: int) -> tuple[int, ...] | str:
    axes = s.attr("axes") if s.opset < since else s.integers(1)
    rank = s.rank()
    if rank is None:
        return "its rank is unknown"
    if s.opset >= since and s.has(1) and axes is None:
        return STATIC_ONLY.format("axes")
    if axes is None or len(axes) == 0:
        return () if s.attr("noop_with_empty_axes", 0) else tuple(range(rank))
    return tuple(sorted(axis % rank for axis in axes))


def _reduce(s: Site) -> Reading:
    kind, since = REDUCTIONS[s.node.op_type]
    axes = _axes(s, since)
    if isinstance(axes, str):
        return axes
    if not axes:
        return s.one(K.IDENTITY, s.inputs(1))
    return s.one(kind, s.inputs(1), axes=axes, keepdims=bool(s.attr("keepdims", 1)))


def _reduce_norm(s: Site) -> Reading:
    """ReduceL1, ReduceL2, ReduceSumSquare as a sum of absolute values or squares."""
    axes = _axes(s, 18)
    if isinstance(axes, str):
        return axes
    x, source = s.input(0), ValueType(s.shape(0), s.dtype())
    first = Step(K.ABS, [x], type=source) if s.node.op_type == "ReduceL1" else Step(K.MUL, [x, x], type=source)
    if not axes:
        return "it reduces nothing"
    total = Step(K.SUM, [first], {"axes": axes, "keepdims": bool(s.attr("keepdims", 1))}, (0,))
    if s.node.op_type != "ReduceL2":
        return [first, total]
    total.outputs, total.type = (), ValueType(_named(s), s.dtype())
    return [first, total, s.one(K.SQRT, [total])]


def _argmax(s: Site) -> Reading:
    axis = s.axis(0)
    if axis is None or axis < 0 or s.attr("select_last_index", 0):
        return "it takes the last of several"
    return s.one(K.ARGMAX, s.inputs(1), axes=(axis,), keepdims=bool(s.attr("keepdims", 1)))


def _cumsum(s: Site) -> Reading:
    axis, rank = s.number(1), s.rank()
    if axis is None or rank is None or s.attr("exclusive", 0) or s.attr("reverse", 0):
        return "it is exclusive, reversed, or along an unknown axis"
    return s.one(K.CUMSUM, s.inputs(1), axis=int(axis) % rank)


def _topk(s: Site) -> Reading:
    attrs = {"axis": s.axis(-1), "largest": bool(s.attr("largest", 1)), "sorted": bool(s.attr("sorted", 1))}
    if s.opset < 10:
        attrs["k"] = s.attr("k")
    return Step(K.TOPK, list(s.node.inputs), attrs, (0, 1))


# ---- out of nothing --------------------------------------------------------------------------------------------------


def _full(s: Site) -> Reading:
    tensor = s.attr("value")
    value = 0.0 if tensor is None else float(tensor.numpy().reshape(-1)[0])
    return s.one(K.FULL, list(s.node.inputs), value=value)


def _range(s: Site) -> Reading:
    start, step = s.number(0), s.number(2)
    if start is None or step is None:
        return STATIC_ONLY.format("start or step")
    if s.dtype() in (None, "int64", "int32", "int16"):
        start, step = int(start), int(step)
    return s.one(K.ARANGE, list(s.node.inputs), start=start, step=step)


def _shape(s: Site) -> Reading:
    """Shape 15 may take a part of the shape only."""
    rank = s.rank()
    start, end = s.attr("start", 0), s.attr("end", INT64_MAX)
    if start == 0 and end == INT64_MAX:
        return s.one(K.SHAPE, s.inputs(1))
    if rank is None:
        return "its rank is unknown"
    first, last, _ = slice(start, end).indices(rank)
    whole = Step(K.SHAPE, s.inputs(1), type=ValueType((rank,), "int64"))
    return [whole, s.one(K.SLICE, [whole], axes=(0,), starts=(first,), stops=(max(first, last),), steps=(1,))]


def _random(s: Site) -> Reading:
    extras = {name: attribute.value for name, attribute in s.node.attributes.items()}
    return s.one(K.RANDOM, list(s.node.inputs), op=s.node.op_type, **extras)


READERS: dict[str, Reader] = {
    **{row.op_type: _plain(row.kind) for row in PLAIN},
    **dict.fromkeys(REDUCTIONS, _reduce),
    "Sum": _sum,
    "Sub": _sub,
    "Mean": _mean,
    "Div": _div,
    "Mod": _mod,
    "Max": _extremum(K.MAXIMUM),
    "Min": _extremum(K.MINIMUM),
    "Cast": _cast,
    "CastLike": _cast,
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
    "Conv": _conv,
    "ConvTranspose": _conv_transpose,
    "MaxPool": lambda s: _pool(s, average=False),
    "AveragePool": lambda s: _pool(s, average=True),
    "GlobalAveragePool": _global_pool,
    "GlobalMaxPool": _global_pool,
    "Upsample": _resize,
    "Resize": _resize,
    "MatMul": _matmul,
    "Gemm": _gemm,
    "Einsum": _einsum,
    "Attention": _attention,
    "LSTM": _recurrent,
    "GRU": _recurrent,
    "RNN": _recurrent,
    "DFT": _dft,
    "BatchNormalization": _batch_norm,
    "LayerNormalization": _layer_norm,
    "RMSNormalization": _rms_norm,
    "SimplifiedLayerNormalization": _rms_norm,
    "GroupNormalization": _group_norm,
    "InstanceNormalization": _instance_norm,
    "LRN": _lrn,
    "Clip": _clip,
    "LeakyRelu": _attrs(K.LEAKY_RELU, slope=("alpha", 0.01)),
    "PRelu": _prelu,
    "Elu": _attrs(K.ELU, alpha=("alpha", 1.0)),
    "Gelu": _attrs(K.GELU, approximate=("approximate", "none")),
    "Swish": _swish,
    "HardSigmoid": _attrs(K.HARDSIGMOID, alpha=("alpha", 0.2), beta=("beta", 0.5)),
    "Dropout": _dropout,
    "Softmax": _softmax,
    "LogSoftmax": _softmax,
    "ReduceL1": _reduce_norm,
    "ReduceL2": _reduce_norm,
    "ReduceSumSquare": _reduce_norm,
    "ArgMax": _argmax,
    "CumSum": _cumsum,
    "TopK": _topk,
    "ConstantOfShape": _full,
    "Range": _range,
    "Shape": _shape,
    "RandomNormal": _random,
    "RandomNormalLike": _random,
    "RandomUniform": _random,
    "RandomUniformLike": _random,
    "Bernoulli": _random,
}
