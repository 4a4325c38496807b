"""TVM's runtime alone: what loads and runs a compiled program, without the compiler and without `import tvm`.

Two libraries, libtvm_runtime and libtvm_runtime_cuda, and the package tvm_ffi: about 7 MB. They are taken from where
the package apache-tvm is installed, or from a folder of the same form that `pack_runtime` wrote.
"""

from __future__ import annotations

import ctypes
import importlib.util
import sys
from collections.abc import Sequence
from functools import cache
from importlib import import_module
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from rescompile.errors import RescompileError

RUNTIME = "libtvm_runtime.so"
CUDA_RUNTIME = "libtvm_runtime_cuda.so"
CUDART = "libcudart.so.13"  # the one that libtvm_runtime_cuda is linked to
CPU, CUDA = 1, 2  # DLPack's numbers of devices
_POOLED = 2  # TVM's allocator that keeps what was freed


def folder() -> Path:
    """Where TVM's libraries lie. RescompileError where they do not."""
    try:
        spec = importlib.util.find_spec("tvm")
    except (ImportError, ValueError):
        spec = None
    for root in (spec.submodule_search_locations or []) if spec else []:
        if (Path(root) / "lib" / RUNTIME).is_file():
            return Path(root) / "lib"
    raise RescompileError(
        "Running a compiled program needs TVM's runtime, which is not here: pip install 'rescompile[tvm]', "
        "or put a folder made by `python -m rescompile.backends.pack_runtime` on PYTHONPATH."
    )


@cache
def load() -> None:
    """Load the runtime into the process, once; `import tvm` before or after it loads the same library."""
    try:
        import_module("tvm_ffi")
    except ModuleNotFoundError as error:
        raise RescompileError(
            f"Running a compiled program needs the package {error.name}, which is not installed: "
            f"pip install 'rescompile[tvm]'."
        ) from None
    except ImportError as error:
        raise RescompileError(f"The package tvm_ffi cannot be loaded: {error}.") from error
    try:
        ctypes.CDLL(str(folder() / RUNTIME), mode=ctypes.RTLD_GLOBAL)
    except OSError as error:
        raise RescompileError(f"TVM's runtime cannot be loaded: {error}.") from error


@cache
def load_cuda() -> str:
    """Load the runtime for NVIDIA GPUs; why not, empty when it is there."""
    load()
    if function("device_api.cuda", missing=True) is not None:
        return ""
    _load_cudart()
    try:
        ctypes.CDLL(str(folder() / CUDA_RUNTIME))
    except OSError as error:
        return str(error)
    return ""


def function(name: str, *, missing: bool = False) -> Any:
    """A function that the runtime registers."""
    import tvm_ffi

    return tvm_ffi.get_global_func(name, allow_missing=missing)


def device(kind: int, index: int = 0) -> Any:
    """A device of DLPack's."""
    import tvm_ffi

    return tvm_ffi.device({CPU: "cpu", CUDA: "cuda"}[kind], index)


def empty(shape: Sequence[int], dtype: str, where: Any) -> Any:
    """Fresh memory on a device, outside any pool; freeing it waits for the device."""
    import tvm_ffi

    return function("runtime.TVMTensorAllocWithScope")(tvm_ffi.Shape(shape), tvm_ffi.dtype(dtype), where, None)


def upload(data: np.ndarray[Any, Any], into: Any) -> None:
    """Copy an array to a device; returns when it is there."""
    source = np.ascontiguousarray(data)
    if source.nbytes:
        function("runtime.TVMTensorCopyFromBytes")(into, ctypes.c_void_p(source.ctypes.data), source.nbytes)


def placed(data: np.ndarray[Any, Any], where: Any) -> Any:
    """An array, on a device."""
    tensor = empty(data.shape, dtype_name(data), where)
    upload(data, tensor)
    return tensor


def nbytes(shape: Sequence[int], dtype: str) -> int:
    """Bytes of a tensor that lies without gaps."""
    import tvm_ffi

    return prod(shape) * int(tvm_ffi.dtype(dtype).itemsize)


def download(tensor: Any, shape: Sequence[int], dtype: Any) -> np.ndarray[Any, Any]:
    """Copy a tensor from a device; what its stream has still to do must be waited for before."""
    out = np.empty(tuple(shape), dtype=dtype)
    if out.nbytes:
        function("runtime.TVMTensorCopyToBytes")(tensor, ctypes.c_void_p(out.ctypes.data), out.nbytes)
    return out


def numpy_dtype(name: str) -> Any:
    """numpy's dtype of that name; bfloat16 comes from ml_dtypes."""
    if name != "bfloat16":
        return np.dtype(name)
    try:
        import ml_dtypes
    except ImportError:
        raise RescompileError(
            "numpy has no bfloat16 of its own: pip install ml_dtypes, or give torch tensors."
        ) from None
    return np.dtype(ml_dtypes.bfloat16)


def storage_dtype(name: str) -> Any:
    """numpy's dtype to keep elements in that are not computed with: two bytes where bfloat16 is not to be had."""
    try:
        return np.dtype(numpy_dtype(name))
    except RescompileError:
        return np.dtype("V2")


def dtype_name(data: np.ndarray[Any, Any]) -> str:
    """The element type that an array stands for."""
    return "bfloat16" if data.dtype == np.dtype("V2") else str(data.dtype)


class VirtualMachine:
    """The functions of a loaded executable, on a device."""

    def __init__(self, library: Any, where: Any) -> None:
        self._module = library["vm_load_executable"]()
        host = device(CPU)
        devices = [where] if where.dlpack_device_type() == CPU else [where, host]
        self._module["vm_initialization"](
            *(part for one in devices for part in (one.dlpack_device_type(), one.index, _POOLED))
        )

    def __getitem__(self, name: str) -> Any:
        return self._module[name]


def _load_cudart() -> None:
    """CUDA's runtime, from the loader's path or from where pip puts it beside torch; quiet where it is nowhere."""
    candidates = [CUDART]
    for entry in sys.path:
        candidates += [str(path) for path in sorted(Path(entry or ".").glob(f"nvidia/*/lib/{CUDART}"))]
    for candidate in candidates:
        try:
            ctypes.CDLL(candidate, mode=ctypes.RTLD_GLOBAL)
        except OSError:
            continue
        return
