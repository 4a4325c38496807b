"""What every test needs before it imports a model library, and fixtures that more than one test file uses."""

from __future__ import annotations

from types import ModuleType

import pytest

from benchmarks.corpus import import_torchvision

_TORCHVISION = import_torchvision()  # transformers imports it too, and would fail where its operators are not declared


@pytest.fixture(scope="session")
def torchvision() -> ModuleType:
    """torchvision, importable beside a torch that its compiled part was not built for."""
    return _TORCHVISION
