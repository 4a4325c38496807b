"""`rescompile explore`: what placements cost, how far gradients reach, how they train, and one search by many."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import rescompile as rc
from rescompile.costs import graph_costs
from rescompile.exploring import BASELINE, Candidate, Training, explore, grid
from rescompile.fx_training import first_to_last
from rescompile.graph import Graph
from tests.plain_models import mlp

IRS = ("fx", "onnx")
Run = Callable[..., tuple[int, str, str]]

# What the command line is given: a model, and training functions that leave a line for each training.
LAB = '''
import os, pathlib, time
import torch
from torch import nn

def model():
    torch.manual_seed(0)
    layers = [layer for _ in range(5) for layer in (nn.Linear(8, 8), nn.Tanh())]
    return nn.Sequential(*layers, nn.Linear(8, 2)), (torch.zeros(2, 8),)

def _note(text):
    with open("log.txt", "a") as log:
        log.write(f"{os.getpid()} {text}\\n")

def train(model, report, steps):
    _note("trained")
    loss = sum(float(p.detach().double().abs().sum()) for p in model.parameters())
    for step in range(steps):
        report(step, loss)
    return loss

def together(model, report, steps):
    """Goes on when two processes are at work."""
    _note("trained")
    until = time.time() + 150
    while time.time() < until and len({line.split()[0] for line in open("log.txt")}) < 2:
        time.sleep(0.05)
    return 1.0

def dies(model, report, steps):
    if pathlib.Path("alive").exists():
        return train(model, report, steps)
    os._exit(9)

def fails(model, report, steps):
    raise ValueError("no data")

NUMBER = 3
'''
NARROW = ("--every", "1,2", "--join", "before-activation", "--kind", "add,gated")  # 4 placements


@pytest.fixture
def lab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a module of a model and training functions, as the current one."""
    (tmp_path / "placement_lab.py").write_text(LAB)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "placement_lab", raising=False)
    return tmp_path


def captured(model: nn.Module, inputs: tuple[torch.Tensor, ...], ir: str) -> Graph:
    model.eval()
    if ir == "fx":
        return rc.capture(model, inputs)
    return rc.capture(torch.onnx.export(model, inputs, dynamo=True, verbose=False))


def trainings(folder: Path) -> int:
    log = folder / "log.txt"
    return len(log.read_text().splitlines()) if log.exists() else 0


# ---- costs and gradients -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("ir", IRS)
def test_added_costs_are_the_differences_of_the_graphs(ir: str) -> None:
    graph = captured(mlp(4), (torch.randn(2, 16),), ir)
    specs = grid((1, 2), ("before-activation",), ("add", "gated", "dense"))
    found = {candidate.spec: candidate for candidate in rc.explore(graph, candidates=specs).candidates}
    before = graph_costs(graph)
    assert len(found) == 7
    for spec in specs:
        after = graph_costs(rc.rewrite(graph, spec, verify=False).graph)
        candidate = next(
            c for c in found.values() if c.spec != BASELINE and rc.plan(graph, c.spec) == rc.plan(graph, spec)
        )
        assert candidate.added == {
            "parameters": after.parameters - before.parameters,
            "flops": after.flops - before.flops,
            "bytes": after.bytes - before.bytes,
        }
    assert found[BASELINE].added == {}


@pytest.mark.parametrize("ir", IRS)
def test_gradient_ratio_is_that_of_autograd(ir: str) -> None:
    torch.manual_seed(0)
    model = mlp(3)
    inputs = torch.randn(2, 16, generator=torch.Generator().manual_seed(5))
    direction = torch.randn(2, 4, generator=torch.Generator().manual_seed(7))
    (model(inputs) * direction).sum().backward()
    first, last = model[0].weight.grad, model[-1].weight.grad
    expected = float(first.square().mean().sqrt() / last.square().mean().sqrt())
    graph = captured(model, (inputs,), ir)
    assert first_to_last(graph, inputs.numpy(), seed=7) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("ir", IRS)
def test_gradient_ratio_of_a_candidate_is_that_of_its_own_model(ir: str) -> None:
    torch.manual_seed(0)
    graph = captured(mlp(4), (torch.randn(2, 16),), ir)
    inputs = np.random.default_rng(0).standard_normal((2, 16)).astype(np.float32)
    spec = "insert-shortcuts{every=2,start=residual}"
    found = {c.spec: c.ratio for c in rc.explore(graph, candidates=[spec], inputs=inputs, seed=3).candidates}
    rewritten = rc.rewrite(graph, spec, verify=False).graph
    assert found.pop(BASELINE) == first_to_last(graph, inputs, 3)
    assert list(found.values()) == [first_to_last(rewritten, inputs, 3)]


def test_shortcuts_bring_the_gradient_of_the_first_layer_back() -> None:
    torch.manual_seed(0)
    spec = "insert-shortcuts{every=1,start=residual}"
    found = rc.explore(mlp(20), (torch.randn(2, 16),), candidates=[spec]).candidates
    plain = next(c.ratio for c in found if c.spec == BASELINE)
    skipped = next(c.ratio for c in found if c.spec != BASELINE)
    assert plain is not None
    assert skipped is not None
    assert plain < 1e-3
    assert skipped > 1e-1
    assert found[0].spec != BASELINE


def test_a_frozen_model_is_refused() -> None:
    model = mlp(4).requires_grad_(False)
    with pytest.raises(rc.RescompileError, match="frozen"):
        rc.explore(model, (torch.randn(2, 16),), candidates=["insert-shortcuts{every=2}"])


def test_a_model_without_places_says_so_for_each() -> None:
    found = rc.explore(nn.Linear(4, 4), (torch.randn(2, 4),), candidates=["insert-shortcuts{every=2}"])
    assert "no place for a shortcut" in found.candidates[-1].reason
    assert "no place" in str(found)


# ---- ranking and forms of the result -----------------------------------------------------------------------------


def ranked(candidates: list[Candidate]) -> list[str]:
    from rescompile.exploring import _rank

    return [candidate.spec for candidate in sorted(candidates, key=_rank)]


def test_losses_rank_first_and_pruned_ones_last() -> None:
    tried = [
        Candidate("pruned", ratio=1.0, loss=0.1, pruned=True),
        Candidate("none", reason="no place"),
        Candidate("worse", ratio=1.0, loss=0.6),
        Candidate("nan", ratio=1.0, loss=math.nan),
        Candidate("better", ratio=1e-9, loss=0.5),
    ]
    assert ranked(tried) == ["better", "worse", "nan", "pruned", "none"]


def test_without_losses_an_even_gradient_ranks_first() -> None:
    tried = [
        Candidate("vanishing", ratio=1e-6),
        Candidate("none at all", ratio=0.0),
        Candidate("exploding", ratio=1e3),
        Candidate("even", ratio=0.9, added={"bytes": 10}),
        Candidate("even and cheap", ratio=1.1, added={"bytes": 5}),
    ]
    assert ranked(tried) == ["even and cheap", "even", "exploding", "vanishing", "none at all"]


@pytest.mark.parametrize("suffix", ["svg", "png"])
def test_command_prints_json_and_draws(run: Run, lab: Path, suffix: str) -> None:
    code, out, _ = run("explore", "placement_lab:model", *NARROW, "--plot", f"a.{suffix}", "--json")
    assert code == 0
    content = json.loads(out)
    assert content["schema"] == 1
    assert set(content) == {"schema", "model", "candidates"}
    keys = {"spec", "shortcuts", "added", "gradient_ratio", "loss", "steps", "pruned", "reason"}
    assert len(content["candidates"]) == 5
    assert all(set(candidate) == keys for candidate in content["candidates"])
    head = (lab / f"a.{suffix}").read_bytes()[:200]
    assert b"PNG" in head if suffix == "png" else b"<?xml" in head


def test_command_prints_a_table(run: Run, lab: Path) -> None:
    code, out, _ = run("explore", "placement_lab:model", *NARROW)
    assert code == 0
    assert "5 placements" in out
    assert out.count("insert-shortcuts{") == 4
    assert "loss" not in out


# ---- training ----------------------------------------------------------------------------------------------------


def test_second_run_on_the_same_database_trains_nothing(run: Run, lab: Path) -> None:
    command = ("explore", "placement_lab:model", *NARROW, "--train", "placement_lab:train", "--steps", 4, "--json")
    code, first, _ = run(*command)
    assert code == 0
    assert (lab / "rescompile.db").exists()
    assert trainings(lab) == 5
    code, second, _ = run(*command)
    assert code == 0
    assert trainings(lab) == 5
    assert json.loads(first) == json.loads(second)
    losses = [candidate["loss"] for candidate in json.loads(first)["candidates"] if not candidate["pruned"]]
    assert losses == sorted(losses)


@pytest.mark.parametrize("ir", IRS)
def test_hopeless_placements_are_given_up_early(ir: str) -> None:
    seen: list[int] = []

    def worse_and_worse(model: nn.Module, report: Callable[[int, float], None], steps: int) -> float:
        seen.append(0)
        level = len(seen)
        for step in range(steps):
            seen[-1] = step + 1
            report(step, float(level))
        return float(level)

    graph = captured(mlp(4), (torch.randn(2, 16),), ir)
    specs = grid((1, 2), ("before-activation",), ("add", "gated", "dense"))
    found = rc.explore(graph, candidates=specs, training=Training(worse_and_worse, steps=8))
    assert seen[:3] == [8, 8, 8]
    assert all(2 < count < 8 for count in seen[3:])
    assert [candidate.pruned for candidate in found.candidates] == [False] * 3 + [True] * 4
    assert [candidate.steps for candidate in found.candidates[:3]] == [8] * 3


def test_every_candidate_is_trained_from_its_own_copy() -> None:
    graph = rc.capture(mlp(4), (torch.randn(2, 16),))
    before = {value.name: graph.data(value).copy() for value in graph.parameters}

    def train(model: nn.Module, report: Any, steps: int) -> float:
        model.train()
        optimiser = torch.optim.SGD(model.parameters(), 0.1)
        loss = model(torch.ones(2, 16)).square().sum()
        loss.backward()
        optimiser.step()
        return loss.item() + torch.rand(()).item()

    def losses() -> dict[str, float | None]:
        spec = "insert-shortcuts{every=2,start=residual}"
        found = rc.explore(graph, candidates=[spec], training=Training(train, steps=1))
        return {candidate.spec: candidate.loss for candidate in found.candidates}

    assert losses() == losses()
    for value in graph.parameters:
        np.testing.assert_array_equal(graph.data(value), before[value.name])


def test_loss_that_is_no_number_counts_as_infinite() -> None:
    training = Training(lambda model, report, steps: math.nan, steps=1)
    found = explore(rc.capture(mlp(2), (torch.randn(2, 16),)), [], training=training)
    assert found.candidates[0].loss == math.inf
    assert found.to_dict()["candidates"][0]["loss"] is None


def test_two_processes_share_one_study(lab: Path) -> None:
    command = [sys.executable, "-m", "rescompile", "explore", "placement_lab:model", *NARROW, "--json"]
    command += ["--train", "placement_lab:together", "--steps", "3", "--storage", "sqlite:///shared.db"]
    root = str(Path(__file__).parents[1])
    environment = {**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1"}
    both = [
        subprocess.Popen(command, cwd=lab, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    ends = [process.communicate(timeout=300) for process in both]
    assert [process.returncode for process in both] == [0, 0], ends
    by_process = Counter(line.split()[0] for line in (lab / "log.txt").read_text().splitlines())
    assert len(by_process) == 2  # both had work
    assert sum(by_process.values()) == 5  # and none twice
    results = [json.loads(out) for out, _ in ends]
    assert results[0] == results[1]  # each waited for the other's
    assert all(candidate["loss"] == 1.0 for candidate in results[0]["candidates"])


def test_placement_of_a_process_that_died_is_trained_when_resumed(
    run: Run, lab: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["explore", "placement_lab:model", *NARROW, "--train", "placement_lab:dies", "--steps", "2"]
    root = str(Path(__file__).parents[1])
    environment = {**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1"}
    died = subprocess.run(
        [sys.executable, "-m", "rescompile", *arguments], cwd=lab, env=environment, capture_output=True, check=False
    )
    assert died.returncode == 9
    (lab / "alive").touch()
    import rescompile.studies

    monkeypatch.setattr(rescompile.studies, "_GRACE", 1)
    code, out, _ = run(*arguments, "--json")
    assert code == 0
    assert trainings(lab) == 5
    assert all(candidate["loss"] is not None for candidate in json.loads(out)["candidates"])


# ---- what is wrong -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--train", "placement_lab:trian"], "no function 'trian' (did you mean 'train'?)"),
        (["--train", "placement_lab:NUMBER"], "no function 'NUMBER'"),
        (["--train", "placement_lab"], "package.module:function"),
        (["--train", "placement_laboratory:train"], "cannot be imported"),
        (["--train", "placement_lab:train", "--steps", "0"], "at least one step"),
        (["--train", "placement_lab:train", "--storage", "sqlite:////no/such/folder/a.db"], "cannot be opened"),
        (["--train", "placement_lab:train", "--storage", "nonsense"], "cannot be opened"),
        (
            ["--train", "placement_lab:train", "--storage", "mysql+oursql://me:secret@host/db"],
            "storage 'mysql+oursql://me:***@host/db' cannot be opened",
        ),
        (["--train", "placement_lab:fails"], "ValueError: no data"),
        (["--every", "two"], "no list of layer counts"),
        (["--every", "0"], "no list of layer counts"),
        (["--every", ""], "no placement to explore"),
        (["--kind", "ad"], "no choice 'ad'"),
        (["--join", "befor"], "no choice 'befor'"),
        (["--plot", "a.gif"], "neither"),
    ],
)
def test_mistakes_are_said_in_one_sentence(run: Run, lab: Path, options: list[str], said: str) -> None:
    narrow = [] if options[0] in ("--every", "--kind", "--join") else NARROW
    code, out, err = run("explore", "placement_lab:model", *narrow, *options)
    assert code == 1
    assert out == ""
    assert said in err
    assert len(err.strip().splitlines()) == 1


def test_unknown_pass_is_a_mistake_of_usage(run: Run, lab: Path) -> None:
    code, out, err = run("explore", "placement_lab:model", "--pass", "insert-shortcut{every=2}")
    assert code == 2
    assert out == ""
    assert "did you mean 'insert-shortcuts'" in err


def test_study_of_another_search_is_not_mixed_with_this_one(run: Run, lab: Path) -> None:
    command = ("explore", "placement_lab:model", *NARROW, "--train", "placement_lab:train")
    assert run(*command, "--steps", 2)[0] == 0
    done = trainings(lab)
    for other, said in (
        ((*command, "--steps", 3), "other steps"),
        ((*command, "--steps", 2, "--every", 3), "other placements"),
        ((*command[:-1], "placement_lab:fails", "--steps", 2), "other training function"),
    ):
        code, _, err = run(*other)
        assert code == 1
        assert said in err
        assert "name another study" in err
    assert trainings(lab) == done
    assert run(*command, "--steps", 3, "--study", "longer")[0] == 0
