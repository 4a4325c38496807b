"""Files in and out: what cannot be served gets one sentence, and nothing half-written is left."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import helper, numpy_helper
from onnx.external_data_helper import convert_model_to_external_data

from rescompile.errors import RescompileError
from rescompile.kinds import OpKind as K
from rescompile.onnx_files import capture, load, save
from tests.onnx_models import check, kinds, model_of, same

X = {"x": np.random.default_rng(0).uniform(-1, 1, (2, 8)).astype(np.float32)}
W = np.random.default_rng(1).uniform(-1, 1, (8, 8)).astype(np.float32)


def proto(opset: int = 18) -> onnx.ModelProto:
    nodes = [helper.make_node("MatMul", ["x", "W"], ["xw"]), helper.make_node("Add", ["xw", "x"], ["y"])]
    return model_of(nodes, {"x": (2, 8)}, ["y"], {"W": W}, opset=opset)


@pytest.fixture
def external(tmp_path: Path) -> Path:
    """A model whose weight lies in `weights.bin` beside it."""
    model = proto()
    convert_model_to_external_data(model, location="weights.bin", size_threshold=0)
    path = tmp_path / "model.onnx"
    onnx.save(model, str(path))
    return path


def relocate(path: Path, location: str) -> None:
    model = onnx.load(str(path), load_external_data=False)
    for entry in model.graph.initializer[0].external_data:
        if entry.key == "location":
            entry.value = location
    path.write_bytes(model.SerializeToString())


def test_round_trip_keeps_the_model(tmp_path: Path) -> None:
    path, again = tmp_path / "a.onnx", tmp_path / "b.onnx"
    onnx.save(proto(), str(path))
    graph = load(path)
    save(graph, again)
    assert isinstance(graph.to_user(), ir.Model)
    before, after = onnx.load(str(path)), onnx.load(str(again))
    del after.graph.value_info[:]  # onnx_ir writes the types of initializers there
    assert before == after
    same(graph.run(X), load(again).run(X), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"hello, this is no model", "is not an ONNX model"),
        (b"\x00" * 64, "is not an ONNX model"),
        (proto().SerializeToString()[:-40], "is not an ONNX model, or it is cut short"),
        (onnx.GraphProto(name="g").SerializeToString(), "is not an ONNX model"),
        (onnx.ModelProto().SerializeToString(), "is empty"),
    ],
)
def test_file_that_is_not_a_whole_model(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(content)
    with pytest.raises(RescompileError, match=message) as caught:
        load(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_file_and_folder(tmp_path: Path) -> None:
    for path in (tmp_path / "nothing.onnx", tmp_path):
        with pytest.raises(RescompileError, match="There is no file"):
            load(path)


@pytest.mark.parametrize(("opset", "advice"), [(99, "upgrade onnx"), (6, "version_converter")])
def test_unknown_opset(tmp_path: Path, opset: int, advice: str) -> None:
    model = proto()
    model.opset_import[0].version = opset
    path = tmp_path / "model.onnx"
    path.write_bytes(model.SerializeToString())
    with pytest.raises(RescompileError, match=f"uses opset {opset}.*{advice}"):
        load(path)


def test_operator_that_the_opset_does_not_have() -> None:
    model = proto()
    model.graph.node[1].op_type = "Frobnicate"
    model.graph.node[1].name = "odd"
    with pytest.raises(RescompileError, match=r"operator Frobnicate.*'odd'.*opset 18"):
        capture(model)


def test_operator_younger_than_the_opset() -> None:
    model = model_of([helper.make_node("Relu", ["x"], ["y"])], {"x": (2, 8)}, ["y"], opset=17)
    model.graph.node[0].op_type = "Gelu"
    with pytest.raises(RescompileError, match=r"operator Gelu.*opset 17"):
        capture(model)


def test_operator_of_a_domain_that_is_imported_is_opaque_and_survives(tmp_path: Path) -> None:
    model = proto()
    model.graph.node[1].domain = "com.example"
    with pytest.raises(RescompileError, match=r"com\.example::Add.*does not import"):
        capture(model)
    model.opset_import.append(helper.make_opsetid("com.example", 3))
    graph = capture(model)
    assert kinds(graph) == [K.LINEAR, K.OPAQUE]
    save(graph, tmp_path / "model.onnx")
    assert onnx.load(str(tmp_path / "model.onnx")).graph.node[1].domain == "com.example"


def test_operator_of_rescompile_without_its_function() -> None:
    model = proto()
    model.graph.node[1].domain = "rescompile"
    model.opset_import.append(helper.make_opsetid("rescompile", 1))
    with pytest.raises(RescompileError, match="does not contain that function"):
        capture(model)


def test_nodes_out_of_order_are_put_in_order() -> None:
    model = proto()
    nodes = list(model.graph.node)
    del model.graph.node[:]
    model.graph.node.extend(reversed(nodes))
    graph = capture(model)
    assert [node.op_type for node in graph.model.graph] == [node.op_type for node in nodes]


def test_object_of_another_kind() -> None:
    with pytest.raises(RescompileError, match="dict is not an ONNX model"):
        capture({})


def test_external_data_is_mapped_and_comes_back(external: Path, tmp_path: Path) -> None:
    graph = load(external)
    assert isinstance(graph.model.graph.initializers["W"].const_value, ir.ExternalTensor)
    np.testing.assert_array_equal(graph.data(graph.value("W")), W)
    expected = graph.run(X)
    target = tmp_path / "out"
    target.mkdir()
    save(graph, target / "new.onnx")
    assert sorted(os.listdir(target)) == ["new.onnx", "new.onnx.data"]
    same(expected, load(target / "new.onnx").run(X), rtol=0, atol=0)
    same(expected, graph.run(X), rtol=0, atol=0)


def test_external_model_can_be_edited_and_saved_over_itself(external: Path) -> None:
    graph = load(external)
    op = graph.ops[0]
    weight = graph.add_parameter("V", 2 * graph.data(graph.value("W")))
    graph.set_operand(op, 1, weight)
    graph.commit()
    expected = graph.run(X)
    save(graph, external)
    same(expected, load(external).run(X), rtol=0, atol=0)


def test_external_data_that_is_missing(external: Path) -> None:
    (external.parent / "weights.bin").unlink()
    with pytest.raises(RescompileError, match=r"'W' in 'weights\.bin', which is not there"):
        load(external)


def test_external_data_that_is_cut_short(external: Path) -> None:
    data = external.parent / "weights.bin"
    data.write_bytes(data.read_bytes()[:-8])
    with pytest.raises(RescompileError, match="cut short: the tensor 'W'"):
        load(external)


@pytest.mark.parametrize("escape", ["parent", "absolute", "symlink", "symlinked folder"])
def test_external_data_outside_the_models_folder(tmp_path: Path, escape: str) -> None:
    inner = tmp_path / "inner"
    inner.mkdir()
    model = proto()
    convert_model_to_external_data(model, location="weights.bin", size_threshold=0)
    path = inner / "model.onnx"
    onnx.save(model, str(path))
    outside = tmp_path / "weights.bin"
    (inner / "weights.bin").rename(outside)
    if escape == "symlink":
        (inner / "weights.bin").symlink_to(outside)
    elif escape == "symlinked folder":
        (inner / "link").symlink_to(tmp_path)
        relocate(path, "link/weights.bin")
    else:
        relocate(path, "../weights.bin" if escape == "parent" else str(outside))
    with pytest.raises(RescompileError, match="outside its folder"):
        load(path)


def test_a_link_inside_the_folder_is_fine(external: Path) -> None:
    data = external.parent / "weights.bin"
    data.rename(external.parent / "real.bin")
    data.symlink_to(external.parent / "real.bin")
    graph = load(external)
    np.testing.assert_array_equal(graph.data(graph.value("W")), W)


def test_external_data_with_several_hard_links_may_lie_outside(external: Path) -> None:
    os.link(external.parent / "weights.bin", external.parent.parent / "elsewhere.bin")
    with pytest.raises(RescompileError, match="several hard links"):
        load(external)


@pytest.mark.parametrize("place", ["missing/model.onnx", "file/model.onnx", "folder"])
def test_unwritable_target_leaves_nothing(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(RescompileError, match="cannot be written"):
        save(capture(proto()), tmp_path / place)
    assert sorted(tmp_path.rglob("*")) == before


def test_failure_while_writing_leaves_the_old_file(external: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = external.read_bytes()
    graph = load(external)

    def fail(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(RescompileError, match="No space left"):
        save(graph, external)
    assert external.read_bytes() == before
    assert sorted(os.listdir(external.parent)) == ["model.onnx", "weights.bin"]


def test_tensors_too_large_for_one_file_go_beside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    graph = capture(proto())
    expected = graph.run(X)
    monkeypatch.setattr("rescompile.onnx_serial.PROTO_LIMIT", 100)
    monkeypatch.setattr("rescompile.onnx_run.PROTO_LIMIT", 100)
    save(graph, tmp_path / "big.onnx")
    assert sorted(os.listdir(tmp_path)) == ["big.onnx", "big.onnx.data"]
    again = load(tmp_path / "big.onnx")
    same(expected, again.run(X), rtol=0, atol=0)
    assert graph.model.graph.initializers["W"].const_value is not None


def test_a_small_model_is_one_file(tmp_path: Path) -> None:
    save(capture(proto()), tmp_path / "small.onnx")
    assert os.listdir(tmp_path) == ["small.onnx"]


def test_shapes_are_inferred_without_the_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []
    infer = onnx.shape_inference.infer_shapes

    def spy(model: onnx.ModelProto, **options: bool) -> onnx.ModelProto:
        sizes.append(model.ByteSize())
        return infer(model, **options)

    monkeypatch.setattr(onnx.shape_inference, "infer_shapes", spy)
    big = np.zeros((256, 512), np.float32)
    nodes = [helper.make_node("MatMul", ["x", "W"], ["a"]), helper.make_node("Relu", ["a"], ["y"])]
    info = helper.make_tensor_value_info
    body = helper.make_graph(
        nodes,
        "g",
        [info("x", 1, ["N", 256])],
        [info("y", 1, ["N", 512])],
        [numpy_helper.from_array(big, "W")],
    )
    graph = capture(helper.make_model(body, opset_imports=[helper.make_opsetid("", 18)]))
    assert graph.value("a").shape == ("N", 512)
    assert len(sizes) == 1
    assert sizes[0] < 1000 < big.nbytes
    check(graph)
