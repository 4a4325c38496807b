"""Linear kernels against torch: few rows, dynamic rows, tails, epilogues, types."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("tvm")

from rescompile.backends.kernels import Epilogue, LinearSpec
from tests.kernels_harness import ACTIVATIONS, check, linear_case

JOIN = Epilogue(bias=True, residual=True)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def test_every_candidate_tile_gives_the_same_numbers() -> None:
    check([linear_case(LinearSpec(37, 33, 100, JOIN)), linear_case(LinearSpec(2, 64, 100, JOIN))], every_tile=True)


def test_few_rows() -> None:
    check([linear_case(LinearSpec(rows, 50, features, JOIN)) for rows in (1, 2, 5, 8) for features in (1, 70, 200)])


def test_dynamic_rows_from_one_to_several_tiles() -> None:
    spec = LinearSpec(None, 30, 70, Epilogue(bias=True, residual=True, inner="gelu"))
    check([linear_case(spec, rows) for rows in (1, 2, 3, 4, 5, 6, 7, 8, 9, 33)])


def test_every_activation_on_both_sides_of_the_residual() -> None:
    inner = [Epilogue(True, True, name) for name in ACTIVATIONS]
    outer = [Epilogue(False, True, "none", name) for name in ACTIVATIONS]
    check([linear_case(LinearSpec(6, 20, 24, epilogue)) for epilogue in inner + outer])


@pytest.mark.parametrize("dtype", ["float64", "float16", "bfloat16"])
def test_other_types(dtype: str) -> None:
    epilogue = Epilogue(bias=True, residual=True, inner="gelu")
    check(
        [
            linear_case(LinearSpec(9, 30, 40, epilogue, dtype)),
            linear_case(LinearSpec(None, 30, 40, epilogue, dtype), rows=5),
            linear_case(LinearSpec(1, 30, 40, epilogue, dtype)),
        ]
    )
