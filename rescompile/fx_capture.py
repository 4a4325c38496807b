"""Torch models into graphs: modules through torch.export, traced graphs, exported programs, `.pt2` files."""

from __future__ import annotations

import inspect
import io
import linecache
import re
import traceback
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import Dim, ExportedProgram
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext
from torch.fx.passes.fake_tensor_prop import FakeTensorProp
from torch.utils._pytree import tree_leaves

import rescompile.fx_fused  # noqa: F401 (a program may call the fused operations)
from rescompile.errors import RescompileError, nearest
from rescompile.fx_graph import FxGraph
from rescompile.fx_inline import drop_guards, unfold
from rescompile.fx_modes import depends_on_mode, in_training_form
from rescompile.fx_result import Origin
from rescompile.fx_tree import copy_module
from rescompile.fx_types import Dims

_FIXED = re.compile(r"L\['(\w+)'\]\.size\(\)\[(\d+)\][^\n]*constant \((\d+)\)")

Dynamic = Mapping[str, Mapping[int, str]] | Sequence[Mapping[int, str] | None] | None


def capture(model: Any, example_inputs: Any = None, *, dynamic: Dynamic = None) -> FxGraph:
    """The graph of a torch model, which itself stays untouched.

    `model`: an `nn.Module` (captured by torch.export in the mode, training or evaluation, that it is in), a
    `GraphModule` of `torch.fx.symbolic_trace` (taken as it is), or an `ExportedProgram`.
    `example_inputs`: a tensor, a sequence of positional arguments, or a mapping of keyword arguments. `dynamic`: names
    of the dimensions that may vary, by argument name or in the order of the arguments: `{"x": {0: "N"}}`.

    RescompileError: no example inputs, or a model that torch.export does not take; it names the line of the model.
    """
    if isinstance(model, FxGraph):
        return model
    if isinstance(model, ExportedProgram):
        return _from_program(model)
    if isinstance(model, fx.GraphModule) and not _is_rewritten(model):
        return _from_graph_module(model, example_inputs, dynamic)
    if isinstance(model, nn.Module):
        return _from_module(model, example_inputs, dynamic)
    raise RescompileError(
        f"A {type(model).__name__} is not a torch model: pass an nn.Module, a GraphModule or an ExportedProgram."
    )


def load_pt2(path: str | Path, trust: bool = False) -> FxGraph:
    """The graph of an exported program in a file. `trust`: torch may run code that the file holds.

    RescompileError: not a `.pt2` file, a truncated one, or one that is not trusted.
    """
    path = Path(path)
    if not path.is_file():
        raise RescompileError(f"There is no file '{path}'.")
    if path.stat().st_size == 0:
        raise RescompileError(f"'{path}' is empty: export the model again.")
    if not zipfile.is_zipfile(path):
        raise RescompileError(f"'{path}' is not a .pt2 file, or is truncated: torch.export.save writes one.")
    with zipfile.ZipFile(path) as archive:
        names = [name.partition("/")[2] for name in archive.namelist()]
    if not any(
        name == "archive_format" or name.startswith(("models/", "serialized_exported_program")) for name in names
    ):
        raise RescompileError(f"'{path}' holds no exported program: torch.export.save writes one.")
    if not trust:
        raise RescompileError(
            f"Loading '{path}' lets torch run code from the file: pass --trust (trust=True) if you know its origin."
        )
    try:
        program = torch.export.load(str(path))
    except Exception as error:
        raise RescompileError(f"torch cannot load '{path}': {_first_line(error)}") from error
    return _from_program(program, name=path.stem)


# ---- the four entries ----------------------------------------------------------------------------------------------


def _from_module(model: nn.Module, example_inputs: Any, dynamic: Dynamic) -> FxGraph:
    args, kwargs = arguments(example_inputs)
    if example_inputs is None and _needs_inputs(model):
        raise RescompileError(
            f"{type(model).__name__} needs example inputs to be captured: pass them, or --input 1x3x224x224."
        )
    names, shapes, args, kwargs = dynamic_shapes(model, args, kwargs, dynamic)
    program = export(model, args, kwargs, shapes)
    module = unfold(program)
    module.training = model.training
    graph = FxGraph.read(
        copy_module(module, {}),
        name=type(model).__name__,
        dims=Dims(_symbol_names(program, _bind(model, args, kwargs), names)),
    )
    graph.origin = Origin("module", model, args, kwargs, shapes, training=model.training, pristine=module.graph)
    return graph


def _from_program(program: ExportedProgram, name: str = "") -> FxGraph:
    try:
        module = unfold(program)
    except (RuntimeError, ValueError, AssertionError, KeyError) as error:
        raise RescompileError(f"torch cannot unfold the exported program: {_first_line(error)}") from error
    module.training = False
    graph = FxGraph.read(copy_module(module, {}), name=name or "ExportedProgram")
    args, kwargs = program.example_inputs or ((), {})
    graph.origin = Origin("program", program, args, kwargs, None, training=False, pristine=module.graph)
    return graph


def _from_graph_module(model: fx.GraphModule, example_inputs: Any, dynamic: Dynamic) -> FxGraph:
    args, kwargs = arguments(example_inputs)
    module = copy_module(model, {})
    module.__dict__.pop("train", None)  # of ExportedProgram.module(): methods of the original, which refuse
    module.__dict__.pop("eval", None)
    drop_guards(module)
    dims = Dims()
    has_shapes = any("val" in node.meta for node in module.graph.find_nodes(op="placeholder"))
    if example_inputs is not None and not has_shapes:
        names, _, args, kwargs = dynamic_shapes(model, args, kwargs, dynamic)
        dims = _propagate(module, args, kwargs, names)
    if any(depends_on_mode(node) for node in module.graph.nodes):  # exported: its flag says nothing
        module.training = in_training_form(module.graph)
    graph = FxGraph.read(module, name=type(model).__name__, dims=dims)
    graph.origin = Origin("graph", model, args, kwargs, None, training=module.training, pristine=model.graph)
    return graph


def _is_rewritten(model: fx.GraphModule) -> bool:
    from rescompile.fx_module import RewrittenModule

    return isinstance(model, RewrittenModule) and model.graph._codegen.__class__.__name__ == "_PyTreeCodeGen"


# ---- inputs --------------------------------------------------------------------------------------------------------


def arguments(example_inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments from what people pass as example inputs."""
    if example_inputs is None:
        return (), {}
    if isinstance(example_inputs, Mapping):
        return (), dict(example_inputs)
    if isinstance(example_inputs, list | tuple):
        return tuple(example_inputs), {}
    return (example_inputs,), {}


def _needs_inputs(model: nn.Module) -> bool:
    parameters = inspect.signature(model.forward).parameters.values()
    plain = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return any(p.default is p.empty and p.kind in plain for p in parameters)


def _bind(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    try:
        return dict(inspect.signature(model.forward).bind(*args, **kwargs).arguments)
    except TypeError as error:
        raise RescompileError(f"The example inputs do not fit {type(model).__name__}.forward: {error}.") from None


def dynamic_shapes(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], dynamic: Dynamic
) -> tuple[dict[str, dict[int, str]], Any, tuple[Any, ...], dict[str, Any]]:
    """Names of dynamic dimensions by argument, torch.export's form of them, and the arguments to capture with.

    torch.export takes an extent of 1 for a constant, so an example with one is doubled along a dynamic dimension.
    """
    bound = _bind(model, args, kwargs)
    if not dynamic:
        return {}, None, args, kwargs
    if not isinstance(dynamic, Mapping):
        dynamic = {name: dims for name, dims in zip(bound, dynamic, strict=False) if dims}
    for name in dynamic:
        if name not in bound:
            raise RescompileError(f"{type(model).__name__}.forward has no input '{name}'{nearest(name, bound)}.")
    names = {
        name: {int(axis): str(getattr(label, "__name__", label)) for axis, label in dims.items()}
        for name, dims in dynamic.items()
    }
    shapes: dict[str, Any] = {}
    for name, value in bound.items():
        wanted = names.get(name)
        if wanted is None:
            shapes[name] = _nothing(value)
            continue
        if not isinstance(value, torch.Tensor) or any(axis >= value.dim() for axis in wanted):
            raise RescompileError(f"Input '{name}' has no dimension {max(wanted)}: check the dynamic dimensions.")
        # Of any extent that the model allows: torch finds the bounds, and refuses a dimension that has to be fixed.
        shapes[name] = dict.fromkeys(wanted, Dim.DYNAMIC)
        bound[name] = _without_ones(value, wanted)
    places = list(bound)
    args = tuple(bound[place] for place in places[: len(args)])
    kwargs = {place: bound[place] for place in places[len(args) :]}
    return names, shapes, args, kwargs


def _nothing(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_nothing(item) for item in value]
    return {key: _nothing(item) for key, item in value.items()} if isinstance(value, dict) else None


def _without_ones(value: torch.Tensor, axes: Mapping[int, str]) -> torch.Tensor:
    for axis in axes:
        if value.shape[axis] == 1:
            value = torch.cat([value, value], axis)
    return value


def _symbol_names(
    program: ExportedProgram, bound: Mapping[str, Any], names: Mapping[str, Mapping[int, str]]
) -> dict[str, str]:
    """torch's symbols by the names that the user gave the dimensions. `bound`: arguments, in the program's order."""
    labels = [name for name, value in bound.items() for _ in tree_leaves(value)]
    vals = {node.name: node.meta.get("val") for node in program.graph.find_nodes(op="placeholder")}
    found: dict[str, str] = {}
    for name, user_input in zip(labels, program.graph_signature.user_inputs, strict=False):
        val = vals.get(user_input) if isinstance(user_input, str) else None
        for axis, label in names.get(name, {}).items():
            extent = val.shape[axis] if isinstance(val, torch.Tensor) else None
            if isinstance(extent, torch.SymInt):
                found[str(extent.node.expr)] = label
    return found


def _propagate(
    module: fx.GraphModule, args: tuple[Any, ...], kwargs: dict[str, Any], names: Mapping[str, Mapping[int, str]]
) -> Dims:
    """Shapes of a traced graph's nodes, by running it on fake tensors."""
    mode = FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv())
    symbols: dict[str, str] = {}
    labels: dict[str, Any] = {}
    values: list[Any] = []
    given = list(args)
    for node in module.graph.find_nodes(op="placeholder"):
        name = str(node.target)
        value = given.pop(0) if given else kwargs.get(name, node.args[0] if node.args else None)
        if isinstance(value, torch.Tensor):
            value = _fake(mode, value, names.get(name, {}), labels, symbols)
        values.append(value)
    flags = {child: child.training for child in module.modules()}
    module.eval()
    try:
        FakeTensorProp(module, mode).propagate_dont_convert_inputs(*values)
    except Exception as error:
        raise RescompileError(f"The model fails on the example inputs: {_first_line(error)}") from error
    finally:
        for child, training in flags.items():
            child.training = training
    return Dims(symbols)


def _fake(
    mode: FakeTensorMode, value: torch.Tensor, axes: Mapping[int, str], labels: dict[str, Any], symbols: dict[str, str]
) -> torch.Tensor:
    kinds = [DimDynamic.DYNAMIC if axis in axes else DimDynamic.STATIC for axis in range(value.dim())]
    fake = mode.from_tensor(value, symbolic_context=StatelessSymbolicContext(dynamic_sizes=kinds))
    for axis, label in axes.items():
        extent = fake.shape[axis]
        if isinstance(extent, torch.SymInt):
            symbols[str(extent.node.expr)] = label
            first = labels.setdefault(label, extent)
            if first is not extent:
                torch._check(first == extent)
    return fake


# ---- torch.export --------------------------------------------------------------------------------------------------


@contextmanager
def plain_attention() -> Iterator[None]:
    """Without the fast path of nn.TransformerEncoderLayer, which hides a whole layer in one call."""
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)


def export(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], shapes: Any) -> ExportedProgram:
    """`torch.export.export`, non-strict, with an error that names the line of the model it stops at."""
    try:
        # Where it fails, torch prints the half-made graph on stderr; the error says what matters of it.
        with plain_attention(), redirect_stderr(io.StringIO()):
            return torch.export.export(model, args, kwargs, dynamic_shapes=shapes, strict=False)
    except Exception as error:
        raise RescompileError(_why_not(model, args, kwargs, error)) from error


def _why_not(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], error: Exception) -> str:
    name, line = type(model).__name__, user_line(error)
    at = f" at {line}" if line else ""
    try:
        with torch.no_grad():
            model(*args, **kwargs)
    except Exception as failure:  # noqa: BLE001 (the user's code may raise anything)
        where = user_line(failure)
        return f"{name} fails on the example inputs{f' at {where}' if where else ''}: {_first_line(failure)}"
    fixed = _FIXED.search(str(error))
    if fixed is not None:
        return f"{name} fixes dimension {fixed[2]} of input '{fixed[1]}' to {fixed[3]}: do not make that one dynamic."
    text = f"torch.export cannot take {name}{at}: {_first_line(error)}"
    try:
        fx.symbolic_trace(model)
    except Exception:  # noqa: BLE001 (only whether it works matters)
        return f"{text} Rewrite that line without a decision on tensor values."
    return f"{text} torch.fx.symbolic_trace takes it: pass capture(torch.fx.symbolic_trace(model), example_inputs)."


def user_line(error: BaseException | None) -> str:
    """The innermost line outside torch that an error passed through: `model.py:12 in forward: "if x.sum() > 0:"`."""
    root = str(Path(torch.__file__).parent)
    own = str(Path(__file__).parent)
    best = ""
    while error is not None and not best:
        for frame in reversed(traceback.extract_tb(error.__traceback__)):
            path = frame.filename
            inside = path.startswith((root, own, "<frozen")) or "/contextlib.py" in path
            if inside or (path.startswith("<") and not linecache.getline(path, frame.lineno or 0)):
                continue
            best = f'{path}:{frame.lineno} in {frame.name}: "{(frame.line or "").strip()}"'
            break
        error = error.__cause__ or error.__context__
    return best


def _first_line(error: BaseException) -> str:
    """The first sentence of an error, with a full stop."""
    lines = [line.strip() for line in str(error).strip().splitlines() if line.strip()]
    text = lines[0] if lines else type(error).__name__
    return text if text.endswith((".", "!", "?")) else f"{text}."
