"""Rules for what only moves elements: views, indexing, splitting, joining, padding, casts."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from rescompile.fx_rules import Rule, Site, Step, is_number
from rescompile.fx_types import static_shape
from rescompile.graph import Dim, Shape, ValueType
from rescompile.kinds import OpKind as K

_END = sys.maxsize


def _reshape(c: Site) -> Step:
    return Step(K.RESHAPE, [c["input"]])


def _view(c: Site) -> Step | None:
    return None if isinstance(c.get("dtype"), torch.dtype) else _reshape(c)


def _identity(c: Site) -> Step:
    return Step(K.IDENTITY, [c["input"]])


def _cast(c: Site) -> Step | None:
    """A conversion that changes the dtype is a cast; one that only moves, copies or lays out anew is nothing"""
    value = c.value(c["input"])
    dtype = c.out.dtype
    wanted = c.get("dtype")
    if dtype is None or value is None or value.dtype is None:
        return Step(K.CAST, [c["input"]], {"dtype": str(wanted)[6:]}) if wanted is not None else _identity(c)
    return _identity(c) if value.dtype == dtype else Step(K.CAST, [c["input"]], {"dtype": dtype})


def _named_cast(c: Site) -> Step:
    names = {"float": "float32", "half": "float16", "double": "float64", "int": "int32", "long": "int64"}
    dtype = names.get(c.name, c.name)
    value = c.value(c["input"])
    if value is not None and value.dtype == dtype:
        return _identity(c)
    return Step(K.CAST, [c["input"]], {"dtype": dtype})


def _permute(c: Site) -> Step:
    return Step(K.PERMUTE, [c["input"]], {"perm": c.axes(c["dims"])})


def _swap(c: Site, first: int, second: int) -> Step:
    rank = c.rank()
    if rank is None:
        return Step(K.PERMUTE, [c["input"]], {"perm": ()})
    perm = list(range(rank))
    first, second = c.axis(first), c.axis(second)
    perm[first], perm[second] = perm[second], perm[first]
    return Step(K.PERMUTE, [c["input"]], {"perm": tuple(perm)})


def _transpose(c: Site) -> Step:
    return _swap(c, c["dim0"], c["dim1"])


def _t(c: Site) -> Step:
    return _identity(c) if c.rank() in (0, 1) else _swap(c, 0, 1)


def _expand(c: Site) -> Step:
    shape = c.shape()
    return _identity(c) if shape is not None and shape == c.out.shape else Step(K.EXPAND, [c["input"]])


def _slice_attrs(axis: int, start: Any, stop: Any, step: Any, shape: Shape | None) -> dict[str, Any] | None:
    """Bounds clamped to the extent where it is known, counted from the front."""
    start, stop = (0 if start is None else start), (_END if stop is None else stop)
    if not all(isinstance(bound, int) for bound in (start, stop, step)):
        return None
    extent = shape[axis] if shape is not None else None
    if isinstance(extent, int):
        start = min(max(start + extent if start < 0 else start, 0), extent)
        stop = min(max(stop + extent if stop < 0 else stop, 0), extent)
    return {"axes": (axis,), "starts": (start,), "stops": (stop,), "steps": (step,)}


def _slice(c: Site) -> Step | None:
    axis = c.axis(c.get("dim", 0))
    attrs = _slice_attrs(axis, c.get("start"), c.get("end"), c.get("step", 1), c.shape())
    if attrs is None:
        # A bound that the graph computes: still nothing but a part of the operand.
        attrs = {"axes": (axis,), "starts": (None,), "stops": (None,), "steps": (c.get("step", 1),)}
    return Step(K.SLICE, [c["input"]], attrs)


def _narrow(c: Site) -> Step | None:
    start, length = c["start"], c["length"]
    if not isinstance(start, int) or not isinstance(length, int):
        return None
    attrs = _slice_attrs(c.axis(c["dim"]), start, start + length, 1, c.shape())
    return Step(K.SLICE, [c["input"]], attrs) if attrs is not None else None


def _select(c: Site) -> Step | None:
    axis, index = c.axis(c["dim"]), c["index"]
    if not isinstance(index, int):
        return None
    shape = c.shape()
    kept = None if shape is None else (*shape[:axis], 1, *shape[axis + 1 :])
    attrs = _slice_attrs(axis, index, _END if index == -1 else index + 1, 1, shape)
    if attrs is None:
        return None
    return Step(K.RESHAPE, [Step(K.SLICE, [c["input"]], attrs, suffix="slice", types=c.retype(kept))])


def _index(c: Site) -> Step | None:
    """x[:, index]: one index tensor, the other dimensions whole"""
    given = [(axis, index) for axis, index in enumerate(c["indices"]) if index is not None]
    if len(given) != 1:
        return None
    axis, index = given[0]
    value = c.value(index)
    if value is None or value.dtype not in ("int64", "int32"):
        return None
    return Step(K.GATHER, [c["input"], index], {"axis": axis})


def _getitem(c: Site) -> Step | None:
    """x[index] of a tensor, the index made of integers, slices, None and Ellipsis"""
    index = c["other"]
    items = list(index) if isinstance(index, tuple | list) else [index]
    shape = c.shape()
    consumed = sum(item is not None and item is not Ellipsis for item in items)
    first = 0
    if Ellipsis in [item for item in items if not isinstance(item, fx.Node)]:
        at = next(position for position, item in enumerate(items) if item is Ellipsis)
        if shape is not None:
            items[at : at + 1] = [slice(None)] * (len(shape) - consumed)
        elif at == 0 and all(isinstance(item, slice) for item in items[1:]):
            del items[0]
            first = -len(items)  # dimensions of a tensor of unknown rank, counted from the end
        else:
            return None
    if any(isinstance(item, fx.Node) or not (item is None or isinstance(item, int | slice)) for item in items):
        return None
    axis, reshaped = first, False
    cuts: list[tuple[int, dict[str, Any]]] = []
    for item in items:
        if item is None or isinstance(item, bool):
            reshaped = True
            continue
        if isinstance(item, int):
            reshaped = True
            attrs = _slice_attrs(axis, item, _END if item == -1 else item + 1, 1, shape)
        else:
            attrs = _slice_attrs(axis, item.start, item.stop, 1 if item.step is None else item.step, shape)
        if attrs is None:
            return None
        if not isinstance(item, slice) or item != slice(None):
            cuts.append((axis, attrs))
        axis += 1
    if not cuts:
        return _reshape(c) if reshaped else _identity(c)
    merged = {key: tuple(attrs[key][0] for _, attrs in cuts) for key in ("axes", "starts", "stops", "steps")}
    if not reshaped:
        return Step(K.SLICE, [c["input"]], merged)
    cut = Step(K.SLICE, [c["input"]], merged, suffix="slice", types=c.retype(_cut_shape(shape, merged)))
    return Step(K.RESHAPE, [cut])


def _cut_shape(shape: Shape | None, attrs: dict[str, tuple[int, ...]]) -> Shape | None:
    if shape is None:
        return None
    result = list(shape)
    bounds = zip(attrs["axes"], attrs["starts"], attrs["stops"], attrs["steps"], strict=True)
    for axis, start, stop, step in bounds:
        if not isinstance(result[axis], int) and (stop == _END or stop < 0 or start < 0):
            return None
        result[axis] = max(0, -(-(stop - start) // step))
    return tuple(result)


def _sizes(c: Site, axis: int) -> tuple[int, ...] | None:
    extents = [kind.shape[axis] if kind.shape is not None else None for kind in c.outs]
    if not extents or not all(isinstance(extent, int) for extent in extents):
        return None
    return tuple(extents)  # type: ignore[arg-type]


def _split(c: Site) -> Step:
    axis = c.axis(c.get("dim", 0))
    return Step(K.SPLIT, [c["input"]], {"axis": axis, "sizes": _sizes(c, axis) or ()}, types=c.outs)


def _unbind(c: Site) -> tuple[Step, ...] | None:
    shape, axis = c.shape(), c.axis(c.get("dim", 0))
    if shape is None or not isinstance(shape[axis], int):
        return None
    part = ValueType((*shape[:axis], 1, *shape[axis + 1 :]), c.out.dtype)
    count = int(shape[axis])
    split = Step(K.SPLIT, [c["input"]], {"axis": axis, "sizes": (1,) * count}, suffix="part", types=(part,) * count)
    return tuple(Step(K.RESHAPE, [(split, index)], types=(kind,)) for index, kind in enumerate(c.outs))


def _meshgrid(c: Site) -> tuple[Step, ...] | None:
    """Each vector along an axis of its own, repeated over the others: "xy" exchanges the first two axes"""
    tensors = c.get("tensors")
    if not isinstance(tensors, list | tuple) or any(kind.shape is None for kind in c.outs):
        return None
    rank = len(tensors)
    axes = list(range(rank))
    if c.get("indexing") == "xy" and rank > 1:
        axes[:2] = 1, 0
    steps: list[Step] = []
    for index, (x, axis, kind) in enumerate(zip(tensors, axes, c.outs, strict=True)):
        extent = kind.shape[axis] if kind.shape is not None else 1
        lone = ValueType((*(1,) * axis, extent, *(1,) * (rank - axis - 1)), kind.dtype)
        part = Step(K.RESHAPE, [x], suffix=f"part{index}", types=(lone,))
        steps.append(Step(K.EXPAND, [part], types=(kind,)))
    return tuple(steps)


def _concat(c: Site) -> Step:
    tensors = c.get("tensors", c.get("input"))
    tensors = list(tensors) if isinstance(tensors, list | tuple) else [tensors]
    dim = c.get("dim", 0)
    rank = len(c.out.shape) if c.out.shape is not None else None
    axis = dim + rank if dim < 0 and rank is not None else dim
    return Step(K.CONCAT, tensors, {"axis": axis})


def _stack(c: Site) -> Step | None:
    tensors, shape = c.get("tensors", c.get("input")), c.out.shape
    if not isinstance(tensors, list | tuple):
        return None
    dim = c.get("dim", 0)
    axis = dim + len(shape) if dim < 0 and shape is not None else dim
    part = c.retype(None if shape is None else (*shape[:axis], 1, *shape[axis + 1 :]))
    parts = [Step(K.RESHAPE, [x], suffix=f"part{index}", types=part) for index, x in enumerate(tensors)]
    return Step(K.CONCAT, parts, {"axis": axis})


def _pad(c: Site) -> Step | None:
    pads, rank = c.get("pad", c.get("padding")), c.rank()
    if rank is None or not all(isinstance(amount, int) for amount in pads):
        return None
    begins, ends = [0] * rank, [0] * rank
    for position in range(len(pads) // 2):
        begins[rank - 1 - position], ends[rank - 1 - position] = pads[2 * position], pads[2 * position + 1]
    mode = c.get("mode", "constant")
    if c.name not in ("pad", "constant_pad_nd"):
        mode = "reflect" if c.name.startswith("reflection") else "replicate"
    value = c.get("value") or 0
    return Step(K.PAD, [c["input"]], {"pads": (*begins, *ends), "mode": mode, "value": float(value)})


def _roll(c: Site) -> Step | None:
    shifts, dims = c["shifts"], c.get("dims") or ()
    if not dims:
        return None
    shifts = (shifts,) if isinstance(shifts, int) else tuple(shifts)
    return Step(K.ROLL, [c["input"]], {"axes": c.axes(dims), "shifts": shifts})


def _overwrite(c: Site) -> Step | None:
    """x with all elements replaced by those of `src`, broadcast and cast to x's type"""
    argument = c["src"] if "src" in c.args else c["value"]
    source = c.value(argument)
    if source is None or source.shape is None or c.out.shape is None:
        return None
    x: fx.Node | Step = argument
    if source.dtype != c.out.dtype:
        x = Step(K.CAST, [x], {"dtype": c.out.dtype}, suffix="cast", types=c.retype(source.shape))
    if source.shape != c.out.shape:
        return Step(K.EXPAND, [x])
    return x if isinstance(x, Step) else Step(K.IDENTITY, [x])


def _tile(c: Site) -> Step | None:
    repeats, shape = c.get("repeats", c.get("dims")), c.out.shape
    repeats = (repeats,) if isinstance(repeats, int) else repeats
    if not all(isinstance(count, int) for count in repeats) or shape is None or len(shape) != c.rank():
        return None
    return Step(K.TILE, [c["input"]], {"repeats": (1,) * (len(shape) - len(repeats)) + tuple(repeats)})


def _through(c: Site, inner: Sequence[Dim], perm: tuple[int, ...], outer: Sequence[Dim]) -> Step:
    """reshape to `inner`, permute, reshape to the result's shape"""
    split = Step(K.RESHAPE, [c["input"]], suffix="split", types=c.retype(tuple(inner)))
    turned = Step(K.PERMUTE, [split], {"perm": perm}, suffix="permuted", types=c.retype(tuple(outer)))
    return Step(K.RESHAPE, [turned])


def _pixel_shuffle(c: Site) -> Step | None:
    shape = static_shape(c.shape()[1:]) if c.rank() == 4 else None  # type: ignore[index]
    if shape is None:
        return None
    (channels, height, width), batch = shape, c.shape()[0]  # type: ignore[index]
    if c.name == "channel_shuffle":
        groups = c["groups"]
        inner = (batch, groups, channels // groups, height, width)
        return _through(c, inner, (0, 2, 1, 3, 4), (batch, channels // groups, groups, height, width))
    if c.name == "pixel_shuffle":
        r = c["upscale_factor"]
        depth = channels // (r * r)
        inner = (batch, depth, r, r, height, width)  # type: ignore[assignment]
        return _through(c, inner, (0, 1, 4, 2, 5, 3), (batch, depth, height, r, width, r))
    r = c["downscale_factor"]
    inner = (batch, channels, height // r, r, width // r, r)  # type: ignore[assignment]
    return _through(c, inner, (0, 1, 3, 5, 2, 4), (batch, channels, r, r, height // r, width // r))


_REDUCTIONS = {
    "sum": "add",
    "add": "add",
    "prod": "mul",
    "multiply": "mul",
    "amax": "max",
    "amin": "min",
    "mean": "mean",
}
_SOURCES = ("src", "source", "values", "value")


def _scatter(reduction: str) -> Rule:
    """x with `src` at the places that an index, or a range, names; the source is the last operand"""

    def rule(c: Site) -> Step | None:
        name = next((name for name in _SOURCES if name in c.args), None)
        how = "add" if c.get("accumulate") else _REDUCTIONS.get(c.get("reduce", ""), reduction)
        scale = c.get("alpha", 1)
        if name is None or not is_number(scale) or not c.get("include_self", True):
            return None
        source: Any = c[name]
        if scale != 1:
            source = Step(K.MUL, [source, scale], suffix="scaled", types=c.retype(c.shape(c[name])))
        places = [x for key, x in c.args.items() if key not in ("input", name) for x in _tensors(x)]
        dim = c.get("dim", 0)
        return Step(K.SCATTER, [c["input"], *places, source], {"axis": c.axis(dim), "reduction": how})

    return rule


def _tensors(argument: Any) -> list[fx.Node]:
    if isinstance(argument, list | tuple):
        return [node for item in argument for node in _tensors(item)]
    return [argument] if isinstance(argument, fx.Node) else []


_RESHAPES = ("reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "reshape_as", "view_as", "ravel")
_IDENTITIES = ("contiguous", "clone", "alias", "detach", "lift_fresh", "lift_fresh_copy", "identity", "positive")

SHAPE_RULES: dict[str, Rule] = {
    **dict.fromkeys(_RESHAPES, _reshape),
    "view": _view,
    **dict.fromkeys(_IDENTITIES, _identity),
    **dict.fromkeys(("to", "_to_copy", "type_as", "type", "_to_cpu"), _cast),
    **dict.fromkeys(("float", "half", "double", "bfloat16", "int", "long", "bool"), _named_cast),
    "permute": _permute,
    "transpose": _transpose,
    **dict.fromkeys(("t", "numpy_T"), _t),
    "mT": lambda c: _swap(c, -2, -1),
    **dict.fromkeys(("expand", "expand_as", "broadcast_to"), _expand),
    "slice": _slice,
    "narrow": _narrow,
    "select": _select,
    "index": _index,
    "index_select": lambda c: Step(K.GATHER, [c["input"], c["index"]], {"axis": c.axis(c["dim"])}),
    "getitem": _getitem,
    **dict.fromkeys(("split", "chunk", "split_with_sizes", "tensor_split"), _split),
    "unbind": _unbind,
    "meshgrid": _meshgrid,
    "cat": _concat,
    "stack": _stack,
    **dict.fromkeys(("pad", "constant_pad_nd"), _pad),
    **{f"{name}_pad{dims}d": _pad for name in ("reflection", "replication") for dims in (1, 2, 3)},
    "roll": _roll,
    "copy": _overwrite,
    "fill": lambda c: Step(K.FULL, [], {"value": c["value"]}) if is_number(c["value"]) else _overwrite(c),
    "flip": lambda c: Step(K.FLIP, [c["input"]], {"axes": c.axes(c["dims"])}),
    **dict.fromkeys(("repeat", "tile"), _tile),
    **dict.fromkeys(("pixel_shuffle", "pixel_unshuffle", "channel_shuffle", "native_channel_shuffle"), _pixel_shuffle),
    **dict.fromkeys(("scatter", "index_copy", "slice_scatter", "select_scatter", "index_put"), _scatter("none")),
    **dict.fromkeys(("masked_scatter", "diagonal_scatter", "as_strided_scatter"), _scatter("none")),
    **dict.fromkeys(("scatter_add", "index_add", "scatter_reduce", "index_reduce"), _scatter("add")),
}
