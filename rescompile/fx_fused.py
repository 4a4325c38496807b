"""The fused kinds as torch operations: `rescompile::fused_conv`, `fused_linear`, `add_norm` and `fused_region`.

Importing this module defines them, once. They are composite: torch differentiates, exports, decomposes and compiles
through their bodies, which `rescompile.fused.expand` writes in simpler kinds. A `.pt2` file that holds one needs this
module imported before torch loads it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rescompile.fused import expand
from rescompile.fx_emit import emit
from rescompile.fx_torch import Eager
from rescompile.graph import Attrs
from rescompile.kinds import OpKind

_EAGER = Eager()
_SCHEMAS = (
    "fused_conv(Tensor x, Tensor weight, Tensor? bias, Tensor? residual, SymInt[] stride, SymInt[] pads, "
    "SymInt[] dilation, SymInt groups, str inner, str outer) -> Tensor",
    "fused_linear(Tensor x, Tensor weight, Tensor? bias, Tensor? residual, bool transpose_weight, str inner, "
    "str outer) -> Tensor",
    "add_norm(Tensor x, Tensor residual, Tensor? weight, Tensor? bias, str norm, int axis, float eps) "
    "-> (Tensor, Tensor)",
    "fused_region(Tensor[] x, str label, str steps) -> Tensor[]",
)


def _compute(kind: OpKind, inputs: Sequence[Tensor | None], attrs: Attrs) -> Tensor:
    # A number takes on the type of what it meets, as it does where it stands in a call of its own.
    result: Tensor = attrs["value"] if kind is OpKind.FULL else emit(_EAGER, kind, inputs, attrs)
    return result


def _fused_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    stride: Sequence[int],
    pads: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    inner: str,
    outer: str,
) -> Tensor:
    attrs: dict[str, Any] = {"stride": stride, "pads": pads, "dilation": dilation, "groups": groups}
    attrs.update(inner=inner, outer=outer)
    return expand(OpKind.FUSED_CONV, (x, weight, bias, residual), attrs, _compute)[0]


def _fused_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    transpose_weight: bool,
    inner: str,
    outer: str,
) -> Tensor:
    attrs = {"transpose_weight": transpose_weight, "inner": inner, "outer": outer}
    return expand(OpKind.FUSED_LINEAR, (x, weight, bias, residual), attrs, _compute)[0]


def _add_norm(
    x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, norm: str, axis: int, eps: float
) -> tuple[Tensor, Tensor]:
    attrs = {"norm": norm, "axis": axis, "eps": eps}
    normed, total = expand(OpKind.ADD_NORM, (x, residual, weight, bias), attrs, _compute)
    return normed, total


def _fused_region(x: Sequence[Tensor], label: str, steps: str) -> list[Tensor]:
    return list(expand(OpKind.FUSED_REGION, x, {"label": label, "steps": steps}, _compute))


def _define() -> Any:
    library: Any = torch.library.Library("rescompile", "DEF")  # type: ignore[no-untyped-call]
    for schema, body in zip(_SCHEMAS, (_fused_conv, _fused_linear, _add_norm, _fused_region), strict=True):
        library.define(schema)
        library.impl(schema.partition("(")[0], body, "CompositeImplicitAutograd")
    return library


# Kept alive: the definitions go when the library object does.
_LIBRARY = _define()
