"""Fixup (Zhang, Dauphin and Ma 2019, "Fixup Initialization: Residual Learning Without Normalization", section 4).

y = F(x)  →  y = s(x) + a·F′(x) + b, for L branches of m layers each:

1. The last layer of each branch starts at zero, its bias too, so that the skips alone are left at first. (The paper
   starts the classifier at zero as well; it lies in no branch and is left as it is.)
2. The weights of the others are scaled by L^(−1/(2m−2)).
3. Each branch ends in a scalar multiplier a, which starts at 1. A scalar bias, which starts at 0, stands in front of
   each convolution, each linear and each activation, the one that reads the join among them.

The biases are called as in the authors' code: bias1a is in front of the first layer, bias1b of its activation. A
projection on the skip reads what the first layer reads, with bias1a.
"""

from __future__ import annotations

from rescompile.graph import Op, Value
from rescompile.kinds import OpKind as K
from rescompile.kinds import Trait
from rescompile.passes.layers import Place
from rescompile.passes.sketch import Made, Sketch, Term
from rescompile.plans import Refusal

_LAYERS = (K.CONV, K.LINEAR, K.CONV_TRANSPOSE)


def unfit(sketch: Sketch, place: Place) -> Refusal | None:
    """Why a branch cannot start as the paper says."""
    if any(op.has(Trait.NORM) for op in place.ops):
        return Refusal(place.name, "start=fixup is for networks without norms, and the branch holds one")
    others = [op for op in place.ops if op.has(Trait.PARAMETRIC) and not op.has(Trait.ACTIVATION) and not _weights(op)]
    work = [op for op in place.ops if op.kind in _LAYERS]
    if others or not work:
        return Refusal(place.name, "start=fixup rescales convolutions and linears, and the branch holds others")
    bias = work[-1].operand("bias")
    if bias is not None and len(bias.users) > 1 and sketch.graph.data(bias).any():
        return Refusal(place.name, f"start=fixup needs a bias of zeros, and '{bias.name}' belongs to other layers too")
    return None


def start(sketch: Sketch, source: Term, place: Place, depth: int, *, projected: bool, last: bool) -> tuple[Term, Made]:
    """Rescale and shift the branch. What the skip is to read, biased where it is `projected`, and a·F′(x) + b.

    `last`: no other branch starts at the join, so that the bias of an activation that reads it belongs to this one.
    """
    work = [op for op in place.ops if op.kind in _LAYERS]
    factor = depth ** (-1.0 / (2 * len(work) - 2)) if len(work) > 1 else 1.0
    for op in work[:-1]:
        sketch.rescale(_weights(op)[0], factor)
    for value in _weights(work[-1]):
        sketch.rescale(value, 0.0)
    biased: dict[tuple[Value, str], Made] = {}  # what the layers of a region read alike is shifted once
    number = 0
    for op in place.ops:
        layer = op in work
        if not layer and not op.has(Trait.ACTIVATION):
            continue
        number += layer
        read = op.operands[0]
        letter = "a" if layer else "b"
        if (read, letter) not in biased:
            biased[read, letter] = _shifted(sketch, source if read is place.fork else read, f"bias{number}{letter}")
        sketch.let_read(op, biased[read, letter])
    skip = source
    if projected:
        skip = biased.get((place.fork, "a")) or _shifted(sketch, source, "bias0a")
    multiplier = sketch.parameter("scale", (), "constant", value=1.0)
    branch = sketch.op(K.MUL, place.join, multiplier, label="scaled")
    if last and any(user.has(Trait.ACTIVATION) for user in place.join.users):
        branch = _shifted(sketch, branch, f"bias{number}b")
    return skip, branch


def _shifted(sketch: Sketch, term: Term, leaf: str) -> Made:
    bias = sketch.parameter(leaf, (), "constant", value=0.0)
    return sketch.op(K.ADD, term, bias, label=leaf)


def _weights(op: Op) -> list[Value]:
    """Weight and bias of a layer; none where the layer's weight is computed by the model itself."""
    if op.kind not in _LAYERS:
        return []
    found = [op.operand("weight"), op.operand("bias")]
    stored = [value for value in found if value is not None]
    return stored if all(value.producer is None for value in stored) else []
