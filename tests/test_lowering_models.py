"""Whole models from both IRs, compiled and compared; no function of them is left without a schedule."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from rescompile.backends import compile_cpu, lowering
from rescompile.backends.compile import compile_graph
from rescompile.fx_capture import capture
from rescompile.onnx_files import capture as capture_onnx
from tests.light_models import randomised
from tests.lowering_cases import close

tvm = pytest.importorskip("tvm")

UNSCHEDULED_ITERATIONS = 4096


class Residual(nn.Module):
    """Convolutions with batch norm, a projection, depthwise and squeeze-and-excite, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(3, 2, 1)
        )
        self.a = nn.Sequential(
            nn.Conv2d(16, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 32, 3, 2, 1)
        )
        self.project = nn.Conv2d(16, 32, 1, 2)
        self.depthwise = nn.Sequential(nn.Conv2d(32, 32, 5, 1, 2, groups=32), nn.Hardswish())
        self.excite = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Conv2d(32, 8, 1), nn.ReLU(), nn.Conv2d(8, 32, 1), nn.Sigmoid()
        )
        self.head = nn.Linear(48, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        y = torch.relu(self.a(x) + self.project(x))
        z = self.depthwise(y)
        y = y + z * self.excite(z)
        y = torch.cat([y, nn.functional.avg_pool2d(x, 2)], 1)
        return self.head(y.mean((2, 3)))


def _with_statistics(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, 0, 0.2)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return model.eval().requires_grad_(False)


def _encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(64, 4, 128, batch_first=True, activation="gelu")
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval().requires_grad_(False)


MODELS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "residual": (lambda: _with_statistics(Residual()), (2, 3, 32, 32)),
    "encoder": (_encoder, (2, 12, 64)),
    "pre_norm": (
        lambda: nn.TransformerEncoderLayer(64, 4, 128, batch_first=True, norm_first=True).eval().requires_grad_(False),
        (1, 12, 64),
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_torch_models_keep_their_numbers(name: str) -> None:
    torch.manual_seed(0)
    make, shape = MODELS[name]
    model, x = make(), torch.randn(shape)
    program = compile_graph(capture(model, (x,)), tuning=0, threads=1)
    close(program(x), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["residual", "encoder"])
def test_no_function_is_left_without_a_schedule(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    make, shape = MODELS[name]
    finished: list[Any] = []
    finish = lowering.finish

    def keep(*args: Any) -> Any:
        finished.append(finish(*args))
        return finished[-1]

    monkeypatch.setattr(compile_cpu.lowering, "finish", keep)
    compile_graph(capture(make(), (torch.randn(shape),)), tuning=0, threads=2)
    functions = {v.name_hint: f for v, f in finished[-1].functions.items() if isinstance(f, tvm.tirx.PrimFunc)}
    assert functions
    assert [name for name, function in functions.items() if _unscheduled(function)] == []


def test_the_count_of_unscheduled_functions_sees_one() -> None:
    from tvm import relax

    x = relax.Var("x", relax.TensorType((64, 128), "float32"))
    builder = relax.BlockBuilder()
    with builder.function("main", [x]):
        builder.emit_func_output(builder.emit(relax.op.exp(x)))
    module = relax.transform.LegalizeOps()(builder.get())
    assert [f for f in module.functions.values() if isinstance(f, tvm.tirx.PrimFunc) and _unscheduled(f)]


def _unscheduled(function: Any) -> bool:
    """Whether a function runs many iterations with neither a parallel nor a vectorised loop."""
    text = function.script()
    if any(word in text for word in ("T.parallel(", "T.vectorized(", "T.Ramp(")):
        return False
    return _iterations(function.body) > UNSCHEDULED_ITERATIONS


def _iterations(statement: Any) -> int:
    """The largest number of times that anything inside runs; a dynamic extent counts as 1."""
    if isinstance(statement, tvm.tirx.For):
        extent = int(statement.extent.value) if isinstance(statement.extent, tvm.tirx.IntImm) else 1
        return extent * _iterations(statement.body)
    inside = [getattr(statement, name, None) for name in ("body", "block", "then_case", "else_case")]
    inside += list(getattr(statement, "seq", None) or ())
    return max((_iterations(part) for part in inside if part is not None), default=1)


def test_a_light_onnx_model_keeps_its_numbers() -> None:
    import onnxruntime

    model = randomised("squeezenet")
    session = onnxruntime.InferenceSession(model.SerializeToString())
    name = session.get_inputs()[0].name
    x = np.random.default_rng(0).standard_normal((1, 3, 224, 224)).astype(np.float32)
    want = session.run(None, {name: x})[0]
    graph = capture_onnx(model)
    feeds = {value.name: x for value in graph.inputs if value.name == name}
    assert len(feeds) == len(graph.inputs)
    got = compile_graph(graph, tuning=0, threads=2)(x)
    close(got, torch.from_numpy(want), rtol=1e-4, atol=1e-4 * float(np.abs(want).max()))


def test_a_compiled_model_is_the_same_from_torch_and_from_onnx() -> None:
    pytest.importorskip("onnxscript")
    torch.manual_seed(0)
    model, x = _with_statistics(Residual()), torch.randn(2, 3, 32, 32)
    exported = torch.onnx.export(model, (x,), dynamo=True, verbose=False)
    assert exported is not None
    from_onnx = compile_graph(capture_onnx(exported.model_proto), tuning=0, threads=1)
    close(from_onnx(x), model(x), rtol=1e-4, atol=1e-5)
