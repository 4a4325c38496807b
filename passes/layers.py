"""The layers of a network that runs straight ahead.

A *step* leads from one value to one other: a single operation, or a region with one way in and one way out (an
Inception module, a squeeze-and-excite gate, a residual block). Steps that follow one another make a *chain*. A *layer*
is a working step with the norm and the activation that follow it. The *stem* is the first layer behind each graph
input; the *head* is what follows a reduction to a vector (global pooling, flatten, the last token).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from heapq import heappop, heappush

from rescompile.graph import Graph, Op, Value
from rescompile.kinds import OpKind, Trait

_LARGEST_REGION = 4_000  # operations; a wider one is taken for a chain's end
_WORKING = frozenset(
    (
        OpKind.CONV,
        OpKind.CONV_TRANSPOSE,
        OpKind.LINEAR,
        OpKind.MATMUL,
        OpKind.EINSUM,
        OpKind.ATTENTION,
        OpKind.RECURRENT,
        OpKind.EMBEDDING,
        OpKind.FFT,
        OpKind.FUSED_CONV,
        OpKind.FUSED_LINEAR,
        OpKind.OPAQUE,
    )
)
_MOVES = (OpKind.PERMUTE, OpKind.PAD, OpKind.RESHAPE, OpKind.SLICE, OpKind.CAST, OpKind.IDENTITY, OpKind.DROPOUT)
_RESIZES = (OpKind.INTERPOLATE, OpKind.CONV_TRANSPOSE)


@dataclass(frozen=True, slots=True, eq=False)
class Step:
    """Operations between two values through which everything passes, in topological order."""

    entry: Value
    exit: Value
    ops: tuple[Op, ...]

    @property
    def op(self) -> Op:
        """The last operation, which makes `exit`."""
        return self.ops[-1]

    @property
    def single(self) -> bool:
        """Whether the step is one operation."""
        return len(self.ops) == 1

    @property
    def gate(self) -> bool:
        """Whether the step multiplies its entry by something made of it (squeeze-and-excite, x·σ(x))."""
        return not self.single and self.op.kind is OpKind.MUL and self.entry in self.op.inputs

    @property
    def works(self) -> bool:
        """Whether the step is the work of a layer, rather than a norm, an activation, a pool or a move."""
        return not self.gate and any(op.kind in _WORKING for op in self.ops)

    @property
    def norm(self) -> bool:
        """Whether the step is a normalisation."""
        return self.single and self.op.has(Trait.NORM)

    @property
    def activation(self) -> bool:
        """Whether the step is a nonlinearity."""
        return self.single and self.op.has(Trait.ACTIVATION)

    @property
    def move(self) -> bool:
        """Whether the step moves elements only, or switches off in evaluation."""
        return self.single and self.op.kind in _MOVES

    @property
    def affine(self) -> bool:
        """Whether the step adds or multiplies constants only."""
        kinds = (OpKind.ADD, OpKind.MUL, OpKind.DIV, OpKind.NEG)
        return self.single and self.op.kind in kinds

    @property
    def resolution(self) -> bool:
        """Whether the step pools or interpolates."""
        return self.single and (self.op.has(Trait.POOL) or self.op.kind in _RESIZES)


@dataclass(frozen=True, slots=True, eq=False)
class Layer:
    """A working step and what belongs to it.

    `entry` is what the layer reads, `inner` the value before its last activation (`end` where there is none), `end`
    what it hands on. `lead` is what the norm and activation in front of the working step read (pre-activation), and
    `work` the working step's result.
    """

    steps: tuple[Step, ...]
    entry: Value
    inner: Value
    end: Value
    lead: Value
    work: Value
    stem: bool
    head: bool
    residual: bool  # a block lies inside

    @property
    def ops(self) -> list[Op]:
        """The operations, in order."""
        return [op for step in self.steps for op in step.ops]

    @property
    def name(self) -> str:
        """The name of the working operation."""
        return next(step for step in self.steps if step.works).op.name


@dataclass(frozen=True, slots=True, eq=False)
class Place:
    """A shortcut from `fork` to `join`, the value that it is added to. `ops`: the branch, in topological order.

    `note`: what is to be said of it besides.
    """

    fork: Value
    join: Value
    ops: tuple[Op, ...]
    layers: int = 0
    note: str = ""

    @property
    def name(self) -> str:
        """What reports call the place."""
        return f"{self.fork.name} → {self.join.name}"


@dataclass(slots=True, eq=False)
class Chain:
    """Steps one after the other, and the layers that they make up. `worked`, `head`: what lies before the chain."""

    start: Value
    steps: list[Step] = field(default_factory=list)
    worked: bool = False
    head: bool = False

    def past_moves(self, value: Value) -> list[Value]:
        """The value, and those that moves alone make of it."""
        found = [value]
        for step in self.steps:
            if step.entry is found[-1] and step.move:
                found.append(step.exit)
        return found

    def ops_between(self, fork: Value, join: Value) -> list[Op]:
        """The operations from one value of the chain to a later one."""
        found: list[Op] = []
        inside = False
        for step in self.steps:
            inside = inside or step.entry is fork
            if inside:
                found.extend(step.ops)
            if step.exit is join:
                return found
        return []


def chains(graph: Graph) -> list[Chain]:
    """The chains that start from graph inputs, and from where chains come together, in topological order."""
    found: list[Chain] = []
    worked: set[Value] = set()  # values behind a working operation
    vectors: set[Value] = set()  # values of the head
    seen: set[Value] = set()
    pending: list[tuple[int, int, Value]] = []

    def start(value: Value) -> None:
        if value not in seen and not value.constant:
            seen.add(value)
            order = -1 if value.producer is None else value.producer.order
            heappush(pending, (order, len(seen), value))

    for value in graph.inputs:
        start(value)
    moving = _moving(graph)
    while pending:
        value = heappop(pending)[2]
        chain = Chain(value, worked=value in worked, head=value in vectors)
        done, head = chain.worked, chain.head
        while (step := _step(graph, value, moving)) is not None:
            chain.steps.append(step)
            done = done or step.works
            head = head or (done and _reduces_to_vector(step))
            value = step.exit
            seen.add(value)
        if chain.steps:
            found.append(chain)
        for op in value.users:
            if op.kind is OpKind.RECURRENT and op.operands[0] is not value and op.operands[0] in moving:
                continue  # a state; the chain of the sequence goes through it
            works = done or op.kind in _WORKING
            for output in op.outputs:
                if works:
                    worked.add(output)
                if head or (works and _reduces(op)):
                    vectors.add(output)
                start(output)
    return found


def _moving(graph: Graph) -> set[Value]:
    """The values that depend on an input; others are weights, or computed from weights (by a weight norm)."""
    found = set(graph.inputs)
    for op in graph:
        if not found.isdisjoint(op.operands):
            found.update(op.outputs)
    return found


def _step(graph: Graph, value: Value, moving: Collection[Value]) -> Step | None:
    """The step that `value` enters; None where the chain ends."""
    readers = value.users
    if not readers or graph.is_output(value):
        return None
    if len(readers) == 1:
        op = readers[0]
        if not _reads_only(op, (value,), moving):
            return None
        open_ = [output for output in op.outputs if output.uses or graph.is_output(output)]
        if op.kind is OpKind.RECURRENT:  # the stream is the sequence, its last states may go elsewhere
            return Step(value, open_[0], (op,)) if open_[:1] == list(op.outputs[:1]) else None
        if len(open_) == 1:
            return Step(value, open_[0], (op,))
    return _region(graph, value, moving)


def _region(graph: Graph, entry: Value, moving: Collection[Value]) -> Step | None:
    """The operations from `entry` to where all that comes from it has gone through one value again."""
    heap: list[tuple[int, int, Op]] = []
    queued: set[Op] = set()
    known: set[Value] = {entry}
    unread: dict[Value, int] = {entry: len(entry.users)}  # values that operations outside still read, with how many
    inside: list[Op] = []

    def queue(value: Value) -> None:
        for op in value.users:
            if op not in queued:
                queued.add(op)
                heappush(heap, (op.order, len(queued), op))

    queue(entry)
    while heap and len(inside) < _LARGEST_REGION:
        op = heappop(heap)[2]
        if not _reads_only(op, known, moving):
            return None
        inside.append(op)
        for value in dict.fromkeys(op.operands):
            if value in unread:
                unread[value] -= 1
                if not unread[value]:
                    del unread[value]
        for output in op.outputs:
            known.add(output)
            leaves = graph.is_output(output)
            if output.uses or leaves:
                unread[output] = len(output.users) + leaves
                queue(output)
        if len(unread) == 1 and (last := next(iter(unread))) in op.outputs:
            return Step(entry, last, tuple(inside))
    return None


def _reads_only(op: Op, known: Collection[Value], moving: Collection[Value]) -> bool:
    """Whether nothing else that depends on an input enters; the states that a recurrent layer starts from may."""
    if op.kind is OpKind.RECURRENT:
        return op.operands[0] in known
    return all(value in known or value not in moving for value in op.operands)


def _reduces_to_vector(step: Step) -> bool:
    return step.single and _reduces(step.op)


def _reduces(op: Op) -> bool:
    """Whether positions are pooled, flattened or picked away until features alone are left: [N, C, 1, 1] or [N, C].

    What merges or drops some of several axes of positions (an image read as a sequence) leaves a stream.
    """
    if not op.operands or op.kind in _WORKING:
        return False
    before, after = op.operands[0].shape, op.outputs[0].shape
    if before is None or after is None:
        return False
    held = [sum(extent != 1 for extent in shape) for shape in (before, after)]
    return held[1] < held[0] and sum(extent != 1 for extent in after[1:]) <= 1


def layers(chain: Chain, blocks: Collection[Op]) -> Iterator[Layer]:
    """The layers of a chain. `blocks`: the joins of the graph's residual blocks."""
    steps = chain.steps
    worked, head = chain.worked, chain.head
    at = 0
    previous = chain.start  # where the layer before ended, and what pooled or interpolated after it
    behind = chain.start  # the result of the working step before
    while at < len(steps):
        step = steps[at]
        if not step.works:
            head = head or (worked and _reduces_to_vector(step))
            if not step.move and not (step.norm or step.activation):
                previous = step.exit
                if step.resolution or not step.affine:
                    behind = step.exit
            at += 1
            continue
        first = at
        while first and steps[first - 1].move and steps[first].entry is not previous:
            first -= 1
        last = _trail(steps, at)
        members = steps[first : last + 1]
        active = [index for index, member in enumerate(members) if member.activation]
        inner = members[active[-1]].entry if active else members[-1].exit
        tail = at
        while tail + 1 <= last and steps[tail + 1].affine:
            tail += 1
        yield Layer(
            steps=tuple(members),
            entry=members[0].entry,
            inner=inner,
            end=members[-1].exit,
            lead=behind,
            work=steps[tail].exit,
            stem=not worked,
            head=head,
            residual=any(op in blocks for member in members for op in member.ops),
        )
        worked = True
        behind = steps[tail].exit
        previous = members[-1].exit
        at = last + 1


def _trail(steps: Sequence[Step], work: int) -> int:
    """The index of the last step that belongs to the layer: norms, gates and shifts, then one activation."""
    last = at = work
    active = False
    while at + 1 < len(steps):
        step = steps[at + 1]
        if step.activation and not active:
            active = True
        elif not (step.norm or step.affine or step.gate or step.move) or (step.move and _reduces_to_vector(step)):
            break
        at += 1
        if not step.move:
            last = at
    return last
