"""Operations that move elements, look them up, or make them out of nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tvm import relax, tirx

from rescompile.backends.emitter import Emitter, Expr
from rescompile.backends.layouts import CHANNELS_LAST, NATIVE, SWAP, SWAPPED, to_channels_first, to_channels_last
from rescompile.backends.lower_reduce import product
from rescompile.backends.symbols import Extent
from rescompile.errors import GraphError
from rescompile.graph import Op, Value
from rescompile.kinds import OpKind

R = relax.op


def reshape(e: Emitter, op: Op) -> None:
    """y has the elements of x in another shape. Merging or dropping spatial extents keeps channels last."""
    value = _input(op)
    have, want = value.shape, op.output.shape
    if (
        e.lies_channels_last(value)
        and have is not None
        and want is not None
        and len(want) >= 2
        and have[:2] == want[:2]
    ):
        spatial = have[2:]
        plain = e.get(value, CHANNELS_LAST)
        shape = e.shape(plain)
        if len(want) == 3:
            e.bind(op.output, e.reshape(plain, [shape[0], product(shape[1:-1]), shape[-1]]), CHANNELS_LAST)
            return
        if len(want) == 2 and all(extent == 1 for extent in spatial):
            e.bind(op.output, e.reshape(plain, [shape[0], shape[-1]]))
            return
        if len(want) > 3 and all(extent == 1 for extent in (*spatial, *want[2:])):
            e.bind(op.output, e.reshape(plain, [shape[0], *[1] * (len(want) - 2), shape[-1]]), CHANNELS_LAST)
            return
    native = e.get(value)
    if want is not None and len(want) in (3, 4) and have is not None and len(have) == 2 and have == want[:2]:
        # [N, C] → [N, C, 1, 1] lies channels last as well as first
        shape = e.shape(native)
        e.bind(op.output, e.reshape(native, [shape[0], *[1] * (len(want) - 2), shape[1]]), CHANNELS_LAST)
    e.bind(op.output, e.reshape(native, e.target_shape(op, native)))


def permute(e: Emitter, op: Op) -> None:
    """y[i_perm] = x[i]; a permutation between channels first and last is a change of name only."""
    value = _input(op)
    perm = tuple(op.attr("perm"))
    rank = len(perm)
    if rank >= 3 and perm == to_channels_last(rank) and e.lies_channels_last(value):
        e.bind(op.output, e.get(value, CHANNELS_LAST))
        return
    if perm == SWAP and e.has(value, SWAPPED):
        e.bind(op.output, e.get(value, SWAPPED))
        return
    if e.has(value, SWAPPED) and not e.has(value, NATIVE):
        # [a, b, c, d] lies as [a, c, b, d]: permute from there, perhaps by nothing
        e.bind(op.output, e.permute(e.get(value, SWAPPED), [SWAP[axis] for axis in perm]))
        return
    native = e.get(value)
    if rank >= 3 and perm == to_channels_first(rank):
        e.bind(op.output, native, CHANNELS_LAST)
        return
    if perm == SWAP:
        e.bind(op.output, native, SWAPPED)
        return
    e.bind(op.output, e.permute(native, perm))


def slice_(e: Emitter, op: Op) -> None:
    """y = x[starts:stops:steps] along `axes`"""
    value = _input(op)
    last = e.lies_channels_last(value)
    x = e.get(value, CHANNELS_LAST if last else NATIVE)
    shape = e.shape(x)
    place = _axis_in(last, len(shape))
    axes, starts, stops, steps = [], [], [], []
    backwards = []
    given = op.attr("steps") or (1,) * len(op.attr("axes"))
    for axis, start, stop, step in zip(op.attr("axes"), op.attr("starts"), op.attr("stops"), given, strict=True):
        at = place(axis)
        first, final = _bound(e, start, shape[at], 0), _bound(e, stop, shape[at], shape[at])
        if step < 0:
            if not isinstance(shape[at], int):
                raise GraphError(
                    f"'{op.name}' slices backwards along an extent of unknown size: it cannot be compiled."
                )
            first, final, backwards_step = _backwards(start, stop, step, shape[at])
            backwards.append(at)
            step = backwards_step
        axes.append(at)
        starts.append(first)
        stops.append(final)
        steps.append(step)
    out = x
    whole = all(
        start == 0 and isinstance(stop, int) and stop == shape[axis] and step == 1
        for axis, start, stop, step in zip(axes, starts, stops, steps, strict=True)
    )
    if not whole:
        out = e.slice(x, axes, starts, stops, steps)
    for axis in backwards:
        out = e.emit(R.flip(out, axis))
    if op.output.rank is not None and op.output.rank != len(shape):
        native = out if not last else e.permute(out, to_channels_first(len(shape)))
        e.bind(op.output, e.reshape(native, e.target_shape(op)))
        return
    e.bind(op.output, out, CHANNELS_LAST if last else NATIVE)


def split(e: Emitter, op: Op) -> None:
    """y_0, y_1, ... = consecutive parts of x along `axis`"""
    value = _input(op)
    last = e.lies_channels_last(value)
    x = e.get(value, CHANNELS_LAST if last else NATIVE)
    at = _axis_in(last, len(e.shape(x)))(op.attr("axis"))
    start = 0
    for output, size in zip(op.outputs, _split_sizes(op), strict=True):
        part = e.slice(x, [at], [start], [start + size])
        e.bind(output, part, CHANNELS_LAST if last else NATIVE)
        start += size


def concat(e: Emitter, op: Op) -> None:
    """y = x_0, x_1, ... joined along `axis`; nothing where they lie so already"""
    if e.join(op):
        return
    last = any(e.lies_channels_last(value) for value in op.operands)
    layout = CHANNELS_LAST if last else NATIVE
    parts = [e.cast(e.get(value, layout), op.output.dtype) for value in op.operands]
    at = _axis_in(last, len(e.shape(parts[0])))(op.attr("axis"))
    e.bind(op.output, e.emit(R.concat(parts, axis=at)), layout)


def expand(e: Emitter, op: Op) -> None:
    """y = x broadcast to the output's shape"""
    x = e.get(_input(op))
    shape = e.shape(x)
    want = e.target_shape(op)
    lead = len(want) - len(shape)
    want = [shape[axis - lead] if extent == -1 and axis >= lead else extent for axis, extent in enumerate(want)]
    e.bind(op.output, x if want == shape else e.emit(R.broadcast_to(x, tuple(want))))


def roll(e: Emitter, op: Op) -> None:
    """y[i] = x[i − shift mod extent] along each of `axes`"""
    x = e.get(_input(op))
    for axis, shift in zip(op.attr("axes"), op.attr("shifts"), strict=True):
        extent = e.shape(x)[axis]
        if not isinstance(extent, int):
            raise GraphError(f"'{op.name}' rolls along an extent of unknown size: it cannot be compiled.")
        cut = (extent - shift) % extent
        if cut:
            parts = [e.slice(x, [axis], [cut], [extent]), e.slice(x, [axis], [0], [cut])]
            x = e.emit(R.concat(parts, axis=axis))
    e.bind(op.output, x)


def flip(e: Emitter, op: Op) -> None:
    """y[i] = x[extent − 1 − i] along each of `axes`"""
    x = e.get(_input(op))
    for axis in op.attr("axes"):
        x = e.emit(R.flip(x, axis))
    e.bind(op.output, x)


def pad(e: Emitter, op: Op) -> None:
    """y = x with elements added (or, where negative, cut) at both ends of every dimension"""
    value = _input(op)
    last = e.lies_channels_last(value)
    x = e.get(value, CHANNELS_LAST if last else NATIVE)
    pads = list(op.attr("pads"))
    rank = len(pads) // 2
    order = to_channels_last(rank) if last else tuple(range(rank))
    sides = [(pads[axis], pads[rank + axis]) for axis in order]
    shape = e.shape(x)
    cut = [(axis, max(0, -a), max(0, -b)) for axis, (a, b) in enumerate(sides) if a < 0 or b < 0]
    if cut:
        x = e.slice(x, [c[0] for c in cut], [c[1] for c in cut], [shape[c[0]] - c[2] for c in cut])
    width = [max(0, side) for pair in sides for side in pair]
    if any(width):
        mode = op.attr("mode")
        x = e.emit(R.nn.pad(x, width, mode, float(op.attr("value") or 0.0) if mode == "constant" else 0.0))
    e.bind(op.output, x, CHANNELS_LAST if last else NATIVE)


def tile(e: Emitter, op: Op) -> None:
    """y = x repeated along every dimension"""
    e.bind(op.output, e.emit(R.tile(e.get(_input(op)), list(op.attr("repeats")))))


def embedding(e: Emitter, op: Op) -> None:
    """y[..., d] = weight[indices[...], d]"""
    weight, indices = op.operands
    e.bind(op.output, e.emit(R.take(e.get(weight), _indices(e, indices), axis=0, mode="wrap")))


def gather(e: Emitter, op: Op) -> None:
    """y = x[..., indices, ...] along `axis`; a negative index counts from the end"""
    value, indices = op.operands
    x, axis = e.get(value), op.attr("axis")
    at = _indices(e, indices)
    extent = e.shape(x)[axis]
    if e.is_literal(indices) and isinstance(extent, int):
        data = e.data(indices)
        at = e.weight(f"{indices.name}.from{extent}", lambda: data % extent)
        e.bind(op.output, e.emit(R.take(x, at, axis=axis, mode="fast")))
        return
    e.bind(op.output, e.emit(R.take(x, at, axis=axis, mode="wrap")))


def shape_(e: Emitter, op: Op) -> None:
    """y = the extents of x, or one of them, as int64"""
    x = e.get(_input(op))
    extents = e.shape(x)
    axis = op.attrs.get("axis", op.attrs.get("dim"))
    if axis is not None:
        extents = [extents[axis]]
    as_tensor = e.emit(R.shape_to_tensor(relax.ShapeExpr(extents)))
    if op.output.rank == 0:
        as_tensor = e.reshape(as_tensor, [])
    e.bind(op.output, e.cast(as_tensor, op.output.dtype))


def full(e: Emitter, op: Op) -> None:
    """y = value everywhere"""
    shape = e.target_shape(op)
    if -1 in shape:
        raise GraphError(f"'{op.name}' makes a tensor whose size does not follow from the inputs' shapes.")
    dtype = op.output.dtype or "float32"
    e.bind(op.output, e.emit(R.full(tuple(shape), e.scalar(op.attr("value"), dtype), dtype)))


def arange(e: Emitter, op: Op) -> None:
    """y[i] = start + i·step"""
    extent = e.target_shape(op)[0]
    if extent == -1:
        raise GraphError(f"'{op.name}' makes a tensor whose size does not follow from the inputs' shapes.")
    counted = e.emit(R.arange(0, extent, 1, "int64"))
    dtype = op.output.dtype or "int64"
    out = e.cast(counted, dtype)
    start, step = op.attr("start"), op.attr("step")
    if step != 1:
        out = e.emit(R.multiply(out, e.scalar(step, dtype)))
    if start != 0:
        out = e.emit(R.add(out, e.scalar(start, dtype)))
    e.bind(op.output, out)


def _input(op: Op) -> Value:
    value = op.inputs[0]
    if value is None:
        raise GraphError(f"'{op.name}' has no input.")
    return value


def _indices(e: Emitter, value: Value) -> Expr:
    return e.cast(e.get(value), "int64") if value.dtype not in ("int32", "int64") else e.get(value)


def _axis_in(last: bool, rank: int) -> Any:
    order = to_channels_last(rank) if last else tuple(range(rank))
    return lambda axis: order.index(axis % rank)


def _bound(e: Emitter, bound: Any, extent: Extent, default: Extent) -> Extent:
    if bound is None:
        return default
    if isinstance(bound, str):
        found = e.symbols.resolve(bound)
        if found is None:
            raise GraphError(f"A slice's bound '{bound}' does not follow from the inputs' shapes.")
        return found
    bound = int(bound)
    if isinstance(extent, int):
        return max(0, min(extent, bound + extent if bound < 0 else bound))
    if bound < 0:
        return tirx.max(extent + bound, 0)
    return extent if bound >= 1 << 31 else tirx.min(extent, bound) if bound else 0


def _backwards(start: Any, stop: Any, step: int, extent: int) -> tuple[int, int, int]:
    """The forward slice that a backward one reads, to be flipped."""
    picked = range(extent)[slice(start, None if stop is not None and stop < -extent else stop, step)]
    return picked[-1], picked[0] + 1, -step


def _split_sizes(op: Op) -> Sequence[int]:
    sizes = op.attr("sizes")
    if sizes:
        return tuple(sizes)
    axis = op.attr("axis")
    return tuple(int((value.shape or ())[axis]) for value in op.outputs)


MOVES = {
    OpKind.RESHAPE: reshape,
    OpKind.PERMUTE: permute,
    OpKind.SLICE: slice_,
    OpKind.SPLIT: split,
    OpKind.CONCAT: concat,
    OpKind.EXPAND: expand,
    OpKind.ROLL: roll,
    OpKind.FLIP: flip,
    OpKind.PAD: pad,
    OpKind.TILE: tile,
    OpKind.EMBEDDING: embedding,
    OpKind.GATHER: gather,
    OpKind.SHAPE: shape_,
    OpKind.FULL: full,
    OpKind.ARANGE: arange,
}
