"""Analysis is near-linear in time and memory, whatever the form: counted in steps, not in seconds."""

from __future__ import annotations

import gc
import sys
import tracemalloc
from types import FrameType
from typing import Any

import pytest

from benchmarks.scale_forms import FORMS, in_memory
from rescompile.detection import inspect_graph
from rescompile.graph import Graph

SIZE = 600
# Twice the size may take this many times the steps: 2 for what is linear, and some for logarithms and for beginnings.
BOUND = 2.3


def steps(graph: Graph) -> int:
    """How many lines of Python the analysis runs through."""
    count = 0

    def line(frame: FrameType, event: str, argument: Any) -> Any:
        nonlocal count
        count += event == "line"
        return line

    before = sys.gettrace()
    sys.settrace(line)
    try:
        inspect_graph(graph)
    finally:
        sys.settrace(before)
    return count


def peak(graph: Graph) -> int:
    """The most bytes that the analysis held, its report included."""
    gc.collect()
    tracemalloc.start()
    try:
        report = inspect_graph(graph)
        assert report.blocks
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("form", FORMS)
def test_steps_grow_with_the_size(form: str) -> None:
    small, large = (in_memory(FORMS[form](size)) for size in (SIZE, 2 * SIZE))
    assert steps(large) < BOUND * steps(small)


@pytest.mark.parametrize("form", FORMS)
def test_memory_grows_with_the_size(form: str) -> None:
    small, large = (in_memory(FORMS[form](size)) for size in (SIZE, 2 * SIZE))
    inspect_graph(small)  # what is made once only is made now
    assert peak(large) < BOUND * peak(small)


@pytest.mark.parametrize(
    ("form", "nodes", "blocks"), [("one fork", 30_001, 10_000), ("nested", 3_003, 1_000), ("chain", 25_001, 5_000)]
)
def test_large_networks_are_analysed_whole(form: str, nodes: int, blocks: int) -> None:
    report = inspect_graph(in_memory(FORMS[form](nodes)))
    assert len(report) == blocks
    assert {block.kind for block in report} == {"add"}
    if form == "nested":
        assert [block.parent for block in report] == [*range(1, blocks), None]
    elif form == "one fork":
        assert {block.fork for block in report} == {"x"}
    else:
        assert all(block.parent is None for block in report)
