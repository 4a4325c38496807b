"""Composites: decomposed spellings of one operation, presented as that operation.

Exporters write a layer norm as nine primitives and a GELU as five. `recognise` finds such regions in a graph of neutral
primitives and lets the graph show one logical operation that covers their native nodes, so that detection, passes and
lowering see the same block in every IR. Nothing changes in the native object, and nothing is recognised that is not
equal to the composite: constants agree to 1e-4 relative, no interior value has another reader.
"""

from __future__ import annotations

from collections.abc import Callable

from rescompile.composites.activations import activation
from rescompile.composites.attention import attention
from rescompile.composites.group_norm import group_norm
from rescompile.composites.lerp import lerp
from rescompile.composites.linear import linear_bias
from rescompile.composites.moves import roll
from rescompile.composites.norms import norm
from rescompile.composites.region import Recogniser
from rescompile.composites.stacks import stacked_sum
from rescompile.graph import Graph, Op
from rescompile.kinds import OpKind

Rule = Callable[[Recogniser, Op], Op | None]

# The kind of operation that every spelling of a composite contains once, and the rules that start from it, in turn.
_ANCHORS: dict[OpKind, tuple[Rule, ...]] = {
    OpKind.MEAN: (norm, stacked_sum),
    OpKind.SUM: (norm, stacked_sum),
    OpKind.INSTANCE_NORM: (group_norm,),
    OpKind.ERF: (activation,),
    OpKind.TANH: (activation,),
    OpKind.SIGMOID: (activation,),
    OpKind.CLIP: (activation,),
    OpKind.HARDSIGMOID: (activation,),
    OpKind.SOFTMAX: (attention,),
    OpKind.ADD: (linear_bias,),
    OpKind.WHERE: (lerp,),
    OpKind.CONCAT: (roll,),
}


def recognise(graph: Graph) -> None:
    """Present every decomposed composite of the graph as one logical operation.

    One scan over the operations, a bounded number of steps from each anchor. Only for graphs just read: operations that
    share a native node with others (`Op.group`) are covered together or not at all.
    """
    recogniser = Recogniser(graph)
    for op in graph.ops:
        for rule in _ANCHORS.get(op.kind, ()):
            if not recogniser.covered(op):
                rule(recogniser, op)
    if recogniser.count:
        graph.sort()
