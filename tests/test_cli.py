"""The command line's contract: exit codes, one sentence for an error, JSON alone, files whole or not at all."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from rescompile import api, cli_models
from rescompile.cli_files import write_whole
from rescompile.errors import RescompileError, VerificationError

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def never_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails a test that loads the model: what is wrong must be said before long work."""

    def load(*arguments: object) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(cli_models, "load_model", load)


class Result:
    """What a rewrite returns, as far as the command line is concerned."""

    applied = ("one rewrite",)

    def __init__(self, failure: str = "") -> None:
        self.failure = failure
        self.plan = SimpleNamespace(to_json=lambda: '{"schema": 1}')

    def save(self, path: Path) -> None:
        if self.failure:
            raise VerificationError(self.failure)
        Path(path).write_text("model")

    def to_dict(self) -> dict[str, Any]:
        return {"schema": 1}

    def __str__(self) -> str:
        return "what was done"


@pytest.fixture
def rewritten(monkeypatch: pytest.MonkeyPatch) -> Callable[[Result], None]:
    """Lets every model load, and every rewrite return the given result."""

    def install(result: Result) -> None:
        monkeypatch.setattr(cli_models, "load_model", lambda *arguments: SimpleNamespace())
        monkeypatch.setattr(api, "rewrite", lambda *arguments, **options: result)

    return install


def is_one_sentence(text: str) -> bool:
    return text.startswith("rescompile: ") and text.count("\n") == 1 and "Traceback" not in text


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["insp"], "Did you mean 'inspect'?"),
        (["inspect"], "MODEL"),
        (["inspect", "m.onnx", "--jsn"], "--json"),
        (["rewrite", "m.onnx"], "-o OUT.onnx"),
        (["rewrite", "m.onnx", "-o", "out.pt2"], "must end in .onnx"),
        (["rewrite", "pkg:net", "-o", "out.onnx"], "must end in .pt2"),
        (["rewrite", "m.onnx", "-o", "out.onnx", "--pass", "fuze"], "did you mean 'fuse'?"),
        (["rewrite", "m.onnx", "-o", "out.onnx", "--pass", "fuse{jonis=all}"], "did you mean 'joins'?"),
        (["rewrite", "m.onnx", "-o", "out.onnx", "--pass", "fuse{joins=some}"], "one of residual, all"),
        (["bench", "m.onnx", "--against", "eagre"], "did you mean 'eager'?"),
        (["compile", "m.onnx"], "output"),
        (["run", "m.onnx", "--backend", "trt"], "trt"),
        (["compile", "m.onnx", "-o", "a", "--tune", "many"], "--tune"),
    ],
)
@pytest.mark.usefixtures("never_loaded")
def test_wrong_usage_is_code_2_and_one_sentence(run: Run, arguments: list[str], said: str) -> None:
    code, out, err = run(*arguments)
    assert code == 2
    assert out == ""
    assert said in err
    assert is_one_sentence(err)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["inspect", "resnet50"], "file.onnx, file.pt2 or package.module:attribute"),
        (["inspect", "weights.pth"], "holds weights, not a graph"),
        (["inspect", "missing.onnx"], "does not exist"),
        (["inspect", "not_installed_anywhere:net"], "no Python module 'not_installed_anywhere'"),
        (["diff", "missing.onnx", "other.onnx"], "Cannot read 'missing.onnx'"),
        (["run", "missing.onnx"], "does not exist"),
        (["run", "artifact"], "is not a model"),
    ],
)
def test_what_cannot_be_served_is_code_1_and_one_sentence(run: Run, arguments: list[str], said: str) -> None:
    code, out, err = run(*arguments)
    assert code == 1
    assert out == ""
    assert said in err
    assert is_one_sentence(err)


def test_an_input_that_does_not_follow_the_grammar_is_wrong_usage(run: Run) -> None:
    code, _, err = run("inspect", "json:loads", "--input", "1x3xx4")
    assert code == 2
    assert "Cannot read the input '1x3xx4'" in err


def test_a_module_without_example_inputs_asks_for_them_by_name(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = "class Net:\n    def state_dict(self): ...\n    def forward(self, tokens, mask, scale=1): ...\n"
    (tmp_path / "models_without_inputs.py").write_text(source)
    monkeypatch.syspath_prepend(str(tmp_path))
    code, _, err = run("inspect", "models_without_inputs:Net")
    assert code == 1
    assert "give --input SHAPE[:DTYPE] once for each of tokens, mask." in err


@pytest.mark.usefixtures("never_loaded")
@pytest.mark.parametrize("command", ["rewrite", "compile"])
def test_an_unwritable_output_is_said_before_long_work(run: Run, tmp_path: Path, command: str) -> None:
    target = tmp_path / "nowhere" / "out.onnx"
    code, _, err = run(command, "m.onnx", "-o", target)
    assert code == 1
    assert "there is no folder" in err
    (tmp_path / "folder.onnx").mkdir()
    code, _, err = run(command, "m.onnx", "-o", tmp_path / "folder.onnx")
    assert code == 1
    assert "it is a folder" in err


@pytest.mark.usefixtures("never_loaded")
def test_a_missing_plan_is_said_before_long_work(run: Run, tmp_path: Path) -> None:
    code, _, err = run("apply", "m.onnx", tmp_path / "plan.json", "-o", tmp_path / "out.onnx")
    assert code == 1
    assert "plan.json" in err
    (tmp_path / "plan.json").write_text('{"schema": 1, "rewrites": [{}]}')
    code, _, err = run("apply", "m.onnx", tmp_path / "plan.json", "-o", tmp_path / "out.onnx")
    assert code == 1
    assert "not a plan" in err
    assert is_one_sentence(err)


def test_a_rewrite_writes_the_model_and_the_plan(run: Run, tmp_path: Path, rewritten: Callable[[Result], None]) -> None:
    rewritten(Result())
    code, out, err = run("rewrite", "m.onnx", "-o", tmp_path / "out.onnx", "--plan-out", tmp_path / "p.json")
    assert (code, out, err) == (0, "what was done\n", "")
    assert (tmp_path / "out.onnx").read_text() == "model"
    assert json.loads((tmp_path / "p.json").read_text()) == {"schema": 1}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.onnx", "p.json"]


def test_a_failed_verification_is_code_3_and_writes_nothing(
    run: Run, tmp_path: Path, rewritten: Callable[[Result], None]
) -> None:
    rewritten(Result("the numbers changed at add_3."))
    (tmp_path / "out.onnx").write_text("as it was")
    code, _, err = run("rewrite", "m.onnx", "-o", tmp_path / "out.onnx")
    assert code == 3
    assert "the numbers changed at add_3" in err
    assert is_one_sentence(err)
    assert (tmp_path / "out.onnx").read_text() == "as it was"
    assert [path.name for path in tmp_path.iterdir()] == ["out.onnx"]


def test_json_is_alone_on_stdout_whatever_the_model_prints(
    run: Run, tmp_path: Path, rewritten: Callable[[Result], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    rewritten(Result())
    monkeypatch.setattr(cli_models, "load_model", lambda *arguments: print("loading layer 1"))
    code, out, err = run("rewrite", "m.onnx", "-o", tmp_path / "out.onnx", "--json")
    assert code == 0
    assert json.loads(out) == {"schema": 1}
    assert err == "loading layer 1\n"


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (ValueError("odd\nthing"), 1, "Internal error (ValueError: odd thing)"),
        (ModuleNotFoundError("No module named 'tvm'", name="tvm"), 1, "pip install 'rescompile[tvm]'"),
        (ModuleNotFoundError("No module named 'onnx_ir'", name="onnx_ir.passes"), 1, "pip install 'rescompile[onnx]'"),
        (ModuleNotFoundError("No module named 'mypkg'", name="mypkg"), 1, "the Python package 'mypkg'"),
        (RescompileError("No."), 1, "rescompile: No."),
    ],
)
def test_every_other_error_is_one_sentence_too(
    run: Run, monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int, said: str
) -> None:
    def load(*arguments: object) -> None:
        raise error

    monkeypatch.setattr(cli_models, "load_model", load)
    found, out, err = run("inspect", "m.onnx")
    assert found == code
    assert out == ""
    assert said in err
    assert is_one_sentence(err)


def test_ctrl_c_ends_without_a_word(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli_models, "load_model", load)
    assert run("inspect", "m.onnx") == (130, "", "")


def test_a_traceback_is_shown_on_request_only(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*arguments: object) -> None:
        raise ValueError("odd")

    monkeypatch.setattr(cli_models, "load_model", load)
    assert "Traceback" in run("--traceback", "inspect", "m.onnx")[2]
    assert "Traceback" not in run("inspect", "m.onnx")[2]


def test_passes_lists_options_defaults_and_what_is_preserved(run: Run) -> None:
    code, out, _ = run("passes")
    assert code == 0
    assert "fuse   preserves values" in out
    assert "joins: one of residual, all, residual if not given" in out
    code, out, _ = run("passes", "--json")
    listed = {entry["name"]: entry for entry in json.loads(out)["passes"]}
    assert listed["fuse"]["preserves"] == "values"
    assert {"name": "joins", "type": "one of residual, all", "default": "residual"} in listed["fuse"]["options"]


def test_without_a_command_the_help_is_shown(run: Run) -> None:
    code, out, err = run()
    assert code == 2
    assert "Usage:" in out
    assert err == ""


def test_a_reader_that_leaves_is_no_error() -> None:
    command = f"{sys.executable} -m rescompile passes --json | {sys.executable} -c pass"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert done.stderr == ""


def test_files_beside_the_model_move_with_it(tmp_path: Path) -> None:
    def save(path: Path) -> None:
        path.write_text("model")
        path.with_suffix(".data").write_text("weights")

    write_whole(tmp_path / "out.onnx", save)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.data", "out.onnx"]


def test_a_failed_write_leaves_what_was_there(tmp_path: Path) -> None:
    def save(path: Path) -> None:
        path.write_text("half")
        raise OSError(28, "No space left on device")

    (tmp_path / "out.onnx").write_text("as it was")
    with pytest.raises(RescompileError, match="no space left on device"):
        write_whole(tmp_path / "out.onnx", save)
    assert (tmp_path / "out.onnx").read_text() == "as it was"
    assert [path.name for path in tmp_path.iterdir()] == ["out.onnx"]


def test_arrays_are_read_without_pickle(tmp_path: Path) -> None:
    from rescompile.arrays import load_arrays, save_arrays

    save_arrays(tmp_path / "x.npz", {"x": np.arange(3)})
    np.testing.assert_array_equal(load_arrays(tmp_path / "x.npz")["x"], np.arange(3))
    np.savez(tmp_path / "objects.npz", x=np.array([{}], dtype=object))
    for name, content in (("empty.npz", b""), ("text.npz", b"not an archive")):
        (tmp_path / name).write_bytes(content)
    np.save(tmp_path / "single.npy", np.arange(3))
    for name in ("objects.npz", "empty.npz", "text.npz", "single.npy", "missing.npz"):
        with pytest.raises(RescompileError, match=f"Cannot read .*{name}"):
            load_arrays(tmp_path / name)
