"""From the sum of squares to the quotient: what every spelling of a norm does with its statistic.

    y = g·d / (s·√(f·mean(d²) + eps) + outside)      at least `floor`

`root_of` walks from the mean, or the sum, of the squares down to the quotient and keeps account of the factors, so that
√(Σd²/n), ‖d‖·n^(−1/2) and std·√(n/(n−1)) are told apart by number and not by spelling.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import prod

from rescompile.composites.region import Recogniser, close
from rescompile.graph import Op, Shape, Value
from rescompile.kinds import OpKind

_MAX_STEPS = 10
_SAME = (OpKind.CAST, OpKind.IDENTITY)


@dataclass(slots=True)
class Root:
    """What divides d, and the operations that compute it. `factor`: what multiplies the mean of the squares."""

    factor: float | None  # None: a sum over an unknown number of elements
    eps: float = 0.0
    bounded: bool = False  # something is added to the root, or it is kept above a bound
    centred: Op | None = None  # the sum that turns the mean of squares into E[x²] − E[x]²
    ops: list[Op] = field(default_factory=list)
    weights: list[Value] = field(default_factory=list)  # constants that multiply the quotient on the way
    numerator: Value | None = None
    output: Value | None = None

    @property
    def exact(self) -> bool:
        """Whether the divisor is √(mean(d²) + eps)."""
        return self.factor is not None and close(self.factor, 1.0) and not self.bounded


def kept(shape: Shape | None, axes: tuple[int, ...]) -> Shape | None:
    """The shape with the axes reduced to 1."""
    if shape is None:
        return None
    reduced = {axis % len(shape) for axis in axes}
    return tuple(1 if axis in reduced else extent for axis, extent in enumerate(shape))


def count(shape: Shape | None, axes: tuple[int, ...]) -> int | None:
    """Number of elements along the axes, None when an extent is unknown."""
    extents = [None] if shape is None else [shape[axis] for axis in axes]
    known = [extent for extent in extents if isinstance(extent, int)]
    return prod(known) if len(known) == len(extents) else None


def root_of(recogniser: Recogniser, reduction: Op) -> Root | None:
    """The root and the quotient below a mean or sum of squares; None where the statistic goes anywhere else."""
    axes, shape = tuple(reduction.attr("axes")), reduction.operands[0].shape
    size = count(shape, axes)
    root = Root(1.0 if reduction.kind is OpKind.MEAN else None if size is None else float(size))
    value = reduction.output
    aligned = bool(reduction.attr("keepdims"))
    rooted = inverse = False
    while len(root.ops) < _MAX_STEPS and (user := recogniser.only_user(value)) is not None:
        root.ops.append(user)
        kind = user.kind
        number = _other_number(recogniser, user, value)
        if kind in (OpKind.RESHAPE, OpKind.EXPAND):
            aligned = aligned or user.output.shape == kept(shape, axes)
            if not aligned:
                return None
        elif kind is OpKind.ADD and len(user.inputs) == 2 and not inverse:
            if not _shift(root, user, value, number, rooted):
                return None
        elif kind in (OpKind.SQRT, OpKind.RSQRT) and not rooted:
            rooted, inverse = True, kind is OpKind.RSQRT
        elif kind is OpKind.POW and not rooted and user.inputs[0] is value and number in (0.5, -0.5):
            rooted, inverse = True, number < 0
        elif (kind is OpKind.CLIP and user.attr("max") is None) or (kind is OpKind.MAXIMUM and number is not None):
            root.bounded = True
        elif rooted and not inverse and _is_reciprocal(recogniser, user):
            inverse = True
        elif (
            kind in (OpKind.MUL, OpKind.DIV)
            and number is not None
            and not (kind is OpKind.DIV and _is_divisor(user, value))
        ):
            _multiply(root, number if kind is OpKind.MUL else 1.0 / number if number else 0.0, rooted, inverse)
        elif rooted and kind is (OpKind.MUL if inverse else OpKind.DIV):
            other = _other(user, value)
            if other is None or other is value or (kind is OpKind.DIV and not _is_divisor(user, value)):
                return None
            if not other.constant:
                root.numerator, root.output = other, user.output
                return root if aligned else None
            root.weights.append(other)
            inverse = True
        elif kind not in _SAME:
            return None
        value = user.output
    return None


def _shift(root: Root, op: Op, value: Value, number: float | None, rooted: bool) -> bool:
    """Take account of an addition on the way; False when it is neither an epsilon nor minus the mean's square."""
    if number is None:
        if rooted or root.centred is not None or op.scales != (1.0, -1.0) or op.inputs[0] is not value:
            return False
        root.centred = op
        return True
    if op.scales != (1.0, 1.0):
        return False
    root.eps += 0.0 if rooted else number
    root.bounded = root.bounded or rooted
    return True


def _multiply(root: Root, number: float, rooted: bool, inverse: bool) -> None:
    by = number if not rooted else 1.0 / number**2 if inverse and number else number**2
    root.factor = None if root.factor is None else root.factor * by
    root.eps *= by


def _other(op: Op, value: Value) -> Value | None:
    first, second = op.inputs[:2]
    return second if first is value else first


def _is_divisor(op: Op, value: Value) -> bool:
    return op.inputs[1] is value


def _other_number(recogniser: Recogniser, op: Op, value: Value) -> float | None:
    return recogniser.scalar(_other(op, value)) if len(op.inputs) == 2 else None


def _is_reciprocal(recogniser: Recogniser, op: Op) -> bool:
    if op.kind is OpKind.DIV:
        return close(recogniser.scalar(op.inputs[0]), 1.0)
    return op.kind is OpKind.RECIPROCAL
