"""A norm of what is normed already: one norm does both."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from rescompile.graph import Graph, Op, Role
from rescompile.kinds import OpKind as K
from rescompile.passes.features import held, moved, normed_axis, uniform
from rescompile.plans import (
    AddParameter,
    Edit,
    Erase,
    FreshNames,
    Fuse,
    Plan,
    Preserves,
    Refusal,
    ReplaceUses,
    Rewrite,
    SetParameter,
    gather,
)

_NORMS = (K.LAYER_NORM, K.RMS_NORM, K.GROUP_NORM, K.INSTANCE_NORM)


@dataclass(frozen=True)
class MergeNorms:
    """N₂(c·N₁(x) + b)  →  N(x),  ε = ε₁ε₂/(c² + ε₂), γ = γ₂·c/√(c² + ε₂), β = β₂

    N₁ leaves the variance v/(v + ε₁), not 1, so N₂ divides by √(c²v + ε₂(v + ε₁)) in all: exact, with both eps.
    1. Both norms take the same statistics: two layer norms, RMS norms, instance norms, group norms of as many groups;
       an RMS norm behind a layer norm that adds no bias, since what it reads has no mean.
    2. N₁ has one number c ≠ 0 as gain, and one as bias (which N₂ takes off again), or none. A gain that differs between
       features changes what N₂ measures.
    3. Only N₂ reads N₁, through views that keep the features together.
    4. In a training graph N₁ has no gain and no bias to train.
    """

    name: ClassVar[str] = "merge-norms"
    preserves: ClassVar[Preserves] = "values"

    def plan(self, graph: Graph) -> Plan:
        """One rewrite for each chain of norms, one refusal for each norm that stays before another."""
        return gather(self.name, self.preserves, graph, self._decisions(graph))

    def _decisions(self, graph: Graph) -> Iterator[Rewrite | Refusal]:
        links: dict[Op, Op] = {}
        found = False
        for norm in graph:
            before = _before(norm)
            if before is None:
                continue
            found = True
            reason = _reason(graph, before, norm)
            if reason:
                yield Refusal(before.name, reason)
            else:
                links[norm] = before
        if not found:
            yield Refusal(graph.name or "model", "no norm of the model follows another")
        fresh = FreshNames(graph)
        for last in links:
            if last not in links.values():
                chain = [last]
                while chain[0] in links:
                    chain.insert(0, links[chain[0]])
                yield _merged(graph, chain, fresh)


def _before(norm: Op) -> Op | None:
    """The norm whose result this one reads, views in between."""
    if norm.kind not in _NORMS:
        return None
    axis, value = normed_axis(norm), norm.inputs[0]
    while value is not None and value.producer is not None:
        op = value.producer
        if op.kind in _NORMS:
            return op
        inner = op.inputs[0] if op.inputs else None
        if op.kind is not K.IDENTITY:
            last = norm.kind in (K.LAYER_NORM, K.RMS_NORM) and isinstance(axis, int)
            places = range(inner.rank or 0) if inner is not None and last else ()
            axis = next((place for place in places if moved(op, 0, place, value) == axis), "")
            if isinstance(axis, str):
                return None
        value = inner
    return None


def _reason(graph: Graph, first: Op, second: Op) -> str:
    """Why the second norm does not do the first one's work; empty where it does."""
    inner = first.attrs.get("stash_type") or second.attrs.get("stash_type")
    if inner:
        return f"one of them computes in {inner}, which rounds in between"
    if not _same_statistics(first, second):
        return f"'{second.name}' takes other statistics than it"
    value = first.output
    while value is not second.inputs[0]:
        if len(value.uses) != 1 or graph.is_output(value):
            break
        value = value.users[0].output
    if len(value.uses) != 1 or graph.is_output(value):
        return f"more than '{second.name}' reads what it makes"
    gain, bias = first.operand("weight"), first.operand("bias") if len(first.inputs) > 2 else None
    if graph.training and (gain is not None or bias is not None):
        return "its gain and bias are trained: what is one number now need not stay one"
    factor, shift = uniform(graph, gain, 1.0), uniform(graph, bias, 0.0)
    if factor is None:
        return f"its gain differs between features, which changes what '{second.name}' measures"
    if factor == 0:
        return "its gain is zero"
    if shift is None:
        return f"its bias differs between features, which changes what '{second.name}' measures"
    if shift and second.kind is K.RMS_NORM:
        return f"its bias is a mean that '{second.name}' does not take off"
    own, stored = second.operand("weight"), held(second.operand("weight"))
    if own is not None and (stored is None or (stored is not own and len(stored.uses) > 1)):
        return f"the gain of '{second.name}' is computed in the graph"
    if own is None and _extents(second) is None:
        return f"how many features '{second.name}' has is not known"
    return ""


def _same_statistics(first: Op, second: Op) -> bool:
    if first.kind is not second.kind:
        return first.kind is K.LAYER_NORM and second.kind is K.RMS_NORM and _from_last(first) == _from_last(second)
    if first.kind is K.GROUP_NORM:
        return bool(first.attr("groups") == second.attr("groups"))
    return first.kind is K.INSTANCE_NORM or _from_last(first) == _from_last(second)


def _from_last(norm: Op) -> int | None:
    axis, rank = norm.attr("axis"), norm.output.rank
    return None if rank is None else int(axis % rank - rank)


def _extents(norm: Op) -> tuple[int, ...] | None:
    """Shape of a gain."""
    shape = norm.output.shape
    if shape is None:
        return None
    part = shape[norm.attr("axis") :] if norm.kind in (K.LAYER_NORM, K.RMS_NORM) else shape[1:2]
    extents = tuple(extent for extent in part if isinstance(extent, int))
    return extents if len(extents) == len(part) else None


def _merged(graph: Graph, chain: list[Op], fresh: FreshNames) -> Rewrite:
    first, last = chain[0], chain[-1]
    eps, gain = float(first.attr("eps")), uniform(graph, first.operand("weight"), 1.0) or 1.0
    factor = 1.0
    for norm in chain[1:]:
        own = float(norm.attr("eps"))
        factor, eps = gain / math.sqrt(gain**2 + own), eps * own / (gain**2 + own)
        gain = factor * (uniform(graph, norm.operand("weight"), 1.0) or 1.0)
    edits: list[Edit] = []
    weight = _gain(last, factor, edits, fresh)
    for norm in reversed(chain[:-1]):
        x = norm.inputs[0]
        assert x is not None  # a norm reads something
        edits += [ReplaceUses(norm.output.name, x.name), Erase(norm.name)]
    x = last.inputs[0]
    assert x is not None
    source = first.inputs[0]
    direct = x.producer in chain and source is not None
    read = source.name if direct and source is not None else x.name
    bias = last.operand("bias") if len(last.inputs) > 2 else None
    tail = () if first.kind is K.RMS_NORM else (None if bias is None else bias.name,)
    attrs = {**last.attrs, "eps": eps}
    edits.append(Fuse((last.name,), first.kind.value, (read, weight, *tail), (last.output.name,), attrs))
    equation = "N₂(c·N₁(x) + b)  →  N(x), ε = ε₁ε₂/(c² + ε₂), γ = γ₂·c/√(c² + ε₂)"
    gone = ", ".join(f"'{norm.name}'" for norm in chain[:-1])
    return Rewrite(last.name, equation, f"does what {gone} did: ε = {eps:.3g}, gain times {factor:.7g}", tuple(edits))


def _gain(norm: Op, factor: float, edits: list[Edit], fresh: FreshNames) -> str | None:
    """The last norm's gain, times a factor."""
    weight = norm.operand("weight")
    if factor == 1.0:
        return None if weight is None else weight.name
    if weight is None:
        name = fresh(f"{norm.output.name}_gain")
        settings = {"shape": _extents(norm), "value": factor, "dtype": norm.output.dtype}
        edits.append(AddParameter(name, "constant", (), settings, trainable=False))
        return name
    stored = held(weight) or weight
    operands, settings = (stored.name,), {"factor": factor}
    if stored.role is Role.PARAMETER and len(stored.uses) == 1:
        edits.append(SetParameter(stored.name, "scaled", operands, settings))
        return weight.name
    name = fresh(f"{weight.name}_scaled")
    edits.append(AddParameter(name, "scaled", operands, settings))
    return name
