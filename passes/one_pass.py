"""Which operations around a sum one kernel computes in one pass: no element twice, no value that it does not have yet.

A kernel runs a root (a contraction, a window) or none, computes elementwise on what it has in registers, and writes
each element to the place that index arithmetic tells. So everything between the root and what is written is
elementwise or a move, and the ways from one value to the result agree in what element goes where.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from rescompile.fused_region import FUSIBLE, unfit
from rescompile.graph import Graph, Op, Value
from rescompile.kinds import OpKind, Trait
from rescompile.passes.joins import only_reader
from rescompile.plans import Fuse, depends_on, region_edit, same_shape

K = OpKind

CONTRACTIONS = frozenset((K.CONV, K.CONV_TRANSPOSE, K.LINEAR, K.MATMUL))
WINDOWS = frozenset((K.AVG_POOL, K.MAX_POOL))
_MOVES = frozenset((K.IDENTITY, K.CAST, K.RESHAPE, K.PERMUTE, K.SLICE, K.ROLL, K.FLIP, K.PAD))
_VIEWS = frozenset((K.IDENTITY, K.RESHAPE, K.SLICE, K.PERMUTE))
_PLACED = (_MOVES | {K.CONCAT}) - {K.IDENTITY, K.CAST}  # put elements elsewhere
_TESTS = frozenset((K.WHERE, K.EQUAL, K.NOT_EQUAL, K.LESS, K.LESS_EQUAL, K.GREATER, K.GREATER_EQUAL))
_PARTS = 16  # of a concatenation that a kernel reads in the place of its copy
_FAR = 64  # operations between a root and the sum; more than any block tail has


@dataclass(frozen=True)
class Place:
    """A graph, and which of its operations no kernel may hold, each with the reason."""

    graph: Graph
    closed: Mapping[str, str]


@dataclass(frozen=True)
class Kernel:
    """Operations of one kernel in topological order, and what it returns: its last value first."""

    ops: tuple[Op, ...]
    outputs: tuple[Value, ...]
    root: Op | None

    @property
    def computing(self) -> tuple[Op, ...]:
        """Those that would pass over memory on their own: all but the ones that name or index what is there."""
        return tuple(op for op in self.ops if op.kind not in _VIEWS)


def computed(op: Op) -> list[Value]:
    """The operands that depend on the graph's inputs."""
    return [value for value in op.operands if not value.constant]


def is_sum(op: Op) -> bool:
    """Whether the operation adds up two streams; a difference, as in x + t·(h − x), is no stream of its own."""
    return op.kind is K.ADD and len(computed(op)) > 1 and all(scale > 0 for scale in op.scales)


def paths(place: Place, value: Value, roots: frozenset[OpKind], *, shared: bool) -> Iterator[tuple[Op, ...]]:
    """Ways from a root up to `value`, each in topological order; `shared`: by values that others read too.

    On the way every operation computes each element of its result from the one element that the root made.
    """
    pending: list[tuple[Value, tuple[Op, ...]]] = [(value, ())]
    seen: set[Value] = set()
    while pending:
        current, above = pending.pop()
        op = current.producer
        if op is None or current.constant or current in seen or len(above) > _FAR:
            continue
        seen.add(current)
        if not shared and (len(current.users) > 1 or place.graph.is_output(current)):
            continue
        if op.kind in roots:
            if not unable(place, op):
                yield (op, *above)
        elif carries(place, op):
            pending.extend((operand, (op, *above)) for operand in _carried(op))


def carries(place: Place, op: Op) -> bool:
    """Whether a kernel can compute the operation on what it has: elementwise of one type, or a move."""
    if op.kind in _MOVES:
        return not unable(place, op)
    if op.kind is K.BATCH_NORM:
        return not op.attr("training") and all(v.constant for v in op.operands[1:]) and not unable(place, op)
    if not op.has(Trait.ELEMENTWISE) or op.has(Trait.RANDOM) or len(op.outputs) != 1:
        return False
    if op.kind not in _TESTS:
        types = {value.dtype for value in op.operands if value.shape != ()}
        if len(types | {op.output.dtype}) > 1:
            return False
    return not unable(place, op)


def unable(place: Place, op: Op) -> str:
    """Why a region cannot hold the operation; empty when it can."""
    if op.name in place.closed:
        return place.closed[op.name]
    if op.kind is K.IDENTITY:
        return ""
    if op.kind not in FUSIBLE:
        return f"'{op.name}' ({op.kind.value}) is nothing that a fused operation can hold"
    return unfit(op) or place.graph.cannot_emit(op.kind)


def gathered(place: Place, join: Op, path: Sequence[Op], *, behind: bool) -> Kernel | str:
    """The kernel of a root's way up to the join; with `behind`, what follows the sum too; or why there is none.

    What the operations read is taken in where only they read it, it has all of the elements, and it is elementwise or
    a move.
    """
    inside: dict[Op, None] = dict.fromkeys((*path, join))
    end, kept = join.output, False
    if behind:
        followers, kept = _followers(place, join.output, set(inside))
        inside.update(dict.fromkeys(followers))
        end = followers[-1].output if followers else end
    root = path[0] if path else None
    trouble = _take_in(place, inside, root)
    if trouble:
        return trouble
    ops = tuple(sorted(inside, key=lambda op: op.order))
    others = [op.output for op in ops if op.output is not end and _leaves(place, op.output, inside)]
    if kept and join.output not in others:
        others.append(join.output)
    return Kernel(ops, (end, *others), root)


def edit_of(place: Place, kernel: Kernel) -> Fuse | str:
    """The edit that makes the kernel one operation, or the reason why none can."""
    return region_edit(place.graph, kernel.ops, kernel.outputs)


def _carried(op: Op) -> list[Value]:
    """The operands whose elements are the result's, one for one."""
    if op.kind in _MOVES or op.kind is K.BATCH_NORM:
        return op.operands[:1]
    return [value for value in computed(op) if same_shape(value, op.output)]


def _leaves(place: Place, value: Value, inside: dict[Op, None]) -> bool:
    return place.graph.is_output(value) or any(user not in inside for user in value.users)


def _take_in(place: Place, inside: dict[Op, None], root: Op | None) -> str:
    """Add to `inside` what its operations alone read; the reason where they do not agree on what goes where."""
    pending = [(-op.order, op.name, op) for op in inside]
    heapq.heapify(pending)
    frames: dict[Op, object] = {}
    while pending:
        op = heapq.heappop(pending)[2]
        if op in frames:
            continue
        frame = _frame(op, inside, frames)
        if op not in inside:
            if frame is None or not _alone(place, op, inside, root):
                continue
            inside[op] = None
        elif frame is None:
            return f"'{op.output.name}' is needed at more than one place for one element of the result"
        frames[op] = frame
        if op is root:
            continue
        for value in computed(op):
            if value.producer is not None and value.producer not in frames:
                heapq.heappush(pending, (-value.producer.order, value.producer.name, value.producer))
    return ""


def _frame(op: Op, inside: dict[Op, None], frames: dict[Op, object]) -> object | None:
    """What stands for the order of the elements in which the result is needed; None where it is needed in several."""
    readers = [user for user in op.output.users if user in inside]
    found = {reader if reader.kind in _PLACED else frames[reader] for reader in readers}
    if len(found) > 1:
        return op if _disjoint(readers) else None
    return found.pop() if found else op


def _disjoint(readers: Sequence[Op]) -> bool:
    """Whether all are slices along one axis, none of them of what another has."""
    if any(op.kind is not K.SLICE or len(op.attr("axes")) != 1 or op.attr("steps") != (1,) for op in readers):
        return False
    if len({op.attr("axes") for op in readers}) > 1:
        return False
    bounds = [(op.attr("starts")[0], op.attr("stops")[0]) for op in readers]
    if any(not isinstance(bound, int) or bound < 0 for pair in bounds for bound in pair):
        return False
    bounds.sort()
    return all(first[1] <= second[0] for first, second in pairwise(bounds))


def _alone(place: Place, op: Op, inside: dict[Op, None], root: Op | None) -> bool:
    """Whether an operation before the join is the kernel's own: nothing else reads it, each element is made once.

    The root reads an element more than once, so what it reads is there before the kernel runs.
    """
    value = op.output
    if len(op.outputs) != 1 or _leaves(place, value, inside) or root in value.users:
        return False
    if op.kind is K.CONCAT:
        if len(op.operands) > _PARTS or unable(place, op):
            return False
    elif not carries(place, op):
        return False
    return all(user.kind in _PLACED or same_shape(value, user.output) for user in value.users)


def _followers(place: Place, total: Value, inside: set[Op]) -> tuple[list[Op], bool]:
    """What the kernel computes behind the sum, in order, and whether the sum is needed beside it.

    A chain that alone reads the sum; else the one chain up to an activation among the sum's readers.
    """
    chain = _chain(place, total, inside)
    if chain or only_reader(place.graph, total) is not None:
        return chain, False
    found = []
    for reader in total.users:
        if reader.kind not in _MOVES and _continues(place, reader, total, inside, gates=False):
            rest = [reader, *_chain(place, reader.output, inside, gates=False)]
            last = next((i for i, op in enumerate(rest) if op.has(Trait.ACTIVATION)), None)
            if last is not None:
                found.append(rest)
    return (found[0], True) if len(found) == 1 else ([], False)


def _chain(place: Place, value: Value, inside: set[Op], *, gates: bool = True) -> list[Op]:
    """The operations that one after the other alone read `value`; views at the end, which cost nothing, stay out.

    Identities stay: a region has no such steps, and what they stand for in the model's own format goes with them.
    """
    chain: list[Op] = []
    members = set(inside)
    while (reader := only_reader(place.graph, value)) is not None:
        parts = _parted(place, reader, value, members) if gates else None
        if parts is None and not _continues(place, reader, value, members, gates=gates):
            break
        chain += [*(parts or ()), reader]
        members.update(chain)
        value = reader.output
    while chain and chain[-1].kind in _VIEWS and chain[-1].kind is not K.IDENTITY:
        chain.pop()
    return chain


def _continues(place: Place, op: Op, value: Value, inside: set[Op], *, gates: bool) -> bool:
    """Whether the kernel can go on with an operation that reads what it made.

    Another stream may be added here only where no contraction of its own, which would take the sum, ends in it.
    """
    if not carries(place, op) or value not in _carried(op):
        return False
    others = [other for other in computed(op) if other is not value]
    if not others:
        return True
    if not gates or (is_sum(op) and any(_has_own(place, other) for other in others)):
        return False
    return depends_on(others, inside) is None


def _has_own(place: Place, value: Value) -> bool:
    return next(paths(place, value, CONTRACTIONS, shared=False), None) is not None


def _parted(place: Place, concat: Op, value: Value, inside: set[Op]) -> list[Op] | None:
    """Slices of what the kernel has, that `concat` alone puts beside the sum: x added to a part of the channels."""
    if concat.kind is not K.CONCAT or concat.operands.count(value) != 1 or unable(place, concat):
        return None
    slices: list[Op] = []
    for other in concat.operands:
        op = other.producer
        if other is value:
            continue
        if op is None or op.kind is not K.SLICE or unable(place, op) or only_reader(place.graph, other) is not concat:
            return None
        if op.operands[0].producer not in inside:
            return None
        slices.append(op)
    return slices


def _ways(place: Place, join: Op, skip: Value | None, roots: frozenset[OpKind]) -> Iterator[tuple[Op, ...]]:
    """Ways from a root up to the join, in the order of `searched`; the later ones are looked for when asked for."""
    streams = [value for value in computed(join) if same_shape(value, join.output)]  # others are broadcast
    branches = [value for value in streams if value is not skip or len(streams) == 1]

    def latest(ways: Iterable[tuple[Op, ...]]) -> list[tuple[Op, ...]]:
        return sorted(ways, key=lambda way: -way[0].order)

    own = [way for value in branches for way in paths(place, value, roots, shared=False)]
    yield from latest(own)
    if skip is not None:
        shared = (way for value in branches for way in paths(place, value, roots, shared=True))
        yield from latest(way for way in shared if way not in own)
    if len(branches) < len(streams) and skip is not None and skip in streams:
        yield from latest(paths(place, skip, roots, shared=False))


def searched(
    place: Place, join: Op, skip: Value | None, roots: frozenset[OpKind], trouble: Callable[[str], object]
) -> Kernel | None:
    """The kernel that runs a root of these kinds up to the join; None, and why through `trouble`, where there is none.

    A root behind the branch comes before one behind the skip, what only the kernel reads before what it returns
    beside the sum, and the root that runs last before the others.
    """
    for way in _ways(place, join, skip, roots):
        for behind in (True, False):
            kernel = gathered(place, join, way, behind=behind)
            edit = kernel if isinstance(kernel, str) else edit_of(place, kernel)
            if isinstance(edit, str):
                trouble(edit)
            elif isinstance(kernel, Kernel):
                return kernel
    return None
