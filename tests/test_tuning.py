"""Schedules are searched, kept, found again; what breaks, breaks alone."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import tvm
from tvm import te, tirx

from rescompile.backends import targets, tuning, tuning_bench
from rescompile.backends.kernels import ConvSpec, Epilogue, LinearSpec, Tile, arguments, pack_bias, pack_weight
from rescompile.backends.tuning import TuningReport, apply_database, tune
from rescompile.backends.tuning_bench import Local, Remote, parse_runner
from rescompile.backends.tuning_records import Database
from rescompile.backends.tuning_rivals import rival
from rescompile.backends.tuning_search import Searcher, gather, normalized, split_budget
from rescompile.errors import RescompileError

TARGET = targets.resolve("cpu")
EPILOGUE = Epilogue(bias=True, residual=True, outer="relu")
SPEC = ConvSpec(1, 8, 8, 16, 32, (3, 3), pads=(1, 1, 1, 1), in_border=(1, 1), epilogue=EPILOGUE)
TILE = Tile(8, 16)


def _module(**functions: tvm.tirx.PrimFunc) -> tvm.IRModule:
    return tvm.IRModule({name: function.with_attr("global_symbol", name) for name, function in functions.items()})


def _intrinsic(name: str) -> tvm.tirx.PrimFunc:
    a = te.placeholder((64, 64), name="a")
    return te.create_prim_func([a, te.compute((64, 64), lambda i, j: tirx.call_intrin("float32", name, a[i, j]))])


def _scaled(rows: Any, factor: float = 2.0) -> tvm.tirx.PrimFunc:
    a = te.placeholder((rows, 64), name="a")
    return te.create_prim_func([a, te.compute((rows, 64), lambda i, j: a[i, j] * tirx.const(factor, "float32"))])


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, TuningReport]:
    """A database with four trials of a convolution + bias + residual + relu, and one that does not build."""
    folder = tmp_path_factory.mktemp("tuned") / "db"
    module = _module(conv=rival(SPEC, TILE), same=rival(SPEC, TILE), unbuildable=_intrinsic("tirx.tvm_warp_shuffle"))
    # A budget by work alone would leave the small function without any.
    report = _tune_each(module, folder)
    return folder, report


def _tune_each(module: tvm.IRModule, folder: Path) -> TuningReport:
    workloads, skipped = gather(module)
    for workload in workloads:
        workload.work = 1.0
    records = Database.open(folder, TARGET, create=True)
    bench = tuning_bench.Bench(TARGET, Local())
    return tuning.search_all(workloads, TARGET, bench, records, 8, seed=1, skipped=skipped)


# ---- tuning and replaying --------------------------------------------------------------------------------------


def test_tuning_writes_a_database_and_searches_equal_functions_once(tuned: tuple[Path, TuningReport]) -> None:
    folder, report = tuned
    conv = next(search for search in report.searches if "conv" in search.functions)
    assert sorted(conv.functions) == ["conv", "same"]
    assert conv.seconds is not None
    assert conv.seconds > 0
    provenance = json.loads(next(folder.glob("runs/*/provenance.json")).read_text())
    assert "llvm" in provenance["target"]
    assert provenance["tvm"] == "0.27.0.post1"
    assert provenance["date"].startswith("20")


def test_a_workload_that_does_not_build_is_reported_and_the_others_are_tuned(tuned: tuple[Path, TuningReport]) -> None:
    _, report = tuned
    bad = next(search for search in report.searches if search.functions == ["unbuildable"])
    assert bad.seconds is None
    assert bad.failed == bad.trials > 0
    assert any("did not build" in reason for reason in bad.reasons)
    assert "unbuildable: no schedule" in str(report)


def test_records_replay_without_trials_and_give_the_numbers_of_torch(tuned: tuple[Path, TuningReport]) -> None:
    plain = _module(conv=rival(SPEC, TILE))
    module, report = apply_database(plain, TARGET, tuned[0])
    assert list(report.applied) == ["conv"]
    assert "parallel" in module["conv"].script() or "vectorized" in module["conv"].script()
    got, want = _run(module["conv"], SPEC, TILE)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_a_function_without_a_record_stays_as_it_is(tuned: tuple[Path, TuningReport]) -> None:
    plain = _module(other=_scaled(32))
    module, report = apply_database(plain, TARGET, tuned[0])
    assert report.missed == {"other": "no record"}
    assert module["other"].same_as(plain["other"])


def test_a_second_run_adds_to_the_records(tuned: tuple[Path, TuningReport], tmp_path: Path) -> None:
    folder = tmp_path / "db"
    shutil.copytree(tuned[0], folder)
    before = len(Database.open(folder, TARGET, create=False))
    # The build of this one ends its process; the run goes on.
    module = _module(scaled=_scaled(64), crashing=_intrinsic("tirx.tvm_storage_sync"))
    told: list[tuple[str, int, int]] = []
    report = tune(module, TARGET, trials=4, database=folder, progress=lambda *step: told.append(step), seed=1)
    assert 2 <= report.spent <= 4
    assert told[-1] == ("tune", report.spent, 4)
    crashed = next(search for search in report.searches if search.functions == ["crashing"])
    assert crashed.failed == crashed.trials
    assert len(Database.open(folder, TARGET, create=False)) > before
    assert len(list(folder.glob("runs/*"))) == 2


def test_a_search_that_breaks_ends_alone(
    tuned: tuple[Path, TuningReport], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def evolve(self: Searcher, workload: Any, *_: Any) -> None:
        seen.append(workload.functions)
        if len(seen) == 1:
            raise RuntimeError("Check failed: a bad schedule")

    monkeypatch.setattr(Searcher, "_evolve", evolve)
    monkeypatch.setattr(tuning_bench.Bench, "__enter__", lambda self: self)
    monkeypatch.setattr(tuning_bench.Bench, "__exit__", lambda *_: None)
    report = tune(_module(a=_scaled(64), b=_scaled(128)), TARGET, trials=4, database=tmp_path / "db")
    assert seen == [["a"], ["b"]]
    assert report.searches[0].reasons == []
    assert report.searches[1].reasons == ["the search ended: Check failed: a bad schedule"]


def test_no_trials_do_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "Bench", None)
    report = tune(_module(a=_scaled(64)), TARGET, trials=0, database=tmp_path / "db")
    assert report.spent == 0
    assert not (tmp_path / "db").exists()


# ---- the database ----------------------------------------------------------------------------------------------


def test_a_database_that_does_not_exist_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(RescompileError, match="There is no tuning database"):
        apply_database(_module(a=_scaled(64)), TARGET, tmp_path / "missing")


def test_an_empty_folder_is_a_database_without_records(tmp_path: Path) -> None:
    _, report = apply_database(_module(a=_scaled(64)), TARGET, tmp_path)
    assert report.missed == {"a": "no record"}


@pytest.mark.parametrize("what", ["file", "foreign"])
def test_something_else_is_no_database(tmp_path: Path, what: str) -> None:
    path = tmp_path / "thing"
    if what == "file":
        path.write_text("")
    else:
        path.mkdir()
        (path / "notes.txt").write_text("")
    with pytest.raises(RescompileError, match=r"is a file|holds other files"):
        apply_database(_module(a=_scaled(64)), TARGET, path)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("provenance.json", "{"),
        ("provenance.json", "[]"),
        ("database_workload.json", "not json\n"),
        ("database_workload.json", '["1", "AAAA"]\n'),
        ("database_tuning_record.json", "[7, []]\n"),
        ("database_tuning_record.json", "[0, 5]\n"),
        ("choices.json", "[]\n"),
    ],
)
def test_a_damaged_record_is_one_sentence(
    tuned: tuple[Path, TuningReport], tmp_path: Path, name: str, text: str
) -> None:
    folder = tmp_path / "db"
    shutil.copytree(tuned[0], folder)
    next(folder.glob("runs/*")).joinpath(name).write_text(text)
    with pytest.raises(RescompileError, match=rf"{name}' is damaged .* delete the folder") as caught:
        apply_database(_module(conv=rival(SPEC, TILE)), TARGET, folder)
    assert "\n" not in str(caught.value)


def test_the_unfinished_line_of_a_killed_run_is_left_out(tuned: tuple[Path, TuningReport], tmp_path: Path) -> None:
    folder = tmp_path / "db"
    shutil.copytree(tuned[0], folder)
    with next(folder.glob("runs/*/database_tuning_record.json")).open("a") as file:
        file.write('[0, [[["Ge')
    _, report = apply_database(_module(conv=rival(SPEC, TILE)), TARGET, folder)
    assert list(report.applied) == ["conv"]
    assert any("unfinished" in note for note in report.notes)


@pytest.mark.parametrize("field", ["target", "tvm"])
def test_records_of_another_target_or_version_are_left_out_with_a_note(
    tuned: tuple[Path, TuningReport], tmp_path: Path, field: str
) -> None:
    folder = tmp_path / "db"
    shutil.copytree(tuned[0], folder)
    path = next(folder.glob("runs/*/provenance.json"))
    path.write_text(json.dumps({**json.loads(path.read_text()), field: "another"}))
    _, report = apply_database(_module(conv=rival(SPEC, TILE)), TARGET, folder)
    assert report.missed == {"conv": "no record"}
    assert len(report.notes) == 1
    assert "another" in report.notes[0]


def test_runs_at_the_same_time_do_not_disturb_each_other(tuned: tuple[Path, TuningReport], tmp_path: Path) -> None:
    source = Database.open(tuned[0], TARGET, create=False)
    module = normalized(_plain(SPEC))
    records = source.best(module, 2)
    both = [Database.open(tmp_path / "db", TARGET, create=True) for _ in range(2)]
    for database in (*both, *both):
        for record in records:
            seconds = tuple(float(value) for value in record.run_secs)
            database.add(module, record.trace, seconds, TARGET.tvm, record.args_info)
    assert len(Database.open(tmp_path / "db", TARGET, create=False)) == 4 * len(records) > 0


# ---- budget, workloads, runners --------------------------------------------------------------------------------


def test_the_budget_follows_the_work_and_is_spent_whole() -> None:
    assert split_budget(100, [75.0, 20.0, 5.0]) == [75, 20, 5]
    assert split_budget(4, [3.0, 3.0, 3.0]) == [2, 1, 1]
    assert split_budget(0, [1.0]) == [0]
    assert split_budget(5, []) == []


def test_dynamic_and_scheduled_functions_are_skipped_with_their_reasons() -> None:
    schedule = tvm.s_tir.Schedule(_scaled(64))
    schedule.parallel(schedule.get_loops(schedule.get_sblock("compute"))[0])
    module = _module(
        dynamic=_scaled(tirx.Var("rows", "int64")),
        scheduled=schedule.mod["main"],
        marked=_scaled(16).with_attr("tirx.is_scheduled", True),
        plain=_scaled(64),
    )
    workloads, skipped = gather(module)
    assert [workload.functions for workload in workloads] == [["plain"]]
    assert skipped == {
        "dynamic": "its shapes are known at run time only",
        "scheduled": "it is scheduled already",
        "marked": "it is scheduled already",
    }


def test_runners_parse() -> None:
    assert parse_runner(None) == parse_runner("local") == Local()
    assert parse_runner("rpc://board.local:9190/pi-4") == Remote("board.local", 9190, "pi-4")
    assert str(parse_runner("rpc://127.0.0.1:9190/k")) == "rpc://127.0.0.1:9190/k"


@pytest.mark.parametrize(
    "text", ["remote", "rpc://", "rpc://host/key", "rpc://host:9190", "rpc://:9190/k", "rpc://h:99999/k", "http://h:1/k",
             "rpc://h:x/k", "rpc://h:1/a/b", "rpc://h:1/k?x=1"],
)  # fmt: skip
def test_runners_that_do_not_parse_are_one_sentence(text: str) -> None:
    with pytest.raises(RescompileError, match="names no place to tune on"):
        parse_runner(text)


def test_a_missing_package_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning_bench.importlib.util, "find_spec", lambda name: None if name == "xgboost" else name)
    with pytest.raises(RescompileError, match=r"Tuning needs xgboost.*rescompile\[tvm\]"):
        tune(_module(a=_scaled(64)), TARGET, trials=1, database=tmp_path / "db")


def test_a_processor_of_another_kind_cannot_be_tuned_for_here(tmp_path: Path) -> None:
    with pytest.raises(RescompileError, match=r"cannot be timed on this machine.*rpc://"):
        tune(_module(a=_scaled(64)), "cpu:x86-64-v2", trials=1, database=tmp_path / "db")


# ---- plain forms -----------------------------------------------------------------------------------------------

CONVS = [
    SPEC,
    ConvSpec(2, 9, 7, 8, 16, (3, 3), (2, 2), (1, 1, 1, 1), epilogue=Epilogue(bias=True, outer="gelu")),
    ConvSpec(1, 6, 6, 8, 16, (1, 1), out_border=(1, 2), epilogue=Epilogue(inner="silu")),
    ConvSpec(1, 8, 8, 8, 16, (3, 3), (1, 1), (2, 2, 2, 2), (2, 2), in_border=(1, 3), residual_border=(1, 1),
             out_border=(1, 1), epilogue=Epilogue(residual=True, inner="hardswish", outer="sigmoid")),
    ConvSpec(1, 1, 20, 8, 16, (1, 5), pads=(0, 2, 0, 1), epilogue=Epilogue(bias=True, outer="gelu_tanh")),
    ConvSpec(1, 5, 5, 8, 16, (3, 3), epilogue=Epilogue(inner="tanh", residual=True, outer="relu6"), dtype="float64"),
]  # fmt: skip


@pytest.mark.parametrize("spec", CONVS, ids=range(len(CONVS)))
def test_the_plain_form_of_a_convolution_gives_the_numbers_of_torch(spec: ConvSpec) -> None:
    got, want = _run(_plain(spec), spec, TILE)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_the_plain_form_of_a_linear_gives_the_numbers_of_torch() -> None:
    spec = LinearSpec(5, 12, 32, Epilogue(bias=True, residual=True, inner="gelu"))
    x, weight, bias, residual = (torch.randn(shape) for shape in ((5, 12), (32, 12), (32,), (5, 32)))
    packed = torch.from_numpy(pack_weight(spec, TILE, weight.numpy()))
    y = torch.empty(5, 32)
    kernel = tvm.compile(_module(main=_plain(spec)), target=TARGET.tvm)
    kernel["main"](*(_aligned(tensor) for tensor in (x, packed, bias, residual)), y := _aligned(y))
    want = residual + torch.nn.functional.gelu(torch.nn.functional.linear(x, weight, bias))
    torch.testing.assert_close(torch.from_numpy(y.numpy()), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "spec",
    [
        ConvSpec(1, 8, 8, 16, 24, (3, 3)),
        ConvSpec(1, 8, 8, 16, 16, (3, 3), groups=4),
        LinearSpec(None, 16, 16),
        LinearSpec(4, 16, 16, dtype="float16"),
    ],
    ids=["lanes", "groups", "rows", "dtype"],
)
def test_a_kernel_without_a_plain_form_says_why(spec: ConvSpec | LinearSpec) -> None:
    assert isinstance(rival(spec, TILE), str)


def _plain(spec: ConvSpec | LinearSpec) -> tvm.tirx.PrimFunc:
    found = rival(spec, TILE)
    assert not isinstance(found, str), found
    return found


def _aligned(tensor: torch.Tensor) -> Any:
    return tvm.runtime.tensor(tensor.contiguous().numpy())


def _run(function: tvm.tirx.PrimFunc, spec: ConvSpec, tile: Tile) -> tuple[torch.Tensor, torch.Tensor]:
    """What a function says, borders cut off once they are seen to be zero, and what torch says."""
    torch.manual_seed(0)
    dtype = getattr(torch, spec.dtype)
    x = torch.randn(spec.batch, spec.in_channels, spec.height, spec.width, dtype=dtype)
    weight = torch.randn(spec.out_channels, spec.in_channels, *spec.kernel, dtype=dtype)
    bias = torch.randn(spec.out_channels, dtype=dtype)
    residual = torch.randn(spec.batch, spec.out_channels, spec.out_height, spec.out_width, dtype=dtype)
    values: dict[str, Any] = {
        "x": _bordered(x, spec.in_border),
        "weight": torch.from_numpy(pack_weight(spec, tile, weight.numpy())),
        "bias": torch.from_numpy(pack_bias(spec, tile, bias.numpy())),
        "residual": _bordered(residual, spec.residual_border),
    }
    given = [
        _aligned(torch.full(buffer.shape, torch.nan, dtype=dtype) if buffer.output else values[buffer.name])
        for buffer in arguments(spec, tile)
    ]
    tvm.compile(_module(main=function), target=TARGET.tvm)["main"](*given)
    got = torch.from_numpy(np.array(given[-1].numpy()))
    vertical, horizontal = spec.out_border
    inner = got[:, vertical : vertical + spec.out_height, horizontal : horizontal + spec.out_width]
    assert got.abs().sum() == pytest.approx(float(inner.abs().sum()), rel=1e-6)
    top, left, bottom, right = spec.pads
    padded = torch.nn.functional.pad(x, (left, right, top, bottom))
    want = torch.nn.functional.conv2d(padded, weight, stride=spec.stride, dilation=spec.dilation)
    if spec.epilogue.bias:
        want = want + bias[:, None, None]
    want = _ACTIVATIONS[spec.epilogue.inner](want)
    if spec.epilogue.residual:
        want = want + residual
    return inner, _ACTIVATIONS[spec.epilogue.outer](want).permute(0, 2, 3, 1)


def _bordered(image: torch.Tensor, border: tuple[int, int]) -> torch.Tensor:
    vertical, horizontal = border
    return torch.nn.functional.pad(image, (horizontal, horizontal, vertical, vertical)).permute(0, 2, 3, 1).contiguous()


_ACTIVATIONS: dict[str, Any] = {
    "none": lambda x: x,
    "relu": torch.relu,
    "relu6": torch.nn.functional.relu6,
    "gelu": torch.nn.functional.gelu,
    "gelu_tanh": lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
    "silu": torch.nn.functional.silu,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "hardswish": torch.nn.functional.hardswish,
}
