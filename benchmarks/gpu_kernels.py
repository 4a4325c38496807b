"""The part of the GPU benchmark that runs kernels: correct first, then timed beside every rival, region by region.

    python -m benchmarks.gpu_kernels SET OUT.jsonl [--rivals inductor] [--seconds N] [--only NAME]

A line of OUT for each region, written as soon as it is known. A kernel that breaks the device takes this process along:
whoever started it (benchmarks.gpu) starts it again behind the region that broke it.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import gpu_rivals
from benchmarks.gpu_set import Region, Set, load_runtime
from rescompile.backends.cuda.contest import BrokenDevice, Buffers, Verdict, contest
from rescompile.backends.cuda.device import Device, TorchDevice

RIVALS: dict[str, Callable[[Region], Callable[..., object] | None]] = {
    "torch eager": gpu_rivals.eager,
    "triton": gpu_rivals.triton_add_norm,
    "plain library": gpu_rivals.alone,
}
INDUCTOR = "inductor max-autotune"
START_AGAIN = 3  # exit status: the device is broken for this process, and there is more to do


def main(given: Sequence[str] | None = None) -> None:
    """Run what is left to run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("set", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--inductor", action="store_true", help="time inductor on the regions, and nothing else")
    parser.add_argument("--seconds", type=float, default=1e9, help="start no region after so many seconds")
    parser.add_argument("--only", default="", help="regions whose name holds this")
    options = parser.parse_args(given)
    opened = Set.open(options.set)
    load_runtime(options.set)
    device = TorchDevice()
    if not run(opened, options.out, device, only=options.only, seconds=options.seconds, inductor=options.inductor):
        raise SystemExit(START_AGAIN)


def run(
    opened: Set, out: Path, device: Device, *, only: str = "", seconds: float = 1e9, inductor: bool = False
) -> bool:
    """Measure what `out` does not name yet; each region is named there before it is touched.

    False where a candidate broke the device: a new process goes on, and leaves that one out.
    """
    deadline = time.monotonic() + seconds
    known, without = begun(out)
    with out.open("a", encoding="utf-8") as file:

        def tell(line: dict[str, Any]) -> None:
            file.write(json.dumps(line) + "\n")
            file.flush()

        for region in opened.regions:
            if region.name in known or only not in region.name or time.monotonic() > deadline:
                continue
            tell({"name": region.name, "begun": True})
            began = time.monotonic()
            out_of_it = without.get(region.name, {})
            try:
                line = inductor_line(region, device) if inductor else region_line(region, device, out_of_it)
            except BrokenDevice as error:
                tell({"name": region.name, "breaks": error.label, "said": str(error)})
                return False
            tell({"name": region.name, **line, "took": round(time.monotonic() - began, 2)})
            if not device.healthy():
                return False
    return True


def begun(path: Path) -> tuple[set[str], dict[str, dict[str, str]]]:
    """Regions not to begin again, and the candidates that broke the device, with what was said, by region."""
    starts: dict[str, int] = {}
    without: dict[str, dict[str, str]] = {}
    done: set[str] = set()
    for line in read_lines(path):
        name = line["name"]
        if line.get("begun"):
            starts[name] = starts.get(name, 0) + 1
        elif "breaks" in line:
            without.setdefault(name, {})[line["breaks"]] = line["said"]
        else:
            done.add(name)
    # A region that ended its process without a word is not tried again.
    silent = {name for name, count in starts.items() if count > len(without.get(name, {}))}
    return done | silent, without


def region_line(region: Region, device: Device, without: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Our candidates, the libraries' and the rivals on one region; `without` those that break the device."""
    out_of_it = without or {}
    buffers = Buffers(region.buffers, device)
    entrants = [
        (label, function)
        for label, function in [*region.kernels(), *region.libraries(device.torch)]
        if label not in out_of_it
    ]
    verdicts = contest(region.data["spec"], buffers, entrants, device)
    rivals = {name: made for name, make in RIVALS.items() if (made := make(region)) is not None}
    calls = [buffers.call(_on_torch(function, device)) for function in rivals.values()]
    timings = dict(zip(rivals, device.times(calls, buffers.copies), strict=True))
    return {
        "group": region.data["group"],
        "key": region.data["key"],
        "kernels": region.data["kernels"],
        "flops": region.data["flops"],
        "bytes": region.data["bytes"],
        "own": [candidate["label"] for candidate in region.data["candidates"]],
        "copies": buffers.copies,
        "candidates": {
            **{verdict.label: _told(verdict) for verdict in verdicts},
            **{label: {"refused": said, "gaps": {}} for label, said in out_of_it.items()},
        },
        "failures": region.data["failures"],
        "rivals": {name: {"seconds": timing.device, "host": timing.host} for name, timing in timings.items() if timing},
    }


def inductor_line(region: Region, device: Device) -> dict[str, Any]:
    """Inductor on one region."""
    made = gpu_rivals.inductor(region, "max-autotune-no-cudagraphs")
    if made is None:
        return {"rivals": {}}
    buffers = Buffers(region.buffers, device)
    (timing,) = device.times([buffers.call(made)], buffers.copies)
    return {"rivals": {} if timing is None else {INDUCTOR: {"seconds": timing.device, "host": timing.host}}}


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a file that are whole; none where there is no file."""
    if not path.is_file():
        return []
    found = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            found.append(json.loads(line))
        except ValueError:  # the last one of a process that was ended
            continue
    return found


def results(path: Path) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """What was measured, by region, and the regions that ended the process they were measured in."""
    found: dict[str, dict[str, Any]] = {}
    named: dict[str, None] = {}
    for line in read_lines(path):
        if line.get("begun") or "breaks" in line:
            named[line["name"]] = None
        else:
            found[line["name"]] = line
    return found, [name for name in named if name not in found]


def _on_torch(function: Callable[..., object], device: Device) -> Callable[..., object]:
    return lambda *buffers: function(*map(device.torch, buffers))


def _told(verdict: Verdict) -> dict[str, Any]:
    timing = verdict.timing
    return {
        **({} if timing is None else {"seconds": timing.device, "host": timing.host, "captured": timing.captured}),
        **({"refused": verdict.refused} if verdict.refused else {}),
        "gaps": {name: gap if math.isfinite(gap) else None for name, gap in verdict.gaps.items()},
    }


if __name__ == "__main__":
    main()
