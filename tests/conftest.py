"""What every test needs before it imports a model library."""

from __future__ import annotations

import torch

# torchvision's compiled operators are missing beside a CPU build of torch that does not match: it needs their schemas
# only, to be imported. Kept alive: the definitions go when the library object does.
_TORCHVISION = torch.library.Library("torchvision", "DEF")
_TORCHVISION.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
_TORCHVISION.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
