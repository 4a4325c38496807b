"""Networks of several streams: y₁ = x₁ + F(x₂), y₂ = x₂ + G(y₁) (RevNet, path aggregation, value residuals).

Contracted, a stream leads back along its own skips only, so a branch that came over from another stream does not show
where it comes from. Here the branch is followed through the joins of blocks that began before the shortcut's value:

1. One operand, by a free way, is a value that the other one was made from.
2. The other one is no stream itself: it does work of its own behind its last join. (Two streams that merge are no
   block.)

The search is short where streams cross often, and all searches of one graph together are bounded by its size.
"""

from __future__ import annotations

from dataclasses import dataclass

from rescompile.detection.chains import order
from rescompile.detection.judgement import Judgement
from rescompile.detection.paths import branch_works, is_scale, keeps_all
from rescompile.graph import Op, Value
from rescompile.kinds import Trait

_STEPS = 8  # free operations between the fork and the join, at most
_VISITS = 1000  # values of one search


@dataclass(frozen=True, slots=True)
class Crossing:
    """A shortcut and a branch that came over another stream."""

    fork: Value
    shortcut_ops: list[Op]
    region: list[Op]
    outside: list[Value]

    @property
    def shortcut(self) -> str:
        """The shortcut's kind."""
        moved = any(op.has(Trait.FREE) and not keeps_all(op) for op in self.shortcut_ops)
        return "view" if moved else "identity"


def crossing(judgement: Judgement, skip: Value, other: Value, through: bool = False) -> Crossing | None:
    """The block whose shortcut ends in `skip` and whose branch ends in `other`; None when they make none.

    `through`: the shortcut may be the stream of the block that `skip` ends, where the branch starts before that.
    """
    if _free_way(judgement, other, through=False)[-1] in judgement.reach.forks:
        return None
    near = _free_way(judgement, skip, through=False)
    found = _followed(judgement, near, other)
    if found is None and through and near[-1] in judgement.reach.forks:
        found = _followed(judgement, _free_way(judgement, skip, through=True), other)
    return found


def _followed(judgement: Judgement, ways: list[Value], other: Value) -> Crossing | None:
    """The block that starts from one of `ways`, of which each leads to the one before."""
    if all(len(value.uses) == 1 for value in ways):
        return None
    lowest = order(ways[-1])
    sources: dict[Value, tuple[Value, ...]] = {}
    pending = [other]
    while pending:
        value = pending.pop()
        if value in sources or value.producer is None or order(value) <= lowest or value in ways:
            continue
        judgement.budget -= 1
        if len(sources) >= _VISITS or judgement.budget <= 0:
            return None
        fork = judgement.reach.forks.get(value)
        within = fork is not None and order(fork) >= lowest
        sources[value] = (fork,) if fork is not None and within else judgement.reach.operands(value.producer)
        pending.extend(sources[value])
    read = {value for found in sources.values() for value in found}
    fork = next((value for value in ways if value in read), None)
    if fork is None:
        return None
    from_fork = {fork}
    region: list[Op] = []
    outside: dict[Value, None] = {}
    for value in sorted(sources, key=order):
        if value.producer is None or from_fork.isdisjoint(sources[value]):
            continue
        from_fork.add(value)
        if not region or region[-1] is not value.producer:
            region.append(value.producer)
        outside.update((source, None) for source in sources[value] if source not in from_fork)
    if other not in from_fork or not branch_works(judgement.reach, region):
        return None
    shortcut = [value.producer for value in ways[: ways.index(fork)] if value.producer is not None]
    return Crossing(fork, shortcut[::-1], region, list(outside))


def _free_way(judgement: Judgement, value: Value, through: bool) -> list[Value]:
    """The value, and those before it by free operations and factors, up to the last join or `through` it."""
    forks = judgement.reach.forks
    ways = [value]
    for _ in range(_STEPS):
        value, op = ways[-1], ways[-1].producer
        if value in forks and through:
            draft = None if op is None else judgement.drafts.get(op)
            if draft is None or draft.kind not in ("add", "gated") or draft.shortcut not in ("identity", "view"):
                break
            ways.append(forks[value])
            continue
        if op is None or value in forks or not (op.has(Trait.FREE) or is_scale(op)):
            break
        before = [operand for operand in judgement.reach.operands(op) if not operand.constant]
        if len(before) != 1:
            break
        ways.append(before[0])
    return ways
