"""python functions.py LIBCUDA LIBCUDART FOLDER NAME...: call functions of FOLDER/functions.so on the simulated GPU.

FOLDER/NAME.inputs holds a function's buffers, inputs and outputs alike; FOLDER/NAME.outputs what they hold afterwards.
"""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path

libcuda, libcudart, folder, *names = sys.argv[1:]
# Before TVM: its CUDA runtime is loaded only where these names are found.
for library in (libcuda, libcudart):
    ctypes.CDLL(library, mode=ctypes.RTLD_GLOBAL)

import tvm  # noqa: E402

from tests.simulated_gpu import restore, store  # noqa: E402

module = tvm.runtime.load_module(str(Path(folder) / "functions.so"))
for name in names:
    arrays = restore(Path(folder) / f"{name}.inputs")
    buffers = [tvm.runtime.tensor(array, tvm.cuda()) for array in arrays]
    module[name](*buffers)
    store(Path(folder) / f"{name}.outputs", [buffer.numpy() for buffer in buffers])
