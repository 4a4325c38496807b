"""The last contraction of a branch and that of its projection shortcut, as one over both of their inputs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from rescompile.costs import tensor_size
from rescompile.detection import inspect_graph
from rescompile.graph import Graph, Op, Value
from rescompile.kinds import OpKind as K
from rescompile.kinds import Trait
from rescompile.passes.joins import only_reader, plain_sum
from rescompile.passes.tracing import is_stored
from rescompile.plans import (
    AddParameter,
    Edit,
    FreshNames,
    Insert,
    Plan,
    Preserves,
    Refusal,
    Rewrite,
    fuse_edit,
    gather,
    names,
)


@dataclass(frozen=True)
class MergeProjections:
    """W·h + b + P·x[::s] + c  →  [W P]·[h, x[::s]] + (b + c)

    The sum that joins a projection shortcut (He et al. 2015, options B and C) goes into the contraction: its reduction
    runs over the channels of both. What is computed is the same, each product added up in one accumulator.
    1. Both operands of the sum are linears, or convolutions of one group with a kernel of one element and no padding,
       that nothing else reads; a stride becomes a slice of the input. Batch norms are folded before.
    2. They read different values. Two maps of one value are one with the sum of the weights (remove-shortcuts).
    3. Weights and biases are stored, of one dtype and layout, and nothing else reads the weights.
    4. The graph is no training form: the two biases become one.
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
            elif not _is_merged(block.join_op):
                yield _decide(graph, block.join_op, fresh)


def _is_merged(join: Op) -> bool:
    """Whether the pass was here before."""
    return join.provenance == MergeProjections.name


def _decide(graph: Graph, join: Op, fresh: FreshNames) -> Rewrite | Refusal:
    if join.kind is not K.ADD:
        return Refusal(join.name, f"the join is a {join.kind.value} already: merge before fusing")
    refused = plain_sum(join)
    if refused is not None:
        return refused
    works = []
    for value in join.operands:
        work = value.producer
        reason = _obstacle(graph, value, work)
        if reason or work is None:
            return Refusal(join.name, reason)
        works.append(work)
    works.sort(key=lambda op: -op.order)  # the branch runs last, mostly: its names stay
    reason = _mismatch(works[0], works[1])
    return Refusal(join.name, reason) if reason else _merged(join, works, fresh)


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


def _merged(join: Op, works: list[Op], fresh: FreshNames) -> Rewrite:
    main, out = works[0], join.output
    axis = 1 if main.kind is K.CONV else len(out.shape or ()) - 1
    edits: list[Edit] = []
    parts, widths = [], []
    for work in works:
        parts.append(_input(work, out, edits, fresh))
        widths.append(int((work.operands[0].shape or ())[axis]))
    shape = (*(out.shape or ())[:axis], sum(widths), *(out.shape or ())[axis + 1 :])
    whole = fresh(f"{out.name}_inputs")
    edits.append(Insert("concat", tuple(parts), ((whole, shape, out.dtype),), {"axis": axis}))
    weights, biases = [work.operand("weight") for work in works], [work.operand("bias") for work in works]
    head = weights[0]
    assert head is not None  # _obstacle
    weight = fresh(f"{head.name}_merged")
    inner = 1 if main.kind is K.CONV or main.attr("transpose_weight") else 0
    edits.append(AddParameter(weight, "concatenated", names(weights), {"axis": inner, "sizes": tuple(widths)}))
    given = [each for each in biases if each is not None]
    bias = fresh(f"{given[0].name}_merged") if given else None
    if bias is not None:
        edits.append(AddParameter(bias, "summed", names(given)))
    attrs = dict(main.attrs)
    if main.kind is K.CONV:
        attrs["stride"] = (1,) * len(main.attr("stride"))
    edits.append(fuse_edit([*works, join], main.kind, [whole, weight, bias], [out], **attrs))
    moved = sum(tensor_size(work.operands[0])[1] // _steps(work) for work in works)
    equation = "W·h + b + P·x + c  →  [W P]·[h, x] + (b + c)"
    shortcut = works[1].module or works[1].name
    cost = f"'{shortcut}' writes no {tensor_size(out)[1]:,} bytes for a sum to read; the concat copies {moved:,}"
    return Rewrite(join.name, equation, f"{cost} where no kernel reads two inputs", tuple(edits))


def _input(work: Op, out: Value, edits: list[Edit], fresh: FreshNames) -> str:
    """The positions that a contraction reads, as a value."""
    x = work.operands[0]
    steps = tuple(work.attr("stride")) if work.kind is K.CONV else ()
    strided = [place for place, step in enumerate(steps) if step != 1]
    if not strided:
        return x.name
    shape = x.shape or ()
    name = fresh(f"{x.name}_strided")
    extents = list(shape)
    for place in strided:
        extents[place + 2] = (out.shape or ())[place + 2]
    attrs = {
        "axes": tuple(place + 2 for place in strided),
        "starts": (0,) * len(strided),
        "stops": tuple(shape[place + 2] for place in strided),
        "steps": tuple(steps[place] for place in strided),
    }
    edits.append(Insert("slice", (x.name,), ((name, tuple(extents), x.dtype),), attrs))
    return name


def _steps(work: Op) -> int:
    total = 1
    for step in work.attr("stride") if work.kind is K.CONV else ():
        total *= step
    return total
