"""Where the tensors of a call live, and on which stream it runs: torch's, or TVM's runtime alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

from rescompile.backends import tvm_runtime
from rescompile.backends.cuda import cudart


class Graph(Protocol):
    """Launches that were recorded, to be launched again as a whole."""

    def capturing(self, stream: int) -> Any:
        """Record what is launched on the stream inside."""

    def launch(self, stream: int) -> None:
        """Launch it."""


class Memory(Protocol):
    """The side of a call that its caller decides."""

    @property
    def stream(self) -> int:
        """The stream that the caller's work is on."""

    @property
    def capturing(self) -> bool:
        """Whether the caller is capturing that stream."""

    def empty(self, shape: Sequence[int], dtype: str) -> Any:
        """A tensor that is the caller's, ordered on `stream`."""

    def pointer(self, tensor: Any) -> int:
        """Its address."""

    def rows(self, tensor: Any, count: int) -> Any:
        """Its first rows, in the same memory."""

    def view(self, tensor: Any) -> Any:
        """The same memory as TVM's runtime takes it."""

    def graph(self) -> Graph:
        """Something to record launches with."""


class TorchMemory:
    """torch's allocator, which knows of streams, and torch's current stream."""

    def __init__(self, index: int, *, libraries: bool) -> None:
        import torch

        self._torch: Any = torch
        self._device = torch.device("cuda", index)
        self._libraries = libraries

    @property
    def stream(self) -> int:
        """torch's current stream."""
        return int(self._torch.cuda.current_stream(self._device).cuda_stream)

    @property
    def capturing(self) -> bool:
        """Whether `torch.cuda.graph` is around the call."""
        return bool(self._torch.cuda.is_current_stream_capturing())

    def empty(self, shape: Sequence[int], dtype: str) -> Any:
        """From torch's allocator: memory that another stream still uses is not handed out."""
        return self._torch.empty(tuple(shape), dtype=getattr(self._torch, dtype), device=self._device)

    def pointer(self, tensor: Any) -> int:
        """Its address."""
        return int(tensor.data_ptr())

    def rows(self, tensor: Any, count: int) -> Any:
        """A view."""
        return tensor[:count]

    def view(self, tensor: Any) -> Any:
        """Without a copy; as a capsule, since `__dlpack__` may let streams wait for each other."""
        import tvm_ffi

        return tvm_ffi.from_dlpack(self._torch.utils.dlpack.to_dlpack(tensor))

    def graph(self) -> Graph:
        """torch's own where torch's operations run inside: their memory must be kept for the graph."""
        return TorchGraph() if self._libraries else cudart.Graph()


class PlainMemory:
    """The runtime's own allocations, on a stream of the caller's choice."""

    def __init__(self, index: int, stream: int = 0) -> None:
        self._device = tvm_runtime.device(tvm_runtime.CUDA, index)
        self.stream = stream

    @property
    def capturing(self) -> bool:
        """Whether the stream is being captured."""
        return cudart.is_capturing(self.stream)

    def empty(self, shape: Sequence[int], dtype: str) -> Any:
        """Allocated here and now."""
        return tvm_runtime.empty(shape, dtype, self._device)

    def pointer(self, tensor: Any) -> int:
        """Its address."""
        return int(tensor.data_ptr())

    def rows(self, tensor: Any, count: int) -> Any:
        """A view."""
        import tvm_ffi

        shape = tvm_ffi.Shape((count, *tensor.shape[1:]))
        return tvm_runtime.function("runtime.TVMTensorCreateView")(tensor, shape, tensor.dtype, 0)

    def view(self, tensor: Any) -> Any:
        """Itself."""
        return tensor

    def graph(self) -> Graph:
        """The runtime's."""
        return cudart.Graph()


class TorchGraph:
    """A graph whose launches come from torch too: what they allocate stays the graph's."""

    def __init__(self) -> None:
        import torch

        self._torch = torch
        self._graph = torch.cuda.CUDAGraph()

    @contextmanager
    def capturing(self, stream: int) -> Iterator[None]:
        """Record what is launched on the stream inside, which is torch's current one there."""
        torch = self._torch
        where = torch.cuda.ExternalStream(stream)
        with torch.cuda.graph(self._graph, stream=where, capture_error_mode="thread_local"):
            yield

    def launch(self, stream: int) -> None:
        """Launch it on a stream."""
        torch = self._torch
        if torch.cuda.current_stream().cuda_stream == stream:
            self._graph.replay()
        else:
            with torch.cuda.stream(torch.cuda.ExternalStream(stream)):
                self._graph.replay()
