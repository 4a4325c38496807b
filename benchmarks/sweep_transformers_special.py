"""What `benchmarks.sweep_transformers` cannot tell from a model's fields: settings and inputs of single model types."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

# model type → field (dotted into nested configurations) → value, after shrinking
CONFIGS: dict[str, dict[str, Any]] = {}

# model type → its inputs, from its configuration
INPUTS: dict[str, Callable[[Any], dict[str, torch.Tensor]]] = {}
