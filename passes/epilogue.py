"""Rules: additions and activations behind a conv or a linear move into its epilogue."""

from __future__ import annotations

from rescompile.graph import Graph, Op, Value
from rescompile.kinds import OpKind
from rescompile.passes.joins import activation_of, only_reader, plain_sum, trailing_activation
from rescompile.plan import Refusal, Rewrite, fuse_edit

_FUSED = {OpKind.CONV: OpKind.FUSED_CONV, OpKind.LINEAR: OpKind.FUSED_LINEAR}


def residual_epilogue(graph: Graph, join: Op) -> Rewrite | Refusal:
    """y = g(f(W·x + b) + r)  →  y = fused(x, W, b, r; inner=f, outer=g)

    1. One operand of the sum is a conv or linear, or an activation f of one, that nothing else reads.
    2. The sum is plain: two operands of equal shape and dtype, neither constant.
    3. g is an activation that alone reads the sum, or nothing. f before the add and g after it are kept apart.
    """
    refused = plain_sum(join)
    if refused is not None:
        return refused
    # Where both operands are contractions (a projection shortcut), the one that runs last takes the add.
    found = [branch for branch in (_branch(graph, value) for value in join.operands) if branch]
    if not found:
        return Refusal(join.name, "neither operand is a conv or linear whose output only the sum reads")
    ops, inner, tail = max(found, key=lambda branch: branch[0][0].order)
    work = ops[0]
    residual = next(value for value in join.operands if value is not tail)
    outer, readers = trailing_activation(graph, join.output)
    result = readers[0].output if readers else join.output
    rewrite = _fused(graph, work, [*ops, join, *readers], residual, result, inner, outer)
    if isinstance(rewrite, Refusal):
        return Refusal(join.name, rewrite.reason)
    return rewrite


def activation_epilogue(graph: Graph, work: Op) -> Rewrite | Refusal:
    """y = f(W·x + b)  →  y = fused(x, W, b; outer=f), for an activation f that alone reads the contraction."""
    outer, readers = trailing_activation(graph, work.output)
    if not readers:
        return Refusal(work.name, "no activation alone reads it")
    return _fused(graph, work, [work, *readers], None, readers[0].output, "none", outer)


def _branch(graph: Graph, value: Value) -> tuple[list[Op], str, Value] | None:
    """The contraction (and activation) that ends in `value`, when nothing else reads them."""
    producer = value.producer
    if producer is None or only_reader(graph, value) is None:
        return None
    if producer.kind in _FUSED:
        return [producer], "none", value
    inner = activation_of(producer)
    source = producer.inputs[0] if inner is not None else None
    if source is None or source.producer is None or source.producer.kind not in _FUSED:
        return None
    if only_reader(graph, source) is None:
        return None
    return [source.producer, producer], inner or "none", value


def _fused(
    graph: Graph, work: Op, ops: list[Op], residual: Value | None, result: Value, inner: str, outer: str
) -> Rewrite | Refusal:
    kind = _FUSED[work.kind]
    unable = graph.cannot_emit(kind)
    if unable:
        return Refusal(work.name, unable)
    operands = [*work.inputs, None, None][:3]
    attrs = {**work.attrs, "inner": inner, "outer": outer}
    edit = fuse_edit(ops, kind, [*operands, residual], [result], **attrs)
    inside = "W·x + b" if inner == "none" else f"{inner}(W·x + b)"
    total = inside if residual is None else f"{inside} + r"
    equation = total if outer == "none" else f"{outer}({total})"
    call = "x, W, b" if residual is None else "x, W, b, r"
    reason = f"into the epilogue of '{work.name}'"
    join = next((op for op in ops if op.kind is OpKind.ADD), work)
    return Rewrite(join.name, f"{equation}  →  {kind.value}({call})", reason, (edit,))
