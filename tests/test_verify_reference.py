"""Where a model amplifies rounding, the float64 run of the original tells an exact rewrite from a wrong one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import rescompile as rc
from rescompile import verify as verification
from rescompile.fx_reference import Reference
from rescompile.graph import Graph
from rescompile.kinds import OpKind
from rescompile.passes.fold_batch_norm import FoldBatchNorm
from rescompile.passes.fuse import Fuse
from rescompile.plans import Plan, Preserves, Rewrite, fuse_edit, gather
from rescompile.rewriting import run_passes
from rescompile.verify import ADVERSARIES, make_inputs, relative_difference
from tests.test_detect_models import bert

WIDTH = 8


class Cancels(nn.Module):
    """BN(W·round(x)) + BN(W·round(x + ½)): large weights that cancel, and an input whose last places do not matter."""

    def __init__(self) -> None:
        super().__init__()
        self.linears = nn.ModuleList(nn.Linear(2 * WIDTH, WIDTH, bias=False) for _ in range(2))
        self.norms = nn.ModuleList(nn.BatchNorm1d(WIDTH) for _ in range(2))
        with torch.no_grad():
            for linear, norm in zip(self.linears, self.norms, strict=True):
                large = torch.rand(WIDTH, WIDTH) * 1e4
                linear.weight.copy_(torch.cat([large, torch.rand(WIDTH, WIDTH) - large], 1))
                norm.running_var.uniform_(0.3, 3.0)
                norm.weight.uniform_(0.3, 3.0)

    def forward(self, x: Tensor) -> Tensor:
        first, second = torch.round(x), torch.round(x + 0.5)
        return self.norms[0](self.linears[0](torch.cat([first, first], 1))) + self.norms[1](
            self.linears[1](torch.cat([second, second], 1))
        )


def cancelling(ir: str) -> Graph:
    torch.manual_seed(1)
    model, x = Cancels().eval(), torch.randn(4, WIDTH)
    if ir == "fx":
        return rc.capture(model, (x,))
    return rc.capture(torch.onnx.export(model, (x,), dynamo=True, verbose=False, optimize=False))


@dataclass(frozen=True)
class Wrong:
    """BN(x)  →  BN(x) with another epsilon, in the second norm only: an error larger than any rounding."""

    name: ClassVar[str] = "wrong"
    preserves: ClassVar[Preserves] = "values"
    eps: float = 0.1

    def plan(self, graph: Graph) -> Plan:
        norms = [op for op in graph if op.kind is OpKind.BATCH_NORM]
        found = []
        for norm, eps in zip(norms, (norms[0].attr("eps"), self.eps), strict=True):
            edit = fuse_edit([norm], norm.kind, list(norm.inputs), norm.outputs, **{**norm.attrs, "eps": eps})
            found.append(Rewrite(norm.name, "BN(x)  →  BN(x)", "for the test", (edit,)))
        return gather(self.name, self.preserves, graph, iter(found))


@pytest.mark.parametrize("ir", ["fx", "onnx"])
def test_an_exact_fold_of_an_ill_conditioned_model_is_kept(ir: str) -> None:
    result = run_passes(cancelling(ir), [FoldBatchNorm()])
    assert len(result.applied) == 2
    assert not result.rolled_back
    assert result.verification.ok
    beyond = [check for check in result.verification.checks if check.difference > check.tolerance]
    assert any("from float64" in check.note for check in beyond), "the plain comparison fails"


@pytest.mark.parametrize("ir", ["fx", "onnx"])
def test_a_real_error_in_such_a_model_is_found_and_rolled_back(ir: str) -> None:
    graph = cancelling(ir)
    norms = [op.name for op in graph if op.kind is OpKind.BATCH_NORM]
    result = run_passes(graph, [Wrong()])
    assert [refusal.where for refusal in result.rolled_back] == norms[1:]
    assert [rewrite.where for rewrite in result.applied] == norms[:1]


def test_float64_runs_only_where_the_plain_comparison_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    class Counted(verification.Reference):
        def outputs(self, label: str, inputs: Any) -> Any:
            asked.append(label)
            return super().outputs(label, inputs)

    monkeypatch.setattr("rescompile.rewriting.Reference", Counted)
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH)).eval()
    assert run_passes(rc.capture(model, (torch.randn(2, WIDTH),)), [Fuse()]).verification.ok
    assert not asked
    assert run_passes(cancelling("fx"), [FoldBatchNorm()]).verification.ok
    assert asked


def test_where_torch_cannot_run_the_graph_the_plain_comparison_decides() -> None:
    graph = cancelling("fx")
    assert Reference(graph).outputs({"nothing": np.zeros(1)}) is None


class Mixed(nn.Module):
    """Types that a model fixes: a norm in float32, a buffer, a constant, a mask of float16's smallest number."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.register_buffer("table", torch.randn(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        wide = y.to(torch.float32)
        y = (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)
        scale = torch.arange(WIDTH, dtype=x.dtype) + torch.tensor(0.1, dtype=x.dtype)
        return torch.softmax((y * scale + self.table).float(), -1).to(x.dtype) + x


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("fused", [False, True])
def test_the_reference_is_the_model_in_float64(dtype: torch.dtype, fused: bool) -> None:
    torch.manual_seed(0)
    model = Mixed().to(dtype).eval()
    graph = rc.capture(model, (torch.randn(2, WIDTH, dtype=dtype),))
    inputs = make_inputs(graph, ADVERSARIES["random"], 0)
    assert inputs is not None
    if fused:
        graph = rc.rewrite(graph, ["fuse"], verify=False).graph
    found = Reference(graph).outputs(inputs)
    assert found is not None
    assert found[0].dtype == np.float64
    x = torch.from_numpy(inputs["x"].astype(np.float64))
    linear = nn.functional.linear(x, model.linear.weight.double(), model.linear.bias.double())
    y = linear * torch.rsqrt(linear.pow(2).mean(-1, keepdim=True) + 1e-6)
    scale = torch.arange(WIDTH, dtype=torch.float64) + 0.1
    wanted = torch.softmax(y * scale + model.table.double(), -1) + x
    assert relative_difference(wanted.detach().numpy(), found[0]) < (1e-3 if dtype != torch.float32 else 1e-7)


def test_the_twins_reference_agrees_with_the_modules() -> None:
    model, x = bert()
    graphs = [
        rc.capture(model.eval(), x),
        rc.capture(torch.onnx.export(model.eval(), x, dynamo=True, verbose=False)),
    ]
    found = []
    for graph in graphs:
        inputs = {value.name: tensor.numpy() for value, tensor in zip(graph.inputs, x, strict=True)}
        found.append(Reference(graph).outputs(inputs))
    assert relative_difference(found[0][0], found[1][0]) < 1e-12
