"""Regions around norms: what comes before, statistics and what follows, row after row while it is in the cache.

A row is what one mean is taken of: the last axes of a layer or RMS norm, a group of channels of a group norm. A region
may hold several norms of the same rows (norm, add, norm); each ends a sweep over the row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod

import tvm

from rescompile.backends.kernels.elementwise import bound, clear_borders
from rescompile.backends.kernels.emit import (
    Expr,
    Flat,
    chunk,
    const,
    div,
    lanes,
    let,
    local,
    mod,
    parallel,
    prim_func,
    scratch,
    serial,
    sqrt,
)
from rescompile.backends.kernels.machine import Machine
from rescompile.backends.kernels.moves import Index
from rescompile.backends.kernels.region import Program, Values, broadcast
from rescompile.backends.kernels.rows import SERIAL_ELEMENTS, add, fold
from rescompile.backends.kernels.specs import Argument, compute_dtype
from rescompile.backends.kernels.tiles import Tile
from rescompile.fused_region import Step
from rescompile.kinds import OpKind

K = OpKind
GROUPED = frozenset((K.GROUP_NORM, K.INSTANCE_NORM))
ROW_NORMS = frozenset((K.LAYER_NORM, K.RMS_NORM, K.GROUP_NORM, K.INSTANCE_NORM))
_SPAN = 64  # channels of neighbouring small groups that are worked on side by side

Term = Callable[[Index, Expr], Expr]
Statistic = Callable[[Expr], Expr]  # by position in the row
Body = Callable[[Index, Expr, Expr], None]  # index, position in the row, lane


@dataclass(frozen=True)
class RowsSpec:
    """The program's results. `norms`: its norms in order, over the same rows; the first's input is walked over."""

    program: Program
    norms: tuple[int, ...]
    channels_last: bool = False
    dtype: str = "float32"

    @property
    def anchor(self) -> int:
        """What the first norm reads."""
        step = self.step(self.norms[0])
        return step.inputs[0] or 0

    def step(self, number: int) -> Step:
        """A norm."""
        step = self.program.step(number)
        if step is None:
            raise ValueError(f"{number} is an operand")
        return step

    @property
    def grouped(self) -> bool:
        """Whether rows are groups of channels."""
        return self.step(self.norms[0]).kind in GROUPED

    @property
    def groups(self) -> int:
        """Groups of channels."""
        step, shape = self.step(self.norms[0]), self.program.shape(self.anchor)
        return int(shape[1] or 0) if step.kind is K.INSTANCE_NORM else int(step.attrs.get("groups", 1))

    @property
    def axis(self) -> int:
        """The first axis of a row."""
        return int(self.step(self.norms[0]).attrs.get("axis", -1)) % len(self.program.shape(self.anchor))

    @property
    def rows(self) -> int | None:
        """Rows; None where their count is dynamic."""
        shape = self.program.shape(self.anchor)
        if self.grouped:
            return int(shape[0] or 0) * self.groups
        return None if None in shape else prod(extent or 1 for extent in shape[: self.axis])


def arguments(spec: RowsSpec, tile: Tile | None = None) -> list[Argument]:
    """The operands, then the results."""
    operands, results = spec.program.arguments("x")
    return [*operands, *results]


def candidates(spec: RowsSpec, machine: Machine) -> list[Tile]:
    """One. Its pixels are the groups that are worked on side by side."""
    rows, size = spec.rows, prod(extent or 1 for extent in spec.program.shape(spec.anchor))
    small = rows is not None and size <= SERIAL_ELEMENTS
    together = 1
    if spec.grouped and spec.channels_last:
        width = int(spec.program.shape(spec.anchor)[1] or 0) // spec.groups
        fitting = [n for n in range(1, spec.groups + 1) if spec.groups % n == 0 and n * width <= _SPAN]
        busy = [n for n in fitting if small or (rows or 0) // n >= machine.threads]
        together = max(busy or fitting or [1])
    tasks = 1 if small else machine.threads if rows is None else min(rows // together, machine.threads)
    return [Tile(together, (2 if spec.grouped else 4) * machine.vector(spec.dtype), tasks)]


def build(spec: RowsSpec, tile: Tile, name: str) -> tvm.tirx.PrimFunc:
    """The kernel."""

    def body(*given: Expr) -> None:
        values, rows = bound(spec.program, given)
        clear_borders(spec.program, values.results, tile.row_tasks > 1)
        _Kernel(spec, tile, values).emit(rows)

    return prim_func(name, arguments(spec), body)


class _Kernel:
    """The sweeps over one row after another."""

    def __init__(self, spec: RowsSpec, tile: Tile, values: Values) -> None:
        self.spec, self.tile, self.values = spec, tile, values
        self.program = spec.program
        self.shape = spec.program.shape(spec.anchor)
        self.position: Expr = 0
        self.compute = compute_dtype(spec.program.dtype(spec.norms[0]))
        self.written: set[int] = set()
        values.narrow |= {self._source(norm) for norm in spec.norms}
        self.aside: dict[int, Flat] = {}

    def emit(self, rows: Expr | None) -> None:
        total: Expr = self.spec.rows if rows is None else rows
        total = total // self.tile.pixels if isinstance(total, int) else total
        with parallel(self.tile.row_tasks) as task:
            first, last = chunk(task, self.tile.row_tasks, total)
            if not self.spec.grouped:
                self._allocate()
            with serial(first, last) as row:
                self._row(row)

    def _allocate(self) -> None:
        """A row of each value that a later sweep would otherwise compute again."""
        size = prod(extent or 1 for extent in self.shape[self.spec.axis :])
        for norm in self.spec.norms:
            source = self._source(norm)
            plain = source < len(self.program.operands)
            if not plain and self._result(source) is None and source not in self.aside:
                dtype = compute_dtype(self.program.dtype(source))
                self.aside[source] = scratch(size, dtype)

    def _source(self, norm: int) -> int:
        return self.spec.step(norm).inputs[0] or 0

    def _result(self, number: int) -> int | None:
        """Where a value is written in the type that it is computed in, so that it can be read from there again."""
        for position, made in enumerate(self.program.region.outputs):
            if made == number and self.program.results[position].dtype == compute_dtype(self.program.dtype(number)):
                return position
        return None

    def _row(self, row: Expr) -> None:
        self.written = set()
        self.values.kept.clear()
        walk = _groups(self, row) if self.spec.grouped else _row(self, row)
        for norm in self.spec.norms:
            self._statistics(walk, norm)
        final = self.spec.anchor

        def finish(index: Index, position: Expr) -> None:
            self.position = position
            self.values.follow(final, index, self.values.at(final, index))
            for made in dict.fromkeys(self.program.region.outputs):
                if made != final and made not in self.program.following(final):
                    self.values.store(made, index)
            self.values.forget()

        self.values.skip = frozenset(self.written)
        walk.each(finish)
        self.values.skip = frozenset()

    def _statistics(self, walk: _Walk, norm: int) -> None:
        """Sweep over what the norm reads, putting it aside; then its elements are known."""
        step, source = self.spec.step(norm), self._source(norm)
        values, compute = self.values, self.compute
        centred = step.kind is not K.RMS_NORM
        inverse = const(1.0 / walk.count, compute)
        result, aside = self._result(source), self.aside.get(source)

        def read(index: Index, position: Expr) -> Expr:
            self.position = position
            return values.at(source, index).astype(compute)

        def first(index: Index, position: Expr) -> Expr:
            value = read(index, position)
            if result is not None and source >= len(self.program.operands):
                place = self.program.results[result]
                values.results[result].store(place.at(index), values.at(source, index))
            elif aside is not None:
                aside.store(position, values.at(source, index))
            return value if centred else value * value

        total = walk.reduce(first, values.forget)
        if source >= len(self.program.operands):
            if result is not None:
                place, flat = self.program.results[result], values.results[result]
                values.kept[source] = lambda index: flat[place.at(index)]
                self.written.add(source)
            elif aside is not None:
                values.kept[source] = lambda index: aside[self.position]
        mean: Statistic | None = None
        if centred:
            mean = walk.each_statistic(lambda at: total(at) * inverse)
            centre = mean

            def square(index: Index, position: Expr) -> Expr:
                off = read(index, position) - centre(position)
                return off * off

            total = walk.reduce(square, values.forget)
        eps = const(step.attrs.get("eps", 1e-5), compute)
        scale = walk.each_statistic(lambda at: const(1.0, compute) / sqrt(total(at) * inverse + eps))

        def normed(index: Index) -> Expr:
            position = self.position
            value = values.at(source, index).astype(compute)
            value = (value if mean is None else value - mean(position)) * scale(position)
            for place in (1, 2):
                operand = step.inputs[place] if place < len(step.inputs) else None
                if operand is not None:
                    where = (index[1],) if self.spec.grouped else broadcast(index, self.program.shape(operand))
                    factor = values.at(operand, where).astype(compute)
                    value = value * factor if place == 1 else value + factor
            return value

        values.kept[norm] = normed


class _Walk:
    """The elements of one row (or of several small groups side by side): loops, and sums over them.

    count: elements of one row. width: of the innermost loop. parts: rows side by side.
    loops: runs a body for every element, in vectors of a given number of lanes.
    """

    def __init__(self, kernel: _Kernel, count: int, width: int, parts: int, loops: Callable[[Body, int], None]) -> None:
        self.count, self.width, self.parts, self.loops = count, width, parts, loops
        self.lanes, self.compute = kernel.tile.lanes, kernel.compute

    def each(self, body: Callable[[Index, Expr], None]) -> None:
        """body(index, position) for every element."""
        self.loops(lambda index, position, _: body(index, position), self.lanes)

    def reduce(self, term: Term, forget: Callable[[], None]) -> Statistic:
        """The sum over the row, by group where there are several."""
        size = self.width if self.parts > 1 else self.lanes
        while self.parts == 1 and size > self.width:
            size //= 2
        partial = local(size, self.compute)
        with lanes(size) as lane:
            partial.store(lane, const(0.0, self.compute))

        def body(index: Index, position: Expr, lane: Expr) -> None:
            slot = position if self.parts > 1 else lane
            partial.store(slot, partial[slot] + term(index, position))
            forget()

        self.loops(body, self.lanes if self.parts > 1 else size)
        if self.parts == 1:
            total = fold(partial, size, add)
            return lambda _: total
        group = self.width // self.parts
        sums = local(self.width, self.compute)
        for part in range(self.parts):
            whole = partial[part * group]
            for member in range(1, group):
                whole = whole + partial[part * group + member]
            named = let(whole)
            with lanes(group) as lane:
                sums.store(part * group + lane, named)
        return lambda position: sums[position]

    def each_statistic(self, made: Statistic) -> Statistic:
        """A number of the row, computed once; one for each of several groups."""
        if self.parts == 1:
            value = let(made(0))
            return lambda _: value
        kept = local(self.width, self.compute)
        with lanes(self.width) as lane:
            kept.store(lane, made(lane))
        return lambda position: kept[position]


def _row(kernel: _Kernel, row: Expr) -> _Walk:
    """The last axes."""
    shape, axis = kernel.shape, kernel.spec.axis
    lead = _coordinates(row, shape[:axis])
    *outer, inner = (int(extent or 0) for extent in shape[axis:])
    lines = prod(outer)

    def loops(body: Body, width: int) -> None:
        with serial(lines) as line:
            inside = _coordinates(line, outer)
            _vectors(inner, width, lambda i, lane: body((*lead, *inside, i), line * inner + i, lane))

    return _Walk(kernel, lines * inner, inner, 1, loops)


def _groups(kernel: _Kernel, row: Expr) -> _Walk:
    """A group of channels with its positions; small groups that lie side by side together."""
    _, whole, *space = (int(extent or 0) for extent in kernel.shape)
    parts, groups = kernel.tile.pixels, kernel.spec.groups
    channels = whole // groups
    width = channels * parts
    image, part = _coordinates(row, (None, groups // parts))
    base = part * width
    along = kernel.spec.channels_last or not space

    def across(body: Body, lanes_: int) -> None:
        with serial(prod(space)) as pixel:
            where = _coordinates(pixel, space)
            _vectors(width, lanes_, lambda i, lane: body((image, base + i, *where), i, lane))

    def planes(body: Body, lanes_: int) -> None:
        with serial(width * prod(space[:-1])) as line:
            channel, *where = _coordinates(line, (None, *space[:-1]))
            _vectors(space[-1], lanes_, lambda i, lane: body((image, base + channel, *where, i), 0, lane))

    return _Walk(kernel, channels * prod(space), width if along else space[-1], parts, across if along else planes)


def _coordinates(position: Expr, extents: Sequence[int | None]) -> list[Expr]:
    """The coordinates of a position in a box; the first needs no bound."""
    found: list[Expr] = []
    for number, extent in reversed(list(enumerate(extents))):
        last = number == 0 or extent is None
        found.insert(0, let(position if last else mod(position, extent or 1)))
        position = position if last else let(div(position, extent or 1))
    return found


def _vectors(count: int, width: int, body: Callable[[Expr, Expr], None]) -> None:
    """body(i, lane) for i in range(count), in vectors of `width` lanes."""
    full = count // width
    if full:
        with serial(full) as block, lanes(width) as lane:
            body(block * width + lane, lane)
    if count % width:
        with lanes(count % width) as lane:
            body(full * width + lane, lane)
