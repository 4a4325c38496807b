"""Small networks as ONNX files, and what ONNX Runtime's optimisers make of each."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import torch
from torch import nn

from tests.residual_models import livened

TOKENS = torch.randint(0, 97, (2, 12), generator=torch.Generator().manual_seed(0))
PIXELS = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}


class First(nn.Module):
    """A model of transformers that returns its last hidden state alone."""

    def __init__(self, name: str, **config: Any) -> None:
        super().__init__()
        import transformers

        settings = getattr(transformers, f"{name}Config")(attn_implementation="eager", **config)
        settings.use_cache = False
        self.model = getattr(transformers, f"{name}Model")(settings)

    def forward(self, x: torch.Tensor) -> Any:
        return self.model(x, return_dict=True).last_hidden_state


def conv(ins: int, outs: int, kernel: int = 3, groups: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(ins, outs, kernel, padding=kernel // 2, groups=groups), nn.BatchNorm2d(outs))


class Basic(nn.Module):
    """He's basic block: relu(s(x) + F(x)), a projection where the width changes."""

    def __init__(self, ins: int, outs: int) -> None:
        super().__init__()
        self.first, self.second = conv(ins, outs), conv(outs, outs)
        self.shortcut = conv(ins, outs, 1) if ins != outs else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.shortcut(x) + self.second(torch.relu(self.first(x))))


class Inverted(nn.Module):
    """MobileNet's block: x + narrow(relu6(depthwise(relu6(wide(x)))))"""

    def __init__(self, width: int) -> None:
        super().__init__()
        wide = 4 * width
        layers = [conv(width, wide, 1), nn.ReLU6(), conv(wide, wide, groups=wide), nn.ReLU6(), conv(wide, width, 1)]
        self.branch = nn.Sequential(*layers)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.branch(x)


MODELS: dict[str, Callable[[], tuple[nn.Module, torch.Tensor]]] = {
    "bert": lambda: (First("Bert", vocab_size=97, **SIZES), TOKENS),
    "gpt2": lambda: (First("GPT2", vocab_size=97, n_embd=32, n_layer=2, n_head=4, n_positions=64), TOKENS),
    "llama": lambda: (First("Llama", vocab_size=97, num_key_value_heads=2, **SIZES), TOKENS),
    "vit": lambda: (First("ViT", image_size=16, patch_size=8, **SIZES), PIXELS),
    "resnet": lambda: (nn.Sequential(Basic(3, 16), Basic(16, 16), Basic(16, 32)), PIXELS),
    "mobilenet": lambda: (nn.Sequential(conv(3, 16), nn.ReLU6(), Inverted(16), Inverted(16)), PIXELS),
}
TRANSFORMERS = {"bert": "bert", "gpt2": "bert", "llama": "gpt2", "vit": "vit"}


@functools.cache
def exported(name: str) -> onnx.ModelProto:
    """The network as torch exports it."""
    torch.manual_seed(0)
    model, example = MODELS[name]()
    program = torch.onnx.export(livened(model), (example,), dynamo=True, verbose=False, opset_version=20)
    return program.model_proto  # type: ignore[no-any-return, union-attr]


@functools.cache
def optimised(name: str, how: str) -> onnx.ModelProto:
    """As ONNX Runtime's session saves it at a level ("extended", "all"), or as its transformers tool makes it."""
    with tempfile.TemporaryDirectory() as folder:
        after = Path(folder) / "after.onnx"
        if how != "tool":
            session(exported(name), how, after)
            return onnx.load(after)
        from onnxruntime.transformers import optimizer

        before = Path(folder) / "before.onnx"
        onnx.save(exported(name), before)
        tool: Any = optimizer.optimize_model(str(before), model_type=TRANSFORMERS[name], num_heads=4, hidden_size=32)
        tool.save_model_to_file(str(after))
        return onnx.load(after)


def session(proto: onnx.ModelProto, level: str, path: Path) -> Any:
    """A session of ONNX Runtime on the CPU at an optimisation level, which saves what it made of the model."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, f"ORT_ENABLE_{level.upper()}")
    options.optimized_model_filepath = str(path)
    return onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
