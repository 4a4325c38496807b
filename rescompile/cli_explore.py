"""`rescompile explore`: placements of shortcuts, tried side by side."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rescompile.cli_files import check_writable, write_whole
from rescompile.cli_output import complain
from rescompile.errors import RescompileError, nearest
from rescompile.exploring import JOINS, KINDS, Exploration, Training, grid
from rescompile.graph import Graph


def run_explore(
    graph: Graph,
    *,
    every: str,
    joins: str,
    kinds: str,
    passes: Sequence[str],
    training: Training | None,
    plot: Path | None,
    seed: int,
) -> Exploration:
    """Try the candidates that the options describe, and draw the picture."""
    if plot is not None:
        from rescompile.plots import format_of

        format_of(plot)
        check_writable(plot)
    from rescompile import api

    specs = list(passes) or grid(_numbers(every), _words(joins, JOINS), _words(kinds, (*KINDS, "long")))
    terminal = sys.stderr.isatty()
    found = api.explore(
        graph, candidates=specs, training=training, seed=seed, progress=complain if terminal else lambda text: None
    )
    if plot is not None:
        write_whole(plot, found.plot)
    return found


def training_of(name: str, steps: int, storage: str | None, study: str, seed: int) -> Training:
    """The training function that `package.module:function` names, with where its results are kept.

    Without a storage they go to an SQLite file in the current folder, named after the study, so that a search that was
    interrupted goes on.
    """
    if steps < 1:
        raise RescompileError(f"Training takes at least one step, so --steps {steps} trains nothing: give 1 or more.")
    return Training(_function(name), steps, storage or f"sqlite:///{study}.db", study, seed)


def _function(name: str) -> Callable[[Any, Callable[[int, float], None], int], float]:
    module_name, colon, attribute = name.partition(":")
    if not colon or not module_name or not attribute:
        raise RescompileError(f"'{name}' names no training function: give package.module:function.")
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.append(os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise RescompileError(f"The training function's module '{module_name}' cannot be imported: {error}.") from error
    found = getattr(module, attribute, None)
    if not callable(found):
        hint = nearest(attribute, [entry for entry in dir(module) if not entry.startswith("_")])
        raise RescompileError(f"'{module_name}' has no function '{attribute}'{hint}, wanted for training.")
    function: Callable[[Any, Callable[[int, float], None], int], float] = found
    return function


def _numbers(text: str) -> list[int]:
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not all(part.isdecimal() and int(part) for part in parts):
        raise RescompileError(f"'{text}' is no list of layer counts: write numbers from 1, as in 1,2,3.")
    return [int(part) for part in parts]


def _words(text: str, known: Sequence[str]) -> list[str]:
    parts = [part.strip() for part in text.split(",") if part.strip()]
    wrong = next((part for part in parts if part not in known), None)
    if wrong is not None:
        raise RescompileError(f"There is no choice '{wrong}'{nearest(wrong, known)}: take of {', '.join(known)}.")
    return parts
