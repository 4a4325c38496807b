"""Compare detection with every architecture: `python -m tests.classics.check [--ir fx,symbolic,onnx] [--only TEXT]`."""

from __future__ import annotations

import argparse
import importlib
import logging
import pkgutil
import tempfile
import time
import traceback
from pathlib import Path

from rescompile.detection import inspect_graph
from tests import classics
from tests.classics.case import Case

AREAS = [name for _, name, _ in pkgutil.iter_modules(classics.__path__) if name not in ("case", "check", "parts")]


def cases() -> dict[str, Case]:
    """All architectures, by "area: name"."""
    found: dict[str, Case] = {}
    for area in AREAS:
        module = importlib.import_module(f"tests.classics.{area}")
        found.update({f"{area}: {name}": case for name, case in module.CASES.items()})
    return found


def main() -> None:
    """A line for every architecture and IR, and the totals."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ir", default="fx")
    parser.add_argument("--only", default="")
    parser.add_argument("-v", "--verbose", action="store_true")
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)
    for ir in arguments.ir.split(","):
        right = total = 0
        for name, case in cases().items():
            if arguments.only not in name or (ir == "symbolic" and not case.traced):
                continue
            start = time.perf_counter()
            total += 1
            try:
                with tempfile.TemporaryDirectory() as folder:
                    report = inspect_graph(case.graph(ir, Path(folder)))
                    wrong = case.differences(report, ir)
            except Exception as error:  # noqa: BLE001 (whatever an exporter raises is a line of the table)
                wrong, report = [f"{type(error).__name__}: {str(error)[-300:]}"], None
                if arguments.verbose:
                    traceback.print_exc()
            right += not wrong
            seconds = time.perf_counter() - start
            print(f"{ir:8} {'BAD' if wrong else 'ok ':3} {seconds:5.1f} s  {name}  {'; '.join(wrong)}", flush=True)
            if wrong and arguments.verbose and report is not None:
                print(report)
                for join in report.not_residual:
                    print("   ", join.join, "-", join.reason)
        print(f"{ir}: {right} of {total} as defined\n", flush=True)


if __name__ == "__main__":
    main()
