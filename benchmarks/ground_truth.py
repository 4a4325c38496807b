"""Detection against known architectures: `python -m benchmarks.ground_truth GROUND_TRUTH.json`.

The JSON lists models ("module:expression", or a sentence that names a model of `benchmarks.written_models`) and the
blocks that each holds. Every model is built with random weights, captured as a torch graph and exported to ONNX, and
what detection finds is compared with what the file says. The expressions are evaluated: give files that you trust.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib
import io
import json
import logging
import os
import re
import time
import traceback
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.corpus import import_torchvision
from benchmarks.written_models import WRITTEN
from rescompile.blocks import Report

CACHE = Path(os.environ.get("TMPDIR", "/tmp")) / "rescompile-ground-truth"


_UNTRACED = "torch.fx cannot trace it"


class UntracedError(Exception):
    """torch.fx.symbolic_trace does not take the model."""


@dataclass(frozen=True)
class Case:
    """One model of the file, built, with its inputs by name."""

    title: str
    model: torch.nn.Module
    inputs: dict[str, torch.Tensor] | tuple[torch.Tensor, ...]


def build(entry: dict[str, Any]) -> Iterator[Case]:
    """The models that an entry speaks of, in evaluation mode where they may be."""
    text = entry["model"]
    if ":" in text and not text.startswith("written"):
        yield Case(text, _evaluate(text).eval(), _inputs(entry["inputs"], text))
        return
    for words, builders in WRITTEN.items():
        if words in text:
            for number, builder in enumerate(builders):
                torch.manual_seed(0)
                model = builder()
                model.train(getattr(model, "training_only", False))
                title = f"{text} #{number}" if len(builders) > 1 else text
                yield Case(title, model, _inputs(entry["inputs"], text))


def _evaluate(text: str) -> torch.nn.Module:
    module, expression = text.split(":", 1)
    root = module.split(".")[0]
    if root in ("torchvision", "timm", "transformers"):
        import_torchvision()
    library = importlib.import_module(module)
    names = {word: getattr(library, word) for word in re.findall(r"\w+", expression) if hasattr(library, word)}
    names[root] = importlib.import_module(root)
    torch.manual_seed(0)
    if root == "transformers":
        expression = re.sub(r"\*\*\{", '**{"attn_implementation": "eager", ', expression)
    if "weights" not in expression and "(" not in expression:
        expression += "(weights=None)" if root == "torchvision" else "()"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        built = eval(expression, names)
    assert isinstance(built, torch.nn.Module)
    return _LastHidden(built) if root == "transformers" else built


class _LastHidden(torch.nn.Module):
    """A transformer without its cache and its other outputs."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, **inputs: torch.Tensor) -> Any:
        given = dict(inputs)
        if hasattr(self.model.config, "use_cache"):
            self.model.config.use_cache = False
        return self.model(**given, return_dict=True).last_hidden_state


def _inputs(spec: str, text: str) -> dict[str, torch.Tensor] | tuple[torch.Tensor, ...]:
    tensors: dict[str, torch.Tensor] = {}
    for index, (shape, kind, role) in enumerate(
        re.findall(r"([0-9x]+)(:int64)?(?:\((\w+)\))?", spec.split(" (", maxsplit=1)[0])
    ):
        extents = [int(extent) for extent in shape.split("x")]
        tensor = torch.randint(0, 90, extents) if kind else torch.randn(extents)
        name = "input_ids" if kind else "pixel_values"
        if role == "mask":
            name, tensor = "attention_mask", torch.ones_like(tensor)
        elif role == "decoder":
            name = "decoder_input_ids"
        tensors[name if name not in tensors else f"{name}_{index}"] = tensor
    return tensors if text.startswith("transformers") else tuple(tensors.values())


def transformer_only(report: Report) -> Report:
    """The report without the blocks of a backbone."""
    kept = tuple(block for block in report if "backbone" not in block.module)
    return dataclasses.replace(report, blocks=kept)


def count(report: Report) -> dict[str, int]:
    """What the file counts: kinds, and `add` blocks by their shortcut."""
    counts: dict[str, int] = dict(report.summary()["by_kind"])
    for block in report:
        if block.kind == "add":
            counts[block.shortcut] = counts.get(block.shortcut, 0) + 1
    return counts


def compare(entry: dict[str, Any], report: Report) -> list[str]:
    """What differs from the file: empty when nothing does."""
    if "transformer only" in (entry["inputs"] or ""):
        report = transformer_only(report)
    counts = count(report)
    wrong = [
        f"{name} {counts.get(name, 0)}, not {number}"
        for name, number in entry["expect"].items()
        if counts.get(name, 0) != number
    ]
    norms = report.summary()["by_norm"]
    if "norm" in entry and norms:
        majority = max(norms, key=lambda name: norms[name])
        if majority != entry["norm"]:
            wrong.append(f"norm {majority}, not {entry['norm']} ({norms})")
    return wrong


def load(case: Case, ir: str) -> Any:
    """The case's graph in one of "fx", "symbolic", "onnx", "onnx, not optimised"."""
    if ir.startswith("onnx"):
        from rescompile import onnx_files

        return onnx_files.load(export(case, optimise=ir == "onnx"))
    from rescompile import fx_capture

    if ir != "symbolic":
        return fx_capture.capture(case.model, case.inputs)
    try:
        traced = torch.fx.symbolic_trace(case.model)
    except Exception as error:
        raise UntracedError(str(error).splitlines()[0]) from error
    return fx_capture.capture(traced, case.inputs)


def export(case: Case, optimise: bool = True, folder: Path = CACHE) -> Path:
    """The case as an ONNX file, exported once. `optimise`: let the exporter fold constants, and with them `0 + x`."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / (re.sub(r"\W+", "_", case.title)[:120] + ("" if optimise else "_plain") + ".onnx")
    if not path.exists():
        training = torch.onnx.TrainingMode.PRESERVE if case.model.training else torch.onnx.TrainingMode.EVAL
        positional = case.inputs if isinstance(case.inputs, tuple) else ()
        named = case.inputs if isinstance(case.inputs, dict) else None
        program = torch.onnx.export(
            case.model, positional, kwargs=named, dynamo=True, verbose=False, training=training, optimize=optimise
        )
        program.save(str(path))
    return path


def main() -> None:
    """Compare every model of the file, print a line for each, and the total."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--ir", default="fx,onnx", help="of fx, symbolic, onnx")
    parser.add_argument("--only", default="", help="a part of the model's name")
    parser.add_argument("--verbose", action="store_true", help="print the report of what differs")
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)
    entries = [entry for entry in json.loads(arguments.file.read_text())["models"] if arguments.only in entry["model"]]
    for ir in arguments.ir.split(","):
        right = total = 0
        for entry in entries:
            for title, wrong, seconds in _check(entry, ir, arguments.verbose):
                traced = not any(text.startswith(_UNTRACED) for text in wrong)
                total += traced
                right += not wrong
                verdict = "BAD" if wrong and traced else "ok" if traced else "-"
                print(f"{ir:8} {verdict:3} {seconds:6.1f} s  {title[:100]}  {'; '.join(wrong)}", flush=True)
        print(f"{ir}: {right} of {total} exact\n", flush=True)


def _check(entry: dict[str, Any], ir: str, verbose: bool) -> Iterator[tuple[str, list[str], float]]:
    from rescompile.detection import inspect_graph

    if entry["model"].startswith("onnx/"):
        if ir == "onnx":
            import onnx

            from rescompile import onnx_files

            start = time.perf_counter()
            report = inspect_graph(onnx_files.load(Path(onnx.__file__).parents[1] / entry["model"]))
            yield entry["model"], compare(entry, report), time.perf_counter() - start
        return
    for case in build(entry):
        start = time.perf_counter()
        wrong, report = _detect(entry, case, ir, verbose)
        if wrong and ir == "onnx" and report is not None:
            plain, _ = _detect(entry, case, "onnx, not optimised", verbose)
            wrong.append("the export without the exporter's folding is exact" if not plain else "without folding too")
        if wrong and verbose and report is not None:
            print(report)
            for join in report.not_residual:
                print("   ", join.join, "-", join.reason)
        yield case.title, wrong, time.perf_counter() - start


def _detect(entry: dict[str, Any], case: Case, ir: str, verbose: bool) -> tuple[list[str], Report | None]:
    from rescompile.detection import inspect_graph

    try:
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            graph = load(case, ir)
        report = inspect_graph(graph)
    except UntracedError as error:
        return [f"{_UNTRACED}: {str(error)[:80]}"], None
    except Exception as error:  # noqa: BLE001 (whatever an exporter raises is a line of the table)
        if verbose:
            traceback.print_exc()
        return [f"{type(error).__name__}: {str(error)[:300]}"], None
    return compare(entry, report), report


if __name__ == "__main__":
    main()
