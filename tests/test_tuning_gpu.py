"""Tuning for a GPU: candidates are built into machine code here, and timed where one is, over RPC.

The machine behind the tracker has the simulated GPU: what it runs is the candidates' generated source on a processor,
with the numbers of every launch, and its clock is an ordinary one.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("tvm")

import tvm
from tvm import te

from rescompile.backends import targets
from rescompile.backends.cuda.cubin import Cubin
from rescompile.backends.tuning import apply_database, search_all, tune
from rescompile.backends.tuning_bench import Bench, Local, Remote
from rescompile.backends.tuning_records import Database
from rescompile.backends.tuning_search import gather
from rescompile.errors import RescompileError
from tests import simulated_gpu
from tests.test_tuning_rpc import _free_port, _wait_for

TARGET = targets.resolve("cuda:sm_90")
KEY = "gpu"


def _module() -> tvm.IRModule:
    """y = relu(a + b): what no kernel of ours serves is such a loop nest."""
    a, b = (te.placeholder((64, 32), name=name) for name in "ab")
    y = te.compute((64, 32), lambda i, j: te.max(a[i, j] + b[i, j], 0.0), name="y")
    return tvm.IRModule({"add_relu": te.create_prim_func([a, b, y]).with_attr("global_symbol", "add_relu")})


def simulated(source: str, _: str) -> Cubin:
    return Cubin(simulated_gpu.simulated_cubin(source), (), "g++")


@pytest.fixture(scope="module")
def gpu_machine() -> Iterator[Remote]:
    """A tracker with one machine, whose CUDA driver is the simulated one."""
    if simulated_gpu.COMPILER is None:
        pytest.skip("no g++ here")
    port, serving = _free_port(), _free_port()
    python = [sys.executable, "-m"]
    quiet: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "start_new_session": True}

    def at(number: int) -> list[str]:
        return ["--host", "127.0.0.1", "--port", str(number), "--port-end", str(number + 1)]

    processes = [subprocess.Popen([*python, "tvm.exec.rpc_tracker", *at(port)], **quiet)]
    remote = Remote("127.0.0.1", port, KEY)
    try:
        server = ["tvm.exec.rpc_server", *at(serving), "--tracker", f"127.0.0.1:{port}", "--key", KEY]
        driver = {**os.environ, "LD_PRELOAD": ":".join(simulated_gpu.driver())}
        processes.append(subprocess.Popen([*python, *server], env=driver, **quiet))
        _wait_for(remote)
        yield remote
    finally:
        for process in reversed(processes):
            os.killpg(process.pid, signal.SIGKILL)
            process.wait(timeout=20)


def test_candidates_for_a_gpu_elsewhere_are_built_here_and_timed_there(gpu_machine: Remote, tmp_path: Path) -> None:
    module = _module()
    workloads, skipped = gather(module)
    assert [workload.functions for workload in workloads] == [["add_relu"]]
    records = Database.open(tmp_path / "db", TARGET, create=True, runner=str(gpu_machine))
    bench = Bench(TARGET, gpu_machine, simulated)
    report = search_all(workloads, TARGET, bench, records, 1, seed=1, skipped=skipped)
    assert report.spent == 1
    assert report.failed == 0, str(report)
    tuned, used = apply_database(module, TARGET, tmp_path / "db")
    assert list(used.applied) == ["add_relu"]
    assert "threadIdx.x" in tuned["add_relu"].script()
    assert "sm_90" in next(tmp_path.glob("db/runs/*/provenance.json")).read_text()


def test_without_a_gpu_tuning_for_one_needs_a_machine(tmp_path: Path) -> None:
    if tvm.cuda(0).exist:
        pytest.skip("there is a GPU here")
    with pytest.raises(RescompileError, match=r"'cuda:sm_90' cannot be timed on this machine.*rpc://host:port/key"):
        tune(_module(), "cuda:sm_90", trials=1, database=tmp_path / "db", runner=Local())
