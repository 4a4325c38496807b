"""The kernels whose machine code is recorded: of each family some specs that models bring, one tile each."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from rescompile.backends.cuda import depthwise, flash, mma, pool, region_kernel, softmax, wgmma
from rescompile.backends.cuda.contraction import (
    ContractionSpec,
    ConvGeometry,
    EpilogueOperand,
    EpilogueOutput,
    EpilogueProgram,
    EpilogueStep,
)
from rescompile.backends.cuda.depthwise import Depthwise
from rescompile.backends.cuda.pool import GlobalMean, GlobalMeans, Pool
from rescompile.backends.cuda.region_spec import RegionSpec, norm_spec, tensors
from rescompile.backends.cuda.softmax import RowSoftmax
from rescompile.backends.cuda.targets import architecture
from rescompile.backends.cuda.windows import Window
from rescompile.backends.kernels import AttentionSpec, Epilogue, NormSpec
from rescompile.fused_region import Region, Step
from rescompile.kinds import OpKind

EVERYWHERE = ("sm_80", "sm_90")
ARCHITECTURES = (*EVERYWHERE, "sm_90a")
_DTYPES = {"f32": "float32", "f16": "float16", "bf16": "bfloat16"}


@dataclass(frozen=True)
class Recorded:
    """A kernel of a family, by a name that stays when the family changes; `tile` is the place among its candidates."""

    name: str
    family: Any
    spec: Any
    archs: tuple[str, ...] = EVERYWHERE
    tile: int = 0

    def function(self, arch: str) -> tuple[Any, str]:
        """The kernel for an architecture, and its tile as text."""
        if not hasattr(self.family, "candidates"):
            return self.family.prim_func(self.spec, self.name), ""
        tile = self.family.candidates(self.spec, architecture(arch))[self.tile]
        return self.family.prim_func(self.spec, tile, self.name), str(tile)


def kernels(arch: str) -> list[Recorded]:
    """What is recorded for an architecture."""
    return [kernel for kernel in [*_rows(), *_windows(), *_contractions()] if arch in kernel.archs]


def _rows() -> Iterator[Recorded]:
    layer = NormSpec(None, 768, "layer", residual=True, sum_output=True)
    for width, dtypes in ((64, "bf16"), (768, "f32 f16 bf16"), (4096, "f32 bf16"), (16384, "f32 bf16"), (1000, "f16")):
        for short in dtypes.split():
            spec = norm_spec(replace(layer, width=width, dtype=_DTYPES[short]))
            yield Recorded(f"add_layer_norm_{width}_{short}", region_kernel, spec)
    rms = NormSpec(None, 4096, "rms", residual=True, sum_output=True, bias=False)
    yield Recorded("add_layer_norm_77_bf16", region_kernel, norm_spec(replace(layer, width=77, dtype="bfloat16")))
    yield Recorded("add_layer_norm_65536_bf16", region_kernel, norm_spec(replace(layer, width=65536, dtype="bfloat16")))
    yield Recorded("add_rms_norm_4096_bf16", region_kernel, norm_spec(replace(rms, dtype="bfloat16")))
    yield Recorded("layer_norm_768_f16", region_kernel, norm_spec(NormSpec(None, 768, "layer", dtype="float16")))
    yield Recorded("softmax_197_f16", softmax, RowSoftmax(None, 197, "float16", "float16"))
    yield Recorded("softmax_1024_f32", softmax, RowSoftmax(None, 1024))
    gate = Region(3, (Step(OpKind.SILU, (0,)), Step(OpKind.MUL, (3, 1)), Step(OpKind.ADD, (4, 2))), (5,))
    tail = Region(2, (Step(OpKind.ADD, (0, 1)), Step(OpKind.RELU, (2,))), (3,))
    group = Region(
        4,
        (Step(OpKind.ADD, (0, 1)), Step(OpKind.GROUP_NORM, (4, 2, 3), {"groups": 32}), Step(OpKind.RELU, (5,))),
        (6,),
    )
    for short in ("f32", "f16"):
        dtype = _DTYPES[short]
        rows, image = tensors([("n", 11008)], dtype), tensors([(8, 256, 28, 28)], dtype)
        yield Recorded(f"gate_{short}", region_kernel, RegionSpec(gate.text(), rows * 3, rows))
        yield Recorded(f"add_relu_{short}", region_kernel, RegionSpec(tail.text(), image * 2, image))
        affine = tensors([(256,)] * 2, dtype)
        yield Recorded(f"add_group_norm_{short}", region_kernel, RegionSpec(group.text(), (*image * 2, *affine), image))


def _windows() -> Iterator[Recorded]:
    same = (1, 1, 1, 1)
    relu6, hardswish = Epilogue(True, inner="relu6"), Epilogue(True, True, "hardswish")
    for short in ("f32", "f16"):
        dtype = _DTYPES[short]
        three = Depthwise(None, Window(56, 56, 128, (3, 3), pads=same), relu6, dtype)
        yield Recorded(f"depthwise_3x3_{short}", depthwise, three)
        half = replace(three, window=replace(three.window, stride=(2, 2)), epilogue=hardswish)
        yield Recorded(f"depthwise_3x3_stride2_{short}", depthwise, half)
        five = Depthwise(32, Window(28, 28, 240, (5, 5), pads=(2,) * 4), relu6, dtype)
        yield Recorded(f"depthwise_5x5_{short}", depthwise, five)
        stem = Pool("max", 32, Window(112, 112, 64, (3, 3), (2, 2), same), dtype=dtype)
        yield Recorded(f"max_pool_3x3_{short}", pool, stem)
        yield Recorded(
            f"avg_pool_2x2_{short}", pool, Pool("avg", None, Window(56, 56, 128, (2, 2), (2, 2)), dtype=dtype)
        )
        yield Recorded(f"global_mean_2048_{short}", GlobalMeans, GlobalMean(None, 49, 2048, dtype))
    seven = Depthwise(32, Window(56, 56, 96, (7, 7), pads=(3,) * 4), Epilogue(True), "bfloat16")
    yield Recorded("depthwise_7x7_bf16", depthwise, seven)
    yield Recorded(
        "max_pool_3x3_bf16", pool, Pool("max", 32, Window(112, 112, 64, (3, 3), (2, 2), same), dtype="bfloat16")
    )


def _contractions() -> Iterator[Recorded]:
    for short, dtype in _DTYPES.items():
        plain = ContractionSpec(None, 3072, 768, EpilogueProgram.plain(dtype), dtype=dtype)
        yield Recorded(f"mma_linear_{short}", mma, replace(plain, epilogue=_residual(dtype)))
        if short == "bf16":
            large = replace(plain, rows=4096, epilogue=_residual(dtype))
            yield Recorded(f"wgmma_linear_{short}", wgmma, large, ("sm_90a",))
            yield Recorded(f"wgmma_linear_dynamic_{short}", wgmma, plain, ("sm_90a",))
            continue
        geometry = ConvGeometry(32, 56, 56, (3, 3), pads=(1, 1, 1, 1))
        conv = ContractionSpec(32 * 56 * 56, 64, 576, _residual(dtype), dtype=dtype, conv=geometry)
        yield Recorded(f"mma_conv_3x3_{short}", mma, conv)
    narrow = ContractionSpec(256, 64, 256, _residual("float16"))
    yield Recorded("mma_linear_64_f16", mma, narrow)
    yield Recorded("mma_scores_f16", mma, ContractionSpec(128, 128, 64, EpilogueProgram.plain("float16"), batch=96))
    attention = AttentionSpec(8, 12, 128, 128, 64, 0.125, dtype="float16")
    yield Recorded("attention_64_f16", flash, attention)
    yield Recorded("attention_128_causal_bf16", flash, replace(attention, head_dim=128, causal=True, dtype="bfloat16"))


def _residual(dtype: str) -> EpilogueProgram:
    """y = relu(residual + acc + bias)"""
    operands = (EpilogueOperand("bias", dtype, column=True), EpilogueOperand.full("residual", dtype))
    steps = (
        EpilogueStep.of(OpKind.ADD, (0, 1)),
        EpilogueStep.of(OpKind.ADD, (3, 2)),
        EpilogueStep.of(OpKind.RELU, (4,)),
    )
    return EpilogueProgram((EpilogueOutput(5, dtype),), operands, steps)
