"""What a kernel computes: frozen, hashable, everything its code depends on."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import prod
from typing import TYPE_CHECKING

from rescompile.errors import RescompileError

if TYPE_CHECKING:
    from rescompile.backends.kernels.tail import Tail

ACTIVATIONS = ("none", "relu", "relu6", "gelu", "gelu_tanh", "silu", "sigmoid", "tanh", "hardswish")
DTYPES = ("float32", "float64", "float16", "bfloat16")

Pair = tuple[int, int]


@dataclass(frozen=True)
class Argument:
    """One buffer of a kernel. A dimension of None is the dynamic row count.

    shared: the kernel writes a part of it, and what else it holds stays.
    """

    name: str
    shape: tuple[int | None, ...]
    dtype: str
    output: bool = False
    shared: bool = False


@dataclass(frozen=True)
class Epilogue:
    """y = outer(residual + inner(acc + bias))"""

    bias: bool = False
    residual: bool = False
    inner: str = "none"
    outer: str = "none"

    def __post_init__(self) -> None:
        for name in (self.inner, self.outer):
            if name not in ACTIVATIONS:
                raise RescompileError(
                    f"No kernel applies the activation '{name}'; use one of {', '.join(ACTIVATIONS)}."
                )


@dataclass(frozen=True)
class ConvSpec:
    """y[n, oh, ow, oc] = epilogue(sum over kh, kw, ic of x[n, oh*s+kh*d-p, ow*s+kw*d-p, ic] * w[oc, ic, kh, kw])

    Activations are NHWC. A border (vertical, horizontal) is a frame of zeros that lies physically around a
    buffer: x has shape (N, H + 2*vertical, W + 2*horizontal, C). A border at least as wide as the padding saves
    the padding pass; a narrower one costs a padded copy inside the kernel. The kernel writes the zeros of its
    own `out_border`. A 1-D convolution has height 1 and kernel (1, kw). Grouped weights are made dense over a few
    neighbouring groups where a group is narrower than a register, so an infinity in one group can reach its
    neighbours as NaN. With `in_pitch` x is channels `in_first` to `in_first` + in_channels of a buffer of that many.
    A `tail` follows the epilogue, and then says where the results go.
    """

    batch: int
    height: int
    width: int
    in_channels: int
    out_channels: int
    kernel: Pair = (1, 1)
    stride: Pair = (1, 1)
    pads: tuple[int, int, int, int] = (0, 0, 0, 0)  # top, left, bottom, right
    dilation: Pair = (1, 1)
    groups: int = 1
    in_border: Pair = (0, 0)
    out_border: Pair = (0, 0)
    residual_border: Pair = (0, 0)
    epilogue: Epilogue = field(default_factory=Epilogue)
    dtype: str = "float32"
    in_pitch: int = 0
    in_first: int = 0
    tail: Tail | None = None

    def __post_init__(self) -> None:
        _check_dtype(self.dtype)
        if self.in_channels % self.groups or self.out_channels % self.groups:
            raise RescompileError(
                f"A convolution from {self.in_channels} to {self.out_channels} channels cannot have "
                f"{self.groups} groups; both must be multiples of it."
            )
        if min(self.batch, self.out_height, self.out_width, *self.stride, *self.dilation) < 1 or min(self.pads) < 0:
            raise RescompileError(f"The convolution {self} has no output; check input size, kernel, pads and strides.")

    @property
    def out_height(self) -> int:
        """Output rows, the border not counted."""
        reach = (self.kernel[0] - 1) * self.dilation[0] + 1
        return (self.height + self.pads[0] + self.pads[2] - reach) // self.stride[0] + 1

    @property
    def out_width(self) -> int:
        """Output columns, the border not counted."""
        reach = (self.kernel[1] - 1) * self.dilation[1] + 1
        return (self.width + self.pads[1] + self.pads[3] - reach) // self.stride[1] + 1

    @property
    def depthwise(self) -> bool:
        """One filter per channel, no mixing across channels."""
        return self.groups == self.in_channels == self.out_channels and self.groups > 1

    @property
    def flops(self) -> int:
        """Floating point operations: two per multiply-add."""
        taps = prod(self.kernel) * self.in_channels // self.groups
        return 2 * self.batch * self.out_height * self.out_width * self.out_channels * taps


@dataclass(frozen=True)
class LinearSpec:
    """y[m, n] = epilogue(sum over k of x[m, k] * w[n, k]); `rows` None leaves the row count to run time.

    With `in_pitch` x is columns `in_first` to `in_first` + in_features of a matrix of that many. A `tail` follows the
    epilogue, and then says where the results go.
    """

    rows: int | None
    in_features: int
    out_features: int
    epilogue: Epilogue = field(default_factory=Epilogue)
    dtype: str = "float32"
    in_pitch: int = 0
    in_first: int = 0
    tail: Tail | None = None

    def __post_init__(self) -> None:
        _check_dtype(self.dtype)
        if min(self.in_features, self.out_features, 1 if self.rows is None else self.rows) < 1:
            raise RescompileError(f"The linear {self} is empty; every extent must be at least 1.")

    @property
    def flops(self) -> int:
        """Floating point operations; per row where the row count is dynamic."""
        return 2 * (self.rows or 1) * self.in_features * self.out_features


@dataclass(frozen=True)
class LayoutSpec:
    """y = x in another layout; `source` and `target` are "NCHW" or "NHWC", not both NCHW.

    A border belongs to an NHWC side; y's is filled with zeros.
    """

    batch: int
    height: int
    width: int
    channels: int
    source: str = "NCHW"
    target: str = "NHWC"
    in_border: Pair = (0, 0)
    out_border: Pair = (0, 0)
    dtype: str = "float32"

    def __post_init__(self) -> None:
        if {self.source, self.target} - {"NCHW", "NHWC"} or self.source == self.target == "NCHW":
            raise RescompileError(f"No copy from {self.source} to {self.target}; at least one side must be NHWC.")


@dataclass(frozen=True)
class AttentionSpec:
    """out = softmax(scale * q·kᵀ + mask)·v, per head; kv_heads divides heads (grouped queries).

    Attributes:
        layout: "qkv": one buffer (B, S, (heads + 2*kv_heads)*head_dim) holding q, k, v side by side;
            "bshd": q (B, q_len, heads, head_dim), k and v (B, k_len, kv_heads, head_dim);
            "bhsd": q (B, heads, q_len, head_dim), k and v (B, kv_heads, k_len, head_dim).
        out_layout: "bshd" (B, q_len, heads, head_dim) or "bhsd" (B, heads, q_len, head_dim).
        causal: query i sees keys j <= i, counted from the first of each (as torch's is_causal).
        mask: "none", "additive" (spec dtype, added to the scaled scores) or "keep" (bool, False hides the key).
        mask_shape: 4 extents, each 1 or that of (B, heads, q_len, k_len).
    """

    batch: int
    heads: int
    q_len: int
    k_len: int
    head_dim: int
    scale: float
    kv_heads: int | None = None  # None: as many as heads
    causal: bool = False
    mask: str = "none"
    mask_shape: tuple[int, int, int, int] = (1, 1, 1, 1)
    layout: str = "bshd"
    out_layout: str = "bshd"
    dtype: str = "float32"

    def __post_init__(self) -> None:
        _check_dtype(self.dtype)
        if self.kv_heads is None:
            object.__setattr__(self, "kv_heads", self.heads)
        if self.layout not in ("qkv", "bshd", "bhsd") or self.out_layout not in ("bshd", "bhsd"):
            raise RescompileError(f"No attention kernel for the layouts {self.layout} and {self.out_layout}.")
        if self.mask not in ("none", "additive", "keep"):
            raise RescompileError(f"No attention mask of kind '{self.mask}'; use none, additive or keep.")
        if self.heads % self.shared_heads:
            raise RescompileError(
                f"{self.heads} query heads cannot share {self.kv_heads} key heads; it must divide them."
            )
        if self.layout == "qkv" and self.q_len != self.k_len:
            raise RescompileError("A packed qkv buffer has as many queries as keys; pass q, k and v separately.")
        full = (self.batch, self.heads, self.q_len, self.k_len)
        if self.mask != "none" and any(m not in (1, n) for m, n in zip(self.mask_shape, full, strict=True)):
            raise RescompileError(f"A mask of shape {self.mask_shape} does not broadcast to {full}.")

    @property
    def shared_heads(self) -> int:
        """Key and value heads."""
        return self.kv_heads or self.heads

    @property
    def flops(self) -> int:
        """Of the two matrix products, masked parts included."""
        return 4 * self.batch * self.heads * self.q_len * self.k_len * self.head_dim


@dataclass(frozen=True)
class NormSpec:
    """s = x + residual; y = N(s) * weight + bias over the last axis; s is a second output where `sum_output`.

    "layer": N(s) = (s - mean) / sqrt(var + eps) in two passes; "rms": N(s) = s / sqrt(mean(s²) + eps).
    `rows` None leaves the row count to run time.
    """

    rows: int | None
    width: int
    kind: str = "layer"
    residual: bool = False
    sum_output: bool = False
    weight: bool = True
    bias: bool = True
    eps: float = 1e-5
    dtype: str = "float32"

    def __post_init__(self) -> None:
        _check_dtype(self.dtype)
        if self.kind not in ("layer", "rms"):
            raise RescompileError(f"No kernel for the norm '{self.kind}'; use layer or rms.")
        if self.sum_output and not self.residual:
            raise RescompileError("A norm without a residual has no sum to output.")


@dataclass(frozen=True)
class SoftmaxSpec:
    """y = softmax(x) over the last axis, or its logarithm; `rows` None leaves the row count to run time."""

    rows: int | None
    width: int
    log: bool = False
    dtype: str = "float32"

    def __post_init__(self) -> None:
        _check_dtype(self.dtype)


@dataclass(frozen=True)
class PoolSpec:
    """y[n, oh, ow, c] = max or mean of x over a window, NHWC, with borders as for `ConvSpec`.

    The border of x is never read: a maximum ignores padding, a mean counts it as zeros (`count_include_pad`) or not.
    `in_pitch`, `in_first` and `tail` as there.
    """

    kind: str
    batch: int
    height: int
    width: int
    channels: int
    kernel: Pair
    stride: Pair
    pads: tuple[int, int, int, int] = (0, 0, 0, 0)
    dilation: Pair = (1, 1)
    ceil: bool = False
    count_include_pad: bool = True
    in_border: Pair = (0, 0)
    out_border: Pair = (0, 0)
    dtype: str = "float32"
    in_pitch: int = 0
    in_first: int = 0
    tail: Tail | None = None

    def __post_init__(self) -> None:
        _check_dtype(self.dtype)
        if self.kind not in ("max", "avg"):
            raise RescompileError(f"No kernel for the pool '{self.kind}'; use max or avg.")
        if min(self.out_height, self.out_width) < 1:
            raise RescompileError(f"The pool {self} has no output; check input size, kernel, pads and strides.")

    def _extent(self, axis: int) -> int:
        size = (self.height, self.width)[axis]
        before, after = self.pads[axis], self.pads[axis + 2]
        reach = (self.kernel[axis] - 1) * self.dilation[axis] + 1
        spare = size + before + after - reach
        count = (-(-spare // self.stride[axis]) if self.ceil else spare // self.stride[axis]) + 1
        # torch: a window rounded up must still start inside the input or the padding before it.
        if self.ceil and (count - 1) * self.stride[axis] >= size + before:
            count -= 1
        return count

    @property
    def out_height(self) -> int:
        """Output rows, the border not counted."""
        return self._extent(0)

    @property
    def out_width(self) -> int:
        """Output columns, the border not counted."""
        return self._extent(1)


@dataclass(frozen=True)
class GlobalMeanSpec:
    """y[n, c] = mean over h, w of x[n, h, w, c]"""

    batch: int
    height: int
    width: int
    channels: int
    in_border: Pair = (0, 0)
    dtype: str = "float32"

    def __post_init__(self) -> None:
        _check_dtype(self.dtype)


def _check_dtype(dtype: str) -> None:
    if dtype not in DTYPES:
        raise RescompileError(f"CPU kernels are not made for {dtype}; cast to one of {', '.join(DTYPES)}.")


def compute_dtype(dtype: str) -> str:
    """The type that sums are held in: float32 also for the 16-bit types. Masks stay bool, integers integers."""
    return "float32" if dtype in ("float16", "bfloat16") else dtype
