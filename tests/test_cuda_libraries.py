"""Library calls against the float64 reference, on the processor: the same torch functions that run on a GPU.

cuDNN's fused convolutions exist on a GPU alone: here only that they are called, and with what, is checked.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

pytest.importorskip("tvm")

from rescompile.backends.cuda import composed, contraction, libraries, reference, region_kernel
from rescompile.backends.cuda.contraction import (
    ContractionSpec,
    ConvGeometry,
    EpilogueOperand,
    EpilogueOutput,
    EpilogueProgram,
    EpilogueStep,
)
from rescompile.backends.cuda.libraries import LibraryCall
from rescompile.backends.cuda.library_candidates import library_candidates, simple
from rescompile.backends.cuda.region_spec import RegionSpec, Tensor, norm_spec
from rescompile.backends.kernels import AttentionSpec, NormSpec
from rescompile.backends.kernels.specs import Argument
from rescompile.errors import RescompileError
from rescompile.fused_region import Region, Step
from rescompile.kinds import OpKind
from tests.gpu_clock import MadeUpDevice

DEVICE = MadeUpDevice([])
TOLERANCE = {"float32": 1e-5, "float16": 3e-3, "bfloat16": 2e-2}


def epilogue(
    dtype: str = "float32", bias: bool = True, residual: bool = False, act: str = "", first: bool = False
) -> EpilogueProgram:
    """y = act(acc + bias + residual), or act(acc + bias) + residual where the activation comes `first`."""
    operands, steps, place = [], [], 0
    if bias:
        operands.append(EpilogueOperand("c", dtype, column=True))
    if residual:
        operands.append(EpilogueOperand.full("r", dtype))
    names = {operand.name: 1 + index for index, operand in enumerate(operands)}
    order = ["c", "act", "r"] if first else ["c", "r", "act"]
    for name in order:
        if name in names:
            steps.append(EpilogueStep.of(OpKind.ADD, (place, names[name])))
        elif name == "act" and act:
            kind, _, how = act.partition("_")
            steps.append(EpilogueStep.of(OpKind(kind), (place,), {"approximate": how} if kind == "gelu" else {}))
        else:
            continue
        place = len(operands) + len(steps)
    return EpilogueProgram((EpilogueOutput(place, dtype),), tuple(operands), tuple(steps))


CONV = ConvGeometry(2, 7, 9, (3, 3), (2, 2), (1, 1, 1, 1))
POINT = ConvGeometry(2, 7, 9)
LINEARS = {
    "plain": ContractionSpec(12, 24, 16, EpilogueProgram.plain("float32"), dtype="float32"),
    "bias": ContractionSpec(12, 24, 16, epilogue(), dtype="float32"),
    "relu": ContractionSpec(12, 24, 16, epilogue(act="relu"), dtype="float32"),
    "gelu": ContractionSpec(12, 24, 16, epilogue(act="gelu_none"), dtype="float32"),
    "silu": ContractionSpec(12, 24, 16, epilogue(act="silu"), dtype="float32"),
    "residual": ContractionSpec(12, 24, 16, epilogue(bias=False, residual=True), dtype="float32"),
    "both": ContractionSpec(12, 24, 16, epilogue(residual=True), dtype="float32"),
    "both_relu": ContractionSpec(12, 24, 16, epilogue(residual=True, act="relu"), dtype="float32"),
    "both_half": ContractionSpec(12, 24, 16, epilogue("bfloat16", residual=True), dtype="bfloat16"),
    "turned": ContractionSpec(12, 24, 16, epilogue(), dtype="float32", a_depth_last=False, b_depth_last=False),
    "batched": ContractionSpec(12, 24, 16, EpilogueProgram.plain("float32"), batch=3, dtype="float32"),
    "batched_shared": ContractionSpec(
        12, 24, 16, epilogue(bias=False, residual=True), batch=3, dtype="float32", b_share=0
    ),
    "pixels": ContractionSpec(126, 24, 16, epilogue(residual=True, act="relu"), dtype="float32", conv=POINT),
    "conv": ContractionSpec(40, 24, 144, epilogue(residual=True, act="silu"), dtype="float32", conv=CONV),
    "conv_plain": ContractionSpec(40, 24, 144, EpilogueProgram.plain("float32"), dtype="float32", conv=CONV),
    "conv_groups": ContractionSpec(40, 8, 72, epilogue(), batch=2, dtype="float32", conv=CONV),
}


def tensors(arguments: list[Argument]) -> dict[str, torch.Tensor]:
    return {
        part.name: DEVICE.blank(part.shape, part.dtype)
        if part.output
        else DEVICE.tensor(part.shape, part.dtype, seed, 0.3)
        for seed, part in enumerate(arguments)
    }


def compare(spec: Any, arguments: list[Argument], calls: list[LibraryCall]) -> None:
    assert calls
    for call in calls:
        given = tensors(arguments)
        want = reference.evaluate(reference.described(spec), {k: v for k, v in given.items() if k not in ("y", "sum")})
        assert want is not None
        LibraryCall.parse(call.text()).function()(*given.values())
        for name, value in want.items():
            torch.testing.assert_close(
                given[name].double(), value, rtol=TOLERANCE[spec.dtype], atol=TOLERANCE[spec.dtype]
            )


def names(arguments: list[Argument]) -> tuple[str, ...]:
    return tuple(part.name for part in arguments)


@pytest.mark.parametrize("name", LINEARS)
def test_a_library_computes_the_contraction(name: str) -> None:
    spec = LINEARS[name]
    arguments = contraction.arguments(spec)
    calls = [call for call in library_candidates(spec, names(arguments)) if "_act" not in call.function_name]
    compare(spec, arguments, calls)


def test_a_convolution_of_single_pixels_is_a_product_too() -> None:
    calls = library_candidates(LINEARS["pixels"], names(contraction.arguments(LINEARS["pixels"])))
    assert [call.function_name for call in calls] == ["conv", "conv_add_act", "linear_add"]


def test_tanh_gelu_is_the_librarys_own() -> None:
    """cuBLASLt's GELU is the approximation; torch's function of the same name computes the exact one here."""
    spec = replace(LINEARS["gelu"], epilogue=epilogue(act="gelu_tanh"))
    (call,) = library_candidates(spec, names(contraction.arguments(spec)))
    given = tensors(contraction.arguments(spec))
    call.function()(*given.values())
    want = reference.evaluate(reference.described(spec), given)
    assert want is not None
    torch.testing.assert_close(given["y"].double(), want["y"], rtol=1e-2, atol=1e-3)


def test_the_plain_float64_reference_is_what_numpy_computes() -> None:
    spec = LINEARS["both_relu"]
    given = tensors(contraction.arguments(spec))
    want = given["a"].double() @ given["b"].double().T + given["c"].double() + given["r"].double()
    found = reference.evaluate(reference.described(spec), given)
    assert found is not None
    torch.testing.assert_close(found["y"], want.relu(), rtol=1e-12, atol=1e-12)


def test_operands_that_repeat_or_vary_by_row_are_read_so() -> None:
    operands = (
        EpilogueOperand("window", "float32", row=True, column=True, row_cycle=4),
        EpilogueOperand("image", "float32", row=True, row_step=6),
    )
    steps = (EpilogueStep.of(OpKind.ADD, (0, 1)), EpilogueStep.of(OpKind.MUL, (3, 2)))
    spec = ContractionSpec(
        12, 8, 16, EpilogueProgram((EpilogueOutput(4, "float32"),), operands, steps), dtype="float32"
    )
    given = tensors(contraction.arguments(spec))
    found = reference.evaluate(reference.described(spec), given)
    sums = given["a"].double() @ given["b"].double().T + given["window"].double().repeat(3, 1)
    assert found is not None
    torch.testing.assert_close(found["y"], sums * given["image"].double().reshape(2, 1).repeat_interleave(6, 0))
    assert simple(spec) is None
    assert not library_candidates(spec, names(contraction.arguments(spec)))


@pytest.mark.parametrize(
    "spec",
    [
        ContractionSpec(12, 24, 16, epilogue(residual=True, act="relu", first=True), dtype="float32"),
        ContractionSpec(12, 24, 16, epilogue("float32"), dtype="float16"),
        replace(
            LINEARS["conv"], rows=30, conv=ConvGeometry(2, 7, 9, (3, 3), (2, 2), (1, 1, 0, 1))
        ),
        replace(LINEARS["batched"], b_share=3),
    ],
    ids=["activation_before_the_sum", "another_type", "uneven_padding", "shared_by_some"],
)  # fmt: skip
def test_what_no_library_computes_has_no_candidate(spec: ContractionSpec) -> None:
    assert not library_candidates(spec, names(contraction.arguments(spec)))


# ---- rows, attention --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["layer", "rms"])
@pytest.mark.parametrize("residual", [True, False])
def test_a_library_computes_the_norm(kind: str, residual: bool) -> None:
    spec = NormSpec(6, 16, kind, residual=residual, sum_output=residual, bias=kind == "layer")
    arguments = [
        Argument("x", (6, 16), "float32"),
        *([Argument("residual", (6, 16), "float32")] if residual else []),
        Argument("weight", (16,), "float32"),
        *([Argument("bias", (16,), "float32")] if spec.bias else []),
        Argument("y", (6, 16), "float32", output=True),
        *([Argument("sum", (6, 16), "float32", output=True)] if residual else []),
    ]
    compare(spec, arguments, library_candidates(spec, names(arguments)))


@pytest.mark.parametrize("kind", ["layer", "rms"])
@pytest.mark.parametrize("residual", [True, False])
def test_a_library_computes_the_norm_of_a_region(kind: str, residual: bool) -> None:
    spec = norm_spec(NormSpec(6, 16, kind, residual=residual, sum_output=residual, bias=kind == "layer"))
    arguments = region_kernel.arguments(spec)
    (call,) = library_candidates(spec, names(arguments))
    given = tensors(arguments)
    want = reference.evaluate(reference.described(spec), given)
    call.function()(*given.values())
    assert want is not None
    assert len(want) == 1 + residual
    for name, value in want.items():
        torch.testing.assert_close(given[name].double(), value, rtol=1e-5, atol=1e-5)


def test_a_region_with_more_than_a_norm_has_no_library() -> None:
    spec = norm_spec(NormSpec(6, 16, "rms", residual=True, sum_output=True, bias=False))
    steps = (*spec.region.steps, Step(OpKind.RELU, (4,)))
    more = replace(spec, steps=Region(3, steps, (5, 3)).text())
    assert library_candidates(spec, names(region_kernel.arguments(spec)))
    assert not library_candidates(more, names(region_kernel.arguments(more)))


def test_a_regions_reference_follows_views_and_orders() -> None:
    last = (0, 2, 3, 1)
    image, vector = Tensor((2, 8, 3, 5), "float32", last), Tensor((8,), "float32")
    steps = (
        Step(OpKind.GROUP_NORM, (0, 2, None), {"groups": 2}),
        Step(OpKind.CONCAT, (1, 3), {"axis": 1}),
        Step(OpKind.SLICE, (4,), {"axes": (1,), "starts": (4,), "stops": (12,)}),
    )
    spec = RegionSpec(Region(3, steps, (5,)).text(), (image, image, vector), (image,))
    given = tensors(region_kernel.arguments(spec))
    found = reference.evaluate(reference.described(spec), given)
    assert found is not None
    one, two = (given[name].double().permute(0, 3, 1, 2) for name in ("x0", "x1"))
    want = torch.cat([two, torch.nn.functional.group_norm(one, 2, given["x2"].double())], 1)[:, 4:12]
    torch.testing.assert_close(found["y0"], want.permute(last))
    unknown = replace(spec, steps=spec.steps.replace("group_norm", "batch_norm"))
    assert reference.evaluate(reference.described(unknown), given) is None


@pytest.mark.parametrize(
    "spec",
    [
        AttentionSpec(2, 4, 5, 5, 8, 0.35, layout="qkv"),
        AttentionSpec(2, 4, 5, 7, 8, 0.35, layout="bhsd", out_layout="bhsd"),
        AttentionSpec(2, 4, 5, 5, 8, 0.35, kv_heads=2, causal=True),
        AttentionSpec(2, 4, 5, 7, 8, 0.35, mask="additive", mask_shape=(2, 1, 5, 7)),
    ],
    ids=["packed", "heads_first", "grouped_causal", "masked"],
)
def test_a_library_computes_attention(spec: AttentionSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = composed.arguments(spec)
    (call,) = library_candidates(spec, names(arguments))
    assert str(call) == "library attention(backend=EFFICIENT_ATTENTION)"
    # The processor has other implementations of the same function.
    settings = tuple((key, "FLASH_ATTENTION+MATH" if key == "backend" else value) for key, value in call.settings)
    compare(spec, arguments, [replace(call, settings=settings)])


def test_narrow_types_have_flash_and_cudnn_attention_too() -> None:
    spec = AttentionSpec(2, 4, 5, 5, 64, 0.35, layout="qkv", dtype="float16")
    assert [dict(call.settings)["backend"] for call in library_candidates(spec, ("qkv", "y"))] == [
        "FLASH_ATTENTION",
        "EFFICIENT_ATTENTION",
        "CUDNN_ATTENTION",
    ]
    masked = replace(spec, mask="additive")
    backends = [dict(call.settings)["backend"] for call in library_candidates(masked, ("qkv", "mask", "y"))]
    assert "FLASH_ATTENTION" not in backends


# ---- how a program calls them -----------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["", "{}", '["norm"]', '["nothing", [], []]', "[1, 2, 3]"])
def test_a_call_that_cannot_be_read_is_one_sentence(text: str) -> None:
    with pytest.raises(RescompileError, match=r"calls a library|library function"):
        LibraryCall.parse(text)


def test_a_program_calls_a_library_with_its_own_buffers() -> None:
    import tvm
    from tvm import relax

    from rescompile.backends import lowering

    spec = LINEARS["both_relu"]
    arguments = contraction.arguments(spec)
    (call,) = library_candidates(spec, names(arguments))
    block = relax.BlockBuilder()
    inputs = [relax.Var(part.name, relax.TensorType(part.shape, part.dtype)) for part in arguments if not part.output]
    with block.function("main", inputs):
        with block.dataflow():
            made = relax.op.call_dps_packed(
                libraries.GLOBAL,
                relax.Tuple([tvm.ir.StringImm(call.text()), *inputs]),
                relax.TensorType((12, 24), "float32"),
            )
            result = block.emit_output(block.emit(made))
        block.emit_func_output(result)
    executable = relax.build(block.get(), target=tvm.target.Target("llvm"), relax_pipeline=lowering.build_passes())
    libraries.register()
    given = tensors(arguments)
    given.pop("y")
    found = relax.VirtualMachine(executable, tvm.cpu())["main"](*given.values())
    want = reference.evaluate(reference.described(spec), given)
    assert want is not None
    torch.testing.assert_close(torch.from_dlpack(found).double(), want["y"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("residual", "name"), [(False, "conv_act"), (True, "conv_add_act")])
def test_cudnns_fused_convolution_is_given_everything(
    residual: bool, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stand-in takes the place of cuDNN's function, which no processor has."""
    spec = replace(LINEARS["conv"], epilogue=epilogue(residual=residual, act="relu"))
    seen = []

    def fused(x: torch.Tensor, weight: torch.Tensor, *rest: Any) -> torch.Tensor:
        *terms, bias, stride, padding, dilation, groups = rest
        seen.append(x.is_contiguous(memory_format=torch.channels_last))
        y = torch.conv2d(x, weight, bias, stride, padding, dilation, groups)
        return torch.relu(y + terms[0] if terms else y)

    class Aten:
        cudnn_convolution_relu = staticmethod(fused)
        cudnn_convolution_add_relu = staticmethod(fused)

    monkeypatch.setattr(torch.ops, "aten", Aten)
    arguments = contraction.arguments(spec)
    calls = [call for call in library_candidates(spec, names(arguments)) if call.function_name == name]
    compare(spec, arguments, calls)
    assert seen == [True]
