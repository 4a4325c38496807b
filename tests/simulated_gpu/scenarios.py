"""python scenarios.py LIBCUDA LIBCUDART FOLDER NAME...: what programs do on the simulated GPU, as JSON by name.

Each scenario gets the folder with the artifacts and the driver's controls, and returns what the test looks at.
"""

from __future__ import annotations

import ctypes
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np


class Controls:
    """What a test chooses and counts of the simulated driver."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library
        library.simulated_get.restype = ctypes.c_long

    def __getitem__(self, name: str) -> int:
        return int(self._library.simulated_get(name.encode()))

    @contextmanager
    def having(self, **settings: int) -> Iterator[None]:
        """A GPU or driver of another kind, for a while."""
        usual = {"major": 9, "minor": 0, "devices": 2, "driver": 13000, "shared_limit": 227 << 10}
        for name, value in settings.items():
            self._library.simulated_set(name.encode(), ctypes.c_long(value))
        try:
            yield
        finally:
            for name in settings:
                self._library.simulated_set(name.encode(), ctypes.c_long(usual.get(name, 0)))


@dataclass
class FakeDevice:
    """As torch.device."""

    type: str = "cuda"
    index: int = 0

    def __str__(self) -> str:
        return f"{self.type}:{self.index}"


class FakeTensor:
    """As a torch tensor on a GPU, as far as programs look at it."""

    requires_grad = False

    def __init__(self, tensor: Any, dtype: str, device: FakeDevice | None = None, keeps: Any = None) -> None:
        self.tensor, self.dtype, self.device = tensor, f"torch.{dtype}", device or FakeDevice()
        self.shape = tuple(tensor.shape)
        self.keeps = keeps  # a list that the memory goes back to, or the tensor that this is a view of

    def __del__(self) -> None:
        if isinstance(self.keeps, list):
            self.keeps.append(self.tensor)

    def is_contiguous(self) -> bool:
        """Always."""
        return True

    def data_ptr(self) -> int:
        """Its address."""
        return int(self.tensor.data_ptr())


class FakeTorchMemory:
    """As TorchMemory: one current stream, and what is dropped is handed out again on that stream."""

    stream = 0
    fresh = False  # whether each tensor is a new one
    _pool: dict[Any, list[Any]] = {}

    def __init__(self, index: int, *, libraries: bool) -> None:
        from rescompile.backends.cuda.memory import PlainMemory

        self._plain, self._index = PlainMemory(index), index

    def graph(self) -> Any:
        """The runtime's, where no library is called."""
        return self._plain.graph()

    def empty(self, shape: Any, dtype: str) -> FakeTensor:
        """Of what was dropped the lowest address, as torch's allocator does, or a new one."""
        free = self._pool.setdefault((self._index, self.stream, tuple(shape), dtype), [])
        free.sort(key=lambda tensor: tensor.data_ptr())
        tensor = free.pop(0) if free and not self.fresh else self._plain.empty(shape, dtype)
        return FakeTensor(tensor, dtype, keeps=free)

    @property
    def capturing(self) -> bool:
        """Whether the stream is being captured."""
        from rescompile.backends.cuda import cudart

        return cudart.is_capturing(self.stream)

    def pointer(self, tensor: FakeTensor) -> int:
        """Its address."""
        return tensor.data_ptr()

    def rows(self, tensor: FakeTensor, count: int) -> FakeTensor:
        """A view."""
        return FakeTensor(self._plain.rows(tensor.tensor, count), tensor.dtype.removeprefix("torch."), keeps=tensor)

    def view(self, tensor: FakeTensor) -> Any:
        """As TVM takes it."""
        return tensor.tensor


def scenario_numpy(folder: Path, gpu: Controls) -> Any:
    """Arrays in and out: warm-up, capture, and what later calls allocate."""
    program, x, y = _loaded(folder, "static")
    errors, mallocs = [], []
    for _ in range(6):
        errors.append(_error(program(x), y))
        mallocs.append(gpu["mallocs"])
    launched, replayed = gpu["launches"], gpu["graph_launches"]
    program(x)
    return {
        "errors": errors,
        "mallocs": mallocs,
        "launches_of_a_replay": gpu["launches"] - launched,
        "replays": gpu["graph_launches"] - replayed,
        "note": program.note,
        "tvm": "tvm" in sys.modules,
    }


def scenario_pointers(folder: Path, gpu: Controls) -> Any:
    """Tensors that come again have graphs of their own; others go through buffers."""
    program, x, y = _loaded(folder, "static")
    with _fake_torch(stream=0):
        given = _tensor(x)
        errors, counted = [], []
        kept = None
        for _ in range(9):
            counts = _counts(gpu)
            kept = program(given)
            errors.append(_error(_arrays(kept), y))
            counted.append([now - then for now, then in zip(_counts(gpu), counts, strict=True)])
        FakeTorchMemory.fresh = True
        others = []
        for step in range(4):
            tensor, counts = _tensor(x + step), _counts(gpu)
            got = program(tensor)
            others.append([now - then for now, then in zip(_counts(gpu), counts, strict=True)])
            errors.append(_error(_arrays(got), _reference(folder, x + step)))
        FakeTorchMemory.fresh = False
        return {"errors": errors, "again": counted, "others": others}


def _counts(gpu: Controls) -> tuple[int, ...]:
    return gpu["captures"], gpu["copies"], gpu["mallocs"], gpu["launches"]


def scenario_streams(folder: Path, gpu: Controls) -> Any:
    """Two programs on two streams, in turns, nothing waiting in between: each has its own numbers."""
    from rescompile.backends.cuda import cudart

    (first, x, y), (second, _, _) = _loaded(folder, "static"), _loaded(folder, "static")
    streams = [cudart.create_stream(), cudart.create_stream()]
    errors, early = [], []
    with _fake_torch(stream=0):
        given = [_tensor(x), _tensor(x[::-1].copy())]
        wanted = [y, _reference(folder, x[::-1].copy())]
        for _ in range(5):
            kept = []
            for program, stream, tensor in zip((first, second), streams, given, strict=True):
                FakeTorchMemory.stream = stream
                kept.append(program(tensor))
            if not early:
                early = [bool(np.isnan(_raw(kept[0][0])).any())]
            for stream, got, want in reversed(list(zip(streams, kept, wanted, strict=True))):
                cudart.synchronize(stream)
                errors.append(_error(_arrays(got), want))
    # One program on both: a lane each, the weights once.
    before = gpu["mallocs"]
    with _fake_torch(stream=0):
        for _ in range(5):
            kept = []
            for stream, tensor in zip(streams, given, strict=True):
                FakeTorchMemory.stream = stream
                kept.append(first(tensor))
            for stream, got, want in reversed(list(zip(streams, kept, wanted, strict=True))):
                cudart.synchronize(stream)
                errors.append(_error(_arrays(got), want))
    return {"errors": errors, "early": early, "mallocs": gpu["mallocs"] - before}


def scenario_capture_of_the_caller(folder: Path, gpu: Controls) -> Any:
    """A caller that captures gets the launches into its own graph, on memory of its own."""
    from rescompile.backends.cuda import cudart

    program, x, y = _loaded(folder, "static")
    stream, graph = cudart.create_stream(), cudart.Graph()
    with _fake_torch(stream=stream):
        given = _tensor(x)
        for _ in range(4):
            program(given)
        own = FakeTorchMemory(0, libraries=False)
        pooled = [own.empty((*shape,), "float32") for shape in ((64, 48), (64, 48))]
        pooled += [FakeTensor(own._plain.empty((1 << 16,), "uint8"), "uint8") for _ in range(2)]
        captures = gpu["captures"]
        with _handed_out(pooled), graph.capturing(stream):
            kept = program(given)
        captures = gpu["captures"] - captures
        graph.launch(stream)
        cudart.synchronize(stream)
        return {"errors": [_error(_arrays(kept), y)], "captures": captures, "note": program.note}


def scenario_libraries(folder: Path, gpu: Controls) -> Any:
    """A program that calls torch's libraries is captured by torch, on the stream that both launch on."""
    import torch

    from rescompile.backends.cuda import cudart
    from rescompile.backends.cuda.memory import TorchGraph

    program, x, y = _loaded(folder, "static")
    program.manifest.libraries = ["rescompile.library"]
    current, streams = [cudart.create_stream()], []

    class Stream:
        """As torch.cuda.ExternalStream."""

        def __init__(self, handle: int) -> None:
            self.cuda_stream = handle

    class CaptureOfTorch:
        """As torch.cuda.graph."""

        def __init__(self, graph: Any, *, stream: Stream, capture_error_mode: str) -> None:
            self._graph, self._stream, self._mode = graph, stream, capture_error_mode

        def __enter__(self) -> None:
            streams.append(self._mode)
            current.append(self._stream.cuda_stream)
            self._inner = self._graph.capturing(self._stream.cuda_stream)
            self._inner.__enter__()

        def __exit__(self, *error: Any) -> Any:
            current.pop()
            return self._inner.__exit__(*error)

    class GraphOfTorch(cudart.Graph):
        """As torch.cuda.CUDAGraph."""

        def replay(self) -> None:
            """On torch's current stream."""
            self.launch(current[-1])

    names = ("CUDAGraph", "graph", "ExternalStream", "current_stream")
    usual = {name: getattr(torch.cuda, name) for name in names}
    with _fake_torch(stream=current[0]):
        given = _tensor(x)
        program(given)
        runner = next(iter(program._gpu._runners.values()))
        main = runner._main

        def with_library(*arguments: Any) -> None:
            """The kernels, and then a copy of an output onto itself, on torch's current stream."""
            main(*arguments)
            address = int(arguments[-1].data_ptr())
            cudart.copy(address, address, 4, current[-1])

        runner._main = with_library
        own_graph = FakeTorchMemory.graph
        FakeTorchMemory.graph = lambda _: TorchGraph()  # type: ignore[method-assign]
        for name, made in zip(names, (GraphOfTorch, CaptureOfTorch, Stream, lambda: Stream(current[-1])), strict=True):
            setattr(torch.cuda, name, made)
        try:
            kept, errors = None, []
            for _ in range(7):
                kept = program(given)
                errors.append(_error(_arrays(kept), y))
        finally:
            for name, was in usual.items():
                setattr(torch.cuda, name, was)
            FakeTorchMemory.graph = own_graph  # type: ignore[method-assign]
    return {"errors": errors, "modes": streams, "note": program.note}


def scenario_failures(folder: Path, gpu: Controls) -> Any:
    """What cannot be captured runs as before, with a note."""
    from rescompile.backends.cuda import cudart

    program, x, y = _loaded(folder, "static")
    with gpu.having(graph_status=801):
        instantiated = [_error(program(x), y) for _ in range(5)]
    note = program.note
    allocating, _, _ = _loaded(folder, "static")
    allocating(x)
    runner = next(iter(allocating._gpu._runners.values()))
    main = runner._main

    def allocates(*arguments: Any) -> None:
        from rescompile.backends import tvm_runtime

        tvm_runtime.empty((16,), "float32", runner._device)
        main(*arguments)

    runner._main = allocates
    allocated = [_error(allocating(x), y) for _ in range(5)]
    eager, _, _ = _loaded(folder, "static")
    eager.graphs = False
    before = gpu["graph_launches"]
    plain = [_error(eager(x), y) for _ in range(5)]
    return {
        "errors": [*instantiated, *allocated, *plain],
        "notes": [note, allocating.note, eager.note],
        "replays": gpu["graph_launches"] - before,
        "current": cudart.current_device(),
    }


def scenario_buckets(folder: Path, gpu: Controls) -> Any:
    """A dynamic batch: padded to the next size, cut to the rows that were asked for; larger ones run as they are."""
    program, x, _ = _loaded(folder, "dynamic")
    errors, replays = [], {}
    for rows in (1, 2, 3, 4, 5, 9, 2, 4, 4, 4, 3, 0):
        errors.append(_error(program(x[:rows]), _reference(folder, x[:rows])))
    for rows in (2, 3, 4, 6):
        before = gpu["graph_launches"]
        for _ in range(4):
            errors.append(_error(program(x[:rows]), _reference(folder, x[:rows])))
        replays[rows] = gpu["graph_launches"] - before
    with _fake_torch(stream=0):
        for rows in (3, 1, 4, 7):
            for _ in range(5):
                errors.append(_error(_arrays(program(_tensor(x[:rows]))), _reference(folder, x[:rows])))
    return {"errors": errors, "replays": replays}


def scenario_architectures(folder: Path, gpu: Controls) -> Any:
    """The code that each GPU chooses, and what a GPU says that none is for."""
    found = {}
    for major, minor in ((8, 0), (8, 6), (9, 0), (10, 0), (12, 0), (7, 5)):
        program, x, y = _loaded(folder, "several")
        with gpu.having(major=major, minor=minor):
            found[f"{major}.{minor}"] = _said(lambda program=program, x=x, y=y: f"{_error(program(x), y) < 1e-5}")
    return found


def scenario_machines(folder: Path, gpu: Controls) -> Any:
    """Machines and tensors that a program does not run on."""
    from rescompile.backends.cuda import cubin, cudart

    found = {}
    for name, settings in {
        "old_driver": {"driver": 12040},
        "no_gpu": {"devices": 0},
        "code_refused": {"load_status": 218},
    }.items():
        program, x, _ = _loaded(folder, "static")
        with gpu.having(**settings):
            found[name] = _said(lambda program=program, x=x: program(x))
    program, x, _ = _loaded(folder, "source")
    cubin.compilers = lambda: []  # type: ignore[assignment]
    found["source_only"] = _said(lambda: program(x))
    program, x, _ = _loaded(folder, "static")
    runner_error = RuntimeError("Failed to set the allowed dynamic shared memory size to 150000")
    program(x)
    with gpu.having(shared_limit=101376, major=8, minor=9):
        found["shared"] = str(next(iter(program._gpu._runners.values()))._explained(runner_error))
    with _fake_torch(stream=0) as torch:
        elsewhere = _tensor(x, FakeDevice(index=1))
        found["other_gpu"] = _said(lambda: program(elsewhere))
        fresh, _, _ = _loaded(folder, "static")
        found["not_current"] = _said(lambda: fresh(elsewhere))
        torch.cuda.current_device = lambda: 1
        found["second_gpu"] = _said(lambda: fresh(elsewhere) and fresh._gpu.index)
        torch.cuda.current_device = lambda: 0
        found["on_cpu"] = _said(lambda: program(_tensor(x, FakeDevice("cpu", 0))))
        found["no_such_gpu"] = _said(lambda: _loaded(folder, "static")[0]._on_gpu(2))
    found["current"] = str(cudart.current_device())
    return found


# ---- what they share -------------------------------------------------------------------------------------------------


def _loaded(folder: Path, name: str) -> tuple[Any, np.ndarray[Any, Any], list[np.ndarray[Any, Any]]]:
    from rescompile.backends.program import load

    data = np.load(folder / "numbers.npz")
    return load(folder / f"{name}.zip"), data["x"], _reference(folder, data["x"])


def _reference(folder: Path, x: np.ndarray[Any, Any]) -> list[np.ndarray[Any, Any]]:
    """As `tests/test_cuda_program.py` builds it: t = N(x)·w + b; y = softmax(t) + x; outputs y, t."""
    data = np.load(folder / "numbers.npz")
    wide = x.astype(np.float64)
    centred = wide - wide.mean(-1, keepdims=True)
    t = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5) * data["weight"] + data["bias"]
    exponents = np.exp(t - t.max(-1, keepdims=True))
    return [exponents / exponents.sum(-1, keepdims=True) + wide, t]


def _error(got: Any, want: list[np.ndarray[Any, Any]]) -> float:
    if any(a.shape != b.shape for a, b in zip(got, want, strict=True)):
        return float("inf")
    worst = max(float(np.abs(a - b).max(initial=0.0)) for a, b in zip(got, want, strict=True))
    return float("inf") if np.isnan(worst) else worst


def _tensor(array: np.ndarray[Any, Any], device: FakeDevice | None = None) -> FakeTensor:
    from rescompile.backends import tvm_runtime

    tvm_runtime.load_cuda()
    where = tvm_runtime.device(tvm_runtime.CUDA, device.index if device is not None else 0)
    return FakeTensor(tvm_runtime.placed(array, where), str(array.dtype), device)


def _raw(tensor: FakeTensor) -> np.ndarray[Any, Any]:
    """What lies there now, whatever its stream has still to do."""
    size = int(np.prod(tensor.shape)) * 4
    return np.frombuffer(ctypes.string_at(tensor.data_ptr(), size), np.float32).reshape(tensor.shape)


def _arrays(tensors: tuple[FakeTensor, ...]) -> list[np.ndarray[Any, Any]]:
    from rescompile.backends.cuda import cudart

    cudart.synchronize(FakeTorchMemory.stream)
    return [_raw(tensor) for tensor in tensors]


@contextmanager
def _fake_torch(stream: int) -> Iterator[Any]:
    """Programs take FakeTensor for torch's."""
    import torch

    from rescompile.backends.cuda import memory

    before = memory.TorchMemory, torch.cuda.current_device
    memory.TorchMemory, torch.cuda.current_device = FakeTorchMemory, lambda: 0  # type: ignore[assignment,misc]
    FakeTorchMemory.stream = stream
    try:
        yield torch
    finally:
        memory.TorchMemory, torch.cuda.current_device = before  # type: ignore[misc]


@contextmanager
def _handed_out(tensors: list[FakeTensor]) -> Iterator[None]:
    """Let FakeTorchMemory hand these out: while a stream is captured nothing can be allocated."""
    usual = FakeTorchMemory.empty

    left = list(tensors)

    def empty(_: Any, shape: Any, dtype: str) -> FakeTensor:
        return left.pop(next(place for place, tensor in enumerate(left) if tensor.dtype == f"torch.{dtype}"))

    FakeTorchMemory.empty = empty  # type: ignore[method-assign]
    try:
        yield
    finally:
        FakeTorchMemory.empty = usual  # type: ignore[method-assign]


def _said(call: Callable[[], Any]) -> str:
    from rescompile.errors import RescompileError

    try:
        return str(call())
    except RescompileError as error:
        return f"RescompileError: {error}"


if __name__ == "__main__":
    # Before TVM: its CUDA runtime is loaded only where these names are found.
    loaded = [ctypes.CDLL(path, mode=ctypes.RTLD_GLOBAL) for path in sys.argv[1:3]]
    controls = Controls(loaded[1])
    found = {name: globals()[f"scenario_{name}"](Path(sys.argv[3]), controls) for name in sys.argv[4:]}
    print(json.dumps(found))
