"""How the threads of a GPU share a region's elements, and which ways there are to choose from."""

from __future__ import annotations

from dataclasses import dataclass, replace

from rescompile.backends.cuda.index import lanes
from rescompile.backends.cuda.region_nodes import Chosen, Load, Made, Node, Normed, Trace
from rescompile.backends.cuda.region_spec import ACCESS, BYTES, RegionSpec
from rescompile.backends.cuda.scalars import is_portable, widest_lanes
from rescompile.backends.cuda.targets import Architecture

_WARP = 32
_BLOCK = 128  # threads of a block in which each warp, or part of one, has a row of its own
_MOST = 1024  # threads of a block
_ONE_WARP = 1024  # elements of the widest row that one warp holds
_HELD = 64  # bytes of a row that one thread holds for each value that a later phase needs
_STATIC_SHARED = 48 << 10
_SHARED_ROW = 32 << 10  # bytes of a row from which on a cluster of blocks may serve it better than one
_CLUSTER = (2, 4, 8)  # blocks


@dataclass(frozen=True)
class RegionTile:
    """`vector` elements an access, `threads` a row, `chunks` accesses a thread, `rows` a block.

    `parts`: blocks that share a row: a cluster of them where norms have to know all of it. `streams`: a row that no
    block holds is read chunk by chunk, once for each pass over it; `stash`: what is normalised stays in shared memory
    between the passes.
    """

    vector: int
    threads: int
    chunks: int
    rows: int = 1
    parts: int = 1
    streams: bool = False
    stash: bool = False

    @property
    def span(self) -> int:
        """Elements that the threads of a row read at once."""
        return self.vector * self.threads


def candidates(spec: RegionSpec, limits: Architecture | None = None) -> list[RegionTile]:
    """Tiles to choose from; the first is the one to take where nothing can be timed. GraphError: no kernel for it."""
    trace = Trace(spec)
    vector = vector_of(spec, trace)
    width = trace.space.width.number
    if not trace.norms:
        return _element_tiles(width, vector, trace.space.rows.number if not trace.space.rows.names else None)
    tiles = _row_tiles(spec, trace, width, vector, limits)
    # Without shuffles a row is summed in shared memory, by a block of its own.
    return list(dict.fromkeys(replace(tile, rows=1) for tile in tiles)) if is_portable() else tiles


def vector_of(spec: RegionSpec, trace: Trace) -> int:
    """Elements an access: as many as make the streams' and outputs' accesses widest, and divide the row."""
    width = trace.space.width.number
    streams = [load for value in spec.region.outputs for load in loads(trace.root(value)) if is_stream(spec, load)]
    tensors = [*(spec.operands[load.operand] for load in streams), *spec.outputs]
    vector = max(1, min(widest_lanes(), max(ACCESS[tensor.dtype] for tensor in tensors)))
    while width % vector:
        vector //= 2
    # Lanes that no access joins would only cost registers.
    joined = [lanes(at, vector) for at in (*(load.at for load in streams), *map(trace.written, spec.region.outputs))]
    return max((min(seen.group, seen.align) for seen in joined if seen.steps), default=vector)


def loads(node: Node | None) -> list[Load]:
    """What a node reads, each place once."""
    found: dict[Load, None] = {}
    seen: set[int] = set()
    stack = [node]
    while stack:
        here = stack.pop()
        if here is None or id(here) in seen:
            continue
        seen.add(id(here))
        if isinstance(here, Load):
            found[here] = None
        stack.extend(children(here))
    return list(found)


def children(node: Node) -> list[Node | None]:
    """The nodes that a node is made of."""
    if isinstance(node, Made):
        return list(node.operands)
    if isinstance(node, Chosen):
        return [node.inside, node.outside]
    return [node.source, node.weight, node.bias] if isinstance(node, Normed) else []


def is_stream(spec: RegionSpec, node: Load) -> bool:
    """Whether an operand differs from row to row and along the row: the traffic that counts."""
    sources = _coordinates(node.at)
    return "col" in sources and ("row" in sources or not _has_rows(spec))


def _has_rows(spec: RegionSpec) -> bool:
    return any(step.kind.value.endswith("_norm") and step.kind.value != "batch_norm" for step in spec.region.steps)


def _coordinates(term: object) -> set[str]:
    source = getattr(term, "source", None)
    if isinstance(source, str):
        return {source}
    inner = [source, getattr(term, "term", None), *(part for part, _ in getattr(term, "parts", ()))]
    return set().union(*(_coordinates(part) for part in inner if part is not None))


def _element_tiles(width: int, vector: int, rows: int | None) -> list[RegionTile]:
    """Flat pieces of 128 or 256 threads, several accesses each where there is enough for all multiprocessors."""
    found = []
    accesses = -(-width // vector)
    for threads, chunks in ((256, 2), (128, 4), (256, 1), (512, 1)):
        if accesses < threads:
            # A short row: several of them in a block.
            short = 1
            while short < accesses:
                short *= 2
            beside = max(1, min(threads // short, 1 << 16 if rows is None else rows))
            found.append(RegionTile(vector, short, 1, beside))
            continue
        piece = threads * chunks
        if (rows or 1) * accesses < piece * 264 and chunks > 1 and rows is not None:
            continue  # fewer blocks than two on each of 132 multiprocessors
        found.append(RegionTile(vector, threads, chunks, 1, -(-accesses // piece)))
    return list(dict.fromkeys(found))


def _row_tiles(spec: RegionSpec, trace: Trace, width: int, vector: int, limits: Architecture | None) -> list[RegionTile]:
    held = max(BYTES[spec.dtype(value)] for value in {spec.step(norm).inputs[0] for norm in trace.norms})  # type: ignore[union-attr]
    most = max(vector, _HELD // held)  # elements of a row that one thread holds
    accesses = -(-width // vector)
    found: list[RegionTile] = []
    if width <= _ONE_WARP and -(-accesses // _WARP) * vector <= 32:
        threads = 1
        while threads < min(accesses, _WARP):
            threads *= 2
        chunks = -(-accesses // threads)
        found += [RegionTile(vector, threads, chunks, rows) for rows in (_BLOCK // threads, 2 * _BLOCK // threads)]
    for per_thread in (16, 8, 32):
        if per_thread > most or (found and per_thread != 8):
            continue
        per_thread = max(per_thread, vector)
        threads = min(-(-width // (_WARP * per_thread)), -(-accesses // _WARP)) * _WARP
        if threads <= _MOST:
            found.append(RegionTile(vector, threads, -(-accesses // threads)))
    if limits is not None and limits.number >= 90 and not is_portable() and width * held >= _SHARED_ROW:
        # Small blocks, of several rows at once on a multiprocessor, keep reading while one row's blocks meet.
        wide = _cluster_tiles(width, vector)
        found = [*wide, *found] if width * held >= 2 * _SHARED_ROW or not found else [*found, *wide]
    if not found or width * held > _SHARED_ROW * 2:
        row, shared = len(trace.norms) * width * held, limits.shared_bytes if limits is not None else _STATIC_SHARED
        for threads in (512,):
            stash = row <= shared - (2 << 10)
            found.append(RegionTile(vector, threads, -(-accesses // threads), streams=True, stash=stash))
    return list(dict.fromkeys(found))


def _cluster_tiles(width: int, vector: int) -> list[RegionTile]:
    """Rows of clusters of blocks, 16 elements a thread, the smallest blocks that eight are enough of first."""
    found = []
    accesses = -(-width // vector)
    for threads in (256, 512, 1024):
        held = max(vector, 16)
        blocks = next((blocks for blocks in _CLUSTER if blocks * threads * held >= width), None)
        if blocks is not None:
            found.append(RegionTile(vector, threads, -(-accesses // (threads * blocks)), parts=blocks))
    return found[:2]
