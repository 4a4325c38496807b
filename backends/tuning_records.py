"""The tuning database: a folder in which every run keeps its own records, so that runs never wait for each other.

    FOLDER/runs/20261204T101530-4711-1a2b3c/provenance.json             target, versions, date, where it was timed
                                            database_workload.json       as MetaSchedule writes them:
                                            database_tuning_record.json  one line for each workload, for each record
                                            choices.json                 one line for each contest with another kernel

Files only grow, line by line; a run that was killed loses its unfinished line. What a reader takes are the records of
all runs for the same target and the same version of TVM.
"""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tvm import s_tir
from tvm.s_tir import meta_schedule as ms

from rescompile.backends import artifact
from rescompile.backends.kernels.emit import TVM_ERRORS
from rescompile.backends.require import PINS
from rescompile.backends.targets import CompileTarget
from rescompile.errors import RescompileError

SCHEMA = 1
_WORKLOADS, _RECORDS, _CHOICES = "database_workload.json", "database_tuning_record.json", "choices.json"


def default_folder() -> Path:
    """Where records are kept when no database is named."""
    return Path.home() / ".cache" / "rescompile" / "tuning"


@dataclass(frozen=True)
class Provenance:
    """Where the records of a run come from."""

    target: str
    tvm: str
    tvm_ffi: str
    rescompile: str
    date: str  # UTC, ISO 8601
    runner: str
    schema: int = SCHEMA

    @staticmethod
    def now(target: CompileTarget, runner: str) -> Provenance:
        """Of a run that starts now."""
        date = datetime.now(UTC).isoformat(timespec="seconds")
        versions = artifact.tvm_version(), PINS["apache-tvm-ffi"], artifact.version()
        return Provenance(_identity(target), *versions, date, runner)

    def fits(self, other: Provenance) -> bool:
        """Whether records of the other can be used: schedules depend on the target and on TVM's transformations."""
        return (self.schema, self.target, self.tvm) == (other.schema, other.target, other.tvm)


def _identity(target: CompileTarget) -> str:
    """What distinguishes the machines that a schedule was timed on, as JSON."""
    described = {
        str(key): str(value) for key, value in dict(target.tvm.export()).items() if key not in ("host", "tag", "keys")
    }
    return json.dumps(described, sort_keys=True)


class Database:
    """The records in a folder that fit a target, and the file that this run adds to."""

    def __init__(self, folder: Path, target: CompileTarget, runner: str) -> None:
        self.folder = folder
        self.notes: list[str] = []
        self.provenance = Provenance.now(target, runner)
        self.memory = ms.database.MemoryDatabase()
        self._choices: dict[str, dict[str, Any]] = {}
        self._run: Path | None = None
        self._written: dict[str, int] = {}  # index of each workload in this run's file, by hash
        self._others: dict[str, int] = {}

    @staticmethod
    def open(folder: str | Path | None, target: CompileTarget, *, create: bool, runner: str = "local") -> Database:
        """Read a folder.

        Raises:
            RescompileError: there is none and `create` is not set, it is something else, or a file in it is damaged.
        """
        path = default_folder() if folder is None else Path(folder)
        if path.exists() and not path.is_dir():
            raise RescompileError(f"'{path}' is a file: a tuning database is a folder.")
        if not path.exists() and not create:
            raise RescompileError(f"There is no tuning database '{path}': tune into it first, or name another.")
        if path.is_dir() and any(path.iterdir()) and not ((path / "runs").is_dir() or any(path.glob("tiles-*.json"))):
            raise RescompileError(f"'{path}' holds other files and no tuning records: name a new folder.")
        database = Database(path, target, runner)
        if create:
            _writable(path)
        for run in sorted((path / "runs").glob("*/provenance.json")):
            database._read(run.parent)
        for reason, count in sorted(database._others.items()):
            database.notes.append(f"{count} tuning runs in '{path}' are for {reason} and were left out.")
        return database

    # ---- reading -----------------------------------------------------------------------------------------------

    def __len__(self) -> int:
        return len(self.memory)

    def best(self, module: Any, count: int = 1) -> list[Any]:
        """The fastest records of a workload, fastest first."""
        if not self.memory.has_workload(module):
            return []
        return list(self.memory.get_top_k(self.memory.commit_workload(module), count))

    def choice(self, key: str) -> dict[str, Any] | None:
        """The remembered outcome of a contest."""
        return self._choices.get(key)

    def _read(self, run: Path) -> None:
        try:
            found = Provenance(**json.loads((run / "provenance.json").read_text(encoding="utf-8")))
        except OSError as error:
            raise RescompileError(f"'{run}' cannot be read: {error.strerror or error}.") from error
        except (ValueError, TypeError) as error:
            raise _damaged(run / "provenance.json", error) from error
        if not self.provenance.fits(found):
            other = f"TVM {found.tvm}" if found.target == self.provenance.target else f"the target {found.target}"
            self._others[other] = self._others.get(other, 0) + 1
            return
        workloads = []
        for line in self._lines(run / _WORKLOADS):
            try:
                workloads.append(self.memory.commit_workload(ms.database.Workload.from_json(line).mod))
            except (*TVM_ERRORS, KeyError, AttributeError) as error:
                raise _damaged(run / _WORKLOADS, error) from error
        for line in self._lines(run / _RECORDS):
            try:
                index, record = line
                self.memory.commit_tuning_record(ms.database.TuningRecord.from_json(record, workloads[index]))
            except (*TVM_ERRORS, KeyError, AttributeError) as error:
                raise _damaged(run / _RECORDS, error) from error
        for line in self._lines(run / _CHOICES):
            try:
                self._choices[line["key"]] = line
            except (TypeError, KeyError) as error:
                raise _damaged(run / _CHOICES, error) from error

    def _lines(self, path: Path) -> Iterator[Any]:
        try:
            text = path.read_text(encoding="utf-8")
        except FileNotFoundError:
            return
        except (OSError, UnicodeDecodeError) as error:
            raise _damaged(path, error) from error
        *complete, rest = text.split("\n")
        if rest:
            self.notes.append(f"The last line of '{path}' is unfinished and was left out.")
        for line in complete:
            try:
                yield json.loads(line)
            except ValueError as error:
                raise _damaged(path, error) from error

    # ---- writing -----------------------------------------------------------------------------------------------

    def add(self, module: Any, trace: Any, seconds: tuple[float, ...], target: Any, infos: Any) -> None:
        """Keep a candidate of a workload with its seconds."""
        workload = self.memory.commit_workload(module)
        record = ms.database.TuningRecord(trace, workload, list(seconds), target, infos)
        self.memory.commit_tuning_record(record)
        digest = hash_of(module)
        if digest not in self._written:
            self._append(_WORKLOADS, workload.as_json())
            self._written[digest] = len(self._written)
        self._append(_RECORDS, [self._written[digest], record.as_json()])

    def remember(self, key: str, outcome: dict[str, Any]) -> None:
        """Keep the outcome of a contest; a folder that cannot be written to costs a note only."""
        entry = {"key": key, **outcome}
        self._choices[key] = entry
        try:
            self._append(_CHOICES, entry)
        except RescompileError as error:
            if str(error) not in self.notes:
                self.notes.append(str(error))

    def _append(self, name: str, data: Any) -> None:
        try:
            if self._run is None:
                stamp = datetime.now(UTC).strftime("%Y%m%dT%H%M%S")
                run = self.folder / "runs" / f"{stamp}-{os.getpid()}-{secrets.token_hex(3)}"
                run.mkdir(parents=True)
                text = json.dumps(asdict(self.provenance), indent=1)
                # Readers look for this file, so it appears whole.
                partial = run / "provenance.json.partial"
                partial.write_text(text, encoding="utf-8")
                partial.rename(run / "provenance.json")
                self._run = run
            with (self._run / name).open("a", encoding="utf-8") as file:
                file.write(json.dumps(data) + "\n")
        except OSError as error:
            raise RescompileError(
                f"The tuning database '{self.folder}' cannot be written to: {error.strerror or error}."
            ) from error


def hash_of(module: Any) -> str:
    """A hash of a module's structure, the same in every process."""
    return str(ms.utils.shash2hex(module))


def replay(record: Any) -> Any:
    """The scheduled function of a record. One of TVM's errors when the record no longer fits TVM."""
    schedule = s_tir.Schedule(record.workload.mod)
    record.trace.apply_to_schedule(schedule, remove_postproc=False)
    return schedule.mod["main"]


def _writable(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RescompileError(f"The tuning database '{path}' cannot be made: {error.strerror or error}.") from error
    if not os.access(path, os.W_OK | os.X_OK):
        raise RescompileError(f"The tuning database '{path}' cannot be written to: name another folder.")


def _damaged(path: Path, error: Exception) -> RescompileError:
    lines = str(error).strip().splitlines()
    return RescompileError(
        f"The tuning record '{path}' is damaged ({lines[-1][:120] if lines else type(error).__name__}): delete the "
        f"folder '{path.parent.name}'."
    )
