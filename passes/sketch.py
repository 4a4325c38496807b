"""Edits under construction: new operations and parameters, with names and the shapes that follow."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, TypeAlias

from rescompile.costs import Cost, kind_cost
from rescompile.graph import Graph, Op, Shape, Value
from rescompile.kinds import OpKind
from rescompile.plans import (
    AddLiteral,
    AddParameter,
    Edit,
    FreshNames,
    Insert,
    ReplaceUses,
    SetOperand,
    SetParameter,
)


@dataclass(frozen=True, slots=True)
class Made:
    """A value that an edit makes."""

    name: str
    shape: Shape | None
    dtype: str | None


Term: TypeAlias = Value | Made


class Sketch:
    """The edits of one rewrite. `prefix` is what its parameters' names start with."""

    def __init__(self, graph: Graph, fresh: FreshNames, prefix: str, dtype: str, seed: int) -> None:
        self.graph = graph
        self.prefix = prefix
        self.dtype = dtype
        self.edits: list[Edit] = []
        self.parameters = 0  # numbers that training changes
        self.cost = Cost()  # of the new operations, on one call
        self._fresh = fresh
        self._seed = seed

    def parameter(self, leaf: str, shape: tuple[int, ...], recipe: str, trainable: bool = True, **attrs: Any) -> Made:
        """A new tensor, filled by a recipe of `rescompile.recipes`."""
        name = self._fresh(f"{self.prefix}.{leaf}")
        settings = {"shape": shape, "dtype": self.dtype, **attrs}
        if recipe in ("kaiming_normal",):
            settings["seed"] = [self._seed, len(self.edits)]
        self.edits.append(AddParameter(name, recipe, (), settings, trainable))
        self.parameters += math.prod(shape) * trainable
        return Made(name, shape, self.dtype)

    def copy(self, leaf: str, parameter: Value) -> Made:
        """A new parameter with the contents of another."""
        name = self._fresh(f"{self.prefix}.{leaf}")
        self.edits.append(AddParameter(name, "scaled", (parameter.name,), {"factor": 1.0}))
        shape = tuple(extent for extent in parameter.shape or () if isinstance(extent, int))
        self.parameters += math.prod(shape)
        return Made(name, shape, self.dtype)

    def scalar(self, name: str, number: float) -> Made:
        """A new tensor without dimensions, under a name of its own, that no optimiser changes."""
        settings = {"shape": (), "dtype": self.dtype, "value": number}
        self.edits.append(AddParameter(name, "constant", (), settings, False))
        return Made(name, (), self.dtype)

    def literal(self, number: float) -> Made:
        """A number that no training changes."""
        name = self._fresh(f"{self.prefix}.literal")
        self.edits.append(AddLiteral(name, number, self.dtype))
        return Made(name, (), self.dtype)

    def rescale(self, parameter: Value, factor: float, rows: tuple[int, int] | None = None) -> None:
        """Multiply an existing parameter by a number, or the rows from one index to another of it."""
        settings: dict[str, Any] = {"factor": factor} if rows is None else {"factor": factor, "rows": rows}
        self.edits.append(SetParameter(parameter.name, "scaled", (parameter.name,), settings))

    def op(self, kind: OpKind, *inputs: Term | None, shape: Shape | None = None, label: str = "", **attrs: Any) -> Made:
        """A new operation with one output, of the first operand's shape where none is given."""
        first = next(term for term in inputs if term is not None and term.shape != ())
        name = self._fresh(f"{self.prefix.replace('.', '_')}_{label or kind.value}")
        made = Made(name, first.shape if shape is None else shape, self.dtype)
        cost = kind_cost(kind, inputs, (made,), attrs)
        self.cost = Cost(self.cost.flops + cost.flops, self.cost.bytes + cost.bytes)
        operands = tuple(None if term is None else term.name for term in inputs)
        self.edits.append(Insert(kind.value, operands, ((made.name, made.shape, made.dtype),), attrs))
        return made

    def let_read(self, op: Op, made: Made) -> None:
        """Let an existing operation read a new value as its first operand."""
        self.edits.append(SetOperand(op.name, 0, made.name))

    @property
    def costs(self) -> str:
        """What the edits add, in words."""
        plural = "s" * (self.parameters != 1)
        return f"{self.parameters:,} parameter{plural}, {self.cost.flops:,} FLOPs, {self.cost.bytes:,} bytes moved"

    def stand_in(self, old: Value, new: Made) -> None:
        """Let every reader of `old` read `new`, but for the operations of this sketch."""
        own = [
            SetOperand(edit.outputs[0][0], index, old.name)
            for edit in self.edits
            if isinstance(edit, Insert)
            for index, name in enumerate(edit.inputs)
            if name == old.name
        ]
        self.edits += [ReplaceUses(old.name, new.name), *own]
