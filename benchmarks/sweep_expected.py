"""What the definitions of architectures say of their residual structure: counts that detection has to reach.

Counted by hand from the library's source, not from what some run gave. Keys are those of the vocabulary: `identity`,
`projection`, `pad`, `pool`, `view` are blocks of kind `add` by their shortcut, the others kinds. A count that is not
named is zero. Nested blocks count.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Expected:
    """Counts of one model; `onnx`: those of the export, where the exporter loses something; `because`: why, or how."""

    counts: dict[str, int]
    onnx: dict[str, int] | None = None
    because: str = ""


def _of(because: str = "", onnx: dict[str, int] | None = None, /, **counts: int) -> Expected:
    return Expected(counts, onnx, because)


EXPECTED: dict[str, Expected] = {}
