"""Extents of an operation's output that follow from its operands' by kind.

onnx's inference loses symbolic extents in convolutions and pools, and gives up where a shape is computed; these rules
carry them on, and spell the same expression the same way wherever it arises, so that the two branches of a block agree.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

from rescompile.kinds import OpKind as K
from rescompile.kinds import Trait
from rescompile.values import Dim, PartialShape, Shape

Rule: TypeAlias = Callable[[Sequence[Shape | None], dict[str, Any], int], PartialShape | None]


def complete(
    kind: K, attrs: dict[str, Any], inputs: Sequence[Shape | None], shape: PartialShape | None, position: int = 0
) -> PartialShape | None:
    """The shape of output `position`, with the unknown extents (None) that follow from the operands filled in."""
    if shape is not None and None not in shape:
        return shape
    if not inputs or inputs[0] is None:
        return shape
    if kind.has(Trait.SHAPE_PRESERVING):
        return merge(shape, inputs[0])
    if kind.has(Trait.ELEMENTWISE):
        return merge(shape, broadcast(inputs))
    rule = _RULES.get(kind)
    return shape if rule is None else merge(shape, rule(inputs, attrs, position))


def merge(shape: PartialShape | None, other: PartialShape | None) -> PartialShape | None:
    """The first shape, with what the second knows beyond it."""
    if shape is None or other is None or len(shape) != len(other):
        return other if shape is None else shape
    return tuple(b if a is None else a for a, b in zip(shape, other, strict=True))


_BOOLEAN = frozenset((K.EQUAL, K.NOT_EQUAL, K.LESS, K.LESS_EQUAL, K.GREATER, K.GREATER_EQUAL, K.IS_NAN))
_INDICES = frozenset((K.SHAPE, K.ARGMAX))


def result_dtype(kind: K, attrs: dict[str, Any], operands: Sequence[str | None]) -> str | None:
    """The element type of an operation's first output, None when it does not follow from the operands'."""
    if kind in _BOOLEAN:
        return "bool"
    if kind in _INDICES:
        return "int64"
    if kind is K.CAST:
        return str(attrs["dtype"])
    if kind is K.WHERE:
        operands = operands[1:]
    if kind in (K.TOPK, K.FULL, K.RANDOM, K.RECURRENT) or not operands:
        return None
    return operands[0]


def broadcast(shapes: Sequence[PartialShape | None]) -> PartialShape | None:
    """Extents of an elementwise result; None for one that the operands leave open."""
    known = [shape for shape in shapes if shape is not None]
    if not known or len(known) < len(shapes):
        return None
    rank = max(len(shape) for shape in known)
    result: list[Dim | None] = []
    for axis in range(-rank, 0):
        extents = {shape[axis] for shape in known if len(shape) >= -axis} - {1}
        # An extent that is known and not 1 is the result's, whatever a symbolic one turns out to be.
        fixed = [extent for extent in extents if isinstance(extent, int)]
        result.append(fixed[0] if fixed else extents.pop() if len(extents) == 1 else None if extents else 1)
    return tuple(result)


def product(extents: Sequence[Dim | None]) -> Dim | None:
    """The product, None unless it is a number or one of the names."""
    total = 1
    names = [extent for extent in extents if not isinstance(extent, int)]
    for extent in extents:
        total *= extent if isinstance(extent, int) else 1
    if not names or total == 0:
        return total
    return names[0] if len(names) == 1 and total == 1 else None


def reshaped(shape: Shape, target: PartialShape, *, zeros: bool) -> PartialShape:
    """Reshape's target with 0 (keep, unless `zeros`) and −1 (the rest) resolved."""
    extents = [
        shape[axis] if extent == 0 and not zeros and axis < len(shape) else extent for axis, extent in enumerate(target)
    ]
    if -1 not in extents:
        return tuple(extents)
    rest = list(shape)
    for extent in extents:
        if isinstance(extent, str) and extent in rest:
            rest.remove(extent)
        elif not isinstance(extent, int):
            return tuple(None if extent == -1 else extent for extent in extents)
    known = product([extent for extent in extents if isinstance(extent, int) and extent != -1])
    total = product([extent for extent in rest if isinstance(extent, int)])
    names: list[Dim | None] = [extent for extent in rest if isinstance(extent, str)]
    factor = total // known if isinstance(total, int) and isinstance(known, int) and known else 0
    missing = product([*names, factor]) if factor else None
    return tuple(missing if extent == -1 else extent for extent in extents)


def sliced(shape: Shape, attrs: dict[str, Any]) -> PartialShape:
    """Extents of x[starts:stops:steps] along `axes`, bounds counted from the front."""
    result: list[Dim | None] = list(shape)
    for axis, start, stop, step in zip(*(attrs[name] for name in ("axes", "starts", "stops", "steps")), strict=True):
        extent = shape[axis]
        if start == 0 and step == 1 and stop == extent:
            continue
        known = all(isinstance(bound, int) for bound in (start, stop))
        if known and isinstance(extent, int):
            result[axis] = len(range(*slice(start, stop if stop >= -extent else None, step).indices(extent)))
        else:
            result[axis] = stop if start == 0 and step == 1 and isinstance(stop, str) else None
    return tuple(result)


def _slice(inputs: Sequence[Shape | None], attrs: dict[str, Any], _: int) -> PartialShape | None:
    return None if inputs[0] is None else sliced(inputs[0], attrs)


def _split(inputs: Sequence[Shape | None], attrs: dict[str, Any], position: int) -> PartialShape | None:
    return _with(inputs[0] or (), attrs["axis"], attrs["sizes"][position])


def _with(shape: PartialShape, axis: int, extent: Dim | None) -> PartialShape:
    return (*shape[:axis], extent, *shape[axis + 1 :])


def _permute(inputs: Sequence[Shape | None], attrs: dict[str, Any], _: int) -> PartialShape | None:
    return tuple((inputs[0] or ())[axis] for axis in attrs["perm"])


def _concat(inputs: Sequence[Shape | None], attrs: dict[str, Any], _: int) -> PartialShape | None:
    axis = attrs["axis"]
    parts = [shape[axis] if shape is not None else None for shape in inputs]
    total = sum(part for part in parts if isinstance(part, int))
    known = all(isinstance(part, int) for part in parts)
    return _with(inputs[0] or (), axis, total if known else None)


def _pad(inputs: Sequence[Shape | None], attrs: dict[str, Any], _: int) -> PartialShape | None:
    pads = attrs["pads"]
    rank = len(pads) // 2
    return tuple(
        extent + pads[axis] + pads[axis + rank]
        if isinstance(extent, int)
        else (extent if pads[axis] == pads[axis + rank] == 0 else None)
        for axis, extent in enumerate(inputs[0] or ())
    )


def _tile(inputs: Sequence[Shape | None], attrs: dict[str, Any], _: int) -> PartialShape | None:
    return tuple(product(pair) for pair in zip(inputs[0] or (), attrs["repeats"], strict=False))


def _reduce(inputs: Sequence[Shape | None], attrs: dict[str, Any], _: int) -> PartialShape | None:
    axes, keep = attrs["axes"], attrs["keepdims"]
    shape = inputs[0] or ()
    return tuple(1 if axis in axes else extent for axis, extent in enumerate(shape) if keep or axis not in axes)


def _gather(inputs: Sequence[Shape | None], attrs: dict[str, Any], _: int) -> PartialShape | None:
    shape, indices = inputs[0], inputs[1]
    if shape is None or indices is None:
        return None
    axis = attrs.get("axis", 0)
    return (*shape[:axis], *indices, *shape[axis + 1 :])


def _linear(inputs: Sequence[Shape | None], attrs: dict[str, Any], _: int) -> PartialShape | None:
    shape, weight = inputs[0], inputs[1]
    if shape is None or weight is None:
        return None
    return (*shape[:-1], weight[0 if attrs["transpose_weight"] else 1])


def _matmul(inputs: Sequence[Shape | None], _attrs: dict[str, Any], _: int) -> PartialShape | None:
    a, b = inputs[0], inputs[1]
    if a is None or b is None or min(len(a), len(b)) < 2:
        return None
    lead = broadcast((a[:-2], b[:-2])) if a[:-2] and b[:-2] else a[:-2] or b[:-2]
    return None if lead is None else (*lead, a[-2], b[-1])


def _conv(inputs: Sequence[Shape | None], attrs: dict[str, Any], _: int) -> PartialShape | None:
    x, weight = inputs[0], inputs[1]
    if x is None or weight is None:
        return None
    return _windowed(x, weight[0], weight[2:], attrs)


def _conv_transpose(inputs: Sequence[Shape | None], attrs: dict[str, Any], _: int) -> PartialShape | None:
    """out = (in − 1)·stride − pads + dilation·(kernel − 1) + output_padding + 1"""
    x, weight = inputs[0], inputs[1]
    if x is None or weight is None or not isinstance(weight[1], int):
        return None
    spatial = len(x) - 2
    pads, more = attrs["pads"], attrs["output_padding"]
    result: list[Dim | None] = [x[0], weight[1] * attrs["groups"]]
    for axis in range(spatial):
        extent, kernel = x[axis + 2], weight[axis + 2]
        if not isinstance(extent, int) or not isinstance(kernel, int):
            result.append(None)
            continue
        reach = attrs["dilation"][axis] * (kernel - 1) + more[axis] + 1 - pads[axis] - pads[axis + spatial]
        result.append((extent - 1) * attrs["stride"][axis] + reach)
    return tuple(result)


def _pool(inputs: Sequence[Shape | None], attrs: dict[str, Any], _: int) -> PartialShape | None:
    x = inputs[0] or ()
    return None if attrs.get("ceil_mode") else _windowed(x, x[1], attrs["kernel"], attrs)


def _windowed(x: Shape, channels: Dim, kernel: Sequence[Dim], attrs: dict[str, Any]) -> PartialShape:
    """out = (in + pads − dilation·(kernel − 1) − 1) // stride + 1"""
    spatial = len(x) - 2
    stride, pads = attrs["stride"], attrs["pads"]
    dilation = attrs.get("dilation") or (1,) * spatial
    result: list[Dim | None] = [x[0], channels]
    for axis in range(spatial):
        extent, size = x[axis + 2], kernel[axis]
        if not isinstance(size, int):
            result.append(None)
            continue
        margin = pads[axis] + pads[axis + spatial] - dilation[axis] * (size - 1) - 1
        if isinstance(extent, int):
            result.append((extent + margin) // stride[axis] + 1)
        elif stride[axis] == 1:
            result.append(extent if margin == -1 else f"({extent}{margin + 1:+d})")
        else:
            result.append(f"(({extent}{margin:+d})//{stride[axis]}+1)")
    return tuple(result)


def _reshape(inputs: Sequence[Shape | None], attrs: dict[str, Any], _: int) -> PartialShape | None:
    target = attrs.get("shape")
    return None if not target or inputs[0] is None else reshaped(inputs[0], target, zeros=True)


_RULES: dict[K, Rule] = {
    K.RESHAPE: _reshape,
    K.ROLL: lambda inputs, attrs, position: inputs[0],
    K.SLICE: _slice,
    K.SPLIT: _split,
    K.FLIP: lambda inputs, attrs, position: inputs[0],
    K.PERMUTE: _permute,
    K.CONCAT: _concat,
    K.PAD: _pad,
    K.TILE: _tile,
    K.CONV: _conv,
    K.FUSED_CONV: _conv,
    K.CONV_TRANSPOSE: _conv_transpose,
    K.MAX_POOL: _pool,
    K.AVG_POOL: _pool,
    K.LINEAR: _linear,
    K.FUSED_LINEAR: _linear,
    K.MATMUL: _matmul,
    K.ADD_NORM: lambda inputs, attrs, position: inputs[0],
    K.GATHER: _gather,
    K.EMBEDDING: _gather,
    **dict.fromkeys((K.MEAN, K.SUM, K.AMAX, K.AMIN, K.PROD, K.ARGMAX), _reduce),
}
