"""Kernels one by one against torch (oneDNN): python -m benchmarks.kernels [--threads N] [--out FILE]

Prints microseconds, GFLOP/s and percent of this machine's multiply-add ceiling for regions of ResNet-50 and BERT-base,
bias, residual and activation included. Competitors run in blocks, not call by call: a library's idle workers spin
for a while, and would slow down whatever comes next.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import tvm

from rescompile.backends import kernels
from rescompile.backends.kernels import AttentionSpec, ConvSpec, Epilogue, LinearSpec, Machine, NormSpec
from rescompile.backends.kernels.chooser import own_core
from rescompile.backends.kernels.emit import lanes, let, local, parallel, prim_func, serial

ROUNDS, CALLS = 5, 7
PAUSE_S = 0.05  # lets the other library's workers fall asleep

JOIN = Epilogue(bias=True, residual=True, outer="relu")
RELU6 = Epilogue(bias=True, outer="relu6")
SAME = (1, 1, 1, 1)
REGIONS: dict[str, kernels.Spec] = {
    "conv 3x3 64->64, 56x56": ConvSpec(1, 56, 56, 64, 64, (3, 3), pads=SAME, in_border=(1, 1), epilogue=JOIN),
    "conv 1x1 256->64, 56x56": ConvSpec(1, 56, 56, 256, 64, epilogue=JOIN),
    "conv 1x1 64->256, 56x56": ConvSpec(1, 56, 56, 64, 256, epilogue=JOIN),
    "conv 3x3 256->256, 14x14": ConvSpec(1, 14, 14, 256, 256, (3, 3), pads=SAME, in_border=(1, 1), epilogue=JOIN),
    "conv 1x1 2048->512, 7x7": ConvSpec(1, 7, 7, 2048, 512, epilogue=JOIN),
    "conv 3x3 512->512, 7x7": ConvSpec(1, 7, 7, 512, 512, (3, 3), pads=SAME, in_border=(1, 1), epilogue=JOIN),
    "conv 7x7 3->64, 224x224": ConvSpec(
        1, 224, 224, 3, 64, (7, 7), (2, 2), (3, 3, 3, 3), in_border=(3, 3), epilogue=Epilogue(bias=True, outer="relu")
    ),
    "depthwise 3x3 144, 56x56": ConvSpec(
        1,
        56,
        56,
        144,
        144,
        (3, 3),
        pads=SAME,
        groups=144,
        in_border=(1, 1),
        epilogue=Epilogue(bias=True, outer="relu6"),
    ),
    "linear 128x768->3072, gelu": LinearSpec(128, 768, 3072, Epilogue(bias=True, inner="gelu")),
    "linear 128x3072->768, add": LinearSpec(128, 3072, 768, Epilogue(bias=True, residual=True)),
    "linear 1x2048->1000": LinearSpec(1, 2048, 1000, Epilogue(bias=True)),
    "attention 12x128x64": AttentionSpec(1, 12, 128, 128, 64, 0.125, layout="bhsd", out_layout="bhsd"),
    "add + layer norm 128x768": NormSpec(128, 768, residual=True, sum_output=True),
}
ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "none": lambda x: x,
    "relu": F.relu,
    "relu6": F.relu6,
    "gelu": F.gelu,
}


@dataclass
class Row:
    """One region: microseconds (minimum and median) of the kernel and of torch."""

    region: str
    tile: str
    kernel_us: float
    kernel_median_us: float
    torch_us: float
    torch_median_us: float
    gflops: float
    percent: float


def ceiling_gflops(machine: Machine) -> float:
    """Multiply-adds on registers alone, all threads, two operations each."""
    chains, steps, width = 12, 1_000_000, machine.lanes  # long enough that starting the threads costs nothing

    def body(y: Any) -> None:
        with parallel(machine.threads) as task:
            sums = [local(width, "float32") for _ in range(chains)]
            for total in sums:
                with lanes(width) as lane:
                    total.store(lane, y[task * width + lane])
            factor = let(y[0])
            with serial(steps):
                for total in sums:
                    with lanes(width) as lane:
                        total.store(lane, total[lane] * factor + factor)
            for total in sums:
                with lanes(width) as lane:
                    y.store(task * width + lane, y[task * width + lane] + total[lane])

    argument = kernels.Argument("y", (machine.threads * width,), "float32", output=True)
    built = tvm.compile(tvm.IRModule({"f": prim_func("f", [argument], body)}), target=machine.tvm_target())
    y = torch.full((machine.threads * width,), 1e-3)
    best = min(timed(lambda: built["f"](y)) for _ in range(50))
    return 2 * chains * steps * width * machine.threads / best / 1e9


def timed(call: Callable[[], Any]) -> float:
    """Seconds of one call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def reference(spec: kernels.Spec, tensors: dict[str, torch.Tensor]) -> Callable[[], Any]:
    """What torch needs for the same region, its tensors in the layout it likes best."""
    if isinstance(spec, ConvSpec):
        like = torch.channels_last
        x = torch.randn(spec.batch, spec.in_channels, spec.height, spec.width).to(memory_format=like)
        w = torch.randn(spec.out_channels, spec.in_channels // spec.groups, *spec.kernel).to(memory_format=like)
        b = torch.randn(spec.out_channels)
        r = torch.randn(spec.batch, spec.out_channels, spec.out_height, spec.out_width).to(memory_format=like)
        outer = ACTIVATIONS[spec.epilogue.outer]

        def conv() -> torch.Tensor:
            y = F.conv2d(x, w, b, spec.stride, spec.pads[:2], spec.dilation, spec.groups)
            return outer(y.add_(r)) if spec.epilogue.residual else outer(y)

        return conv
    if isinstance(spec, LinearSpec):
        x, w = torch.randn(spec.rows or 1, spec.in_features), torch.randn(spec.out_features, spec.in_features)
        b, r = torch.randn(spec.out_features), torch.randn(spec.rows or 1, spec.out_features)
        inner = ACTIVATIONS[spec.epilogue.inner]

        def linear() -> torch.Tensor:
            y = inner(F.linear(x, w, b))
            return y.add_(r) if spec.epilogue.residual else y

        return linear
    if isinstance(spec, NormSpec):
        width, eps = spec.width, spec.eps

        def add_norm() -> tuple[torch.Tensor, torch.Tensor]:
            total = tensors["x"] + tensors["residual"]
            return F.layer_norm(total, (width,), tensors["weight"], tensors["bias"], eps), total

        return add_norm
    return lambda: F.scaled_dot_product_attention(tensors["q"], tensors["k"], tensors["v"])


def measure(region: str, spec: kernels.Spec, choice: kernels.Choice, machine: Machine, ceiling: float) -> Row:
    """Kernel and torch in blocks, in turns."""
    func = kernels.prim_func(spec, choice.tile, "kernel")
    built = tvm.compile(tvm.IRModule({"kernel": func}), target=machine.tvm_target())
    tensors = {a.name: torch.randn([n or 1 for n in a.shape]) for a in kernels.arguments(spec, choice.tile)}
    function, buffers = built["kernel"], list(tensors.values())
    calls: dict[str, Callable[[], Any]] = {"kernel": lambda: function(*buffers), "torch": reference(spec, tensors)}
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(ROUNDS):
        for name, call in calls.items():
            time.sleep(PAUSE_S)
            call()
            call()
            seconds[name] += [timed(call) for _ in range(CALLS)]
    best = {name: min(values) * 1e6 for name, values in seconds.items()}
    median = {name: sorted(values)[len(values) // 2] * 1e6 for name, values in seconds.items()}
    gflops = getattr(spec, "flops", 0) / best["kernel"] / 1e3
    tile = str(choice.tile)
    return Row(
        region, tile, best["kernel"], median["kernel"], best["torch"], median["torch"], gflops, 100 * gflops / ceiling
    )


def main() -> None:
    """Prints the table, and writes it as JSON with --out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--out", type=Path, default=None)
    parser.add_argument("--cache", type=Path, default=None, help="folder of the remembered tiles")
    options = parser.parse_args()
    machine = Machine.host(options.threads)
    torch.set_num_threads(machine.threads)
    choices = kernels.choose(REGIONS.values(), machine, options.cache)
    ceiling = ceiling_gflops(machine)
    print(
        f"{dict(machine.target)['mcpu']}, {machine.threads} threads, float32, ceiling {ceiling:.0f} GFLOP/s, "
        f"torch {torch.__version__}, tvm {tvm.__version__}"
    )
    print(f"{'region':28}{'kernel us':>11}{'torch us':>11}{'ratio':>8}{'GFLOP/s':>10}{'ceiling':>9}")
    rows = []
    with own_core(), torch.inference_mode():
        for region, spec in REGIONS.items():
            row = measure(region, spec, choices[spec], machine, ceiling)
            rows.append(row)
            share = f"{row.gflops:10.0f}{row.percent:8.0f}%" if row.gflops else f"{'-':>10}{'-':>9}"
            print(f"{region:28}{row.kernel_us:11.0f}{row.torch_us:11.0f}{row.kernel_us / row.torch_us:8.2f}{share}")
    if options.out is not None:
        report = {
            "machine": repr(machine),
            "platform": platform.platform(),
            "torch": torch.__version__,
            "tvm": tvm.__version__,
            "dtype": "float32",
            "ceiling_gflops": ceiling,
            "rows": [vars(row) for row in rows],
        }
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
