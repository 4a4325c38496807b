"""The driver: planning, transactions, verification, bisecting, plans as files; on graphs that numpy runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pytest

from rescompile.errors import RescompileError, VerificationError
from rescompile.graph import Graph, ValueType
from rescompile.kinds import OpKind
from rescompile.plans import Insert, Plan, Refusal, Rewrite, SetOperand, gather
from rescompile.printing import print_graph
from rescompile.rewriting import apply_plan, rewrite_in_place, run_passes
from rescompile.verify import make_inputs, relative_difference, verify

SHAPE = (2, 3)
F32 = ValueType(SHAPE, "float32")


class NumpyGraph(Graph):
    """A graph in memory with a runtime."""

    def run(self, inputs: Mapping[str, np.ndarray[Any, Any]]) -> dict[str, np.ndarray[Any, Any]]:
        env = {value: inputs[value.name] for value in self.inputs}
        env.update((value, self.data(value)) for value in self.parameters)
        rules: dict[OpKind, Any] = {
            OpKind.ADD: lambda op, a, b: a + b,
            OpKind.MUL: lambda op, a, b: a * b,
            OpKind.RELU: lambda op, a: np.maximum(a, 0),
            OpKind.ABS: lambda op, a: np.abs(a),
            OpKind.EXP: lambda op, a: np.exp(a),
            OpKind.IDENTITY: lambda op, a: a,
        }
        for op in self:
            env[op.output] = rules[op.kind](op, *(env[value] for value in op.operands))
        return {value.name: env[value] for value in self.outputs}


def chain(length: int) -> NumpyGraph:
    graph = NumpyGraph("chain")
    value = graph.add_input("x", SHAPE, "float32")
    for index in range(length):
        value = graph.add_op(OpKind.RELU, [value], [(f"relu{index}", F32)]).output
    graph.set_outputs([value])
    graph.commit()
    return graph


@dataclass(frozen=True)
class WrapRelu:
    """relu(x) → relu(relu(x)), right everywhere but at `wrong`, where it puts exp."""

    name: ClassVar[str] = "wrap-relu"
    preserves: ClassVar[Any] = "values"
    wrong: tuple[str, ...] = ()

    def plan(self, graph: Graph) -> Plan:
        decisions: list[Rewrite | Refusal] = []
        for op in graph:
            new = f"{op.name}_again"
            kind = "exp" if op.name in self.wrong else "relu"
            edits = (Insert(kind, (op.operands[0].name,), ((new, SHAPE, "float32"),)), SetOperand(op.name, 0, new))
            decisions.append(Rewrite(op.name, "relu(x) → relu(relu(x))", "idempotent", edits))
        return gather(self.name, self.preserves, graph, decisions)


def test_right_rewrites_verify_on_random_and_adversarial_inputs() -> None:
    result = run_passes(chain(3), [WrapRelu()])
    assert result.verification.ok
    assert {check.inputs for check in result.verification.checks} == {"random", "zero", "large", "negative", "denormal"}
    assert len(result.applied) == 3
    assert len(result.graph) == 6
    assert len(result.original) == 3


@pytest.mark.parametrize("wrong", [("relu0",), ("relu4",), ("relu7",), ("relu2", "relu5")])
def test_wrong_rewrites_are_found_and_rolled_back_alone(wrong: tuple[str, ...]) -> None:
    result = run_passes(chain(8), [WrapRelu(wrong)])
    assert {refusal.where for refusal in result.rolled_back} == set(wrong)
    assert len(result.applied) == 8 - len(wrong)
    assert result.verification.ok, "what is left is right"


def test_rewrites_that_build_on_a_wrong_one_go_with_it() -> None:
    graph = chain(1)
    first = WrapRelu(("relu0",)).plan(graph).rewrites[0]
    second = Rewrite("relu0", "relu(exp(x)) → relu(x)", "", (SetOperand("relu0", 0, "x"),))
    result = apply_plan(graph, Plan(rewrites=[first, second, first_on("relu0_again")]))
    assert not result.rolled_back, "the second undoes the first, so the whole is right"
    result = apply_plan(graph, Plan(rewrites=[first, first_on("relu0_again")]))
    assert [refusal.where for refusal in result.rolled_back] == ["relu0", "relu0_again"]
    assert "builds on 'relu0'" in result.rolled_back[1].reason


def first_on(value: str) -> Rewrite:
    return Rewrite(value, "x → |x|", "", (Insert("abs", (value,), ((f"{value}_abs", SHAPE, "float32"),)),))


def test_equality_of_a_model_that_ignores_its_inputs_is_called_what_it_is() -> None:
    assert not verify(chain(1), chain(1)).vacuous
    constant = chain(1)
    zero = constant.add_constant("zero", SHAPE, "float32", np.zeros(SHAPE, "float32"))
    constant.insert(OpKind.MUL, [constant.outputs[0], zero], [("y", F32)])
    constant.set_outputs([constant.value("y")])
    constant.commit()
    verification = verify(constant, constant)
    assert verification.ok
    assert "proves little" in str(verification)


def test_unverified_result_says_so_and_is_not_called_ok() -> None:
    result = run_passes(chain(1), [WrapRelu(("relu0",))], check=False)
    assert not result.verification.ok
    assert "not verified" in str(result.verification)


def test_result_with_rolled_back_rewrites_is_not_saved() -> None:
    with pytest.raises(VerificationError, match="Nothing was written"):
        run_passes(chain(2), [WrapRelu(("relu0",))]).save("never.onnx")


def test_plan_that_does_not_fit_changes_nothing_and_names_the_place() -> None:
    graph = chain(2)
    rewrite = Rewrite("here", "", "", (SetOperand("relu9", 0, "x"),), pass_name="p")
    with pytest.raises(RescompileError, match=r"'p' at 'here' does not fit.*'relu9'.*did you mean 'relu"):
        apply_plan(graph, Plan(rewrites=[rewrite]))
    assert [op.name for op in graph] == ["relu0", "relu1"]


def test_plan_of_another_ir_is_refused() -> None:
    with pytest.raises(RescompileError, match="made for a model in onnx"):
        apply_plan(chain(1), Plan(ir="onnx"))


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b'{"rewrites": [{"where": 1}]}', b'{"rewrites": 3}'])
def test_file_that_is_no_plan_is_refused_in_one_sentence(text: bytes) -> None:
    with pytest.raises(RescompileError, match="not a plan"):
        Plan.from_json(text)


def test_plan_of_a_later_schema_is_refused() -> None:
    with pytest.raises(RescompileError, match="schema 2"):
        Plan.from_json(b'{"schema": 2}')


def test_interface_change_fails_verification() -> None:
    other = chain(1)
    other.inputs[0].shape = (2, 4)
    assert not verify(chain(1), other).ok


def test_unknown_shapes_skip_verification_with_the_reason() -> None:
    graph = chain(1)
    graph.inputs[0].shape = None
    assert "no known shape" in verify(graph, graph).skipped


def test_integer_inputs_stay_inside_the_table_they_index() -> None:
    graph = Graph()
    ids = graph.add_input("ids", (64,), "int64")
    table = graph.add_constant("table", (5, 2), "float32", np.zeros((5, 2), "float32"))
    same = graph.add_op(OpKind.IDENTITY, [ids], [("same", ValueType((64,), "int64"))]).output
    graph.add_op(OpKind.EMBEDDING, [table, same], [("rows", ValueType((64, 2), "float32"))])
    drawn = make_inputs(graph, lambda rng, shape: rng.standard_normal(shape), 0)
    assert drawn is not None
    assert set(np.unique(drawn["ids"])) == {0, 1, 2, 3, 4}


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        ([1.0, 2.0], [1.0, 2.0], 0.0),
        ([1.0, 2.0], [1.0, 3.0], 0.5),
        ([np.inf, 1.0], [np.inf, 1.0], 0.0),
        ([np.inf, 1.0], [-np.inf, 1.0], np.inf),
        ([np.nan, 1.0], [np.nan, 1.0], 0.0),
        ([np.nan, 1.0], [1.0, 1.0], np.inf),
        ([1.0], [1.0, 1.0], np.inf),
        ([0.0], [0.0], 0.0),
    ],
)
def test_relative_difference(a: list[float], b: list[float], expected: float) -> None:
    assert relative_difference(np.array(a), np.array(b)) == expected


def test_a_rewrite_in_place_edits_the_graph_and_keeps_the_outline_of_what_went_in() -> None:
    graph, expected = chain(3), run_passes(chain(3), [WrapRelu()], check=False)
    result = rewrite_in_place(graph, [WrapRelu()])
    assert result.graph is graph
    assert print_graph(result.graph) == print_graph(expected.graph)
    assert print_graph(result.original) == print_graph(expected.original)
    assert result.to_dict() == expected.to_dict()


def test_an_outline_has_no_data() -> None:
    graph = NumpyGraph("one")
    graph.add_constant("w", SHAPE, "float32", np.ones(SHAPE))
    assert graph.outline().value("w").native is None


def test_denormal_numbers_are_measured_by_the_smallest_normal_one() -> None:
    expected = np.array([1e-40, 0.0], "float32")
    assert relative_difference(expected, expected + np.float32(3e-45)) < 1e-6, "the last place of 1e-40 is 1.4e-45"
    assert relative_difference(expected, expected * 2) > 1e-3
