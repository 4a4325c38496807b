"""Writers of what moves elements."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir

from rescompile.errors import GraphError
from rescompile.graph import Shape
from rescompile.kinds import OpKind as K
from rescompile.onnx_build import Builder, Request, Writer, target_of
from rescompile.onnx_ops import INT64_MAX, PAD_MODES, Arg


def _target(r: Request) -> Shape:
    if r.out.shape is None:
        raise GraphError(f"The shape of a {r.kind.value}'s output is unknown, so its target cannot be written.")
    return r.out.shape


def _reshape(b: Builder, r: Request) -> ir.Value:
    """Extents that stay in place are 0, one more that is symbolic is −1."""
    if r.attr("shape"):
        return b.node("Reshape", [r.arg(0), b.const(list(r.attr("shape")))])
    x, target = r.arg(0), target_of(r)
    source = x.shape or ()
    entries: list[Any] = [
        0 if isinstance(extent, str) and axis < len(source) and source[axis] == extent else extent
        for axis, extent in enumerate(target)
    ]
    unknown = [axis for axis, extent in enumerate(entries) if isinstance(extent, str)]
    if len(unknown) == 1 and 0 not in target:
        entries[unknown[0]] = -1
        unknown = []
    if not unknown and not (0 in target and any(entry == -1 for entry in entries)):
        zeros = 0 in target
        return b.node("Reshape", [x, b.const(entries)], allowzero=1 if zeros and b.opset >= 14 else None)
    return b.node("Reshape", [x, b.shape(target, r.args)])


def _expand(b: Builder, r: Request) -> ir.Value:
    return b.node("Expand", [r.arg(0), b.shape(target_of(r), r.args)])


def _slice(b: Builder, r: Request) -> ir.Value:
    starts, stops, axes, steps = (list(r.attr(name)) for name in ("starts", "stops", "axes", "steps"))
    shape = r.arg(0).shape
    for i, axis in enumerate(axes):
        if shape is not None and isinstance(stops[i], str) and stops[i] == shape[axis]:
            stops[i] = INT64_MAX
    steps = steps or [1] * len(axes)
    if b.opset < 10:
        if any(isinstance(bound, str) for bound in (*starts, *stops)) or set(steps) - {1}:
            b.since(10, "a slice with steps or symbolic bounds")
        return b.node("Slice", [r.arg(0)], starts=starts, ends=stops, axes=axes)
    return _slice_by(b, r, starts, stops, axes, steps)


def _slice_by(
    b: Builder, r: Request, starts: list[Any], stops: list[Any], axes: list[int], steps: list[int]
) -> ir.Value:
    bounds = [b.shape(tuple(bound), r.args) for bound in (starts, stops)]
    return b.node("Slice", [r.arg(0), *bounds, b.const(axes), b.const(steps)])


def _flip(b: Builder, r: Request) -> ir.Value:
    axes = list(r.attr("axes"))
    return _slice_by(b, r, [-1] * len(axes), [-INT64_MAX] * len(axes), axes, [-1] * len(axes))


def _roll(b: Builder, r: Request) -> ir.Value:
    """Each axis: the last `shift` entries, then the others."""
    value: ir.Value | Arg = r.arg(0)
    for axis, shift in zip(r.attr("axes"), r.attr("shifts"), strict=True):
        extent = target_of(r)[axis]
        if not isinstance(extent, int):
            raise GraphError(f"A roll along the symbolic extent '{extent}' cannot be written as ONNX nodes.")
        cut = (extent - shift) % extent if extent else 0
        if cut:
            parts = [_cut(b, value, axis, cut, INT64_MAX), _cut(b, value, axis, 0, cut)]
            value = b.node("Concat", parts, axis=axis)
    return value if isinstance(value, ir.Value) else b.node("Identity", [value])


def _cut(b: Builder, x: ir.Value | Arg, axis: int, start: int, stop: int) -> ir.Value:
    if b.opset < 10:
        return b.node("Slice", [x], starts=[start], ends=[stop], axes=[axis])
    return b.node("Slice", [x, b.const([start]), b.const([stop]), b.const([axis])])


def _split(b: Builder, r: Request) -> list[ir.Value]:
    sizes, axis, count = list(r.attr("sizes")), r.attr("axis"), len(r.outputs)
    if b.opset < 13:
        return b.many("Split", [r.arg(0)], count, axis=axis, split=sizes)
    return b.many("Split", [r.arg(0), b.const(sizes)], count, axis=axis)


def _pad(b: Builder, r: Request) -> ir.Value:
    mode = {ours: theirs for theirs, ours in PAD_MODES.items()}[r.attr("mode")]
    if mode == "wrap":
        b.since(19, "circular padding")
    pads, value = list(r.attr("pads")), r.attr("value")
    if b.opset < 11:
        return b.node("Pad", [r.arg(0)], pads=pads, mode=mode, value=float(value))
    fill = b.like(value, r.arg(0)) if mode == "constant" else None
    return b.node("Pad", [r.arg(0), b.const(pads), fill], mode=mode)


def _tile(b: Builder, r: Request) -> ir.Value:
    return b.node("Tile", [r.arg(0), b.const(list(r.attr("repeats")))])


def _scatter(b: Builder, r: Request) -> ir.Value:
    op_type = r.attrs.get("op")
    if op_type is None:
        raise GraphError("A scatter that does not come from an ONNX model cannot be written as ONNX nodes.")
    extras = {name: value for name, value in r.attrs.items() if name != "op"}
    return b.node(op_type, list(r.args), **extras)


MOVES_WRITERS: dict[K, Writer] = {
    K.RESHAPE: _reshape,
    K.EXPAND: _expand,
    K.PERMUTE: lambda b, r: b.node("Transpose", [r.arg(0)], perm=tuple(r.attr("perm"))),
    K.SLICE: _slice,
    K.FLIP: _flip,
    K.ROLL: _roll,
    K.SPLIT: _split,
    K.PAD: _pad,
    K.TILE: _tile,
    K.CONCAT: lambda b, r: b.node("Concat", list(r.args), axis=r.attr("axis")),
    K.SCATTER: _scatter,
}
