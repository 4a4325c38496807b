"""The main job on three models: find the residual blocks, fuse them, verify, compile, and measure.

`make demo` runs it. The first model is trained here, in seconds, on real handwritten digits. ResNet-50 and BERT-base
have random weights, so that nothing needs to be downloaded: their outputs are compared with the original's.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch

import rescompile as rc
from benchmarks.corpus import bert_base, resnet50
from examples.digits import train
from rescompile.cli_bench import OURS, Measured, bench_graph
from rescompile.cli_output import libraries_silent, show, table

RUNTIMES = {"eager": "eager ms", "onnxruntime": "ONNX Runtime ms", OURS: "rescompile ms"}
Build = Callable[[], tuple[torch.nn.Module, tuple[torch.Tensor, ...], Callable[[torch.Tensor], float] | None]]


@dataclass(frozen=True)
class Row:
    """One model's line in the table at the end."""

    model: str
    blocks: int
    accuracy: str
    measured: Measured


def digits() -> tuple[torch.nn.Module, tuple[torch.Tensor, ...], Callable[[torch.Tensor], float]]:
    """A residual network of 4 blocks, trained on 1,437 images, with the 360 that it has not seen."""
    found = train()
    return found.model, (found.images,), found.accuracy


def main() -> None:
    """Run the job on every model, then print the table."""
    models: list[tuple[str, Build]] = [
        ("digits (360 images)", digits),
        ("ResNet-50 (224², batch 1)", lambda: (*resnet50(), None)),
        ("BERT-base (128 tokens)", lambda: (*bert_base(), None)),
    ]
    with libraries_silent():
        rows = [run(name, build) for name, build in models]
    print(f"\n{'─' * 100}\n")
    print(table(["model", "blocks", "accuracy", "max error", *RUNTIMES.values(), "compiled in"], [*map(cells, rows)]))
    print("\nmedians of interleaved blocks, fp32;", rows[0].measured.conditions())


def run(name: str, build: Build) -> Row:
    """The whole path for one model, with what each step says."""
    title(name, "building")
    model, inputs, accuracy = build()
    graph = rc.capture(model, inputs)

    title(name, "residual blocks")
    report = rc.inspect(graph)
    show(report)

    title(name, "fusing and verifying")
    result = rc.rewrite(graph, ["fuse"])
    print(f"{len(result.applied)} rewrites, {len(result.refused)} refusals")
    print("\n".join(cost_text(result)))
    print(result.verification)
    if not result.verification.ok:
        sys.exit(3)

    title(name, "compiling and measuring")
    measured = bench_graph(graph, ["eager", "onnxruntime"], inputs=[tensor.numpy() for tensor in inputs], rounds=6)
    print(measured)
    return Row(name, len(report), accuracy_text(accuracy, model, inputs, measured), measured)


def accuracy_text(
    accuracy: Callable[[torch.Tensor], float] | None,
    model: torch.nn.Module,
    inputs: tuple[torch.Tensor, ...],
    measured: Measured,
) -> str:
    """Accuracy of the original and of the compiled model, where the model was trained."""
    if accuracy is None:
        return "–"
    with torch.no_grad():
        before = accuracy(model(*inputs))
    after = accuracy(torch.from_numpy(measured.outputs[0]))
    return f"{before:.2%} → {after:.2%}"


def cost_text(result: rc.Result) -> list[str]:
    """Parameters, FLOPs and bytes before and after."""
    from rescompile.costs import cost_lines

    return cost_lines(*result.costs)


def cells(row: Row) -> list[str]:
    """A row of the final table."""
    measured = row.measured
    ours = measured.timing(OURS)
    error, seconds = ("–", "–") if ours is None else (f"{ours.error:.1e}", f"{ours.prepared_in:.0f} s")
    found = [measured.timing(name) for name in RUNTIMES]
    times = ["–" if timing is None else f"{timing.milliseconds:.2f}" for timing in found]
    return [row.model, str(row.blocks), row.accuracy, error, *times, seconds]


def title(model: str, step: str) -> None:
    """Say what comes next."""
    print(f"\n── {model}: {step} {'─' * max(4, 90 - len(model) - len(step))}\n", flush=True)


if __name__ == "__main__":
    main()
