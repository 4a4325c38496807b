"""Importing the package, or asking the command line for help, loads none of the heavy libraries."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

HEAVY = ["torch", "torchvision", "transformers", "onnx", "onnx_ir", "onnxscript", "onnxruntime", "tvm", "tvm_ffi"]
HEAVY += ["numpy", "scipy", "sklearn", "sympy", "rustworkx", "rich"]


def loaded_by(code: str) -> set[str]:
    """The heavy libraries that a fresh process has loaded after running `code`."""
    report = f"import json, sys; sys.stderr.write(json.dumps([name for name in {HEAVY!r} if name in sys.modules]))"
    script = f"try:\n    {code}\nexcept SystemExit:\n    pass\n{report}"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return set(json.loads(done.stderr))


def test_importing_the_package_loads_nothing_heavy() -> None:
    assert loaded_by("import rescompile") == set()


@pytest.mark.parametrize("arguments", [["--help"], ["inspect", "--help"], ["compile", "--help"], []])
def test_asking_for_help_loads_nothing_heavy(arguments: list[str]) -> None:
    assert loaded_by(f"from rescompile.cli import main; main({arguments!r})") == set()


def test_the_catalogue_of_passes_loads_no_framework() -> None:
    loaded = loaded_by("from rescompile.cli import main; main(['passes'])")
    assert loaded.isdisjoint({"torch", "onnx", "onnx_ir", "onnxruntime", "tvm"})


def test_a_heavy_library_would_be_noticed() -> None:
    assert "numpy" in loaded_by("import numpy")


def test_every_public_name_can_be_imported() -> None:
    script = "import rescompile; [getattr(rescompile, name) for name in rescompile.__all__]"
    subprocess.run([sys.executable, "-c", script], check=True, capture_output=True)
