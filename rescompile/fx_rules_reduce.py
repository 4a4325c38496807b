"""Rules for reductions: sums, means, extremes, spreads and lengths."""

from __future__ import annotations

import math
from collections.abc import Callable

from rescompile.fx_rules import Rule, Site, Step, is_number
from rescompile.fx_types import static_shape
from rescompile.kinds import OpKind as K


def _reduction(kind: K) -> Callable[[Site], Step]:
    def rule(c: Site) -> Step:
        x, dtype = c["input"], c.get("dtype")
        if dtype is not None and not c.keeps_dtype(x):
            x = Step(K.CAST, [x], {"dtype": c.out.dtype}, suffix="cast", types=c.retype(c.shape(x)))
        return Step(kind, [x], {"axes": c.axes(c.get("dim")), "keepdims": bool(c.get("keepdim", False))})

    return rule


def _extreme(kind: K, both: K, position: K) -> Rule:
    """max and min: of two tensors, of all elements, or along a dimension (values and indices)"""

    def rule(c: Site) -> Step | tuple[Step, ...] | None:
        if "other" in c.args:
            return Step(both, [c["input"], c["other"]])
        attrs = {"axes": c.axes(c.get("dim")), "keepdims": bool(c.get("keepdim", False))}
        if "dim" not in c.args:
            return Step(kind, [c["input"]], attrs)
        if position is not K.ARGMAX:
            return None
        return (
            Step(kind, [c["input"]], attrs, types=c.outs[:1]),
            Step(position, [c["input"]], dict(attrs), types=c.outs[1:2]),
        )

    return rule


def _spread(c: Site) -> Step | None:
    """var = Σ(x − mean)² / (n − correction)"""
    shape = c.shape()
    axes = c.axes(c.get("dim"))
    known = static_shape(shape)
    correction = c.get("correction", 1 if c.get("unbiased", True) else 0)
    correction = 1 if correction is None else correction
    if not is_number(correction) or (shape is None and correction != 0):
        return None
    kept = None if shape is None else tuple(1 if axis in axes else extent for axis, extent in enumerate(shape))
    mean = Step(K.MEAN, [c["input"]], {"axes": axes, "keepdims": True}, suffix="mean", types=c.retype(kept))
    centred = Step(K.ADD, [c["input"], mean], {"scales": (1.0, -1.0)}, suffix="centred", types=c.retype(shape))
    squared = Step(K.MUL, [centred, centred], suffix="squared", types=c.retype(shape))
    attrs = {"axes": axes, "keepdims": bool(c.get("keepdim", False))}
    if correction == 0:
        return Step(K.MEAN, [squared], attrs)
    if known is None:
        return None
    count = math.prod(known[axis] for axis in axes)
    if count <= correction:
        return None
    return Step(K.MUL, [Step(K.MEAN, [squared], attrs, suffix="mean_squared"), count / (count - correction)])


def _with_mean(spread: Rule) -> Rule:
    """Two results, the variance or deviation and the mean"""

    def rule(c: Site) -> tuple[Step, ...] | None:
        found = spread(c)
        if not isinstance(found, Step):
            return None
        mean = _reduction(K.MEAN)(c)
        mean.types = c.outs[1:2]
        found.types = c.outs[:1]
        return found, mean

    return rule


def _deviation(c: Site) -> Step | None:
    variance = _spread(c)
    if variance is None:
        return None
    variance.suffix = "var"
    return Step(K.SQRT, [variance])


def _vector_norm(c: Site) -> Step | None:
    """√Σx²"""
    order = c.get("ord", c.get("p", 2))
    if not is_number(order) or order != 2 or c.get("dtype") is not None:
        return None
    squared = Step(K.MUL, [c["input"], c["input"]], suffix="squared", types=c.retype(c.shape()))
    attrs = {"axes": c.axes(c.get("dim")), "keepdims": bool(c.get("keepdim", False))}
    return Step(K.SQRT, [Step(K.SUM, [squared], attrs, suffix="sum")])


def _normalize(c: Site) -> Step | None:
    """x / max(‖x‖, eps)"""
    shape, dim = c.shape(), c.get("dim", 1)
    if c.get("p", 2.0) != 2 or shape is None or not isinstance(dim, int):
        return None
    axis = c.axis(dim)
    kept = c.retype((*shape[:axis], 1, *shape[axis + 1 :]))
    squared = Step(K.MUL, [c["input"], c["input"]], suffix="squared", types=c.retype(shape))
    total = Step(K.SUM, [squared], {"axes": (axis,), "keepdims": True}, suffix="sum", types=kept)
    length = Step(K.SQRT, [total], suffix="norm", types=kept)
    bounded = Step(K.CLIP, [length], {"min": c.get("eps", 1e-12), "max": None}, suffix="clamped", types=kept)
    return Step(K.DIV, [c["input"], bounded])


def _argmax(c: Site) -> Step:
    return Step(K.ARGMAX, [c["input"]], {"axes": c.axes(c.get("dim")), "keepdims": bool(c.get("keepdim", False))})


def _cumsum(c: Site) -> Step:
    return Step(K.CUMSUM, [c["input"]], {"axis": c.axis(c["dim"])})


REDUCE_RULES: dict[str, Rule] = {
    "mean": _reduction(K.MEAN),
    "sum": _reduction(K.SUM),
    "amax": _reduction(K.AMAX),
    "amin": _reduction(K.AMIN),
    "prod": _reduction(K.PROD),
    "max": _extreme(K.AMAX, K.MAXIMUM, K.ARGMAX),
    "min": _extreme(K.AMIN, K.MINIMUM, K.OPAQUE),
    "var": _spread,
    "std": _deviation,
    "var_mean": _with_mean(_spread),
    "std_mean": _with_mean(_deviation),
    **dict.fromkeys(("linalg_vector_norm", "norm"), _vector_norm),
    "normalize": _normalize,
    "argmax": _argmax,
    "cumsum": _cumsum,
}
