"""Rule: a skip that is never negative travels through the branch's own convolutions and activations (RMNet)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from rescompile.graph import Graph, Op, Shape, Value
from rescompile.kinds import OpKind as K
from rescompile.passes.bounds import Bounds, bounds
from rescompile.passes.maps import Map, common_frame
from rescompile.passes.merge_branches import Replacement, contraction, main_contraction
from rescompile.passes.tracing import Layout, Trace, escapes
from rescompile.plans import FreshNames, Insert, Refusal, fuse_edit


@dataclass(frozen=True, slots=True)
class Stage:
    """A map of the stage before, or of the fork, and the activation behind it."""

    trace: Trace
    map: Map
    source: Value
    activation: Op


@dataclass(frozen=True, slots=True)
class Branch:
    """What lies between fork and join: stages in order, and at the join the maps of the last of them and of the skip.

    `pool`: the map that the skip starts with where it is no single position, which the stages take over.
    """

    stages: list[Stage]
    trace: Trace
    last: Map
    skip: Map
    pool: Map | None
    ops: dict[Op, None]


def reserve(graph: Graph, fork: Value, join: Value, layout: Layout, fresh: FreshNames) -> Replacement | Refusal:
    """y = W₂·f(W₁·x) + P·x  →  y = [W₂ P]·f([W₁; I]·x), for x ≥ 0 (Meng et al. 2021, RMNet)

    1. The fork is nowhere negative, and the branch's activations return what it holds as it is: relu, clipping from
       above its largest number on, leaky relu.
    2. The branch is convolutions or linears, their batch norms folded, with one activation between each two of them.
    3. The skip is the identity or an affine map at the branch's stride.
    4. Nothing else reads what lies inside.
    """
    refusal: Refusal | None = None
    for start in (*_pools_of(fork), fork):
        branch = _branch(graph, fork, join, layout, start)
        found = branch if isinstance(branch, Refusal) else _carried(graph, fork, join, branch, fresh)
        if not isinstance(found, Refusal):
            return found
        refusal = found
    assert refusal is not None  # the fork itself was tried
    return refusal


def _carried(graph: Graph, fork: Value, join: Value, branch: Branch, fresh: FreshNames) -> Replacement | Refusal:
    refused = _impassable(graph, fork, branch) or escapes(graph, branch.ops, join)
    if refused:
        return Refusal(join.name, refused)
    replacement = Replacement()
    carried = branch.skip.inputs
    read, stride = fork.name, (1,) * branch.trace.layout.spatial
    pool = branch.pool
    for number, stage in enumerate(branch.stages):
        taken = pool if pool is not None and pool.stride == stage.map.stride else None
        made = _reserved(stage, carried, taken, first=number == 0)
        if isinstance(made, str):
            return Refusal(stage.activation.name, made)
        if taken is None:
            stride = tuple(a * b for a, b in zip(stride, stage.map.stride, strict=True))
        else:
            pool = None
        read = _insert(stage, made, carried, read, fresh, replacement)
    if pool is not None:
        return Refusal(join.name, "no convolution of the branch has the stride of the skip's pool")
    total = _rejoined(branch, stride)
    if isinstance(total, str):
        return Refusal(join.name, total)
    main = _last_contraction(branch)
    end = contraction(branch.trace, total, "reserved", fresh, main)
    ops = sorted(branch.ops, key=lambda op: op.order)
    replacement.edits += end.edits
    replacement.edits.append(fuse_edit(ops, end.kind, [read, end.weight, end.bias], [join], **end.attrs))
    replacement.count(total, join, branch.trace.layout)
    return replacement


def _branch(graph: Graph, fork: Value, join: Value, layout: Layout, start: Value) -> Branch | Refusal:
    """`start`: where the skip starts, at the fork or at a pool of it."""
    pool: Map | None = None
    ops: dict[Op, None] = {}
    if start is not fork:
        entry = Trace(graph, fork, layout)
        pooled = entry.maps(start)
        if isinstance(pooled, Refusal):
            return pooled
        pool, ops = pooled[fork], dict(entry.ops)
    trace = Trace(graph, start, layout)
    ends = trace.maps(join)
    if isinstance(ends, Refusal):
        return ends
    others = [base for base in ends if base is not start]
    if start not in ends:
        return Refusal(join.name, "every way from the fork to the sum goes through an activation")
    if len(others) != 1:
        return Refusal(join.name, "several branches have activations, and no one convolution stands behind all of them")
    last, value = ends[others[0]], others[0]
    if not last.works:
        return Refusal(join.name, "the branch ends in an activation, behind which no convolution could add the skip")
    ops |= trace.ops
    stages: list[Stage] = []
    while value is not fork:
        activation = value.producer
        operand = activation.inputs[0] if activation is not None else None
        if activation is None or operand is None or activation.order <= _order(fork):
            return Refusal(join.name, f"'{value.name}' enters from outside the block")
        part = Trace(graph, fork, layout)
        found = part.maps(operand)
        if isinstance(found, Refusal):
            return found
        if len(found) != 1:
            return Refusal(activation.name, f"'{activation.name}' reads a sum of what activations separate")
        before, map_ = next(iter(found.items()))
        if not map_.works:
            return Refusal(activation.name, f"no convolution stands before '{activation.name}'")
        stages.append(Stage(part, map_, before, activation))
        ops |= {**part.ops, activation: None}
        value = before
    return Branch(stages[::-1], trace, last, ends[start], pool, ops)


def _pools_of(fork: Value) -> list[Value]:
    """The average pools that a shortcut may start with."""
    return [op.output for op in fork.users if op.kind is K.AVG_POOL]


def _order(value: Value) -> int:
    return -1 if value.producer is None else value.producer.order


def _impassable(graph: Graph, fork: Value, branch: Branch) -> str:
    """Why the fork does not come through the activations as it is; empty where it does."""
    held = bounds(graph, fork)
    if held.low < 0:
        return f"'{fork.name}' may be negative, and activations between the convolutions would clip it"
    for stage in branch.stages:
        if not _passes(stage.activation, held):
            op = stage.activation
            return f"'{op.name}' ({op.kind.value}) changes non-negative values, so the skip cannot go through it"
    return ""


def _passes(op: Op, held: Bounds) -> bool:
    if op.kind is K.PRELU:
        slope = op.inputs[1]
        return slope is not None and slope.shape is not None and all(extent == 1 for extent in slope.shape)
    if op.kind is K.CLIP:
        low, high = op.attr("min"), op.attr("max")
        return (low is None or low <= held.low) and (high is None or high >= held.high)
    return op.kind in (K.RELU, K.LEAKY_RELU)


def _reserved(stage: Stage, channels: int, pool: Map | None, *, first: bool) -> Map | str:
    """[W; I] of the first stage, diag(W, I) of a later one, with the pool in the place of I where there is one."""
    program, map_ = stage.trace.program, stage.map
    kept = replace(program.input(channels), stride=map_.stride)
    if pool is not None:
        pooled = program.add("pool", [kept], kernel=list(pool.kernel))
        kept = replace(pool, step=pooled, inputs=channels, groups=channels)
    layout = stage.trace.layout
    extents = (stage.source.shape or ())[2:] if layout.spatial else ()
    frame = common_frame([map_, kept], extents)
    if isinstance(frame, str):
        return f"of its convolution and the skip, {frame}"
    parts = [program.placed(map_, frame), program.placed(kept, frame)]
    outputs = map_.outputs + channels
    shared: dict[str, Any] = {"shifted": map_.shifted, "works": True}
    if first:
        if map_.groups > 1:
            return "the first convolution has groups, of which none reads all channels of the skip"
        return replace(frame, step=program.add("stack", parts), outputs=outputs, groups=1, **shared)
    width = map_.inputs // map_.groups
    groups = 1
    if map_.groups > 1:
        if width != map_.outputs // map_.groups or channels % width:
            return f"the skip's {channels} channels make no whole groups of its convolution"
        groups = map_.groups + channels // width
    step = program.add("diagonal", parts, groups=groups)
    return replace(frame, step=step, inputs=map_.inputs + channels, outputs=outputs, groups=groups, **shared)


def _insert(stage: Stage, map_: Map, channels: int, read: str, fresh: FreshNames, to: Replacement) -> str:
    """The stage with its reserved channels; the name of what its activation makes."""
    made = contraction(stage.trace, map_, "reserved", fresh)
    before, after = stage.activation.inputs[0], stage.activation.output
    assert before is not None  # the trace went through it
    inner, outer = fresh(f"{before.name}_reserved"), fresh(f"{after.name}_reserved")
    shape = _wider(before.shape, stage.trace.layout, channels)
    rest = [None if value is None else value.name for value in stage.activation.inputs[1:]]
    settings: dict[str, Any] = dict(stage.activation.attrs)
    to.edits += made.edits
    to.edits.append(
        Insert(made.kind.value, (read, made.weight, made.bias), ((inner, shape, before.dtype),), made.attrs)
    )
    to.edits.append(Insert(stage.activation.kind.value, (inner, *rest), ((outer, shape, after.dtype),), settings))
    to.count(map_, before, stage.trace.layout)
    return outer


def _wider(shape: Shape | None, layout: Layout, channels: int) -> Shape:
    extents = list(shape or ())
    width = extents[layout.channel]
    assert isinstance(width, int)  # the trace read the map's width from a weight
    extents[layout.channel] = width + channels
    return tuple(extents)


def _rejoined(branch: Branch, stride: tuple[int, ...]) -> Map | str:
    """[W P]: the last convolution reads the branch, and behind it the reserved channels."""
    last, skip, layout = branch.last, branch.skip, branch.trace.layout
    if last.groups > 1:
        return "the last convolution has groups, of which none reads the skip's channels beside its own"
    if any(own % inner for own, inner in zip(skip.stride, stride, strict=True)):
        return f"the strides differ: {list(skip.stride)} of the skip, {list(stride)} within the branch"
    if any(step != 1 for step in stride) and (not skip.pointwise or skip.bordered):
        return "the skip's kernel reads positions that the stride of the branch leaves out"
    left = replace(skip, stride=tuple(own // inner for own, inner in zip(skip.stride, stride, strict=True)))
    value = branch.stages[-1].activation.output
    extents = (value.shape or ())[2:] if layout.spatial else ()
    frame = common_frame([last, left], extents)
    if isinstance(frame, str):
        return f"of the last convolution and the skip, {frame}"
    parts = [branch.trace.program.placed(last, frame), branch.trace.program.placed(left, frame)]
    step = branch.trace.program.add("beside", parts)
    return replace(
        frame, step=step, inputs=last.inputs + skip.inputs, groups=1, shifted=last.shifted or skip.shifted, works=True
    )


def _last_contraction(branch: Branch) -> Op:
    """The convolution or linear of the branch behind its last activation, not one of the skip."""
    behind: dict[Op, None] = {}
    pending = [branch.stages[-1].activation]
    while pending:
        found = [user for user in pending.pop().output.users if user in branch.trace.ops and user not in behind]
        behind |= dict.fromkeys(found)
        pending.extend(found)
    return main_contraction(behind)
