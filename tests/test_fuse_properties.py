"""What holds of `fuse` on every network: it keeps the values, doing it twice is doing it once, the order of a file's
nodes does not matter, and what fails verification leaves the model as it was."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("torch")

from rescompile import api, fx_fused  # noqa: E402, F401 (defines the operations that a fused module calls)
from rescompile.errors import VerificationError  # noqa: E402
from rescompile.graph import Graph  # noqa: E402
from rescompile.passes.fuse import Fuse  # noqa: E402
from rescompile.plans import Fuse as FuseEdit  # noqa: E402
from rescompile.plans import Pass, Plan, Refusal, Rewrite  # noqa: E402
from rescompile.printing import print_graph  # noqa: E402
from rescompile.rewriting import run_passes  # noqa: E402
from rescompile.verify import TOLERANCES, make_inputs, relative_difference  # noqa: E402
from tests.residual_grammar import programs  # noqa: E402
from tests.residual_program import Program  # noqa: E402
from tests.residual_realisers import in_fx, in_onnx  # noqa: E402

_UNHURRIED = settings(
    deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large], max_examples=15
)


def with_weights(graph: Graph, seed: int) -> Graph:
    """The graph, its weights drawn anew: the realisers make them of ones."""
    rng = np.random.default_rng(seed)
    for value in graph.parameters:
        data = graph.data(value)
        fan = max(1, int(np.prod(data.shape[1:])) if data.ndim > 1 else 1)
        graph.set_data(value, (rng.uniform(0.5, 1.5, data.shape) * rng.choice((-1, 1), data.shape) / fan).astype("f4"))
    return graph


def fused(graph: Graph) -> Graph:
    return run_passes(graph, [Fuse()], check=False).graph


def text(graph: Graph) -> str:
    return print_graph(graph, comments=False)


def difference(graph: Graph, other: Graph, seed: int = 0) -> float:
    inputs = make_inputs(graph, lambda rng, shape: rng.standard_normal(shape), seed)
    assert inputs is not None
    pairs = zip(graph.run(inputs).values(), other.run(inputs).values(), strict=True)
    return max(relative_difference(a, b) for a, b in pairs)


def chain(layers: int = 3) -> Any:
    """x ← norm(x + W·relu(W·x + b)) as an ONNX model."""
    rng, nodes, tensors, x = np.random.default_rng(0), [], [], "x"
    helper, numpy_helper = onnx.helper, onnx.numpy_helper

    def weight(name: str, *shape: int) -> str:
        tensors.append(numpy_helper.from_array(rng.standard_normal(shape).astype("f4"), name))
        return name

    def node(kind: str, inputs: list[str], output: str, **attrs: Any) -> str:
        nodes.append(helper.make_node(kind, inputs, [output], name=output, **attrs))
        return output

    for index in range(layers):
        y = node("MatMul", [x, weight(f"w{index}", 4, 4)], f"up{index}")
        y = node("Relu", [node("Add", [y, weight(f"b{index}", 4)], f"biased{index}")], f"relu{index}")
        y = node("MatMul", [y, weight(f"v{index}", 4, 4)], f"down{index}")
        total = node("Add", [x, y], f"sum{index}")
        affine = [weight(f"g{index}", 4), weight(f"s{index}", 4)]
        x = node("LayerNormalization", [total, *affine], f"norm{index}") if index % 2 else total
    info = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes, "chain", [info("x", 1, (2, 3, 4))], [info(x, 1, (2, 3, 4))], tensors,
    )  # fmt: skip
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)


@given(programs(), st.integers(0, 2**32))
@_UNHURRIED
def test_fusing_keeps_the_values_in_onnx(program: Program, seed: int) -> None:
    graph = with_weights(in_onnx(program.varied(seed)), seed)
    assert difference(graph, fused(graph)) <= TOLERANCES["float32"]


@given(programs(), st.integers(0, 2**32))
@_UNHURRIED
def test_fusing_keeps_the_values_in_torch(program: Program, seed: int) -> None:
    graph = with_weights(in_fx(program.varied(seed)), seed)
    assert difference(graph, fused(graph)) <= TOLERANCES["float32"]


@given(programs(), st.integers(0, 2**32))
@_UNHURRIED
def test_fusing_twice_is_fusing_once(program: Program, seed: int) -> None:
    once = fused(with_weights(in_onnx(program.varied(seed)), seed))
    twice = run_passes(once, [Fuse()], check=False)
    assert [str(rewrite) for rewrite in twice.applied] == []
    assert text(twice.graph) == text(once)


@pytest.mark.parametrize("seed", range(5))
def test_the_order_of_a_files_nodes_does_not_matter(seed: int, tmp_path: Path) -> None:
    model = chain(5)
    expected = run_passes(api.capture(model), [Fuse()], check=False)
    nodes = list(model.graph.node)
    random.Random(seed).shuffle(nodes)
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    onnx.save(model, tmp_path / "shuffled.onnx")
    found = run_passes(api.load(tmp_path / "shuffled.onnx"), [Fuse()], check=False)
    assert {str(rewrite) for rewrite in found.applied} == {str(rewrite) for rewrite in expected.applied}
    assert len(found.applied) == 5
    assert {op.name: op.kind for op in found.graph} == {op.name: op.kind for op in expected.graph}


@dataclass(frozen=True)
class Spoilt:
    """`fuse`, with a relu too many in every fusion that has a place for one."""

    name: ClassVar[str] = "spoilt"
    preserves: ClassVar[Any] = "values"

    def plan(self, graph: Graph) -> Plan:
        joins: Pass = next(stage for stage in Fuse().stages() if stage.name == "fuse-joins")
        plan = joins.plan(graph)
        return Plan(plan.model, plan.ir, [self.spoil(rewrite) for rewrite in plan.rewrites], plan.refusals)

    def spoil(self, rewrite: Rewrite) -> Rewrite:
        edits = []
        for edit in rewrite.edits:
            if isinstance(edit, FuseEdit) and "outer" in edit.attrs:
                edit = FuseEdit(edit.ops, edit.kind, edit.inputs, edit.outputs, {**edit.attrs, "outer": "relu"})
            edits.append(edit)
        return Rewrite(rewrite.where, rewrite.equation, rewrite.reason, tuple(edits), pass_name=self.name)


def test_what_fails_verification_leaves_the_file_and_the_graph_as_they_were(tmp_path: Path) -> None:
    source, target = tmp_path / "model.onnx", tmp_path / "out.onnx"
    onnx.save(chain(3), source)
    before = source.read_bytes()
    graph = api.load(source)
    printed = print_graph(graph)
    graph.save(tmp_path / "untouched.onnx")
    result = run_passes(graph, [Spoilt()])
    assert result.rolled_back
    assert all(isinstance(refusal, Refusal) for refusal in result.rolled_back)
    with pytest.raises(VerificationError):
        result.save(target)
    assert not target.exists()
    assert source.read_bytes() == before
    assert print_graph(graph) == printed
    graph.save(tmp_path / "after.onnx")
    assert (tmp_path / "after.onnx").read_bytes() == (tmp_path / "untouched.onnx").read_bytes()
    assert difference(graph, result.graph) <= TOLERANCES["float32"], "what is left of the rewrite is right"


def test_doubles_agree_to_their_own_precision() -> None:
    model = chain(5)
    for tensor in model.graph.initializer:
        tensor.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(tensor).astype("f8"), tensor.name))
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.elem_type = onnx.TensorProto.DOUBLE
    graph = api.capture(model)
    result = run_passes(graph, [Fuse()], check=False)
    assert result.applied
    assert difference(graph, result.graph) <= TOLERANCES["float64"]


def test_the_saved_file_of_a_fused_model_fuses_to_itself(tmp_path: Path) -> None:
    once = run_passes(api.capture(chain(5)), [Fuse()], check=False)
    once.save(tmp_path / "fused.onnx")
    again = run_passes(api.load(tmp_path / "fused.onnx"), [Fuse()], check=False)
    assert not again.applied
    assert text(again.graph) == text(once.graph)
