"""The Python API: the one place, with the command line, that sees core, passes and backends together."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import msgspec

from rescompile.errors import RescompileError
from rescompile.graph import Graph
from rescompile.plans import Pass, Pipeline, Plan
from rescompile.rewriting import Result, apply_plan, make_plan, rewrite_in_place, run_passes

if TYPE_CHECKING:
    from rescompile.backends.program import Program
    from rescompile.blocks import Report
    from rescompile.detection import Explanation
    from rescompile.differences import GraphDiff
    from rescompile.exploring import Exploration, Training
    from rescompile.fusion_audit import Audit
    from rescompile.gradient_comparison import GradientComparison
    from rescompile.gradients import GradientFlow

PassLike: TypeAlias = str | Pass | Pipeline
Passes: TypeAlias = PassLike | Sequence[PassLike]

# What compiling applies when the caller names no passes: every fusion, joins or not, that keeps the inferred values.
COMPILE_PASSES = ("canonicalise{dropout=true}", "fuse{joins=all,activations=true}")


class Tuning(msgspec.Struct, frozen=True):
    """How much to search when compiling: schedule trials, the folder that keeps tuning records, and where to time.

    `runner`: "local", or "rpc://host:port/key" for the machines at TVM's RPC tracker.
    """

    trials: int = 0
    database: str | None = None
    runner: str = "local"


def capture(model: Any, example_inputs: Any = None, *, dynamic: Any = None) -> Graph:
    """The graph of a torch module, GraphModule, ExportedProgram, or ONNX model object.

    `example_inputs`: tuple of tensors (or dict of keyword arguments) for a module; `dynamic`: torch.export's
    dynamic_shapes. The model itself is not changed by anything that is done to the graph.
    """
    if isinstance(model, Graph):
        return model
    root = type(model).__module__.partition(".")[0]
    if root in ("onnx", "onnx_ir", "onnxscript") or any("ONNXProgram" in base.__name__ for base in type(model).__mro__):
        from rescompile.onnx_files import capture as capture_onnx

        return capture_onnx(model)
    from rescompile.fx_capture import capture as capture_torch

    return capture_torch(model, example_inputs, dynamic=dynamic)


def load(path: str | Path, *, trust: bool = False) -> Graph:
    """The graph of a model file: `.onnx`, or `.pt2` with `trust`, because torch executes code from it."""
    suffix = Path(path).suffix.lower()
    if suffix == ".onnx":
        from rescompile.onnx_files import load as load_onnx

        return load_onnx(str(path))
    if suffix == ".pt2":
        from rescompile.fx_capture import load_pt2

        return load_pt2(str(path), trust=trust)
    raise RescompileError(f"'{path}' is neither an .onnx nor a .pt2 file: give one of these, or package.module:model.")


def inspect(model: Any, example_inputs: Any = None) -> Report:
    """The residual structure of a graph or model."""
    from rescompile.detection import inspect_graph

    return inspect_graph(capture(model, example_inputs))


def audit(model: Any, example_inputs: Any = None, *, extents: Mapping[str, int] | None = None) -> Audit:
    """The residual joins that are in no fused operation, why `fuse` would leave or take each, and the bytes it costs.

    `extents`: what symbolic extents count as (1 otherwise). See `rescompile.fusion_audit`.
    """
    graph = capture(model, example_inputs)
    return audit_report(graph, inspect(graph), extents)


def audit_report(graph: Graph, report: Report, extents: Mapping[str, int] | None = None) -> Audit:
    """As `audit`, for a graph whose report is there."""
    from rescompile.fusion_audit import audit as audit_joins

    return audit_joins(report, plan(graph, "fuse"), extents)


def gradient_flow(model: Any, example_inputs: Any = None, *, inputs: Any = None, seed: int = 0) -> GradientFlow:
    """Forward variance and gradient norm of every residual block, from one forward and one backward pass.

    `example_inputs`: what capturing a module needs. `inputs`: the data, by name or in order; random inputs of the
    model's shapes from `seed` where there are none. The gradient is that of L = Σ ⟨c, output⟩, c ~ N(0, 1) from `seed`;
    see `rescompile.gradients`. RescompileError names an operation that torch cannot compute, and says where there is
    no gradient. The model itself, its gradients included, stays as it is.
    """
    from rescompile.detection import inspect_graph
    from rescompile.fx_gradients import measure

    graph = capture(model, example_inputs)
    return measure(graph, inspect_graph(graph), inputs, seed)


def compare_gradients(
    before: Any, after: Any, example_inputs: Any = None, *, inputs: Any = None, seed: int = 0, init: str = "given"
) -> GradientComparison:
    """Gradient norm and E[x²] by block of two graphs or models, on the same inputs and in the same direction.

    `before`, `after`: a model and what became of it (`result.compare_gradients()` is short for a rewrite), or two whose
    parameters have the same names. `init`: "given", or "xavier" for new weights, the same in both. The other arguments
    are those of `gradient_flow`; see `rescompile.gradient_comparison`.
    """
    from rescompile.detection import inspect_graph
    from rescompile.fx_gradient_comparison import compare

    one, other = ((graph, inspect_graph(graph)) for graph in (capture(m, example_inputs) for m in (before, after)))
    return compare(one, other, inputs, seed, init)


def explain(graph: Graph, report: Report, node: str) -> Explanation:
    """Which block the operation or value belongs to and in which role, or which rule turned it down; prints as text."""
    from rescompile.detection import Explainer

    return Explainer(graph, report).why(node)


def resolve(passes: Passes) -> list[Pass | Pipeline]:
    """Passes out of specs like `fuse{joins=all}`; RescompileError suggests the nearest name or option."""
    from rescompile.passes import PASSES
    from rescompile.specs import parse_pass

    items = [passes] if isinstance(passes, str) or not isinstance(passes, Sequence) else passes
    return [parse_pass(item, PASSES) if isinstance(item, str) else item for item in items]


def plan(model: Any, passes: Passes, example_inputs: Any = None, *, dialect: str | None = None) -> Plan:
    """What `rewrite` would do, without doing it."""
    return make_plan(capture(model, example_inputs), resolve(passes), dialect)[0]


def rewrite(
    model: Any,
    passes: Passes,
    example_inputs: Any = None,
    *,
    verify: bool = True,
    all_or_nothing: bool = False,
    in_place: bool = False,
    dialect: str | None = None,
) -> Result:
    """Run passes over a graph or model; the result holds the rewritten model, and what was done, refused and proven.

    With `all_or_nothing` a place that a pass refuses raises RescompileError. With `in_place` a Graph is edited itself,
    which saves a copy of a large one and leaves nothing to compare with or to go back to: `verify` has to be off.
    `dialect`, for ONNX models: how fused operations are written, as "functions" of the model, which every runtime
    reads, or as ONNX Runtime's own operators, "ort", where it has one.
    """
    graph = capture(model, example_inputs)
    if in_place:
        if verify or all_or_nothing:
            raise RescompileError("A rewrite in place keeps no original: leave out verify and all_or_nothing.")
        return rewrite_in_place(graph, resolve(passes), dialect)
    return run_passes(graph, resolve(passes), check=verify, all_or_nothing=all_or_nothing, dialect=dialect)


def apply(
    model: Any, plan: Plan, example_inputs: Any = None, *, verify: bool = True, dialect: str | None = None
) -> Result:
    """Apply a plan that was made, and perhaps edited, before. `dialect`: as for `rewrite`."""
    return apply_plan(capture(model, example_inputs), plan, check=verify, dialect=dialect)


def load_plan(text: str | bytes) -> Plan:
    """A plan from its JSON."""
    return Plan.from_json(text)


def diff(before: Any, after: Any, *, names: tuple[str, str] = ("A", "B")) -> GraphDiff:
    """What changed between two graphs or models; `names` are what the report calls them."""
    from rescompile.differences import diff_graphs

    return diff_graphs(capture(before), capture(after), names)


def explore(
    model: Any,
    example_inputs: Any = None,
    *,
    candidates: Passes = (),
    inputs: Any = None,
    training: Training | None = None,
    seed: int = 0,
    progress: Callable[[str], None] = lambda text: None,
) -> Exploration:
    """Try placements of shortcuts: what each costs, how far gradients reach, and, with `training`, how it trains.

    `candidates`: passes, `insert-shortcuts` over several numbers of layers, joins and kinds where none are given;
    `inputs`: data for the one backward pass, random where there is none.
    """
    from rescompile.exploring import EVERY, JOINS, KINDS, grid
    from rescompile.exploring import explore as explore_graph

    chosen = resolve(candidates or grid(EVERY, JOINS, KINDS))
    graph = capture(model, example_inputs)
    return explore_graph(graph, chosen, inputs=inputs, training=training, seed=seed, progress=progress)


def compile(
    model: Any,
    example_inputs: Any = None,
    *,
    target: Any = "cpu",
    passes: Passes = COMPILE_PASSES,
    tune: Tuning | None = None,
    verify: bool = False,
    threads: int | None = None,
    buckets: Sequence[int] = (),
) -> Program:
    """Lower a graph or model through TVM to a program for `target`, after fusing it.

    `target`: "cpu", "cuda:sm_90", "cuda:sm_80,sm_90" (code for both, and PTX for later GPUs), or a TVM target. With
    `verify`, the fused graph is compared with the original before it is lowered. `buckets`: sizes of a dynamic batch to
    compile static code for, on a GPU, beside that for any; a call is padded to the next of them.
    """
    from rescompile.backends.compile import compile_graph

    result = run_passes(capture(model, example_inputs), resolve(passes), check=verify)
    if result.rolled_back:
        raise RescompileError(f"Fusing changed the numbers: {result.rolled_back[0]}.")
    options = tune or Tuning()
    return compile_graph(
        result.graph,
        target,
        trials=options.trials,
        database=options.database,
        runner=options.runner,
        threads=threads,
        buckets=buckets,
    )


def load_program(path: str | Path) -> Program:
    """A compiled program from an artifact."""
    from rescompile.backends.program import load as load_artifact

    return load_artifact(str(path))
