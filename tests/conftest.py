"""What every test needs before it imports a model library, and fixtures that more than one test file uses."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import pytest

from benchmarks.corpus import import_torchvision
from rescompile.cli import main
from tests.export_tables import keep_export_tables

_TORCHVISION = import_torchvision()  # transformers imports it too, and would fail where its operators are not declared
keep_export_tables()


@pytest.fixture(scope="session")
def torchvision() -> ModuleType:
    """torchvision, importable beside a torch that its compiled part was not built for."""
    return _TORCHVISION


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Runs the command line: exit code, stdout, stderr."""

    def call(*arguments: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as left:
            main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return int(left.value.code or 0), captured.out, captured.err

    return call
