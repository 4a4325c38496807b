"""From an edited graph back to what the user gave: a module, a traced graph, an exported program, a file."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import fx, nn
from torch.export import Dim, ExportedProgram

from rescompile.errors import RescompileError
from rescompile.fx_inline import unfold
from rescompile.fx_modes import Modes, align, depends_on_mode, modes_of, record
from rescompile.fx_modules import is_known

if TYPE_CHECKING:
    from rescompile.fx_graph import FxGraph
    from rescompile.fx_module import RewrittenModule


@dataclass(slots=True)
class Origin:
    """What a graph was captured from."""

    kind: Literal["module", "graph", "program"]
    model: Any
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    shapes: Any = None  # dynamic shapes, as torch.export takes them
    training: bool = False
    pristine: fx.Graph | None = None  # as captured; never edited


def to_user(graph: FxGraph) -> nn.Module | ExportedProgram:
    """The committed graph as the kind of object that it was captured from, with tensors of its own."""
    origin = graph.origin
    if origin is not None and origin.kind == "program":
        return to_program(graph)
    return to_module(graph)


def to_module(graph: FxGraph) -> RewrittenModule:
    """The committed graph as a module that answers `train()` and `eval()`; its tensors are copies."""
    from rescompile.fx_module import RewrittenModule

    modes = _modes(graph)
    module = RewrittenModule.adopt(graph.module, modes=modes, name=graph.name or "Rewritten", tensors=_own_tensor)
    present = {node.name: node for node in module.graph.nodes}
    for name, differences in modes.nodes.items():
        node = present.get(name)
        if node is not None and not modes_of(node):
            record(node, "modes", differences)
    return module


def to_program(graph: FxGraph) -> ExportedProgram:
    """The committed graph as an exported program, captured with the example inputs of the original."""
    from rescompile.fx_capture import export

    origin = graph.origin
    if origin is None or not (origin.args or origin.kwargs):
        raise RescompileError("An exported program needs example inputs: capture the model with some.")
    from rescompile.fx_module import RewrittenModule

    module = RewrittenModule.adopt(
        graph.module, modes=Modes(origin.training), name=graph.name or "Rewritten", tensors=_own_tensor
    )
    shapes = origin.shapes
    if origin.kind == "program":
        shapes = _program_shapes(origin.model)
    return export(module, origin.args, origin.kwargs, shapes)


def save(graph: FxGraph, path: str | os.PathLike[str]) -> None:
    """Write the graph as a `.pt2` file, whole or not at all."""
    path = Path(path)
    program = to_program(graph)
    try:
        handle, partial = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".pt2")
        os.close(handle)
    except OSError as error:
        raise RescompileError(f"'{path}' cannot be written: {error.strerror}.") from error
    try:
        torch.export.save(program, partial)
        os.replace(partial, path)
    except (OSError, RuntimeError, ValueError, TypeError) as error:
        Path(partial).unlink(missing_ok=True)
        raise RescompileError(f"'{path}' cannot be written: {error}.") from error


def _own_tensor(tensor: torch.Tensor) -> torch.Tensor:
    twin = tensor.detach().clone()
    return nn.Parameter(twin, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else twin


def _program_shapes(program: ExportedProgram) -> Any:
    """The dynamic dimensions of an exported program, as torch.export takes them."""
    known: dict[str, Any] = {}
    ranges = {str(symbol): limits for symbol, limits in program.range_constraints.items()}

    def extent(dim: Any) -> Any:
        name = str(dim.node.expr)
        if not name.isidentifier():
            return Dim.AUTO
        if name not in known:
            limits = ranges.get(name)
            low = int(limits.lower) if limits is not None and limits.lower > 0 else None
            high = int(limits.upper) if limits is not None and limits.upper.is_Integer else None
            known[name] = Dim(name, min=low, max=high)
        return known[name]

    vals = {node.name: node.meta.get("val") for node in program.graph.find_nodes(op="placeholder")}
    shapes = [
        {axis: extent(dim) for axis, dim in enumerate(vals[name].shape) if isinstance(dim, torch.SymInt)}
        if isinstance(vals[name], torch.Tensor)
        else None
        for name in program.graph_signature.user_inputs
        if isinstance(name, str)
    ]
    if not known:
        return None
    spec = program.call_spec.in_spec
    args, kwargs = torch.utils._pytree.tree_unflatten(shapes, spec)
    names = program.module_call_graph[0].signature
    labels = list(names.forward_arg_names or ()) if names is not None else []
    return {**dict(zip(labels, args, strict=False)), **kwargs} if labels else (*args, *kwargs.values())


def _modes(graph: FxGraph) -> Modes:
    origin = graph.origin
    if origin is None or origin.pristine is None:
        return Modes(graph.module.training)
    if origin.kind == "graph":
        return _traced_modes(graph, origin)
    modes = _both_forms(origin, origin.pristine)
    if modes.refusal is None:
        lost = _lost_nodes(graph, modes.nodes, origin.pristine)
        modes.refusal = _lost(lost) if lost else None
    return modes


def _both_forms(origin: Origin, pristine: fx.Graph) -> Modes:
    """Capture the model in its other form, and compare."""
    from rescompile.fx_capture import export

    model: nn.Module = origin.model
    flags = {child: child.training for child in model.modules()}
    try:
        for child in flags:
            _switch(child, not origin.training)
        other = unfold(export(model, origin.args, origin.kwargs, origin.shapes))
    except RescompileError as error:
        return Modes(origin.training, refusal=str(error))
    finally:
        for child, training in flags.items():
            _switch(child, training)
    return align(pristine, other.graph, training=origin.training)


def _switch(module: nn.Module, training: bool) -> None:
    """Change one module's form, not that of its children, unless it is one of ours."""
    from rescompile.fx_module import RewrittenModule

    if isinstance(module, RewrittenModule):
        module.train(training)
    else:
        module.training = training


def _lost_nodes(graph: FxGraph, names: Iterable[str], pristine: fx.Graph) -> list[str]:
    """Those of the nodes that an edit removed, or made something else of."""
    names = [name for name in names if name not in graph.forgone]
    now = {node.name: node for node in graph.module.graph.nodes}
    before = {node.name: node for node in pristine.nodes}
    return [n for n in names if n not in now or not (_operation(now[n]) == _operation(before[n]) or modes_of(now[n]))]


def _operation(node: fx.Node) -> str:
    """What a node calls, in place or not."""
    return str(getattr(node.target, "_opname", node.target)).removesuffix("_")


def _traced_modes(graph: FxGraph, origin: Origin) -> Modes:
    """A traced graph's modules hold the mode; what an edit wrote out as functions is recorded at the nodes."""
    modes = Modes(origin.training)
    if origin.pristine is None:
        return modes
    present = {node.name: node for node in graph.module.graph.nodes}
    lost = []
    for node in origin.pristine.find_nodes(op="call_module"):
        module = origin.model.get_submodule(str(node.target))
        changes = isinstance(module, nn.modules.batchnorm._BatchNorm) or getattr(module, "p", 0) > 0
        twin = present.get(node.name)
        if node.name in graph.forgone:
            continue
        if changes and is_known(module) and (twin is None or (twin.op != "call_module" and not modes_of(twin))):
            lost.append(node.name)
    modes.refusal = _lost(lost) if lost else None
    written = next((node for node in origin.pristine.nodes if depends_on_mode(node)), None)
    if written is not None and not lost:
        modes.refusal = f"'{written.name}' was exported in one form, and only the model itself knows the other."
    return modes


def _lost(names: list[str]) -> str:
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return f"a rewrite took away '{names[0]}'{more}, which training needs."
