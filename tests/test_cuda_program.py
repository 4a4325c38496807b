"""Whole programs for GPUs on the simulated one: streams, graphs, sizes of batch, architectures, bad machines.

The simulated driver (tests/simulated_gpu/driver.cpp) lets a stream's work wait until something waits for the stream,
so that an order that nothing guarantees shows as wrong numbers, and refuses in a capture what the real one refuses.
"""

from __future__ import annotations

import inspect
import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rescompile.errors import RescompileError
from rescompile.kinds import OpKind as K
from tests import simulated_gpu
from tests.lowering_cases import Sketch

pytest.importorskip("tvm")

from rescompile.backends import pack_runtime, tvm_runtime
from rescompile.backends.artifact import Code
from rescompile.backends.compile import compile_graph
from rescompile.backends.cuda import codes, ptx
from rescompile.backends.cuda import compile as compile_module
from rescompile.backends.cuda.cubin import Cubin, compilers, to_cubin
from rescompile.backends.cuda.ptx import Ptx
from rescompile.backends.program import load

WIDTH = 48
EXACT = 2e-6  # float32 sums of 48 against float64
SCENARIOS = (
    "numpy", "pointers", "streams", "capture_of_the_caller", "libraries", "failures", "buckets", "architectures",
    "machines",
)  # fmt: skip


def _graph(rows: int | str) -> tuple[Sketch, dict[str, np.ndarray[Any, Any]]]:
    """t = N(x)·w + b; y = softmax(t) + x; outputs y, t."""
    sketch = Sketch()
    x = sketch.input(64, WIDTH, dynamic=(rows, WIDTH))
    weight, bias = sketch.param(WIDTH), sketch.param(WIDTH)
    t = sketch.op(K.LAYER_NORM, [x, weight, bias], (rows, WIDTH), axis=-1)
    s = sketch.op(K.SOFTMAX, [t], (rows, WIDTH), axis=-1)
    sketch.graph.set_outputs([sketch.op(K.ADD, [s, x], (rows, WIDTH)), t])
    sketch.graph.commit()
    return sketch, {name: sketch.of(value).numpy() for name, value in (("x", x), ("weight", weight), ("bias", bias))}


def _assembled(made: dict[tuple[str, int], bytes], source: str, number: int) -> bytes:
    key = (source, number)
    if key not in made:
        made[key] = simulated_gpu.simulated_cubin(source, optimise="-O0", arch=number)
    return made[key]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Artifacts with code for the simulated GPU: static, dynamic with sizes, several architectures, source only."""
    if simulated_gpu.COMPILER is None:
        pytest.skip("no g++ here")
    made: dict[tuple[str, int], bytes] = {}
    out = tmp_path_factory.mktemp("programs")

    def to_cubin(source: str, arch: str) -> Cubin:
        return Cubin(_assembled(made, source, int(arch.removeprefix("sm_"))), (), "simulated")

    def to_ptx(source: str, arch: str) -> Ptx:
        return Ptx(_assembled(made, source, -int(arch.removeprefix("sm_"))), (13, 0))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compile_module, "to_cubin", to_cubin)
        patch.setattr(compile_module, "to_ptx", to_ptx)
        sketch, numbers = _graph(64)
        np.savez(out / "numbers.npz", **numbers)
        compile_graph(sketch.graph, "cuda:sm_90", ptx=False).save(out / "static.zip")
        compile_graph(sketch.graph, "cuda:sm_80,sm_90").save(out / "several.zip")
        dynamic = compile_graph(_graph("N")[0].graph, "cuda:sm_90", buckets=(4, 2), ptx=False)
        dynamic.save(out / "dynamic.zip")
        patch.setattr(compile_module, "to_cubin", lambda *_: None)
        compile_graph(sketch.graph, "cuda:sm_90").save(out / "source.zip")
    return out


@pytest.fixture(scope="module")
def seen(folder: Path) -> dict[str, Any]:
    return simulated_gpu.run_scenarios(folder, SCENARIOS)


def test_artifacts_say_what_they_hold(folder: Path) -> None:
    static = load(folder / "static.zip").manifest
    block = 64 * WIDTH * 4
    assert static.storage["weights"] == 2 * WIDTH * 4
    assert static.storage["activations"] == block  # softmax(t); t and y are outputs
    dynamic = load(folder / "dynamic.zip").manifest
    assert [code.extents for code in dynamic.codes] == [{}, {"N": 2}, {"N": 4}]
    assert dynamic.symbols == ["N"]
    assert dynamic.codes[0].workspace is None
    several = load(folder / "several.zip").manifest
    assert [(code.arch, code.form) for code in several.codes] == [
        ("sm_80", "cubin"), ("sm_90", "cubin"), ("sm_90", "ptx"),
    ]  # fmt: skip
    source = load(folder / "source.zip").manifest
    assert source.note.startswith("source only")
    assert [code.form for code in source.codes] == ["cuda"]


def test_weights_are_kept_once_for_all_codes(folder: Path) -> None:
    for name in ("several", "dynamic"):
        manifest = load(folder / f"{name}.zip").manifest
        assert len(manifest.weights) == 2
        assert all(code.weights == manifest.weights for code in manifest.codes)


def test_arrays_go_in_and_out_and_later_calls_allocate_nothing(seen: dict[str, Any]) -> None:
    found = seen["numpy"]
    assert max(found["errors"]) < EXACT
    assert len(set(found["mallocs"])) == 1
    assert found["launches_of_a_replay"] == 0
    assert found["replays"] == 1
    assert found["note"] == ""
    assert not found["tvm"]  # the runtime alone did it


def test_tensors_that_come_again_are_replayed_where_they_lie(seen: dict[str, Any]) -> None:
    found = seen["pointers"]
    assert max(found["errors"]) < EXACT
    # Captures, copies, allocations and launches of one call: two warm up, and soon nothing but replays is left.
    assert [call[3] > 0 for call in found["again"][:2]] == [True, True]
    assert found["again"][5:] == [[0, 0, 0, 0]] * 4


def test_other_tensors_go_through_buffers_that_stay(seen: dict[str, Any]) -> None:
    captures, copies, _, launches = zip(*seen["pointers"]["others"], strict=True)
    assert copies == (3,) * 4  # one input, two outputs
    assert sum(captures) <= 1
    assert sum(bool(launched) for launched in launches) <= 1  # for that capture


def test_programs_on_two_streams_do_not_disturb_each_other(seen: dict[str, Any]) -> None:
    found = seen["streams"]
    assert max(found["errors"]) < EXACT
    assert found["early"] == [True]  # nothing had run before its stream was waited for


def test_caller_that_captures_gets_the_launches_into_its_own_graph(seen: dict[str, Any]) -> None:
    found = seen["capture_of_the_caller"]
    assert max(found["errors"]) < EXACT
    assert found["captures"] == 1
    assert found["note"] == ""


def test_programs_that_call_libraries_are_captured_by_torch(seen: dict[str, Any]) -> None:
    found = seen["libraries"]
    assert max(found["errors"]) < EXACT
    assert found["note"] == ""
    assert found["modes"]
    assert set(found["modes"]) == {"thread_local"}
    accepted = inspect.signature(torch.cuda.graph.__init__).parameters
    assert {"stream", "capture_error_mode"} <= set(accepted)


def test_what_cannot_be_captured_runs_as_before_with_a_note(seen: dict[str, Any]) -> None:
    found = seen["failures"]
    assert max(found["errors"]) < EXACT
    instantiate, allocate, eager = found["notes"]
    assert "not captured" in instantiate
    assert "cudaGraphInstantiate" in instantiate
    assert "not captured" in allocate
    assert eager == ""
    assert found["replays"] == 0  # graphs = False
    assert found["current"] == 0


def test_dynamic_batch_is_padded_and_cut(seen: dict[str, Any]) -> None:
    found = seen["buckets"]
    assert max(found["errors"]) < EXACT
    assert found["replays"]["4"] == found["replays"]["3"] == 4
    assert found["replays"]["6"] == 0  # larger than all sizes: any number of rows, launch by launch


def test_code_is_chosen_by_the_compute_capability(seen: dict[str, Any]) -> None:
    found = seen["architectures"]
    assert {name: said for name, said in found.items() if name != "7.5"} == dict.fromkeys(
        ("8.0", "8.6", "9.0", "10.0", "12.0"), "True"
    )
    assert found["7.5"] == (
        "RescompileError: The program has code for sm_80, sm_90, sm_90 and later, as ptx, and this GPU is sm_75: "
        "compile the model with --target cuda:sm_75."
    )


@pytest.mark.parametrize(
    ("machine", "said"),
    [
        ("old_driver", "serves CUDA 12.4 at most, and the runtime is that of CUDA 13.0: update the driver."),
        ("no_gpu", "has an NVIDIA driver and no GPU"),
        ("code_refused", "The driver does not take the program's code (failure of the simulated GPU)"),
        ("source_only", "neither nvcc nor NVRTC is here to compile it: pip install nvidia-cuda-nvrtc."),
        ("shared", "asks for 150000 bytes of shared memory in a block, and this GPU has 101376: compile the model"),
        ("other_gpu", "runs on cuda:0, where its weights are, and the inputs are on cuda:1"),
        ("not_current", "on cuda:1 and the current device is cuda:0: call the program under"),
        ("on_cpu", "is on cpu:0; the program takes one on cuda"),
        ("no_such_gpu", "There is no GPU cuda:2 here: the last is cuda:1."),
    ],
)
def test_machines_and_tensors_that_do_not_fit_are_one_sentence(seen: dict[str, Any], machine: str, said: str) -> None:
    found = seen["machines"][machine]
    assert found.startswith("RescompileError: ") or machine == "shared"
    assert said in found
    assert "\n" not in found


def test_second_gpu_is_used_where_it_is_current(seen: dict[str, Any]) -> None:
    assert seen["machines"]["second_gpu"] == "1"
    assert seen["machines"]["current"] == "0"


def test_machine_without_a_driver_is_said(folder: Path) -> None:
    program = load(folder / "static.zip")
    with pytest.raises(RescompileError, match="no NVIDIA driver"):
        program(np.zeros((64, WIDTH), np.float32))


@pytest.mark.parametrize("kept", [0, 200, 4000, 20000])
def test_truncated_program_is_refused(folder: Path, tmp_path: Path, kept: int) -> None:
    path = tmp_path / "cut.zip"
    path.write_bytes((folder / "static.zip").read_bytes()[:kept])
    with pytest.raises(RescompileError, match="not a program"):
        load(path)


def test_damaged_code_is_refused(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "damaged.zip"
    data = bytearray((folder / "static.zip").read_bytes())
    with zipfile.ZipFile(folder / "static.zip") as archive:
        entry = archive.getinfo(load(folder / "static.zip").manifest.codes[0].file)
    data[entry.header_offset + 400] ^= 0xFF
    path.write_bytes(data)
    with pytest.raises(RescompileError, match="not a program"):
        load(path)


def test_program_that_was_loaded_can_be_saved_without_a_gpu(folder: Path, tmp_path: Path) -> None:
    again = load(load(folder / "several.zip").save(tmp_path / "again.zip"))
    first = load(folder / "several.zip")
    assert again.manifest == first.manifest
    assert {name: bytes(data) for name, data in again._code.items()} == dict(first._code)


def test_runtime_that_is_packed_needs_nothing_but_numpy(folder: Path, tmp_path: Path) -> None:
    site = pack_runtime.pack(tmp_path, f"{sys.version_info.major}.{sys.version_info.minor}")
    assert pack_runtime.size(site) < 12e6
    beside = tmp_path / "beside"
    beside.mkdir()
    for part in Path(np.__file__).parent.parent.glob("numpy*"):
        if part.name in ("numpy", "numpy.libs"):
            (beside / part.name).symlink_to(part)
    script = str(Path(simulated_gpu.__file__).parent / "scenarios.py")
    command = [sys.executable, "-S", script, *simulated_gpu.driver(), str(folder), "numpy"]
    environment = {"PYTHONPATH": f"{site}:{beside}", "PATH": os.environ["PATH"]}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)["numpy"]
    assert max(found["errors"]) < EXACT
    assert not found["tvm"]
    with pytest.raises(RescompileError, match="is there already"):
        pack_runtime.pack(tmp_path)


def test_machine_without_the_runtime_is_told_where_it_comes_from(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tvm_runtime.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(RescompileError, match="pack_runtime"):
        tvm_runtime.folder()


SMALL = 'extern "C" __global__ void f(float* x) { x[threadIdx.x] += 1.0f; }'


def test_ptx_is_of_a_version_that_the_oldest_driver_takes() -> None:
    if not compilers():
        pytest.skip("neither nvcc nor NVRTC here")
    made = ptx.to_ptx(SMALL, "sm_90")
    assert made is not None
    assert made.data.endswith(b"\0")
    if ptx.assembler() is not None:
        assert made.driver <= (13, 0)
        assert ptx.declared(made.data.decode()) <= ptx.OLDEST
        assert not made.note


def test_ptx_that_nobody_can_check_stays_and_says_what_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    text = ".version 9.4\n.target sm_90\n.address_size 64\n"
    monkeypatch.setattr(ptx, "_by_nvcc", lambda *_: text)
    monkeypatch.setattr(ptx, "assembler", lambda: None)
    made = ptx.to_ptx(SMALL, "sm_90")
    assert made is not None
    assert made.driver == (13, 4)
    assert made.data.startswith(b".version 9.4")
    assert "CUDA 13.4" in made.note


def test_code_of_one_architecture_alone_has_ptx_made_for_any_beside_it(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def to_ptx(_: str, arch: str) -> Ptx:
        asked.append(arch)
        return Ptx(b".version 8.0\0", (12, 0))

    monkeypatch.setattr(compile_module, "to_cubin", lambda *_: Cubin(b"\x7fELF", (), "simulated"))
    monkeypatch.setattr(compile_module, "to_ptx", to_ptx)
    monkeypatch.setattr(compile_module, "code_arch", lambda _, arch: f"{arch}a" if arch == "sm_90" else arch)
    manifest = compile_graph(_graph(64)[0].graph, "cuda:sm_90").manifest
    assert [(code.arch, code.form) for code in manifest.codes] == [("sm_90a", "cubin"), ("sm_89", "ptx")]
    assert asked == ["sm_89"]
    assert codes.choose(manifest.codes, (12, 0), (13, 0))[0].form == "ptx"
    assert codes.choose(manifest.codes, (9, 0), (13, 0))[0].form == "cubin"


def test_more_shared_memory_than_the_architecture_has_is_one_sentence() -> None:
    if not compilers():
        pytest.skip("neither nvcc nor NVRTC here")
    source = 'extern "C" __global__ void f(float* x) { __shared__ float s[65536]; s[threadIdx.x] = x[0]; x[1] = s[0]; }'
    with pytest.raises(RescompileError, match=r"does not compile for sm_80: .*shared"):
        to_cubin(source, "sm_80")


def test_program_for_a_newer_driver_is_refused_in_one_sentence() -> None:
    newer = Code("a.so", "sm_90", "ptx", driver=(13, 4))
    with pytest.raises(
        RescompileError, match=r"needs a driver for CUDA 13\.4 or later, and this one serves CUDA 13\.0"
    ):
        codes.choose([newer], (9, 0), (13, 0))
    own = Code("b.so", "sm_90a", "cubin", driver=(13, 0))
    assert codes.choose([newer, own], (9, 0), (13, 0)) == [own]
    with pytest.raises(RescompileError, match="has code for sm_90a, and this GPU is sm_100"):
        codes.choose([own], (10, 0), (13, 0))
    assert codes.choose([newer, own], (10, 0), (13, 4)) == [newer]


def test_command_line_says_why_a_program_does_not_run(folder: Path, run: Callable[..., tuple[int, str, str]]) -> None:
    status, _, said = run("run", folder / "static.zip")
    assert status == 1
    assert "no NVIDIA driver" in said
    status, _, said = run("compile", "nothing:model", "-o", folder / "x.zip", "--target", "cuda:sm_80,sm_91")
    assert status == 1
    assert "did you mean 'sm_" in said
    status, _, said = run("compile", "nothing:model", "-o", folder / "x.zip", "--buckets", "1,two")
    assert status == 2
    assert "'two' is no size" in said


def test_sizes_of_a_batch_whose_rows_meet_are_refused() -> None:
    sketch = Sketch()
    x = sketch.input(2, 4, dynamic=("N", 4))
    sketch.graph.set_outputs([sketch.op(K.SOFTMAX, [x], ("N", 4), axis=0)])
    sketch.graph.commit()
    with pytest.raises(RescompileError, match="works along the batch"):
        compile_graph(sketch.graph, "cuda:sm_90", buckets=(1, 8))
    with pytest.raises(RescompileError, match="positive"):
        compile_graph(_graph("N")[0].graph, "cuda:sm_90", buckets=(0,))
    with pytest.raises(RescompileError, match="for GPUs"):
        compile_graph(_graph("N")[0].graph, "cpu", buckets=(1,))
