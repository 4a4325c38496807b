"""What must be there before test modules are imported."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from benchmarks.corpus import import_torchvision

_TORCHVISION = import_torchvision()  # transformers imports it too, and would fail where its operators are not declared


def _declare_torchvision_operators():
    """Two operators that torchvision's import asks for, where its compiled library does not fit the torch installed.

    The result must be kept: the declarations go when it does.
    """
    found = find_spec("torchvision")
    if found is None or found.origin is None or find_spec("torch") is None:
        return None
    import torch

    for library in Path(found.origin).parent.glob("_C*.so"):
        try:
            torch.ops.load_library(library)
        except OSError:
            continue
        return None
    library = torch.library.Library("torchvision", "DEF")
    library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return library


_TORCHVISION = _declare_torchvision_operators()
