"""From what follows a contraction to the program of its epilogue: steps, operands by how they broadcast, outputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import TypeAlias

from rescompile.backends.cuda.contraction import EpilogueOperand, EpilogueOutput, EpilogueProgram, EpilogueStep
from rescompile.backends.emitter import Emitter, Expr
from rescompile.backends.layouts import CHANNELS_LAST, to_channels_last
from rescompile.graph import Op, Value
from rescompile.kinds import ACTIVATIONS, OpKind
from rescompile.values import Attrs, Shape

Place: TypeAlias = str | int  # the sum ("acc"), an operand by name, a step by number
Make: TypeAlias = Callable[[Emitter], Expr]

SUM = "acc"


@dataclass
class Tail:
    """An epilogue under construction, for a result of `shape`, its columns last, `batch_axes` of them first."""

    shape: Shape
    channels_last: bool = False  # whether the graph's values have their columns at 1
    batch_axes: int = 0
    operands: dict[str, tuple[EpilogueOperand, Make]] = field(default_factory=dict)
    steps: list[tuple[OpKind, tuple[Place, ...], Attrs]] = field(default_factory=list)
    outputs: list[tuple[Place, str]] = field(default_factory=list)

    def read(self, value: Value, name: str = "") -> str | None:
        """The place of a value that the epilogue reads; None where it does not broadcast to the result."""
        if value.shape is None or value.dtype is None:
            return None
        name = name or f"operand{len(self.operands)}"
        shape = (1,) * (len(self.shape) - len(value.shape)) + tuple(value.shape)
        if self.channels_last and len(shape) == len(self.shape):
            shape = tuple(shape[axis] for axis in to_channels_last(len(shape)))
        found = broadcast(name, value.dtype, shape, self.shape, self.batch_axes, images=self.channels_last)
        if found is None:
            return None
        # Of a value with one long axis the elements lie in order in any layout.
        moved = self.channels_last and len([extent for extent in value.shape if extent != 1]) > 1
        if moved and len(value.shape) != len(self.shape):
            return None
        self.operands[name] = found, lambda e: e.get(value, CHANNELS_LAST) if moved else e.get(value)
        return name

    def vector(self, value: Value, name: str) -> str | None:
        """The place of a value of one entry for each column, whatever the result's rank."""
        if value.dtype is None or value.shape is None or value.shape != (self.shape[-1],):
            return None
        self.operands[name] = EpilogueOperand(name, value.dtype, column=True), lambda e: e.get(value)
        return name

    def step(self, kind: OpKind, inputs: Sequence[Place], attrs: Attrs | None = None) -> int:
        """The place of one more value."""
        self.steps.append((kind, tuple(inputs), dict(attrs or {})))
        return len(self.steps) - 1

    def activate(self, name: str, place: Place) -> Place:
        """One of the activations that fused kinds name."""
        entry = ACTIVATIONS[name]
        return place if entry is None else self.step(entry[0], [place], entry[1])

    def program(self) -> EpilogueProgram:
        """The finished program; its outputs are y, or y0, y1, ..."""
        names = list(self.operands)

        def number(place: Place) -> int:
            if isinstance(place, int):
                return 1 + len(names) + place
            return 0 if place == SUM else 1 + names.index(place)

        return EpilogueProgram(
            tuple(
                EpilogueOutput(number(place), dtype, "y" if len(self.outputs) == 1 else f"y{index}")
                for index, (place, dtype) in enumerate(self.outputs)
            ),
            tuple(operand for operand, _ in self.operands.values()),
            tuple(EpilogueStep.of(kind, tuple(map(number, inputs)), attrs) for kind, inputs, attrs in self.steps),
        )

    def given(self, e: Emitter) -> dict[str, Expr]:
        """The operands' buffers by name."""
        return {name: make(e) for name, (_, make) in self.operands.items()}


def broadcast(
    name: str, dtype: str, shape: Shape, result: Shape, batch_axes: int = 0, *, images: bool = False
) -> EpilogueOperand | None:
    """How a value meets a result of [batch..., rows..., columns] and of as many axes; None where no epilogue reads it.

    images: the first axis may be symbolic although others are numbers.
    """
    if len(shape) != len(result) or any(have not in (1, want) for have, want in zip(shape, result, strict=True)):
        return None
    lead, wanted = tuple(shape[:-1]), tuple(result[:-1])
    column = shape[-1] == result[-1] and shape[-1] != 1
    if lead == wanted:
        return EpilogueOperand(name, dtype, batch=True, row=True, column=column)
    outer, outer_wanted = lead[:batch_axes], wanted[:batch_axes]
    inner, inner_wanted = lead[batch_axes:], wanted[batch_axes:]
    batch = outer == outer_wanted and batch_axes > 0
    if not batch and any(extent != 1 for extent in outer):
        return None
    if all(extent == 1 for extent in inner):
        return EpilogueOperand(name, dtype, batch=batch, column=column)
    if inner == inner_wanted:
        return EpilogueOperand(name, dtype, batch=batch, row=True, column=column)
    for cut in range(1, len(inner)):
        after = [extent for extent in inner_wanted[cut:] if isinstance(extent, int)]
        if len(after) != len(inner) - cut or batch_axes:
            continue
        if all(extent == 1 for extent in inner[:cut]) and inner[cut:] == inner_wanted[cut:]:
            return EpilogueOperand(name, dtype, row=True, column=column, row_cycle=prod(after))
        known = all(isinstance(extent, int) for extent in inner[:cut]) or (images and cut == 1)
        if known and all(extent == 1 for extent in inner[cut:]) and inner[:cut] == inner_wanted[:cut]:
            return EpilogueOperand(name, dtype, row=True, column=column, row_step=prod(after))
    return None


def fused_tail(tail: Tail, op: Op, dtype: str) -> bool:
    """Add outer(residual + inner(acc + bias)) of a plain or fused kind; whether an epilogue can read its operands."""
    place: Place = SUM
    kind = op.kind.spec
    bias = op.operand("bias") if "bias?" in kind.operands else None
    residual = op.operand("residual") if "residual?" in kind.operands else None
    for value, name, activation in ((bias, "bias", "inner"), (residual, "residual", "outer")):
        if value is not None:
            read = tail.vector(value, name) if name == "bias" else tail.read(value, name)
            if read is None:
                return False
            place = tail.step(OpKind.ADD, [place, read])
        if activation in kind.attrs:
            place = tail.activate(str(op.attr(activation)), place)
    tail.outputs.append((place, dtype))
    return True
