"""How a skip joins a branch, for each kind of residual connection, and what the network computes at the start.

start       y = F(x) + s(x) becomes                        the network computes at first
preserve    F(x) + g·s(x), g = 0, or a projection s = 0    what it did before, to the bit
residual    F(x) + s(x)                                    another function; for training from scratch
rezero      s(x) + α·F(x), α = 0                           the skips alone (Bachlechner et al. 2020)
skipinit    the same (De and Smith 2020)
layerscale  s(x) + γ⊙F(x), γ small                         nearly the skips alone (Touvron et al. 2021)
fixup       s(x) + a·F′(x) + b, F′ rescaled, its last 0    the skips alone (see `passes.fixup`)
highway     T⊙F(x) + (1 − T)⊙s(x), T = σ(W·x + b), b < 0    mostly the skips (Srivastava et al. 2015); kind=gated only

A gated connection that preserves has 1 − T = g·σ(W·x − b) with g = 0; a dense one, whose 1×1 contraction takes
[s(x), F(x)] back to the width of F(x), starts that contraction as [0 | I].
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeAlias

from rescompile.graph import Value
from rescompile.kinds import OpKind as K
from rescompile.passes import fixup
from rescompile.passes.geometry import Geometry, show
from rescompile.passes.layers import Place
from rescompile.passes.shortcut import (
    Activation,
    Match,
    Norm,
    Skip,
    level,
    matched,
    per_channel,
    project,
    projects,
    resized,
)
from rescompile.passes.sketch import Made, Sketch, Term
from rescompile.plans import Refusal

Kind: TypeAlias = Literal["add", "gated", "dense", "long"]
Combine: TypeAlias = Literal["concat", "add"]
Start: TypeAlias = Literal["preserve", "residual", "rezero", "skipinit", "layerscale", "fixup", "highway"]


@dataclass(frozen=True, slots=True)
class Settings:
    """Options of the pass that concern one shortcut. `depth`: how many the network gets; `forks`: where they start."""

    match: Match
    norm: Norm
    activation: Activation
    start: Start
    gate_bias: float
    combine: Combine
    depth: int
    forks: frozenset[Value]


@dataclass(frozen=True, slots=True)
class Mixed:
    """The joined value, its equation, and what the skip turned out to be."""

    result: Made
    equation: str
    shortcut: str


# The term is what stands at the fork: its value, or what an earlier shortcut that ends there made of it.
Mix: TypeAlias = Callable[[Sketch, Term, Place, Geometry, Settings], Mixed | Refusal]


def add(sketch: Sketch, source: Term, place: Place, lie: Geometry, settings: Settings) -> Mixed | Refusal:
    """y = F(x)  →  y = F(x) + s(x)"""
    start = settings.start
    if start == "highway":
        return Refusal(place.name, "start=highway is for gated connections: give kind=gated too, or another start")
    branch: Term = place.join
    if start == "fixup":
        refused = fixup.unfit(sketch, place)
        if refused is not None:
            return refused
        projected, last = projects(place, lie, settings.match), place.join not in settings.forks
        source, branch = fixup.start(sketch, source, place, settings.depth, projected=projected, last=last)
    skip = matched(
        sketch, source, place, lie, settings.match, settings.norm, settings.activation, zero=start == "preserve"
    )
    if isinstance(skip, Refusal):
        return skip
    equation = {"identity": "x", "projection": "P(x)", "pad": "pad(x)", "pool": "pool(x)"}[skip.kind]
    scaled = "F(x)"
    term = skip.term
    if start == "preserve" and not skip.zero:
        gate = sketch.parameter("gate", (), "constant", value=0.0)
        term = sketch.op(K.MUL, skip.term, gate, label="gated")
        equation = f"g·{equation}"
    elif start in ("rezero", "skipinit"):
        alpha = sketch.parameter("alpha", (), "constant", value=0.0)
        branch = sketch.op(K.MUL, place.join, alpha, label="scaled")
        scaled = "α·F(x)"
    elif start == "layerscale":
        shape = place.join.shape or ()
        width = shape[lie.channel]
        assert isinstance(width, int)  # geometry() refuses symbolic widths
        gamma = sketch.parameter(
            "gamma", per_channel(lie, len(shape), width), "constant", value=_layer_scale(settings.depth)
        )
        branch = sketch.op(K.MUL, place.join, gamma, label="scaled")
        scaled = "γ⊙F(x)"
    elif start == "fixup":
        scaled = "a·F′(x) + b"
    total = sketch.op(K.ADD, branch, term, label="sum")
    return Mixed(total, f"y = F(x)  →  y = {scaled} + {equation}", skip.kind)


def gated(sketch: Sketch, source: Term, place: Place, lie: Geometry, settings: Settings) -> Mixed | Refusal:
    """y = F(x)  →  y = T⊙F(x) + (1 − T)⊙s(x),  T = σ(W·x + b), b < 0: a highway network"""
    if settings.start not in ("preserve", "highway", "residual"):
        return Refusal(place.name, f"start={settings.start} scales a plain sum: a gated connection starts as highway")
    if any(extent.factor > 1 for extent in lie.extents):  # the gate's contraction cannot enlarge, a repetition can
        placed = _positions_only(sketch, source, place, lie, settings)
        if isinstance(placed, Refusal):
            return placed
        source, lie = placed.term, level(lie)
    skip = matched(sketch, source, place, lie, settings.match, "none")
    if isinstance(skip, Refusal):
        return skip
    one = sketch.literal(1.0)
    if settings.start == "preserve":
        logits = project(sketch, source, place, lie, leaf="gate", bias=-settings.gate_bias)
        opening = sketch.parameter("opening", (), "constant", value=0.0)
        carry = sketch.op(K.MUL, sketch.op(K.SIGMOID, logits, label="gate"), opening, label="carry")
        transform = sketch.op(K.ADD, one, carry, label="transform", scales=(1.0, -1.0))
        equation = "y = (1 − C)⊙F(x) + C⊙s(x),  C = g·σ(W·x + b)"
    else:
        logits = project(sketch, source, place, lie, leaf="gate", bias=settings.gate_bias)
        transform = sketch.op(K.SIGMOID, logits, label="transform")
        carry = sketch.op(K.ADD, one, transform, label="carry", scales=(1.0, -1.0))
        equation = "y = T⊙F(x) + (1 − T)⊙s(x),  T = σ(W·x + b)"
    new = sketch.op(K.MUL, place.join, transform, label="new")
    old = sketch.op(K.MUL, skip.term, carry, label="carried")
    total = sketch.op(K.ADD, new, old, label="mix")
    return Mixed(total, f"y = F(x)  →  {equation}", skip.kind)


def dense(sketch: Sketch, source: Term, place: Place, lie: Geometry, settings: Settings) -> Mixed | Refusal:
    """y = F(x)  →  y = W·[s(x), F(x)], W a 1×1 contraction back to the width of F(x)"""
    if settings.start not in ("preserve", "residual"):
        return Refusal(place.name, f"start={settings.start} scales a plain sum: a dense connection has none")
    fork_width, width = (place.fork.shape or ())[lie.channel], (place.join.shape or ())[lie.channel]
    assert isinstance(fork_width, int)  # geometry() refuses symbolic widths
    assert isinstance(width, int)
    skip = _positions_only(sketch, source, place, lie, settings)
    if isinstance(skip, Refusal):
        return skip
    shape = list(place.join.shape or ())
    shape[lie.channel] = fork_width + width
    together = sketch.op(K.CONCAT, skip.term, place.join, shape=tuple(shape), label="concat", axis=lie.channel)
    recipe = "select_last" if settings.start == "preserve" else "kaiming_normal"
    result = project(sketch, together, place, level(lie), leaf="transition", recipe=recipe)
    return Mixed(result, "y = F(x)  →  y = W·[s(x), F(x)]", skip.kind)


def _positions_only(sketch: Sketch, source: Term, place: Place, lie: Geometry, settings: Settings) -> Skip | Refusal:
    """The fork at the join's positions, with its own channels."""
    if lie.same_positions:
        return Skip(source, "identity")
    if settings.match == "none":
        shapes = f"{show(place.fork.shape)} at the fork, {show(place.join.shape)} at the join"
        return Refusal(place.name, f"the positions differ ({shapes}), and match=none takes none but equal shapes")
    return resized(sketch, source, place, lie, settings.match)


def _layer_scale(depth: int) -> float:
    """Touvron et al. 2021, section 2: 0.1 up to 18 blocks, 1e-5 up to 24, 1e-6 beyond."""
    return 0.1 if depth <= 18 else 1e-5 if depth <= 24 else 1e-6


def long(sketch: Sketch, source: Term, place: Place, lie: Geometry, settings: Settings) -> Mixed | Refusal:
    """u  →  u + s(x) or W·[s(x), u], from the way down to the way up (Ronneberger et al. 2015 concatenate)"""
    return (dense if settings.combine == "concat" else add)(sketch, source, place, lie, settings)


MIXES: dict[Kind, Mix] = {"add": add, "gated": gated, "dense": dense, "long": long}
