"""Tuned schedules and our own functions are both timed; the faster one runs, is remembered, and both are printed."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import tvm
from tvm import te, tirx
from tvm.s_tir import meta_schedule as ms

from rescompile.backends import lowering, targets, tuning_contest
from rescompile.backends.compile import compile_graph
from rescompile.backends.cuda.compile import Settings, compile_cuda
from rescompile.backends.kernels import Argument, arguments, prim_func
from rescompile.backends.program import Program
from rescompile.backends.tuning_bench import Local
from rescompile.backends.tuning_contest import DEFAULT, TUNED, Contest, Outcome, measure, race
from rescompile.backends.tuning_records import Database
from rescompile.backends.tuning_rivals import rival
from rescompile.backends.tuning_search import _Context, normalized
from rescompile.errors import RescompileError
from tests.lowering_cases import K, Sketch, close
from tests.test_tuning import SPEC, TARGET, TILE, _scaled

Race = Callable[..., list[float | None]]


def _conv_and_product() -> tuple[Sketch, torch.Tensor]:
    """A fused convolution, and a product that stays a generated loop nest, of about the same work."""
    sketch = Sketch()
    x, weight, bias = sketch.input(1, 8, 6, 6), sketch.param(16, 8, 3, 3), sketch.param(16)
    residual = sketch.input(1, 16, 6, 6)
    conv = sketch.op(
        K.FUSED_CONV, [x, weight, bias, residual], (1, 16, 6, 6),
        stride=(1, 1), pads=(1, 1, 1, 1), dilation=(1, 1), groups=1, inner="none", outer="relu",
    )  # fmt: skip
    a = sketch.input(256, 256)
    total = sketch.op(K.AMAX, [a], (256,), axes=(1,), keepdims=False)
    sketch.graph.set_outputs([conv, total])
    sketch.graph.commit()
    want = torch.nn.functional.conv2d(sketch.of(x), sketch.of(weight), sketch.of(bias), padding=1) + sketch.of(residual)
    return sketch, torch.relu(want)


def _compiled(sketch: Sketch, database: Path, trials: int) -> Program:
    return compile_graph(sketch.graph, database=database, trials=trials, threads=2, tuning=0)


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Records of the convolution and of the generated loop nests, and no outcomes of contests."""
    folder = tmp_path_factory.mktemp("contest") / "db"
    sketch, _ = _conv_and_product()
    _compiled(sketch, folder, 8)
    for path in folder.glob("runs/*/choices.json"):
        path.unlink()
    return folder


def _fixed(own: float | None, tuned: float | None, calls: list[int]) -> Race:
    def instead(functions: Sequence[Any], *_: Any) -> list[float | None]:
        calls.append(len(functions))
        return [own, tuned]

    return instead


@pytest.mark.parametrize("winner", ["own", "tuned"])
def test_the_faster_one_is_used_remembered_and_printed(
    database: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, winner: str
) -> None:
    folder = tmp_path / "db"
    shutil.copytree(database, folder)
    sketch, want = _conv_and_product()
    calls: list[int] = []
    monkeypatch.setattr(tuning_contest, "race", _fixed(2e-6, 3e-6 if winner == "own" else 1e-6, calls))
    program = _compiled(sketch, folder, 0)
    region = next(region for region in program.explain() if region["kernel"] == "conv")
    assert calls
    assert [entry["microseconds"] for entry in region["tried"][-2:]] == [2.0, 3.0 if winner == "own" else 1.0]
    assert region["tried"][-1]["tile"] == TUNED
    assert (region["tile"] == TUNED) == (winner == "tuned")
    close(program(*(sketch.tensors[value.name] for value in sketch.graph.inputs))[0], want)
    timed = len(calls)
    again = _compiled(sketch, folder, 0)
    assert len(calls) == timed
    assert [region["tile"] for region in again.explain()] == [region["tile"] for region in program.explain()]


def test_a_generated_function_is_compared_with_its_default_schedule(
    database: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sketch, _ = _conv_and_product()
    monkeypatch.setattr(Contest, "_compare", lambda *_, **__: Outcome(2e-6, 1e-6))
    program = _compiled(sketch, database, 0)
    tuned = [region for region in program.explain() if region["kernel"] == "generated" and region["tried"]]
    assert tuned
    assert all([entry["tile"] for entry in region["tried"]] == [DEFAULT, TUNED] for region in tuned)
    inputs = [sketch.tensors[value.name] for value in sketch.graph.inputs]
    close(program(*inputs)[1], inputs[2].amax(1))


def test_a_tuned_function_with_other_numbers_loses() -> None:
    right, wrong = _scaled(64), _scaled(64, 3.0)
    buffers = [Argument("a", (64, 64), "float32"), Argument("y", (64, 64), "float32", output=True)]
    seconds = race([right, wrong, right], TARGET, buffers, Local())
    assert seconds[1] is None
    assert seconds[0] is not None
    assert seconds[2] is not None
    assert not Outcome(seconds[0], seconds[1]).tuned_wins


def test_a_function_that_does_not_build_has_no_time() -> None:
    a = te.placeholder((64, 64), name="a")
    body = te.compute((64, 64), lambda i, j: tirx.call_intrin("float32", "tirx.tvm_warp_shuffle", a[i, j]))
    buffers = [Argument("a", (64, 64), "float32"), Argument("y", (64, 64), "float32", output=True)]
    assert measure(te.create_prim_func([a, body]), TARGET, buffers) is None
    assert (measure(_scaled(64), TARGET, buffers) or 0) > 0


def test_a_kernel_and_its_plain_form_agree_and_are_both_timed() -> None:
    plain = rival(SPEC, TILE)
    assert isinstance(plain, tvm.tirx.PrimFunc)
    seconds = race([prim_func(SPEC, TILE), plain], TARGET, arguments(SPEC, TILE), Local())
    assert all(found is not None and found > 0 for found in seconds)


def test_without_trials_and_database_there_is_no_contest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning_contest, "Contest", None)
    sketch, _ = _conv_and_product()
    program = compile_graph(sketch.graph, threads=1, tuning=0)
    assert all(region["tile"] != TUNED for region in program.explain())


def test_a_database_that_does_not_exist_is_an_error_before_any_work(tmp_path: Path) -> None:
    sketch, _ = _conv_and_product()
    with pytest.raises(RescompileError, match="There is no tuning database"):
        _compiled(sketch, tmp_path / "missing", 0)
    assert not (tmp_path / "missing").exists()


def test_for_another_processor_a_kernel_stays_and_a_generated_function_takes_its_record(tmp_path: Path) -> None:
    contest = Contest(targets.resolve("cpu:x86-64-v2"), database=tmp_path)
    function = _scaled(64)
    assert not contest._compare(function, (function, 1e-6), [], is_kernel=True).tuned_wins
    assert contest._compare(function, (function, 1e-6), [], is_kernel=False).tuned_wins


def test_a_record_for_a_gpu_replaces_the_default_schedule_without_a_gpu(tmp_path: Path) -> None:
    target = targets.resolve("cuda:sm_90")
    sketch = Sketch()
    sketch.graph.set_outputs([sketch.op(K.AMAX, [sketch.input(64, 64)], (64,), axes=(1,), keepdims=False)])
    sketch.graph.commit()
    contest = Contest(target, database=tmp_path)
    plain: dict[str, Any] = {}

    def keep(module: tvm.IRModule, *_: Any) -> tvm.IRModule:
        plain.update({str(v.name_hint): f for v, f in module.functions.items() if isinstance(f, tirx.PrimFunc)})
        return module

    contest.replaced = keep  # type: ignore[method-assign, assignment]
    settings = Settings(lowering.check(sketch.graph), lambda *_: None, contest, ptx=False)
    compile_cuda(sketch.graph, [target], settings)
    (name,) = plain
    module = normalized(plain[name])
    context = _Context(module, target.tvm, ms.search_strategy.ReplayTrace(), 1)
    context.pre_tuning(1, 1)
    (candidate,) = context.generate_measure_candidates()
    records = Database.open(tmp_path, target, create=True)
    records.add(module, candidate.sch.trace, (1e-6,), target.tvm, candidate.args_info)
    program = compile_graph(sketch.graph, "cuda:sm_90", database=tmp_path)
    (region,) = program.explain()
    assert region["tile"] == TUNED
    assert region["tried"] == [{"tile": TUNED, "microseconds": 1.0}]


def test_a_gpu_that_is_not_here_cannot_be_tuned_for(tmp_path: Path) -> None:
    if tvm.cuda(0).exist:
        pytest.skip("there is a GPU")
    sketch, _ = _conv_and_product()
    with pytest.raises(RescompileError, match="'cuda:sm_90' cannot be timed on this machine"):
        compile_graph(sketch.graph, "cuda:sm_90", trials=2, database=tmp_path / "db")
