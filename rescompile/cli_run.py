"""`rescompile run`: arrays in, arrays out, whatever runs the model."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from rescompile import api
from rescompile.cli_files import write_whole
from rescompile.errors import RescompileError
from rescompile.printing import print_type

Arrays = dict[str, np.ndarray[Any, Any]]


def run(model: str, backend: str, inputs: list[str], trust: bool, input_file: Path | None) -> Arrays:
    """Outputs by name."""
    given = None if input_file is None else load_arrays(input_file)
    return api.run(model, given, backend=backend, inputs=inputs, trust=trust)


def load_arrays(path: Path) -> Arrays:
    """The arrays of an .npz file, by name. Pickled objects are refused."""
    try:
        with np.load(path, allow_pickle=False) as archive:
            if not hasattr(archive, "files"):
                raise RescompileError(f"Cannot read '{path}': it holds one unnamed array; save it with numpy.savez.")
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


def summaries(arrays: Arrays) -> list[dict[str, Any]]:
    """Name, type and spread of every array."""
    return [
        {"name": name, "type": print_type(array.shape, str(array.dtype)), **_spread(array)}
        for name, array in arrays.items()
    ]


def _spread(array: np.ndarray[Any, Any]) -> dict[str, Any]:
    if array.size == 0:
        return {"min": None, "mean": None, "max": None}
    wide = array.astype(np.float64)
    return {"min": _short(wide.min()), "mean": _short(wide.mean()), "max": _short(wide.max())}


def _short(number: np.float64) -> float:
    return float(f"{float(number):.6g}")
