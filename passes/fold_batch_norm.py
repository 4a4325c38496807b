"""Batch normalisation in evaluation is a scale and a shift: the contraction before it can carry both."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from rescompile.graph import Graph, Op
from rescompile.kinds import OpKind
from rescompile.plans import AddParameter, FreshNames, Plan, Preserves, Refusal, Rewrite, fuse_edit, gather, names

# The weight's axis that holds output channels.
_OUTPUT_AXIS = {OpKind.CONV: 0, OpKind.CONV_TRANSPOSE: 1, OpKind.LINEAR: 0}


@dataclass(frozen=True)
class FoldBatchNorm:
    """γ·(Wx + b − μ)/√(σ²+ε) + β  →  W'x + b',  W' = W·γ/√(σ²+ε),  b' = (b − μ)·γ/√(σ²+ε) + β

    1. The norm is in evaluation mode, and its statistics, scale and shift are parameters or literals.
    2. It reads a conv, transposed conv or linear, whose output nothing else reads.
    3. The channels that it normalises are the contraction's output channels.
    """

    name: ClassVar[str] = "fold-batch-norm"
    preserves: ClassVar[Preserves] = "values"

    def plan(self, graph: Graph) -> Plan:
        """One rewrite or refusal for each batch norm."""
        fresh = FreshNames(graph)
        norms = (op for op in graph if op.kind is OpKind.BATCH_NORM and not op.output.constant)
        return gather(self.name, self.preserves, graph, (_fold(graph, norm, fresh) for norm in norms))


def _fold(graph: Graph, norm: Op, fresh: FreshNames) -> Rewrite | Refusal:
    where = norm.name
    if graph.training or norm.attr("training"):
        return Refusal(where, "in training the statistics are the batch's own, so no constant weight stands for them")
    x, gamma, beta, mean, variance = norm.inputs
    work = x.producer if x is not None else None
    if x is None or work is None or work.kind not in _OUTPUT_AXIS:
        kind = "a graph input" if work is None else f"'{work.name}' ({work.kind.value})"
        return Refusal(where, f"it reads {kind}, and only a conv or a linear can carry its scale")
    if mean is None or variance is None:
        return Refusal(where, "it has no running statistics")
    if any(value is not None and value.producer is not None for value in norm.inputs[1:]):
        return Refusal(where, "its scale, shift or statistics are computed in the graph")
    if len(x.uses) > 1 or graph.is_output(x):
        return Refusal(where, f"the output of '{work.name}' is also read elsewhere, which needs it un-normalised")
    weight, bias = work.operand("weight"), work.operand("bias")
    if weight is None or weight.producer is not None or (bias is not None and bias.producer is not None):
        return Refusal(where, f"the weights of '{work.name}' are computed in the graph")
    axis = _OUTPUT_AXIS[work.kind]
    if work.kind is OpKind.LINEAR:
        if x.rank != 2:
            return Refusal(where, "the norm's channel axis is not the linear's feature axis: the value has not rank 2")
        axis = 0 if work.attr("transpose_weight") else 1
    if work.kind is OpKind.CONV_TRANSPOSE and work.attr("groups") != 1:
        return Refusal(where, "a grouped transposed conv spreads its output channels over two weight axes")
    new_weight = fresh(f"{weight.name}_folded")
    new_bias = fresh(f"{bias.name}_folded" if bias is not None else _bias_name(weight.name))
    eps = norm.attr("eps")
    scaled = AddParameter(new_weight, "batch_norm_weight", names([weight, gamma, variance]), {"axis": axis, "eps": eps})
    shifted = AddParameter(
        new_bias, "batch_norm_bias", names([weight, bias, gamma, beta, mean, variance]), {"eps": eps}
    )
    folded = fuse_edit([work, norm], work.kind, [work.inputs[0], new_weight, new_bias], norm.outputs, **work.attrs)
    equation = "BN(W·x + b)  →  W'·x + b'"
    return Rewrite(where, equation, f"the scale and shift go into '{work.name}'", (scaled, shifted, folded))


def _bias_name(weight: str) -> str:
    """`layer.weight` → `layer.bias_folded`; a name without a leaf to replace gets one more."""
    stem, dot, _ = weight.rpartition(".")
    return f"{stem}.bias_folded" if dot else f"{weight}_bias_folded"
