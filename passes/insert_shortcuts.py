"""Residual connections for a network that has none: where, of which kind, matched how, starting from what."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import ClassVar

from rescompile.blocks import Report
from rescompile.detection import inspect_graph
from rescompile.errors import RescompileError
from rescompile.graph import Graph, Op, Role, Value
from rescompile.kinds import OpKind, Trait
from rescompile.passes.geometry import geometry
from rescompile.passes.layers import Place
from rescompile.passes.likeness import Likeness, Nature, likeness
from rescompile.passes.mixing import MIXES, Combine, Kind, Mixed, Settings, Start
from rescompile.passes.places import Join, by_count, by_name, by_resolution, by_stage
from rescompile.passes.shortcut import Activation, Match, Norm, averages, projects
from rescompile.passes.sketch import Made, Sketch, Term
from rescompile.plans import FreshNames, Plan, Preserves, Refusal, Rewrite, gather

_HARM = "a projection on every skip trained to 12.2 % error against 6.6 % with identities (He et al. 2016, table 1)"


@dataclass(frozen=True)
class InsertShortcuts:
    """y = F(x)  →  y = F(x) + s(x), with s the identity where shapes are equal and matched to them where not

    1. Where: every `every` layers; or the places that `between` names, as FORK:JOIN; or, with `auto`, pairs of layers
       within a stage; with kind=long, from each resolution on the way down to the same one on the way up. The first
       layer behind an input, all from a reduction to a vector on, and what lies in a residual block stay outside.
    2. The join comes before the last activation of the skipped layers (He et al. 2015), after it, or, with
       `pre-activation`, between two bare contractions (He et al. 2016).
    3. Fork and join hold floating-point numbers, and no layer between them shares its weights with another.
    4. `match` says what the skip is where shapes differ; `norm` and `activation` what follows a projection (`auto`: the
       norm that the branch ends in).
    5. `start` says what the network computes at first: `preserve` the same as before, to the bit; see `passes.mixing`.
    """

    name: ClassVar[str] = "insert-shortcuts"
    every: int | None = None
    between: str | tuple[str, ...] = "auto"
    kind: Kind = "add"
    match: Match = "projection"
    start: Start = "preserve"
    join: Join = "before-activation"
    norm: Norm = "auto"
    activation: Activation = "none"
    gate_bias: float = -2.0
    combine: Combine = "concat"
    seed: int = 0

    @property
    def preserves(self) -> Preserves:
        """Values only where the shortcuts start as nothing."""
        return "values" if self.start == "preserve" else "interface"

    def plan(self, graph: Graph) -> Plan:
        """One rewrite or refusal for each place."""
        if self.every is not None and self.between != "auto":
            raise RescompileError("The options every and between of insert-shortcuts both say where: give one of them.")
        return gather(self.name, self.preserves, graph, self._decisions(graph))

    def _decisions(self, graph: Graph) -> Iterator[Rewrite | Refusal]:
        report = inspect_graph(graph)
        alike = likeness(graph, self._nature)
        found = list(self._fit(self._places(graph, report, alike), alike))
        forks = frozenset(place.fork for place in found if isinstance(place, Place))
        depth = self._depth(graph, found)
        fresh = FreshNames(graph)
        joined: dict[Value, Made] = {}  # what stands at a join now
        first = number = _first_number(graph)
        for place in found:
            if isinstance(place, Refusal):
                yield place
                continue
            sketch = Sketch(graph, fresh, f"shortcuts.{number}", place.join.dtype or "float32", self.seed + number)
            mixed = self._mixed(sketch, joined.get(place.fork, place.fork), place, depth, forks)
            if isinstance(mixed, Refusal):
                yield mixed
                continue
            joined[place.join] = mixed.result
            sketch.stand_in(place.join, mixed.result)
            reason = f"{place.layers} layer{'s' * (place.layers != 1)}" if place.layers else "as asked"
            reason += f"; {mixed.shortcut} shortcut: {sketch.costs}"
            if place.note:
                reason += f"; {place.note}"
            if number == first:
                reason += self._remark(depth)
            number += 1
            yield Rewrite(place.name, mixed.equation, reason, tuple(sketch.edits))
        if not found:
            yield Refusal(graph.name or "model", _nothing(report, self.kind))

    def _remark(self, depth: int) -> str:
        """What is said once."""
        remark = f"; warning: {_HARM}" if self.match == "always" else ""
        if self.start == "fixup":
            remark += f"; rescaled for {depth} branches; the classifier, zero in the paper, is left as it is"
        return remark

    def _places(self, graph: Graph, report: Report, alike: Likeness) -> Iterator[Place | Refusal]:
        if self.between != "auto":
            pairs = (self.between,) if isinstance(self.between, str) else self.between
            return by_name(graph, report, pairs)
        if self.kind == "long":
            return by_resolution(graph, report)
        if self.every is not None:
            return by_count(graph, report, self.every, self.join, alike)
        return by_stage(graph, report, self.join, alike)

    def _nature(self, place: Place) -> Nature | None:
        """How the skip at a place would work; None where it only moves elements or is not added."""
        lie = geometry(place)
        added = self.kind == "add" or (self.kind == "long" and self.combine == "add")
        if not added or isinstance(lie, Refusal):
            return None
        if not projects(place, lie, self.match):
            return "linear" if averages(lie, self.match) else None
        if self.activation != "none":
            return "active"
        return "normed" if self._norm(place) == "layer" else "linear"

    def _norm(self, place: Place) -> Norm:
        return _closing_norm(place) if self.norm == "auto" else self.norm

    def _fit(self, places: Iterable[Place | Refusal], alike: Likeness) -> Iterator[Place | Refusal]:
        """The places, with a refusal in the place of those that get no shortcut whatever its shape."""
        rescaled: set[Op] = set()
        for place in places:
            if isinstance(place, Refusal):
                yield place
            elif (refused := _unfit(place)) is not None:
                yield refused
            elif why := alike(place):
                advice = "skip more layers, or let it join behind an activation"
                yield Refusal(place.name, f"the sum would be no residual connection: {why}; {advice}")
            elif self.start == "fixup" and not rescaled.isdisjoint(place.ops):
                yield Refusal(place.name, "start=fixup rescales each layer for one branch, and another holds these too")
            else:
                rescaled.update(place.ops)
                yield place

    def _depth(self, graph: Graph, places: Iterable[Place | Refusal]) -> int:
        """How many of the places get a shortcut."""
        names = FreshNames(graph)
        tried = (
            self._mixed(Sketch(graph, names, "trial", "float32", 0), place.fork, place, 1, frozenset())
            for place in places
            if isinstance(place, Place)
        )
        return sum(not isinstance(mixed, Refusal) for mixed in tried)

    def _mixed(
        self, sketch: Sketch, source: Term, place: Place, depth: int, forks: frozenset[Value]
    ) -> Mixed | Refusal:
        lie = geometry(place)
        if isinstance(lie, Refusal):
            return lie
        norm = self._norm(place)
        settings = Settings(self.match, norm, self.activation, self.start, self.gate_bias, self.combine, depth, forks)
        return MIXES[self.kind](sketch, source, place, lie, settings)


def _unfit(place: Place) -> Refusal | None:
    """Why no shortcut goes here, whatever the shapes."""
    for value in (place.fork, place.join):
        if value.dtype is None or "float" not in value.dtype or value.dtype.startswith("float8"):
            return Refusal(place.name, f"'{value.name}' holds {value.dtype or 'an unknown dtype'}, not floating point")
    if place.fork.dtype != place.join.dtype:
        return Refusal(place.name, f"the branch goes from {place.fork.dtype} to {place.join.dtype}")
    shared = _shared_layer(place)
    if shared is not None:
        where = "in" if shared[1] in place.ops else "outside"
        return Refusal(place.name, f"'{shared[0].name}' shares its weights with '{shared[1].name}', {where} the branch")
    return None


def _shared_layer(place: Place) -> tuple[Op, Op] | None:
    """A working operation of the branch whose weights another operation reads too, and that one.

    Biases do not count: exporters store equal ones once.
    """
    for op in place.ops:
        if not op.has(Trait.PARAMETRIC) or op.has(Trait.NORM) or op.has(Trait.ACTIVATION):
            continue
        for value in op.inputs[1:3] if op.kind is OpKind.RECURRENT else op.inputs[1:2]:
            other = None if value is None else next((user for user in _readers(value) if user is not op), None)
            if other is not None:
                return op, other
    return None


def _readers(weight: Value) -> Iterator[Op]:
    """What reads a stored tensor, also transposed or otherwise moved."""
    while weight.producer is not None and weight.producer.has(Trait.FREE) and weight.constant:
        weight = weight.producer.operands[0]
    pending = [weight] if weight.role is Role.PARAMETER else []
    while pending:
        for user in pending.pop().users:
            if user.has(Trait.FREE) and all(output.constant for output in user.outputs):
                pending.extend(user.outputs)
            else:
                yield user


def _closing_norm(place: Place) -> Norm:
    """The norm for a projection: batch norm, or layer norm, where the branch ends in one."""
    op = place.join.producer
    if op is not None and op.kind is OpKind.BATCH_NORM:
        return "batch"
    return "layer" if op is not None and op.kind is OpKind.LAYER_NORM else "none"


def _first_number(graph: Graph) -> int:
    """Shortcuts of an earlier run keep their numbers."""
    taken = [value.name.split(".")[1] for value in graph.parameters if value.name.startswith("shortcuts.")]
    return 1 + max((int(number) for number in taken if number.isdecimal()), default=-1)


def _nothing(report: Report, kind: Kind) -> str:
    if kind == "long":
        return "the model does not lower its resolution and raise it to the same again, outside of residual blocks"
    if report.blocks:
        return f"every layer lies in one of the {len(report)} residual blocks already, or is stem or head"
    return "the model has no layers in a row between its first layer and its head"
