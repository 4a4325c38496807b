"""Files of named arrays: .npz, without pickles."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from rescompile.cli_files import write_whole
from rescompile.errors import RescompileError

Arrays: TypeAlias = dict[str, np.ndarray[Any, Any]]


def load_arrays(path: Path) -> Arrays:
    """The arrays of an .npz file, by name. Pickled objects are refused."""
    try:
        archive = np.load(path, allow_pickle=False)
        if isinstance(archive, np.ndarray):
            raise RescompileError(f"Cannot read '{path}': it holds one unnamed array; save it with numpy.savez.")
        with archive:
            return {name: archive[name] for name in archive.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        reason = getattr(error, "strerror", None) or "it is not an .npz file of plain arrays"
        raise RescompileError(f"Cannot read '{path}': {reason}.") from error


def save_arrays(path: Path, arrays: Arrays) -> None:
    """Write an .npz file whole."""

    def save(part: Path) -> None:
        with part.open("wb") as file:
            np.savez(file, **arrays)  # type: ignore[arg-type]

    write_whole(path, save)
