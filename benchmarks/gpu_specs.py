"""What the GPU benchmark measures: residual regions of common widths, each as a spec with the families that serve it.

An entry's name is `group/shape/dtype`. The first entries of a group are the ones to run where time is short.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from rescompile.backends.cuda import composed, depthwise, flash, mma, pool, region_kernel, softmax, wgmma
from rescompile.backends.cuda.contraction import (
    ContractionSpec,
    ConvGeometry,
    EpilogueOperand,
    EpilogueOutput,
    EpilogueProgram,
    EpilogueStep,
)
from rescompile.backends.cuda.region_spec import RegionSpec, Tensor, norm_spec
from rescompile.backends.cuda.rows import row_tile
from rescompile.backends.cuda.softmax import RowSoftmax
from rescompile.backends.cuda.targets import Architecture
from rescompile.backends.cuda.windows import Window
from rescompile.backends.kernels import AttentionSpec, Epilogue, NormSpec
from rescompile.fused_region import Region, Step
from rescompile.kinds import OpKind

ELEMENTS = 1 << 25  # of a tensor that rows are measured on: larger than the L2 cache in any type
TENSOR_CORES = (wgmma, mma)


@dataclass(frozen=True)
class Entry:
    """A region to measure. `norm`: what it is in the words of the CPU's norms, where it is one."""

    name: str
    spec: Any
    families: tuple[Any, ...]
    norm: NormSpec | None = None

    @property
    def group(self) -> str:
        """The first part of the name."""
        return self.name.partition("/")[0]


def entries(*, small: bool = False) -> list[Entry]:
    """Everything, the most telling first within each group; `small`: a few tiny ones, for a simulated device."""
    if small:
        return list(_small())
    return [*_norms(), *_softmaxes(), *_linears(), *_convolutions(), *_windows(), *_elements(), *_attentions()]


# ---- rows ------------------------------------------------------------------------------------------------------


def norm_entry(width: int, kind: str, dtype: str, rows: int | None = None, *, fused: bool = True) -> Entry:
    """add + norm with both outputs, or the norm alone."""
    rows = ELEMENTS // width if rows is None else rows
    spec = NormSpec(rows, width, kind, residual=fused, sum_output=fused, bias=kind == "layer", dtype=dtype)
    name = f"{'add_' if fused else ''}{kind}_norm/{rows}x{width}/{dtype}"
    return Entry(name, norm_spec(spec), (region_kernel,), spec)


def _norms() -> Iterator[Entry]:
    for dtype in ("bfloat16", "float16", "float32"):
        for width in (4096, 1024, 8192, 2048, 16384):
            for kind in ("rms", "layer"):
                yield norm_entry(width, kind, dtype)
    for width in (768, 64, 256, 5120, 3000, 32768, 65536):
        yield norm_entry(width, "layer", "bfloat16")
    # What a model of batch 1 has: it lies in the cache, and the launch counts.
    yield norm_entry(768, "layer", "float16", 128)
    yield norm_entry(768, "layer", "float16", 32 * 128)
    yield norm_entry(4096, "rms", "bfloat16", 2048)
    yield norm_entry(4096, "rms", "bfloat16", fused=False)


def _softmaxes() -> Iterator[Entry]:
    for width, dtype in (
        (4096, "bfloat16"),
        (1024, "float16"),
        (128, "float16"),
        (16384, "bfloat16"),
        (2048, "float32"),
    ):
        rows = ELEMENTS // width
        yield Entry(f"softmax/{rows}x{width}/{dtype}", RowSoftmax(rows, width, dtype, dtype), (_rows_family(softmax),))


def _elements() -> Iterator[Entry]:
    """Gates, group norms, concatenations: what memory bounds, without a norm over rows."""
    rows = ELEMENTS // 8192
    wide = Tensor((rows, 8192), "bfloat16")
    gate = Region(2, (Step(OpKind.SILU, (0,)), Step(OpKind.MUL, (2, 1))), (3,))
    yield Entry(f"gated/{rows}x8192/bfloat16", RegionSpec(gate.text(), (wide, wide), (wide,)), (region_kernel,))
    highway = Region(3, (Step(OpKind.SIGMOID, (0,)), Step(OpKind.ADD, (1, 2), {"scales": (1.0, -1.0)}),
                         Step(OpKind.MUL, (3, 4)), Step(OpKind.ADD, (2, 5))), (6,))  # fmt: skip
    yield Entry(
        f"gated/highway {rows}x8192/bfloat16", RegionSpec(highway.text(), (wide,) * 3, (wide,)), (region_kernel,)
    )
    last = (0, 2, 3, 1)
    image, vector = Tensor((32, 512, 32, 32), "float16", last), Tensor((512,), "float16")
    steps = (Step(OpKind.ADD, (0, 1)), Step(OpKind.GROUP_NORM, (4, 2, 3), {"groups": 32}), Step(OpKind.SILU, (5,)))
    norm = RegionSpec(Region(4, steps, (6, 4)).text(), (image, image, vector, vector), (image, image))
    yield Entry("group_norm/b32 512x32² 32 groups +add +silu/float16", norm, (region_kernel,))
    old, new = Tensor((32, 256, 28, 28), "float16", last), Tensor((32, 32, 28, 28), "float16", last)
    both = Tensor((32, 288, 28, 28), "float16", last)
    concat = Region(2, (Step(OpKind.CONCAT, (0, 1), {"axis": 1}), Step(OpKind.RELU, (2,))), (3,))
    yield Entry("concat/b32 256+32 28² +relu/float16", RegionSpec(concat.text(), (old, new), (both,)), (region_kernel,))


class _rows_family:
    """A module over rows that knows one tile for each spec, as a kernel family."""

    def __init__(self, module: Any) -> None:
        self.module, self.__name__ = module, module.__name__
        self.arguments = module.arguments

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _rows_family) and self.module is other.module

    def __hash__(self) -> int:
        return hash(self.module)

    def refusal(self, spec: Any, limits: Architecture | None) -> str:
        """Whether the module takes the spec."""
        return "" if self.module.takes(spec) else "its rows are too wide"

    def candidates(self, spec: Any, limits: Architecture) -> list[Any]:
        """The one tile."""
        return [row_tile(spec.width, spec.dtype)]

    def prim_func(self, spec: Any, tile: Any, name: str) -> Any:
        """The kernel."""
        return self.module.prim_func(spec, name)


# ---- contractions ----------------------------------------------------------------------------------------------


def program(
    dtype: str, *, bias: bool = True, residual: bool = False, act: str = "", first: bool = False
) -> EpilogueProgram:
    """y = act(acc + bias + residual); act(acc + bias) + residual with `first`."""
    operands = [EpilogueOperand("bias", dtype, column=True)] if bias else []
    operands += [EpilogueOperand.full("residual", dtype)] if residual else []
    places = {operand.name: 1 + index for index, operand in enumerate(operands)}
    steps: list[EpilogueStep] = []
    place = 0
    for name in ("bias", "act", "residual") if first else ("bias", "residual", "act"):
        if name in places:
            steps.append(EpilogueStep.of(OpKind.ADD, (place, places[name])))
        elif name == "act" and act:
            attrs = {"approximate": "tanh" if act == "gelu_tanh" else "none"} if act.startswith("gelu") else {}
            steps.append(EpilogueStep.of(OpKind(act.partition("_")[0]), (place,), attrs))
        else:
            continue
        place = len(operands) + len(steps)
    return EpilogueProgram((EpilogueOutput(place, dtype),), tuple(operands), tuple(steps))


def linear_entry(rows: int, depth: int, columns: int, dtype: str, label: str, **epilogue: Any) -> Entry:
    """x·weightᵀ with an epilogue."""
    spec = ContractionSpec(rows, columns, depth, program(dtype, **epilogue), dtype=dtype)
    return Entry(f"linear/{rows}x{depth}x{columns}{_told(epilogue)} {label}/{dtype}", spec, TENSOR_CORES)


def conv_entry(
    images: int, size: int, inner: int, outer: int, kernel: int, stride: int, dtype: str = "float16", **epilogue: Any
) -> Entry:
    """A square convolution, channels last, padded so that stride 1 keeps the size."""
    edge = kernel // 2
    geometry = ConvGeometry(images, size, size, (kernel, kernel), (stride, stride), (edge, edge, edge, edge))
    rows = images * geometry.pixels
    spec = ContractionSpec(rows, outer, inner * kernel * kernel, program(dtype, **epilogue), dtype=dtype, conv=geometry)
    shape = f"b{images} {size}² {inner}→{outer} {kernel}×{kernel}/{stride}".replace("×", "x")
    return Entry(f"conv/{shape}{_told(epilogue)}/{dtype}", spec, TENSOR_CORES)


def _linears() -> Iterator[Entry]:
    join = {"residual": True}
    for rows, where in ((32 * 128, "BERT b32"), (128, "BERT b1")):
        yield linear_entry(rows, 3072, 768, "float16", where, **join)
        yield linear_entry(rows, 768, 3072, "float16", where, act="gelu")
        yield linear_entry(rows, 768, 768, "float16", where, **join)
        yield linear_entry(rows, 768, 2304, "float16", where)
    for rows in (2048, 8192, 1):
        yield linear_entry(rows, 4096, 4096, "bfloat16", "Llama", bias=False, residual=True)
        yield linear_entry(rows, 11008, 4096, "bfloat16", "Llama", bias=False, residual=True)
        yield linear_entry(rows, 4096, 11008, "bfloat16", "Llama", bias=False, act="silu")
    yield linear_entry(8192, 8192, 8192, "bfloat16", "square", bias=False, residual=True)
    yield linear_entry(8192, 8192, 8192, "float16", "square", residual=True, act="relu")
    yield linear_entry(4096, 1024, 4096, "float32", "tf32", residual=True)
    yield linear_entry(197 * 32, 768, 3072, "float16", "ViT b32", act="gelu")
    for batch, size, depth in ((12 * 32, 128, 64), (32 * 4, 2048, 128)):
        spec = ContractionSpec(size, size, depth, EpilogueProgram.plain("float16"), batch=batch, dtype="float16")
        yield Entry(f"matmul/{batch}x{size}x{depth}x{size}/float16", spec, TENSOR_CORES)


def _convolutions() -> Iterator[Entry]:
    join, relu = {"residual": True, "act": "relu"}, {"act": "relu"}
    for images in (32, 1, 128):
        yield conv_entry(images, 56, 64, 64, 3, 1, **relu)
        yield conv_entry(images, 56, 64, 256, 1, 1, **join)
        yield conv_entry(images, 14, 256, 256, 3, 1, **relu)
        yield conv_entry(images, 14, 256, 1024, 1, 1, **join)
        if images == 128:
            continue
        yield conv_entry(images, 28, 512, 128, 1, 1, **relu)
        yield conv_entry(images, 28, 128, 512, 1, 1, **join)
        yield conv_entry(images, 7, 512, 2048, 1, 1, **join)
        yield conv_entry(images, 7, 512, 512, 3, 1, **relu)
        yield conv_entry(images, 56, 128, 128, 3, 2, **relu)
        yield conv_entry(images, 56, 256, 512, 1, 2)


def _attentions() -> Iterator[Entry]:
    """Packed queries, keys and values, as one projection writes them."""
    for batch, heads, length, size, causal, dtype in (
        (32, 12, 128, 64, False, "float16"),
        (1, 12, 128, 64, False, "float16"),
        (32, 12, 197, 64, False, "float16"),
        (1, 16, 2048, 128, True, "bfloat16"),
        (4, 32, 2048, 128, True, "bfloat16"),
    ):
        scale = size**-0.5
        spec = AttentionSpec(batch, heads, length, length, size, scale, causal=causal, layout="qkv", dtype=dtype)
        told = " causal" if causal else ""
        yield Entry(f"attention/b{batch} {heads}x{length}x{size}{told}/{dtype}", spec, (flash, composed))


def _windows() -> Iterator[Entry]:
    big = Window(112, 112, 64, (3, 3), (2, 2), (1, 1, 1, 1))
    yield Entry("pool/b32 112² 64 3x3/2 max/float16", pool.Pool("max", 32, big, dtype="float16"), (pool,))
    means = pool.GlobalMean(128, 49, 2048, "float16")
    yield Entry("pool/b128 7² 2048 mean/float16", means, (pool.GlobalMeans,))
    for channels, size in ((96, 56), (384, 14)):
        window = Window(size, size, channels, (7, 7), (1, 1), (3, 3, 3, 3))
        spec = depthwise.Depthwise(32, window, Epilogue(bias=True), "float16")
        yield Entry(f"depthwise/b32 {size}² {channels} 7x7/float16", spec, (depthwise,))


def _small() -> Iterator[Entry]:
    yield norm_entry(96, "layer", "float16", 7)
    yield norm_entry(64, "rms", "float32", 5)
    image, vector = Tensor((2, 16, 3, 5), "float16", (0, 2, 3, 1)), Tensor((16,), "float16")
    steps = (Step(OpKind.ADD, (0, 1)), Step(OpKind.GROUP_NORM, (4, 2, 3), {"groups": 4}), Step(OpKind.SILU, (5,)))
    norm = RegionSpec(Region(4, steps, (6, 4)).text(), (image, image, vector, vector), (image, image))
    yield Entry("group_norm/b2 16x3x5 +add +silu/float16", norm, (region_kernel,))
    yield Entry("softmax/6x40/float32", RowSoftmax(6, 40), (_rows_family(softmax),))
    yield Entry(
        "linear/24x32x16/float16",
        ContractionSpec(24, 16, 32, program("float16", residual=True, act="relu"), dtype="float16"),
        (mma,),
    )


def _told(epilogue: dict[str, Any]) -> str:
    words = ["bias"] if epilogue.get("bias", True) else []
    words += [str(epilogue["act"])] if epilogue.get("act") and epilogue.get("first") else []
    words += ["add"] if epilogue.get("residual") else []
    words += [str(epilogue["act"])] if epilogue.get("act") and not epilogue.get("first") else []
    return "".join(f" +{word}" for word in words)
