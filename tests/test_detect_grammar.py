"""What the grammar generates, detection finds, in every IR, whatever the order, the names and the operands' places."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

pytest.importorskip("torch")
pytest.importorskip("onnx")

from rescompile.blocks import Report
from rescompile.detection import inspect_graph
from rescompile.graph import Graph
from tests.residual_grammar import programs
from tests.residual_program import K, Program
from tests.residual_realisers import REALISERS

_UNHURRIED = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])


_JOINS = (K.ADD, K.CONCAT, K.MAXIMUM, K.MINIMUM, K.WHERE)


def check(program: Program, graph: Graph, report: Report) -> None:
    """The blocks are those that were meant, and every other join has a reason."""
    found = {block.join: block for block in report}
    assert set(found) == {program.name(entry.join) for entry in program.made}, report
    joins = {block.id: block.join for block in report}
    for entry in program.made:
        block = found[program.name(entry.join)]
        got = (block.kind, block.fork, block.shortcut, block.parent if block.parent is None else joins[block.parent])
        parent = None if entry.parent is None else program.name(entry.parent)
        shortcut = block.shortcut if entry.kind == "branches" else entry.shortcut
        assert got == (entry.kind, program.name(entry.fork), shortcut, parent), block.join
        assert entry.norm is None or block.norm == entry.norm, (block.join, block.norm, entry)
        assert block.scale == program.scale(entry), block.join
    told = {op.name for block in report for op in block.join_ops} | {join.join for join in report.not_residual}
    assert told >= {op.name for op in graph if op.kind in _JOINS}


@pytest.mark.parametrize("ir", REALISERS)
@given(programs(), st.integers(0, 2**32))
@settings(_UNHURRIED, max_examples=25)
def test_detection_finds_what_the_grammar_generates(ir: str, program: Program, seed: int) -> None:
    varied = program.varied(seed)
    graph = REALISERS[ir](varied)
    check(varied, graph, inspect_graph(graph))


@pytest.mark.parametrize("ir", REALISERS)
@given(programs(), st.integers(0, 2**32))
@settings(_UNHURRIED, max_examples=25)
def test_detection_finds_it_where_shapes_and_dtypes_are_not_known(ir: str, program: Program, seed: int) -> None:
    varied = program.varied(seed).without_types(seed)
    graph = REALISERS[ir](varied)
    check(varied, graph, inspect_graph(graph))
