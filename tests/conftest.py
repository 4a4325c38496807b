"""Fixtures that more than one test file uses."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="session")
def torchvision():
    """torchvision beside a torch without its compiled operators: two of them must be declared before the import."""
    torch = pytest.importorskip("torch")
    library = torch.library.Library("torchvision", "DEF")
    library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    yield pytest.importorskip("torchvision")
    del library
