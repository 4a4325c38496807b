"""The rewritten module as a module: training and evaluation, copies, pickles, moves, state."""

from __future__ import annotations

import copy
import io
import pickle

import pytest

from rescompile.errors import RescompileError
from rescompile.kinds import OpKind as K

torch = pytest.importorskip("torch")
nn = torch.nn

from rescompile.fx_capture import capture, load_pt2  # noqa: E402


class Net(nn.Module):
    """A residual CNN with batch norm, dropout and a tied weight."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(1, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.body = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8, momentum=0.3), nn.ReLU(inplace=True))
        self.drop = nn.Dropout(0.2)
        self.first = nn.Linear(8, 8)
        self.second = nn.Linear(8, 8)
        self.second.weight = self.first.weight
        self.register_buffer("offset", torch.full((8,), 0.1), persistent=False)

    def forward(self, x):
        x = torch.relu(self.norm(self.stem(x)))
        x = x + self.body(x)
        return self.second(self.drop(self.first(x.mean((2, 3)) + self.offset)))


def encoder():
    return nn.TransformerEncoderLayer(16, 2, 32, dropout=0.1, batch_first=True)


def net_input():
    return torch.randn(4, 1, 6, 6)


def encoder_input():
    return torch.randn(2, 5, 16)


CASES = {"cnn": (Net, net_input), "encoder": (encoder, encoder_input)}


@pytest.fixture(params=list(CASES))
def case(request):
    make, inputs = CASES[request.param]
    torch.manual_seed(1)
    return make(), inputs


def curve(model, inputs, steps=5):
    """Losses of a few steps of training, with the random numbers of dropout fixed."""
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for step in range(steps):
        torch.manual_seed(step)
        x = inputs()
        loss = model(x).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    return losses


def same_state(a, b):
    assert list(a.state_dict()) == list(b.state_dict())
    for key, tensor in a.state_dict().items():
        torch.testing.assert_close(tensor, b.state_dict()[key], rtol=1e-6, atol=1e-6, msg=key)


@pytest.mark.parametrize("captured_in_training", [False, True])
def test_training_and_evaluation_are_those_of_the_original(case, captured_in_training):
    model, inputs = case
    model.train(captured_in_training)
    module = capture(model, inputs()).to_user()
    assert module.training is captured_in_training
    model.train()
    module.train()
    assert curve(module, inputs) == pytest.approx(curve(model, inputs), rel=1e-5)
    same_state(module, model)
    model.eval()
    module.eval()
    x = inputs()
    torch.testing.assert_close(module(x), model(x), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(module(x), module(x), rtol=0, atol=0)
    model.train()
    module.train()
    assert curve(module, inputs, 2) == pytest.approx(curve(model, inputs, 2), rel=1e-5)
    same_state(module, model)


def test_training_the_result_does_not_train_the_original(case):
    model, inputs = case
    before = copy.deepcopy(model.state_dict())
    module = capture(model.eval(), inputs()).to_user()
    module.train()
    curve(module, inputs, 2)
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[key]), key


def test_a_parent_switches_the_result(case):
    model, inputs = case
    module = capture(model.eval(), inputs()).to_user()
    parent = nn.Sequential(module)
    parent.train()
    assert module.training
    assert module.modes.training
    parent.eval()
    x = inputs()
    torch.testing.assert_close(parent(x), model(x), rtol=1e-5, atol=1e-5)


def test_keys_order_and_ties_of_the_state_are_the_users():
    model = Net().eval()
    module = capture(model, net_input()).to_user()
    assert list(module.state_dict()) == list(model.state_dict())
    assert [name for name, _ in module.named_parameters()] == [name for name, _ in model.named_parameters()]
    assert module.first.weight is module.second.weight
    module.load_state_dict(Net().state_dict())


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "torch.save"])
def test_a_copy_has_both_modes_and_tensors_of_its_own(case, way):
    model, inputs = case
    module = capture(model.eval(), inputs()).to_user()
    if way == "deepcopy":
        twin = copy.deepcopy(module)
    elif way == "pickle":
        twin = pickle.loads(pickle.dumps(module))
    else:
        file = io.BytesIO()
        torch.save(module, file)
        file.seek(0)
        twin = torch.load(file, weights_only=False)
    same_state(twin, module)
    twin.train()
    model.train()
    assert curve(twin, inputs, 3) == pytest.approx(curve(model, inputs, 3), rel=1e-5)
    assert not torch.equal(next(twin.parameters()), next(module.parameters()))


def test_a_pickled_module_is_captured_again_with_names_and_shapes():
    module = capture(Net().eval(), net_input()).to_user()
    before, after = capture(module, net_input()), capture(pickle.loads(pickle.dumps(module)), net_input())
    assert [(v.name, v.shape) for v in after.values] == [(v.name, v.shape) for v in before.values]


def test_the_result_of_a_rewritten_module_captured_again_still_trains():
    torch.manual_seed(0)
    model = Net().eval()
    module = capture(capture(model, net_input()).to_user(), net_input()).to_user()
    module.train()
    model.train()
    assert curve(module, net_input, 3) == pytest.approx(curve(model, net_input, 3), rel=1e-5)
    same_state(module, model)


def test_moving_changes_constants_and_devices_written_into_the_graph():
    class Made(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3))

        def forward(self, x):
            return x * self.weight + torch.arange(3, device=x.device) + torch.tensor([1.0, 2.0, 3.0])

    module = capture(Made(), torch.randn(2, 3)).to_user().to("meta")
    assert module(torch.randn(2, 3, device="meta")).device.type == "meta"


def test_half_precision_moves_the_parameters():
    module = capture(nn.Linear(3, 3).eval(), torch.randn(2, 3)).to_user().to(torch.bfloat16)
    assert module(torch.randn(2, 3, dtype=torch.bfloat16)).dtype == torch.bfloat16


class Noisy(nn.Module):
    """Adds noise, in training only."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x):
        if self.training:
            x = x + torch.randn_like(x)
        return self.linear(x)


def test_a_model_that_branches_on_training_is_served_in_its_own_mode():
    module = capture(Noisy().eval(), torch.randn(2, 4)).to_user()
    module.eval()
    assert module(torch.randn(2, 4)).shape == (2, 4)


def test_a_model_that_branches_on_training_says_so_when_switched():
    module = capture(Noisy().eval(), torch.randn(2, 4)).to_user()
    with pytest.raises(
        RescompileError, match=r"only its evaluation form.*test_fx_modes.py:\d+: x = x \+ torch.randn_like"
    ):
        module.train()


def test_a_fold_that_training_needs_undone_says_so():
    model = Net().eval()
    graph = capture(model, net_input())
    norm = next(op for op in graph if op.kind is K.BATCH_NORM)
    graph.replace_uses(norm.output, norm.inputs[0])
    graph.erase(norm)
    graph.commit()
    module = graph.to_user()
    module.eval()
    with pytest.raises(RescompileError, match="took away 'batch_norm'"):
        module.train()
    assert "norm.num_batches_tracked" not in module.state_dict()


def test_an_edit_that_leaves_the_modes_alone_keeps_both():
    torch.manual_seed(0)
    model = Net().eval()
    graph = capture(model, net_input())
    relu = next(op for op in graph if op.kind is K.RELU)
    graph.fuse([relu], K.CLIP, relu.inputs, [relu.output], {"min": 0.0, "max": None})
    graph.commit()
    module = graph.to_user()
    module.train()
    model.train()
    assert curve(module, net_input, 3) == pytest.approx(curve(model, net_input, 3), rel=1e-5)


def test_a_batch_norm_written_anew_in_training_keeps_its_momentum():
    torch.manual_seed(0)
    model = Net().train()
    graph = capture(model, net_input())
    norm = [op for op in graph if op.kind is K.BATCH_NORM][1]
    conv = norm.inputs[0]
    twice = graph.insert(K.IDENTITY, [conv], [("again", conv.type)])
    graph.set_operand(norm, 0, twice.output)
    graph.commit()
    module = graph.to_user()
    assert curve(module, net_input, 3) == pytest.approx(curve(model, net_input, 3), rel=1e-5)
    same_state(module, model)


def test_a_dropout_in_place_is_not_lost_by_an_edit_elsewhere():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), nn.Dropout(0.5, inplace=True), nn.ReLU()).eval()
    graph = capture(model, torch.randn(2, 6))
    relu = next(op for op in graph if op.kind is K.RELU)
    graph.fuse([relu], K.CLIP, relu.inputs, [relu.output], {"min": 0.0, "max": None})
    graph.commit()
    module = graph.to_user()
    module.train()
    model.train()
    inputs = lambda: torch.randn(2, 6)  # noqa: E731
    assert curve(module, inputs, 2) == pytest.approx(curve(model, inputs, 2), rel=1e-5)


def test_a_rewritten_module_is_left_in_its_form_by_another_capture():
    module = capture(Net().eval(), net_input()).to_user()
    capture(module, net_input()).to_user()
    x = net_input()
    assert not module.modes.training
    torch.testing.assert_close(module(x), module(x), rtol=0, atol=0)


def test_a_rewritten_module_inside_another_model_switches_when_captured():
    torch.manual_seed(0)
    model = Net().eval()
    inner = capture(model, net_input()).to_user()
    module = capture(nn.Sequential(inner).eval(), net_input()).to_user()
    module.train()
    model.train()
    assert curve(module, net_input, 2) == pytest.approx(curve(model, net_input, 2), rel=1e-5)


def test_a_traced_module_switches_with_its_submodules():
    torch.manual_seed(0)
    model = Net().eval()
    traced = torch.fx.symbolic_trace(model)
    module = capture(traced, net_input()).to_user()
    assert isinstance(module, torch.fx.GraphModule)
    assert list(module.state_dict()) == list(traced.state_dict())
    module.train()
    model.train()
    assert curve(module, net_input, 3) == pytest.approx(curve(model, net_input, 3), rel=1e-5)
    model.eval()
    module.eval()
    x = net_input()
    torch.testing.assert_close(module(x), model(x), rtol=1e-5, atol=1e-5)


def test_an_exported_module_passed_as_a_graph_has_one_form():
    model, x = Net().eval(), net_input()
    graph = capture(torch.export.export(model, (x,), strict=False).module(), x)
    module = graph.to_user()
    assert not module.training
    torch.testing.assert_close(module.eval()(x), model(x), rtol=1e-5, atol=1e-5)
    with pytest.raises(RescompileError, match="only the model itself knows"):
        module.train()


def test_a_traced_batch_norm_written_out_as_a_function_still_switches():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2, momentum=0.3), nn.ReLU()).eval()
    graph = capture(torch.fx.symbolic_trace(model), net_input())
    norm = next(op for op in graph if op.kind is K.BATCH_NORM)
    weight = norm.operand("weight")
    graph.set_operand(norm, 1, graph.add_parameter("gain", graph.data(weight)))
    graph.commit()
    module = graph.to_user()
    x = net_input()
    torch.testing.assert_close(module(x), model(x), rtol=1e-5, atol=1e-5)
    module.train()
    model.train()
    torch.testing.assert_close(module(x), model(x), rtol=1e-5, atol=1e-5)
    module.eval()
    model.eval()
    torch.testing.assert_close(module(x), model(x), rtol=1e-5, atol=1e-5)


def test_running_a_training_graph_does_not_move_its_statistics():
    model = Net().train()
    graph = capture(model, net_input())
    before = copy.deepcopy(model.state_dict())
    graph.run({"x": net_input().numpy()})
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


def test_a_result_saved_and_loaded_computes_the_same(tmp_path):
    model = Net().eval()
    capture(model, net_input()).save(tmp_path / "net.pt2")
    graph = load_pt2(tmp_path / "net.pt2", trust=True)
    x = net_input()
    found = next(iter(graph.run({"x": x.numpy()}).values()))
    torch.testing.assert_close(torch.from_numpy(found), model(x).detach(), rtol=1e-5, atol=1e-5)
    program = graph.to_user()
    assert isinstance(program, torch.export.ExportedProgram)
    torch.testing.assert_close(program.module()(x), model(x), rtol=1e-5, atol=1e-5)
