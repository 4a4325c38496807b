"""Gain and bias of a norm, in the linears or convolutions that read it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeAlias

from rescompile.costs import tensor_size
from rescompile.graph import Graph, Op, Role, Value
from rescompile.kinds import OpKind as K
from rescompile.passes.features import carried, held, moved, normed_axis, uniform
from rescompile.passes.tracing import is_stored
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
    SetOperand,
    SetParameter,
    fuse_edit,
    gather,
    names,
)

_NORMS = (K.LAYER_NORM, K.RMS_NORM, K.GROUP_NORM, K.INSTANCE_NORM, K.BATCH_NORM)
_AVERAGES = (K.MEAN, K.ADAPTIVE_AVG_POOL)

# What an affine part is made of: gain, bias, and of a batch norm mean and variance.
Affine: TypeAlias = tuple[Value | None, ...]


@dataclass(frozen=True)
class FoldNormAffine:
    """W·(γ⊙z + β) + b  →  W'·z + b',  W' = W·diag(γ), b' = b + W·β,  z the norm without gain and bias

    A batch norm in evaluation is nothing else, with γ/√(σ²+ε) and β − μ·γ/√(σ²+ε), and goes as a whole.
    1. Gain and bias are stored, one number for each feature.
    2. Nothing but linears and convolutions reads the norm, through views and averages that keep features apart.
    3. A bias does not go into a convolution with a border of zeros, which it would not reach.
    4. Weights that something else reads as they are get a copy where `copy` says so; a bias always gets one.
    """

    name: ClassVar[str] = "fold-norm-affine"
    preserves: ClassVar[Preserves] = "values"
    copy: bool = False

    def plan(self, graph: Graph) -> Plan:
        """One rewrite for norms that share gain and bias, one refusal for each norm that keeps them."""
        return gather(self.name, self.preserves, graph, self._decisions(graph))

    def _decisions(self, graph: Graph) -> Iterator[Rewrite | Refusal]:
        groups: dict[tuple[Affine, float], list[_Site]] = {}
        norms = [op for op in graph if op.kind in _NORMS]
        if not norms:
            yield Refusal(graph.name or "model", "the model has no norm with a gain or a bias")
        for norm in norms:
            site = _site(graph, norm)
            if isinstance(site, Refusal):
                yield site
            else:
                groups.setdefault((site.affine, norm.attr("eps") if site.whole else 0.0), []).append(site)
        fresh = FreshNames(graph)
        for sites in groups.values():
            kept, refused = _unshared(sites, self.copy)
            yield from refused
            if kept:
                yield _folded(graph, kept, fresh)


@dataclass(slots=True)
class _Site:
    """A norm, its affine part, and the contractions that read it. `whole`: a batch norm, which goes with its gain."""

    norm: Op
    affine: Affine
    shifts: bool
    whole: bool
    readers: list[Op] = field(default_factory=list)


def _site(graph: Graph, norm: Op) -> _Site | Refusal:
    whole = norm.kind is K.BATCH_NORM
    gain, bias = norm.inputs[1], norm.inputs[2] if len(norm.inputs) > 2 else None
    if whole and (graph.training or norm.attr("training")):
        return Refusal(norm.name, "in training the statistics are the batch's own: no constant weight stands for them")
    axis = normed_axis(norm)
    if isinstance(axis, str):
        return Refusal(norm.name, axis)
    if whole and any(value is None for value in norm.inputs[3:5]):
        return Refusal(norm.name, "it has no running statistics")
    affine = tuple(held(value) for value in norm.inputs[1:])
    if any(value is not None and stored is None for value, stored in zip(norm.inputs[1:], affine, strict=True)):
        return Refusal(norm.name, "its gain, bias or statistics are computed in the graph")
    size = (norm.inputs[0].shape or ())[axis] if norm.inputs[0] is not None else None
    if any(value is not None and tensor_size(value)[0] != size for value in affine):
        return Refusal(norm.name, "its gain or bias is not one number for each feature")
    silent = uniform(graph, bias, 0.0) == 0
    if not whole and silent and uniform(graph, gain, 1.0) == 1:
        return Refusal(norm.name, "its gain is one and its bias zero already")
    site = _Site(norm, affine, whole or not silent, whole)
    reason = _collect(graph, site, axis)
    return Refusal(norm.name, reason) if reason else site


def _collect(graph: Graph, site: _Site, axis: int) -> str:
    """Notes the readers; says why one of them cannot take gain and bias."""
    pending = [(site.norm.output, axis)]
    readers: dict[Op, None] = {}
    while pending:
        value, along = pending.pop()
        if graph.is_output(value):
            return f"'{value.name}' is an output of the graph"
        for op, index in value.uses:
            if op.kind is K.SHAPE:
                continue
            if op.kind in (K.LINEAR, K.CONV) and index == 0:
                reason = _fits(op, value, along, site.shifts)
                if reason:
                    return reason
                readers[op] = None
                continue
            if op.kind is K.IDENTITY and op.attr("dropout") and site.shifts:
                return f"the dropout '{op.name}' drops the bias too, in training"
            through = carried if op.kind in _AVERAGES else moved
            for output in op.outputs:
                place = through(op, index, along, output)
                if place is None:
                    return f"'{op.name}' ({op.kind.value}) reads it, which cannot take its gain"
                pending.append((output, place))
    site.readers = sorted(readers, key=lambda op: op.order)
    return "" if readers else "no linear and no convolution reads it"


def _fits(op: Op, value: Value, axis: int, shifts: bool) -> str:
    if not is_stored(op.operand("weight")) or not is_stored(op.operand("bias")):
        return f"the weights of '{op.name}' are computed in the graph"
    if axis != (1 if op.kind is K.CONV else (value.rank or 0) - 1):
        return f"'{op.name}' contracts another axis than that of the gain"
    if shifts and op.kind is K.CONV and any(op.attr("pads")):
        return f"'{op.name}' has a border of zeros, which the bias does not reach"
    return ""


def _unshared(sites: list[_Site], copy: bool) -> tuple[list[_Site], list[Refusal]]:
    """Without `copy`, only norms whose readers' weights nothing else reads; one that stays may keep others back."""
    refused: list[Refusal] = []
    while not copy:
        own = {op for site in sites for op in site.readers}
        for site in sites:
            found = next(((op, other) for op in site.readers for other in _weight(op).users if other not in own), None)
            if found:
                op, other = found
                cost = f"a copy would cost {tensor_size(_weight(op))[0]:,} parameters (copy=true)"
                refused.append(
                    Refusal(site.norm.name, f"'{other.name}' also reads the weight of '{op.name}' as it is; {cost}")
                )
                sites = [kept for kept in sites if kept is not site]
                break
        else:
            break
    return sites, refused


def _weight(op: Op) -> Value:
    weight = op.operand("weight")
    assert weight is not None  # _fits
    return weight


def _settings(op: Op, site: _Site) -> dict[str, Any]:
    """Where the weight has its inputs, in how many groups."""
    at = 1 if op.kind is K.CONV or op.attr("transpose_weight") else 0
    groups = op.attr("groups") if op.kind is K.CONV else 1
    return {"axis": at, "groups": groups, "eps": site.norm.attr("eps") if site.whole else 0.0}


def _folded(graph: Graph, sites: list[_Site], fresh: FreshNames) -> Rewrite:
    site = sites[0]
    gain, bias = site.affine[0], site.affine[1] if len(site.affine) > 1 else None
    mean, variance = site.affine[2:4] if site.whole else (None, None)
    readers = list(dict.fromkeys(op for each in sites for op in each.readers))
    weights: dict[tuple[Value, int], list[Op]] = {}
    biases: dict[tuple[Value, Value | None, int], list[Op]] = {}
    for op in readers:
        groups = _settings(op, site)["groups"]
        weights.setdefault((_weight(op), groups), []).append(op)
        biases.setdefault((_weight(op), op.operand("bias"), groups), []).append(op)
    shifted: list[Edit] = []  # a bias is computed from the weight as it was
    scaled: list[Edit] = []
    rewired: list[Edit] = []
    renewed: dict[Op, str] = {}
    for (weight, old, _), ops in biases.items() if site.shifts else ():
        operands = names([weight, old, gain if site.whole else None, bias, mean, variance])
        settings = _settings(ops[0], site)
        if old is not None and _alone(old, ops, 2):
            shifted.append(SetParameter(old.name, "folded_bias", operands, settings))
            continue
        new = fresh(f"{old.name}_folded" if old is not None else _bias_name(weight.name))
        shifted.append(AddParameter(new, "folded_bias", operands, settings))
        renewed |= dict.fromkeys(ops, new)
    stands: dict[Value, str] = {}
    copies = 0
    if site.whole or uniform(graph, gain, 1.0) != 1:
        for (weight, _), ops in weights.items():
            settings, operands = _settings(ops[0], site), names([weight, gain, variance])
            if _alone(weight, ops, 1):
                scaled.append(SetParameter(weight.name, "folded_weight", operands, settings))
                continue
            stands[weight] = fresh(f"{weight.name}_folded")
            copies += tensor_size(weight)[0] * any(user not in readers for user in weight.users)
            scaled.append(AddParameter(stands[weight], "folded_weight", operands, settings))
            rewired += [SetOperand(op.name, 1, stands[weight]) for op in ops]
    for op, new in renewed.items():
        weight = _weight(op)
        if op.operand("bias") is not None:
            rewired.append(SetOperand(op.name, 2, new))
        else:
            reads = [op.inputs[0], stands.get(weight, weight.name), new]
            rewired.append(fuse_edit([op], op.kind, reads, op.outputs, **op.attrs))
    edits: list[Edit] = [*shifted, *scaled, *rewired]
    edits += _kept([each.norm for each in sites if _rounds(each.norm)], fresh)
    for each in sites:
        edits += [] if _rounds(each.norm) else _bare(each)
    readers_text = ", ".join(f"'{op.name}'" for op in readers[:4]) + (", …" if len(readers) > 4 else "")
    cost = f"; copies of {copies:,} parameters that something else reads too" if copies else ""
    shared = f", with {len(sites) - 1} more norms of the same gain and bias" if len(sites) > 1 else ""
    equation = "W·(γ⊙z + β) + b  →  W·diag(γ)·z + (b + W·β)"
    return Rewrite(site.norm.name, equation, f"into {readers_text}{shared}{cost}", tuple(edits))


def _alone(value: Value, ops: list[Op], index: int) -> bool:
    """Whether it is a parameter that only these operations read, as that operand."""
    return value.role is Role.PARAMETER and set(value.uses) == {(op, index) for op in ops}


def _rounds(norm: Op) -> bool:
    """Whether it may compute in less than the precision of its output: several nodes, with casts between them."""
    return (
        norm.output.dtype == "float64" and len(norm.native) > 1 and all(is_stored(value) for value in norm.inputs[1:])
    )


def _kept(norms: list[Op], fresh: FreshNames) -> list[Edit]:
    """Ones and zeros for norms whose nodes are to stay as they are."""
    edits: list[Edit] = []
    readers: dict[tuple[int, Value], list[Op]] = {}
    for norm in norms:
        for index in range(1, len(norm.inputs)):
            value = norm.inputs[index]
            if value is not None:
                readers.setdefault((index, value), []).append(norm)
    for (index, value), ops in readers.items():
        settings = {"shape": value.shape, "value": 1.0 if index == 1 else 0.0, "dtype": value.dtype}
        if _alone(value, ops, index):
            edits.append(SetParameter(value.name, "constant", (), settings))
            continue
        name = fresh(f"{value.name}_folded")
        edits.append(AddParameter(name, "constant", (), settings))
        edits += [SetOperand(op.name, index, name) for op in ops]
    return edits


def _bare(site: _Site) -> list[Edit]:
    """The norm without gain and bias; of a batch norm nothing."""
    norm = site.norm
    x = norm.inputs[0]
    assert x is not None
    if site.whole:
        return [ReplaceUses(norm.output.name, x.name), Erase(norm.name)]
    inputs = (x.name, *(None for _ in norm.inputs[1:]))
    views = dict.fromkeys(value.producer for value in norm.inputs[1:] if value is not None)
    unread = [op for op in views if op is not None and op.output.users == [norm]]
    fused = Fuse((norm.name,), norm.kind.value, inputs, (norm.output.name,), dict(norm.attrs))
    return [fused, *(Erase(op.name) for op in unread)]


def _bias_name(weight: str) -> str:
    """`layer.weight` → `layer.bias`; a name without a leaf to replace gets one more."""
    stem, dot, _ = weight.rpartition(".")
    return f"{stem}.bias" if dot else f"{weight}_bias"
