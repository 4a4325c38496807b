"""The inner kernel of every contraction: a block of pixels × lanes sums that never leaves the registers.

    acc[p][l] += x(p, k) * w(k, l)      for all k, then   y(p, l) = epilogue(acc[p][l])

One weight vector is loaded per step and used by all pixels; one value of x is broadcast and used by all lanes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack

from rescompile.backends.kernels.activations import activate
from rescompile.backends.kernels.emit import Expr, Flat, const, lanes, local, serial
from rescompile.backends.kernels.specs import Epilogue

Reader = Callable[[int, Sequence[Expr], Expr], Expr]


class RegisterTile:
    """`pixels` accumulators of `width` lanes each, zeroed.

    A buffer per pixel rather than one for all: each stays far below the size that TVM would move to the heap.
    """

    def __init__(self, pixels: int, width: int, dtype: str) -> None:
        self.width, self.dtype = width, dtype
        self.sums: list[Flat] = [local(width, dtype) for _ in range(pixels)]
        for total in self.sums:
            with lanes(width) as lane:
                total.store(lane, const(0.0, dtype))

    def accumulate(
        self, extents: Sequence[Expr], x: Reader, w: Callable[[Sequence[Expr], Expr], Expr], unroll: int = 4
    ) -> None:
        """Adds x(pixel, index, lane) * w(index, lane) over the box `extents`, the last axis unrolled."""
        *outer, inner = extents

        def step(index: Sequence[Expr]) -> None:
            for pixel, total in enumerate(self.sums):
                with lanes(self.width) as lane:
                    total.store(lane, total[lane] + x(pixel, index, lane) * w(index, lane))

        with ExitStack() as stack:
            prefix = [stack.enter_context(serial(extent)) for extent in outer]
            full, rest = divmod(inner, unroll)
            if full == 1:
                full, rest = 0, inner
            if full:
                with serial(full) as block:
                    for offset in range(unroll):
                        step([*prefix, block * unroll + offset])
            for offset in range(inner - rest, inner):
                step([*prefix, offset])

    def store(
        self,
        epilogue: Epilogue,
        width: int,
        y: Callable[[int, Expr, Expr], None],
        bias: Callable[[Expr], Expr] | None = None,
        residual: Callable[[int, Expr], Expr] | None = None,
    ) -> None:
        """Hands y(pixel, lane, value) the finished values of the first `width` lanes."""
        for pixel, total in enumerate(self.sums):
            with lanes(width) as lane:
                value = total[lane]
                if epilogue.bias and bias is not None:
                    value = value + bias(lane)
                value = activate(epilogue.inner, value, self.dtype)
                if epilogue.residual and residual is not None:
                    value = residual(pixel, lane) + value
                y(pixel, lane, activate(epilogue.outer, value, self.dtype))


def pixels_for(extent: int, most: int, preferred: int) -> int:
    """Tile length that covers `extent` with little overlap: the last tile is moved back to end at the edge.

    >>> pixels_for(56, 12, 8), pixels_for(14, 12, 8), pixels_for(10, 12, 8), pixels_for(3, 12, 8)
    (8, 7, 10, 3)
    """

    def rate(pixels: int) -> float:
        useful = extent / (-(-extent // pixels) * pixels)
        # A short tile reloads the weights for little work; beyond the preferred length little more is gained.
        loads = pixels / (pixels + 1.0)
        return useful * loads - 0.004 * max(0, pixels - preferred)

    return max(range(1, min(extent, most) + 1), key=rate)
