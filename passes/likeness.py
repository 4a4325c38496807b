"""Shortcuts that nobody could tell from the branch beside them.

W·x + P·x is the linear map (W + P)·x: with a projection around a single layer without its activation, neither side is
the shortcut, and both fold into one (He et al. 2015, section 3.2, saw no advantage in skipping one layer). The same
holds of relu(W·x) + relu(P·x). `inspect` calls the first `branches`, the second two working branches.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, TypeAlias

from rescompile.detection.paths import chain
from rescompile.detection.reach import Reach
from rescompile.graph import Graph
from rescompile.kinds import OpKind, Trait
from rescompile.passes.layers import Place

# A skip that works: a linear map, one with a norm by its own statistics, or one with an activation.
Nature: TypeAlias = Literal["linear", "normed", "active"]
# Why the sum at a place would be no residual connection; empty where it is one.
Likeness: TypeAlias = Callable[[Place], str]


def likeness(graph: Graph, nature: Callable[[Place], Nature | None]) -> Likeness:
    """The question, where `nature` says how the skip at a place would work; None: not at all, or it is no sum."""
    reach = Reach(graph)

    def why(place: Place) -> str:
        skip = nature(place)
        way = None if skip is None else chain(reach, place.fork, place.join)
        if way is None or not way.working:
            return ""
        if skip == "linear":
            return "W·x + P·x is one linear map (He et al. 2015, section 3.2)" if way.affine else ""
        contracts = any(op.kind in (OpKind.CONV, OpKind.LINEAR) for op in way.ops)
        told = skip == "normed" and any(op.has(Trait.ACTIVATION) for op in way.ops)
        if way.shortcut != "projection" or way.affine or not contracts or told:
            return ""
        return "branch and skip are projections alike, and neither is the other's shortcut"

    return why
