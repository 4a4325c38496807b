"""Batch normalisation in evaluation is a scale and a shift: the contraction before it can carry both."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from rescompile.graph import Graph, Op
from rescompile.kinds import OpKind, Trait
from rescompile.passes.scale_paths import Asked, behind
from rescompile.plans import (
    AddParameter,
    Edit,
    Erase,
    FreshNames,
    Plan,
    Preserves,
    Refusal,
    ReplaceUses,
    Rewrite,
    fuse_edit,
    gather,
    names,
)

_CONTRACTIONS = (OpKind.CONV, OpKind.CONV_TRANSPOSE, OpKind.LINEAR)


@dataclass(frozen=True)
class FoldBatchNorm:
    """γ·(Wx + b − μ)/√(σ²+ε) + β  →  W'x + b',  W' = W·γ/√(σ²+ε),  b' = (b − μ)·γ/√(σ²+ε) + β

    1. The norm is in evaluation mode, and its statistics, scale and shift are parameters or literals.
    2. It reads a conv, transposed conv or linear, through views that keep channels apart; nothing else reads these.
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
    maker = x.producer if x is not None else None
    if x is None or maker is None or not (maker.kind in _CONTRACTIONS or maker.has(Trait.FREE)):
        kind = "a graph input" if maker is None else f"'{maker.name}' ({maker.kind.value})"
        return Refusal(where, f"it reads {kind}, and only a conv or a linear can carry its scale")
    if mean is None or variance is None:
        return Refusal(where, "it has no running statistics")
    if any(value is not None and value.producer is not None for value in norm.inputs[1:]):
        return Refusal(where, "its scale, shift or statistics are computed in the graph")
    sites = behind(Asked(graph, shifts=True, positive=False), x, 1)
    if isinstance(sites, str):
        return Refusal(where, sites)
    site, work = sites[0], sites[0].op
    weight, bias = work.operand("weight"), work.operand("bias")
    assert weight is not None  # a site has contents
    new_weight = fresh(f"{weight.name}_folded")
    new_bias = fresh(f"{bias.name}_folded" if bias is not None else _bias_name(weight.name))
    eps = norm.attr("eps")
    attrs = {"axis": site.axis, "groups": site.groups, "eps": eps}
    scaled = AddParameter(new_weight, "folded_weight", names([weight, gamma, variance]), attrs)
    shifted = AddParameter(
        new_bias, "batch_norm_bias", names([weight, bias, gamma, beta, mean, variance]), {"eps": eps}
    )
    edits: list[Edit] = [scaled, shifted]
    operands = [work.inputs[0], new_weight, new_bias]
    if work is maker:
        edits.append(fuse_edit([work, norm], work.kind, operands, norm.outputs, **work.attrs))
    else:
        edits.append(fuse_edit([work], work.kind, operands, work.outputs, **work.attrs))
        edits += [ReplaceUses(norm.output.name, x.name), Erase(norm.name)]
    equation = "BN(W·x + b)  →  W'·x + b'"
    return Rewrite(where, equation, f"the scale and shift go into '{work.name}'", tuple(edits))


def _bias_name(weight: str) -> str:
    """`layer.weight` → `layer.bias_folded`; a name without a leaf to replace gets one more."""
    stem, dot, _ = weight.rpartition(".")
    return f"{stem}.bias_folded" if dot else f"{weight}_bias_folded"
