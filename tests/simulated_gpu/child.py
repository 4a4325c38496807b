"""python child.py LIBCUDA LIBCUDART FOLDER NAME...: run artifacts on the simulated GPU, numbers in files."""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path

libcuda, libcudart, folder, *names = sys.argv[1:]
# Before TVM: its CUDA runtime is loaded only where these names are found.
for library in (libcuda, libcudart):
    ctypes.CDLL(library, mode=ctypes.RTLD_GLOBAL)

from rescompile.backends.program import Program  # noqa: E402
from tests.simulated_gpu import restore, store  # noqa: E402

for name in names:
    program = Program.load(Path(folder) / f"{name}.zip")
    result = program(*restore(Path(folder) / f"{name}.inputs"))
    store(Path(folder) / f"{name}.outputs", list(result) if isinstance(result, tuple) else [result])
