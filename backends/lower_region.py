"""Fused regions that a processor has one kernel for: each value where it lies, the steps in the kernel."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import numpy as np

from rescompile.backends.emitter import Emitter, Expr
from rescompile.backends.kernels import (
    ConvSpec,
    Epilogue,
    LinearSpec,
    Place,
    PoolSpec,
    ProductSpec,
    Program,
    RegionSpec,
    RowsSpec,
    Spec,
    Tail,
)
from rescompile.backends.kernels.moves import groups_of
from rescompile.backends.layouts import CHANNELS_LAST, NATIVE, Layout, pair, spatial_pads_of, to_channels_last
from rescompile.backends.lower_linear import packed
from rescompile.backends.region_collapse import collapsed
from rescompile.backends.region_draft import Draft, draft, with_defaults
from rescompile.errors import GraphError
from rescompile.fused_region import Region, Step, parse
from rescompile.graph import Op, Value
from rescompile.kinds import OpKind
from rescompile.values import numpy_dtype

K = OpKind


@dataclass
class Source:
    """What a region reads: a value of the graph, or numbers that follow from some when compiling."""

    value: Value | None
    made: Callable[[], np.ndarray[Any, Any]] | None = None
    name: str = ""


def region(e: Emitter, op: Op) -> None:
    """y = program(x, ...) in one kernel"""
    steps = parse(op.attr("steps"))
    found = draft(steps, op.inputs, op.outputs, e.graph.source_ir == "onnx")
    if isinstance(found, str):
        raise GraphError(f"There is no kernel for the fused region '{op.name}': {found}.")
    sources = [Source(value) for value in op.inputs]
    found, sources = _without_batch_norms(e, op, found, sources)
    _Lowering(e, op, found, sources).emit()


def _without_batch_norms(e: Emitter, op: Op, found: Draft, sources: list[Source]) -> tuple[Draft, list[Source]]:
    """Batch norms of known statistics as a factor and an offset for each channel."""
    norms = []
    for number, step in enumerate(found.region.steps, found.region.operands):
        stored = [None if place is None else _source(sources, place) for place in step.inputs[1:]]
        if step.kind is K.BATCH_NORM and all(value is None or e.is_literal(value) for value in stored):
            norms.append((number, step, [*stored, None, None, None, None][:4]))
    if not norms:
        return found, sources
    count, extra = found.region.operands, 2 * len(norms)
    at: dict[int, int] = {number: number for number in range(count)}
    steps: list[Step] = []
    types: list[Any] = []
    operands = list(found.operands)
    folded = {number: (position, step, stored) for position, (number, step, stored) in enumerate(norms)}
    for number, step in enumerate(found.region.steps, count):
        shape, dtype = found.type(number)
        if number not in folded:
            steps.append(Step(step.kind, tuple(None if v is None else at[v] for v in step.inputs), step.attrs))
            types.append((shape, dtype))
        else:
            position, norm, stored = folded[number]
            channels = (int(shape[1] or 0), *[1] * (len(shape) - 2))
            for part in range(2):
                sources.append(_Folded(e, op, norm, stored, channels, dtype, part, number).source)
                operands.append((channels, dtype))
            factor = count + 2 * position
            steps.append(Step(K.MUL, (at[norm.inputs[0] or 0], factor)))
            types.append((shape, dtype))
            steps.append(Step(K.ADD, (count + extra + len(steps) - 1, factor + 1)))
            types.append((shape, dtype))
        at[number] = count + extra + len(steps) - 1
    region_ = Region(count + extra, tuple(steps), tuple(at[made] for made in found.region.outputs))
    changed = replace(
        found,
        region=region_,
        root=None if found.root is None else at[found.root],
        norms=tuple(at[norm] for norm in found.norms),
        operands=tuple(operands),
        steps=tuple(types),
    )
    return changed, sources


class _Folded:
    """weight / √(var + ε), or bias − mean·that."""

    def __init__(
        self,
        e: Emitter,
        op: Op,
        norm: Step,
        stored: Sequence[Value | None],
        shape: tuple[int, ...],
        dtype: str,
        part: int,
        number: int,
    ) -> None:
        def made() -> np.ndarray[Any, Any]:
            weight, bias, mean, var = (None if v is None else e.data(v).astype(np.float64) for v in stored)
            scale = np.ones(shape[0]) if var is None else 1.0 / np.sqrt(var + with_defaults(norm)["eps"])
            scale = scale if weight is None else scale * weight
            shift = (0.0 if bias is None else bias) - (0.0 if mean is None else mean * scale)
            found = scale if part == 0 else np.broadcast_to(shift, scale.shape)
            return np.asarray(found.reshape(shape), numpy_dtype(dtype))

        self.source = Source(None, made, f"{op.name}.{number}.{'scale' if part == 0 else 'shift'}")


def _source(sources: Sequence[Source], place: int) -> Value | None:
    return sources[place].value if place < len(sources) else None


class _Lowering:
    """One region on its way into the module."""

    def __init__(self, e: Emitter, op: Op, found: Draft, sources: list[Source]) -> None:
        # Results that go into a buffer which holds something already come first, as calls in place want them.
        buffers = [e.buffers.number(value) for value in op.outputs]
        ranked = sorted(range(len(buffers)), key=lambda i: (buffers[i] not in e.buffers.held, buffers[i] is None, i))
        self.outputs = [op.outputs[i] for i in ranked]
        self.into = [buffers[i] for i in ranked]
        made = tuple(found.region.outputs[i] for i in ranked)
        found = replace(found, region=Region(found.region.operands, found.region.steps, made))
        self.e, self.op, self.draft, self.sources = e, op, found, sources
        self.given: dict[str, Expr] = {}
        self.rows: Any = None
        self.lead: list[Any] = []
        root = None if found.root is None else found.step(found.root)
        self.channels_last = self._channels_last(root)

    def _channels_last(self, root: Step | None) -> bool:
        """Whether images lie channels last in this kernel."""
        if root is not None and (root.kind is K.CONV or self.draft.form == "window"):
            return True
        if self.draft.dynamic or (root is not None and root.kind is K.LINEAR):
            return False
        values = [source.value for source in self.sources]
        return any(v is not None and self.e.lies_channels_last(v) and (v.rank or 0) in (3, 4, 5) for v in values)

    def emit(self) -> None:
        orders = self._orders()
        first = "t" if self.draft.form in ("contraction", "window") else "x"
        operands = [self._read(number, f"{first}{number}", orders) for number in range(len(self.sources))]
        results, layouts = self._results(orders)
        program = self.draft.program(operands, results)
        anchor = self.draft.anchor
        last = orders[anchor] == to_channels_last(len(orders[anchor])) and len(orders[anchor]) > 2
        spec: Spec
        if self.draft.form in ("contraction", "window"):
            spec = self._rooted(program, last)
        elif self.draft.form == "rows":
            rows = RowsSpec(program, self.draft.norms, last, self.draft.type(self.draft.norms[0])[1])
            spec = rows if self.draft.dynamic else collapsed(rows, program, last)
        else:
            dtype = self.draft.type(self.draft.region.outputs[0])[1]
            loops = RegionSpec(program, anchor, last, dtype if dtype in ("float64", "float32") else "float32")
            spec = loops if self.draft.dynamic else collapsed(loops, program, last)
        made = self.e.call(self.op, spec, self.given, self.rows, self.into)
        for value, expr, place, layout in zip(self.outputs, made, results, layouts, strict=True):
            if place.shared:
                continue
            if layout.channels_last:
                self.e.bind(value, self._unflat(expr, place), layout)
            else:
                self.e.bind(value, self.e.reshape(expr, self._native_shape(value, place)), NATIVE)

    def _unflat(self, expr: Expr, place: Place) -> Expr:
        return self.e.reshape(expr, [int(extent or 0) for extent in place.extents])

    def _native_shape(self, value: Value, place: Place) -> list[Any]:
        if not self.draft.dynamic:
            return list(place.shape)
        return self.lead if len(place.shape) < 2 else [*self.lead, place.shape[-1]]

    def _orders(self) -> dict[int, tuple[int, ...]]:
        """For each value its axes, the one that moves slowest in memory first."""
        orders: dict[int, tuple[int, ...]] = {}
        for number, source in enumerate(self.sources):
            rank = len(self.draft.type(number)[0])
            lies = source.value is not None and self.channels_last and rank in (3, 4, 5) and not self._small(number)
            orders[number] = to_channels_last(rank) if lies else tuple(range(rank))
        for number, step in enumerate(self.draft.region.steps, self.draft.region.operands):
            shape = self.draft.type(number)[0]
            natural = tuple(range(len(shape)))
            if number == self.draft.root and (step.kind is K.CONV or self.draft.form == "window"):
                orders[number] = to_channels_last(len(shape))
            elif step.kind is K.PERMUTE:
                perm = list(step.attrs["perm"])
                orders[number] = tuple(perm.index(axis) for axis in orders[step.inputs[0] or 0])
            elif step.kind is K.RESHAPE:
                before = step.inputs[0] or 0
                orders[number] = _regrouped(self.draft.type(before)[0], shape, orders[before])
            else:
                full = [v for v in step.inputs if v is not None and self.draft.type(v)[0] == shape]
                turned = [orders[v] for v in full if orders[v] != natural]
                alike = [orders[v] for v in step.inputs if v is not None and len(orders[v]) == len(shape)]
                parts = alike if step.kind in (K.CONCAT, K.SLICE, K.PAD) else []
                orders[number] = next(iter(turned), next((o for o in parts if o != natural), natural))
        return orders

    def _small(self, number: int) -> bool:
        """Whether an operand is broadcast along an image, so that its own order hardly matters."""
        shape = self.draft.type(number)[0]
        source = self.sources[number].value
        if source is not None and self.e.is_literal(source):
            return True
        return prod(int(extent or 1) for extent in shape[2:]) == 1

    def _read(self, number: int, name: str, orders: dict[int, tuple[int, ...]]) -> Place | None:
        """Where an operand lies; its buffer becomes an argument of the kernel."""
        source, known = self.sources[number], self.draft.operands[number]
        steps = enumerate(self.draft.region.steps, self.draft.region.operands)
        own = None if self.draft.form == "rows" else self.draft.root  # its operands are its kernel's own
        used = {value for position, step in steps if position != own for value in step.inputs}
        passed = number in self.draft.region.outputs
        if known is None or (number not in used and not passed):
            return None
        shape, dtype = known
        if source.made is not None:
            self.given[name] = self.e.weight(source.name, source.made)
            return Place.plain(shape, dtype)
        value = source.value
        if value is None:
            return None
        if self.e.buffers.holds(value) and not self.e.buffers.whole(value):
            place = self.e.buffers.place(value)
            self.given[name] = self.e.buffers.held[self.e.buffers.number(value)]
            return replace(place, shared=False)
        if orders[number] != tuple(range(len(shape))):
            layout = self.e.widest(value) if len(shape) < 5 else CHANNELS_LAST
            self.given[name] = self.e.cast(self.e.get(value, layout), dtype)
            return Place.channels_last([int(extent or 0) for extent in shape], dtype, layout.border)
        expr = self.e.cast(self.e.get(value), dtype)
        if self.draft.dynamic and shape[:1] == (None,):
            self._dynamic(expr)
        self.given[name] = expr
        return Place.plain(shape, dtype)

    def _dynamic(self, expr: Expr) -> None:
        extents = self.e.shape(expr)
        self.lead = extents[:-1]
        rows: Any = 1
        for extent in self.lead:
            rows = rows * extent
        self.rows = rows

    def _results(self, orders: dict[int, tuple[int, ...]]) -> tuple[list[Place], list[Layout]]:
        places, layouts = [], []
        for value, made in zip(self.outputs, self.draft.region.outputs, strict=True):
            shape, dtype = self.draft.type(made)
            if self.e.buffers.number(value) is not None:
                places.append(self.e.buffers.place(value))
                layouts.append(self.e.buffers.layout(value))
            elif len(shape) in (3, 4, 5) and orders[made] == to_channels_last(len(shape)):
                border = self.e.borders.get(value, (0, 0)) if len(shape) < 5 else (0, 0)
                places.append(Place.channels_last([int(extent or 0) for extent in shape], dtype, border))
                layouts.append(Layout(channels_last=True, border=border))
            else:
                places.append(Place.plain(shape, dtype))
                layouts.append(NATIVE)
        return places, layouts

    def _rooted(self, program: Program, last: bool) -> ConvSpec | LinearSpec | PoolSpec | ProductSpec:
        """The spec of the contraction or window with the region as its tail."""
        root = self.draft.root or 0
        step = self.draft.step(root)
        tail = Tail(program, root, last)
        if step.kind is K.MATMUL:
            return self._product(step, tail)
        x = self.sources[step.inputs[0] or 0].value
        if x is None:
            raise GraphError(f"The region '{self.op.name}' reads nothing.")
        if step.kind is K.LINEAR:
            return self._linear(step, tail, x)
        sliced = self.e.buffers.holds(x) and not self.e.buffers.whole(x) and self.e.buffers.layout(x).channels_last
        layout = self.e.buffers.layout(x) if sliced else self.e.widest(x)
        self.given["x"] = self.e.buffers.held[self.e.buffers.number(x)] if sliced else self.e.get(x, layout)
        slot = self.e.buffers.shared.slots[x] if sliced else None
        pitch = self.e.buffers.shared.buffers[slot.buffer].shape[1] if slot is not None else 0
        first = slot.start if slot is not None else 0
        shape = [int(extent or 0) for extent in self.draft.type(step.inputs[0] or 0)[0]]
        flat = len(shape) == 3
        attrs = with_defaults(step)
        size = (1, shape[2]) if flat else (shape[2], shape[3])
        if self.draft.form == "window":
            kernel = pair(attrs["kernel"], flat)
            largest = step.kind is K.MAX_POOL
            return PoolSpec(
                "max" if largest else "avg", shape[0], *size, shape[1], kernel,
                pair(attrs["stride"], flat) if attrs["stride"] else kernel, spatial_pads_of(attrs["pads"]),
                pair(attrs["dilation"] or (1, 1), flat) if largest else (1, 1), bool(attrs["ceil_mode"]),
                not largest and bool(attrs["count_include_pad"]), layout.border, (0, 0),
                self.draft.type(root)[1], pitch, first, tail,
            )  # fmt: skip
        weight, bias = self._stored(step)
        view, turned = _VIEWS[attrs.get("turned", "")], attrs.get("turned") == "columns"
        extents = [int(extent) for extent in (weight.shape or ())]
        if turned:
            extents = [prod(extents[1:]), extents[0], *[1] * (len(extents) - 2)]
        elif attrs.get("turned"):
            extents[:2] = extents[1::-1]
        spec = ConvSpec(
            shape[0], *size, shape[1], extents[0],
            pair(extents[2:], flat), pair(attrs["stride"], flat), spatial_pads_of(attrs["pads"]),
            pair(attrs["dilation"], flat), int(attrs["groups"]), in_border=layout.border,
            epilogue=Epilogue(bias=bias is not None), dtype=self.draft.type(root)[1],
            in_pitch=pitch, in_first=first, tail=tail,
        )  # fmt: skip
        repeat = prod(int(k) for k in (weight.shape or ())[2:]) if turned else 1
        self.given.update(
            packed(
                self.e,
                spec,
                weight,
                bias,
                lambda data: view(data)[:, :, None] if flat else view(data),
                lambda data: np.tile(data, repeat),
            )
        )
        return spec

    def _linear(self, step: Step, tail: Tail, x: Value) -> LinearSpec:
        weight, bias = self._stored(step)
        turned = bool(with_defaults(step)["transpose_weight"])
        inside, outside = (int(extent) for extent in weight.shape or ())
        if turned:
            inside, outside = outside, inside
        buffers = self.e.buffers
        sliced = buffers.holds(x) and not buffers.whole(x) and buffers.axis(x) == (x.rank or 0) - 1
        expr = buffers.held[buffers.number(x)] if sliced else self.e.get(x)
        pitch = int(self.e.shape(expr)[-1]) if sliced else 0
        first = buffers.shared.slots[x].start if sliced else 0
        self.given["x"] = expr
        if self.draft.dynamic:
            self._dynamic(expr)
        rows = None if self.draft.dynamic else prod(self.e.shape(expr)[:-1])
        dtype = self.draft.type(self.draft.root or 0)[1]
        given = Epilogue(bias=bias is not None)
        spec = LinearSpec(rows, inside, outside, given, dtype, in_pitch=pitch, in_first=first, tail=tail)
        self.given.update(packed(self.e, spec, weight, bias, (lambda data: data) if turned else (lambda data: data.T)))
        return spec

    def _product(self, step: Step, tail: Tail) -> ProductSpec:
        a, b = (self.draft.type(value or 0)[0] for value in step.inputs)
        shape, dtype = self.draft.type(self.draft.root or 0)
        *lead, rows, columns = (int(extent or 0) for extent in shape)
        for name, place in zip("ab", step.inputs, strict=True):
            value = self.sources[place or 0].value
            if value is not None:
                self.given[name] = self.e.get(value)
        shared = [prod(int(extent or 0) for extent in s[:-2]) == 1 and prod(lead) > 1 for s in (a, b)]
        return ProductSpec(tuple(lead), rows, int(a[-1] or 0), columns, tail, shared[0], shared[1], dtype)

    def _stored(self, step: Step) -> tuple[Value, Value | None]:
        weight = self.sources[step.inputs[1] or 0].value
        place = step.inputs[2] if len(step.inputs) > 2 else None
        if weight is None:
            raise GraphError(f"The region '{self.op.name}' has no weight.")
        return weight, None if place is None else self.sources[place].value


def _as_stored(data: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return data


def _mirrored(data: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """The weight [in, out, *kernel] of a transposed convolution as that of a convolution with the same result."""
    return np.flip(data, tuple(range(2, data.ndim))).swapaxes(0, 1)


def _columns(data: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """The weight [in, out, *kernel] of a transposed convolution as [kernel × out, in, 1, ...]."""
    turned = np.moveaxis(data, (0, 1), (-1, -2))
    return turned.reshape(-1, data.shape[0], *[1] * (data.ndim - 2))


_VIEWS = {"": _as_stored, "mirror": _mirrored, "columns": _columns}


def _regrouped(before: Sequence[Any], after: Sequence[Any], order: tuple[int, ...]) -> tuple[int, ...]:
    """The order of axes behind a reshape that splits or joins axes which lie side by side."""
    groups = groups_of(tuple(before), tuple(after))
    placed: list[int] = []
    for axis in order:
        placed += next((new for old, new in groups if old[:1] == [axis]), [])
    lonely = [axis for axis in range(len(after)) if axis not in placed]
    placed = [*lonely, *placed]
    together = all(
        [order.index(axis) for axis in old] == list(range(order.index(old[0]), order.index(old[0]) + len(old)))
        for old, _ in groups
        if old
    )
    return tuple(placed) if together else tuple(range(len(after)))


def region_border(op: Op) -> tuple[Value, tuple[int, int, int, int]] | None:
    """The value that the region's convolution reads, and its pads."""
    steps = parse(op.attr("steps"))
    for step in steps.steps:
        if step.kind is not K.CONV or step.inputs[0] is None or step.inputs[0] >= steps.operands:
            continue
        value, pads = op.inputs[step.inputs[0]], with_defaults(step)["pads"]
        if value is not None and len(pads) <= 4:
            return value, spatial_pads_of(pads)
    return None
