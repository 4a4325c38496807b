"""Timing several runtimes beside each other, fairly: interleaved in blocks.

A runtime's idle threads may spin into the next call of another one, which then takes twice as long. So each block
begins with a pause and calls that do not count, and the candidates take turns, in a new order every round.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping


def measure(
    calls: Mapping[str, Callable[[], object]],
    *,
    rounds: int = 12,
    discarded: int = 2,
    timed: int = 5,
    pause: float = 0.05,
) -> dict[str, list[float]]:
    """Seconds of every timed call, by candidate: `rounds` blocks of `timed` calls each, `pause` seconds before each."""
    order = list(calls)
    shuffle = random.Random(0).shuffle
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        shuffle(order)
        for name in order:
            call = calls[name]
            time.sleep(pause)
            for _ in range(discarded):
                call()
            for _ in range(timed):
                start = time.perf_counter()
                call()
                seconds[name].append(time.perf_counter() - start)
    return seconds
