"""The tables of a sweep: what was found, whether the IRs agree, and whether it is what the definitions say."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

from benchmarks.sweep_expected import EXPECTED

RESULTS = Path(__file__).parent / "results"
_LIBRARIES = ("torch", "torchvision", "timm", "transformers", "onnx", "onnxscript", "onnx_ir")
_OURS = ("read", "inspect")  # stages in which an exception is rescompile's


def counts(found: dict[str, Any]) -> dict[str, int]:
    """Blocks by kind, those of kind `add` by their shortcut: the terms of `sweep_expected`."""
    kinds = {kind: number for kind, number in found["kinds"].items() if kind != "add"}
    return {**found["shortcuts"], **kinds}


def counts_text(found: dict[str, Any]) -> str:
    """The counts in one line; an error where there are none."""
    if "error" in found:
        crash = "CRASH in " if found["stage"] in _OURS else ""
        return f"{crash}{found['stage']}: {found['error'][:100]}"
    return ", ".join(f"{number} {name}" for name, number in counts(found).items()) or "none"


def agreement(record: dict[str, Any]) -> str:
    """Whether both IRs hold the same blocks: "same", "differ", "explained" (see `sweep_expected`), or "" if unknown."""
    found = [record[ir] for ir in ("fx", "onnx") if "kinds" in record.get(ir, {})]
    if len(found) < 2:
        return ""
    if counts(found[0]) == counts(found[1]):
        return "same"
    expected = EXPECTED.get(f"{record['source']}:{record['name']}")
    return "explained" if expected is not None and expected.onnx is not None else "differ"


def verdict(record: dict[str, Any]) -> str:
    """Whether the counts are those of the definition: "ok", "BAD" and what is wrong, or "" where none is written."""
    expected = EXPECTED.get(f"{record['source']}:{record['name']}")
    if expected is None or expected.counts is None:
        return ""
    if not any("kinds" in record.get(ir, {}) for ir in ("fx", "onnx")):
        return ""
    wrong = []
    for ir in ("fx", "onnx"):
        if "kinds" not in record.get(ir, {}):
            continue
        should = expected.onnx if ir == "onnx" and expected.onnx is not None else expected.counts
        found = counts(record[ir])
        wrong += [
            f"{ir} {found.get(key, 0)} {key}, not {should.get(key, 0)}"
            for key in sorted({*should, *found})
            if found.get(key, 0) != should.get(key, 0)
        ]
    return "BAD: " + "; ".join(wrong) if wrong else "ok"


def crashed(record: dict[str, Any]) -> bool:
    """Whether rescompile, and not a library or an exporter, failed."""
    return any("read" in record or record.get(ir, {}).get("stage") in _OURS for ir in ("fx", "onnx"))


def write_tables(records: Iterable[dict[str, Any]]) -> None:
    """`benchmarks/results/sweep.json` and `sweep.md`."""
    rows = sorted(records, key=lambda record: (record["source"], record["name"]))
    versions = {name: _version(name) for name in _LIBRARIES}
    head = {"date": time.strftime("%Y-%m-%d"), "versions": versions, "totals": _totals(rows)}
    lines = ",\n".join(json.dumps(_compact(row), separators=(",", ":")) for row in rows)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "sweep.json").write_text(json.dumps(head, indent=1)[:-2] + f',\n "models": [\n{lines}\n]}}\n')
    (RESULTS / "sweep.md").write_text("\n".join(_markdown(rows, head)) + "\n")


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return ""


def _totals(rows: list[dict[str, Any]]) -> dict[str, int]:
    verdicts = [verdict(row) for row in rows]
    agreements = [agreement(row) for row in rows]
    looked_at = [row for row in rows if "fx" in row or "onnx" in row]
    return {
        "models": len(rows),
        "looked at": len(looked_at),
        "of the structure of another, at other sizes, and so not looked at": sum("twin" in row for row in rows),
        "not come to": sum("left" in row for row in rows),
        "not built by their library": sum("build" in row for row in rows),
        "not exported by torch": sum("export" in row for row in rows),
        "crashes of rescompile": sum(map(crashed, rows)),
        "in torch's form alone": sum("onnx" not in row for row in looked_at),
        "not exported to ONNX": sum(row.get("onnx", {}).get("stage") == "export" for row in looked_at),
        "in both IRs": sum(bool(text) for text in agreements),
        "same in both IRs": agreements.count("same"),
        "differ as explained": agreements.count("explained"),
        "differ": agreements.count("differ"),
        "counts known from the definition": sum(bool(text) for text in verdicts),
        "as the definition says": verdicts.count("ok"),
    }


def _compact(row: dict[str, Any]) -> dict[str, Any]:
    """A row without what both IRs have in common."""
    kept = {key: value for key, value in row.items() if key != "seconds"}
    kept.pop("structure", None)
    kept["expected"] = verdict(row)
    kept["irs"] = agreement(row)
    return kept


def _markdown(rows: list[dict[str, Any]], head: dict[str, Any]) -> Iterator[str]:
    yield "# Detection over the architectures of model libraries"
    yield ""
    yield "Written by `make sweep`, " + head["date"] + ", random weights;"
    yield ", ".join(f"{name} {version}" for name, version in head["versions"].items() if version) + "."
    yield ""
    for name, number in head["totals"].items():
        yield f"- {name}: {number}"
    yield ""
    yield "Kinds are those of docs/vocabulary.md, those of kind `add` by their shortcut. *Expected*: whether they are"
    yield "what the architecture's definition tells (`benchmarks/sweep_expected.py`). *ONNX*: whether it agrees."
    for source in sorted({row["source"] for row in rows}):
        yield ""
        yield f"## {source}"
        yield ""
        yield "| model | blocks | norms | joins that are none | ONNX | expected |"
        yield "|---|---|---|---|---|---|"
        own = [row for row in rows if row["source"] == source]
        yield from (_row(row) for row in own if "fx" in row or "onnx" in row)
        yield from _rest(own)
    notes = {key: entry.because for key, entry in EXPECTED.items() if entry.because}
    if notes:
        yield ""
        yield "## Notes"
        yield ""
        for key, text in sorted(notes.items()):
            yield f"- `{key}`: {text}"


def _rest(rows: list[dict[str, Any]]) -> Iterator[str]:
    """What was not looked at, and why."""
    twins: dict[str, list[str]] = {}
    for row in rows:
        if "twin" in row:
            twins.setdefault(row["twin"], []).append(row["name"])
    if twins:
        yield ""
        yield "Of the structure of another model, at other sizes:"
        yield ""
        for first, names in sorted(twins.items()):
            yield f"- {first}: {', '.join(names)}"
    left = [row["name"] for row in rows if "left" in row]
    if left:
        yield ""
        yield f"Not come to: {', '.join(left)}."
    for stage, title in (("build", "Not built"), ("export", "Not exported by torch"), ("read", "Not read")):
        failed = [row for row in rows if stage in row and "fx" not in row and "onnx" not in row]
        if failed:
            yield ""
            yield f"{title}:"
            yield ""
            for row in failed:
                yield f"- {row['name']}: {_reason(row[stage])}"


def _reason(text: str) -> str:
    """An error in one line, without the paths of this machine."""
    text = re.sub(r"/\S*/site-packages/", "", " ".join(text.split()))
    return f"{text[:197]}..." if len(text) > 200 else text


def _row(row: dict[str, Any]) -> str:
    found = row.get("fx") if "kinds" in row.get("fx", {}) else row.get("onnx", {})
    if found is None or "kinds" not in found:
        return f"| {row['name']} | {_cell(counts_text(row.get('fx') or row['onnx']))} | | | | |"
    refused = ", ".join(
        f"{number} {reason}" for reason, number in sorted(found["not_residual"].items(), key=lambda item: -item[1])
    )
    other = agreement(row) or (_cell(counts_text(row["onnx"])) if "onnx" in row else "")
    if other in ("differ", "explained"):
        other = f"{other}: {counts_text(row['onnx'])}"
    norms = ", ".join(f"{number} {name}" for name, number in found["norms"].items())
    nested = f" ({found['nested']} nested)" if found["nested"] else ""
    cells = (row["name"], counts_text(found) + nested, norms, refused, other, verdict(row))
    return "| " + " | ".join(_cell(cell) for cell in cells) + " |"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
