"""`make bench-gpu`: kernels and models on this machine's GPU against the libraries, Triton, eager and inductor.

    python -m benchmarks.gpu [--set DIR] [--out DIR] [--seconds S] [--stages kernels,models,...]
                             [--only NAME] [--records] [--dry]

Without `--set` everything is compiled first, which needs TVM. Without a GPU it says so and ends well. Each stage runs
in processes of its own, so that a kernel that breaks the device costs one region. `--seconds` bounds the whole run; a
run into the same `--out` goes on where the last one stopped. `--dry` says what would run.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks import gpu_kernels, gpu_report
from benchmarks.gpu_set import Set
from rescompile.backends.cuda import device

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
STAGES = ("kernels", "models", "inductor-models", "inductor-kernels")
# Parts of the time that the stages may take at most; what one leaves goes to the next.
SHARES = {"kernels": 0.35, "models": 0.55, "inductor-models": 0.85, "inductor-kernels": 1.0}
NO_GPU = "There is no CUDA GPU that torch can use here: nothing was measured."
_REPORT_SECONDS = 10.0


@dataclass
class Run:
    """One run into a folder."""

    folder: Path
    out: Path
    seconds: float
    only: str = ""
    notes: list[str] = field(default_factory=list)
    began: float = field(default_factory=time.monotonic)

    def left(self, share: float = 1.0) -> float:
        """Seconds until that share of the time is used up."""
        return share * (self.seconds - _REPORT_SECONDS) - (time.monotonic() - self.began)

    def child(self, module: str, *arguments: str, share: float) -> int:
        """Run a module in a process of its own; its exit status, 124 where its time was over."""
        command = [sys.executable, "-m", module, *arguments]
        try:
            return subprocess.run(command, cwd=ROOT, timeout=max(1.0, self.left(share)), check=False).returncode
        except subprocess.TimeoutExpired:
            return 124

    def lines(self, name: str, module: str, share: float, *flags: str) -> None:
        """All of a stage into a file of lines, with a new process behind each region or model that ends one."""
        path = self.out / f"{name}.jsonl"
        while self.left(share) > 5:
            before = len(gpu_kernels.results(path)[1])
            status = self.child(
                module, str(self.folder), str(path), "--only", self.only,
                "--seconds", str(self.left(share) - 3), *flags, share=share,
            )  # fmt: skip
            broken = gpu_kernels.results(path)[1]
            if status == 0 or len(broken) == before:
                if status not in (0, 124):
                    self.notes.append(f"the stage '{name}' ended with status {status}")
                return


def main(given: Sequence[str] | None = None) -> None:
    """Measure, and write what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--set", type=Path, default=None, help="a compiled set (benchmarks.gpu_pack)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="where results go")
    parser.add_argument("--seconds", type=float, default=3600.0, help="of the whole run")
    parser.add_argument("--stages", default=",".join(STAGES), help="with commas")
    parser.add_argument("--only", default="", help="regions and models whose name holds this")
    parser.add_argument("--records", action="store_true", help="kernels alone, for backends/records")
    parser.add_argument("--dry", action="store_true", help="say what would run, and run nothing")
    options = parser.parse_args(given)
    stages = ["kernels"] if options.records else options.stages.split(",")
    unknown = [stage for stage in stages if stage not in STAGES]
    if unknown:
        parser.error(f"there is no stage '{unknown[0]}': choose from {', '.join(STAGES)}")
    if options.dry:
        print(plan(options.set, stages, options.seconds, options.only))
        return
    found = device.here()
    if found is None:
        print(NO_GPU)
        return
    folder = options.set or packed(options.only, any("models" in stage for stage in stages), found.facts["arch"])
    options.out.mkdir(parents=True, exist_ok=True)
    run = Run(folder.resolve(), options.out.resolve(), options.seconds, options.only)
    measure(run, stages)
    results = collected(run, found.facts)
    print(gpu_report.markdown(results))
    for path in gpu_report.write(run.out, results):
        print(path)


def measure(run: Run, stages: Sequence[str]) -> None:
    """The stages, one after the other."""
    ceilings = run.out / "ceilings.json"
    if not ceilings.is_file():
        run.child("benchmarks.gpu_rivals", str(ceilings), share=1.0)
    modules = {"kernels": "benchmarks.gpu_kernels", "models": "benchmarks.gpu_models"}
    for stage in STAGES:
        if stage in stages:
            what, inductor = (stage.removeprefix("inductor-"), stage.startswith("inductor-"))
            run.lines(stage, modules[what], SHARES[stage], *(["--inductor"] if inductor else []))


def collected(run: Run, facts: dict[str, str]) -> dict[str, Any]:
    """Everything that lies in the folder, as one result."""
    opened = Set.open(run.folder)
    kernels, broken = gpu_kernels.results(run.out / "kernels.jsonl")
    inductor, _ = gpu_kernels.results(run.out / "inductor-kernels.jsonl")
    for name, line in inductor.items():
        if name in kernels:
            kernels[name]["rivals"].update(line["rivals"])
    models, broken_models = gpu_kernels.results(run.out / "models.jsonl")
    for name, line in gpu_kernels.results(run.out / "inductor-models.jsonl")[0].items():
        _beside(models.setdefault(name, {}), line)
    ceilings = run.out / "ceilings.json"
    return {
        "schema": 1,
        "date": gpu_report.today(),
        "facts": facts,
        "set": {"arch": opened.arch, "kernels": opened.kernels, "versions": opened.versions},
        "ceilings": json.loads(ceilings.read_text(encoding="utf-8")) if ceilings.is_file() else {},
        "kernels": kernels,
        "models": models,
        "broken": [*broken, *broken_models],
        "notes": run.notes,
    }


def _beside(model: dict[str, Any], line: dict[str, Any]) -> None:
    """Add what was measured beside inductor: its own time at the speed that ours had in the other run."""
    found = model.setdefault("milliseconds", {})
    theirs, ours = line["milliseconds"].get(gpu_report.INDUCTOR), line["milliseconds"].get("rescompile")
    if theirs is not None:
        before = found.get("rescompile")
        found[gpu_report.INDUCTOR] = theirs if ours is None or before is None else theirs / ours * before
    model.setdefault("failures", {}).update(line["failures"])


def packed(only: str, models: bool, arch: str) -> Path:
    """A set compiled here, for this machine's GPU. Needs TVM."""
    from benchmarks import gpu_pack

    folder = Path(tempfile.mkdtemp(prefix="rescompile-gpu-"))
    exact = f"{arch}a" if arch in ("sm_90", "sm_100", "sm_103", "sm_120") else arch
    wanted = ["--models", "all"] if models else []
    gpu_pack.main([str(folder), "--arch", exact, "--only", only, "--no-runtime", *wanted])
    return folder


def plan(folder: Path | None, stages: Sequence[str], seconds: float, only: str) -> str:
    """What a run would do."""
    lines = [f"{', '.join(stages)} within {seconds:.0f} s"]
    if folder is None:
        return "\n".join([*lines, "the set is compiled first"])
    opened = Set.open(folder)
    regions = [region for region in opened.regions if only in region.name]
    candidates = sum(len(region.data["candidates"]) + len(region.data["libraries"]) for region in regions)
    lines.append(f"{folder}: {len(regions)} regions, {candidates} candidates for {opened.arch}")
    lines += [f"  {region.name}: {len(region.data['candidates'])} kernels" for region in regions]
    lines += [f"  model {model['name']}" for model in opened.models if only in model["name"]]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
