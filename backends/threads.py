"""How many threads compiled programs run on.

TVM reads its limit from the process environment when the first kernel runs, counts only half of the processors on
x86, and pins its threads, the caller's included, to single processors, which torch's own threads then inherit.
So the limit is set here, before that first kernel, and pinning is off.
"""

from __future__ import annotations

import os

import tvm_ffi

from rescompile.errors import RescompileError

_BIG_CORES = 1  # TVM's affinity mode: the fastest processors first
_asked = {"threads": 0}  # TVM's pool is one for the process, and so is this


def available() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def prepare() -> None:
    """Let TVM's pool have as many threads as there are processors; of effect until the first kernel runs."""
    os.environ.setdefault("TVM_NUM_THREADS", str(available()))
    os.environ.setdefault("TVM_BIND_THREADS", "0")


def use(count: int) -> None:
    """Let kernels that are called from now on run on `count` threads."""
    if count < 1 or count > available():
        raise RescompileError(f"{count} threads were asked for where this process may use 1 to {available()}.")
    prepare()
    tvm_ffi.get_global_func("runtime.config_threadpool")(_BIG_CORES, count)
    _asked["threads"] = count


def current() -> int:
    """The number of threads that was last asked for, 0 when none was."""
    return _asked["threads"]
