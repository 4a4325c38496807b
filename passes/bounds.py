"""Between which numbers a value lies, by what computes it."""

from __future__ import annotations

import math
from dataclasses import dataclass

from rescompile.graph import Graph, Op, Value
from rescompile.kinds import OpKind as K

_KEEP = (
    K.IDENTITY, K.CAST, K.RESHAPE, K.PERMUTE, K.SLICE, K.SPLIT, K.EXPAND, K.ROLL, K.FLIP, K.TILE, K.GATHER, K.MAX_POOL,
    K.ADAPTIVE_AVG_POOL, K.MEAN, K.AMAX, K.AMIN, K.MAXIMUM, K.MINIMUM, K.CONCAT,
)  # fmt: skip
_UNIT = (K.SIGMOID, K.HARDSIGMOID)
_POSITIVE = (K.EXP, K.SOFTPLUS, K.ABS, K.SQRT)
_FAR = 64  # operations that are looked back over


@dataclass(frozen=True, slots=True)
class Bounds:
    """low ≤ every element ≤ high."""

    low: float = -math.inf
    high: float = math.inf

    def clamped(self, low: float, high: float) -> Bounds:
        """What clamping to [low, high] makes of it."""
        return Bounds(min(max(self.low, low), high), max(min(self.high, high), low))


def bounds(graph: Graph, value: Value, far: int = _FAR) -> Bounds:
    """Bounds that hold for every input of the model; infinite where nothing is known."""
    op = value.producer
    if op is None:
        number = graph.scalar(value)
        return Bounds() if number is None else Bounds(number, number)
    if far <= 0:
        return Bounds()
    kind = op.kind
    if kind is K.SOFTMAX:
        return Bounds(-math.inf, 0.0) if op.attr("log") else Bounds(0.0, 1.0)
    if kind in _UNIT:
        return Bounds(0.0, 1.0)
    if kind in _POSITIVE:
        return Bounds(0.0)
    if kind not in (*_KEEP, K.RELU, K.CLIP, K.AVG_POOL, K.PAD, K.ADD, K.MUL, K.INTERPOLATE):
        return Bounds()
    read = _read(op)
    parts = [bounds(graph, operand, (far - 1) // len(read)) for operand in read]
    if kind is K.ADD:
        low = sum(min(f * part.low, f * part.high) for f, part in zip(op.scales, parts, strict=True) if f)
        high = sum(max(f * part.low, f * part.high) for f, part in zip(op.scales, parts, strict=True) if f)
        return Bounds(low, high)
    if kind is K.MUL:
        return Bounds(0.0) if all(part.low >= 0 for part in parts) else Bounds()
    whole = Bounds(min(part.low for part in parts), max(part.high for part in parts))
    if kind is K.RELU:
        return whole.clamped(0.0, math.inf)
    if kind is K.CLIP:
        low, high = op.attr("min"), op.attr("max")
        return whole.clamped(-math.inf if low is None else low, math.inf if high is None else high)
    if kind is K.INTERPOLATE and op.attr("mode") not in ("nearest", "linear"):
        return Bounds()
    if kind is K.AVG_POOL:
        return Bounds(min(whole.low, 0.0), max(whole.high, 0.0))
    if kind is K.PAD and op.attr("mode") == "constant":
        filler = float(op.attr("value"))
        return Bounds(min(whole.low, filler), max(whole.high, filler))
    return whole


def _read(op: Op) -> list[Value]:
    """The operands whose elements may come out."""
    return op.operands if op.kind in (K.ADD, K.MUL, K.MAXIMUM, K.MINIMUM, K.CONCAT) else op.operands[:1]
