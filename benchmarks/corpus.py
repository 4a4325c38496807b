"""The models of the demo and the benchmarks: real architectures with random weights.

Each entry builds `(module, example_inputs)`, so that the command line takes it too: `benchmarks.corpus:resnet50`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

Built = tuple[torch.nn.Module, tuple[torch.Tensor, ...]]


def resnet18() -> Built:
    """ResNet-18 (He 2015), 8 basic blocks, batch 1, 224²."""
    return _vision("resnet18")


def resnet50() -> Built:
    """ResNet-50 (He 2015), 16 bottleneck blocks, batch 1, 224²."""
    return _vision("resnet50")


def mobilenet_v2() -> Built:
    """MobileNetV2 (Sandler 2018), inverted residuals with linear bottlenecks, batch 1, 224²."""
    return _vision("mobilenet_v2")


def convnext_tiny() -> Built:
    """ConvNeXt-T (Liu 2022), blocks with a layer scale, batch 1, 224²."""
    return _vision("convnext_tiny")


def vit_b_16() -> Built:
    """ViT-B/16 (Dosovitskiy 2020), 12 pre-norm layers, batch 1, 224²."""
    return _vision("vit_b_16")


def bert_base() -> Built:
    """BERT-base (Devlin 2018), 12 post-norm layers of 2 joins, batch 1, 128 tokens."""
    import_torchvision()  # transformers imports it
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    return _language(BertModel(BertConfig(), add_pooling_layer=False), 30522)


def gpt2() -> Built:
    """GPT-2 small (Radford 2019), 12 pre-norm layers, batch 1, 128 tokens."""
    import_torchvision()  # transformers imports it
    from transformers import GPT2Config, GPT2Model

    torch.manual_seed(0)
    config = GPT2Config(use_cache=False, attn_implementation="eager")
    return _language(GPT2Model(config), 50257)


CORPUS: dict[str, Callable[[], Built]] = {
    "resnet18": resnet18,
    "resnet50": resnet50,
    "mobilenet_v2": mobilenet_v2,
    "convnext_tiny": convnext_tiny,
    "vit_b_16": vit_b_16,
    "bert_base": bert_base,
    "gpt2": gpt2,
}


class LastHidden(torch.nn.Module):
    """A transformer that returns its last hidden state alone, as a tensor."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        hidden: torch.Tensor = self.model(input_ids=input_ids, return_dict=True).last_hidden_state
        return hidden


def _vision(name: str) -> Built:
    torch.manual_seed(0)
    model = import_torchvision().models.get_model(name, weights=None)
    vary_norms(model)
    return model.eval(), (torch.randn(1, 3, 224, 224),)


def vary_norms(model: torch.nn.Module) -> None:
    """Give norms a scale, shift and statistics of their own, so that nothing folds into ones and zeros."""
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d | torch.nn.LayerNorm):
            for name, tensor in (*module.named_parameters(), *module.named_buffers()):
                if tensor.is_floating_point():
                    low, high = (-0.2, 0.2) if name in ("bias", "running_mean") else (0.7, 1.3)
                    torch.nn.init.uniform_(tensor, low, high)


def _language(model: Any, vocabulary: int) -> Built:
    vary_norms(model)
    tokens = torch.randint(0, vocabulary, (1, 128), generator=torch.Generator().manual_seed(0))
    return LastHidden(model).eval(), (tokens,)


def import_torchvision() -> Any:
    """torchvision, with the operators declared that its compiled part would bring beside a CPU torch."""
    try:
        import torchvision
    except RuntimeError:
        library = torch.library.Library("torchvision", "DEF")
        library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _KEPT.append(library)
        import torchvision
    return torchvision


_KEPT: list[torch.library.Library] = []  # a library's definitions live as long as it does
