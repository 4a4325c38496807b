"""Pre-norm networks with layer norms, as the same networks with RMS norms."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from rescompile.graph import Graph, Op, Role, Value
from rescompile.kinds import OpKind
from rescompile.passes.centring import Centred, Stream, Streams
from rescompile.passes.features import normed_axis
from rescompile.plans import (
    AddParameter,
    Edit,
    Erase,
    FreshNames,
    Fuse,
    Insert,
    Plan,
    Preserves,
    Refusal,
    ReplaceUses,
    Rewrite,
    SetOperand,
    SetParameter,
    gather,
    names,
)


@dataclass(frozen=True)
class RmsNorm:
    """LN(x) = γ⊙(x − E x)/√(Var x + ε) + β  →  RMS(x) = γ⊙x/√(E x² + ε) + β, where E x = 0

    Everything that writes into the stream loses its mean over the features: W' = W − E_out W, b' = b − E b (Jiang et
    al. 2023, Pre-RMSNorm and Pre-CRMSNorm Transformers, section 3). Then the stream has none.
    1. The norms run over the last axis alone.
    2. All that reads the stream are such norms: the raw stream is no output, enters no other norm, no contraction and
       no skip of another stream.
    3. Writers are embeddings, linears, convolutions of one group, stored positions and tokens. A factor for each
       feature behind a writer (LayerScale) goes into its weights.
    4. What no weights centre (an input, a table that the head reads too) has its mean taken off once, at run time;
       such places are fewer than the norms.
    5. The graph is no training form: dropout and steps of an optimiser bring a mean back.
    """

    name: ClassVar[str] = "rms-norm"
    preserves: ClassVar[Preserves] = "values"

    def plan(self, graph: Graph) -> Plan:
        """One rewrite or refusal for each stream."""
        return gather(self.name, self.preserves, graph, self._decisions(graph))

    def _decisions(self, graph: Graph) -> Iterator[Rewrite | Refusal]:
        norms = [op for op in graph if op.kind is OpKind.LAYER_NORM]
        if not norms:
            yield Refusal(graph.name or "model", "the model has no layer norm")
            return
        if graph.training:
            reason = "in training, dropout and steps of an optimiser bring a mean back: capture the model in evaluation"
            yield Refusal(norms[0].name, reason)
            return
        for norm in norms:
            axis = normed_axis(norm)
            if isinstance(axis, str):
                yield Refusal(norm.name, axis)
        streams, fresh = Streams(graph), FreshNames(graph)
        for stream in streams:
            yield _converted(graph, streams, stream, fresh)


def _converted(graph: Graph, streams: Streams, stream: Stream, fresh: FreshNames) -> Rewrite | Refusal:
    first, count = stream.norms[0].name, len(stream.norms)
    if len(stream.edges) >= count:
        more = f", like {count - 1} more norms of the stream" if count > 1 else ""
        saved = "taking the mean off at run time would cost as much as is saved"
        return Refusal(first, f"{stream.reasons[0]}; {saved}{more}")
    now: dict[Value, str] = {}  # names under which centred values are read
    edits: list[Edit] = []
    for value, readers in stream.edges.items():
        now[value] = _centre(value, stream.axes[value], readers, edits, fresh)
    changed = _tensors(graph, streams, stream.tensors, edits, fresh)
    for op in stream.factors:
        x, output = next(term for term in op.operands if term.producer is not None), op.output
        edits += [ReplaceUses(output.name, x.name), Erase(op.name)]
        now[output] = x.name
    for norm in stream.norms:
        edits += _rms(norm, now, fresh)
    start = stream.reasons[0] if stream.reasons else ""
    places = ", ".join(f"'{value.name}'" for value in stream.edges)
    late = f", the mean of {places} taken off at run time ({start})" if places else ""
    what = f"{count} norm{'s' * (count > 1)}; {changed} tensor{'s' * (changed != 1)} centred{late}"
    equation = "γ⊙(x − E x)/√(Var x + ε) + β  →  γ⊙x/√(E x² + ε) + β, E x = 0"
    return Rewrite(first, equation, what, tuple(edits))


def _centre(value: Value, axis: int, readers: list[tuple[Op, int]], edits: list[Edit], fresh: FreshNames) -> str:
    """x − E x for the readers that are given."""
    mean, centred = fresh(f"{value.name}_mean"), fresh(f"{value.name}_centred")
    shape = tuple(1 if place == axis else extent for place, extent in enumerate(value.shape or ()))
    edits += [
        Insert("mean", (value.name,), ((mean, shape, value.dtype),), {"axes": (axis,), "keepdims": True}),
        Insert("add", (value.name, mean), ((centred, value.shape, value.dtype),), {"scales": (1.0, -1.0)}),
    ]
    edits += [SetOperand(op.name, index, centred) for op, index in readers if op.kind is not OpKind.LAYER_NORM]
    return centred


def _tensors(graph: Graph, streams: Streams, parts: list[Centred], edits: list[Edit], fresh: FreshNames) -> int:
    """In place where nobody else reads the tensor, a copy otherwise. How many there are."""
    groups: dict[tuple[Value, int, Value | None], list[tuple[Op, int]]] = {}
    readers: dict[Value, set[tuple[Op, int]]] = {}
    keys: dict[Value, int] = {}
    for part in parts:
        if streams.silent(part):
            continue
        if part.key not in groups:
            keys[part.value] = keys.get(part.value, 0) + 1
        groups.setdefault(part.key, []).extend(part.uses)
        readers.setdefault(part.value, set()).update(part.uses)
    for (value, axis, factor), uses in groups.items():
        settings = {"axis": axis}
        if value.role is Role.PARAMETER and keys[value] == 1 and readers[value] == set(value.uses):
            edits.append(SetParameter(value.name, "centred", names([value, factor]), settings))
            continue
        copy = fresh(f"{value.name}_centred")
        edits.append(AddParameter(copy, "centred", names([value, factor]), settings))
        edits += [SetOperand(op.name, index, copy) for op, index in dict.fromkeys(uses)]
    return len(groups)


def _rms(norm: Op, now: dict[Value, str], fresh: FreshNames) -> list[Edit]:
    x, weight, bias = norm.inputs
    read = now.get(x, x.name) if x is not None else None
    attrs = {"axis": norm.attr("axis"), "eps": norm.attr("eps")}
    gain = None if weight is None else weight.name
    if bias is None:
        return [Fuse((norm.name,), "rms_norm", (read, gain), (norm.output.name,), attrs)]
    scaled = fresh(f"{norm.output.name}_rms")
    output = norm.output
    return [
        Insert("rms_norm", (read, gain), ((scaled, output.shape, output.dtype),), attrs),
        Fuse((norm.name,), "add", (scaled, bias.name), (output.name,)),
    ]
