"""DeepNorm's two factors, by the depth of a stack, and which weights the second one is for (Wang et al. 2022)."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod

import numpy as np

from rescompile.blocks import Block
from rescompile.graph import Graph, Op, Role, Value
from rescompile.kinds import OpKind, Trait
from rescompile.passes.norm_blocks import NormedBlock
from rescompile.passes.norm_stacks import Stacks
from rescompile.passes.sketch import Sketch

_LAYER_OF_ENCODER, _LAYER_OF_DECODER = 2, 3  # branches in a layer
_CHANNELS = (OpKind.RESHAPE, OpKind.PERMUTE, OpKind.SLICE, OpKind.SPLIT, OpKind.IDENTITY, OpKind.CAST)


class DeepScales:
    """α and β of every stack of a graph. A weight that blocks share is scaled once."""

    def __init__(self, graph: Graph, stacks: Stacks) -> None:
        self.graph = graph
        self.stacks = stacks
        self._scaled: set[Value] = set()

    def factors(self, block: Block) -> tuple[float, float]:
        """(α, β). With S branches α = S^¼ and β = (4S)^−¼, which is (2N)^¼, (8N)^−¼ for N layers of two branches.

        An encoder of N layers before a decoder of M: 0.81·(N⁴M)^(1/16), 0.87·(N⁴M)^(−1/16).
        """
        stack = self.stacks.stack_of(block)
        decoder = self.stacks.decoder_of(block)
        if decoder is None:
            return len(stack) ** 0.25, (4 * len(stack)) ** -0.25
        layers, behind = len(stack) / _LAYER_OF_ENCODER, len(decoder) / _LAYER_OF_DECODER
        depth = float(layers**4 * behind) ** (1 / 16)
        return 0.81 * depth, 0.87 / depth

    def shrink(self, sketch: Sketch, normed: NormedBlock, beta: float) -> str:
        """Multiply by β the weights that the branch's result is linear in; in words which."""
        found = []
        for weight, rows in _linear_weights(normed):
            if weight in self._scaled:
                continue
            self._scaled.add(weight)
            sketch.rescale(weight, beta, rows)
            found.append(weight.name if rows is None else f"{weight.name} [{rows[0]}:{rows[1]}]")
        return ", ".join(found) or "no weight of its own"


def _linear_weights(normed: NormedBlock) -> Iterator[tuple[Value, tuple[int, int] | None]]:
    """Weights on the ways back from the branch's end that no softmax lies on, with the rows that such ways come from.

    Rows are asked for where one linear makes queries, keys and values together.
    """
    inside = set(normed.block.branch_ops)
    pending: list[tuple[Value, tuple[tuple[Op, int], ...]]] = [(slot.value, ()) for slot in normed.ends]
    seen: set[Value] = set()
    while pending:
        value, way = pending.pop()
        op = value.producer
        if op is None or op not in inside or value in seen:
            continue
        seen.add(value)
        if op.has(Trait.NORM) or op.kind is OpKind.SOFTMAX:
            continue
        if op.kind is OpKind.ATTENTION:
            pending.append((_operand(op, "v"), ()))
        elif op.has(Trait.PARAMETRIC) and len(op.inputs) > 1 and op.inputs[1] is not None:
            weight = _parameter(op.inputs[1])
            if weight is not None:
                yield weight, _rows(op, way)
            pending.append((op.operands[0], ()))
        else:
            step = (op, op.outputs.index(value))
            kept = (step, *way) if op.kind in _CHANNELS else ()
            pending += [(operand, kept) for operand in op.operands if not operand.constant]


def _operand(op: Op, name: str) -> Value:
    value = op.operand(name)
    assert value is not None  # attention has all three
    return value


def _parameter(value: Value) -> Value | None:
    """The parameter behind casts and views of it."""
    while value.role is not Role.PARAMETER:
        if value.producer is None or not value.producer.operands:
            return None
        value = value.producer.operands[0]
    return value


def _rows(linear: Op, way: tuple[tuple[Op, int], ...]) -> tuple[int, int] | None:
    """Which of a linear's output features a way of views leads on from; None for all of them.

    Found by sending every feature's number along the way.
    """
    shape = linear.output.shape
    if shape is None or not way:
        return None
    extents = tuple(extent if isinstance(extent, int) else 1 for extent in shape)
    width = extents[-1]
    numbers = np.broadcast_to(np.arange(width), extents)
    for op, output in way:
        moved = _view(op, numbers, output)
        if moved is None:
            return None
        numbers = moved
    kept = np.unique(numbers)
    if len(kept) == width or len(kept) != kept[-1] - kept[0] + 1:
        return None
    return int(kept[0]), int(kept[-1]) + 1


def _view(op: Op, numbers: np.ndarray, output: int) -> np.ndarray | None:
    if op.kind is OpKind.PERMUTE:
        return numbers.transpose(op.attr("perm"))
    if op.kind is OpKind.SLICE:
        cut = [slice(None)] * numbers.ndim
        bounds = zip(op.attr("axes"), op.attr("starts"), op.attr("stops"), op.attr("steps"), strict=True)
        for axis, start, stop, step in bounds:
            if not isinstance(stop, int):
                stop = None
            cut[axis] = slice(start, stop, step)
        return numbers[tuple(cut)]
    if op.kind is OpKind.SPLIT:
        return np.split(numbers, np.cumsum(op.attr("sizes"))[:-1], op.attr("axis"))[output]
    if op.kind is OpKind.RESHAPE:
        shape = tuple(extent if isinstance(extent, int) else 1 for extent in op.output.shape or ())
        return numbers.reshape(shape) if prod(shape) == numbers.size else None
    return numbers
