"""Which kernels a program calls, and with which tiles."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from rescompile.backends.kernels import Choice, Machine, Spec, Tile, arguments, candidates, choose
from rescompile.backends.reports import Region


class KernelSet:
    """The kernels of one program. Emission first records what it needs; once tiles are chosen, it runs again."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.wanted: dict[Spec, None] = {}
        self.choices: dict[Spec, Choice] = {}

    def tile(self, spec: Spec) -> Tile:
        """The chosen tile, before the choice the best guess."""
        self.wanted.setdefault(spec)
        if spec in self.choices:
            return self.choices[spec].tile
        return candidates(spec, self.machine)[0]

    def family(self, spec: Spec) -> str:
        """conv, linear, attention, norm, softmax, pool, globalmean or layout."""
        return type(spec).__name__.removesuffix("Spec").lower()

    def shapes(self, spec: Spec) -> dict[str, tuple[tuple[int, ...], str]]:
        """Shape and dtype of the kernel's buffers of static shape, by name."""
        found = {}
        for buffer in arguments(spec, self.tile(spec)):
            static = tuple(extent for extent in buffer.shape if extent is not None)
            if len(static) == len(buffer.shape):
                found[buffer.name] = (static, buffer.dtype)
        return found

    def packing(self, spec: Spec) -> str:
        """What the packed form of a weight depends on, as text."""
        return f"{spec.dtype}{self.shapes(spec)['weight'][0]}"

    def called(self, regions: Mapping[str, Region]) -> dict[str, tuple[Spec, Tile]]:
        """Spec and tile of each kernel of a program, by the name of its function."""
        specs = {str(spec): spec for spec in self.wanted}
        found = {name: specs[region.spec] for name, region in regions.items() if region.spec in specs}
        return {name: (spec, self.tile(spec)) for name, spec in found.items()}

    def choose(self, cache_dir: str | Path | None, budget_s: float | None) -> None:
        """Take remembered tiles, or time the candidates of the kernels that are wanted."""
        self.choices = choose(self.wanted, self.machine, cache_dir, budget_s)
