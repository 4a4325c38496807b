"""What shortcuts are for: a deep network that trains worse than a shallow one, or not at all, trains better."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

pytest.importorskip("sklearn")

from examples import deep_mlp, degradation
from examples.training import draw_curves


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Operations this small are slower on more threads, and other tests may have asked for more."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_deep_plain_network_trains_worse_than_a_shallow_one_and_better_than_both_with_shortcuts() -> None:
    outcomes = degradation.compare((20, 56), steps=60, seeds=1, width=4)
    shallow, deep, skipped = (outcome.losses[0] for outcome in outcomes.values())
    assert skipped < 0.5 * shallow
    assert shallow < 0.8 * deep
    assert outcomes["plain-56"].parameters == outcomes["plain-56 + skips"].parameters


def test_gradient_that_vanishes_reaches_the_first_layer_behind_shortcuts_and_the_network_learns() -> None:
    outcomes = deep_mlp.compare(depth=200, steps=40)
    plain, skipped = outcomes["plain"], outcomes["with shortcuts"]
    assert plain.first == 0.0 < plain.last
    assert skipped.first > 0.1 * skipped.last
    assert plain.loss > 2.2
    assert skipped.loss < 1.5
    assert skipped.accuracy > 0.6


@pytest.mark.parametrize("name", ["curves.svg", "curves.png"])
def test_curves_are_drawn(tmp_path: Path, name: str) -> None:
    draw_curves({"plain": [[2.0, 1.0, 0.5]], "with shortcuts": [[1.0, 0.5, 0.25]]}, "losses", tmp_path / "new" / name)
    assert (tmp_path / "new" / name).stat().st_size > 1000
