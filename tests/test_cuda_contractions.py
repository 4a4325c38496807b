"""Contractions by mma.sync: their generated source on the CPU against torch, and what the assembler makes of them."""

from __future__ import annotations

from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest
import torch

from rescompile.errors import RescompileError
from rescompile.kinds import OpKind
from tests import simulated_gpu

tvm = pytest.importorskip("tvm")

from rescompile.backends.cuda import mma, sass  # noqa: E402
from rescompile.backends.cuda.contraction import (  # noqa: E402
    ContractionSpec,
    ConvGeometry,
    EpilogueOperand,
    EpilogueOutput,
    EpilogueProgram,
    EpilogueStep,
    arguments,
)
from rescompile.backends.cuda.cubin import compilers, to_cubin  # noqa: E402
from rescompile.backends.cuda.executable import cuda_source  # noqa: E402
from rescompile.backends.cuda.mma import MmaTile  # noqa: E402
from rescompile.backends.cuda.targets import ARCHITECTURES, architecture, cuda_target  # noqa: E402

K = OpKind
TORCH = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
# Against float64, relative to the result or to the length of the sum: one rounding of the result, and of the operands
# where they are multiplied as tf32.
TOLERANCE = {"float16": 1e-3, "bfloat16": 8e-3, "float32": 1e-5, "tf32": 2e-3}
FREE = 21  # what an extent that is left to run time is

SMALL = MmaTile(32, 32, 64, (1, 2, 1), 3)
SLICED = MmaTile(16, 32, 128, (1, 1, 4), 3)


def plain(dtype: str = "float16") -> EpilogueProgram:
    return EpilogueProgram.plain(dtype)


def fused(dtype: str = "float16") -> EpilogueProgram:
    """relu(acc + bias) + residual"""
    steps = (EpilogueStep.of(K.ADD, (0, 1)), EpilogueStep.of(K.RELU, (3,)), EpilogueStep.of(K.ADD, (4, 2)))
    operands = (EpilogueOperand("bias", dtype, column=True), EpilogueOperand.full("residual", dtype))
    return EpilogueProgram((EpilogueOutput(5, dtype),), operands, steps)


def one_operand(operand: EpilogueOperand, kind: OpKind = K.MUL, dtype: str = "float16") -> EpilogueProgram:
    """acc ∘ operand"""
    return EpilogueProgram((EpilogueOutput(2, dtype),), (operand,), (EpilogueStep.of(kind, (0, 1)),))


def two_outputs() -> EpilogueProgram:
    """sum = half(acc + residual), gelu(sum)·0.5 in float32"""
    steps = (
        EpilogueStep.of(K.ADD, (0, 1)),
        EpilogueStep.of(K.CAST, (2,), {"dtype": "float16"}),
        EpilogueStep.of(K.GELU, (3,)),
        EpilogueStep.of(K.FULL, (), {"value": 0.5}),
        EpilogueStep.of(K.MUL, (4, 5)),
    )
    outputs = (EpilogueOutput(3, "float16", "y0"), EpilogueOutput(6, "float32", "y1"))
    return EpilogueProgram(outputs, (EpilogueOperand.full("residual", "float16"),), steps)


def image(
    images: int | None, size: int, channels: int, out: int, kernel: int = 3, *, epilogue: EpilogueProgram, **how: object
) -> ContractionSpec:
    groups = int(how.pop("groups", 1))  # type: ignore[call-overload]
    dtype = str(how.pop("dtype", "float16"))
    conv = ConvGeometry(images, size, size, (kernel, kernel), **how)  # type: ignore[arg-type]
    rows = None if images is None else images * conv.pixels
    depth = kernel * kernel * channels // groups
    return ContractionSpec(rows, out // groups, depth, epilogue, groups, dtype, conv=conv)


FULL16 = fused()
PADDED = (1, 1, 1, 1)
CASES: dict[str, tuple[ContractionSpec, MmaTile]] = {
    "whole_tiles": (ContractionSpec(64, 64, 128, FULL16), SMALL),
    "tiny": (ContractionSpec(1, 8, 8, FULL16), SLICED),
    "ragged": (ContractionSpec(37, 40, 72, FULL16), MmaTile(32, 32, 32, (2, 1, 1), 2)),
    "odd": (ContractionSpec(19, 13, 21, FULL16), SLICED),
    "two_by_two": (ContractionSpec(20, 14, 38, FULL16), SMALL),
    "one_step": (ContractionSpec(32, 32, 16, plain()), SMALL),
    "large_tile": (ContractionSpec(130, 128, 64, FULL16), MmaTile(128, 128, 32, (2, 2, 1), 4)),
    "grouped_blocks": (ContractionSpec(16 * 19, 64, 32, plain()), MmaTile(16, 32, 32, (1, 1, 1), 2)),
    "bfloat16": (replace(ContractionSpec(48, 64, 96, fused("bfloat16")), dtype="bfloat16"), SMALL),
    "dynamic_rows": (ContractionSpec(None, 64, 64, FULL16), SMALL),
    "dynamic_batch": (ContractionSpec(16, 32, 64, FULL16, batch=None), SLICED),
    "sliced_depth": (ContractionSpec(16, 64, 512, FULL16), SLICED),
    "both_turned": (
        ContractionSpec(32, 64, 128, FULL16, batch=2, a_depth_last=False, b_depth_last=False),
        MmaTile(32, 32, 64, (1, 2, 2), 3),
    ),
    "turned_ragged": (ContractionSpec(24, 44, 70, plain(), a_depth_last=False, b_depth_last=False), SMALL),
    "shared_matrices": (ContractionSpec(16, 32, 64, plain(), batch=6, b_share=3), SLICED),
    "one_matrix_for_all": (ContractionSpec(16, 32, 64, plain(), batch=3, a_share=0, b_depth_last=False), SLICED),
    "tf32": (ContractionSpec(40, 48, 40, fused("float32"), dtype="float32"), MmaTile(32, 32, 32, (1, 2, 1), 3)),
    "tf32_turned": (
        ContractionSpec(32, 64, 72, plain("float32"), dtype="float32", a_depth_last=False, b_depth_last=False),
        MmaTile(32, 64, 16, (1, 2, 1), 3),
    ),
    "float32_out": (ContractionSpec(33, 40, 64, fused("float32")), SMALL),
    "two_outputs": (ContractionSpec(33, 32, 64, two_outputs()), SMALL),
    "scale_by_row": (ContractionSpec(33, 40, 64, one_operand(EpilogueOperand("s", "float32", row=True))), SMALL),
    "scalar": (ContractionSpec(33, 40, 64, one_operand(EpilogueOperand("s", "float16"))), SMALL),
    "cycle_of_rows": (
        ContractionSpec(36, 40, 64, one_operand(EpilogueOperand("s", "float16", row=True, column=True, row_cycle=12))),
        SMALL,
    ),
    "step_of_rows": (
        ContractionSpec(36, 40, 64, one_operand(EpilogueOperand("s", "float16", row=True, column=True, row_step=12))),
        SMALL,
    ),
    "by_product": (
        ContractionSpec(16, 32, 64, one_operand(EpilogueOperand("s", "float16", batch=True, column=True)), batch=3),
        SLICED,
    ),
    "conv": (image(2, 7, 32, 40, pads=PADDED, epilogue=FULL16), SMALL),
    "conv_strided": (image(1, 9, 24, 32, stride=(2, 2), pads=PADDED, epilogue=FULL16), SMALL),
    "conv_dilated": (image(1, 9, 64, 32, dilation=(2, 2), pads=(2, 1, 0, 2), epilogue=plain()), SMALL),
    "conv_1x1": (image(2, 5, 32, 32, 1, epilogue=FULL16), SMALL),
    "conv_1x1_strided": (image(2, 5, 32, 32, 1, stride=(2, 2), epilogue=plain()), SMALL),
    "conv_large": (image(1, 12, 4, 32, 7, stride=(2, 2), pads=(3, 3, 3, 3), epilogue=FULL16), SMALL),
    "conv_groups": (image(2, 6, 32, 64, groups=2, pads=PADDED, epilogue=FULL16), SMALL),
    "conv_odd": (image(1, 6, 5, 7, pads=PADDED, epilogue=plain()), SLICED),
    "conv_dynamic": (image(None, 3, 16, 16, pads=PADDED, epilogue=FULL16), SMALL),
    "conv_bfloat16": (
        image(1, 8, 16, 32, pads=PADDED, epilogue=fused("bfloat16"), dtype="bfloat16"),
        MmaTile(64, 32, 32, (2, 1, 1), 4),
    ),
    "conv_tf32": (
        image(1, 8, 16, 32, pads=PADDED, epilogue=plain("float32"), dtype="float32"),
        MmaTile(64, 32, 16, (2, 1, 1), 4),
    ),
}


def _buffers(spec: ContractionSpec) -> dict[str, torch.Tensor]:
    """Random inputs, outputs full of NaN."""
    random = torch.Generator().manual_seed(spec.depth)
    made = {}
    for argument in arguments(spec):
        shape = [FREE if extent is None else extent for extent in argument.shape]
        value = torch.full(shape, torch.nan) if argument.output else torch.randn(shape, generator=random)
        made[argument.name] = value.to(TORCH[argument.dtype])
    return made


def _sum(spec: ContractionSpec, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """acc in float64, as the result lies."""
    if spec.conv is not None:
        top, left, bottom, right = spec.conv.pads
        x = torch.nn.functional.pad(a.permute(0, 3, 1, 2), (left, right, top, bottom))
        how = (spec.conv.stride, 0, spec.conv.dilation, spec.groups)
        y = torch.nn.functional.conv2d(x, b.permute(0, 3, 1, 2), None, *how)
        return y.permute(0, 2, 3, 1).reshape(len(y), spec.conv.pixels, spec.channels)
    a = a if spec.a_depth_last else a.mT
    b = b if spec.b_depth_last else b.mT
    if spec.batch == 1:
        return a @ b.mT
    batch = FREE if spec.batch is None else spec.batch
    a, b = (
        matrix.expand(batch, *matrix.shape) if share == 0 else matrix.repeat_interleave(share, 0)
        for matrix, share in ((a, spec.a_share), (b, spec.b_share))
    )
    return a @ b.mT


def _operand(spec: ContractionSpec, operand: EpilogueOperand, value: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    if operand.row and (operand.row_step > 1 or operand.row_cycle):
        rows = torch.arange(like.shape[-2]) // operand.row_step
        value = value[rows % operand.row_cycle if operand.row_cycle else rows]
    if operand.row and not operand.column:
        value = value[..., None]
    return value[:, None] if operand.batch and not operand.row else value


def _expected(spec: ContractionSpec, given: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    exact = {name: value.double() for name, value in given.items()}
    total = _sum(spec, exact["a"], exact["b"])
    program = spec.epilogue
    values = [total, *(_operand(spec, part, exact[part.name], total) for part in program.operands)]
    rules = {
        K.ADD: torch.add,
        K.MUL: torch.mul,
        K.RELU: torch.relu,
        K.GELU: torch.nn.functional.gelu,
        K.CAST: lambda x: x.half().double(),
    }
    for step in program.steps:
        if step.kind is K.FULL:
            values.append(torch.tensor(step.settings["value"], dtype=torch.float64))
        else:
            values.append(rules[step.kind](*(values[place] for place in step.inputs)))
    return [values[output.value].expand_as(total) for output in program.outputs]


def _numpy(tensor: torch.Tensor) -> np.ndarray:
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.uint16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[np.ndarray]]:
    if simulated_gpu.COMPILER is None:
        pytest.skip("no g++ here")
    functions = {name: mma.prim_func(spec, tile, name) for name, (spec, tile) in CASES.items()}
    calls = {name: [_numpy(value) for value in _buffers(spec).values()] for name, (spec, _) in CASES.items()}
    folder = tmp_path_factory.mktemp("mma")
    # Compiling what is unrolled takes longer than running it.
    return simulated_gpu.run_functions(folder, tvm.IRModule(functions), calls, optimise="-O0")


@pytest.mark.parametrize("name", CASES)
def test_contraction_is_as_exact_as_its_types(name: str, results: dict[str, list[np.ndarray]]) -> None:
    spec = CASES[name][0]
    outputs = spec.epilogue.outputs
    wanted = _expected(spec, _buffers(spec))
    for output, want, got in zip(outputs, wanted, results[name][-len(outputs) :], strict=True):
        kind = "tf32" if spec.dtype == "float32" else output.dtype
        kind = "float16" if any(step.kind is K.CAST for step in spec.epilogue.steps) else kind
        found = torch.from_numpy(got.astype(np.float64)).reshape(want.shape)
        wrong = (found - want).abs() / (want.abs() + spec.depth**0.5)
        assert wrong.max() < TOLERANCE[kind], f"{name}: {wrong.max()}"


# ---- what there is a kernel for -----------------------------------------------------------------------------------


def test_refusals_say_why() -> None:
    hopper = architecture("sm_90")
    assert mma.refusal(CASES["whole_tiles"][0], hopper) == ""
    assert "float64" in mma.refusal(ContractionSpec(8, 8, 8, plain("float32"), dtype="float64"), hopper)
    assert "float64" in mma.refusal(ContractionSpec(8, 8, 8, plain("float64")), hopper)
    depthwise = image(1, 8, 16, 16, groups=16, pads=PADDED, epilogue=plain())
    assert "1 channels" in mma.refusal(depthwise, hopper)
    assert "shared" in mma.refusal(ContractionSpec(8, 8, 8, plain(), batch=None, b_share=2), hopper)


def test_empty_and_doubly_dynamic_products_are_no_specs() -> None:
    with pytest.raises(RescompileError, match="empty"):
        ContractionSpec(8, 0, 8, plain())
    with pytest.raises(RescompileError, match="not both"):
        ContractionSpec(None, 8, 8, plain(), batch=None)
    with pytest.raises(RescompileError, match="No epilogue holds 'softmax'"):
        EpilogueProgram((EpilogueOutput(1, "float16"),), (), (EpilogueStep.of(K.SOFTMAX, (0,)),))


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_candidates_fit_the_architecture(arch: str) -> None:
    limits = ARCHITECTURES[arch]
    for spec, _ in CASES.values():
        tiles = mma.candidates(spec, limits)
        assert len(tiles) > 4
        for tile in tiles:
            assert tile.shared_bytes(spec.dtype) < limits.shared_bytes
            assert tile.rows % (16 * tile.warps[0]) == 0 == tile.columns % (16 * tile.warps[1])


def test_first_candidate_follows_the_shape() -> None:
    hopper = architecture("sm_90")

    def first(rows: int, columns: int, depth: int) -> MmaTile:
        return mma.candidates(ContractionSpec(rows, columns, depth, plain()), hopper)[0]

    assert first(8192, 8192, 4096).rows * first(8192, 8192, 4096).columns >= 128 * 128
    assert first(1, 4096, 4096).rows == 16
    assert first(128, 768, 768).rows * first(128, 768, 768).columns <= 64 * 64


# ---- machine code -------------------------------------------------------------------------------------------------

BIG = MmaTile(128, 128, 32, (2, 2, 1), 4)
TURNED = {"a_depth_last": False, "b_depth_last": False}
ASSEMBLED: dict[str, tuple[ContractionSpec, MmaTile | None]] = {
    "float16": (ContractionSpec(4096, 4096, 4096, fused()), BIG),
    "bfloat16_turned": (
        replace(ContractionSpec(4096, 4096, 4096, fused("bfloat16"), **TURNED), dtype="bfloat16"),  # type: ignore[arg-type]
        BIG,
    ),
    "tf32": (
        ContractionSpec(4096, 4096, 4096, fused("float32"), dtype="float32"),
        MmaTile(128, 128, 16, (2, 2, 1), 4),
    ),
    "dynamic": (ContractionSpec(None, 3072, 768, fused()), None),
    "conv_strided": (image(32, 56, 128, 128, stride=(2, 2), pads=PADDED, epilogue=fused()), None),
}
# What each architecture is asked for; the committed table of machine code has more.
ASKED = [("sm_90", name) for name in ASSEMBLED] + [("sm_80", "float16"), ("sm_80", "conv_strided")]


@pytest.fixture(scope="module")
def assembled() -> dict[tuple[str, str], sass.KernelCode]:
    if not compilers() or sass.disassembler() is None:
        pytest.skip("no compiler of CUDA, or no disassembler, here")
    found = {}
    for arch in ("sm_80", "sm_90"):
        limits = architecture(arch)
        functions = {
            name: mma.prim_func(spec, tile or mma.candidates(spec, limits)[0], name)
            for name, (spec, tile) in ASSEMBLED.items()
            if (arch, name) in ASKED
        }
        source = cuda_source(tvm.compile(tvm.IRModule(functions), target=cuda_target(arch)).mod)
        cubin = to_cubin(source, arch)
        assert cubin is not None
        found.update({(arch, name): code for name, code in sass.read(cubin).items()})
    return found


INSTRUCTION = {"float16": "HMMA.16816.F32", "bfloat16": "HMMA.16816.F32.BF16", "float32": "HMMA.1688.F32.TF32"}


@pytest.mark.parametrize(("arch", "name"), ASKED)
def test_machine_code_is_what_a_tuned_kernel_has(
    arch: str, name: str, assembled: dict[tuple[str, str], sass.KernelCode]
) -> None:
    spec = ASSEMBLED[name][0]
    code = assembled[arch, name]
    assert (code.spills, code.stack) == (0, 0)
    assert set(code.tensor) == {INSTRUCTION[spec.dtype]}
    assert set(code.accesses["async_copies"]) == {128}
    assert set(code.accesses["global_loads"]) == {128}
    assert max(code.accesses["global_stores"]) == 128
    # Fragments come from shared memory by ldmatrix, sums go through it in wide accesses.
    assert code.counts["matrix_loads"] >= code.tensor[INSTRUCTION[spec.dtype]] // 4
    assert min(code.accesses["shared_stores"]) >= 64


def test_large_tiles_leave_room_for_two_blocks(assembled: dict[tuple[str, str], sass.KernelCode]) -> None:
    for arch in ("sm_80", "sm_90"):
        registers, shared = assembled[arch, "float16"].registers, BIG.shared_bytes("float16")
        assert sass.occupancy(architecture(arch), BIG.threads, registers, shared) >= 8


def test_unknown_inline_assembly_does_not_run_on_the_simulated_gpu() -> None:
    if simulated_gpu.COMPILER is None:
        pytest.skip("no g++ here")
    source = 'extern "C" __global__ void f(int* x);\nextern "C" __global__ void f(int* x) { tvm_builtin_ptx_other(x); }'
    with pytest.raises(RuntimeError, match="tvm_builtin_ptx_other"):
        simulated_gpu.simulated_cubin(source)
