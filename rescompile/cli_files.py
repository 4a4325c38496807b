"""Files that are written whole or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from rescompile.errors import RescompileError


def check_writable(path: Path) -> None:
    """RescompileError when `path` cannot be written: asked before long work, and without touching what is there."""
    if path.is_dir():
        raise RescompileError(f"Cannot write '{path}': it is a folder; name a file.")
    folder = path.parent
    if not folder.is_dir():
        raise RescompileError(f"Cannot write '{path}': there is no folder '{folder}'; create it first.")
    if path.exists() and not os.access(path, os.W_OK):
        raise RescompileError(f"Cannot write '{path}': the file is write-protected; choose another name.")
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise RescompileError(f"Cannot write '{path}': {reason}; choose another folder.") from error


def write_whole(path: Path, save: Callable[[Path], object]) -> None:
    """Let `save` write into a folder of its own beside `path`, then move everything it wrote into place.

    Files that `save` writes beside the one it is given (an ONNX model's external data) move first, so that a reader
    never sees the model without them.
    """
    try:
        folder = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    except OSError as error:
        raise RescompileError(f"Cannot write '{path}': {(error.strerror or str(error)).lower()}.") from error
    try:
        save(folder / path.name)
        for item in sorted(folder.iterdir(), key=lambda item: item.name == path.name):
            os.replace(item, path.parent / item.name)
    except OSError as error:
        raise RescompileError(f"Cannot write '{path}': {(error.strerror or str(error)).lower()}.") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file whole."""
    write_whole(path, lambda part: part.write_text(text, encoding="utf-8"))
