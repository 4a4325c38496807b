"""What capture takes, keeps, and says when it cannot serve."""

from __future__ import annotations

import copy
import pickle
import zipfile

import numpy as np
import pytest

from rescompile.errors import RescompileError
from rescompile.kinds import OpKind as K

torch = pytest.importorskip("torch")
nn = torch.nn

from rescompile.fx_capture import capture, load_pt2  # noqa: E402
from rescompile.fx_graph import FxGraph  # noqa: E402


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x, *, scale=1.0):
        return {"sum": x + self.linear(x) * scale, "nothing": None, "x": x}


def test_a_module_is_named_and_keeps_its_outputs():
    model = Block().eval()
    graph = capture(model, torch.randn(2, 4))
    assert graph.name == "Block"
    assert len(graph.outputs) == 2
    result = graph.to_user()(torch.randn(2, 4))
    assert set(result) == {"sum", "nothing", "x"}
    assert result["nothing"] is None


def test_example_inputs_come_as_a_tensor_a_sequence_or_a_mapping():
    x = torch.randn(2, 4)
    graphs = [capture(Block(), inputs) for inputs in (x, (x,), [x], {"x": x})]
    assert len({tuple(op.kind for op in graph) for graph in graphs}) == 1


def test_the_module_itself_is_not_touched():
    model = Block()
    model.linear.register_forward_hook(hook := lambda *_: None)
    graph = capture(model, torch.randn(2, 4))
    linear = next(op for op in graph if op.kind is K.LINEAR)
    graph.set_operand(linear, 1, graph.add_parameter("zero", np.zeros((4, 4), np.float32)))
    graph.commit()
    assert list(model.state_dict()) == ["linear.weight", "linear.bias"]
    assert model.training
    assert list(model.linear._forward_hooks.values()) == [hook]


def test_a_graph_module_is_not_touched():
    traced = torch.fx.symbolic_trace(nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True)).eval())
    code, keys = traced.code, list(traced.state_dict())
    graph = capture(traced, torch.randn(2, 4))
    linear = next(op for op in graph if op.kind is K.LINEAR)
    graph.set_operand(linear, 1, graph.add_parameter("zero", np.zeros((4, 4), np.float32)))
    graph.commit()
    assert traced.code == code
    assert list(traced.state_dict()) == keys
    assert traced.get_submodule("1").inplace
    assert not any("val" in node.meta for node in traced.graph.nodes)


def test_a_traced_module_is_taken_without_inputs():
    graph = capture(torch.fx.symbolic_trace(nn.Sequential(nn.Linear(4, 4), nn.ReLU())))
    assert [op.kind for op in graph] == [K.LINEAR, K.RELU]
    assert graph.outputs[0].shape is None


def test_weights_of_called_modules_are_operands():
    graph = capture(torch.fx.symbolic_trace(nn.Sequential(nn.Linear(4, 4))))
    assert [value.name for value in graph.ops[0].inputs[1:]] == ["0.weight", "0.bias"]
    assert graph.ops[0].module == "0"


def test_the_module_that_an_operation_belongs_to_is_known():
    graph = capture(nn.Sequential(nn.Sequential(nn.Linear(4, 4), nn.ReLU())), torch.randn(2, 4))
    assert [op.module for op in graph] == ["0.0", "0.1"]


@pytest.mark.parametrize("dynamic", [{"x": {0: "N"}}, [{0: "N"}], [{0: torch.export.Dim("N")}]])
def test_a_dynamic_dimension_keeps_its_name_and_varies(dynamic):
    model = Block().eval()
    graph = capture(model, torch.randn(1, 4), dynamic=dynamic)
    assert graph.inputs[0].shape == ("N", 4)
    for count in (1, 3, 7):
        x = torch.randn(count, 4)
        found = graph.run({"x": x.numpy()})[graph.outputs[0].name]
        np.testing.assert_allclose(found, model(x)["sum"].detach().numpy(), rtol=1e-5, atol=1e-5)


def test_a_dynamic_dimension_of_a_traced_module_keeps_its_name():
    traced = torch.fx.symbolic_trace(nn.Sequential(nn.Linear(4, 4), nn.Flatten()))
    graph = capture(traced, torch.randn(2, 4), dynamic=[{0: "N"}])
    assert graph.outputs[0].shape == ("N", 4)


def test_a_reshape_inserted_between_dynamic_values_follows_them():
    graph = capture(nn.Sequential(nn.Tanh(), nn.ReLU()), torch.randn(2, 4), dynamic=[{0: "N"}])
    tanh, relu = graph.ops
    assert tanh.output.shape == ("N", 4)
    made = graph.insert(K.RESHAPE, [tanh.output], [("folded", type(tanh.output.type)(("N", 2, 2), "float32"))])
    back = graph.insert(K.RESHAPE, [made.output], [("unfolded", tanh.output.type)])
    graph.set_operand(relu, 0, back.output)
    graph.commit()
    assert next(iter(graph.run({graph.inputs[0].name: np.ones((5, 4), np.float32)}).values())).shape == (5, 4)


def test_an_operation_that_torch_cannot_make_is_refused_when_inserted():
    graph = capture(nn.Tanh(), torch.randn(2, 4))
    weight = graph.add_parameter("w", np.zeros((3, 5), np.float32))
    with pytest.raises(RescompileError, match="torch cannot make"):
        graph.insert(K.LINEAR, [graph.inputs[0], weight, None], [("y", graph.inputs[0].type)])


def test_an_operation_of_another_shape_than_declared_is_refused():
    graph = capture(nn.Tanh(), torch.randn(2, 4))
    weight = graph.add_parameter("w", np.zeros((3, 4), np.float32))
    with pytest.raises(RescompileError, match=r"declared as float32\[2, 4\], but torch makes float32\[2, 3\]"):
        graph.insert(K.LINEAR, [graph.inputs[0], weight, None], [("y", graph.inputs[0].type)])


def test_regions_without_gradients_are_part_of_the_graph():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(4))

        def forward(self, x):
            with torch.no_grad():
                table = (self.weight * 2).cos()
            return x * table * self.weight

    model, x = Model(), torch.randn(2, 4)
    graph = capture(model, x)
    assert K.OPAQUE not in {op.kind for op in graph}
    module = graph.to_user()
    module(x).sum().backward()
    model(x).sum().backward()
    torch.testing.assert_close(module.weight.grad, model.weight.grad, rtol=1e-6, atol=1e-6)
    assert list(module.state_dict()) == ["weight"]


class Branches(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x):
        y = torch.cond(x.sum() > 0, lambda x: x.sin(), lambda x: x.cos() * 2, (x,))
        return self.linear(y) + x


def test_a_condition_is_opaque_and_survives():
    model, x = Branches().eval(), torch.ones(2, 4)
    graph = capture(model, x).clone()
    assert [op.kind for op in graph][-3:] == [K.OPAQUE, K.LINEAR, K.ADD]
    linear = next(op for op in graph if op.kind is K.LINEAR)
    graph.set_operand(linear, 1, graph.add_parameter("other", graph.data(linear.inputs[1])))
    graph.commit()
    module = graph.to_user()
    for sample in (x, -x):
        torch.testing.assert_close(module(sample), model(sample), rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(copy.deepcopy(module)(sample), model(sample), rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(pickle.loads(pickle.dumps(module))(sample), model(sample), rtol=1e-6, atol=1e-6)


# ---- writes -----------------------------------------------------------------------------------------------------


class Written(nn.Module):
    """Runs a function."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def _slice_write(x):
    y = torch.zeros_like(x)
    y[:, 1:3] = x[:, :2] * 2
    return y + x


def _nested_write(x):
    y = x * 1.0
    y[0][:, 1].fill_(3.0)
    return y


def _write_below_a_view(x):
    y = x + 1
    view = y.view(-1)
    y.mul_(2)
    return view.sum() + y


def _write_through_views(x):
    y = x.clone()
    y.transpose(0, 1).unsqueeze(0).add_(1)
    return y * x


def _chain(x):
    y = x * 2
    z = y.relu_().add_(1).mul_(3)
    return z + y


@pytest.mark.parametrize("function", [_slice_write, _nested_write, _write_below_a_view, _write_through_views, _chain])
def test_writes_are_functions_in_the_view_and_after_an_edit(function):
    x = torch.randn(3, 4, 2)
    graph = capture(Written(function), x)
    assert K.OPAQUE not in {op.kind for op in graph}
    wanted = function(x.clone()).numpy()
    np.testing.assert_allclose(next(iter(graph.run({"x": x.numpy()}).values())), wanted, rtol=1e-6, atol=1e-6)
    last = graph.outputs[0].producer
    made = graph.insert(K.NEG, [graph.outputs[0]], [("negated", graph.outputs[0].type)])
    graph.replace_uses(last.output, made.output)
    graph.set_operand(made, 0, last.output)
    graph.commit()
    found = next(iter(graph.run({"x": x.numpy()}).values()))
    np.testing.assert_allclose(found, -wanted, rtol=1e-6, atol=1e-6)


def test_readers_after_a_write_read_its_result():
    def function(x):
        y = x * 2
        torch.relu_(y)
        return y + 1

    graph = capture(Written(function), torch.randn(2, 3))
    relu = next(op for op in graph if op.kind is K.RELU)
    assert [op.kind for op in relu.output.users] == [K.ADD]


def test_readers_before_a_write_read_the_old_value():
    def function(x):
        y = x * 2
        before = y.exp()
        torch.relu_(y)
        return y + before

    graph = capture(Written(function), torch.randn(2, 3))
    exp = next(op for op in graph if op.kind is K.EXP)
    assert exp.inputs[0].producer.kind is K.MUL
    x = torch.randn(2, 3)
    extra = graph.insert(K.IDENTITY, [exp.inputs[0]], [("again", exp.inputs[0].type)])
    graph.set_operand(exp, 0, extra.output)
    graph.commit()
    found = next(iter(graph.run({"x": x.numpy()}).values()))
    np.testing.assert_allclose(found, function(x).numpy(), rtol=1e-6, atol=1e-6)


def test_a_write_to_an_input_stays_one():
    graph = capture(Written(lambda x: x.add_(1) * 2), torch.zeros(3))
    assert K.OPAQUE in {op.kind for op in graph}
    x = torch.zeros(3)
    graph.to_user()(x)
    assert torch.equal(x, torch.ones(3))


# ---- what cannot be served ---------------------------------------------------------------------------------------


def refusal(*arguments, **options):
    with pytest.raises(RescompileError) as error:
        capture(*arguments, **options)
    text = str(error.value)
    assert "\n" not in text
    return text


def test_what_is_no_model_is_refused():
    assert "not a torch model" in refusal(42)


def test_missing_example_inputs_are_asked_for():
    assert "needs example inputs" in refusal(Block())


def test_inputs_of_the_wrong_number_are_refused():
    assert "do not fit" in refusal(Block(), (torch.zeros(1), torch.zeros(1)))


def test_inputs_of_the_wrong_shape_are_refused_with_the_line():
    text = refusal(Block(), torch.randn(2, 5))
    assert "fails on the example inputs" in text
    assert "test_fx_capture.py" in text
    assert "self.linear(x)" in text


def test_an_unknown_dynamic_input_is_refused_with_the_nearest():
    assert "did you mean 'x'" in refusal(Block(), torch.randn(2, 4), dynamic={"xx": {0: "N"}})


class Fixes(nn.Module):
    def forward(self, x):
        return x.view(2, 2) + 1


def test_a_dynamic_dimension_that_the_model_fixes_is_refused():
    assert "fixes dimension 0 of input 'x' to 4" in refusal(Fixes(), torch.randn(4), dynamic={"x": {0: "N"}})


class Bounded(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(torch.randn(16, 4))

    def forward(self, x):
        return x + self.table[: x.shape[0]]


def test_a_dynamic_dimension_with_a_bound_is_taken():
    graph = capture(Bounded(), torch.randn(4, 4), dynamic={"x": {0: "N"}})
    assert graph.inputs[0].shape == ("N", 4)
    assert next(iter(graph.run({"x": np.zeros((9, 4), np.float32)}).values())).shape == (9, 4)


def test_a_dynamic_dimension_that_is_not_there_is_refused():
    assert "no dimension 5" in refusal(Block(), torch.randn(2, 4), dynamic={"x": {5: "N"}})


class Decides(nn.Module):
    def forward(self, x):
        if x.sum() > 0:
            return x + 1
        return x - 1


def test_a_decision_on_values_is_refused_with_its_line():
    text = refusal(Decides(), torch.ones(3))
    assert "torch.export cannot take Decides" in text
    assert "test_fx_capture.py" in text
    assert "if x.sum() > 0:" in text
    assert "symbolic_trace" not in text


class Unsupported(nn.Module):
    """What torch.export stops at and tracing does not."""

    def __init__(self):
        super().__init__()
        self.inner = Decides()

    def forward(self, x):
        return self.inner(x) * 2


class LeafTracer(torch.fx.Tracer):
    def is_leaf_module(self, module, path):
        return isinstance(module, Decides) or super().is_leaf_module(module, path)


def test_tracing_is_offered_where_it_works(monkeypatch):
    monkeypatch.setattr(
        torch.fx, "symbolic_trace", lambda model: torch.fx.GraphModule(model, LeafTracer().trace(model))
    )
    monkeypatch.setattr("rescompile.fx_capture.fx.symbolic_trace", torch.fx.symbolic_trace)
    text = refusal(Unsupported(), torch.ones(3))
    assert "pass capture(torch.fx.symbolic_trace(model), example_inputs)" in text


def test_a_traced_module_that_fails_on_the_inputs_is_refused():
    traced = torch.fx.symbolic_trace(nn.Sequential(nn.Linear(4, 4)))
    assert "fails on the example inputs" in refusal(traced, torch.randn(2, 5))


def file_refusal(path, **options):
    with pytest.raises(RescompileError) as error:
        load_pt2(path, **options)
    return str(error.value)


def test_a_file_that_is_not_there_is_refused(tmp_path):
    assert "no file" in file_refusal(tmp_path / "none.pt2")


def test_an_empty_file_is_refused(tmp_path):
    (tmp_path / "empty.pt2").touch()
    assert "is empty" in file_refusal(tmp_path / "empty.pt2", trust=True)


def test_a_truncated_file_is_refused(tmp_path):
    path = tmp_path / "whole.pt2"
    capture(nn.Tanh(), torch.randn(2)).save(path)
    (tmp_path / "half.pt2").write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert "truncated" in file_refusal(tmp_path / "half.pt2", trust=True)


def test_another_archive_is_refused(tmp_path):
    path = tmp_path / "other.pt2"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("folder/readme", "nothing")
    assert "no exported program" in file_refusal(path, trust=True)


def test_a_file_that_is_not_trusted_is_refused(tmp_path):
    path = tmp_path / "whole.pt2"
    capture(nn.Tanh(), torch.randn(2)).save(path)
    text = file_refusal(path)
    assert "--trust" in text
    assert isinstance(load_pt2(path, trust=True), FxGraph)


def test_a_file_that_cannot_be_written_leaves_nothing_behind(tmp_path):
    graph = capture(nn.Tanh(), torch.randn(2))
    with pytest.raises(RescompileError, match="cannot be written"):
        graph.save(tmp_path / "missing" / "x.pt2")
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_fails_half_way_keeps_the_old_one(tmp_path, monkeypatch):
    path = tmp_path / "x.pt2"
    path.write_bytes(b"old")
    graph = capture(nn.Tanh(), torch.randn(2))

    def fail(program, target):
        raise OSError("disk full")

    monkeypatch.setattr(torch.export, "save", fail)
    with pytest.raises(RescompileError, match="disk full"):
        graph.save(path)
    assert path.read_bytes() == b"old"
    assert [item.name for item in tmp_path.iterdir()] == ["x.pt2"]


def test_a_traced_graph_without_inputs_has_no_file(tmp_path):
    graph = capture(torch.fx.symbolic_trace(nn.Sequential(nn.Tanh())))
    with pytest.raises(RescompileError, match="needs example inputs"):
        graph.save(tmp_path / "x.pt2")
