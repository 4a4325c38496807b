"""CUDA source to machine code: by `nvcc` where a toolkit is installed, by NVRTC from pip, or not at all."""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from rescompile.backends.cuda import nvrtc
from rescompile.backends.cuda.bool_vectors import corrected
from rescompile.errors import RescompileError

# Neither fast math nor flushed denormals: what is verified on a processor must hold on the GPU. TVM's own callback
# compiles with both.
_OPTIONS = ("-std=c++17", "--ptxas-options=-v")

# Instructions that belong to one compute capability, and assemble only for its name with an a: no later GPU has them.
_SPECIFIC = {"sm_90": re.compile(r"\bwgmma\.|\bsetmaxnreg\.")}
# What cuda.h says of a tensor map, which NVRTC has no copy of.
TENSOR_MAP = """struct alignas(64) CUtensorMap_st { unsigned long long opaque[16]; };
typedef struct CUtensorMap_st CUtensorMap;
"""

_ENTRY = re.compile(r"Compiling entry function '(?P<kernel>\w+)'")
_STACK = re.compile(
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads"
)
_USED = re.compile(r"Used (?P<registers>\d+) registers")
_SHARED = re.compile(r"(\d+) bytes smem")
_DYNAMIC_SHARED = re.compile(r"extern __shared__ __align__\((\d+)\) (\w+) (?!dynamic_shared_)(\w+)\[\];")
# Machine code that any CUDA 13 made runs on every driver of CUDA 13 (CUDA Compatibility, minor version compatibility).
CUBIN_DRIVER = (13, 0)


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


def code_arch(source: str, arch: str) -> str:
    """The name to assemble for: sm_90a in the place of sm_90 where the source uses what only that one has (wgmma).

    Such machine code runs on compute capability 9.0 alone, and the source gives no PTX for later ones.
    """
    specific = _SPECIFIC.get(arch)
    return f"{arch}a" if specific is not None and specific.search(source) else arch


def ready_to_compile(source: str) -> str:
    """TVM's source, its booleans corrected, with one name for dynamic shared memory: kernels declare that alike.

    A source that is so already stays as it is.
    """
    return _DYNAMIC_SHARED.sub(
        r"extern __shared__ __align__(\1) uchar dynamic_shared_\1[];"
        r"\n  \2* \3 = reinterpret_cast<\2*>(dynamic_shared_\1);",
        corrected(source),
    )


def to_cubin(source: str, arch: str) -> Cubin | None:
    """Machine code for a compute capability such as sm_90; None where there is neither nvcc nor NVRTC.

    RescompileError when a compiler is there and turns the source down.
    """
    said = []
    arch, source = code_arch(source, arch), ready_to_compile(source)
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
        # Spelled out, since the short form compiles for sm_90 as well, which rejects what only sm_90a has.
        target = f"-gencode=arch={arch.replace('sm', 'compute')},code={arch}"
        command = [nvcc, "-cubin", "-O3", target, "-w", *_OPTIONS, "-o", str(made), str(code)]
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
    if "CUtensorMap" in source:
        source = TENSOR_MAP + source
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
