"""What detection reports: residual blocks, and the joins that are none."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import msgspec

from rescompile.graph import Graph, Op, Shape, Value
from rescompile.structure.lengths import Lengths, path_lengths
from rescompile.structure.members import Members

if TYPE_CHECKING:  # rich takes longer to import than all of rescompile
    from rich.console import Console, ConsoleOptions, RenderResult

    from rescompile.structure.depth import Depth
    from rescompile.structure.equations import Chain
    from rescompile.structure.overhead import Overhead

SCHEMA = 1

KINDS = ("add", "gated", "dense", "long", "parallel", "recurrent", "stochastic", "branches")
SHORTCUTS = ("identity", "projection", "pad", "pool", "view")
NORMS = ("post", "pre", "branch", "sandwich", "inner", "none")

_UNCOUNTED = ("branches",)  # reported, but no skip
_NEITHER_SHORTCUT_NOR_NORM = ("dense", "long", "branches")


@dataclass(frozen=True, slots=True)
class Scale:
    """A factor on the branch or on the skip.

    `type`: "vector" (LayerScale), "scalar" (a parameter of one element: ReZero, SkipInit) or "constant" (a literal,
    torch's `alpha=`, DeepNorm's α). `factor` is the number, or the name of the tensor that holds it.
    """

    on: str
    type: str
    factor: float | str

    def to_dict(self) -> dict[str, object]:
        """As JSON."""
        return {"on": self.on, "type": self.type, "factor": self.factor}

    def __str__(self) -> str:
        factor = f"{self.factor:g}" if isinstance(self.factor, float) else self.factor
        return f"{self.on} × {factor}"


class Block(msgspec.Struct, frozen=True, eq=False):
    """H(x) = F(x) + x and its relatives: the operations between a fork and the join that brings its paths together.

    `branch_ops` are the branch's own operations in topological order; a block nested in it appears there as its join
    only. `fork_value` is the graph's; `join_value` is None where a fused operation keeps the sum to itself.
    """

    id: int
    kind: str
    parent: int | None
    shortcut: str
    norm: str
    scale: Scale | None
    fork_value: Value
    join_op: Op
    join_value: Value | None
    skip_index: int  # which operand of `join_op` the shortcut ends in
    branch_ops: tuple[Op, ...]
    shortcut_ops: tuple[Op, ...]
    norm_ops: tuple[Op, ...]
    join_ops: tuple[Op, ...]  # all sums that make up the join, the last of them `join_op`
    outside: tuple[Value, ...] = ()  # what enters the branch past the fork: a mask, a memory, a rotary table
    shape: Shape | None = None
    module: str = ""
    fused: bool = False
    undecided: tuple[str, ...] = ()  # what could not be told, for want of shapes
    path: str = ""  # of the graph, inside an operation of the model's graph, that all names are of; "" for the latter
    branch_count: int = 1  # how many branches a `parallel` block, or a sum of `branches`, has

    @property
    def fork(self) -> str:
        """Name of the value that the block starts from."""
        return self.fork_value.name

    @property
    def join(self) -> str:
        """Name of the operation that brings the paths together."""
        return self.join_op.name

    @property
    def norms(self) -> tuple[str, ...]:
        """Names of the normalisations that `norm` speaks of."""
        return tuple(op.name for op in self.norm_ops)

    @property
    def branch(self) -> tuple[str, ...]:
        """Names of `branch_ops`."""
        return tuple(op.name for op in self.branch_ops)

    @property
    def dominated(self) -> bool:
        """Whether everything that the branch reads, constants apart, comes through the fork."""
        return not self.outside

    def to_dict(self) -> dict[str, object]:
        """As in `inspect --json`, schema 1."""
        return {
            "id": self.id,
            "kind": self.kind,
            "parent": self.parent,
            "shortcut": self.shortcut,
            "norm": self.norm,
            "scale": None if self.scale is None else self.scale.to_dict(),
            "fork": self.fork,
            "join": self.join,
            "norms": list(self.norms),
            "branch": list(self.branch),
            "shape": None if self.shape is None else list(self.shape),
            "module": self.module,
            "fused": self.fused,
            "path": self.path,
            "undecided": list(self.undecided),
        }


@dataclass(frozen=True, slots=True)
class NotResidual:
    """A join that is no residual one, and why. `meet`: the nearest value that its operands both come from.

    `path`: of the graph that the join is in, as `Block.path`.
    """

    join: str
    reason: str
    meet: str | None = None
    path: str = ""

    def to_dict(self) -> dict[str, object]:
        """As in `inspect --json`, schema 1."""
        return {"join": self.join, "reason": self.reason, "path": self.path}


@dataclass(frozen=True)
class Report:
    """The residual structure of one graph.

    What the structure means (`lengths`, `depth`, `chains`, `overhead`) is computed when it is first asked for, from the
    graph as it is then: ask before you edit the graph.
    """

    model: str
    ir: str
    nodes: int
    parameters: int
    blocks: tuple[Block, ...]
    not_residual: tuple[NotResidual, ...] = field(default=())
    bodies: Mapping[str, Graph] = field(default_factory=dict)  # the graphs that operations hold, by path
    graph: Graph | None = field(default=None, repr=False, compare=False)
    show_costs: bool = field(default=False, repr=False, compare=False)  # whether the printed table has costs

    def __iter__(self) -> Iterator[Block]:
        return iter(self.blocks)

    def __len__(self) -> int:
        return len(self.blocks)

    @cached_property
    def children(self) -> dict[int | None, list[Block]]:
        """The blocks directly inside each block's branch, by its id; under None the outermost."""
        nested: dict[int | None, list[Block]] = {}
        for block in self.blocks:
            nested.setdefault(block.parent, []).append(block)
        return nested

    @cached_property
    def members(self) -> Members:
        """The part of every operation in the blocks: as long as the graph, however deep blocks nest."""
        return Members(self.blocks)

    def all_branch_ops(self, block: Block) -> list[Op]:
        """The branch's operations with those of the blocks nested in it, in topological order.

        Blocks inside an operation of the branch are of other graphs: that operation stands for them. For many blocks at
        once ask `members` instead: the lists of n blocks nested in one another are n² long.
        """
        found: dict[Op, None] = {}
        pending = [block]
        while pending:
            inner = pending.pop()
            found.update((op, None) for op in inner.branch_ops)
            if inner is not block:
                found.update((op, None) for op in (*inner.shortcut_ops, *inner.join_ops))
            pending.extend(nested for nested in self.children.get(inner.id, ()) if nested.path == block.path)
        return sorted(found, key=lambda op: op.order)

    @cached_property
    def lengths(self) -> Lengths:
        """The ways through the network, and how many branches they take (Veit et al. 2016)."""
        return path_lengths(self.blocks, _UNCOUNTED)

    @cached_property
    def depth(self) -> Depth | None:
        """Operations on the longest way and on the shortest; None for a report without its graph."""
        from rescompile.structure.depth import graph_depth

        return None if self.graph is None else graph_depth(self.graph, self.members)

    @cached_property
    def chains(self) -> tuple[Chain, ...]:
        """The blocks as recursions y = head(Rₙ(…R₀(stem(x)))); none for a report without its graph."""
        from rescompile.structure.equations import chains

        return () if self.graph is None else chains(self.graph, self.members, self.bodies.values())

    @cached_property
    def overhead(self) -> Overhead | None:
        """What branches and shortcuts cost; None for a report without its graph."""
        from rescompile.structure.overhead import block_costs

        return None if self.graph is None else block_costs(self.graph, self.members, self.bodies.values())

    @cached_property
    def dense_connections(self) -> tuple[int, ...]:
        """Connections of each chain of dense blocks: L(L + 1)/2 where L layers append to the same list of features."""
        chained: dict[Value, int] = {}  # layers so far, by the list that the last of them made
        for block in self.blocks:
            if block.kind == "dense" and block.join_value is not None:
                layers = chained.pop(block.fork_value, 0)
                chained[block.join_value] = layers + 1
        return tuple(layers * (layers + 1) // 2 for layers in chained.values())

    def summary(self) -> dict[str, Any]:
        """Counts over all blocks, nested ones included."""
        counted = [block for block in self.blocks if block.kind not in _UNCOUNTED]
        placed = [block for block in self.blocks if block.kind not in _NEITHER_SHORTCUT_NOR_NORM]
        return {
            "blocks": len(counted),
            "nested": sum(block.parent is not None for block in counted),
            "by_kind": _count((block.kind for block in self.blocks), KINDS),
            "by_shortcut": _count((block.shortcut for block in placed), SHORTCUTS),
            "by_norm": _count((block.norm for block in placed), NORMS),
        }

    def paths(self) -> dict[str, Any]:
        """How many ways lead through the network, as log2, and how long they are, as in `inspect --json`.

        `lengths.shares[i]` is the share of the ways that take `lengths.first` + i branches; shares under 1e-12 at both
        ends are left out. `central`: the lengths between which 95 % of the ways lie.
        """
        lengths = self.lengths
        low, high = lengths.central()
        return {
            "log2_count": round(lengths.log2_count, 6),
            "mean_length": round(lengths.mean, 6),
            "deviation": round(lengths.deviation, 6),
            "central": [low, high],
            "lengths": {"first": lengths.first, "shares": [float(f"{share:.6g}") for share in lengths.shares]},
            "depth": None if self.depth is None else self.depth.to_dict(),
            "dense_connections": list(self.dense_connections),
        }

    def to_dict(self) -> dict[str, Any]:
        """As in `inspect --json`, schema 1."""
        return {
            "schema": SCHEMA,
            "model": self.model,
            "ir": self.ir,
            "nodes": self.nodes,
            "parameters": self.parameters,
            "blocks": [self._block_dict(block) for block in self.blocks],
            "not_residual": [join.to_dict() for join in self.not_residual],
            "summary": self.summary(),
            "paths": self.paths(),
            "chains": [chain.to_dict() for chain in self.chains],
            "costs": None if self.overhead is None else self.overhead.to_dict(),
        }

    def _block_dict(self, block: Block) -> dict[str, Any]:
        from rescompile.structure.equations import block_equation

        costs = None if self.overhead is None else self.overhead.blocks[block.id].to_dict()
        return {**block.to_dict(), "equation": block_equation(block), "costs": costs}

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        from rescompile.report_text import report_parts

        yield from report_parts(self)

    def __str__(self) -> str:
        from rescompile.plain_text import plain_text

        return plain_text(self)


def _count(found: Iterator[str], order: tuple[str, ...]) -> dict[str, int]:
    counts = Counter(found)
    return {name: counts[name] for name in order if counts[name]}
