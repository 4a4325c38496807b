"""Blocks as equations, and a network as the recursion y = head(Rₙ(…R₀(stem(x)))).

Letters: F what the branch does, N a norm, P a projection, T a gate, λ a vector and α a number that scale.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from rescompile.detection.paths import works
from rescompile.graph import Graph, Value
from rescompile.kinds import OpKind, Trait
from rescompile.structure.members import NORM, Members

if TYPE_CHECKING:
    from rescompile.blocks import Block

_PASSED = (OpKind.IDENTITY, OpKind.CAST, OpKind.DROPOUT)
_SKIPS = {"identity": "{x}", "projection": "P({x})", "pad": "pad({x})", "pool": "pool({x})", "view": "view({x})"}
_RUNS = 6  # runs of blocks that the text of a chain writes out
_CHAINS = 12  # chains that the text lists
_LISTED = 12  # runs of ids that the text lists for an equation


def block_equation(block: Block) -> str:
    """The right-hand side of R(x) = …, for instance `relu(x + N(F(x)))` or `P(x) + F(N(x))`."""
    text = _joined(block)
    if block.norm == "post":
        text = f"N({text})"
    activation = _activation(block)
    return f"{activation}({text})" if activation else text


def _joined(block: Block) -> str:
    # Where the norm made the fork, both paths read it: P(N(x)) + F(N(x)).
    before = block.norm == "pre" and not any(op in block.branch_ops for op in block.norm_ops)
    x = "N(x)" if before else "x"
    read = "N(x)" if block.norm in ("pre", "sandwich") else "x"
    skip = _SKIPS[block.shortcut].format(x=x)
    branches = [_branch(block, letter, read) for letter in _letters(block)]
    if block.kind == "branches":
        return " + ".join(branches)
    if block.kind == "gated":
        return f"T(x)·{branches[0]} + (1 − T(x))·{skip}"
    join = block.join_op
    skip = f"{_factor(block, 'skip')}{skip}"
    called = join.kind is OpKind.OPAQUE and block.kind != "long"  # a call stands for the join inside it
    if join.kind is OpKind.CONCAT or (called and block.kind == "dense"):
        return f"[{skip}, {', '.join(branches)}]"
    if join.kind is not OpKind.ADD and not called and not join.has(Trait.FUSED):
        return f"{join.kind.value}({skip}, {', '.join(branches)})"
    return skip + "".join(f" {_sign(block)} {branch}" for branch in branches)


def _letters(block: Block) -> list[str]:
    count = block.branch_count
    if count == 1:
        return ["F"]
    return ["A", "F"] if count == 2 else [f"F{number}" for number in range(1, count + 1)]


def _branch(block: Block, letter: str, read: str) -> str:
    text = f"{letter}({read})"
    if block.norm in ("branch", "sandwich"):
        text = f"N({text})"
    if block.kind == "stochastic":
        text = f"b·{text}"
    return f"{_factor(block, 'branch')}{text}"


def _factor(block: Block, on: str) -> str:
    """The factor of the branch or the skip, "" for none; a sum may have one on each of the two."""
    own = _sum_factors(block)
    if any(factor not in (None, 1.0) for factor in own.values()):
        factor = own[on]
        return "" if factor in (None, 1.0) else f"{factor:g}·"
    scale = block.scale
    if scale is None or scale.on != on:
        return ""
    if scale.type == "vector":
        return "λ⊙"
    return f"{scale.factor:g}·" if isinstance(scale.factor, float) else "α·"


def _sum_factors(block: Block) -> dict[str, float | None]:
    """What the join itself multiplies its operands by, without signs; None where its terms differ."""
    op = block.join_op
    if op.kind is not OpKind.ADD or block.skip_index >= len(op.inputs):
        return {"skip": None, "branch": None}
    skip = abs(op.scales[block.skip_index])
    others = {abs(scale) for index, scale in enumerate(op.scales) if index != block.skip_index}
    return {"skip": skip, "branch": others.pop() if len(others) == 1 else None}


def _sign(block: Block) -> str:
    op = block.join_op
    if op.kind is not OpKind.ADD:
        return "+"
    return "−" if any(scale < 0 for index, scale in enumerate(op.scales) if index != block.skip_index) else "+"


def _activation(block: Block) -> str:
    """The activation that alone reads the sum, or its norm."""
    value = block.join_value
    if block.join_op.kind is OpKind.CONCAT and any(
        user.kind is OpKind.CONCAT and user is not block.join_op
        for operand in block.join_op.operands
        for user, _ in operand.uses
    ):
        return ""  # the features go on as they are, in the next concatenation
    if value is None:
        outer = block.join_op.attrs.get("outer", "none")
        return "" if outer == "none" else str(outer)
    norms = set(block.norm_ops) if block.norm == "post" else set()
    while len(value.uses) == 1:
        op = next(iter(value.uses))[0]
        if op.has(Trait.ACTIVATION):
            return str(op.kind.value)
        if op not in norms and op.kind not in _PASSED:
            return ""
        value = op.outputs[0]
    return ""


@dataclass(frozen=True, slots=True)
class Chain:
    """Blocks one after the other on one stream.

    `parent`: the block in whose branch the chain runs, None for the graph's own. `runs`: ids of the blocks in order;
    between one run and the next something works on the stream that is in no block. `start`: what the chain comes from;
    `stem`, `head`: whether something works before it and behind it. `reads`: numbers of the chains whose streams enter
    its branches.
    """

    number: int
    parent: int | None
    start: str
    stem: bool
    runs: tuple[tuple[int, ...], ...]
    head: bool
    reads: tuple[int, ...] = ()
    path: str = ""  # of the graph that the chain is in, as of its blocks

    @property
    def blocks(self) -> tuple[int, ...]:
        """Ids of all blocks, in order."""
        return tuple(block for run in self.runs for block in run)

    @property
    def equation(self) -> str:
        """The recursion, for instance `head(R7(…R0(stem(x))))`."""
        before, behind = ("stem", "head") if self.parent is None else ("in", "out")
        text = f"{before}({self.start})" if self.stem else self.start
        if len(self.runs) > _RUNS:
            ids = self.blocks
            text = f"R{ids[-1]}(…R{ids[0]}({text}))"
        else:
            for index, run in enumerate(self.runs):
                if index:
                    text = f"g{index}({text})"
                if len(run) <= 2:
                    for block in run:
                        text = f"R{block}({text})"
                else:
                    text = f"R{run[-1]}(…R{run[0]}({text}))"
        return f"{behind}({text})" if self.head else text

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "parent": self.parent,
            "start": self.start,
            "stem": self.stem,
            "runs": [list(run) for run in self.runs],
            "head": self.head,
            "reads": list(self.reads),
            "path": self.path,
            "equation": self.equation,
        }


@dataclass(frozen=True, slots=True)
class _Stream:
    """What a value carries: the block behind it, whether something worked on it since, and where it started."""

    block: Block | None
    worked: bool
    start: str


def chains(graph: Graph, members: Members, bodies: Iterable[Graph] = ()) -> tuple[Chain, ...]:
    """The blocks of a committed graph, and of the graphs that its operations hold, in the order of their first ones."""
    graphs = list(dict.fromkeys([graph, *bodies]))
    streams: dict[Value, _Stream] = {}
    for each in graphs:
        streams |= _streams(each, members)
    groups: list[list[Block]] = []
    number: dict[int, int] = {}  # by block: its chain
    before: dict[int, Block | None] = {}
    continued: set[int] = set()
    for block in members.blocks:
        previous = before[block.id] = _sibling_before(streams, members, block)
        if previous is not None and previous.id not in continued:
            continued.add(previous.id)
            number[block.id] = number[previous.id]
        else:
            number[block.id] = len(groups)
            groups.append([])
        groups[number[block.id]].append(block)
    ends: dict[int, bool] = {}
    for stream in (streams.get(value) for each in graphs for value in each.outputs):
        if stream is not None and stream.block is not None:
            ends[stream.block.id] = ends.get(stream.block.id, False) or stream.worked
    return tuple(
        Chain(
            number=index,
            parent=group[0].parent,
            path=group[0].path,
            runs=_runs(streams, group),
            reads=_reads(streams, members, number, group),
            head=_head(streams, members, group[-1], ends),
            **_start(streams, members, group[0], before[group[0].id]),
        )
        for index, group in enumerate(groups)
    )


def _streams(graph: Graph, members: Members) -> dict[Value, _Stream]:
    streams: dict[Value, _Stream] = {}
    for value in [*graph.inputs, *(block.fork_value for block in members.blocks if block.fork_value.constant)]:
        streams[value] = _Stream(None, False, value.name)
    for op in graph:
        block = members.by_join.get(op)
        if block is not None:
            fork = streams.get(block.fork_value)
            joined = _Stream(block, False, block.fork if fork is None else fork.start)
            streams.update((value, joined) for value in op.outputs)
            continue
        carried = [streams[value] for value in op.operands if value in streams]
        if not carried:
            continue
        newest = max(carried, key=_age)
        worked = any(stream.worked for stream in carried if stream.block is newest.block)
        if not worked and works(op) and not any(part.role == NORM for part in members.of(op)):
            worked = True
        after = newest if worked is newest.worked else _Stream(newest.block, worked, newest.start)
        streams.update((value, after) for value in op.outputs if not value.constant)
    return streams


def _age(stream: _Stream) -> int:
    return -1 if stream.block is None else stream.block.id


def _sibling_before(streams: dict[Value, _Stream], members: Members, block: Block) -> Block | None:
    """The block that the fork comes from, or the one around it that is as deeply nested as `block`.

    One that ends later is none before: of two streams, the fork may lie in a branch of the other.
    """
    stream = streams.get(block.fork_value)
    previous = None if stream is None else stream.block
    while previous is not None and previous.parent != block.parent:
        previous = None if previous.parent is None else members.by_id[previous.parent]
    return previous if previous is not None and previous.id < block.id else None


def _start(streams: dict[Value, _Stream], members: Members, first: Block, previous: Block | None) -> dict[str, Any]:
    stream = streams.get(first.fork_value)
    if previous is not None:
        return {"start": f"R{previous.id}", "stem": stream is not None and stream.worked}
    if first.parent is not None:
        return {"start": "x", "stem": first.fork_value is not members.by_id[first.parent].fork_value}
    if stream is None:
        return {"start": first.fork, "stem": False}
    return {"start": stream.start, "stem": stream.worked}


def _runs(streams: dict[Value, _Stream], group: Sequence[Block]) -> tuple[tuple[int, ...], ...]:
    runs: list[list[int]] = [[group[0].id]]
    for previous, block in pairwise(group):
        stream = streams[block.fork_value]
        if stream.worked or stream.block is not previous:
            runs.append([])
        runs[-1].append(block.id)
    return tuple(map(tuple, runs))


def _reads(
    streams: dict[Value, _Stream], members: Members, number: dict[int, int], group: Sequence[Block]
) -> tuple[int, ...]:
    entering = (streams.get(value) for block in group for value in block.outside)
    found = {number[stream.block.id] for stream in entering if stream is not None and stream.block is not None}
    around: Block | None = group[0]
    while found and around is not None:  # what a branch holds besides is the stream of the block around it
        found.discard(number[around.id])
        around = None if around.parent is None else members.by_id[around.parent]
    return tuple(sorted(found))


def _head(streams: dict[Value, _Stream], members: Members, last: Block, ends: dict[int, bool]) -> bool:
    if last.parent is None:
        return ends.get(last.id, False)
    ways = (streams.get(value) for value in members.by_id[last.parent].join_op.operands)
    return not any(stream is not None and stream.block is last and not stream.worked for stream in ways)


def equation_groups(blocks: Sequence[Block]) -> list[tuple[str, list[int]]]:
    """Each equation that occurs, with the ids of its blocks, in the order of first occurrence."""
    groups: dict[str, list[int]] = {}
    for block in blocks:
        groups.setdefault(block_equation(block), []).append(block.id)
    return list(groups.items())


def recursion_lines(found: Sequence[Chain], blocks: Sequence[Block]) -> list[str]:
    """One line for each chain, and one for each equation with the blocks that it holds for."""
    own = [chain for chain in found if chain.parent is None]
    titles = {chain.number: "y" if len(own) == 1 else f"y{index}" for index, chain in enumerate(own, start=1)}
    lines = []
    for chain in (*own, *(chain for chain in found if chain.parent is not None)):
        title = titles.get(chain.number, f"F{chain.parent}(x)")
        reads = ", ".join(titles[number] for number in chain.reads if number in titles)
        inside = f", in {chain.path}" if chain.path else ""
        lines.append(f"{title} = {chain.equation}" + (f", reading {reads}" if reads else "") + inside)
    shown = lines[:_CHAINS]
    if len(lines) > _CHAINS:
        shown.append(f"... and {len(lines) - _CHAINS} more chains inside branches")
    return shown + [f"  {_ranges(ids)}: R(x) = {equation}" for equation, ids in equation_groups(blocks)]


def _ranges(ids: Sequence[int]) -> str:
    """Ids in ascending order, those in a row as R0…R3."""
    runs: list[list[int]] = []
    for number in ids:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    texts = [f"R{run[0]}" if len(run) == 1 else f"R{run[0]}…R{run[-1]}" for run in runs]
    if len(texts) > _LISTED:
        texts[_LISTED - 1 :] = [f"... ({len(ids)} blocks)"]
    return ", ".join(texts)
