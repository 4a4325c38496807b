"""Detection: which joins of a graph are residual, what their blocks look like, and why the others are none.

By structure, never by literal patterns: a join is residual where one operand's way back to a value that the other
operand comes from too is free of work, or a projection, and the other way works. Each kind of block is a rule here
(`sums`, `concats`, `gates`) or a row of a table (`flavours`); adding one changes no other.
"""

from __future__ import annotations

from rescompile.detection.explain import Explainer, Explanation, explain
from rescompile.detection.inspect import inspect_graph

__all__ = ["Explainer", "Explanation", "explain", "inspect_graph"]
