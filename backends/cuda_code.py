"""From generated CUDA source to code that a GPU loads: by nvcc, or by the NVRTC library that pip can install."""

from __future__ import annotations

import ctypes
import hashlib
import importlib.util
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rescompile.errors import RescompileError

_NVCC_PLACES = ("/usr/local/cuda/bin/nvcc", "/usr/local/bin/nvcc")


@dataclass(frozen=True)
class Cubin:
    """Machine code for one architecture; `usage` is what the compiler says of registers and spills."""

    code: bytes
    usage: str = ""


def sources(executable: Any) -> list[str]:
    """The CUDA source of an executable's device code."""
    found: list[str] = []

    def visit(module: Any) -> None:
        if module.kind == "cuda":
            found.append(str(module.inspect_source()))
        for imported in module.imports:
            visit(imported)

    visit(getattr(executable, "mod", executable))
    return found


def digest(source: str) -> str:
    """The name under which the code of a source is kept."""
    return hashlib.sha256(source.encode()).hexdigest()[:32]


def compiler() -> str | None:
    """Path of nvcc, or "nvrtc" where only the library is there, None where neither is."""
    nvcc = shutil.which("nvcc") or next((place for place in _NVCC_PLACES if Path(place).exists()), None)
    return nvcc or ("nvrtc" if _nvrtc_library() is not None else None)


def compile_source(source: str, arch: str) -> Cubin | None:
    """Machine code for `arch` (sm_90), None where no compiler is there. RescompileError when it rejects the source."""
    tool = compiler()
    if tool is None:
        return None
    return _by_nvrtc(source, arch) if tool == "nvrtc" else _by_nvcc(tool, source, arch)


def _by_nvcc(nvcc: str, source: str, arch: str) -> Cubin:
    with tempfile.TemporaryDirectory() as folder:
        text, binary = Path(folder) / "kernels.cu", Path(folder) / "kernels.cubin"
        text.write_text(source)
        command = [nvcc, "-O3", "-std=c++17", f"-arch={arch}", "-Xptxas", "-v", "-cubin", "-o", str(binary), str(text)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise _rejected("nvcc", arch, done.stderr)
        return Cubin(binary.read_bytes(), done.stderr)


def _nvrtc_folders() -> list[Path]:
    """Folders of NVIDIA's packages, which hold libraries and headers."""
    spec = importlib.util.find_spec("nvidia")
    places = list(spec.submodule_search_locations or ()) if spec is not None else []
    return [folder for place in places for folder in sorted(Path(place).iterdir()) if folder.is_dir()]


def _nvrtc_library() -> Path | None:
    found = [library for folder in _nvrtc_folders() for library in sorted((folder / "lib").glob("libnvrtc.so*"))]
    return found[0] if found else None


def _by_nvrtc(source: str, arch: str) -> Cubin:
    library = ctypes.CDLL(str(_nvrtc_library()))
    headers = [folder / "include" for folder in _nvrtc_folders() if (folder / "include").is_dir()]
    options = [f"-arch={arch}", "-std=c++17", "-default-device", *(f"-I{path}" for path in headers)]
    program = ctypes.c_void_p()
    _checked(library.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"kernels.cu", 0, None, None))
    try:
        given = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
        if library.nvrtcCompileProgram(program, len(options), given):
            raise _rejected("NVRTC", arch, _text(library, program, "ProgramLog").decode(errors="replace"))
        return Cubin(_text(library, program, "CUBIN"))
    finally:
        library.nvrtcDestroyProgram(ctypes.byref(program))


def _text(library: Any, program: ctypes.c_void_p, what: str) -> bytes:
    size = ctypes.c_size_t()
    _checked(getattr(library, f"nvrtcGet{what}Size")(program, ctypes.byref(size)))
    buffer = ctypes.create_string_buffer(size.value)
    _checked(getattr(library, f"nvrtcGet{what}")(program, buffer))
    return buffer.raw


def _checked(status: int) -> None:
    if status:
        raise RescompileError(f"NVRTC failed with status {status}: install nvcc or another nvidia-cuda-nvrtc.")


def _rejected(tool: str, arch: str, said: str) -> RescompileError:
    errors = [line.strip() for line in said.splitlines() if "error" in line]
    return RescompileError(f"{tool} rejects generated code for {arch}: {(errors or ['no message'])[0]}.")


def spills(usages: Sequence[str]) -> int:
    """Bytes that kernels spill to local memory, by nvcc's report."""
    total = 0
    for usage in usages:
        for line in usage.splitlines():
            words = line.replace(",", " ").split()
            if "spill" in words and "stores" in words:
                total += int(words[words.index("spill") - 2])
    return total
