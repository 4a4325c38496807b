"""Activations that exporters write as arithmetic around one transcendental operation t.

    GELU      y = x/2 + x·t/2,   t = erf(x/√2)  or  t = tanh(√(2/π)·(x + 0.044715·x³))
    SiLU      y = x·t,           t = sigmoid(x)
    Mish      y = x·t,           t = tanh(softplus(x))
    HardSigmoid y = a·t, HardSwish y = a·x·t,   t = clip(p·x + q, 0, 1/a)

Spellings differ in the order of factors and in where constants are multiplied in, so both sides are expanded to
polynomials, t's operand in x and y in x and t, and compared by coefficients.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from rescompile.composites.region import Recogniser, close
from rescompile.graph import Attrs, Op, Value
from rescompile.kinds import OpKind

Monomial = tuple[int, int]  # the powers of x and of t
Polynomial = dict[Monomial, float]

_X: Polynomial = {(1, 0): 1.0}
_GATED: Polynomial = {(1, 1): 1.0}
_HALF_GATED: Polynomial = {(1, 0): 0.5, (1, 1): 0.5}
_TANH_SCALE = math.sqrt(2.0 / math.pi)

# anchor kind → (what t's operand is, what y is, the composite, its attributes)
_SPELLINGS: dict[OpKind, tuple[Polynomial, Polynomial, OpKind, Attrs]] = {
    OpKind.ERF: ({(1, 0): math.sqrt(0.5)}, _HALF_GATED, OpKind.GELU, {"approximate": "none"}),
    OpKind.TANH: (
        {(1, 0): _TANH_SCALE, (3, 0): _TANH_SCALE * 0.044715},
        _HALF_GATED,
        OpKind.GELU,
        {"approximate": "tanh"},
    ),
    OpKind.SIGMOID: (_X, _GATED, OpKind.SILU, {}),
}
_ARITHMETIC = (OpKind.MUL, OpKind.DIV, OpKind.ADD, OpKind.POW, OpKind.NEG, OpKind.IDENTITY)
_MAX_STEPS = 8  # operations between x and t, or between t and y, in the longest spelling


def activation(recogniser: Recogniser, anchor: Op) -> Op | None:
    """The activation in the place of the region around `anchor`; None when the arithmetic is not that of one."""
    operand = anchor.operands[0]
    if anchor.kind is OpKind.CLIP:
        return _hard(recogniser, anchor, operand)
    if anchor.kind is OpKind.HARDSIGMOID:
        if close(anchor.attr("alpha"), 1.0 / 6.0) and close(anchor.attr("beta"), 0.5):
            return _gate(recogniser, [anchor], operand, anchor.output, {OpKind.HARDSWISH: _equals(_GATED)})
        return None
    producer = operand.producer
    if anchor.kind is OpKind.TANH and producer is not None and producer.kind is OpKind.SOFTPLUS:
        x = producer.operands[0]
        return _gate(recogniser, [anchor, producer], x, anchor.output, {OpKind.MISH: _equals(_GATED)})
    inner, outer, kind, attrs = _SPELLINGS[anchor.kind]
    found = _argument(recogniser, operand, inner)
    if found is None:
        return None
    x, ops = found
    return _gate(recogniser, [anchor, *ops], x, anchor.output, {kind: _equals(outer)}, attrs)


def _hard(recogniser: Recogniser, anchor: Op, operand: Value) -> Op | None:
    low, high = anchor.attr("min"), anchor.attr("max")
    if low != 0.0 or high is None or high <= 0.0:
        return None
    for x, ops in _candidates(operand):
        line = _expand(recogniser, operand, {x: (1, 0)}, set())
        if line is None or not line.keys() <= {(1, 0), (0, 0)}:
            continue
        slope, offset = line.get((1, 0), 0.0), line.get((0, 0), 0.0)
        if slope <= 0.0 or offset == 0.0:
            continue

        wanted = {OpKind.HARDSIGMOID: _equals({(0, 1): 1.0 / high})}
        if close(slope / high, 1.0 / 6.0) and close(offset / high, 0.5):
            wanted[OpKind.HARDSWISH] = _equals({(1, 1): 1.0 / high})
        attrs = {"alpha": slope / high, "beta": offset / high}
        return _gate(recogniser, [anchor, *ops], x, anchor.output, wanted, attrs)
    return None


def _equals(target: Polynomial) -> Callable[[Polynomial], bool]:
    return lambda y: y.keys() == target.keys() and all(close(y[power], factor) for power, factor in target.items())


def _argument(recogniser: Recogniser, operand: Value, inner: Polynomial) -> tuple[Value, list[Op]] | None:
    """The x for which `operand` is the polynomial `inner`, and the operations that compute it."""
    equal = _equals(inner)
    for x, ops in _candidates(operand):
        expanded = _expand(recogniser, operand, {x: (1, 0)}, set())
        if expanded is not None and equal(expanded):
            return x, ops
    return None


def _candidates(value: Value) -> list[tuple[Value, list[Op]]]:
    """Every value that all of `value`'s arithmetic goes through, nearest first, with the arithmetic in between."""
    found: list[tuple[Value, list[Op]]] = [(value, [])]
    frontier: dict[Value, None] = {value: None}
    ops: list[Op] = []
    for _ in range(_MAX_STEPS):
        latest = max(frontier, key=lambda value: -1 if value.producer is None else value.producer.order)
        op = latest.producer
        if op is None or op.kind not in _ARITHMETIC:
            break
        del frontier[latest]
        ops.append(op)
        frontier.update((operand, None) for operand in op.operands if not operand.constant)
        if not frontier:
            break
        if len(frontier) == 1:
            found.append((next(iter(frontier)), list(ops)))
    return found


def _gate(
    recogniser: Recogniser,
    ops: list[Op],
    x: Value,
    t: Value,
    wanted: Mapping[OpKind, Callable[[Polynomial], bool]],
    attrs: Attrs | None = None,
) -> Op | None:
    """Walk from t to its readers as long as they are arithmetic; cover up to the furthest y that is wanted."""
    value, best = t, None
    for _ in range(_MAX_STEPS):
        user = recogniser.only_user(value)
        if user is None or user.kind not in _ARITHMETIC:
            break
        value = user.output
        inner: set[Op] = set()
        y = _expand(recogniser, value, {x: (1, 0), t: (0, 1)}, inner)
        if y is None:
            continue
        kind = next((kind for kind, wants in wanted.items() if wants(y)), None)
        if kind is not None and (x.shape is None or value.shape is None or x.shape == value.shape):
            best = (kind, inner, value)
    if best is None:
        return None
    kind, inner, value = best
    keep = {name: number for name, number in (attrs or {}).items() if name in kind.spec.attrs}
    return recogniser.cover([*ops, *inner], kind, [x], value, keep)


def _expand(recogniser: Recogniser, value: Value, atoms: Mapping[Value, Monomial], ops: set[Op]) -> Polynomial | None:
    """The value as a polynomial of the atoms, None when it is none or a long one; collects the operations."""
    if value in atoms:
        return {atoms[value]: 1.0}
    number = recogniser.scalar(value)
    if number is not None:
        return {(0, 0): number}
    op = value.producer
    if op is None or op.kind not in _ARITHMETIC or len(ops) > 2 * _MAX_STEPS:
        return None
    ops.add(op)
    if op.kind is OpKind.POW:
        exponent = recogniser.scalar(op.inputs[1])
        base = _expand(recogniser, op.operands[0], atoms, ops)
        if base is None or exponent not in (1.0, 2.0, 3.0):
            return None
        power = base
        for _ in range(int(exponent) - 1):
            power = _times(power, base)
        return power
    terms = []
    for operand in op.operands:
        term = _expand(recogniser, operand, atoms, ops)
        if term is None:
            return None
        terms.append(term)
    if op.kind is OpKind.ADD:
        total: Polynomial = {}
        for factor, term in zip(op.scales, terms, strict=True):
            for monomial, number in term.items():
                total[monomial] = total.get(monomial, 0.0) + factor * number
        return total
    if op.kind is OpKind.MUL:
        return _times(terms[0], terms[1])
    if op.kind is OpKind.DIV:
        divisor = terms[1]
        if divisor.keys() != {(0, 0)} or divisor[0, 0] == 0.0:
            return None
        return _times(terms[0], {(0, 0): 1.0 / divisor[0, 0]})
    return _times(terms[0], {(0, 0): -1.0 if op.kind is OpKind.NEG else 1.0})


def _times(a: Polynomial, b: Polynomial) -> Polynomial:
    product: Polynomial = {}
    for (xa, ta), left in a.items():
        for (xb, tb), right in b.items():
            product[xa + xb, ta + tb] = product.get((xa + xb, ta + tb), 0.0) + left * right
    return product
