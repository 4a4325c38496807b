"""Runtimes beside each other: the same numbers from each, and measurements in interleaved blocks."""

from __future__ import annotations

from collections.abc import Callable
from itertools import groupby

import numpy as np
import pytest
import torch
from torch import nn

import rescompile as rc
from rescompile.backends.measure import measure
from rescompile.backends.runtimes import prepare
from rescompile.errors import RescompileError
from rescompile.graph import Graph


class Masked(nn.Module):
    """y = x + relu(linear(x)) where the mask says so; the other output is the mask itself."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor, *, mask: torch.Tensor, scale: float = 2.0) -> dict[str, torch.Tensor]:
        return {"y": x + scale * torch.relu(self.linear(x)) * mask, "kept": mask + 0}


def captured() -> tuple[Graph, list[np.ndarray]]:
    torch.manual_seed(0)
    graph = rc.capture(Masked().eval(), {"x": torch.randn(2, 8), "mask": torch.ones(2, 1)})
    return graph, [np.random.default_rng(0).standard_normal((2, 8)).astype(np.float32), np.ones((2, 1), np.float32)]


@pytest.mark.parametrize("name", ["eager", "onnxruntime"])
def test_runtimes_agree_with_the_graph_itself(name: str) -> None:
    graph, arrays = captured()
    expected = list(graph.run(dict(zip([value.name for value in graph.inputs], arrays, strict=True))).values())
    found = prepare(graph, name, threads=1).run(arrays)
    assert len(found) == len(expected) == 2
    for a, b in zip(expected, found, strict=True):
        np.testing.assert_allclose(b, a, rtol=0, atol=1e-6)


def test_a_bound_call_runs_on_its_own_inputs() -> None:
    graph, arrays = captured()
    runtime = prepare(graph, "eager", threads=1)
    call = runtime.bind(arrays)
    first, second = call(), call()
    assert isinstance(first, dict)
    assert isinstance(second, dict)
    torch.testing.assert_close(first["y"], second["y"], rtol=0, atol=0)


def test_an_unknown_runtime_is_told_the_nearest() -> None:
    with pytest.raises(RescompileError, match="did you mean 'eager'"):
        prepare(Graph(), "eagre")


def test_a_graph_that_is_not_torch_does_not_run_eagerly() -> None:
    with pytest.raises(RescompileError, match="runs torch models"):
        prepare(Graph(), "eager")


def test_candidates_take_turns_in_blocks() -> None:
    calls: list[str] = []

    def call(name: str) -> Callable[[], object]:
        return lambda: calls.append(name)

    names = ["a", "b", "c"]
    found = measure({name: call(name) for name in names}, rounds=4, discarded=2, timed=3, pause=0.0)
    assert {name: len(seconds) for name, seconds in found.items()} == {"a": 12, "b": 12, "c": 12}
    assert all(second >= 0 for seconds in found.values() for second in seconds)
    assert len(calls) == 4 * 3 * (2 + 3)
    blocks = [len(list(block)) for _, block in groupby(calls)]
    assert all(length % 5 == 0 for length in blocks)
    rounds = [calls[start : start + 15 : 5] for start in range(0, 60, 15)]
    assert all(sorted(order) == names for order in rounds)
    assert len({tuple(order) for order in rounds}) > 1
