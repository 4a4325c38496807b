"""Where candidates are timed: a process beside this one, or machines behind TVM's RPC tracker."""

from __future__ import annotations

import importlib.util
import shutil
import socket
import struct
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from urllib.parse import urlsplit

import tvm
from tvm.rpc.base import RPC_TRACKER_MAGIC
from tvm.s_tir import meta_schedule as ms
from tvm.support.popen_pool import PopenPoolExecutor, StatusKind

from rescompile.backends import threads, tuning_worker
from rescompile.backends.kernels.emit import TVM_ERRORS
from rescompile.backends.targets import CompileTarget
from rescompile.errors import RescompileError

BUILD_SECONDS = 60.0
RUN_SECONDS = 30.0
SESSION_SECONDS = 60
CONNECT_SECONDS = 5.0
_LOCAL_NEEDS = ("xgboost", "cloudpickle", "psutil")
_REMOTE_NEEDS = (*_LOCAL_NEEDS, "tornado")


@dataclass(frozen=True)
class Local:
    """This machine, in a process of its own."""

    def __str__(self) -> str:
        return "local"


@dataclass(frozen=True)
class Remote:
    """The machines that wait under a key at TVM's RPC tracker."""

    host: str
    port: int
    key: str

    def __str__(self) -> str:
        return f"rpc://{self.host}:{self.port}/{self.key}"


Runner = Local | Remote


def parse_runner(text: str | Runner | None) -> Runner:
    """`local`, or `rpc://host:port/key`. RescompileError when it is neither."""
    if text is None or text == "local":
        return Local()
    if not isinstance(text, str):
        return text
    wrong = f"'{text}' names no place to tune on: write local, or rpc://host:port/key as in rpc://127.0.0.1:9190/board."
    parts = urlsplit(text)
    if parts.scheme != "rpc":
        raise RescompileError(wrong)
    try:
        host, port = parts.hostname, parts.port
    except ValueError:
        raise RescompileError(f"{wrong} (The port is a number from 1 to 65535.)") from None
    key = parts.path.strip("/")
    missing = [name for name, given in (("host", host), ("port", port), ("key", key)) if not given]
    if missing or host is None or port is None or "/" in key or parts.query or parts.fragment or parts.username:
        raise RescompileError(f"{wrong}{f' (The {missing[0]} is missing.)' if missing else ''}")
    return Remote(host, port, key)


def require_packages(runner: Runner) -> None:
    """RescompileError when a package that tuning needs is not installed."""
    needed = _REMOTE_NEEDS if isinstance(runner, Remote) else _LOCAL_NEEDS
    absent = [name for name in needed if importlib.util.find_spec(name) is None]
    if absent:
        raise RescompileError(
            f"Tuning needs {', '.join(absent)}, which is not installed: pip install 'rescompile[tvm]'."
        )


def runs_here(target: CompileTarget) -> bool:
    """Whether this machine can run what is compiled for the target."""
    return bool(tvm.cuda(0).exist) if target.cuda else target.host


@dataclass(frozen=True)
class Timing:
    """Seconds of each repeat, None and the reason where the candidate did not build or run."""

    seconds: tuple[float, ...] | None
    reason: str = ""

    @property
    def best(self) -> float:
        """Seconds of the fastest repeat, infinity where there is none."""
        return min(self.seconds) if self.seconds else float("inf")

    def as_result(self) -> Any:
        """The same as MetaSchedule passes it around."""
        return ms.runner.RunnerResult(list(self.seconds) if self.seconds else None, self.reason or None)


class Bench:
    """Builds and times modules in other processes, so that a crash or a hang costs one candidate and nothing else."""

    def __init__(self, target: CompileTarget, runner: Runner, assemble: Any = None) -> None:
        """RescompileError when nothing can be timed there.

        `assemble`: makes machine code of CUDA source for an architecture; by default `cubin.to_cubin`.
        """
        require_packages(runner)
        self.target = target
        self.runner = runner
        self.assemble = assemble
        self._builders: Any = None
        self._timer: Any = None
        if isinstance(runner, Remote):
            self._servers = _servers(runner)
        elif not runs_here(target):
            raise RescompileError(
                f"Candidates for '{target.name}' cannot be timed on this machine: give a machine that can, as "
                f"runner='rpc://host:port/key'."
            )

    def __enter__(self) -> Self:
        import cloudpickle

        cloudpickle.register_pickle_by_value(tuning_worker)  # type: ignore[no-untyped-call]
        self._builders = PopenPoolExecutor(threads.available(), timeout=BUILD_SECONDS, maximum_process_uses=64)
        self._timer = self._make_timer()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        import cloudpickle

        self._builders.shutdown()
        self._timer.pool.shutdown()
        cloudpickle.unregister_pickle_by_value(tuning_worker)  # type: ignore[no-untyped-call]

    def _make_timer(self) -> Any:
        evaluator = ms.runner.EvaluatorConfig(number=3, repeat=1, min_repeat_ms=20, enable_cpu_cache_flush=False)
        if isinstance(self.runner, Remote):
            return ms.runner.RPCRunner(
                rpc_config=_config(self.runner), evaluator_config=evaluator, max_workers=self._servers
            )
        return ms.runner.LocalRunner(
            timeout_sec=RUN_SECONDS,
            evaluator_config=evaluator,
            initializer=None if self.target.cuda else partial(tuning_worker.use_threads, self.target.threads),
        )

    def times(self, modules: Sequence[Any], infos: Sequence[Any]) -> list[Timing]:
        """One timing for each module, whose function `main` takes arguments as `infos` describe them."""
        build = self._build()
        built = list(
            self._builders.map_with_error_catching(
                lambda module, target=self.target.tvm, build=build: build(module, target), modules
            )
        )
        kind = "cuda" if self.target.cuda else "cpu"
        paths = [str(one.value) if one.status == StatusKind.COMPLETE else None for one in built]
        inputs = [
            ms.runner.RunnerInput(path, kind, info) for path, info in zip(paths, infos, strict=True) if path is not None
        ]
        try:
            ran = iter([self._result(future) for future in self._timer.run(inputs)] if inputs else [])
        finally:
            for path in paths:
                if path is not None:
                    shutil.rmtree(Path(path).parent, ignore_errors=True)
        return [
            next(ran) if path is not None else Timing(None, f"did not build: {_why(one)}")
            for path, one in zip(paths, built, strict=True)
        ]

    def _build(self) -> Any:
        if not self.target.cuda:
            return tuning_worker.build
        folders = [folder for folder in sys.path if folder]
        return partial(tuning_worker.build_cuda, arch=str(self.target.arch), folders=folders, assemble=self.assemble)

    def _result(self, future: Any) -> Timing:
        try:
            result = future.result()
        except (*TVM_ERRORS, OSError) as error:
            return Timing(None, f"did not run: {_last_line(str(error))}")
        if result.error_msg is not None or not result.run_secs:
            return Timing(None, f"did not run: {_last_line(str(result.error_msg))}")
        return Timing(tuple(float(seconds) for seconds in result.run_secs))


def _config(remote: Remote) -> Any:
    return ms.runner.RPCConfig(
        tracker_host=remote.host,
        tracker_port=remote.port,
        tracker_key=remote.key,
        session_priority=1,
        session_timeout_sec=SESSION_SECONDS,
    )


def _servers(remote: Remote) -> int:
    """How many machines wait at the tracker. RescompileError when it does not answer or has none under the key."""
    _greet(remote)
    try:
        found = int(_config(remote).count_num_servers(allow_missing=True))
    except (*TVM_ERRORS, OSError) as error:
        raise RescompileError(
            f"The RPC tracker at {remote.host}:{remote.port} does not say what it knows: {_last_line(str(error))}."
        ) from error
    if not found:
        raise RescompileError(
            f"The RPC tracker at {remote.host}:{remote.port} knows no machine under the key '{remote.key}': start one "
            f"with python -m tvm.exec.rpc_server --tracker {remote.host}:{remote.port} --key {remote.key}."
        )
    return found


def _greet(remote: Remote) -> None:
    """Exchange the tracker's greeting. TVM's own client tries for a minute, and waits for an answer without end."""
    try:
        with socket.create_connection((remote.host, remote.port), timeout=CONNECT_SECONDS) as connection:
            connection.sendall(struct.pack("<i", RPC_TRACKER_MAGIC))
            answer = connection.recv(4)
    except TimeoutError:
        answer = b""
    except OSError as error:
        raise RescompileError(
            f"No RPC tracker answers at {remote.host}:{remote.port} ({error.strerror or error}): start one with "
            f"python -m tvm.exec.rpc_tracker --port {remote.port} --port-end {remote.port + 1}."
        ) from error
    if answer != struct.pack("<i", RPC_TRACKER_MAGIC):
        raise RescompileError(
            f"What listens at {remote.host}:{remote.port} is no RPC tracker: give the tracker's own port, or start one "
            f"with python -m tvm.exec.rpc_tracker."
        )


def _why(result: Any) -> str:
    if result.status == StatusKind.TIMEOUT:
        return f"took more than {BUILD_SECONDS:.0f} s"
    return _last_line(str(result.value))


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:300] if lines else "no message"
