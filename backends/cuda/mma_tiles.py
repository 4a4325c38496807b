"""How a contraction is cut for mma.sync, and which cuts are worth timing, best guess first."""

from __future__ import annotations

from dataclasses import dataclass

from rescompile.backends.cuda.contraction import ACCESS, BYTES, ContractionSpec
from rescompile.backends.cuda.targets import Architecture

WARP = 32
# Multiprocessors of the product that a compute capability stands for; others are taken to have as many.
_MULTIPROCESSORS = {"sm_80": 108, "sm_86": 84, "sm_87": 16, "sm_89": 128, "sm_90": 132, "sm_100": 148, "sm_103": 148}
_REGISTERS = 65536  # of a multiprocessor
# Of one multiprocessor and cycle: multiply-adds of tensor cores, bytes from L2. Cycles that a copy is under way.
_MULTIPLIES = {"float16": 1024.0, "bfloat16": 1024.0, "float32": 512.0}
_CACHE_BYTES = 32.0
_LATENCY = 800.0
_BITS = 31  # rows and columns of a kernel whose meeting an image is noted in one register
_PADDING = 8  # floats between rows of sums in shared memory: the rows of a fragment then lie in different banks


@dataclass(frozen=True)
class MmaTile:
    """A block computes rows×columns of the result, `depth` terms of the sum a step.

    warps: along rows, columns and depth; those along depth each sum a part of every step. stages: steps in flight.
    """

    rows: int
    columns: int
    depth: int
    warps: tuple[int, int, int]
    stages: int

    @property
    def threads(self) -> int:
        """Threads of a block."""
        return WARP * self.warps[0] * self.warps[1] * self.warps[2]

    @property
    def warp_rows(self) -> int:
        """Rows that a warp computes."""
        return self.rows // self.warps[0]

    @property
    def warp_columns(self) -> int:
        """Columns that a warp computes."""
        return self.columns // self.warps[1]

    @property
    def sums_stride(self) -> int:
        """Floats from row to row of sums in shared memory."""
        return self.warp_columns + _PADDING

    def shared_bytes(self, dtype: str) -> int:
        """Shared memory of a block: the operands' steps in flight, afterwards sums on their way to the epilogue."""
        operands = self.stages * (self.rows + self.columns) * self.depth * BYTES[dtype]
        return max(operands, self.threads // WARP * 16 * self.sums_stride * 4)


def _tile(rows: int, columns: int, warps: tuple[int, int, int], steps: int, stages: int, dtype: str) -> MmaTile:
    """`steps`: products of 16 terms (8 of tf32) that each warp along depth sums in a step."""
    return MmaTile(rows, columns, steps * warps[2] * 32 // BYTES[dtype], warps, stages)


# rows, columns, warps, products a step, stages
_SHAPES: tuple[tuple[int, int, tuple[int, int, int], int, int], ...] = (
    (256, 128, (4, 2, 1), 2, 3),
    (128, 256, (2, 4, 1), 2, 3),
    (128, 128, (2, 2, 1), 2, 4),
    (128, 128, (2, 4, 1), 4, 3),
    (128, 64, (2, 2, 1), 4, 3),
    (64, 128, (2, 2, 1), 4, 3),
    (64, 64, (2, 2, 1), 4, 4),
    (64, 64, (1, 2, 2), 4, 3),
    (128, 32, (4, 1, 1), 4, 3),
    (32, 128, (1, 4, 1), 4, 3),
    (64, 32, (2, 1, 2), 2, 4),
    (32, 64, (1, 2, 2), 2, 4),
    (32, 32, (1, 1, 4), 2, 4),
    (16, 64, (1, 2, 4), 2, 4),
    (16, 32, (1, 1, 4), 2, 4),
    (16, 32, (1, 1, 8), 2, 3),
)


def refusal(spec: ContractionSpec, limits: Architecture) -> str:
    """Why there is no such kernel, one clause; empty when there is one."""
    if limits.number < 80:
        return f"{limits.name} has no asynchronous copies"
    if spec.dtype not in ("float16", "bfloat16", "float32"):
        return f"tensor cores do not multiply {spec.dtype}"
    others = {operand.dtype for operand in spec.epilogue.operands} | {out.dtype for out in spec.epilogue.outputs}
    if others - {"float32", "float16", "bfloat16"}:
        return f"its epilogue reads or writes {', '.join(sorted(others - {'float32', 'float16', 'bfloat16'}))}"
    if spec.batch is None and any(share > 1 for share in (spec.a_share, spec.b_share)):
        return "matrices are shared among products whose count is not known"
    if spec.conv is not None and spec.depth // spec.conv.taps * BYTES[spec.dtype] < ACCESS // 4:
        return f"a group has only {spec.depth // spec.conv.taps} channels"
    if spec.conv is not None and sum(spec.conv.kernel) > _BITS:
        return "its kernel is too large"
    if not spec.a_depth_last and spec.rows is None:
        return "its left operand lies along rows whose count is not known"
    return ""


def candidates(spec: ContractionSpec, limits: Architecture) -> list[MmaTile]:
    """Tiles worth timing; the first is the one to take where nothing can be timed."""
    tiles = [_tile(*shape, spec.dtype) for shape in _SHAPES]
    fitting = [tile for tile in tiles if _fits(spec, tile, limits)]
    return sorted(fitting, key=lambda tile: _cost(spec, tile, limits))


def _fits(spec: ContractionSpec, tile: MmaTile, limits: Architecture) -> bool:
    if tile.shared_bytes(spec.dtype) > limits.shared_bytes - 1024:
        return False
    # A warp reads 32-bit elements across 8 rows without conflicts only from rows of 128 bytes.
    narrow = spec.dtype == "float32" and min(tile.rows, tile.columns) < 32
    if narrow and not (spec.a_depth_last and spec.b_depth_last):
        return False
    return tile.threads <= 256 or (spec.rows or 128) <= 64


def _cost(spec: ContractionSpec, tile: MmaTile, limits: Architecture) -> float:
    """An estimate of the cycles: waves of blocks × what the blocks take that a multiprocessor holds at once."""
    processors = _MULTIPROCESSORS.get(limits.name, 132)
    size = BYTES[spec.dtype]
    blocks = -(-(spec.rows or 1024) // tile.rows) * -(-spec.columns // tile.columns) * (spec.batch or 8)
    registers = min(255, 40 + (tile.warp_rows * tile.warp_columns) // WARP * 3 // 2)
    resident = min(_REGISTERS // (registers * tile.threads), limits.shared_bytes // tile.shared_bytes(spec.dtype))
    # The last wave is as long as a full one, but blocks that have a multiprocessor to themselves share nothing.
    held = min(max(1, resident), -(-blocks // processors))
    warps = held * tile.threads // WARP
    area = tile.rows * tile.columns * tile.depth * held
    multiply = area / (_MULTIPLIES[spec.dtype] * min(1.0, 0.2 + 0.1 * warps))
    fragments = tile.warps[0] * tile.warps[1] * (tile.warp_rows + tile.warp_columns) * tile.depth * size * held / 128
    copies = (tile.rows + tile.columns) * tile.depth * size * held / _CACHE_BYTES
    work = max(multiply, fragments, copies)
    step = max(work + 0.2 * (multiply + fragments + copies - work), _LATENCY / (tile.stages - 1))
    steps = -(-spec.depth // tile.depth)
    ends = _LATENCY + 1500.0 + tile.rows * tile.columns * held / 24.0
    return -(-blocks // (processors * held)) * (steps * step + ends)
