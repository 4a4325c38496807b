"""What the fusion rules share: which additions are asked for, and when an addition is plain enough to fuse."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, TypeAlias

from rescompile.graph import Graph, Op, Shape, Value
from rescompile.kinds import OpKind, Trait, activation_name
from rescompile.plans import Refusal, same_shape

Scope: TypeAlias = Literal["residual", "all"]


def plain_sum(join: Op) -> Refusal | None:
    """None when `join` is x + y of equal shape and dtype, neither of them a constant; else the reason."""
    where = join.name
    operands = join.operands
    if len(operands) != 2:
        return Refusal(where, f"it adds {len(operands)} values, and a fused kernel adds two")
    if any(scale != 1 for scale in join.attr("scales")):
        return Refusal(where, "an operand is scaled, which the fused operations have no place for")
    if operands[0] is operands[1]:
        return Refusal(where, "it adds a value to itself")
    constant = next((value for value in operands if value.constant), None)
    if constant is not None:
        return Refusal(where, f"'{constant.name}' is a constant: a bias, not a skip")
    if not same_shape(*operands):  # the sum has it too, whatever the model calls its extents
        shapes = " and ".join(_shape(value) for value in operands)
        return Refusal(where, f"the operands have shapes {shapes}: a broadcast or unknown extent cannot be fused")
    if len({value.dtype for value in (join.output, *operands)}) != 1:
        return Refusal(where, f"the operands have dtypes {operands[0].dtype} and {operands[1].dtype}")
    return None


def spread(total: Value, streams: Sequence[Value]) -> bool:
    """Whether all streams have the shape of the sum, or some do and the others, of known extents, are broadcast to it.

    Symbolic extents are equal when their names are, and are never taken for one that is broadcast.
    """
    if same_shape(total, *streams):
        return True
    shapes = [value.shape for value in streams]
    if total.shape is None or total.shape not in shapes:
        return False
    return all(shape is not None and _fits(shape, total.shape) for shape in shapes)


def _fits(shape: Shape, target: Shape) -> bool:
    if any(isinstance(extent, str) for extent in (*shape, *target)) or len(shape) > len(target):
        return False
    return all(extent in (1, wanted) for extent, wanted in zip(reversed(shape), reversed(target), strict=False))


def quantised_side(join: Op) -> str:
    """Why a sum of which one operand alone comes out of a quantised tensor cannot join a kernel; empty for any other.

    Quantisation rounds: what is before it cannot change places with what is behind it.
    """
    rounded = [_is_rounded(value) for value in join.operands]
    if join.kind is not OpKind.ADD or len(rounded) != 2 or rounded[0] == rounded[1]:
        return ""
    value = join.operands[rounded.index(True)]
    return f"'{value.name}' is quantised on its way to the sum, and the other operand is not"


def _is_rounded(value: Value) -> bool:
    while value.producer is not None and value.producer.has(Trait.FREE) and len(value.producer.operands) > 0:
        if value.producer.kind is OpKind.DEQUANTIZE:
            return True
        value = value.producer.operands[0]
    return False


def only_reader(graph: Graph, value: Value) -> Op | None:
    """The one operation that reads `value`, None when there are several or the graph returns it."""
    if len(value.uses) != 1 or graph.is_output(value):
        return None
    return value.users[0]


def activation_of(op: Op | None) -> str | None:
    """The name by which a fused kind carries this operation as an activation."""
    return None if op is None else activation_name(op.kind, {**op.kind.spec.attrs, **op.attrs})


def trailing_activation(graph: Graph, value: Value) -> tuple[str, list[Op]]:
    """The activation that alone reads `value` ("none" without one), and its operation."""
    reader = only_reader(graph, value)
    name = activation_of(reader)
    return ("none", []) if reader is None or name is None else (name, [reader])


def _shape(value: Value) -> str:
    return "unknown" if value.shape is None else "[" + ",".join(str(extent) for extent in value.shape) + "]"
