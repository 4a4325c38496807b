"""A stand-in for a GPU's clock: torch tensors on the processor, and seconds that somebody made up."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from rescompile.backends.cuda.device import Call, Timing, relative_gap

FACTS = {"device": "made up", "arch": "sm_90", "driver": "0", "cuda": "0", "torch": "0"}


class MadeUpDevice:
    """Runs every call once, and says that it took what `seconds` says of its number."""

    def __init__(
        self, seconds: Callable[[int], Timing | None] | Sequence[float], facts: dict[str, str] = FACTS
    ) -> None:
        self.seconds = seconds if callable(seconds) else lambda index: Timing(seconds[index])
        self.facts = facts
        self.cache_bytes = 1 << 12
        self.timed = 0
        self.broken = False

    def tensor(self, shape: Sequence[int], dtype: str, seed: int, scale: float = 1.0) -> Any:
        kind = getattr(torch, dtype)
        random = torch.Generator().manual_seed(seed)
        if not kind.is_floating_point:
            return torch.rand(*shape, generator=random) < 0.5 if kind is torch.bool else torch.zeros(*shape, dtype=kind)
        return (torch.randn(*shape, generator=random) * scale).to(kind)

    def blank(self, shape: Sequence[int], dtype: str) -> Any:
        return torch.full(tuple(shape), float("nan"), dtype=getattr(torch, dtype))

    def twin(self, tensor: Any) -> Any:
        return tensor.clone()

    def gap(self, tensor: Any, reference: Any) -> float:
        return relative_gap(tensor, reference)

    def torch(self, tensor: Any) -> Any:
        return tensor

    def healthy(self) -> bool:
        return not self.broken

    def times(self, calls: Sequence[Call], copies: int) -> list[Timing | None]:
        self.timed += 1
        for call in calls:
            for copy in range(copies):
                call(copy)
        return [self.seconds(index) for index in range(len(calls))]
