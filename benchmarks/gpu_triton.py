"""A fused residual add + LayerNorm or RMSNorm in Triton, something to beat. Importing it needs Triton."""

# Triton reads the source of this function: its annotations are values, not text.
import triton
import triton.language as tl


@triton.jit
def add_norm(
    x,
    residual,
    weight,
    bias,
    y,
    total,
    width,
    eps,
    block: tl.constexpr,
    layer: tl.constexpr,
    has_bias: tl.constexpr,
):  # type: ignore[no-untyped-def]
    """total = x + residual; y = (total − mean) / sqrt(var + eps) · weight + bias, or without the mean."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, block)
    inside = column < width
    at = row * width + column
    summed = tl.load(x + at, mask=inside, other=0.0) + tl.load(residual + at, mask=inside, other=0.0)
    tl.store(total + at, summed, mask=inside)
    value = summed.to(tl.float32)
    if layer:
        mean = tl.sum(value, 0) / width
        value = tl.where(inside, value - mean, 0.0)
    scale = tl.rsqrt(tl.sum(value * value, 0) / width + eps)
    value = value * scale * tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    if has_bias:
        value += tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + at, value.to(y.dtype.element_ty), mask=inside)
