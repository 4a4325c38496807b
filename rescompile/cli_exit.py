"""How the command line ends: exit codes, and errors as one sentence."""

from __future__ import annotations

import os
import sys
import traceback
from contextlib import nullcontext

import typer

from rescompile.cli_output import complain, libraries_silent
from rescompile.errors import EXIT_CANNOT_SERVE, EXIT_USAGE, RescompileError

_INTERRUPTED = 130  # what shells expect of a program that Ctrl-C ended


def run_and_exit(app: typer.Typer, arguments: list[str]) -> None:
    """Run a program and exit: errors are one sentence on stderr, a traceback only with --traceback."""
    try:
        status = _run(app, arguments)
        sys.stdout.flush()
    except BrokenPipeError:
        # Whoever read the output has left: nothing to say, and nowhere to say it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = EXIT_CANNOT_SERVE
    sys.exit(status)


def _run(app: typer.Typer, arguments: list[str]) -> int:
    show = "--traceback" in arguments
    try:
        with nullcontext() if show else libraries_silent():
            status = app(arguments, standalone_mode=False)
    except RescompileError as error:
        return _failed(str(error), error.exit_code, show)
    except (KeyboardInterrupt, typer.Abort):
        return _INTERRUPTED
    except BrokenPipeError:
        raise
    except ModuleNotFoundError as error:
        return _failed(_missing(error), EXIT_CANNOT_SERVE, show)
    except Exception as error:  # noqa: BLE001 - the last resort: one sentence, and the traceback on request
        message = getattr(error, "format_message", None)
        if message is not None:  # typer's own usage errors, whose classes differ between its versions
            return _failed(str(message()), EXIT_USAGE, show)
        what = f"{type(error).__name__}: {error}".rstrip(".")
        hint = "this is a bug in rescompile; run again with `rescompile --traceback ...` to see where"
        return _failed(f"Internal error ({what}): {hint}.", EXIT_CANNOT_SERVE, show)
    return status if isinstance(status, int) else 0


def _failed(sentence: str, status: int, show_traceback: bool) -> int:
    if show_traceback:
        traceback.print_exc()
    complain(sentence)
    return status


_EXTRAS = {
    "matplotlib": "plot",
    "torch": "torch",
    "onnx": "onnx",
    "onnx_ir": "onnx",
    "onnxscript": "onnx",
    "onnxruntime": "onnx",
    "tvm": "tvm",
    "tvm_ffi": "tvm",
    "safetensors": "tvm",
}


def _missing(error: ModuleNotFoundError) -> str:
    name = (error.name or "").partition(".")[0]
    if name in _EXTRAS:
        return f"This needs {name}, which is not installed: pip install 'rescompile[{_EXTRAS[name]}]'."
    if name == "rescompile":
        return f"Internal error ({error}): this installation of rescompile is not complete; install it again."
    return f"This needs the Python package '{name or error}', which is not installed: install it first."
