"""Where the rows of a contraction's left operand come from: a matrix, or the pixels of an image.

A tile of a matrix is neighbouring rows. A tile of an image is a box of output pixels, (images, height, width) of it:
for each tap of the kernel the input pixels that it meets are a box, too, moved by the tap. TMA copies that, with zeros
where it lies outside of the image. Rows of a tile for which the box has no pixel are computed, and written nowhere.
"""

from __future__ import annotations

from functools import cache
from math import ceil
from typing import Any

import tvm

from rescompile.backends.cuda import hopper
from rescompile.backends.cuda.contraction import ContractionSpec, ConvGeometry
from rescompile.backends.cuda.epilogue import Call
from rescompile.backends.cuda.hopper import Panel
from rescompile.errors import RescompileError

Expr = Any

_IMAGES = 32  # that a dynamic count is taken for


class MatrixRows:
    """Rows of a matrix, or of each of several."""

    def __init__(self, spec: ContractionSpec, rows: int, call: Call) -> None:
        self.spec, self.count, self.call = spec, rows, call
        self.panel = Panel(rows, spec.a_depth_last)
        self.bytes = self.panel.bytes  # that a step's copies bring
        self.steps = -(-spec.depth // Panel.TERMS)
        self.tiles: Expr = (call.rows + (rows - 1)) // rows
        inner = [spec.depth, call.rows] if spec.a_depth_last else [call.rows, spec.depth]
        matrices = [call.batch // spec.a_share] if several(spec, spec.a_share) else []
        box = [*self.panel.box, *(1 for _ in matrices)]
        self.map = hopper.tensor_map("map_a", call.buffers["a"].data, spec.dtype, [*inner, *matrices], box)

    def load(self, to: Expr, tile: Expr, step: Expr, matrix: Expr, barrier: Expr) -> None:
        """Begin to copy a step of a tile."""
        rest = [shared_matrix(matrix, self.spec.a_share)] if several(self.spec, self.spec.a_share) else []
        self.panel.load(to, self.map, tile * self.count, step * Panel.TERMS, rest, barrier)

    def place(self, tile: Expr, row: Expr) -> tuple[Expr, Expr]:
        """The row of the result that a tile's row is, and whether there is one."""
        down = tile * self.count + row
        return down, down < _int32(self.call.rows)


class ImageRows:
    """Output pixels of a convolution, channels last, one group."""

    def __init__(self, spec: ContractionSpec, rows: int, call: Call) -> None:
        conv = spec.conv
        if conv is None:
            raise RescompileError(f"The product {spec} has no image: its rows are those of a matrix.")
        self.conv, self.taps = conv, conv.taps
        self.channels = spec.depth // conv.taps
        self.blocks = -(-self.channels // Panel.TERMS)  # steps of a tap
        self.steps = self.taps * self.blocks
        self.panel = Panel(rows, depth_last=True)
        self.box = images, height, width = box_of_pixels(conv, rows)
        self.bytes = images * height * width * hopper.SWIZZLE
        self.images = call.rows // conv.pixels
        self.across = -(-conv.out_width // width)
        self.down = -(-conv.out_height // height)
        self.tiles: Expr = (self.images + (images - 1)) // images * (self.across * self.down)
        extents = [self.channels, conv.width, conv.height, self.images]
        strides = [1, conv.stride[1], conv.stride[0], 1]
        counts = [Panel.TERMS, width, height, images]
        self.map = hopper.tensor_map("map_a", call.buffers["a"].data, spec.dtype, extents, counts, strides)

    def term(self, step: Expr) -> tuple[Expr, Expr]:
        """First channel and tap of a step."""
        return step % self.blocks * Panel.TERMS, step // self.blocks

    def load(self, to: Expr, tile: Expr, step: Expr, matrix: Expr, barrier: Expr) -> None:
        """Begin to copy a step of a tile."""
        conv = self.conv
        channel, tap = self.term(step)
        image, top, left = self._corner(tile)
        y = top * conv.stride[0] - conv.pads[0] + tap // conv.kernel[1] * conv.dilation[0]
        x = left * conv.stride[1] - conv.pads[1] + tap % conv.kernel[1] * conv.dilation[1]
        hopper.load_box(to, self.map, [channel, x, y, image], barrier)

    def place(self, tile: Expr, row: Expr) -> tuple[Expr, Expr]:
        """The row of the result that a tile's row is, and whether there is one."""
        conv, (images, height, width) = self.conv, self.box
        image, top, left = self._corner(tile)
        image, y, x = image + row // (height * width), top + row // width % height, left + row % width
        whole = tvm.tirx.And(row < images * height * width, image < _int32(self.images))
        inside = tvm.tirx.And(whole, tvm.tirx.And(y < conv.out_height, x < conv.out_width))
        return (image * conv.out_height + y) * conv.out_width + x, inside

    def _corner(self, tile: Expr) -> tuple[Expr, Expr, Expr]:
        images, height, width = self.box
        image = tile // (self.across * self.down) * images
        return image, tile // self.across % self.down * height, tile % self.across * width


@cache
def box_of_pixels(conv: ConvGeometry, rows: int) -> tuple[int, int, int]:
    """The box of output pixels (images, height, width) of at most so many that leaves the fewest rows unused.

    Among equal ones the widest: it reads the most of an image's row at once.
    """
    images = conv.images or _IMAGES
    most = hopper.LARGEST_BOX
    boxes = (
        (min(rows // (height * width), images), height, width)
        for width in range(1, min(conv.out_width, rows, most // conv.stride[1]) + 1)
        for height in range(1, min(conv.out_height, rows // width, most // conv.stride[0]) + 1)
    )
    return min(boxes, key=lambda box: (_tiles(conv, box), -box[2], -box[1]))


def fraction_used(spec: ContractionSpec, rows: int) -> float:
    """Of the rows that tiles of so many compute for an image, or a matrix, how many the result has."""
    conv = spec.conv
    count = spec.rows or 4096
    if conv is None or conv.is_product:
        return count / (ceil(count / rows) * rows)
    images = conv.images or _IMAGES
    return images * conv.pixels / (_tiles(conv, box_of_pixels(conv, rows)) * rows)


def several(spec: ContractionSpec, share: int) -> bool:
    """Whether an operand that `share` neighbouring products read is several matrices."""
    return share != 0 and spec.batch != 1 and spec.conv is None


def shared_matrix(matrix: Expr, share: int) -> Expr:
    """Which matrix a product reads."""
    return matrix if share == 1 else matrix // share


def _tiles(conv: ConvGeometry, box: tuple[int, int, int]) -> int:
    images, height, width = box
    return ceil((conv.images or _IMAGES) / images) * ceil(conv.out_height / height) * ceil(conv.out_width / width)


def _int32(value: Expr) -> Expr:
    return tvm.tirx.const(value, "int32") if isinstance(value, int) else value.astype("int32")
