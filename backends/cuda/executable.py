"""A compiled program whose GPU code is machine code: what TVM keeps as source is replaced where a program is exported.

TVM 0.27 carries the source along where its CUDA runtime is not loaded (on every machine without a driver) and compiles
it when the program is loaded, on a machine that then needs a compiler. The exported library holds, in the order of the
import tree, `kind` and `bytes` of each module; those of the kind `cuda` are `format`, `functions`, `code`, each string
with its length before it. Here `cuda` and the source become `cubin` and the machine code: TVM's runtime alone loads it.
"""

from __future__ import annotations

import struct
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import tvm
import tvm_ffi

from rescompile.errors import RescompileError

_LENGTH = struct.Struct("<Q")
_HOST_CODE = "_lib"  # stands in the import tree for what is linked beside it


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
    return "\n".join(str(found.inspect_source("cuda")) for found in cuda_modules(module))


class CudaExecutable(tvm.runtime.Executable):  # type: ignore[misc]
    """An executable for a GPU: exported with `cubin` in it, and run by way of that export."""

    def __init__(self, module: Any, cubin: bytes | None) -> None:
        super().__init__(module)
        self.cubin = cubin
        self._jitted_mod: Any = None

    def export_library(self, file_name: str, *, fcompile: Callable[..., Any] | None = None, **kwargs: Any) -> Any:
        """Write host code and GPU code as one shared library; `fcompile` links it."""
        pack = self._pack if self.cubin else None
        return self.mod.export_library(str(file_name), fcompile=fcompile, fpack_imports=pack, **kwargs)

    def jit(self, **kwargs: Any) -> Any:
        """The exported library, loaded into this process."""
        if self._jitted_mod is None:
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / "program.so"
                self.export_library(str(path), **kwargs)
                self._jitted_mod = tvm.runtime.load_module(str(path))
        return self._jitted_mod

    def _pack(self, module: Any, is_system_lib: bool, prefix: str, workspace: str) -> str:
        """The imports of `module` as an object file, GPU code as machine code."""
        packed = tvm_ffi.get_global_func("runtime.ModulePackImportsToTensor")(module).numpy().tobytes()
        assert self.cubin is not None
        blob = with_cubin(packed, self.cubin)
        host = next(part for part in (module, *_imports(module)) if part.kind == "llvm")
        target = host.get_function("_get_target_string")()
        made = tvm_ffi.get_global_func("codegen.codegen_blob")(blob, is_system_lib, target, prefix)
        path = Path(workspace) / f"{prefix}devc.o"
        made.write_to_file(str(path))
        return str(path)


def with_cubin(packed: bytes, cubin: bytes) -> bytes:
    """Imports as TVM packs them, with the machine code in the place of the CUDA source."""
    blob = packed[_LENGTH.size :]
    modules, position = _import_tree(blob)
    out = [blob[:position]]
    replaced = 0
    for _ in range(modules):
        kind, position = _string(blob, position)
        out.append(_said(kind))
        if kind == _HOST_CODE.encode():
            continue
        content, position = _string(blob, position)
        if kind == b"cuda":
            content = _as_cubin(content, cubin)
            replaced += 1
        out.append(_said(content))
    if position != len(blob) or replaced != 1:
        raise RescompileError(
            f"The program has {replaced} modules of GPU code where one was expected: report the model that did this."
        )
    body = b"".join(out)
    return _LENGTH.pack(len(body)) + body


def _as_cubin(content: bytes, cubin: bytes) -> bytes:
    form, start = _string(content, 0)
    if form != b"cuda":
        return content  # made on a machine with a driver, where TVM has compiled it already
    # `functions` in between has a form of its own, and stays: so the code is found from its end, by its length.
    end = next(
        at
        for at in range(start, len(content) - _LENGTH.size + 1)
        if _LENGTH.unpack_from(content, at)[0] == len(content) - at - _LENGTH.size and content[at + 8 :].isascii()
    )
    return _said(b"cubin") + content[start:end] + _said(cubin)


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
