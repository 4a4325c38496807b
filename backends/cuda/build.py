"""One kernel alone: compiled into a function of this process, or into a library that TVM's runtime loads elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import tvm

from rescompile.backends.cuda.cubin import Cubin, to_cubin
from rescompile.backends.cuda.executable import CudaExecutable, cross_compiling, cuda_source
from rescompile.backends.link import link
from rescompile.backends.targets import CompileTarget
from rescompile.errors import RescompileError

Assemble = Callable[[str, str], Cubin | None]  # CUDA source and architecture into machine code


def builder(target: CompileTarget) -> Callable[[Any], Callable[..., object]]:
    """A function that compiles a kernel and loads it; it needs the GPU's driver and TVM's CUDA runtime."""

    def build(function: Any) -> Callable[..., object]:
        return _Loaded(compiled({"kernel": function}, target).jit())

    return build


class _Loaded:
    """A function with the module that it would die with."""

    def __init__(self, module: Any) -> None:
        self.module, self.function = module, module["kernel"]

    def __call__(self, *buffers: Any) -> object:
        return self.function(*buffers)


def compiled(functions: Mapping[str, Any], target: CompileTarget, assemble: Assemble = to_cubin) -> CudaExecutable:
    """Kernels under their names, their launches on the host and their machine code.

    RescompileError where there is no compiler for the machine code.
    """
    module = tvm.IRModule({name: function.with_attr("global_symbol", name) for name, function in functions.items()})
    with cross_compiling():
        made = tvm.compile(module, target=target.tvm)
    source = cuda_source(made.mod)
    cubin = assemble(source, str(target.arch))
    if cubin is None:
        raise RescompileError(
            "Kernels cannot be timed without machine code, and neither nvcc nor NVRTC is here to make it: "
            "pip install nvidia-cuda-nvrtc."
        )
    return CudaExecutable(made.mod, source, cubin.data)


def library(functions: Mapping[str, Any], target: CompileTarget, path: Path, assemble: Assemble = to_cubin) -> Path:
    """The kernels as a shared library at `path`."""
    link(compiled(functions, target, assemble), path)
    return path
