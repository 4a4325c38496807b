"""The file of a compiled program: one uncompressed zip of manifest.json, shared libraries and weights.safetensors.

Code for a processor is one library. Code for a GPU is one for each architecture, form (cubin, PTX, source) and size of
batch that it was compiled for. Reading one needs numpy and TVM's runtime, and neither torch nor the compiler.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import struct
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from importlib import metadata
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rescompile.backends import tvm_runtime
from rescompile.backends.quiet import without_notes
from rescompile.errors import RescompileError

if TYPE_CHECKING:
    from rescompile.graph import Value

SCHEMA = 2
CODE = "program.so"
_SUFFIX = ".so"
_LENGTH = struct.Struct("<Q")


@dataclass
class TensorInfo:
    """Name, shape (symbolic extents by name) and dtype of an input or output."""

    name: str
    shape: tuple[int | str, ...]
    dtype: str


@dataclass
class Code:
    """One library of a program for a GPU."""

    file: str
    arch: str  # sm_90: what it was assembled for, or what its PTX or source is for at least
    form: str  # cubin, ptx or cuda (source)
    weights: list[str] = field(default_factory=list)  # in the order in which it takes them
    extents: dict[str, int] = field(default_factory=dict)  # symbols that have this one value in it
    driver: tuple[int, int] = (0, 0)  # the oldest CUDA whose driver takes it
    workspace: int | None = None  # bytes of what it computes on the way; None where they depend on the inputs' extents


@dataclass
class Manifest:
    """What a program is, apart from its code and weights."""

    target: str
    device: str  # cpu or cuda
    inputs: list[TensorInfo]
    outputs: list[TensorInfo]
    model: str = ""
    source_hash: str = ""  # of the graph that was compiled and its weights
    threads: int = 1
    arch: str = field(default_factory=platform.machine)
    system: str = field(default_factory=lambda: platform.system().lower())
    rescompile: str = ""
    tvm: str = ""
    cpu: str = ""  # LLVM's name of the processor, or the compute capability of the GPU
    extensions: list[str] = field(default_factory=list)  # vector extensions that the code uses
    schema: int = SCHEMA
    sources: dict[str, str] = field(default_factory=dict)  # generated GPU source
    compiler: str = ""  # that made GPU code of it; empty where there was none, and the machine that runs it needs one
    weights: list[str] = field(default_factory=list)  # in the order in which the program takes them
    regions: list[dict[str, Any]] = field(default_factory=list)
    note: str = ""
    codes: list[Code] = field(default_factory=list)  # for a GPU
    symbols: list[str] = field(default_factory=list)  # extents that only the inputs say, in the order of `plan`
    libraries: list[str] = field(default_factory=list)  # packed functions that the code calls besides TVM's own
    storage: dict[str, int | None] = field(default_factory=dict)  # bytes of weights, activations, and those unshared

    def to_json(self) -> str:
        """The manifest as text."""
        return json.dumps(asdict(self), indent=1)

    @staticmethod
    def from_json(text: str) -> Manifest:
        """The manifest that `to_json` wrote."""
        data = json.loads(text)
        for key in ("inputs", "outputs"):
            data[key] = [TensorInfo(info["name"], tuple(info["shape"]), info["dtype"]) for info in data[key]]
        data["codes"] = [Code(**{**code, "driver": tuple(code["driver"])}) for code in data.get("codes", ())]
        return Manifest(**data)


def version() -> str:
    """This package's version, "unknown" in a tree that is not installed."""
    try:
        return metadata.version("rescompile")
    except metadata.PackageNotFoundError:
        return "unknown"


def infos(values: list[Value]) -> list[TensorInfo]:
    """Names and types of inputs or outputs."""
    return [TensorInfo(value.name, tuple(value.shape or ()), str(value.dtype)) for value in values]


def tvm_version() -> str:
    """The version of TVM that is installed."""
    return metadata.version("apache-tvm")


def write(path: Path, code: Mapping[str, Any], weights: dict[str, Any], manifest: Manifest) -> Path:
    """Write the program, whole or not at all. RescompileError when it cannot be linked or written.

    `code` holds, by file name, executables that are still to be linked, or the bytes of libraries.
    """
    from rescompile.backends.link import link

    try:
        handle, partial = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    except OSError as error:
        raise RescompileError(f"'{path}' cannot be written: {error.strerror}.") from error
    os.close(handle)
    try:
        with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(partial, "w", zipfile.ZIP_STORED) as archive:
            archive.writestr("manifest.json", replace(manifest, weights=list(weights)).to_json())
            for name, part in code.items():
                if isinstance(part, bytes):
                    archive.writestr(name, part)
                    continue
                library = Path(folder) / f"program{_SUFFIX}"
                link(part, library)
                archive.write(library, name)
            for name, text in manifest.sources.items():
                archive.writestr(f"sources/{name}", text)
            with archive.open("weights.safetensors", "w", force_zip64=True) as entry:
                for part in _serialized(weights):
                    entry.write(part)
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(partial, 0o666 & ~mask)
        os.replace(partial, path)
    except OSError as error:
        raise RescompileError(f"'{path}' cannot be written: {error.strerror or error}.") from error
    finally:
        Path(partial).unlink(missing_ok=True)
    return path


def read(path: Path) -> tuple[dict[str, bytes], dict[str, Any], Manifest]:
    """Libraries by file name, as bytes; weights; manifest. RescompileError for any other file."""
    try:
        with zipfile.ZipFile(path) as archive:
            manifest = _manifest(path, archive.read("manifest.json").decode())
            _check(path, manifest)
            found = _deserialized(archive.read("weights.safetensors"))
            weights = {name: found[name] for name in manifest.weights}
            names = [code.file for code in manifest.codes] or [CODE]
            code = {name: archive.read(name) for name in names}
    except FileNotFoundError:
        raise RescompileError(f"There is no file '{path}'.") from None
    except OSError as error:
        raise RescompileError(f"'{path}' cannot be read: {error.strerror or error}.") from error
    except (zipfile.BadZipFile, KeyError, ValueError, EOFError, TypeError) as error:
        raise RescompileError(
            f"'{path}' is not a program of rescompile, or not all of one ({error}): compile the model again."
        ) from error
    return code, weights, manifest


def fingerprint(parts: list[str], weights: dict[str, np.ndarray[Any, Any]]) -> str:
    """A hash of a graph's text and of its weights' shapes and contents."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.encode())
    for name, data in weights.items():
        digest.update(f"{name}{data.shape}{data.dtype}".encode())
        digest.update(np.ascontiguousarray(data).view(np.uint8).reshape(-1).data)
    return digest.hexdigest()


def _manifest(path: Path, text: str) -> Manifest:
    schema = json.loads(text).get("schema")
    if schema != SCHEMA:
        raise RescompileError(
            f"'{path}' has format {schema} and this version of rescompile reads format {SCHEMA}: "
            f"compile the model again."
        )
    try:
        return Manifest.from_json(text)
    except TypeError as error:
        raise ValueError(str(error)) from error


def _check(path: Path, manifest: Manifest) -> None:
    here = (platform.machine(), platform.system().lower())
    if (manifest.arch, manifest.system) != here:
        raise RescompileError(
            f"'{path}' is compiled for {manifest.arch} {manifest.system} and this machine is {here[0]} {here[1]}: "
            f"compile the model for this machine."
        )
    missing = sorted(set(manifest.extensions) - _extensions()) if _extensions() else []
    if missing:
        raise RescompileError(
            f"'{path}' is compiled for {manifest.cpu}, and this processor lacks {', '.join(missing)}: "
            f"compile the model for this machine."
        )
    tvm_runtime.load()
    found = tvm_version()
    if manifest.tvm != found:
        raise RescompileError(
            f"'{path}' was compiled with apache-tvm {manifest.tvm} and {found} is installed: compile the model again, "
            f"or install that version."
        )


def _extensions() -> set[str]:
    """What this processor can do, by Linux's names; empty where that cannot be asked."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return set()
    return {word for line in lines if line.startswith("flags") for word in line.partition(":")[2].split()}


def loaded(code: bytes) -> Any:
    """A library, mapped."""
    import tvm_ffi

    # The file can go once the library is mapped; where a system forbids that, it stays in its temporary folder.
    folder = tempfile.mkdtemp(prefix="rescompile-")
    library = Path(folder) / f"program{_SUFFIX}"
    library.write_bytes(code)
    try:
        with without_notes():
            return tvm_ffi.load_module(str(library))
    except (RuntimeError, OSError, ValueError) as error:
        raise RescompileError(f"The program's code cannot be loaded: {error}; compile the model again.") from error
    finally:
        if sys.platform != "win32":
            library.unlink()
            os.rmdir(folder)


def _serialized(weights: dict[str, Any]) -> Iterator[bytes]:
    """The weights as safetensors, piece by piece."""
    header: dict[str, Any] = {}
    start = 0
    for name, data in weights.items():
        end = start + data.nbytes
        kind = _NAMES[tvm_runtime.dtype_name(data)]
        header[name] = {"dtype": kind, "shape": list(data.shape), "data_offsets": [start, end]}
        start = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % _LENGTH.size)
    yield _LENGTH.pack(len(text)) + text
    for data in weights.values():
        yield np.asarray(data, order="C").tobytes()


def _deserialized(data: bytes) -> dict[str, Any]:
    """The tensors of a safetensors file, without a copy. ValueError for anything else."""
    if len(data) < _LENGTH.size or _LENGTH.unpack_from(data)[0] > len(data) - _LENGTH.size:
        raise ValueError("the weights are cut off")
    base = _LENGTH.size + _LENGTH.unpack_from(data)[0]
    found = {}
    for name, info in json.loads(data[_LENGTH.size : base]).items():
        if name == "__metadata__":
            continue
        dtype = tvm_runtime.storage_dtype(_DTYPES[info["dtype"]])
        (start, end), shape = info["data_offsets"], info["shape"]
        if end - start != prod(shape) * dtype.itemsize or base + end > len(data):
            raise ValueError(f"the weight '{name}' is cut off")
        found[name] = np.frombuffer(data, dtype=dtype, count=prod(shape), offset=base + start).reshape(shape)
    return found


_DTYPES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64", "I32": "int32",
    "I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool", "U16": "uint16", "U32": "uint32", "U64": "uint64",
}  # fmt: skip
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
