"""What each fused kind means, written once, in simpler kinds.

From this one expansion come the torch reference implementation, the body of the ONNX function, costs, what detection
sees, and un-fusing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar

from rescompile.errors import GraphError
from rescompile.fused_region import Region, Step, parse
from rescompile.kinds import ACTIVATIONS, OpKind
from rescompile.values import Attrs

V = TypeVar("V")


class Emit(Protocol[V]):
    """Makes one operation and returns its first output: a graph edit, a torch call, an ONNX node.

    A FULL without inputs is a number: its attributes are `value` and `dtype`.
    """

    def __call__(self, kind: OpKind, inputs: Sequence[V | None], attrs: Attrs, /) -> V: ...


def expand(kind: OpKind, inputs: Sequence[V | None], attrs: Attrs, emit: Emit[V]) -> tuple[V, ...]:
    """The outputs of a fused operation, computed through `emit` by simpler ones."""
    if kind is OpKind.FUSED_REGION:
        return play(parse(attrs["steps"]), inputs, emit)
    try:
        rule = _EXPANSIONS[kind]
    except KeyError:
        raise GraphError(f"{kind.value} is not a fused kind, so it has no expansion.") from None
    return tuple(rule(list(inputs), {**kind.spec.attrs, **attrs}, emit))


def play(region: Region, inputs: Sequence[V | None], emit: Emit[V]) -> tuple[V, ...]:
    """The outputs of a program, computed through `emit`."""
    if len(inputs) != region.operands:
        raise GraphError(f"A fused region reads {region.operands} values and was given {len(inputs)}.")
    known: list[V | None] = list(inputs)
    for step in region.steps:
        known.append(emit(step.kind, [None if index is None else known[index] for index in step.inputs], step.attrs))
    outputs = [known[index] for index in region.outputs]
    return tuple(value for value in outputs if value is not None)


def program(kind: OpKind, inputs: Sequence[object | None], attrs: Attrs) -> Region:
    """The expansion as a program: for what needs to know the steps, and which of them make the outputs."""
    if kind is OpKind.FUSED_REGION:
        return parse(attrs["steps"])
    steps: list[Step] = []

    def emit(part: OpKind, operands: Sequence[int | None], part_attrs: Attrs, /) -> int:
        steps.append(Step(part, tuple(operands), part_attrs))
        return len(inputs) + len(steps) - 1

    outputs = expand(kind, [None if value is None else index for index, value in enumerate(inputs)], attrs, emit)
    return Region(len(inputs), tuple(steps), outputs)


def _activate(name: str, x: Any, emit: Emit[Any]) -> Any:
    entry = ACTIVATIONS[name]
    return x if entry is None else emit(entry[0], [x], dict(entry[1]))


def _epilogue(x: Any, residual: Any, attrs: Attrs, emit: Emit[Any]) -> list[Any]:
    x = _activate(attrs["inner"], x, emit)
    if residual is not None:
        x = emit(OpKind.ADD, [x, residual], {})
    return [_activate(attrs["outer"], x, emit)]


def _fused_conv(inputs: list[Any], attrs: Attrs, emit: Emit[Any]) -> list[Any]:
    """y = outer(residual + inner(conv(x) + bias))"""
    x, weight, bias, residual = inputs
    conv = {name: attrs[name] for name in OpKind.CONV.spec.attrs}
    return _epilogue(emit(OpKind.CONV, [x, weight, bias], conv), residual, attrs, emit)


def _fused_linear(inputs: list[Any], attrs: Attrs, emit: Emit[Any]) -> list[Any]:
    """y = outer(residual + inner(x·weightᵀ + bias))"""
    x, weight, bias, residual = inputs
    linear = {"transpose_weight": attrs["transpose_weight"]}
    return _epilogue(emit(OpKind.LINEAR, [x, weight, bias], linear), residual, attrs, emit)


def _add_norm(inputs: list[Any], attrs: Attrs, emit: Emit[Any]) -> list[Any]:
    """sum = x + residual; y = N(sum); outputs y, sum"""
    x, residual, weight, bias = inputs
    total = emit(OpKind.ADD, [x, residual], {})
    where = {"axis": attrs["axis"], "eps": attrs["eps"]}
    if attrs["norm"] == "rms":
        return [emit(OpKind.RMS_NORM, [total, weight], where), total]
    return [emit(OpKind.LAYER_NORM, [total, weight, bias], where), total]


_EXPANSIONS: dict[OpKind, Callable[[list[Any], Attrs, Emit[Any]], list[Any]]] = {
    OpKind.FUSED_CONV: _fused_conv,
    OpKind.FUSED_LINEAR: _fused_linear,
    OpKind.ADD_NORM: _add_norm,
}
