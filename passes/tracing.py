"""Reading a region of a graph as affine maps: y = Σ Aᵢ(vᵢ), each vᵢ the region's own start or an activation's output.

Affine are, in evaluation and with constant weights: convolutions and linears, batch norms, average pools whose window
is full everywhere, factors and shifts that are one number or one for each channel, differences, strided slices of
positions, zero channels and zero borders.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TypeAlias

from rescompile.graph import Graph, Op, Role, Value
from rescompile.kinds import OpKind as K
from rescompile.kinds import Trait
from rescompile.passes.maps import Map, Program, composed
from rescompile.plans import Refusal

_CONTRACTIONS = (K.CONV, K.LINEAR)
_DEEPEST = 100


@dataclass(frozen=True, slots=True)
class Layout:
    """`channel`: the axis of channels; `spatial`: how many dimensions of positions kernels have, 0 for linears."""

    channel: int
    spatial: int
    rank: int


@dataclass(slots=True)
class Trace:
    """What was read on the way: `ops`, those that a result replaces."""

    graph: Graph
    start: Value
    layout: Layout
    ops: dict[Op, None] = field(default_factory=dict)
    program: Program = field(init=False)
    known: dict[Value, dict[Value, Map] | Refusal] = field(default_factory=dict)
    depth: int = 0

    def __post_init__(self) -> None:
        self.program = Program(self.layout.spatial)

    def maps(self, value: Value) -> dict[Value, Map] | Refusal:
        """`value` as a sum of one map for each value that it starts from."""
        if value not in self.known:
            self.depth += 1
            self.known[value] = self._maps(value)
            self.depth -= 1
        return self.known[value]

    def _maps(self, value: Value) -> dict[Value, Map] | Refusal:
        op = value.producer
        if self.depth > _DEEPEST:
            return Refusal(value.name, f"more than {_DEEPEST} operations in a row")
        if value is self.start or (op is not None and op.has(Trait.ACTIVATION)):
            channels = None if value.shape is None else value.shape[self.layout.channel]
            if not isinstance(channels, int) or len(value.shape or ()) != self.layout.rank:
                return Refusal(value.name, f"how many channels '{value.name}' has is not known")
            return {value: self.program.input(channels)}
        if op is None or value.constant:
            return Refusal(value.name, f"'{value.name}' enters from outside the block")
        reader = _READERS.get(op.kind)
        if reader is None:
            return Refusal(op.name, f"'{op.name}' ({op.kind.value}) is no affine map of its channels")
        self.ops[op] = None
        return reader(self, op)

    def of(self, op: Op) -> dict[Value, Map] | Refusal:
        """The maps of the first operand."""
        operand = op.inputs[0]
        return Refusal(op.name, f"'{op.name}' has no operand") if operand is None else self.maps(operand)

    def each(self, op: Op, change: Callable[[Map], Map | str]) -> dict[Value, Map] | Refusal:
        """The maps of the first operand, each changed; a refusal where one cannot be."""
        found = self.of(op)
        if isinstance(found, Refusal):
            return found
        changed: dict[Value, Map] = {}
        for base, map_ in found.items():
            new = change(map_)
            if isinstance(new, str):
                return Refusal(op.name, f"'{op.name}': {new}")
            changed[base] = new
        return changed

    def shifted(self, maps: dict[Value, Map], add: Callable[[Map], int]) -> dict[Value, Map]:
        """A shift, which one of several maps takes for all."""
        base, map_ = next(iter(maps.items()))
        return {**maps, base: replace(map_, step=add(map_), shifted=True)}

    def constant(self, op: Op, value: Value) -> Value | Refusal:
        """The parameter or literal that holds `value`, one number or one for each channel."""
        shape, rank = value.shape, self.layout.rank
        fits = shape is not None and len(shape) <= rank
        if fits and shape is not None:
            whole = (1,) * (rank - len(shape)) + shape
            fits = all(extent == 1 for axis, extent in enumerate(whole) if axis != self.layout.channel)
        if not fits:
            return Refusal(op.name, f"'{value.name}' is not one number for each channel")
        while value.producer is not None and value.producer.kind in (K.RESHAPE, K.IDENTITY):
            value = value.producer.operands[0]
        return value if is_stored(value) else Refusal(op.name, f"'{value.name}' is computed in the graph")


_Reader: TypeAlias = Callable[[Trace, Op], dict[Value, Map] | Refusal]


def is_affine(op: Op) -> bool:
    """Whether the operation may be an affine map of one value: of a kind that is read here, the others constants."""
    if op.kind is K.ADD:
        return True
    computed = [index for index, value in enumerate(op.inputs) if value is not None and not value.constant]
    return op.kind in _READERS and (computed == [0] or (op.kind is K.MUL and len(computed) == 1))


def is_stored(value: Value | None) -> bool:
    """Whether the value has contents of its own, or is absent."""
    return value is None or value.role in (Role.PARAMETER, Role.CONSTANT)


def layout_of(ops: list[Op], start: Value) -> Layout | str:
    """Where channels are, by the contractions among `ops`; text where they do not say."""
    kinds = {op.kind for op in ops if op.kind in _CONTRACTIONS}
    if len(kinds) != 1:
        return "it holds both convolutions and linears" if kinds else "it holds no convolution and no linear"
    if start.shape is None:
        return f"the shape of '{start.name}' is not known"
    rank = len(start.shape)
    return Layout(1, rank - 2, rank) if kinds == {K.CONV} else Layout(rank - 1, 0, rank)


def escapes(graph: Graph, ops: dict[Op, None], join: Value) -> str:
    """Which value of the region is read outside it; empty where none is."""
    for op in ops:
        for value in op.outputs:
            if value is join:
                continue
            reader = next((user for user in value.users if user not in ops), None)
            if reader is not None:
                return f"'{reader.name}' also reads '{value.name}', which lies inside the block"
            if graph.is_output(value):
                return f"'{value.name}', which lies inside the block, is an output of the graph"
    return ""


def _through(trace: Trace, op: Op) -> dict[Value, Map] | Refusal:
    if any(value.dtype != op.output.dtype for value in op.operands):
        return Refusal(op.name, f"'{op.name}' changes the dtype")
    return trace.of(op)


def _contraction(trace: Trace, op: Op) -> dict[Value, Map] | Refusal:
    weight, bias = op.operand("weight"), op.operand("bias")
    if weight is None or not is_stored(weight) or not is_stored(bias):
        return Refusal(op.name, f"the weights of '{op.name}' are computed in the graph")
    if weight.shape is None or not all(isinstance(extent, int) for extent in weight.shape):
        return Refusal(op.name, f"the shape of '{weight.name}' is not known")
    if bias is not None and bias.rank != 1:
        return Refusal(op.name, f"'{bias.name}' is not one number for each channel")
    shape = tuple(int(extent) for extent in weight.shape)
    spatial = trace.layout.spatial
    if op.kind is K.LINEAR:
        transposed = bool(op.attr("transpose_weight"))
        outputs, inputs = shape if transposed else shape[::-1]
        own = Map(-1, inputs, outputs, 1, (), (), (), (), (), bias is not None, works=True)

        def make(map_: Map) -> int:
            return trace.program.add("linear", [map_], [weight, bias], transpose=not transposed)
    else:
        groups, pads = int(op.attr("groups")), tuple(op.attr("pads"))
        strides, dilation = tuple(op.attr("stride")), tuple(op.attr("dilation"))
        begin, end = pads[:spatial], pads[spatial:]
        own = Map(
            -1, shape[1] * groups, shape[0], groups, shape[2:], strides, begin, end, dilation, bias is not None, True
        )

        def make(map_: Map) -> int:
            return trace.program.add("conv", [map_], [weight, bias], groups=groups)

    found = _composed(trace, op, own, make)
    return found if isinstance(found, Refusal) or len(found) == 1 else Refusal(op.name, _TWICE.format(op.name))


_TWICE = "'{}' reads a sum of what activations separate"


def _composed(trace: Trace, op: Op, own: Map, make: Callable[[Map], int]) -> dict[Value, Map] | Refusal:
    def change(map_: Map) -> Map | str:
        new = composed(map_, own)
        return new if isinstance(new, str) else replace(new, step=make(map_))

    return trace.each(op, change)


def _norm(trace: Trace, op: Op) -> dict[Value, Map] | Refusal:
    if op.attr("training"):
        return Refusal(op.name, f"'{op.name}' normalises by the statistics of the batch")
    _, gamma, beta, mean, variance = op.inputs
    if mean is None or variance is None:
        return Refusal(op.name, f"'{op.name}' has no running statistics")
    if not all(is_stored(value) for value in (gamma, beta, mean, variance)):
        return Refusal(op.name, f"the scale, shift or statistics of '{op.name}' are computed in the graph")
    if trace.layout.channel != 1:
        return Refusal(op.name, f"'{op.name}' normalises another axis than that of the linears")
    found = trace.of(op)
    if isinstance(found, Refusal):
        return found
    if len(found) > 1:
        return Refusal(op.name, _TWICE.format(op.name))
    data, eps = (gamma, beta, mean, variance), float(op.attr("eps"))
    return trace.shifted(found, lambda map_: trace.program.add("norm", [map_], data, eps=eps))


def _factor(trace: Trace, op: Op) -> dict[Value, Map] | Refusal:
    left, right = [*op.inputs, None][:2]
    if left is not None and left.constant and op.kind is K.MUL:
        left, right = right, left
    if left is None or (right is not None and not right.constant) or op.output.shape != left.shape:
        return Refusal(op.name, f"'{op.name}' ({op.kind.value}) is no product with a constant")
    held = None if right is None else trace.constant(op, right)
    if isinstance(held, Refusal):
        return held
    factor, divide = -1.0 if op.kind is K.NEG else 1.0, op.kind is K.DIV
    found = trace.maps(left)
    if isinstance(found, Refusal):
        return found
    data = [] if held is None else [held]
    return {
        base: replace(map_, step=trace.program.add("scale", [map_], data, factor=factor, divide=divide))
        for base, map_ in found.items()
    }


def _sum(trace: Trace, op: Op) -> dict[Value, Map] | Refusal:
    parts: dict[Value, list[tuple[Map, float]]] = {}
    constants: list[tuple[Value, float]] = []
    for value, scale in zip(op.operands, op.scales, strict=True):
        if value.constant:
            held = trace.constant(op, value)
            if isinstance(held, Refusal):
                return held
            constants.append((held, scale))
            continue
        if value.shape != op.output.shape:
            return Refusal(op.name, f"'{op.name}' broadcasts '{value.name}'")
        found = trace.maps(value)
        if isinstance(found, Refusal):
            return found
        for base, map_ in found.items():
            parts.setdefault(base, []).append((map_, scale))
    result: dict[Value, Map] = {}
    for base, terms in parts.items():
        map_, factor = terms[0]
        if len(terms) > 1 or factor != 1:
            positions = (base.shape or ())[2:] if trace.layout.spatial else ()
            total = trace.program.sum([term for term, _ in terms], [scale for _, scale in terms], positions)
            if isinstance(total, str):
                return Refusal(op.name, f"of the branches that '{op.name}' adds, {total}")
            map_ = total
        result[base] = map_
    for held, scale in constants:
        result = trace.shifted(result, partial(_shift, trace.program, held, scale))
    return result


def _shift(program: Program, held: Value, factor: float, map_: Map) -> int:
    return program.add("shift", [map_], [held], factor=factor)


def _pool(trace: Trace, op: Op) -> dict[Value, Map] | Refusal:
    kernel, pads = tuple(op.attr("kernel")), tuple(op.attr("pads"))
    stride = tuple(op.attr("stride")) or (1,) * len(kernel)
    operand, spatial = op.inputs[0], len(kernel)
    if operand is None or spatial != trace.layout.spatial:
        return Refusal(op.name, f"'{op.name}' pools other dimensions than the convolutions")
    pads = pads or (0,) * (2 * spatial)
    if any(pads) and not op.attr("count_include_pad"):
        return Refusal(op.name, f"'{op.name}' divides by fewer elements at the border than inside")
    channels = (operand.shape or ())[1] if operand.rank else None
    if not isinstance(channels, int):
        return Refusal(op.name, f"how many channels '{operand.name}' has is not known")
    begin, end, ones = pads[:spatial], pads[spatial:], (1,) * spatial
    own = Map(-1, channels, channels, channels, kernel, stride, begin, end, ones)
    if op.attr("ceil_mode"):
        extents = zip((operand.shape or ())[2:], own.margins, stride, strict=True)
        if not all(isinstance(extent, int) and (extent + margin) % step == 0 for extent, margin, step in extents):
            return Refusal(op.name, f"the last window of '{op.name}' may be cut, which changes what it divides by")
    return _composed(trace, op, own, lambda map_: trace.program.add("pool", [map_], kernel=list(kernel)))


def _slice(trace: Trace, op: Op) -> dict[Value, Map] | Refusal:
    operand, layout = op.inputs[0], trace.layout
    if operand is None or operand.shape is None:
        return Refusal(op.name, f"the shape that '{op.name}' slices is not known")
    steps = [1] * layout.spatial
    for axis, start, stop, step in zip(*(op.attr(name) for name in ("axes", "starts", "stops", "steps")), strict=True):
        extent = operand.shape[axis]
        whole = stop == extent or (isinstance(stop, int) and isinstance(extent, int) and stop >= extent)
        whole = whole or (isinstance(stop, int) and stop >= 2**31 - 1)
        if start != 0 or not whole or step < 1 or (step > 1 and not 2 <= axis < 2 + layout.spatial):
            return Refusal(op.name, f"'{op.name}' takes a part of the values, which no kernel does")
        if step > 1:
            steps[axis - 2] = step
    found = trace.of(op)
    if isinstance(found, Refusal):
        return found
    return {
        base: replace(map_, stride=tuple(a * b for a, b in zip(map_.stride, steps, strict=True)))
        for base, map_ in found.items()
    }


def _pad(trace: Trace, op: Op) -> dict[Value, Map] | Refusal:
    layout, pads = trace.layout, tuple(op.attr("pads"))
    rank = layout.rank
    if op.attr("mode") != "constant" or op.attr("value") != 0 or any(amount < 0 for amount in pads):
        return Refusal(op.name, f"'{op.name}' pads with something else than zeros")
    outside = [axis for axis in range(rank) if axis != layout.channel and (pads[axis] or pads[axis + rank])]
    if any(axis < 2 or not layout.spatial for axis in outside):
        return Refusal(op.name, f"'{op.name}' pads an axis that is neither of channels nor of positions")
    before, after = pads[layout.channel], pads[layout.channel + rank]
    spatial = slice(2, 2 + layout.spatial)
    begin, end = pads[:rank][spatial] if layout.spatial else (), pads[rank:][spatial] if layout.spatial else ()

    def change(map_: Map) -> Map | str:
        if outside:
            if map_.shifted or not map_.pointwise or map_.strided:
                return "a border of zeros behind a convolution"
            map_ = replace(map_, begin=begin, end=end)
        if before or after:
            step = trace.program.add("rows", [map_], before=before, after=after)
            map_ = replace(map_, step=step, groups=1, outputs=map_.outputs + before + after)
        return map_

    return trace.each(op, change)


_READERS: dict[K, _Reader] = {
    K.IDENTITY: _through,
    K.CAST: _through,
    K.CONV: _contraction,
    K.LINEAR: _contraction,
    K.BATCH_NORM: _norm,
    K.MUL: _factor,
    K.DIV: _factor,
    K.NEG: _factor,
    K.ADD: _sum,
    K.AVG_POOL: _pool,
    K.SLICE: _slice,
    K.PAD: _pad,
}
