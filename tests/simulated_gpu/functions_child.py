"""python functions_child.py LIBCUDA LIBCUDART LIBRARY FOLDER: call a library's functions on the simulated GPU.

FOLDER holds `calls.json`, a list of [function, stem]: the function's buffers are in `STEM.given`, as they are before the
call; those after it go to `STEM.made`.
"""

from __future__ import annotations

import ctypes
import json
import sys
from pathlib import Path

libcuda, libcudart, library, folder = sys.argv[1:]
# Before TVM: its CUDA runtime is loaded only where these names are found.
for name in (libcuda, libcudart):
    ctypes.CDLL(name, mode=ctypes.RTLD_GLOBAL)

import tvm  # noqa: E402

from tests.simulated_gpu import restore, store  # noqa: E402

module, device = tvm.runtime.load_module(library), tvm.cuda(0)
for function, stem in json.loads((Path(folder) / "calls.json").read_text()):
    buffers = [tvm.runtime.tensor(array, device) for array in restore(Path(folder) / f"{stem}.given")]
    module[function](*buffers)
    store(Path(folder) / f"{stem}.made", [buffer.numpy() for buffer in buffers])
