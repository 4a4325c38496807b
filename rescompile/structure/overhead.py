"""What branches and shortcuts cost, so that the overhead of skips is a number.

A branch costs what its operations do, the blocks nested in it included. A shortcut costs its operations, the join and
the factors of the join's mix: without the skip there would be no sum to compute, no skip to read and no sum to write.
Of a sum of several terms, and of a fused operation that holds the sum, the shortcut pays for one addition and for
reading the skip. Each operation counts once in the totals, and each parameter once however many operations share it:
for the skips only where no branch, and nothing outside blocks, reads it too.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import chain, pairwise
from typing import TYPE_CHECKING, Any

from rescompile.costs import Costs, graph_costs, op_cost, tensor_size, trained_parameters
from rescompile.graph import Graph, Op, Value
from rescompile.kinds import OpKind, Trait
from rescompile.structure.members import BRANCH, NORM, SHORTCUT, SUM, Members, skip_of

if TYPE_CHECKING:
    from rescompile.blocks import Block

_NO_SKIP = ("branches",)
_BEHIND = "behind"  # neither branch nor shortcut: what follows the sum


@dataclass(frozen=True, slots=True)
class PathCost:
    """Trained numbers, floating-point operations and bytes moved on one call, as `rescompile.costs` counts them."""

    parameters: int = 0
    flops: int = 0
    bytes: int = 0

    def __add__(self, other: PathCost) -> PathCost:
        return PathCost(self.parameters + other.parameters, self.flops + other.flops, self.bytes + other.bytes)

    def __sub__(self, other: PathCost) -> PathCost:
        return PathCost(self.parameters - other.parameters, self.flops - other.flops, self.bytes - other.bytes)

    def to_dict(self) -> dict[str, int]:
        """As JSON."""
        return {"parameters": self.parameters, "flops": self.flops, "bytes": self.bytes}


@dataclass(frozen=True, slots=True)
class BlockCosts:
    """What a block's branch and its shortcut cost."""

    branch: PathCost
    shortcut: PathCost

    def to_dict(self) -> dict[str, dict[str, int]]:
        """As JSON."""
        return {"branch": self.branch.to_dict(), "shortcut": self.shortcut.to_dict()}


@dataclass(frozen=True, slots=True)
class Overhead:
    """What the blocks cost, by id, what all skips cost together, and the whole graph."""

    blocks: dict[int, BlockCosts]
    skips: PathCost
    total: Costs

    @property
    def shares(self) -> dict[str, float]:
        """The skips' share of the whole graph's parameters, FLOPs and bytes."""
        return {
            "parameters": _share(self.skips.parameters, self.total.parameters),
            "flops": _share(self.skips.flops, self.total.flops),
            "bytes": _share(self.skips.bytes, self.total.bytes),
        }

    def to_dict(self) -> dict[str, Any]:
        """The totals as JSON."""
        return {
            "total": self.total.to_dict(),
            "skips": self.skips.to_dict(),
            "shares": {name: round(share, 6) for name, share in self.shares.items()},
        }


def block_costs(
    graph: Graph, members: Members, bodies: Iterable[Graph] = (), extents: Mapping[str, int] | None = None
) -> Overhead:
    """Costs of every branch and shortcut on one call.

    `bodies`: the graphs that operations hold; each runs once. `extents`: what symbolic extents count as (1 otherwise).
    """
    extents = extents or {}
    branches = _Subtrees(members)
    shortcuts = {block.id: PathCost() for block in members.blocks}
    skips = PathCost()
    graphs = list(dict.fromkeys([graph, *bodies]))
    for op in chain.from_iterable(graphs):
        parts = [(part.block, side) for part in members.of(op) if (side := _side(part.block, part.role))]
        if not parts:
            continue
        cost = op_cost(op, extents)
        whole = PathCost(0, cost.flops, cost.bytes)
        joined = next((block for block, side in parts if block.join_op is op and side == SHORTCUT), None)
        own = whole if joined is None else _skip_cost(op, joined, whole, extents)
        for block, side in parts:
            if side == SHORTCUT:
                shortcuts[block.id] += own
        if any(side == SHORTCUT and block.kind not in _NO_SKIP for block, side in parts):
            skips += own
        # A fused operation may also be the next block's norm: that block does not pay for this one's sum.
        around = parts if joined is None else [part for part in parts if members.within(joined, part[0])]
        branches.add(own, (_node(block, side) for block, side in around))
        if own != whole:
            branches.add(whole - own, (_node(block, _rest_side(op, block, side)) for block, side in parts))
    skips += _add_parameters(graphs, members, branches, shortcuts)
    totals = branches.totals()
    found = {block.id: BlockCosts(totals[block.id], shortcuts[block.id]) for block in members.blocks}
    return Overhead(found, skips, _total([graph_costs(each, extents) for each in graphs]))


def _total(costs: list[Costs]) -> Costs:
    if len(costs) == 1:
        return costs[0]
    return replace(
        costs[0],
        parameters=sum(each.parameters for each in costs),
        parameter_bytes=sum(each.parameter_bytes for each in costs),
        flops=sum(each.flops for each in costs),
        bytes=sum(each.bytes for each in costs),
        ops=sum(each.ops for each in costs),
        uncounted=sum(each.uncounted for each in costs),
    )


def overhead_line(overhead: Overhead) -> str:
    """The overhead of the skips in one sentence."""
    shares = overhead.shares
    symbols = ", ".join(f"{name} = {extent}" for name, extent in overhead.total.symbols)
    return (
        f"skips cost {shares['parameters']:.2%} of the parameters, {shares['flops']:.2%} of the FLOPs, "
        f"{shares['bytes']:.2%} of the bytes moved" + (f", with {symbols}" if symbols else "")
    )


def _share(part: int, whole: int) -> float:
    return part / whole if whole else 0.0


def _side(block: Block, role: str) -> str:
    """Which path of the block pays for an operation in that role; "" when neither does."""
    if role == NORM:
        return ""
    if role in (BRANCH, SHORTCUT):
        return role
    if role == SUM:  # A + F of a parallel block would be there without the skip; h − x of a mix would not
        return SHORTCUT if block.kind in ("add", "gated") else BRANCH
    return BRANCH if block.kind in _NO_SKIP else SHORTCUT


def _rest_side(op: Op, block: Block, side: str) -> str:
    """Who pays for what a join does besides adding the skip: the branch, but for a norm behind the sum."""
    if block.join_op is not op or side != SHORTCUT:
        return side
    return _BEHIND if op.kind is OpKind.ADD_NORM else BRANCH


def _node(block: Block, side: str) -> int | None:
    """The innermost block whose branch holds what is on that side of `block`."""
    return block.id if side == BRANCH else block.parent


def _skip_cost(op: Op, block: Block, whole: PathCost, extents: Mapping[str, int]) -> PathCost:
    """What of a join is there for the skip."""
    terms = [value for value in op.operands if not value.constant]
    if not op.has(Trait.FUSED) and (op.kind is not OpKind.ADD or len(terms) <= 2):
        return whole
    flops, moved = tensor_size(op.outputs[0], extents)[0], tensor_size(skip_of(block), extents)[1]
    if op.kind is OpKind.ADD_NORM and len(op.outputs) > 1 and op.outputs[1].uses:
        moved += tensor_size(op.outputs[1], extents)[1]
    return PathCost(0, min(flops, whole.flops), min(moved, whole.bytes))


def _add_parameters(
    graphs: Iterable[Graph], members: Members, branches: _Subtrees, shortcuts: dict[int, PathCost]
) -> PathCost:
    """Give each parameter to the paths whose operations read it; what the skips alone have."""
    skips = 0
    for value in chain.from_iterable(map(trained_parameters, graphs)):
        size = PathCost(tensor_size(value)[0])
        sides: dict[tuple[Block, str], None] = {}
        only_skips = True
        for op in _readers(value):
            parts = [(part.block, _side(part.block, part.role)) for part in members.of(op)]
            # The weights of a fused join are its branch's.
            parts = [(block, _rest_side(op, block, side) if op.has(Trait.FUSED) else side) for block, side in parts]
            only_skips &= any(side == SHORTCUT and block.kind not in _NO_SKIP for block, side in parts)
            sides.update(((block, side), None) for block, side in parts if side)
        branches.add(size, (_node(block, side) for block, side in sides))
        for block, side in sides:
            if side == SHORTCUT:
                shortcuts[block.id] += size
        skips += size.parameters if only_skips and sides else 0
    return PathCost(skips)


def _readers(value: Value) -> Iterable[Op]:
    """The operations that read a parameter on each call, directly or as computed from it once."""
    found: dict[Op, None] = {}
    pending = [value]
    seen: set[Op] = set()
    while pending:
        for op, _ in pending.pop().uses:
            if op in seen:
                continue
            seen.add(op)
            if all(output.constant for output in op.outputs):
                pending.extend(op.outputs)
            else:
                found[op] = None
    return found


class _Subtrees:
    """Sums over the blocks nested in each block, in which what several of them hold counts once."""

    def __init__(self, members: Members) -> None:
        self._members = members
        self._own = {block.id: PathCost() for block in members.blocks}

    def add(self, cost: PathCost, nodes: Iterable[int | None]) -> None:
        """Count `cost` in each of the blocks and in all around them, once."""
        if cost == PathCost():
            return
        position = self._members.preorder
        inside = sorted({node for node in nodes if node is not None}, key=position.__getitem__)
        for node in inside:
            self._own[node] += cost
        for left, right in pairwise(inside):
            around = self._around(left, right)
            if around is not None:
                self._own[around] -= cost

    def totals(self) -> dict[int, PathCost]:
        """By block."""
        totals = dict(self._own)
        for block in self._members.blocks:  # nested ones first
            if block.parent is not None:
                totals[block.parent] += totals[block.id]
        return totals

    def _around(self, left: int, right: int) -> int | None:
        """The innermost block that holds both; `left` comes first in preorder."""
        members = self._members
        around: int | None = left
        while around is not None and not members.within(members.by_id[right], members.by_id[around]):
            around = members.by_id[around].parent
        return around
