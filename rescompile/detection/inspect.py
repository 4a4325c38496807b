"""From a graph to the report of its residual structure."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from rescompile.blocks import Block, NotResidual, Report
from rescompile.costs import parameter_count
from rescompile.detection.concats import residual_concat
from rescompile.detection.flavours import flavour, shortcut_kind
from rescompile.detection.gates import completes, gated_sum
from rescompile.detection.judgement import Draft, Judgement, Refusal
from rescompile.detection.placement import find_scale, norm_placement
from rescompile.detection.scatters import residual_scatter
from rescompile.detection.selections import selection, unknown
from rescompile.detection.sums import residual_sum
from rescompile.detection.unfused import has_fused, unfuse
from rescompile.graph import Graph, Op, Value
from rescompile.kinds import OpKind, Trait

Rule = Callable[[Judgement, Op], Draft | Refusal | None]

# join → the rules that may claim it, in turn; None from a rule leaves the join to the next
_RULES: dict[OpKind, tuple[Rule, ...]] = {
    OpKind.ADD: (gated_sum, residual_sum),
    OpKind.CONCAT: (residual_concat,),
    OpKind.SCATTER: (residual_scatter,),
    OpKind.MAXIMUM: (selection,),
    OpKind.MINIMUM: (selection,),
    OpKind.WHERE: (selection,),
    OpKind.OPAQUE: (unknown,),
}


def inspect_graph(graph: Graph) -> Report:
    """The residual blocks of a committed graph, and a reason for every join that ends none.

    Time is near-linear in the number of operations. The graph does not change; blocks refer to its operations.
    """
    with _collector_paused():
        return _inspect(graph)


@contextmanager
def _collector_paused() -> Iterator[None]:
    """What analysis allocates it mostly keeps, and makes no cycles: collecting meanwhile costs a third of the time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _inspect(graph: Graph) -> Report:
    if has_fused(graph):
        view, origin, values = unfuse(graph)
        judgement = _judge(view)
        translate = _Original(origin, values)
    else:
        judgement = _judge(graph)
        translate = _Original({}, {})
    blocks = _blocks(judgement, translate)
    joins = {op: None for block in blocks for op in block.join_ops}
    refused = {translate.op(op): refusal for op, refusal in judgement.refusals.items()}
    not_residual = tuple(
        NotResidual(op.name, refusal.reason, None if refusal.meet is None else translate.value(refusal.meet).name)
        for op, refusal in refused.items()
        if op not in joins
    )
    return Report(graph.name, graph.ir, len(graph), parameter_count(graph), tuple(blocks), not_residual)


class _Original:
    """From the operations and values that were judged to those of the user's graph."""

    def __init__(self, ops: dict[Op, Op], values: dict[Value, Value]) -> None:
        self._ops = ops
        self._values = values

    def op(self, op: Op) -> Op:
        return self._ops.get(op, op)

    def ops(self, ops: Iterable[Op]) -> tuple[Op, ...]:
        return tuple(dict.fromkeys(self._ops.get(op, op) for op in ops))

    def value(self, value: Value) -> Value:
        return self._values.get(value, value)

    def exists(self, value: Value) -> bool:
        return not self._values or value in self._values


def _judge(graph: Graph) -> Judgement:
    judgement = Judgement(graph)
    for op in graph:
        judgement.reach.extend(op)
        for rule in _RULES.get(op.kind, ()):
            if op.kind is OpKind.ADD and (total := completes(op)) is not None:
                judgement.refusals[op] = Refusal(f"part of the mix that '{total.name}' completes")
                break
            found = rule(judgement, op)
            if isinstance(found, Draft):
                judgement.accept(found)
                break
            if found is not None:
                judgement.refusals[op] = found
                break
    return judgement


def _blocks(judgement: Judgement, original: _Original) -> list[Block]:
    drafts = list(judgement.drafts.values())
    number = {draft.join_op: index for index, draft in enumerate(drafts)}
    parents: dict[int, int] = {}
    for index, draft in enumerate(drafts):
        for op in draft.branch_ops:
            inner = number.get(op)
            if inner is not None and inner != index and not _beside(drafts[inner], draft):
                parents.setdefault(inner, index)
    forks = {draft.fork for draft in drafts}
    return [_block(judgement, original, draft, index, parents.get(index), forks) for index, draft in enumerate(drafts)]


def _beside(inner: Draft, outer: Draft) -> bool:
    """Whether a block in another's branch is a stream of its own: each carries a part of one fork, and goes on."""
    if inner.fork is not outer.fork or inner.shortcut != "view" or outer.shortcut != "view":
        return False
    own = {*outer.branch_ops, outer.join_op}
    return any(user not in own for user, _ in inner.join_value.uses)


def _block(
    judgement: Judgement, original: _Original, draft: Draft, index: int, parent: int | None, forks: set[Value]
) -> Block:
    norm, norms = norm_placement(judgement, draft, forks)
    join_op = original.op(draft.join_op)
    skip_index = draft.skip_index
    if join_op is not draft.join_op:
        skip = original.value(draft.skip)
        skip_index = next((at for at, value in enumerate(join_op.inputs) if value is skip), skip_index)
    return Block(
        id=index,
        kind=flavour(judgement, draft),
        parent=parent,
        shortcut=shortcut_kind(judgement, draft),
        norm=norm,
        scale=find_scale(judgement.graph, draft),
        fork_value=original.value(draft.fork),
        join_op=join_op,
        join_value=original.value(draft.join_value) if original.exists(draft.join_value) else None,
        skip_index=skip_index,
        branch_ops=original.ops(draft.branch_ops),
        shortcut_ops=original.ops(draft.shortcut_ops),
        norm_ops=original.ops(norms),
        join_ops=original.ops(draft.join_ops),
        outside=tuple(original.value(value) for value in draft.outside if not value.constant),
        shape=draft.join_value.shape,
        module=_module(draft),
        fused=join_op.has(Trait.FUSED),
    )


def _module(draft: Draft) -> str:
    """The innermost module that the branch and the join run in, by the longest common path of theirs."""
    common: list[str] | None = None
    for op in (*draft.branch_ops, draft.join_op):
        if not op.module:
            continue
        parts = op.module.split(".")
        if common is None:
            common = parts
            continue
        length = 0
        for own, other in zip(common, parts, strict=False):
            if own != other:
                break
            length += 1
        common = common[:length]
        if not common:
            break
    return ".".join(common or ())
