"""From a working graph to a Relax module: one function, kernels and generated loop nests called by it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import tvm
from tvm import relax

from rescompile.backends.emitter import Emitter
from rescompile.backends.fallback import Imports
from rescompile.backends.reports import Region
from rescompile.backends.rules import RULES, Rule
from rescompile.errors import UnsupportedOps
from rescompile.fused_region import parse
from rescompile.graph import Graph, Op, Value
from rescompile.kinds import OpKind, Trait


@dataclass
class Lowered:
    """A module whose `main` takes the inputs and then the weights, as one tuple."""

    module: tvm.IRModule
    weights: dict[str, np.ndarray[Any, Any]]
    regions: dict[str, Region]


def unsupported(graph: Graph, op: Op, imports: Imports) -> str | None:
    """Why the operation cannot be lowered, None when it can."""
    if op.has(Trait.RANDOM):
        return f"{op.kind.value} (a different value on each call; put the model into evaluation mode)"
    if op.kind is OpKind.BATCH_NORM and op.attr("training"):
        return "batch_norm with the batch's statistics (put the model into evaluation mode)"
    if needs_fallback(graph.ir, op):
        return imports.unsupported(graph, op)
    return None


def needs_fallback(ir: str, op: Op) -> bool:
    """Whether TVM's own frontend reads the operation: the vocabulary does not know it, or not all of it."""
    if op.kind not in RULES:
        return True
    # The vocabulary keeps neither ONNX's coordinate transformations nor its other modes of resizing.
    return op.kind is OpKind.INTERPOLATE and ir == "onnx"


def check(graph: Graph) -> Imports:
    """What frontends read of the graph; UnsupportedOps, naming all that cannot be lowered, before any work is done."""
    imports = Imports()
    live: set[Value] = set(graph.outputs)
    reasons: dict[str, list[str]] = {}
    for op in reversed(graph.ops):
        if not any(value in live for value in op.outputs):
            continue
        live.update(op.operands)
        reason = _unsupported_step(op) if op.kind is OpKind.FUSED_REGION else unsupported(graph, op, imports)
        if reason is not None:
            reasons.setdefault(reason, []).append(op.name)
    if reasons:
        listed = "; ".join(f"{reason} at {', '.join(reversed(names))}" for reason, names in sorted(reasons.items()))
        raise UnsupportedOps(
            f"TVM has no lowering for these operations: {listed}; run the model with --backend eager, inductor or "
            f"onnxruntime, or replace them."
        )
    return imports


def _unsupported_step(op: Op) -> str | None:
    """Why a region cannot be lowered: frontends read an IR's own operations only."""
    kinds = [step.kind for step in parse(op.attr("steps")).steps]
    unknown = next((kind for kind in kinds if kind not in RULES and kind is not OpKind.FULL), None)
    return None if unknown is None else f"{unknown.value} inside a fused region (unfuse the model first)"


def lower(
    e: Emitter, imports: Imports | None = None, *, contents: bool = True, rules: Mapping[OpKind, Rule] = RULES
) -> Lowered:
    """Emit every operation of the emitter's graph and close the function; without `contents` no weight is made."""
    graph = e.graph
    with e.bb.function("main"):
        with e.bb.dataflow():
            for op in graph:
                if imports is not None and op.name in imports.found:
                    imports.lower(e, op)
                else:
                    rules[op.kind](e, op)
            outputs = [e.cast(e.get(value), value.dtype) for value in graph.outputs]
            result = e.bb.emit_output(outputs[0] if len(outputs) == 1 else relax.Tuple(outputs))
        e.bb.emit_func_output(result, [*e.inputs, *e.weight_vars])
    module = e.bb.get()
    main = module["main"].with_attr("num_input", len(e.inputs))
    module.update_func(module.get_global_var("main"), main)
    return Lowered(module, e.weights() if contents else {}, e.regions)


def finish(module: tvm.IRModule, target: tvm.target.Target, schedule: tvm.transform.Pass | None) -> tvm.IRModule:
    """Generate loop nests for what no kernel serves, join neighbours, schedule them, gather the weights in a tuple."""
    passes: list[Any] = [
        relax.transform.InlinePrivateFunctions(),
        relax.transform.CanonicalizeBindings(),
        relax.transform.EliminateCommonSubexpr(),
        relax.transform.DeadCodeElimination(),
        relax.backend.DispatchSortScan(),
        # A reshape is another view of the same memory; inside a generated loop it would cost divisions.
        relax.transform.LegalizeOps(skip_ops=["relax.reshape"]),
        relax.transform.AnnotateTIROpPattern(),
        relax.transform.FuseOps(),
        relax.transform.FuseTIR(),
        relax.transform.DeadCodeElimination(),
    ]
    if schedule is not None:
        passes.append(schedule)
    passes.append(relax.transform.BundleModelParams("weights"))
    with target:
        return tvm.transform.Sequential(passes)(module)


def build_passes(storage: tvm.transform.Pass | None = None) -> tvm.transform.Pass:
    """From a finished module to virtual machine code: TVM's default, reshapes kept as views.

    storage: what says where tensors lie, in the place of TVM's planning.
    """
    return tvm.transform.Sequential(
        [
            relax.transform.ToNonDataflow(),
            relax.transform.RemovePurityChecking(),
            relax.transform.CallTIRRewrite(),
            storage or relax.transform.StaticPlanBlockMemory(),
            relax.transform.LowerAllocTensor(),
            relax.transform.KillAfterLastUse(),
            relax.transform.LowerRuntimeBuiltin(),
            relax.transform.ComputePrimValue(),
            relax.transform.VMShapeLower(),
            relax.transform.AttachGlobalSymbol(),
        ]
    )
