"""Matrix products of 16-bit operands on tensor cores, sums in float32, their epilogue in the same kernel.

After dlight's MatmulTensorization (Apache TVM), in whose place it stands: that one takes float16 only, one tile, and
turns every operand in shared memory so that the summed axis is last. Here operands may be bfloat16 too, tiles follow
the extents, each operand is read the way it lies, in accesses of up to 128 bits, and convolutions are products as well.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import tvm
from tvm import s_tir, tirx
from tvm.s_tir.dlight.analysis import get_root_block
from tvm.s_tir.dlight.gpu.matmul import (
    auto_inline_consumer_chain,
    auto_inline_producers,
    get_index_map,
    get_reduction_blocks,
)

from rescompile.backends.cuda import wmma
from rescompile.backends.cuda.targets import WARP

_SHARED = "shared.dyn"
_OPERANDS = ("float16", "bfloat16")
_WIDEST = 8  # elements of one access: 128 bits


@dataclass(frozen=True)
class ProductTile:
    """How a product is cut. In units of 16: a block has warps[0]×warps[1] warps of each[0]×each[1] accumulators."""

    warps: tuple[int, int]
    each: tuple[int, int]
    depth: int  # of a step along the sum, in units of 16

    @property
    def rows(self) -> int:
        """Rows of the result that a block computes."""
        return self.warps[0] * self.each[0] * wmma.SIDE

    @property
    def columns(self) -> int:
        """Columns of the result that a block computes."""
        return self.warps[1] * self.each[1] * wmma.SIDE


LARGE = ProductTile((4, 2), (2, 4), 2)  # 128×128, 8 warps
SMALL = ProductTile((2, 2), (2, 2), 2)  # 64×64, 4 warps
_FEW_BLOCKS = 64  # with fewer blocks of the large tile than this, the small one fills more multiprocessors


@dataclass(frozen=True)
class Operand:
    """How an operand lies in memory: whether its fastest axis is the summed one, and elements of one access."""

    sum_last: bool
    vector: int

    @staticmethod
    def of(region: Any, iterators: dict[Any, Any]) -> Operand:
        """Of what a block reads; `iterators` are the block's, by their variables."""
        analyzer = tvm.sym.Analyzer()
        for var, item in iterators.items():
            analyzer.bind(var, item.dom)  # an extent of one makes it zero
        indices = [analyzer.simplify(axis.min) for axis in region.region]
        last = indices[-1]
        if last not in iterators:
            return Operand(sum_last=False, vector=1)  # such as x + kx in a convolution: neighbours, but not aligned
        if iterators[last].iter_type != tirx.IterVar.CommReduce:
            return Operand(sum_last=False, vector=_dividing(_number(region.source.shape[-1])))
        return Operand(sum_last=True, vector=_dividing(_number(region.source.shape[-1])))


class TensorCoreProduct:
    """The rule: C[s, i, j] = sum over k of A[s, i, k]·B[s, j, k], in whatever order the operands spell it."""

    def apply(self, function: tirx.PrimFunc, target: tvm.target.Target, _: bool) -> s_tir.Schedule | None:
        """The schedule, None when the function is no such product."""
        if str(target.kind.name) != "cuda":
            return None
        sch = s_tir.Schedule(function)
        blocks = get_reduction_blocks(sch, sch.get_child_blocks(get_root_block(sch)))
        if blocks is None:
            return None
        main = blocks[0]
        statement = sch.get(main)
        dtypes = {str(region.source.dtype) for region in statement.reads}
        if len(statement.reads) != 2 or len(dtypes) != 1 or not dtypes <= set(_OPERANDS):
            return None
        if str(statement.writes[0].source.dtype) != "float32":
            return None
        iterators = {item.var: item for item in statement.iter_vars}
        operands = [Operand.of(region, iterators) for region in statement.reads]
        if not _normalise(sch, main, operands):
            return None
        tile = choose_tile(*(_number(item.dom.extent) for item in sch.get(main).iter_vars))
        if tile is None:
            return None
        names = wmma.intrinsics(dtypes.pop(), (operands[0].sum_last, operands[1].sum_last))
        _bind(sch, main, tile, operands, names)
        return sch


def choose_tile(batch: int | None, rows: int | None, columns: int | None, depth: int | None) -> ProductTile | None:
    """The tile for a product of these extents (None where dynamic), None where it is too thin for tensor cores."""
    if any(extent is not None and extent < wmma.SIDE for extent in (rows, columns, depth)):
        return None
    if rows is None or columns is None:
        return LARGE if columns is None or columns > SMALL.columns else SMALL
    blocks = (batch or 1) * -(-rows // LARGE.rows) * -(-columns // LARGE.columns)
    narrow = rows <= SMALL.rows or columns <= SMALL.columns
    return SMALL if narrow or blocks < _FEW_BLOCKS else LARGE


def _normalise(sch: s_tir.Schedule, main: Any, operands: list[Operand]) -> bool:
    """Bring the product into its normal form; whether it has one."""
    read = [sch.reindex(main, ("read", index)) for index in (0, 1)]
    written = sch.reindex(main, ("write", 0))
    maps = get_index_map(sch.get(main))
    if maps is None:
        return False
    for block, operand, index_map in zip(read, operands, maps[1:3], strict=True):
        sch.transform_layout(block, ("write", 0), index_map)
        if not operand.sum_last:
            sch.transform_layout(block, ("write", 0), lambda s, outer, k: (s, k, outer))
    sch.transform_layout(written, ("read", 0), maps[3])
    sch.transform_block_layout(main, maps[0])
    return True


def _bind(sch: s_tir.Schedule, main: Any, tile: ProductTile, operands: list[Operand], names: dict[str, str]) -> None:
    side = wmma.SIDE
    # Extents that the tile does not divide are padded with zeros while a block reads its part: no pass over memory.
    sch.pad_einsum(main, [1, tile.rows, tile.columns, tile.depth * side])
    batch, i, j, k = sch.get_loops(main)
    i, i_in = sch.split(i, [None, side])
    j, j_in = sch.split(j, [None, side])
    k, k_in = sch.split(k, [None, side])
    sch.reorder(i, j, k, i_in, j_in, k_in)
    inner, outer = main, sch.blockize(i_in)
    i0, i1, i2 = sch.split(i, [None, tile.warps[0], tile.each[0]])
    j0, j1, j2 = sch.split(j, [None, tile.warps[1], tile.each[1]])
    k0, k1 = sch.split(k, [None, tile.depth])
    sch.reorder(i0, j0, i1, j1, k0, k1, i2, j2)
    warp = sch.fuse(i1, j1)
    sch.bind(batch, "blockIdx.z")
    sch.bind(i0, "blockIdx.x")
    sch.bind(j0, "blockIdx.y")
    sch.bind(warp, "threadIdx.y")
    # Loads of the next step are in flight while this one is multiplied, through registers into a second buffer.
    sch.annotate(k0, "software_pipeline_order", [0, 3, 1, 4, 5, 2, 6])
    sch.annotate(k0, "software_pipeline_stage", [0, 0, 0, 0, 0, 1, 1])
    sch.annotate(k1, "software_pipeline_order", [0, 1, 2])
    sch.annotate(k1, "software_pipeline_stage", [0, 0, 1])
    staged = [_stage(sch, outer, index, k0, tile, operand.vector) for index, operand in enumerate(operands)]
    for read in staged:
        auto_inline_producers(sch, read)
    fragments = [sch.cache_read(outer, index, f"wmma.matrix_{name}") for index, name in enumerate("ab")]
    for fragment in fragments:
        sch.compute_at(fragment, k1)
    result = sch.cache_write(outer, 0, _SHARED)
    sch.storage_align(result, 0, -2, 16, 4)
    store = sch.cache_write(outer, 0, "wmma.accumulator")
    sch.reverse_compute_at(store, warp)
    sch.reverse_compute_at(result, warp)
    _cut(sch, store)
    start = sch.decompose_reduction(outer, k0)
    for fragment, name in zip(fragments, ("load_a", "load_b"), strict=True):
        for loop in _cut(sch, fragment):
            sch.unroll(loop)
        sch.tensorize(sch.get_loops(fragment)[-2], names[name])
    sch.tensorize(sch.get_loops(sch.get_child_blocks(start)[0])[-2], names["fill"])
    sch.tensorize(sch.get_loops(store)[-2], names["store"])
    sch.tensorize(sch.get_loops(inner)[-3], names["multiply"])
    auto_inline_consumer_chain(sch, result)
    fused = sch.fuse(*sch.get_loops(result)[-2:])
    _, lane, vector = sch.split(fused, [None, WARP, 4])
    sch.bind(lane, "threadIdx.x")
    sch.vectorize(vector)


def _stage(sch: s_tir.Schedule, outer: Any, index: int, step: Any, tile: ProductTile, vector: int) -> Any:
    """Let the block's threads copy an operand's part of one step into shared memory, neighbours reading neighbours."""
    read = sch.cache_read(outer, index, _SHARED)
    sch.compute_at(read, step)
    fused = sch.fuse(*sch.get_loops(read)[-2:])
    _, warp, lane, access = sch.split(fused, [None, tile.warps[0] * tile.warps[1], WARP, vector])
    sch.bind(warp, "threadIdx.y")
    sch.bind(lane, "threadIdx.x")
    sch.vectorize(access)
    sch.storage_align(read, 0, axis=-2, factor=16, offset=8)
    sch.annotate(read, "tirx.manifest_shared_memory_local_stage", 1)
    sch.annotate(read, "double_buffer_scope", 0)
    return read


def _cut(sch: s_tir.Schedule, block: Any) -> list[Any]:
    """Split a block's last two loops into 16×16; the outer two."""
    i, j = sch.get_loops(block)[-2:]
    i0, i1 = sch.split(i, [None, wmma.SIDE])
    j0, j1 = sch.split(j, [None, wmma.SIDE])
    sch.reorder(i0, j0, i1, j1)
    return [i0, j0]


def _dividing(extent: int | None) -> int:
    """The widest access that an extent divides into."""
    vector = _WIDEST if extent is not None else 1
    while extent is not None and extent % vector:
        vector //= 2
    return vector


def _number(extent: Any) -> int | None:
    return int(extent.value) if isinstance(extent, tirx.IntImm) else None
