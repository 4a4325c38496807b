"""A loaded program on one GPU: weights uploaded once, a workspace for each stream, launches captured where they repeat.

The kernels of a program are launched one by one for the first calls on a stream. After that, where shapes are static,
calls replay a CUDA graph:

- tensors at addresses that came before have a graph of their own: nothing is copied. A loop that reuses its input and
  drops its last output before the next but one is such a case, as torch's allocator hands out the same two outputs;
- any other call goes through buffers that stay where they are: inputs are copied in, outputs out.

At most `EXACT` graphs of the first kind are kept for a stream; one that has not been used for `STALE` calls makes room.
Capturing in the program rather than in the virtual machine (Relax's RewriteCUDAGraph) takes in the kernels that read
inputs and write outputs too, needs no storage of the machine's own, and takes the calls of libraries along.
"""

from __future__ import annotations

import gc
import re
import threading
from collections import OrderedDict, deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from rescompile.backends import tvm_runtime
from rescompile.backends.artifact import TensorInfo
from rescompile.backends.cuda import cudart
from rescompile.backends.cuda.memory import Graph, Memory, PlainMemory
from rescompile.errors import RescompileError

WARM_UP = 2  # calls before the first capture: kernels are loaded, libraries choose their algorithms
EXACT = 8
STALE = 256
_REMEMBERED = 32  # addresses of so many calls, to see whether they come again
_LEAST = 256  # bytes of a workspace: an address is wanted even of nothing
_SHARED = re.compile(r"allowed dynamic shared memory size to (\d+)")
_LOADING = "cuModuleLoadData"


@dataclass
class _Lane:
    """What belongs to one stream: its calls follow each other, so that they can share memory."""

    workspace: Any = None
    bytes: int = 0
    calls: int = 0
    graphs: OrderedDict[tuple[int, ...], tuple[Graph, int]] = field(default_factory=OrderedDict)
    seen: deque[tuple[int, ...]] = field(default_factory=lambda: deque(maxlen=_REMEMBERED))
    fixed: tuple[list[Any], list[Any]] | None = None
    fixed_graph: Graph | None = None


class GpuRunner:
    """The program's code on the GPU of that index."""

    def __init__(
        self,
        library: Any,
        weights: Sequence[Any],
        inputs: Sequence[TensorInfo],
        outputs: Sequence[TensorInfo],
        *,
        dynamic: bool,
        index: int,
    ) -> None:
        import tvm_ffi

        self.index = index
        self.graphs = True
        self.note = ""  # why launches are not captured, where they could be
        self.inputs, self._outputs = inputs, outputs
        self._dynamic = dynamic
        self._device = tvm_runtime.device(tvm_runtime.CUDA, index)
        self._lanes: dict[tuple[str, int], _Lane] = {}
        self._plans: dict[tuple[int, ...], tuple[int, list[tuple[int, ...]]]] = {}
        self._staged: dict[tuple[int, ...], list[Any]] = {}
        self._capture_stream = 0
        self._lock = threading.RLock()
        machine = tvm_runtime.VirtualMachine(library, self._device)
        self._main, self._plan = machine["main"], machine["plan"]
        self._weights = tvm_ffi.convert(list(weights))
        cudart.synchronize(0)  # constants of the code were copied on the default stream

    # ---- calls ---------------------------------------------------------------------------------------------------

    def run(self, inputs: Sequence[Any], extents: Sequence[int], memory: Memory) -> list[Any]:
        """The outputs, in memory of the caller's, ordered on its stream; `extents` are those of the symbols."""
        with self._lock:
            size, shapes = self.plan(tuple(extents))
            size = max(size, _LEAST)
            stream = memory.stream
            outputs = [memory.empty(shape, info.dtype) for info, shape in zip(self._outputs, shapes, strict=True)]
            if all(0 in shape for shape in shapes):
                return outputs  # a launch of nothing is an error
            if self.note or not self.graphs or self._dynamic or memory.capturing:
                self._launch(inputs, outputs, size, memory, stream)
            else:
                self._captured(inputs, outputs, size, memory, stream)
            return outputs

    def run_numpy(self, arrays: Sequence[np.ndarray[Any, Any]], extents: Sequence[int]) -> list[np.ndarray[Any, Any]]:
        """The outputs as arrays, when they are there."""
        with self._lock, cudart.on_device(self.index):
            memory = _Staged(PlainMemory(self.index), self._staging(tuple(extents)))
            inputs = [memory.empty(array.shape, info.dtype) for array, info in zip(arrays, self.inputs, strict=True)]
            for array, tensor in zip(arrays, inputs, strict=True):
                tvm_runtime.upload(array, tensor)
            outputs = self.run(inputs, extents, memory)
            cudart.synchronize(memory.stream)
            return [
                tvm_runtime.download(tensor, tensor.shape, tvm_runtime.numpy_dtype(info.dtype))
                for tensor, info in zip(outputs, self._outputs, strict=True)
            ]

    def plan(self, extents: tuple[int, ...]) -> tuple[int, list[tuple[int, ...]]]:
        """Bytes of the workspace and shapes of the outputs, for values of the symbols."""
        if extents not in self._plans:
            import tvm_ffi

            found = self._plan(*([tvm_ffi.Shape(extents)] if extents else []))
            shapes = [tuple(int(extent) for extent in shape) for shape in found]
            if len(self._plans) >= STALE:
                self._plans.clear()
            self._plans[extents] = (shapes[0][0], shapes[1:])
        return self._plans[extents]

    # ---- launching -----------------------------------------------------------------------------------------------

    def _launch(self, inputs: Sequence[Any], outputs: Sequence[Any], size: int, memory: Memory, stream: int) -> None:
        # While the caller captures, memory is the graph's: a later call on this stream must not write there.
        workspace = memory.empty((size,), "uint8") if memory.capturing else self._workspace(stream, size, memory)
        self._call(stream, memory, inputs, workspace, outputs)

    def _call(self, stream: int, memory: Memory, inputs: Sequence[Any], workspace: Any, outputs: Sequence[Any]) -> None:
        import tvm_ffi

        view = memory.view
        with tvm_ffi.use_raw_stream(self._device, stream):
            try:
                self._main(*map(view, inputs), self._weights, view(workspace), *map(view, outputs))
            except (RuntimeError, ValueError, TypeError) as error:
                raise self._explained(error) from error

    def _explained(self, error: Exception) -> RescompileError:
        """What TVM's runtime says of a launch that failed, as one sentence."""
        said = str(error)
        asked = _SHARED.search(said)
        if asked is not None:
            offered = cudart.shared_bytes(self.index)
            major, minor = cudart.capability(self.index)
            return RescompileError(
                f"A kernel of the program asks for {asked[1]} bytes of shared memory in a block, and this GPU has "
                f"{offered}: compile the model with --target cuda:sm_{major}{minor}."
            )
        if _LOADING in said:
            why = _first_line(said).rpartition("failed with error: ")[2]
            return RescompileError(f"The driver does not take the program's code ({why}): compile the model again.")
        return RescompileError(f"The program failed on the GPU: {_first_line(said)}.")

    def _workspace(self, stream: int, size: int, memory: Memory) -> Any:
        lane = self._lane(memory, stream)
        if lane.workspace is None or lane.bytes < size:
            lane.workspace, lane.bytes = None, size
            lane.workspace = memory.empty((size,), "uint8")
        return lane.workspace

    def _lane(self, memory: Memory, stream: int) -> _Lane:
        return self._lanes.setdefault((type(memory).__name__, stream), _Lane())

    def _captured(self, inputs: Sequence[Any], outputs: Sequence[Any], size: int, memory: Memory, stream: int) -> None:
        lane = self._lane(memory, stream)
        lane.calls += 1
        key = tuple(memory.pointer(tensor) for tensor in (*inputs, *outputs))
        known = lane.graphs.get(key)
        if known is not None:
            lane.graphs[key] = (known[0], lane.calls)
            lane.graphs.move_to_end(key)
            known[0].launch(stream)
            return
        again = key in lane.seen
        lane.seen.append(key)
        workspace = self._workspace(stream, size, memory)
        if lane.calls <= WARM_UP:
            self._call(stream, memory, inputs, workspace, outputs)
            return
        try:
            if again and self._has_room(lane):
                graph = self._capture(memory, inputs, workspace, outputs)
                lane.graphs[key] = (graph, lane.calls)
                graph.launch(stream)
            else:
                self._through_fixed(lane, memory, inputs, workspace, outputs, stream)
        except Exception as error:  # noqa: BLE001 - whatever cannot be captured runs as it did before
            self._give_up(error)
            self._call(stream, memory, inputs, workspace, outputs)

    def _has_room(self, lane: _Lane) -> bool:
        if len(lane.graphs) < EXACT:
            return True
        oldest = next(iter(lane.graphs))
        if lane.calls - lane.graphs[oldest][1] < STALE:
            return False
        del lane.graphs[oldest]
        return True

    def _through_fixed(
        self, lane: _Lane, memory: Memory, inputs: Sequence[Any], workspace: Any, outputs: Sequence[Any], stream: int
    ) -> None:
        if lane.fixed is None or lane.fixed_graph is None:
            _, shapes = self.plan(())
            fixed_inputs = [memory.empty([int(extent) for extent in info.shape], info.dtype) for info in self.inputs]
            fixed_outputs = [memory.empty(shape, info.dtype) for info, shape in zip(self._outputs, shapes, strict=True)]
            lane.fixed_graph = self._capture(memory, fixed_inputs, workspace, fixed_outputs)
            lane.fixed = (fixed_inputs, fixed_outputs)
        fixed_inputs, fixed_outputs = lane.fixed
        for info, tensor, fixed in zip(self.inputs, inputs, fixed_inputs, strict=True):
            size = tvm_runtime.nbytes(fixed.shape, info.dtype)
            cudart.copy(memory.pointer(fixed), memory.pointer(tensor), size, stream)
        lane.fixed_graph.launch(stream)
        for info, tensor, fixed in zip(self._outputs, outputs, fixed_outputs, strict=True):
            size = tvm_runtime.nbytes(fixed.shape, info.dtype)
            cudart.copy(memory.pointer(tensor), memory.pointer(fixed), size, stream)

    def _capture(self, memory: Memory, inputs: Sequence[Any], workspace: Any, outputs: Sequence[Any]) -> Graph:
        if not self._capture_stream:
            self._capture_stream = cudart.create_stream()
        graph = memory.graph()
        with _no_collection(), graph.capturing(self._capture_stream):
            self._call(self._capture_stream, memory, inputs, workspace, outputs)
        return graph

    def _give_up(self, error: Exception) -> None:
        self.note = f"launches are not captured into a CUDA graph: {_first_line(str(error)) or type(error).__name__}"
        for lane in self._lanes.values():
            lane.graphs.clear()
            lane.fixed = lane.fixed_graph = None

    # ---- memory --------------------------------------------------------------------------------------------------

    def _staging(self, extents: tuple[int, ...]) -> list[Any]:
        """Tensors on the GPU for arrays of these extents; those of one set of extents are kept."""
        if extents not in self._staged:
            self._staged.clear()
            self._staged[extents] = []
        return self._staged[extents]


class _Staged:
    """Memory whose tensors are the same in each call, in the order in which they are asked for."""

    def __init__(self, memory: PlainMemory, kept: list[Any]) -> None:
        self._memory, self._kept, self._next = memory, kept, 0
        self.capturing = False
        self.stream, self.pointer, self.rows = memory.stream, memory.pointer, memory.rows
        self.view, self.graph = memory.view, memory.graph

    def empty(self, shape: Sequence[int], dtype: str) -> Any:
        """The next of them."""
        if self._next == len(self._kept):
            self._kept.append(self._memory.empty(shape, dtype))
        self._next += 1
        return self._kept[self._next - 1]


@contextmanager
def _no_collection() -> Iterator[None]:
    """Nobody's tensors are collected here: freeing memory ends a capture, and TVM ends the process when it fails to."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


def _first_line(said: str) -> str:
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    return lines[0].rstrip(".:") if lines else ""
