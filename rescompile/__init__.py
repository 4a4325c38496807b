"""rescompile: find, rewrite, verify, inspect and compile the residual connections of an existing model.

Importing the package loads none of torch, onnx or tvm; each function loads what it needs.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from rescompile.api import (
        Tuning,
        apply,
        audit,
        capture,
        compare_gradients,
        compile,
        diff,
        explore,
        gradient_flow,
        inspect,
        load,
        load_program,
        plan,
        rewrite,
    )
    from rescompile.errors import RescompileError, UnsupportedOps, VerificationError
    from rescompile.plans import Plan, Refusal, Rewrite

_HOMES = {
    "Tuning": "rescompile.api",
    "apply": "rescompile.api",
    "audit": "rescompile.api",
    "capture": "rescompile.api",
    "compare_gradients": "rescompile.api",
    "compile": "rescompile.api",
    "diff": "rescompile.api",
    "explore": "rescompile.api",
    "gradient_flow": "rescompile.api",
    "inspect": "rescompile.api",
    "load": "rescompile.api",
    "load_program": "rescompile.api",
    "plan": "rescompile.api",
    "rewrite": "rescompile.api",
    "RescompileError": "rescompile.errors",
    "UnsupportedOps": "rescompile.errors",
    "VerificationError": "rescompile.errors",
    "Plan": "rescompile.plans",
    "Refusal": "rescompile.plans",
    "Rewrite": "rescompile.plans",
}

__all__ = [
    "Plan",
    "Refusal",
    "RescompileError",
    "Rewrite",
    "Tuning",
    "UnsupportedOps",
    "VerificationError",
    "apply",
    "audit",
    "capture",
    "compare_gradients",
    "compile",
    "diff",
    "explore",
    "gradient_flow",
    "inspect",
    "load",
    "load_program",
    "plan",
    "rewrite",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'rescompile' has no attribute '{name}'")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
