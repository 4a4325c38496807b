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
from rescompile.composites.linear import linear_bias
from rescompile.composites.moves import roll
from rescompile.composites.norms import norm
from rescompile.composites.region import Recogniser
from rescompile.graph import Graph, Op
from rescompile.kinds import OpKind

Rule = Callable[[Recogniser, Op], Op | None]

# The kind of operation that every spelling of a composite contains exactly once, and the rule that starts from it.
_ANCHORS: dict[OpKind, Rule] = {
    OpKind.MEAN: norm,
    OpKind.ERF: activation,
    OpKind.TANH: activation,
    OpKind.SIGMOID: activation,
    OpKind.CLIP: activation,
    OpKind.HARDSIGMOID: activation,
    OpKind.SOFTMAX: attention,
    OpKind.ADD: linear_bias,
    OpKind.CONCAT: roll,
}


def recognise(graph: Graph) -> None:
    """Present every decomposed composite of the graph as one logical operation.

    One scan over the operations, a bounded number of steps from each anchor. Only for graphs just read: operations that
    share a native node with others (`Op.group`) are left as they are.
    """
    recogniser = Recogniser(graph)
    for op in graph.ops:
        rule = _ANCHORS.get(op.kind)
        if rule is not None and not recogniser.covered(op):
            rule(recogniser, op)
    if recogniser.count:
        graph.sort()
