"""Operations that scale or shift one value by a constant: one number, or one for each place along one axis."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from rescompile.graph import Graph, Op, Value
from rescompile.kinds import OpKind as K
from rescompile.passes.features import held
from rescompile.passes.tracing import is_stored
from rescompile.plans import same_shape


@dataclass(frozen=True, slots=True)
class Constant:
    """y = number·v·x or number·x/v (`divide`), or y = x + number·v (`shift`); a batch norm is both.

    `held`: the stored v, None where there is the number only. `axis`: of x along which v lies, None where v is one
    number. `index`: of the operand that a sum scales, for y = r + number·x.
    """

    op: Op
    x: Value
    do: Literal["scale", "shift", "norm", "term"]
    axis: int | None = None
    held: Value | None = None
    number: float = 1.0
    divide: bool = False
    index: int = 0

    @property
    def shifts(self) -> bool:
        """Whether zero does not stay zero."""
        return self.do in ("shift", "norm")


def constants_of(graph: Graph, op: Op) -> list[Constant]:
    """What the operation scales or shifts by a constant; a sum may do so to several of its operands."""
    if op.output.constant or "float" not in (op.output.dtype or ""):
        return []
    computed = [value for value in op.operands if not value.constant]
    if op.kind is K.ADD and len(computed) > 1:
        terms = enumerate(zip(op.operands, op.scales, strict=True))
        scaled = [(index, x, scale) for index, (x, scale) in terms if scale != 1 and not x.constant]
        return [Constant(op, x, "term", number=scale, index=index) for index, x, scale in scaled]
    if len(computed) != 1 or not same_shape(computed[0], op.output) or computed[0].dtype != op.output.dtype:
        return []
    (x,) = computed
    if op.kind is K.NEG:
        return [Constant(op, x, "scale", number=-1.0)]
    if op.kind is K.BATCH_NORM:
        stored = all(value is None or (value.constant and held(value) is not None) for value in op.inputs[1:])
        return [Constant(op, x, "norm", axis=1)] if stored and not op.attr("training") else []
    if op.kind not in (K.MUL, K.DIV, K.ADD) or len(op.operands) != 2 or (op.kind is K.DIV and op.inputs[0] is not x):
        return []
    index = op.inputs.index(x)
    other = op.operands[1 - index]
    found, axis = _stored(graph, other), lies_along(other, x)
    if found is None or axis == "several":
        return []
    v, number = found
    if op.kind is K.ADD:
        if op.scales[index] != 1:
            return []
        return [Constant(op, x, "shift", axis, v, number * op.scales[1 - index])]
    divide = op.kind is K.DIV
    return [Constant(op, x, "scale", axis, v, 1 / number if divide else number, divide)]


def _stored(graph: Graph, value: Value | None) -> tuple[Value, float] | None:
    """The stored v and the number that make a constant number·v, reshaped or not; None for any other."""
    number = 1.0
    while value is not None and value.producer is not None:
        op = value.producer
        if op.kind is K.MUL:
            scales = [graph.scalar(operand) for operand in op.operands]
            index = next((place for place, scale in enumerate(scales) if scale), None)
            if index is None:
                return None
            number *= scales[index] or 1.0
            value = op.operands[1 - index]
        elif op.kind in (K.IDENTITY, K.RESHAPE):
            value = op.inputs[0]
        else:
            return None
    return (value, number) if value is not None and is_stored(value) else None


def lies_along(constant: Value, x: Value) -> int | Literal["several"] | None:
    """The one axis of x along which the constant has several elements, None where it has one."""
    if constant.shape is None or x.shape is None or len(constant.shape) > len(x.shape):
        return "several"
    lead = len(x.shape) - len(constant.shape)
    axes = [lead + axis for axis, extent in enumerate(constant.shape) if extent != 1]
    if any(constant.shape[axis - lead] != x.shape[axis] for axis in axes) or len(axes) > 1:
        return "several"
    return axes[0] if axes else None


def positive(graph: Graph, constant: Constant) -> bool:
    """Whether it scales by positive numbers only, which rectifiers let pass."""
    if constant.do not in ("scale", "term") or constant.number <= 0:
        return False
    return constant.held is None or bool((graph.data(constant.held) > 0).all())
