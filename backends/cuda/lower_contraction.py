"""Products and convolutions as calls of one tensor-core kernel each, epilogue included; what none takes goes to TVM.

Weights are read as [out, in], as torch keeps them, and convolutions run channels last. What is done to a weight alone
is done when compiling. What every kernel family refuses is lowered to Relax, whose loop nests are scheduled by rule.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from tvm import relax

from rescompile.backends.cuda import mma, wgmma
from rescompile.backends.cuda.contraction import BYTES, ContractionSpec
from rescompile.backends.cuda.contraction_products import Product, product_of
from rescompile.backends.cuda.epilogue_builder import SUM, Place, Tail, fused_tail
from rescompile.backends.cuda.scalars import refusal as scalar_refusal
from rescompile.backends.cuda.targets import Architecture
from rescompile.backends.emitter import Emitter, Expr
from rescompile.backends.fallback import NARROW
from rescompile.backends.layouts import CHANNELS_LAST
from rescompile.backends.lower_conv import conv_in_relax
from rescompile.backends.lower_linear import epilogue, matmul_of, residual_of, residual_value
from rescompile.backends.lower_linear import matmul as matmul_in_relax
from rescompile.backends.symbols import Extent
from rescompile.fused_region import Region, parse, step_types
from rescompile.graph import Op, Role, Value
from rescompile.kinds import OpKind, Trait

# The preferred one first; all have the same arguments. wgmma has to win a measurement: its machine code is for one
# compute capability, and no figures were taken yet.
FAMILIES: tuple[Any, ...] = (mma, wgmma)

_STEMS = {OpKind.CONV: "conv", OpKind.FUSED_CONV: "conv", OpKind.MATMUL: "matmul"}
_MULTIPLIES = (OpKind.LINEAR, OpKind.MATMUL, OpKind.CONV)
_FLOATS = ("float32", "float16", "bfloat16")


def families_for(spec: ContractionSpec, limits: Architecture) -> tuple[Any, ...]:
    """The kernel families that take a spec, the preferred one first."""
    return tuple(family for family in FAMILIES if not family.refusal(spec, limits))


def linear(e: Any, op: Op) -> None:
    """y = outer(residual + inner(x·weightᵀ + bias))"""
    if not _by_kernel(e, op):
        linear_in_relax(e, op)


def conv(e: Any, op: Op) -> None:
    """y = outer(residual + inner(conv(x) + bias)), channels last"""
    if not _by_kernel(e, op):
        conv_channels_last(e, op)


def matmul(e: Any, op: Op) -> None:
    """y = a·b over the last two dimensions, the others broadcast"""
    if not _by_kernel(e, op):
        matmul_in_relax(e, op)


def _by_kernel(e: Any, op: Op) -> bool:
    """Call one kernel for an operation and its epilogue; whether there is one."""
    made = product_of(op, e.tf32)
    if made is None:
        return False
    tail = Tail(made.shape, made.channels_last, made.batch_axes)
    if not fused_tail(tail, op, str(op.output.dtype or made.spec.dtype)):
        return False
    return _call(e, op, op, made, tail, list(op.outputs))


def _call(e: Any, op: Op, work: Op, made: Product, tail: Tail, outputs: list[Value]) -> bool:
    """Emit the call and bind the outputs; whether a family takes it."""
    spec = replace(made.spec, epilogue=tail.program())
    families = families_for(spec, e.choice.limits)
    if not families:
        return False
    extents = e.symbols.shape(made.shape)
    rows = _free(made, e)
    given = {**made.given(e), **tail.given(e)}
    given["a"], given["b"] = (e.cast(given[name], spec.dtype) for name in "ab")
    results = e.call_kernel(op, spec, families, _STEMS.get(work.kind, "linear"), given, rows)
    layout = (CHANNELS_LAST,) if made.channels_last else ()
    for value, result in zip(outputs, results, strict=True):
        e.bind(value, e.reshape(result, extents), *layout)
    return True


def _free(made: Product, e: Any) -> Extent | None:
    """The extent that the spec leaves to run time."""
    if not made.free:
        return None
    if made.channels_last:
        return e.symbols.resolve(made.free[0])
    total: Extent = 1
    dims = made.shape[:-1]
    if made.spec.rows is None and made.spec.batch not in (1, None):
        dims = dims[-1:]
    elif made.spec.batch is None:
        dims = dims[:-1]
    for dim in dims:
        total = total * e.symbols.resolve(dim)
    return total


# ---- regions --------------------------------------------------------------------------------------------------------


def region_refusal(op: Op, limits: Architecture, tf32: bool = False) -> str:
    """Why a fused region is not one contraction with an epilogue, one clause; empty when it is."""
    found = _described(op, tf32)
    if isinstance(found, str):
        return found
    _, made, tail = found
    spec = replace(made.spec, epilogue=tail.program())
    refused = [family.refusal(spec, limits) for family in FAMILIES]
    return "" if "" in refused else refused[0]


def region(e: Any, op: Op) -> bool:
    """Call one kernel for a region that multiplies and then goes on elementwise; whether there is one."""
    found = _described(op, e.tf32)
    if isinstance(found, str):
        return False
    work, made, tail = found
    return _call(e, op, work, made, tail, list(op.outputs))


def _described(op: Op, tf32: bool) -> tuple[Op, Product, Tail] | str:
    """The region's contraction, what it multiplies, and the epilogue; or why there is none."""
    program = parse(op.attr("steps"))
    types = step_types(program, [None if x is None else x.type for x in op.inputs], [x.type for x in op.outputs])
    working = [index for index, step in enumerate(program.steps) if step.kind.has(Trait.WORK)]
    if len(working) != 1 or program.steps[working[0]].kind not in _MULTIPLIES:
        return "it does not have exactly one product"
    at = working[0]
    step, result = program.steps[at], types[at]
    if any(place is not None and place >= program.operands for place in step.inputs):
        return "what its product reads is made inside"
    inputs = [None if place is None else op.inputs[place] for place in step.inputs]
    made_value = Value(f"{op.name}.product", result.shape, result.dtype, Role.RESULT)
    work = Op(step.kind, op.name, inputs, [made_value], dict(step.attrs))
    if result.shape is None:
        return "the shape of its product is not known"
    made = product_of(work, tf32)
    if made is None:
        return "its product has no kernel on tensor cores"
    tail = Tail(made.shape, made.channels_last, made.batch_axes)
    why = _steps(op, program, work, at, tail, [kind.dtype for kind in types])
    return why or (work, made, tail)


def _steps(op: Op, program: Region, work: Op, at: int, tail: Tail, dtypes: list[str | None]) -> str:
    """Add the region's steps after its product; why not, empty when done."""
    known: dict[int, Place] = {}
    first = program.operands

    def place(index: int) -> Place | None:
        if index not in known and index < first:
            value = op.inputs[index]
            read = None if value is None or value.dtype not in _FLOATS else tail.read(value)
            if read is None:
                return None
            known[index] = read
        return known.get(index)

    for index, step in enumerate(program.steps):
        if index == at:
            bias = work.operand("bias") if "bias?" in work.kind.spec.operands else None
            here: Place = SUM
            if bias is not None:
                read = tail.vector(bias, "bias")
                if read is None:
                    return "its bias is not one number for each column"
                here = tail.step(OpKind.ADD, [SUM, read])
        elif step.kind is OpKind.FULL:
            here = tail.step(OpKind.FULL, [], {"value": step.attrs["value"]})
        else:
            if step.kind in (OpKind.PRELU, OpKind.BATCH_NORM) or scalar_refusal(step.kind):
                return f"its step '{step.kind.value}' is no epilogue"
            if step.kind is OpKind.CAST and step.attrs.get("dtype", "float32") not in _FLOATS:
                return "it casts to what is no float"
            read_places = [None if operand is None else place(operand) for operand in step.inputs]
            places = [found for found in read_places if found is not None]
            if len(places) != len(read_places):
                return f"an operand of its step '{step.kind.value}' does not broadcast to the result"
            here = tail.step(step.kind, places, dict(step.attrs))
        dtype = dtypes[index]
        if first + index in program.outputs and dtype in ("float16", "bfloat16"):
            # Others read the rounded value, and so does what follows here.
            here = tail.step(OpKind.CAST, [here], {"dtype": dtype})
        known[first + index] = here
    for output, value in zip(program.outputs, op.outputs, strict=True):
        if output < first or value.dtype not in _FLOATS or value.shape != work.output.shape:
            return "an output is not of the product's shape"
        tail.outputs.append((known[output], str(value.dtype)))
    return "" if all(dtype in BYTES for _, dtype in tail.outputs) else "an output is no float"


# ---- what no kernel takes -------------------------------------------------------------------------------------------


def linear_in_relax(e: Emitter, op: Op) -> None:
    """The same in Relax operations, both operands along the summed axis."""
    x, weight = e.get(op.operands[0]), op.operands[1]
    if op.attr("transpose_weight"):
        matrix = e.emit(relax.op.permute_dims(e.cast(e.get(weight), e.dtype(x))))
    elif e.is_literal(weight) and weight.rank == 2:
        turned = e.weight(f"{weight.name}.transposed", lambda: e.data(weight).T)
        matrix = e.emit(relax.op.permute_dims(e.cast(turned, e.dtype(x))))
    else:
        matrix = e.cast(e.get(weight), e.dtype(x))
    out = epilogue(e, op, matmul_of(e, x, matrix), residual_of(e, op))
    e.bind(op.output, e.cast(out, op.output.dtype or e.dtype(x)))


def conv_channels_last(e: Emitter, op: Op) -> None:
    """The same in Relax operations, channels last."""
    value, weight = op.operands[:2]
    rank = (value.rank or 0) - 2
    if rank not in _CONVOLUTIONS:
        conv_in_relax(e, op)
        return
    function, data, kernel = _CONVOLUTIONS[rank]
    x = e.get(value, CHANNELS_LAST)
    dtype = e.dtype(x)
    out = e.emit(
        function(
            x,
            e.cast(e.get(weight, CHANNELS_LAST), dtype),
            strides=tuple(op.attr("stride"))[:rank],
            padding=tuple(op.attr("pads"))[: 2 * rank],
            dilation=tuple(op.attr("dilation"))[:rank],
            groups=int(op.attr("groups")),
            data_layout=data,
            kernel_layout=kernel,
            out_layout=data,
            out_dtype="float32" if dtype in NARROW else dtype,
        )
    )
    residual = residual_value(op)
    beside = None if residual is None else e.get(residual, CHANNELS_LAST)
    e.bind(op.output, e.cast(epilogue(e, op, out, beside), op.output.dtype or dtype), CHANNELS_LAST)


# Function, layout of the data and layout of the weight, by the number of spatial dimensions.
_CONVOLUTIONS: dict[int, tuple[Callable[..., Expr], str, str]] = {
    1: (relax.op.nn.conv1d, "NWC", "OWI"),
    2: (relax.op.nn.conv2d, "NHWC", "OHWI"),
    3: (relax.op.nn.conv3d, "NDHWC", "ODHWI"),
}
