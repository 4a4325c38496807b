"""CUDA's runtime library through ctypes: what TVM does not offer. Capture, graphs, versions, limits of a device.

Source: CUDA Runtime API, 13.x. The library is the one that libtvm_runtime_cuda is linked to, so that streams, memory
and the current device are the same as TVM's, and torch's.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

from rescompile.backends.tvm_runtime import CUDART
from rescompile.errors import RescompileError

_NON_BLOCKING = 1
_THREAD_LOCAL = 1  # other threads may allocate and wait while this one captures
_DEVICE_TO_DEVICE = 3
_MAJOR, _MINOR, _SHARED = 75, 76, 97  # attributes of a device
INSUFFICIENT_DRIVER = 35


class CudaError(RescompileError):
    """A call of CUDA's runtime failed."""


@cache
def _library() -> ctypes.CDLL:
    library = ctypes.CDLL(CUDART)
    library.cudaGetErrorString.restype = ctypes.c_char_p
    return library


def _call(name: str, *arguments: Any) -> None:
    status = getattr(_library(), name)(*arguments)
    if status:
        said = (_library().cudaGetErrorString(status) or b"no message").decode()
        _library().cudaGetLastError()  # else the next call of anybody would report it
        raise CudaError(f"{name} failed with status {status}: {said}.")


def _number(name: str, *arguments: Any) -> int:
    value = ctypes.c_int()
    _call(name, ctypes.byref(value), *arguments)
    return value.value


# ---- the machine -----------------------------------------------------------------------------------------------------


def driver_version() -> tuple[int, int]:
    """The newest CUDA that the driver serves, (0, 0) where there is none."""
    version = _number("cudaDriverGetVersion")
    return version // 1000, version % 1000 // 10


def runtime_version() -> tuple[int, int]:
    """The CUDA that this library is of."""
    version = _number("cudaRuntimeGetVersion")
    return version // 1000, version % 1000 // 10


def device_count() -> tuple[int, int]:
    """How many GPUs there are, and the status that the runtime answers with: it fails where there are none."""
    count = ctypes.c_int()
    status = _library().cudaGetDeviceCount(ctypes.byref(count))
    _library().cudaGetLastError()
    return (0 if status else count.value), status


def capability(device: int) -> tuple[int, int]:
    """Compute capability of a GPU: (9, 0) for an H200."""
    return (_number("cudaDeviceGetAttribute", _MAJOR, device), _number("cudaDeviceGetAttribute", _MINOR, device))


def shared_bytes(device: int) -> int:
    """The most shared memory that one block can ask for."""
    return _number("cudaDeviceGetAttribute", _SHARED, device)


def current_device() -> int:
    """The GPU that this thread's calls go to."""
    return _number("cudaGetDevice")


@contextmanager
def on_device(device: int) -> Iterator[None]:
    """Let this thread's calls go to a GPU, and after that to the one before."""
    before = current_device()
    if before != device:
        _call("cudaSetDevice", ctypes.c_int(device))
    try:
        yield
    finally:
        if before != device:
            _call("cudaSetDevice", ctypes.c_int(before))


# ---- streams and graphs ----------------------------------------------------------------------------------------------


def create_stream() -> int:
    """A stream that the default stream does not wait for."""
    stream = ctypes.c_void_p()
    _call("cudaStreamCreateWithFlags", ctypes.byref(stream), ctypes.c_uint(_NON_BLOCKING))
    return stream.value or 0


def destroy_stream(stream: int) -> None:
    """Let go of a stream when its work is done."""
    _call("cudaStreamDestroy", ctypes.c_void_p(stream))


def synchronize(stream: int) -> None:
    """Wait for all that a stream was given."""
    _call("cudaStreamSynchronize", ctypes.c_void_p(stream))


def is_capturing(stream: int) -> bool:
    """Whether somebody is capturing the stream."""
    return _number_of_stream("cudaStreamIsCapturing", stream) != 0


def copy(to: int, source: int, size: int, stream: int) -> None:
    """Copy within the GPU's memory, in the order of the stream."""
    if size:
        _call(
            "cudaMemcpyAsync",
            ctypes.c_void_p(to),
            ctypes.c_void_p(source),
            ctypes.c_size_t(size),
            ctypes.c_int(_DEVICE_TO_DEVICE),
            ctypes.c_void_p(stream),
        )


def clear(to: int, size: int, stream: int) -> None:
    """Zeros, in the order of the stream."""
    if size:
        arguments = ctypes.c_void_p(to), ctypes.c_int(0), ctypes.c_size_t(size), ctypes.c_void_p(stream)
        _call("cudaMemsetAsync", *arguments)


class Graph:
    """What was launched on a stream, to be launched again as a whole: `with graph.capturing(stream)`, `launch`."""

    def __init__(self) -> None:
        self._executable = ctypes.c_void_p()
        self._destroy = _library().cudaGraphExecDestroy

    @contextmanager
    def capturing(self, stream: int) -> Iterator[None]:
        """Record what is launched on the stream inside. CudaError where something in there cannot be recorded."""
        _call("cudaStreamBeginCapture", ctypes.c_void_p(stream), ctypes.c_int(_THREAD_LOCAL))
        graph = ctypes.c_void_p()
        try:
            yield
        except BaseException:
            # The capture ends in any case; its status would hide what went wrong.
            _library().cudaStreamEndCapture(ctypes.c_void_p(stream), ctypes.byref(graph))
            _library().cudaGetLastError()
            if graph.value:
                _library().cudaGraphDestroy(graph)
            raise
        _call("cudaStreamEndCapture", ctypes.c_void_p(stream), ctypes.byref(graph))
        try:
            _call("cudaGraphInstantiate", ctypes.byref(self._executable), graph, ctypes.c_ulonglong(0))
        finally:
            _library().cudaGraphDestroy(graph)

    def launch(self, stream: int) -> None:
        """Launch it on a stream."""
        _call("cudaGraphLaunch", self._executable, ctypes.c_void_p(stream))

    def __del__(self) -> None:
        if self._executable.value:
            self._destroy(self._executable)


def _number_of_stream(name: str, stream: int) -> int:
    value = ctypes.c_int()
    _call(name, ctypes.c_void_p(stream), ctypes.byref(value))
    return value.value
