"""One Relax function under construction: values in their layouts, weights as parameters, calls of kernels."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import prod
from typing import Any, TypeAlias

import numpy as np
from tvm import relax

from rescompile.backends.dense_buffers import Shared
from rescompile.backends.kernel_set import KernelSet
from rescompile.backends.kernels import LayoutSpec, Place, Program, RegionSpec, Spec, arguments, prim_func
from rescompile.backends.layouts import (
    CHANNELS_LAST,
    NATIVE,
    SWAP,
    SWAPPED,
    Layout,
    Pair,
    to_channels_first,
    to_channels_last,
)
from rescompile.backends.reports import Region
from rescompile.backends.shared_buffers import SharedBuffers
from rescompile.backends.symbols import Extent, Symbols, static
from rescompile.backends.working import WorkingGraph
from rescompile.errors import GraphError
from rescompile.fused_region import Region as FusedRegion
from rescompile.fused_region import Step
from rescompile.graph import Op, Role, Value
from rescompile.kinds import OpKind
from rescompile.values import numpy_dtype

Expr: TypeAlias = Any  # a relax expression; tvm's own types are loose

# A constant of at most this many elements is written into the program; a larger one is a weight beside it.
LITERAL_ELEMENTS = 16
# What the copying kernel takes; it moves elements only, so their width is all that counts.
DTYPES = ("float32", "float64", "float16", "bfloat16")
_COPY = Op(OpKind.PERMUTE, "layout", [], [], {})


class Emitter:
    """Builds `main(inputs..., weights...)` out of a working graph, one operation at a time."""

    def __init__(
        self,
        graph: WorkingGraph,
        kernels: KernelSet | None = None,
        borders: dict[Value, Pair] | None = None,
        shared: Shared | None = None,
    ) -> None:
        self.graph = graph
        self.kernels = kernels
        self.bb = relax.BlockBuilder()
        self.symbols = Symbols(graph.extents)
        self.borders = borders or {}
        self.buffers = SharedBuffers(shared or Shared(), self.borders)
        self.regions: dict[str, Region] = {}
        self._functions: dict[Spec, Expr] = {}
        self._weights: dict[str, Callable[[], np.ndarray[Any, Any]]] = {}
        self._weight_vars: dict[str, Expr] = {}
        self._forms: dict[Value, dict[Layout, Expr]] = {}
        self.inputs: list[Expr] = []
        for value in graph.inputs:
            shape = value.shape
            if shape is None or value.dtype is None:
                raise GraphError(f"The input '{value.name}' has no shape or no dtype: give it one before compiling.")
            extents = [self.symbols.declare(dim) for dim in shape]
            var = relax.Var(
                value.name if value.name.isidentifier() else f"input_{len(self.inputs)}", _type(extents, value.dtype)
            )
            self.inputs.append(var)
            self._forms[value] = {NATIVE: var}

    # ---- expressions -------------------------------------------------------------------------------------------

    def emit(self, expr: Expr) -> Expr:
        """Bind an expression to a variable, so that its shape is known."""
        return self.bb.emit(expr)

    def shape(self, expr: Expr) -> list[Extent]:
        """Extents of an emitted expression: numbers where static."""
        extents = expr.ty.shape
        if extents is None:
            raise GraphError(f"The shape of {expr} is not known to the compiler.")
        return [found if (found := static(extent)) is not None else extent for extent in extents]

    def dtype(self, expr: Expr) -> str:
        """Element type of an emitted expression."""
        return str(expr.ty.dtype)

    def scalar(self, number: float | bool, dtype: str) -> Expr:
        """A literal number."""
        return relax.const(np.asarray(number, dtype=numpy_dtype(dtype)), dtype)

    def cast(self, expr: Expr, dtype: str | None) -> Expr:
        """`expr` in another element type, itself where it already has that."""
        if dtype is None or self.dtype(expr) == dtype:
            return expr
        if dtype == "bool":
            return self.emit(relax.op.not_equal(expr, self.scalar(0, self.dtype(expr))))
        return self.emit(relax.op.astype(expr, dtype))

    def reshape(self, expr: Expr, shape: Sequence[Extent]) -> Expr:
        """`expr` with other extents; nothing is emitted where they are the same."""
        have = self.shape(expr)
        if len(have) == len(shape) and all(isinstance(a, int) and a == b for a, b in zip(have, shape, strict=True)):
            return expr
        return self.emit(relax.op.reshape(expr, tuple(shape)))

    def permute(self, expr: Expr, axes: Sequence[int]) -> Expr:
        """`expr` with its axes in another order."""
        if list(axes) == list(range(len(axes))):
            return expr
        shape = self.shape(expr)
        moving = [axis for axis in axes if shape[axis] != 1]
        if moving == sorted(moving):  # only extents of one move: the elements stay where they are
            return self.reshape(expr, [shape[axis] for axis in axes])
        return self.emit(relax.op.permute_dims(expr, list(axes)))

    # ---- values ------------------------------------------------------------------------------------------------

    def get(self, value: Value, layout: Layout = NATIVE) -> Expr:
        """The value in a layout, converted where it does not lie so already."""
        forms = self._forms.setdefault(value, {})
        if not forms and self.buffers.holds(value):
            forms[self.buffers.layout(value)] = self._taken_out(value)
        if layout not in forms:
            forms[layout] = self._convert(value, forms, layout)
        return forms[layout]

    def bind(self, value: Value, expr: Expr, layout: Layout = NATIVE) -> None:
        """Say what an operation's output is. Channels last, the border that its readers want is added here."""
        want = self.borders.get(value, (0, 0))
        if layout == CHANNELS_LAST and want != (0, 0) and len(self.shape(expr)) in (3, 4):
            layout, expr = Layout(channels_last=True, border=want), self._add_border(expr, want)
        self._forms.setdefault(value, {})[layout] = expr

    def has(self, value: Value, layout: Layout) -> bool:
        """Whether the value lies in that layout already."""
        return layout in self._forms.get(value, {})

    def lies_channels_last(self, value: Value) -> bool:
        """Whether the value lies channels last and not as the graph says."""
        forms = self._forms.get(value, {})
        if not forms and self.buffers.holds(value):
            return self.buffers.layout(value).channels_last
        return bool(forms) and NATIVE not in forms and any(layout.channels_last for layout in forms)

    def widest(self, value: Value) -> Layout:
        """The channels-last layout to read the value in: with the border that its readers want, if it has one."""
        found = [layout for layout in self._forms.get(value, {}) if layout.channels_last]
        if not self._forms.get(value) and self.lies_channels_last(value):
            return self.buffers.layout(value)
        want = self.borders.get(value, (0, 0))
        return max(found, key=lambda layout: layout.border) if found else Layout(channels_last=True, border=want)

    def is_literal(self, value: Value) -> bool:
        """Whether the value is known at compile time."""
        return value.role in (Role.PARAMETER, Role.CONSTANT)

    def data(self, value: Value) -> np.ndarray[Any, Any]:
        """Contents of a constant."""
        return self.graph.data(value)

    def weight(
        self,
        name: str,
        make: Callable[[], np.ndarray[Any, Any]],
        shape: Sequence[int] | None = None,
        dtype: str | None = None,
    ) -> Expr:
        """A tensor known at compile time, as a parameter of the program, or as a literal where it is small.

        It is made once for each name; with `shape` and `dtype` given, not before the function is complete.
        """
        if name not in self._weight_vars:
            if shape is None or dtype is None or prod(shape) <= LITERAL_ELEMENTS:
                data = np.asarray(make(), order="C")
                shape, dtype, make = data.shape, str(data.dtype), lambda: data
            if prod(shape) <= LITERAL_ELEMENTS:
                self._weight_vars[name] = relax.const(make(), dtype)
            else:
                self._weights[name] = make
                self._weight_vars[name] = relax.Var(f"w{len(self._weights)}", _type(list(shape), dtype))
        return self._weight_vars[name]

    @property
    def weight_vars(self) -> list[Expr]:
        """Parameters of the function after the inputs."""
        return [self._weight_vars[name] for name in self._weights]

    def weights(self) -> dict[str, np.ndarray[Any, Any]]:
        """Contents of `weight_vars`, by name, in order."""
        return {name: np.asarray(make(), order="C") for name, make in self._weights.items()}

    def call(
        self,
        op: Op,
        spec: Spec,
        given: Mapping[str, Expr],
        rows: Extent | None = None,
        into: Sequence[int | None] = (),
    ) -> list[Expr]:
        """Call the kernel of a spec with buffers by name; the outputs. `rows` is the dynamic row count.

        into: for each output the number of the shared buffer that it is written into; those that hold something already
        come first.
        """
        if self.kernels is None:
            raise GraphError("There are no kernels for this target.")
        tile = self.kernels.tile(spec)
        buffers = arguments(spec, tile)
        if spec not in self._functions:
            family = self.kernels.family(spec)
            name = f"{family}_{len(self._functions)}"
            self._functions[spec] = self.bb.add_func(prim_func(spec, tile, name), name)
            self.regions[name] = Region.of_kernel(name, family, spec, tile, self.kernels.choices.get(spec), buffers)
        function = self._functions[spec]
        region = self.regions[function.name_hint]
        region.ops.append(op.name)
        region.calls += 1

        def extents(shape: Sequence[int | None]) -> list[Extent]:
            return [rows if extent is None else extent for extent in shape]

        operands = [self.reshape(given[buffer.name], extents(buffer.shape)) for buffer in buffers if not buffer.output]
        types = [_type(extents(buffer.shape), buffer.dtype) for buffer in buffers if buffer.output]
        targets = [*into, *[None] * (len(types) - len(into))]
        held = [self.buffers.held[number] for number in targets if number in self.buffers.held]
        out = types[0] if len(types) == 1 else types
        if held:
            places = [len(operands) + i if number in self.buffers.held else -1 for i, number in enumerate(targets)]
            called = relax.call_tir_inplace(function, relax.Tuple([*operands, *held]), places, out)
        else:
            called = relax.call_tir(function, relax.Tuple(operands), out)
        result = self.emit(called)
        many = len(types) > 1
        results = [self.emit(relax.TupleGetItem(result, i)) for i in range(len(types))] if many else [result]
        for number, made in zip(targets, results, strict=True):
            if number is not None:
                self.buffers.held[number] = made
        return results

    def join(self, op: Op) -> bool:
        """Whether the concatenation lies in a shared buffer already; what nobody wrote there is copied into it."""
        slot = self.buffers.shared.slots.get(op.output)
        if slot is None:
            return False
        for value, start in self.buffers.missing(slot):
            self._copy_into(op, value, slot.buffer, start)
        if self.buffers.whole(op.output):
            self._forms[op.output] = {self.buffers.layout(op.output): self.buffers.held[slot.buffer]}
        return True

    def _copy_into(self, op: Op, value: Value, number: int, start: int) -> None:
        layout = self.buffers.layout_of(number)
        source = self.widest(value) if layout.channels_last else NATIVE
        expr = self.cast(self.get(value, source), self.buffers.shared.buffers[number].dtype)
        shape, dtype = [int(extent) for extent in value.shape or ()], self.dtype(expr)
        read = Place.channels_last(shape, dtype, source.border) if layout.channels_last else Place.plain(shape, dtype)
        write = self.buffers.place_at(number, shape, start)
        steps = FusedRegion(1, (Step(OpKind.ADD, (0,)),), (1,)).text()
        program = Program(steps, (read,), (write,), ((tuple(shape), dtype),))
        self.call(op, RegionSpec(program, 1, layout.channels_last, dtype), {"x0": expr}, None, [number])

    def _taken_out(self, value: Value) -> Expr:
        """A copy of a slice of a shared buffer, for who cannot read it there."""
        slot = self.buffers.shared.slots[value]
        expr = self.buffers.held[slot.buffer]
        if self.buffers.whole(value):
            return expr
        axis = len(self.shape(expr)) - 1 if self.buffers.layout(value).channels_last else self.buffers.axis(value)
        return self.slice(expr, [axis], [slot.start], [slot.start + slot.extent])

    def target_shape(self, op: Op, source: Expr | None = None) -> list[Extent]:
        """Extents of the operation's output as the graph has them; one that it cannot say is -1."""
        shape = op.output.shape
        if shape is None:
            raise GraphError(f"The shape of '{op.output.name}' is unknown: '{op.name}' cannot be compiled without it.")
        extents = self.symbols.shape(shape)
        if sum(extent is None for extent in extents) > 1 and source is not None:
            have = self.shape(source)
            extents = [
                have[axis] if extent is None and axis < len(have) and not isinstance(have[axis], int) else extent
                for axis, extent in enumerate(extents)
            ]
        if sum(extent is None for extent in extents) > 1:
            raise GraphError(
                f"'{op.name}' has several extents that do not follow from the inputs' ({shape}): fix all but one."
            )
        return [-1 if extent is None else extent for extent in extents]

    def unique(self, stem: str) -> str:
        """A name for a function of the module."""
        return self.bb.get_unique_name("".join(c if c.isalnum() else "_" for c in stem)) if stem else "region"

    # ---- inside ------------------------------------------------------------------------------------------------

    def _convert(self, value: Value, forms: dict[Layout, Expr], layout: Layout) -> Expr:
        if not forms:
            if not self.is_literal(value):
                raise GraphError(f"'{value.name}' is read before anything produces it: the graph is not sorted.")
            return self._literal(value, layout)
        if layout == SWAPPED:
            return self.permute(self.get(value), SWAP)
        if not layout.channels_last:
            if SWAPPED in forms:
                return self.permute(forms[SWAPPED], SWAP)
            return self._to_native(value, *next(iter(forms.items())))
        if layout.border != (0, 0):
            if CHANNELS_LAST not in forms and NATIVE in forms:
                return self._from_native(forms[NATIVE], layout.border)
            return self._add_border(self.get(value, CHANNELS_LAST), layout.border)
        bordered = next((known for known in forms if known.channels_last), None)
        if bordered is not None:
            return self._cut_border(forms[bordered], bordered.border)
        return self._from_native(self.get(value), (0, 0))

    def _from_native(self, native: Expr, border: Pair) -> Expr:
        shape = self.shape(native)
        axes = to_channels_last(len(shape))
        if self._copied_by_kernel(native, shape):
            height, width = ([1, *shape[2:]])[-2:]
            copy = LayoutSpec(shape[0], height, width, shape[1], out_border=border, dtype=self.dtype(native))
            out = self.call(_COPY, copy, {"x": native})[0]
            return self.reshape(out, [shape[0], shape[2] + 2 * border[1], shape[1]]) if len(shape) == 3 else out
        plain = self.permute(native, axes)
        return plain if border == (0, 0) else self._add_border(plain, border)

    def _to_native(self, value: Value, layout: Layout, expr: Expr) -> Expr:
        shape = self.shape(expr)
        if self._copied_by_kernel(expr, shape):
            vertical, horizontal = layout.border
            height = shape[1] - 2 * vertical if len(shape) == 4 else 1
            width = shape[-2] - 2 * horizontal
            copy = LayoutSpec(
                shape[0], height, width, shape[-1], "NHWC", "NCHW", in_border=layout.border, dtype=self.dtype(expr)
            )
            out = self.call(_COPY, copy, {"x": expr})[0]
            return self.reshape(out, [shape[0], shape[-1], width]) if len(shape) == 3 else out
        plain = self.get(value, CHANNELS_LAST)
        return self.permute(plain, to_channels_first(len(self.shape(plain))))

    def _copied_by_kernel(self, expr: Expr, shape: list[Extent]) -> bool:
        """Whether a layout copy is large enough, and of a kind, for the copying kernel."""
        if self.kernels is None or len(shape) not in (3, 4) or self.dtype(expr) not in DTYPES:
            return False
        return all(isinstance(extent, int) for extent in shape) and prod(shape) >= 4096 and shape.count(1) < 2

    def _literal(self, value: Value, layout: Layout) -> Expr:
        if not layout.channels_last:
            return self.weight(value.name, lambda: self.data(value), *_static_type(value))
        axes = to_channels_last(len(self.data(value).shape))
        plain = self.weight(f"{value.name}.channels_last", lambda: self.data(value).transpose(axes))
        return plain if layout.border == (0, 0) else self._add_border(plain, layout.border)

    def _add_border(self, expr: Expr, border: Pair) -> Expr:
        rank = len(self.shape(expr))
        frame = [border[1]] if rank == 3 else [border[0], border[1]]
        width = [0, 0, *(side for extent in frame for side in (extent, extent)), 0, 0]
        return self.emit(relax.op.nn.pad(expr, width))

    def _cut_border(self, expr: Expr, border: Pair) -> Expr:
        shape = self.shape(expr)
        if len(shape) == 3:
            return self.slice(expr, [1], [border[1]], [shape[1] - border[1]])
        return self.slice(expr, [1, 2], list(border), [shape[1] - border[0], shape[2] - border[1]])

    def slice(
        self,
        expr: Expr,
        axes: Sequence[int],
        starts: Sequence[Extent],
        stops: Sequence[Extent],
        steps: Sequence[int] | None = None,
    ) -> Expr:
        """expr[start:stop:step] along some axes, bounds within the extents."""
        return self.emit(
            relax.op.strided_slice(
                expr, list(axes), list(starts), list(stops), list(steps or [1] * len(axes)), assume_inbound=True
            )
        )


def _static_type(value: Value) -> tuple[tuple[int, ...] | None, str | None]:
    shape = value.shape
    if shape is None or any(isinstance(extent, str) for extent in shape):
        return None, None
    return tuple(int(extent) for extent in shape), value.dtype


def _type(extents: Sequence[Extent], dtype: str) -> Expr:
    return relax.TensorType(tuple(extents), dtype)
