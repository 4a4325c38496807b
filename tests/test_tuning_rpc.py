"""Candidates are timed by TVM's own RPC server, found through its tracker, over loopback."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rescompile.backends import tuning_bench
from rescompile.backends.kernels import Argument
from rescompile.backends.tuning import apply_database, tune
from rescompile.backends.tuning_bench import Remote, parse_runner
from rescompile.backends.tuning_contest import measure
from rescompile.backends.tuning_rivals import rival
from rescompile.errors import RescompileError
from tests.test_tuning import SPEC, TARGET, TILE, _module, _scaled

KEY = "board"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def tracker() -> Iterator[Remote]:
    """A tracker with one server under the key."""
    port, serving = _free_port(), _free_port()
    python = [sys.executable, "-m"]
    # Both do their work in a child process, which only the end of the whole group ends.
    quiet: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "start_new_session": True}

    def at(number: int) -> list[str]:
        return ["--host", "127.0.0.1", "--port", str(number), "--port-end", str(number + 1)]

    processes = [subprocess.Popen([*python, "tvm.exec.rpc_tracker", *at(port)], **quiet)]
    remote = Remote("127.0.0.1", port, KEY)
    try:
        server = ["tvm.exec.rpc_server", *at(serving), "--tracker", f"127.0.0.1:{port}", "--key", KEY]
        processes.append(subprocess.Popen([*python, *server], **quiet))
        _wait_for(remote)
        yield remote
    finally:
        for process in reversed(processes):
            os.killpg(process.pid, signal.SIGKILL)
            process.wait(timeout=20)


def _wait_for(remote: Remote) -> None:
    deadline = time.monotonic() + 120
    while True:
        try:
            tuning_bench._servers(remote)
        except RescompileError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.2)
        else:
            return


def test_tuning_over_rpc_writes_records_that_replay(tracker: Remote, tmp_path: Path) -> None:
    module = _module(conv=rival(SPEC, TILE))
    report = tune(module, TARGET, trials=2, database=tmp_path / "db", runner=str(tracker), seed=1)
    assert report.spent == 2
    assert report.failed == 0, str(report)
    _, used = apply_database(module, TARGET, tmp_path / "db")
    assert used.applied["conv"] > 0
    assert str(tracker) in next(tmp_path.glob("db/runs/*/provenance.json")).read_text()


def test_a_function_is_measured_where_the_runner_says(tracker: Remote) -> None:
    buffers = [Argument("a", (64, 64), "float32"), Argument("y", (64, 64), "float32", output=True)]
    assert (measure(_scaled(64), TARGET, buffers, str(tracker)) or 0) > 0


def test_a_key_that_no_machine_has_is_one_sentence(tracker: Remote, tmp_path: Path) -> None:
    runner = f"rpc://{tracker.host}:{tracker.port}/nobody"
    with pytest.raises(RescompileError, match="knows no machine under the key 'nobody'"):
        tune(_module(a=_scaled(64)), TARGET, trials=1, database=tmp_path / "db", runner=runner)
    assert not (tmp_path / "db").exists()


def test_a_tracker_that_does_not_answer_is_one_sentence(tmp_path: Path) -> None:
    runner = f"rpc://127.0.0.1:{_free_port()}/{KEY}"
    with pytest.raises(RescompileError, match=r"No RPC tracker answers at 127\.0\.0\.1"):
        tune(_module(a=_scaled(64)), TARGET, trials=1, database=tmp_path / "db", runner=runner)
    assert parse_runner(runner) != parse_runner("local")


def test_something_else_that_listens_is_no_tracker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning_bench, "CONNECT_SECONDS", 0.5)
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        runner = Remote("127.0.0.1", int(listening.getsockname()[1]), KEY)
        with pytest.raises(RescompileError, match="is no RPC tracker"):
            tune(_module(a=_scaled(64)), TARGET, trials=1, database=tmp_path / "db", runner=runner)
