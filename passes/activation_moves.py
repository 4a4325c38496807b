"""How norm and activation of a convolutional block, and its stem's pool, change places, as edits."""

from __future__ import annotations

from rescompile.graph import Op, Value
from rescompile.passes.activated_blocks import ActivatedBlock, Lead
from rescompile.passes.sketch import Made, Sketch
from rescompile.plans import Erase, ReplaceUses, SetOperand, SetShape

_STARTS = {"weight": 1.0, "bias": 0.0, "mean": 0.0, "var": 1.0}


def norm_behind_join(sketch: Sketch, block: ActivatedBlock, norm: Op) -> None:
    """σ(x + N(t))  →  σ(N(x + t))"""
    sketch.edits.append(ReplaceUses(norm.output.name, block.tail.name))
    read(sketch, norm, 0, block.total)
    read(sketch, block.closing.act, 0, norm.output)


def norm_before_join(sketch: Sketch, block: ActivatedBlock, norm: Op) -> None:
    """σ(N(x + t))  →  σ(x + N(t))"""
    for op, index in block.ends:
        read(sketch, op, index, norm.output)
    read(sketch, norm, 0, block.tail)
    read(sketch, block.closing.act, 0, block.total)


def pools_before_activation(sketch: Sketch, block: ActivatedBlock, lead: Lead) -> None:
    """pool(σ(N(c)))  →  σ(N(pool(c))), of which a skip without weights reads pool(c)"""
    pooled, act = lead.x, lead.closing.act
    sketch.edits.append(ReplaceUses(act.output.name, lead.c.name))
    _work_on(sketch, lead, pooled)
    kept = () if block.projected else block.skip
    for op, index in pooled.uses:
        if (op, index) not in kept:
            read(sketch, op, index, act.output)


def pools_behind_activation(sketch: Sketch, block: ActivatedBlock, lead: Lead) -> None:
    """σ(N(pool(c)))  →  pool(σ(N(c))), which all that read the one or the other read"""
    pooled, act = lead.bare, lead.closing.act
    _work_on(sketch, lead, lead.c)
    read(sketch, lead.pools[0], 0, act.output)
    for op, index in act.output.uses:
        read(sketch, op, index, pooled)


def without_norm(sketch: Sketch, block: ActivatedBlock, norm: Op) -> None:
    """N(P(x))  →  P(x)"""
    read(sketch, block.block.join_op, block.block.skip_index, norm.operands[0])
    sketch.edits.append(Erase(norm.name, for_good=True))


def with_norm(sketch: Sketch, block: ActivatedBlock, model: Op) -> Made:
    """P(x)  →  N(P(x)), N of the model's kind, its gain one and its shift zero, its statistics those of N(0, 1)"""
    join, index = block.block.join_op, block.block.skip_index
    projected = join.operands[index]
    leaves = [name.rstrip("?") for name in model.kind.spec.operands][1:]
    operands: list[Made | None] = []
    for leaf, given in zip(leaves, model.inputs[1:], strict=False):
        fixed = leaf in ("mean", "var")
        shape = () if given is None else tuple(int(extent) for extent in given.shape or ())
        name = f"running_{leaf}" if fixed else leaf
        made = None if given is None else sketch.parameter(name, shape, "constant", not fixed, value=_STARTS[leaf])
        operands.append(made)
    made = sketch.op(model.kind, projected, *operands, label="norm", **model.attrs)
    sketch.edits.append(SetOperand(join.name, index, made.name))
    return made


def read(sketch: Sketch, op: Op, index: int, value: Value) -> None:
    """Let an operand be another value."""
    sketch.edits.append(SetOperand(op.name, index, value.name))


def _work_on(sketch: Sketch, lead: Lead, value: Value) -> None:
    """Let the lead's norm and activation read another value, and have its shape."""
    closing = lead.closing
    read(sketch, closing.first, 0, value)
    for op in (closing.norm, closing.act):
        if op is not None:
            sketch.edits.append(SetShape(op.output.name, value.shape))
