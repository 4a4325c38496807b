"""What a fused region computes: a short program in simpler kinds, carried by the operation as text.

A region has operands 0 ... n−1; step i makes value n + i out of values before it. The text is JSON: data that says what
was fused, never code. Types of the values in between follow from the operands', so that one program serves any batch.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any

import msgspec

from rescompile.errors import GraphError, RescompileError
from rescompile.kinds import OpKind, Trait
from rescompile.result_types import complete, result_dtype
from rescompile.values import Attrs, Dim, Op, Role, Value, ValueType

K = OpKind

# What a step may be, besides what computes each element alone: kinds whose result's shape follows from the operands'
# and attributes, and that every IR can spell.
_MOVES = frozenset((K.CAST, K.RESHAPE, K.PERMUTE, K.SLICE, K.ROLL, K.FLIP, K.PAD, K.CONCAT))
_WORKS = frozenset((K.CONV, K.CONV_TRANSPOSE, K.LINEAR, K.MATMUL))
_NORMS = frozenset((K.BATCH_NORM, K.LAYER_NORM, K.RMS_NORM, K.GROUP_NORM, K.INSTANCE_NORM))
_POOLS = frozenset((K.MAX_POOL, K.AVG_POOL))
_NOT_FUSED = frozenset((K.IDENTITY, K.QUANTIZE, K.DEQUANTIZE, K.DROPOUT, K.MOD))
FUSIBLE: frozenset[OpKind] = (
    _MOVES
    | _WORKS
    | _NORMS
    | _POOLS
    | {kind for kind in K if kind.has(Trait.ELEMENTWISE) and kind not in _NOT_FUSED and kind is not K.CAST}
)

_LARGEST = 1 << 16  # characters of a program; a file may hold any text


class Step(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """One operation of a region. A `full` without operands is a number of the attribute `dtype`."""

    kind: OpKind
    inputs: tuple[int | None, ...]
    attrs: Attrs = {}

    def settings(self, result: ValueType) -> Attrs:
        """Attributes of an operation of its own: a reshape's target is its result's shape, where that is known."""
        told = result.shape is not None
        return {name: value for name, value in self.attrs.items() if not (told and name == "shape")}


class Region(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`operands`: how many values it reads; `outputs`: which of its values it returns."""

    operands: int
    steps: tuple[Step, ...]
    outputs: tuple[int, ...]

    def text(self) -> str:
        """As JSON."""
        return msgspec.json.encode(self).decode()

    def made_by(self, output: int) -> int | None:
        """The step that makes an output; None for an operand that is passed on."""
        index = self.outputs[output] - self.operands
        return index if index >= 0 else None


@lru_cache(maxsize=4096)
def parse(text: str) -> Region:
    """The program of a region. GraphError where the text is none."""
    if len(text) > _LARGEST:
        raise GraphError(f"A fused region's program has {len(text)} characters: more than {_LARGEST} are not read.")
    try:
        region = msgspec.json.decode(text, type=Region)
    except msgspec.MsgspecError as error:
        raise GraphError(f"A fused region's program cannot be read: {error}.") from error
    known = region.operands
    for step in region.steps:
        if step.kind not in FUSIBLE and step.kind is not K.FULL:
            raise GraphError(f"A fused region has a step '{step.kind.value}', which no region may hold.")
        if any(value is not None and not 0 <= value < known for value in step.inputs):
            raise GraphError(f"A fused region's step '{step.kind.value}' reads a value that is not made before it.")
        known += 1
    if not region.outputs or any(not 0 <= value < known for value in region.outputs):
        raise GraphError("A fused region returns a value that it does not have.")
    steps = tuple(Step(step.kind, step.inputs, _tuples(step.attrs)) for step in region.steps)
    return Region(region.operands, steps, region.outputs)


def describe(ops: Iterable[Op], outputs: Sequence[Value], number: Any) -> tuple[list[Value], Attrs]:
    """The operands and attributes of the region that stands for `ops`. RescompileError says why it cannot.

    `number`: tells the number that a literal holds, None for other values. Identities go: they name a value anew.
    """
    ordered = sorted(ops, key=lambda op: op.order)
    made = {op.output: op for op in ordered}
    operands: dict[Value, None] = {}
    literals: dict[Value, float] = {}
    for op in ordered:
        for value in op.operands:
            if value in made or value in literals or value in operands:
                continue
            literal = number(value) if value.role is Role.CONSTANT and value.shape == () else None
            if literal is None or not math.isfinite(literal):
                operands[value] = None
            else:
                literals[value] = literal
    places = {value: index for index, value in enumerate(operands)}
    steps: list[Step] = []
    for value, literal in literals.items():
        places[value] = len(operands) + len(steps)
        whole = value.dtype is not None and not value.dtype.startswith(("float", "bfloat"))
        steps.append(Step(K.FULL, (), {"value": int(literal) if whole else literal, "dtype": value.dtype}))
    for op in ordered:
        if op.kind is K.IDENTITY:
            places[op.output] = places[op.operands[0]]
            continue
        step = Step(op.kind, tuple(None if value is None else places[value] for value in op.inputs), _settings(op))
        places[op.output] = len(operands) + len(steps)
        steps.append(step)
    region = Region(len(operands), tuple(steps), tuple(places[value] for value in outputs))
    label = "_".join(op.kind.value for op in ordered if op.kind is not K.IDENTITY)
    return list(operands), {"label": label, "steps": region.text()}


def unfit(op: Op) -> str:
    """Why no region can hold the operation, empty when one can: what `describe` would say of it, without its text."""
    try:
        _settings(op)
    except RescompileError as error:
        return str(error)
    return ""


def step_types(region: Region, operands: Sequence[ValueType | None], outputs: Sequence[ValueType]) -> list[ValueType]:
    """Type of what each step makes, as far as it follows from the operands' and outputs'."""
    known: list[ValueType | None] = list(operands)
    declared = dict(zip(region.outputs, outputs, strict=False))
    for step in region.steps:
        given = declared.get(len(known))
        read = [None if index is None else known[index] for index in step.inputs]
        known.append(_type(step, read) if given is None else given)
    return [kind or ValueType(None, None) for kind in known[region.operands :]]


def _type(step: Step, operands: Sequence[ValueType | None]) -> ValueType:
    if step.kind is K.FULL:
        return ValueType((), step.attrs.get("dtype"))
    attrs = {**step.kind.spec.attrs, **step.attrs}
    present = [kind for kind in operands if kind is not None]
    extents = complete(step.kind, attrs, [None if kind is None else kind.shape for kind in operands], None)
    shape = None if extents is None or None in extents else tuple(extent for extent in extents if extent is not None)
    # A number without dimensions takes on the type of what it meets.
    typed = [kind.dtype for kind in present if kind.shape != ()] or [kind.dtype for kind in present]
    return ValueType(shape, result_dtype(step.kind, attrs, typed))


def _settings(op: Op) -> Attrs:
    if op.kind not in FUSIBLE or len(op.outputs) != 1:
        raise RescompileError(f"'{op.name}' ({op.kind.value}) is nothing that a fused operation can hold")
    if op.kind is K.BATCH_NORM and op.attr("training"):
        raise RescompileError(f"'{op.name}' is a batch norm in training, which also moves its running statistics")
    defaults = op.kind.spec.attrs
    unknown = [name for name in op.attrs if name not in defaults]
    if unknown:
        raise RescompileError(f"'{op.name}' has the setting '{unknown[0]}', which a fused operation cannot carry")
    attrs = {name: value for name, value in op.attrs.items() if value != defaults[name]}
    if op.kind is K.RESHAPE:
        attrs["shape"] = _target(op)
    if op.kind is K.SLICE:
        attrs["stops"] = tuple(_LAST if isinstance(stop, str) else stop for stop in op.attr("stops"))
        if any(stop != shape for stop, shape in _named_stops(op)):
            raise RescompileError(f"'{op.name}' is a slice up to a symbolic extent of another value")
    for name, value in attrs.items():
        entries = value if isinstance(value, tuple) else (value,)
        if any(isinstance(entry, str) for entry in entries) and isinstance(value, tuple):
            raise RescompileError(f"the {name} of '{op.name}' depends on a symbolic extent")
        if any(isinstance(entry, float) and not math.isfinite(entry) for entry in entries):
            raise RescompileError(f"the {name} of '{op.name}' is not finite")
    return attrs


_LAST = (1 << 63) - 1


def _named_stops(op: Op) -> list[tuple[Dim, Dim | None]]:
    shape = op.operands[0].shape or ()
    pairs = zip(op.attr("axes"), op.attr("stops"), strict=True)
    return [(stop, shape[axis] if axis < len(shape) else None) for axis, stop in pairs if isinstance(stop, str)]


def _target(op: Op) -> tuple[int, ...]:
    """A reshape's target: −1 for the extent that is symbolic."""
    shape = op.output.shape
    if shape is None or sum(isinstance(extent, str) for extent in shape) > 1:
        raise RescompileError(f"'{op.name}' is a reshape with more than one unknown extent")
    return tuple(extent if isinstance(extent, int) else -1 for extent in shape)


def _tuples(attrs: Attrs) -> Attrs:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in attrs.items()}
