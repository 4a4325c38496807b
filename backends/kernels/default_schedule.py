"""A sensible CPU schedule for any legalised PrimFunc, so that nothing runs at TVM's unscheduled default.

Elementwise work becomes parallel tasks of vectors. A reduction keeps either a vector of outputs (where an output axis
is contiguous in what it reads) or a vector of partial sums (where the reduced axis is). Small functions stay
serial: a parallel launch costs microseconds.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Any

import tvm
from tvm import s_tir
from tvm.sym.pattern import detect_linear_equation

from rescompile.backends.kernels.emit import TVM_ERRORS
from rescompile.backends.kernels.rows import SERIAL_ELEMENTS

WIDEST = 64  # lanes of one vector statement: 4 registers of AVX-512
FEW_TASKS = 64
_SPATIAL, _REDUCTION = 0, 2  # tirx.IterVar.DataPar and CommReduce

Rule = Callable[[Any, Any], None]


def schedule_default(func: tvm.tirx.PrimFunc) -> tvm.tirx.PrimFunc:
    """`func` scheduled for a CPU; each block that a rule cannot handle stays as it is, so this never fails.

    Takes functions of blocks over plain loops, as Relax's legalisation and fusion make them. Others, and functions
    that were scheduled before, come back unchanged.
    """
    try:
        schedule = s_tir.Schedule(func)
        blocks = _blocks(schedule)
        if any(_is_scheduled(schedule, block) for block in blocks):
            return func
    except TVM_ERRORS:
        return func
    for block in blocks:
        schedule = _attempt(schedule, block, _inline)
    for block in _blocks(schedule):
        kind = _Block.of(schedule, block)
        if kind is None:
            continue
        rules = (_sum_columns, _sum_rows, _parallel_only) if kind.reductions else (_elementwise, _parallel_only)
        for rule in rules:
            changed = _attempt(schedule, block, rule)
            if changed is not schedule:
                schedule = changed
                break
    result: tvm.tirx.PrimFunc = schedule.mod["main"]
    return result.with_attrs(func.attrs) if func.attrs is not None else result


class _Skip(Exception):
    """A rule does not apply to a block."""


def _attempt(schedule: Any, name: str, rule: Rule) -> Any:
    """A changed copy of the schedule, or the schedule itself where the rule does not apply."""
    trial = schedule.copy()
    try:
        rule(trial, trial.get_sblock(name))
    except (_Skip, *TVM_ERRORS):
        return schedule
    return trial


def _blocks(schedule: Any) -> list[str]:
    """Names of the blocks right under the root, in order."""
    root = schedule.get_sblock("root")
    return [str(schedule.get(block).name_hint) for block in schedule.get_child_blocks(root)]


def _is_scheduled(schedule: Any, name: str) -> bool:
    loops = schedule.get_loops(schedule.get_sblock(name))
    return any(int(schedule.get(loop).kind) != tvm.tirx.ForKind.SERIAL for loop in loops)


@dataclass(frozen=True)
class _Block:
    """Loops of a block by kind. An extent of None is dynamic."""

    spatial: tuple[int | None, ...]
    reductions: tuple[int | None, ...]

    @staticmethod
    def of(schedule: Any, name: str) -> _Block | None:
        """None where the loops do not belong to the block's axes one to one."""
        block = schedule.get_sblock(name)
        loops = schedule.get_loops(block)
        axes = schedule.get(block).iter_vars
        if len(loops) != len(axes) or any(int(axis.iter_type) not in (_SPATIAL, _REDUCTION) for axis in axes):
            return None
        extents = [_extent(schedule, loop) for loop in loops]
        kinds = [int(axis.iter_type) for axis in axes]
        if kinds != sorted(kinds):
            return None
        count = kinds.count(_SPATIAL)
        return _Block(tuple(extents[:count]), tuple(extents[count:]))

    @property
    def small(self) -> bool:
        """Whether a parallel launch would cost more than it saves."""
        extents = (*self.spatial, *self.reductions)
        return None not in extents and prod(extent or 1 for extent in extents) <= SERIAL_ELEMENTS


def _extent(schedule: Any, loop: Any) -> int | None:
    extent = schedule.get(loop).extent
    return int(extent) if isinstance(extent, tvm.tirx.IntImm) else None


def _lanes(extent: int | None, repeats: int = 1, most: int = WIDEST) -> int | None:
    """The widest vector that divides an extent into at least `repeats` parts."""
    if extent is None:
        return None
    fitting = [n for n in range(4, most + 1) if extent % n == 0 and extent // n >= repeats]
    # A multiple of the registers beats a longer vector with a partly filled one.
    return max(fitting, key=lambda n: (n % 16 == 0, n % 8 == 0, n), default=None)


def _inline(schedule: Any, block: Any) -> None:
    """Moves an elementwise block into its consumers where that computes nothing twice."""
    body = schedule.get(block)
    if any(int(axis.iter_type) != _SPATIAL for axis in body.iter_vars):
        raise _Skip
    consumers = schedule.get_consumers(block)
    if not consumers:
        raise _Skip
    size = _size(schedule, block)
    if len(consumers) > 1 or any(_size(schedule, consumer) > size for consumer in consumers):
        raise _Skip
    schedule.compute_inline(block)


def _size(schedule: Any, block: Any) -> int:
    """Iterations of a block, dynamic extents counted as a large number that is the same for all."""
    return prod(_extent(schedule, loop) or 1 << 20 for loop in schedule.get_loops(block))


def _indices(schedule: Any, block: Any) -> tuple[list[Any], list[list[Any]], list[Any]]:
    """The block's variables, the index of every read, and that of its write."""
    body = schedule.get(block)
    reads = [[axis.min for axis in region.region] for region in body.reads]
    return [axis.var for axis in body.iter_vars], reads, [axis.min for axis in body.writes[0].region]


def _contiguous(index: list[Any], variable: Any) -> bool:
    """Whether neighbouring values of the variable are neighbours in memory."""
    return bool(index) and _step(index[-1], variable) == 1 and all(_step(part, variable) == 0 for part in index[:-1])


def _step(expression: Any, variable: Any) -> int | None:
    """By how much the expression grows with the variable; None where that is not constant."""
    found = detect_linear_equation(expression, [variable])
    return int(found[0]) if found and isinstance(found[0], tvm.tirx.IntImm) else None


def _parallelise(schedule: Any, loops: list[Any], small: bool) -> None:
    if loops and not small:
        schedule.parallel(schedule.fuse(*loops) if len(loops) > 1 else loops[0])


def _elementwise(schedule: Any, block: Any) -> None:
    """All loops but the last run in parallel, the last in vectors; same-index blocks are flattened first."""
    kind = _Block.of(schedule, schedule.get(block).name_hint)
    if kind is None:
        raise _Skip
    loops = schedule.get_loops(block)
    variables, reads, write = _indices(schedule, block)
    flat = all(_is_identity(index, variables) for index in [*reads, write])
    if flat and len(loops) > 1:
        loops = [schedule.fuse(*loops)]
    lanes = _lanes(_extent(schedule, loops[-1])) if _contiguous(write, variables[-1]) or flat else None
    if lanes is None:
        raise _Skip
    outer, inner = schedule.split(loops[-1], [None, lanes])
    schedule.vectorize(inner)
    _parallelise(schedule, [*loops[:-1], outer], kind.small)


def _is_identity(index: list[Any], variables: list[Any]) -> bool:
    return len(index) == len(variables) and all(
        isinstance(part, tvm.tirx.Var) and part.same_as(variable)
        for part, variable in zip(index, variables, strict=True)
    )


def _sum_columns(schedule: Any, block: Any) -> None:
    """Outputs side by side in a vector: for reductions whose last output axis is contiguous in an operand."""
    kind = _Block.of(schedule, schedule.get(block).name_hint)
    variables, reads, write = _indices(schedule, block)
    if kind is None or not kind.spatial:
        raise _Skip
    last, reduced = variables[len(kind.spatial) - 1], variables[len(kind.spatial) :]
    lanes = _lanes(kind.spatial[-1])
    # An operand that no reduction moves through, such as a mean per row, says nothing about the order.
    moving = [index for index in reads if any(_step(part, var) != 0 for part in index for var in reduced)]
    if lanes is None or not _contiguous(write, last) or not any(_contiguous(index, last) for index in moving):
        raise _Skip
    loops = schedule.get_loops(block)
    spatial, reductions = loops[: len(kind.spatial)], loops[len(kind.spatial) :]
    outer, inner = schedule.split(spatial[-1], [None, lanes])
    schedule.reorder(*spatial[:-1], outer, *reductions, inner)
    result = schedule.cache_write(block, 0, "local")
    schedule.reverse_compute_at(result, outer, preserve_unit_loops=True)
    schedule.vectorize(schedule.get_loops(result)[-1])
    schedule.vectorize(inner)
    _parallelise(schedule, [*spatial[:-1], outer], kind.small)
    # Last, since a loop over a block without its initialisation can no longer be annotated.
    schedule.decompose_reduction(block, reductions[0])


def _sum_rows(schedule: Any, block: Any) -> None:
    """Partial results side by side in a vector: for reductions along a contiguous axis."""
    kind = _Block.of(schedule, schedule.get(block).name_hint)
    variables, reads, _ = _indices(schedule, block)
    if kind is None or not any(_contiguous(index, variables[-1]) for index in reads):
        raise _Skip
    lanes = _lanes(kind.reductions[-1], repeats=2, most=32)
    if lanes is None:
        raise _Skip
    _, inner = schedule.split(schedule.get_loops(block)[-1], [None, lanes])
    partial = schedule.rfactor(inner, len(schedule.get(block).writes[0].region))
    spatial = schedule.get_loops(block)[:-1]
    loops = schedule.get_loops(partial)
    lane, first = loops[-1], loops[len(spatial)]
    if spatial:
        row = schedule.fuse(*spatial) if len(spatial) > 1 else spatial[0]
        schedule.compute_at(partial, row, preserve_unit_loops=True)
        _parallelise(schedule, [row], kind.small)
        # Under the row the loops come in the order of the block's axes, the lanes first.
        _, lane, *others = schedule.get_loops(partial)
        schedule.reorder(*others, lane)
        first = others[-len(kind.reductions)]
    schedule.vectorize(lane)
    schedule.decompose_reduction(partial, first)


def _parallel_only(schedule: Any, block: Any) -> None:
    """The output axes run in parallel; what is inside is left to LLVM's vectoriser."""
    kind = _Block.of(schedule, schedule.get(block).name_hint)
    if kind is None or kind.small or not kind.spatial:
        raise _Skip
    loops = schedule.get_loops(block)[: len(kind.spatial)]
    outer = prod(extent or FEW_TASKS for extent in kind.spatial[:-1])
    # The last axis of elementwise work stays inside a task where the others give tasks enough.
    _parallelise(schedule, loops if kind.reductions or outer < FEW_TASKS else loops[:-1], kind.small)
