"""Fused regions and norms as calls of one GPU kernel each.

A region that multiplies goes to the tensor-core kernels, one that memory bounds to `region_kernel`: norms over rows and
elements, with the views between them as index arithmetic. Operands are read as they lie, channels
last or not, and outputs lie as the largest operand does. What no kernel takes is written out before it is lowered.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from rescompile.backends.cuda import lower_contraction, region_kernel
from rescompile.backends.cuda.region_spec import NORMS, VIEWS, RegionSpec, Tensor
from rescompile.backends.cuda.targets import Architecture
from rescompile.backends.layouts import CHANNELS_LAST, NATIVE, Layout, to_channels_last
from rescompile.backends.lower_norm import add_norm as add_norm_in_relax
from rescompile.backends.lower_norm import group_norm as group_norm_in_relax
from rescompile.backends.lower_norm import layer_norm as layer_norm_in_relax
from rescompile.backends.rules import RULES, Rule
from rescompile.backends.symbols import Extent
from rescompile.errors import GraphError
from rescompile.fused_region import Region, Step, parse, step_types
from rescompile.graph import Op, Role, Value
from rescompile.kinds import OpKind, Trait

K = OpKind
Order: TypeAlias = tuple[int, ...]


class KeptRegions:
    """Which fused regions of a graph have a kernel of their own; `refused` says why others have none."""

    def __init__(self, limits: Architecture, ir: str, *, tf32: bool = False) -> None:
        self.limits, self.ir, self.tf32 = limits, ir, tf32
        self.refused: dict[str, str] = {}

    def __call__(self, op: Op) -> bool:
        reason = refusal(op, self.limits, self.ir, tf32=self.tf32)
        if reason:
            self.refused[op.name] = reason
        return not reason

    def note(self) -> str:
        """What is said of the others in a program's notes; empty where there are none."""
        reasons: dict[str, int] = {}
        for reason in self.refused.values():
            reasons[reason] = reasons.get(reason, 0) + 1
        counted = "; ".join(f"{count}: {reason}" for reason, count in reasons.items())
        return f"{len(self.refused)} fused regions have no kernel and are written out ({counted})" if counted else ""


def refusal(op: Op, limits: Architecture, ir: str, *, tf32: bool = False) -> str:
    """Why no GPU kernel computes a fused region, one clause; empty where one does."""
    program = parse(op.attr("steps"))
    if any(value is None or value.shape is None or value.dtype is None for value in (*op.inputs, *op.outputs)):
        return "an operand's shape or type is not known"
    if all(value.constant for value in op.operands):
        return "all that it reads is constant: it is computed beforehand"
    if _multiplies(program):
        reason = lower_contraction.region_refusal(op, limits, tf32)
        return reason and (_refused_rest(op, program, limits, ir) and reason)
    named = {dim for value in op.operands for dim in value.shape or () if isinstance(dim, str)}
    if any(isinstance(dim, str) and dim not in named for value in op.outputs for dim in value.shape or ()):
        return "an extent of its result is none of its operands'"
    spec = _spec(program.text(), op.operands, op.outputs, {}, ir)
    return region_kernel.refusal(spec, limits)


def fused_region(e: Any, op: Op) -> None:
    """Several operations in one kernel"""
    program = parse(op.attr("steps"))
    if _multiplies(program):
        made = lower_contraction.region(e, op) or _call_rest(e, op, program)
    else:
        made = _call(e, op, program, op.operands, op.outputs)
    if not made:
        raise GraphError(f"No GPU kernel computes the fused region '{op.name}': unfuse the model first.")


# ---- a product, and then all the rest -------------------------------------------------------------------------------


def _multiplies(program: Region) -> bool:
    return any(_works(step) for step in program.steps)


def _works(step: Step) -> bool:
    return step.kind.has(Trait.WORK) and not step.kind.has(Trait.NORM)


def _split(op: Op, program: Region) -> tuple[Op, Region, list[Value]] | None:
    """The product of a region as an operation of its own, and the rest, which has the product as its last operand.

    None where there is not one product of operands, or where what follows is no more than an epilogue.
    """
    at = [index for index, step in enumerate(program.steps) if _works(step)]
    if len(at) != 1 or all(step.kind not in _MOVES | NORMS for step in program.steps):
        return None
    step = program.steps[at[0]]
    if step.kind not in _PRODUCTS or any(place is not None and place >= program.operands for place in step.inputs):
        return None
    types = step_types(program, [value.type for value in op.operands], [value.type for value in op.outputs])
    result = Value(f"{op.name}.product", types[at[0]].shape, types[at[0]].dtype, Role.RESULT)
    if result.shape is None or result.dtype is None or program.operands + at[0] in program.outputs:
        return None
    inputs = [None if place is None else op.operands[place] for place in step.inputs]
    attrs = {**step.kind.spec.attrs, **step.attrs}
    product = Op(step.kind, f"{op.name}.product", inputs, [result], attrs)
    result.producer = product
    # The product becomes the next operand: steps before it move up by one, those behind it stay.
    place = program.operands + at[0]

    def moved(value: int | None) -> int | None:
        if value is None or value < program.operands:
            return value
        return program.operands if value == place else value + (value < place)

    steps = tuple(
        Step(other.kind, tuple(moved(value) for value in other.inputs), other.attrs)
        for other in program.steps
        if other is not step
    )
    outputs = tuple(moved(value) or 0 for value in program.outputs)
    return product, Region(program.operands + 1, steps, outputs), [*op.operands, result]


def _refused_rest(op: Op, program: Region, limits: Architecture, ir: str) -> str:
    split = _split(op, program)
    if split is None:
        return "what follows its product is an epilogue"
    _, rest, operands = split
    return region_kernel.refusal(_spec(*_used(rest, operands), op.outputs, {}, ir), limits)


def _call_rest(e: Any, op: Op, program: Region) -> bool:
    """Emit the product by the rule for its kind, and one kernel for the rest."""
    split = _split(op, program)
    if split is None:
        return False
    product, rest, operands = split
    _PRODUCTS[product.kind](e, product)
    steps, used = _used(rest, operands)
    return _call(e, op, parse(steps), used, op.outputs)


def _used(program: Region, operands: Sequence[Value]) -> tuple[str, list[Value]]:
    """The program with the operands that it reads, and no others."""
    read = {value for step in program.steps for value in step.inputs if value is not None} | {*program.outputs}
    kept = [index for index in range(program.operands) if index in read]
    places = {old: new for new, old in enumerate(kept)}
    gone = program.operands - len(kept)

    def moved(value: int) -> int:
        return places[value] if value < program.operands else value - gone

    steps = tuple(
        Step(step.kind, tuple(None if value is None else moved(value) for value in step.inputs), step.attrs)
        for step in program.steps
    )
    outputs = tuple(moved(value) for value in program.outputs)
    return Region(len(kept), steps, outputs).text(), [operands[index] for index in kept]


# ---- norms of their own ---------------------------------------------------------------------------------------------


def layer_norm(e: Any, op: Op) -> None:
    """y = N(x)·weight + bias over the dimensions from `axis` to the last"""
    if not _call_norm(e, op):
        layer_norm_in_relax(e, op)


def group_norm(e: Any, op: Op) -> None:
    """y = (x − mean) / sqrt(var + eps)·weight + bias over groups of channels"""
    if not _call_norm(e, op):
        group_norm_in_relax(e, op)


def joined_norm(e: Any, op: Op) -> None:
    """sum = x + residual; y = N(sum); outputs y, sum"""
    places: dict[Value, int] = {}
    for value in op.operands:
        places.setdefault(value, len(places))
    count = len(places)
    rms = op.attr("norm") == "rms"
    affine = [None if value is None else places[value] for value in [*op.inputs[2:], None, None][: 1 if rms else 2]]
    attrs = {"axis": op.attr("axis") % (op.operands[0].rank or 1), "eps": op.attr("eps")}
    one, other = op.operands[:2]
    steps = (
        Step(K.ADD, (places[one], places[other])),
        Step(K.RMS_NORM if rms else K.LAYER_NORM, (count, *affine), attrs),
    )
    same = one.shape == other.shape is not None and one.dtype == other.dtype == op.outputs[1].dtype
    program = Region(count, steps, (count + 1, count))
    if not same or not _call(e, op, program, list(places), op.outputs):
        add_norm_in_relax(e, op)


def _call_norm(e: Any, op: Op) -> bool:
    present = list(dict.fromkeys(op.operands))
    inputs = tuple(None if value is None else present.index(value) for value in op.inputs)
    wanted = 2 if op.kind is K.RMS_NORM else 3
    attrs = {name: op.attr(name) for name in op.kind.spec.attrs}
    if "axis" in attrs:
        attrs["axis"] %= op.operands[0].rank or 1
    step = Step(op.kind, (*inputs, None, None)[:wanted], attrs)
    return _call(e, op, Region(len(present), (step,), (len(present),)), present, op.outputs)


def _call(e: Any, op: Op, program: Region, operands: Sequence[Value], outputs: Sequence[Value]) -> bool:
    """Emit the call and bind the outputs; whether there is a kernel."""
    if any(value.shape is None or value.dtype is None for value in (*operands, *outputs)):
        return False
    for layouts in (_layouts(e, operands, outputs), {}):
        orders = {value: to_channels_last(value.rank or 0) for value in layouts}
        spec = _spec(program.text(), operands, outputs, orders, e.graph.source_ir)
        if not region_kernel.refusal(spec, e.limits):
            _emit(e, op, spec, operands, outputs, layouts)
            return True
    return False


def _emit(
    e: Any,
    op: Op,
    spec: RegionSpec,
    operands: Sequence[Value],
    outputs: Sequence[Value],
    layouts: Mapping[Value, Layout],
) -> None:
    given = {f"x{i}": e.get(value, layouts.get(value, NATIVE)) for i, value in enumerate(operands)}
    extents = {name: e.shape(expr) for name, expr in given.items()}
    named: dict[str, Extent] = {}
    for (name, _), tensor in zip(given.items(), spec.operands, strict=True):
        for dim, found in zip(tensor.lying, extents[name], strict=True):
            if isinstance(dim, str):
                named.setdefault(dim, found)
    for index, tensor in enumerate(spec.outputs):
        extents[f"y{index}"] = [named[dim] if isinstance(dim, str) else dim for dim in tensor.lying]
    results = e.call_kernel(op, spec, region_kernel, _stem(spec), given, extents)
    for value, result in zip(outputs, results, strict=True):
        e.bind(value, result, layouts.get(value, NATIVE))


def _layouts(e: Any, operands: Sequence[Value], outputs: Sequence[Value]) -> dict[Value, Layout]:
    """The values that are read and written channels last: those that lie so, where the largest of them does."""
    images = [value for value in operands if (value.rank or 0) >= 3]
    last = [value for value in images if e.lies_channels_last(value)]
    if not last or max(map(_elements, last)) < max(map(_elements, images)):
        return {}
    ranks = {value.rank for value in last}
    literal = [value for value in images if e.is_literal(value) and value.rank in ranks]
    return dict.fromkeys([*last, *literal, *(value for value in outputs if value.rank in ranks)], CHANNELS_LAST)


def _elements(value: Value) -> int:
    total = 1
    for dim in value.shape or ():
        total *= dim if isinstance(dim, int) else 1
    return total


def _spec(
    steps: str, operands: Sequence[Value], outputs: Sequence[Value], orders: Mapping[Value, Order], ir: str
) -> RegionSpec:
    def tensor(value: Value) -> Tensor:
        return Tensor(tuple(value.shape or ()), str(value.dtype), orders.get(value, ()))

    slopes_last = ir == "onnx" and any(step.kind is K.PRELU for step in parse(steps).steps)
    return RegionSpec(steps, tuple(map(tensor, operands)), tuple(map(tensor, outputs)), slopes_last)


def _stem(spec: RegionSpec) -> str:
    kinds = {step.kind for step in spec.region.steps}
    if kinds & NORMS:
        return "norm"
    return "concat" if K.CONCAT in kinds else "elementwise"


_MOVES = VIEWS | {K.CONCAT}
_PRODUCTS: dict[OpKind, Rule] = {
    K.LINEAR: lower_contraction.linear,
    K.MATMUL: lower_contraction.matmul,
    K.CONV: lower_contraction.conv,
    K.CONV_TRANSPOSE: RULES[K.CONV_TRANSPOSE],
}
REGIONS = {
    K.FUSED_REGION: fused_region,
    K.LAYER_NORM: layer_norm,
    K.RMS_NORM: layer_norm,
    K.GROUP_NORM: group_norm,
    K.INSTANCE_NORM: group_norm,
    K.ADD_NORM: joined_norm,
}
