"""TVM is an optional dependency, of one exact version: say so in one sentence when it is not there."""

from __future__ import annotations

from importlib import metadata

from rescompile.errors import RescompileError

PINS = {"apache-tvm": "0.27.0.post1", "apache-tvm-ffi": "0.1.14.post1"}


def require_tvm() -> None:
    """RescompileError when TVM is missing or not the version that the lowering is written for."""
    for package, wanted in PINS.items():
        try:
            found = metadata.version(package)
        except metadata.PackageNotFoundError:
            raise RescompileError(
                f"Compiling and running compiled models needs {package} {wanted}, which is not installed: "
                f"pip install 'rescompile[tvm]'."
            ) from None
        if found != wanted:
            raise RescompileError(
                f"{package} {found} is installed where {wanted} is needed: pip install 'rescompile[tvm]'."
            )
