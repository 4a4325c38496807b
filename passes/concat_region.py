"""Rule: what stands around a concatenation computes it on the way, so that no copy of its parts is made."""

from __future__ import annotations

from rescompile.graph import Graph, Op, Value
from rescompile.kinds import OpKind, Trait
from rescompile.passes.joins import only_reader
from rescompile.plans import Refusal, Rewrite, region_edit

_CONTRACTIONS = frozenset((OpKind.CONV, OpKind.CONV_TRANSPOSE, OpKind.LINEAR, OpKind.MATMUL))
_VIEWS = frozenset((OpKind.RESHAPE, OpKind.IDENTITY))


def concat_region(graph: Graph, join: Op, skip: Value | None = None) -> Rewrite | Refusal:
    """y = g(concat(x, f(W·h + b)))  →  one region: each element is computed where it is written

    1. g is what alone reads the concatenation: a batch norm in evaluation, activations, products and sums with
       constants, and moves (a channel shuffle). A dense block's features are read as often as layers use them, and
       written once, normalised.
    2. f(W·h + b) is a part of it that nothing else reads: a contraction with its activation, which writes its slice. Of
       several the one that runs last.
    3. At least one of both is there.
    """
    after = _behind(graph, join)
    before = max((ops for value in join.operands if (ops := _contraction(graph, value))), key=_order, default=[])
    if not after and not before:
        return Refusal(join.name, _reason(graph, join))
    ops = [*before, join, *after]
    edit = region_edit(graph, ops, [ops[-1].output])
    if isinstance(edit, str) and before and after:  # the shorter one may do where the longer one does not
        ops = [join, *after]
        edit = region_edit(graph, ops, [ops[-1].output])
    if isinstance(edit, str):
        return Refusal(join.name, edit)
    where = (
        f"the {before[0].kind.value} of '{before[0].module or before[0].name}' writes its slice"
        if ops[0] in before
        else ""
    )
    what = f"with {', '.join(op.kind.value for op in after)} behind it" if after else ""
    equation = "y = g(concat(x, f(W·h + b)))  →  y = region(x, h, W, b)"
    return Rewrite(join.name, equation, "; ".join(part for part in (where, what) if part), (edit,))


def _behind(graph: Graph, join: Op) -> list[Op]:
    """The operations that follow, each the only reader of the one before; nothing where they are but another view."""
    ops: list[Op] = []
    value = join.output
    while (reader := only_reader(graph, value)) is not None and _follows(reader, value):
        ops.append(reader)
        value = reader.output
    return ops if any(op.kind not in _VIEWS for op in ops) else []


def _follows(op: Op, value: Value) -> bool:
    if op.kind in _VIEWS or op.kind is OpKind.PERMUTE:
        return True
    if op.kind is OpKind.BATCH_NORM:
        return not op.attr("training") and op.inputs[0] is value
    if len(op.outputs) != 1 or not (op.has(Trait.ACTIVATION) or op.kind in (OpKind.MUL, OpKind.ADD)):
        return False
    return op.operands.count(value) == 1 and all(other is value or other.constant for other in op.operands)


def _contraction(graph: Graph, value: Value) -> list[Op]:
    """The contraction, with its activation, that ends in the value when nothing else reads them; else nothing."""
    ops: list[Op] = []
    while (op := value.producer) is not None and only_reader(graph, value) is not None:
        ops.insert(0, op)
        if op.kind in _CONTRACTIONS:
            return ops
        if not (op.has(Trait.ACTIVATION) or op.kind is OpKind.IDENTITY) or op.inputs[0] is None or len(ops) > 2:
            break
        value = op.inputs[0]
    return []


def _order(ops: list[Op]) -> int:
    return ops[0].order


def _reason(graph: Graph, join: Op) -> str:
    readers = len(join.output.users) + graph.is_output(join.output)
    if readers > 1:
        behind = f"{readers} readers take the concatenation as it is"
    else:
        reader = join.output.users[0] if join.output.users else None
        behind = f"a {reader.kind.value} reads it" if reader is not None else "the model returns it"
    return f"{behind}, and no part of it ends in a contraction that only it reads"
