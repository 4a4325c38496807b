"""The bias of a branch's last contraction, added where the sum is written."""

from __future__ import annotations

from dataclasses import dataclass

from msgspec import structs

from rescompile.graph import Graph, Op, Role, Value
from rescompile.kinds import OpKind as K
from rescompile.passes.joins import only_reader
from rescompile.passes.tracing import is_stored
from rescompile.plans import Decide, Edit, Fuse, Refusal, Rewrite, fuse_edit, region_edit

_EXACT = ("float32", "float64")


@dataclass(frozen=True, slots=True)
class Hoisted:
    """`ops`: add the bias; they are no part of the graph, only of a region that `region_edit` describes with them.

    `edits`: take it from the contraction; they come before the region's.
    """

    bias: Value
    ops: list[Op]
    edits: list[Edit]

    def placed(self, region: Fuse) -> list[Edit]:
        """All edits, of a region that was described with `ops`."""
        own = {op.name for op in self.ops}
        return [*self.edits, structs.replace(region, ops=tuple(name for name in region.ops if name not in own))]


def hoisting(graph: Graph, join: Op, skip: Value | None, *, rule: Decide) -> Rewrite | Refusal:
    """What the rule decides; where it leaves a contraction with a bias outside, the bias goes into what it makes."""
    decision = rule(graph, join, skip)
    if not isinstance(decision, Rewrite) or len(decision.edits) != 1 or not isinstance(decision.edits[0], Fuse):
        return decision
    made = decision.edits[0]
    for value in join.operands:
        found = None if value is skip else hoisted_bias(graph, join, value)
        if found is None or value.producer is None or value.producer.name in made.ops:
            continue
        ops = [*found.ops, *(graph.op(name) for name in made.ops)]
        region = region_edit(graph, ops, [graph.value(name) for name in made.outputs])
        if isinstance(region, Fuse):
            reason = f"{decision.reason}; it adds the bias of '{value.producer.name}', too"
            return structs.replace(decision, reason=reason, edits=tuple(found.placed(region)))
    return decision


def hoisted_bias(graph: Graph, join: Op, value: Value) -> Hoisted | None:
    """(W·x + b) + r  →  (W·x) + b + r, the first sum in the contraction's kernel, the others in that of the join.

    1. `value`, an operand of the join, is written by a linear or convolution with a stored bias, one number a channel.
    2. Only the join reads it.
    3. In 32 or 64 bits: in 16 the product would be rounded once more.
    """
    work = value.producer
    if work is None or work.kind not in (K.LINEAR, K.CONV) or only_reader(graph, value) is not join:
        return None
    bias = work.operand("bias")
    if bias is None or bias.rank != 1 or not is_stored(bias) or value.dtype not in _EXACT or value.rank is None:
        return None
    bare = Value(value.name, value.shape, value.dtype, Role.RESULT)
    ops: list[Op] = []
    added = bias
    if work.kind is K.CONV:
        shape = (*(bias.shape or ()), *(1,) * (value.rank - 2))
        added = Value(f"{value.name}.bias", shape, bias.dtype, Role.RESULT)
        ops.append(Op(K.RESHAPE, f"{value.name}.bias", [bias], [added], {}))
    ops.append(Op(K.ADD, f"{value.name}.biased", [bare, added], [value], {}))
    for op in ops:
        op.order = work.order
    edit = fuse_edit([work], work.kind, [*work.inputs[:2], None], [value], **work.attrs)
    return Hoisted(bias, ops, [edit])
