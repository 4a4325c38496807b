"""Where shortcuts go: from which value to which, by number of layers, by name, or by stage."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import pairwise, product
from typing import Literal, TypeAlias

from rescompile.blocks import Block, Report
from rescompile.detection.paths import is_pointwise
from rescompile.errors import RescompileError, nearest
from rescompile.graph import Graph, Op, Shape, Value
from rescompile.kinds import OpKind, Trait
from rescompile.passes.geometry import Geometry, geometry, show
from rescompile.passes.layers import Chain, Layer, Place, chains, layers
from rescompile.passes.likeness import Likeness
from rescompile.plans import Refusal

_FACTORS = 4  # factors and shifts between the end of a branch and the join, a gate among them

Join: TypeAlias = Literal["before-activation", "after", "pre-activation"]


def by_count(graph: Graph, report: Report, every: int, join: Join, alike: Likeness) -> Iterator[Place | Refusal]:
    """Groups of `every` consecutive layers.

    1. The stem and the head stay outside, and so does a layer that holds a residual block.
    2. A group lies in one chain; a rest shorter than `every` gets none.
    3. Where the sum before the activation would be no residual connection, the join goes behind it.
    """
    if every < 1:
        raise RescompileError(f"A shortcut skips at least one layer, so every={every} places none: give 1 or more.")
    for chain, run in _runs(graph, report):
        last: Value | None = None
        for start in range(0, len(run) - every + 1, every):
            place = _place(chain, run[start : start + every], join, last, alike)
            last = place.join
            yield place
        rest = len(run) % every
        if rest:
            yield Refusal(run[-rest].name, f"{rest} of {every} layers are left: a rest gets no shortcut")


def by_stage(graph: Graph, report: Report, join: Join, alike: Likeness) -> Iterator[Place | Refusal]:
    """Pairs of layers within a stage, the layers that keep one shape and the one that changes to it.

    A stage's odd layer goes with its last pair; stages of one layer that follow one another are paired too; a region
    with branches (an Inception module) is a group of its own.
    """
    for chain, run in _runs(graph, report):
        last: Value | None = None
        for stage in _stages(run):
            groups = [stage[at : at + 2] for at in range(0, len(stage), 2)]
            if len(groups) > 1 and len(groups[-1]) == 1:
                groups[-2:] = [groups[-2] + groups[-1]]
            for group in groups:
                if len(group) == 1 and not _has_branches(group[0]):
                    why = "the only layer of its stage: every=1, or between=FORK:JOIN, puts a shortcut around it"
                    yield Refusal(group[0].name, why)
                else:
                    place = _place(chain, group, join, last, alike)
                    last = place.join
                    yield place


def by_name(graph: Graph, report: Report, pairs: Sequence[str]) -> Iterator[Place | Refusal]:
    """Places that the caller names, `FORK:JOIN`: a value, operation or module each. RescompileError where none fits."""
    taken: dict[Value, str] = {}
    spans: list[tuple[int, int, str]] = []
    for pair in pairs:
        fork, join = _ends(graph, pair)
        ops = _ops_between(fork, join)
        if not ops:
            before = bool(_ops_between(join, fork)) or fork is join
            why = "lies before it" if before else f"does not come from '{fork.name}'"
            raise RescompileError(
                f"No shortcut fits '{pair}': '{join.name}' {why}; name a fork that leads to the join."
            )
        span = (ops[0].order, ops[-1].order, pair)
        for low, high, other in spans:
            if low < span[0] <= high < span[1] or span[0] < low <= span[1] < high:
                raise RescompileError(f"The requests '{other}' and '{pair}' overlap: nest them or keep them apart.")
        if join in taken:
            raise RescompileError(f"The requests '{taken[join]}' and '{pair}' end in one value: keep one of them.")
        taken[join] = pair
        spans.append(span)
        existing = _existing(report, fork, join)
        if existing is not None:
            yield Refusal(pair, f"there is a shortcut already: block {existing.id}, {existing.fork} → {existing.join}")
            continue
        yield Place(fork, join, tuple(ops))


def _existing(report: Report, fork: Value, join: Value) -> Block | None:
    """The block that a shortcut from `fork` to `join` has made already, whatever it did to the branch and its end."""
    forks = {fork}
    for block in report:
        if _is_end(block, fork):  # the stream goes on from what stands in for the value
            forks.update(_handed_on(block))
    for block in report:
        op = block.fork_value.producer
        shifted = op is not None and op.kind is OpKind.ADD and any(operand in forks for operand in op.operands)
        if (block.fork_value in forks or shifted) and _is_end(block, join):
            return block
    return None


def _is_end(block: Block, value: Value) -> bool:
    """Whether a branch of the block ends in the value, but for factors and shifts."""
    if value.producer is None or value.producer not in (*block.join_ops, *block.branch_ops):
        return False
    ends = [value]
    for _ in range(_FACTORS):
        users = [op for end in ends for op in end.users]
        if value is block.join_op.output or any(op in block.join_ops for op in users):
            return True
        ends = [op.output for op in users if op.has(Trait.ELEMENTWISE) and not op.has(Trait.ACTIVATION)]
    return False


def _handed_on(block: Block) -> list[Value]:
    """The join, and what a transition alone makes of it."""
    readers = block.join_op.output.users
    transition = block.join_op.kind is OpKind.CONCAT and len(readers) == 1 and is_pointwise(readers[0])
    return [block.join_op.output, *([readers[0].output] if transition else [])]


def by_resolution(graph: Graph, report: Report) -> Iterator[Place | Refusal]:
    """Long skips, from the last value of each resolution on the way down to the first of the same on the way up.

    1. Something between them lowers the resolution and something raises it again; the skip is not around a stem.
    2. The join is what the layer behind the rise reads, so that a transposed convolution's activation comes first.
    """
    joins = _joins(report)
    for chain in chains(graph):
        earlier: dict[Shape, Layer] = {}  # the last layer that ended at each resolution
        for before, after in pairwise(layers(chain, joins)):
            start, end, there = (_positions(value) for value in (before.entry, before.end, after.entry))
            if before.head or after.head or start is None or end is None or there is None:
                continue
            if there != end and not all(isinstance(extent, int) for extent in (*there, *end)):
                shapes = f"{show(before.end.shape)} → {show(after.entry.shape)}"
                why = "odd sizes would not come back; fix height and width (not the batch)"
                yield Refusal(after.name, f"kind=long compares resolutions, and {shapes} is symbolic: {why}")
            rises = _larger(there, end) or (there == end and _larger(end, start))
            source = earlier.get(there) if rises else None
            if source is not None and (source.residual or after.residual):
                yield Refusal(after.name, "a residual block holds one of the two ends already")
            elif source is not None:
                ops = tuple(chain.ops_between(source.end, after.entry))
                yield Place(source.end, after.entry, ops)
            earlier[end] = before


def _positions(value: Value) -> Shape | None:
    """Extents of an image without batch and channels."""
    return None if value.shape is None or len(value.shape) < 3 else value.shape[2:]


def _larger(one: Shape, other: Shape) -> bool:
    return one != other and all(
        isinstance(a, int) and isinstance(b, int) and a >= b for a, b in zip(one, other, strict=False)
    )


def _runs(graph: Graph, report: Report) -> Iterator[tuple[Chain, list[Layer]]]:
    """Consecutive layers between the stem and the head that no block holds."""
    joins = _joins(report)
    for chain in chains(graph):
        run: list[Layer] = []
        for layer in layers(chain, joins):
            if layer.stem or layer.head or layer.residual:
                if run:
                    yield chain, run
                run = []
            else:
                run.append(layer)
        if run:
            yield chain, run


def _joins(report: Report) -> set[Op]:
    """What brings the paths of blocks together: a contraction that alone reads a dense join, a transition, does too."""
    joins = {op for block in report if block.kind != "branches" for op in block.join_ops}
    handed_on = (value.producer for block in report if block.kind != "branches" for value in _handed_on(block))
    return joins | {op for op in handed_on if op is not None}


def _place(chain: Chain, group: Sequence[Layer], join: Join, previous: Value | None, alike: Likeness) -> Place:
    """The place around a group. `previous`: where the shortcut before this one joins."""
    place = _around(chain, group, join, previous)
    why = alike(place) if join == "before-activation" else ""
    behind = _around(chain, group, "after", previous) if why else place
    if why and not alike(behind):
        return replace(behind, note=f"joins behind the activation, for before it {why}")
    return place


def _around(chain: Chain, group: Sequence[Layer], join: Join, previous: Value | None) -> Place:
    first, last = group[0], group[-1]
    if join == "pre-activation":
        fork, end = first.lead, last.work
    else:
        fork, end = first.entry, last.inner if join == "before-activation" else last.end
    forks = chain.past_moves(fork)
    if previous in forks:  # one stream leads through both shortcuts, rather than around the join of the first
        forks = forks[forks.index(previous) :]
    # Where layouts differ (an NHWC stream around NCHW convolutions), behind some moves at the ends they agree.
    ways = list(product(forks, chain.past_moves(end)))
    places = [Place(start, stop, tuple(chain.ops_between(start, stop)), len(group)) for start, stop in ways]
    return next((place for place in places if isinstance(geometry(place), Geometry)), places[0])


def _stages(run: Sequence[Layer]) -> Iterator[list[Layer]]:
    stages: list[list[Layer]] = []
    shape: Shape | None = None
    for layer in run:
        if stages and layer.end.shape == shape:
            stages[-1].append(layer)
        else:
            stages.append([layer])
        shape = layer.end.shape
    single: list[Layer] = []
    for stage in stages:
        if len(stage) == 1 and not _has_branches(stage[0]):
            single += stage
            continue
        if single:
            yield single
        single = []
        yield stage
    if single:
        yield single


def _has_branches(layer: Layer) -> bool:
    return any(len(step.ops) > 1 and step.works for step in layer.steps)


def _ends(graph: Graph, pair: str) -> tuple[Value, Value]:
    fork, colon, join = pair.rpartition(":")
    if not colon or not fork or not join:
        raise RescompileError(f"Cannot read '{pair}': write FORK:JOIN, names of values, operations or modules.")
    return _find(graph, fork), _find(graph, join)


def _find(graph: Graph, name: str) -> Value:
    """The value of that name, or what the operation or the module of that name hands on."""
    known: dict[str, Value] = {value.name: value for value in graph.values if not value.constant}
    modules: dict[str, Value] = {}
    for op in graph:
        known.setdefault(op.name, op.output)
        path = op.module
        while path:
            modules[path] = op.output
            path = path.rpartition(".")[0]
    found = known.get(name) or modules.get(name)
    if found is None:
        hint = nearest(name, [*known, *modules])
        raise RescompileError(f"There is no value, operation or module '{name}' in the graph{hint}.")
    return found


def _ops_between(fork: Value, join: Value) -> list[Op]:
    """The operations on the ways from `fork` to `join`, in topological order."""
    bound = -1 if fork.producer is None else fork.producer.order
    behind: set[Op] = set()
    stack = [join]
    while stack:
        op = stack.pop().producer
        if op is not None and op.order > bound and op not in behind:
            behind.add(op)
            stack.extend(op.operands)
    reached: set[Value] = {fork}
    found = []
    for op in sorted(behind, key=lambda op: op.order):
        if not reached.isdisjoint(op.operands):
            reached.update(op.outputs)
            found.append(op)
    return found if join in reached else []
