"""Which contents a factor can go into: of what writes a value, or of everything that reads it.

A factor passes whatever is linear and keeps features apart, and a rectifier where it is positive. A shift passes only
what moves elements.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass, field
from typing import TypeAlias

from rescompile.graph import Graph, Op, Value
from rescompile.kinds import OpKind as K
from rescompile.kinds import Trait
from rescompile.passes.features import carried, carriers, moved, normed_axis
from rescompile.passes.tracing import is_stored

_CONTRACTIONS = (K.CONV, K.CONV_TRANSPOSE, K.LINEAR)
_HOMOGENEOUS = (K.RELU, K.LEAKY_RELU, K.PRELU)
_NORMS = (K.LAYER_NORM, K.RMS_NORM, K.GROUP_NORM, K.INSTANCE_NORM, K.BATCH_NORM)
_AVERAGES = (K.MEAN, K.ADAPTIVE_AVG_POOL)
_POOLS = (K.MEAN, K.SUM, K.AVG_POOL, K.ADAPTIVE_AVG_POOL, K.INTERPOLATE)
_UNEVEN = (K.CAST, K.QUANTIZE, K.DEQUANTIZE)

_LONGEST = 64


@dataclass(frozen=True, slots=True)
class Site:
    """Operand `index` of `op`, whose `axis`, in `groups`, holds the features that are scaled."""

    op: Op
    index: int
    axis: int
    groups: int = 1


@dataclass(frozen=True, slots=True)
class Asked:
    """What is to pass. `gone`: operations that are taken out, each with the value that stands for its output.

    `biased`: contractions that were given a bias. `into_factors`: whether another factor takes it.
    """

    graph: Graph
    shifts: bool
    positive: bool
    gone: Mapping[Op, Value] = field(default_factory=dict)
    biased: Set[Op] = frozenset()
    into_factors: bool = False
    trail: list[Value] = field(default_factory=list)


Sites: TypeAlias = list[Site] | str


def behind(asked: Asked, value: Value, axis: int | None) -> Sites:
    """What writes `value`, if only the caller reads it; text where a factor along `axis` cannot go there."""
    if len(asked.trail) == _LONGEST:
        return f"what writes it is more than {_LONGEST} operations away"
    asked.trail.append(value)
    try:
        return _behind(asked, value, axis)
    finally:
        asked.trail.pop()


def _behind(asked: Asked, value: Value, axis: int | None) -> Sites:
    readers = [(op, index) for op, index in value.uses if op.kind is not K.SHAPE]
    if len(readers) > 1 or asked.graph.is_output(value):
        how = "" if len(readers) > 1 else ": it is an output"
        return f"'{value.name}' is also read elsewhere{how}"
    op = value.producer
    if op is None:
        return f"'{value.name}' is an input of the graph"
    if op in asked.gone:
        return behind(asked, asked.gone[op], axis)
    if op.kind in _CONTRACTIONS:
        return _writer(asked, op, value, axis)
    if op.kind in _NORMS and not asked.shifts:
        return _gain(asked, op, axis)
    rule = _BEHIND.get(op.kind)
    if rule is not None and not asked.shifts:
        return rule(asked, op, axis)
    return _carried_back(asked, op, value, axis)


def ahead(asked: Asked, value: Value, axis: int | None) -> Sites:
    """The contractions that read `value`; text where something else does that a factor along `axis` does not pass."""
    found: dict[Site, None] = {}
    pending, seen = [(value, axis)], {value}
    while pending:
        value, axis = pending.pop()
        if asked.graph.is_output(value):
            return f"'{value.name}' is an output"
        for op, index in value.uses:
            if op.kind is K.SHAPE:
                continue
            if op.kind in _CONTRACTIONS and index == 0:
                sites = _reader(asked, op, value, axis)
                if isinstance(sites, str):
                    return sites
                found |= dict.fromkeys(sites)
                continue
            for output in op.outputs:
                place = axis if op in asked.gone else _passed(asked, op, index, axis, output)
                if isinstance(place, str):
                    return place
                if output not in seen:
                    seen.add(output)
                    pending.append((output, place))
    return list(found) or f"nothing reads '{value.name}'"


def _writer(asked: Asked, op: Op, value: Value, axis: int | None) -> Sites:
    features = 1 if op.kind is not K.LINEAR else (value.rank or 0) - 1
    if axis not in (None, features):
        return f"'{op.name}' writes other features than those of the factor"
    if op.kind is K.CONV_TRANSPOSE:
        weight = _into(asked, op, 1, axis, 1, op.attr("groups"))
    else:
        weight = _into(asked, op, 1, axis, 1 if op.kind is K.LINEAR and not op.attr("transpose_weight") else 0)
    if isinstance(weight, str) or (op.operand("bias") is None and op not in asked.biased):
        return weight
    return [*weight, Site(op, 2, 0)] if is_stored(op.operand("bias")) else _COMPUTED.format(op.name)


_COMPUTED = "the weights of '{}' are computed in the graph"


def _into(asked: Asked, op: Op, index: int, factor: int | None, axis: int, groups: int = 1) -> Sites:
    """The contents that make a constant operand, whose `axis` holds the features; `factor`: None for one number."""
    value = op.inputs[index]
    if value is None or is_stored(value):
        return f"'{op.name}' has no stored gain" if value is None else [Site(op, index, axis, groups)]
    if not value.constant or groups != 1 or asked.shifts:
        return _COMPUTED.format(op.name)
    found = behind(asked, value, None if factor is None else axis)
    return f"{_COMPUTED.format(op.name)}: {found}" if isinstance(found, str) else found


def _gain(asked: Asked, op: Op, axis: int | None) -> Sites:
    own = normed_axis(op)
    if isinstance(own, str) or axis not in (None, own):
        return f"the gain of '{op.name}' lies along another axis"
    gain, bias = op.inputs[1], op.inputs[2] if op.kind is not K.RMS_NORM and len(op.inputs) > 2 else None
    if gain is None or gain.rank != 1 or not is_stored(bias):
        return f"'{op.name}' has no stored gain"
    sites = _into(asked, op, 1, axis, 0)
    return sites if isinstance(sites, str) or bias is None else [*sites, Site(op, 2, 0)]


def _sum_back(asked: Asked, op: Op, axis: int | None) -> Sites:
    sites: list[Site] = []
    for index, value in enumerate(op.inputs):
        assert value is not None  # sums have no absent operands
        place = _aligned_axis(op, value, axis)
        if place == "none":
            return f"'{op.name}' broadcasts '{value.name}'"
        if not value.constant:
            found = behind(asked, value, None if axis is None else int(place or 0))
            if isinstance(found, str):
                return found
            sites += found
        elif not is_stored(value):
            return f"'{value.name}' is computed in the graph"
        else:
            sites.append(Site(op, index, int(place or 0)))
    return sites


def _aligned_axis(op: Op, value: Value, axis: int | None) -> int | str | None:
    """The axis of an operand that broadcasting lays on `axis` of the output; "none" where it has one element there."""
    if axis is None:
        return None
    shape, out = value.shape, op.output.shape
    own = axis - len(out or ()) + len(shape or ())
    return own if shape is not None and out is not None and own >= 0 and shape[own] == out[axis] else "none"


def _product_back(asked: Asked, op: Op, axis: int | None) -> Sites:
    """Into what writes a factor that is computed; else, where that is asked for, into one that is stored."""
    reasons = []
    for index in sorted(range(len(op.operands)), key=lambda index: op.operands[index].constant):
        value = op.operands[index]
        stored = value.constant and not op.output.constant
        if (op.kind is K.DIV and index) or (stored and not asked.into_factors):
            continue
        place = _aligned_axis(op, value, axis)
        along = None if axis is None or place is None else int(place) if place != "none" else -1
        if along == -1:
            reasons.append(f"'{op.name}' broadcasts '{value.name}'")
            continue
        sites = _into(asked, op, index, along, along or 0) if value.constant else behind(asked, value, along)
        if not isinstance(sites, str):
            return sites
        reasons.append(sites)
    return "; ".join(reasons)


def _rectified(asked: Asked, op: Op, axis: int | None) -> Sites:
    if not asked.positive:
        return f"'{op.name}' ({op.kind.value}) lets only positive factors pass"
    return behind(asked, op.operands[0], axis)


_BEHIND: dict[K, Callable[[Asked, Op, int | None], Sites]] = {
    K.ADD: _sum_back,
    K.MUL: _product_back,
    K.DIV: _product_back,
    K.NEG: lambda asked, op, axis: behind(asked, op.operands[0], axis),
    K.RELU: _rectified,
    K.LEAKY_RELU: _rectified,
    K.PRELU: _rectified,
}


def _carried_back(asked: Asked, op: Op, value: Value, axis: int | None) -> Sites:
    """Through one operation that only moves, or averages, what it reads."""
    if len(op.outputs) > 1 or op.inputs[:1] in ([], [None]):
        return f"'{op.name}' ({op.kind.value}) lies between"
    blocked = _passed(asked, op, 0, None, value)
    if isinstance(blocked, str):
        return blocked
    operand = op.operands[0]
    if axis is None:
        return behind(asked, operand, None)
    places = carriers(value, axis)
    if places is None or len(places) != 1 or places[0][0] != 0:
        return f"'{op.name}' ({op.kind.value}) mixes or cuts the features"
    return behind(asked, operand, places[0][1])


def _reader(asked: Asked, op: Op, value: Value, axis: int | None) -> Sites:
    features = 1 if op.kind is not K.LINEAR else (value.rank or 0) - 1
    if axis not in (None, features):
        return f"'{op.name}' contracts another axis than that of the factor"
    if not is_stored(op.operand("bias")):
        return _COMPUTED.format(op.name)
    if asked.shifts and op.kind is not K.LINEAR and (op.kind is K.CONV_TRANSPOSE or any(op.attr("pads"))):
        return f"'{op.name}' has a border of zeros, which the shift does not reach"
    if op.kind is K.CONV_TRANSPOSE:
        return _into(asked, op, 1, axis, 0)
    if op.kind is K.CONV:
        return _into(asked, op, 1, axis, 1, op.attr("groups") if axis is not None else 1)
    return _into(asked, op, 1, axis, 1 if op.attr("transpose_weight") else 0)


def _passed(asked: Asked, op: Op, index: int, axis: int | None, output: Value) -> int | str | None:
    """The axis of `output` that what passes lies along, None for one number; text where it does not pass."""
    blocked = f"'{op.name}' ({op.kind.value}) lies between"
    value = op.inputs[index]
    assert value is not None
    if op.kind in _HOMOGENEOUS and index == 0 and asked.positive and not asked.shifts:
        return axis
    if op.kind in (K.MUL, K.DIV, K.NEG) and not asked.shifts:
        steady = all(other.constant for place, other in enumerate(op.inputs) if other is not None and place != index)
        if not steady or (op.kind is K.DIV and index) or value.shape != output.shape:
            return blocked
        return axis
    if asked.shifts and op.kind is K.IDENTITY and op.attr("dropout"):
        return f"the dropout '{op.name}' would drop the shift too, in training"
    if op.kind in _UNEVEN or index or op.kind in (K.ADD, K.CONCAT, K.MUL, K.DIV):
        return blocked
    if axis is None:
        averages = op.kind in (_AVERAGES if asked.shifts else _POOLS)
        quiet = op.kind is not K.PAD or (not asked.shifts and _pads_zeros(op))
        return None if (op.has(Trait.FREE) or averages) and quiet else blocked
    through = carried if not asked.shifts or op.kind in _AVERAGES else moved
    place = through(op, index, axis, output)
    return blocked if place is None else place


def _pads_zeros(op: Op) -> bool:
    return bool(op.attr("mode") != "constant" or op.attr("value") == 0)
