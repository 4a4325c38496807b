"""The command line on small real models of both IRs, and on what is no model."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from rescompile import cli_models

Run = Callable[..., tuple[int, str, str]]

SOURCE = """
import torch
from torch import nn


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(4)

    def forward(self, x):
        return torch.relu(self.bn(self.conv(torch.relu(x))) + x)


class Branching(nn.Module):
    def forward(self, x):
        if x.sum() > 0:
            return x
        return x + 1


def block():
    torch.manual_seed(0)
    model = Block().eval()
    model.bn.running_mean.uniform_(-0.2, 0.2)
    model.bn.running_var.uniform_(0.7, 1.3)
    return model


def with_inputs():
    return block(), (torch.randn(2, 4, 8, 8),)
"""


@pytest.fixture
def never_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails a test that loads the model."""

    def load(*arguments: object) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(cli_models, "load_model", load)


@pytest.fixture
def user_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A Python module of the user's, by name."""
    (tmp_path / "users_own_models.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(str(tmp_path))
    return "users_own_models"


@pytest.fixture
def residual_onnx(tmp_path: Path) -> Path:
    """y = relu(bn(conv(relu(x))) + x) as an ONNX file."""
    path = tmp_path / "block.onnx"
    onnx.save(residual_model(), path)
    return path


def residual_model(operator: str = "Relu") -> onnx.ModelProto:
    random = np.random.default_rng(0)
    arrays = {
        "conv.weight": random.standard_normal((4, 4, 3, 3)) * 0.2,
        "bn.weight": random.uniform(0.7, 1.3, 4),
        "bn.bias": random.uniform(-0.2, 0.2, 4),
        "bn.mean": random.uniform(-0.2, 0.2, 4),
        "bn.var": random.uniform(0.7, 1.3, 4),
    }
    nodes = [
        helper.make_node("Relu", ["x"], ["inner"], name="inner"),
        helper.make_node("Conv", ["inner", "conv.weight"], ["conv"], pads=[1, 1, 1, 1], name="conv"),
        helper.make_node(
            "BatchNormalization", ["conv", "bn.weight", "bn.bias", "bn.mean", "bn.var"], ["bn"], name="bn"
        ),
        helper.make_node("Add", ["bn", "x"], ["sum"], name="join"),
        helper.make_node(operator, ["sum"], ["y"], name="activation"),
    ]
    shape = [2, 4, 8, 8]
    graph = helper.make_graph(
        nodes,
        "block",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, shape)],
        [numpy_helper.from_array(array.astype(np.float32), name) for name, array in arrays.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


# ---- inspect, rewrite, apply, diff ---------------------------------------------------------------------------------


def test_inspect_finds_the_block_in_both_irs_alike(run: Run, residual_onnx: Path, user_module: str) -> None:
    reports = []
    for model in (residual_onnx, f"{user_module}:with_inputs"):
        code, out, err = run("inspect", model, "--json")
        assert (code, err) == (0, "")
        reports.append(json.loads(out))
    assert [report["ir"] for report in reports] == ["onnx", "fx"]
    assert reports[0]["summary"] == reports[1]["summary"]
    assert reports[0]["summary"]["blocks"] == 1
    assert reports[0]["blocks"][0]["norm"] == "branch"


def test_inspect_explains_a_node(run: Run, residual_onnx: Path) -> None:
    code, out, _ = run("inspect", residual_onnx, "--why", "join")
    assert code == 0
    assert "join" in out
    code, _, err = run("inspect", residual_onnx, "--why", "jion")
    assert code == 1
    assert "join" in err
    code, out, _ = run("inspect", residual_onnx, "--why", "join", "--json")
    data = json.loads(out)
    assert (code, data["node"], data["role"], data["block"], data["rule"]) == (0, "join", "join", 0, None)
    assert data["explanation"].startswith("'join' is the join of block 0")


def test_inspect_shows_costs_on_request(run: Run, residual_onnx: Path) -> None:
    code, out, _ = run("inspect", residual_onnx, "--costs")
    assert code == 0
    assert "shortcut: params" in out
    code, out, _ = run("inspect", residual_onnx)
    assert "shortcut: params" not in out
    assert "skips cost" in out


def test_inspect_writes_a_page_that_refers_to_nothing_outside(run: Run, residual_onnx: Path, tmp_path: Path) -> None:
    assert run("inspect", residual_onnx, "--html", tmp_path / "report.html")[0] == 0
    page = (tmp_path / "report.html").read_text()
    assert "1 residual blocks" in page
    assert "http" not in page


def test_a_rewritten_onnx_model_computes_the_same_in_onnx_runtime(
    run: Run, residual_onnx: Path, tmp_path: Path
) -> None:
    from onnxruntime import InferenceSession

    out = tmp_path / "fused.onnx"
    code, text, err = run("rewrite", residual_onnx, "-o", out)
    assert (code, err) == (0, "")
    assert "fused_conv" in text
    assert "verified" in text
    onnx.checker.check_model(str(out), full_check=True)
    x = np.random.default_rng(1).standard_normal((2, 4, 8, 8)).astype(np.float32)
    before, after = (InferenceSession(str(path)).run(None, {"x": x})[0] for path in (residual_onnx, out))
    np.testing.assert_allclose(after, before, rtol=0, atol=1e-5 * np.abs(before).max())


def test_a_dry_run_plans_and_writes_no_model(run: Run, residual_onnx: Path, tmp_path: Path) -> None:
    plan = tmp_path / "plan.json"
    code, text, _ = run("rewrite", residual_onnx, "--dry-run", "--plan-out", plan)
    assert code == 0
    assert "fused_conv" in text
    assert json.loads(plan.read_text())["schema"] == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["block.onnx", "plan.json"]


def test_a_reviewed_plan_applies_and_diff_shows_what_it_did(run: Run, residual_onnx: Path, tmp_path: Path) -> None:
    plan, out = tmp_path / "plan.json", tmp_path / "folded.onnx"
    run("rewrite", residual_onnx, "--dry-run", "--plan-out", plan)
    reviewed = json.loads(plan.read_text())
    reviewed["rewrites"] = [step for step in reviewed["rewrites"] if step["pass"] == "fold-batch-norm"]
    plan.write_text(json.dumps(reviewed))
    code, _, err = run("apply", residual_onnx, plan, "-o", out)
    assert (code, err) == (0, "")
    code, text, _ = run("diff", residual_onnx, out, "--json")
    assert code == 0
    kinds = json.loads(text)["kinds"]
    assert kinds == {"batch_norm": {"before": 1, "after": 0}}
    assert "No difference." in run("diff", out, out)[1]


def test_a_plan_for_the_other_ir_is_refused(run: Run, residual_onnx: Path, user_module: str, tmp_path: Path) -> None:
    plan = tmp_path / "plan.json"
    run("rewrite", residual_onnx, "--dry-run", "--plan-out", plan)
    code, _, err = run("apply", f"{user_module}:with_inputs", plan, "-o", tmp_path / "out.pt2")
    assert code == 1
    assert "plan again" in err
    assert not (tmp_path / "out.pt2").exists()


def test_a_rewritten_module_is_written_as_pt2_and_read_with_trust_only(
    run: Run, user_module: str, tmp_path: Path
) -> None:
    out = tmp_path / "fused.pt2"
    code, _, err = run("rewrite", f"{user_module}:with_inputs", "-o", out)
    assert (code, err) == (0, "")
    code, _, err = run("inspect", out)
    assert code == 1
    assert "--trust" in err
    code, text, err = run("inspect", out, "--trust", "--json")
    assert (code, err) == (0, "")
    assert json.loads(text)["blocks"][0]["fused"] is True


@pytest.mark.parametrize("given", ["2x4x8x8", "Nx4x8x8"])
def test_a_module_takes_its_inputs_from_the_command_line(run: Run, user_module: str, given: str) -> None:
    code, out, err = run("inspect", f"{user_module}:block", "--input", given, "--json")
    assert (code, err) == (0, "")
    batch = json.loads(out)["blocks"][0]["shape"][0]
    assert isinstance(batch, str) == given.startswith("N")


# ---- compile, run, bench -------------------------------------------------------------------------------------------


def test_an_artifact_runs_on_given_inputs_and_agrees_with_torch(run: Run, user_module: str, tmp_path: Path) -> None:
    artifact, given = tmp_path / "block.rescompile", tmp_path / "x.npz"
    code, text, err = run("compile", f"{user_module}:with_inputs", "-o", artifact)
    assert (code, err) == (0, "")
    assert "x: f32[2,4,8,8]" in text
    np.savez(given, x=np.random.default_rng(0).standard_normal((2, 4, 8, 8)).astype(np.float32))
    outputs = []
    for model, backend in ((artifact, "tvm"), (f"{user_module}:with_inputs", "eager")):
        out = tmp_path / f"{backend}.npz"
        code, text, err = run("run", model, "--backend", backend, "--input-file", given, "-o", out, "--json")
        assert (code, err) == (0, "")
        assert json.loads(text)["outputs"][0]["type"] == "f32[2,4,8,8]"
        outputs.append(next(iter(np.load(out).values())))
    np.testing.assert_allclose(outputs[0], outputs[1], rtol=0, atol=1e-5 * np.abs(outputs[1]).max())


def test_an_artifact_runs_where_neither_torch_nor_onnx_is(run: Run, residual_onnx: Path, tmp_path: Path) -> None:
    artifact = tmp_path / "block.rescompile"
    assert run("compile", residual_onnx, "-o", artifact)[0] == 0
    absent = "import sys; sys.modules.update(dict.fromkeys(('torch', 'onnx', 'onnx_ir', 'onnxruntime')))"
    script = f"{absent}; from rescompile.cli import main; main(['run', {str(artifact)!r}, '--json'])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["outputs"][0]["type"] == "f32[2,4,8,8]"


def test_wrong_arrays_for_an_artifact_are_one_sentence(run: Run, residual_onnx: Path, tmp_path: Path) -> None:
    artifact, given = tmp_path / "block.rescompile", tmp_path / "x.npz"
    assert run("compile", residual_onnx, "-o", artifact)[0] == 0
    right = np.zeros((2, 4, 8, 8), np.float32)
    for arrays, said in (
        ({"z": right}, "no input 'z'"),
        ({}, "lacks x"),
        ({"x": right[:1]}, "'x'"),
        ({"x": right.astype(np.float64)}, "'x'"),
    ):
        np.savez(given, **arrays)
        code, out, err = run("run", artifact, "--input-file", given)
        assert (code, out) == (1, "")
        assert said in err
        assert "Internal error" not in err
    code, _, err = run("run", artifact, "--backend", "eager")
    assert code == 1
    assert "compiled artifact" in err


def test_operations_without_a_lowering_are_all_named_at_once(run: Run, tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Mystery", ["x"], ["a"], name="first", domain="acme"),
        helper.make_node("Riddle", ["a"], ["y"], name="second", domain="acme"),
    ]
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [2, 4]) for name in ("x", "y", "a")]
    graph = helper.make_graph(nodes, "unknown", values[:1], values[1:2], value_info=values[2:])
    imports = [helper.make_opsetid("", 17), helper.make_opsetid("acme", 1)]
    path = tmp_path / "unknown.onnx"
    onnx.save(helper.make_model(graph, opset_imports=imports, ir_version=8), path)
    assert run("inspect", path)[0] == 0
    code, _, err = run("compile", path, "-o", tmp_path / "out.rescompile")
    assert code == 1
    assert "Mystery" in err
    assert "Riddle" in err
    assert err.count("\n") == 1
    assert not (tmp_path / "out.rescompile").exists()


@pytest.mark.usefixtures("never_loaded")
def test_an_unknown_target_is_said_before_long_work(run: Run, tmp_path: Path) -> None:
    code, _, err = run("compile", "m.onnx", "-o", tmp_path / "out", "--target", "cuda:sm_9O")
    assert code == 1
    assert "did you mean 'cuda:sm_90'?" in err


def test_tvm_missing_names_the_extra_to_install(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from importlib import metadata

    def missing(package: str) -> str:
        raise metadata.PackageNotFoundError(package)

    monkeypatch.setattr(metadata, "version", missing)
    code, _, err = run("compile", "m.onnx", "-o", tmp_path / "out")
    assert code == 1
    assert "pip install 'rescompile[tvm]'" in err


def test_bench_measures_every_runtime_and_says_which_could_not(run: Run, residual_onnx: Path) -> None:
    code, text, err = run("bench", residual_onnx, "--against", "eager,onnxruntime", "--json")
    assert (code, err) == (0, "")
    found = json.loads(text)
    assert set(found["runtimes"]) == {"onnxruntime", "rescompile"}
    assert "onnxruntime" in found["failures"]["eager"]
    assert found["runtimes"]["rescompile"]["max_relative_error"] < 1e-5


# ---- what cannot be served -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("inputs", "said"),
    [
        ([], "once for each of x"),
        (["2x4x8"], ""),
        (["2x3x8x8"], ""),
        (["2x4x8x8:int64"], ""),
        (["2x4x8x8", "1x1"], ""),
    ],
)
def test_wrong_inputs_of_a_module_are_one_sentence(run: Run, user_module: str, inputs: list[str], said: str) -> None:
    arguments = [word for text in inputs for word in ("--input", text)]
    code, out, err = run("inspect", f"{user_module}:block", *arguments)
    assert (code, out) == (1, "")
    assert said in err
    assert "Internal error" not in err
    assert err.count("\n") == 1


def test_a_module_that_torch_export_cannot_take_is_told_its_line(run: Run, user_module: str) -> None:
    code, _, err = run("inspect", f"{user_module}:Branching", "--input", "2x4")
    assert code == 1
    assert "users_own_models.py" in err
    assert err.count("\n") == 1


def write_empty(path: Path) -> None:
    path.write_bytes(b"")


def write_text(path: Path) -> None:
    path.write_text("not a model")


def write_truncated(path: Path) -> None:
    path.write_bytes(residual_model().SerializeToString()[:200])


def write_external(path: Path, location: str) -> None:
    model = residual_model()
    for tensor in model.graph.initializer:
        size = len(tensor.raw_data)
        tensor.ClearField("raw_data")
        tensor.data_location = TensorProto.EXTERNAL
        for key, value in (("location", location), ("offset", "0"), ("length", str(size))):
            tensor.external_data.add(key=key, value=value)
    path.write_bytes(model.SerializeToString())


def write_missing_data(path: Path) -> None:
    write_external(path, "weights.bin")


def write_data_outside(path: Path) -> None:
    (path.parent.parent / "outside.bin").write_bytes(b"\0" * 4096)
    write_external(path, "../outside.bin")


def write_unknown_opset(path: Path) -> None:
    model = residual_model()
    model.opset_import[0].version = 999
    path.write_bytes(model.SerializeToString())


@pytest.mark.parametrize(
    "write",
    [write_empty, write_text, write_truncated, write_missing_data, write_data_outside, write_unknown_opset],
    ids=lambda write: write.__name__.removeprefix("write_"),
)
def test_a_bad_file_is_one_sentence_and_the_output_stays(
    run: Run, tmp_path: Path, write: Callable[[Path], None]
) -> None:
    folder = tmp_path / "models"
    folder.mkdir()
    path, out = folder / "bad.onnx", folder / "out.onnx"
    write(path)
    out.write_text("as it was")
    code, text, err = run("rewrite", path, "-o", out)
    assert (code, text) == (1, "")
    assert "Internal error" not in err
    assert err.count("\n") == 1
    assert out.read_text() == "as it was"
    assert sorted(item.name for item in folder.iterdir()) == ["bad.onnx", "out.onnx"]


@pytest.mark.parametrize("content", [b"", b"not a program"])
def test_a_bad_pt2_is_one_sentence(run: Run, tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "bad.pt2"
    path.write_bytes(content)
    code, out, err = run("inspect", path, "--trust")
    assert (code, out) == (1, "")
    assert "Internal error" not in err
    assert err.count("\n") == 1


def test_inputs_given_for_a_file_must_fit_its_own(run: Run, residual_onnx: Path) -> None:
    assert run("inspect", residual_onnx, "--input", "2x4x8x8")[0] == 0
    for wrong in ("2x4x8", "1x4x8x8", "2x4x8x8:int64"):
        code, _, err = run("inspect", residual_onnx, "--input", wrong)
        assert code == 1
        assert "does not fit" in err
    code, _, err = run("inspect", residual_onnx, "--input", "2x4x8x8", "--input", "1")
    assert code == 1
    assert "leave it out" in err


def test_a_plan_that_does_not_fit_is_refused_and_nothing_is_written(
    run: Run, residual_onnx: Path, tmp_path: Path
) -> None:
    plan = tmp_path / "plan.json"
    run("rewrite", residual_onnx, "--dry-run", "--plan-out", plan)
    edited: dict[str, Any] = json.loads(plan.read_text().replace('"conv"', '"convolution"'))
    plan.write_text(json.dumps(edited))
    code, _, err = run("apply", residual_onnx, plan, "-o", tmp_path / "out.onnx")
    assert code == 1
    assert "does not fit" in err
    assert not (tmp_path / "out.onnx").exists()
