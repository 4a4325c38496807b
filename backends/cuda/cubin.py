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

_ENTRY = re.compile(r"Compiling entry function '(?P<kernel>\w+)'")
_STACK = re.compile(
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads"
)
_USED = re.compile(r"Used (?P<registers>\d+) registers")
_SHARED = re.compile(r"(\d+) bytes smem")


# Machine code that any CUDA 13 made runs on every driver of CUDA 13 (CUDA Compatibility, minor version compatibility).
CUBIN_DRIVER = (13, 0)
# Instructions of sm_90a, which no later architecture has, by what the source says of them.
_HOPPER = ("wgmma.", "setmaxnreg.")


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


def assembled_for(source: str, arch: str) -> str:
    """The architecture that source for `arch` must be assembled for: sm_90a where it uses Hopper's own instructions."""
    return f"{arch}a" if arch == "sm_90" and any(word in source for word in _HOPPER) else arch


def to_cubin(source: str, arch: str) -> Cubin | None:
    """Machine code for a compute capability such as sm_90; None where there is neither nvcc nor NVRTC.

    RescompileError when a compiler is there and turns the source down.
    """
    said = []
    for compile_with in (_by_nvcc, _by_nvrtc):
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


def _by_nvrtc(source: str, arch: str) -> Cubin | str | None:
    path = nvrtc.library()
    if path is None:
        return None
    data, log = nvrtc.compile_source(path, source, [f"--gpu-architecture={arch}", *_OPTIONS])
    return f"NVRTC: {_first_error(log)}" if data is None else Cubin(data, usage(log), "nvrtc")


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
