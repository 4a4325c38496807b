"""Residual joins that each tool fuses: `python -m benchmarks.fusion [GROUND_TRUTH.json]`.

Over the models of the file, and over ResNet-50, MobileNetV2, ConvNeXt-T, BERT, GPT-2, a 12-layer Llama, ViT-B and
Swin-T, exported to ONNX once: how many residual joins there are, how many of them rescompile's `fuse`, ONNX Runtime's
optimiser (its session's, its tool's for transformers) and onnxscript's fusions make part of one operation, whether what
each of them writes still computes the same, and why rescompile leaves what it leaves.

`--verify` compares rescompile's output with the original on random and on adversarial inputs, and runs no other tool.
`--only WORDS` takes the models whose name holds the words; results of the others stay as they were.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import io
import json
import logging
import re
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from datetime import date
from importlib import metadata
from pathlib import Path
from typing import Any

from benchmarks import corpus
from benchmarks.fusion_exact import Exactness, exactness, verdicts
from benchmarks.fusion_exact import table as exact_table
from benchmarks.fusion_tools import PEERS, Outcome, compare, fused_joins, joins_of, run_peer, stands
from benchmarks.ground_truth import CACHE, Case, build, export
from rescompile import api
from rescompile.cli_files import write_text
from rescompile.machine import machine, versions

RESULTS = Path(__file__).parent / "results"
GOAL = 0.95
TOLERANCE = 1e-5  # relative, fp32


@dataclass(frozen=True)
class Model:
    """A file to be had, and the family by which ONNX Runtime's tool for transformers knows it."""

    title: str
    path: Callable[[], Path]
    family: str = ""


@dataclass
class Row:
    """What became of one model. `remainders`: joins that `fuse` leaves, and why. `joins`: by kind of block."""

    model: str
    joins: dict[str, int]
    fused: int
    remainders: list[dict[str, str]]
    errors: dict[str, float | str]
    peers: list[Outcome] = field(default_factory=list)
    exact: list[Exactness] = field(default_factory=list)

    @property
    def total(self) -> int:
        """All joins."""
        return sum(self.joins.values())


def llama() -> corpus.Built:
    """Llama, 12 layers, 768 wide, 128 tokens."""
    corpus.import_torchvision()  # transformers imports it
    import torch
    from transformers import LlamaConfig, LlamaModel

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32000, hidden_size=768, intermediate_size=2048, num_hidden_layers=12, num_attention_heads=12,
        use_cache=False, attn_implementation="eager",
    )  # fmt: skip
    tokens = torch.randint(0, 32000, (1, 128), generator=torch.Generator().manual_seed(0))
    return corpus.LastHidden(LlamaModel(config)).eval(), (tokens,)


def swin() -> corpus.Built:
    """Swin-T (Liu 2021), batch 1, 224²."""
    import torch

    torch.manual_seed(0)
    model = corpus.import_torchvision().models.get_model("swin_t", weights=None)
    corpus.vary_norms(model)
    return model.eval(), (torch.randn(1, 3, 224, 224),)


# The models of the comparison: what builds each, and its family.
COMPARED: dict[str, tuple[Callable[[], corpus.Built], str]] = {
    "ResNet-50": (corpus.resnet50, ""),
    "MobileNetV2": (corpus.mobilenet_v2, ""),
    "ConvNeXt-T": (corpus.convnext_tiny, ""),
    "BERT": (corpus.bert_base, "bert"),
    "GPT-2": (corpus.gpt2, "gpt2"),
    "Llama, 12 layers": (llama, "gpt2"),
    "ViT-B": (corpus.vit_b_16, "vit"),
    "Swin-T": (swin, "swin"),
}


def compared() -> Iterator[Model]:
    """The models of the comparison."""
    for title, (builder, family) in COMPARED.items():

        def path(title: str = title, builder: Callable[[], corpus.Built] = builder) -> Path:
            return _exported(f"fusion {title}", lambda: Case(f"fusion {title}", *builder()))

        yield Model(title, path, family)


def listed(file: Path) -> Iterator[Model]:
    """The models of a ground-truth file."""
    for entry in json.loads(file.read_text())["models"]:
        text = entry["model"]
        if text.startswith("onnx/"):
            import onnx

            yield Model(text, lambda text=text: Path(onnx.__file__).parents[1] / text)  # type: ignore[misc]
        elif ":" in text and not text.startswith("written"):
            yield Model(text, lambda entry=entry, text=text: _exported(text, lambda: next(build(entry))))  # type: ignore[misc]
        else:
            for case in build(entry):
                yield Model(case.title, lambda case=case: _exported(case.title, lambda: case))  # type: ignore[misc]


def _exported(title: str, case: Callable[[], Case]) -> Path:
    """The model's file, made where it is not there yet; nothing is built where it is."""
    path = CACHE / (re.sub(r"\W+", "_", title)[:120] + ".onnx")
    if not path.exists():
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            path = export(case())
        gc.collect()
    return path


def measure(model: Model, spec: str, *, verify: bool = False) -> Row:
    """Run every tool over one model; with `verify` rescompile alone, on adversarial inputs too."""
    source = model.path()
    before = joins_of(source)
    kinds: dict[str, int] = {}
    for block in before.blocks:
        kinds[block.kind] = kinds.get(block.kind, 0) + 1
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "fused.onnx"
        result = api.rewrite(api.load(source), spec, verify=False, in_place=True)
        result.save(target)
        after = joins_of(target)
        reasons = {refusal.where: f"{refusal.pass_name}: {refusal.reason}" for refusal in result.refused}
        remainders = []
        for block in after.blocks:
            if stands(block):
                where = f"{block.path}/{block.join}" if block.path else block.join
                reason = reasons.get(where) or "no reason was given"
                remainders.append({"join": where, "kind": block.kind, "reason": reason})
        row = Row(model.title, kinds, fused_joins(before, after), remainders, {})
        if verify:
            row.exact = exactness(source, target, before.graph)
        else:
            row.errors = compare(source, target, before.graph)
        for name in () if verify or not before.blocks else PEERS:
            made = Path(folder) / f"{re.sub(r'[^a-z]+', '_', name.lower())}.onnx"
            outcome = run_peer(name, source, made, model.family, before)
            if made.exists():
                outcome.errors = compare(source, made, before.graph)
                made.unlink()
            row.peers.append(outcome)
    return row


# ---- as text ---------------------------------------------------------------------------------------------------------


def _error(errors: dict[str, float | str]) -> str:
    texts = [f"{value:.0e}" if isinstance(value, float) else "fails" for value in errors.values()]
    return "/".join(texts)


def table(rows: list[Row]) -> str:
    """As Markdown: joins fused, and the largest relative difference with the runtime's optimisation off / on."""
    names = ["rescompile `fuse`", *PEERS]
    lines = ["| model | joins | " + " | ".join(names) + " |", "|---|---:|" + "---:|" * len(names)]
    for row in rows:
        cells = [f"{row.fused} ({_error(row.errors)})"]
        for name in PEERS:
            found = next((peer for peer in row.peers if peer.tool == name), None)
            if found is None:
                cells.append("–")
            elif found.fused is None:
                cells.append("fails")
            else:
                cells.append(f"{found.fused} ({_error(found.errors)})")
        lines.append(f"| {_short(row.model)} | {row.total} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _exact(rows: list[Row]) -> list[tuple[str, list[Exactness]]]:
    return [(_short(row.model), row.exact) for row in rows]


def remainder_lines(rows: list[Row]) -> list[str]:
    """What is left, by model and reason."""
    lines = []
    for row in rows:
        by_reason: dict[tuple[str, str], list[str]] = {}
        for each in row.remainders:
            by_reason.setdefault((each["kind"], each["reason"]), []).append(each["join"])
        for (kind, reason), joins in by_reason.items():
            lines.append(
                f"- {_short(row.model)}: {len(joins)} {kind} ({joins[0]}{', ...' if joins[1:] else ''}): {reason}"
            )
    return lines


def summary(rows: list[Row]) -> list[str]:
    """The share that is fused, and what is worse than another tool or beyond the tolerance."""
    total, fused = sum(row.total for row in rows), sum(row.fused for row in rows)
    lines = [f"{fused} of {total} residual joins fused, {fused / max(total, 1):.1%} (goal {GOAL:.0%})"]
    for row in rows:
        for peer in row.peers:
            if peer.fused is not None and peer.fused > row.fused:
                lines.append(f"{_short(row.model)}: {peer.tool} fuses {peer.fused}, rescompile {row.fused}")
        for level, error in row.errors.items():
            if not isinstance(error, float) or not error <= TOLERANCE:
                lines.append(f"{_short(row.model)}: with the runtime's optimisation {level}: {error}")
    return lines


def _short(title: str) -> str:
    match = re.match(r"transformers:(\w+)", title)
    return match[1] if match else title.removeprefix("written for the tests: ").removeprefix("onnx/backend/test/data/")


def main() -> None:
    """Measure, print, and write `results/fusion.json` and `.md` (with `--verify` `results/fusion_verify.json`)."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, nargs="?", help="models and their blocks, as JSON")
    parser.add_argument("--only", default="", help="a part of the model's name")
    parser.add_argument("--pass", dest="spec", default="fuse", help="the pass to run")
    parser.add_argument("--verify", action="store_true", help="numbers only, on adversarial inputs too")
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)
    models = [*compared(), *(listed(arguments.file) if arguments.file else ())]
    stem = "fusion_verify" if arguments.verify else "fusion"
    kept = {row.model: row for row in _read(RESULTS / f"{stem}.json")} if arguments.only else {}
    for model in models:
        if arguments.only.lower() not in model.title.lower():
            continue
        try:
            row = measure(model, arguments.spec, verify=arguments.verify)
        except Exception as error:  # noqa: BLE001 (a model that cannot be exported or read is a line, not the end)
            print(f"{_short(model.title)}: {type(error).__name__}: {str(error).splitlines()[0]}", flush=True)
            continue
        told = exact_table(_exact([row])) if arguments.verify else table([row])
        print("\n".join(told.splitlines()[2:] + remainder_lines([row])), flush=True)
        kept[row.model] = row
        gc.collect()
    order = [model.title for model in models]
    rows = sorted(kept.values(), key=lambda row: order.index(row.model) if row.model in order else len(order))
    _write(rows, stem, arguments.spec)
    print("\n".join(["", *_told(rows, stem)]))


def _told(rows: list[Row], stem: str) -> list[str]:
    if stem == "fusion_verify":
        return [exact_table(_exact(rows)), "", *verdicts(_exact(rows))]
    return [table(rows), "", *summary(rows)]


_ABOUT_JOINS = (
    "In brackets the largest relative difference to the original's outputs, with ONNX Runtime's own optimisation "
    "off / on.",
)
_ABOUT_NUMBERS = (
    "Random, zero, large, negative and denormal inputs; the fused file in ONNX Runtime with its own optimisation "
    "off / on, against the original with the optimisation off (largest difference relative to the largest magnitude), "
    "and both, each at that level, against the original in float64 (root mean square of four draws of the kind of "
    "input with the largest difference).",
)


def _read(path: Path) -> list[Row]:
    if not path.exists():
        return []
    rows = json.loads(path.read_text())["models"]
    return [
        Row(
            **{
                **row,
                "peers": [Outcome(**p) for p in row["peers"]],
                "exact": [Exactness(**e) for e in row.get("exact", ())],
            }
        )
        for row in rows
    ]


def _write(rows: list[Row], stem: str, spec: str) -> None:
    found: dict[str, Any] = {
        "date": str(date.today()),
        "pass": spec,
        "machine": machine(),
        "versions": {**versions(), "onnxscript": metadata.version("onnxscript")},
        "models": [asdict(row) for row in rows],
    }
    write_text(RESULTS / f"{stem}.json", json.dumps(found, indent=1) + "\n")
    versions_ = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    verified = stem == "fusion_verify"
    head = [
        f"# {'Numbers' if verified else 'Residual joins fused'}, `{spec}`",
        "",
        f"{found['date']}; {versions_}; {found['machine']['processor']}.",
        *(_ABOUT_NUMBERS if verified else _ABOUT_JOINS),
        "",
    ]
    text = [*head, *_told(rows, stem)]
    if not verified:
        text += ["", "## What is left, and why", "", *remainder_lines(rows)]
    write_text(RESULTS / f"{stem}.md", "\n".join(text) + "\n")


if __name__ == "__main__":
    main()
