"""One way to run a model on any runtime: compiled by rescompile, ONNX Runtime, torch eager, torch inductor.

Arrays go in in the order of the graph's inputs and come out in the order of its outputs.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

import numpy as np

from rescompile.errors import RescompileError, nearest
from rescompile.graph import Graph

if TYPE_CHECKING:
    from rescompile.backends.program import Program
    from rescompile.fx_graph import FxGraph

Array: TypeAlias = np.ndarray[Any, Any]


class Runtime(Protocol):
    """A model, ready to run."""

    def run(self, inputs: Sequence[Array]) -> tuple[Array, ...]:
        """The outputs for these inputs."""
        ...

    def bind(self, inputs: Sequence[Array]) -> Callable[[], object]:
        """A call that runs on these inputs, in the form that the runtime takes without copying: for timing."""
        ...


def prepare(graph: Graph, name: str, *, threads: int | None = None) -> Runtime:
    """A graph, as it is, on the runtime of that name. RescompileError where it cannot run there."""
    try:
        make = RUNTIMES[name]
    except KeyError:
        raise RescompileError(
            f"There is no runtime '{name}'{nearest(name, RUNTIMES)}: choose from {', '.join(RUNTIMES)}."
        ) from None
    return make(graph, threads or _available())


class Compiled:
    """A program of rescompile's own."""

    def __init__(self, program: Program) -> None:
        self._program = program

    def run(self, inputs: Sequence[Array]) -> tuple[Array, ...]:
        """The outputs for these inputs."""
        return _tuple(self._program(*inputs))

    def bind(self, inputs: Sequence[Array]) -> Callable[[], object]:
        """A call on torch tensors, which the program takes without copying."""
        import torch

        program, tensors = self._program, [torch.from_numpy(array) for array in inputs]
        return lambda: program(*tensors)


class _OnnxRuntime:
    """A session of ONNX Runtime on the CPU."""

    def __init__(self, path: Path, threads: int) -> None:
        onnxruntime: Any = import_module("onnxruntime")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        self._session = onnxruntime.InferenceSession(str(path), options, ["CPUExecutionProvider"])
        self._names = [item.name for item in self._session.get_inputs()]

    def run(self, inputs: Sequence[Array]) -> tuple[Array, ...]:
        """The outputs for these inputs."""
        return tuple(self._session.run(None, self._feed(inputs)))

    def bind(self, inputs: Sequence[Array]) -> Callable[[], object]:
        """A call on arrays, which ONNX Runtime takes without copying."""
        session, feed = self._session, self._feed(inputs)
        return lambda: session.run(None, feed)

    def _feed(self, inputs: Sequence[Array]) -> dict[str, Array]:
        return dict(zip(self._names, inputs, strict=True))


class _Torch:
    """A torch callable; inputs are put where the example inputs of the capture had their tensors."""

    def __init__(self, call: Callable[..., Any], graph: FxGraph) -> None:
        self._call = call
        self._origin = graph.origin

    def run(self, inputs: Sequence[Array]) -> tuple[Array, ...]:
        """The outputs for these inputs."""
        import torch
        from torch.utils import _pytree

        leaves = _pytree.tree_leaves(self.bind(inputs)())
        return tuple(leaf.numpy() for leaf in leaves if isinstance(leaf, torch.Tensor))

    def bind(self, inputs: Sequence[Array]) -> Callable[[], object]:
        """A call on torch tensors."""
        import torch

        args, kwargs = self._arguments([torch.from_numpy(array) for array in inputs])
        call, inference = self._call, torch.inference_mode

        def bound() -> object:
            with inference():
                return call(*args, **kwargs)

        return bound

    def _arguments(self, tensors: list[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        import torch
        from torch.utils import _pytree

        if self._origin is None or not (self._origin.args or self._origin.kwargs):
            return tuple(tensors), {}
        leaves, form = _pytree.tree_flatten((self._origin.args, self._origin.kwargs))
        fresh = iter(tensors)
        filled = [next(fresh) if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
        args, kwargs = _pytree.tree_unflatten(filled, form)
        return args, kwargs


# ---- how each runtime is made ready --------------------------------------------------------------------------------


def _eager(graph: Graph, threads: int) -> Runtime:
    module, fx_graph = _module(graph, "eager", threads)
    return _Torch(module, fx_graph)


def _inductor(graph: Graph, threads: int) -> Runtime:
    import torch

    module, fx_graph = _module(graph, "inductor", threads)
    return _Torch(torch.compile(module, options={"freezing": True}), fx_graph)


def _onnxruntime(graph: Graph, threads: int) -> Runtime:
    if find_spec("onnxruntime") is None:
        raise RescompileError(
            "Running on ONNX Runtime needs onnxruntime, which is not installed: pip install 'rescompile[onnx]'."
        )
    with tempfile.TemporaryDirectory(prefix="rescompile") as folder:
        path = Path(folder) / "model.onnx"
        if graph.ir == "onnx":
            graph.save(str(path))
        else:
            _export(graph, path, threads)
        try:
            return _OnnxRuntime(path, threads)
        except Exception as error:
            raise RescompileError(f"ONNX Runtime cannot load the model: {_first_line(error)}.") from error


def _export(graph: Graph, path: Path, threads: int) -> None:
    import torch

    module, fx_graph = _module(graph, "onnxruntime", threads)
    origin = fx_graph.origin
    if origin is None or not (origin.args or origin.kwargs):
        raise RescompileError("Exporting to ONNX needs example inputs: capture the model with some.")
    try:
        torch.onnx.export(
            module,
            origin.args,
            str(path),
            kwargs=origin.kwargs,
            dynamic_shapes=origin.shapes,
            dynamo=True,
            verbose=False,
            external_data=True,
        )
    except Exception as error:
        raise RescompileError(f"torch.onnx.export cannot take the model: {_first_line(error)}.") from error


def _module(graph: Graph, name: str, threads: int) -> tuple[Any, FxGraph]:
    if graph.ir != "fx":
        raise RescompileError(f"'{name}' runs torch models: an ONNX model runs on onnxruntime and tvm.")
    import torch

    from rescompile.fx_graph import FxGraph

    if not isinstance(graph, FxGraph):
        raise RescompileError("The graph has no torch module to run.")
    torch.set_num_threads(threads)
    model = graph.to_user()
    return (model.module() if isinstance(model, torch.export.ExportedProgram) else model), graph


RUNTIMES: dict[str, Callable[[Graph, int], Runtime]] = {
    "eager": _eager,
    "inductor": _inductor,
    "onnxruntime": _onnxruntime,
}


def _available() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _tuple(outputs: Any) -> tuple[Any, ...]:
    return tuple(outputs) if isinstance(outputs, tuple | list) else (outputs,)


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0].rstrip(".") if text else type(error).__name__
