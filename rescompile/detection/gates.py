"""Gated sums: y = T·H + (1 − T)·x, x + T·(H − x), or T·H + C·x with gates T and C (highways, Srivastava et al. 2015).

Of several streams beside each other, C may be a matrix that each position makes for itself, to mix them by
(manifold-constrained hyper-connections, Xie et al. 2026).

A gate that does not depend on the inputs is a scale: with a constant t the second spelling is an `add` block.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from rescompile.detection.judgement import Draft, Judgement, Refusal
from rescompile.detection.paths import Chain, branch_works, chain
from rescompile.detection.reach import Reach
from rescompile.detection.recurrences import is_step
from rescompile.graph import Graph, Op, Value
from rescompile.kinds import OpKind, Trait

_PASSED = (OpKind.IDENTITY, OpKind.CAST)
_MADE_BY = 160  # operations between a matrix and the linear that it is made by: Sinkhorn's steps, at most
_LOOKED_AT = 24  # values behind a sum, until it is clear what becomes of it


@dataclass(frozen=True, slots=True)
class _Mix:
    skip_index: int
    x: Value
    new: Value
    gate: Value
    inner: tuple[Op, ...]  # sums that the spelling holds besides the last
    carry: Value | None = None  # a gate of its own on x


def gated_sum(judgement: Judgement, op: Op) -> Draft | Refusal | None:
    """A gated block (or, with a constant gate, an `add` block) that ends in the sum `op`; None when it is no mix.

    1. The sum mixes two values, x and H, by one gate, T and 1 − T; or by two, T and C, that are sigmoids.
    2. The way from the fork to x is free or a projection; the way to H, or to the one gate, works.
    3. Gates of their own come from the fork too, and the way to x is free; a matrix is made behind the fork: two parts
       of one linear, multiplied, are scores of an attention.
    4. It is no step of an unrolled recurrence.
    """
    if (nothing := cancelled(op)) is not None:
        return nothing
    if len(op.inputs) != 2 or op.scales != (1.0, 1.0):
        return None
    left, right = op.inputs
    if not (_is_product(left) or _is_product(right)):
        return None
    reach = judgement.reach
    best: tuple[Chain, _Mix, Value, list[Op], list[Value]] | None = None
    for mix in (*_differences(op), *(_convex(judgement.graph, op) or _carried(op)), *_mixed(op)):
        fork = reach.meet(mix.x, (mix.new,))
        way = None if fork is None else chain(reach, fork, mix.x)
        if fork is None or way is None or way.shortcut is None or way.sums:
            continue
        if best is not None and best[0].rank <= way.rank:
            continue
        gates = [gate for gate in (mix.gate, mix.carry) if gate is not None and not gate.constant]
        if mix.carry is not None and (
            way.rank > 1
            or not all(reach.comes_from(fork, gate) for gate in gates)
            or not branch_works(reach, reach.between(fork, [mix.new])[0])
            or (mix.carry is mix.gate and not branch_works(reach, reach.between(fork, [mix.gate])[0]))
        ):
            continue
        region, outside = reach.between(fork, [mix.new, *gates])
        if branch_works(reach, region):
            best = way, mix, fork, region, outside
    if best is None:
        return None
    way, mix, fork, region, outside = best
    if is_step(judgement, fork, region, outside):
        judgement.recurrences.add(op)
        return Refusal(f"unrolled recurrence: the steps on '{fork.name}' share their weights", fork)
    return Draft(
        kind="add" if mix.gate.constant else "gated",
        shortcut=way.shortcut or "identity",
        fork=fork,
        join_op=op,
        join_value=op.outputs[0],
        skip_index=mix.skip_index,
        branches=[mix.new],
        branch_ops=region,
        shortcut_ops=list(way.ops),
        outside=outside,
        join_ops=list(mix.inner),
    )


def only_weighs(judgement: Judgement, draft: Draft) -> bool:
    """Whether all that becomes of a sum is factors: it ends in a sigmoid that is multiplied, or in attention weights.

    W·x + U·y under a gate (GTrXL), content and position scores (Transformer-XL). Behind a convolution or a norm only
    a gate on the block's own fork counts (attention gates): a mask on anything else is what a network may compute.
    """
    pending: list[tuple[Value, bool, bool]] = [(draft.join_value, False, False)]  # is it a weight, was it mapped
    weighs = False
    for _ in range(_LOOKED_AT):
        if not pending:
            return weighs
        value, weight, mapped = pending.pop()
        if value in judgement.outputs:
            return False
        for user, index in value.uses:
            others = [operand for operand in user.operands if operand is not value and not operand.constant]
            if weight and others and user.kind in (OpKind.MUL, OpKind.MATMUL, OpKind.EINSUM):
                if mapped and not any(_same(other, draft.fork) for other in others):
                    return False
                weighs = True
                continue
            if others and user.kind is not OpKind.WHERE:
                return False
            known = user.kind in (OpKind.SIGMOID, OpKind.HARDSIGMOID, OpKind.SOFTMAX)
            maps = index == 0 and (user.kind in (OpKind.CONV, OpKind.LINEAR) or user.has(Trait.NORM))
            if not (known or maps or user.has(Trait.FREE) or user.has(Trait.ELEMENTWISE)) or (weight and maps):
                return False
            pending.extend((out, weight or known, mapped or maps) for out in user.outputs)
    return False


def reached_by_gates_only(reach: Reach, fork: Value, region: Iterable[Op], top: Value, through: bool = False) -> bool:
    """Whether what leads from the fork to `top` only weighs another stream on the way.

    `through`: follow the branches of the blocks in the region too, not their skips alone.
    """
    reached = {fork}
    for op in region:
        sources = reach.operands(op) if through else reach.sources(op.outputs[0])
        own = [value for value in sources if value in reached]
        rest = [value for value in sources if value not in reached and not value.constant]
        if op.kind is OpKind.MUL and rest and own and all(is_gate(value) for value in own):
            continue
        if own:
            reached.update(op.outputs)
    return top not in reached


def _same(value: Value, fork: Value) -> bool:
    """Whether a value is the fork, or moved from it."""
    while value is not fork:
        if value.producer is None or not value.producer.has(Trait.FREE):
            return False
        value = value.producer.operands[0]
    return True


def cancelled(op: Op) -> Refusal | None:
    """Why x + (h − x) ends no block: its value is h (a straight-through estimator, van den Oord et al. 2017)."""
    if len(op.inputs) != 2:
        return None
    for index, x in enumerate(op.inputs):
        other = op.inputs[1 - index]
        inner = None if other is None else other.producer
        while inner is not None and inner.kind in _PASSED:
            inner = inner.operands[0].producer
        if (
            x is None
            or inner is None
            or inner.kind is not OpKind.ADD
            or len(inner.inputs) != 2
            or x not in inner.inputs
        ):
            continue
        at = inner.inputs.index(x)
        if op.scales[index] == -op.scales[1 - index] * inner.scales[at]:
            return Refusal(f"cancels: '{x.name}' is added and subtracted, so the sum is no function of it", x)
    return None


def completes(op: Op) -> Op | None:
    """The sum that completes the mix, or the x + (h − x), in which `op` is the h − x; None when it is part of none."""
    product = _only_user(op.outputs[0])
    while product is not None and product.kind in _PASSED:
        product = _only_user(product.outputs[0])
    if product is not None and product.kind is OpKind.ADD and cancelled(product) is not None:
        return product
    total = None if product is None or product.kind is not OpKind.MUL else _only_user(product.outputs[0])
    if total is None or total.kind is not OpKind.ADD:
        return None
    return total if any(op in mix.inner for mix in _differences(total)) else None


def _differences(op: Op) -> Iterator[_Mix]:
    """x + t·(h − x)"""
    if len(op.inputs) != 2 or op.scales != (1.0, 1.0):
        return
    for index, x in enumerate(op.inputs):
        product = _producer(op.inputs[1 - index], OpKind.MUL)
        if x is None or product is None:
            continue
        for factor, gate in (product.inputs, product.inputs[::-1]):
            inner = _producer(factor, OpKind.ADD)
            if inner is None or gate is None or len(inner.inputs) != 2 or x not in inner.inputs:
                continue
            negative = inner.inputs.index(x)
            new = inner.inputs[1 - negative]
            if new is not None and inner.scales[negative] == -1.0 and inner.scales[1 - negative] == 1.0:
                yield _Mix(index, x, new, gate, (inner,))


def _convex(graph: Graph, op: Op) -> list[_Mix]:
    """t·h + (1 − t)·x, with either of them the shortcut"""
    products = [_producer(value, OpKind.MUL) for value in op.inputs]
    left, right = products
    if left is None or right is None:
        return []
    found: list[_Mix] = []
    for index, (first, second) in enumerate(((left, right), (right, left))):
        for x, rest in (first.inputs, first.inputs[::-1]):
            for new, gate in (second.inputs, second.inputs[::-1]):
                if x is None or new is None or rest is None or gate is None or gate.constant:
                    continue
                if _one_minus(graph, rest) is gate or _one_minus(graph, gate) is rest:
                    found.append(_Mix(index, x, new, gate, ()))
    return found


def _carried(op: Op) -> Iterator[_Mix]:
    """t·h + c·x with sigmoids t and c, with either of h and x the shortcut

    A product that something else reads too is a stream of its own, whose gate belongs to what made it (HGNet).
    """
    products = [_producer(value, OpKind.MUL) for value in op.inputs]
    left, right = products
    if left is None or right is None or any(len(product.output.uses) > 1 for product in (left, right)):
        return
    for index, (first, second) in enumerate(((left, right), (right, left))):
        for x, carry in (first.inputs, first.inputs[::-1]):
            for new, gate in (second.inputs, second.inputs[::-1]):
                if x is None or new is None or carry is None or gate is None:
                    continue
                if is_gate(carry) and is_gate(gate) and carry is not gate:
                    yield _Mix(index, x, new, gate, (), carry)


def _mixed(op: Op) -> Iterator[_Mix]:
    """H + C·x with a matrix C that a linear made"""
    for index, value in enumerate(op.inputs):
        product, new = _producer(value, OpKind.MATMUL), op.inputs[1 - index]
        for x, carry in (product.inputs, product.inputs[::-1]) if product is not None else ():
            if x is not None and carry is not None and new is not None and not carry.constant and _is_made(carry):
                yield _Mix(index, x, new, carry, (), carry)


def _is_made(value: Value) -> bool:
    """Whether a value is what a linear gave, element by element, normalised: no product of two, as scores are."""
    for _ in range(_MADE_BY):
        op = value.producer
        if op is None or op.kind is OpKind.LINEAR:
            return op is not None
        moving = [operand for operand in op.operands if not operand.constant]
        known = op.has(Trait.FREE) or op.has(Trait.ELEMENTWISE) or op.kind in (OpKind.SOFTMAX, OpKind.SPLIT)
        if not known or not moving or (len(moving) > 1 and op.kind is not OpKind.DIV):
            return False
        value = moving[0]
    return False


def is_gate(value: Value) -> bool:
    """Whether a value is a sigmoid's, or a part of one's."""
    op = value.producer
    while op is not None and op.has(Trait.FREE):
        op = op.operands[0].producer
    return op is not None and op.kind in (OpKind.SIGMOID, OpKind.HARDSIGMOID)


def _one_minus(graph: Graph, value: Value) -> Value | None:
    """`t`, where the value is 1 − t."""
    op = _producer(value, OpKind.ADD)
    if op is None or len(op.inputs) != 2:
        return None
    for index, one in enumerate(op.inputs):
        number = graph.scalar(one)
        if number is not None and number * op.scales[index] == 1.0 and op.scales[1 - index] == -1.0:
            return op.inputs[1 - index]
    return None


def _is_product(value: Value | None) -> bool:
    op = None if value is None else value.producer
    return op is not None and (op.kind is OpKind.MUL or op.kind is OpKind.MATMUL)


def _producer(value: Value | None, kind: OpKind) -> Op | None:
    op = None if value is None else value.producer
    return op if op is not None and op.kind is kind else None


def _only_user(value: Value) -> Op | None:
    return next(iter(value.uses))[0] if len(value.uses) == 1 else None


def only_measured(judgement: Judgement, op: Op) -> bool:
    """Whether a difference is only squared (or made absolute) and summed up: a distance, such as a loss, no stream."""
    difference = op.outputs[0]
    if -1.0 not in op.attrs.get("scales", ()) or difference in judgement.outputs:
        return False
    sizes = []
    for user in difference.users:
        squares = user.kind is OpKind.MUL and set(user.inputs) == {difference}
        squares = squares or (user.kind is OpKind.POW and judgement.graph.scalar(user.inputs[1]) == 2.0)
        if squares or user.kind is OpKind.ABS:
            sizes.append(user.output)
        elif user.kind is not OpKind.ADD or cancelled(user) is None:
            return False
    summed = (OpKind.MEAN, OpKind.SUM)
    return bool(sizes) and all(size.uses and all(user.kind in summed for user in size.users) for size in sizes)
