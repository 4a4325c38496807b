"""Rule: a sum becomes one kernel with the elementwise operations around it, where no contraction takes it."""

from __future__ import annotations

from rescompile.graph import Graph, Op, Value
from rescompile.passes.one_pass import WINDOWS, edit_of, gathered, searched
from rescompile.passes.region_rewrite import branch_end, readers_of, rewrite_of, unsuited
from rescompile.plans import Refusal, Rewrite


def elementwise_region(graph: Graph, join: Op, skip: Value | None = None) -> Rewrite | Refusal:
    """y = g(e(a) + s(r))  →  y = fused_region(a, r, ...): T·F + (1 − T)·x with its sigmoid, F·gate + x, pool(x) − x

    1. e and s are what `epilogue_region` says, which the sum alone reads, behind a pool of windows or behind anything.
    2. g is a chain that alone reads the sum, or the one activation among its readers: then the sum is returned, too.
    3. An addition alone is one kernel already: at least one more operation passes over memory on its own.
    """
    refused = unsuited(join, skip)
    if refused is not None:
        return refused
    kernel = searched(graph, join, skip, WINDOWS, lambda reason: None)
    if kernel is not None and kernel.root is not None:
        return rewrite_of(graph, join, kernel, f"with the pool '{kernel.root.name}'")
    for behind in (True, False):
        found = gathered(graph, join, (), behind=behind)
        if not isinstance(found, str) and len(found.computing) > 1 and not isinstance(edit_of(graph, found), str):
            return rewrite_of(graph, join, found, "with the elementwise operations around it")
    reason = f"{branch_end(graph, join, skip)}, and the sum goes to {readers_of(graph, join.output)} as it is"
    return Refusal(join.name, f"an addition alone is one kernel already: {reason}")
