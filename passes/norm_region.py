"""Rule: a residual join with everything beside it that one kernel over rows or channels computes, as one region."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from rescompile.fused_region import FUSIBLE
from rescompile.graph import Graph, Op, Value
from rescompile.kinds import OpKind, Trait
from rescompile.passes.add_norm import add_norm
from rescompile.passes.joins import only_reader, spread
from rescompile.passes.norm_rows import Axes, Rows, carried, origins, row_of
from rescompile.passes.one_pass import Place, unable
from rescompile.plans import Refusal, Rewrite, region_edit, same_shape

K = OpKind

_NORMS = (K.LAYER_NORM, K.RMS_NORM, K.GROUP_NORM, K.INSTANCE_NORM, K.BATCH_NORM)
_PLACES = (K.CAST, K.IDENTITY, K.PERMUTE, K.RESHAPE)  # may stand between a sum and the norm of it
_MOVES = (K.PERMUTE, K.RESHAPE, K.ROLL, K.FLIP, K.SLICE)
_FREE = (K.IDENTITY, K.RESHAPE)  # no kernel gains by holding these at its ends
_MIXES = (K.ADD, K.MUL, K.DIV)
_WORKS = (K.CONV, K.CONV_TRANSPOSE, K.LINEAR)


def norm_region(
    graph: Graph, join: Op, skip: Value | None = None, *, closed: Mapping[str, str] | None = None
) -> Rewrite | Refusal:
    """s = g(α·x + β·N₁(F + b) + ...); y = h(N₂(s))  →  y, s = region(x, F, ...)

    1. A norm reads the sum, past casts, permutations, views and what computes each element with constants; or a norm
       ends a branch that the sum alone reads. The first norm in the order of the graph counts; others read the sum.
    2. The sum has two or more computed operands of its own dtype and shape; some may be broadcast, of known extents.
    3. The norms' scales, shifts and statistics are constants, no batch norm is in training, and all other norms of a
       region have the same rows: one kernel computes them.
    4. In front of the sum goes in what the region alone reads: scales, biases, activations, casts, dropouts that are
       off, further sums, a norm, and moves of elements; where all norms are affine by channel, the contraction too.
    5. Behind the norm goes in what alone reads it and computes each element with constants: casts, an activation.

    Values that others read are outputs of the region. A plain sum with one norm is left to `add_norm`.
    `closed`: operations that no region may hold, each with the reason; the region ends before them.
    """
    refused = _sum(join)
    if refused:
        return Refusal(join.name, refused)
    found = _Region(Place(graph, closed or {}), join)
    found.go_behind()
    found.go_in_front(skip, moves=True)
    if not found.norms:
        why = found.reasons[0] if found.reasons else "no norm reads the sum, or ends a branch that only the sum reads"
        return Refusal(join.name, why)
    if not found.front and found.behind == [found.norm] and add_norm(graph, join, skip):
        return Refusal(join.name, "there is a sum and one norm, and nothing else to fuse")
    edit = region_edit(graph, found.ops, found.outputs())
    if isinstance(edit, str) and any(op.kind in _MOVES for op in found.front):
        # Not every move can be written down for every extent, and it may as well stay outside.
        found.go_in_front(skip, moves=False)
        edit = region_edit(graph, found.ops, found.outputs()) if found.norms else edit
    if isinstance(edit, str):
        return Refusal(join.name, edit)
    return Rewrite(join.name, found.equation(), found.reason(), (edit,))


def _sum(join: Op) -> str:
    """Why no region holds the sum; empty when one may."""
    computed = [value for value in join.operands if not value.constant]
    if len(set(computed)) < len(computed):
        return "it adds a value to itself"
    if len(computed) < 2:
        constant = next((value for value in join.operands if value.constant), join.output)
        return f"'{constant.name}' is a constant: a bias, not a skip"
    if not spread(join.output, computed):
        return "the operands have different or unknown shapes: extents that are unknown may differ"
    dtypes = {value.dtype for value in (join.output, *join.operands)}
    if len(dtypes) != 1:
        return f"the operands have dtypes {' and '.join(sorted(str(dtype) for dtype in dtypes))}"
    return ""


@dataclass
class _Region:
    """The operations around one join, collected in both directions."""

    place: Place
    join: Op
    behind: list[Op] = field(default_factory=list)  # from the sum on, in order
    front: list[Op] = field(default_factory=list)  # in order
    norm: Op | None = None  # the norm of the sum
    reasons: list[str] = field(default_factory=list)  # why a norm did not go in
    _rows: list[Rows] = field(default_factory=list)  # what its norms reduce over: of those that are not by channel

    @property
    def graph(self) -> Graph:
        """The graph that they are of."""
        return self.place.graph

    @property
    def ops(self) -> list[Op]:
        """All of them."""
        return [*self.front, self.join, *self.behind]

    @property
    def norms(self) -> list[Op]:
        """The norms among them."""
        return [op for op in self.ops if op.kind in _NORMS]

    def outputs(self) -> list[Value]:
        """Values that are read outside, the last one first: the normed value, then the sum."""
        inside = set(self.ops)
        made = [op.output for op in (self.join, *self.behind)]
        kept = [v for v in made if self.graph.is_output(v) or any(user not in inside for user in v.users)]
        return kept[::-1]

    def go_behind(self) -> None:
        """Follow the sum to the norm that reads it, and on."""
        value, chain = self.join.output, list[Op]()
        while not (path := self._path_to_norm(value)):
            reader = only_reader(self.graph, value)
            if reader is None or not _alone(self.place, reader, value):
                break
            chain.append(reader)
            value = reader.output
        if path:
            self.norm = path[-1]
            value = self.norm.output
        turned = any(op.kind is K.PERMUTE for op in path)
        chain += path
        while self.norm is not None:
            reader = only_reader(self.graph, value)
            back = turned and reader is not None and reader.kind is K.PERMUTE and _holdable(self.place, reader)
            if reader is None or not (back or _alone(self.place, reader, value)):
                break
            chain.append(reader)
            value = reader.output
        while chain and chain[-1].kind in _FREE:
            chain.pop()
        self.behind = chain

    def _path_to_norm(self, value: Value) -> list[Op]:
        """The operations from `value` to the first norm of it that a region can hold, empty without one."""
        for reader in sorted(value.users, key=lambda op: op.order):
            path = [reader]
            at: Axes = tuple(range(value.rank or 0))
            while path[-1].kind in _PLACES and _holdable(self.place, path[-1]):
                follower = only_reader(self.graph, path[-1].output)
                if follower is None:
                    break
                at = carried(path[-1], at)
                path.append(follower)
            read = path[-2].output if len(path) > 1 else value
            norm = path[-1]
            if norm.kind in _NORMS and norm.inputs[0] is read and not self._ends_branch(norm) and self._takes(norm, at):
                return path
        return []

    def _ends_branch(self, norm: Op) -> bool:
        """Whether a later sum alone reads the norm, and so takes it."""
        reader: Op | None = norm
        while reader is not None and (reader is norm or reader.kind is K.IDENTITY):
            reader = only_reader(self.graph, reader.output)
        return reader is not None and reader.kind is K.ADD and not any(value.constant for value in reader.operands)

    def go_in_front(self, skip: Value | None, *, moves: bool) -> None:
        """Collect what only the region reads."""
        del self._rows[self.norm is not None and self.norm.kind is not K.BATCH_NORM :]
        self.front = []
        inside = {self.join, *self.behind}
        axes: dict[Value, Axes] = {}
        waiting: set[Op] = set()
        came = origins(self.join, tuple(range(self.join.output.rank or 0)))
        works: list[Op] = []
        while came or waiting:
            for value, at in came:
                axes[value] = at if axes.get(value, at) == at else (None,) * len(at)
                if value.producer is not None and not value.constant:
                    waiting.add(value.producer)
            came = []
            if not waiting:
                break
            # Latest first: whoever else reads a value has been looked at before its producer.
            op = max(waiting, key=lambda op: op.order)
            waiting.remove(op)
            if len(op.outputs) != 1 or self.graph.is_output(op.output) or not inside.issuperset(op.output.users):
                continue
            at = axes[op.output]
            if op.kind in _WORKS and _holdable(self.place, op) and all(v.constant for v in op.operands[1:]):
                works.append(op)
            elif self._goes_in(op, at, moves=moves):
                inside.add(op)
                self.front.insert(0, op)
                came = origins(op, at)
        if works and self.norms and not self._rows and all(op.kind is not K.SLICE for op in self.front):
            # Where both are contractions (a projection shortcut), the branch takes the add, else the later one.
            self.front.insert(0, max(works, key=lambda op: (op.output is not skip, op.order)))
        self._trim()

    def _goes_in(self, op: Op, axes: Axes, *, moves: bool) -> bool:
        if op.kind in _NORMS:
            return self._takes(op, axes)
        if not _holdable(self.place, op):
            return False
        if op.kind in _MOVES:
            return moves
        if not op.has(Trait.ELEMENTWISE) or op.output.shape is None:
            return False
        computed = [value for value in op.operands if not value.constant]
        return len(computed) == 1 if op.kind not in _MIXES else op.output.shape in [value.shape for value in computed]

    def _takes(self, norm: Op, axes: Axes) -> bool:
        """Whether the norm goes into the region; notes what it reduces over, or why not."""
        why = _unfit(self.place, norm)
        if not why and norm.kind is not K.BATCH_NORM:
            rows = row_of(norm, axes)
            if rows is None:
                why = f"'{norm.name}' normalises over axes that a view has split or moved"
            elif self._rows and rows != self._rows[0]:
                why = f"'{norm.name}' normalises over other rows than the norm that is fused with the sum"
            else:
                self._rows.append(rows)
        if why:
            self.reasons.append(why)
        return not why

    def _trim(self) -> None:
        """Let go, from the outside, of what costs nothing where it is."""
        inside = set(self.ops)
        for op in list(self.front):
            if op.kind in _FREE and not any(value.producer in inside for value in op.operands):
                inside.remove(op)
                self.front.remove(op)

    def equation(self) -> str:
        """s = ...; y = N(s)  →  y, s = region(...)"""
        ahead = any(op.kind in _NORMS for op in self.front)
        summands = ["x", "N₁(f)" if ahead else "f", *"abcdefg"[: len(self.join.operands) - 2]]
        right = ["y"] if len(self.outputs()) == 1 else ["y", "s"]
        total = f"s = {' + '.join(summands)}"
        if self.norm is not None:
            total += f"; y = {'N₂' if ahead else 'N'}(s)"
        elif self.behind:
            total += f"; y = {self.behind[-1].kind.value}(s)"
        else:
            total, right = total.replace("s", "y", 1), ["y"]
        return f"{total}  →  {', '.join(right)} = region(x, f{', ...' if len(summands) > 2 else ''})"

    def reason(self) -> str:
        """Which norms, and what else went in."""
        others = [op.kind.value for op in self.ops if op is not self.join and op.kind not in _NORMS]
        named = " and ".join(f"'{op.name}'" for op in self.norms)
        return f"with {named}" + (f", and {', '.join(dict.fromkeys(others))} beside them" if others else "")


def _alone(place: Place, op: Op, value: Value) -> bool:
    """Whether `op` computes each element of `value` with constants only, without making it larger."""
    if not op.has(Trait.ELEMENTWISE) or not _holdable(place, op):
        return False
    others = (operand for operand in op.operands if operand is not value)
    return all(operand.constant for operand in others) and same_shape(op.output, value)


def _holdable(place: Place, op: Op) -> bool:
    return len(op.outputs) == 1 and not unable(place, op)


def _unfit(place: Place, norm: Op) -> str:
    """Why no region holds the norm; empty when one may."""
    graph = place.graph
    if norm.name in place.closed:
        return place.closed[norm.name]
    if graph.cannot_emit(norm.kind):
        return graph.cannot_emit(norm.kind)
    if norm.kind not in FUSIBLE:
        return f"'{norm.name}' ({norm.kind.value}) is nothing that a fused operation can hold"
    if any(value.uses or graph.is_output(value) for value in norm.outputs[1:]):
        return f"the statistics of '{norm.name}' are read elsewhere"
    if any(value is not None and not value.constant for value in norm.inputs[1:]):
        return f"the scale or shift of '{norm.name}' is computed from the graph's inputs"
    if norm.kind is K.BATCH_NORM:
        if graph.training or norm.attr("training"):
            return f"'{norm.name}' takes the statistics of the batch that it trains on"
        if norm.operand("mean") is None or norm.operand("var") is None:
            return f"'{norm.name}' has no running statistics"
    return ""
