"""What the command line prints: results on stdout, progress and errors on stderr, JSON alone where it is asked for."""

from __future__ import annotations

import contextlib
import json
import logging
import sys
import warnings
from collections.abc import Iterator
from typing import Any


def say(text: str) -> None:
    """A result, for people or for a file."""
    sys.stdout.write(text if text.endswith("\n") else text + "\n")


def show(result: Any) -> None:
    """A result that prints itself: with colours and the terminal's width on a terminal, as plain text in a pipe."""
    if sys.stdout.isatty() and hasattr(result, "__rich_console__"):
        from rich.console import Console

        Console(highlight=False).print(result)
    else:
        say(str(result))


def html_page(result: Any, title: str) -> str:
    """A result that prints itself, as one HTML page that refers to nothing outside it."""
    import io
    from html import escape

    from rich.console import Console

    console = Console(record=True, file=io.StringIO(), width=200, highlight=False)
    console.print(result)
    page = console.export_html(inline_styles=True)
    return page.replace("<head>", f"<head>\n<title>{escape(title)}</title>", 1)


def say_json(data: Any) -> None:
    """A result, for programs."""
    say(json.dumps(data, indent=2))


def complain(sentence: str) -> None:
    """An error: one sentence."""
    sys.stderr.write(f"rescompile: {' '.join(sentence.split())}\n")


@contextlib.contextmanager
def libraries_silent() -> Iterator[None]:
    """Keep what libraries warn and log of: they speak to their developers, not to the users of this program."""
    disabled = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


@contextlib.contextmanager
def stage(what: str) -> Iterator[None]:
    """Show that something long is going on: a spinner on a terminal, nothing in a pipe.

    What the user's own code prints meanwhile goes to stderr, so that stdout holds results only.
    """
    with contextlib.redirect_stdout(sys.stderr):
        if not sys.stderr.isatty():
            yield
            return
        from rich.console import Console

        with Console(stderr=True).status(what):
            yield


def table(headings: list[str], rows: list[list[str]]) -> str:
    """Columns of text, the widths of the widest cells; the last column is not padded."""
    widths = [max(len(row[index]) for row in [headings, *rows]) for index in range(len(headings))]
    rule = ["─" * width for width in widths]
    lines = []
    for row in [headings, rule, *rows]:
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)
