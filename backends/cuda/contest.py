"""Candidates of one region against each other on a device: the same random buffers, the same judge, the same clock.

Neither TVM nor the modules that make kernels are needed: a spec is plain data (`reference.described`), a candidate is
a function of its buffers. So the same code decides while a model is compiled, and on a machine that has nothing but
torch and kernels that were compiled elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any, Protocol, TypeAlias

from rescompile.backends.cuda import reference
from rescompile.backends.cuda.device import Device, Timing, rotations

DYNAMIC_EXTENT = 4096  # what an extent that is known at run time only is timed at
DYNAMIC_EXTENTS = 64  # what several of them are
TOLERANCE = {"float64": 1e-10, "float32": 1e-4, "float16": 1e-2, "bfloat16": 5e-2}
TF32 = 4e-3  # of products whose factors are rounded to 10 bits
BYTES = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2, "int64": 8, "int32": 4, "bool": 1}

Function: TypeAlias = Callable[..., object]  # takes the buffers in order


class Buffer(Protocol):
    """One buffer of a region: a shape with None for a dynamic extent."""

    @property
    def name(self) -> str:
        """Its name."""

    @property
    def shape(self) -> tuple[int | None, ...]:
        """Its extents."""

    @property
    def dtype(self) -> str:
        """Its element type."""

    @property
    def output(self) -> bool:
        """Whether it is written."""


@dataclass(frozen=True)
class Verdict:
    """What became of a candidate: its time, or why it may not win; the largest relative gap of each of its outputs."""

    label: str
    timing: Timing | None = None
    refused: str = ""
    gaps: Mapping[str, float] = field(default_factory=dict)


def contest(
    spec: reference.Plain, buffers: Buffers, entrants: Sequence[tuple[str, Function | None]], device: Device
) -> list[Verdict]:
    """Compare candidates with the reference, and time those that agree; None stands for one that does not build."""
    judge = Judge(spec, buffers, device)
    judged = [
        Verdict(label, refused="does not build") if function is None else judge.verdict(label, function)
        for label, function in entrants
    ]
    right = [
        function
        for (_, function), verdict in zip(entrants, judged, strict=True)
        if function is not None and not verdict.refused
    ]
    timings = iter(device.times([buffers.call(function) for function in right], buffers.copies))
    found = []
    for verdict in judged:
        timing = None if verdict.refused else next(timings)
        refused = verdict.refused or ("" if timing is not None else "fails when it is called again and again")
        found.append(Verdict(verdict.label, timing, refused, verdict.gaps))
    return found


class Buffers:
    """Random inputs and blank outputs of one spec, in several copies that together exceed the cache."""

    def __init__(self, described: Sequence[Buffer], device: Device) -> None:
        self.described = list(described)
        self.device = device
        self.shapes = shapes(described)
        self.copies = rotations(bytes_of(described), device.cache_bytes)
        first = [self._made(buffer, seed) for seed, buffer in enumerate(described)]
        self.sets = [first]
        for _ in range(self.copies - 1):
            self.sets.append([device.twin(tensor) for tensor in first])

    def __getitem__(self, copy: int) -> list[Any]:
        return self.sets[copy]

    @property
    def inputs(self) -> dict[str, Any]:
        """The first copy's inputs by name."""
        return {part.name: t for part, t in zip(self.described, self.sets[0], strict=True) if not part.output}

    @property
    def outputs(self) -> dict[str, Any]:
        """The first copy's outputs by name."""
        return {part.name: t for part, t in zip(self.described, self.sets[0], strict=True) if part.output}

    def call(self, function: Function) -> Callable[[int], object]:
        """The function on the buffers of a copy."""
        return lambda copy: function(*self.sets[copy])

    def wipe(self) -> None:
        """Fresh blank outputs in the first copy: what the next candidate does not write shows."""
        for index, part in enumerate(self.described):
            if part.output:
                self.sets[0][index] = self.device.blank(self.shapes[index], part.dtype)

    def _made(self, buffer: Buffer, seed: int) -> Any:
        shape = self.shapes[seed]
        if buffer.output:
            return self.device.blank(shape, buffer.dtype)
        # Factors of a product are scaled so that its sums are of the size of one.
        scale = float(shape[-1]) ** -0.5 if buffer.name in ("b", "weight") and len(shape) > 1 else 1.0
        return self.device.tensor(shape, buffer.dtype, seed, scale)


class Judge:
    """Compares what candidates write with float64, or with the first that runs where torch does not know the spec."""

    def __init__(self, spec: reference.Plain, buffers: Buffers, device: Device) -> None:
        self.spec, self.buffers, self.device = spec, buffers, device
        inputs = {name: device.torch(tensor) for name, tensor in buffers.inputs.items()}
        self.want: dict[str, Any] | None = reference.evaluate(spec, inputs)
        self.by = "the float64 reference" if self.want is not None else "the first candidate"

    def verdict(self, label: str, function: Function) -> Verdict:
        """Whether a candidate may win."""
        self.buffers.wipe()
        try:
            function(*self.buffers[0])
            found = self.buffers.outputs
            if self.want is None:
                self.want = {name: self.device.twin(tensor) for name, tensor in found.items()}
            gaps = {name: self.device.gap(tensor, self.want[name]) for name, tensor in found.items()}
        except (RuntimeError, ValueError, TypeError) as error:  # torch's and TVM's own errors
            lines = str(error).strip().splitlines()
            return Verdict(label, refused=f"does not run: {lines[-1][:160] if lines else type(error).__name__}")
        for part in self.buffers.described:
            if part.output and not gaps[part.name] <= tolerance(self.spec, part.dtype):
                why = f"its '{part.name}' differs from {self.by} by {gaps[part.name]:.1e}"
                return Verdict(label, refused=why, gaps=gaps)
        return Verdict(label, gaps=gaps)


def tolerance(spec: reference.Plain, dtype: str) -> float:
    """The largest difference that a candidate's output may have, relative to the largest value."""
    products = spec.get("dtype") == "float32" and "depth" in spec
    return max(TOLERANCE.get(dtype, 0.0), TF32 if products else 0.0)


def shapes(buffers: Sequence[Buffer]) -> list[tuple[int, ...]]:
    """Shapes as they are timed: with a number for each extent that is known at run time only."""
    several = any(buffer.shape.count(None) > 1 for buffer in buffers)
    instead = DYNAMIC_EXTENTS if several else DYNAMIC_EXTENT
    return [tuple(instead if extent is None else extent for extent in buffer.shape) for buffer in buffers]


def bytes_of(buffers: Sequence[Buffer]) -> int:
    """Of all buffers, as they are timed."""
    return sum(prod(shape) * BYTES.get(buffer.dtype, 4) for buffer, shape in zip(buffers, shapes(buffers), strict=True))
