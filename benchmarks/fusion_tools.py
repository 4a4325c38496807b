"""The tools that `benchmarks.fusion` compares, each from an ONNX file to an ONNX file, and what is left of the joins.

A join counts as left when it stands alone in the tool's output: detection finds its block there and no fused operation
holds it, or a plain Add, Sum or Concat of computed values still makes the value of its name. Of the two counts the
larger one holds, and no tool is credited with more joins than plain sums and concatenations went away.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from rescompile import api
from rescompile.blocks import Block
from rescompile.detection import inspect_graph
from rescompile.errors import RescompileError
from rescompile.graph import Graph
from rescompile.verify import ADVERSARIES, make_inputs, relative_difference

_JOINS = ("Add", "Sum", "Concat")


@dataclass(frozen=True)
class Joins:
    """The residual joins of a file: value names by block, how many plain joins there are, and the graph itself."""

    blocks: tuple[Block, ...]
    plain: frozenset[str]
    graph: Graph

    @property
    def names(self) -> set[str]:
        """Names of the values that the joins make."""
        return {block.join_value.name for block in self.blocks if block.join_value is not None}


@dataclass
class Outcome:
    """What one tool did to one file. `errors`: the largest relative difference by runtime level, or what failed."""

    tool: str
    fused: int | None = None
    failure: str = ""
    errors: dict[str, float | str] = field(default_factory=dict)


Tool = Callable[[Path, Path, str], None]


def runtime(source: Path, target: Path, family: str) -> None:
    """ONNX Runtime's session, all of its levels: the fusions of "extended", and on this processor's own layout more."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.optimized_model_filepath = str(target)
    options.log_severity_level = 4
    onnxruntime.InferenceSession(str(source), options, providers=["CPUExecutionProvider"])


def transformers_tool(source: Path, target: Path, family: str) -> None:
    """onnxruntime.transformers.optimizer for the model's family, "bert" (its default) where it knows none."""
    from onnxruntime.transformers import optimizer

    optimizer.optimize_model(str(source), model_type=family or "bert").save_model_to_file(str(target))


def onnxscript_fusions(source: Path, target: Path, family: str) -> None:
    """onnxscript's optimizer, then its fusions for ONNX Runtime."""
    import onnxscript.optimizer
    from onnxscript.rewriter.ort_fusions import optimize_for_ort

    model = ir.load(source)
    onnxscript.optimizer.optimize(model)
    model, _ = optimize_for_ort(model)
    ir.save(model, target)


PEERS: dict[str, Tool] = {
    "ONNX Runtime, session": runtime,
    "ONNX Runtime, transformers tool": transformers_tool,
    "onnxscript, fusions for ORT": onnxscript_fusions,
}


def joins_of(path: Path) -> Joins:
    """The residual joins of a file, those in bodies included, sums of branches too."""
    graph = api.load(path)
    report = inspect_graph(graph)
    return Joins(report.blocks, plain_joins(ir.load(path)), graph)


def plain_joins(model: ir.Model) -> frozenset[str]:
    """Names of the values that a plain Add, Sum or Concat makes of two computed values or more."""
    computed: set[ir.Value] = {value for value in model.graph.inputs if value.name not in model.graph.initializers}
    found = set()
    for node in model.graph:
        reads = [value for value in node.inputs if value in computed]
        if reads:
            computed.update(node.outputs)
        if len(reads) > 1 and node.op_type in _JOINS and node.domain == "":
            found.add(node.outputs[0].name or "")
    return frozenset(found)


def stands(block: Block) -> bool:
    """Whether an operation of its own makes the block's join: no fused one, and no node that does more than that."""
    if block.fused:
        return False
    nodes = block.join_op.native
    if any(node.op_type in _JOINS and node.domain == "" for node in nodes):
        return True
    return block.join_op.group is None and all(node.domain == "" for node in nodes)


def fused_joins(before: Joins, after: Joins) -> int:
    """How many of the joins no longer stand alone."""
    total = len(before.blocks)
    standing = len(before.names & after.plain)
    unfused = sum(stands(block) for block in after.blocks)
    return max(0, min(total - max(standing, min(unfused, total)), len(before.plain) - len(after.plain)))


def run_peer(name: str, source: Path, target: Path, family: str, before: Joins) -> Outcome:
    """Run a tool and count; what it raises is its result."""
    outcome = Outcome(name)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            PEERS[name](source, target, family)
    except Exception as error:  # noqa: BLE001 (whatever a tool raises is a line of the table)
        outcome.failure = _sentence(error)
        return outcome
    try:
        outcome.fused = fused_joins(before, joins_of(target))
    except RescompileError as error:  # its output cannot be read: what stands by name has to do
        outcome.fused = len(before.blocks) - len(before.names & plain_joins(ir.load(target)))
        outcome.failure = f"counted by name: {_sentence(error)}"
    return outcome


# ---- numbers ---------------------------------------------------------------------------------------------------------


def compare(source: Path, target: Path, graph: Graph, kinds: tuple[str, ...] = ("random",)) -> dict[str, float | str]:
    """The largest relative difference of the target's outputs, optimised by the runtime ("default") and not ("off").

    `graph`: of the source, for its inputs. The reference is the source with the runtime's optimisation off.
    """
    batches = [make_inputs(graph, ADVERSARIES[kind], 0) for kind in kinds]
    feeds = [batch for batch in batches if batch is not None]
    if not feeds:
        return {"off": "an input has no known shape or dtype"}
    expected = outputs(source, feeds, "off")
    found: dict[str, float | str] = {}
    for level in ("off", "default"):
        try:
            actual = outputs(target, feeds, level)
        except Exception as error:  # noqa: BLE001 (a model that does not run is a line of the table)
            found[level] = _sentence(error)
            continue
        pairs = [(a, b) for run, other in zip(expected, actual, strict=True) for a, b in zip(run, other, strict=True)]
        found[level] = max(relative_difference(a, b) for a, b in pairs)
    return found


def outputs(path: Path, feeds: list[dict[str, np.ndarray[Any, Any]]], level: str) -> list[list[Any]]:
    """What a file computes for each of the inputs, with the runtime's optimisation "off" or as it is ("default")."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    if level == "off":
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return [session.run(None, feed) for feed in feeds]


def _sentence(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:160] if lines else ''}"
