"""From a graph to the report of its residual structure."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from msgspec.structs import replace

from rescompile.blocks import Block, NotResidual, Report
from rescompile.costs import own_parameter_count, parameter_count
from rescompile.detection.chains import order
from rescompile.detection.coins import drops, is_tossed, stochastic
from rescompile.detection.concats import residual_concat
from rescompile.detection.flavours import flavour, shortcut_kind
from rescompile.detection.gates import completes, gated_sum
from rescompile.detection.judgement import Draft, Judgement, Refusal
from rescompile.detection.placement import find_scale, norm_placement
from rescompile.detection.scatters import residual_scatter
from rescompile.detection.selections import selection, unknown
from rescompile.detection.sums import residual_sum
from rescompile.detection.view import View, path_of, written_out
from rescompile.graph import Body, Graph, Op, Value
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


@dataclass(slots=True)
class _Part:
    """What was found in one graph, and in the graphs that its operations hold."""

    blocks: list[Block]
    not_residual: list[NotResidual]
    bodies: dict[str, Graph]
    parameters: int


def _inspect(graph: Graph) -> Report:
    part = _inspect_part(graph, "")
    return Report(
        graph.name,
        graph.ir,
        len(graph),
        parameter_count(graph) + part.parameters,
        tuple(part.blocks),
        tuple(part.not_residual),
        part.bodies,
        graph,
    )


def _inspect_part(graph: Graph, path: str) -> _Part:
    """What is in a graph; `path` leads to it from the outermost one."""
    view = written_out(graph)
    judgement = _judge(graph if view is None else view)
    telling = _Telling(view, path)
    part = _Part([], [], {}, 0)
    inner: list[tuple[Op, list[Block]]] = []
    if view is not None:
        part.bodies = {_join(path, at): body.graph for at, body in view.called.items()}
        part.parameters = sum(own_parameter_count(body) for body in view.called.values())
        held: dict[Op, list[Body]] = {}
        for holder, body in view.held:
            held.setdefault(holder, []).append(body)
        for holder, bodies in held.items():
            tossed = is_tossed(view.levels[holder][-1], bodies)
            if tossed and drops(bodies):
                judgement.dropped.add(holder)
            for body, other in zip(bodies, bodies[::-1], strict=True):
                at = _join(path, f"{path_of(view.levels[holder])}/{body.label}")
                found = _inspect_part(body.graph, at)
                blocks = [stochastic(block, body, other) for block in found.blocks] if tossed else found.blocks
                inner.append((holder, blocks))
                part.bodies |= {at: body.graph, **found.bodies}
                part.not_residual += found.not_residual
                part.parameters += found.parameters + own_parameter_count(body)
    part.blocks = _blocks(judgement, telling, inner)
    joins = {op: None for block in part.blocks for op in block.join_ops}
    refused: dict[tuple[Op, str], NotResidual] = {}
    for op, refusal in judgement.refusals.items():
        told, where = telling.place(op)
        if told is not None and told not in joins:
            meet = None if refusal.meet is None else telling.name(refusal.meet, op)
            refused[told, where] = NotResidual(told.name, refusal.reason, meet, where)
    part.not_residual = [*refused.values(), *part.not_residual]
    return part


def _join(path: str, name: str) -> str:
    return f"{path}/{name}" if path else name


class _Telling:
    """From the operations and values that were judged to those of the user's graph and of the graphs inside it."""

    def __init__(self, view: View | None, path: str) -> None:
        self._view = view
        self._path = path

    def place(self, op: Op) -> tuple[Op | None, str]:
        """The operation in its own graph, and the path of that."""
        if self._view is None:
            return op, self._path
        calls = self._view.levels[op][:-1]
        return self._view.told_op(op, len(calls)), _join(self._path, path_of(calls)) if calls else self._path

    def name(self, value: Value, op: Op) -> str:
        """The name of a value where the operation is."""
        return value.name if self._view is None else self._view.told_value(value, len(self._view.levels[op]) - 1).name

    def block(self, block: Block) -> Block:
        """The block, told where it lies: inside the calls that it is in from fork to join."""
        view = self._view
        if view is None or block.join_value is None:
            return replace(block, path=self._path) if self._path else block
        calls = view.common(block.join_op, block.fork_value)
        depth = len(calls)
        join_op = view.told_op(block.join_op, depth) or block.join_op
        skip_index = block.skip_index
        if join_op is not block.join_op:
            read = block.join_op.inputs[skip_index]
            skip = view.told_value(block.fork_value if read is None else read, depth)
            skip_index = next((at for at, value in enumerate(join_op.inputs) if value is skip), skip_index)

        def told_beside(ops: Iterable[Op]) -> tuple[Op, ...]:
            """As they are told; what does the join counts only if it computes a part of the path as well."""
            return view.told_ops(
                (op for op in ops if not (op.has(Trait.FREE) and view.told_op(op, depth) is join_op)), depth
            )

        return replace(
            block,
            fork_value=view.told_value(block.fork_value, depth),
            join_op=join_op,
            join_value=view.visible(block.join_value, depth),
            skip_index=skip_index,
            branch_ops=told_beside(block.branch_ops),
            shortcut_ops=told_beside(block.shortcut_ops),
            norm_ops=view.told_ops(block.norm_ops, depth),
            join_ops=view.told_ops(block.join_ops, depth),
            outside=tuple(view.told_value(value, depth) for value in block.outside),
            fused=join_op.has(Trait.FUSED),
            path=_join(self._path, path_of(calls)) if calls else self._path,
        )


def _judge(graph: Graph) -> Judgement:
    judgement = Judgement(graph)
    for op in graph:
        rules = _RULES.get(op.kind)
        if rules is None:
            continue
        if op.kind is OpKind.ADD and (total := completes(op)) is not None:
            judgement.refusals[op] = Refusal(f"part of the mix that '{total.name}' completes")
            continue
        if op.kind is OpKind.ADD and judgement.joins_siblings(op):
            judgement.refusals[op] = Refusal("two working branches: blocks beside each other, with one fork, are added")
            continue
        for rule in rules:
            found = rule(judgement, op)
            if isinstance(found, Draft):
                judgement.accept(found)
                break
            if found is not None:
                judgement.refusals[op] = found
                break
        refusal = judgement.refusals.get(op)
        if op.kind is OpKind.ADD and refusal is not None and refusal.meet is not None:
            last = judgement.mix(op)
            if last is not None:
                judgement.refusals[op] = Refusal(f"a mix: shares of values of one stream, '{last.name}' the last")
    return judgement


def _lies_in(inner: Draft, outer: Draft) -> bool:
    """Whether a block whose join is in another's branch starts there too: blocks of two streams may interleave.

    Two that start from parts of one value are beside each other where the inner one's stream goes on by itself.
    """
    if order(inner.fork) < order(outer.fork):
        return False
    if inner.fork is not outer.fork or inner.shortcut != "view" or outer.shortcut != "view":
        return True
    own = {*outer.branch_ops, outer.join_op}
    return all(user in own for user, _ in inner.join_value.uses)


def _blocks(judgement: Judgement, telling: _Telling, inner: Sequence[tuple[Op, Sequence[Block]]]) -> list[Block]:
    """All blocks in the order of their joins; those that an operation holds come where the operation does."""
    drafts = list(judgement.drafts.values())
    number = {draft.join_op: index for index, draft in enumerate(drafts)}
    parents: dict[Op, int] = {}  # of a join, or of an operation that holds graphs: the innermost block around it
    held = {op for op, _ in inner}
    for index, draft in enumerate(drafts):
        for op in (*draft.branch_ops, *draft.shortcut_ops) if held else draft.branch_ops:
            at = number.get(op, index)
            if op in held or (at != index and _lies_in(drafts[at], draft)):
                parents.setdefault(op, index)
    # A block in another's shortcut lies beside that one, in whatever branch that is; outer blocks end later.
    for draft in reversed(drafts):
        around_it = parents.get(draft.join_op)
        if around_it is not None:
            for op in draft.shortcut_ops:
                if op in number:
                    parents.setdefault(op, around_it)
    ids: list[int] = []
    offsets: list[int] = []
    count = 0
    for draft in drafts:
        while len(offsets) < len(inner) and inner[len(offsets)][0].order < draft.join_op.order:
            offsets.append(count)
            count += len(inner[len(offsets) - 1][1])
        ids.append(count)
        count += 1
    while len(offsets) < len(inner):
        offsets.append(count)
        count += len(inner[len(offsets) - 1][1])
    forks = {draft.fork for draft in drafts}
    carried = {draft.fork for draft in drafts if draft.shortcut == "identity"}
    around = {op: ids[index] for op, index in parents.items()}
    blocks = [
        telling.block(_block(judgement, draft, at, around.get(draft.join_op), forks, carried))
        for at, draft in zip(ids, drafts, strict=True)
    ]
    for (holder, found), offset in zip(inner, offsets, strict=True):
        for block in found:
            parent = around.get(holder) if block.parent is None else block.parent + offset
            blocks.append(replace(block, id=block.id + offset, parent=parent))
    return sorted(blocks, key=lambda block: block.id) if inner else blocks


def _block(
    judgement: Judgement, draft: Draft, index: int, parent: int | None, forks: set[Value], carried: set[Value]
) -> Block:
    norm, norms = norm_placement(judgement, draft, forks, carried)
    return Block(
        id=index,
        kind=flavour(judgement, draft),
        parent=parent,
        shortcut=shortcut_kind(judgement, draft),
        norm=norm,
        scale=find_scale(judgement.graph, draft),
        fork_value=draft.fork,
        join_op=draft.join_op,
        join_value=draft.join_value,
        skip_index=draft.skip_index,
        branch_ops=tuple(draft.branch_ops),
        shortcut_ops=tuple(draft.shortcut_ops),
        norm_ops=tuple(norms),
        join_ops=tuple(draft.join_ops),
        outside=tuple([value for value in draft.outside if not value.constant]),
        shape=draft.join_value.shape,
        module=_module(draft),
        fused=draft.join_op.has(Trait.FUSED),
        branch_count=max(1, len(draft.branches)) if draft.kind in ("parallel", "branches") else 1,
        undecided=tuple(draft.undecided),
    )


def _module(draft: Draft) -> str:
    """The innermost module that the branch and the join run in, by the longest common path of theirs."""
    common: list[str] | None = None
    modules = {op.module for op in draft.branch_ops}
    modules.add(draft.join_op.module)
    modules.discard("")
    if len(modules) == 1:
        return modules.pop()
    for module in modules:
        parts = module.split(".")
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
