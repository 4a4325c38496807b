"""What was fastest on a GPU, on disk: the user's own records, and those that come with the package.

A record is a spec's text with the label of the fastest candidate, its seconds, and those of all that were timed:

    {"schema": 1, "device": {"device": "NVIDIA H200", "arch": "sm_90", "driver": ..., ...}, "date": "2026-12-04",
     "versions": {"rescompile": ..., "tvm": ...}, "kernels": DIGEST,
     "records": {SPEC: {"candidate": LABEL, "seconds": S, "tried": {LABEL: S, ...}}}}

The user's own are valid for the same device, driver, versions and kernel generators only. Those of the package
(backends/records) are used where the device and the spec match: measured elsewhere, they are better than a guess.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import tvm

from rescompile.backends import artifact
from rescompile.backends.kernels.records import Choices, default_cache_dir, sources
from rescompile.errors import RescompileError

SCHEMA = 1
SHIPPED = Path(__file__).resolve().parents[1] / "records"
_FIELDS = {"schema": int, "device": dict, "date": str, "versions": dict, "kernels": str, "records": dict}


@dataclass(frozen=True)
class Record:
    """The fastest candidate of a spec by its label, and the seconds of all that were timed, itself among them."""

    candidate: str
    seconds: float
    tried: Mapping[str, float]

    @staticmethod
    def of(entry: Mapping[str, Any]) -> Record:
        """A record from its plain form. KeyError, TypeError or ValueError for anything else."""
        tried = {str(label): float(seconds) for label, seconds in dict(entry["tried"]).items()}
        record = Record(str(entry["candidate"]), float(entry["seconds"]), tried)
        if record.candidate not in tried or not all(seconds > 0 for seconds in tried.values()):
            raise ValueError(f"the candidate '{record.candidate}' has no time")
        return record

    def plain(self) -> dict[str, Any]:
        """As JSON has it."""
        return {"candidate": self.candidate, "seconds": self.seconds, "tried": dict(self.tried)}


def generators() -> str:
    """Digest of everything that makes GPU kernels: with another one, old timings say nothing."""
    return sources(Path(__file__).parent)


class OwnRecords(Choices):
    """The records of this machine's GPU in the user's cache."""

    @staticmethod
    def load(folder: str | Path | None, facts: Mapping[str, str]) -> OwnRecords:
        """Those in a folder, by default ~/.cache/rescompile."""
        identity = f"{sorted(facts.items())} tvm {tvm.__version__} kernels {generators()}"
        name = f"gpu-{hashlib.sha256(identity.encode()).hexdigest()[:16]}.json"
        records = OwnRecords(Path(folder or default_cache_dir()) / name, dict(facts))
        records.read()
        return records

    def check(self, entry: dict[str, Any]) -> None:
        """One of the errors of a damaged record."""
        Record.of(entry)

    def get(self, spec: object) -> Record | None:
        """The record of a spec."""
        entry = self.entries.get(repr(spec))
        return None if entry is None else Record.of(entry)

    def put(self, spec: object, record: Record) -> None:
        """Records a choice; `save` writes it."""
        self.fresh[repr(spec)] = record.plain()


@dataclass(frozen=True)
class ShippedRecords:
    """One file of records that were measured elsewhere, with where and when."""

    name: str
    device: Mapping[str, str]
    date: str
    versions: Mapping[str, str]
    kernels: str
    records: Mapping[str, Record]

    @property
    def origin(self) -> str:
        """In words, for a report."""
        stale = "" if self.kernels == generators() else ", of other kernels than today's"
        return f"measured on {self.device['device']}, {self.date}{stale}"

    def fits(self, arch: str, device: str | None) -> bool:
        """Whether they are for this device, or, where none is at hand, for its architecture."""
        return self.device["arch"] == arch and device in (None, self.device["device"])


def read_shipped(folder: Path = SHIPPED) -> list[ShippedRecords]:
    """All files of a folder, by name. RescompileError for one that is damaged."""
    return [_read(path) for path in sorted(folder.glob("*.json"))]


def write_shipped(
    path: Path, facts: Mapping[str, str], records: Mapping[str, Record], kernels: str, versions: Mapping[str, str]
) -> None:
    """Write a file for `backends/records`, whole or not at all."""
    data = {
        "schema": SCHEMA,
        "device": dict(facts),
        "date": datetime.now(UTC).date().isoformat(),
        "versions": dict(versions),
        "kernels": kernels,
        "records": {spec: record.plain() for spec, record in sorted(records.items())},
    }
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    partial.replace(path)


def versions() -> dict[str, str]:
    """What made the kernels."""
    return {"rescompile": artifact.version(), "tvm": artifact.tvm_version()}


def lookup(shipped: Sequence[ShippedRecords], spec: object, arch: str, device: str | None) -> tuple[Record, str] | None:
    """A spec's record and where it comes from."""
    for file in shipped:
        record = file.records.get(repr(spec))
        if record is not None and file.fits(arch, device):
            return record, file.origin
    return None


def _read(path: Path) -> ShippedRecords:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        for field, kind in _FIELDS.items():
            if not isinstance(data[field], kind):
                raise TypeError(f"{field} is no {kind.__name__}")
        if data["schema"] != SCHEMA:
            raise ValueError(f"schema {data['schema']}")
        device = {name: str(data["device"][name]) for name in ("device", "arch", "driver")}
        records = {spec: Record.of(entry) for spec, entry in data["records"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise RescompileError(f"The GPU records in '{path}' are damaged ({error}): delete the file.") from error
    return ShippedRecords(path.stem, device, data["date"], data["versions"], data["kernels"], records)
