"""Chosen tiles on disk: one JSON file per machine and version of the kernels, so that a second compile is instant."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tvm

from rescompile.backends.kernels.machine import Machine
from rescompile.backends.kernels.tiles import Tile
from rescompile.errors import RescompileError

SCHEMA = 1


def default_cache_dir() -> Path:
    """The user's cache: ~/.cache/rescompile."""
    return Path.home() / ".cache" / "rescompile"


def sources(folder: Path) -> str:
    """Digest of the kernel generators: a changed generator makes its timings worthless."""
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


@dataclass
class Choices:
    """What was chosen on a machine, by the text of its spec, in a file that several processes may write."""

    path: Path
    machine: object
    entries: dict[str, dict[str, Any]] = field(default_factory=dict)
    fresh: dict[str, dict[str, Any]] = field(default_factory=dict)

    def read(self) -> None:
        """Take the file's records; an unreadable file counts as empty, with a warning."""
        self.entries = self._read()

    def check(self, entry: dict[str, Any]) -> None:
        """One of the errors of a damaged record, when the entry is none of this kind."""
        float(entry["seconds"])

    def _read(self) -> dict[str, dict[str, Any]]:
        try:
            data = json.loads(self.path.read_text(encoding="utf-8"))
            if data["schema"] != SCHEMA:
                raise ValueError(f"schema {data['schema']}")
            entries: dict[str, dict[str, Any]] = data["records"]
            for entry in entries.values():
                self.check(entry)
        except (FileNotFoundError, NotADirectoryError):
            return {}
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RescompileError) as error:
            warnings.warn(f"Ignoring the damaged kernel records in {self.path}: {error}", stacklevel=5)
            return {}
        return entries

    def save(self) -> None:
        """Adds the new records to the file. It is replaced whole, so readers never see half of it."""
        if not self.fresh:
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            # Another process may have written since; its records are kept.
            merged = {**self._read(), **self.fresh}
            text = json.dumps({"schema": SCHEMA, "machine": repr(self.machine), "records": merged}, indent=1)
            handle, temporary = tempfile.mkstemp(dir=self.path.parent, prefix=self.path.stem, suffix=".tmp")
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(text)
            os.replace(temporary, self.path)
        except OSError as error:
            warnings.warn(f"Kernel choices cannot be kept in {self.path.parent}: {error}", stacklevel=3)


class Records(Choices):
    """Tiles and their seconds by the text of their spec."""

    @staticmethod
    def load(cache_dir: str | Path | None, machine: Machine) -> Records:
        """The records for this machine."""
        identity = f"{machine} tvm {tvm.__version__} kernels {sources(Path(__file__).parent)}"
        name = f"tiles-{hashlib.sha256(identity.encode()).hexdigest()[:16]}.json"
        records = Records(Path(cache_dir or default_cache_dir()) / name, machine)
        records.read()
        return records

    def check(self, entry: dict[str, Any]) -> None:
        """One of the errors of a damaged record, when the entry holds no tile."""
        Tile.from_json(entry["tile"])
        super().check(entry)

    def get(self, spec: object) -> tuple[Tile, float] | None:
        """The recorded tile of a spec and its seconds."""
        entry = self.entries.get(repr(spec))
        return None if entry is None else (Tile.from_json(entry["tile"]), float(entry["seconds"]))

    def put(self, spec: object, tile: Tile, seconds: float) -> None:
        """Records a choice; `save` writes it."""
        self.fresh[repr(spec)] = {"tile": tile.to_json(), "seconds": seconds}
