"""The kernel of a region that memory bounds: rows of norms, or elements alone, as scheduled TIR, thread by thread.

A row is read once and stays in registers; its statistics are of what is held, so that they take two passes and no
traffic. What the graph has in 16 bits is rounded where it is normalised or written, nowhere else; sums are in float32.
A row that no block holds is read chunk by chunk in each pass, what is normalised stays in shared memory where it fits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import tvm
from tvm import tirx
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script.builder import ir as T

from rescompile.backends.cuda import clusters, scalars
from rescompile.backends.cuda.index import Lanes, Sum, Term, expression, lanes, size_of
from rescompile.backends.cuda.region_nodes import Chosen, Guards, Load, Made, Node, Normed, Number, Trace
from rescompile.backends.cuda.region_spec import ACCESS, BYTES, RegionSpec
from rescompile.backends.cuda.region_tile import RegionTile, candidates, children, is_stream
from rescompile.backends.cuda.rows import across_threads, function_frame, store, unrolled, vector
from rescompile.backends.cuda.targets import Architecture
from rescompile.backends.kernels import Argument
from rescompile.errors import GraphError
from rescompile.kinds import OpKind

K = OpKind
Expr = Any
_WARP = 32


def refusal(spec: RegionSpec, limits: Architecture | None = None) -> str:
    """Why there is no kernel for the region, one clause; empty where there is one."""
    try:
        for value in range(len(spec.values)):
            if spec.dtype(value) not in BYTES:
                return f"there are no kernels for elements of {spec.dtype(value)}"
        trace = Trace(spec)
        for value in spec.region.outputs:
            trace.root(value)
        if trace.space.width.names or trace.space.width.number == 0 or trace.space.rows.number == 0:
            return "the length of its rows is not known before it runs, or is 0"
        candidates(spec, limits)
    except GraphError as error:
        return str(error)
    return ""


def arguments(spec: RegionSpec) -> list[Argument]:
    """x0, x1, ... and then y0, y1, ..., in the shapes in which they lie."""

    def argument(name: str, index: int, output: bool) -> Argument:
        tensor = (spec.outputs if output else spec.operands)[index]
        shape = tuple(dim if isinstance(dim, int) else None for dim in tensor.lying)
        return Argument(f"{name}{index}", shape, tensor.dtype, output=output)

    return [
        *(argument("x", index, False) for index in range(len(spec.operands))),
        *(argument("y", index, True) for index in range(len(spec.outputs))),
    ]


def prim_func(spec: RegionSpec, tile: RegionTile, name: str) -> tvm.tirx.PrimFunc:
    """The kernel, its threads bound; named extents are read from the buffers' shapes at run time."""
    trace = Trace(spec)
    with IRBuilder() as builder, T.prim_func(s_tir=True), ExitStack() as stack:
        function_frame(name)
        names = {dim: tirx.Var(dim if dim.isidentifier() else f"n{i}", "int64") for i, dim in enumerate(spec.names)}
        tensors = [*zip([f"x{i}" for i in range(len(spec.operands))], spec.operands, strict=True)]
        tensors += zip([f"y{i}" for i in range(len(spec.outputs))], spec.outputs, strict=True)
        given = {}
        for label, tensor in tensors:
            shape = [dim if isinstance(dim, int) else names[dim] for dim in tensor.lying]
            given[label] = (T.arg(label, T.buffer(shape, tensor.dtype)), shape)
        flat = {}
        for label, (buffer, shape) in given.items():
            count: Expr = 1
            for dim in shape:
                count = dim * count
            alias = T.decl_buffer((count,), buffer.dtype, data=buffer.data)
            flat[label] = IRBuilder.name(f"{label}_flat", alias)
        rows = size_of(trace.space.rows, names)
        blocks = (rows + tile.rows - 1) // tile.rows * tile.parts
        block = stack.enter_context(T.launch_thread("blockIdx.x", blocks))
        inner = stack.enter_context(T.launch_thread("threadIdx.y", tile.rows))
        lane = stack.enter_context(T.launch_thread("threadIdx.x", tile.threads))
        if trace.norms and tile.parts > 1:
            stack.enter_context(T.launch_thread("clusterCtaIdx.x", tile.parts))
        _Thread(spec, trace, tile, flat, names, rows, (block, inner, lane)).emit()
    return builder.get()


@dataclass
class _Stats:
    """What is known of a norm's row."""

    mean: Expr | None
    scale: Expr


@dataclass
class _Registers:
    """What was loaded for a place: element i of a chunk is at (chunk · count + i // group)."""

    buffer: Expr
    count: int
    group: int
    persistent: bool


class _Thread:
    """Emits the work of one thread."""

    def __init__(
        self,
        spec: RegionSpec,
        trace: Trace,
        tile: RegionTile,
        flat: dict[str, Expr],
        names: dict[str, Expr],
        rows: Expr,
        threads: tuple[Expr, Expr, Expr],
    ) -> None:
        self.spec, self.trace, self.tile, self.flat = spec, trace, tile, flat
        block, inner, self.lane = threads
        self.names = {name: value.astype("int32") for name, value in names.items()}
        self.width = trace.space.width.number
        part = 0 if tile.parts == 1 else tirx.floormod(block, tile.parts).astype("int32") * (tile.span * tile.chunks)
        self.begin = self.lane * tile.vector + part
        row = (block if tile.parts == 1 else tirx.floordiv(block, tile.parts)) * tile.rows + inner
        exact = tile.rows == 1 or (isinstance(rows, int) and rows % tile.rows == 0)
        # Rows past the end compute on the last one and write nothing: every lane takes part in every shuffle.
        self.row = (row if exact else tirx.min(row, rows - 1)).astype("int32")
        self.inside = None if exact else row < rows
        self.roots = {value: trace.root(value) for value in spec.region.outputs}
        self.norms = [norm for value in trace.norms if isinstance(norm := trace.root(value), Normed)]
        self.sources = dict(_narrow(spec, norm) for norm in self.norms)  # what is held for them, and in which type
        self.levels: dict[Node, int] = {}
        self.last = max([self._level(root) for root in self.roots.values()])
        self.stats: dict[int, _Stats] = {}
        self.held: dict[Node, tuple[Expr, bool]] = {}  # buffer, and whether it is in shared memory
        self.registers: dict[Load, _Registers] = {}
        elements = (*spec.operands, *spec.outputs)
        self.stash: Expr = None  # shared memory for rows, and where each one's begins
        self.places: dict[Node, int] = {}
        self.shared: Expr = None  # of a cluster's blocks, and how much of it has been given out
        self.taken = 0
        self.far = bool(spec.names) or any(_elements(tensor.shape) >= 1 << 31 for tensor in elements)

    def emit(self) -> None:
        """All phases: what needs no norm, then what needs the first ones, ..."""
        if self.tile.streams:
            self._emit_streaming()
        else:
            self._emit_held()

    # ---- rows in registers -------------------------------------------------------------------------------------------

    def _emit_held(self) -> None:
        clustered = bool(self.norms) and self.tile.parts > 1
        if clustered:
            # One buffer, whose places nothing else takes: another block may still read them.
            size = 2 * len(self.norms) * (1 + self.tile.threads // _WARP)
            self.shared = T.alloc_buffer((size,), self.spec.wide, scope="shared.dyn")
        for phase in range(self.last + 1):
            roots = self._roots(phase)
            sources = [node for node in self.sources if self._level(node) == phase]
            needed = self._reads([*sources, *roots.values()])
            streams = [load for load in needed if is_stream(self.spec, load)]
            if phase == 0:
                later = self._reads(list(self.roots.values()))
                streams += [load for load in later if is_stream(self.spec, load) and load not in streams]
            for load in streams:
                # All of them first: they are in flight together.
                if load not in self.registers:
                    self._allocate(load, persistent=True)
            for load in streams:
                if phase == 0:
                    for chunk in range(self.tile.chunks):
                        self._load(load, chunk)
            for node in sources:
                self.held[node] = (_local(self.tile.chunks * self.tile.vector, self.sources[node]), False)
            direct = {value for value, node in roots.items() if self._kept_as(node, self._out(value).dtype)}
            mixed = {value: node for value, node in roots.items() if value not in direct}
            staged = {value: _local(self.tile.vector, self._out(value).dtype) for value in mixed}
            for chunk in range(self.tile.chunks):
                for load in needed:
                    if load not in streams:
                        self._allocate(load, persistent=False)
                        self._load(load, chunk)
                self._compute(chunk, sources, mixed, staged)
                for value, node in roots.items():
                    if value in direct:
                        self._write(value, self.held[node][0], chunk, self._slot(chunk))
                    else:
                        self._write(value, staged[value], chunk)
            for norm in self.norms:
                if self._level(norm.source) == phase:
                    self._reduce(norm)
        if clustered:
            clusters.meet()  # no block ends while another reads its memory

    def _kept_as(self, node: Node, dtype: str) -> bool:
        """Whether a node is in registers just as it is to be written."""
        return node in self.held and not self.held[node][1] and str(self.held[node][0].dtype) == dtype

    def _compute(self, chunk: Expr, sources: Sequence[Node], roots: dict[int, Node], staged: dict[int, Expr]) -> None:
        """Hold what is normalised next, and stage what is written, of one chunk."""

        def element(i: Expr) -> None:
            known: dict[Node, Expr] = {}
            done: set[Node] = set()
            for node in sources:
                value = scalars.convert(self._value(node, chunk, i, known, {*sources} - done), self.sources[node])
                self._hold(node, value, chunk, i)
                done.add(node)
                known.pop(node, None)
            for value, node in roots.items():
                result = self._value(node, chunk, i, known, set())
                store(staged[value], scalars.convert(result, self._out(value).dtype), i)

        unrolled(self.tile.vector, element)

    # ---- expressions -------------------------------------------------------------------------------------------------

    def _value(self, node: Node, chunk: Expr, i: Expr, known: dict[Node, Expr], fresh: set[Node]) -> Expr:
        """Element i of a chunk; `fresh`: nodes that are about to be held, but are not yet."""
        if node in self.held and node not in fresh:
            return self._wide(self._held_at(node, chunk, i))
        if node in known:
            return known[node]
        value = self._expression(node, chunk, i, known, fresh)
        if not isinstance(node, Load | Number):
            register = _local(1, scalars.dtype_of(value))
            store(register, value, 0)
            value = register[0]
        known[node] = value
        return value

    def _expression(self, node: Node, chunk: Expr, i: Expr, known: dict[Node, Expr], fresh: set[Node]) -> Expr:
        if isinstance(node, Number):
            return scalars.literal(node.value, self._computed(node.dtype))
        if isinstance(node, Load):
            registers = self.registers[node]
            place = i if registers.group == 1 else tirx.floordiv(i, registers.group) if registers.count > 1 else 0
            base = self._slot(chunk) // self.tile.vector * registers.count if registers.persistent else 0
            return self._wide(registers.buffer[base + place])
        if isinstance(node, Chosen):
            inside = self._value(node.inside, chunk, i, known, fresh)
            outside = scalars.convert(self._value(node.outside, chunk, i, known, fresh), scalars.dtype_of(inside))
            return tirx.Select(self._holds(node.guards, chunk, i), inside, outside)
        if isinstance(node, Normed):
            stats = self.stats[node.value]
            value = self._value(node.source, chunk, i, known, fresh)
            value = (value if stats.mean is None else value - stats.mean[0]) * stats.scale[0]
            if node.weight is not None:
                value = value * self._value(node.weight, chunk, i, known, fresh)
            return value if node.bias is None else value + self._value(node.bias, chunk, i, known, fresh)
        step = self.spec.step(node.value)
        assert step is not None
        operands = [None if part is None else self._value(part, chunk, i, known, fresh) for part in node.operands]
        return self._step(node.value, step.kind, step.attrs, operands)

    def _step(self, value: int, kind: OpKind, attrs: dict[str, Any], operands: list[Expr | None]) -> Expr:
        dtype = self.spec.dtype(value)
        computed = self._computed(dtype)
        present = [operand for operand in operands if operand is not None]
        if kind is K.CAST:
            rounded = scalars.convert(present[0], dtype)
            return scalars.convert(rounded, computed)
        if kind is K.WHERE:
            branches = [scalars.convert(operand, computed) for operand in present[1:]]
            return scalars.scalar(kind, attrs, [scalars.convert(present[0], "bool"), *branches])
        if kind in _COMPARES:
            floats = any("float" in scalars.dtype_of(operand) for operand in present)
            common = self.spec.wide if floats else max((scalars.dtype_of(x) for x in present), key=_rank)
            return scalars.scalar(kind, attrs, [scalars.convert(operand, common) for operand in present])
        if kind in (K.LOGICAL_AND, K.LOGICAL_OR, K.LOGICAL_NOT, K.IS_NAN):
            return scalars.scalar(kind, attrs, present)
        return scalars.scalar(kind, attrs, [x if x is None else scalars.convert(x, computed) for x in operands])

    def _wide(self, value: Expr) -> Expr:
        return scalars.convert(value, self._computed(scalars.dtype_of(value)))

    def _computed(self, dtype: str) -> str:
        """The type in which elements of a type are computed."""
        return self.spec.wide if "float" in dtype else dtype

    # ---- places ------------------------------------------------------------------------------------------------------

    def _column(self, chunk: Expr) -> Expr:
        return self.begin + chunk * self.tile.span

    def _slot(self, chunk: Expr) -> int:
        """Where a chunk's registers begin; a streaming row has one chunk of them."""
        return 0 if self.tile.streams else chunk * self.tile.vector

    def _index(self, at: Sum, chunk: Expr, i: Expr) -> Expr:
        def coordinate(name: str) -> Expr:
            return self.row if name == "row" else self._column(chunk) + i

        if not self.far:
            return expression(at, coordinate, self.names)
        total: Expr = tirx.const(at.offset, "int64")
        for part, stride in at.parts:
            factor = size_of(stride, {name: value.astype("int64") for name, value in self.names.items()})
            total = total + expression(part, coordinate, self.names).astype("int64") * factor
        return total

    def _holds(self, guards: Guards, chunk: Expr, i: Expr) -> Expr:
        def coordinate(name: str) -> Expr:
            return self.row if name == "row" else self._column(chunk) + i

        holds: Expr = None
        for guard in guards:
            value = expression(guard.term, coordinate, self.names)
            bounds = [value >= guard.low] if guard.low > -(1 << 30) else []
            bounds += [value < guard.high] if guard.high is not None else []
            for bound in bounds:
                holds = bound if holds is None else tirx.all(holds, bound)
        return tirx.const(True, "bool") if holds is None else holds

    def _within(self, chunk: Expr) -> Expr | None:
        """What has to hold for a chunk to be inside the row; None where it is for every thread."""
        tile = self.tile
        if isinstance(chunk, int):
            ragged = (
                tile.parts * tile.span * tile.chunks > self.width
                if tile.parts > 1
                else ((chunk + 1) * tile.span > self.width)
            )
        else:
            ragged = tile.chunks * tile.span > self.width
        return self._column(chunk) < self.width if ragged else None

    # ---- memory ------------------------------------------------------------------------------------------------------

    def _reads(self, nodes: Sequence[Node]) -> list[Load]:
        """What is read for the nodes, apart from what is held already."""
        found: dict[Load, None] = {}
        seen: set[Node] = set()
        stack = list(reversed(nodes))
        while stack:
            node = stack.pop()
            if node in seen or node in self.held:
                continue
            seen.add(node)
            if isinstance(node, Load):
                found[node] = None
            stack.extend(child for child in reversed(children(node)) if child is not None)
        return list(found)

    def _allocate(self, load: Load, *, persistent: bool) -> None:
        if load in self.registers:
            return
        seen = self._lanes(load)
        dtype = self.spec.operands[load.operand].dtype
        group = 1 if seen.steps else seen.group
        count = self.tile.vector // group
        chunks = self.tile.chunks if persistent and not self.tile.streams else 1
        self.registers[load] = _Registers(_local(count * chunks, dtype), count, group, persistent)

    def _lanes(self, load: Load) -> Lanes:
        seen = lanes(load.at, self.tile.vector)
        group = seen.group
        for guard in load.guards:
            group = min(group, self._uniform(guard.term, guard.low, guard.high))
        aligned = min(group, seen.align) if seen.steps else group
        return Lanes(aligned, seen.steps, seen.align)

    def _uniform(self, term: Term, low: int, high: int | None) -> int:
        """Groups of lanes for which a guard is the same."""
        seen = lanes(term, self.tile.vector)
        group = seen.group
        if seen.steps:
            group = min(group, seen.align)
            for bound in (low, high):
                while bound is not None and abs(bound) < 1 << 30 and bound % group:
                    group //= 2
        return group

    def _load(self, load: Load, chunk: Expr) -> None:
        """Read a chunk of an operand into its registers."""
        registers, source = self.registers[load], self.flat[f"x{load.operand}"]
        seen = self._lanes(load)
        width = min(seen.group, ACCESS[self.spec.operands[load.operand].dtype]) if seen.steps else 1
        step = width if seen.steps else seen.group
        base = self._slot(chunk) // self.tile.vector * registers.count if registers.persistent else 0
        with self._guarded(self._within(chunk)):
            for first in range(0, self.tile.vector, step):
                at = base + first // registers.group
                with self._guarded(self._holds(load.guards, chunk, first) if load.guards else None):
                    index = self._index(load.at, chunk, first)
                    vector(width, _copied(registers.buffer, at, source, index))

    def _write(self, value: int, staged: Expr, chunk: Expr, slot: int = 0) -> None:
        """Write a chunk of an output, which begins at a slot of registers."""
        tensor = self._out(value)
        at = self.trace.written(value)
        seen = lanes(at, self.tile.vector)
        width = min(seen.group, seen.align, ACCESS[tensor.dtype]) if seen.steps else 1
        target = self.flat[f"y{self.spec.region.outputs.index(value)}"]
        with self._guarded(self.inside), self._guarded(self._within(chunk)):
            for first in range(0, self.tile.vector, width):
                vector(width, _copied(target, self._index(at, chunk, first), staged, slot + first))

    @contextmanager
    def _guarded(self, condition: Expr | None) -> Iterator[None]:
        if condition is None:
            yield
            return
        with T.If(condition), T.Then():
            yield

    def _hold(self, node: Node, value: Expr, chunk: Expr, i: Expr) -> None:
        buffer, shared = self.held[node]
        place = self._shared_at(node, chunk, i) if shared else self._slot(chunk) + i
        store(buffer, value, place)

    def _held_at(self, node: Node, chunk: Expr, i: Expr) -> Expr:
        buffer, shared = self.held[node]
        return buffer[self._shared_at(node, chunk, i) if shared else self._slot(chunk) + i]

    def _shared_at(self, node: Node, chunk: Expr, i: Expr) -> Expr:
        return self.places[node] + chunk * self.tile.span + self.lane * self.tile.vector + i

    # ---- statistics --------------------------------------------------------------------------------------------------

    def _reduce(self, norm: Normed) -> None:
        """Mean and 1 / spread of a row that is held."""
        step = self.spec.step(norm.value)
        assert step is not None
        inverse = scalars.literal(1.0 / self.width, self.spec.wide)

        def over(term: Callable[[Expr], Expr]) -> Expr:
            total = _local(1, self.spec.wide)
            zero = scalars.literal(0, self.spec.wide)
            store(total, zero, 0)
            for chunk in range(self.tile.chunks):
                within = self._within(chunk)

                def add(i: Expr, chunk: int = chunk, within: Expr = within) -> None:
                    value = term(self._value(norm.source, chunk, i, {}, set()))
                    value = value if within is None else tirx.Select(within, value, zero)
                    store(total, total[0] + value, 0)

                unrolled(self.tile.vector, add)
            self._across(total, zero)
            return total

        self._finish(norm, step.attrs, over, inverse)

    def _across(self, total: Expr, zero: Expr) -> None:
        """The sum over all threads that have a part of the row, in all of them."""
        if self.shared is None:
            across_threads(total, self.tile.threads, self.lane, zero)
            return
        warps = self.tile.threads // _WARP
        across_threads(total, self.tile.threads, self.lane, zero, shared=(self.shared, self.taken + 1))
        clusters.across_cluster(total, self.tile.parts, self.shared, self.taken, self.lane)
        self.taken += 1 + warps

    def _finish(
        self, norm: Normed, attrs: dict[str, Any], over: Callable[[Callable[[Expr], Expr]], Expr], inverse: Expr
    ) -> None:
        step = self.spec.step(norm.value)
        assert step is not None
        mean: Expr = None
        if step.kind is not K.RMS_NORM:
            mean = _named(over(lambda x: x)[0] * inverse)
        power = over(lambda x: x * x if mean is None else (x - mean[0]) * (x - mean[0]))
        eps = scalars.literal({**step.kind.spec.attrs, **attrs}["eps"], self.spec.wide)
        self.stats[norm.value] = _Stats(mean, _named(scalars.call("rsqrt", power[0] * inverse + eps)))

    # ---- rows that no block holds ------------------------------------------------------------------------------------

    def _emit_streaming(self) -> None:
        for phase in range(self.last + 1):
            roots = self._roots(phase)
            sources = [node for node in self.sources if self._level(node) == phase]
            norms = [norm for norm in self.norms if self._level(norm.source) == phase]
            if not norms:
                self._pass(roots, [], [])
                continue
            self._statistics(norms, sources, roots)

    def _statistics(self, norms: list[Normed], sources: list[Node], roots: dict[int, Node]) -> None:
        zero, inverse = (scalars.literal(x, self.spec.wide) for x in (0.0, 1.0 / self.width))
        # One buffer for all: TVM lays a second one over the first.
        dtype = next(iter(self.sources.values()))
        stashed = [node for node in sources if self.tile.stash and self.sources[node] == dtype]
        if stashed and self.stash is None:
            size = len(self.sources) * self.tile.chunks * self.tile.span
            self.stash = T.alloc_buffer((size,), dtype, scope="shared.dyn")
        first: list[Any] = []
        totals: dict[int, Expr] = {}
        for norm in norms:
            totals[norm.value] = _local(1, self.spec.wide)
            store(totals[norm.value], zero, 0)
            kind = self.spec.step(norm.value).kind  # type: ignore[union-attr]
            first.append((norm, totals[norm.value], (lambda x: x * x) if kind is K.RMS_NORM else (lambda x: x)))
        self._pass(roots, stashed, first)
        for norm in norms:
            across_threads(totals[norm.value], self.tile.threads, self.lane, zero)
        centred = []
        for norm in norms:
            step = self.spec.step(norm.value)
            assert step is not None
            if step.kind is not K.RMS_NORM:
                mean = _named(totals[norm.value][0] * inverse)
                power = _local(1, self.spec.wide)
                store(power, zero, 0)
                totals[norm.value] = power
                centred.append((norm, power, lambda x, mean=mean: (x - mean[0]) * (x - mean[0])))
                self.stats[norm.value] = _Stats(mean, None)
            else:
                self.stats[norm.value] = _Stats(None, None)
        if centred:
            self._pass({}, [], centred)
            for _, power, _ in centred:
                across_threads(power, self.tile.threads, self.lane, zero)
        for norm in norms:
            step = self.spec.step(norm.value)
            assert step is not None
            eps = scalars.literal({**step.kind.spec.attrs, **step.attrs}["eps"], self.spec.wide)
            scale = scalars.call("rsqrt", totals[norm.value][0] * inverse + eps)
            self.stats[norm.value] = _Stats(self.stats[norm.value].mean, _named(scale))

    def _pass(self, roots: dict[int, Node], stashed: list[Node], sums: list[Any]) -> None:
        """One pass over the row: write outputs, keep what is normalised, add up terms of it."""
        for node in stashed:
            self.held[node] = (self.stash, True)
            self.places[node] = len(self.places) * self.tile.chunks * self.tile.span
        fresh = set(stashed)
        wanted = [*stashed, *(norm.source for norm, _, _ in sums), *roots.values()]
        held = {node: self.held.pop(node) for node in stashed}
        needed = self._reads(wanted)
        self.held.update(held)
        staged = {value: _local(self.tile.vector, self._out(value).dtype) for value in roots}
        self.registers = {}
        for load in needed:
            self._allocate(load, persistent=False)
        with T.serial(0, self.tile.chunks) as chunk:
            for load in needed:
                self._load(load, chunk)
            within = self._within(chunk)

            def element(i: Expr) -> None:
                known: dict[Node, Expr] = {}
                for node in stashed:
                    value = self._value(node, chunk, i, known, fresh)
                    rounded = _named(scalars.convert(value, self.sources[node]))
                    self._hold(node, rounded[0], chunk, i)
                    known[node] = self._wide(rounded[0])
                for norm, total, term in sums:
                    value = term(self._value(norm.source, chunk, i, known, fresh))
                    if within is not None:
                        value = tirx.Select(within, value, scalars.literal(0, self.spec.wide))
                    store(total, total[0] + value, 0)
                for output, node in roots.items():
                    result = self._value(node, chunk, i, known, fresh)
                    store(staged[output], scalars.convert(result, self._out(output).dtype), i)

            unrolled(self.tile.vector, element)
            for output in roots:
                self._write(output, staged[output], chunk)

    # ---- the program -------------------------------------------------------------------------------------------------

    def _roots(self, phase: int) -> dict[int, Node]:
        return {value: root for value, root in self.roots.items() if self._level(root) == phase}

    def _level(self, node: Node) -> int:
        """How many norms follow one another up to the node."""
        if node not in self.levels:
            below = max((self._level(child) for child in children(node) if child is not None), default=0)
            own = self._level(node.source) + 1 if isinstance(node, Normed) else 0
            self.levels[node] = max(below, own)
        return self.levels[node]

    def _out(self, value: int) -> Any:
        return self.spec.outputs[self.spec.region.outputs.index(value)]


_COMPARES = frozenset((K.EQUAL, K.NOT_EQUAL, K.LESS, K.LESS_EQUAL, K.GREATER, K.GREATER_EQUAL))


def _rank(dtype: str) -> int:
    return 0 if dtype == "bool" else BYTES[dtype]


def _elements(shape: Sequence[object]) -> int:
    return int(np.prod([dim for dim in shape if isinstance(dim, int)], dtype=np.float64))


def _local(size: int, dtype: str) -> Expr:
    return T.alloc_buffer((size,), dtype, scope="local")


def _named(value: Expr) -> Expr:
    buffer = _local(1, scalars.dtype_of(value))
    store(buffer, value, 0)
    return buffer


def _copied(into: Expr, to: Expr, source: Expr, start: Expr) -> Callable[[Expr], None]:
    """into[to + j] = source[start + j]"""
    return lambda j: store(into, source[start + j], to + j)


def _narrow(spec: RegionSpec, norm: Normed) -> tuple[Node, str]:
    """What is held for a norm, and in which type: what a cast to a wider type reads, not its result."""
    node, value = norm.source, spec.step(norm.value).inputs[0] or 0  # type: ignore[union-attr]
    while isinstance(node, Made):
        step = spec.step(value)
        if step is None or step.kind is not K.CAST or step.inputs[0] is None:
            break
        if BYTES[spec.dtype(step.inputs[0])] > BYTES[spec.dtype(value)] or node.operands[0] is None:
            break
        node, value = node.operands[0], step.inputs[0]
    return node, spec.dtype(value)
