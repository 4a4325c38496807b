"""What detection reports: residual blocks, and the joins that are none."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from math import log2
from typing import TYPE_CHECKING, Any

from rescompile.graph import Graph, Op, Shape, Value

if TYPE_CHECKING:  # rich takes longer to import than all of rescompile
    from rich.console import Console, ConsoleOptions, RenderResult
    from rich.table import Table

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


@dataclass(frozen=True, slots=True, eq=False)
class Block:
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
    path: str = ""  # of the graph, inside an operation of the model's graph, that all names are of; "" for the latter

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
    """The residual structure of one graph."""

    model: str
    ir: str
    nodes: int
    parameters: int
    blocks: tuple[Block, ...]
    not_residual: tuple[NotResidual, ...] = field(default=())
    bodies: Mapping[str, Graph] = field(default_factory=dict)  # the graphs that operations hold, by path

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

    def all_branch_ops(self, block: Block) -> list[Op]:
        """The branch's operations with those of the blocks nested in it, in topological order.

        Blocks inside an operation of the branch are of other graphs: that operation stands for them.
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

    def paths(self) -> dict[str, float]:
        """How many ways lead through the network, as log2, and how many branches a way takes on average.

        A block with c ways through its branch multiplies the ways by 1 + c (Veit et al. 2016: n plain blocks make 2ⁿ);
        blocks nested in one branch count as a series.
        """
        inner: dict[int | None, tuple[float, float]] = {}
        # A parent's join comes after its children's, so ascending ids see children first.
        for block in self.blocks:
            log_ways, length = inner.get(block.id, (0.0, 0.0))
            if block.kind not in _UNCOUNTED:
                log_ways += log2(len(block.join_ops)) if block.kind == "parallel" else 0.0
                share = 1.0 / (1.0 + 2.0 ** -min(log_ways, 1000.0))
                log_ways = log_ways + log2(1.0 + 2.0**-log_ways) if log_ways < 1000.0 else log_ways
                length = share * (1.0 + length)
            before = inner.get(block.parent, (0.0, 0.0))
            inner[block.parent] = (before[0] + log_ways, before[1] + length)
        log_ways, length = inner.get(None, (0.0, 0.0))
        return {"log2_count": round(log_ways, 6), "mean_length": round(length, 6)}

    def to_dict(self) -> dict[str, Any]:
        """As in `inspect --json`, schema 1."""
        return {
            "schema": SCHEMA,
            "model": self.model,
            "ir": self.ir,
            "nodes": self.nodes,
            "parameters": self.parameters,
            "blocks": [block.to_dict() for block in self.blocks],
            "not_residual": [join.to_dict() for join in self.not_residual],
            "summary": self.summary(),
            "paths": self.paths(),
        }

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        from rich.markup import escape

        summary = self.summary()
        name = escape(self.model or "graph")
        yield f"[bold]{name}[/bold] ({self.ir}, {self.nodes:,} operations, {self.parameters:,} parameters)"
        if self.blocks:
            yield self._table()
        counts = ", ".join(f"{count} {kind}" for kind, count in summary["by_kind"].items())
        nested = f", {summary['nested']} of them nested" if summary["nested"] else ""
        yield f"{summary['blocks']} residual blocks{nested}" + (f": {counts}" if counts else "")
        if self.not_residual:
            reasons = Counter(join.reason.split(":")[0] for join in self.not_residual)
            listed = ", ".join(f"{count} × {reason}" for reason, count in reasons.most_common())
            yield escape(f"{len(self.not_residual)} joins that are none: {listed}")

    def _table(self) -> Table:
        from rich.table import Table
        from rich.text import Text

        table = Table(box=None, pad_edge=False)
        inside = ["path"] if any(block.path for block in self.blocks) else []
        for title in ("", "kind", "shortcut", "norm", "scale", "fork", "join", "ops", "shape", "module", *inside):
            table.add_column(title, justify="right" if title in ("", "ops") else "left", no_wrap=title != "module")
        depth: dict[int, int] = {}
        for block in reversed(self.blocks):
            depth[block.id] = 0 if block.parent is None else depth[block.parent] + 1
        for block in self.blocks:
            cells = (
                f"{'·' * min(depth[block.id], 8)}{block.id}",
                block.kind,
                block.shortcut,
                block.norm,
                "" if block.scale is None else str(block.scale),
                block.fork,
                block.join + (" (fused)" if block.fused else ""),
                str(len(block.branch_ops)),
                "" if block.shape is None else "×".join(str(extent) for extent in block.shape),
                block.module,
                *(block.path for _ in inside),
            )
            table.add_row(*map(Text, cells))
        return table

    def __str__(self) -> str:
        from rich.console import Console

        console = Console(width=160, no_color=True, highlight=False)
        with console.capture() as capture:
            console.print(self)
        return capture.get().rstrip()


def _count(found: Iterator[str], order: tuple[str, ...]) -> dict[str, int]:
    counts = Counter(found)
    return {name: counts[name] for name in order if counts[name]}
