"""Plan, apply, verify, report: the driver that runs passes over a graph as one transaction.

The user's graph is edited by `rewrite_in_place` only. Passes are planned one after the other on a clone; the result is
verified against the original; a failure is bisected to the guilty rewrite, which is rolled back together with those
that build on it.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import msgspec

from rescompile.costs import Costs, cost_lines, graph_costs
from rescompile.errors import RescompileError, VerificationError
from rescompile.garbage import uncollected
from rescompile.graph import Graph
from rescompile.plans import AddParameter, Pass, Pipeline, Plan, Refusal, Rewrite, SetParameter
from rescompile.traffic import Traffic, graph_traffic, traffic_lines
from rescompile.verify import Reference, Verification, verify

if TYPE_CHECKING:
    from rescompile.gradient_comparison import GradientComparison


class Result(msgspec.Struct):
    """What a rewrite did. `graph` is a new graph; the one that went in is as it was."""

    original: Graph
    graph: Graph
    plan: Plan
    verification: Verification
    rolled_back: list[Refusal]

    @property
    def applied(self) -> list[Rewrite]:
        """The rewrites that are in the result."""
        return self.plan.rewrites

    @property
    def refused(self) -> list[Refusal]:
        """What was left alone or rolled back, with reasons."""
        return self.plan.refusals + self.rolled_back

    @property
    def model(self) -> Any:
        """The rewritten model, the same kind of object that went in."""
        return self.graph.to_user()

    @property
    def key_map(self) -> dict[str, list[str]]:
        """For each original parameter, the parameters of the result that hold it or were computed from it."""
        present = {value.name for value in self.graph.parameters}
        heirs: dict[str, list[str]] = {value.name: [] for value in self.original.parameters}
        origins: dict[str, dict[str, None]] = {name: {name: None} for name in heirs}
        for rewrite in self.applied:
            for edit in rewrite.edits:
                if isinstance(edit, AddParameter | SetParameter):
                    read = [origins[operand] for operand in edit.operands if operand in origins]
                    origins.setdefault(edit.name, {}).update(dict.fromkeys(name for each in read for name in each))
        for name in sorted(origins, key=lambda name: name not in heirs):
            for origin in origins[name] if name in present else ():
                heirs[origin].insert(0 if origin == name else len(heirs[origin]), name)
        return heirs

    @property
    def costs(self) -> tuple[Costs, Costs]:
        """Parameters, floating-point operations and bytes moved, before and after."""
        return graph_costs(self.original), graph_costs(self.graph)

    @property
    def traffic(self) -> tuple[Traffic, Traffic]:
        """Memory traffic beside the least that there could be, before and after."""
        return graph_traffic(self.original), graph_traffic(self.graph)

    def compare_gradients(self, inputs: Any = None, *, seed: int = 0, init: str = "given") -> GradientComparison:
        """Gradient norm and E[x²] by block, before and after: see `rescompile.compare_gradients`."""
        from rescompile.detection import inspect_graph
        from rescompile.fx_gradient_comparison import compare

        sides = [(graph, inspect_graph(graph)) for graph in (self.original, self.graph)]
        return compare(sides[0], sides[1], inputs, seed, init)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the model, whole or not at all. VerificationError when the verification failed."""
        if self.rolled_back or not (self.verification.ok or self.verification.skipped):
            raise VerificationError(f"Nothing was written to '{path}': {self._failure()}")
        self.graph.save(path)

    def _failure(self) -> str:
        return "; ".join(str(refusal) for refusal in self.rolled_back) or str(self.verification)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            "schema": 1,
            "applied": msgspec.to_builtins(self.applied),
            "refused": msgspec.to_builtins(self.refused),
            "verification": {"ok": self.verification.ok, **msgspec.to_builtins(self.verification)},
            "rolled_back": msgspec.to_builtins(self.rolled_back),
            "key_map": self.key_map,
            "unspelled": self.graph.unspelled(),
            "costs": {name: costs.to_dict() for name, costs in zip(("before", "after"), self.costs, strict=True)},
            "traffic": {name: each.to_dict() for name, each in zip(("before", "after"), self.traffic, strict=True)},
        }

    def __str__(self) -> str:
        lines = [str(self.plan), *_unspelled_lines(self.graph), *cost_lines(*self.costs), *traffic_lines(*self.traffic)]
        return "\n".join([*lines, str(self.verification)])


def _unspelled_lines(graph: Graph) -> list[str]:
    """Each reason why fused operations have no operator in the dialect, with the first of them that it holds for."""
    names: dict[str, list[str]] = {}
    for name, reason in graph.unspelled().items():
        names.setdefault(reason, []).append(name)
    return [
        f"{len(found)} written as functions of the model: {reason} ('{found[0]}'{', ...' if len(found) > 1 else ''})"
        for reason, found in names.items()
    ]


def stages(passes: Iterable[Pass | Pipeline]) -> list[Pass]:
    """The passes with every pipeline replaced by its stages."""
    flat: list[Pass] = []
    for item in passes:
        flat.extend(item.stages() if isinstance(item, Pipeline) else [item])
    return flat


@uncollected()
def make_plan(graph: Graph, passes: Sequence[Pass | Pipeline], dialect: str | None = None) -> tuple[Plan, Graph]:
    """The plan of all passes in order, and the graph as it leaves it. `graph` stays as it was."""
    working = _copy(graph, dialect)
    return _planned(working, passes), working


@uncollected()
def rewrite_in_place(graph: Graph, passes: Sequence[Pass | Pipeline], dialect: str | None = None) -> Result:
    """Plan and apply `passes` to the graph itself, without a copy to compare with: for who has no use for the original.

    The result's `original` is the outline of what went in. After an error the graph is unusable.
    """
    original = graph.outline()
    if dialect is not None:
        graph.use_dialect(dialect)
    plan = _planned(graph, passes)
    return Result(original, graph, plan, Verification(_preserves(plan), skipped="switched off"), [])


def _planned(working: Graph, passes: Sequence[Pass | Pipeline]) -> Plan:
    plan = Plan(working.name, working.ir)
    for item in stages(passes):
        step = item.plan(working)
        step.apply(working)
        plan.extend(step)
    return plan


def run_passes(
    graph: Graph,
    passes: Sequence[Pass | Pipeline],
    *,
    check: bool = True,
    all_or_nothing: bool = False,
    dialect: str | None = None,
) -> Result:
    """Plan and apply `passes`, and verify the result unless `check` is off.

    With `all_or_nothing` a place that a pass refuses is an error, and nothing is done. `dialect`: how fused operations
    are written; the graph's own way where there is none.
    """
    plan, rewritten = make_plan(graph, passes, dialect)
    if all_or_nothing and plan.refusals:
        count = len(plan.refusals)
        raise RescompileError(
            f"Nothing was done, because {count} place{'s were' if count > 1 else ' was'} refused, the first: "
            f"{plan.refusals[0]}."
        )
    return _verified(graph, rewritten, plan, check=check, dialect=dialect)


def apply_plan(graph: Graph, plan: Plan, *, check: bool = True, dialect: str | None = None) -> Result:
    """Apply a plan that was made before, and verify the result unless `check` is off.

    RescompileError where the plan does not fit the graph; nothing is changed then.
    """
    if plan.ir and plan.ir != graph.ir:
        raise RescompileError(f"The plan was made for a model in {plan.ir} and this one is in {graph.ir}: plan again.")
    rewritten = _copy(graph, dialect)
    plan.apply(rewritten)
    return _verified(graph, rewritten, plan, check=check, dialect=dialect)


def _copy(graph: Graph, dialect: str | None) -> Graph:
    copy = graph.clone()
    if dialect is not None:
        copy.use_dialect(dialect)
    return copy


def _preserves(plan: Plan) -> str:
    return "interface" if any(rewrite.preserves == "interface" for rewrite in plan.rewrites) else "values"


def _verified(graph: Graph, rewritten: Graph, plan: Plan, *, check: bool, dialect: str | None) -> Result:
    if not check:
        return Result(graph, rewritten, plan, Verification(_preserves(plan), skipped="switched off"), [])
    rolled_back: list[Refusal] = []
    reference = Reference(graph)
    verification = verify(graph, rewritten, _preserves(plan), reference=reference)
    while plan.rewrites and not verification.ok and not verification.skipped:
        guilty = _bisect(graph, plan, dialect, reference)
        rewrite = plan.rewrites[guilty]
        reason = f"rolled back, it changed the numbers: {verification.worst}"
        rolled_back.append(Refusal(rewrite.where, reason, rewrite.pass_name))
        kept = plan.rewrites[:guilty]
        for later in plan.rewrites[guilty + 1 :]:
            if _applies(_copy(graph, dialect), [*kept, later]):
                kept.append(later)
            else:
                rolled_back.append(
                    Refusal(later.where, f"rolled back: it builds on '{rewrite.where}'", later.pass_name)
                )
        plan = Plan(plan.model, plan.ir, kept, plan.refusals)
        rewritten = _copy(graph, dialect)
        plan.apply(rewritten)
        verification = verify(graph, rewritten, _preserves(plan), reference=reference)
    return Result(graph, rewritten, plan, verification, rolled_back)


def _applies(copy: Graph, rewrites: list[Rewrite]) -> bool:
    try:
        Plan(rewrites=rewrites).apply(copy)
    except RescompileError:
        return False
    return True


def _bisect(graph: Graph, plan: Plan, dialect: str | None, reference: Reference) -> int:
    """Index of the first rewrite whose prefix fails: the shortest failing prefix ends with the guilty one."""
    low, high = 0, len(plan.rewrites)  # the empty prefix holds, the whole plan fails
    while high - low > 1:
        middle = (low + high) // 2
        prefix = Plan(plan.model, plan.ir, plan.rewrites[:middle])
        trial = _copy(graph, dialect)
        prefix.apply(trial)
        if verify(graph, trial, _preserves(prefix), reference=reference).ok:
            low = middle
        else:
            high = middle
    return high - 1
