"""How deep a graph is: by the longest way from an input to an output, and by the shortest, through all the skips.

Both are exact, by dynamic programming over the operations. The longest way may enter a branch from outside (by an
encoder's memory); the shortest follows the residual stream: it crosses a block through its shortcut or its branch, and
never enters one past its fork, as an attention mask does. A projection counts what it holds: a skip with one is not
free.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from operator import attrgetter

from rescompile.detection.paths import works
from rescompile.fused import program
from rescompile.graph import Graph, Op, Value
from rescompile.kinds import OpKind, Trait
from rescompile.structure.members import Members, skip_of

_CONTRACTION = Trait.WORK | Trait.PARAMETRIC | Trait.LINEAR_IN_INPUT
_order = attrgetter("order")


@dataclass(frozen=True, slots=True)
class Depth:
    """Operations on the longest way and on the shortest one to the same output.

    `nominal`, `shortest`: working operations (see the vocabulary). `layers`, `shortest_layers`: only those with weights
    other than norms, which is how networks are named: ResNet-18 has 18 on its longest way.
    """

    nominal: int
    shortest: int
    layers: int
    shortest_layers: int

    def to_dict(self) -> dict[str, int]:
        """As JSON."""
        return {
            "nominal": self.nominal,
            "shortest": self.shortest,
            "layers": self.layers,
            "shortest_layers": self.shortest_layers,
        }


def graph_depth(graph: Graph, members: Members) -> Depth:
    """The depth of a committed graph whose blocks are known; all zero where no output depends on an input."""
    nominal, shortest = _extremes(graph, members, works)
    layers, shortest_layers = _extremes(graph, members, is_layer)
    return Depth(nominal, shortest, layers, shortest_layers)


def is_layer(op: Op) -> bool:
    """Whether the operation is what networks count as a layer: a contraction with weights, or a recurrent one."""
    return (op.has(_CONTRACTION) and not op.has(Trait.NORM)) or op.kind is OpKind.RECURRENT


_Measure = Callable[[Op], bool]


def _extremes(graph: Graph, members: Members, measure: _Measure) -> tuple[int, int]:
    """The longest way to any output, and the shortest one to the same output."""
    longest = _longest(graph, measure)
    outputs = [value for value in graph.outputs if value in longest]
    if not outputs:
        return 0, 0
    deepest = max(outputs, key=longest.__getitem__)
    return longest[deepest], _shortest(graph, members, measure).get(deepest, longest[deepest])


def _longest(graph: Graph, measure: _Measure) -> dict[Value, int]:
    found: dict[Value, int] = dict.fromkeys(graph.inputs, 0)
    for op in graph:
        for value in op.outputs:
            steps = [found[source] + weight for source, weight in _steps(op, value, measure) if source in found]
            if steps and not value.constant:
                found[value] = max(steps)
    return found


def _shortest(graph: Graph, members: Members, measure: _Measure) -> dict[Value, int]:
    across = _crossings(members, measure)
    found: dict[Value, int] = dict.fromkeys(
        (block.fork_value for block in members.blocks if block.fork_value.constant), 0
    )
    found.update(dict.fromkeys(graph.inputs, 0))
    for op in graph:
        _advance(op, found, members, across, measure)
    return found


def _crossings(members: Members, measure: _Measure) -> dict[int, dict[Value, int]]:
    """By block: the shortest way from its fork to each output of its join."""
    across: dict[int, dict[Value, int]] = {}
    for block in members.blocks:  # nested ones first
        inside = {*block.branch_ops, *block.shortcut_ops, *members.mix.get(block.id, ()), *block.join_ops}
        found = {block.fork_value: 0}
        skip = skip_of(block)
        if skip.producer not in inside:
            found[skip] = 0  # a part of the fork: features that every concatenation of a dense block lists anew
        for op in sorted(inside, key=_order):
            _advance(op, found, members, across, measure)
        across[block.id] = {value: found[value] for value in block.join_op.outputs if value in found}
    return across


def _advance(
    op: Op, found: dict[Value, int], members: Members, across: dict[int, dict[Value, int]], measure: _Measure
) -> None:
    """Make known the shortest ways to the operation's outputs; a block that is crossed already is one step."""
    block = members.by_join.get(op)
    if block is not None and block.id in across and block.fork_value in found:
        start = found[block.fork_value]
        found.update((value, start + steps) for value, steps in across[block.id].items())
        return
    for value in op.outputs:
        steps = [found[source] + weight for source, weight in _steps(op, value, measure) if source in found]
        if steps and not value.constant:
            found[value] = min(steps)


def _steps(op: Op, output: Value, measure: _Measure) -> list[tuple[Value, int]]:
    """What leads to an output, and what each way counts as: through a fused operation there may be several."""
    if not op.has(Trait.FUSED):
        weight = int(measure(op))
        return [(value, weight) for value in op.operands]
    region = program(op.kind, op.inputs, op.attrs)
    ways: list[dict[int, set[int]]] = [{index: {0}} for index in range(region.operands)]
    for step in region.steps:
        weight = int(measure(Op(step.kind, "", [], [], dict(step.attrs))))
        reached: dict[int, set[int]] = {}
        for source in step.inputs:
            for operand, lengths in ways[source].items() if source is not None else ():
                reached.setdefault(operand, set()).update(length + weight for length in lengths)
        ways.append(reached)
    found = ways[region.outputs[next(index for index, value in enumerate(op.outputs) if value is output)]]
    operands = ((op.inputs[index], lengths) for index, lengths in found.items())
    return [(value, length) for value, lengths in operands if value is not None for length in lengths]
