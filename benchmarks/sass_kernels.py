"""The kernels whose machine code is recorded: of each family some specs that models bring, one tile each."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from rescompile.backends.cuda import add_norm, depthwise, mma, pool, softmax, wgmma
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
from rescompile.backends.cuda.softmax import RowSoftmax
from rescompile.backends.cuda.targets import architecture
from rescompile.backends.cuda.windows import Window
from rescompile.backends.kernels import Epilogue, NormSpec
from rescompile.kinds import OpKind

EVERYWHERE = ("sm_80", "sm_90")
ARCHITECTURES = (*EVERYWHERE, "sm_90a")
_SHORT = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}


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
    rms = NormSpec(None, 4096, "rms", residual=True, sum_output=True, bias=False)
    for dtype, short in _SHORT.items():
        for width in (64, 768, 1024, 4096, 16384):
            yield Recorded(f"add_layer_norm_{width}_{short}", add_norm, replace(layer, width=width, dtype=dtype))
        yield Recorded(f"add_rms_norm_4096_{short}", add_norm, replace(rms, dtype=dtype))
        yield Recorded(f"softmax_197_{short}", softmax, RowSoftmax(None, 197, dtype, dtype))
        yield Recorded(f"softmax_1024_{short}", softmax, RowSoftmax(None, 1024, dtype, dtype))
    plain = NormSpec(None, 768, "layer", dtype="float16")
    yield Recorded("layer_norm_768_f16", add_norm, plain)
    yield Recorded("add_layer_norm_1000_f16", add_norm, replace(layer, width=1000, dtype="float16"))
    yield Recorded("add_layer_norm_77_bf16", add_norm, replace(layer, width=77, dtype="bfloat16"))


def _windows() -> Iterator[Recorded]:
    same = (1, 1, 1, 1)
    relu6, hardswish = Epilogue(True, inner="relu6"), Epilogue(True, True, "hardswish")
    for dtype, short in _SHORT.items():
        three = Depthwise(None, Window(56, 56, 128, (3, 3), pads=same), relu6, dtype)
        yield Recorded(f"depthwise_3x3_{short}", depthwise, three)
        half = replace(three, window=replace(three.window, stride=(2, 2)), epilogue=hardswish)
        yield Recorded(f"depthwise_3x3_stride2_{short}", depthwise, half)
        five = Depthwise(32, Window(28, 28, 240, (5, 5), pads=(2,) * 4), relu6, dtype)
        yield Recorded(f"depthwise_5x5_{short}", depthwise, five)
        seven = Depthwise(32, Window(56, 56, 96, (7, 7), pads=(3,) * 4), Epilogue(True), dtype)
        yield Recorded(f"depthwise_7x7_{short}", depthwise, seven)
        stem = Pool("max", 32, Window(112, 112, 64, (3, 3), (2, 2), same), dtype=dtype)
        yield Recorded(f"max_pool_3x3_{short}", pool, stem)
        yield Recorded(
            f"avg_pool_2x2_{short}", pool, Pool("avg", None, Window(56, 56, 128, (2, 2), (2, 2)), dtype=dtype)
        )
        yield Recorded(f"global_mean_2048_{short}", GlobalMeans, GlobalMean(None, 49, 2048, dtype))


def _contractions() -> Iterator[Recorded]:
    for dtype, short in _SHORT.items():
        plain = ContractionSpec(None, 3072, 768, EpilogueProgram.plain(dtype), dtype=dtype)
        narrow = ContractionSpec(256, 64, 256, _residual(dtype), dtype=dtype)
        geometry = ConvGeometry(32, 56, 56, (3, 3), pads=(1, 1, 1, 1))
        conv = ContractionSpec(32 * 56 * 56, 64, 576, _residual(dtype), dtype=dtype, conv=geometry)
        scores = ContractionSpec(128, 128, 64, EpilogueProgram.plain(dtype), batch=96, dtype=dtype)
        yield Recorded(f"mma_linear_{short}", mma, replace(plain, epilogue=_residual(dtype)))
        yield Recorded(f"mma_linear_64_{short}", mma, narrow)
        yield Recorded(f"mma_conv_3x3_{short}", mma, conv)
        yield Recorded(f"mma_scores_{short}", mma, scores)
        if dtype != "float32":
            large = replace(plain, rows=4096, epilogue=_residual(dtype))
            yield Recorded(f"wgmma_linear_{short}", wgmma, large, ("sm_90a",))
            yield Recorded(f"wgmma_linear_dynamic_{short}", wgmma, plain, ("sm_90a",))


def _residual(dtype: str) -> EpilogueProgram:
    """y = relu(residual + acc + bias)"""
    operands = (EpilogueOperand("bias", dtype, column=True), EpilogueOperand.full("residual", dtype))
    steps = (
        EpilogueStep.of(OpKind.ADD, (0, 1)),
        EpilogueStep.of(OpKind.ADD, (3, 2)),
        EpilogueStep.of(OpKind.RELU, (4,)),
    )
    return EpilogueProgram((EpilogueOutput(5, dtype),), operands, steps)
