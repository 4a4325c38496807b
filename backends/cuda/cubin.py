"""CUDA source to machine code: by `nvcc` where a toolkit is installed, by NVRTC from pip, or not at all."""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from rescompile.backends.cuda import nvrtc
from rescompile.errors import RescompileError

# Neither fast math nor flushed denormals: what is verified on a processor must hold on the GPU. TVM's own callback
# compiles with both.
_OPTIONS = ("-std=c++17", "--ptxas-options=-v")
# Of cuda.h, which comes with a toolkit and not with NVRTC: what a kernel takes a tensor map as.
_TENSOR_MAP = "struct alignas(64) CUtensorMap { unsigned long long opaque[16]; };\n"

_DYNAMIC_SHARED = re.compile(r"extern __shared__ __align__\((\d+)\) (?!uchar dynamic_shared)(\w+) (\w+)\[\];")
_ENTRY = re.compile(r"Compiling entry function '(?P<kernel>\w+)'")
_STACK = re.compile(
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads"
)
_USED = re.compile(r"Used (?P<registers>\d+) registers")
_SHARED = re.compile(r"(\d+) bytes smem")


@dataclass(frozen=True)
class ResourceUsage:
    """What one kernel takes of a multiprocessor, as the assembler reports it; bytes, and registers of one thread."""

    kernel: str
    registers: int
    spill_stores: int
    spill_loads: int
    shared: int  # static shared memory of a block
    stack: int  # local memory of a thread, spills included

    @property
    def spills(self) -> int:
        """Bytes that a thread writes and reads because it has too few registers."""
        return self.spill_stores + self.spill_loads


@dataclass(frozen=True)
class Cubin:
    """Machine code of one CUDA source, what each of its kernels takes, and which compiler made it."""

    data: bytes
    usage: tuple[ResourceUsage, ...]
    compiler: str


def to_cubin(source: str, arch: str) -> Cubin | None:
    """Machine code for a compute capability such as sm_90; None where there is neither nvcc nor NVRTC.

    RescompileError when a compiler is there and turns the source down.
    """
    source = _one_shared(source)
    said = []
    for compile_with in (_by_nvcc, by_nvrtc):
        made = compile_with(source, arch)
        if isinstance(made, Cubin):
            return made
        if made is not None:
            said.append(made)
    if said:
        raise RescompileError(f"The generated CUDA source does not compile for {arch}: {'; '.join(said)}.")
    return None


def compilers() -> list[str]:
    """The compilers that are here, in the order in which they are asked."""
    return [*(["nvcc"] if shutil.which("nvcc") else []), *(["nvrtc"] if nvrtc.library() else [])]


def _by_nvcc(source: str, arch: str) -> Cubin | str | None:
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        return None
    with tempfile.TemporaryDirectory() as folder:
        code, made = Path(folder) / "kernels.cu", Path(folder) / "kernels.cubin"
        code.write_text(source)
        command = [nvcc, "-cubin", "-O3", f"-arch={arch}", "-w", *_OPTIONS, "-o", str(made), str(code)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            said = (done.stderr or done.stdout).replace(f"{folder}/", "")
            return f"nvcc: {_first_error(said)}"
        return Cubin(made.read_bytes(), usage(done.stderr + done.stdout), "nvcc")


def by_nvrtc(source: str, arch: str) -> Cubin | str | None:
    """Machine code by NVRTC, whichever other compiler is here; else what it said, None where it is missing."""
    path = nvrtc.library()
    if path is None:
        return None
    source = _one_shared(source)
    source = _TENSOR_MAP + source if "CUtensorMap" in source else source
    data, log = nvrtc.compile_source(path, source, [f"--gpu-architecture={arch}", *_OPTIONS])
    return f"NVRTC: {_first_error(log)}" if data is None else Cubin(data, usage(log), "nvrtc")


def _one_shared(source: str) -> str:
    """The source with one name for dynamic shared memory, which each of its kernels sees as it needs it.

    Kernels of several types would else declare the same names differently.
    """
    return _DYNAMIC_SHARED.sub(
        r"extern __shared__ __align__(\1) uchar dynamic_shared_\1[];"
        r"\n  \2* \3 = reinterpret_cast<\2*>(dynamic_shared_\1);",
        source,
    )


def usage(log: str) -> tuple[ResourceUsage, ...]:
    """What `ptxas -v` says of each kernel."""
    found = []
    entries = list(_ENTRY.finditer(log))
    for entry, after in zip(entries, [*entries[1:], None], strict=True):
        text = log[entry.end() : after.start() if after else len(log)]
        stack, used, shared = _STACK.search(text), _USED.search(text), _SHARED.search(text)
        found.append(
            ResourceUsage(
                kernel=entry["kernel"],
                registers=int(used["registers"]) if used else 0,
                spill_stores=int(stack["stores"]) if stack else 0,
                spill_loads=int(stack["loads"]) if stack else 0,
                shared=int(shared[1]) if shared else 0,
                stack=int(stack["stack"]) if stack else 0,
            )
        )
    return tuple(found)


def _first_error(log: str) -> str:
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    return next((line for line in lines if "error" in line or "fatal" in line), lines[0] if lines else "no message")
