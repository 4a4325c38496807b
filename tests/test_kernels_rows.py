"""Norm and softmax kernels against torch."""

from __future__ import annotations

from itertools import product

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("tvm")

from rescompile.backends.kernels import NormSpec, SoftmaxSpec
from rescompile.errors import RescompileError
from tests.kernels_harness import Case, check


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def norm_case(spec: NormSpec, rows: int = 0, offset: float = 1.0) -> Case:
    """Random numbers around `offset`, and torch's result in float64."""
    dtype, count = getattr(torch, spec.dtype), spec.rows or rows
    x, residual = ((torch.randn(count, spec.width) * 3 + offset).to(dtype) for _ in "xr")
    weight, bias = torch.randn(spec.width).to(dtype), torch.randn(spec.width).to(dtype)
    total = x.double() + residual.double() if spec.residual else x.double()
    if spec.sum_output:
        total = total.to(dtype).double()
    gain = weight.double() if spec.weight else None
    if spec.kind == "layer":
        y = F.layer_norm(total, (spec.width,), gain, None, spec.eps)
    else:
        y = F.rms_norm(total, (spec.width,), gain, spec.eps)
    y = y + bias.double() if spec.bias else y
    inputs: list[torch.Tensor | None] = [x]
    inputs += [t for t, there in ((residual, spec.residual), (weight, spec.weight), (bias, spec.bias)) if there]
    return Case(spec, inputs, [y, total] if spec.sum_output else [y])


def test_every_combination_of_inputs_and_outputs() -> None:
    flags = [(r, s, w, b) for r, s, w, b in product((False, True), repeat=4) if r or not s]
    check([norm_case(NormSpec(5, 70, kind, *flag)) for kind in ("layer", "rms") for flag in flags])


def test_widths_of_less_and_more_than_a_vector() -> None:
    check([norm_case(NormSpec(3, width, "layer", True, True)) for width in (2, 7, 16, 64, 100, 769)])


def test_rows_split_over_threads_and_dynamic_rows() -> None:
    check([norm_case(NormSpec(129, 100, "layer", True, True))])
    check([norm_case(NormSpec(None, 100, "rms", True, True), rows) for rows in (1, 2, 33)])


def test_variance_is_taken_around_the_mean() -> None:
    # With E[x²] - E[x]² a mean of 1000 would leave no digits of a variance of 9.
    case = norm_case(NormSpec(4, 256), offset=1000.0)
    check([case])


@pytest.mark.parametrize("dtype", ["float64", "float16", "bfloat16"])
def test_other_types(dtype: str) -> None:
    check([norm_case(NormSpec(5, 70, kind, True, True, dtype=dtype)) for kind in ("layer", "rms")])


def softmax_case(spec: SoftmaxSpec, rows: int = 0, scale: float = 5.0) -> Case:
    """Random numbers, and torch's result in float64."""
    x = (torch.randn(spec.rows or rows, spec.width) * scale).to(getattr(torch, spec.dtype))
    return Case(spec, [x], [(F.log_softmax if spec.log else F.softmax)(x.double(), -1)])


def test_softmax_and_its_logarithm() -> None:
    check([softmax_case(SoftmaxSpec(6, width, log)) for width in (1, 5, 64, 1000) for log in (False, True)])
    check([softmax_case(SoftmaxSpec(None, 77), rows) for rows in (1, 40)])


def test_softmax_of_large_numbers_does_not_overflow() -> None:
    check([softmax_case(SoftmaxSpec(6, 50), scale=200.0)])


@pytest.mark.parametrize("dtype", ["float64", "float16", "bfloat16"])
def test_softmax_of_other_types(dtype: str) -> None:
    check([softmax_case(SoftmaxSpec(3, 70, log, dtype)) for log in (False, True)])


def test_impossible_norms_are_refused() -> None:
    with pytest.raises(RescompileError, match="batch"):
        NormSpec(1, 8, "batch")
    with pytest.raises(RescompileError, match="no sum"):
        NormSpec(1, 8, residual=False, sum_output=True)
