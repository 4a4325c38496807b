"""The ways through a residual network and how long they are (Veit, Wilber and Belongie 2016).

```
P(block) = 1 + c·z·P(its branch)      P(branch) = Π P(block nested in it)      P(network) = Π P(outermost block)
```

The coefficient of zᵏ counts the ways that take k branches; c is the number of branches of a parallel block, 1 of any
other. n plain blocks make 2ⁿ ways with lengths of Binomial(n, ½). A shortcut has length 0 whatever it does: also a
projection, which is a skip though not a free one (what it costs is told with the depth and the costs). A gate, a
concatenation and a long skip are ways like any sum. `branches` blocks have no skip and count as nothing.
"""

from __future__ import annotations

import heapq
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from rescompile.blocks import Block

    Array = np.ndarray[Any, np.dtype[np.float64]]

_TAIL = 1e-12  # shares below are left out at both ends
_EXACT = 1000.0  # log2 of counts beyond which 1 + n is n
_DIRECT = 64  # lengths of the shorter factor up to which products are summed directly


@dataclass(frozen=True, eq=False)
class Lengths:
    """How long the ways are: `shares[i]` is the share of the ways that take `first` + i branches.

    `log2_count`: how many ways there are, as log2. `mean`: their mean length, without the tails left out of `shares`.
    """

    log2_count: float
    mean: float
    first: int
    shares: Array

    def share(self, low: int, high: int) -> float:
        """The share of the ways that take `low` to `high` branches, both included (Veit's effective ways)."""
        start, stop = max(low - self.first, 0), max(high - self.first + 1, 0)
        return float(self.shares[start:stop].sum())

    def central(self, share: float = 0.95) -> tuple[int, int]:
        """The lengths between which that share of the ways lies, as much above it as below."""
        cumulated = np.cumsum(self.shares)
        tail = (1.0 - share) / 2.0
        low = int(np.searchsorted(cumulated, tail + _TAIL))
        high = int(np.searchsorted(cumulated, 1.0 - tail - _TAIL))
        last = len(self.shares) - 1
        return self.first + min(low, last), self.first + min(high, last)

    @cached_property
    def deviation(self) -> float:
        """Standard deviation of the length."""
        lengths = self.first + np.arange(len(self.shares))
        return math.sqrt(float((self.shares * (lengths - self.mean) ** 2).sum()))


def path_lengths(blocks: Sequence[Block], uncounted: Iterable[str] = ("branches",)) -> Lengths:
    """The ways through the network that the blocks make up; ids ascend from nested blocks to those around them."""
    skipless = frozenset(uncounted)
    plain: dict[int | None, Counter[int]] = {}  # blocks without nested ones, by parent: how many of c branches
    inner: dict[int | None, list[Lengths]] = {}
    for block in blocks:
        nested = block.id in inner or block.id in plain
        if block.kind not in skipless and not nested:
            plain.setdefault(block.parent, Counter())[block.branch_count] += 1
            continue
        ways = _series(inner.pop(block.id, []), plain.pop(block.id, Counter()))
        if block.kind not in skipless:
            ways = _with_skip(ways, block.branch_count)
        inner.setdefault(block.parent, []).append(ways)
    return _series(inner.get(None, []), plain.get(None, Counter()))


def _with_skip(branch: Lengths, count: int) -> Lengths:
    """1 + c·z·P"""
    log_ways = branch.log2_count + math.log2(count)
    share = 1.0 / (1.0 + 2.0 ** -min(log_ways, _EXACT))
    total = log_ways + math.log2(1.0 + 2.0**-log_ways) if log_ways < _EXACT else log_ways
    mean = share * (1.0 + branch.mean)
    if 1.0 - share < _TAIL:
        return Lengths(total, mean, branch.first + 1, branch.shares)
    shares = np.zeros(branch.first + 1 + len(branch.shares))
    shares[0] = 1.0 - share
    shares[branch.first + 1 :] = share * branch.shares
    return _trimmed(total, mean, 0, shares)


def _series(factors: list[Lengths], plain: Counter[int]) -> Lengths:
    """The product of the factors and of plain blocks (1 + c·z)ⁿ, the small ones first."""
    everything = [*factors, *(_binomial(number, branches) for branches, number in plain.items())]
    if not everything:
        return Lengths(0.0, 0.0, 0, np.ones(1))
    heap = [(len(ways.shares), index, ways) for index, ways in enumerate(everything)]
    heapq.heapify(heap)
    count = len(heap)
    while len(heap) > 1:
        left, right = heapq.heappop(heap)[2], heapq.heappop(heap)[2]
        product = _trimmed(
            left.log2_count + right.log2_count,
            left.mean + right.mean,
            left.first + right.first,
            _convolved(left.shares, right.shares),
        )
        heapq.heappush(heap, (len(product.shares), count, product))
        count += 1
    return heap[0][2]


def _binomial(number: int, branches: int) -> Lengths:
    """(1 + c·z)ⁿ: Binomial(n, c / (c + 1)), from its mode outwards as far as shares matter."""
    chance = branches / (branches + 1.0)
    mean = number * chance
    reach = 9.0 * math.sqrt(mean * (1.0 - chance)) + 20.0
    low, high = max(0, math.floor(mean - reach)), min(number, math.ceil(mean + reach))
    mode = min(int((number + 1) * chance), number)
    lengths = np.arange(low, high, dtype=np.float64)
    steps = np.log((number - lengths) / (lengths + 1.0) * (chance / (1.0 - chance)))
    logs = np.concatenate(([0.0], np.cumsum(steps)))
    logs -= logs[mode - low]
    shares = np.exp(logs)
    return _trimmed(number * math.log2(branches + 1.0), mean, low, shares / shares.sum())


def _convolved(left: Array, right: Array) -> Array:
    if min(len(left), len(right)) <= _DIRECT:
        return np.convolve(left, right)
    size = len(left) + len(right) - 1
    spectrum = np.fft.rfft(left, size) * np.fft.rfft(right, size)
    return np.maximum(np.fft.irfft(spectrum, size), 0.0)


def _trimmed(log2_count: float, mean: float, first: int, shares: Array) -> Lengths:
    kept = np.flatnonzero(shares >= _TAIL)
    if len(kept):
        start, stop = int(kept[0]), int(kept[-1]) + 1
        first, shares = first + start, shares[start:stop]
    return Lengths(log2_count, mean, first, shares)
