"""Errors that a user of rescompile can meet, and the exit codes of the command line."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches

EXIT_CANNOT_SERVE = 1
EXIT_USAGE = 2
EXIT_VERIFICATION_FAILED = 3


class RescompileError(Exception):
    """The model or the request cannot be served: one sentence that says what, where, and what to do."""

    exit_code = EXIT_CANNOT_SERVE


class GraphError(RescompileError):
    """A graph, or an edit of one, that is not well formed."""


class UnsupportedOps(RescompileError):
    """Operations that a backend has no lowering for, all of them at once."""


class VerificationError(RescompileError):
    """A rewrite did not preserve what its pass declares to preserve."""

    exit_code = EXIT_VERIFICATION_FAILED


def nearest(name: str, known: Iterable[str]) -> str:
    """A suffix for an error message: " (did you mean 'x'?)", or the empty string when nothing is near."""
    match = get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" (did you mean '{match[0]}'?)" if match else ""
