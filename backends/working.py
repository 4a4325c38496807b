"""The lowering's own copy of a graph: cut to what the outputs need, and free to be rewritten."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from rescompile.extents import extent_of
from rescompile.fused_region import parse, step_types
from rescompile.graph import Attrs, Graph, Op, Role, Shape, Value, ValueType
from rescompile.kinds import OpKind, Trait
from rescompile.values import numpy_dtype

_NORMS = {OpKind.LAYER_NORM: "layer", OpKind.RMS_NORM: "rms"}


class WorkingGraph(Graph):
    """A graph in memory whose constants are read from the graph that it was copied from, when they are needed."""

    def __init__(self, name: str = "") -> None:
        super().__init__(name)
        self.source_ir = "memory"
        self.extents: dict[str, int] = {}  # what symbols stand for, where they were given a value

    def native_data(self, value: Value) -> np.ndarray[Any, Any]:
        """Contents of a constant, from the source graph or from a rewrite."""
        if isinstance(value.native, _Sourced):
            return value.native.graph.data(value.native.value)
        return np.asarray(value.native)

    def literal(self, stem: str, data: np.ndarray[Any, Any]) -> Value:
        """A new constant."""
        shape = tuple(int(extent) for extent in data.shape)
        return self.add_constant(self.unique_name(stem), shape, str(data.dtype), data, Role.CONSTANT)

    def put(
        self,
        kind: OpKind,
        inputs: list[Value | None],
        shape: Shape | None,
        dtype: str | None,
        attrs: Attrs | None = None,
        *,
        like: Op,
    ) -> Value:
        """The output of a new operation that stands in for `like`."""
        name = self.unique_name(f"{like.name}.{kind.value}")
        op = self.add_op(kind, inputs, [(name, ValueType(shape, dtype))], attrs, module=like.module)
        op.provenance = like.provenance
        self._dirty = True
        return op.output

    def settle(self) -> None:
        """Sort, and drop operations and constants that no output needs."""
        self.commit()
        live = set(self.outputs)
        for op in reversed(self.ops):
            if any(value in live for value in op.outputs):
                live.update(op.operands)
            else:
                self._unlink(op)
        self._orphans.clear()
        for value in list(self._values.values()):
            if value.role in (Role.PARAMETER, Role.CONSTANT) and not value.uses and value not in live:
                del self._values[value.name]
        self.commit()


class _Sourced:
    """Where a copied constant's contents are."""

    __slots__ = ("graph", "value")

    def __init__(self, graph: Graph, value: Value) -> None:
        self.graph = graph
        self.value = value


def _nothing(_: Op) -> bool:
    return False


def working_copy(graph: Graph, keeps: Callable[[Op], bool] = _nothing) -> WorkingGraph:
    """Copy what the outputs need. Operations keep their names, their native nodes and their order.

    keeps: whether a fused region has a kernel of its own; any other is written out, to be grouped for this machine.
    """
    live: set[Value] = set(graph.outputs)
    needed: list[Op] = []
    for op in reversed(graph.ops):
        if any(value in live for value in op.outputs):
            live.update(op.operands)
            needed.append(op)
    copy = WorkingGraph(graph.name)
    copy.source_ir = graph.ir
    twins: dict[Value, Value] = {}

    def twin(value: Value) -> Value:
        if value not in twins:
            twins[value] = copy.add_constant(
                value.name, value.shape, value.dtype, _Sourced(graph, value), role=value.role
            )
        return twins[value]

    for value in graph.inputs:
        twins[value] = copy.add_input(value.name, value.shape, value.dtype)
    for op in reversed(needed):
        inputs = [None if value is None else twin(value) for value in op.inputs]
        if op.kind is OpKind.FUSED_REGION and (_rounds_inside(op) or not keeps(op)):
            twins.update(zip(op.outputs, _write_out(copy, op, inputs), strict=True))
            continue
        if op.kind is OpKind.RMS_NORM and op.attr("stash_type"):
            twins[op.output] = _write_norm(copy, inputs, op.attrs, op.output.type, op.output.name, op.module)
            continue
        made = copy.add_op(
            op.kind,
            inputs,
            [(value.name, value.type) for value in op.outputs],
            dict(op.attrs),
            name=op.name,
            native=op.native,
            module=op.module,
        )
        made.provenance = op.provenance
        twins.update(zip(op.outputs, made.outputs, strict=True))
    copy.set_outputs([twin(value) for value in graph.outputs])
    return copy


def specialise(graph: WorkingGraph, extents: Mapping[str, int]) -> None:
    """Give symbols a value, in the shapes of all values."""
    for value in graph.values:
        if value.shape is not None and any(isinstance(dim, str) for dim in value.shape):
            known = [(dim, extent_of(dim, extents)) for dim in value.shape]
            value.shape = tuple(dim if number is None else number for dim, number in known)
    graph.extents = {**graph.extents, **extents}


def _write_out(copy: WorkingGraph, op: Op, inputs: list[Value | None]) -> list[Value]:
    """A region's operations, to be grouped anew for this machine; the values that stand for its outputs."""
    region = parse(op.attr("steps"))
    types = step_types(region, [None if x is None else x.type for x in op.inputs], [x.type for x in op.outputs])
    known = list(inputs)
    norms: list[Op] = []
    for index, (step, type_) in enumerate(zip(region.steps, types, strict=True), region.operands):
        if step.kind is OpKind.FULL:
            number = np.asarray(step.attrs["value"], dtype=numpy_dtype(type_.dtype or "float32"))
            known.append(copy.literal(f"{op.name}.number", number))
            continue
        named = [value.name for place, value in zip(region.outputs, op.outputs, strict=True) if place == index]
        name = named[0] if named else copy.unique_name(f"{op.name}.{step.kind.value}")
        operands = [None if place is None else known[place] for place in step.inputs]
        if step.kind is OpKind.RMS_NORM and step.attrs.get("stash_type"):
            known.append(_write_norm(copy, operands, step.attrs, type_, name, op.module))
            continue
        made = copy.add_op(step.kind, operands, [(name, type_)], step.settings(type_), name=name, module=op.module)
        made.provenance = op.provenance
        known.append(made.output)
        if step.kind in _NORMS:
            norms.append(made)
    for norm in norms:
        _join_norm(copy, norm)
    return [value for place in region.outputs if (value := known[place]) is not None]


def _rounds_inside(region: Op) -> bool:
    return any(step.attrs.get("stash_type") for step in parse(region.attr("steps")).steps)


def _write_norm(
    copy: WorkingGraph, inputs: Sequence[Value | None], attrs: Attrs, kind: ValueType, name: str, module: str
) -> Value:
    """An RMS norm that computes in a type narrower than its operand's, in operations that say where it rounds."""
    settings = {**OpKind.RMS_NORM.spec.attrs, **attrs}
    x, weight = inputs
    assert x is not None  # a norm reads something
    inner, rank = settings["stash_type"], len(kind.shape or ())

    def put(made: OpKind, operands: list[Value | None], shape: Shape | None, element: str | None, **more: Any) -> Value:
        label = copy.unique_name(f"{name}.{made.value}")
        return copy.add_op(made, operands, [(label, ValueType(shape, element))], more, name=label, module=module).output

    def cast(value: Value, dtype: str | None) -> Value:
        return value if value.dtype == dtype else put(OpKind.CAST, [value], value.shape, dtype, dtype=dtype)

    axes = tuple(range(settings["axis"] % rank, rank))
    column = None if kind.shape is None else (*kind.shape[: axes[0]], *(1 for _ in axes))
    narrow = cast(x, inner)
    square = put(OpKind.MUL, [narrow, narrow], kind.shape, inner)
    power = put(OpKind.MEAN, [square], column, inner, axes=axes, keepdims=True)
    eps = copy.literal(f"{name}.eps", np.asarray(settings["eps"], dtype=numpy_dtype(inner)))
    inverse = put(OpKind.RSQRT, [put(OpKind.ADD, [power, eps], column, inner)], column, inner)
    dtype = inner if settings["rounded"] else kind.dtype
    y = put(OpKind.MUL, [cast(x, dtype), cast(inverse, dtype)], kind.shape, dtype)
    if weight is not None:
        dtype = max((dtype, weight.dtype), key=lambda each: numpy_dtype(each or inner).itemsize)
        y = put(OpKind.MUL, [cast(y, dtype), cast(weight, dtype)], kind.shape, dtype)
    return put(OpKind.CAST, [y], kind.shape, kind.dtype, dtype=kind.dtype)


def _join_norm(copy: WorkingGraph, norm: Op) -> None:
    """A plain sum and the norm that reads it are one kernel, also where the region holds more."""
    total = norm.operands[0]
    join = total.producer
    if join is None or join.kind is not OpKind.ADD or len(join.operands) != 2 or norm.output.type != total.type:
        return
    one, other = join.operands
    if one is other or one.type != total.type or other.type != total.type or any(scale != 1 for scale in join.scales):
        return
    affine = [*norm.inputs[1:], None, None][:2]
    attrs = {"norm": _NORMS[norm.kind], "axis": norm.attr("axis"), "eps": norm.attr("eps")}
    outputs = [norm.output, total]
    copy.fuse([join, norm], OpKind.ADD_NORM, [one, other, *affine], outputs, attrs, name=norm.name)


def foldable(op: Op) -> bool:
    """Whether an operation on constants can be computed at compile time and its result kept instead of it."""
    if op.has(Trait.RANDOM) or any(_elements(value.shape) is None for value in op.outputs):
        return False
    if op.kind not in (OpKind.EXPAND, OpKind.TILE):
        return True
    # A broadcast of a constant costs less to repeat than to store.
    return (_elements(op.output.shape) or 0) <= 1 << 14


def _elements(shape: Shape | None) -> int | None:
    total = 1
    for extent in shape or ():
        if isinstance(extent, str):
            return None
        total *= extent
    return None if shape is None else total
