"""Where a model is: `file.onnx`, `file.pt2` or `package.module:attribute`."""

from __future__ import annotations

import importlib
import os
import re
import sys
import traceback
from collections.abc import Iterable
from typing import Any, Literal

from rescompile.errors import RescompileError, nearest

ModelForm = Literal["onnx", "pt2", "attribute"]
_ATTRIBUTE = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*")


def model_form(model: str) -> ModelForm:
    """Which of the three forms of MODEL a text has. RescompileError when none."""
    suffix = os.path.splitext(model)[1].lower()
    if suffix == ".onnx":
        return "onnx"
    if suffix == ".pt2":
        return "pt2"
    if _ATTRIBUTE.fullmatch(model):
        return "attribute"
    what = f"'{model}' is not a model that rescompile reads"
    if suffix in (".pt", ".pth", ".ckpt", ".bin", ".safetensors"):
        raise RescompileError(
            f"{what}: a {suffix} file holds weights, not a graph; name the module that they belong to as "
            "package.module:attribute, or export it to .pt2 or .onnx."
        )
    raise RescompileError(f"{what}: give file.onnx, file.pt2 or package.module:attribute.")


def load_attribute(model: str) -> tuple[Any, tuple[Any, ...] | None]:
    """The module that `package.module:attribute` names, and the example inputs where it brings some.

    The attribute is a module, a callable that returns one, or a callable that returns `(module, example_inputs)`.
    The current folder is searched last, so that a file in it never hides an installed package.
    """
    module_name, _, attribute = model.partition(":")
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.append(os.getcwd())
    found: Any = _import(module_name, model)
    for part in attribute.split("."):
        try:
            found = getattr(found, part)
        except AttributeError:
            raise RescompileError(
                f"'{module_name}' has no attribute '{attribute}'{nearest(part, _public(found))}, wanted by '{model}'."
            ) from None
    if not _is_model(found):
        if not callable(found):
            raise RescompileError(
                f"'{model}' is a {type(found).__name__}: it must be a module, or a callable that returns one."
            )
        try:
            found = found()
        except Exception as error:
            raise RescompileError(f"Calling '{model}' failed: {_where(error)}.") from error
    inputs: tuple[Any, ...] | None = None
    if isinstance(found, tuple) and len(found) == 2 and _is_model(found[0]):
        found, given = found
        inputs = tuple(given) if isinstance(given, tuple | list) else (given,)
    if not _is_model(found):
        raise RescompileError(
            f"'{model}' returned a {type(found).__name__}: it must return a module, or (module, example_inputs)."
        )
    return found, inputs


def _is_model(candidate: Any) -> bool:
    """Whether this is a torch module or an exported program, asked without importing torch."""
    return not isinstance(candidate, type) and hasattr(candidate, "state_dict")


def _import(module_name: str, model: str) -> Any:
    try:
        return importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is not None and (module_name == error.name or module_name.startswith(error.name + ".")):
            raise RescompileError(
                f"There is no Python module '{error.name}', wanted by '{model}': install it, or run where it lies."
            ) from error
        raise RescompileError(f"Importing '{module_name}' failed: {_where(error)}.") from error
    except Exception as error:
        raise RescompileError(f"Importing '{module_name}' failed: {_where(error)}.") from error


def _where(error: Exception) -> str:
    """Type, message and innermost place of an exception, in one line."""
    frames = traceback.extract_tb(error.__traceback__)
    place = f" ({frames[-1].filename}:{frames[-1].lineno})" if frames else ""
    message = " ".join(str(error).split()).rstrip(".")
    return f"{type(error).__name__}: {message}{place}" if message else f"{type(error).__name__}{place}"


def _public(found: Any) -> Iterable[str]:
    return [name for name in dir(found) if not name.startswith("_")]
