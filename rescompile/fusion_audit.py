"""What fusion leaves: every residual join that is in no fused operation, why, and the bytes that it costs.

```
cost of a join  =  Σ over K (operands read + outputs written)  −  (what K reads of others + what others read of K)
```

K are the operations that one kernel could hold: the sums of the join with the factors of its mix, what computes each
element alone in front of them, and either the norm that reads the sum, or the contraction (of which K has the write
only) or norm that ends in the sum and the activation that alone reads it. In passes of the sum's own tensor over
memory: the tail of a block costs 4 (the branch written and read, the skip read, the sum written), as an epilogue 2;
a sum and its norm cost 5, as one kernel 4, or 3 where nothing else reads the sum; a concat costs 2, being a copy, and
nothing where its operands are written in place; with what reads it alone, or a contraction that writes a part of it, it
is one kernel with these.

Why a join is not fused is what the passes' plan says of it; that they would take it is a reason too.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from rescompile.blocks import Block, Report
from rescompile.costs import graph_costs, op_cost, symbol_extents, tensor_size
from rescompile.graph import Graph, Op, Value
from rescompile.kinds import OpKind, Trait
from rescompile.plans import Erase, Fuse, Plan, Refusal, Rewrite
from rescompile.structure.members import skip_of

if TYPE_CHECKING:  # rich takes longer to import than all of rescompile
    from rich.console import Console, ConsoleOptions, RenderResult

_K = OpKind
_ANCHORS = (_K.CONV, _K.CONV_TRANSPOSE, _K.LINEAR, _K.MATMUL, _K.EINSUM)
_NORMS = (_K.LAYER_NORM, _K.RMS_NORM, _K.GROUP_NORM)

Verdict: TypeAlias = Literal["taken", "refused", "unspoken"]


@dataclass(frozen=True, slots=True)
class Unfused:
    """A residual join that is in no fused operation.

    `verdict`: "taken" where the passes would fuse it, "refused" where they say why not, "unspoken" where none of their
    rules is about such a join. `rule`: the kernel that would be nearest. `bytes`: what K moves; `fused_bytes`: what it
    would move as one; `tensor`: bytes of the sum.
    """

    block: Block
    verdict: Verdict
    reason: str
    rule: str
    bytes: int
    fused_bytes: int
    tensor: int

    @property
    def where(self) -> str:
        """Name of the join, with the path to it."""
        return _where(self.block)

    @property
    def cost(self) -> int:
        """Bytes that fusing the join would save on each call."""
        return self.bytes - self.fused_bytes

    @property
    def passes(self) -> tuple[float, float]:
        """How often a tensor of the sum's size goes through memory: now, and as one kernel; 0 where unknown."""
        return (self.bytes / self.tensor, self.fused_bytes / self.tensor) if self.tensor else (0.0, 0.0)

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        now, least = self.passes
        return {
            "block": self.block.id,
            "kind": self.block.kind,
            "join": self.block.join,
            "path": self.block.path,
            "module": self.block.module,
            "shape": None if self.block.shape is None else list(self.block.shape),
            "verdict": self.verdict,
            "reason": self.reason,
            "rule": self.rule,
            "passes": {"unfused": round(now, 3), "fused": round(least, 3)},
            "bytes": {"unfused": self.bytes, "fused": self.fused_bytes, "cost": self.cost},
        }


@dataclass(frozen=True)
class Audit:
    """The residual joins of a model that are not fused, and how many there are. Counts blocks of all kinds."""

    model: str
    ir: str
    joins: int
    unfused: tuple[Unfused, ...]
    traffic: int  # bytes that the whole model moves on one call, each body once
    symbols: tuple[tuple[str, int], ...] = ()  # what each symbolic extent counted as

    @property
    def cost(self) -> int:
        """Bytes that fusing all of them would save on each call."""
        return sum(each.cost for each in self.unfused)

    @property
    def share(self) -> float:
        """The cost's share of the model's traffic."""
        return self.cost / self.traffic if self.traffic else 0.0

    def to_dict(self) -> dict[str, Any]:
        """As in `inspect --unfused --json`."""
        return {
            "joins": self.joins,
            "fused": self.joins - len(self.unfused),
            "unfused": [each.to_dict() for each in self.unfused],
            "cost": self.cost,
            "traffic": self.traffic,
            "share": round(self.share, 6),
            "symbols": dict(self.symbols),
        }

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        from rescompile.fusion_audit_text import audit_parts

        yield from audit_parts(self)

    def __str__(self) -> str:
        from rescompile.plain_text import plain_text

        return plain_text(self)


def audit(report: Report, plan: Plan, extents: Mapping[str, int] | None = None) -> Audit:
    """The unfused joins of `report`, each with what `plan`, made on the same graph, says of it.

    `extents`: what symbolic extents count as (1 otherwise).
    """
    extents = extents or {}
    verdicts = _Verdicts(plan)
    found: list[Unfused] = []
    graphs = {"": report.graph, **report.bodies}
    counted: dict[Op, None] = {}
    joins = {op for block in report.blocks for op in block.join_ops}
    for block in report.blocks:
        graph = graphs.get(block.path)
        sums = [op for op in block.join_ops if not op.has(Trait.FUSED)]
        if not sums or graph is None:
            continue
        kernel = _Kernel(graph, block, sums, report.members.mix.get(block.id, ()), counted, joins)
        counted |= kernel.ops
        verdict, reason = verdicts.of(block)
        now, fused = kernel.moved(extents)
        tensor = tensor_size(sums[-1].output, extents)[1]
        found.append(Unfused(block, verdict, reason, kernel.rule, now, fused, tensor))
    models = dict.fromkeys(graph for graph in graphs.values() if graph is not None)
    return Audit(
        report.model,
        report.ir,
        len(report.blocks),
        tuple(found),
        sum(graph_costs(graph, extents).bytes for graph in models),
        () if report.graph is None else symbol_extents(report.graph, extents),
    )


def _where(block: Block) -> str:
    return f"{block.path}/{block.join}" if block.path else block.join


class _Verdicts:
    """What a plan says of joins."""

    def __init__(self, plan: Plan) -> None:
        self._taken: dict[str, Rewrite] = {}
        for rewrite in plan.rewrites:
            for edit in rewrite.edits:
                ops = edit.ops if isinstance(edit, Fuse) else (edit.op,) if isinstance(edit, Erase) else ()
                for name in ops:
                    self._taken.setdefault(name, rewrite)
        self._refused: dict[str, Refusal] = {refusal.where: refusal for refusal in plan.refusals}  # the last word

    def of(self, block: Block) -> tuple[Verdict, str]:
        """The verdict on a block's join, and its reason."""
        if not block.path:
            names = [op.name for op in block.join_ops if not op.has(Trait.FUSED)]
            rewrites = [self._taken[name] for name in names if name in self._taken]
            left = [name for name in names if name not in self._taken]
            if rewrites:
                rest = f", but for {_quoted(left)}" if left else ""
                return "taken", f"fuse would take it{rest}: {rewrites[-1].equation}"
        refusal = self._refused.get(_where(block))
        if refusal is not None:
            return "refused", refusal.reason
        if block.join_op.has(Trait.FUSED):
            earlier = _quoted(op.name for op in block.join_ops if not op.has(Trait.FUSED))
            return "unspoken", f"the join is fused but for its earlier sum {earlier}, which no rule is about"
        last = _article(block.join_op.kind.value)
        return "unspoken", f"no rule is about {_article(block.kind)} join that ends in {last}"


class _Kernel:
    """The operations that one kernel could hold together with a join.

    `counted`: what is in another join's; `joins`: all joins, which are in their own only.
    """

    def __init__(
        self,
        graph: Graph,
        block: Block,
        sums: Sequence[Op],
        mix: Sequence[Op],
        counted: Mapping[Op, None],
        joins: AbstractSet[Op],
    ) -> None:
        self._graph = graph
        self._counted = counted
        self._joins = joins
        self._work: Op | None = None  # the contraction that ends in the join, or a norm that does
        join = sums[-1]
        self.ops: dict[Op, None] = dict.fromkeys((*sums, *mix))
        self.rule = f"one kernel of {_article(join.kind.value)}"
        if join.kind is _K.OPAQUE:
            return
        if join.kind is _K.CONCAT:
            self._take_copy(join)
            return
        readers = (op for op in join.output.users if op.kind in _NORMS and op.inputs[0] is join.output)
        norm = next((op for op in readers if op not in counted), None)
        reader = self._only_reader(join.output)
        if reader is not None and reader.kind is _K.CONCAT:  # of a part of the channels with the others
            self.ops[reader] = None
        self._take_in(skip_of(block), work=norm is None)
        if norm is not None:
            self.ops[norm] = None
            self.rule = f"{join.kind.value} + {norm.kind.value} '{norm.name}'"
            return
        if self._work is not None:
            name = f"{self._work.kind.value} '{self._work.name}'"
            self.rule = f"{name} + {join.kind.value}" if self._work in self.ops else f"epilogue of {name}"
        if reader is not None and reader.has(Trait.ACTIVATION):
            self.ops[reader] = None

    def _take_copy(self, join: Op) -> None:
        """Take in what alone reads a concat and computes each element alone, and the contraction that writes a part."""
        last = join
        while (behind := self._only_reader(last.output)) is not None and _follows(behind, last.output):
            last = behind
            self.ops[last] = None
        self._take_in(None, work=True)
        named = (self._work, None if last is join else last)
        names = [f"{op.kind.value} '{op.name}'" for op in named if op is not None]
        self.rule = f"concat with {' and '.join(names)}" if names else "concat in place"

    def _only_reader(self, value: Value) -> Op | None:
        users = value.users
        if len(users) != 1 or self._graph.is_output(value):
            return None
        return None if users[0] in self._counted or users[0] in self._joins else users[0]

    def _take_in(self, skip: Value | None, *, work: bool) -> None:
        """Take in what only the join reads, back to the operation that ends in it, the branch's before the skip's."""
        operands = [value for op in self.ops for value in op.operands]
        pending = sorted(operands, key=lambda value: value is not skip)
        while pending:
            value = pending.pop()
            op = value.producer
            if op is None or value.constant or op in self.ops or op in self._counted or not self._is_own(value):
                continue
            if _rides(op):
                self.ops[op] = None
                pending.extend(op.operands)
            elif work and self._work is None and op.kind in (*_ANCHORS, *_NORMS):
                self._work = op
                if op.kind in _NORMS:
                    self.ops[op] = None

    def _is_own(self, value: Value) -> bool:
        return not self._graph.is_output(value) and all(user in self.ops for user in value.users)

    def moved(self, extents: Mapping[str, int]) -> tuple[int, int]:
        """Bytes of the operations as they are, and as one."""
        now = sum(op_cost(op, extents).bytes for op in self.ops)
        if self.rule == "concat in place":
            return now, 0
        known = {value for op in self.ops for value in op.outputs}
        if self._work is not None and self._work not in self.ops:
            now += tensor_size(self._work.output, extents)[1]
            known |= {self._work.output, *self._work.operands}  # what it reads, it reads either way
        read = {value for op in self.ops for value in op.operands if value not in known}
        written = {
            value
            for op in self.ops
            for value in op.outputs
            if self._graph.is_output(value) or any(user not in self.ops for user in value.users)
        }
        return now, min(now, sum(tensor_size(value, extents)[1] for value in (*read, *written)))


def _rides(op: Op) -> bool:
    """Whether an operation computes each element alone, or moves it."""
    if op.kind is _K.BATCH_NORM:
        return not op.attr("training")
    return op.has(Trait.ELEMENTWISE) or op.has(Trait.FREE)


def _follows(op: Op, value: Value) -> bool:
    """Whether an operation computes each element of the value alone, with constants or nothing."""
    return len(op.outputs) == 1 and _rides(op) and all(other is value or other.constant for other in op.operands)


def _quoted(names: Iterable[str]) -> str:
    return ", ".join(f"'{name}'" for name in names)


def _article(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"
