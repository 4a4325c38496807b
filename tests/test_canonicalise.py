"""`canonicalise`: what does nothing goes, also several in a row."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import rescompile as rc
from tests.test_insert_shortcuts import IRS, captured


class InARow(nn.Module):
    """Three operations in a row that change nothing, the last one under the graph's output where `last`."""

    def __init__(self, last: bool = False) -> None:
        super().__init__()
        self.last = last

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.relu(x)
        y = (y + 0.0).reshape(2, 3) + 0.0
        return y if self.last else torch.tanh(y)


@pytest.mark.parametrize("ir", IRS)
def test_operations_in_a_row_that_do_nothing_go(ir: str) -> None:
    result = rc.rewrite(captured(InARow(), (torch.randn(2, 3),), ir), "canonicalise")
    assert [op.kind.value for op in result.graph] == ["relu", "tanh"]
    assert result.verification.ok


@pytest.mark.parametrize("ir", IRS)
def test_the_last_in_a_row_stays_where_it_is_an_output(ir: str) -> None:
    result = rc.rewrite(captured(InARow(last=True), (torch.randn(2, 3),), ir), "canonicalise")
    assert len(result.refused) <= 1  # an exporter may have dropped them all
    assert len(result.graph) == 1 + len(result.refused)
    assert result.verification.ok


def test_casts_in_a_row_of_a_language_model_go() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, attn_implementation="eager", use_cache=False,
    )  # fmt: skip
    model = transformers.LlamaModel(config).eval()
    result = rc.rewrite(rc.capture(model, (torch.randint(0, 32, (1, 6)),)), "canonicalise{dropout=true}")
    assert result.applied
    assert result.verification.ok
    assert not rc.rewrite(result.graph, "canonicalise{dropout=true}", verify=False).applied
