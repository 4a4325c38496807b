"""The plain form of a contraction, loops without a schedule, and its schedule by the rules: a candidate beside kernels.

It is what MetaSchedule searches schedules for, too. As a kernel family it answers to what the others answer to.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import tvm
from tvm import te, tirx

from rescompile.backends.cuda import scalars
from rescompile.backends.cuda.contraction import ContractionSpec, EpilogueOperand
from rescompile.backends.cuda.contraction import arguments as contraction_arguments
from rescompile.backends.cuda.schedule import schedule_with_rules
from rescompile.backends.cuda.targets import Architecture, cuda_target
from rescompile.backends.kernels import Argument
from rescompile.kinds import OpKind

__all__ = ["RuleTile", "arguments", "candidates", "loops", "prim_func", "refusal"]

_LEAST = 16  # rows and columns of the smallest product that the rules schedule well


@dataclass(frozen=True)
class RuleTile:
    """The schedule that the rules find for an architecture."""

    arch: str

    def __str__(self) -> str:
        return "by rule"


def refusal(spec: Any, limits: Architecture) -> str:
    """Why there is no plain form that the rules schedule; empty when there is one."""
    if not isinstance(spec, ContractionSpec):
        return "only contractions have a plain form"
    if spec.rows is None or spec.batch is None:
        return "its extents are known at run time only"
    if any(output.dtype not in ("float32", spec.dtype) for output in spec.epilogue.outputs):
        return "its result is of another type"
    if any(operand.row and (operand.row_step != 1 or operand.row_cycle) for operand in spec.epilogue.operands):
        return "an operand's rows repeat"
    if min(spec.rows, spec.columns) < _LEAST or len(spec.epilogue.outputs) != 1:
        return "it is too small, or has several results"
    return "" if spec.conv is None or spec.batch == 1 else "groups have no plain form"


def candidates(spec: ContractionSpec, limits: Architecture) -> list[RuleTile]:
    """The one schedule that the rules find."""
    return [RuleTile(limits.name)]


def arguments(spec: ContractionSpec) -> list[Argument]:
    """As those of the other families."""
    return contraction_arguments(spec)


def prim_func(spec: ContractionSpec, tile: RuleTile, name: str) -> tvm.tirx.PrimFunc:
    """The scheduled loops. RescompileError when no rule binds them."""
    module = tvm.IRModule({name: loops(spec, name)})
    return schedule_with_rules(module, cuda_target(tile.arch)).module[name]


def loops(spec: ContractionSpec, name: str) -> tvm.tirx.PrimFunc:
    """acc[s, i, j] = sum over k of a[s, i, k]·b[s, j, k], then the epilogue, as loops."""
    given = {
        part.name: te.placeholder([int(extent or 1) for extent in part.shape], part.dtype, part.name)
        for part in arguments(spec)
        if not part.output
    }
    sums = _conv_sums(spec, given["a"], given["b"]) if spec.conv is not None else _sums(spec, given["a"], given["b"])
    output = spec.epilogue.outputs[0]
    shape = next(part.shape for part in arguments(spec) if part.output)

    def result(*index: Any) -> Any:
        places = [index if len(index) == 3 else (0, *index)]
        values = [sums(*index)]
        for operand in spec.epilogue.operands:
            values.append(_element(spec, operand, given[operand.name], places[0]).astype("float32"))
        for step in spec.epilogue.steps:
            values.append(_step(step.kind, step.settings, [values[place] for place in step.inputs]))
        return scalars.convert(values[output.value], output.dtype)

    y = te.compute([int(extent or 1) for extent in shape], result, name=output.name)
    function = te.create_prim_func([*given.values(), y])
    return function.with_attrs({"global_symbol": name, "tirx.noalias": True})


def _sums(spec: ContractionSpec, a: Any, b: Any) -> Any:
    k = te.reduce_axis((0, spec.depth), name="k")

    def factor(part: Any, share: int, depth_last: bool, s: Any, row: Any) -> Any:
        inner = (row, k) if depth_last else (k, row)
        lead = () if len(part.shape) == 2 else (s if share == 1 else s // share,)
        return part(*lead, *inner).astype("float32")

    def at(*index: Any) -> Any:
        s, i, j = index if len(index) == 3 else (0, *index)
        left = factor(a, spec.a_share, spec.a_depth_last, s, i)
        return te.sum(left * factor(b, spec.b_share, spec.b_depth_last, s, j), axis=[k])

    lead = () if spec.batch == 1 else (spec.batch,)
    return te.compute((*lead, spec.rows, spec.columns), at, name="sums")


def _conv_sums(spec: ContractionSpec, a: Any, b: Any) -> Any:
    conv = spec.conv
    if conv is None:
        return _sums(spec, a, b)
    channels = spec.depth // conv.taps
    top, left, _, _ = conv.pads
    ky, kx = te.reduce_axis((0, conv.kernel[0]), name="ky"), te.reduce_axis((0, conv.kernel[1]), name="kx")
    k = te.reduce_axis((0, channels), name="k")
    zero = tirx.const(0, spec.dtype)

    def at(n: Any, pixel: Any, j: Any) -> Any:
        y = pixel // conv.out_width * conv.stride[0] + ky * conv.dilation[0] - top
        x = pixel % conv.out_width * conv.stride[1] + kx * conv.dilation[1] - left
        value = a(n, y, x, k)
        if any(conv.pads):
            inside = tirx.all(y >= 0, y < conv.height, x >= 0, x < conv.width)
            value = tirx.if_then_else(inside, value, zero)
        return te.sum(value.astype("float32") * b(j, ky, kx, k).astype("float32"), axis=[ky, kx, k])

    return te.compute((conv.images, conv.pixels, spec.columns), at, name="sums")


def _element(spec: ContractionSpec, operand: EpilogueOperand, value: Any, place: tuple[Any, ...]) -> Any:
    if len(value.shape) == 1:
        return value(place[-1] if operand.column else place[-2] if operand.row else 0)
    if spec.conv is not None:
        return value(*place) if len(value.shape) == 3 else value(place[0], place[-1])
    lead = (place[0],) if operand.batch and spec.batch != 1 else ()
    rows = (place[1],) if operand.row else ()
    return value(*lead, *rows, *((place[2],) if operand.column else ()))


def _step(kind: OpKind, attrs: dict[str, Any], operands: list[Any]) -> Any:
    if kind is OpKind.FULL:
        return scalars.literal(attrs["value"], "float32")
    if kind is OpKind.CAST:
        return scalars.convert(scalars.convert(operands[0], str(attrs["dtype"])), "float32")
    return scalars.scalar(kind, attrs, operands)
