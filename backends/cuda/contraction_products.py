"""What an operation of the graph multiplies: the spec of its product and where the two operands' buffers come from.

Nothing here emits code until `given` is called: whether there is a kernel is known from shapes and types alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Any, TypeAlias

import numpy as np
from tvm import relax

from rescompile.backends.cuda.contraction import NARROW, ContractionSpec, ConvGeometry, EpilogueProgram
from rescompile.backends.emitter import Emitter, Expr
from rescompile.backends.layouts import CHANNELS_LAST, pair, spatial_pads, to_channels_last
from rescompile.graph import Op, Role, Value
from rescompile.kinds import OpKind
from rescompile.values import Shape

Make: TypeAlias = Callable[[Emitter], dict[str, Expr]]

_WHOLE_ACCESS = 4  # elements: a convolution's channels are padded to a multiple, so that a copy moves 8 bytes


@dataclass(frozen=True)
class Product:
    """A contraction without its epilogue; `shape`: of its result, columns last; `free`: extents left to run time."""

    spec: ContractionSpec
    shape: Shape
    given: Make
    free: tuple[str, ...] = ()
    channels_last: bool = False
    batch_axes: int = 0


def product_of(op: Op, tf32: bool) -> Product | None:
    """The product of a linear, a convolution or a product of two results; None where none of the kernels has it."""
    values = op.operands[:2]
    if any(value.shape is None for value in values) or op.output.shape is None:
        return None
    dtypes = {value.dtype for value in values}
    if len(dtypes) != 1 or not dtypes <= {*NARROW, *(("float32",) if tf32 else ())}:
        return None
    if any(extent == 0 for value in values for extent in value.shape or ()):
        return None
    rule = _RULES.get(op.kind)
    return None if rule is None else rule(op, str(values[0].dtype))


def _linear(op: Op, dtype: str) -> Product | None:
    x, weight = op.operands[:2]
    if weight.rank != 2 or not x.rank or not all(isinstance(extent, int) for extent in weight.shape or ()):
        return None
    lead = tuple(x.shape or ())[:-1]
    outside, inside = (int(extent) for extent in weight.shape or ())
    literal = weight.role in (Role.PARAMETER, Role.CONSTANT)
    if not op.attr("transpose_weight"):
        outside, inside = inside, outside
    turned = bool(op.attr("transpose_weight")) or literal
    rows, free = _extent(lead)
    spec = ContractionSpec(rows, outside, inside, _plain(dtype), dtype=dtype, b_depth_last=turned)

    def given(e: Emitter) -> dict[str, Expr]:
        if op.attr("transpose_weight") or not literal:
            return {"a": e.get(x), "b": e.get(weight)}
        return {"a": e.get(x), "b": e.weight(f"{weight.name}.transposed", lambda: e.data(weight).T)}

    return Product(spec, (*lead, outside), given, free)


def _matmul(op: Op, dtype: str) -> Product | None:
    a, b = op.operands[:2]
    if (a.rank or 0) < 2 or (b.rank or 0) < 2:
        return None
    a_last, b_last = True, False
    source_a, source_b = _unturned(a), _unturned(b)
    if source_a is not None:
        a_last = False
    if source_b is not None:
        b_last = True
    (*lead_a, rows, depth), (*lead_b, _, columns) = tuple(a.shape or ()), tuple(b.shape or ())
    if not isinstance(depth, int) or not isinstance(columns, int):
        return None
    left, right = source_a or a, source_b or b

    def given(e: Emitter) -> dict[str, Expr]:
        return {"a": e.get(left), "b": e.get(right)}

    shape = tuple(op.output.shape or ())
    one_b = all(extent == 1 for extent in lead_b)
    if one_b and a_last:
        count, free = _extent((*lead_a, rows))
        spec = ContractionSpec(count, columns, depth, _plain(dtype), dtype=dtype, b_depth_last=b_last)
        return Product(spec, shape, given, free)
    lead = shape[:-2]
    batch, free = _extent(lead)
    shares = []
    for own in (lead_a, lead_b):
        if all(extent == 1 for extent in own):
            shares.append(0)
        elif tuple(own) == tuple(lead):
            shares.append(1)
        else:
            return None
    if not isinstance(rows, int):
        if batch is None:
            return None
        free = (rows,)
    count = rows if isinstance(rows, int) else None
    if not a_last and count is None:
        return None
    spec = ContractionSpec(
        count,
        columns,
        depth,
        _plain(dtype),
        batch,
        dtype,
        a_depth_last=a_last,
        b_depth_last=b_last,
        a_share=shares[0],
        b_share=shares[1],
    )
    return Product(spec, shape, given, free, batch_axes=len(lead))


def _unturned(value: Value) -> Value | None:
    """What a value is the transpose of, in its last two axes."""
    op = value.producer
    if op is None or op.kind is not OpKind.PERMUTE:
        return None
    rank = value.rank or 0
    turned = (*range(rank - 2), rank - 1, rank - 2)
    source = op.operands[0]
    return source if tuple(op.attr("perm")) == turned and source.dtype == value.dtype else None


def _conv(op: Op, dtype: str) -> Product | None:
    x, weight = op.operands[:2]
    if x.rank not in (3, 4) or weight.rank != x.rank:
        return None
    flat = x.rank == 3
    images, channels, *spatial = tuple(x.shape or ())
    extents = [*spatial, *(weight.shape or ())]
    if not isinstance(channels, int) or not all(isinstance(extent, int) for extent in extents):
        return None
    height, width = ([1, *spatial] if flat else spatial)[:2]
    out, each, *kernel = (int(extent) for extent in weight.shape or ())
    groups = int(op.attr("groups"))
    padded = each
    # Three channels are copied two bytes at a time, four as one access: the layout is changed anyway.
    if groups == 1 and weight.role in (Role.PARAMETER, Role.CONSTANT):
        padded = -(-each // _WHOLE_ACCESS) * _WHOLE_ACCESS
    geometry = ConvGeometry(
        int(images) if isinstance(images, int) else None,
        int(height),
        int(width),
        pair(kernel, flat),
        pair(op.attr("stride"), flat),
        spatial_pads(op),
        pair(op.attr("dilation"), flat),
    )
    if min(geometry.out_height, geometry.out_width) < 1:
        return None
    rows = None if geometry.images is None else geometry.images * geometry.pixels
    spec = ContractionSpec(rows, out // groups, geometry.taps * padded, _plain(dtype), groups, dtype, conv=geometry)
    extra = padded - each

    def given(e: Emitter) -> dict[str, Expr]:
        image = e.get(x, CHANNELS_LAST)
        if not extra:
            return {"a": image, "b": e.get(weight, CHANNELS_LAST)}
        image = e.emit(relax.op.nn.pad(image, [0, 0] * (len(e.shape(image)) - 1) + [0, extra]))
        widened = e.weight(f"{weight.name}.channels_last.{padded}", lambda: _padded(e, weight, extra))
        return {"a": image, "b": widened}

    order = to_channels_last(x.rank)
    shape = tuple((op.output.shape or ())[axis] for axis in order)
    return Product(spec, shape, given, () if isinstance(images, int) else (str(images),), channels_last=True)


def _padded(e: Emitter, weight: Value, extra: int) -> np.ndarray[Any, Any]:
    data = e.data(weight)
    wide = np.zeros((data.shape[0], data.shape[1] + extra, *data.shape[2:]), data.dtype)
    wide[:, : data.shape[1]] = data
    return wide.transpose(to_channels_last(data.ndim))


def _extent(dims: Shape) -> tuple[int | None, tuple[str, ...]]:
    """The product of extents, None where one is left to run time, and those that are."""
    free = tuple(str(extent) for extent in dims if not isinstance(extent, int))
    return (None if free else prod(int(extent) for extent in dims)), free


def _plain(dtype: str) -> EpilogueProgram:
    return EpilogueProgram.plain(dtype)


_RULES: dict[OpKind, Callable[[Op, str], Product | None]] = {
    OpKind.LINEAR: _linear,
    OpKind.FUSED_LINEAR: _linear,
    OpKind.MATMUL: _matmul,
    OpKind.CONV: _conv,
    OpKind.FUSED_CONV: _conv,
}
