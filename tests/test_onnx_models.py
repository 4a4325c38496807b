"""Whole ONNX models: everything is recognised, and writing every operation anew keeps the numbers."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from rescompile.kinds import OpKind as K
from rescompile.onnx_files import capture, load
from rescompile.onnx_graph import OnnxGraph
from tests.light_models import FOLDER, randomised
from tests.onnx_models import Array, check, rewritten, same

LIGHT = (
    "bvlc_alexnet densenet121 inception_v1 inception_v2 resnet50 shufflenet squeezenet vgg19 zfnet512".split()  # noqa: SIM905
)
CONVS = dict(zip(LIGHT, (5, 121, 57, 69, 53, 49, 26, 16, 5), strict=True))


def census(graph: OnnxGraph) -> Counter[str]:
    return Counter(op.kind.value for op in graph)


def feeds_of(graph: OnnxGraph, extents: dict[str, int] | None = None) -> dict[str, Array]:
    rng = np.random.default_rng(0)
    feeds = {}
    for value in graph.inputs:
        assert value.shape is not None
        shape = [extent if isinstance(extent, int) else (extents or {})[extent] for extent in value.shape]
        whole = (value.dtype or "").startswith("int")
        feeds[value.name] = (rng.integers(0, 20, shape) if whole else rng.normal(size=shape)).astype(value.dtype)
    return feeds


def proven(graph: OnnxGraph, extents: dict[str, int] | None = None) -> None:
    """Rewriting every operation keeps outputs that depend on the input."""
    feeds = feeds_of(graph, extents)
    expected = graph.run(feeds)
    assert any(output.dtype.kind == "f" and output.std() > 1e-3 for output in expected.values())
    copy = rewritten(graph)
    check(copy)
    same(expected, copy.run(feeds), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", LIGHT)
def test_light_models_have_no_unknown_operation_and_no_unknown_shape(name: str) -> None:
    graph = load(FOLDER / f"light_{name}.onnx")
    assert graph.opset == 9
    assert graph.notes == []
    assert all(op.kind is not K.OPAQUE for op in graph)
    assert all(value.shape is not None and value.dtype is not None for value in graph.values)
    assert census(graph)["conv"] == CONVS[name]
    assert len(graph.inputs) == 1


@pytest.mark.parametrize("name", ["resnet50", "shufflenet"])
def test_light_models_with_live_weights_keep_their_numbers(name: str) -> None:
    model = randomised(name)
    model.ir_version = 4  # the first in which initializers need not be inputs
    proven(capture(model))


def exported(model: nn.Module, inputs: tuple[Any, ...], opset: int, **options: Any) -> onnx.ModelProto:
    program = torch.onnx.export(model.eval(), inputs, dynamo=True, verbose=False, opset_version=opset, **options)
    assert program is not None
    return program.model_proto


@pytest.mark.parametrize("optimize", [True, False])
def test_exported_convolutional_network(optimize: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.Hardswish(),
        nn.MaxPool2d(3, 2, 1),
        nn.Conv2d(8, 8, 3, groups=8),
        nn.GroupNorm(2, 8),
        nn.SiLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 5),
    )
    graph = capture(exported(model, (torch.randn(2, 3, 16, 16),), 18, optimize=optimize))
    count = census(graph)
    assert (count["conv"], count["batch_norm"], count["linear"], count["opaque"]) == (2, 0 if optimize else 1, 1, 0)
    assert (count["hardswish"], count["silu"]) == (1, 1)
    assert graph.op(next(op.name for op in graph if op.kind is K.LINEAR)).module == "9"
    proven(graph)


@pytest.mark.parametrize("opset", [18, 20])
def test_exported_transformer_layer(opset: int) -> None:
    torch.backends.mha.set_fastpath_enabled(False)
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, activation="gelu")
    graph = capture(exported(layer, (torch.randn(2, 5, 16),), opset))
    count = census(graph)
    assert (count["layer_norm"], count["gelu"], count["linear"], count["opaque"]) == (2, 1, 4, 0)
    proven(graph)


class Tuples(nn.Module):
    """A transformers model that returns plain tensors."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.model(ids)[0]


needs_transformers = pytest.mark.usefixtures("torchvision")  # which transformers imports
TINY = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
IDS = torch.arange(12).reshape(2, 6)


@needs_transformers
def test_exported_llama() -> None:
    from transformers import LlamaConfig, LlamaModel

    config = LlamaConfig(**TINY, num_key_value_heads=1, intermediate_size=32, use_cache=False)
    config._attn_implementation = "eager"
    graph = capture(exported(Tuples(LlamaModel(config)), (IDS,), 20))
    count = census(graph)
    assert (count["rms_norm"], count["silu"], count["linear"], count["opaque"]) == (3, 1, 7, 0)
    proven(graph)


@needs_transformers
def test_exported_gpt2() -> None:
    from transformers import GPT2Config, GPT2Model

    config = GPT2Config(vocab_size=40, n_embd=16, n_layer=1, n_head=2, n_positions=16, use_cache=False)
    config._attn_implementation = "eager"
    graph = capture(exported(Tuples(GPT2Model(config)), (IDS,), 18))
    count = census(graph)
    assert (count["layer_norm"], count["gelu"], count["linear"], count["opaque"]) == (3, 1, 4, 0)
    proven(graph)


@needs_transformers
def test_exported_bert_with_symbolic_extents() -> None:
    from transformers import BertConfig, BertModel

    config = BertConfig(**TINY, intermediate_size=32)
    config._attn_implementation = "eager"
    dims = {"ids": {0: torch.export.Dim("batch"), 1: torch.export.Dim("length")}}
    model = Tuples(BertModel(config, add_pooling_layer=False))
    graph = capture(exported(model, (IDS,), 20, dynamic_shapes=dims))
    norms = [op for op in graph if op.kind is K.LAYER_NORM]
    assert [op.output.shape for op in norms] == [("batch", "length", 16)] * 3
    assert census(graph)["linear"] == 6
    # gathering the buffered token types by element has no kind
    assert {op.attr("target") for op in graph if op.kind is K.OPAQUE} <= {"GatherElements"}
    proven(graph, {"batch": 3, "length": 7})
