"""Rows of a batch: what keeps them apart, and what brings them together."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("tvm")

from rescompile.backends.batches import batch_symbol, dependence
from rescompile.errors import RescompileError
from rescompile.kinds import OpKind as K
from tests.lowering_cases import Sketch

Shape = tuple[Any, ...]


def _reason(kind: K, shapes: list[Shape], out: Shape, **attrs: Any) -> str:
    """Of a graph of one operation; a shape that begins with "N" is an input, any other a weight."""
    sketch = Sketch()
    values = [
        sketch.input(*(2 if dim == "N" else dim for dim in shape), dynamic=shape)
        if "N" in map(str, shape)
        else sketch.param(*shape)
        for shape in shapes
    ]
    sketch.graph.set_outputs([sketch.op(kind, values, out, **attrs)])
    sketch.graph.commit()
    return dependence(sketch.graph, "N")


APART: dict[str, Any] = {
    "add": (K.ADD, [("N", 4), ("N", 4)], ("N", 4), {}),
    "add_of_a_bias": (K.ADD, [("N", 4), (4,)], ("N", 4), {}),
    "conv": (K.CONV, [("N", 3, 8, 8), (4, 3, 1, 1)], ("N", 4, 8, 8), {}),
    "linear": (K.LINEAR, [("N", 5, 4), (6, 4)], ("N", 5, 6), {}),
    "matmul": (K.MATMUL, [("N", 3, 4), ("N", 4, 5)], ("N", 3, 5), {}),
    "matmul_with_a_weight": (K.MATMUL, [("N", 4), (4, 5)], ("N", 5), {}),
    "softmax": (K.SOFTMAX, [("N", 4)], ("N", 4), {"axis": -1}),
    "layer_norm": (K.LAYER_NORM, [("N", 4), (4,)], ("N", 4), {"axis": -1}),
    "mean": (K.MEAN, [("N", 4, 5)], ("N", 5), {"axes": (1,)}),
    "rows_flattened": (K.RESHAPE, [("N", 3, 4)], ("N", 12), {}),
    "concat": (K.CONCAT, [("N", 4), ("N", 4)], ("N", 8), {"axis": 1}),
    "einsum": (K.EINSUM, [("N", 4), (4, 5)], ("N", 5), {"equation": "nk,kc->nc"}),
    "embedding": (K.EMBEDDING, [(10, 4), ("N", 3)], ("N", 3, 4), {}),
    "attention": (K.ATTENTION, [("N", 2, 3, 4)] * 3, ("N", 2, 3, 4), {}),
    "slice": (K.SLICE, [("N", 4)], ("N", 2), {"axes": (1,), "starts": (0,), "stops": (2,), "steps": (1,)}),
}
TOGETHER: dict[str, Any] = {
    "mean": (K.MEAN, [("N", 4)], (4,), {"axes": (0,)}, "reduces over the batch"),
    "mean_of_all": (K.MEAN, [("N", 4)], (), {"axes": ()}, "reduces over the batch"),
    "softmax": (K.SOFTMAX, [("N", 4)], ("N", 4), {"axis": 0}, "works along the batch"),
    "layer_norm": (K.LAYER_NORM, [("N", 4)], ("N", 4), {"axis": 0}, "normalises over the batch"),
    "training": (K.BATCH_NORM, [("N", 4), (4,)], ("N", 4), {"training": True}, "statistics"),
    "gram": (K.EINSUM, [("N", 4), ("N", 4)], ("N", "N"), {"equation": "nk,mk->nm"}, "sums over"),
    "slice": (
        K.SLICE, [("N", 4)], (1, 4), {"axes": (0,), "starts": (0,), "stops": (1,), "steps": (1,)}, "moves rows",
    ),
    "concat": (K.CONCAT, [("N", 4), ("N", 4)], ("2*N", 4), {"axis": 0}, "one behind the other"),
    "flip": (K.FLIP, [("N", 4)], ("N", 4), {"axes": (0,)}, "moves rows"),
    "flattened": (K.RESHAPE, [("N", 3, 4)], ("12*N",), {}, "first axis"),
    "permuted": (K.PERMUTE, [("N", 3)], (3, "N"), {"perm": (1, 0)}, "first axis"),
    "unknown": (K.FFT, [("N", 4)], ("N", 4), {}, "not known to keep"),
}  # fmt: skip


@pytest.mark.parametrize("name", APART)
def test_rows_stay_apart(name: str) -> None:
    kind, shapes, out, attrs = APART[name]
    assert _reason(kind, shapes, out, **attrs) == ""


@pytest.mark.parametrize("name", TOGETHER)
def test_rows_that_meet_are_said(name: str) -> None:
    kind, shapes, out, attrs, said = TOGETHER[name]
    assert said in _reason(kind, shapes, out, **attrs)


def test_batch_that_goes_behind_another_axis_and_comes_back_is_followed() -> None:
    sketch = Sketch()
    x = sketch.input(2, 3, 4, dynamic=("N", 3, 4))
    turned = sketch.op(K.PERMUTE, [x], (3, "N", 4), perm=(1, 0, 2))
    merged = sketch.op(K.RESHAPE, [turned], (3, "4*N"))
    back = sketch.op(K.RESHAPE, [merged], (3, "N", 4))
    sketch.graph.set_outputs([sketch.op(K.PERMUTE, [back], ("N", 3, 4), perm=(1, 0, 2))])
    sketch.graph.commit()
    assert dependence(sketch.graph, "N") == ""


def test_batch_that_a_reshape_takes_apart_is_refused() -> None:
    sketch = Sketch()
    x = sketch.input(2, 3, dynamic=("N", 3))
    turned = sketch.op(K.PERMUTE, [x], (3, "N"), perm=(1, 0))
    sketch.graph.set_outputs([sketch.op(K.RESHAPE, [turned], ("N", 3))])
    sketch.graph.commit()
    assert "behind another axis" in dependence(sketch.graph, "N")


def test_batch_is_the_one_symbol_that_comes_first() -> None:
    sketch = Sketch()
    x = sketch.input(2, 3, dynamic=("N", "T"))
    sketch.graph.set_outputs([sketch.op(K.NEG, [x], ("N", "T"))])
    sketch.graph.commit()
    assert batch_symbol(sketch.graph) == "N"
    fixed = Sketch()
    fixed.graph.set_outputs([fixed.op(K.NEG, [fixed.input(2, 3)], (2, 3))])
    fixed.graph.commit()
    with pytest.raises(RescompileError, match="dynamic batch"):
        batch_symbol(fixed.graph)
