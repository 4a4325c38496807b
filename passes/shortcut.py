"""What a shortcut is made of: the skip, matched to the shape of the join, and the way in which it joins the branch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from rescompile.graph import Shape
from rescompile.kinds import OpKind as K
from rescompile.passes.geometry import Extent, Geometry, show
from rescompile.passes.layers import Place
from rescompile.passes.sketch import Made, Sketch, Term
from rescompile.plans import Refusal

Match: TypeAlias = Literal["pad", "projection", "always", "pool", "none"]
Norm: TypeAlias = Literal["auto", "batch", "layer", "none"]
Activation: TypeAlias = Literal["none", "relu"]

_GAINS = {"relu": 2.0**0.5, "linear": 1.0}


@dataclass(frozen=True, slots=True)
class Skip:
    """The skip's value, what it is ("identity", "projection", "pad", "pool"), and whether it starts as zero."""

    term: Term
    kind: str
    zero: bool = False


def matched(
    sketch: Sketch,
    source: Term,
    place: Place,
    geometry: Geometry,
    match: Match,
    norm: Norm = "none",
    activation: Activation = "none",
    *,
    zero: bool = False,
) -> Skip | Refusal:
    """The source, which is what stands at the fork, in the shape of the join. With `zero`, a projection starts as zero.

    pad         zero channels appended, positions by a strided view (He et al. 2015, option A)
    projection  a 1×1 contraction, strided, where shapes differ (option B)
    always      the same everywhere (option C)
    pool        average pool, then a 1×1 contraction where channels differ (He et al. 2019, ResNet-D)
    none        equal shapes only
    """
    width, target = _width(place.fork.shape, geometry), _width(place.join.shape, geometry)
    same = geometry.same_positions and width == target
    if same and match != "always":
        return Skip(source, "identity")
    if match == "none":
        return Refusal(place.name, f"the shapes differ ({_both(place)}), and match=none takes none but equal ones")
    if match == "pad" and width > target:
        why = f"the branch narrows {width} channels to {target} ({_both(place)})"
        return Refusal(place.name, f"{why}: zeros can only be appended; use a projection")
    if match == "pad" and not any(extent.factor > 1 for extent in geometry.extents):
        return Skip(_padded(sketch, _strided(sketch, source, place, geometry), geometry, target - width, place), "pad")
    if match in ("pad", "pool") or any(extent.factor > 1 for extent in geometry.extents):
        placed = resized(sketch, source, place, geometry, match)
        if isinstance(placed, Refusal):
            return placed
        if match == "pad":
            return Skip(_padded(sketch, placed.term, geometry, target - width, place), "pad")
        if width == target and match == "pool":
            return placed
        source, geometry = placed.term, level(geometry)
    zero = zero and activation == "none"  # behind a rectifier that is zero no gradient would come through
    normed = norm in ("batch", "layer")
    projected = project(sketch, source, place, geometry, zero=zero and not normed)
    if norm == "batch":
        projected = _batch_norm(sketch, projected, geometry, target, zero=zero)
    elif norm == "layer":
        projected = _layer_norm(sketch, projected, geometry, target, zero=zero)
    if activation == "relu":
        projected = sketch.op(K.RELU, projected, label="activation")
    return Skip(projected, "projection", zero)


def projects(place: Place, geometry: Geometry, match: Match) -> bool:
    """Whether the skip that `matched` makes holds a contraction."""
    if match in ("pad", "none"):
        return False
    same_width = _width(place.fork.shape, geometry) == _width(place.join.shape, geometry)
    return match == "always" or not (same_width and (match == "pool" or geometry.same_positions))


def averages(geometry: Geometry, match: Match) -> bool:
    """Whether the skip that `matched` makes pools or repeats elements."""
    return not geometry.same_positions and (match == "pool" or any(extent.factor > 1 for extent in geometry.extents))


def resized(sketch: Sketch, source: Term, place: Place, geometry: Geometry, match: Match) -> Skip | Refusal:
    """The source at the join's positions, with its own channels: pooled (match=pool), strided, or repeated."""
    if geometry.same_positions:
        return Skip(source, "identity")
    width = _width(place.fork.shape, geometry)
    if any(extent.factor > 1 for extent in geometry.extents):
        shape = _with_width(place.join.shape, geometry, width)
        enlarged = _as_images(sketch, source, geometry, shape, K.INTERPOLATE, mode="nearest")
        if enlarged is None:
            why = f"the branch enlarges its extents ({_both(place)})"
            return Refusal(place.name, f"{why}, and only images of one to three dimensions are matched")
        return Skip(enlarged, "pool")
    if match == "pool":
        pooled = _pooled(sketch, source, place, geometry)
        return pooled if isinstance(pooled, Refusal) else Skip(pooled, "pool")
    return Skip(_strided(sketch, source, place, geometry), "view")


def level(geometry: Geometry) -> Geometry:
    """The same channels, positions matched."""
    return Geometry(geometry.channel, (Extent(),) * len(geometry.extents))


def project(
    sketch: Sketch,
    term: Term,
    place: Place,
    geometry: Geometry,
    *,
    leaf: str = "projection",
    zero: bool = False,
    bias: float | None = None,
    recipe: str = "kaiming_normal",
) -> Made:
    """A 1×1 convolution, or a linear where channels come last, from the term to the join's channels and positions."""
    width, target = _width(term.shape, geometry), _width(place.join.shape, geometry)
    spatial = [axis for axis in range(len(term.shape or ())) if axis not in (0, geometry.channel)]
    convolved = geometry.channel == 1 and 1 <= len(spatial) <= 3
    ones = (1,) * len(spatial) if convolved else ()
    shape = (target, width, *ones)
    if zero:
        weight = sketch.parameter(f"{leaf}.weight", shape, "constant", value=0.0)
    elif recipe == "kaiming_normal":
        weight = sketch.parameter(f"{leaf}.weight", shape, recipe, fan_in=width, gain=_GAINS["linear"])
    else:
        weight = sketch.parameter(f"{leaf}.weight", shape, recipe)
    shift = None if bias is None else sketch.parameter(f"{leaf}.bias", (target,), "constant", value=bias)
    out = _with_width(place.join.shape, geometry, target)
    if not convolved:
        moved = _strided(sketch, term, place, geometry)
        return sketch.op(K.LINEAR, moved, weight, shift, shape=out, label=leaf, transpose_weight=True)
    stride = tuple(geometry.extents[axis].stride for axis in spatial)
    cropped = _strided(sketch, term, place, geometry, crop_only=True)
    attrs = {"stride": stride, "pads": (0,) * (2 * len(spatial)), "dilation": ones, "groups": 1}
    return sketch.op(K.CONV, cropped, weight, shift, shape=out, label=leaf, **attrs)


def per_channel(geometry: Geometry, rank: int, width: int) -> tuple[int, ...]:
    """The shape of a vector that multiplies channels: [C, 1, 1] for images, [C] where channels come last."""
    return (width, *(1,) * (rank - 1 - geometry.channel))


def _strided(sketch: Sketch, term: Term, place: Place, geometry: Geometry, *, crop_only: bool = False) -> Term:
    """[a : S − b : s] along every axis that the branch shortens; with `crop_only` without the stride."""
    axes, starts, stops, steps = [], [], [], []
    shape = list(term.shape or ())
    for axis, extent in enumerate(geometry.extents):
        stride = 1 if crop_only else extent.stride
        if axis == geometry.channel or (extent.lost == 0 and stride == 1):
            continue
        before = extent.lost // 2
        behind = extent.lost - before
        given = shape[axis]
        axes.append(axis)
        starts.append(before)
        stops.append(given - behind if isinstance(given, int) else -behind if behind else given)
        steps.append(stride)
        joined = (place.join.shape or ())[axis]
        shape[axis] = given - extent.lost if crop_only and isinstance(given, int) else joined
    if not axes:
        return term
    bounds: dict[str, Any] = {
        "axes": tuple(axes),
        "starts": tuple(starts),
        "stops": tuple(stops),
        "steps": tuple(steps),
    }
    return sketch.op(K.SLICE, term, shape=tuple(shape), **bounds)


def _padded(sketch: Sketch, term: Term, geometry: Geometry, more: int, place: Place) -> Term:
    if not more:
        return term
    rank = len(place.join.shape or ())
    pads = [0] * (2 * rank)
    pads[rank + geometry.channel] = more
    return sketch.op(K.PAD, term, shape=place.join.shape, pads=tuple(pads), mode="constant", value=0.0)


def _pooled(sketch: Sketch, term: Term, place: Place, geometry: Geometry) -> Term | Refusal:
    """Average pooling with the stride as its window, over what the branch's windows cover."""
    spatial = [axis for axis in range(len(place.join.shape or ())) if axis not in (0, geometry.channel)]
    changes = [geometry.extents[axis] for axis in spatial]
    ceil = any(change.lost != change.stride - 1 for change in changes)
    if ceil:  # with the border that the branch loses cut off, a last window that is not full counts
        term = _strided(sketch, term, place, geometry, crop_only=True)
    window = tuple(change.stride for change in changes)
    if set(window) == {1}:
        return term
    shape = _with_width(place.join.shape, geometry, _width(term.shape, geometry))
    pads = (0,) * (2 * len(window))
    attrs = {"kernel": window, "stride": window, "pads": pads, "ceil_mode": ceil, "count_include_pad": False}
    pooled = _as_images(sketch, term, geometry, shape, K.AVG_POOL, **attrs)
    if pooled is None:
        why = f"match=pool takes images of one to three dimensions ({_both(place)})"
        return Refusal(place.name, f"{why}: use a projection")
    return pooled


def _as_images(sketch: Sketch, term: Term, geometry: Geometry, shape: Shape, kind: K, **attrs: Any) -> Made | None:
    """The operation on [N, C, ...], with channels moved there and back where they come last; None for other layouts."""
    last = len(shape) - 1
    if not 2 <= last <= 4 or geometry.channel not in (1, last):
        return None
    if geometry.channel == 1:
        return sketch.op(kind, term, shape=shape, **attrs)
    to, back = (0, last, *range(1, last)), (0, *range(2, last + 1), 1)
    first = sketch.op(K.PERMUTE, term, shape=tuple((term.shape or ())[axis] for axis in to), perm=to)
    made = sketch.op(kind, first, shape=tuple(shape[axis] for axis in to), **attrs)
    return sketch.op(K.PERMUTE, made, shape=shape, perm=back)


def _both(place: Place) -> str:
    return f"{show(place.fork.shape)} at the fork, {show(place.join.shape)} at the join"


def _batch_norm(sketch: Sketch, term: Made, geometry: Geometry, width: int, *, zero: bool) -> Made:
    scale = sketch.parameter("norm.weight", (width,), "constant", value=0.0 if zero else 1.0)
    shift = sketch.parameter("norm.bias", (width,), "constant", value=0.0)
    mean = sketch.parameter("norm.running_mean", (width,), "constant", trainable=False, value=0.0)
    var = sketch.parameter("norm.running_var", (width,), "constant", trainable=False, value=1.0)
    training = sketch.graph.training
    return sketch.op(K.BATCH_NORM, term, scale, shift, mean, var, label="norm", eps=1e-5, training=training)


def _layer_norm(sketch: Sketch, term: Made, geometry: Geometry, width: int, *, zero: bool) -> Made:
    scale = sketch.parameter("norm.weight", (width,), "constant", value=0.0 if zero else 1.0)
    shift = sketch.parameter("norm.bias", (width,), "constant", value=0.0)
    axis = len(term.shape or ()) - 1
    return sketch.op(K.LAYER_NORM, term, scale, shift, label="norm", axis=axis, eps=1e-5)


def _width(shape: Shape | None, geometry: Geometry) -> int:
    width = (shape or ())[geometry.channel]
    assert isinstance(width, int)  # geometry() refuses symbolic widths
    return width


def _with_width(shape: Shape | None, geometry: Geometry, width: int) -> Shape:
    extents = list(shape or ())
    extents[geometry.channel] = width
    return tuple(extents)
