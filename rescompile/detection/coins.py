"""Stochastic depth by control flow: y = (x + F(x) if b else x), or y = x + (F(x) if b else 0), b a coin.

1. An operation holds two graphs with as many outputs each; what decides between them is read by neither.
2. It is a coin: made of random numbers and constants alone, or one number that the model is given for conditions only.
3. An output of one graph is a block's, an activation or a norm behind it included, and the other graph returns what the
   block starts from; or the outputs of one graph are zeros, and the operation is in the branch of a block.

A condition on the data itself is no coin: which layers run then is computed (SkipNet, Wang et al. 2018).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from msgspec.structs import replace

from rescompile.blocks import Block
from rescompile.detection.flavours import is_random_factor
from rescompile.graph import Body, Graph, Op, Role, Value
from rescompile.kinds import OpKind, Trait

_PASSED = (Trait.FREE, Trait.ACTIVATION, Trait.NORM)


def is_tossed(op: Op, bodies: Sequence[Body]) -> bool:
    """Whether an operation runs one of its two graphs by a coin."""
    if len(bodies) != 2 or any(len(body.graph.outputs) != len(op.outputs) for body in bodies):
        return False
    read = {
        outer for body in bodies for inner, outer in body.operands.items() if inner.uses or body.graph.is_output(inner)
    }
    deciding = [value for value in op.operands if value not in read]
    return bool(deciding) and all(_is_coin(value) for value in deciding)


def _is_coin(value: Value) -> bool:
    if value.role is not Role.INPUT:
        return is_random_factor(value)
    single = value.shape is not None and all(extent == 1 for extent in value.shape)
    return single and all(user.kind is OpKind.OPAQUE for user in value.users)


def drops(bodies: Sequence[Body]) -> bool:
    """Whether one of the graphs returns zeros only."""
    return any(all(_is_zero(body.graph, value) for value in body.graph.outputs) for body in bodies)


def _is_zero(graph: Graph, value: Value) -> bool:
    value = _behind(value, (Trait.FREE,))
    op = value.producer
    if op is None:
        return value.role in (Role.PARAMETER, Role.CONSTANT) and not np.any(graph.data(value))
    if op.kind is OpKind.MUL:
        return any(graph.scalar(operand) == 0.0 for operand in op.operands)
    return op.kind is OpKind.FULL and bool(op.attr("value") == 0)


def stochastic(block: Block, body: Body, other: Body) -> Block:
    """The block of one graph, as a stochastic one where the other graph runs past it."""
    if block.kind not in ("add", "parallel"):
        return block
    fork = body.operands.get(_behind(block.fork_value, (Trait.FREE,)))
    if fork is None:
        return block
    for own, instead in zip(body.graph.outputs, other.graph.outputs, strict=True):
        ends = _behind(own, _PASSED, block.join_op).producer is block.join_op
        if ends and other.operands.get(_behind(instead, _PASSED)) is fork:
            return replace(block, kind="stochastic")
    return block


def _behind(value: Value, passed: Sequence[Trait], until: Op | None = None) -> Value:
    """What a value is made from by operations of these traits alone, at most the result of `until`."""
    while (op := value.producer) is not None and op is not until and any(op.has(trait) for trait in passed):
        value = op.operands[0]
    return value
