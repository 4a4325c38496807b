"""NVRTC, the CUDA compiler as a library, through ctypes: no CUDA toolkit, no Python bindings, headers included.

Source: NVRTC documentation, 13.x (`--use-bundled-headers`); the library comes as the package nvidia-cuda-nvrtc.
"""

from __future__ import annotations

import ctypes
import importlib.util
import tempfile
from collections.abc import Sequence
from pathlib import Path

from rescompile.errors import RescompileError


def library() -> Path | None:
    """Where pip put NVRTC; None where it is not, or is a version without headers of its own."""
    try:
        spec = importlib.util.find_spec("nvidia")
    except ValueError:
        return None
    for root in (spec.submodule_search_locations or []) if spec else []:
        for path in sorted(Path(root).glob("c*/lib/libnvrtc.so.*"), reverse=True):
            if "alt" not in path.name and hasattr(_load(path), "nvrtcInstallBundledHeaders"):
                return path
    return None


def compile_source(path: Path, source: str, options: Sequence[str], result: str = "CUBIN") -> tuple[bytes | None, str]:
    """The cubin, or PTX, None where the source does not compile; and what the compiler said."""
    lib = _load(path)
    program = ctypes.c_void_p()
    with tempfile.TemporaryDirectory() as headers:
        _check(lib, lib.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"kernels.cu", 0, None, None))
        try:
            given = [f"--use-bundled-headers={headers}", *options]
            array = (ctypes.c_char_p * len(given))(*(option.encode() for option in given))
            failed = lib.nvrtcCompileProgram(program, len(given), array)
            log = _text(lib, "ProgramLog", program).decode(errors="replace").rstrip("\0")
            return (None if failed else _text(lib, result, program)), log
        finally:
            lib.nvrtcDestroyProgram(ctypes.byref(program))


def _load(path: Path) -> ctypes.CDLL:
    lib = ctypes.CDLL(str(path))
    lib.nvrtcGetErrorString.restype = ctypes.c_char_p
    return lib


def _text(lib: ctypes.CDLL, what: str, program: ctypes.c_void_p) -> bytes:
    size = ctypes.c_size_t()
    _check(lib, getattr(lib, f"nvrtcGet{what}Size")(program, ctypes.byref(size)))
    buffer = ctypes.create_string_buffer(size.value)
    _check(lib, getattr(lib, f"nvrtcGet{what}")(program, buffer))
    return buffer.raw


def _check(lib: ctypes.CDLL, status: int) -> None:
    if status:
        raise RescompileError(f"NVRTC failed: {lib.nvrtcGetErrorString(status).decode()}.")
