"""Rules: additions and activations behind a conv or a linear move into its epilogue."""

from __future__ import annotations

from rescompile.graph import Graph, Op, Value
from rescompile.kinds import OpKind
from rescompile.passes.joins import activation_of, only_reader, plain_sum, trailing_activation
from rescompile.plans import Refusal, Rewrite, fuse_edit

_FUSED = {OpKind.CONV: OpKind.FUSED_CONV, OpKind.LINEAR: OpKind.FUSED_LINEAR}


def residual_epilogue(graph: Graph, join: Op, skip: Value | None = None) -> Rewrite | Refusal:
    """y = g(f(W·x + b) + r)  →  y = fused(x, W, b, r; inner=f, outer=g)

    1. One operand of the sum is a conv or linear, or an activation f of one, that nothing else reads.
    2. The sum is plain: two operands of equal shape and dtype, neither constant.
    3. g is an activation that alone reads the sum, or nothing. f before the add and g after it are kept apart.
    """
    refused = plain_sum(join)
    if refused is not None:
        return refused
    found = [branch for branch in (_branch(graph, value) for value in join.operands) if branch]
    if not found:
        return Refusal(join.name, "neither operand is a conv or linear whose output only the sum reads")
    # Where both are contractions (a projection shortcut), the branch takes the add, else the one that runs last.
    ops, inner, tail = max(found, key=lambda branch: (branch[2] is not skip, branch[0][0].order))
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
    """The contraction (with its activation, past dropouts that are off) that ends in `value`, when nothing else reads
    them."""
    ops: list[Op] = []
    inner = "none"
    current: Value | None = value
    while current is not None and current.producer is not None and only_reader(graph, current) is not None:
        op = current.producer
        ops.insert(0, op)
        if op.kind in _FUSED:
            return ops, inner, value
        activation = activation_of(op)
        if activation is not None and inner == "none":
            inner = activation
        elif op.kind is not OpKind.IDENTITY:
            return None
        current = op.inputs[0]
    return None


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
    reason = f"into the epilogue of the {work.kind.value} of '{work.module or work.name}'"
    dropout = next((op.attr("dropout") for op in ops if op.kind is OpKind.IDENTITY and op.attr("dropout")), None)
    if dropout is not None:
        reason += f"; a dropout of {dropout:g}, which only training applies, goes"
    join = next((op for op in ops if op.kind is OpKind.ADD), work)
    return Rewrite(join.name, f"{equation}  →  {kind.value}({call})", reason, (edit,))
