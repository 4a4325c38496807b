"""Programs as files: written whole or not at all, loaded without torch, refused in one sentence."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rescompile.backends import link
from rescompile.backends.compile import compile_graph
from rescompile.backends.program import Program, load
from rescompile.errors import RescompileError
from rescompile.kinds import OpKind
from tests.lowering_cases import F, Sketch, close

pytest.importorskip("tvm")
K = OpKind


@pytest.fixture(scope="module")
def built() -> tuple[Program, torch.Tensor, torch.Tensor]:
    """A program of a convolution, a norm and a linear, an input, and torch's output."""
    sketch = Sketch()
    x, w, b = sketch.input(2, 8, 6, 6), sketch.param(8, 8, 3, 3), sketch.param(8)
    a = sketch.op(K.FUSED_CONV, [x, w, b, x], (2, 8, 6, 6), pads=(1, 1, 1, 1), outer="relu")
    pooled = sketch.op(K.MEAN, [a], (2, 8), axes=(2, 3))
    head = sketch.param(40, 8)
    y = sketch.op(K.LINEAR, [pooled, head, None], (2, 40))
    sketch.graph.set_outputs([y, a])
    sketch.graph.commit()
    of = sketch.of
    want = F.linear(torch.relu(F.conv2d(of(x), of(w), of(b), padding=1) + of(x)).mean((2, 3)), of(head))
    return compile_graph(sketch.graph, tuning=0, threads=1), of(x), want


def test_a_saved_program_gives_the_same_bits(built: tuple[Program, torch.Tensor, torch.Tensor], tmp_path: Path) -> None:
    program, x, want = built
    path = program.save(tmp_path / "model.rcp")
    again = load(path)
    close(again(x)[0], want)
    assert torch.equal(again(x)[0], program(x)[0])
    assert again.explain() == program.explain()
    assert [entry.name for entry in tmp_path.iterdir()] == ["model.rcp"]


def test_numpy_goes_in_and_comes_out(built: tuple[Program, torch.Tensor, torch.Tensor]) -> None:
    program, x, want = built
    got = program(x.numpy())
    assert isinstance(got[0], np.ndarray)
    close(got[0], want)


def test_torch_goes_in_and_comes_out_from_any_memory(built: tuple[Program, torch.Tensor, torch.Tensor]) -> None:
    program, x, want = built
    close(program(x)[0], want)
    close(program(x.clone().requires_grad_(True))[0], want)
    close(program(x.permute(2, 3, 0, 1).contiguous().permute(2, 3, 0, 1))[0], want)  # not contiguous
    odd = torch.empty(x.numel() + 1)[1:].view(x.shape)  # not aligned
    close(program(odd.copy_(x))[0], want)


def test_a_fresh_process_needs_neither_torch_nor_the_model(
    built: tuple[Program, torch.Tensor, torch.Tensor], tmp_path: Path
) -> None:
    program, x, want = built
    path = program.save(tmp_path / "model.rcp")
    np.save(tmp_path / "x.npy", x.numpy())
    code = f"""
import sys
sys.modules["torch"] = None
sys.modules["onnx"] = None
import numpy as np
from rescompile.backends.program import load
y, _ = load({str(path)!r})(np.load({str(tmp_path / "x.npy")!r}))
np.save({str(tmp_path / "y.npy")!r}, y)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    close(np.load(tmp_path / "y.npy"), want)


def test_explain_says_what_each_region_is(built: tuple[Program, torch.Tensor, torch.Tensor]) -> None:
    regions = {region["kernel"]: region for region in built[0].explain()}
    assert regions["conv"]["flops"] == 2 * 2 * 36 * 8 * 8 * 9
    assert regions["conv"]["bytes"] > 0
    assert regions["conv"]["tile"]
    assert regions["conv"]["calls"] == len(regions["conv"]["ops"]) == 1


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ((), "0 inputs were given"),
        ((torch.zeros(2, 8, 6, 6), torch.zeros(1)), "2 inputs were given"),
        ((torch.zeros(2, 8, 6, 5),), "has shape"),
        ((torch.zeros(2, 8, 6),), "4 dimensions"),
        ((torch.zeros(2, 8, 6, 6, dtype=torch.float64),), "is float64"),
        ((torch.zeros(2, 8, 6, 6, device="meta"),), "is on meta"),
        (([1.0],), "is a list"),
        ((np.zeros((2, 8, 6, 6), np.float64),), "is float64"),
    ],
)
def test_wrong_inputs_are_named(
    built: tuple[Program, torch.Tensor, torch.Tensor], wrong: tuple[Any, ...], said: str
) -> None:
    with pytest.raises(RescompileError, match=said):
        built[0](*wrong)


def test_a_symbolic_extent_must_be_the_same_everywhere() -> None:
    sketch = Sketch()
    a, b = sketch.input(2, 3, dynamic=("N", 3)), sketch.input(2, 3, dynamic=("N", 3))
    sketch.graph.set_outputs([sketch.op(K.ADD, [a, b], ("N", 3))])
    sketch.graph.commit()
    program = compile_graph(sketch.graph, tuning=0, threads=1)
    close(program(torch.ones(4, 3), torch.ones(4, 3)), torch.full((4, 3), 2.0))
    with pytest.raises(RescompileError, match="N = 4"):
        program(torch.ones(4, 3), torch.ones(5, 3))


@pytest.mark.parametrize("kept", [0, 100, 5000])
def test_a_truncated_file_is_refused(
    built: tuple[Program, torch.Tensor, torch.Tensor], tmp_path: Path, kept: int
) -> None:
    path = built[0].save(tmp_path / "model.rcp")
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(RescompileError, match="not a program"):
        load(path)


def test_missing_files_and_other_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RescompileError, match="There is no file"):
        load(tmp_path / "nothing.rcp")
    other = tmp_path / "other.zip"
    with zipfile.ZipFile(other, "w") as archive:
        archive.writestr("hello.txt", "hello")
    with pytest.raises(RescompileError, match="not a program"):
        load(other)


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("arch", "riscv64", "riscv64"),
        ("extensions", ["avx9000"], "lacks avx9000"),
        ("tvm", "0.1.0", "apache-tvm 0.1.0"),
        ("schema", 99, "format 99"),
    ],
)
def test_programs_for_another_machine_or_version_are_refused(
    built: tuple[Program, torch.Tensor, torch.Tensor], tmp_path: Path, field: str, value: Any, said: str
) -> None:
    path = built[0].save(tmp_path / "model.rcp")
    changed = tmp_path / "changed.rcp"
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(changed, "w") as new:
        for name in old.namelist():
            data = old.read(name)
            if name == "manifest.json":
                data = json.dumps({**json.loads(data), field: value}).encode()
            new.writestr(name, data)
    with pytest.raises(RescompileError, match=said):
        load(changed)


def test_a_failed_save_leaves_the_old_file(
    built: tuple[Program, torch.Tensor, torch.Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "model.rcp"
    path.write_text("old")
    monkeypatch.setattr(link, "compiler", lambda: [sys.executable, "-c", "import sys; sys.exit('no linker today')"])
    with pytest.raises(RescompileError, match="no linker today"):
        built[0].save(path)
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["model.rcp"]


def test_a_folder_that_does_not_exist_is_named(
    built: tuple[Program, torch.Tensor, torch.Tensor], tmp_path: Path
) -> None:
    with pytest.raises(RescompileError, match="cannot be written"):
        built[0].save(tmp_path / "no" / "model.rcp")


def test_ziglang_links_where_there_is_no_compiler(
    built: tuple[Program, torch.Tensor, torch.Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("ziglang")
    monkeypatch.setattr(link, "_COMPILERS", ())
    assert link.compiler()[-2:] == ["ziglang", "cc"]
    program, x, want = built
    close(load(program.save(tmp_path / "model.rcp"))(x)[0], want)


def test_an_unknown_target_names_the_nearest() -> None:
    sketch = Sketch()
    x = sketch.input(2, 3)
    with pytest.raises(RescompileError, match="did you mean 'cuda"):
        sketch.run(sketch.op(K.NEG, [x], (2, 3)), target="cuda:sm90")


def test_a_missing_tvm_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    from rescompile.backends import require

    monkeypatch.setattr(require, "PINS", {"apache-tvm": "99.0"})
    with pytest.raises(RescompileError, match=r"rescompile\[tvm\]"):
        require.require_tvm()
    monkeypatch.setattr(require, "PINS", {"no-such-package": "1.0"})
    with pytest.raises(RescompileError, match=r"not installed.*rescompile\[tvm\]"):
        require.require_tvm()
