"""Rules: a sum loses its skip, where that is nothing but zeros (exact), or on request (another function)."""

from __future__ import annotations

from collections.abc import Iterable

from rescompile.blocks import Block
from rescompile.graph import Graph, Op, Value
from rescompile.kinds import OpKind as K
from rescompile.passes.tracing import is_stored
from rescompile.plans import Edit, Erase, Refusal, ReplaceUses, fuse_edit

_ZERO_IN_ZERO_OUT = (
    K.IDENTITY, K.CAST, K.RESHAPE, K.PERMUTE, K.SLICE, K.EXPAND, K.ROLL, K.FLIP, K.NEG, K.RELU, K.AVG_POOL,
)  # fmt: skip


def drop_zero(graph: Graph, block: Block) -> list[Edit] | Refusal:
    """y = F(x) + 0·s(x)  →  y = F(x);  y = (1 − C)⊙F(x) + C⊙s(x), C = 0  →  y = F(x)

    1. The skip holds a factor of zeros, or a projection of zeros: what it adds is 0 for every finite x.
    2. The sum has one other operand, of its own shape and dtype.
    """
    join = block.join_op
    if join.kind is not K.ADD:
        return Refusal(block.join, f"a {join.kind.value} brings the paths together: there is no sum to take it from")
    if not _zero(graph, join.inputs[block.skip_index]):
        return Refusal(block.join, "the skip does not vanish")
    terms = enumerate(zip(join.operands, join.scales, strict=True))
    rest = [term for index, term in terms if index != block.skip_index]
    if len(rest) != 1 or rest[0][1] != 1 or rest[0][0].type != join.output.type:
        return Refusal(block.join, "without the skip the sum is more than one operand")
    return _stand_in(graph, join, _unscaled(graph, rest[0][0]))


def drop_skip(graph: Graph, block: Block) -> list[Edit] | Refusal:
    """y = F(x) + s(x)  →  y = F(x): another function

    1. The block ends in a sum, and the skip is a term of it.
    2. The other terms have the sum's shape and dtype.
    """
    if block.kind not in ("add", "parallel", "recurrent", "stochastic", "long"):
        return Refusal(block.join, f"a block of kind '{block.kind}' has no skip that its sum could do without")
    if any(op.kind is not K.ADD for op in block.join_ops):
        kind = next(op.kind.value for op in block.join_ops if op.kind is not K.ADD)
        return Refusal(block.join, f"a {kind} brings the paths together: there is no sum to take the skip from")
    ends = block.shortcut_ops[-1].outputs if block.shortcut_ops else [block.fork_value]
    found = [(op, index) for op in block.join_ops for index, value in enumerate(op.inputs) if value in ends]
    if len(found) != 1:
        return Refusal(block.join, "the skip is no single term of the sum")
    join, index = found[0]
    rest = [
        (value, scale) for at, (value, scale) in enumerate(zip(join.operands, join.scales, strict=True)) if at != index
    ]
    odd = next((value for value, _ in rest if value.type != join.output.type), None)
    if odd is not None and len(rest) == 1:
        return Refusal(block.join, f"'{odd.name}' has not the type of the sum")
    if len(rest) == 1 and rest[0][1] == 1:
        return _stand_in(graph, join, rest[0][0])
    values, scales = [value for value, _ in rest], tuple(scale for _, scale in rest)
    edits: list[Edit] = [fuse_edit([join], K.ADD, values, [join.output], scales=scales)]
    return [*edits, *_erased(graph, [join.operands[index]], {join})]


def _stand_in(graph: Graph, join: Op, new: Value) -> list[Edit]:
    """`new` in the place of the join, and without what nobody reads any more."""
    edits: list[Edit] = [ReplaceUses(join.output.name, new.name), Erase(join.name)]
    return [*edits, *_erased(graph, [value for value in join.operands if value is not new], {join}, new)]


def _erased(graph: Graph, ends: Iterable[Value], gone: set[Op], kept: Value | None = None) -> list[Edit]:
    """The operations that only led to what is gone, last first."""
    edits: list[Edit] = []
    pending = list(ends)
    while pending:
        value = pending.pop(0)
        op = value.producer
        if op is None or op in gone or any(graph.is_output(out) or out is kept for out in op.outputs):
            continue
        if all(user in gone for out in op.outputs for user in out.users):
            gone.add(op)
            edits.append(Erase(op.name))
            pending.extend(op.operands)
    return edits


def _unscaled(graph: Graph, value: Value) -> Value:
    """Past a factor that is one because what it takes from one vanishes."""
    op = value.producer
    if op is None or op.kind is not K.MUL or len(value.users) != 1:
        return value
    for factor, other in (op.operands, op.operands[::-1]):
        if other.type == value.type and _one(graph, factor):
            return other
    return value


def _one(graph: Graph, value: Value) -> bool:
    op = value.producer
    if op is None:
        return graph.scalar(value) == 1
    if op.kind is not K.ADD:
        return False
    terms = list(zip(op.operands, op.scales, strict=True))
    ones = [scale for term, scale in terms if graph.scalar(term) is not None and graph.scalar(term) == 1]
    return ones == [1] and sum(_zero(graph, term) for term, _ in terms) == len(terms) - 1


def _zero(graph: Graph, value: Value | None, far: int = 16) -> bool:
    """Whether every element is 0, whatever the model's inputs."""
    if value is None or is_stored(value):
        return value is not None and not graph.data(value).any()
    op = value.producer
    if op is None or far == 0:
        return False
    if op.kind is K.MUL:
        return any(_zero(graph, operand, far - 1) for operand in op.operands)
    if op.kind in (K.CONV, K.LINEAR):
        bias = op.operand("bias")
        silent = bias is None or (is_stored(bias) and _zero(graph, bias))
        weight = op.operand("weight")
        return silent and ((is_stored(weight) and _zero(graph, weight)) or _zero(graph, op.inputs[0], far - 1))
    if op.kind in (K.BATCH_NORM, K.LAYER_NORM):
        gamma, beta = op.operand("weight"), op.operand("bias")
        return gamma is not None and _zero(graph, gamma) and (beta is None or _zero(graph, beta))
    return op.kind in _ZERO_IN_ZERO_OUT and _zero(graph, op.inputs[0], far - 1)
