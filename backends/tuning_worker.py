"""What runs in the processes that build and time candidates: each function imports what it needs.

They are sent by value, so that a worker finds them wherever this package was imported from.
"""

from __future__ import annotations

from typing import Any


def build(module: Any, target: Any) -> str:
    """Compile a scheduled module and write its code into a new folder; the file's path.

    Unlike MetaSchedule's own, it does not import the tensor intrinsics of all GPUs and DSPs, which takes 20 s.
    """
    import tempfile
    from pathlib import Path

    import tvm
    from tvm.support.tar import tar

    compiled = tvm.compile(module, target=target)
    path = Path(tempfile.mkdtemp(prefix="rescompile-tuning-")) / f"candidate.{tar.output_format}"
    compiled.export_library(str(path), fcompile=tar)
    return str(path)


def build_cuda(module: Any, target: Any, arch: str, folders: list[str], assemble: Any = None) -> str:
    """As `build`, its GPU code as machine code, so that who times it needs no compiler. `folders` hold this package."""
    import sys
    import tempfile
    from pathlib import Path

    sys.path += [folder for folder in folders if folder not in sys.path]

    import tvm
    from tvm.support.tar import tar

    from rescompile.backends.cuda import intrinsics
    from rescompile.backends.cuda.cubin import to_cubin
    from rescompile.backends.cuda.executable import CudaExecutable, cross_compiling, cuda_source

    intrinsics.load()
    with cross_compiling():
        compiled = tvm.compile(module, target=target)
    source = cuda_source(compiled.mod)
    cubin = (assemble or to_cubin)(source, arch)
    if cubin is None:
        raise RuntimeError("neither nvcc nor NVRTC is here to make machine code: pip install nvidia-cuda-nvrtc")
    path = Path(tempfile.mkdtemp(prefix="rescompile-tuning-")) / f"candidate.{tar.output_format}"
    CudaExecutable(compiled.mod, source, cubin.data).export_library(str(path), fcompile=tar)
    return str(path)


def use_threads(count: int) -> None:
    """Let what this process times run on `count` threads."""
    import tvm_ffi

    fastest_first = 1
    tvm_ffi.get_global_func("runtime.config_threadpool")(fastest_first, count)
