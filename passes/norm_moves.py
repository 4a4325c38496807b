"""How a norm is taken from one place of a block and put in another, as edits.

The edits of one block name what they touch by the block's own operations: they are right whichever of its neighbours
are rewritten too, and in whatever order.
"""

from __future__ import annotations

from rescompile.graph import Role, Value
from rescompile.kinds import OpKind
from rescompile.passes.norm_blocks import NormedBlock, NormUnit, Slot, Spot
from rescompile.passes.sketch import Made, Sketch, Term
from rescompile.plans import Erase, ReadAlike, ReplaceUses, SetOperand


def take_off(sketch: Sketch, normed: NormedBlock, spot: Spot) -> NormUnit:
    """Let what read a norm's output read its input. The norm itself stays, unread."""
    unit = normed.units[spot]
    if spot == "close":
        sketch.edits.append(ReplaceUses(unit.output.name, unit.input.name))
    for slot in {"lead": normed.entries, "tail": normed.ends}.get(spot, ()):
        if unit.input is normed.fork:
            alike(sketch, slot, normed.skip)
        else:
            read(sketch, slot, unit.input)
    return unit


def put_on(sketch: Sketch, normed: NormedBlock, spot: Spot, unit: NormUnit) -> None:
    """Let a norm that nothing reads normalise what is at a spot; made anew where rows are arranged otherwise there."""
    source = {"lead": normed.fork, "tail": normed.end, "close": normed.sum}[spot]
    readers, output = unit.readers, Made(unit.output.name, unit.output.shape, unit.output.dtype)
    if source.shape != unit.input.shape:
        made = copy_norm(sketch, unit, source)
        readers, output = (), made[-1]
        sketch.edits += [Erase(op.name) for op in reversed(unit.ops)]
    if spot == "close":
        sketch.edits.append(ReplaceUses(source.name, output.name))
        if not readers:
            sketch.edits.append(SetOperand(made[0].name, 0, source.name))
    elif not readers and spot == "lead":
        sketch.edits.append(ReadAlike(made[0].name, 0, normed.skip.op.name, normed.skip.index))
    for slot in readers:
        if spot == "lead":
            alike(sketch, slot, normed.skip)
        else:
            read(sketch, slot, source)
    for slot in {"lead": normed.entries, "tail": normed.ends}.get(spot, ()):
        read(sketch, slot, output)


def put_new(sketch: Sketch, normed: NormedBlock, spot: Spot, model: NormUnit) -> Made:
    """A new norm like `model`, its gain one and its shift zero, at a spot."""
    if spot == "lead":
        made = new_norm(sketch, normed.fork, model)
        sketch.edits.append(ReadAlike(made.name, 0, normed.skip.op.name, normed.skip.index))
        for slot in normed.entries:
            read(sketch, slot, made)
        return made
    made = new_norm(sketch, normed.end if spot == "tail" else normed.sum, model)
    if spot == "tail":
        for slot in normed.ends:
            read(sketch, slot, made)
    else:
        sketch.edits.append(ReplaceUses(normed.sum.name, made.name))
        sketch.edits.append(SetOperand(made.name, 0, normed.sum.name))
    return made


def new_norm(sketch: Sketch, source: Value | Made, model: NormUnit, *, like: bool = False) -> Made:
    """A norm of the model's kind, with parameters under the sketch's prefix: fresh ones, or with `like` copies."""
    names = [name.rstrip("?") for name in model.norm.kind.spec.operands][1:]
    operands: list[Made | None] = []
    for name, value in zip(names, model.norm.inputs[1:], strict=False):
        if value is None or value.shape is None:
            operands.append(None)
        elif like and value.role is Role.PARAMETER:
            operands.append(sketch.copy(name, value))
        else:
            shape = tuple(extent for extent in value.shape if isinstance(extent, int))
            operands.append(sketch.parameter(name, shape, "constant", value=float(name == "weight")))
    return sketch.op(model.norm.kind, source, *operands, shape=source.shape, **model.norm.attrs)


def copy_norm(sketch: Sketch, unit: NormUnit, source: Term) -> list[Made]:
    """The norm once more, with the same parameters, reading `source`; every operation's result."""
    made: dict[Value, Term] = {unit.input: source}
    found: list[Made] = []
    for op in unit.ops:
        operands = [None if value is None else made.get(value, value) for value in op.inputs]
        label = f"{op.kind.value}_{len(found)}" if found else op.kind.value
        attrs = {**op.attrs, "axis": len(source.shape or ()) - 1} if "axis" in op.attrs else op.attrs
        found.append(sketch.op(op.kind, *operands, label=label, shape=source.shape, **attrs))
        made[op.output] = found[-1]
    return found


def scale_skip(sketch: Sketch, normed: NormedBlock, factor: float) -> None:
    """Multiply what the shortcut brings to the sum. Last of a block's edits: other ones read alike the shortcut."""
    scaled = sketch.op(OpKind.MUL, normed.fork, sketch.literal(factor), label="alpha")
    sketch.edits.append(ReadAlike(scaled.name, 0, normed.skip.op.name, normed.skip.index))
    read(sketch, normed.skip, scaled)


def unscale_skip(sketch: Sketch, normed: NormedBlock) -> None:
    """Take the factor off the shortcut."""
    factor = normed.factor
    assert factor is not None  # the caller looked
    for op, index in factor.output.uses:
        alike(sketch, Slot(op, index), normed.skip)
    sketch.edits.append(Erase(factor.name))


def read(sketch: Sketch, slot: Slot, value: Value | Made) -> None:
    """Let an operand be a value."""
    sketch.edits.append(SetOperand(slot.op.name, slot.index, value.name))


def alike(sketch: Sketch, slot: Slot, like: Slot) -> None:
    """Let an operand be what another one is when the edit is applied."""
    sketch.edits.append(ReadAlike(slot.op.name, slot.index, like.op.name, like.index))
