"""Pool, global mean and layout kernels against torch."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("tvm")

from rescompile.backends.kernels import GlobalMeanSpec, LayoutSpec, PoolSpec
from rescompile.errors import RescompileError
from tests.kernels_harness import Case, bordered, check


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def pool_case(spec: PoolSpec) -> Case:
    """Random numbers of both signs, and torch's result."""
    x = torch.randn(spec.batch, spec.height, spec.width, spec.channels).to(getattr(torch, spec.dtype))
    planes = x.double().permute(0, 3, 1, 2)
    if spec.kind == "max":
        y = F.max_pool2d(planes, spec.kernel, spec.stride, spec.pads[:2], spec.dilation, spec.ceil)
    else:
        y = F.avg_pool2d(planes, spec.kernel, spec.stride, spec.pads[:2], spec.ceil, spec.count_include_pad)
    return Case(spec, [bordered(x, spec.in_border)], [bordered(y.permute(0, 2, 3, 1), spec.out_border)])


def test_pools_with_padding_borders_and_channel_tails() -> None:
    specs = []
    for kind in ("max", "avg"):
        specs += [
            PoolSpec(kind, 1, 14, 14, 64, (3, 3), (2, 2), (1, 1, 1, 1), out_border=(1, 1)),
            PoolSpec(kind, 2, 9, 11, 20, (3, 2), (2, 1), (1, 1, 1, 1), in_border=(1, 0), out_border=(0, 2)),
            PoolSpec(kind, 1, 5, 5, 3, (2, 2), (2, 2)),
        ]
    check([pool_case(spec) for spec in specs])


def test_a_maximum_of_negative_numbers_ignores_the_zero_border() -> None:
    spec = PoolSpec("max", 1, 6, 6, 8, (3, 3), (1, 1), (1, 1, 1, 1), in_border=(1, 1))
    case = pool_case(spec)
    x = case.inputs[0]
    assert x is not None
    x[:, 1:-1, 1:-1] = -x[:, 1:-1, 1:-1].abs() - 1
    inside = x[:, 1:-1, 1:-1].permute(0, 3, 1, 2).double()
    case.expected = [F.max_pool2d(inside, 3, 1, 1).permute(0, 2, 3, 1)]
    check([case])


def test_rounding_up_and_what_a_mean_counts() -> None:
    pads = (1, 1, 1, 1)
    check(
        [
            pool_case(PoolSpec("avg", 1, 9, 10, 8, (3, 3), (2, 2), pads, ceil=True, count_include_pad=count))
            for count in (False, True)
        ]
        + [pool_case(PoolSpec("max", 1, 9, 9, 5, (2, 3), (2, 2), pads, (2, 1), ceil=True))]
    )


def test_global_mean_over_threads_and_borders() -> None:
    cases = []
    for batch, channels, border in ((1, 512, (0, 0)), (2, 100, (1, 2)), (1, 5, (0, 0))):
        x = torch.randn(batch, 7, 6, channels)
        expected = x.double().mean((1, 2))
        cases.append(Case(GlobalMeanSpec(batch, 7, 6, channels, border), [bordered(x, border)], [expected]))
    check(cases)


def test_layouts_there_and_back_and_between_borders() -> None:
    cases = []
    for batch, height, width, channels, border in (
        (1, 9, 17, 3, (3, 3)),
        (2, 5, 7, 20, (1, 2)),
        (1, 4, 40, 64, (0, 0)),
    ):
        x = torch.randn(batch, channels, height, width)
        nhwc = x.permute(0, 2, 3, 1).contiguous()
        size = (batch, height, width, channels)
        cases += [
            Case(LayoutSpec(*size, out_border=border), [x], [bordered(nhwc, border)]),
            Case(LayoutSpec(*size, "NHWC", "NCHW", in_border=border), [bordered(nhwc, border)], [x]),
            Case(LayoutSpec(*size, "NHWC", "NHWC", border, (2, 1)), [bordered(nhwc, border)], [bordered(nhwc, (2, 1))]),
        ]
    check(cases)


@pytest.mark.parametrize("dtype", ["float64", "float16", "bfloat16"])
def test_other_types(dtype: str) -> None:
    x = torch.randn(1, 3, 5, 6).to(getattr(torch, dtype))
    nhwc = x.permute(0, 2, 3, 1).contiguous()
    check(
        [
            pool_case(PoolSpec("max", 1, 6, 6, 20, (3, 3), (2, 2), (1, 1, 1, 1), out_border=(1, 1), dtype=dtype)),
            pool_case(PoolSpec("avg", 1, 6, 6, 20, (2, 2), (2, 2), dtype=dtype)),
            Case(LayoutSpec(1, 5, 6, 3, out_border=(1, 1), dtype=dtype), [x], [bordered(nhwc, (1, 1))]),
            Case(GlobalMeanSpec(1, 5, 6, 3, dtype=dtype), [nhwc], [nhwc.double().mean((1, 2))]),
        ]
    )


def test_impossible_ones_are_refused() -> None:
    with pytest.raises(RescompileError, match="NCHW"):
        LayoutSpec(1, 2, 2, 2, "NCHW", "NCHW")
    with pytest.raises(RescompileError, match="no output"):
        PoolSpec("max", 1, 2, 2, 2, (3, 3), (1, 1))
    with pytest.raises(RescompileError, match="median"):
        PoolSpec("median", 1, 4, 4, 2, (3, 3), (1, 1))
