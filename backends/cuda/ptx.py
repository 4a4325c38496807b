"""CUDA source to PTX, which a driver compiles for GPUs that came after it.

A driver refuses PTX whose version it does not know, and each CUDA writes its own newest: PTX of CUDA 13.5 is of no use
to a driver of CUDA 13.0, whatever is in it. So the version that PTX declares is lowered to that of the oldest driver
that the runtime takes, where an assembler is here to show that nothing in it is newer. Where none is, the PTX stays as
it is, and the program says which driver it needs.

Source: PTX ISA, release notes (versions 8.0 to 8.8 came with CUDA 12, 9.x with CUDA 13.x).
"""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from rescompile.backends.cuda import nvrtc
from rescompile.backends.cuda.cubin import TENSOR_MAP, ready_to_compile

OLDEST = (9, 0)  # of CUDA 13.0, the oldest whose drivers libcudart.so.13 takes
_VERSION = re.compile(r"^\.version (\d+)\.(\d+)", re.MULTILINE)


@dataclass(frozen=True)
class Ptx:
    """PTX, the oldest CUDA whose driver takes it, and what is to be said of that."""

    data: bytes
    driver: tuple[int, int]
    note: str = ""


def to_ptx(source: str, arch: str) -> Ptx | None:
    """PTX for an architecture and all later ones; None where neither nvcc nor NVRTC makes any."""
    source = ready_to_compile(source)
    text = _by_nvcc(source, arch) or _by_nvrtc(source, arch)
    if text is None:
        return None
    version = declared(text)
    if version <= OLDEST:
        return _made(text, version)
    lowered = _VERSION.sub(f".version {OLDEST[0]}.{OLDEST[1]}", text, count=1)
    if assembles(lowered, arch):
        return _made(lowered, OLDEST)
    return _made(
        text,
        version,
        f"on GPUs later than {arch} it needs a driver of CUDA 13.{version[1]}: its PTX is of version "
        f"{version[0]}.{version[1]}, and no ptxas was here to check an older one",
    )


def declared(text: str) -> tuple[int, int]:
    """The version that PTX says it is of."""
    found = _VERSION.search(text)
    return (int(found[1]), int(found[2])) if found else (0, 0)


def assembles(text: str, arch: str) -> bool:
    """Whether an assembler is here and takes the PTX, instructions newer than its version being errors."""
    ptxas = assembler()
    if ptxas is None:
        return False
    with tempfile.TemporaryDirectory() as folder:
        code = Path(folder) / "kernels.ptx"
        code.write_text(text)
        command = [ptxas, f"-arch={arch}", "-O0", "-o", str(Path(folder) / "kernels.cubin"), str(code)]
        return subprocess.run(command, capture_output=True, check=False).returncode == 0


def assembler() -> str | None:
    """Where ptxas is: of a toolkit, or of the package nvidia-cuda-nvcc."""
    found = shutil.which("ptxas")
    if found is not None:
        return found
    spec = importlib.util.find_spec("nvidia")
    for root in (spec.submodule_search_locations or []) if spec else []:
        for path in sorted(Path(root).glob("c*/bin/ptxas"), reverse=True):
            return str(path)
    return None


def _made(text: str, version: tuple[int, int], note: str = "") -> Ptx:
    driver = (13, version[1]) if version >= OLDEST else (12, 0)
    return Ptx(text.rstrip("\0").encode() + b"\0", driver, note)  # drivers read to the zero


def _by_nvcc(source: str, arch: str) -> str | None:
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        return None
    with tempfile.TemporaryDirectory() as folder:
        code, made = Path(folder) / "kernels.cu", Path(folder) / "kernels.ptx"
        code.write_text(source)
        command = [nvcc, "-ptx", "-O3", f"-arch={_virtual(arch)}", "-w", "-std=c++17", "-o", str(made), str(code)]
        done = subprocess.run(command, capture_output=True, check=False)
        return made.read_text() if done.returncode == 0 else None


def _by_nvrtc(source: str, arch: str) -> str | None:
    path = nvrtc.library()
    if path is None:
        return None
    if "CUtensorMap" in source:
        source = TENSOR_MAP + source
    data, _ = nvrtc.compile_source(path, source, [f"--gpu-architecture={_virtual(arch)}", "-std=c++17"], "PTX")
    return None if data is None else data.decode()


def _virtual(arch: str) -> str:
    return arch.replace("sm_", "compute_")
