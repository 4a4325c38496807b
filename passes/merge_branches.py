"""Rule: branches without an activation, and the skip beside them, become one convolution or linear."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from rescompile.costs import op_cost, tensor_size
from rescompile.graph import Graph, Op, Role, Value
from rescompile.kinds import OpKind
from rescompile.passes.maps import Map
from rescompile.passes.tracing import Layout, Trace, escapes
from rescompile.plans import AddParameter, Edit, FreshNames, Fuse, Refusal, fuse_edit


@dataclass(slots=True)
class Replacement:
    """Edits, and what the operations that they make cost: elements of parameters, floating-point operations a call.

    `extents`: what symbolic extents count as, 1 otherwise.
    """

    edits: list[Edit] = field(default_factory=list)
    parameters: int = 0
    flops: int = 0
    extents: Mapping[str, int] = field(default_factory=dict)

    def count(self, map_: Map, value: Value, layout: Layout) -> None:
        """A convolution or linear that makes as many positions as `value` has."""
        channels = (value.shape or ())[layout.channel]
        positions = tensor_size(value, self.extents)[0] // channels if isinstance(channels, int) and channels else 0
        bias = map_.outputs if map_.shifted else 0
        self.parameters += map_.weights() + bias
        self.flops += positions * (2 * map_.weights() + bias)

    def replaced(self, graph: Graph) -> list[Op]:
        """The operations that the edits take away."""
        names = (name for edit in self.edits if isinstance(edit, Fuse) for name in edit.ops)
        return [graph.op(name) for name in dict.fromkeys(names)]

    def flops_before(self, graph: Graph) -> int:
        """What those cost a call."""
        return sum(op_cost(op, self.extents).flops for op in self.replaced(graph))


@dataclass(frozen=True, slots=True)
class Contraction:
    """A convolution or linear to be: its kind, attributes, and the names of its parameters, which `edits` make."""

    kind: OpKind
    weight: str
    bias: str | None
    attrs: dict[str, Any]
    edits: list[Edit]


def change(graph: Graph, replacement: Replacement) -> str:
    """Parameters and floating-point operations, before and after, as text."""
    ops = set(replacement.replaced(graph))
    read = {value for op in ops for value in op.operands if value.role is Role.PARAMETER and not _is_statistic(value)}
    shared = sorted(value.name for value in read if any(user not in ops for user in value.users))
    before = sum(tensor_size(value)[0] for value in read if value.name not in shared)
    flops = f"FLOPs {replacement.flops_before(graph):,} → {replacement.flops:,}"
    text = f"parameters {before:,} → {replacement.parameters:,}, {flops}"
    return f"{text}; '{shared[0]}', which is read elsewhere too, stays beside its copy" if shared else text


def _is_statistic(value: Value) -> bool:
    return all(op.kind is OpKind.BATCH_NORM and index >= 3 for op, index in value.uses)


def merge_branches(
    trace: Trace, join: Value, fork: Value, whole: Map, fresh: FreshNames, extents: Mapping[str, int] | None = None
) -> Replacement | Refusal:
    """y = W·x + b + P·x + BN(x) + a·x  →  y = W'·x + b',  W' = W + pad(P) + diag(γ/√(σ²+ε) + a)

    RepVGG (Ding et al. 2021, section 3.3), MobileOne, DiracNet. `whole`: the join as a map of the fork alone.
    1. Every term is affine, with at most one kernel of more than one element in a row.
    2. Strides agree, and each term makes as many positions as the others.
    3. Nothing else reads what lies inside.
    Groups: as many as all terms have in common.
    """
    refused = escapes(trace.graph, trace.ops, join)
    if refused:
        return Refusal(join.name, refused)
    if not whole.works:
        return Refusal(join.name, "no convolution or linear is there to carry the sum")
    made = contraction(trace, whole, "merged", fresh)
    ops = sorted(trace.ops, key=lambda op: op.order)
    fused = fuse_edit(ops, made.kind, [fork, made.weight, made.bias], [join], **made.attrs)
    replacement = Replacement([*made.edits, fused], extents=extents or {})
    replacement.count(whole, join, trace.layout)
    return replacement


def contraction(trace: Trace, map_: Map, suffix: str, fresh: FreshNames, main: Op | None = None) -> Contraction:
    """What computes one map of the trace. `main`: whose parameters give the names."""
    main = main or main_contraction(trace.ops)
    old_weight, old_bias = main.operand("weight"), main.operand("bias")
    assert old_weight is not None  # the trace went through it
    operands = tuple(value.name for value in trace.program.operands)
    transposed = main.kind is OpKind.LINEAR and not main.attr("transpose_weight")
    settings = {"steps": trace.program.upto(map_), "dtype": old_weight.dtype, "transpose": transposed}
    weight = fresh(f"{old_weight.name}_{suffix}")
    edits: list[Edit] = [AddParameter(weight, "affine_weight", operands, settings)]
    bias = None
    if map_.shifted:
        bias = fresh(f"{old_bias.name if old_bias is not None else _bias_name(old_weight.name)}_{suffix}")
        edits.append(AddParameter(bias, "affine_bias", operands, {**settings, "transpose": False}))
    attrs: dict[str, Any] = {"transpose_weight": not transposed}
    if main.kind is OpKind.CONV:
        pads = (*map_.begin, *map_.end)
        attrs = {"stride": map_.stride, "pads": pads, "dilation": map_.dilation, "groups": map_.groups}
    return Contraction(main.kind, weight, bias, attrs, edits)


def main_contraction(ops: dict[Op, None]) -> Op:
    """The convolution or linear with the largest kernel, the first of equal ones: its parameters give the names."""
    found = [op for op in ops if op.kind in (OpKind.CONV, OpKind.LINEAR)]
    return max(sorted(found, key=lambda op: op.order), key=_kernel_size)


def _kernel_size(op: Op) -> int:
    shape = op.inputs[1].shape if op.inputs[1] is not None else None
    size = 1
    for extent in (shape or ())[2:]:
        size *= extent if isinstance(extent, int) else 1
    return size


def _bias_name(weight: str) -> str:
    """`layer.weight` → `layer.bias`; a name without a leaf to replace gets one more."""
    stem, dot, _ = weight.rpartition(".")
    return f"{stem}.bias" if dot else f"{weight}_bias"
