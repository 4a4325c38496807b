"""What an operation, and a graph, costs: parameters, floating-point operations, bytes moved.

```
conv, linear, matmul     2·(multiply-adds) (+ 1 an output element for a bias)
attention                2·B·H·S·T·(D + Dv) + 5·B·H·S·T for the scaled softmax
einsum                   2·(product of all index extents)
recurrent                2·(weight elements)·(steps·batch)
batch norm (eval)        2 an element          other norms              8 an element
softmax                  5 an element          pool                     window an output element
reduction                1 an input element    fft                      5·n·log2(n)
activation               1 an output element   elementwise              1 an output element for each operand but one
fused                    the sum over its expansion
```

Bytes: every operand read once and every output written once, at the width of its dtype; a view moves nothing, a lookup
(embedding, gather) reads of its table what it returns, and what a fused operation makes inside counts nothing.
A symbolic extent counts as what `extents` says, otherwise as 1, and is listed in `Costs.symbols`. Parameters are the
trained tensors of floating dtype: statistics of a batch norm are state, not parameters, in every IR. What depends on
constants only is computed once, not on each call, and costs nothing.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from rescompile.extents import extent_of
from rescompile.fused import program
from rescompile.fused_region import step_types
from rescompile.graph import Attrs, Body, Dim, Graph, Op, Shape, Value, ValueType
from rescompile.kinds import OpKind, Trait

_K = OpKind
VIEWS = {_K.IDENTITY, _K.RESHAPE, _K.EXPAND, _K.SLICE, _K.SPLIT, _K.PERMUTE, _K.SHAPE}
_LOOKUPS = {_K.EMBEDDING, _K.GATHER}  # the table is their first operand
_WIDTHS = {"float64": 8, "int64": 8, "float16": 2, "bfloat16": 2, "int16": 2, "int8": 1, "uint8": 1, "bool": 1}
_WIDTHS |= {"complex64": 8, "complex128": 16, "uint16": 2, "uint64": 8, "float8_e4m3fn": 1, "float8_e5m2": 1}
_DEFAULT_WIDTH = 4


@dataclass(frozen=True, slots=True)
class Cost:
    """What one operation costs: `flops` floating-point operations and `bytes` of memory traffic, on each call."""

    flops: int = 0
    bytes: int = 0


@dataclass(frozen=True, slots=True)
class Costs:
    """What a graph costs. `uncounted`: operations whose arithmetic is not known and counts as nothing."""

    parameters: int
    parameter_bytes: int
    flops: int
    bytes: int
    ops: int
    uncounted: int = 0
    symbols: tuple[tuple[str, int], ...] = ()  # what each symbolic extent counted as

    def to_dict(self) -> dict[str, Any]:
        """The same as plain data."""
        return {
            "parameters": self.parameters,
            "parameter_bytes": self.parameter_bytes,
            "flops": self.flops,
            "bytes": self.bytes,
            "ops": self.ops,
            "uncounted": self.uncounted,
            "symbols": dict(self.symbols),
        }


def graph_costs(graph: Graph, extents: Mapping[str, int] | None = None) -> Costs:
    """Costs of the whole graph, on one call. `extents`: what symbolic extents count as (1 otherwise)."""
    extents = extents or {}
    flops = moved = uncounted = 0
    for op in graph:
        cost = op_cost(op, extents)
        flops += cost.flops
        moved += cost.bytes
        uncounted += op.kind is _K.OPAQUE
    trained = trained_parameters(graph)
    return Costs(
        parameters=parameter_count(graph),
        parameter_bytes=sum(_nbytes(value, extents) for value in trained),
        flops=flops,
        bytes=moved,
        ops=len(graph),
        uncounted=uncounted,
        symbols=symbol_extents(graph, extents),
    )


def cost_lines(before: Costs, after: Costs) -> list[str]:
    """Costs before and after, with their ratio, as text."""
    lines = ["costs"]
    rows = [
        ("operations", before.ops, after.ops),
        ("parameters", before.parameters, after.parameters),
        ("FLOPs", before.flops, after.flops),
        ("bytes moved", before.bytes, after.bytes),
    ]
    for title, old, new in rows:
        share = f" ({(new - old) / old:+.1%})" if old and old != new else ""
        lines.append(f"  {title:<14} {old:>16,} → {new:,}{share}")
    if after.symbols:
        lines.append("  with " + ", ".join(f"{name} = {extent}" for name, extent in after.symbols))
    if after.uncounted or before.uncounted:
        lines.append(f"  without the arithmetic of {before.uncounted} → {after.uncounted} unknown operations")
    return lines


def parameter_count(graph: Graph) -> int:
    """How many numbers training would change: what torch counts over `module.parameters()`."""
    shapes = Counter(value.shape for value in trained_parameters(graph))
    return sum(count * _elements(shape, {}) for shape, count in shapes.items())


def own_parameter_count(body: Body) -> int:
    """As `parameter_count`, of a graph inside an operation: without those that the graph around it has."""
    return sum(_elements(value.shape, {}) for value in trained_parameters(body.graph) if value not in body.operands)


def trained_parameters(graph: Graph) -> list[Value]:
    """Parameters of floating dtype but for batch-norm statistics, each once however many operations share it."""
    read = {value for op in graph if op.kind is _K.BATCH_NORM for value in op.inputs[3:]}
    return [
        value
        for value in graph.parameters
        if (value.dtype is None or "float" in value.dtype) and not (value in read and _is_statistic(value))
    ]


def _is_statistic(value: Value) -> bool:
    return bool(value.uses) and all(op.kind is _K.BATCH_NORM and index >= 3 for op, index in value.uses)


def op_cost(op: Op, extents: Mapping[str, int] | None = None) -> Cost:
    """Cost of one operation on one call."""
    if all(value.constant for value in op.outputs):
        return Cost()
    return kind_cost(op.kind, op.inputs, op.outputs, op.attrs, extents)


class Sized(Protocol):
    """A tensor as far as costs go; equal ones are one tensor."""

    @property
    def shape(self) -> Shape | None:
        """Extents."""

    @property
    def dtype(self) -> str | None:
        """Element type."""


def kind_cost(
    kind: OpKind,
    inputs: Sequence[Sized | None],
    outputs: Sequence[Sized],
    attrs: Attrs,
    extents: Mapping[str, int] | None = None,
) -> Cost:
    """Cost of an operation of a kind, also of one that is only planned."""
    extents = extents or {}
    operands = [None if term is None else _Term(term.shape) for term in inputs]
    flops = _flops(kind, operands, [term.shape for term in outputs], attrs, extents)
    if kind in VIEWS:
        return Cost(flops, 0)
    read = dict.fromkeys(term for term in inputs if term is not None)
    written = sum(_nbytes(term, extents) for term in outputs)
    moved = written + sum(_nbytes(term, extents) for term in read)
    if kind in _LOOKUPS and inputs[0] is not None:
        moved -= max(0, _nbytes(inputs[0], extents) - written)
    return Cost(flops, moved)


def tensor_size(value: Value, extents: Mapping[str, int] | None = None) -> tuple[int, int]:
    """Elements and bytes of a value; 0 and 0 where its shape is unknown."""
    return _elements(value.shape, extents or {}), _nbytes(value, extents or {})


@dataclass(frozen=True, slots=True)
class _Term:
    """An operand while a fused operation is expanded: only its shape."""

    shape: Shape | None


def _flops(
    kind: OpKind, inputs: list[_Term | None], out: list[Shape | None], attrs: Attrs, extents: Mapping[str, int]
) -> int:
    attrs = {**kind.spec.attrs, **attrs}
    if kind.has(Trait.FUSED):
        return _fused_flops(kind, inputs, out, attrs, extents)
    counter = _COUNTERS.get(kind)
    if counter is not None:
        return counter(_Shapes(inputs, out, extents), attrs)
    if kind.has(Trait.FREE) or not out:
        return 0
    elements = _elements(out[0], extents)
    if kind.has(Trait.NORM):
        return 8 * elements
    if kind.has(Trait.ELEMENTWISE):
        return elements * max(1, len([term for term in inputs if term is not None]) - 1)
    if kind.has(Trait.REDUCTION) or kind is _K.CUMSUM:
        return _elements(inputs[0].shape, extents) if inputs and inputs[0] is not None else 0
    return 0


def _fused_flops(
    kind: OpKind, inputs: list[_Term | None], out: list[Shape | None], attrs: Attrs, extents: Mapping[str, int]
) -> int:
    region = program(kind, inputs, attrs)
    operands = [None if term is None else ValueType(term.shape, None) for term in inputs]
    types = step_types(region, operands, [ValueType(shape, None) for shape in out])
    shapes = [type_.shape if type_.shape is not None else out[0] for type_ in types]
    terms = [*inputs, *map(_Term, shapes)]
    total = 0
    for step, shape in zip(region.steps, shapes, strict=True):
        read = [None if index is None else terms[index] for index in step.inputs]
        total += _flops(step.kind, read, [shape], step.attrs, extents)
    return total


class _Shapes:
    """Extents of operands and outputs as numbers, by position."""

    def __init__(self, inputs: list[_Term | None], out: list[Shape | None], extents: Mapping[str, int]) -> None:
        self._inputs = inputs
        self._out = out
        self._extents = extents

    def operand(self, index: int) -> tuple[int, ...] | None:
        term = self._inputs[index] if index < len(self._inputs) else None
        return None if term is None or term.shape is None else self._numbers(term.shape)

    def size(self, index: int) -> int:
        shape = self.operand(index)
        return 0 if shape is None else math.prod(shape)

    @property
    def count(self) -> int:
        return len(self._inputs)

    @property
    def out(self) -> int:
        return _elements(self._out[0], self._extents) if self._out else 0

    def _numbers(self, shape: Shape) -> tuple[int, ...]:
        return tuple(_extent(dim, self._extents) for dim in shape)


def _conv(shapes: _Shapes, attrs: Attrs) -> int:
    weight = shapes.operand(1)
    if weight is None:
        return 0
    return shapes.out * (2 * math.prod(weight[1:]) + (shapes.size(2) > 0))


def _conv_transpose(shapes: _Shapes, attrs: Attrs) -> int:
    weight = shapes.operand(1)
    if weight is None:
        return 0
    return 2 * shapes.size(0) * math.prod(weight[1:]) + shapes.out * (shapes.size(2) > 0)


def _linear(shapes: _Shapes, attrs: Attrs) -> int:
    weight = shapes.operand(1)
    if weight is None or not weight:
        return 0
    inner = weight[-1] if attrs["transpose_weight"] else weight[0]
    return shapes.out * (2 * inner + (shapes.size(2) > 0))


def _matmul(shapes: _Shapes, attrs: Attrs) -> int:
    left = shapes.operand(0)
    return 2 * shapes.out * left[-1] if left else 0


def _attention(shapes: _Shapes, attrs: Attrs) -> int:
    q, k, v = shapes.operand(0), shapes.operand(1), shapes.operand(2)
    if q is None or k is None or v is None:
        return 0
    scores = math.prod(q[:-1]) * k[-2]
    return 2 * scores * (q[-1] + v[-1]) + 5 * scores


def _einsum(shapes: _Shapes, attrs: Attrs) -> int:
    extents: dict[str, int] = {}
    left = str(attrs["equation"]).partition("->")[0].replace(" ", "")
    for index, letters in enumerate(left.split(",")):
        shape = shapes.operand(index)
        if shape is None or "." in letters or len(letters) != len(shape):
            return 2 * shapes.out  # an ellipsis: at least one multiply-add for each output element
        extents.update(zip(letters, shape, strict=True))
    return 2 * math.prod(extents.values())


def _recurrent(shapes: _Shapes, attrs: Attrs) -> int:
    x = shapes.operand(0)
    if not x:
        return 0
    return 2 * math.prod(x[:-1]) * sum(shapes.size(index) for index in range(1, shapes.count))


def _pool(shapes: _Shapes, attrs: Attrs) -> int:
    return shapes.out * math.prod(int(extent) for extent in attrs["kernel"])


def _fft(shapes: _Shapes, attrs: Attrs) -> int:
    size = shapes.size(0)
    return int(5 * size * math.log2(size)) if size > 1 else 0


_COUNTERS: dict[OpKind, Callable[[_Shapes, Attrs], int]] = {
    _K.CONV: _conv,
    _K.CONV_TRANSPOSE: _conv_transpose,
    _K.LINEAR: _linear,
    _K.MATMUL: _matmul,
    _K.ATTENTION: _attention,
    _K.EINSUM: _einsum,
    _K.RECURRENT: _recurrent,
    _K.FFT: _fft,
    _K.MAX_POOL: _pool,
    _K.AVG_POOL: _pool,
    _K.ADAPTIVE_AVG_POOL: lambda shapes, attrs: shapes.size(0),
    _K.INTERPOLATE: lambda shapes, attrs: shapes.out * (1 if attrs["mode"] == "nearest" else 8),
    _K.BATCH_NORM: lambda shapes, attrs: shapes.out * (8 if attrs["training"] else 2),
    _K.SOFTMAX: lambda shapes, attrs: 5 * shapes.out,
}


# ---- extents -------------------------------------------------------------------------------------------------------


def _elements(shape: Shape | None, extents: Mapping[str, int]) -> int:
    """Number of elements; 0 where the shape is unknown."""
    if shape is None:
        return 0
    count = 1
    for dim in shape:
        count *= dim if isinstance(dim, int) else _extent(dim, extents)
    return count


def _nbytes(value: Sized, extents: Mapping[str, int]) -> int:
    return _elements(value.shape, extents) * _WIDTHS.get(value.dtype or "", _DEFAULT_WIDTH)


def _extent(dim: Dim, extents: Mapping[str, int]) -> int:
    """An extent as a number: by what `extents` says, otherwise 1."""
    known = extent_of(dim, extents, default=1)
    return 1 if known is None else known


def symbol_extents(graph: Graph, extents: Mapping[str, int]) -> tuple[tuple[str, int], ...]:
    """The symbolic extents of the graph's inputs, in order, each with what it counts as: 1 unless `extents` says."""
    found: dict[str, None] = {}
    for value in graph.inputs:
        found.update(dict.fromkeys(dim for dim in value.shape or () if isinstance(dim, str)))
    return tuple((name, extents.get(name, 1)) for name in found)
