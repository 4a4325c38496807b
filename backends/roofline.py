"""What a GPU at best takes for a region: the longest of moving its bytes, of its arithmetic, of starting a kernel.

    t(region) = max(bytes / bandwidth, flops / rate of the unit that computes it, launch)        t(program) = Σ calls·t

Peaks are those of the makers' data sheets, without sparsity. What is attained of them was measured on an H200 (a copy
reads and writes 4.3 TB/s, a product of 16-bit matrices runs at 790 TFLOP/s); of other GPUs the same shares are assumed.
Bytes are those of the region's buffers, each moved once: what the L2 cache holds between two kernels counts, too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rescompile.errors import RescompileError, nearest

NARROW = ("float16", "bfloat16")
# Attained on an H200 of its data sheet's 4.8 TB/s and 989 TFLOP/s.
BANDWIDTH_SHARE, TENSOR_SHARE, VECTOR_SHARE = 4.3 / 4.8, 790 / 989, 0.9
LAUNCH = 2e-6  # seconds from one kernel to the next inside of a CUDA graph
_TENSOR_WORDS = ("mma", "wgmma", "library", "TensorCoreProduct")


@dataclass(frozen=True)
class Gpu:
    """Peaks of one GPU: bytes and operations a second, dense; `tensor16` sums in float32. 0: there is no such unit."""

    name: str
    arch: str
    bandwidth: float
    tensor16: float
    tensor32: float  # tf32, or what the maker calls so
    vector32: float
    source: str
    copy: float | None = None  # bytes a second that a copy was measured at, read and written
    product: float | None = None  # operations a second that a product of 16-bit matrices was measured at

    @property
    def attained_bandwidth(self) -> float:
        """Bytes a second that a kernel can hope for."""
        return self.copy or self.bandwidth * BANDWIDTH_SHARE

    def rate(self, dtype: str, *, tensor: bool) -> float:
        """Operations a second that a kernel can hope for, on tensor cores or beside them."""
        if dtype == "float64":
            return self.vector32 / 2 * VECTOR_SHARE
        peak = (self.tensor16 if dtype in NARROW else self.tensor32) if tensor else 0.0
        if not peak:
            return self.vector32 * VECTOR_SHARE
        share = self.product / self.tensor16 if self.product else TENSOR_SHARE
        return peak * share


def _gpu(name: str, arch: str, bandwidth: float, tensor16: float, tensor32: float, vector32: float, sheet: str) -> Gpu:
    """GB/s and TFLOP/s into bytes and operations a second."""
    tera = (tensor16 * 1e12, tensor32 * 1e12, vector32 * 1e12)
    measured = {"copy": 4.3e12, "product": 790e12} if name == "H200" else {}
    return Gpu(name, arch, bandwidth * 1e9, *tera, sheet, **measured)


# The first of an architecture stands for it where no name is given.
GPUS = {
    gpu.name: gpu
    for gpu in (
        _gpu("A100", "sm_80", 2039, 312, 156, 19.5, "NVIDIA A100 80GB data sheet, SXM"),
        _gpu("A100-PCIe", "sm_80", 1935, 312, 156, 19.5, "NVIDIA A100 80GB data sheet, PCIe"),
        _gpu("A30", "sm_80", 933, 165, 82, 10.3, "NVIDIA A30 data sheet"),
        _gpu("A10", "sm_86", 600, 125, 62.5, 31.2, "NVIDIA A10 data sheet"),
        _gpu("RTX3090", "sm_86", 936, 71, 35.6, 35.6, "NVIDIA Ampere GA102 white paper"),
        _gpu("L40S", "sm_89", 864, 362, 183, 91.6, "NVIDIA L40S data sheet"),
        _gpu("L4", "sm_89", 300, 121, 60, 30.3, "NVIDIA L4 data sheet, without sparsity"),
        _gpu("RTX4090", "sm_89", 1008, 165.2, 82.6, 82.6, "NVIDIA Ada GPU architecture white paper"),
        _gpu("H200", "sm_90", 4800, 989, 494.5, 67, "NVIDIA H200 data sheet, SXM; copy and product measured"),
        _gpu("H100", "sm_90", 3350, 989, 494.5, 67, "NVIDIA H100 data sheet, SXM"),
        _gpu("H100-PCIe", "sm_90", 2000, 756, 378, 51, "NVIDIA H100 data sheet, PCIe"),
        _gpu("H100-NVL", "sm_90", 3900, 835, 417.5, 60, "NVIDIA H100 data sheet, NVL"),
        _gpu("B200", "sm_100", 8000, 2250, 1125, 75, "NVIDIA DGX B200 data sheet, an eighth"),
        _gpu("RTX5090", "sm_120", 1792, 209.5, 104.8, 104.8, "NVIDIA RTX Blackwell white paper"),
        _gpu("MI250X", "gfx90a", 1638, 191.5, 0, 23.9, "AMD Instinct MI250X data sheet, one of two dies"),
        _gpu("MI300X", "gfx942", 5300, 1307.4, 653.7, 163.4, "AMD Instinct MI300X data sheet"),
        _gpu("RX7900XTX", "gfx1100", 960, 122.8, 0, 61.4, "AMD Radeon RX 7900 XTX specifications"),
    )
}


@dataclass(frozen=True)
class Prediction:
    """One region on one GPU.

    Attributes:
        bound: memory, tensor cores, vector units or launch: what takes longest; "unknown" where extents are dynamic.
        microseconds: of one call; None where they are.
        intensity: operations a byte.
    """

    bound: str
    microseconds: float | None
    intensity: float | None = None


def named_gpu(name: str) -> Gpu:
    """The GPU of that name, upper or lower case; RescompileError, with the nearest name, when there is none."""
    plain = {known.lower(): gpu for known, gpu in GPUS.items()}
    wanted = name.lower().replace(" ", "").replace("_", "-")
    if wanted not in plain:
        raise RescompileError(
            f"There are no peaks of a GPU '{name}'{nearest(name, GPUS)}: use one of {', '.join(GPUS)}."
        )
    return plain[wanted]


def gpu_of(arch: str, name: str | None = None) -> Gpu | None:
    """The GPU to predict for: the one that is named, else the first of the architecture, None where none is known.

    RescompileError when the name is of another architecture.
    """
    if name is None:
        plain = arch.rstrip("af") if arch.startswith("sm_") else arch
        return next((gpu for gpu in GPUS.values() if gpu.arch == plain), None)
    gpu = named_gpu(name)
    if gpu.arch != arch.rstrip("af") and gpu.arch != arch:
        raise RescompileError(
            f"{gpu.name} is of architecture {gpu.arch}, and the program is for {arch}: compile it for {gpu.arch}, or "
            f"name one of {', '.join(known for known, other in GPUS.items() if other.arch == arch.rstrip('af'))}."
        )
    return gpu


def predict(region: Mapping[str, Any], gpu: Gpu) -> Prediction:
    """A region's entry, as in a program's manifest, on a GPU."""
    moved, flops = region.get("bytes"), region.get("flops") or 0
    if moved is None:
        return Prediction("unknown", None)
    tensor = str(region.get("tile", "")).split(" ")[0] in _TENSOR_WORDS
    times = {
        "memory": moved / gpu.attained_bandwidth,
        "tensor cores" if tensor else "vector units": flops / gpu.rate(str(region.get("dtype", "")), tensor=tensor),
        "launch": LAUNCH,
    }
    bound = max(times, key=lambda name: times[name])
    return Prediction(bound, round(times[bound] * 1e6, 2), round(flops / moved, 2) if moved else None)


@dataclass(frozen=True)
class Roofline:
    """A program on a GPU: a prediction for each region, in their order, and sums over all calls of those known."""

    gpu: Gpu
    regions: tuple[Prediction, ...]
    microseconds: float
    bytes: int
    flops: int
    bound: dict[str, float]  # shares of the time by what it is bound by
    unknown: int  # regions whose extents are dynamic


def roofline(regions: Sequence[Mapping[str, Any]], gpu: Gpu) -> Roofline:
    """A program's regions on a GPU."""
    predictions = [predict(region, gpu) for region in regions]
    spent: dict[str, float] = {}
    total, moved, flops = 0.0, 0, 0
    for region, prediction in zip(regions, predictions, strict=True):
        calls = int(region.get("calls", 1))
        if prediction.microseconds is None:
            continue
        spent[prediction.bound] = spent.get(prediction.bound, 0.0) + calls * prediction.microseconds
        total += calls * prediction.microseconds
        moved += calls * int(region.get("bytes") or 0)
        flops += calls * int(region.get("flops") or 0)
    unknown = sum(prediction.microseconds is None for prediction in predictions)
    shares = {bound: round(time / total, 3) for bound, time in sorted(spent.items(), key=lambda part: -part[1])}
    return Roofline(gpu, tuple(predictions), round(total, 1), moved, flops, shares, unknown)


def as_data(found: Roofline) -> dict[str, Any]:
    """The prediction as plain data, without the regions'."""
    return {
        "gpu": found.gpu.name,
        "source": found.gpu.source,
        "microseconds": found.microseconds,
        "bytes": found.bytes,
        "flops": found.flops,
        "bound": found.bound,
        "unknown": found.unknown,
    }
