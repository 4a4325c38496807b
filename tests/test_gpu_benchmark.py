"""The GPU benchmark as far as it goes without a GPU: a set is packed and run on the simulated one; what is reported."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("tvm")

import rescompile as rc
from benchmarks import gpu, gpu_kernels, gpu_models, gpu_pack, gpu_report
from benchmarks.gpu_set import INDEX, Set
from benchmarks.gpu_specs import entries
from rescompile.backends.cuda.choice_records import read_shipped
from rescompile.backends.cuda.cubin import Cubin
from rescompile.errors import RescompileError
from tests import simulated_gpu


def simulated(source: str, _: str) -> Cubin:
    return Cubin(simulated_gpu.simulated_cubin(source), (), "g++")


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five small regions, one kernel of each family, as code for the simulated GPU."""
    if simulated_gpu.COMPILER is None:
        pytest.skip("no g++ here")
    folder = tmp_path_factory.mktemp("set")
    gpu_pack.pack(folder, entries(small=True), "sm_90", tiles=1, rules=False, assemble=simulated)
    return folder


@pytest.fixture(scope="module")
def measured(packed: Path) -> dict[str, dict[str, Any]]:
    """What the benchmark says of them, run in a process that never sees TVM's compiler."""
    out = packed / "kernels.jsonl"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    script = simulated_gpu.HERE / "measure.py"
    command = [sys.executable, str(script), *simulated_gpu.driver(), str(packed), str(out)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert not done.returncode, done.stdout + done.stderr
    found, broken = gpu_kernels.results(out)
    assert not broken
    return found


def test_every_candidate_of_a_set_is_compared_with_float64_and_timed(measured: dict[str, dict[str, Any]]) -> None:
    groups = ["add_layer_norm", "add_rms_norm", "group_norm", "softmax", "linear"]
    assert [name.partition("/")[0] for name in measured] == groups
    for line in measured.values():
        assert not line["failures"]
        assert len(line["own"]) == 1
        for label in line["own"]:
            told = line["candidates"][label]
            assert "refused" not in told, told
            assert 0 <= max(told["gaps"].values()) < 1e-2
            assert told["seconds"] > 0
        if line["group"] != "group_norm":
            assert any(label.startswith("library ") for label in line["candidates"])
        assert "torch eager" in line["rivals"]


def test_a_set_says_what_it_holds(packed: Path) -> None:
    opened = Set.open(packed)
    assert opened.arch == "sm_90"
    assert [region.name for region in opened.regions] == [entry.name for entry in entries(small=True)]
    linear = opened.regions[-1]
    assert [buffer.name for buffer in linear.buffers] == ["a", "b", "bias", "residual", "y"]
    call = linear.alone()
    assert call is not None
    assert call.buffers == ("a", "b", "y")


def test_what_is_packed_already_is_not_packed_again(packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_pack, "compiled", None)
    gpu_pack.pack(packed, entries(small=True), "sm_90", tiles=1, rules=False, assemble=simulated)
    assert len(Set.open(packed).regions) == 5


def test_a_region_that_ended_its_process_is_named_and_not_run_again(tmp_path: Path) -> None:
    out = tmp_path / "kernels.jsonl"
    out.write_text('{"name": "a", "begun": true}\n{"name": "a", "took": 1}\n{"name": "b", "begun": true}\n{"na')
    found, broken = gpu_kernels.results(out)
    assert list(found) == ["a"]
    assert broken == ["b"]
    assert {line["name"] for line in gpu_kernels.read_lines(out)} == {"a", "b"}


@pytest.mark.parametrize("text", ["", "{", '{"schema": 7}'])
def test_a_folder_without_a_set_is_one_sentence(tmp_path: Path, text: str) -> None:
    if text:
        (tmp_path / INDEX).write_text(text)
    with pytest.raises(RescompileError, match=r"holds no compiled set .* benchmarks.gpu_pack"):
        Set.open(tmp_path)


# ---- models ----------------------------------------------------------------------------------------------------


def test_a_model_travels_without_its_weights_and_gets_others_of_the_same_kind(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Linear(64, 96), torch.nn.ReLU(), torch.nn.Linear(96, 32)).eval()
    x = torch.randn(4, 64)
    program = rc.compile(module, (x,), target="cpu")
    program.save(tmp_path / "whole.zip")
    gpu_models.without_weights(tmp_path / "whole.zip", tmp_path / "stripped.zip")
    with zipfile.ZipFile(tmp_path / "stripped.zip") as archive:
        assert gpu_models.WEIGHTS not in archive.namelist()
        told = json.loads(archive.read(gpu_models.DRAWN))
    assert {entry["dtype"] for entry in told} == {"F32"}
    assert any("hex" in entry for entry in told), "the last bias is short enough to travel"
    path = gpu_models.with_weights(tmp_path / "stripped.zip", tmp_path / "again.zip", gpu_models.drawn_on_the_device)
    out = rc.load_program(path)(x)
    assert out.shape == (4, 32)
    assert bool(out.isfinite().all())
    want = module(x).detach()
    assert 0.2 < float(out.std() / want.std()) < 5
    assert not torch.equal(out, want)


def test_models_are_named_once_and_the_most_telling_come_first() -> None:
    names = list(gpu_models.models())
    assert names[:3] == ["resnet50 b32", "bert_base b32", "llama 12 layers"]
    assert len(set(names)) == len(names) == 11 - 1


def test_an_unknown_model_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(RescompileError, match="There is no model 'resnet5000'"):
        gpu_models.pack_models(tmp_path, "resnet5000", "sm_90a")


# ---- the run, the report ---------------------------------------------------------------------------------------


def test_without_a_gpu_one_line_says_so(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    gpu.main(["--out", str(tmp_path)])
    assert capsys.readouterr().out == f"{gpu.NO_GPU}\n"
    assert not list(tmp_path.iterdir())


def test_a_dry_run_names_what_would_run(packed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    gpu.main(["--set", str(packed), "--dry", "--stages", "kernels", "--seconds", "60"])
    told = capsys.readouterr().out
    assert "kernels within 60 s" in told
    assert all(entry.name in told for entry in entries(small=True))


def test_an_unknown_stage_is_wrong_usage() -> None:
    with pytest.raises(SystemExit):
        gpu.main(["--stages", "nothing"])


RESULTS: dict[str, Any] = {
    "schema": 1,
    "date": "2026-12-04",
    "facts": {"device": "NVIDIA H200", "arch": "sm_90", "driver": "580.1", "torch": "2.11"},
    "set": {"arch": "sm_90a", "kernels": "digest", "versions": {"tvm": "0.27"}},
    "ceilings": {"copy_bytes_per_s": 4e12, "matmul_float16_flop_per_s": 8e14},
    "kernels": {
        name: {"name": name, "group": name.partition("/")[0], "key": f"Spec({name})", "kernels": "digest", **line}
        for name, line in {
            "add_rms_norm/8192x4096/float16": {
                "bytes": 4 * 8192 * 4096 * 2, "flops": None, "own": ["rows 1", "rows 2"], "failures": {},
                "candidates": {
                    "rows 1": {"seconds": 8e-5, "gaps": {"y": 1e-3}},
                    "rows 2": {"seconds": 7e-5, "gaps": {"y": 1e-3}},
                    "library norm": {"seconds": 9e-5, "gaps": {"y": 1e-3}},
                },
                "rivals": {"torch eager": {"seconds": 2e-4}, "inductor max-autotune": {"seconds": 6e-5}},
            },
            "linear/4096x768x768 +bias/float16": {
                "bytes": 1 << 24, "flops": 2 * 4096 * 768 * 768, "own": ["mma 1", "mma 2"], "failures": {},
                "candidates": {
                    "mma 1": {"refused": "its 'y' differs", "gaps": {"y": None}},
                    "mma 2": {"seconds": 1.2e-5, "gaps": {"y": 1e-3}},
                    "library linear": {"seconds": 1e-5, "gaps": {"y": 1e-3}},
                },
                "rivals": {"plain library": {"seconds": 1e-5}},
            },
        }.items()
    },
    "models": {
        "a": {"milliseconds": {"rescompile": 1.0, "torch eager": 2.0, "inductor max-autotune": 1.5}, "error": 1e-3},
        "b": {"milliseconds": {"rescompile": 2.0, "inductor max-autotune": 2.0}, "failures": {"ONNX Runtime": "no"}},
    },
    "broken": ["conv/x/float16"],
    "notes": ["a note"],
}  # fmt: skip


def test_the_report_says_what_was_reached_and_what_was_refused() -> None:
    text = gpu_report.markdown(RESULTS)
    assert "1 of 1 reach 0.92; the worst is 0.959" in text
    assert "slower than inductor's: add_rms_norm/8192x4096/float16 (1.17× inductor's time)" in text
    assert "1 of 1 reach 1.05; the worst is 1.000" in text
    assert "1.22× inductor's speed in geometric mean over 2 (reached: 1.15), the lowest 1.00×" in text
    assert "mma 1: its 'y' differs" in text
    assert "conv/x/float16: ended the process" in text
    assert "| a | **1.000** | 2.000 (2.00×) | 1.500 (1.50×) | 1.0e-03 |" in text
    assert "b: ONNX Runtime: no" in text


def test_results_become_files_and_records_that_the_package_reads(tmp_path: Path) -> None:
    paths = gpu_report.write(tmp_path, RESULTS)
    names = [path.name for path in paths]
    assert names[:3] == [
        "gpu-nvidia-h200-2026-12-04.json", "gpu-nvidia-h200-2026-12-04.md", "records-nvidia-h200-2026-12-04.json",
    ]  # fmt: skip
    folder = tmp_path / "records"
    folder.mkdir()
    (folder / names[2]).write_bytes(paths[2].read_bytes())
    (file,) = read_shipped(folder)
    assert file.fits("sm_90", None)
    assert file.records["Spec(add_rms_norm/8192x4096/float16)"].candidate == "rows 2"
    assert file.records["Spec(linear/4096x768x768 +bias/float16)"].candidate == "library linear"


def test_nothing_measured_is_a_report_too() -> None:
    text = gpu_report.markdown({**RESULTS, "kernels": {}, "models": {}, "ceilings": {}, "broken": [], "notes": []})
    assert text.count("not measured") == 2
    assert "None was measured." in text


def test_inductors_time_is_taken_at_the_speed_that_ours_had() -> None:
    model: dict[str, Any] = {"milliseconds": {"rescompile": 1.0}}
    line = {"milliseconds": {"rescompile": 2.0, gpu_report.INDUCTOR: 3.0}, "failures": {}}
    gpu._beside(model, line)
    assert model["milliseconds"][gpu_report.INDUCTOR] == 1.5


def test_names_of_regions_are_unique() -> None:
    names = [entry.name for entry in entries()]
    assert len(set(names)) == len(names)
    assert json.loads(json.dumps(names)) == names
