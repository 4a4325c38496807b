"""What our kernels are measured against on a GPU: a copy, a large product, Triton, torch eager, inductor, plain cuBLAS.

Nothing here needs TVM. A rival is a function of a region's buffers, like a candidate.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.gpu_set import Region
from rescompile.backends.cuda import reference

COPY_BYTES = 1 << 30
PRODUCT = 8192
ROUNDS = 20


def ceilings() -> dict[str, float]:
    """The device's own: bytes per second of a copy (read and written), FLOP/s of a large product by type."""
    import torch

    found = {"copy_bytes_per_s": 2 * COPY_BYTES / _copy_seconds()}
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        before = torch.backends.cuda.matmul.allow_tf32
        torch.backends.cuda.matmul.allow_tf32 = True
        try:
            seconds = _product_seconds(dtype)
        finally:
            torch.backends.cuda.matmul.allow_tf32 = before
        name = str(dtype).removeprefix("torch.")
        found[f"matmul_{'tf32' if name == 'float32' else name}_flop_per_s"] = 2 * PRODUCT**3 / seconds
    return found


def _copy_seconds() -> float:
    import torch

    source = torch.empty(COPY_BYTES // 2, dtype=torch.bfloat16, device="cuda").normal_()
    target = torch.empty_like(source)
    return _median_seconds(lambda: target.copy_(source))


def _product_seconds(dtype: Any) -> float:
    import torch

    a, b = (torch.randn(PRODUCT, PRODUCT, device="cuda", dtype=dtype) for _ in range(2))
    y = torch.empty_like(a)
    return _median_seconds(lambda: torch.mm(a, b.mT, out=y))


def _median_seconds(call: Callable[[], object]) -> float:
    import torch

    samples = []
    for index in range(ROUNDS + 3):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        if index >= 3:
            samples.append(start.elapsed_time(end) / 1e3)
    return median(samples)


def eager(region: Region) -> Callable[..., object] | None:
    """torch's own operations, one after the other, as a model in torch runs them; None where torch does not know it."""
    spec = region.data["spec"]
    names = [buffer.name for buffer in region.buffers]
    inputs = [buffer.name for buffer in region.buffers if not buffer.output]

    def run(*buffers: Any) -> object:
        given = dict(zip(names, buffers, strict=True))
        return reference.eager(spec, {name: given[name] for name in inputs})

    return run if spec["type"] in reference.KNOWN else None


def inductor(region: Region, mode: str) -> Callable[..., object] | None:
    """The same operations compiled by inductor; its outputs are its own, which costs it nothing."""
    import torch

    plain = eager(region)
    if plain is None:
        return None
    spec = region.data["spec"]
    names = [buffer.name for buffer in region.buffers]
    inputs = [buffer.name for buffer in region.buffers if not buffer.output]

    def forward(*given: Any) -> tuple[Any, ...]:
        made = reference.eager(spec, dict(zip(inputs, given, strict=True))) or {}
        return tuple(made.values())

    torch._dynamo.reset()
    compiled = torch.compile(forward, mode=mode, fullgraph=True, dynamic=False)

    def run(*buffers: Any) -> object:
        given = dict(zip(names, buffers, strict=True))
        return compiled(*(given[name] for name in inputs))

    return run


def alone(region: Region) -> Callable[..., object] | None:
    """cuBLAS's or cuDNN's contraction of the same shape without any epilogue."""
    call = region.alone()
    if call is None:
        return None
    function, wanted = call.function(), call.buffers
    names = [buffer.name for buffer in region.buffers]

    def run(*buffers: Any) -> object:
        given = dict(zip(names, buffers, strict=True))
        return function(*(given[name] for name in wanted))

    return run


def triton_add_norm(region: Region) -> Callable[..., object] | None:
    """A fused add + norm in Triton, one program a row, as its users write it; None for any other region."""
    spec: Mapping[str, Any] | None = region.data["norm"]
    if spec is None or not spec["residual"] or not spec["sum_output"] or not spec["weight"]:
        return None
    kernel = _triton_kernel()
    if kernel is None:
        return None
    rows, width = spec["rows"], spec["width"]
    block = 1 << (width - 1).bit_length()
    warps = min(32, max(1, block // 512))

    def run(x: Any, residual: Any, weight: Any, *rest: Any) -> object:
        *bias, y, total = rest
        return kernel[(rows,)](
            x, residual, weight, bias[0] if bias else x, y, total, width, spec["eps"],
            block=block, layer=spec["kind"] == "layer", has_bias=bool(bias), num_warps=warps,
        )  # fmt: skip

    return run


@cache
def _triton_kernel() -> Any:
    """The kernel, None where Triton is not installed."""
    try:
        from benchmarks.gpu_triton import add_norm
    except ImportError:
        return None
    return add_norm


def main() -> None:
    """python -m benchmarks.gpu_rivals OUT.json: the device's ceilings."""
    path = Path(sys.argv[1])
    path.write_text(json.dumps(ceilings(), indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
