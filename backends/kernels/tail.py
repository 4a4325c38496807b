"""What follows a contraction or a window in the same kernel, element by element, before anything is written."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rescompile.backends.kernels.elementwise import bound, clear_borders, emit_anchor
from rescompile.backends.kernels.emit import Expr, Flat, div, mod
from rescompile.backends.kernels.moves import Index, Lanes
from rescompile.backends.kernels.region import Program, Values
from rescompile.backends.kernels.specs import Argument
from rescompile.backends.kernels.tiles import Tile
from rescompile.kinds import OpKind


@dataclass(frozen=True)
class Tail:
    """The region whose step `root` is the contraction; what the other parts of a concatenation are made of is in it."""

    program: Program
    root: int
    channels_last: bool = False

    @property
    def arguments(self) -> list[Argument]:
        """Buffers of what the region reads beside the contraction, then of its results."""
        operands, results = self.program.arguments()
        return [*operands, *results]

    @property
    def joint(self) -> int | None:
        """The concatenation that the contraction writes a part of."""
        for number in self.program.following(self.root):
            step = self.program.step(number)
            if step is not None and step.kind is OpKind.CONCAT:
                return number
        return None

    def unflattened(self, row: Expr) -> list[Expr]:
        """Coordinates of a row of the contraction: all axes but the channels', outermost first."""
        shape = self.program.shape(self.root)
        axis = 1 if self.channels_last and len(shape) > 2 else len(shape) - 1
        lead = [extent for number, extent in enumerate(shape) if number != axis]
        found: list[Expr] = []
        for number, extent in reversed(list(enumerate(lead))):
            found.append(row if number == 0 or extent is None else mod(row, extent))
            row = row if extent is None else div(row, extent)
        return found[::-1]

    def index(self, rows: Sequence[Expr], column: Expr) -> Index:
        """The element's index as the graph has it."""
        shape = self.program.shape(self.root)
        if self.channels_last and len(shape) > 2:
            return (rows[0], column, *rows[1:])
        return (*rows, column)


class Following:
    """A tail over the buffers of one kernel."""

    def __init__(self, tail: Tail, given: Sequence[Flat]) -> None:
        self.tail = tail
        self.values: Values = bound(tail.program, given)[0]

    def store(self, rows: Sequence[Expr], column: Expr, value: Expr) -> None:
        """Write what follows from one element, inside a vector statement."""
        self.values.follow(self.tail.root, self.tail.index(rows, column), value)
        self.values.forget()

    def storer(
        self, rows_of: Callable[[int], Sequence[Expr]], column: Expr, aligned: int = 0
    ) -> Callable[[int, Expr, Expr], None]:
        """store(pixel, lane, value), as register tiles want it; `aligned`: what `column` is a multiple of, or 0."""
        if aligned:
            return lambda pixel, lane, value: self.store(rows_of(pixel), Lanes(column, lane, aligned), value)
        return lambda pixel, lane, value: self.store(rows_of(pixel), column + lane, value)

    def beside(self, tile: Tile, several: bool) -> None:
        """Everything that the contraction's own loops do not write: borders, and the other parts of a concatenation."""
        clear_borders(self.tail.program, self.values.results, several)
        joint = self.tail.joint
        if joint is None:
            return
        step = self.tail.program.step(joint)
        ours = {self.tail.root, *self.tail.program.following(self.tail.root)}
        part = next(value for value in (step.inputs if step else ()) if value in ours)
        lanes = Tile(1, tile.lanes, 2 if several else 1)
        emit_anchor(self.values, joint, self.tail.channels_last, lanes, given=part)
