"""Link a program into a shared library: with the system's compiler, or with the one that pip can install."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rescompile.backends.quiet import without_notes
from rescompile.errors import RescompileError

_COMPILERS = ("cc", "g++", "gcc", "clang")


def compiler() -> list[str]:
    """The command that links, RescompileError when there is none."""
    for name in _COMPILERS:
        if shutil.which(name) is not None:
            return [name]
    if importlib.util.find_spec("ziglang") is not None:
        return [sys.executable, "-m", "ziglang", "cc"]
    raise RescompileError(
        "Saving a program needs a linker, and neither cc, g++, clang nor the package ziglang is here: "
        "pip install 'rescompile[tvm]'."
    )


def link(executable: Any, library: Path) -> None:
    """Write the executable's code as a shared library."""
    command = compiler()

    def run(output: str, objects: Sequence[str], *_: Any, **__: Any) -> None:
        done = subprocess.run(
            [*command, "-shared", "-fPIC", "-o", output, *objects, "-lm"], capture_output=True, text=True, check=False
        )
        if done.returncode:
            said = (done.stderr.strip() or done.stdout.strip()).splitlines()
            raise RescompileError(f"{' '.join(command)} cannot link the program: {said[-1] if said else 'no message'}.")

    run.output_format = "so"  # type: ignore[attr-defined]
    with without_notes():
        executable.export_library(str(library), fcompile=run)
