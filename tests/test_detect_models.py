"""Detection on real architectures, as torch exports them, as torch.fx traces them, and as ONNX files.

The numbers are those of the architectures (He 2015: 8 and 16 blocks; two joins a transformer layer, three with a
memory), not what some run once gave.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from torch import nn

import rescompile as rc
from benchmarks.corpus import import_torchvision
from rescompile import fx_capture, onnx_files
from rescompile.blocks import Report
from rescompile.detection import inspect_graph

Inputs = tuple[torch.Tensor, ...]
Built = tuple[nn.Module, Inputs]


class LastHidden(nn.Module):
    """A transformer that returns its last hidden state alone."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, *inputs: torch.Tensor) -> Any:
        return self.model(*inputs, return_dict=True).last_hidden_state


def vision(name: str, **options: Any) -> Built:
    return import_torchvision().models.get_model(name, weights=None, **options), (torch.randn(1, 3, 64, 64),)


def vision_transformer() -> Built:
    vit = import_torchvision().models.VisionTransformer(32, 8, num_layers=3, num_heads=4, hidden_dim=32, mlp_dim=64)
    return vit, (torch.randn(1, 3, 32, 32),)


def hugging_face(name: str, *inputs: torch.Tensor, **config: Any) -> Built:
    import_torchvision()
    import transformers

    settings = getattr(transformers, f"{name}Config")(attn_implementation="eager", **config)
    if name == "GPT2":
        settings.use_cache = False
    return LastHidden(getattr(transformers, f"{name}Model")(settings)), inputs


SMALL = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 64}
TOKENS = torch.randint(0, 97, (2, 12), generator=torch.Generator().manual_seed(0))


def bert() -> Built:
    return hugging_face("Bert", TOKENS, torch.ones_like(TOKENS), vocab_size=97, **SMALL)


def gpt2() -> Built:
    return hugging_face("GPT2", TOKENS, vocab_size=97, n_embd=32, n_layer=3, n_head=4, n_positions=64)


def vit() -> Built:
    return hugging_face("ViT", torch.randn(1, 3, 32, 32), image_size=32, patch_size=8, **SMALL)


def encoder(norm_first: bool) -> Built:
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, norm_first=norm_first)
    return nn.TransformerEncoder(layer, 3, enable_nested_tensor=False), (torch.randn(2, 7, 32),)


def decoder(norm_first: bool) -> Built:
    layer = nn.TransformerDecoderLayer(32, 4, 64, batch_first=True, norm_first=norm_first)
    return nn.TransformerDecoder(layer, 3), (torch.randn(2, 5, 32), torch.randn(2, 7, 32))


# model → how to build it, how many blocks by shortcut, where the norms are (batch norms: before ONNX export folds them)
MODELS: dict[str, tuple[Callable[[], Built], dict[str, int], str]] = {
    "squeezenet": (lambda: vision("squeezenet1_1"), {}, ""),
    "resnet18": (lambda: vision("resnet18"), {"identity": 5, "projection": 3}, "branch"),
    "resnet50": (lambda: vision("resnet50"), {"identity": 12, "projection": 4}, "branch"),
    "bert": (bert, {"identity": 6}, "post"),
    "gpt2": (gpt2, {"identity": 6}, "pre"),
    "vit": (vit, {"identity": 6}, "pre"),
    "torchvision vit": (vision_transformer, {"identity": 6}, "pre"),
    "encoder post": (lambda: encoder(False), {"identity": 6}, "post"),
    "encoder pre": (lambda: encoder(True), {"identity": 6}, "pre"),
    "decoder post": (lambda: decoder(False), {"identity": 9}, "post"),
    "decoder pre": (lambda: decoder(True), {"identity": 9}, "pre"),
}
TRACED = ("squeezenet", "resnet18", "resnet50", "torchvision vit")
EXPORTED = ("resnet18", "bert", "gpt2", "torchvision vit", "encoder post", "decoder pre")

LIGHT: dict[str, dict[str, int]] = {
    "bvlc_alexnet": {},
    "densenet121": {"dense": 58},
    "inception_v1": {},
    "inception_v2": {},
    "resnet50": {"identity": 12, "projection": 4},
    "squeezenet": {},
    "vgg19": {},
    "zfnet512": {},
}


def model(name: str) -> Built:
    torch.manual_seed(0)
    built, inputs = MODELS[name][0]()
    return built.eval(), inputs


def check(report: Report, name: str, norm: bool = True) -> None:
    summary = report.summary()
    assert summary["by_shortcut"] == MODELS[name][1]
    assert summary["by_kind"] == ({"add": sum(MODELS[name][1].values())} if MODELS[name][1] else {})
    assert summary["nested"] == 0
    if norm and MODELS[name][2]:
        assert summary["by_norm"] == {MODELS[name][2]: summary["blocks"]}


@pytest.mark.parametrize("name", MODELS)
def test_exported_torch_model(name: str) -> None:
    check(inspect_graph(fx_capture.capture(*model(name))), name)


@pytest.mark.parametrize("name", TRACED)
def test_traced_torch_model(name: str) -> None:
    built, inputs = model(name)
    check(inspect_graph(fx_capture.capture(torch.fx.symbolic_trace(built), inputs)), name)


@pytest.fixture(scope="session")
def exports(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """ONNX files of the models, each exported once in a session."""
    folder = tmp_path_factory.mktemp("onnx")

    def export(name: str) -> Path:
        path = folder / f"{name.replace(' ', '_')}.onnx"
        if not path.exists():
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                torch.onnx.export(*model(name), path, dynamo=True, verbose=False, external_data=False)
        return path

    return export


@pytest.mark.parametrize("name", EXPORTED)
def test_onnx_export_has_the_same_blocks(name: str, exports: Callable[[str], Path]) -> None:
    check(inspect_graph(onnx_files.load(exports(name))), name, norm=name != "resnet18")


class Queries(nn.Module):
    """The first decoder layer of DETR: the stream starts as zeros, attends to itself, then to a memory."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.positions = nn.Parameter(torch.randn(5, width))
        self.own, self.cross = (nn.ModuleList(nn.Linear(width, width) for _ in range(3)) for _ in range(2))
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))

    def forward(self, memory: torch.Tensor) -> torch.Tensor:
        positions = self.positions.expand(len(memory), -1, -1)
        x = torch.zeros_like(positions)
        x = self.norms[0](x + self.attend(self.own, x + positions, x + positions, x))
        return self.norms[1](x + self.attend(self.cross, x + positions, memory, memory))

    def attend(self, linears: nn.ModuleList, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        scores = linears[0](q) @ linears[1](k).transpose(1, 2)
        mixed: torch.Tensor = torch.softmax(scores, -1) @ linears[2](v)
        return mixed


@pytest.mark.parametrize(("optimize", "blocks"), [(True, 1), (False, 2)])
def test_exporter_folds_away_a_skip_of_zeros(optimize: bool, blocks: int) -> None:
    # 0 + attention is attention: torch.onnx.export's optimiser leaves DETR with 9 blocks of 10.
    model, memory = Queries().eval(), (torch.randn(1, 7, 8),)
    assert len(rc.inspect(rc.capture(model, memory))) == 2
    program = torch.onnx.export(model, memory, dynamo=True, optimize=optimize, verbose=False)
    assert len(rc.inspect(rc.capture(program))) == blocks


@pytest.mark.parametrize("name", LIGHT)
def test_light_onnx_model(name: str) -> None:
    path = Path(onnx.__file__).parent / "backend" / "test" / "data" / "light" / f"light_{name}.onnx"
    report = inspect_graph(onnx_files.load(path))
    summary = report.summary()
    expected = LIGHT[name]
    counted = {kind: count for kind, count in summary["by_kind"].items() if kind != "add"} | summary["by_shortcut"]
    assert counted == expected


def test_caffe_scales_of_the_light_densenet_are_biases() -> None:
    path = Path(onnx.__file__).parent / "backend" / "test" / "data" / "light" / "light_densenet121.onnx"
    report = inspect_graph(onnx_files.load(path))
    assert sum(join.reason.startswith("bias") for join in report.not_residual) == 121


def test_modules_name_the_blocks_of_a_resnet() -> None:
    report = inspect_graph(fx_capture.capture(*model("resnet18")))
    assert [block.module for block in report] == [f"layer{stage}.{unit}" for stage in range(1, 5) for unit in range(2)]
    assert [block.shape[1] for block in report if block.shape] == [64, 64, 128, 128, 256, 256, 512, 512]
