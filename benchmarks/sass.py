"""python -m benchmarks.sass: what the machine code of every kernel family does, recorded and compared; no GPU needed.

python -m benchmarks.sass               writes benchmarks/results/sass.json and sass.md
python -m benchmarks.sass --check       compares with what is recorded; exit status 1 where something worsened
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

import tvm

from benchmarks.sass_kernels import ARCHITECTURES, kernels
from rescompile.backends.cuda import sass
from rescompile.backends.cuda.cubin import Cubin, by_nvrtc
from rescompile.backends.cuda.executable import cross_compiling, cuda_source
from rescompile.backends.cuda.schedule import thread_extents
from rescompile.backends.cuda.targets import architecture, cuda_target
from rescompile.errors import RescompileError

RESULTS = Path(__file__).parent / "results"
REGISTER_SLACK = 6  # registers that may come and go with an edit elsewhere
Table = dict[str, dict[str, dict[str, Any]]]  # facts by architecture and kernel


def compiler() -> str:
    """The compiler that the machine code is by, with its version: a record holds for one."""
    return f"NVRTC {metadata.version('nvidia-cuda-nvrtc')}"


def measure(arch: str) -> dict[str, dict[str, Any]]:
    """Facts of every recorded kernel, compiled as one module."""
    functions, tiles = {}, {}
    for kernel in kernels(arch):
        functions[kernel.name], tiles[kernel.name] = kernel.function(arch)
    with cross_compiling():
        made = tvm.compile(tvm.IRModule(functions), target=cuda_target(arch))
    cubin = by_nvrtc(cuda_source(made.mod), arch)
    if not isinstance(cubin, Cubin):
        raise RescompileError(f"The table needs NVRTC: {cubin or 'pip install nvidia-cuda-nvrtc'}.")
    found = {}
    for name, code in sorted(sass.read(cubin).items()):
        threads = _threads(functions[name])
        shared = code.shared + sass.dynamic_shared(functions[name])
        facts = asdict(code)
        del facts["kernel"]
        facts["accesses"] = {kind: {str(bits): n for bits, n in each.items()} for kind, each in code.accesses.items()}
        warps = sass.occupancy(architecture(arch), threads, code.registers, shared)
        found[name] = {"tile": tiles[name], "threads": threads, **facts, "shared": shared, "warps": warps}
    return found


def _threads(function: Any) -> int:
    count = 1
    for tag, extent in thread_extents(function).items():
        count *= int(extent) if tag.startswith("threadIdx") else 1
    return count


def recorded() -> tuple[str, Table]:
    """The compiler and the table that are committed."""
    data = json.loads((RESULTS / "sass.json").read_text(encoding="utf-8"))
    return data["compiler"], data["kernels"]


def worsened(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What of a kernel is worse than recorded, a clause each."""
    said = [f"{what} {before[what]} → {now[what]}" for what in ("spills", "stack") if now[what] > before[what]]
    if now["registers"] > before["registers"] + REGISTER_SLACK:
        said.append(f"registers {before['registers']} → {now['registers']}")
    if now["warps"] < before["warps"]:
        said.append(f"warps of a multiprocessor {before['warps']} → {now['warps']}")
    for kind, widths in now["accesses"].items():
        had = {int(bits): count for bits, count in before["accesses"].get(kind, {}).items()}
        widest = max(had, default=0)
        narrow = sum(count for bits, count in widths.items() if int(bits) < widest)
        if narrow > sum(count for bits, count in had.items() if bits < widest):
            said.append(f"{kind} narrower: {_widths(before['accesses'].get(kind, {}))} → {_widths(widths)}")
    for name, count in before["tensor"].items():
        if now["tensor"].get(name, 0) < count:
            said.append(f"{name} {count} → {now['tensor'].get(name, 0)}")
    return said


def differences(arch: str, before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """One line for each kernel that is worse than recorded, or not recorded."""
    lines = [f"{arch} {name}: gone" for name in before if name not in now]
    for name, facts in now.items():
        if name not in before:
            lines.append(f"{arch} {name}: not recorded (make sass)")
            continue
        worse = worsened(before[name], facts)
        lines += [f"{arch} {name}: {'; '.join(worse)}"] if worse else []
    return lines


def _widths(widths: Mapping[str, int]) -> str:
    return " + ".join(f"{count}×{bits}" for bits, count in widths.items()) or "-"


def table(found: Table, by: str) -> str:
    """The table as Markdown."""
    lines = [
        "# Machine code of the GPU kernels",
        "",
        f"Compiled by {by}, read by nvdisasm; `make sass` writes it anew, and a test fails where it worsens.",
        "Accesses are instructions × bits, a loop's body counted once; warps are what a multiprocessor holds at once.",
    ]
    for arch, rows in found.items():
        lines += ["", f"## {arch}", ""]
        lines.append(
            "| kernel | registers | spills | threads | warps | shared | global | in shared | tensor cores | tile |"
        )
        lines.append("|---|---:|---:|---:|---:|---:|---|---|---|---|")
        for name, facts in rows.items():
            lines.append(
                f"| {name} | {facts['registers']} | {facts['spills'] + facts['stack']} | {facts['threads']} | "
                f"{facts['warps']} | {facts['shared']} | {_accesses(facts, 'global')} | {_accesses(facts, 'shared')} | "
                f"{_tensor(facts)} | {facts['tile']} |"
            )
    return "\n".join(lines) + "\n"


def _accesses(facts: Mapping[str, Any], where: str) -> str:
    names = {
        f"{where}_loads": "read",
        f"{where}_stores": "write",
        **({"async_copies": "copy"} if where == "global" else {}),
    }
    parts = [f"{said} {_widths(facts['accesses'][kind])}" for kind, said in names.items() if kind in facts["accesses"]]
    if where == "global" and "tensor_copies" in facts["counts"]:
        parts.append(f"TMA {facts['counts']['tensor_copies']}")
    if where == "shared" and "matrix_loads" in facts["counts"]:
        parts.append(f"ldmatrix {facts['counts']['matrix_loads']}")
    return ", ".join(parts) or "-"


def _tensor(facts: Mapping[str, Any]) -> str:
    return ", ".join(f"{count} {name}" for name, count in facts["tensor"].items()) or "-"


def main(arguments: list[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sass", description=__doc__)
    parser.add_argument("--check", action="store_true", help="compare with the record, and write nothing")
    check = parser.parse_args(arguments).check
    found = {arch: measure(arch) for arch in ARCHITECTURES}
    if check:
        by, before = recorded()
        lines = [line for arch in ARCHITECTURES for line in differences(arch, before.get(arch, {}), found[arch])]
        said = "\n".join(lines) if lines else "Nothing worsened."
        print(said if by == compiler() else f"The record is by {by}, this is {compiler()}.\n{said}")
        return 1 if lines else 0
    RESULTS.mkdir(exist_ok=True)
    data = {"compiler": compiler(), "kernels": found}
    (RESULTS / "sass.json").write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    (RESULTS / "sass.md").write_text(table(found, compiler()), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
