"""Reading a residual block as one whose norms can move, or the reason why they cannot."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from rescompile.blocks import Block, Report
from rescompile.graph import Graph, Op, Role, Value
from rescompile.kinds import OpKind, Trait
from rescompile.passes.norm_blocks import SPOTS, NormedBlock, NormUnit, Slot, Spot, fits, keeps_features
from rescompile.plans import Refusal

_KINDS = ("add", "parallel", "recurrent", "stochastic")
_MOVED = (OpKind.LAYER_NORM, OpKind.RMS_NORM, OpKind.GROUP_NORM)
_BESIDE = (OpKind.IDENTITY, OpKind.CAST)  # what may stand right beside a norm and moves with it
_SCALES = (OpKind.MUL, OpKind.DIV)


def read_block(graph: Graph, report: Report, block: Block) -> NormedBlock | Refusal:
    """The block as the passes see it; the reason where its norms cannot be moved."""
    refused = _unfit(graph, block)
    if refused:
        return Refusal(block.join, refused)
    placement, norms = block.norm, block.norm_ops
    spots = SPOTS.get(placement)
    if spots is None:
        return Refusal(block.join, _nothing_to_move(block))
    branch = report.all_branch_ops(block)
    inside = frozenset(branch)
    skip = _skip(block)
    if isinstance(skip, str):
        return Refusal(block.join, skip)
    if len(norms) != len(spots):
        return Refusal(block.join, f"its {len(norms)} norms stand where this placement has {len(spots)}")
    units: dict[Spot, NormUnit] = {}
    for spot, norm in zip(spots, norms, strict=True):
        units[spot] = _unit(graph, norm, inside if spot != "close" else None)
    assert block.join_value is not None  # _unfit saw to it
    moved = {op for unit in units.values() for op in unit.ops}
    read = units["lead"].output if "lead" in units else block.fork_value
    entries = tuple(_slots(read, inside - moved))
    ends = _ends(block, units.get("tail"), inside)
    scale = next((op for op in block.shortcut_ops if op.kind in _SCALES), None)
    normed = NormedBlock(
        block,
        placement,
        units,
        entries,
        ends,
        skip,
        block.join_value,
        scale,
        frozenset(_parameters(op for op in branch if op not in moved and not op.has(Trait.NORM))),
    )
    refused = _misplaced(graph, normed) or _leak(graph, normed, inside)
    return Refusal(block.join, refused) if refused else normed


def _unfit(graph: Graph, block: Block) -> str:
    """Why a block is none whose norms could move, whatever they are; empty when it is one."""
    if block.path:
        return "it is inside an operation that holds a graph of its own, where no pass rewrites"
    if block.fused:
        return "it is fused: convert the model before fusing it"
    if block.kind not in _KINDS:
        return f"a block of kind {block.kind} has no placement of norms"
    if block.join_op.kind is not OpKind.ADD or block.join_value is None:
        return f"its paths meet in '{block.join}' ({block.join_op.kind.value}), not in a sum"
    if block.shortcut == "projection":
        return "its shortcut is a projection: which side of it the norm belongs to is another question"
    if block.fork_value.shape is None or block.join_value.shape is None:
        return "the stream's shape is not known: capture the model with example inputs, or infer its shapes"
    if block.fork_value.shape != block.join_value.shape:
        return f"its fork is {_shape(block.fork_value)} and its sum {_shape(block.join_value)}"
    return ""


def _nothing_to_move(block: Block) -> str:
    """Why a block without a norm at its ends stays as it is."""
    readers = [] if block.join_value is None else block.join_value.users
    norm = next((op for op in readers if op.has(Trait.NORM)), None)
    other = next((op for op in readers if op is not norm), None)
    if norm is not None and other is not None:
        return f"the sum is also read by '{other.name}', beside its norm '{norm.name}'"
    if norm is not None:
        return "the sum is an output of the graph, beside its norm"
    if block.norm == "none":
        return "it has no norm: there is nothing to move"
    return "its norms stand inside the branch, at neither end of it: there is nothing to move"


def _skip(block: Block) -> Slot | str:
    """Where the shortcut reads the stream."""
    ops = (*block.shortcut_ops, *block.join_ops)
    found = list(_slots(block.fork_value, frozenset(ops)))
    if len(found) != 1:
        return f"its shortcut reads the stream in {len(found)} places"
    bad = next((op for op in block.shortcut_ops if op.kind not in (*_BESIDE, OpKind.DROPOUT, *_SCALES)), None)
    return found[0] if bad is None else f"its shortcut goes through '{bad.name}' ({bad.kind.value})"


def _unit(graph: Graph, norm: Op, inside: frozenset[Op] | None) -> NormUnit:
    """The norm, with what stands beside it. `inside`: the branch, for norms in it."""
    ops = [norm]
    while (op := ops[0].operands[0].producer) is not None:
        dropout = op.kind is OpKind.IDENTITY and op.attr("dropout")
        if op.kind not in _BESIDE or dropout or (inside is not None and op not in inside):
            break
        if len(op.output.uses) != 1 or graph.is_output(op.output):
            break
        ops.insert(0, op)
    while (step := _beside(graph, ops[-1].outputs[0], inside)) is not None:
        ops.append(step)
    first = ops[0]
    source = first.operands[0]
    readers = tuple(Slot(first, index) for index, value in enumerate(first.inputs) if value is source)
    return NormUnit(norm, tuple(ops), readers)


def _beside(graph: Graph, value: Value, inside: frozenset[Op] | None) -> Op | None:
    """The cast, or the gain or shift of a norm without its own, that alone reads a norm's output."""
    if len(value.uses) != 1 or graph.is_output(value):
        return None
    (op, _), *_ = value.uses
    if inside is not None and op not in inside:
        return None
    if op.kind is OpKind.CAST:
        return op
    before = value.producer
    bare = before is not None and (len(before.operands) == 1 or before.kind in (OpKind.MUL, OpKind.CAST))
    constants = [operand for operand in op.operands if operand is not value]
    affine = op.kind in (OpKind.MUL, OpKind.ADD) and len(constants) == 1
    return op if bare and affine and constants[0].constant and constants[0].role is Role.PARAMETER else None


def _ends(block: Block, tail: NormUnit | None, inside: frozenset[Op]) -> tuple[Slot, ...]:
    """Where the sum reads the branch; before LayerScale and stochastic depth, which stay next to the sum."""
    joins = frozenset(block.join_ops)
    if tail is not None:
        return tuple(_slots(tail.output, inside | joins))
    found = [
        Slot(op, index)
        for op in block.join_ops
        for index, value in enumerate(op.inputs)
        if value is not None and value.producer in inside and value.producer not in joins
    ]
    if len(found) != 1:
        return tuple(found)
    slot = found[0]
    while (op := slot.value.producer) is not None and op in inside and op.kind in _SCALES:
        index = next((i for i, v in enumerate(op.inputs) if v is not None and v.producer in inside), None)
        if index is None or len(op.output.uses) != 1:
            break
        slot = Slot(op, index)
    return (slot,)


def _misplaced(graph: Graph, normed: NormedBlock) -> str:
    """Why these norms cannot move; empty when they can."""
    for spot, unit in normed.units.items():
        norm = unit.norm
        if norm.kind is OpKind.BATCH_NORM:
            return f"'{norm.name}' is a batch norm: its running statistics are those of what it normalises now"
        if norm.kind not in _MOVED:
            return f"'{norm.name}' is a {norm.kind.value}: only layer, RMS and group norms are moved"
        if not _over_features(norm):
            return f"'{norm.name}' normalises other axes than the last"
        if any(not value.constant for value in norm.operands[1:]):
            return f"the scale or shift of '{norm.name}' is computed from the graph's inputs"
        if not _same_type(unit.output, unit.input):
            return f"'{norm.name}' changes the dtype or shape of what it normalises"
        if not fits(unit, normed.fork.shape):
            return f"'{norm.name}' works on {_shape(unit.input)} and the stream is {_shape(normed.fork)}"
        source = {"lead": normed.fork, "close": normed.sum}.get(spot)
        way = [] if source is None else _views(source, unit.input)
        if way is None:
            what = "the sum" if spot == "close" else "the stream"
            return f"'{norm.name}' reads '{unit.input.name}' and not {what} itself"
        if spot == "close":
            reason = _read_elsewhere(graph, [normed.sum, *(op.output for op in way)], [*way, unit.ops[0]])
            if reason:
                return reason
        elif (outsider := _outsider(graph, unit, normed)) is not None:
            return f"'{unit.output.name}', which '{norm.name}' makes, {outsider}"
    if not normed.ends:
        return "its branch ends in the sum in no single place"
    return "" if normed.entries else "the branch does not read the stream"


def _same_type(one: Value, other: Value) -> bool:
    """Whether two values have one dtype and no extents known to differ; a file may name one unknown extent twice."""
    first, second = one.shape or (), other.shape or ()
    pairs = zip(first, second, strict=False)
    known = all(a == b for a, b in pairs if isinstance(a, int) and isinstance(b, int))
    return one.dtype == other.dtype and len(first) == len(second) and known


def _over_features(norm: Op) -> bool:
    """Whether a norm works along the last axis; a group norm has its own."""
    return norm.kind is OpKind.GROUP_NORM or norm.attr("axis") == (norm.operands[0].rank or 0) - 1


def _views(source: Value, value: Value) -> list[Op] | None:
    """The operations that lead from one value to another and only rearrange rows; None where others do."""
    way: list[Op] = []
    while value is not source:
        op = value.producer
        if op is None or not op.operands or not keeps_features(op):
            return None
        way.insert(0, op)
        value = op.operands[0]
    return way


def _read_elsewhere(graph: Graph, values: Iterable[Value], readers: Iterable[Op]) -> str:
    """Who reads one of the values beside the reader that it is for; empty when nobody does."""
    for value, reader in zip(values, readers, strict=True):
        if graph.is_output(value):
            return "the sum is an output of the graph"
        other = next((op for op in value.users if op is not reader), None)
        if other is not None:
            return f"the sum is also read by '{other.name}'"
    return ""


def _outsider(graph: Graph, unit: NormUnit, normed: NormedBlock) -> str | None:
    """Who else reads a norm inside the block; None when nobody does."""
    if graph.is_output(unit.output):
        return "is an output of the graph"
    own = {slot.op for slot in (*normed.entries, *normed.ends)}
    other = next((op for op in unit.output.users if op not in own), None)
    return None if other is None else f"is also read by '{other.name}'"


def _leak(graph: Graph, normed: NormedBlock, inside: frozenset[Op]) -> str:
    """Who beside the branch reads the stream by way of the branch's own views of it; empty when nobody does."""
    pending = [slot.op for slot in normed.entries]
    while pending:
        op = pending.pop()
        if not op.has(Trait.FREE):
            continue
        for value in op.outputs:
            other = next((user.name for user in value.users if user not in inside), None)
            if graph.is_output(value) or other is not None:
                reader = "the model's caller" if other is None else f"'{other}'"
                return f"'{op.name}' rearranges the stream for {reader} as well as for the branch"
            pending += value.users
    return ""


def _slots(value: Value, among: frozenset[Op]) -> Iterator[Slot]:
    for op, index in value.uses:
        if op in among:
            yield Slot(op, index)


def _parameters(ops: Iterable[Op]) -> Iterator[Value]:
    """Parameters that operations read, also through casts and splits of them."""
    pending = [value for op in ops for value in op.operands if value.constant]
    seen = set(pending)
    while pending:
        value = pending.pop()
        if value.role is Role.PARAMETER:
            yield value
        elif value.producer is not None:
            fresh = [operand for operand in value.producer.operands if operand not in seen]
            seen.update(fresh)
            pending.extend(fresh)


def _shape(value: Value) -> str:
    return "of unknown shape" if value.shape is None else "[" + ",".join(map(str, value.shape)) + "]"
