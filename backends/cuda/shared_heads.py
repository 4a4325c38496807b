"""Let attention read keys and values once where the graph repeats them for each group of query heads.

    k [B, H, T, D] = reshape(expand(k' [B, H', 1, T, D] → [B, H', n, T, D]))        →  k'

Attention's kind says that k and v may have fewer heads than q, and its kernel reads a shared head in place.
"""

from __future__ import annotations

from rescompile.backends.working import WorkingGraph
from rescompile.graph import Op, Value
from rescompile.kinds import OpKind


def share_heads(graph: WorkingGraph) -> None:
    """Take repetitions of keys and values out of the graph."""
    for op in [op for op in graph if op.kind is OpKind.ATTENTION]:
        key, value = op.operands[1:3]
        sources = _unrepeated(key), _unrepeated(value)
        if sources[0] is not None and sources[1] is not None and key.shape == value.shape:
            graph.set_operand(op, 1, sources[0])
            graph.set_operand(op, 2, sources[1])
    graph.settle()


def _unrepeated(value: Value) -> Value | None:
    """What the value's heads repeat, each as often; None where it is no such repetition."""
    join = _producer(value, OpKind.RESHAPE)
    repeat = None if join is None else _producer(join.operands[0], OpKind.EXPAND)
    split = None if repeat is None else _producer(repeat.operands[0], OpKind.RESHAPE)
    if repeat is None or split is None:
        return None
    source, shape, wide = split.operands[0], value.shape, repeat.output.shape
    if shape is None or wide is None or len(wide) < 4 or not isinstance(wide[-3], int):
        return None
    *lead, heads, times, length, depth = wide
    if not isinstance(heads, int) or not isinstance(times, int):
        return None
    narrow = repeat.operands[0].shape == (*lead, heads, 1, length, depth)
    repeated = shape == (*lead, heads * times, length, depth) and source.shape == (*lead, heads, length, depth)
    return source if narrow and repeated and source.dtype == value.dtype else None


def _producer(value: Value, kind: OpKind) -> Op | None:
    return value.producer if value.producer is not None and value.producer.kind is kind else None
