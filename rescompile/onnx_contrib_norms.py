"""Readers of ONNX Runtime's norms (domain com.microsoft), most of which hold a sum.

Skips and shifts that are broadcast read as the sums that they are; statistics that somebody reads have no kind.
"""

from __future__ import annotations

from typing import Any

import onnx_ir as ir

from rescompile.graph import Shape, ValueType
from rescompile.kinds import OpKind as K
from rescompile.onnx_ops import Reading, Step
from rescompile.onnx_read_nn import norm_eps, rms_norm
from rescompile.onnx_site import Reader, Site, Steps

_STATISTICS = "its statistics are used"


def _skip_norm(s: Site, *, rms: bool) -> Reading:
    """s = x + bias + skip; y = N(s)     outputs: y, mean, inverse deviation, s

    x: [B, S, H] or [T, H]; skip: the same, or [1, S, H], [S, H] beside [B, S, H]; gamma, beta, bias: [H]. The norm is
    over the last axis, eps 1e-12 unless given.
    """
    if s.used(1) or s.used(2):
        return _STATISTICS
    x: Any = s.input(0)
    skip, weight = s.input(1), s.input(2)
    beta, bias = (None, s.input(3)) if rms else (s.input(3), s.input(4))
    shape, other = s.shape(0), s.shape(1)
    if shape is None or other is None:
        return "its rank is unknown"
    if len(other) > len(shape):
        return "its skip has more axes than its input"
    axis, eps = len(shape) - 1, norm_eps(s, 1e-12)
    steps = Steps()
    if bias is not None:
        x = steps.add(K.ADD, [x, bias], type=ValueType(shape, s.dtype()))
    if other == shape:
        steps.add(K.ADD_NORM, [x, skip, weight, beta], {"norm": "rms" if rms else "layer", "axis": axis, "eps": eps})
        return steps.ending(0, 3)
    total = steps.add(K.ADD, [x, skip], type=ValueType(shape, s.dtype()))
    total.outputs = (3,) if len(s.node.outputs) > 3 and s.node.outputs[3].name else ()
    operands = [total, weight] if rms else [total, weight, beta]
    steps.add(K.RMS_NORM if rms else K.LAYER_NORM, operands, {"axis": axis, "eps": eps})
    return steps.ending(0)


def _simplified_norm(s: Site) -> Reading:
    """An RMS norm; where the scale has another element type, the normalised values are cast to it before they meet."""
    given, wanted = s.dtype(0), s.dtype(1)
    if given == wanted or given is None or wanted is None:
        return rms_norm(s)
    axis, rank, weight = s.axis(-1), s.rank(), s.rank(1)
    if s.used(1):
        return _STATISTICS
    if axis is None or rank is None or weight != rank - axis:
        return "its scale is broadcast"
    steps = Steps()
    steps.add(K.RMS_NORM, [s.input(0), None], {"axis": axis, "eps": norm_eps(s)})
    steps.add(K.CAST, steps[-1:], {"dtype": wanted})
    steps.add(K.MUL, [steps[-1], s.input(1)])
    return steps.ending(0)


def _embed_norm(s: Site) -> Reading:
    """s = words[ids] + positions[0, 1, ...] + segments[types]; y = N(s)     outputs: y, mask index, s"""
    if s.used(1):
        return "its mask index, the length of each row, is used"
    ids, places = s.shape(0), s.shape(3)
    if ids is None or len(ids) != 2 or places is None:
        return "its rank is unknown"
    steps = Steps()
    total = steps.add(K.EMBEDDING, [s.input(2), s.input(0)])
    if s.has(8):
        row = steps.add(K.EMBEDDING, [s.input(3), s.input(8)])
    else:
        rows: dict[str, Any] = {"axes": (0,), "starts": (0,), "stops": (ids[1],), "steps": (1,)}
        row = steps.add(K.SLICE, [s.input(3)], rows, ValueType((ids[1], places[1]), s.dtype(3)))
    total = steps.add(K.ADD, [total, row])
    if s.has(1) and s.has(4):
        segment = steps.add(K.EMBEDDING, [s.input(4), s.input(1)])
        total = steps.add(K.ADD, [total, segment])
    total.outputs = (2,) if len(s.node.outputs) > 2 and s.node.outputs[2].name else ()
    steps.add(K.LAYER_NORM, [total, s.input(5), s.input(6)], {"axis": 2, "eps": norm_eps(s, 1e-12)})
    return steps.ending(0)


def _group_norm(s: Site, *, skip: bool) -> Reading:
    """GroupNorm, SkipGroupNorm: s = x + skip + bias; y = silu(N(s)) where it activates     outputs: y, s

    x: [N, H, W, C], or [N, C, H, W] where not channels_last; skip: the same, [N, 1, 1, C] or [N, C].
    """
    shape = s.shape(0)
    if shape is None or len(shape) != 4:
        return "its rank is unknown"
    if s.dtype(0) != s.dtype(1):
        return "its scale has another element type"
    last = bool(s.attr("channels_last", 1))
    same = ValueType(shape, s.dtype())
    steps = Steps()
    x: ir.Value | Step | None = s.input(0)
    if skip:
        other = s.shape(3)
        if other is None or (not last and other != shape):
            return "how its skip is broadcast is unknown"
        added: Any = s.input(3)
        if len(other) == 2:
            wide: Shape = (other[0], 1, 1, other[1])
            added = steps.add(K.RESHAPE, [added], type=ValueType(wide, s.dtype()))
        x = steps.add(K.ADD, [x, added], type=same)
        if s.has(4):
            if not last:
                return "its bias is along channels that are not the last axis"
            x = steps.add(K.ADD, [x, s.input(4)], type=same)
        x.outputs = (1,) if len(s.node.outputs) > 1 and s.node.outputs[1].name else ()
    if last:
        x = steps.add(K.PERMUTE, [x], {"perm": (0, 3, 1, 2)})
    steps.add(K.GROUP_NORM, [x, s.input(1), s.input(2)], {"groups": s.attr("groups"), "eps": norm_eps(s)})
    if s.attr("activation", 0):
        steps.add(K.SILU, steps[-1:])
    if last:
        steps.add(K.PERMUTE, steps[-1:], {"perm": (0, 2, 3, 1)})
    return steps.ending(0)


NORM_READERS: dict[str, Reader] = {
    "SkipLayerNormalization": lambda s: _skip_norm(s, rms=False),
    "SkipSimplifiedLayerNormalization": lambda s: _skip_norm(s, rms=True),
    "SimplifiedLayerNormalization": _simplified_norm,
    "EmbedLayerNormalization": _embed_norm,
    "GroupNorm": lambda s: _group_norm(s, skip=False),
    "SkipGroupNorm": lambda s: _group_norm(s, skip=True),
}
