"""Operations outside the vocabulary, through TVM's frontends, and the frontends' known errors; what is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import helper, numpy_helper
from torch import nn

from rescompile.backends.compile import compile_graph
from rescompile.errors import UnsupportedOps
from rescompile.fx_capture import capture
from rescompile.kinds import OpKind
from rescompile.onnx_files import capture as capture_onnx
from tests.lowering_cases import Sketch, close

pytest.importorskip("tvm")
K = OpKind


def _compiled(function: Any, *inputs: torch.Tensor) -> tuple[Any, Any]:
    class Model(nn.Module):
        def forward(self, *xs: torch.Tensor) -> Any:
            return function(*xs)

    return compile_graph(capture(Model().eval(), inputs), tuning=0, threads=1)(*inputs), function(*inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_an_operation_outside_the_vocabulary_is_read_by_the_torch_frontend(dtype: torch.dtype) -> None:
    got, want = _compiled(lambda x: torch.tril(x) + 1, torch.randn(5, 5).to(dtype))
    close(got, want)


def test_an_operation_with_two_outputs() -> None:
    got, want = _compiled(lambda x: torch.topk(x, 3), torch.randn(4, 9))
    close(got[0], want[0], atol=0.0)
    close(got[1], want[1], atol=0.0)


def test_alpha_of_add_sub_and_rsub_is_not_dropped() -> None:
    def function(x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (torch.add(x, y, alpha=3), torch.sub(x, y, alpha=0.5), torch.rsub(x, y, alpha=2))

    got, want = _compiled(function, torch.randn(3, 4), torch.randn(3, 4))
    for mine, theirs in zip(got, want, strict=True):
        close(mine, theirs)


def test_alpha_is_kept_by_the_frontend_too() -> None:
    # None of these is in the vocabulary as it stands: each decomposes into an add or rsub with alpha, or may do so.
    from tvm.relax.frontend.torch import from_exported_program

    from rescompile.backends.fallback_fx import _CORRECTED

    class Model(nn.Module):
        def forward(self, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, ...]:
            return (torch.add(x, y, alpha=3), torch.sub(x, y, alpha=0.5), torch.rsub(x, y, alpha=2))

    program = torch.export.export(Model(), (torch.randn(3), torch.randn(3)))
    corrected = from_exported_program(program, custom_convert_map=_CORRECTED).script()
    assert corrected.count("multiply") == 3


def test_half_precision_products_stay_in_half_precision() -> None:
    linear = nn.Linear(16, 24).half().eval()
    x = torch.randn(4, 16).half()
    got = compile_graph(capture(linear, (x,)), tuning=0, threads=1)(x)
    with torch.no_grad():
        close(got, linear(x), rtol=4e-3, atol=4e-3)


def test_writing_into_a_part_of_a_tensor_changes_the_whole() -> None:
    def function(x: torch.Tensor) -> torch.Tensor:
        y = torch.zeros(4, 6)
        y[1:3, 2:] = 5.0
        y[3:] = 7.0
        return x + y

    got, want = _compiled(function, torch.randn(4, 6))
    close(got, want)


def test_an_operation_outside_the_vocabulary_is_read_by_the_onnx_frontend() -> None:
    nodes = [
        helper.make_node("Relu", ["x"], ["r"]),
        helper.make_node("Trilu", ["r"], ["t"], upper=0),
        helper.make_node("Resize", ["t4", "", "scales"], ["y"], mode="nearest", nearest_mode="floor",
                         coordinate_transformation_mode="asymmetric"),
        helper.make_node("Unsqueeze", ["t", "axes"], ["t4"]),
    ]  # fmt: skip
    nodes = [nodes[0], nodes[1], nodes[3], nodes[2]]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1, 5, 5])],
        [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [1, 1, 10, 10])],
        [
            numpy_helper.from_array(np.array([1, 1, 2, 2], np.float32), "scales"),
            numpy_helper.from_array(np.array([1], np.int64), "axes"),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    x = np.random.default_rng(0).standard_normal((1, 5, 5)).astype(np.float32)
    want = np.tril(np.maximum(x, 0)).repeat(2, 1).repeat(2, 2)[None]
    got = compile_graph(capture_onnx(model), tuning=0, threads=1)(x)
    np.testing.assert_allclose(got, want, rtol=1e-6)


def test_every_unsupported_operation_is_named_in_one_sentence_before_any_work() -> None:
    sketch = Sketch()
    x = sketch.input(2, 4)
    first = sketch.op(K.OPAQUE, [x], (2, 4), target="my::first")
    second = sketch.op(K.OPAQUE, [first], (2, 4), target="my::second")
    third = sketch.op(K.OPAQUE, [second], (2, 4), target="my::first")
    sketch.graph.set_outputs([third])
    sketch.graph.commit()
    with pytest.raises(UnsupportedOps) as caught:
        compile_graph(sketch.graph)
    said = str(caught.value)
    assert all(op.name in said for op in sketch.graph)
    assert "my::first" in said
    assert "my::second" in said
    assert "\n" not in said


def test_an_unsupported_operation_that_no_output_needs_does_not_matter() -> None:
    sketch = Sketch()
    x = sketch.input(2, 4)
    sketch.op(K.OPAQUE, [x], (2, 4), target="my::first")
    close(sketch.run(sketch.op(K.NEG, [x], (2, 4))), -sketch.of(x))


def test_dropout_in_training_is_refused() -> None:
    sketch = Sketch()
    x = sketch.input(2, 4)
    sketch.graph.set_outputs([sketch.op(K.DROPOUT, [x], (2, 4))])
    sketch.graph.commit()
    with pytest.raises(UnsupportedOps, match="evaluation mode"):
        compile_graph(sketch.graph)


@pytest.mark.parametrize("ir", ["fx", "onnx"])
@pytest.mark.parametrize(
    "layer",
    [
        lambda: nn.LSTM(6, 8, batch_first=True),
        lambda: nn.LSTM(6, 8, num_layers=2, bidirectional=True, batch_first=True),
        lambda: nn.LSTM(6, 8, bias=False),
        lambda: nn.GRU(6, 8),
        lambda: nn.GRU(6, 8, bidirectional=True),
        lambda: nn.RNN(6, 8, nonlinearity="relu"),
    ],
    ids=["lstm", "bidirectional lstm", "lstm without bias", "gru", "bidirectional gru", "rnn"],
)
def test_recurrent_layers_are_compiled(layer: Any, ir: str) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.tanh(self.layer(x)[0])

    torch.manual_seed(0)
    model, x = Model().eval(), torch.randn(4, 3, 6)
    graph = capture(model, (x,))
    if ir == "onnx":
        graph = capture_onnx(torch.onnx.export(model, (x,), dynamo=True, verbose=False))
    close(compile_graph(graph, threads=1)(x), model(x))


def test_recurrent_layer_of_dynamic_extents_is_refused_by_name() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.LSTM(6, 8, batch_first=True)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layer(x)[0]

    dynamic = ({0: torch.export.Dim("batch", min=2, max=50)},)
    exported = torch.onnx.export(
        Model().eval(), (torch.randn(4, 3, 6),), dynamo=True, verbose=False, dynamic_shapes=dynamic
    )
    with pytest.raises(UnsupportedOps, match="is dynamic, and it is unrolled"):
        compile_graph(capture_onnx(exported), threads=1)
