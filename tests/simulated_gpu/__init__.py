"""Run generated CUDA source on a processor: `simulated_cubin` compiles it, `child` runs whole programs made with it.

A thread is a fiber, a block a loop (cuda_on_cpu.h). For whole programs a process loads a CUDA driver of our own
(driver.cpp) before TVM, whose CUDA runtime then loads the artifact, moves memory and launches kernels as on a GPU.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

HERE = Path(__file__).parent
COMPILER = shutil.which("g++")
_KERNEL = re.compile(
    r'extern "C" __global__ void (?:__launch_bounds__\([\d, ]+\) )?(?P<name>\w+)\((?P<parameters>[^)]*)\);'
)
_CODE = ('extern "C" __global__', "template <class V, int N> struct Booleans")  # what comes before is TVM's headers
_SHARED = re.compile(r"__shared__ alignas\((\d+)\)")
_DYNAMIC = re.compile(r"extern __shared__ __align__\(\d+\) (\w+) (\w+)\[\];")


def simulated_cubin(source: str, *, optimise: str = "-O1", arch: int | None = None) -> bytes:
    """A shared library with a function `launch_NAME(parameters, dims, shared bytes)` for each kernel of the source.

    `arch` is the compute capability that it says it is for, 90 for sm_90; -90 stands for PTX, which later ones run too.
    """
    body = source[min(found for mark in _CODE if (found := source.find(mark)) >= 0) :]
    launches = []
    for kernel in _KERNEL.finditer(body):
        types = [_type(parameter) for parameter in kernel["parameters"].split(",") if parameter.strip()]
        given = ", ".join(f"*static_cast<{kind}*>(parameters[{i}])" for i, kind in enumerate(types))
        launches.append(
            f'extern "C" void launch_{kernel["name"]}(void** parameters, const unsigned* dims, std::size_t shared) {{\n'
            f"  gpu::kernel = [parameters] {{ {kernel['name']}({given}); }};\n  gpu::launch(dims, shared);\n}}\n"
            f'extern "C" const unsigned parameters_{kernel["name"]}[] = {{'
            f"{''.join(f'sizeof({kind}), ' for kind in types)}0}};\n"
        )
    if arch is not None:
        launches.append(f'extern "C" const int simulated_arch = {arch};\n')
    body = _SHARED.sub(r"alignas(\1) static", _DYNAMIC.sub(r"\1* \2 = reinterpret_cast<\1*>(gpu::shared());", body))
    with tempfile.TemporaryDirectory() as folder:
        code, made = Path(folder) / "kernels.cpp", Path(folder) / "kernels.so"
        header = "hopper.h" if "wgmma" in body else "tensor_cores.h"
        code.write_text(f'#include "cuda_on_cpu.h"\n#include "{header}"\n{body}\n{"".join(launches)}')
        _build([optimise, "-o", str(made), str(code)])
        return made.read_bytes()


def launch(
    library: bytes,
    name: str,
    arrays: Sequence[np.ndarray[Any, Any]],
    scalars: Sequence[int],
    dims: Sequence[int],
    shared: int = 0,
    cluster: int = 1,
) -> None:
    """Run one kernel in this process; the parameters are the arrays, in the kernel's order, and then the scalars.

    `shared`: bytes of dynamic shared memory; `cluster`: how many blocks run together.
    """
    with tempfile.NamedTemporaryFile(suffix=".so") as file:
        file.write(library)
        file.flush()
        function = getattr(ctypes.CDLL(file.name), f"launch_{name}")
    values: list[Any] = [ctypes.c_void_p(array.ctypes.data) for array in arrays]
    values += [ctypes.c_int64(scalar) for scalar in scalars]
    pointers = (ctypes.c_void_p * len(values))(
        *(ctypes.cast(ctypes.pointer(value), ctypes.c_void_p) for value in values)
    )
    function(pointers, (ctypes.c_uint * 7)(*dims, cluster), ctypes.c_size_t(shared))


def dims(function: Any, extents: Mapping[str, int]) -> list[int]:
    """Blocks and threads of a kernel's launch, from its PrimFunc and its dynamic extents by name."""
    import tvm

    from rescompile.backends.cuda.schedule import thread_extents

    analyzer, found = tvm.sym.Analyzer(), {}
    for tag, extent in thread_extents(function).items():
        for variable in tvm.tirx.analysis.undefined_vars(tvm.tirx.Evaluate(extent)):
            analyzer.bind(variable, tvm.tirx.const(extents[variable.name], "int64"))
        found[tag] = int(analyzer.simplify(extent).value)
    return [found.get(f"{kind}.{axis}", 1) for kind in ("blockIdx", "threadIdx") for axis in "xyz"]


def parameters(source: str, name: str) -> list[str]:
    """Names of a kernel's parameters, without TVM's suffix."""
    kernel = next(kernel for kernel in _KERNEL.finditer(source) if kernel["name"] == name)
    return [parameter.split()[-1].removesuffix("_ptr") for parameter in kernel["parameters"].split(",")]


def run_programs(folder: Path, programs: dict[str, dict[str, np.ndarray[Any, Any]]]) -> dict[str, list[Any]]:
    """Outputs of the artifacts `NAME.zip` in a folder for inputs by name, from a process with the simulated GPU."""
    for name, inputs in programs.items():
        _store(folder / f"{name}.inputs", list(inputs.values()))
    return _in_child("child.py", folder, list(programs))


def run_functions(
    folder: Path, functions: Any, calls: dict[str, list[np.ndarray[Any, Any]]], *, optimise: str = "-O1"
) -> dict[str, list[np.ndarray[Any, Any]]]:
    """What each function's buffers hold after a call by TVM's own host code, launch parameters and all.

    functions: an IRModule of kernels; calls: the buffers of each that is called, in order, inputs and outputs alike.
    """
    build_functions(folder, functions, optimise=optimise)
    return call_functions(folder, calls)


def build_functions(
    folder: Path, functions: Any, *, optimise: str = "-O1", edit: Callable[[str], str] = lambda source: source
) -> None:
    """Make `functions.so` of an IRModule of kernels; `edit` may change their source, to test the simulation."""
    import tvm

    from rescompile.backends.cuda.executable import CudaExecutable, cross_compiling, cuda_source
    from rescompile.backends.cuda.targets import cuda_target
    from rescompile.backends.link import link

    with cross_compiling():
        built = tvm.compile(functions, target=cuda_target("sm_90"))
    source = cuda_source(built.mod)
    link(CudaExecutable(built.mod, source, simulated_cubin(edit(source), optimise=optimise)), folder / "functions.so")


def call_functions(folder: Path, calls: dict[str, list[np.ndarray[Any, Any]]]) -> dict[str, list[np.ndarray[Any, Any]]]:
    """Call functions of `functions.so`, all in one process; RuntimeError with what it said when it fails."""
    for name, arrays in calls.items():
        _store(folder / f"{name}.inputs", arrays)
    return _in_child("functions.py", folder, list(calls))


def run_scenarios(folder: Path, names: Sequence[str]) -> dict[str, Any]:
    """What scenarios.py found, by name, from a process with the simulated GPU."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    command = [sys.executable, str(HERE / "scenarios.py"), *driver(), str(folder), *names]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"The simulated GPU failed:\n{done.stdout}\n{done.stderr}")
    return dict(json.loads(done.stdout.splitlines()[-1]))


def _in_child(script: str, folder: Path, names: list[str]) -> dict[str, list[Any]]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    command = [sys.executable, str(HERE / script), *driver(), str(folder), *names]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"The simulated GPU failed:\n{done.stdout}\n{done.stderr}")
    return {name: restore(folder / f"{name}.outputs") for name in names}


def restore(path: Path) -> list[np.ndarray[Any, Any]]:
    """Arrays that `_store` wrote, of any dtype."""
    described = json.loads(path.with_suffix(path.suffix + ".json").read_text())
    data, arrays, start = path.read_bytes(), [], 0
    for dtype, shape in described:
        kind = np.dtype(ml_dtypes.bfloat16) if dtype == "bfloat16" else np.dtype(dtype)
        size = int(np.prod(shape)) * kind.itemsize
        arrays.append(np.frombuffer(data[start : start + size], dtype=kind).reshape(shape).copy())
        start += size
    return arrays


def _store(path: Path, arrays: Sequence[np.ndarray[Any, Any]]) -> None:
    path.write_bytes(b"".join(np.ascontiguousarray(array).tobytes() for array in arrays))
    described = [[str(array.dtype), list(array.shape)] for array in arrays]
    path.with_suffix(path.suffix + ".json").write_text(json.dumps(described))


store = _store


@cache
def driver() -> tuple[str, str]:
    """The driver and the runtime, under the names that TVM's CUDA runtime asks for. All of it is in the second."""
    folder = Path(tempfile.mkdtemp(prefix="simulated-gpu-"))
    versions, empty = folder / "versions", folder / "empty.cpp"
    versions.write_text("libcudart.so.13 { global: *; };\n")
    empty.touch()
    cuda, cudart = folder / "libcuda.so.1", folder / "libcudart.so.13"
    _build([f"-Wl,-soname,{cuda.name}", "-o", str(cuda), str(empty)])
    linked = [f"-Wl,-soname,{cudart.name}", f"-Wl,--version-script={versions}", "-o", str(cudart)]
    _build(["-O1", *linked, str(HERE / "driver.cpp"), "-ldl"])
    return str(cuda), str(cudart)


def _build(options: list[str]) -> None:
    command = [str(COMPILER), "-std=c++17", "-w", "-shared", "-fPIC", "-ffp-contract=off", f"-I{HERE}", *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"g++ failed:\n{done.stderr[:3000]}")


def _type(parameter: str) -> str:
    return " ".join(parameter.replace("__restrict__", "").split()[:-1])
