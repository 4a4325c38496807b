"""Where the elements of a contraction's operand come from: a matrix as it lies, or an image whose windows are rows.

A source computes once, in `place`, where each of a thread's accesses begins, and says in `access` where it reads in a
step along the sum. Rows past the end read the last one again: what is computed from them is not written. Terms past the
end of the sum, and pixels outside an image, are zeros.
"""

from __future__ import annotations

from typing import Any

import tvm
from tvm.tirx.script.builder import ir as T

from rescompile.backends.cuda.contraction import ContractionSpec
from rescompile.backends.cuda.rows import local, store

Expr = Any  # tvm.tirx expressions, buffers and Python integers alike


class MatrixSource:
    """element[outer, k] of a matrix: outer·stride + k (`depth_last`) or k·stride + outer from `base` on.

    `stride` None: rows follow each other.
    """

    def __init__(
        self,
        buffer: Expr,
        base: Expr,
        first: Expr,
        extent: Expr,
        depth: int,
        depth_last: bool,
        wide: bool,
        stride: Expr = None,
    ) -> None:
        self.buffer, self.base, self.first, self.extent = buffer, base, first, extent
        self.stride = stride if stride is not None else depth if depth_last else extent
        self.depth, self.depth_last, self.kind = depth, depth_last, "int64" if wide else "int32"

    def begin(self, accesses: int, step: int, vector: int) -> None:
        """`step`: terms of the sum in a step."""
        self.step, self.vector = step, vector
        self.offsets = local(accesses, self.kind)

    def place(self, index: int, row: Expr, element: Expr) -> None:
        """Compute where an access begins: `row` of the tile, `element` of the row."""
        if self.depth_last:
            outer = _least(self.first + row, self.extent - 1)
            offset = as_kind(outer, self.kind) * self.stride + element
        else:
            outer = _least(self.first + element, self.extent - self.vector)
            offset = as_kind(row, self.kind) * self.stride + outer
        store(self.offsets, as_kind(self.base + offset, self.kind), index)

    def advance(self, step: Expr, element: Expr | None) -> None:
        """Compute what all accesses of a step share."""
        first = as_kind(step, self.kind) * self.step
        self.shift = first if self.depth_last else first * self.stride

    def access(self, index: int, row: Expr, element: Expr, step: Expr) -> tuple[Expr, Expr]:
        """Where an access reads, and whether that is inside; None: always."""
        term = element if self.depth_last else row
        inside = step * self.step + term < self.depth if self.depth % self.step else None
        return self.offsets[index] + self.shift, inside


class ImageSource:
    """element[pixel, (kh, kw, c)] = x[image, oh·stride + kh·dilation − pad, ow·stride + kw·dilation − pad, c]"""

    def __init__(self, spec: ContractionSpec, buffer: Expr, group: Expr, first: Expr, extent: Expr, wide: bool) -> None:
        if spec.conv is None:
            raise TypeError("a product of matrices has no image")
        self.spec, self.conv, self.buffer = spec, spec.conv, buffer
        self.group, self.first, self.extent = group, first, extent
        self.kind = "int64" if wide else "int32"
        self.channels = spec.depth // spec.conv.taps
        top, left, bottom, right = spec.conv.pads
        self.padded = bool(top or left or bottom or right)

    def begin(self, accesses: int, step: int, vector: int) -> None:
        """`step`: terms of the sum in a step."""
        self.step = step
        self.offsets = local(accesses, self.kind)
        if self.padded:
            # A bit for each column and each row of the kernel: whether it meets the image.
            self.meets = local(accesses, "int32")
        # Of the tap that is read, for all accesses of a step where they share it: its bits, and where its channel is.
        self.tap = local(2, "int32")

    def place(self, index: int, row: Expr, element: Expr) -> None:
        """Compute where the window of a row begins."""
        conv, total = self.conv, self.channels * self.spec.groups
        pixel = _least(self.first + row, self.extent - 1).astype("int32")
        image, rest = pixel // conv.pixels, pixel % conv.pixels
        top = rest // conv.out_width * conv.stride[0] - conv.pads[0]
        left = rest % conv.out_width * conv.stride[1] - conv.pads[1]
        if self.padded:
            store(self.meets, self._meets(top, left), index)
        offset = as_kind(image, self.kind) * (conv.height * conv.width * total)
        offset = offset + ((top * conv.width + left) * total + self.group * self.channels)
        store(self.offsets, as_kind(offset, self.kind), index)

    def advance(self, step: Expr, element: Expr | None) -> None:
        """Find the tap of a step; `element` None where a thread's accesses are of several."""
        if element is not None:
            self._find(step, element)

    def _find(self, step: Expr, element: Expr) -> None:
        conv, channels = self.conv, self.channels
        if channels % self.step == 0:
            each = channels // self.step
            tap, channel = step // each, step % each * self.step + element
        else:
            term = step * self.step + element
            tap, channel = term // channels, term % channels
        down, across = tap // conv.kernel[1], tap % conv.kernel[1]
        one = tvm.tirx.const(1, "int32")
        store(self.tap, (one << across) | (one << (down + conv.kernel[1])), 0)
        pixel = down * (conv.dilation[0] * conv.width) + across * conv.dilation[1]
        store(self.tap, pixel * (channels * self.spec.groups) + channel, 1)

    def _meets(self, top: Expr, left: Expr) -> Expr:
        conv = self.conv
        total: Expr = 0
        for start, extent, count, dilation, first in (
            (left, conv.width, conv.kernel[1], conv.dilation[1], 0),
            (top, conv.height, conv.kernel[0], conv.dilation[0], conv.kernel[1]),
        ):
            for tap in range(count):
                at = start + tap * dilation
                bit = tvm.tirx.const(1 << (first + tap), "int32")
                here = tvm.tirx.all(at >= 0, at < extent)
                total = total + tvm.tirx.Select(here, bit, tvm.tirx.const(0, "int32"))
        return total

    def access(self, index: int, row: Expr, element: Expr, step: Expr) -> tuple[Expr, Expr]:
        """Where an access reads, and whether that is inside; None: always."""
        conditions = []
        if self.spec.depth % self.step:
            conditions.append(step * self.step + element < self.spec.depth)
        if self.padded:
            conditions.append(tvm.tirx.EQ(self.meets[index] & self.tap[0], self.tap[0]))
        inside = None
        for condition in conditions:
            inside = condition if inside is None else tvm.tirx.all(inside, condition)
        return self.offsets[index] + self.tap[1], inside


def as_kind(value: Expr, dtype: str) -> Expr:
    """An index in another type."""
    return tvm.tirx.const(value, dtype) if isinstance(value, int) else value.astype(dtype)


def _least(value: Expr, bound: Expr) -> Expr:
    return T.min(value, bound)
