"""A compiled program whose GPU code is machine code: what TVM keeps as source is replaced where a program is exported.

TVM 0.27 carries the source along where its CUDA runtime is not loaded (on every machine without a driver) and compiles
it when the program is loaded, on a machine that then needs a compiler. The exported library holds, in the order of the
import tree, `kind` and `bytes` of each module; those of the kind `cuda` are `format`, `functions`, `code`, each string
with its length before it. Here `cuda` and the source become `cubin` and the machine code, or `ptx` and that: TVM's
runtime alone loads it.
"""

from __future__ import annotations

import os
import struct
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import tvm
import tvm_ffi

from rescompile.backends.cuda.cubin import ready_to_compile
from rescompile.backends.link import link
from rescompile.errors import RescompileError

_LENGTH = struct.Struct("<Q")
_HOST_CODE = b"_lib"  # stands in the import tree for what is linked beside it
_KEEP_SOURCE = "TVM_COMPILE_FORCE_FALLBACK"  # read by TVM, each time that it has generated GPU code
_UNEXPECTED = "TVM packs GPU code in a form that is not that of version 0.27: install the version that is pinned."


def cuda_modules(module: Any) -> Iterator[Any]:
    """The modules of GPU code that a module imports, at any depth, each once."""
    seen: list[Any] = []
    stack = [module]
    while stack:
        here = stack.pop()
        for imported in here.imports:
            if not any(imported.same_as(other) for other in seen):
                seen.append(imported)
                stack.append(imported)
                if imported.kind == "cuda":
                    yield imported


def cuda_source(module: Any) -> str:
    """The CUDA source in a module and its imports, empty when there is none."""
    return ready_to_compile(_generated(module))


def _generated(module: Any) -> str:
    """As TVM keeps it."""
    return "\n".join(str(found.inspect_source("cuda")) for found in cuda_modules(module))


@contextmanager
def cross_compiling() -> Iterator[None]:
    """Let TVM keep CUDA source as it is also where a GPU is: it would have it compiled at once, in its own way."""
    before = os.environ.get(_KEEP_SOURCE)
    os.environ[_KEEP_SOURCE] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[_KEEP_SOURCE]
        else:
            os.environ[_KEEP_SOURCE] = before


class CudaExecutable(tvm.runtime.Executable):  # type: ignore[misc]
    """An executable for a GPU: exported with `cubin` in it, and run by way of that export."""

    def __init__(self, module: Any, source: str, code: bytes | None, form: str = "cubin") -> None:
        super().__init__(module)
        self.source, self.code, self.form = source, code, form
        self._loaded: Any = None

    def export_library(self, file_name: str, *, fcompile: Callable[..., Any] | None = None, **kwargs: Any) -> Any:
        """Write host code and GPU code as one shared library; `fcompile` links it."""
        code, form = self.code, self.form.encode()
        pack = (lambda module, *options: _packed(code, form, module, *options)) if code else None
        return self.mod.export_library(str(file_name), fcompile=fcompile, fpack_imports=pack, **kwargs)

    def jit(self, **_: Any) -> Any:
        """The exported library, loaded into this process."""
        if self._loaded is None:
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / "program.so"
                link(self, path)
                self._loaded = tvm.runtime.load_module(str(path))
        return self._loaded


def _packed(code: bytes, form: bytes, module: Any, is_system_lib: bool, prefix: str, workspace: str) -> str:
    """The imports of `module` as an object file, GPU code as machine code or PTX."""
    packed = tvm_ffi.get_global_func("runtime.ModulePackImportsToTensor")(module).numpy().tobytes()
    host = next(part for part in (module, *_imports(module)) if part.kind == "llvm")
    target = host.get_function("_get_target_string")()
    blob = with_code(packed, _generated(module).encode(), code, form)
    made = tvm_ffi.get_global_func("codegen.codegen_blob")(blob, is_system_lib, target, prefix)
    path = Path(workspace) / f"{prefix}devc.o"
    made.write_to_file(str(path))
    return str(path)


def with_code(packed: bytes, source: bytes, code: bytes, form: bytes) -> bytes:
    """Imports as TVM packs them, with machine code or PTX in the place of the CUDA source."""
    blob = packed[_LENGTH.size :]
    modules, position = _import_tree(blob)
    out = [blob[:position]]
    replaced = 0
    for _ in range(modules):
        kind, position = _string(blob, position)
        out.append(_said(kind))
        if kind == _HOST_CODE:
            continue
        content, position = _string(blob, position)
        if kind == b"cuda":
            before = len(_said(b"cuda")), len(content) - len(_said(source))
            if content[: before[0]] != _said(b"cuda") or content[before[1] :] != _said(source):
                raise RescompileError(_UNEXPECTED)
            # What lies between are the functions, in a form of their own, which stays.
            content = _said(form) + content[before[0] : before[1]] + _said(code)
            replaced += 1
        out.append(_said(content))
    if position != len(blob) or replaced != 1:
        raise RescompileError(_UNEXPECTED)
    body = b"".join(out)
    return _LENGTH.pack(len(body)) + body


def _import_tree(blob: bytes) -> tuple[int, int]:
    """How many modules the blob holds, and where the first begins: after two vectors, of row starts and of children."""
    rows = _LENGTH.unpack_from(blob, 0)[0]
    position = _LENGTH.size * (rows + 1)
    children = _LENGTH.unpack_from(blob, position)[0]
    return rows - 1, position + _LENGTH.size * (children + 1)


def _string(blob: bytes, position: int) -> tuple[bytes, int]:
    size = _LENGTH.unpack_from(blob, position)[0]
    start = position + _LENGTH.size
    return blob[start : start + size], start + size


def _said(content: bytes) -> bytes:
    return _LENGTH.pack(len(content)) + content


def _imports(module: Any) -> list[Any]:
    found: list[Any] = []
    for imported in module.imports:
        found += [imported, *_imports(imported)]
    return found
