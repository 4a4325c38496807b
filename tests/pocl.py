"""Run kernels on a processor through OpenCL: TVM's OpenCL source of a schedule, compiled by PoCL."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

_KERNEL = re.compile(r"__kernel void (?P<name>\w+)\((?P<parameters>[^)]*)\) *\{")


def device() -> Any:
    """PoCL's processor; the test is skipped where there is none."""
    try:
        import pyopencl
    except ImportError:
        pytest.skip("OpenCL is not here: pip install pyopencl pocl-binary-distribution")
    try:
        platforms = pyopencl.get_platforms()
    except pyopencl.LogicError:
        platforms = []
    for platform in platforms:
        if "Portable Computing Language" in platform.name and platform.get_devices():
            return platform.get_devices()[0]
    pytest.skip("no PoCL among OpenCL's platforms: pip install pocl-binary-distribution")


class Kernels:
    """The kernels of an OpenCL source on PoCL."""

    def __init__(self, source: str) -> None:
        import pyopencl

        self.cl, self.source = pyopencl, source
        self.context = pyopencl.Context([device()])
        self.queue = pyopencl.CommandQueue(self.context)
        self.program = pyopencl.Program(self.context, source).build()
        self.parameters = {
            kernel["name"]: [part.split()[-1].removesuffix("_ptr").removesuffix("_flat") for part in kernel["parameters"].split(",")]
            for kernel in _KERNEL.finditer(source)
        }

    def run(
        self, name: str, buffers: Mapping[str, np.ndarray[Any, Any]], scalars: Mapping[str, int], dims: list[int]
    ) -> None:
        """Launch a kernel with buffers, which are written, and numbers by name; `dims`: blocks, then threads of one."""
        flags = self.cl.mem_flags
        held = {
            part: self.cl.Buffer(self.context, flags.READ_WRITE | flags.COPY_HOST_PTR, hostbuf=array)
            for part, array in buffers.items()
        }
        given = [held[part] if part in held else np.int64(scalars[part]) for part in self.parameters[name]]
        kernel = self.cl.Kernel(self.program, name)
        every = [blocks * threads for blocks, threads in zip(dims[:3], dims[3:], strict=True)]
        kernel(self.queue, every, dims[3:], *given)
        for part, array in buffers.items():
            self.cl.enqueue_copy(self.queue, array, held[part])
        self.queue.finish()
