"""`rescompile run`: arrays in, arrays out, whatever runs the model; and what a compiled program is, as text."""

from __future__ import annotations

import dataclasses
import zipfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rescompile import api
from rescompile.arrays import Arrays, load_arrays
from rescompile.cli_models import load_model
from rescompile.cli_output import table
from rescompile.errors import RescompileError, nearest
from rescompile.printing import print_type
from rescompile.specs import InputSpec

if TYPE_CHECKING:
    from rescompile.backends.artifact import Code
    from rescompile.backends.program import Program
    from rescompile.backends.roofline import Gpu
    from rescompile.backends.targets import CompileTarget


def run(model: str, backend: str, inputs: Sequence[str], trust: bool, input_file: Path | None) -> Arrays:
    """Outputs by name."""
    given = None if input_file is None else load_arrays(input_file)
    if zipfile.is_zipfile(model) and not model.lower().endswith(".pt2"):
        if backend != "tvm":
            raise RescompileError(f"'{model}' is a compiled artifact, which runs on tvm only: leave --backend out.")
        return _run_program(api.load_program(model), given)
    graph = load_model(model, inputs, trust)
    if backend == "tvm":
        return _run_program(api.compile(graph), given)
    from rescompile.backends.runtimes import prepare

    wanted = [InputSpec(value.shape or (), value.dtype or "float32") for value in graph.inputs]
    arrays = _inputs([value.name for value in graph.inputs], wanted, given)
    return _named([value.name for value in graph.outputs], prepare(graph, backend).run(arrays))


def _run_program(program: Program, given: Arrays | None) -> Arrays:
    manifest = program.manifest
    specs = [InputSpec(tuple(info.shape), info.dtype) for info in manifest.inputs]
    arrays = _inputs([info.name for info in manifest.inputs], specs, given)
    return _named([info.name for info in manifest.outputs], program(*arrays))


def _inputs(names: Sequence[str], specs: Sequence[InputSpec], given: Arrays | None) -> list[np.ndarray[Any, Any]]:
    """The given arrays in order, or random ones."""
    if given is None:
        return [spec.example(seed) for seed, spec in enumerate(specs)]
    for name in given:
        if name not in names:
            raise RescompileError(
                f"The model has no input '{name}'{nearest(name, names)}: it takes {', '.join(names)}."
            )
    missing = [f"{name}: {spec}" for name, spec in zip(names, specs, strict=True) if name not in given]
    if missing:
        raise RescompileError(f"The input file lacks {', '.join(missing)}.")
    return [given[name] for name in names]


def _named(names: Sequence[str], outputs: Any) -> Arrays:
    values = outputs if isinstance(outputs, tuple | list) else (outputs,)
    return {name: np.asarray(value) for name, value in zip(names, values, strict=True)}


# ---- texts ---------------------------------------------------------------------------------------------------------


def summaries(arrays: Arrays) -> list[dict[str, Any]]:
    """Name, type and spread of every array."""
    return [
        {"name": name, "type": print_type(array.shape, str(array.dtype)), **_spread(array)}
        for name, array in arrays.items()
    ]


def print_summaries(rows: list[dict[str, Any]]) -> str:
    """The summaries as a table."""
    return table(["output", "type", "min", "mean", "max"], [[str(cell) for cell in row.values()] for row in rows])


def _spread(array: np.ndarray[Any, Any]) -> dict[str, float | None]:
    if array.size == 0:
        return {"min": None, "mean": None, "max": None}
    wide = array.astype(np.float64)
    return {"min": _short(wide.min()), "mean": _short(wide.mean()), "max": _short(wide.max())}


def _short(number: Any) -> float:
    return float(f"{float(number):.6g}")


def program_data(program: Program, gpu: Gpu | None = None) -> dict[str, Any]:
    """What a compiled program is, as plain data, with what a GPU at best takes for it; generated source is left out."""
    data = dataclasses.asdict(program.manifest)
    data.pop("sources")
    if gpu is not None:
        from rescompile.backends.roofline import as_data, roofline

        found = roofline(data["regions"], gpu)
        data["roofline"] = as_data(found)
        for region, prediction in zip(data["regions"], found.regions, strict=True):
            region["predicted"] = dataclasses.asdict(prediction)
    return data


def predicted_gpu(targets: Sequence[CompileTarget], name: str | None) -> Gpu | None:
    """The GPU to predict times for: the named one, else the first known of the last target's; None for a CPU.

    RescompileError where a GPU is named that no target is for.
    """
    from rescompile.backends.roofline import gpu_of, named_gpu

    target = targets[-1]
    if target.name.startswith("rocm:"):
        return gpu_of(target.name.removeprefix("rocm:"), name)
    if target.arch is None:
        if name is not None:
            raise RescompileError(f"Times are predicted for GPUs, and '{target.name}' is none: leave --gpu out.")
        return None
    if name is not None:
        arch = named_gpu(name).arch
        target = next((one for one in targets if one.arch == arch), target)
    return gpu_of(str(target.arch), name)


def describe(program: Program, path: Path) -> str:
    """What a compiled program is, and where it lies, as text."""
    manifest = program.manifest
    lines = [f"{path} for {manifest.target}, {path.stat().st_size / 2**20:.1f} MiB"]
    for title, infos in (("input", manifest.inputs), ("output", manifest.outputs)):
        lines += [f"  {title:<7}{info.name}: {print_type(tuple(info.shape), info.dtype)}" for info in infos]
    kernels = Counter(str(region.get("kernel", "other")) for region in manifest.regions)
    listed = ", ".join(f"{count} {kernel}" for kernel, count in kernels.most_common())
    lines.append(f"  regions: {listed}")
    if manifest.codes:
        lines += [f"  code for {_code(code)}" for code in manifest.codes]
        lines.append(
            f"  memory: {_bytes(manifest.storage.get('weights'))} of weights, {_activations(manifest.storage)}"
        )
    if manifest.note:
        lines.append(f"  {manifest.note}")
    return "\n".join(lines)


def _code(code: Code) -> str:
    """One library of a program for GPUs, as text."""
    form = {"cubin": "", "ptx": " and later, as PTX", "cuda": ", as CUDA source"}[code.form]
    sizes = "".join(f", {name} = {size}" for name, size in code.extents.items())
    return f"{code.arch}{form}{sizes}"


def _activations(storage: dict[str, int | None]) -> str:
    peak, apart = storage.get("activations"), storage.get("activations_unshared")
    if peak is None:
        return "activations as the extents of the inputs ask for"
    return f"{_bytes(peak)} of activations in {storage.get('tensors')} tensors ({_bytes(apart)} if none shared memory)"


def _bytes(count: int | None) -> str:
    return f"{(count or 0) / 2**20:.1f} MiB"


def explained(program: Program, gpu: Gpu | None) -> str:
    """The regions of a program as a table: on a GPU what bounds them, on a processor what was measured of them."""
    regions = [region for region in program.explain() if region.get("calls", 1)]
    if gpu is None:
        rows = [[*_common(region), _number(region.get("microseconds"), 1.0), _rate(region)] for region in regions]
        return table(["region", "kernel", "calls", "MB", "MFLOP", "µs", "GFLOP/s"], rows)
    from rescompile.backends.roofline import roofline

    found = roofline(regions, gpu)
    rows = [
        [*_common(region), prediction.bound, _number(prediction.microseconds, 1.0)]
        for region, prediction in zip(regions, found.regions, strict=True)
    ]
    lines = [table(["region", "kernel", "calls", "MB", "MFLOP", "bound", "µs"], rows)]
    shares = ", ".join(f"{bound} {share:.0%}" for bound, share in found.bound.items())
    lines.append(
        f"at best {found.microseconds:.0f} µs on an {gpu.name} ({found.bytes / 1e6:.1f} MB, {found.flops / 1e9:.2f} "
        f"GFLOP; time by bound: {shares or 'none'}), predicted from {gpu.source}"
    )
    if found.unknown:
        lines.append(f"without {found.unknown} regions whose extents are dynamic: compile with fixed ones to see them")
    return "\n".join(lines)


def _common(region: dict[str, Any]) -> list[str]:
    # The tile's extents are in the JSON.
    tile, kernel = str(region.get("tile", "")).partition("(")[0], str(region.get("kernel", ""))
    return [
        str(region.get("name", "")),
        tile if kernel in ("generated", tile.split(" ")[0]) else f"{kernel} {tile}".strip(),
        str(region.get("calls", 1)),
        _number(region.get("bytes"), 1e6),
        _number(region.get("flops"), 1e6),
    ]


def _rate(region: dict[str, Any]) -> str:
    flops, microseconds = region.get("flops"), region.get("microseconds")
    return f"{flops / microseconds / 1e3:.0f}" if flops and microseconds else "-"


def _number(value: float | None, unit: float) -> str:
    return "-" if value is None else f"{value / unit:.2f}"
