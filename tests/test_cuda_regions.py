"""Regions as GPU kernels: their generated source on the CPU against torch in float64."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from rescompile.kinds import OpKind
from tests import simulated_gpu

pytest.importorskip("tvm")

from rescompile.backends.cuda import region_kernel, sass  # noqa: E402
from rescompile.backends.cuda.cubin import compilers, to_cubin  # noqa: E402
from rescompile.backends.cuda.region_spec import BYTES  # noqa: E402
from rescompile.backends.cuda.targets import architecture  # noqa: E402
from tests.gpu_regions import Case, check, full, inputs, run, source_of  # noqa: E402

K = OpKind
NHWC, NHC = (0, 2, 3, 1), (0, 2, 1)


def add_norm(shape: tuple[Any, ...], dtype: str, kind: OpKind = K.LAYER_NORM, **settings: Any) -> Case:
    """y, s = N(x + r)"""
    width = shape[-1]
    affine = 2 if kind is K.LAYER_NORM else 1
    stream, vector = full(shape, dtype), full((width,), dtype)
    norm = (kind, (2 + affine, *range(2, 2 + affine)), {"axis": len(shape) - 1})
    outputs = [(3 + affine, stream), (2 + affine, stream)]
    return Case([stream, stream, *[vector] * affine], [(K.ADD, (0, 1)), norm], outputs, **settings)


def sandwich(dtype: str) -> Case:
    """s = x + N₁(F + b); y = N₂(s)"""
    stream, vector = full(("rows", 160), dtype), full((160,), dtype)
    steps = [
        (K.ADD, (1, 2)),
        (K.LAYER_NORM, (5, 3, 4), {"axis": 1}),
        (K.ADD, (0, 6)),
        (K.RMS_NORM, (7, 3), {"axis": 1}),
    ]
    return Case([stream, stream, vector, vector, vector], steps, [(8, stream), (7, stream)])


def llama(dtype: str, width: int = 256) -> Case:
    """float32 statistics of a stream in 16 bits, cast back before the gain: y, s"""
    stream, vector = full((2, "rows", width), dtype), full((width,), dtype)
    steps = [
        (K.ADD, (0, 1)),
        (K.CAST, (3,), {"dtype": "float32"}),
        (K.RMS_NORM, (4, None), {"axis": 2, "eps": 1e-6}),
        (K.CAST, (5,), {"dtype": dtype}),
        (K.MUL, (2, 6)),
    ]
    return Case([stream, stream, vector], steps, [(7, stream), (3, stream)])


def group_norm(shape: tuple[Any, ...], groups: int, dtype: str, order: tuple[int, ...] = (), tile: int = 0) -> Case:
    """y = relu(GN(x + r))"""
    stream, vector = full(shape, dtype, order), full((shape[1],), dtype)
    steps = [(K.ADD, (0, 1)), (K.GROUP_NORM, (4, 2, 3), {"groups": groups}), (K.RELU, (5,))]
    return Case([stream, stream, vector, vector], steps, [(6, stream)], tile)


IMAGE = full((2, 24, 6, 10), "float16", NHWC)
PER_CHANNEL = full((24,), "float16")
NORMS = {
    "part_of_a_warp": add_norm(("rows", 32), "float16"),
    "one_warp": add_norm(("rows", 768), "float16"),
    "eight_rows_a_block": add_norm(("rows", 768), "float16", tile=1),
    "one_warp_float32": add_norm(("rows", 768), "float32"),
    "one_warp_float64": add_norm(("rows", 64), "float64"),
    "one_warp_bfloat16": add_norm(("rows", 512), "bfloat16", K.RMS_NORM),
    "one_block": add_norm(("rows", 4096), "float16"),
    "one_block_fewer_elements": add_norm((3, 4096), "float16", tile=1),
    "one_block_ragged": add_norm((2, 3000), "bfloat16"),
    "one_block_odd": add_norm((2, 1025), "float32"),
    "odd_width": add_norm(("rows", 77), "float16"),
    "sandwich": sandwich("float32"),
    "sandwich_bfloat16": sandwich("bfloat16"),
    "cast_in_and_out": llama("float16"),
    "parallel_residual": Case(
        [full((3, 96))] * 3 + [full((96,))],
        [(K.ADD, (0, 1, 2)), (K.LAYER_NORM, (4, 3, None), {"axis": 1})],
        [(5, full((3, 96))), (4, full((3, 96)))],
    ),
    "scaled_branch_and_activation": Case(
        [full(("rows", 4, 48), "float16"), full(("rows", 4, 48), "float16"), full((48,), "float16"), full((4, 48))],
        [
            (K.MUL, (1, 2)),
            (K.ADD, (0, 4), {"scales": [1.0, 0.5]}),
            (K.LAYER_NORM, (5, 3, None), {"axis": 1}),
            (K.GELU, (6,), {"approximate": "tanh"}),
        ],
        [(7, full(("rows", 4, 48), "float16"))],
    ),
    "position_that_rows_share": Case(
        [full((5, 7, 64), "bfloat16"), full((1, 7, 64), "bfloat16"), full((5, 1, 1), "bfloat16")],
        [(K.MUL, (0, 2)), (K.ADD, (3, 1)), (K.RMS_NORM, (4, None), {"axis": 2})],
        [(5, full((5, 7, 64), "bfloat16")), (4, full((5, 7, 64), "bfloat16"))],
    ),
    "skip_around_the_norm": Case(
        [full((3, 1, 128)), full((128,))],
        [(K.LAYER_NORM, (0, 1, None), {"axis": 2}), (K.SIGMOID, (2,)), (K.MUL, (3, 0)), (K.ADD, (0, 4))],
        [(5, full((3, 1, 128)))],
    ),
    "channels_first_norm": Case(
        [full((2, 24, 5, 6), "float32", NHWC), full((2, 24, 5, 6), "float32", NHWC), full((24,))],
        [
            (K.ADD, (0, 1)),
            (K.PERMUTE, (3,), {"perm": [0, 2, 3, 1]}),
            (K.LAYER_NORM, (4, 2, None), {"axis": 3}),
            (K.PERMUTE, (5,), {"perm": [0, 3, 1, 2]}),
        ],
        [(6, full((2, 24, 5, 6), "float32", NHWC)), (3, full((2, 24, 5, 6), "float32", NHWC))],
    ),
    "channels_first_norm_of_memory_so": Case(
        [full((2, 24, 5, 6)), full((2, 24, 5, 6)), full((24,))],
        [
            (K.ADD, (0, 1)),
            (K.PERMUTE, (3,), {"perm": [0, 2, 3, 1]}),
            (K.LAYER_NORM, (4, 2, None), {"axis": 3}),
            (K.PERMUTE, (5,), {"perm": [0, 3, 1, 2]}),
        ],
        [(6, full((2, 24, 5, 6))), (3, full((2, 24, 5, 6)))],
    ),
    "windows_turned_back": Case(
        [full((1, 14, 14, 32), "float16"), full((4, 49, 32), "float16"), full((32,), "float16")],
        [
            (K.RESHAPE, (1,), {"shape": [1, 2, 2, 7, 7, 32]}),
            (K.PERMUTE, (3,), {"perm": [0, 1, 3, 2, 4, 5]}),
            (K.RESHAPE, (4,), {"shape": [1, 14, 14, 32]}),
            (K.ROLL, (5,), {"axes": [1, 2], "shifts": [3, 3]}),
            (K.ADD, (0, 6)),
            (K.LAYER_NORM, (7, 2, 2), {"axis": 3}),
        ],
        [(8, full((1, 14, 14, 32), "float16")), (7, full((1, 14, 14, 32), "float16"))],
    ),
    "windows_of_the_norm": Case(
        [full((1, 8, 8, 16)), full((1, 64, 16)), full((16,))],
        [
            (K.RESHAPE, (1,), {"shape": [1, 8, 8, 16]}),
            (K.ADD, (0, 3)),
            (K.LAYER_NORM, (4, 2, None), {"axis": 3}),
            (K.ROLL, (5,), {"axes": [1, 2], "shifts": [-2, -2]}),
            (K.RESHAPE, (6,), {"shape": [1, 2, 4, 2, 4, 16]}),
            (K.PERMUTE, (7,), {"perm": [0, 1, 3, 2, 4, 5]}),
            (K.RESHAPE, (8,), {"shape": [4, 16, 16]}),
        ],
        [(9, full((4, 16, 16))), (4, full((1, 8, 8, 16)))],
    ),
    "group_norm": group_norm((2, 12, 4, 6), 3, "float32"),
    "group_norm_odd": group_norm((2, 6, 5, 3), 2, "float16"),
    "group_norm_channels_last": group_norm((2, 32, 6, 5), 4, "float16", NHWC),
    "group_norm_of_few_channels_last": group_norm((2, 30, 6, 5), 10, "float32", NHWC),
    "group_norm_one_block": group_norm((1, 16, 16, 16), 1, "bfloat16"),
    "instance_norm": Case(
        [full((2, 3, 8, 8)), full((3,)), full((3,))],
        [(K.INSTANCE_NORM, (0, 1, 2)), (K.LEAKY_RELU, (3,), {"slope": 0.2}), (K.ADD, (0, 4))],
        [(5, full((2, 3, 8, 8)))],
    ),
    "cluster": add_norm((2, 16384), "float32"),
    "cluster_of_eight": add_norm((1, 65536), "bfloat16", K.RMS_NORM),
    "cluster_ragged": add_norm((2, 20004), "float32"),
    "streamed": add_norm((2, 65536), "float32", arch="sm_80"),
    "streamed_in_shared_memory": add_norm((2, 40000), "float16", arch="sm_80"),
    "streamed_sandwich": Case(
        [full((1, 33000), "float16")] * 2 + [full((33000,), "float16")],
        [
            (K.RMS_NORM, (1, 2), {"axis": 1}),
            (K.ADD, (0, 3)),
            (K.LAYER_NORM, (4, 2, None), {"axis": 1}),
        ],
        [(5, full((1, 33000), "float16")), (4, full((1, 33000), "float16"))],
        arch="sm_80",
    ),
}


def elementwise(shape: tuple[Any, ...], dtype: str, *other: tuple[Any, ...]) -> Case:
    """relu(x + r·…)"""
    stream = full(shape, dtype)
    beside = [full(extents, dtype) for extents in other]
    steps: list[Any] = [(K.ADD, (0, 1))]
    for index in range(len(other)):
        steps.append((K.MUL, (len(other) + 2 + index, 2 + index)))
    steps.append((K.RELU, (len(other) + 2 + len(other),)))
    return Case([stream, stream, *beside], steps, [(len(other) * 2 + 3, stream)])


ELEMENTS = {
    "flat": elementwise((3, 5, 1000), "float32"),
    "flat_float16": elementwise((4, 4096), "float16"),
    "flat_odd": elementwise((3, 5, 7), "float16"),
    "dynamic": elementwise(("rows", 3, 40), "float16", (40,), (3, 1)),
    "dynamic_within": elementwise((2, "rows", 24), "float32", ("rows", 1), (2, 1, 1)),
    "vector_along_the_channels": elementwise((2, 24, 6, 10), "float32", (24, 1, 1), (2, 24, 1, 1)),
    "scale_of_channels_last": Case(
        [IMAGE, full((2, 24, 1, 1), "float16", NHWC), IMAGE],
        [(K.MUL, (0, 1)), (K.ADD, (3, 2)), (K.RELU, (4,))],
        [(5, IMAGE)],
    ),
    "operands_that_lie_differently": Case(
        [IMAGE, full((2, 24, 6, 10), "float16")], [(K.ADD, (0, 1)), (K.GELU, (2,))], [(3, IMAGE)]
    ),
    "highway": Case(
        [full((6, 80))] * 3,
        [
            (K.SIGMOID, (2,)),
            (K.FULL, (), {"value": 1.0, "dtype": "float32"}),
            (K.ADD, (4, 3), {"scales": [1.0, -1.0]}),
            (K.MUL, (3, 1)),
            (K.MUL, (5, 0)),
            (K.ADD, (6, 7)),
        ],
        [(8, full((6, 80)))],
    ),
    "two_outputs": Case(
        [full((6, 80), "bfloat16")] * 2,
        [(K.ADD, (0, 1)), (K.SILU, (2,))],
        [(2, full((6, 80), "bfloat16")), (3, full((6, 80), "bfloat16"))],
    ),
    "concat_then_batch_norm": Case(
        [full((2, 16, 5, 4), "float32", NHWC), full((2, 8, 5, 4), "float32", NHWC), *[full((24,))] * 4],
        [(K.CONCAT, (0, 1), {"axis": 1}), (K.BATCH_NORM, (6, 2, 3, 4, 5)), (K.RELU, (7,))],
        [(8, full((2, 24, 5, 4), "float32", NHWC)), (6, full((2, 24, 5, 4), "float32", NHWC))],
    ),
    "concat_of_odd_parts": Case(
        [full((3, 5), "float16"), full((3, 3), "float16"), full((3, 9), "float16")],
        [(K.CONCAT, (0, 1, 2), {"axis": 1}), (K.TANH, (3,))],
        [(4, full((3, 17), "float16"))],
    ),
    "concat_of_planes": Case(
        [full((2, 3, 4, 4)), full((2, 2, 4, 4))], [(K.CONCAT, (0, 1), {"axis": 1})], [(2, full((2, 5, 4, 4)))]
    ),
    "padded_and_sliced": Case(
        [full((2, 6, 9)), full((2, 8, 8))],
        [
            (K.SLICE, (0,), {"axes": [2], "starts": [1], "stops": [9], "steps": [1]}),
            (K.PAD, (2,), {"pads": [0, 1, 0, 0, 1, 0], "value": 2.5}),
            (K.ADD, (3, 1)),
        ],
        [(4, full((2, 8, 8)))],
    ),
    "reflected": Case(
        [full((3, 6)), full((3, 10))],
        [(K.PAD, (0,), {"pads": [0, 2, 0, 2], "mode": "reflect"}), (K.MUL, (2, 1))],
        [(3, full((3, 10)))],
    ),
    "flipped": Case(
        [full((4, 8), "float16"), full((4, 8), "float16")],
        [(K.FLIP, (0,), {"axes": [1]}), (K.FLIP, (1,), {"axes": [0]}), (K.ADD, (2, 3))],
        [(4, full((4, 8), "float16"))],
    ),
    "transposed": Case(
        [full((6, 4, 8)), full((8, 6, 4))],
        [(K.PERMUTE, (0,), {"perm": [2, 0, 1]}), (K.ADD, (2, 1), {"scales": [2.0, -1.0]})],
        [(3, full((8, 6, 4)))],
    ),
    "chosen_by_a_mask": Case(
        [full((3, 40)), full((3, 40), "bool"), full((40,))],
        [(K.WHERE, (1, 0, 2)), (K.FULL, (), {"value": 0.5, "dtype": "float32"}), (K.GREATER, (3, 4))],
        [(3, full((3, 40))), (5, full((3, 40), "bool"))],
    ),
    "whole_numbers": Case(
        [full((3, 8), "int64"), full((3, 8), "int64")],
        [(K.ADD, (0, 1)), (K.MAXIMUM, (2, 1)), (K.CAST, (3,), {"dtype": "float32"})],
        [(3, full((3, 8), "int64")), (4, full((3, 8)))],
    ),
    "every_activation": Case(
        [full((4, 64)), full((64,))],
        [
            (K.GELU, (0,)),
            (K.ELU, (2,)),
            (K.PRELU, (3, 1)),
            (K.MISH, (4,)),
            (K.SOFTPLUS, (5,)),
            (K.HARDSWISH, (6,)),
            (K.HARDSIGMOID, (7,)),
            (K.CLIP, (8,), {"min": 0.1, "max": 0.9}),
            (K.ERF, (9,)),
            (K.ROUND, (10,)),
        ],
        [(10, full((4, 64))), (11, full((4, 64)))],
    ),
}
CASES = {**NORMS, **ELEMENTS}
CASES["two_blocks_a_row"] = replace(ELEMENTS["flat"], tile=1)


@pytest.fixture(scope="module")
def simulated() -> tuple[str, bytes]:
    if simulated_gpu.COMPILER is None:
        pytest.skip("no g++ here")
    source = source_of(CASES)
    return source, simulated_gpu.simulated_cubin(source)


@pytest.mark.parametrize("name", CASES)
def test_region_computes_what_torch_does(name: str, simulated: tuple[str, bytes]) -> None:
    check(CASES[name], name, *simulated)


@pytest.mark.parametrize("name", ["one_warp", "one_block", "cast_in_and_out", "streamed_in_shared_memory"])
def test_sum_is_bit_exact(name: str, simulated: tuple[str, bytes]) -> None:
    given = inputs(CASES[name])
    total = run(CASES[name], name, *simulated, given)[1]
    assert torch.equal(total, given[0] + given[1])


def test_one_warp_needs_no_barrier_and_a_block_does() -> None:
    assert "__syncthreads" not in source_of({"f": CASES["one_warp"]})
    assert "__syncthreads" in source_of({"f": CASES["one_block"]})


@pytest.mark.parametrize("width", [1, 2, 31, 33, 127, 1000, 1024, 1025, 2047, 4097, 10000, 16383, 16384, 32768, 65536])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_tiles_cover_the_row_within_the_limits(width: int, dtype: str) -> None:
    spec = add_norm(("rows", width), dtype).spec
    for arch in ("sm_80", "sm_90"):
        for tile in region_kernel.candidates(spec, architecture(arch)):
            assert tile.span * tile.chunks * tile.parts >= width
            assert tile.threads * tile.rows <= 1024
            assert tile.streams or tile.vector * tile.chunks * BYTES[dtype] <= 128  # bytes of each value in registers
            assert width % tile.vector == 0


# ---- what has no kernel ----------------------------------------------------------------------------------------------

STREAM = full(("rows", 8, 16))
REFUSED = {
    "a_product": ([STREAM, full((16, 16))], [(K.LINEAR, (0, 1, None))], "linear is more than one element's work"),
    "norms_over_different_rows": (
        [full((4, 8, 16))],
        [(K.LAYER_NORM, (0, None, None), {"axis": 2}), (K.LAYER_NORM, (1, None, None), {"axis": 1})],
        "over different rows",
    ),
    "a_norm_that_is_moved_first": (
        [full((4, 4, 16))],
        [(K.LAYER_NORM, (0, None, None), {"axis": 2}), (K.PERMUTE, (1,), {"perm": [1, 0, 2]}), (K.ADD, (1, 2))],
        "moved before it is used up",
    ),
    "a_norm_over_unknown_extents": ([full((4, "n"))], [(K.LAYER_NORM, (0, None, None), {"axis": 1})], "not known"),
    "a_view_along_unknown_extents": (
        [full(("rows", 8))],
        [(K.ROLL, (0,), {"axes": [0], "shifts": [1]}), (K.ADD, (0, 1))],
        "not known before it runs",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_no_kernel_computes_is_refused_with_the_reason(name: str) -> None:
    operands, steps, reason = REFUSED[name]
    shape = operands[0] if name != "norms_over_different_rows" else full((4, 8, 16))
    case = Case(operands, steps, [(len(operands) + len(steps) - 1, shape)])
    assert reason in region_kernel.refusal(case.spec, architecture("sm_90"))


# ---- machine code ----------------------------------------------------------------------------------------------------

# Loads and stores of 128 bits, and that there are no others; None where the layout or width asks for others.
ASSEMBLED: dict[str, tuple[int, int] | None] = {
    "one_warp": (12, 6),
    "one_block": (8, 4),
    "one_block_ragged": (8, 4),
    "sandwich_bfloat16": (6, 2),
    "windows_turned_back": (3, 2),
    "group_norm_channels_last": None,
    "streamed_in_shared_memory": None,
    "scale_of_channels_last": (3, 1),
    "concat_then_batch_norm": (6, 2),
    "highway": (3, 1),
    "padded_and_sliced": None,
    "chosen_by_a_mask": None,
}


@pytest.fixture(scope="module")
def assembled() -> dict[str, Any]:
    if not compilers():
        pytest.skip("neither nvcc nor NVRTC here")
    source = source_of({name: CASES[name] for name in ASSEMBLED})
    return {arch: to_cubin(source, arch) for arch in ("sm_80", "sm_90")}


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_kernels_stay_in_registers(arch: str, assembled: dict[str, Any]) -> None:
    usage = {kernel.kernel.removesuffix("_kernel"): kernel for kernel in assembled[arch].usage}
    assert set(usage) == set(ASSEMBLED)
    assert {name: kernel.spills + kernel.stack for name, kernel in usage.items()} == dict.fromkeys(ASSEMBLED, 0)


def test_accesses_are_of_128_bits(assembled: dict[str, Any]) -> None:
    if sass.disassembler() is None:
        pytest.skip("no nvdisasm here")
    read = {name.removesuffix("_kernel"): code.accesses for name, code in sass.read(assembled["sm_90"]).items()}
    for name, wanted in ASSEMBLED.items():
        if wanted is not None:
            found = read[name]["global_loads"], read[name]["global_stores"]
            assert found == ({128: wanted[0]}, {128: wanted[1]}), name
