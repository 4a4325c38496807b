"""The catalogue of passes: names, equations, options with their defaults, and what each preserves."""

from __future__ import annotations

import inspect
from typing import Any

from rescompile.passes import PASSES
from rescompile.specs import describe_options


def catalogue() -> list[dict[str, Any]]:
    """Every pass, as plain data."""
    entries = []
    for name, cls in PASSES.items():
        preserves = getattr(cls().preserves, "value", cls().preserves)
        options = [{"name": key, "type": kind, "default": default} for key, kind, default in describe_options(cls)]
        entries.append(
            {"name": name, "preserves": str(preserves), "summary": _summary(cls), "options": options},
        )
    return entries


def print_catalogue(entries: list[dict[str, Any]]) -> str:
    """The catalogue as text."""
    blocks = []
    for entry in entries:
        lines = [f"{entry['name']}   preserves {entry['preserves']}"]
        lines += [f"    {line}" for line in entry["summary"].splitlines()]
        for option in entry["options"]:
            default = f", {option['default']} if not given" if option["default"] else ""
            lines.append(f"      {option['name']}: {option['type']}{default}")
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)


def _summary(cls: type) -> str:
    """The first paragraph of the docstring: the equation, or what the pass does."""
    return (inspect.getdoc(cls) or "").split("\n\n")[0]
