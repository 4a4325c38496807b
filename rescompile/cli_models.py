"""A graph out of what the command line calls MODEL."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rescompile import api
from rescompile.errors import RescompileError
from rescompile.graph import Graph
from rescompile.locate import load_attribute, model_form
from rescompile.printing import print_type
from rescompile.specs import InputSpec, parse_input


def load_model(model: str, inputs: Sequence[str] = (), trust: bool = False) -> Graph:
    """The graph of `file.onnx`, `file.pt2` or `package.module:attribute`.

    `inputs` describe the example inputs of a module that brings none of its own; a file brings its own, and what is
    given is compared with them.
    """
    specs = [parse_input(text) for text in inputs]
    if model_form(model) == "attribute":
        return _captured(model, specs)
    path = Path(model)
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise RescompileError(
            f"Cannot read '{model}': it {what}; give file.onnx, file.pt2 or package.module:attribute."
        )
    graph = api.load(path, trust=trust)
    if specs:
        _check_inputs(model, graph, specs)
    return graph


def _captured(model: str, specs: list[InputSpec]) -> Graph:
    module, examples = load_attribute(model)
    dynamic: list[dict[int, str]] = []
    if specs:
        from rescompile.fx_inputs import check_runs, example_tensors

        examples = example_tensors(specs)
        if hasattr(module, "forward"):  # an exported program has no forward of its own
            check_runs(module, examples, model)
        dynamic = [{axis: dim for axis, dim in enumerate(spec.shape) if isinstance(dim, str)} for spec in specs]
    elif examples is None and not hasattr(module, "graph"):  # graphs and exported programs know their own
        takes = _required(module)
        raise RescompileError(
            f"'{model}' does not bring example inputs: give --input SHAPE[:DTYPE] once for each of "
            f"{', '.join(takes) if takes else 'its inputs'}."
        )
    return api.capture(module, examples, dynamic=dynamic if any(dynamic) else None)


def _required(module: Any) -> list[str]:
    """Names of the inputs that a module's forward cannot do without."""
    parameters = inspect.signature(module.forward).parameters.values()
    ordinary = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return [item.name for item in parameters if item.kind in ordinary and item.default is inspect.Parameter.empty]


def _check_inputs(model: str, graph: Graph, specs: list[InputSpec]) -> None:
    own = ", ".join(f"{value.name}: {print_type(value.shape, value.dtype)}" for value in graph.inputs)
    if len(specs) != len(graph.inputs):
        raise RescompileError(
            f"'{model}' brings its own {len(graph.inputs)} inputs ({own}), and --input was given {len(specs)} times: "
            "leave it out."
        )
    for value, spec in zip(graph.inputs, specs, strict=True):
        if value.dtype not in (None, spec.dtype) or not _fits(spec, value.shape):
            raise RescompileError(f"--input {spec} does not fit '{model}', which takes {own}: leave it out.")


def _fits(spec: InputSpec, shape: tuple[int | str, ...] | None) -> bool:
    if shape is None:
        return True
    if len(shape) != len(spec.shape):
        return False
    return all(
        isinstance(own, str) or isinstance(given, str) or own == given
        for own, given in zip(shape, spec.shape, strict=True)
    )
