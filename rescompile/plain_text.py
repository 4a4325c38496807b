"""What rich would print, as plain text."""

from __future__ import annotations

from typing import Any


def plain_text(printable: Any) -> str:
    """An object with `__rich_console__` as text, without colours, 160 columns wide."""
    from rich.console import Console  # takes longer to import than all of rescompile

    console = Console(width=160, no_color=True, highlight=False)
    with console.capture() as capture:
        console.print(printable)
    return capture.get().rstrip()
