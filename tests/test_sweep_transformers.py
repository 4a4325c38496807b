"""Tiny configurations of transformers' model types: what detection finds is what their definitions say."""

from __future__ import annotations

import pytest

from benchmarks import sweep_transformers
from benchmarks.sweep_expected_transformers import EXPECTED
from rescompile import fx_capture
from rescompile.blocks import Report
from rescompile.detection import inspect_graph
from rescompile.graph import Graph
from rescompile.kinds import OpKind

JOINS = (OpKind.ADD, OpKind.CONCAT)

# Activations and norms spelled in unusual ways, a mixture, parallel branches, stages.
SAMPLE = ("apertus", "falcon_h1", "hiera", "qwen2_moe", "squeezebert")


def untold(graph: Graph, report: Report) -> list[str]:
    """Joins that are neither in a block nor told why they are in none."""
    told = {op for block in report for op in block.join_ops}
    names = {entry.join for entry in report.not_residual}
    return [op.name for op in graph if op.kind in JOINS and op not in told and op.name not in names]


def counts(report: Report) -> dict[str, int]:
    found: dict[str, int] = {}
    for block in report:
        name = block.shortcut if block.kind == "add" else block.kind
        found[name] = found.get(name, 0) + 1
    return found


@pytest.mark.parametrize("name", SAMPLE)
def test_a_tiny_model_has_what_its_definition_says(name: str) -> None:
    model, inputs = sweep_transformers.build(name)
    graph = fx_capture.capture(model, inputs)
    report = inspect_graph(graph)
    expected = EXPECTED[name]
    assert counts(report) == expected.counts, report
    norms = report.summary()["by_norm"]
    assert max(norms, key=lambda norm: norms[norm]) == expected.norm
    assert untold(graph, report) == []


def test_every_expectation_is_of_a_model_type() -> None:
    assert EXPECTED.keys() <= set(sweep_transformers.names())


def test_layers_that_stay_are_of_every_sort() -> None:
    config = sweep_transformers.configuration("gpt_oss")
    assert config.num_hidden_layers == len(config.layer_types) == 2
    assert sorted(config.layer_types) == ["full_attention", "sliding_attention"]
