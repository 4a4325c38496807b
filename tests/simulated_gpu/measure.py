"""python measure.py LIBCUDA LIBCUDART SET OUT: the kernels of a compiled set on the simulated GPU, without TVM."""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path

libcuda, libcudart, folder, out = sys.argv[1:]
for library in (libcuda, libcudart):
    ctypes.CDLL(library, mode=ctypes.RTLD_GLOBAL)

from benchmarks.gpu_kernels import run  # noqa: E402
from benchmarks.gpu_set import Set, load_runtime  # noqa: E402
from tests.simulated_gpu.device import SimulatedDevice  # noqa: E402

load_runtime(Path(folder))
run(Set.open(Path(folder)), Path(out), SimulatedDevice())
if "tvm" in sys.modules:
    raise SystemExit("the set needed TVM's compiler")
