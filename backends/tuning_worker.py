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


def use_threads(count: int) -> None:
    """Let what this process times run on `count` threads."""
    import tvm_ffi

    fastest_first = 1
    tvm_ffi.get_global_func("runtime.config_threadpool")(fastest_first, count)
