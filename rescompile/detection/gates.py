"""Gated sums: y = T·H + (1 − T)·x, or x + T·(H − x) (highway networks, Srivastava et al. 2015).

A gate that does not depend on the inputs is a scale: with a constant t the second spelling is an `add` block.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from rescompile.detection.judgement import Draft, Judgement, Refusal
from rescompile.detection.paths import Chain, branch_works, chain
from rescompile.graph import Graph, Op, Value
from rescompile.kinds import OpKind


@dataclass(frozen=True, slots=True)
class _Mix:
    skip_index: int
    x: Value
    new: Value
    gate: Value
    inner: tuple[Op, ...]  # sums that the spelling holds besides the last


def gated_sum(judgement: Judgement, op: Op) -> Draft | None:
    """A gated block (or, with a constant gate, an `add` block) that ends in the sum `op`; None when it is no mix.

    1. The sum mixes two values, x and H, by one gate, T and 1 − T.
    2. The way from the fork to x is free or a projection; the way to H, or to the gate, works.
    """
    if len(op.inputs) != 2 or not any(_producer(value, OpKind.MUL) for value in op.inputs) or op.scales != (1.0, 1.0):
        return None
    reach = judgement.reach
    best: tuple[Chain, _Mix, Value, list[Op], list[Value]] | None = None
    for mix in (*_differences(op), *_convex(judgement.graph, op)):
        fork = reach.meet(mix.x, (mix.new,))
        way = None if fork is None else chain(reach, fork, mix.x)
        if fork is None or way is None or way.shortcut is None or way.sums:
            continue
        if best is not None and best[0].rank <= way.rank:
            continue
        region, outside = reach.between(fork, [mix.new] if mix.gate.constant else [mix.new, mix.gate])
        if branch_works(reach, region):
            best = way, mix, fork, region, outside
    if best is None:
        return None
    way, mix, fork, region, outside = best
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


def straight_through(judgement: Judgement, op: Op) -> Refusal | None:
    """x + (h − x) is h: the sum takes away again what it adds (van den Oord et al. 2017); None when it does not."""
    inner = _taken_back(op)
    if inner is None:
        return None
    return Refusal(f"cancels: '{inner.name}' took away what the sum adds (a straight-through estimator)")


def _taken_back(op: Op) -> Op | None:
    """The h − x of the sum x + (h − x)."""
    if len(op.inputs) != 2 or op.scales != (1.0, 1.0):
        return None
    for x, other in (op.inputs, op.inputs[::-1]):
        inner = None if other is None else other.producer
        while inner is not None and inner.kind in (OpKind.IDENTITY, OpKind.CAST):
            inner = inner.operands[0].producer
        if inner is None or inner.kind is not OpKind.ADD or len(inner.inputs) != 2:
            continue
        if any(value is x and scale == -1.0 for value, scale in zip(inner.inputs, inner.scales, strict=True)):
            return inner
    return None


def completes(op: Op) -> Op | None:
    """The sum that completes the mix, or the x + (h − x), in which `op` is the h − x; None when it is part of none."""
    product = _only_user(op.outputs[0])
    while product is not None and product.kind in (OpKind.IDENTITY, OpKind.CAST):
        product = _only_user(product.outputs[0])
    if product is not None and product.kind is OpKind.ADD and _taken_back(product) is op:
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


def _convex(graph: Graph, op: Op) -> Iterator[_Mix]:
    """t·h + (1 − t)·x, with either of them the shortcut"""
    products = [_producer(value, OpKind.MUL) for value in op.inputs]
    left, right = products
    if left is None or right is None:
        return
    for index, (first, second) in enumerate(((left, right), (right, left))):
        for x, rest in (first.inputs, first.inputs[::-1]):
            for new, gate in (second.inputs, second.inputs[::-1]):
                if x is None or new is None or rest is None or gate is None or gate.constant:
                    continue
                if _one_minus(graph, rest) is gate or _one_minus(graph, gate) is rest:
                    yield _Mix(index, x, new, gate, ())


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


def _producer(value: Value | None, kind: OpKind) -> Op | None:
    op = None if value is None else value.producer
    return op if op is not None and op.kind is kind else None


def _only_user(value: Value) -> Op | None:
    return next(iter(value.uses))[0] if len(value.uses) == 1 else None
