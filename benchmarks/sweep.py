"""Detection over the architectures of whole libraries: `python -m benchmarks.sweep [--source timm] [--only NAME]`.

Every model is built with random weights, captured by torch.export, and exported to ONNX from the same program. What
detection finds in both is compared with each other, and with `benchmarks.sweep_expected` where the definition of an
architecture tells the counts. Models run in a process of their own, with a limit of time and of memory: what a library
or an exporter cannot do is a line of the table, and what rescompile cannot do is marked as such.

Results are appended to a file as they come, so that a broken run goes on where it stopped (`--fresh` begins again);
`benchmarks/results/sweep.json` and `sweep.md` are written at the end.
"""

from __future__ import annotations

import argparse
import contextlib
import fnmatch
import importlib
import io
import json
import logging
import os
import resource
import select
import subprocess
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

from benchmarks.sweep_table import write_tables

WORK = Path(os.environ.get("TMPDIR", "/tmp")) / "rescompile-sweep"

IRS = ("fx", "onnx")

# Numbers in the weights of the largest model that the ONNX exporter optimises.
_LARGEST_FOLDED = 100_000_000


class Source(Protocol):
    """A library of models; a module with these two functions is one.

    It may have a third, `structure(name)`: a text that models have in common which differ in widths and depths alone.
    """

    def names(self, everything: bool = False) -> list[str]:
        """The models to look at: one or a few of each family, or all that fit into memory."""

    def build(self, name: str) -> tuple[Any, Any]:
        """A module in the mode that it is to be captured in, and its inputs: a tuple, or a dict of named ones."""


# source → the module, or the object in a module, that is one; imported when asked for
SOURCES: dict[str, str] = {
    "torchvision": "benchmarks.sweep_vision:TORCHVISION",
    "timm": "benchmarks.sweep_vision:TIMM",
    "transformers": "benchmarks.sweep_transformers",
}


def find_source(name: str) -> Source:
    """The source by its name in `SOURCES`."""
    module, _, attribute = SOURCES[name].partition(":")
    found: Any = importlib.import_module(module)
    return getattr(found, attribute) if attribute else found


# ---- one model -----------------------------------------------------------------------------------------------------


class StageError(Exception):
    """A model that did not come through: `stage` is "build", "export" (theirs), "read" or "inspect" (rescompile's)."""

    def __init__(self, stage: str, error: BaseException) -> None:
        text = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
        super().__init__(f"{type(error).__name__}: {text[:300]}")
        self.stage = stage


@contextlib.contextmanager
def _stage(name: str, verbose: bool = False) -> Iterator[None]:
    try:
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except Exception as error:
        if verbose:
            traceback.print_exc()
        raise StageError(name, error) from error


def check(source: str, name: str, irs: tuple[str, ...] = IRS, keep: Path | None = None) -> dict[str, Any]:
    """What detection finds in one model, by IR. `keep`: a folder for ONNX files, which are read again from there."""
    record: dict[str, Any] = {"source": source, "name": name}
    start = time.perf_counter()
    program: Any = None
    path = None if keep is None else keep / f"{source}-{name}.onnx"
    try:
        for ir in irs:
            if program is None and not (ir == "onnx" and path is not None and path.exists()):
                program = _program(source, name)
            record[ir] = _findings(program, ir, path)
    except StageError as error:
        record[error.stage] = str(error)
    record["seconds"] = round(time.perf_counter() - start, 1)
    return record


def _program(source: str, name: str) -> Any:
    import torch

    from benchmarks.corpus import vary_norms
    from rescompile import fx_capture

    with _stage("build"):
        torch.manual_seed(0)
        model, inputs = find_source(source).build(name)
        vary_norms(model)  # an exporter makes one of two that are equal, as untrained ones are
    with _stage("export"), torch.no_grad():
        return fx_capture.export(model, *fx_capture.arguments(inputs), None)


def _findings(program: Any, ir: str, path: Path | None) -> dict[str, Any]:
    try:
        report = inspect(program, ir, path)
        with _stage("inspect"):
            json.dumps(report.to_dict())
            str(report)
        return describe(report)
    except StageError as error:
        return {"stage": error.stage, "error": str(error)}


def inspect(program: Any, ir: str, path: Path | None = None, verbose: bool = False) -> Any:
    """The report on an exported program, as it is or as ONNX."""
    from rescompile import fx_capture, onnx_files
    from rescompile.detection import inspect_graph

    if ir == "fx":
        with _stage("read", verbose):
            graph: Any = fx_capture.capture(program)
    elif path is not None and path.exists():
        with _stage("read", verbose):
            graph = onnx_files.load(path)
    else:
        import torch
        from torch.nn.attention import SDPBackend, sdpa_kernel

        if any(value.device.type == "meta" for value in program.state_dict.values()):
            raise StageError("export", MemoryError("the weights are too large to be made"))
        # What the exporter folds it computes, which a large model's empty weights are not worth.
        optimize = sum(value.numel() for value in program.state_dict.values()) < _LARGEST_FOLDED
        # A fused attention is taken apart for some devices only: without, the exporter has no rule for it.
        with _stage("export", verbose), sdpa_kernel(SDPBackend.MATH):
            exported = torch.onnx.export(_with_plain_attention(program), dynamo=True, verbose=False, optimize=optimize)
            if path is not None:
                path.parent.mkdir(parents=True, exist_ok=True)
                exported.save(str(path))
        with _stage("read", verbose):
            graph = onnx_files.capture(exported)
    with _stage("inspect", verbose):
        return inspect_graph(graph)


def _with_plain_attention(program: Any) -> Any:
    """The program; where an attention has groups besides heads, which the exporter has no rule for, taken apart."""
    import torch

    fused = torch.ops.aten.scaled_dot_product_attention
    calls = (node for node in program.graph.nodes if node.target is fused.default)
    if all(node.args[0].meta["val"].ndim == 4 for node in calls):
        return program
    rules = torch.export.default_decompositions()
    return program.run_decompositions({op: rule for op, rule in rules.items() if "scaled_dot_product" in str(op)})


def describe(report: Any) -> dict[str, Any]:
    """The counts of a report, and the reasons of its refusals, grouped."""
    summary = report.summary()
    reasons = Counter(join.reason.split(":")[0] for join in report.not_residual)
    shortcuts = Counter(block.shortcut for block in report if block.kind == "add")
    return {
        "nodes": report.nodes,
        "blocks": summary["blocks"],
        "nested": summary["nested"],
        "kinds": summary["by_kind"],
        "shortcuts": dict(sorted(shortcuts.items())),
        "norms": summary["by_norm"],
        "not_residual": dict(sorted(reasons.items())),
    }


# ---- many models, each in a worker ---------------------------------------------------------------------------------


class Worker:
    """A process that checks models one after the other, begun anew when one of them breaks it."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self._arguments = arguments
        self._process: subprocess.Popen[str] | None = None
        self._done = 0

    def check(self, source: str, name: str) -> dict[str, Any]:
        """The record of one model."""
        process = self._started()
        assert process.stdin is not None
        assert process.stdout is not None
        print(json.dumps([source, name]), file=process.stdin, flush=True)
        ready, _, _ = select.select([process.stdout], [], [], self._arguments.seconds)
        line = process.stdout.readline() if ready else ""
        self._done += 1
        if not line:
            self.stop()
            why = f"the process ended with {process.returncode}" if ready else f"over {self._arguments.seconds} s"
            return {"source": source, "name": name, "export": why}
        if self._done >= self._arguments.renew:  # what torch keeps of old models slows it down
            self.stop()
        record: dict[str, Any] = json.loads(line)
        return record

    def _started(self) -> subprocess.Popen[str]:
        if self._process is None:
            command = [sys.executable, "-m", "benchmarks.sweep", "--worker", "--ir", self._arguments.ir]
            command += ["--gigabytes", str(self._arguments.gigabytes)]
            if self._arguments.keep:
                command += ["--keep", str(self._arguments.keep)]
            self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            self._done = 0
        return self._process

    def stop(self) -> None:
        """End the process."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        self._process = None


def _work(arguments: argparse.Namespace) -> None:
    """The worker's side: a line in, a line out."""
    limit = int(arguments.gigabytes * 2**30)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    logging.disable(logging.WARNING)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever libraries print is no answer
    for line in sys.stdin:
        source, name = json.loads(line)
        record = check(source, name, tuple(arguments.ir.split(",")), arguments.keep)
        print(json.dumps(record), file=answers, flush=True)


def run(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """The records of all models asked for, those of an earlier run included."""
    WORK.mkdir(parents=True, exist_ok=True)
    log = WORK / "records.jsonl"
    if arguments.fresh:
        log.unlink(missing_ok=True)
    known = read_records([log] if log.exists() else [])
    offered = [(source, name) for source in arguments.source.split(",") for name in _names(source, arguments.all)]
    wanted = choose(offered, arguments.only.split(",") if arguments.only else ["*"])[: arguments.limit or None]
    due = [key for key in wanted if arguments.again or not _is_done(known.get(key, {}), arguments)]
    with ThreadPoolExecutor(arguments.jobs) as pool, log.open("a") as file:
        for record in pool.map(_Share(arguments, known), due):
            key = record["source"], record["name"]
            record = _kept(known.get(key, {}), record)
            known[key] = _merged(known.get(key, {}), record)
            print(json.dumps(record), file=file, flush=True)
            print(_line(known[key]), flush=True)
    return [known[key] for key in wanted if key in known]


def read_records(logs: Iterable[Path]) -> dict[tuple[str, str], dict[str, Any]]:
    """The records of earlier runs by source and name, the last of each model counting."""
    known: dict[tuple[str, str], dict[str, Any]] = {}
    for log in logs:
        for line in log.read_text().splitlines():
            record = json.loads(line)
            key = record["source"], record["name"]
            if "twin" not in record or key not in known:
                known[key] = _merged(known.get(key, {}), _kept(known.get(key, {}), record))
    return known


def _merged(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """A record with the other IR's findings of an earlier run, but none of its errors."""
    return {**{key: value for key, value in old.items() if key not in ("build", "export", "read", "twin")}, **new}


def _kept(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """A record in which an export that took too long is ONNX's where the other one was done before."""
    if "export" not in new or "onnx" in new or "fx" in new or "kinds" not in old.get("fx", {}):
        return new
    rest = {key: value for key, value in new.items() if key != "export"}
    return {**rest, "onnx": {"stage": "export", "error": new["export"]}}


def _is_done(record: dict[str, Any], arguments: argparse.Namespace) -> bool:
    if "twin" in record:
        return bool(arguments.distinct)
    return "build" in record or "export" in record or all(ir in record for ir in arguments.ir.split(","))


def _names(source: str, everything: bool) -> list[str]:
    return find_source(source).names(everything)


def choose(offered: list[tuple[str, str]], patterns: list[str]) -> list[tuple[str, str]]:
    """The models that one of the patterns means, pattern by pattern: a whole name, one with `*`, a part of a name."""
    chosen: dict[tuple[str, str], None] = {}
    for pattern in patterns:
        whole = [key for key in offered if key[1] == pattern]
        parts = (key for key in offered if fnmatch.fnmatchcase(key[1], pattern) or pattern in key[1])
        chosen.update(dict.fromkeys(whole or parts))
    return list(chosen)


class _Share:
    """Gives each thread of a pool a worker of its own."""

    def __init__(self, arguments: argparse.Namespace, known: dict[tuple[str, str], dict[str, Any]]) -> None:
        self._arguments = arguments
        self._idle: list[Worker] = []
        self._listed = {
            (source, name) for source in arguments.source.split(",") for name in find_source(source).names()
        }
        self._first = _first_of_each(known) if arguments.distinct else {}

    def __call__(self, key: tuple[str, str]) -> dict[str, Any]:
        source, name = key
        structure = _structure(source, name) if self._arguments.distinct else ""
        twin = self._first.setdefault((source, structure), name)
        if structure and twin != name and key not in self._listed:
            return {"source": source, "name": name, "structure": structure, "twin": twin}
        worker = self._idle.pop() if self._idle else Worker(self._arguments)
        record = worker.check(source, name)
        self._idle.append(worker)
        return {**record, "structure": structure} if structure else record


def _structure(source: str, name: str) -> str:
    told = getattr(find_source(source), "structure", None)
    return str(told(name)) if told is not None else ""


def _first_of_each(known: dict[tuple[str, str], dict[str, Any]]) -> dict[tuple[str, str], str]:
    """Source and structure → the first model of it that was looked at."""
    first: dict[tuple[str, str], str] = {}
    for (source, name), record in known.items():
        if "kinds" in record.get("fx", {}) and (structure := record.get("structure") or _structure(source, name)):
            first.setdefault((source, structure), name)
    return first


def _left(known: dict[tuple[str, str], dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Records of the models that no run came to: those of a known structure, and others."""
    first = _first_of_each(known)
    for source in SOURCES:
        for name in find_source(source).names(everything=True):
            if (source, name) not in known:
                twin = first.get((source, _structure(source, name)))
                yield {"source": source, "name": name, **({"twin": twin} if twin else {"left": True})}


def _line(record: dict[str, Any]) -> str:
    from benchmarks.sweep_table import agreement, counts_text, verdict

    head = f"{record.get('seconds', '-'):>6} {record['source']}:{record['name']:40}"
    if "twin" in record:
        return f"{head} as {record['twin']}"
    failed = record.get("build") or record.get("export")
    if failed:
        return f"{head} not exported: {failed[:120]}"
    found = "  ".join(f"{ir} {counts_text(record[ir])}" for ir in IRS if ir in record)
    return f"{head} {found}  {agreement(record)}  {verdict(record)}"


def main() -> None:
    """Check the models asked for, print a line for each, and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", default="torchvision,timm", help=f"of {', '.join(SOURCES)}")
    parser.add_argument(
        "--only", default="", help="names, parts of names, or patterns with *, separated by commas: in that order"
    )
    parser.add_argument("--all", action="store_true", help="every model that fits, not a few of each family")
    parser.add_argument("--distinct", action="store_true", help="of models that differ in size alone only the first")
    parser.add_argument("--limit", type=int, default=0, help="stop after this many models")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--ir", default=",".join(IRS))
    parser.add_argument("--fresh", action="store_true", help="forget what an earlier run found")
    parser.add_argument("--again", action="store_true", help="look again at the models asked for")
    parser.add_argument("--keep", type=Path, help="a folder to keep ONNX files in, and to read them from")
    parser.add_argument("--seconds", type=int, default=300, help="limit for one model")
    parser.add_argument("--gigabytes", type=float, default=8.0, help="limit for one process")
    parser.add_argument("--renew", type=int, default=25, help="models after which a process begins anew")
    parser.add_argument("--tables-of", type=Path, nargs="+", help="records of earlier runs to write tables of, no more")
    parser.add_argument("--no-tables", action="store_true", help="leave benchmarks/results as it is")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        _work(arguments)
        return
    if arguments.tables_of:
        known = read_records(arguments.tables_of)
        write_tables([*known.values(), *_left(known)])
        return
    records = run(arguments)
    if not arguments.no_tables:
        write_tables(records)


if __name__ == "__main__":
    main()
