"""How far a rewrite that changes the function moves the outputs: on random inputs, at the weights as they are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec
import numpy as np

from rescompile.graph import Graph, Value
from rescompile.kinds import OpKind, Trait

Array = np.ndarray[Any, Any]

_HEADS = (OpKind.LINEAR, OpKind.FUSED_LINEAR)


class Effect(msgspec.Struct, frozen=True):
    """One output before (a) and after (b).

    `cosine`: ⟨a, b⟩ / ‖a‖‖b‖ over all elements. `difference`: max |a − b| / max |a|. `divergence`: the mean of
    KL(softmax a ‖ softmax b) over the last axis, in nats, where the output is made by a linear layer: logits.
    """

    output: str
    cosine: float
    difference: float
    divergence: float | None = None

    def __str__(self) -> str:
        text = f"'{self.output}' cosine {self.cosine:.3f}, largest relative difference {self.difference:.2g}"
        return text if self.divergence is None else f"{text}, KL {self.divergence:.3g}"


def measure_effects(graph: Graph, before: Mapping[str, Array], after: Mapping[str, Array]) -> tuple[Effect, ...]:
    """For each floating-point output of `graph`: `before` are its values, in order, and `after` the rewritten ones."""
    found = []
    for value, old, new in zip(graph.outputs, before.values(), after.values(), strict=True):
        if old.shape != new.shape or not old.size or old.dtype.kind not in "fV":
            continue
        a, b = old.astype(np.float64), new.astype(np.float64)
        largest = float(np.abs(a).max())
        difference = float(np.abs(a - b).max()) / (largest or 1.0)
        divergence = _divergence(a, b) if _is_logits(value) else None
        found.append(Effect(value.name, _cosine(a.ravel(), b.ravel()), difference, divergence))
    return tuple(found)


def _cosine(a: Array, b: Array) -> float:
    lengths = float(np.linalg.norm(a) * np.linalg.norm(b))
    return float(a @ b) / lengths if lengths else float(np.array_equal(a, b))


def _divergence(a: Array, b: Array) -> float:
    old, new = _log_softmax(a), _log_softmax(b)
    return float((np.exp(old) * (old - new)).sum(-1).mean())


def _log_softmax(logits: Array) -> Array:
    moved = logits - logits.max(-1, keepdims=True)
    result: Array = moved - np.log(np.exp(moved).sum(-1, keepdims=True))
    return result


def _is_logits(value: Value) -> bool:
    op = value.producer
    while op is not None and op.has(Trait.FREE):
        op = op.operands[0].producer
    wide = value.shape is not None and len(value.shape) > 1 and value.shape[-1] != 1
    return op is not None and op.kind in _HEADS and wide
