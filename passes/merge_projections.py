"""The last contraction of a branch and that of its projection shortcut, as one over both of their inputs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from rescompile.costs import tensor_size
from rescompile.detection import inspect_graph
from rescompile.fused_region import Region, Step
from rescompile.graph import Graph, Op, Value
from rescompile.kinds import ACTIVATIONS, Trait
from rescompile.kinds import OpKind as K
from rescompile.passes.joins import only_reader, plain_sum, trailing_activation
from rescompile.passes.tracing import is_stored
from rescompile.plans import (
    AddParameter,
    Edit,
    FreshNames,
    Plan,
    Preserves,
    Refusal,
    Rewrite,
    fuse_edit,
    gather,
    names,
)

_LAST = (1 << 63) - 1  # as far as a slice goes


@dataclass(frozen=True)
class MergeProjections:
    """σ(W·h + b + P·x[::s] + c)  →  σ([W P]·[h, x[::s]] + (b + c)), one region

    The sum that joins a projection shortcut (He et al. 2015, options B and C) goes into the contraction: its reduction
    runs over the channels of both. Every product is there as before, added up in one accumulator.
    1. Both operands of the sum are linears, or convolutions of one group with a kernel of one element and no padding,
       that nothing else reads; a stride becomes a slice of the input. Batch norms are folded before.
    2. They read different values. Two maps of one value are one with the sum of the weights (remove-shortcuts).
    3. Weights and biases are stored, of one dtype and layout, and nothing else reads the weights.
    4. The graph is no training form: the two biases become one.
    5. σ is an activation that alone reads the sum, or nothing.
    """

    name: ClassVar[str] = "merge-projections"
    preserves: ClassVar[Preserves] = "values"

    def plan(self, graph: Graph) -> Plan:
        """One rewrite or refusal for each block with a projection shortcut."""
        return gather(self.name, self.preserves, graph, self._decisions(graph))

    def _decisions(self, graph: Graph) -> Iterator[Rewrite | Refusal]:
        blocks = [b for b in inspect_graph(graph).blocks if b.shortcut == "projection" and b.kind == "add"]
        if not blocks:
            yield Refusal(graph.name or "model", "the model has no projection shortcut")
        fresh = FreshNames(graph)
        for block in blocks:
            if block.path:
                where = f"{block.path}/{block.join}"
                yield Refusal(where, "it is inside an operation that holds a graph of its own, where no pass rewrites")
            elif graph.training:
                reason = "in training branch and shortcut keep parameters of their own: optimisers and checkpoints go"
                yield Refusal(block.join, f"{reason} by them")
            elif block.join_op.provenance != self.name:
                yield _decide(graph, block.join_op, block.skip_index, fresh)


def _decide(graph: Graph, join: Op, skip: int, fresh: FreshNames) -> Rewrite | Refusal:
    if join.kind is not K.ADD:
        return Refusal(join.name, f"the join is a {join.kind.value} already: merge before fusing")
    refused = plain_sum(join)
    if refused is not None:
        return refused
    works = []
    for value in (join.operands[1 - skip], join.operands[skip]):
        work = value.producer
        reason = _obstacle(graph, value, work)
        if reason or work is None:
            return Refusal(join.name, reason)
        works.append(work)
    reason = _mismatch(*works) or graph.cannot_emit(K.FUSED_REGION)
    return Refusal(join.name, reason) if reason else _merged(graph, join, works, fresh)


def _obstacle(graph: Graph, value: Value, work: Op | None) -> str:
    """Why the contraction that a sum reads cannot reduce over another input as well; empty where it can."""
    if work is None:
        return f"'{value.name}' is an input of the graph"
    if work.kind not in (K.LINEAR, K.CONV):
        hint = " (fold-batch-norm takes it away in evaluation)" if work.kind is K.BATCH_NORM else ""
        where = "an activation" if work.has(Trait.ACTIVATION) else f"'{work.name}' ({work.kind.value})"
        return f"{where} lies between a contraction and the sum{hint}"
    if only_reader(graph, value) is None:
        return f"the sum is not the only reader of '{value.name}'"
    weight, bias, x = work.operand("weight"), work.operand("bias"), work.inputs[0]
    if weight is None or not is_stored(weight) or not is_stored(bias):
        return f"the weights of '{work.name}' are computed in the graph"
    if x is None or x.shape is None or weight.shape is None or not all(isinstance(n, int) for n in weight.shape):
        return f"the shapes of what '{work.name}' reads are not known"
    if bias is not None and bias.rank != 1:
        return f"the bias of '{work.name}' is not one number for each output"
    other = next((user for user, index in weight.uses if user is not work or index != 1), None)
    if other is not None:
        return f"'{other.name}' also reads the weight of '{work.name}'"
    if work.kind is K.CONV:
        if any(extent != 1 for extent in weight.shape[2:]):
            kernel = "×".join(map(str, weight.shape[2:]))
            return f"the kernel of '{work.name}' is {kernel}: only kernels of one element share a reduction"
        if work.attr("groups") != 1 or any(work.attr("pads")):
            return f"'{work.name}' has groups or a border of zeros"
    return ""


def _mismatch(one: Op, other: Op) -> str:
    """Why two contractions cannot be one over both inputs; empty where they can."""
    if one.kind is not other.kind:
        return f"'{one.name}' is a {one.kind.value} and '{other.name}' a {other.kind.value}"
    if one.inputs[0] is other.inputs[0]:
        return f"both map '{one.operands[0].name}', so that one contraction with the sum of the weights does"
    if one.kind is K.LINEAR and bool(one.attr("transpose_weight")) != bool(other.attr("transpose_weight")):
        return f"the weight of '{one.name}' lies transposed to that of '{other.name}'"
    if len({value.dtype for op in (one, other) for value in (*op.operands, op.output)}) != 1:
        return "their operands have several dtypes"
    before = [op.operands[0].shape or () for op in (one, other)]
    if one.kind is K.LINEAR and before[0][:-1] != before[1][:-1]:
        return f"'{one.name}' and '{other.name}' read values of which one is broadcast"
    return ""


def _merged(graph: Graph, join: Op, works: list[Op], fresh: FreshNames) -> Rewrite:
    """The region [W P]·[h, x] with what follows it. `works`: the branch's contraction, the shortcut's."""
    main = works[0]
    inputs = [work.operands[0] for work in works]
    axis = 1 if main.kind is K.CONV else len(join.output.shape or ()) - 1
    widths = tuple(int((value.shape or ())[axis]) for value in inputs)
    weights, biases = [work.operand("weight") for work in works], [work.operand("bias") for work in works]
    head, given = weights[0], [each for each in biases if each is not None]
    assert head is not None  # _obstacle
    inner = 1 if main.kind is K.CONV or main.attr("transpose_weight") else 0
    weight, bias = fresh(f"{head.name}_merged"), fresh(f"{given[0].name}_merged") if given else None
    edits: list[Edit] = [
        AddParameter(weight, "concatenated", names(weights), {"axis": inner, "sizes": widths}),
        *([AddParameter(bias, "summed", names(given))] if bias is not None else []),
    ]
    name, after = trailing_activation(graph, join.output)
    out = after[0].output if after else join.output
    operands: list[Value | str] = [*inputs, weight, *([bias] if bias is not None else [])]
    steps = _steps(works, axis, len(operands))
    if after:
        kind, settings = ACTIVATIONS[name] or (K.RELU, {})
        steps.append(Step(kind, (len(operands) + len(steps) - 1,), settings))
    region = Region(len(operands), tuple(steps), (len(operands) + len(steps) - 1,))
    label = "_".join(step.kind.value for step in steps)
    done = [*works, join, *after]
    edits.append(fuse_edit(done, K.FUSED_REGION, operands, [out], label=label, steps=region.text()))
    equation = "W·h + b + P·x + c  →  [W P]·[h, x] + (b + c)"
    shortcut, size = works[1].module or works[1].name, tensor_size(join.output)[1]
    saved = f"'{shortcut}' writes no {size:,} bytes that a sum would read"
    return Rewrite(join.name, equation, f"{saved}; multiplications as before", tuple(edits))


def _steps(works: list[Op], axis: int, count: int) -> list[Step]:
    """Slices where a contraction has a stride, the concatenation, and the contraction; `count` operands before them."""
    main, parts = works[0], []
    steps: list[Step] = []
    for place, work in enumerate(works):
        strides = tuple(work.attr("stride")) if work.kind is K.CONV else ()
        axes = tuple(axis + 1 + at for at, step in enumerate(strides) if step != 1)
        parts.append(count + len(steps) if axes else place)
        if axes:
            cut = {
                "axes": axes,
                "starts": (0,) * len(axes),
                "stops": (_LAST,) * len(axes),
                "steps": tuple(strides[at - axis - 1] for at in axes),
            }
            steps.append(Step(K.SLICE, (place,), cut))
    steps.append(Step(K.CONCAT, tuple(parts), {"axis": axis}))
    whole = count + len(steps) - 1
    spatial = len(main.attr("stride")) if main.kind is K.CONV else 0
    attrs = {"stride": (1,) * spatial, "pads": (0,) * 2 * spatial, "dilation": (1,) * spatial}
    if main.kind is K.LINEAR:
        attrs = {"transpose_weight": main.attr("transpose_weight")}
    steps.append(Step(main.kind, (whole, 2, 3 if count > 3 else None), attrs))
    return steps
