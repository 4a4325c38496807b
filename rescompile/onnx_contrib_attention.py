"""Readers of ONNX Runtime's attention operators (domain com.microsoft), without a cache.

y = softmax(scale·q·kᵀ + mask)·v     for each head, the heads one after the other in the last axis of q, k, v and y
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import onnx_ir as ir

from rescompile.graph import Dim, ValueType
from rescompile.kinds import OpKind as K
from rescompile.onnx_ops import Reading, Step
from rescompile.onnx_site import Reader, Site, Steps

_CACHE = "it reads or keeps a cache of keys and values"
_LENGTHS = "its mask is a number of tokens for each row"
_UNKNOWN = "its extents are unknown"


def _attention(s: Site) -> Reading:
    """Attention: q, k, v = split(x·W + b)     x: [B, S, H], W: [H, 2·Hq + Hv]"""
    x, weight, bias = s.inputs(3)
    if s.has(4) or s.has(6) or s.used(1):
        return _CACHE
    if s.attr("do_rotary", 0):
        return "it turns queries and keys by their position"
    shape, width = s.shape(0), s.shape(1)
    heads = s.attr("num_heads")
    if shape is None or len(shape) != 3 or width is None or not isinstance(width[1], int):
        return _UNKNOWN
    sizes = tuple(s.attr("qkv_hidden_sizes") or (width[1] // 3,) * 3)
    steps = Steps()
    if s.constant(1) and (bias is None or s.constant(2)):
        packed = steps.add(K.LINEAR, [x, weight, bias], {"transpose_weight": False})
    else:
        packed = steps.add(K.MATMUL, [x, weight])
        packed = packed if bias is None else steps.add(K.ADD, [packed, bias])
    parts, start = [], 0
    for size in sizes:
        cut: dict[str, Any] = {"axes": (2,), "starts": (start,), "stops": (start + size,), "steps": (1,)}
        parts.append(steps.add(K.SLICE, [packed], cut, ValueType((shape[0], shape[1], size), s.dtype())))
        start += size
    split = [_heads(steps, part, (shape[0], shape[1]), size, heads, s) for part, size in zip(parts, sizes, strict=True)]
    return _attended(s, steps, split, (shape[0], shape[1]), sizes[2], heads, masks=(3, 5))


def _multi_head_attention(s: Site) -> Reading:
    """MultiHeadAttention: q: [B, S, Hq], k: [B, T, Hq], v: [B, T, Hv], or k and v with heads of their own; a bias for
    all three one after the other"""
    if any(s.has(index) for index in (6, 7, 8, 9)) or s.used(1) or s.used(2):
        return _CACHE
    if s.used(3):
        return "its scores are used"
    if not s.has(1) or not s.has(2):
        return "its queries, keys and values are packed into one tensor"
    shapes = [s.shape(index) for index in range(3)]
    heads, bias = s.attr("num_heads"), s.input(3)
    query = shapes[0]
    if query is None or len(query) != 3 or not isinstance(query[2], int):
        return _UNKNOWN
    steps = Steps()
    split: list[Any] = []
    start, width = 0, 0
    for index, shape in enumerate(shapes):
        value: Any = s.input(index)
        if shape is not None and len(shape) == 4 and bias is None and isinstance(shape[3], int):
            split.append(value)
            width = heads * shape[3]
            continue
        if shape is None or len(shape) != 3 or not isinstance(shape[2], int):
            return _UNKNOWN
        width = shape[2]
        if bias is not None:
            cut: dict[str, Any] = {"axes": (0,), "starts": (start,), "stops": (start + width,), "steps": (1,)}
            part = steps.add(K.SLICE, [bias], cut, ValueType((width,), s.dtype()))
            value = steps.add(K.ADD, [value, part], type=ValueType(shape, s.dtype()))
        start += width
        split.append(_heads(steps, value, (shape[0], shape[1]), width, heads, s))
    return _attended(s, steps, split, (query[0], query[1]), width, heads, masks=(4, 5))


def _heads(steps: Steps, value: Any, rows: tuple[Dim, Dim], width: int, heads: int, s: Site) -> Step:
    """[B, S, N·D] → [B, N, S, D]"""
    apart = ValueType((*rows, heads, width // heads), s.dtype())
    return steps.add(K.PERMUTE, [steps.add(K.RESHAPE, [value], type=apart)], {"perm": (0, 2, 1, 3)})


def _attended(
    s: Site, steps: Steps, split: list[Any], rows: tuple[Dim, Dim], width: int, heads: int, masks: tuple[int, int]
) -> Reading:
    """The attention and what brings its heads together again. `masks`: inputs that hide tokens, and that are added."""
    mask = _hiding(s, steps, masks[0])
    if isinstance(mask, str):
        return mask
    added: Any = s.input(masks[1])
    if mask is not None and added is not None:
        added = steps.add(K.ADD, [added, mask])
    elif mask is not None:
        added = mask
    query = split[0].inputs[0].type.shape
    scale = s.attr("scale", 0.0) or 1.0 / math.sqrt(query[3])
    causal = bool(s.attr("unidirectional", 0))
    together = ValueType((rows[0], heads, rows[1], width // heads), s.dtype())
    result = steps.add(K.ATTENTION, [*split, added], {"scale": scale, "causal": causal}, together)
    result = steps.add(K.PERMUTE, [result], {"perm": (0, 2, 1, 3)})
    steps.add(K.RESHAPE, [result])
    steps[-1].extents = (*rows, width)
    return steps.ending(0)


def _hiding(s: Site, steps: Steps, index: int) -> Step | str | None:
    """What a mask of whole numbers, [B, T] or [B, S, T], adds to the scores: nothing where it is positive."""
    mask: ir.Value | None = s.input(index)
    shape = s.shape(index)
    if mask is None:
        return None
    if shape is None:
        return _UNKNOWN
    if len(shape) not in (2, 3):
        return _LENGTHS if len(shape) == 1 else "its mask has a form of its own"
    fill = s.attr("mask_filter_value", -10000.0)
    dtype = s.dtype() or "float32"
    seen = steps.add(K.GREATER, [mask, np.zeros((), s.dtype(index) or "int32")])
    wide = (shape[0], 1, 1, shape[1]) if len(shape) == 2 else (shape[0], 1, *shape[1:])
    seen = steps.add(K.RESHAPE, [seen], type=ValueType(wide, "bool"))
    numbers = [np.asarray(number, dtype) for number in (0.0, fill)]
    return steps.add(K.WHERE, [seen, *numbers], type=ValueType(wide, dtype))


ATTENTION_READERS: dict[str, Reader] = {
    "Attention": _attention,
    "MultiHeadAttention": _multi_head_attention,
    "GroupQueryAttention": lambda s: f"{_CACHE}, whose length only a run knows",
    "DecoderMaskedMultiHeadAttention": lambda s: _CACHE,
    "PackedAttention": lambda s: "it takes rows of different lengths one after the other",
    "PackedMultiHeadAttention": lambda s: "it takes rows of different lengths one after the other",
    "SparseAttention": lambda s: f"{_CACHE}, and leaves out blocks of its scores",
    "RotaryEmbedding": lambda s: "it turns pairs of elements by their position",
}
