"""Everything that the GPU benchmark runs, compiled here for a machine with a GPU and torch but without TVM.

    python -m benchmarks.gpu_pack DIR [--arch sm_90a] [--only NAME] [--tiles N] [--archive FILE.tar.xz]

DIR then holds the *set*: `set.json` (regions as plain data, candidates by label, libraries' calls), one shared library
for each region with all of its candidates as machine code, programs of whole models without their weights, and TVM's
runtime for Python 3.12 (a few MB). No weights: the device draws them by seed. `--archive` packs it all into one file.
A run that was interrupted goes on where it stopped.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from benchmarks.gpu_set import INDEX, SCHEMA, SITE, Buffer
from benchmarks.gpu_specs import Entry, entries
from rescompile.backends import targets
from rescompile.backends.cuda import nvrtc, plain
from rescompile.backends.cuda.build import Assemble, compiled
from rescompile.backends.cuda.choice_records import generators, versions
from rescompile.backends.cuda.choose import Candidate, Wanted, candidates
from rescompile.backends.cuda.contest import bytes_of, shapes
from rescompile.backends.cuda.contraction import ContractionSpec, EpilogueProgram
from rescompile.backends.cuda.cubin import Cubin, to_cubin, usage
from rescompile.backends.cuda.library_candidates import library_candidates
from rescompile.backends.cuda.reference import described
from rescompile.backends.cuda.targets import Architecture, architecture
from rescompile.backends.kernels.emit import TVM_ERRORS
from rescompile.backends.link import link
from rescompile.errors import RescompileError

PYTHON = "3.12"
PLATFORMS = ("manylinux_2_34", "manylinux_2_31", "manylinux_2_28", "manylinux_2_27", "manylinux_2_24", "manylinux_2_17")
RUNTIME = ("tvm/lib/libtvm_runtime.so", "tvm/lib/libtvm_runtime_cuda.so")


def main(given: Sequence[str] | None = None) -> None:
    """Build the set."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--arch", default="sm_90a", help="what the machine code is for")
    parser.add_argument("--only", default="", help="regions whose name holds this")
    parser.add_argument("--tiles", type=int, default=5, help="candidates of each kernel family, the likeliest ones")
    parser.add_argument("--no-rules", action="store_true", help="leave out schedules by rule")
    parser.add_argument("--no-runtime", action="store_true", help="leave out TVM's runtime")
    parser.add_argument("--models", default="", help="models to compile, with commas, or `all`")
    parser.add_argument("--archive", type=Path, default=None, help="pack the finished folder into this .tar.xz")
    options = parser.parse_args(given)
    options.folder.mkdir(parents=True, exist_ok=True)
    chosen = [entry for entry in entries() if options.only in entry.name]
    pack(options.folder, chosen, options.arch, tiles=options.tiles, rules=not options.no_rules)
    if options.models:
        from benchmarks.gpu_models import pack_models

        pack_models(options.folder, options.models, options.arch)
    if not options.no_runtime:
        pack_runtime(options.folder)
    if options.archive is not None:
        archive(options.folder, options.archive)


def pack(
    folder: Path,
    chosen: Sequence[Entry],
    arch: str,
    *,
    tiles: int = 5,
    rules: bool = True,
    assemble: Assemble | None = None,
) -> None:
    """Compile the candidates of regions into a folder, and write its index; what is there already stays."""
    limits = architecture(arch)
    described_before = _read(folder / INDEX)
    regions: list[dict[str, Any]] = []
    for number, entry in enumerate(chosen):
        began = time.monotonic()
        known = described_before.get(entry.name)
        if known is None or known["kernels"] != generators():
            known = _packed(folder, _stem(entry), entry, limits, arch, tiles, rules, assemble or assembled)
            print(
                f"{number + 1}/{len(chosen)} {entry.name}: {_told(known)}, {time.monotonic() - began:.0f} s", flush=True
            )
        regions.append(known)
        others = [region for name, region in described_before.items() if name not in {r["name"] for r in regions}]
        _write_index(folder, arch, [*regions, *others])


def _packed(
    folder: Path, stem: str, entry: Entry, limits: Architecture, arch: str, tiles: int, rules: bool, assemble: Assemble
) -> dict[str, Any]:
    wanted = Wanted(entry.spec, entry.families)
    found = _listed(wanted, limits, tiles, rules)
    target = targets.resolve(f"cuda:{limits.name}")
    functions, failures = _functions(found, entry.spec)
    made: list[dict[str, Any]] = []
    try:
        made = [_library(folder, f"{stem}.so", functions, target, arch, assemble)] if functions else []
    except (*TVM_ERRORS, RescompileError):
        # One that is turned down must not take the others along: each on its own.
        for label, function in functions.items():
            try:
                name = f"{stem}_{len(made)}.so"
                made.append(_library(folder, name, {label: function}, target, arch, assemble))
            except (*TVM_ERRORS, RescompileError) as error:
                failures[label] = _last_line(error)
    arguments = [
        Buffer(part.name, shape, part.dtype, part.output)
        for part, shape in zip(wanted.arguments, shapes(wanted.arguments), strict=True)
    ]
    libraries = library_candidates(entry.spec, tuple(part.name for part in arguments))
    alone = None
    if isinstance(entry.spec, ContractionSpec):
        bare = replace(entry.spec, epilogue=EpilogueProgram.plain(entry.spec.dtype))
        alone = next(iter(library_candidates(bare, ("a", "b", "y"))), None)
    return {
        "name": entry.name,
        "group": entry.group,
        "kernels": generators(),
        "key": repr(entry.spec),
        "spec": described(entry.spec),
        "norm": None if entry.norm is None else described(entry.norm),
        "arguments": [asdict(part) for part in arguments],
        "flops": getattr(entry.spec, "flops", None),
        "bytes": bytes_of(arguments),
        "candidates": [candidate for library in made for candidate in library["candidates"]],
        "failures": failures,
        "libraries": [{"label": str(call), "text": call.text()} for call in libraries],
        "alone": None if alone is None else alone.text(),
    }


def _stem(entry: Entry) -> str:
    """A file's name that no other region has."""
    return f"{entry.group}_{hashlib.sha256(entry.name.encode()).hexdigest()[:10]}"


def _listed(wanted: Wanted, limits: Architecture, tiles: int, rules: bool) -> list[Candidate]:
    found: list[Candidate] = []
    counts: dict[int, int] = {}
    for candidate in candidates(wanted, limits, libraries=False):
        if candidate.inline or (candidate.family is plain and not rules):
            continue
        counts[id(candidate.family)] = counts.get(id(candidate.family), 0) + 1
        if counts[id(candidate.family)] <= tiles:
            found.append(candidate)
    return found


def _functions(found: Sequence[Candidate], spec: Any) -> tuple[dict[str, Any], dict[str, str]]:
    functions: dict[str, Any] = {}
    failures: dict[str, str] = {}
    for number, candidate in enumerate(found):
        try:
            functions[candidate.label] = candidate.prim_func(spec, f"k{number}")
        except (*TVM_ERRORS, RescompileError) as error:
            failures[candidate.label] = _last_line(error)
    return functions, failures


def _library(
    folder: Path, name: str, functions: dict[str, Any], target: Any, arch: str, assemble: Assemble
) -> dict[str, Any]:
    named = {str(function.attrs["global_symbol"]): function for function in functions.values()}
    resources: dict[str, Any] = {}

    def keep(source: str, _: str) -> Cubin | None:
        cubin = assemble(source, arch)
        if cubin is not None:
            resources.update({kernel.kernel.removesuffix("_kernel"): asdict(kernel) for kernel in cubin.usage})
        return cubin

    link(compiled(named, target, keep), folder / name)
    return {
        "candidates": [
            {"label": label, "library": name, "function": symbol, "usage": resources.get(symbol)}
            for label, symbol in zip(functions, named, strict=True)
        ]
    }


def assembled(source: str, arch: str) -> Cubin | None:
    """Machine code by NVRTC, the faster of the two compilers; by nvcc what NVRTC turns down."""
    path = nvrtc.library()
    if path is None:
        return to_cubin(source, arch)
    options = [f"--gpu-architecture={arch}", "-std=c++17", "--ptxas-options=-v"]
    data, log = nvrtc.compile_source(path, source, options)
    return to_cubin(source, arch) if data is None else Cubin(data, usage(log), "nvrtc")


def pack_runtime(folder: Path) -> None:
    """TVM's runtime and its FFI for Python 3.12, as the package index has them."""
    from rescompile.backends.require import PINS

    site = folder / SITE
    if all((site / name).is_file() for name in RUNTIME):
        return
    with tempfile.TemporaryDirectory() as wheels:
        platforms = [part for name in PLATFORMS for part in ("--platform", f"{name}_x86_64")]
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:"]
        command += ["--python-version", PYTHON, "--implementation", "cp", *platforms, "-d", wheels]
        command += [f"{name}=={PINS[name]}" for name in ("apache-tvm", "apache-tvm-ffi")]
        subprocess.run(command, check=True)
        for wheel in Path(wheels).glob("*.whl"):
            with zipfile.ZipFile(wheel) as archive_:
                names = [name for name in archive_.namelist() if _of_runtime(name)]
                archive_.extractall(site, names)


def _of_runtime(name: str) -> bool:
    if name.endswith(".dist-info/METADATA"):
        return True
    if name.startswith("tvm_ffi"):
        left_out = ("/include/", "/3rdparty/", "/cython/", "/src/")
        return not any(part in name for part in left_out)
    return name in RUNTIME


def archive(folder: Path, path: Path) -> None:
    """The folder as one file."""
    with tarfile.open(path, "w:xz", preset=6) as packed:
        packed.add(folder, arcname="set")
    print(f"{path}: {path.stat().st_size / 2**20:.1f} MiB")


def _read(path: Path) -> dict[str, dict[str, Any]]:
    if not path.is_file():
        return {}
    return {region["name"]: region for region in json.loads(path.read_text(encoding="utf-8"))["regions"]}


def _write_index(folder: Path, arch: str, regions: Sequence[dict[str, Any]]) -> None:
    before = json.loads((folder / INDEX).read_text(encoding="utf-8")) if (folder / INDEX).is_file() else {}
    data = {
        "schema": SCHEMA,
        "arch": arch,
        "kernels": generators(),
        "versions": versions(),
        "regions": list(regions),
        "models": before.get("models", []),
    }
    partial = folder / f"{INDEX}.partial"
    partial.write_text(json.dumps(data, indent=1), encoding="utf-8")
    partial.replace(folder / INDEX)


def _told(region: dict[str, Any]) -> str:
    failed = "".join(f"; {label}: {why}" for label, why in region["failures"].items())
    return f"{len(region['candidates'])} candidates{failed}"


def _last_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1][:160] if lines else type(error).__name__


if __name__ == "__main__":
    main()
