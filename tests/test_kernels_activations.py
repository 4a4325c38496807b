"""The polynomials against torch in float64, over the whole range of their arguments."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

pytest.importorskip("tvm")
import tvm

from rescompile.backends.kernels import Argument
from rescompile.backends.kernels.activations import activate, erf, exp, tanh
from rescompile.backends.kernels.emit import Expr, Flat, each, prim_func
from tests.kernels_harness import ACTIVATIONS, HOST

COUNT = 40_000


def apply(rules: dict[str, Callable[[Expr], Expr]], x: torch.Tensor) -> dict[str, torch.Tensor]:
    """Each rule over the vector x, as one module."""
    functions = {}
    for name, rule in rules.items():

        def body(given: Flat, y: Flat, rule: Callable[[Expr], Expr] = rule) -> None:
            each(x.numel(), lambda i: y.store(i, rule(given[i])))

        arguments = [Argument("x", (x.numel(),), "float32"), Argument("y", (x.numel(),), "float32", output=True)]
        functions[name] = prim_func(name, arguments, body)
    built = tvm.compile(tvm.IRModule(functions), target=HOST.tvm_target())
    results = {}
    for name in rules:
        results[name] = torch.empty_like(x)
        built[name](x, results[name])
    return results


def test_exp_within_a_millionth_and_zero_far_below() -> None:
    x = torch.linspace(-87.0, 88.0, COUNT)
    result = apply({"exp": lambda v: exp(v, "float32")}, x)["exp"]
    assert ((result.double() / x.double().exp()) - 1).abs().max() < 1e-6
    low = torch.tensor([-88.0, -1000.0, float("-inf")])
    assert apply({"exp": lambda v: exp(v, "float32")}, low)["exp"].tolist() == [0.0, 0.0, 0.0]


def test_tanh_and_erf_within_rounding() -> None:
    x = torch.linspace(-12.0, 12.0, COUNT)
    results = apply({"tanh": lambda v: tanh(v, "float32"), "erf": lambda v: erf(v, "float32")}, x)
    assert (results["tanh"].double() - x.double().tanh()).abs().max() < 3e-7
    assert (results["erf"].double() - x.double().erf()).abs().max() < 3e-7


def test_every_activation_over_a_wide_range() -> None:
    x = torch.linspace(-100.0, 100.0, COUNT)
    names = [name for name in ACTIVATIONS if name != "none"]
    results = apply({f"f_{name}": lambda v, name=name: activate(name, v, "float32") for name in names}, x)
    for name in names:
        expected = ACTIVATIONS[name](x.double())
        error = (results[f"f_{name}"].double() - expected).abs() / expected.abs().clamp_min(1.0)
        assert error.max() < 1e-6, name
