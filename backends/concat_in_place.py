"""Let a processor's kernels write concatenations in place: who can, and the operations that do so as regions."""

from __future__ import annotations

from rescompile.backends.dense_buffers import Shared, share
from rescompile.backends.region_draft import FLOATS, draft
from rescompile.backends.working import WorkingGraph
from rescompile.errors import RescompileError
from rescompile.fused import program
from rescompile.fused_region import FUSIBLE, Region, Step, describe, parse, step_types
from rescompile.graph import Op, Value
from rescompile.kinds import OpKind, Trait

K = OpKind
_IMAGES = frozenset((K.CONV, K.FUSED_CONV, K.MAX_POOL, K.AVG_POOL))


def share_concats(graph: WorkingGraph) -> Shared:
    """Where values lie; every operation that writes or reads a slice is a region afterwards."""
    split = _split(graph)
    hoisted = _hoist(graph)
    lie: dict[Value, bool] = {}
    for op in graph:
        for value in op.outputs:
            lie[value] = _lies_last(op, value, lie)

    def able(op: Op, value: Value) -> str:
        return _why_no_slices(graph, op, value)

    found = share(graph, able, able, lambda value: lie.get(value, False))
    for concat, (name, inputs, attrs) in hoisted.items():
        join = found.joins.get(concat.name)
        if join is None or found.copies.get(join.slot.buffer):
            _put_back(graph, found, concat, name, inputs, attrs)
    for concat, (part, inputs, attrs) in split.items():
        if concat.name not in found.joins:
            output = concat.output
            members = [concat] if part.producer is None else [part.producer, concat]
            graph.fuse(members, K.FUSED_REGION, inputs, [output], attrs, name=concat.name)
            found.refused.pop(concat.name, None)
    graph.settle()
    for op in graph.ops:
        touched = [value for value in (*op.operands, *op.outputs) if value in found.slots]
        if op.kind in (K.CONCAT, K.FUSED_REGION) or not touched or not graph.has_op(op.name):
            continue
        if not any(able(op, value) for value in touched):
            _as_region(graph, op)
    graph.commit()
    return found


def _split(graph: WorkingGraph) -> dict[Op, tuple[Value, list[Value | None], dict[str, object]]]:
    """Regions that end in a concatenation in two: what makes a part of it, and the concatenation.

    In place it costs nothing, where the region copies the other parts. Told: the part, and the region as it was.
    """
    result: dict[Op, tuple[Value, list[Value | None], dict[str, object]]] = {}
    for op in [op for op in graph if op.kind is K.FUSED_REGION]:
        region = parse(op.attr("steps"))
        last = region.operands + len(region.steps) - 1
        step = region.steps[-1]
        made = [place for place in step.inputs if place is not None and place >= region.operands]
        read = [place for other in region.steps for place in other.inputs]
        if step.kind is not K.CONCAT or region.outputs != (last,) or len(made) != 1 or read.count(made[0]) != 1:
            continue
        types = step_types(region, [None if v is None else v.type for v in op.inputs], [v.type for v in op.outputs])
        type_ = types[made[0] - region.operands]
        inputs, attrs = list(op.inputs), dict(op.attrs)
        inner = Region(region.operands, region.steps[:-1], (made[0],)).text()
        part = graph.put(K.FUSED_REGION, inputs, type_.shape, type_.dtype, {**attrs, "steps": inner}, like=op)
        parts = [part if place == made[0] else op.inputs[place] for place in step.inputs if place is not None]
        axis = int(step.attrs.get("axis", 0))
        concat = graph.fuse([op], K.CONCAT, parts, [op.output], {"axis": axis}, name=op.name)
        result[concat] = part, inputs, attrs
    graph.commit()
    return result


def _hoist(graph: WorkingGraph) -> dict[Op, tuple[str, list[Value | None], dict[str, object]]]:
    """Concatenations at the beginning of regions as operations of their own, and what the regions were before."""
    hoisted: dict[Op, tuple[str, list[Value | None], dict[str, object]]] = {}
    for op in [op for op in graph if op.kind is K.FUSED_REGION]:
        region = parse(op.attr("steps"))
        for number, step in enumerate(region.steps, region.operands):
            run = _run(region, number, step)
            if step.kind is not K.CONCAT or run is None:
                continue
            first, last = run
            types = step_types(region, [None if v is None else v.type for v in op.inputs], [v.type for v in op.outputs])
            shape = types[number - region.operands].shape
            parts = [op.inputs[place] for place in step.inputs[first:last] if place is not None]
            axis = int(step.attrs.get("axis", 0))
            if shape is None or any(p is None or p.shape is None for p in parts):
                continue
            extents = [p.shape[axis] for p in parts if p is not None and p.shape is not None]
            if any(isinstance(extent, str) for extent in extents):
                continue
            joined = (*shape[:axis], sum(int(extent) for extent in extents), *shape[axis + 1 :])
            value = graph.put(K.CONCAT, parts, joined, op.output.dtype, {"axis": axis}, like=op)
            before = op.name, list(op.inputs), dict(op.attrs)
            _read_joined(graph, op, region, number, run, value)
            if value.producer is not None:
                hoisted[value.producer] = before
            break
    graph.commit()
    return hoisted


def _run(region: Region, number: int, step: Step) -> tuple[int, int] | None:
    """The longest run of a concatenation's operands that are the region's, and that nothing else in it reads."""
    if step.kind is not K.CONCAT or number in region.outputs:
        return None
    read = [value for other in region.steps for value in other.inputs]
    fit = [v is not None and v < region.operands and read.count(v) == 1 for v in step.inputs]
    return max(
        ((i, j) for i in range(len(fit)) for j in range(i + 2, len(fit) + 1) if all(fit[i:j])),
        key=lambda run: run[1] - run[0],
        default=None,
    )


def _read_joined(graph: WorkingGraph, op: Op, region: Region, number: int, run: tuple[int, int], joined: Value) -> None:
    """The region over the joined value; the concatenation goes where it is all of it."""
    first, last = run
    step = region.steps[number - region.operands]
    gone = set(step.inputs[first:last])
    kept = [place for place in range(region.operands) if place not in gone]
    at: dict[int, int] = {place: position for position, place in enumerate(kept)}
    inputs = [*(op.inputs[place] for place in kept), joined]
    here = len(kept)
    whole = (first, last) == (0, len(step.inputs))
    steps: list[Step] = []
    for position, other in enumerate(region.steps, region.operands):
        if position == number and whole:
            at[position] = here
            continue
        if position == number:
            parts = [*step.inputs[:first], None, *step.inputs[last:]]
            read = tuple(here if place is None else at[place] for place in parts)
        else:
            read = tuple(None if place is None else at[place] for place in other.inputs)  # type: ignore[misc]
        at[position] = len(inputs) + len(steps)
        steps.append(Step(other.kind, read, other.attrs))
    text = Region(len(inputs), tuple(steps), tuple(at[made] for made in region.outputs)).text()
    graph.fuse([op], K.FUSED_REGION, inputs, list(op.outputs), {**op.attrs, "steps": text}, name=op.name)


def _put_back(
    graph: WorkingGraph, found: Shared, concat: Op, name: str, inputs: list[Value | None], attrs: dict[str, object]
) -> None:
    """The region as it was, where the concatenation before it would be a copy."""
    reader = concat.output.users[0]
    outputs = list(reader.outputs)
    graph.fuse([reader], K.FUSED_REGION, inputs, outputs, attrs, name=name)
    found.joins.pop(concat.name, None)
    found.refused.pop(concat.name, None)
    found.slots.pop(concat.output, None)


def _why_no_slices(graph: WorkingGraph, op: Op, value: Value) -> str:
    """Why the operation can neither read nor write a part of a buffer; empty where it can."""
    made = _region_of(graph, op)
    if made is None:
        return f"there is no kernel with gaps for a {op.kind.value}"
    if value.dtype not in FLOATS:
        return f"no kernel computes in {value.dtype}"
    inputs, text = made
    found = draft(parse(text), inputs, op.outputs, graph.source_ir == "onnx")
    if isinstance(found, str):
        return found
    return "its rows are not known" if found.dynamic else ""


def _region_of(graph: WorkingGraph, op: Op) -> tuple[list[Value | None], str] | None:
    """What the operation does, as a region."""
    if op.kind is K.FUSED_REGION:
        return list(op.inputs), str(op.attr("steps"))
    if op.has(Trait.FUSED):
        return list(op.inputs), program(op.kind, op.inputs, op.attrs).text()
    if op.kind not in FUSIBLE or op.kind is K.CONCAT or len(op.outputs) != 1:
        return None
    try:
        operands, attrs = describe([op], op.outputs, graph.scalar)
    except RescompileError:
        return None
    return list(operands), str(attrs["steps"])


def _as_region(graph: WorkingGraph, op: Op) -> None:
    """The operation as a region; a batch norm with the activation behind it."""
    users = op.output.users
    follows = users[0] if op.kind is K.BATCH_NORM and len(users) == 1 and not graph.is_output(op.output) else None
    if follows is not None and follows.has(Trait.ACTIVATION) and follows.inputs[0] is op.output:
        try:
            operands, attrs = describe([op, follows], follows.outputs, graph.scalar)
        except RescompileError:
            operands = []
        both = draft(parse(str(attrs["steps"])), operands, follows.outputs) if operands else ""
        if not isinstance(both, str):
            graph.fuse([op, follows], K.FUSED_REGION, operands, follows.outputs, attrs, name=op.name)
            return
    made = _region_of(graph, op)
    if made is not None:
        attrs = {"label": op.kind.value, "steps": made[1]}
        graph.fuse([op], K.FUSED_REGION, made[0], list(op.outputs), attrs, name=op.name)


def _lies_last(op: Op, value: Value, lie: dict[Value, bool]) -> bool:
    """Whether a value will lie channels last, as far as that can be told before anything is emitted."""
    if op.kind in _IMAGES:
        return op.kind in (K.CONV, K.FUSED_CONV) or lie.get(op.operands[0], False)
    if op.kind is K.FUSED_REGION:
        region = parse(op.attr("steps"))
        if any(step.kind is K.CONV for step in region.steps):
            return value.rank in (3, 4)
        if any(step.kind in (K.LINEAR, K.PERMUTE) for step in region.steps):
            return False
    same = [x for x in op.operands if x.rank == value.rank]
    return (value.rank or 0) in (3, 4, 5) and any(lie.get(x, False) for x in same) and op.kind is not K.PERMUTE
