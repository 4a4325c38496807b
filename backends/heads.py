"""Find attention heads where they lie.

Models reach softmax(q·kᵀ)·v through projections, splits, reshapes and permutations, each spelled in its own way. What
counts is where the elements lie: the chain of views from q, k and v back to a common buffer is replayed on a numpy
view, and its strides are compared with the layout [batch, sequence, (q heads, k heads, v heads) × head_dim] that one
kernel reads directly. Three projections of the same value are first joined into one, with their weights stacked.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from rescompile.backends.working import WorkingGraph
from rescompile.graph import Op, Role, Value
from rescompile.kinds import OpKind

_VIEWS = frozenset((OpKind.RESHAPE, OpKind.PERMUTE, OpKind.SLICE, OpKind.SPLIT, OpKind.IDENTITY))


def pack_heads(graph: WorkingGraph) -> None:
    """Let every attention whose q, k, v lie side by side in one buffer read that buffer."""
    for op in [op for op in graph if op.kind is OpKind.ATTENTION]:
        _join_projections(graph, op)
    for op in [op for op in graph if op.kind is OpKind.ATTENTION]:
        packed = _packed_buffer(op)
        if packed is not None:
            op.attrs["packed"] = packed
    graph.settle()


def _join_projections(graph: WorkingGraph, op: Op) -> None:
    """linear(x, Wq), linear(x, Wk), linear(x, Wv) → slices of linear(x, [Wq; Wk; Wv])"""
    sources = [_view_source(value) for value in op.operands[:3]]
    linears = [source.producer for source in sources]
    if len({id(linear) for linear in linears}) != 3 or len({value.shape for value in sources}) > 3:
        return
    found = [linear for linear in linears if linear is not None and linear.kind is OpKind.LINEAR]
    if len(found) != 3 or len({id(linear.operands[0]) for linear in found}) != 1:
        return
    if any(not _is_literal(value) for linear in found for value in linear.operands[1:]):
        return
    if len({(linear.attr("transpose_weight"), linear.output.dtype) for linear in found}) != 1:
        return
    first = found[0]
    shape = first.output.shape
    if shape is None or any(linear.output.shape is None for linear in found):
        return
    axis = 0 if first.attr("transpose_weight") else 1
    weights = [graph.data(linear.operands[1]) for linear in found]
    if any(weight.ndim != 2 for weight in weights):
        return
    stacked = graph.literal(f"{first.name}.qkv.weight", np.concatenate(weights, axis))
    stacked.dtype = first.operands[1].dtype
    bias: Value | None = None
    biases = [linear.operand("bias") for linear in found]
    if any(value is not None for value in biases):
        parts = [
            np.zeros(weight.shape[axis], weight.dtype) if value is None else graph.data(value)
            for value, weight in zip(biases, weights, strict=True)
        ]
        bias = graph.literal(f"{first.name}.qkv.bias", np.concatenate(parts))
        bias.dtype = stacked.dtype
    widths = [weight.shape[axis] for weight in weights]
    joined = graph.put(
        OpKind.LINEAR,
        [first.operands[0], stacked, bias],
        (*shape[:-1], sum(widths)),
        first.output.dtype,
        dict(first.attrs),
        like=first,
    )
    start = 0
    for linear, width in zip(found, widths, strict=True):
        attrs = {"axes": (len(shape) - 1,), "starts": (start,), "stops": (start + width,), "steps": (1,)}
        part = graph.put(OpKind.SLICE, [joined], linear.output.shape, linear.output.dtype, attrs, like=linear)
        graph.replace_uses(linear.output, part)
        start += width
    graph.settle()


def _packed_buffer(op: Op) -> Value | None:
    """The value [batch, sequence, (heads + 2·kv_heads)·head_dim] that q, k and v are views of, or None."""
    q, k, v = op.operands[:3]
    shapes = [_static(value) for value in (q, k, v)]
    if any(shape is None or len(shape) != 4 for shape in shapes):
        return None
    (batch, heads, rows, dim), (_, shared, columns, _), (_, _, _, width) = (shape or () for shape in shapes)
    if rows != columns or dim != width:
        return None
    for source in _common_sources([q, k, v]):
        extents = _static(source)
        if extents is None or np.prod(extents) != batch * rows * (heads + 2 * shared) * dim:
            continue
        base = np.empty(extents, np.int8)
        views = [_replayed(value, source, base) for value in (q, k, v)]
        if any(view is None for view in views):
            continue
        line = (heads + 2 * shared) * dim
        starts = (0, heads * dim, (heads + shared) * dim)
        if all(
            view is not None and _lies_at(base, view, start, (rows * line, dim, line, 1))
            for view, start in zip(views, starts, strict=True)
        ):
            return source
    return None


def _view_source(value: Value) -> Value:
    """The value that a chain of views starts from."""
    while value.producer is not None and value.producer.kind in _VIEWS:
        value = value.producer.operands[0]
    return value


def _common_sources(values: list[Value]) -> list[Value]:
    """Values that all of `values` are views of, the nearest first."""
    chains = []
    for value in values:
        chain = [value]
        while chain[-1].producer is not None and chain[-1].producer.kind in _VIEWS:
            chain.append(chain[-1].producer.operands[0])
        chains.append(chain)
    return [value for value in chains[0] if all(value in chain for chain in chains[1:])]


def _replayed(value: Value, source: Value, base: np.ndarray[Any, Any]) -> np.ndarray[Any, Any] | None:
    """`value` as a numpy view of `base`, which stands for `source`; None where a copy would be needed."""
    steps: list[tuple[Op, Value]] = []
    while value is not source:
        op = value.producer
        if op is None or op.kind not in _VIEWS:
            return None
        steps.append((op, value))
        value = op.operands[0]
    view = base
    for op, output in reversed(steps):
        found = _step(op, output, view)
        if found is None:
            return None
        view = found
    return view


def _step(op: Op, output: Value, view: np.ndarray[Any, Any]) -> np.ndarray[Any, Any] | None:
    shape = _static(output)
    if shape is None:
        return None
    if op.kind is OpKind.PERMUTE:
        return view.transpose(op.attr("perm"))
    if op.kind is OpKind.SPLIT:
        axis = op.attr("axis")
        at = 0
        for sibling in op.outputs:
            if sibling is output:
                break
            at += int((sibling.shape or ())[axis])
        picked: list[Any] = [slice(None)] * view.ndim
        picked[axis] = slice(at, at + shape[axis])
        part: np.ndarray[Any, Any] = view[tuple(picked)]
        return part
    if op.kind is OpKind.SLICE:
        picked = [slice(None)] * view.ndim
        steps = op.attr("steps") or (1,) * len(op.attr("axes"))
        for axis, start, stop, step in zip(op.attr("axes"), op.attr("starts"), op.attr("stops"), steps, strict=True):
            if any(isinstance(bound, str) for bound in (start, stop)):
                return None
            picked[axis] = slice(start, stop, step)
        view = view[tuple(picked)]
    if view.shape == shape:
        return view
    try:
        copy = view.view()
        copy.shape = shape
    except AttributeError:
        return None
    return copy


def _lies_at(
    base: np.ndarray[Any, Any], view: np.ndarray[Any, Any], start: int, strides: tuple[int, int, int, int]
) -> bool:
    """Whether the view starts at an element and has these strides along each extent that is not 1."""
    offset = view.__array_interface__["data"][0] - base.__array_interface__["data"][0]
    return offset == start and all(
        extent == 1 or have == want for extent, have, want in zip(view.shape, view.strides, strides, strict=True)
    )


def _static(value: Value) -> tuple[int, ...] | None:
    shape = value.shape
    if shape is None or any(isinstance(extent, str) for extent in shape):
        return None
    return tuple(int(extent) for extent in shape)


def _is_literal(value: Value) -> bool:
    return value.role in (Role.PARAMETER, Role.CONSTANT)
