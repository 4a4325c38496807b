"""Convolution kernels against torch: tails, borders, groups, depthwise, epilogues, types."""

from __future__ import annotations

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

pytest.importorskip("tvm")

from rescompile.backends.kernels import ConvSpec, Epilogue, Machine, candidates
from rescompile.errors import RescompileError
from tests.kernels_harness import check, conv_case

RELU = Epilogue(bias=True, outer="relu")
JOIN = Epilogue(bias=True, residual=True, outer="relu")
SAME = (1, 1, 1, 1)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def test_every_candidate_tile_gives_the_same_numbers() -> None:
    specs = [
        ConvSpec(1, 9, 14, 8, 48, (3, 3), pads=SAME, in_border=(1, 1), out_border=(1, 1), epilogue=JOIN),
        ConvSpec(1, 7, 7, 24, 72, epilogue=JOIN),
    ]
    check([conv_case(spec) for spec in specs], every_tile=True)


def test_widths_and_channels_without_a_whole_number_of_tiles() -> None:
    widths = [ConvSpec(1, 4, width, 5, 32, (3, 3), pads=SAME, epilogue=RELU) for width in (1, 2, 9, 13, 23)]
    channels = [ConvSpec(1, 5, 6, 7, channels, (3, 3), pads=SAME, epilogue=RELU) for channels in (1, 3, 17, 40, 70)]
    check([conv_case(spec) for spec in widths + channels])


def test_borders_replace_padding_and_are_written() -> None:
    def spec(inside: tuple[int, int], out: tuple[int, int], residual: tuple[int, int]) -> ConvSpec:
        return ConvSpec(
            2, 6, 7, 8, 20, (3, 3), pads=SAME, in_border=inside, out_border=out, residual_border=residual, epilogue=JOIN
        )

    borders = [((1, 1), (0, 0), (0, 0)), ((2, 3), (1, 2), (1, 1)), ((0, 1), (2, 0), (0, 2)), ((0, 0), (0, 3), (0, 0))]
    check([conv_case(spec(*border)) for border in borders])


def test_pointwise_on_bordered_buffers() -> None:
    check(
        [
            conv_case(ConvSpec(2, 7, 7, 16, 40, in_border=(1, 1), epilogue=RELU)),
            conv_case(ConvSpec(1, 7, 7, 16, 40, out_border=(1, 1), epilogue=JOIN)),
            conv_case(ConvSpec(2, 8, 8, 16, 40, stride=(2, 2), residual_border=(1, 1), epilogue=JOIN)),
            conv_case(ConvSpec(3, 5, 5, 16, 40, epilogue=JOIN)),
        ]
    )


def test_stems_strides_dilations_and_uneven_padding() -> None:
    check(
        [
            conv_case(ConvSpec(1, 20, 22, 3, 64, (7, 7), (2, 2), (3, 3, 3, 3), in_border=(3, 3), epilogue=RELU)),
            conv_case(ConvSpec(1, 16, 16, 3, 24, (4, 4), (4, 4), epilogue=RELU)),
            conv_case(ConvSpec(1, 10, 11, 6, 16, (3, 2), (1, 3), (0, 1, 2, 1), (2, 1), epilogue=RELU)),
            conv_case(ConvSpec(1, 12, 12, 6, 16, (3, 3), pads=(2, 2, 2, 2), dilation=(2, 2), epilogue=RELU)),
            conv_case(ConvSpec(1, 9, 9, 6, 16, (3, 3), (2, 2), (0, 0, 1, 1), epilogue=RELU)),
        ]
    )


def test_one_dimensional_convolutions_have_height_one() -> None:
    check(
        [
            conv_case(ConvSpec(2, 1, 50, 16, 20, (1, 5), (1, 2), (0, 2, 0, 2), epilogue=RELU)),
            conv_case(ConvSpec(1, 1, 33, 20, 20, (1, 3), pads=(0, 4, 0, 0), dilation=(1, 2), epilogue=RELU)),
        ]
    )


def test_groups_narrower_and_wider_than_a_block() -> None:
    def spec(inside: int, out: int, groups: int) -> ConvSpec:
        return ConvSpec(1, 6, 7, inside, out, (3, 3), pads=SAME, groups=groups, epilogue=JOIN)

    check([conv_case(spec(*c)) for c in ((64, 64, 16), (24, 80, 2), (24, 48, 24), (40, 24, 8), (96, 96, 2), (6, 9, 3))])


def test_depthwise_channels_with_and_without_a_tail() -> None:
    def spec(channels: int, kernel: int, stride: int) -> ConvSpec:
        pad = kernel // 2
        return ConvSpec(
            2, 9, 10, channels, channels, (kernel, kernel), (stride, stride), (pad, pad, pad, pad), groups=channels,
            out_border=(1, 1), epilogue=Epilogue(bias=True, inner="relu6"),
        )  # fmt: skip

    check([conv_case(spec(*c)) for c in ((32, 3, 1), (40, 5, 2), (5, 3, 1), (70, 7, 1))])


@pytest.mark.parametrize("dtype", ["float64", "float16", "bfloat16"])
def test_other_types(dtype: str) -> None:
    join = Epilogue(bias=True, residual=True, inner="silu", outer="relu")
    check(
        [
            conv_case(ConvSpec(2, 6, 7, 5, 40, (3, 3), (2, 2), SAME, out_border=(1, 1), epilogue=join, dtype=dtype)),
            conv_case(ConvSpec(1, 6, 7, 24, 24, (3, 3), pads=SAME, groups=24, epilogue=RELU, dtype=dtype)),
            conv_case(ConvSpec(1, 6, 7, 24, 24, epilogue=Epilogue(bias=True, outer="gelu"), dtype=dtype)),
        ]
    )


def test_without_an_epilogue() -> None:
    check([conv_case(ConvSpec(1, 6, 7, 8, 16, (3, 3), pads=SAME)), conv_case(ConvSpec(1, 6, 7, 8, 16))])


def test_relu_before_and_after_the_residual_are_different_things() -> None:
    check(
        [
            conv_case(ConvSpec(1, 5, 5, 8, 16, epilogue=Epilogue(residual=True, inner="relu"))),
            conv_case(ConvSpec(1, 5, 5, 8, 16, epilogue=Epilogue(residual=True, outer="relu"))),
        ]
    )


def test_a_machine_with_narrower_vectors() -> None:
    narrow = Machine.named("x86-64-v3", threads=2) if Machine.host().lanes >= 8 else Machine.host(threads=2)
    specs = [
        ConvSpec(1, 6, 13, 5, 40, (3, 3), pads=SAME, out_border=(1, 1), epilogue=JOIN),
        ConvSpec(1, 7, 7, 16, 24, epilogue=JOIN),
        ConvSpec(1, 7, 7, 20, 20, (3, 3), pads=SAME, groups=20, epilogue=RELU),
    ]
    assert all(tile.lanes * tile.pixels <= 12 * narrow.lanes for spec in specs for tile in candidates(spec, narrow))
    check([conv_case(spec) for spec in specs], narrow)


pads = st.integers(0, 2)
pairs = st.tuples(st.integers(1, 3), st.integers(1, 3))
borders = st.tuples(st.integers(0, 2), st.integers(0, 2))
names = st.sampled_from(["none", "relu", "silu", "gelu"])


@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    size=st.tuples(st.integers(1, 2), st.integers(1, 9), st.integers(1, 19)),
    channels=st.tuples(st.integers(1, 9), st.integers(1, 40)),
    groups=st.sampled_from([1, 1, 1, 2, 3]),
    kernel=pairs,
    stride=pairs,
    dilation=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    padding=st.tuples(pads, pads, pads, pads),
    frames=st.tuples(borders, borders, borders),
    epilogue=st.builds(Epilogue, st.booleans(), st.booleans(), names, names),
)
def test_any_small_convolution(size, channels, groups, kernel, stride, dilation, padding, frames, epilogue) -> None:  # type: ignore[no-untyped-def]
    inside, out = (count * groups for count in channels)
    try:
        spec = ConvSpec(*size, inside, out, kernel, stride, padding, dilation, groups, *frames, epilogue)
    except RescompileError:
        assume(False)
        return
    check([conv_case(spec)])


def test_impossible_convolutions_are_refused_in_one_sentence() -> None:
    with pytest.raises(RescompileError, match="groups"):
        ConvSpec(1, 8, 8, 6, 8, groups=4)
    with pytest.raises(RescompileError, match="no output"):
        ConvSpec(1, 2, 2, 6, 8, (3, 3))
    with pytest.raises(RescompileError, match="int8"):
        ConvSpec(1, 8, 8, 6, 8, dtype="int8")
    with pytest.raises(RescompileError, match="activation"):
        Epilogue(inner="swish")
