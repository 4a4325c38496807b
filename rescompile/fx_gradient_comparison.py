"""Measuring gradient flow before and after a rewrite: the same inputs, the same direction, corresponding blocks."""

from __future__ import annotations

from typing import Literal, TypeAlias, get_args

from rescompile.blocks import Report
from rescompile.errors import RescompileError, nearest
from rescompile.fx_gradients import Inputs, example_arrays, notes_on, run_probes
from rescompile.fx_initialise import initialise
from rescompile.fx_twin import twin
from rescompile.gradient_comparison import GradientComparison, pairs_of
from rescompile.gradients import GradientFlow, final_outputs
from rescompile.graph import Graph

Init: TypeAlias = Literal["given", "xavier"]

_GIVEN = "weights as given"
_WHEN = ("before", "after")


def compare(
    before: tuple[Graph, Report],
    after: tuple[Graph, Report],
    inputs: Inputs | None = None,
    seed: int = 0,
    init: str = "given",
) -> GradientComparison:
    """Gradient flow of both graphs on `inputs`, random ones of the first graph's shapes where there are none.

    `init`: "given", or "xavier" for new weights in both, the same ones (`fx_initialise`). RescompileError as for one
    graph, and where an input of the second graph is not one of the first.
    """
    if init not in get_args(Init):
        known = get_args(Init)
        raise RescompileError(
            f"There is no initialisation '{init}'{nearest(init, known)}: choose {' or '.join(known)}."
        )
    arrays, data, extents = example_arrays(before[0], inputs, seed)
    pairs, notes = pairs_of(before, after)
    if not pairs:
        nothing = GradientFlow(before[1].model, (), data, seed, extents, ())
        notes = ("There is no residual block in either, and so no stream to follow.",)
        return GradientComparison(nothing, nothing, (), _GIVEN, notes)
    # Which outputs count depends on the blocks that they are behind: the graph with all of them decides.
    lead = max((after, before), key=lambda side: len(side[1].blocks))
    positions = final_outputs(*lead)
    outputs = getattr(before[0], "output_names", None) or [value.name for value in before[0].outputs]
    original = {value.name for value in before[0].parameters}
    flows, weights = [], _GIVEN
    for graph, probes in ((before[0], [pair.before for pair in pairs]), (after[0], [pair.after for pair in pairs])):
        module = twin(graph)
        if init == "xavier":
            drawn = initialise(module, graph, original, seed)
            weights = f"new weights (Xavier, seed {seed}): {drawn} drawn"
        names, found = run_probes(module, probes, arrays, positions, seed, outputs)
        flows.append(GradientFlow(before[1].model, found, data, seed, extents, names, notes_on(found, len(found))))
    return GradientComparison(
        flows[0],
        flows[1],
        tuple((pair.was, pair.now) for pair in pairs),
        weights,
        (*notes, *(f"{when}: {note}" for when, flow in zip(_WHEN, flows, strict=True) for note in flow.notes)),
    )
