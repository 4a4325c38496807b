"""How a contraction is cut for wgmma, what cannot be, and which cuts are worth timing, best guess first."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

from rescompile.backends.cuda import hopper
from rescompile.backends.cuda.contraction import ACCESS, BYTES, NARROW, ContractionSpec
from rescompile.backends.cuda.hopper import Panel
from rescompile.backends.cuda.targets import WARP, Architecture
from rescompile.backends.cuda.wgmma_rows import fraction_used

SM = "sm_90"
WARPS = hopper.WARPGROUP // WARP
STAGED = 32  # columns of the sums that a warp turns at once, in shared memory, from fragments to rows
PITCH = STAGED + 8  # elements: the rows of a fragment fall into different banks
TURNED = 16 * PITCH * 4 + 16  # bytes of a warp: that, and where its tile is


@dataclass(frozen=True)
class WgmmaTile:
    """How a product is cut: rows and columns of a tile, stages of the ring, who computes it.

    `consumers` warpgroups share each tile, or have tiles of their own and alternate. `blocks` take tile after tile;
    `cluster` of them, with tiles one below the other, copy b for each other.
    """

    rows: int
    columns: int
    stages: int
    consumers: int = 2
    alternate: bool = False
    cluster: int = 1
    blocks: int = 132  # multiprocessors of an H100 or H200; with fewer, some begin late, with more, some stay empty

    @property
    def rows_each(self) -> int:
        """Rows that a warpgroup computes."""
        return self.rows if self.alternate else self.rows // self.consumers

    @property
    def threads(self) -> int:
        """Of a block."""
        return hopper.WARPGROUP * (1 + self.consumers)

    @property
    def stage_bytes(self) -> int:
        """A tile of a and a tile of b."""
        return (self.rows + self.columns) * hopper.SWIZZLE

    @property
    def shared_bytes(self) -> int:
        """Of a block: slack up to an atom's boundary, the ring, what the epilogue turns, barriers."""
        barriers = 2 * self.stages + (self.consumers if self.alternate else 0)
        return hopper.ATOM + self.stages * self.stage_bytes + self.turned_bytes + 8 * barriers

    @property
    def turned_bytes(self) -> int:
        """Of all warps' buffers in which sums become rows."""
        return self.consumers * WARPS * TURNED


def refusal(spec: ContractionSpec, limits: Architecture) -> str:
    """Why this family cannot do it, one clause; empty when it can."""
    if limits.name != SM:
        return f"wgmma is {SM}a's"
    if spec.dtype not in NARROW:
        return f"its tiles are of 16-bit numbers, not of {spec.dtype}"
    conv = spec.conv
    if conv is not None and spec.batch != 1:
        return "the groups of a convolution are not copied in boxes"
    whole = ACCESS // BYTES[spec.dtype]
    depth = spec.depth if conv is None else spec.depth // conv.taps
    inner = {"a": depth if spec.a_depth_last else spec.rows, "b": depth if spec.b_depth_last else spec.columns}
    for name, extent in inner.items():
        if extent is None or extent % whole:
            return f"the rows of {name} are not known to be multiples of {ACCESS} bytes"
    if conv is not None and not conv.is_product and max(conv.stride) > 8:
        return "boxes step over at most 8 pixels"
    if spec.batch is None and (spec.a_share > 1 or spec.b_share > 1):
        return "with a dynamic batch matrices are shared by all products or by none"
    return ""


def candidates(spec: ContractionSpec, limits: Architecture) -> list[WgmmaTile]:
    """Tiles that are worth timing, the likeliest first; none where the family refuses."""
    if refusal(spec, limits):
        return []
    found = [tile for tile in _TILES if _fits(spec, tile)]
    return sorted(found, key=lambda tile: _expected(spec, tile))


_TILES = (
    WgmmaTile(128, 256, 4, cluster=2),
    WgmmaTile(256, 128, 4, cluster=2),
    WgmmaTile(128, 128, 6, alternate=True, cluster=2),
    WgmmaTile(128, 256, 4),
    WgmmaTile(256, 128, 4),
    WgmmaTile(128, 128, 6, alternate=True),
    WgmmaTile(64, 256, 5, alternate=True),
    WgmmaTile(128, 128, 6),
    WgmmaTile(64, 128, 8, alternate=True),
    WgmmaTile(128, 64, 8),
    WgmmaTile(64, 128, 6, consumers=1),
    WgmmaTile(64, 64, 8, consumers=1),
)
_RATE = 2048  # multiply-adds of 16-bit numbers in a clock of a multiprocessor
_CACHE_RATE = 38  # bytes that the L2 cache gives each multiprocessor in a clock, when all ask
_WRITE_RATE = 24  # bytes of the result that a multiprocessor writes in a clock, with the residual that it reads


def _fits(spec: ContractionSpec, tile: WgmmaTile) -> bool:
    """Whether no half of the tile, or tile of the cluster, lies outside of the product: a smaller one does it then."""
    least = tile.rows * (tile.cluster - 1) if tile.cluster > 1 else tile.rows // 2 if tile.rows > 64 else 0
    tall = spec.rows is None or spec.rows > least
    return tall and (spec.columns > tile.columns // 2 or tile.columns == 64)


def _expected(spec: ContractionSpec, tile: WgmmaTile) -> float:
    """Clocks: full rounds over the multiprocessors, each of a tile's products or copies, and of its epilogue.

    A dynamic count of rows is taken for 4,096.
    """
    computed = (spec.rows or 4096) / fraction_used(spec, tile.rows)
    high = ceil(computed / (tile.rows * tile.cluster)) * tile.cluster
    tiles = (spec.batch or 1) * high * -(-spec.columns // tile.columns)
    rounds = -(-tiles // tile.blocks)
    taps = 1 if spec.conv is None else spec.conv.taps
    steps = taps * -(-spec.depth // taps // Panel.TERMS)
    products = tile.rows * tile.columns * Panel.TERMS / _RATE
    copies = (tile.rows + tile.columns / tile.cluster) * hopper.SWIZZLE / _CACHE_RATE
    epilogue = tile.rows * tile.columns * BYTES[spec.dtype] / _WRITE_RATE
    # Alternating warpgroups hide all but the last.
    return rounds * steps * max(products, copies) + (1 if tile.alternate else rounds) * epilogue
