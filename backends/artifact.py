"""The file of a compiled program: one uncompressed zip of manifest.json, program.so and weights.safetensors."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import sys
import tempfile
import zipfile
from dataclasses import asdict, dataclass, field, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from rescompile.backends.quiet import without_notes
from rescompile.backends.require import require_tvm
from rescompile.errors import RescompileError
from rescompile.graph import Value

SCHEMA = 1
_SUFFIX = ".so"


@dataclass
class TensorInfo:
    """Name, shape (symbolic extents by name) and dtype of an input or output."""

    name: str
    shape: tuple[int | str, ...]
    dtype: str


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

    def to_json(self) -> str:
        """The manifest as text."""
        return json.dumps(asdict(self), indent=1)

    @staticmethod
    def from_json(text: str) -> Manifest:
        """The manifest that `to_json` wrote."""
        data = json.loads(text)
        for key in ("inputs", "outputs"):
            data[key] = [TensorInfo(info["name"], tuple(info["shape"]), info["dtype"]) for info in data[key]]
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


def write(path: Path, executable: Any, weights: dict[str, Any], manifest: Manifest) -> Path:
    """Write the program, whole or not at all. RescompileError when it cannot be linked or written."""
    from rescompile.backends.link import link

    try:
        handle, partial = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    except OSError as error:
        raise RescompileError(f"'{path}' cannot be written: {error.strerror}.") from error
    os.close(handle)
    try:
        with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(partial, "w", zipfile.ZIP_STORED) as archive:
            archive.writestr("manifest.json", replace(manifest, weights=list(weights)).to_json())
            library = Path(folder) / f"program{_SUFFIX}"
            link(executable, library)
            archive.write(library, "program.so")
            for name, text in manifest.sources.items():
                archive.writestr(f"sources/{name}", text)
            archive.writestr("weights.safetensors", _serialized(weights))
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(partial, 0o666 & ~mask)
        os.replace(partial, path)
    except OSError as error:
        raise RescompileError(f"'{path}' cannot be written: {error.strerror or error}.") from error
    finally:
        Path(partial).unlink(missing_ok=True)
    return path


def read(path: Path) -> tuple[Any, dict[str, Any], Manifest]:
    """Code (None where it is for a GPU and there is none), weights, manifest. RescompileError for any other file."""
    try:
        with zipfile.ZipFile(path) as archive:
            manifest = _manifest(path, archive.read("manifest.json").decode())
            _check(path, manifest)
            found = _deserialized(archive.read("weights.safetensors"))
            weights = {name: found[name] for name in manifest.weights}
            code = archive.read("program.so")
    except FileNotFoundError:
        raise RescompileError(f"There is no file '{path}'.") from None
    except OSError as error:
        raise RescompileError(f"'{path}' cannot be read: {error.strerror or error}.") from error
    except (zipfile.BadZipFile, KeyError, ValueError, EOFError) as error:
        raise RescompileError(
            f"'{path}' is not a program of rescompile, or not all of one ({error}): compile the model again."
        ) from error
    return _loaded(code, manifest), weights, manifest


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
    require_tvm()
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


def _loaded(code: bytes, manifest: Manifest) -> Any:
    """The code, mapped; None for a GPU program on a machine without CUDA, where it can be read but not run."""
    import tvm

    if manifest.device == "cuda":
        from rescompile.backends.cuda.executable import ready_to_load

        if not ready_to_load(manifest.compiler, manifest.cpu):
            return None
    # The file can go once the library is mapped; where a system forbids that, it stays in its temporary folder.
    folder = tempfile.mkdtemp(prefix="rescompile-")
    library = Path(folder) / f"program{_SUFFIX}"
    library.write_bytes(code)
    try:
        with without_notes():
            return tvm.runtime.load_module(str(library))
    except (RuntimeError, OSError, ValueError) as error:
        raise RescompileError(f"The program's code cannot be loaded: {error}; compile the model again.") from error
    finally:
        if sys.platform != "win32":
            library.unlink()
            os.rmdir(folder)


def _serialized(weights: dict[str, Any]) -> bytes:
    import safetensors.numpy

    return bytes(safetensors.numpy.save({name: np.asarray(data, order="C") for name, data in weights.items()}))


def _deserialized(data: bytes) -> dict[str, Any]:
    import safetensors

    try:
        found = safetensors.deserialize(data)  # type: ignore[no-untyped-call,unused-ignore]
    except safetensors.SafetensorError as error:
        raise ValueError(str(error)) from error
    return {
        name: np.frombuffer(info["data"], dtype=_DTYPES[info["dtype"]]).reshape(info["shape"]) for name, info in found
    }


_DTYPES: dict[str, Any] = {
    "F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16, "I64": np.int64,
    "I32": np.int32, "I16": np.int16, "I8": np.int8, "U8": np.uint8, "BOOL": np.bool_,
    "U16": np.uint16, "U32": np.uint32, "U64": np.uint64,
}  # fmt: skip
