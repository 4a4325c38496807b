"""The table of residual joins that each tool fuses: what counts as fused, and what the lines say."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("torch")

from benchmarks import fusion, fusion_exact, fusion_tools  # noqa: E402
from benchmarks.fusion import Model, Row, measure, remainder_lines, summary, table  # noqa: E402
from benchmarks.fusion_exact import Exactness, exactness  # noqa: E402
from benchmarks.fusion_tools import Outcome, compare, fused_joins, joins_of, plain_joins, run_peer  # noqa: E402


def model_file(folder: Path, joins: int = 2) -> Path:
    """x ← x + W·relu(x), as often as there are joins."""
    helper, rng = onnx.helper, np.random.default_rng(0)
    nodes, tensors, x = [], [], "x"
    for index in range(joins):
        weight = rng.standard_normal((4, 4)).astype("f4")
        tensors.append(onnx.numpy_helper.from_array(weight, f"w{index}"))
        nodes.append(helper.make_node("Relu", [x], [f"relu{index}"], name=f"relu{index}"))
        nodes.append(helper.make_node("MatMul", [f"relu{index}", f"w{index}"], [f"y{index}"], name=f"y{index}"))
        nodes.append(helper.make_node("Add", [f"y{index}", x], [f"sum{index}"], name=f"join{index}"))
        x = f"sum{index}"
    info = [helper.make_tensor_value_info(name, 1, (2, 3, 4)) for name in ("x", x)]
    graph = helper.make_graph(nodes, "tiny", info[:1], info[1:], tensors)
    path = folder / "tiny.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9), path)
    return path


def test_a_copy_of_the_file_fuses_nothing(tmp_path: Path) -> None:
    joins = joins_of(model_file(tmp_path))
    assert joins.names == joins.plain == {"sum0", "sum1"}
    assert fused_joins(joins, joins) == 0


def test_sums_of_a_constant_are_no_plain_joins(tmp_path: Path) -> None:
    import onnx_ir

    model = onnx.load(model_file(tmp_path))
    model.graph.node[2].input[1] = "w0"
    onnx.save(model, tmp_path / "biased.onnx")
    assert plain_joins(onnx_ir.load(tmp_path / "biased.onnx")) == {"sum1"}


def test_a_row_holds_what_fuse_did_and_that_the_numbers_are_kept(tmp_path: Path) -> None:
    path = model_file(tmp_path)
    row = measure(Model("tiny", lambda: path), "fuse", verify=True)
    assert row.total == row.fused == 2
    assert not row.remainders
    assert [each.level for each in row.exact] == ["off", "default"]
    assert all(each.difference <= fusion.TOLERANCE for each in row.exact)
    assert compare(path, path, joins_of(path).graph) == {"off": 0.0, "default": pytest.approx(0.0, abs=1e-6)}


def test_what_is_switched_off_is_a_remainder_with_its_reason(tmp_path: Path) -> None:
    path = model_file(tmp_path)
    row = measure(Model("tiny", lambda: path), "fuse{epilogue=false}", verify=True)
    assert row.fused == 0
    assert [each["join"] for each in row.remainders] == ["join0", "join1"]
    assert all(each["reason"].startswith("fuse-joins: ") for each in row.remainders)
    assert len(remainder_lines([row])) == 1, "one line for one reason"


def test_a_tool_that_fails_is_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(source: Path, target: Path, family: str) -> None:
        raise RuntimeError("no\nsuch thing")

    monkeypatch.setitem(fusion_tools.PEERS, "broken", broken)
    path = model_file(tmp_path)
    outcome = run_peer("broken", path, tmp_path / "out.onnx", "", joins_of(path))
    assert outcome.fused is None
    assert outcome.failure == "RuntimeError: no"


def test_other_numbers_are_seen(tmp_path: Path) -> None:
    path = model_file(tmp_path)
    model = onnx.load(path)
    model.graph.node[0].op_type = "Abs"
    onnx.save(model, tmp_path / "other.onnx")
    errors = compare(path, tmp_path / "other.onnx", joins_of(path).graph)
    assert all(isinstance(error, float) and error > fusion.TOLERANCE for error in errors.values())


def test_the_summary_names_what_another_tool_does_better_and_what_is_not_exact() -> None:
    peer = Outcome("other", 2)
    row = Row("tiny", {"add": 2}, 1, [], {"off": 1e-3}, [peer])
    lines = summary([row])
    assert lines[0].startswith("1 of 2 residual joins fused, 50.0%")
    assert "tiny: other fuses 2, rescompile 1" in lines
    assert any("optimisation off: 0.001" in line for line in lines)
    assert "| tiny | 2 | 1 (1e-03) |" in table([row])


def test_the_verified_table_sets_both_against_float64(tmp_path: Path) -> None:
    path = model_file(tmp_path)
    row = measure(Model("tiny", lambda: path), "fuse", verify=True)
    assert [each.level for each in row.exact] == ["off", "default"]
    for each in row.exact:
        assert each.ok
        assert each.original is not None
        assert each.fused is not None
        assert 0 < each.original < 1e-6
        assert each.fused <= 1.5 * each.original
    assert fusion_exact.table([("tiny", row.exact)]).splitlines()[-1].startswith("| tiny | ")
    assert fusion_exact.verdicts([("tiny", row.exact)]) == [
        "2 of 2 comparisons within 1e-05 of the original's outputs; 0 more no further from float64 than the original "
        "(at most 1.1 times)"
    ]


def test_what_is_further_from_float64_than_the_original_is_told(tmp_path: Path) -> None:
    path, other = model_file(tmp_path), tmp_path / "other.onnx"
    model = onnx.load(path)
    wrong = onnx.numpy_helper.to_array(model.graph.initializer[0]) * np.float32(1.0001)
    model.graph.initializer[0].CopyFrom(onnx.numpy_helper.from_array(wrong, "w0"))
    onnx.save(model, other)
    found = exactness(path, other, joins_of(path).graph)
    assert not any(each.ok for each in found)
    assert fusion_exact.table([("tiny", found)]).endswith("| further |")
    assert len(fusion_exact.verdicts([("tiny", found)])) == 3
    near = Exactness("off", "denormal", 1e-4, 2e-5, 2.1e-5)
    assert near.ok
    assert "2.1e-05 from float64 where the original is 2.0e-05" in fusion_exact.verdicts([("tiny", [near])])[-1]
