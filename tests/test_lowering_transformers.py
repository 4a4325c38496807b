"""Attention heads found where they lie, merged projections, add and norm; dynamic batch and sequence."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from rescompile.backends.compile import compile_graph
from rescompile.graph import Value
from rescompile.kinds import OpKind
from tests.lowering_cases import F, Sketch, close

pytest.importorskip("tvm")
K = OpKind
B, S, H, D = 2, 10, 3, 16
E = H * D


def _heads(sketch: Sketch, x: Value, batch: Any = B, length: Any = S) -> Value:
    split = sketch.op(K.RESHAPE, [x], (batch, length, H, D))
    return sketch.op(K.PERMUTE, [split], (batch, H, length, D), perm=(0, 2, 1, 3))


def _merged(sketch: Sketch, x: Value, batch: Any = B, length: Any = S) -> Value:
    back = sketch.op(K.PERMUTE, [x], (batch, length, H, D), perm=(0, 2, 1, 3))
    return sketch.op(K.RESHAPE, [back], (batch, length, E))


def _kinds(sketch: Sketch) -> list[tuple[str, int]]:
    return [(r["kernel"], r["calls"]) for r in compile_graph(sketch.graph, tuning=0, threads=1).explain()]


def _attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    q, k, v = (x.reshape(x.shape[0], x.shape[1], H, D).transpose(1, 2) for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
    return out.reshape(out.shape[0], out.shape[1], E)


def test_three_projections_of_one_value_are_one_linear_and_one_attention() -> None:
    sketch = Sketch()
    x = sketch.input(B, S, E)
    weights = [sketch.param(E, E) for _ in range(3)]
    biases: list[Value | None] = [sketch.param(E), None, sketch.param(E)]
    parts = [sketch.op(K.LINEAR, [x, w, b], (B, S, E)) for w, b in zip(weights, biases, strict=True)]
    y = sketch.op(K.ATTENTION, [_heads(sketch, part) for part in parts], (B, H, S, D), scale=1 / math.sqrt(D))
    of = sketch.of
    projected = [F.linear(of(x), of(w), None if b is None else of(b)) for w, b in zip(weights, biases, strict=True)]
    close(sketch.run(_merged(sketch, y)), _attend(*projected))
    assert sorted(_kinds(sketch)) == [("attention", 1), ("linear", 1)]


def test_one_projection_that_is_split_is_read_where_it_lies() -> None:
    sketch = Sketch()
    x, w = sketch.input(B, S, E), sketch.param(3 * E, E)
    packed = sketch.op(K.LINEAR, [x, w, None], (B, S, 3 * E))
    parts = sketch.op(K.SPLIT, [packed], [(B, S, E)] * 3, axis=2, sizes=(E, E, E)).producer
    assert parts is not None
    y = sketch.op(K.ATTENTION, [_heads(sketch, part) for part in parts.outputs], (B, H, S, D), scale=1 / math.sqrt(D))
    close(sketch.run(_merged(sketch, y)), _attend(*F.linear(sketch.of(x), sketch.of(w)).split(E, 2)))
    assert sorted(_kinds(sketch)) == [("attention", 1), ("linear", 1)]


def test_heads_in_another_order_are_not_taken_for_packed_ones() -> None:
    sketch = Sketch()
    x, w = sketch.input(B, S, E), sketch.param(3 * E, E)
    packed = sketch.op(K.LINEAR, [x, w, None], (B, S, 3 * E))
    parts = sketch.op(K.SPLIT, [packed], [(B, S, E)] * 3, axis=2, sizes=(E, E, E)).producer
    assert parts is not None
    k, q, v = parts.outputs  # the keys come first in the buffer
    y = sketch.op(K.ATTENTION, [_heads(sketch, part) for part in (q, k, v)], (B, H, S, D), scale=1 / math.sqrt(D))
    first, second, third = F.linear(sketch.of(x), sketch.of(w)).split(E, 2)
    close(sketch.run(_merged(sketch, y)), _attend(second, first, third))


def test_projections_of_two_values_are_not_merged() -> None:
    sketch = Sketch()
    x, memory = sketch.input(B, S, E), sketch.input(B, 7, E)
    wq, wk, wv = (sketch.param(E, E) for _ in range(3))
    q = _heads(sketch, sketch.op(K.LINEAR, [x, wq, None], (B, S, E)))
    k, v = (_heads(sketch, sketch.op(K.LINEAR, [memory, w, None], (B, 7, E)), B, 7) for w in (wk, wv))
    y = sketch.op(K.ATTENTION, [q, k, v], (B, H, S, D), scale=1 / math.sqrt(D))
    of = sketch.of
    want = _attend(F.linear(of(x), of(wq)), F.linear(of(memory), of(wk)), F.linear(of(memory), of(wv)))
    close(sketch.run(_merged(sketch, y)), want)


def test_a_gelu_after_a_linear_is_part_of_it_and_a_residual_too() -> None:
    sketch = Sketch()
    x, up, b, down = sketch.input(B, S, E), sketch.param(4 * E, E), sketch.param(4 * E), sketch.param(E, 4 * E)
    wide = sketch.op(K.GELU, [sketch.op(K.LINEAR, [x, up, b], (B, S, 4 * E))], (B, S, 4 * E))
    y = sketch.op(K.ADD, [sketch.op(K.LINEAR, [wide, down, None], (B, S, E)), x], (B, S, E))
    of = sketch.of
    close(sketch.run(y), F.linear(F.gelu(F.linear(of(x), of(up), of(b))), of(down)) + of(x))
    assert sorted(_kinds(sketch)) == [("linear", 1), ("linear", 1)]


def test_dynamic_batch_and_sequence_run_right_at_every_size() -> None:
    sketch = Sketch()
    x = sketch.input(1, 4, E, dynamic=("N", "T", E))
    wq, wk, wv, wo = (sketch.param(E, E) for _ in range(4))
    gain, bias = sketch.param(E), sketch.param(E)
    q, k, v = (_heads(sketch, sketch.op(K.LINEAR, [x, w, None], ("N", "T", E)), "N", "T") for w in (wq, wk, wv))
    a = sketch.op(K.ATTENTION, [q, k, v], ("N", H, "T", D), scale=1 / math.sqrt(D))
    o = sketch.op(K.FUSED_LINEAR, [_merged(sketch, a, "N", "T"), wo, None, x], ("N", "T", E))
    y = sketch.op(K.ADD_NORM, [o, x, gain, bias], [("N", "T", E), ("N", "T", E)], axis=2)
    s = sketch.op(K.SOFTMAX, [y], ("N", "T", E), axis=2)
    sketch.graph.set_outputs([y, s])
    sketch.graph.commit()
    program = compile_graph(sketch.graph, tuning=0, threads=1)
    of = sketch.of
    for batch, length in ((1, 1), (1, 9), (3, 5), (2, 32)):
        data = torch.randn(batch, length, E)
        attended = F.linear(_attend(*(F.linear(data, of(w)) for w in (wq, wk, wv))), of(wo)) + data
        want = F.layer_norm(attended + data, (E,), of(gain), of(bias))
        got = program(data)
        close(got[0], want)
        close(got[1], F.softmax(want, -1))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_layer_in_half_precision(dtype: torch.dtype) -> None:
    sketch = Sketch()
    name = str(dtype).removeprefix("torch.")
    x = sketch.input(1, S, E, dtype=dtype)
    w = sketch.param(3 * E, E, dtype=dtype)
    packed = sketch.op(K.LINEAR, [x, w, None], (1, S, 3 * E), name)
    parts = sketch.op(K.SPLIT, [packed], [(1, S, E)] * 3, name, axis=2, sizes=(E, E, E)).producer
    assert parts is not None
    heads = []
    for part in parts.outputs:
        split = sketch.op(K.RESHAPE, [part], (1, S, H, D), name)
        heads.append(sketch.op(K.PERMUTE, [split], (1, H, S, D), name, perm=(0, 2, 1, 3)))
    a = sketch.op(K.ATTENTION, heads, (1, H, S, D), name, scale=1 / math.sqrt(D))
    q, k, v = (
        part.reshape(1, S, H, D).transpose(1, 2)
        for part in F.linear(sketch.of(x).double(), sketch.of(w).double()).split(E, 2)
    )
    want = F.scaled_dot_product_attention(q, k, v).to(dtype)
    tolerance = {torch.float16: 1e-2, torch.bfloat16: 8e-2}[dtype]
    close(sketch.run(a), want, rtol=tolerance, atol=tolerance)
