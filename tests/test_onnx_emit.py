"""Kinds written at opsets that have no operator for them, against their equations in numpy."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from onnx import helper

from rescompile.errors import GraphError
from rescompile.graph import ValueType
from rescompile.kinds import OpKind as K
from rescompile.onnx_graph import OnnxGraph
from tests.onnx_models import Array, check, graph_of, model_of

RNG = np.random.default_rng(0)


def floats(*shape: int) -> Array:
    return RNG.uniform(-2, 2, shape).astype(np.float32)


def identity(shapes: dict[str, tuple[int | str, ...]], opset: int) -> OnnxGraph:
    """A model that returns its inputs, for operations to be inserted into."""
    nodes = [helper.make_node("Identity", [name], [f"{name}_out"]) for name in shapes]
    return graph_of(model_of(nodes, dict(shapes), [f"{name}_out" for name in shapes], opset=opset, ir_version=4))


def written(kind: K, arrays: list[Array | None], opset: int, attrs: dict[str, Any], out: tuple[int, ...]) -> Array:
    """The result of one operation that was inserted in the place of the first output."""
    fed = {f"x{index}": array for index, array in enumerate(arrays) if array is not None}
    graph = identity({name: array.shape for name, array in fed.items()}, opset)
    inputs = [None if array is None else graph.value(f"x{index}") for index, array in enumerate(arrays)]
    op = graph.insert(kind, inputs, [("made", ValueType(out, "float32"))], attrs, provenance="test")
    graph.replace_uses(graph.value("x0_out"), op.output)
    graph.erase(graph.op("x0_out"))
    graph.commit()
    check(graph)
    return graph.run(fed)["x0_out"]


def erf(x: Array) -> Array:
    return np.vectorize(math.erf)(x).astype(np.float32)


def gelu_tanh(x: Array) -> Array:
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def sigmoid(x: Array) -> Array:
    return 1 / (1 + np.exp(-x))


def normed(x: Array, axes: tuple[int, ...]) -> Array:
    return (x - x.mean(axes, keepdims=True)) / np.sqrt(x.var(axes, keepdims=True) + 1e-5)


def softmax(x: Array, axis: int) -> Array:
    e = np.exp(x - x.max(axis, keepdims=True))
    return e / e.sum(axis, keepdims=True)


def grouped(x: Array, weight: Array, bias: Array) -> Array:
    n = x.shape[0]
    return normed(x.reshape(n, 2, -1), (2,)).reshape(x.shape) * weight[:, None, None] + bias[:, None, None]


X = floats(2, 4, 6)
IMAGE = floats(2, 4, 3, 3)
Rule = Callable[..., Array]
CASES: list[tuple[K, list[Array], dict[str, Any], Rule]] = [
    (K.GELU, [X], {}, lambda x: 0.5 * x * (1 + erf(x / math.sqrt(2)))),
    (K.GELU, [X], {"approximate": "tanh"}, gelu_tanh),
    (K.SILU, [X], {}, lambda x: x * sigmoid(x)),
    (K.HARDSWISH, [X], {}, lambda x: x * np.clip(x / 6 + 0.5, 0, 1)),
    (K.MISH, [X], {}, lambda x: x * np.tanh(np.log1p(np.exp(x)))),
    (K.RSQRT, [np.abs(X) + 0.1], {}, lambda x: 1 / np.sqrt(x)),
    (K.MOD, [X, floats(6)], {}, lambda x, y: np.mod(x, y)),
    (K.LAYER_NORM, [X, floats(6), floats(6)], {"axis": 2}, lambda x, w, b: normed(x, (2,)) * w + b),
    (K.LAYER_NORM, [X], {"axis": -2}, lambda x: normed(x, (1, 2))),
    (K.RMS_NORM, [X, floats(6)], {"axis": 2}, lambda x, w: x / np.sqrt((x**2).mean(2, keepdims=True) + 1e-5) * w),
    (K.GROUP_NORM, [IMAGE, floats(4), floats(4)], {"groups": 2}, grouped),
    (K.INSTANCE_NORM, [IMAGE], {}, lambda x: normed(x, (2, 3))),
    (K.SOFTMAX, [X], {"axis": 1}, lambda x: softmax(x, 1)),
    (K.SOFTMAX, [X], {"axis": 1, "log": True}, lambda x: np.log(softmax(x, 1))),
    (K.ROLL, [X], {"axes": (1, 2), "shifts": (1, -2)}, lambda x: np.roll(x, (1, -2), (1, 2))),
    (K.ADD, [X, floats(6), floats(4, 1)], {"scales": (2.0, -1.0, 0.5)}, lambda a, b, c: 2 * a - b + 0.5 * c),
    (K.ADD, [X], {"scales": (3.0,)}, lambda a: 3 * a),
    (K.LINEAR, [X, floats(5, 6), floats(5)], {}, lambda x, w, b: x @ w.T + b),
    (K.LINEAR, [floats(3, 6), floats(5, 6)], {}, lambda x, w: x @ w.T),
    (
        K.ADAPTIVE_AVG_POOL,
        [floats(1, 2, 4, 6)],
        {"output_size": (2, 3)},
        lambda x: x.reshape(1, 2, 2, 2, 3, 2).mean((3, 5)),
    ),
    (K.RELU, [X], {}, lambda x: np.maximum(x, 0)),
]


@pytest.mark.parametrize("opset", [9, 13, 18, 22])
@pytest.mark.parametrize(
    ("kind", "arrays", "attrs", "rule"), CASES, ids=[f"{c[0].value}-{i}" for i, c in enumerate(CASES)]
)
def test_kind_is_written_at_the_models_own_opset(
    kind: K, arrays: list[Array], attrs: dict[str, Any], rule: Rule, opset: int
) -> None:
    expected = rule(*arrays)
    operands = kind.spec.operands
    padded = arrays if operands[0].startswith("*") else [*arrays, *[None] * (len(operands) - len(arrays))]
    result = written(kind, padded, opset, attrs, expected.shape)  # type: ignore[arg-type]
    np.testing.assert_allclose(result, expected, rtol=2e-5, atol=2e-6)


def attended(q: Array, k: Array, v: Array, mask: Array | None, scale: float, causal: bool) -> Array:
    k, v = (np.repeat(x, q.shape[1] // x.shape[1], axis=1) for x in (k, v))
    scores = scale * q @ np.swapaxes(k, 2, 3)
    if causal:
        scores = np.where(np.tril(np.ones(scores.shape[2:], bool)), scores, -np.inf)
    if mask is not None:
        scores = scores + mask
    return softmax(scores, 3) @ v


@pytest.mark.parametrize("opset", [14, 18, 23])
@pytest.mark.parametrize(("heads", "causal", "masked"), [(4, False, True), (2, True, False), (4, True, False)])
def test_attention_is_written_at_the_models_own_opset(opset: int, heads: int, causal: bool, masked: bool) -> None:
    q, k, v = floats(2, 4, 5, 8), floats(2, heads, 5, 8), floats(2, heads, 5, 8)
    mask = floats(5, 5) if masked else None
    result = written(K.ATTENTION, [q, k, v, mask], opset, {"scale": 0.25, "causal": causal}, q.shape)
    np.testing.assert_allclose(result, attended(q, k, v, mask, 0.25, causal), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("kind", "opset", "needs"), [(K.EINSUM, 11, 12), (K.CUMSUM, 10, 11), (K.FLIP, 9, 10)])
def test_kind_that_the_opset_cannot_hold_is_refused_by_name(kind: K, opset: int, needs: int) -> None:
    graph = identity({"x0": (2, 3)}, opset)
    assert f"needs opset {needs}" in graph.cannot_emit(kind)
    with pytest.raises(GraphError, match=f"needs opset {needs} and the model has {opset}"):
        graph.insert(kind, [graph.value("x0")], [("made", ValueType((2, 3), "float32"))], {"axes": (0,), "axis": 0})
    assert identity({"x0": (2, 3)}, needs).cannot_emit(kind) == ""


def test_reshape_to_several_symbolic_extents_reads_them_off_the_inputs() -> None:
    graph = identity({"x0": ("N", "S", 6)}, 13)
    x = graph.value("x0")
    heads = graph.insert(K.RESHAPE, [x], [("heads", ValueType(("N", "S", 2, 3), "float32"))])
    turned = graph.insert(
        K.PERMUTE, [heads.output], [("turned", ValueType(("N", 2, "S", 3), "float32"))], {"perm": (0, 2, 1, 3)}
    )
    flat = graph.insert(K.RESHAPE, [turned.output], [("flat", ValueType(("S", 2, "N", 3), "float32"))])
    graph.replace_uses(graph.value("x0_out"), flat.output)
    graph.commit()
    array = floats(2, 5, 6)
    expected = array.reshape(2, 5, 2, 3).transpose(0, 2, 1, 3).reshape(5, 2, 2, 3)
    np.testing.assert_array_equal(graph.run({"x0": array})["x0_out"], expected)


def test_reshape_to_an_extent_that_nothing_has_is_refused() -> None:
    graph = identity({"x0": ("N", "S", 6)}, 13)
    with pytest.raises(GraphError, match="extent 'T'"):
        graph.insert(K.RESHAPE, [graph.value("x0")], [("y", ValueType(("T", "U", 6), "float32"))])


def test_float16_norms_are_computed_in_float32() -> None:
    graph = identity({"x0": (2, 64)}, 13)
    x = graph.value("x0")
    half = graph.insert(K.CAST, [x], [("half", ValueType((2, 64), "float16"))], {"dtype": "float16"})
    norm = graph.insert(K.RMS_NORM, [half.output, None], [("n", ValueType((2, 64), "float16"))], {"axis": 1})
    back = graph.insert(K.CAST, [norm.output], [("y", ValueType((2, 64), "float32"))], {"dtype": "float32"})
    graph.replace_uses(graph.value("x0_out"), back.output)
    graph.commit()
    array = floats(2, 64) * 400  # squares overflow float16
    expected = array / np.sqrt((array**2).mean(1, keepdims=True) + 1e-5)
    np.testing.assert_allclose(graph.run({"x0": array})["x0_out"], expected, rtol=2e-3)
