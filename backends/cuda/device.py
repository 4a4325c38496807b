"""The GPU of this machine as a place to time kernels on: buffers, a clock, and what identifies it. torch, not TVM.

Calls are timed as a captured program runs them: `copies` launches on rotating sets of buffers, which together exceed
the L2 cache, are captured into one CUDA graph; its replays are timed between two events, in turns with those of the
other candidates; the median counts. What a launch costs the processor is measured beside it, for programs that are not
captured.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, Protocol, TypeAlias

from rescompile.errors import RescompileError

Call: TypeAlias = Callable[[int], object]  # enqueues one call on the buffers of that number

ROUNDS = 15
SAMPLE_SECONDS = 200e-6  # what is timed between two events lasts at least that long: they resolve half a microsecond
MOST_COPIES = 48
LEAST_COPIES = 2


@dataclass(frozen=True)
class Timing:
    """Seconds of one call: on the device, and of the processor to enqueue it."""

    device: float
    host: float = 0.0
    captured: bool = True  # whether the call could be captured into a CUDA graph

    def cost(self, *, captured: bool) -> float:
        """What the call takes in a program: nothing hides the processor's part where no graph is replayed."""
        return self.device if captured and self.captured else max(self.device, self.host)


class Device(Protocol):
    """Where candidates are timed."""

    @property
    def facts(self) -> dict[str, str]:
        """Name, architecture, driver and versions, for provenance."""

    @property
    def cache_bytes(self) -> int:
        """Size of the L2 cache."""

    def tensor(self, shape: Sequence[int], dtype: str, seed: int, scale: float = 1.0) -> Any:
        """Normally distributed values times `scale`; booleans are drawn evenly, integers are zero."""

    def blank(self, shape: Sequence[int], dtype: str) -> Any:
        """A buffer full of NaN (the largest value of an integer type): what nobody wrote shows."""

    def twin(self, tensor: Any) -> Any:
        """A copy of a tensor."""

    def gap(self, tensor: Any, reference: Any) -> float:
        """max |tensor − reference| / max |reference|; infinite where only one of them is NaN."""

    def torch(self, tensor: Any) -> Any:
        """A buffer as a torch tensor, sharing its memory, for a library."""

    def healthy(self) -> bool:
        """Whether the device still runs what this process gives it."""

    def times(self, calls: Sequence[Call], copies: int) -> list[Timing | None]:
        """Each call timed in turns with the others; None for one that fails."""


def relative_gap(tensor: Any, reference: Any) -> float:
    """max |tensor − reference| / max |reference| of torch tensors; infinite where only one of them is NaN."""
    found, want = tensor.double(), reference.double().to(tensor.device)
    if bool((found.isnan() != want.isnan()).any()):
        return float("inf")
    # Equal infinities differ by nothing, and so do two NaNs.
    difference = (found - want).abs().where(found != want, 0.0).nan_to_num(nan=0.0, posinf=float("inf"))
    largest = want.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0).abs().max()
    return float(difference.max() / largest.clamp_min(1e-30))


def rotations(total_bytes: int, cache_bytes: int) -> int:
    """How many sets of buffers of `total_bytes` together exceed twice the cache."""
    return max(LEAST_COPIES, min(MOST_COPIES, -(-2 * cache_bytes // max(1, total_bytes))))


class TorchDevice:
    """A CUDA device through torch."""

    def __init__(self, index: int = 0) -> None:
        """RescompileError where torch finds no CUDA device."""
        import torch

        if not torch.cuda.is_available():
            raise RescompileError("torch finds no CUDA device here: candidates cannot be timed.")
        self._torch = torch
        self.index = index
        self.properties = torch.cuda.get_device_properties(index)

    @property
    def facts(self) -> dict[str, str]:
        """Name, architecture, driver and versions."""
        torch, properties = self._torch, self.properties
        cudnn = torch.backends.cudnn.version()
        return {
            "device": str(properties.name),
            "arch": f"sm_{properties.major}{properties.minor}",
            "multiprocessors": str(properties.multi_processor_count),
            "driver": driver_version(),
            "cuda": str(torch.version.cuda),
            "cudnn": str(cudnn),
            "torch": str(torch.__version__),
            "python": platform.python_version(),
        }

    @property
    def cache_bytes(self) -> int:
        """Size of the L2 cache."""
        return int(getattr(self.properties, "L2_cache_size", 50 << 20))

    def tensor(self, shape: Sequence[int], dtype: str, seed: int, scale: float = 1.0) -> Any:
        """Normally distributed values times `scale`; booleans are drawn evenly, integers are zero."""
        torch = self._torch
        kind = getattr(torch, dtype)
        random = torch.Generator(device=f"cuda:{self.index}").manual_seed(seed)
        if not kind.is_floating_point:
            if kind is not torch.bool:
                return torch.zeros(*shape, dtype=kind, device=random.device)
            return torch.rand(*shape, generator=random, device=random.device) < 0.5
        values = torch.randn(*shape, generator=random, device=random.device) * scale
        return values.to(kind)

    def blank(self, shape: Sequence[int], dtype: str) -> Any:
        """A buffer full of NaN (the largest value of an integer type)."""
        torch = self._torch
        kind = getattr(torch, dtype)
        fill = float("nan") if kind.is_floating_point else True if kind is torch.bool else torch.iinfo(kind).max
        return torch.full(tuple(shape), fill, dtype=kind, device=f"cuda:{self.index}")

    def twin(self, tensor: Any) -> Any:
        """A copy of a tensor."""
        return tensor.clone()

    def gap(self, tensor: Any, reference: Any) -> float:
        """max |tensor − reference| / max |reference|; infinite where only one of them is NaN."""
        return relative_gap(tensor, reference)

    def torch(self, tensor: Any) -> Any:
        """The tensor itself."""
        return tensor

    def healthy(self) -> bool:
        """Whether the device still runs what this process gives it: some errors end its context."""
        try:
            self._torch.cuda.synchronize()
            return bool(self._torch.ones(1, device=f"cuda:{self.index}").item() == 1)
        except RuntimeError:
            return False

    def times(self, calls: Sequence[Call], copies: int) -> list[Timing | None]:
        """Each call timed in turns with the others; None for one that fails."""
        prepared = [self._prepared(call, copies) for call in calls]
        live = [entry for entry in prepared if entry is not None]
        samples: dict[int, list[float]] = {id(entry): [] for entry in live}
        for _ in range(ROUNDS):
            for entry in live:
                samples[id(entry)].append(entry.sample())
        return [
            None
            if entry is None
            else Timing(median(samples[id(entry)]), host=entry.host, captured=entry.graph is not None)
            for entry in prepared
        ]

    def _prepared(self, call: Call, copies: int) -> _Prepared | None:
        torch = self._torch
        try:
            for copy in range(copies):
                call(copy)
            torch.cuda.synchronize()
            start = time.perf_counter()
            for copy in range(copies):
                call(copy)
            host = (time.perf_counter() - start) / copies
            torch.cuda.synchronize()
        except (RuntimeError, ValueError, TypeError):  # torch's and TVM's own errors: this candidate does not run
            return None
        return _Prepared(torch, call, copies, host)


class _Prepared:
    """One candidate, warm, captured where it can be."""

    def __init__(self, torch: Any, call: Call, copies: int, host: float) -> None:
        self.torch, self.call, self.copies, self.host = torch, call, copies, host
        self.graph = self._captured()
        self.repeats = 1
        self.repeats = max(1, min(64, round(SAMPLE_SECONDS / max(self.sample() * copies, 1e-7))))

    def _captured(self) -> Any:
        torch = self.torch
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                self._enqueue()
        except RuntimeError:
            torch.cuda.synchronize()
            return None
        return graph

    def _enqueue(self) -> None:
        for copy in range(self.copies):
            self.call(copy)

    def sample(self) -> float:
        """Seconds of one call, over a few replays."""
        torch = self.torch
        run = self._enqueue if self.graph is None else self.graph.replay
        run()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(self.repeats):
            run()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3 / self.repeats / self.copies


def driver_version() -> str:
    """The version of NVIDIA's kernel driver; `unknown` where the system does not say."""
    try:
        with open("/proc/driver/nvidia/version", encoding="utf-8") as file:
            words = file.readline().split()
    except OSError:
        return _driver_by_nvml()
    return next((word for word in words if word[:1].isdigit() and "." in word), "unknown")


def _driver_by_nvml() -> str:
    import ctypes

    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return "unknown"
    text = ctypes.create_string_buffer(80)
    if nvml.nvmlInit_v2() or nvml.nvmlSystemGetDriverVersion(text, len(text)):
        return "unknown"
    return text.value.decode()


def here() -> TorchDevice | None:
    """The GPU of this machine; None where torch is not installed or finds none."""
    import importlib.util

    if importlib.util.find_spec("torch") is None:
        return None
    try:
        return TorchDevice()
    except RescompileError:
        return None
