"""One Relax function under construction: values in their layouts, weights as parameters, calls of kernels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import ml_dtypes
import numpy as np
import tvm
from tvm import relax

from rescompile.backends.layouts import CHANNELS_LAST, NATIVE, Layout, Pair, to_channels_first, to_channels_last
from rescompile.backends.symbols import Extent, Symbols, static
from rescompile.backends.working import WorkingGraph
from rescompile.errors import GraphError
from rescompile.graph import Op, Role, Value

Expr: TypeAlias = Any  # a relax expression; tvm's own types are loose

# A constant of at most this many elements is written into the program; a larger one is a weight beside it.
LITERAL_ELEMENTS = 16


@dataclass
class Region:
    """What one kernel, or one group of generated functions, of a program computes."""

    name: str  # name of the function in the module
    kernel: str  # conv, linear, attention, ..., or generated
    ops: list[str] = field(default_factory=list)
    spec: str = ""
    tile: str = ""
    tried: list[dict[str, Any]] = field(default_factory=list)  # tile and microseconds of each timed candidate
    microseconds: float | None = None
    flops: int | None = None
    bytes: int | None = None
    calls: int = 0


class Emitter:
    """Builds `main(inputs..., weights...)` out of a working graph, one operation at a time."""

    def __init__(self, graph: WorkingGraph, borders: dict[Value, Pair] | None = None) -> None:
        self.graph = graph
        self.bb = relax.BlockBuilder()
        self.symbols = Symbols()
        self.borders = borders or {}
        self.weights: dict[str, np.ndarray[Any, Any]] = {}
        self.regions: dict[str, Region] = {}
        self._weight_vars: dict[str, Expr] = {}
        self._forms: dict[Value, dict[Layout, Expr]] = {}
        self.inputs: list[Expr] = []
        for value in graph.inputs:
            shape = value.shape
            if shape is None or value.dtype is None:
                raise GraphError(f"The input '{value.name}' has no shape or no dtype: give it one before compiling.")
            extents = [self.symbols.declare(dim) for dim in shape]
            var = relax.Var(value.name if value.name.isidentifier() else f"input_{len(self.inputs)}", _type(extents, value.dtype))
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
        if layout not in forms:
            forms[layout] = self._convert(value, forms, layout)
        return forms[layout]

    def bind(self, value: Value, expr: Expr, layout: Layout = NATIVE) -> None:
        """Say what an operation's output is. Channels last, the border that its readers want is added here."""
        want = self.borders.get(value, (0, 0))
        if layout == CHANNELS_LAST and want != (0, 0) and len(self.shape(expr)) in (3, 4):
            layout, expr = Layout(True, want), self._add_border(expr, want)
        self._forms.setdefault(value, {})[layout] = expr

    def has(self, value: Value, layout: Layout) -> bool:
        """Whether the value lies in that layout already."""
        return layout in self._forms.get(value, {})

    def lies_channels_last(self, value: Value) -> bool:
        """Whether the value lies channels last and not as the graph says."""
        forms = self._forms.get(value, {})
        return bool(forms) and NATIVE not in forms and any(layout.channels_last for layout in forms)

    def widest(self, value: Value) -> Layout:
        """The channels-last layout to read the value in: with the border that its readers want, if it has one."""
        found = [layout for layout in self._forms.get(value, {}) if layout.channels_last]
        return max(found, key=lambda layout: layout.border) if found else Layout(True, self.borders.get(value, (0, 0)))

    def is_literal(self, value: Value) -> bool:
        """Whether the value is known at compile time."""
        return value.role in (Role.PARAMETER, Role.CONSTANT)

    def data(self, value: Value) -> np.ndarray[Any, Any]:
        """Contents of a constant."""
        return self.graph.data(value)

    def weight(self, name: str, make: Callable[[], np.ndarray[Any, Any]]) -> Expr:
        """A tensor known at compile time, as a parameter of the program; made once for each name."""
        if name not in self._weight_vars:
            data = np.ascontiguousarray(make())
            if data.ndim == 0 or data.size <= LITERAL_ELEMENTS:
                dtype = str(data.dtype)
                self._weight_vars[name] = relax.const(data, dtype)
            else:
                self.weights[name] = data
                self._weight_vars[name] = relax.Var(f"w{len(self.weights)}", _type(list(data.shape), str(data.dtype)))
        return self._weight_vars[name]

    @property
    def weight_vars(self) -> list[Expr]:
        """Parameters of the function after the inputs, in the order of `weights`."""
        return [self._weight_vars[name] for name in self.weights]

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
                f"'{op.name}' has more than one extent that does not follow from the inputs' ({shape}): fix one of them."
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
        if not layout.channels_last:
            plain = self.get(value, CHANNELS_LAST)
            return self.permute(plain, to_channels_first(len(self.shape(plain))))
        if layout.border != (0, 0):
            return self._add_border(self.get(value, CHANNELS_LAST), layout.border)
        bordered = next((known for known in forms if known.channels_last), None)
        if bordered is not None:
            return self._cut_border(forms[bordered], bordered.border)
        native = forms[NATIVE]
        return self.permute(native, to_channels_last(len(self.shape(native))))

    def _literal(self, value: Value, layout: Layout) -> Expr:
        if not layout.channels_last:
            return self.weight(value.name, lambda: self.data(value))
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


def numpy_dtype(dtype: str) -> np.dtype[Any]:
    """The numpy dtype of a graph's dtype name."""
    return np.dtype(ml_dtypes.bfloat16) if dtype == "bfloat16" else np.dtype(dtype)


def _type(extents: Sequence[Extent], dtype: str) -> Expr:
    return relax.TensorType(tuple(extents), dtype)



