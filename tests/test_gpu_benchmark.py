"""The GPU benchmark as far as it goes without a GPU: a set is packed and run on the simulated one; what is reported."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("tvm")

from benchmarks import gpu_kernels, gpu_pack
from benchmarks.gpu_set import INDEX, Set
from benchmarks.gpu_specs import entries
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


def test_names_of_regions_are_unique() -> None:
    names = [entry.name for entry in entries()]
    assert len(set(names)) == len(names)
    assert json.loads(json.dumps(names)) == names
