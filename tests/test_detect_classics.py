"""Detection on architectures of the literature, written out by hand; the counts come from their definitions.

Every one is captured by torch.export; a sample of them is traced by torch.fx and exported to ONNX as well
(`python -m tests.classics.check --ir fx,symbolic,onnx` does it for all).
"""

from __future__ import annotations

from pathlib import Path

import pytest

from rescompile.detection import inspect_graph
from tests.classics.check import cases

CASES = cases()
SAMPLE = (
    "audio: WaveNet",
    "flows: RevNet",
    "gated: highway, carry gate of its own",
    "generative: AlphaZero",
    "resnets: CIFAR ResNet, option A by x·0",
    "tabular: TabNet",
    "transformers: DiT",
    "unets: Attention U-Net",
)


@pytest.mark.parametrize("name", CASES)
def test_exported_architecture(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    assert case.differences(inspect_graph(case.graph("fx", tmp_path))) == []


@pytest.mark.parametrize("ir", ["symbolic", "onnx"])
@pytest.mark.parametrize("name", SAMPLE)
def test_architecture_in_another_ir(name: str, ir: str, tmp_path: Path) -> None:
    case = CASES[name]
    assert case.differences(inspect_graph(case.graph(ir, tmp_path)), ir) == []
