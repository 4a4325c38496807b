"""Every spelling of a join, a norm and a scale gives the same blocks: exported, traced, and through ONNX."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import warnings
from functools import cache
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from torch import fx

import rescompile as rc
from rescompile.blocks import Block, Report
from rescompile.graph import Graph
from tests.spellings import CASES, WIDTH, Collection

INPUTS = {False: torch.randn(2, 6, WIDTH), True: torch.randn(2, WIDTH, 6, 6)}
ROUTES = ("exported", "traced", "onnx")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same for all processes of a run."""
    own = tmp_path_factory.getbasetemp()
    return own.parent if "PYTEST_XDIST_WORKER" in os.environ else own


@cache
def inspected(route: str, images: bool, folder: Path) -> tuple[Graph, Report]:
    """All cases at once, and in ONNX, which takes longest, once for all processes."""
    torch.manual_seed(0)
    module = Collection({name: case for name, case in CASES.items() if case.images is images}).eval()
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            if route == "onnx":
                path = folder / f"spellings_{images}.onnx"
                with FileLock(path.with_suffix(".lock")):
                    if not path.exists():
                        torch.onnx.export(module, (INPUTS[images],), dynamo=True, verbose=False).save(path)
                graph = rc.load(path)
            elif route == "traced":
                graph = rc.capture(fx.symbolic_trace(module))
            else:
                graph = rc.capture(module, (INPUTS[images],))
        finally:
            logging.disable(logging.NOTSET)
    return graph, rc.inspect(graph)


def described(block: Block) -> str:
    scale = "" if block.scale is None else f" {block.scale.on}-{block.scale.type}"
    return f"{block.kind} {block.shortcut} {block.norm}{scale}"


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("name", CASES)
def test_spelling(name: str, route: str, folder: Path) -> None:
    case = CASES[name]
    graph, report = inspected(route, case.images, folder)
    blocks = [block for block in report if block.join_op.module.split(".")[0] == name]
    found, expected = [described(block) for block in blocks], case.expected(route)
    if route == "onnx":  # which does not always say of a number whether it was trained or written
        found, expected = ([text.replace("-constant", "-scalar") for text in texts] for texts in (found, expected))
    assert found == expected
    reasons = [join.reason for join in report.not_residual if graph.op(join.join).module.split(".")[0] == name]
    if case.refused and not (route == "onnx" and case.onnx is not None):
        assert any(case.refused in reason for reason in reasons), reasons


@pytest.mark.parametrize("route", ROUTES)
def test_couplings_are_beside_each_other(route: str, folder: Path) -> None:
    _, report = inspected(route, False, folder)
    blocks = [block for block in report if block.join_op.module.split(".")[0] == "three_couplings"]
    assert [block.parent for block in blocks] == [None] * 6
    assert [block.fork for block in blocks[2:]] == [block.join_value.name for block in blocks[:-2]]  # type: ignore[union-attr]
